package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
)

// MaxSparse is the largest unit of zero detection.
const MaxSparse = 16 << 20

// ConvertOptions control how a disk is copied to another.
type ConvertOptions struct {
	// Compress writes compressed clusters; the target is then a block.CompressedWriter with clusters of ClusterSize.
	Compress    bool
	ClusterSize int64
	// Sparse is the unit in which zeroes in data are found and left out, a multiple of 512; 0 writes every byte out.
	Sparse int64
	// Zero: the target reads as zeroes, so that zeroes need not be written.
	Zero bool
	// Backed: the target has a backing disk of BackingSize, the same as the one below the source. What the source does not
	// allocate itself stays unallocated.
	Backed      bool
	BackingSize int64
	// Workers is how many pieces are in hand at a time; OutOfOrder also writes them as they come.
	Workers    int
	OutOfOrder bool
	// Offload has the host copy data inside the kernel where it can, zeroes in it and all. Without it, too, space is shared
	// between source and target where the file system can do that.
	Offload bool
	// Rate bounds how many bytes are written in a second; 0 means no bound.
	Rate int64
	// Salvage, if not nil, is told of sectors that cannot be read, and the target gets zeroes there.
	Salvage  func(off int64, err error)
	Progress Progress
}

// WriteError says that the target of an operation could not be written.
type WriteError struct {
	Off int64
	Err error
}

func (e *WriteError) Error() string { return fmt.Sprintf("writing at offset %d: %v", e.Off, e.Err) }

// Unwrap returns the cause.
func (e *WriteError) Unwrap() error { return e.Err }

// What has to be done with a piece.
const (
	convertData uint8 = iota
	convertZero
	convertKeep // the target reads right as it is
)

// Convert copies disks, one after another, to the beginning of a target, and makes everything durable. Data is read by
// several workers at once, in pieces; it is written in order, so that the target is laid out in order, unless OutOfOrder.
func Convert(ctx context.Context, target block.Device, sources []block.Device, o ConvertOptions) error {
	c := &converter{o: o, target: target, sources: sources}
	for _, s := range sources {
		c.starts = append(c.starts, c.total)
		c.total += s.Size()
	}
	if c.total > target.Size() {
		return fmt.Errorf("the target has %d bytes, and %d are to be written: %w", target.Size(), c.total, block.ErrOutOfRange)
	}
	c.align = 1
	if o.Compress {
		var ok bool
		if c.compressed, ok = target.(block.CompressedWriter); !ok {
			return block.ErrNoCompression
		}
		c.align = max(o.ClusterSize, 1)
	}
	c.piece = max(pieceSize, c.align, o.Sparse)
	c.pace = newPace(o.Rate)
	if !o.Compress && o.Salvage == nil && (o.Offload || o.Sparse > 0) { // with Sparse 0 the target gets space of its own
		c.offload = newOffload(target, sources, o.Offload)
	}
	produce := func(emit func(*piece) bool) error { return c.produce(ctx, emit) }
	done := func(p *piece) error { return c.done(ctx, p) }
	if err := inOrder(ctx, max(o.Workers, 1), produce, c.work, done); err != nil {
		return err
	}
	if err := target.Flush(ctx); err != nil {
		return fmt.Errorf("making the target durable: %w", err)
	}
	return nil
}

type converter struct {
	o            ConvertOptions
	target       block.Device
	compressed   block.CompressedWriter
	sources      []block.Device
	starts       []int64 // where the sources begin in the target
	total        int64
	align, piece int64
	pace         pace
	offload      *offload // nil: everything is read and written
}

// produce cuts the sources into pieces that start and end at whole clusters where the target is compressed. Offsets of
// pieces are those of the source. A cluster that sources share is read from both, see read.
func (c *converter) produce(ctx context.Context, emit func(*piece) bool) error {
	cursors := make([]*cursor, len(c.sources))
	for i, s := range c.sources {
		cursors[i] = newCursor(s)
	}
	for off := int64(0); off < c.total; {
		p, err := c.next(ctx, cursors, off)
		if err != nil {
			return err
		}
		if !emit(p) {
			return nil
		}
		off += p.n
	}
	return nil
}

// next returns the piece that begins at an offset of the target, which is a multiple of align.
func (c *converter) next(ctx context.Context, cursors []*cursor, off int64) (*piece, error) {
	kind, end, err := c.state(ctx, cursors, off)
	if err != nil {
		return nil, err
	}
	if kind != convertData {
		if end < c.total {
			end = end / c.align * c.align
		}
		if end > off {
			return &piece{off: off, n: end - off, kind: kind}, nil
		}
		end = off + 1 // the cluster has data further on
	}
	most := min(off+c.piece, c.total)
	up := func(end int64) int64 { return min((end+c.align-1)/c.align*c.align, most) }
	for end = up(end); end < most; end = up(end) {
		if kind, end, err = c.following(ctx, cursors, end); err != nil {
			return nil, err
		}
		if kind != convertData {
			break
		}
	}
	return &piece{off: off, n: end - off, kind: convertData}, nil
}

// following is state, but for what is not data it returns where that begins.
func (c *converter) following(ctx context.Context, cursors []*cursor, off int64) (uint8, int64, error) {
	kind, end, err := c.state(ctx, cursors, off)
	if kind != convertData {
		end = off
	}
	return kind, end, err
}

// sourceAt returns the source that holds an offset of the target.
func (c *converter) sourceAt(off int64) int {
	i := len(c.starts) - 1
	for c.starts[i] > off || c.sources[i].Size() == 0 {
		i--
	}
	return i
}

