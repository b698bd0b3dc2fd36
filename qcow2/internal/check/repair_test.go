package check

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

func contentOf(t testing.TB, f storage.File) []byte {
	t.Helper()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if err := storage.ReadFull(f, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// guestBytes is the disk as qemu-img reads it, or what it says instead.
func guestBytes(t testing.TB, path string) []byte {
	t.Helper()
	_, stderr, code := run(t, "qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, path+".raw")
	if code != 0 {
		return []byte(stderr)
	}
	b, err := os.ReadFile(path + ".raw")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// beyondRepair are the damages after which something stays wrong: what an entry meant, nobody can know.
var beyondRepair = []string{"L1 entry past the end", "L1 entry just past the end", "L1 entry at the last offset",
	"L1 entry points to a refcount block", "L1 entry points to the L1 table", "L2 entry past the end",
	"L2 entry just past the end", "compressed past the end", "compressed, all bits", "all bits", "an L2 table of noise",
	"L1 table past the end", "L1 table in the refcount block", "snapshot table past the end",
	"snapshot L1 unaligned", "snapshot L1 too large", "snapshot L1 larger than the file", "snapshot L1 past the end",
	"bitmap cluster past the end", "bitmap table entry reserved", "bitmap table is the L1 table", "bitmap table past the end",
	"bitmap directory broken", "half of the file", "only the header"}

// lostData are the damages that take guest data away: an entry is gone, or points to something else.
var lostData = append([]string{"L1 entry lost", "L1 entry with only COPIED", "L1 entry with only a reserved bit",
	"L1 entry points to the refcount table", "L2 entry lost", "L2 entry in an incomplete cluster at the end",
	"L2 entry points to an L2 table", "L2 entry points to a refcount block", "compressed from nowhere"}, beyondRepair...)

// noWalk are the damages that no check can see through.
var noWalk = []string{"snapshot table unaligned"}

// newTable are the damages after which the snapshot table lies elsewhere.
var newTable = []string{"snapshot without extra data", "snapshot with too much extra data", "more snapshots than there are",
	"too many snapshots"}

// TestRepairDamage repairs what TestDamage checks. Guest data, snapshots and bitmaps must be there afterwards; what is left
// must be what qemu-img check finds left; and another repair must have nothing to do.
func TestRepairDamage(t *testing.T) {
	if testing.Short() {
		t.Skip("one client after another: the long form shows it")
	}
	for _, cluster := range []int{4096, 65536} {
		r := richImage(cluster)
		dir := t.TempDir()
		path := r.make(t, dir)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want := guestBytes(t, path)
		for _, d := range richDamages {
			t.Run(r.name+"/"+d.name, func(t *testing.T) {
				x := parseImage(t, bytes.Clone(good))
				d.do(x)
				repairOne(t, path, x, d, want)
			})
		}
	}
}

func repairOne(t *testing.T, path string, x *bytesOf, d damage, want []byte) {
	head := bytes.Clone(x.b[:512])
	f := memory(t, x.b)
	rep, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
	if slices.Contains(noWalk, d.name) {
		if err == nil {
			t.Errorf("repaired: %+v", rep)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	now := contentOf(t, f)
	if clean := rep.After.Clean(); clean == slices.Contains(beyondRepair, d.name) {
		t.Errorf("clean: %v\n%s", clean, texts(rep.After))
	}
	if rep.After.CheckErrors != 0 {
		t.Errorf("%d check errors are left", rep.After.CheckErrors)
	}
	if rep.Before.Clean() && rep.Fixed() {
		t.Errorf("nothing was wrong, and %d+%d were repaired", rep.CorruptionsFixed, rep.LeaksFixed)
	}
	if slices.Contains(newTable, d.name) {
		if n := parseImage(t, now).h.SnapshotCount; n != 2 {
			t.Errorf("%d snapshots are left of 2", n)
		}
		copy(head[format.OffSnapshots:][:12], now[format.OffSnapshots:])
	}
	if !bytes.Equal(head[format.OffSnapshots:][:12], now[format.OffSnapshots:][:12]) || !bytes.Equal(head[format.OffAutoclear:], now[format.OffAutoclear:512]) {
		t.Error("the header says something else of snapshots or extensions")
	}
	if err := os.WriteFile(path, now, 0o600); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(lostData, d.name) && !bytes.Equal(guestBytes(t, path), want) {
		t.Error("guest data is not what it was")
	}
	if n, messages, _, ok := stock(t, path, false); d.ours == 0 && (!ok || n != numbersOf(rep.After)) {
		t.Errorf("qemu-img check finds %+v, we %+v\n%.2000s", n, numbersOf(rep.After), messages)
	}
	again, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
	if err != nil || again.Fixed() || !bytes.Equal(contentOf(t, f), now) {
		t.Errorf("the second repair: %v, %+v", err, again)
	}
}

func TestRepairDirty(t *testing.T) {
	dir := t.TempDir()
	path := recipe{name: "crash", create: "-o lazy_refcounts=on 10M"}.make(t, dir)
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 1M", "-c", "flush", "-c", "sigraise 9", path)
	x := load(t, path)
	want := guestBytes(t, path)
	f := memory(t, x.b)
	if _, err := Repair(context.Background(), f, RepairOptions{Mode: RepairLeaks}); !errors.Is(err, ErrDirtyLeaks) {
		t.Errorf("repairing the leaks of a dirty image: %v", err)
	}
	if !bytes.Equal(contentOf(t, f), x.b) {
		t.Error("the refused repair has changed the image")
	}
	rep, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
	if err != nil || !rep.After.Clean() || rep.After.Dirty || rep.CorruptionsFixed != rep.Before.Corruptions/2 { // each with its flag
		t.Errorf("%v, %+v", err, rep)
	}
	if err := os.WriteFile(path, contentOf(t, f), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, messages, code, _ := stock(t, path, false); code != 0 {
		t.Errorf("%+v %s", n, messages)
	}
	if !bytes.Equal(guestBytes(t, path), want) || load(t, path).h.Incompat != 0 {
		t.Error("the repaired image has other data, or is still dirty")
	}
}

func TestRepairLeaks(t *testing.T) {
	x := wholeImage(t)
	x.b = append(x.b, make([]byte, 4<<16)...)
	x.refcount(10<<16, 3)
	x.refcount(13<<16, 1)
	x.refcount(4<<16, 4) // an L2 table of 2 references
	f := memory(t, x.b)
	rep, err := Repair(context.Background(), f, RepairOptions{Mode: RepairLeaks})
	if err != nil || rep.LeaksFixed != 3 || rep.CorruptionsFixed != 0 || !rep.After.Clean() || rep.Truncated != 0 {
		t.Errorf("%v, %+v", err, rep)
	}
	// A leak that hides a COPIED flag: the refcount becomes 1, and the flag must follow.
	x = build(t, plain, 1<<20, 8)
	x.set(x.l1(0), 4<<16)
	x.refcount(4<<16, 2)
	f = memory(t, x.b)
	rep, err = Repair(context.Background(), f, RepairOptions{Mode: RepairLeaks})
	if err != nil || rep.LeaksFixed != 1 || rep.CorruptionsFixed != 1 || !rep.After.Clean() {
		t.Errorf("%v, %+v", err, rep)
	}
	// Leaks beside an entry that leads nowhere stay.
	x = build(t, plain, 1<<20, 8)
	x.set(x.l1(0), 1<<40)
	x.refcount(4<<16, 1)
	f = memory(t, x.b)
	rep, err = Repair(context.Background(), f, RepairOptions{Mode: RepairLeaks})
	if err != nil || rep.Fixed() || rep.LeaksKept != 1 || len(rep.Notes) != 1 || !bytes.Equal(contentOf(t, f), x.b) {
		t.Errorf("%v, %+v", err, rep)
	}
	// Broken refcount structures are no leaks.
	x.set(x.refEntry(0), 0)
	f = memory(t, x.b)
	if _, err := Repair(context.Background(), f, RepairOptions{Mode: RepairLeaks}); !errors.Is(err, ErrNeedRebuild) {
		t.Errorf("repairing leaks without refcounts: %v", err)
	}
}

// TestRepairBeforePowerFails looks at every state that a power cut during a repair can leave. Each must be repaired to the
// same end, and nothing that could be reached may be gone.
func TestRepairBeforePowerFails(t *testing.T) {
	for _, d := range crashDamages() {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			x := d.make(t)
			base := storage.NewMemFile("damaged")
			if _, err := base.WriteAt(x.b, 0); err != nil {
				t.Fatal(err)
			}
			file := storage.NewCrashFile(base)
			whole, err := Repair(context.Background(), file, RepairOptions{Mode: RepairAll})
			if err != nil || !whole.After.Clean() {
				t.Fatalf("%v, %+v\n%s", err, whole, texts(whole.After))
			}
			final := contentOf(t, file)
			want, wrong := reachable(t, final), wrongCounts(t, x.b)
			states := 0
			err = file.Explorer().Explore(storage.ExploreOptions{Exhaustive: 6, PerFamily: 12, Samples: 12}, func(s storage.CrashState) error {
				states++
				now := contentOf(t, s.Image)
				if got := wrongCounts(t, now); got > wrong {
					return fmt.Errorf("%d refcounts are too low, before the repair %d", got, wrong)
				}
				if x.l.Version >= format.Version3 && now[format.OffIncompat+7] == 0 && !bytes.Equal(now, x.b) && !bytes.Equal(now, final) {
					return errors.New("the image is neither as before nor as after the repair, and does not say so")
				}
				rep, err := Repair(context.Background(), s.Image, RepairOptions{Mode: RepairAll})
				if err != nil {
					return err
				}
				if !rep.After.Clean() || rep.After.Dirty {
					return errors.New("not repaired:\n" + texts(rep.After))
				}
				if !slices.Equal(reachable(t, contentOf(t, s.Image)), want) {
					return errors.New("the tables have other entries")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d states", states)
		})
	}
}

// wrongCounts returns how many corruptions there are that are no COPIED flags.
func wrongCounts(t testing.TB, b []byte) int64 {
	t.Helper()
	c := newChecker(context.Background(), memory(t, b), Options{})
	if err := errors.Join(c.open(), c.run()); err != nil {
		t.Fatal(err)
	}
	return c.rep.Corruptions - c.copied
}

// TestRepairKeepsDirty: what is not sound after a repair stays dirty and corrupt.
func TestRepairKeepsDirty(t *testing.T) {
	x := build(t, plain, 1<<30, 8)
	x.set(x.l1(0), 4<<16) // without COPIED, which can be repaired
	x.refcount(4<<16, 1)
	x.set(x.l1(1), 1<<50) // nowhere, which cannot
	x.b[format.OffIncompat+7] = 3
	f := memory(t, x.b)
	rep, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
	if err != nil || rep.CorruptionsFixed != 1 || rep.After.Corruptions != 1 || !rep.After.Dirty || !rep.After.Corrupt {
		t.Errorf("%v, %+v", err, rep)
	}
	if got := parseImage(t, contentOf(t, f)).h.Incompat; got != 3 {
		t.Errorf("features %#x after a repair that left an error", got)
	}
	// A bit that the repair itself set goes when the repair is done.
	x.b[format.OffIncompat+7] = 0
	f = memory(t, x.b)
	if rep, err = Repair(context.Background(), f, RepairOptions{Mode: RepairAll}); err != nil || rep.CorruptionsFixed != 1 {
		t.Errorf("%v, %+v", err, rep)
	}
	if got := parseImage(t, contentOf(t, f)).h.Incompat; got != 0 {
		t.Errorf("features %#x", got)
	}
}

// TestRepairKeepsSubclusters: where a subcluster says both, the data stays, and so do all others.
func TestRepairKeepsSubclusters(t *testing.T) {
	l := format.Layout{ClusterBits: 14, RefcountOrder: 4, Version: 3, ExtendedL2: true}
	x := build(t, l, 1<<20, 8)
	x.set(x.l1(0), 1<<63|4<<14)
	x.set(4<<14, 1<<63|5<<14)
	x.set(4<<14+8, 0x8000_0003_0000_000d)
	x.refcount(4<<14, 1)
	x.refcount(5<<14, 1)
	f := memory(t, x.b)
	rep, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
	if err != nil || !rep.After.Clean() || rep.CorruptionsFixed != 1 {
		t.Fatalf("%v, %+v", err, rep)
	}
	if got := parseImage(t, contentOf(t, f)).word(4<<14 + 8); got != 0x8000_0002_0000_000d {
		t.Errorf("the bitmap is %#x", got)
	}
}

// TestRepairCannotCountTwo: with refcounts of one bit the second reference to a cluster does not show in its count. What is
// a refcount block and the L1 table too must not be written as a block.
func TestRepairCannotCountTwo(t *testing.T) {
	x := build(t, format.Layout{ClusterBits: 12, RefcountOrder: 0, Version: 3}, 64<<10, 8)
	x.set(x.l1(0), 1<<63|4<<12)
	x.set(4<<12, 1<<63|5<<12)
	x.set(x.refEntry(0), uint64(x.h.L1Offset))
	f := memory(t, x.b)
	rep, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
	if err != nil || !rep.After.Clean() || !rep.Rebuilt {
		t.Errorf("%v, %+v", err, rep)
	}
	if now := parseImage(t, contentOf(t, f)); now.word(now.l1(0)) != x.word(x.l1(0)) || now.word(4<<12) != x.word(4<<12) {
		t.Error("the L1 table was written over")
	}
}

// TestRepairSnapshotTable damages an entry of the snapshot table. Whatever a power cut leaves of the repair, the next one
// finds the snapshots.
func TestRepairSnapshotTable(t *testing.T) {
	for name, extra := range map[string]uint32{"short": 8, "long": 2000, "none": 0, "too long for any table": 1 << 31} {
		x := wholeImage(t)
		x.set32(x.h.SnapshotsOffset+36, extra)
		base := storage.NewMemFile("damaged")
		if _, err := base.WriteAt(x.b, 0); err != nil {
			t.Fatal(err)
		}
		file := storage.NewCrashFile(base)
		rep, err := Repair(context.Background(), file, RepairOptions{Mode: RepairAll})
		if err != nil || !rep.After.Clean() || rep.CorruptionsFixed == 0 {
			t.Fatalf("%s: %v, %+v", name, err, rep)
		}
		err = file.Explorer().Explore(storage.ExploreOptions{Exhaustive: 8}, func(s storage.CrashState) error {
			rep, err := Repair(context.Background(), s.Image, RepairOptions{Mode: RepairAll})
			if err != nil || !rep.After.Clean() {
				return fmt.Errorf("not repaired: %+v (%w)", rep, err)
			}
			now := parseImage(t, contentOf(t, s.Image))
			list, _, err := format.ParseSnapshots(now.b[now.h.SnapshotsOffset:], int(now.h.SnapshotCount), now.h)
			if err != nil || len(list) != 1 || list[0].Name != "s" || list[0].L1Offset != 5<<16 || list[0].ExtraSize < 16 {
				return fmt.Errorf("the snapshots are %+v (%w)", list, err)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// reachable lists what the tables of an image say, flags left aside: L1 entries, and for each the entries of its table.
func reachable(t testing.TB, b []byte) []uint64 {
	t.Helper()
	x := parseImage(t, b)
	out := []uint64{uint64(x.h.SnapshotCount), uint64(x.h.SnapshotsOffset)}
	const copied = 1 << 63
	for i := range int64(x.h.L1Size) {
		e := format.L1Entry(x.word(x.l1(i)))
		out = append(out, uint64(e)&^copied)
		if e.Offset() == 0 {
			continue
		}
		for k := range x.l.L2Entries() * x.l.L2EntrySize() / 8 {
			out = append(out, x.word(e.Offset()+format.HostOff(8*k))&^copied)
		}
	}
	return out
}

type crashDamage struct {
	name string
	make func(t testing.TB) *bytesOf
}

// leakyDamage is one that is repaired by a change of refcounts in their blocks.
func leakyDamage(t testing.TB) *bytesOf {
	t.Helper()
	for _, d := range crashDamages() {
		if strings.HasSuffix(d.name, " leaks") {
			return d.make(t)
		}
	}
	t.Fatal("no such damage")
	return nil
}

// crashDamages are damages of an image that a test makes without tools, for both versions.
func crashDamages() []crashDamage {
	var list []crashDamage
	for _, l := range []format.Layout{{ClusterBits: 12, RefcountOrder: 4, Version: 3}, {ClusterBits: 12, RefcountOrder: 4, Version: 2},
		{ClusterBits: 9, RefcountOrder: 6, Version: 3}} {
		for name, do := range map[string]func(x *bytesOf){
			"leaks":       func(x *bytesOf) { x.refcount(6<<l.ClusterBits, 3); x.refcount(12<<l.ClusterBits, 1) },
			"too low":     func(x *bytesOf) { x.set(x.l2(0), x.word(x.l2(2<<l.ClusterBits))) },
			"flags":       func(x *bytesOf) { x.xor(x.l2(0), 1<<63); x.xor(x.l1(0), 1<<63) },
			"zero":        func(x *bytesOf) { x.refcount(6<<l.ClusterBits, 0); x.refcount(0, 0) },
			"no block":    func(x *bytesOf) { x.set(x.refEntry(0), 0) },
			"block is L2": func(x *bytesOf) { x.set(x.refEntry(0), x.word(x.l1(0))&^(1<<63)) },
			"odd block":   func(x *bytesOf) { x.xor(x.refEntry(0), 6) },
			"no table":    func(x *bytesOf) { x.set32(format.OffRefTable+8, 0) },
			"some of each": func(x *bytesOf) {
				x.refcount(6<<l.ClusterBits, 0)
				x.refcount(7<<l.ClusterBits, 5)
				x.xor(x.l2(0), 1<<63)
			},
		} {
			list = append(list, crashDamage{x0(l) + " " + name, func(t testing.TB) *bytesOf {
				x := build(t, l, 64<<10, 14)
				x.set(x.l1(0), 1<<63|5<<l.ClusterBits)
				for i := range uint64(5) {
					x.set(5<<l.ClusterBits+format.HostOff(8*i), 1<<63|(6+i)<<l.ClusterBits)
				}
				for i := range format.HostOff(6) {
					x.refcount((5+i)<<l.ClusterBits, 1)
				}
				x.refcount(11<<l.ClusterBits, 1)
				x.set(x.l2(format.GuestOff(9<<l.ClusterBits)), 1<<63|11<<l.ClusterBits)
				do(x)
				return x
			}})
		}
	}
	return list
}

func x0(l format.Layout) string {
	if l.Version == format.Version2 {
		return "version 2"
	}
	return map[uint8]string{9: "512", 12: "4k"}[l.ClusterBits]
}
