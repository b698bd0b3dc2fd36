package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd/internal/wire"
)

// States of the context base:allocation.
const (
	StateHole = wire.StateHole // no host space is in use
	StateZero = wire.StateZero // reads as zeroes
)

const (
	maxStatusRuns = 131072
	// statusGrain is the mean length of a run below which a block status reply is cut short rather than allowed to grow:
	// replies with shorter runs would outgrow what they are charged for.
	statusGrain = 512
)

// Context is a metadata context: a client can ask for the state of any part of the export in it.
type Context struct {
	// Name is "namespace:leaf", for example "qemu:dirty-bitmap:b0".
	Name string
	// BlockStatus calls fn for consecutive runs that begin at off, with their lengths and states, until they reach off+n
	// or fn returns false. Neighbouring runs may have the same state.
	BlockStatus func(ctx context.Context, off, n int64, fn func(n int64, state uint32) bool) error
}

func checkContext(have []Context, c Context) error {
	namespace, leaf, ok := strings.Cut(c.Name, ":")
	if !ok || namespace == "" || leaf == "" || len(c.Name) > maxString {
		return fmt.Errorf("%q is no name of a metadata context", c.Name)
	}
	if c.BlockStatus == nil {
		return fmt.Errorf("metadata context %q has no function", c.Name)
	}
	for _, h := range have {
		if h.Name == c.Name {
			return fmt.Errorf("metadata context %q exists already", c.Name)
		}
	}
	return nil
}

// builtinContexts are the contexts that every device has.
func builtinContexts(dev block.Device, o Advertised) []Context {
	list := []Context{{Name: "base:allocation", BlockStatus: extentStates(dev, allocationState)}}
	if !o.NoDepth {
		list = append(list, Context{Name: "qemu:allocation-depth", BlockStatus: extentStates(dev, depthState)})
	}
	return list
}

func allocationState(e block.Extent) uint32 {
	var state uint32
	if !e.Data {
		state |= StateHole
	}
	if e.Zero {
		state |= StateZero
	}
	return state
}

func depthState(e block.Extent) uint32 {
	if !e.Allocated {
		return 0
	}
	return uint32(min(max(e.Depth, 0), math.MaxInt32)) + 1
}

func extentStates(dev block.Device, state func(block.Extent) uint32) func(
	context.Context, int64, int64, func(int64, uint32) bool) error {
	return func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error {
		return dev.Extents(ctx, off, n, func(e block.Extent) bool { return fn(e.Len, state(e)) })
	}
}

// runSize is the length of a run on the wire.
func (c *conn) runSize() int {
	if c.mode == modeExtended {
		return 16
	}
	return 8
}

// maxRuns bounds the runs that a block status reply has in each context.
func (c *conn) maxRuns(h header) int {
	if h.flags&cmdReqOne != 0 {
		return 1
	}
	return int(min(h.length/statusGrain+1, maxStatusRuns))
}

var errNoStatus = errors.New("metadata context reported no state")

// blockStatus fills the reply of a BLOCK_STATUS: a chunk for each selected context.
func (c *conn) blockStatus(r *request) error {
	for i, s := range c.contexts {
		var flags uint16
		if i == len(c.contexts)-1 {
			flags = chunkDone
		}
		chunk, err := c.statusChunk(r.header, s, flags)
		if err != nil {
			return fmt.Errorf("asking for %s: %w", s.Name, err)
		}
		r.vecs = append(r.vecs, chunk)
	}
	return nil
}

// statusChunk makes the chunk of one context.
func (c *conn) statusChunk(h header, s selected, flags uint16) ([]byte, error) {
	m := merger{limit: c.maxRuns(h), left: int64(h.length), emit: c.appendRun}
	fixed := c.mode.chunkSize() + 4
	kind := uint16(chunkStatus)
	if c.mode == modeExtended {
		fixed += 4
		kind = chunkStatusExt
	}
	m.p = make([]byte, fixed, fixed+64)
	if err := s.BlockStatus(c.ctx, int64(h.off), int64(h.length), m.add); err != nil {
		return nil, err
	}
	m.flush()
	if m.count == 0 {
		return nil, errNoStatus
	}
	p := appendChunk(m.p[:0], c.mode, h, flags, kind, len(m.p)-c.mode.chunkSize())
	p = binary.BigEndian.AppendUint32(p, s.id)
	if c.mode == modeExtended {
		binary.BigEndian.AppendUint32(p, uint32(m.count))
	}
	return m.p, nil
}

// appendRun appends a run as it goes over the wire. Its length fits, as it is no longer than the request.
func (c *conn) appendRun(p []byte, n int64, state uint32) []byte {
	if c.mode == modeExtended {
		p = binary.BigEndian.AppendUint64(p, uint64(n))
		return binary.BigEndian.AppendUint64(p, uint64(state))
	}
	p = binary.BigEndian.AppendUint32(p, uint32(n))
	return binary.BigEndian.AppendUint32(p, state)
}

// merger joins neighbouring runs of one state, up to a number of runs and an amount of bytes.
type merger struct {
	p     []byte
	emit  func(p []byte, n int64, state uint32) []byte
	limit int   // runs
	count int   // runs emitted
	left  int64 // bytes not yet covered
	n     int64 // length of the run not yet emitted
	state uint32
}

// add takes the next run and reports whether more are wanted.
func (m *merger) add(n int64, state uint32) bool {
	n = min(n, m.left)
	if n <= 0 {
		return m.left > 0
	}
	if m.n > 0 && m.state != state {
		m.flush()
		if m.count == m.limit {
			return false
		}
	}
	m.state = state
	m.n += n
	m.left -= n
	return m.left > 0
}

// flush emits the run that is being put together.
func (m *merger) flush() {
	if m.n > 0 {
		m.p = m.emit(m.p, m.n, m.state)
		m.count++
		m.n = 0
	}
}