// state tells what is at an offset of the target, and up to where.
func (c *converter) state(ctx context.Context, cursors []*cursor, off int64) (uint8, int64, error) {
	i := c.sourceAt(off)
	e, err := cursors[i].next(ctx, off-c.starts[i])
	if err != nil {
		return 0, 0, &StatusError{i, err}
	}
	end := min(e.End(), c.sources[i].Size()) + c.starts[i]
	switch {
	case c.o.Backed && e.Depth > 0:
		return convertKeep, end, nil
	case e.Zero && c.o.Sparse > 0:
		return convertZero, end, nil
	}
	return convertData, end, nil
}

// work reads a piece, and writes it if order does not matter.
func (c *converter) work(ctx context.Context, p *piece) error {
	if p.kind == convertData {
		if err := c.locate(ctx, p); err != nil {
			return err
		}
		if p.host == nil {
			if err := c.read(ctx, p); err != nil {
				return err
			}
		}
	}
	if c.o.OutOfOrder {
		return c.write(ctx, p)
	}
	return nil
}

// locate finds out whether the host can copy a piece.
func (c *converter) locate(ctx context.Context, p *piece) (err error) {
	if c.offload == nil {
		return nil
	}
	i := c.sourceAt(p.off)
	from := p.off - c.starts[i]
	if from+p.n > c.sources[i].Size() {
		return nil // it is in two sources
	}
	p.host, err = c.offload.find(ctx, i, from, p.n)
	return err
}

// done writes a piece, if that has not been done, and reports progress.
func (c *converter) done(ctx context.Context, p *piece) error {
	if !c.o.OutOfOrder {
		if err := c.write(ctx, p); err != nil {
			return err
		}
	}
	if c.o.Progress != nil {
		c.o.Progress(p.off+p.n, c.total)
	}
	if p.kind == convertData {
		return c.pace.spend(ctx, p.n)
	}
	return nil
}

// read fills a piece, from several sources where they meet in it.
func (c *converter) read(ctx context.Context, p *piece) error {
	if p.n > pieceSize {
		b := make([]byte, p.n)
		p.buf = &b
	} else {
		p.buf = buffers.Get().(*[]byte)
	}
	buf := (*p.buf)[:p.n]
	for at := int64(0); at < p.n; {
		i := c.sourceAt(p.off + at)
		from := p.off + at - c.starts[i]
		n := min(p.n-at, c.sources[i].Size()-from)
		part := buf[at : at+n]
		if err := c.sources[i].ReadAt(ctx, part, from); err != nil {
			if c.o.Salvage == nil || ctx.Err() != nil || errors.Is(err, block.ErrClosed) {
				return &ReadError{i, p.off + at, err}
			}
			c.salvage(ctx, i, part, from)
		}
		at += n
	}
	return nil
}

// salvage reads sector by sector.
func (c *converter) salvage(ctx context.Context, i int, p []byte, off int64) {
	for at := int64(0); at < int64(len(p)); at += sector {
		part := p[at:min(at+sector, int64(len(p)))]
		if err := c.sources[i].ReadAt(ctx, part, off+at); err != nil {
			clear(part)
			c.o.Salvage(c.starts[i]+off+at, err)
		}
	}
}

// write brings a piece into the target.
func (c *converter) write(ctx context.Context, p *piece) error {
	switch p.kind {
	case convertKeep:
		return nil
	case convertZero:
		return c.zero(ctx, p.off, p.n)
	}
	if p.host != nil {
		if done, err := c.offload.copy(ctx, p.host, p.off); done || err != nil {
			return err
		}
		if err := c.read(ctx, p); err != nil {
			return err
		}
	}
	buf := (*p.buf)[:p.n]
	err := c.writeData(ctx, buf, p.off)
	if p.n <= pieceSize {
		buffers.Put(p.buf)
	}
	p.buf = nil
	return err
}

// writeData writes runs of data, and leaves out the zeroes between them.
func (c *converter) writeData(ctx context.Context, buf []byte, off int64) error {
	unit := c.o.Sparse
	if c.o.Compress {
		unit = c.align
	}
	if unit == 0 {
		return c.put(ctx, buf, off)
	}
	for at := int64(0); at < int64(len(buf)); {
		n, zero := run(buf[at:], off+at, unit)
		var err error
		if zero {
			err = c.zero(ctx, off+at, n)
		} else {
			err = c.put(ctx, buf[at:at+n], off+at)
		}
		if err != nil {
			return err
		}
		at += n
	}
	return nil
}

// run returns how far from the beginning of buf, which lies at off, units are all zeroes, or all not.
func run(buf []byte, off, unit int64) (n int64, zero bool) {
	for n < int64(len(buf)) {
		end := min((off+n)/unit*unit+unit-off, int64(len(buf)))
		z := allZero(buf[n:end])
		if n > 0 && z != zero {
			return n, zero
		}
		n, zero = end, z
	}
	return n, zero
}

var zeroBlock [4096]byte

func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroBlock))
		if !bytes.Equal(b[:n], zeroBlock[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

func (c *converter) put(ctx context.Context, b []byte, off int64) error {
	var err error
	if c.compressed != nil {
		err = c.compressed.WriteCompressed(ctx, b, off)
	} else {
		err = c.target.WriteAt(ctx, b, off, 0)
	}
	if err != nil {
		return &WriteError{off, err}
	}
	return nil
}

// zero makes a range read as zeroes where it does not yet.
func (c *converter) zero(ctx context.Context, off, n int64) error {
	if c.o.Zero || c.o.Backed && off >= c.o.BackingSize {
		return nil
	}
	if err := c.target.WriteZeroes(ctx, off, n, block.ZeroUnmap); err != nil {
		return &WriteError{off, err}
	}
	return nil
}
