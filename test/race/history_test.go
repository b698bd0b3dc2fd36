package race

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

const sectorSize = 512

// value names what a sector holds: 0 for zeroes, initial for what the image held at first, else the number of the one
// request that wrote it.
type value uint32

const initial value = 1

// stamp fills sectors from the given one on with a value. Each word says which sector it belongs to as well, so that bytes of
// another cluster are recognized whoever wrote them.
func stamp(p []byte, sector int64, v value) {
	for ; len(p) > 0; p, sector = p[sectorSize:], sector+1 {
		for i := 0; i < sectorSize; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], uint64(v)<<32|uint64(sector))
		}
	}
}

// errTorn says that a sector holds parts of two writes.
type errTorn struct{ sector int64 }

func (e errTorn) Error() string { return fmt.Sprintf("sector %d holds parts of two writes", e.sector) }

// unstamp returns the value of one sector's bytes.
func unstamp(p []byte, sector int64) (value, error) {
	first := binary.LittleEndian.Uint64(p)
	for i := 8; i < sectorSize; i += 8 {
		if binary.LittleEndian.Uint64(p[i:]) != first {
			return 0, errTorn{sector}
		}
	}
	if first == 0 {
		return 0, nil
	}
	if int64(first&(1<<32-1)) != sector || first>>32 == 0 {
		return 0, fmt.Errorf("sector %d holds what was written to sector %d (value %#x)", sector, first&(1<<32-1), first>>32)
	}
	return value(first >> 32), nil
}

// action is what a request does to a sector.
type action uint8

const (
	actRead    action = iota
	actSet            // the sector holds the value afterwards
	actMaybe          // the sector holds the value, or what it held before (a discard, or a request that failed)
	actUnknown        // a read whose answer says nothing
)

func (a action) String() string { return [...]string{"read", "set", "maybe set", "unknown"}[a] }

// request is one call that a client made.
type request struct {
	client    int
	name      string
	act       action
	v         value // actSet, actMaybe
	sector, n int64
	got       []value // actRead; actSet of a value for each sector (v is not used then)
	call, ret int64
}

func (r *request) covers(sector int64) bool { return sector >= r.sector && sector < r.sector+r.n }

// clock gives times on one scale. It is the monotonic clock and no counter: a counter that all clients share would order
// them in the eyes of the race detector.
type clock struct{ start time.Time }

func (c clock) now() int64 { return int64(time.Since(c.start)) }

// step is one request as one sector sees it.
type step struct {
	act action
	v   value
}

// model is a sector: a register whose content may, after actMaybe, be one of two.
func model(first value) porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{first} },
		Step: func(state, input, _ any) []any {
			held, s := state.(value), input.(step)
			switch s.act {
			case actRead:
				if s.v != held {
					return nil
				}
			case actSet:
				return []any{s.v}
			case actMaybe:
				if s.v != held {
					return []any{held, s.v}
				}
			}
			return []any{held}
		},
		Equal: func(a, b any) bool { return a == b },
		DescribeOperation: func(input, _ any) string {
			return fmt.Sprintf("%v %#x", input.(step).act, input.(step).v)
		},
	}
	return m.ToModel()
}

// Longest time that porcupine may think about one sector: far more than it ever needs.
const judgeLimit = 2 * time.Minute

func linearizable(first value, ops []porcupine.Operation) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(model(first), ops, judgeLimit)
}

// sectorHistory is what one sector saw, in order of calls.
func sectorHistory(all []*request, sector int64) ([]*request, []porcupine.Operation) {
	var seen []*request
	for _, r := range all {
		if r.covers(sector) && r.act != actUnknown {
			seen = append(seen, r)
		}
	}
	sort.SliceStable(seen, func(i, j int) bool { return seen[i].call < seen[j].call })
	return seen, operations(seen, sector)
}

func operations(seen []*request, sector int64) []porcupine.Operation {
	ops := make([]porcupine.Operation, len(seen))
	for i, r := range seen {
		s := step{r.act, r.v}
		if r.got != nil {
			s.v = r.got[sector-r.sector]
		}
		ops[i] = porcupine.Operation{ClientId: r.client, Input: s, Call: r.call, Return: r.ret}
	}
	return ops
}

// judge returns why a sector's history has no explanation, "" if it has one.
func judge(all []*request, sector int64, first value) string {
	seen, ops := sectorHistory(all, sector)
	switch linearizable(first, ops) {
	case porcupine.Ok:
		return ""
	case porcupine.Unknown:
		return fmt.Sprintf("sector %d: no verdict about %d requests within %v", sector, len(ops), judgeLimit)
	}
	return explain(seen, sector, first)
}

