package image

import (
	"bytes"
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
)

// Verdict is the outcome of a comparison.
type Verdict uint8

// The verdicts.
const (
	Identical Verdict = iota
	ContentDiffers
	StatusDiffers // the images keep a range in different ways (strict only)
	SizeDiffers   // strict only
)

// CompareOptions control a comparison.
type CompareOptions struct {
	// Strict wants the same size, and every range to be kept in the same way: as data, as zeroes, compressed, not at all.
	Strict   bool
	Progress Progress
}

// Comparison is what a comparison found.
type Comparison struct {
	Verdict Verdict
	// Off is where the images differ: the first sector, or the beginning of the range.
	Off int64
	// Longer: what both images have is the same, and one of them is longer. The images are identical if the rest reads as
	// zeroes.
	Longer bool
}

// ReadError says that one of the devices of an operation could not be read.
type ReadError struct {
	Dev int // the first is 0
	Off int64
	Err error
}

func (e *ReadError) Error() string { return fmt.Sprintf("reading at offset %d: %v", e.Off, e.Err) }

// Unwrap returns the cause.
func (e *ReadError) Unwrap() error { return e.Err }

// StatusError says that one of the devices of an operation could not tell where its data lies.
type StatusError struct {
	Dev int
	Err error
}

func (e *StatusError) Error() string { return fmt.Sprintf("finding out what is allocated: %v", e.Err) }

// Unwrap returns the cause.
func (e *StatusError) Unwrap() error { return e.Err }

// difference ends a comparison.
type difference struct {
	verdict Verdict
	off     int64
}

func (d *difference) Error() string { return fmt.Sprintf("difference at offset %d", d.off) }

const sector = 512

// What has to be done with a piece.
const (
	compareBoth uint8 = iota
	compareFirst
	compareSecond // one of them alone, with zeroes
	compareSkip
)

// Compare compares two disks. What both say is zero is not read. It finds the first difference, whatever order the disks are read in.
func Compare(ctx context.Context, a, b block.Device, o CompareOptions) (Comparison, error) {
	var r Comparison
	if o.Strict && a.Size() != b.Size() {
		return Comparison{Verdict: SizeDiffers}, nil
	}
	c := comparer{o: o, devs: [2]block.Device{a, b}, both: min(a.Size(), b.Size()), total: max(a.Size(), b.Size())}
	c.cursors = [2]*cursor{newCursor(a), newCursor(b)}
	err := inOrder(ctx, workers(), c.produceBoth, c.work, c.done)
	if err == nil && c.both < c.total {
		r.Longer = true
		err = inOrder(ctx, workers(), c.produceRest, c.work, c.done)
	}
	if d, ok := err.(*difference); ok {
		r.Verdict, r.Off = d.verdict, d.off
		return r, nil
	}
	return r, err
}

type comparer struct {
	o           CompareOptions
	devs        [2]block.Device
	cursors     [2]*cursor
	both, total int64 // where the shorter disk ends, and the longer one
}

// done reports progress.
func (c *comparer) done(p *piece) error {
	if c.o.Progress != nil {
		c.o.Progress(p.off+p.n, c.total)
	}
	return nil
}

// produceBoth walks what both disks have.
func (c *comparer) produceBoth(emit func(*piece) bool) error {
	for off := int64(0); off < c.both; {
		var e [2]block.Extent
		n := c.both - off
		for i := range e {
			var err error
			if e[i], err = c.cursors[i].next(context.Background(), off); err != nil {
				return &StatusError{i, err}
			}
			n = min(n, e[i].Len)
		}
		if c.o.Strict && !sameStatus(e[0], e[1]) {
			return &difference{StatusDiffers, off}
		}
		if !emitPieces(emit, off, n, whatToCompare(e[0], e[1])) {
			return nil
		}
		off += n
	}
	return nil
}

// sameStatus reports whether two disks keep a range in the same way.
func sameStatus(a, b block.Extent) bool {
	return a.Data == b.Data && a.Allocated == b.Allocated && a.Zero == b.Zero && a.HasHost == b.HasHost
}

// comparePiece is how much one goroutine compares, and compareStep how much of it at a time: what two of those take fits into
// a processor's cache.
const (
	comparePiece = 4 << 20
	compareStep  = 256 << 10
)

// emitPieces cuts a range into pieces.
func emitPieces(emit func(*piece) bool, off, n int64, kind uint8) bool {
	if kind == compareSkip {
		return emit(&piece{off: off, n: n, kind: kind})
	}
	for end := off + n; off < end; off += comparePiece {
		if !emit(&piece{off: off, n: min(comparePiece, end-off), kind: kind}) {
			return false
		}
	}
	return true
}

func whatToCompare(a, b block.Extent) uint8 {
	switch {
	case a.Zero && b.Zero:
		return compareSkip
	case a.Zero:
		return compareSecond
	case b.Zero:
		return compareFirst
	}
	return compareBoth
}

// produceRest walks what only the longer disk has.
func (c *comparer) produceRest(emit func(*piece) bool) error {
	i := 0
	if c.devs[1].Size() == c.total {
		i = 1
	}
	for off := c.both; off < c.total; {
		e, err := c.cursors[i].next(context.Background(), off)
		if err != nil {
			return &StatusError{i, err}
		}
		n := min(e.Len, c.total-off)
		kind := compareFirst + uint8(i)
		if e.Zero {
			kind = compareSkip
		}
		if !emitPieces(emit, off, n, kind) {
			return nil
		}
		off += n
	}
	return nil
}

func (c *comparer) work(ctx context.Context, p *piece) error {
	if p.kind == compareSkip {
		return nil
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for at := int64(0); at < p.n; at += compareStep {
		if err := c.step(ctx, *buf, p.kind, p.off+at, min(compareStep, p.n-at)); err != nil {
			return err
		}
	}
	return nil
}

// step compares n bytes.
func (c *comparer) step(ctx context.Context, buf []byte, kind uint8, off, n int64) error {
	var read [2][]byte
	for i := range read {
		if kind == compareFirst && i == 1 || kind == compareSecond && i == 0 {
			continue
		}
		read[i] = buf[i*compareStep:][:n]
		if err := c.devs[i].ReadAt(ctx, read[i], off); err != nil {
			return &ReadError{i, off, err}
		}
	}
	if same(read, 0, int(n)) {
		return nil
	}
	for at := 0; at < int(n); at += sector {
		if !same(read, at, min(at+sector, int(n))) {
			return &difference{ContentDiffers, off + int64(at)}
		}
	}
	return nil
}

// same reports whether both read the same in a range; what was not read is zeroes.
func same(read [2][]byte, at, end int) bool {
	switch {
	case read[0] == nil:
		return allZero(read[1][at:end])
	case read[1] == nil:
		return allZero(read[0][at:end])
	}
	return bytes.Equal(read[0][at:end], read[1][at:end])
}
