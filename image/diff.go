package image

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
)

// DiffKind says how a range differs.
type DiffKind uint8

// The kinds of a DiffRange. The first three are about what is read, the last about how it is kept.
const (
	DiffChanged DiffKind = iota // both disks have something else there
	DiffAdded                   // the first reads as zeroes
	DiffRemoved                 // the second reads as zeroes
	DiffStatus                  // the disks keep the range in different ways
)

// String returns a name for output.
func (k DiffKind) String() string {
	return [...]string{"changed", "added", "removed", "status"}[k]
}

// DiffRange is a range in which two disks differ.
type DiffRange struct {
	Off, Len int64
	Kind     DiffKind
	// States are how the disks keep the range, for DiffStatus.
	States [2]string
}

// DiffOptions control Diff.
type DiffOptions struct {
	// Granularity is the unit in bytes in which content is compared and ranges are told; a multiple of 512. 0 means 4096.
	Granularity int64
	// Status compares how ranges are kept (as data, compressed, as zeroes, not at all) and reads nothing.
	Status   bool
	Progress Progress
}

// Diff calls fn for the ranges in which two disks differ, in order; ranges that touch and are of one kind are one. If one
// disk is longer, the other reads as zeroes behind its end. What both disks say is zero is not read, and neither is what both
// take from the same place of the same file.
func Diff(ctx context.Context, a, b block.Device, o DiffOptions, fn func(DiffRange) error) error {
	if o.Granularity == 0 {
		o.Granularity = 4096
	}
	if o.Granularity < sector || o.Granularity%sector != 0 || o.Granularity > pieceSize {
		return fmt.Errorf("granularity %d: must be a multiple of %d and at most %d", o.Granularity, sector, pieceSize)
	}
	d := differ{o: o, fn: fn, devs: [2]block.Device{a, b}, total: max(a.Size(), b.Size())}
	d.cursors = [2]*cursor{newCursor(a), newCursor(b)}
	produce := d.produceData
	if o.Status {
		produce = d.produceStatus
	}
	err := inOrder(ctx, workers(), produce, d.work, d.done)
	if err != nil {
		return err
	}
	return d.tell(DiffRange{})
}

type differ struct {
	o       DiffOptions
	fn      func(DiffRange) error
	devs    [2]block.Device
	cursors [2]*cursor
	total   int64
	pending DiffRange
}

// at returns how both disks keep what begins at off, and where that ends.
func (d *differ) at(off int64) (e [2]block.Extent, end int64, err error) {
	end = d.total
	for i := range e {
		if off >= d.devs[i].Size() {
			e[i] = block.Extent{Off: off, Len: d.total - off, Zero: true}
			continue
		}
		if e[i], err = d.cursors[i].next(context.Background(), off); err != nil {
			return e, 0, &StatusError{i, err}
		}
		end = min(end, e[i].End())
	}
	return e, end, nil
}

// produceData emits pieces to be compared: whole units, but for the end.
func (d *differ) produceData(emit func(*piece) bool) error {
	unit := d.o.Granularity
	most := pieceSize / unit * unit
	for off := int64(0); off < d.total; {
		e, end, err := d.at(off)
		if err != nil {
			return err
		}
		if same := sameBytes(e[0], e[1]); same && (end-off >= unit || end == d.total) {
			n := (end - off) / unit * unit
			if end == d.total {
				n = end - off
			}
			if !emit(&piece{off: off, n: n, kind: compareSkip}) {
				return nil
			}
			off += n
			continue
		}
		// On until something is alike for a unit or more, or the piece is full.
		stop := min(off+most, d.total)
		last := end
		for last < stop {
			next, nextEnd, err := d.at(last)
			if err != nil {
				return err
			}
			if sameBytes(next[0], next[1]) && nextEnd-roundUp(last, unit) >= unit {
				break
			}
			last = nextEnd
		}
		last = min(off+roundUp(last-off, unit), stop)
		if !emit(&piece{off: off, n: last - off, kind: compareBoth}) {
			return nil
		}
		off = last
	}
	return nil
}

// sameBytes reports whether two extents hold the same without being read.
func sameBytes(a, b block.Extent) bool {
	if a.Zero && b.Zero {
		return true
	}
	return a.HasHost && b.HasHost && !a.Zero && !b.Zero && a.File != "" && a.File == b.File && a.Host == b.Host
}

func (d *differ) produceStatus(emit func(*piece) bool) error {
	for off := int64(0); off < d.total; {
		e, end, err := d.at(off)
		if err != nil {
			return err
		}
		p := &piece{off: off, n: end - off, kind: compareSkip}
		var states [2]string
		for i := range states {
			if states[i] = stateName(e[i]); off >= d.devs[i].Size() {
				states[i] = "none"
			}
		}
		if states[0] != states[1] {
			p.found = []DiffRange{{off, end - off, DiffStatus, states}}
		}
		if !emit(p) {
			return nil
		}
		off = end
	}
	return nil
}

func stateName(e block.Extent) string {
	switch {
	case !e.Allocated:
		return "unallocated"
	case e.Compressed:
		return "compressed"
	case e.Zero && e.Data:
		return "reserved"
	case e.Zero:
		return "zero"
	}
	return "data"
}

// work compares a piece.
func (d *differ) work(ctx context.Context, p *piece) error {
	if p.kind == compareSkip {
		return nil
	}
	var read [2][]byte
	for i := range read {
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		read[i] = (*buf)[:p.n]
		inside := max(min(p.n, d.devs[i].Size()-p.off), 0)
		clear(read[i][inside:])
		if inside == 0 {
			continue
		}
		if err := d.devs[i].ReadAt(ctx, read[i][:inside], p.off); err != nil {
			return &ReadError{i, p.off, err}
		}
	}
	for at := int64(0); at < p.n; at += d.o.Granularity {
		end := min(at+d.o.Granularity, p.n)
		x, y := read[0][at:end], read[1][at:end]
		if string(x) == string(y) {
			continue
		}
		kind := DiffChanged
		switch {
		case allZero(x):
			kind = DiffAdded
		case allZero(y):
			kind = DiffRemoved
		}
		p.found = append(p.found, DiffRange{Off: p.off + at, Len: end - at, Kind: kind})
	}
	return nil
}

func (d *differ) done(p *piece) error {
	for _, r := range p.found {
		if err := d.tell(r); err != nil {
			return err
		}
	}
	if d.o.Progress != nil {
		d.o.Progress(p.off+p.n, d.total)
	}
	return nil
}

// tell joins ranges and passes on those that are complete. An empty range ends the last.
func (d *differ) tell(r DiffRange) error {
	last := d.pending
	if last.Len > 0 && last.Off+last.Len == r.Off && last.Kind == r.Kind && last.States == r.States {
		d.pending.Len += r.Len
		return nil
	}
	d.pending = r
	if last.Len == 0 {
		return nil
	}
	return d.fn(last)
}