// explain finds the first read that no order explains, given all writes and the reads that ended before it, and describes
// what surrounds it.
func explain(seen []*request, sector int64, first value) string {
	reads := slices.DeleteFunc(slices.Clone(seen), func(r *request) bool { return r.act != actRead })
	sort.SliceStable(reads, func(i, j int) bool { return reads[i].ret < reads[j].ret })
	n := sort.Search(len(reads), func(k int) bool {
		some := slices.DeleteFunc(slices.Clone(seen), func(r *request) bool {
			return r.act == actRead && !slices.Contains(reads[:k+1], r)
		})
		return linearizable(first, operations(some, sector)) != porcupine.Ok
	})
	var b strings.Builder
	fmt.Fprintf(&b, "sector %d: no order of the requests explains what was read; first impossible answer marked:\n", sector)
	at := 0
	for i, r := range seen {
		if n < len(reads) && r == reads[n] {
			at = i
		}
	}
	for i := max(0, at-40); i < min(len(seen), at+15); i++ {
		r := seen[i]
		mark, v := "  ", r.v
		if n < len(reads) && r == reads[n] {
			mark = "=>"
		}
		if r.got != nil {
			v = r.got[sector-r.sector]
		}
		fmt.Fprintf(&b, "%s [%10d %10d] client %2d %-12s sectors %d+%d: %v %#x\n", mark, r.call, r.ret, r.client, r.name,
			r.sector, r.n, r.act, v)
	}
	return b.String()
}

// impossible returns why a read cannot be right whatever the order, "" if it can: each value must come from a request that
// wrote that sector and had begun by then.
func impossible(all []*request) string {
	writers := make(map[value]*request)
	for _, r := range all {
		if r.act != actRead && r.v > initial {
			writers[r.v] = r
		}
	}
	for _, r := range all {
		if r.act != actRead {
			continue
		}
		for i, v := range r.got {
			sector := r.sector + int64(i)
			if v <= initial {
				continue
			}
			if w := writers[v]; w == nil || !w.covers(sector) || w.call > r.ret {
				return fmt.Sprintf("client %d read value %#x in sector %d, which nobody had written there", r.client, v, sector)
			}
		}
	}
	return ""
}

// TestJudge shows that the judge tells right from wrong.
func TestJudge(t *testing.T) {
	const s = 9
	op := func(act action, v value, call, ret int64) *request {
		r := &request{act: act, v: v, sector: s - 1, n: 3, call: call, ret: ret}
		if act == actRead {
			r.got = []value{0, v, 0}
		}
		return r
	}
	for _, c := range []struct {
		name string
		all  []*request
		bad  bool
	}{
		{"nothing", nil, false},
		{"reads what it held", []*request{op(actRead, initial, 0, 1)}, false},
		{"reads what nobody wrote", []*request{op(actRead, 5, 0, 1)}, true},
		{"overlapping write is seen or not", []*request{op(actSet, 5, 0, 9), op(actRead, initial, 1, 2), op(actRead, 5, 3, 4)}, false},
		{"overlapping write is seen and gone", []*request{op(actSet, 5, 0, 9), op(actRead, 5, 1, 2), op(actRead, initial, 3, 4)}, true},
		{"lost write", []*request{op(actSet, 5, 0, 1), op(actRead, initial, 2, 3)}, true},
		{"discard does nothing", []*request{op(actMaybe, 0, 0, 1), op(actRead, initial, 2, 3)}, false},
		{"discard zeroes", []*request{op(actMaybe, 0, 0, 1), op(actRead, 0, 2, 3)}, false},
		{"discard changes its mind", []*request{op(actMaybe, 0, 0, 1), op(actRead, 0, 2, 3), op(actRead, initial, 4, 5)}, true},
		{"old value comes back", []*request{op(actSet, 5, 0, 1), op(actSet, 6, 2, 3), op(actRead, 5, 4, 5)}, true},
	} {
		if why := judge(c.all, s, initial); (why != "") != c.bad {
			t.Errorf("%s: judged %q", c.name, why)
		}
	}
	p := make([]byte, 2*sectorSize)
	stamp(p, 7, 5)
	if v, err := unstamp(p[sectorSize:], 8); v != 5 || err != nil {
		t.Errorf("unstamp: %v %v", v, err)
	}
	if _, err := unstamp(p, 8); err == nil {
		t.Error("another sector's bytes pass")
	}
	p[9]++
	if _, err := unstamp(p, 7); err == nil {
		t.Error("a torn sector passes")
	}
}
