package block

import (
	"context"
	"sync"

	"github.com/droverproject/drover/storage"
)

// VectorDevice is implemented by devices that move one contiguous range from or to memory in several pieces at once. Pieces
// may be empty, and may end anywhere. ReadV and WriteV serve every device.
type VectorDevice interface {
	// ReadVAt is ReadAt for buffers that are filled in order.
	ReadVAt(ctx context.Context, bufs [][]byte, off int64) error
	// WriteVAt is WriteAt for buffers that follow each other.
	WriteVAt(ctx context.Context, bufs [][]byte, off int64, flags WriteFlags) error
}

// TryVectorDevice is TryDevice for buffers that follow each other.
type TryVectorDevice interface {
	// TryReadVAt is ReadVAt if it can be done at once.
	TryReadVAt(bufs [][]byte, off int64) error
	// TryWriteVAt is WriteVAt without flags if it can be done at once.
	TryWriteVAt(bufs [][]byte, off int64) error
}

// OverwriteVectorDevice is OverwriteDevice for buffers that follow each other.
type OverwriteVectorDevice interface {
	// TryOverwriteVAt is TryWriteVAt if what is written has its place on the host already.
	TryOverwriteVAt(bufs [][]byte, off int64) error
}

// ReadV fills the buffers in order from the range of dev that begins at off, by one call where dev has one for that.
func ReadV(ctx context.Context, dev Device, bufs [][]byte, off int64) error {
	if len(bufs) == 1 {
		return dev.ReadAt(ctx, bufs[0], off)
	}
	if v, ok := dev.(VectorDevice); ok {
		return v.ReadVAt(ctx, bufs, off)
	}
	if err := CheckRange(off, LenV(bufs), dev.Size()); err != nil {
		return err
	}
	return ReadPieces(bufs, off, func(p []byte, off int64) error { return dev.ReadAt(ctx, p, off) })
}

// WriteV writes the buffers in order to the range of dev that begins at off, by one call where dev has one for that.
func WriteV(ctx context.Context, dev Device, bufs [][]byte, off int64, flags WriteFlags) error {
	if len(bufs) == 1 {
		return dev.WriteAt(ctx, bufs[0], off, flags)
	}
	if v, ok := dev.(VectorDevice); ok {
		return v.WriteVAt(ctx, bufs, off, flags)
	}
	if err := CheckRange(off, LenV(bufs), dev.Size()); err != nil {
		return err
	}
	err := WritePieces(bufs, off, func(p []byte, off int64) error { return dev.WriteAt(ctx, p, off, 0) })
	if err != nil || flags&WriteFUA == 0 {
		return err
	}
	return dev.Flush(ctx) // a durable last piece says nothing about those before it
}

// TryReadV is ReadV if it can be done at once; otherwise ErrWouldBlock, and what the buffers hold is undefined.
func TryReadV(dev Device, bufs [][]byte, off int64) error {
	if one, ok := dev.(TryDevice); ok && len(bufs) == 1 {
		return one.TryReadAt(bufs[0], off)
	}
	if v, ok := dev.(TryVectorDevice); ok {
		return v.TryReadVAt(bufs, off)
	}
	return ErrWouldBlock
}

// TryWriteV is WriteV without flags if it can be done at once; otherwise ErrWouldBlock, and nothing has been changed.
func TryWriteV(dev Device, bufs [][]byte, off int64) error {
	if one, ok := dev.(TryDevice); ok && len(bufs) == 1 {
		return one.TryWriteAt(bufs[0], off)
	}
	if v, ok := dev.(TryVectorDevice); ok {
		return v.TryWriteVAt(bufs, off)
	}
	return ErrWouldBlock
}

// TryOverwriteV is TryWriteV where nothing but data need change: see OverwriteDevice.
func TryOverwriteV(dev Device, bufs [][]byte, off int64) error {
	over, ok := dev.(OverwriteDevice)
	if !ok {
		return TryWriteV(dev, bufs, off)
	}
	if len(bufs) == 1 {
		return over.TryOverwriteAt(bufs[0], off)
	}
	if v, ok := dev.(OverwriteVectorDevice); ok {
		return v.TryOverwriteVAt(bufs, off)
	}
	return ErrWouldBlock
}

// LenV returns the bytes in all buffers.
func LenV(bufs [][]byte) int64 {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// WholeSectors reports whether buffers for the range that begins at off meet between sectors only, so that what is done to
// them one by one tears no sector.
func WholeSectors(bufs [][]byte, off int64) bool {
	for i, b := range bufs {
		if off += int64(len(b)); off%storage.SectorSize != 0 {
			return LenV(bufs[i+1:]) == 0
		}
	}
	return true
}

// bounceSize is how much of buffers that split sectors is moved at a time.
const bounceSize = 256 << 10

var bounces = sync.Pool{New: func() any { return new([bounceSize]byte) }}

// ReadPieces fills the buffers by calls of read for parts of the range that begins at off, none of which ends inside a sector
// but the last. It is ReadVAt for those who read one piece at a time. read is called at least once.
func ReadPieces(bufs [][]byte, off int64, read func(p []byte, off int64) error) error {
	return pieces(bufs, off, func(p []byte, off int64, c *Cursor) error {
		if err := read(p, off); err != nil || c == nil {
			return err
		}
		c.put(p)
		return nil
	})
}

// WritePieces is ReadPieces for writing.
func WritePieces(bufs [][]byte, off int64, write func(p []byte, off int64) error) error {
	return pieces(bufs, off, func(p []byte, off int64, c *Cursor) error {
		if c != nil {
			c.take(p)
		}
		return write(p, off)
	})
}

// pieces calls move for each buffer, or, with a cursor, for memory of its own that stands for what follows the cursor.
func pieces(bufs [][]byte, off int64, move func(p []byte, off int64, c *Cursor) error) error {
	left := LenV(bufs)
	if left == 0 {
		return move(nil, off, nil)
	}
	if WholeSectors(bufs, off) {
		for _, b := range bufs {
			if len(b) == 0 {
				continue
			}
			if err := move(b, off, nil); err != nil {
				return err
			}
			off += int64(len(b))
		}
		return nil
	}
	buf := bounces.Get().(*[bounceSize]byte)
	defer bounces.Put(buf)
	c := NewCursor(bufs)
	defer c.Close()
	for left > 0 {
		n := min(left, bounceSize-off%storage.SectorSize)
		if err := move(buf[:n], off, &c); err != nil {
			return err
		}
		off, left = off+n, left-n
	}
	return nil
}

// Cursor hands out buffers part by part.
type Cursor struct {
	bufs [][]byte // from the one on that the next byte is in
	skip int      // bytes of it that were handed out
	left int64
	part *[][]byte // what the last part was put together in
}

// NewCursor returns a cursor at the beginning of the buffers, which stay as they are. Close it.
func NewCursor(bufs [][]byte) Cursor { return Cursor{bufs: bufs, left: LenV(bufs)} }

// parts keeps lists of buffers for cursors. They hold no pointers while in the pool.
var parts = sync.Pool{New: func() any { return new([][]byte) }}

// Left returns how many bytes follow.
func (c *Cursor) Left() int64 { return c.left }

// Next returns the next n bytes, of which there are so many, and moves on. They are to be used before the next call.
func (c *Cursor) Next(n int64) [][]byte {
	part := c.Peek(n)
	c.Skip(n)
	return part
}

// Peek is Next without moving on.
func (c *Cursor) Peek(n int64) [][]byte {
	if n == c.left && c.skip == 0 {
		return c.bufs
	}
	if c.part == nil {
		c.part = parts.Get().(*[][]byte)
	}
	out := (*c.part)[:0]
	for at := *c; n > 0; {
		b := at.piece(n)
		if len(b) > 0 {
			out = append(out, b)
		}
		n -= int64(len(b))
	}
	*c.part = out
	return out
}

// Skip moves on by n bytes, of which there are so many.
func (c *Cursor) Skip(n int64) {
	for n > 0 {
		n -= int64(len(c.piece(n)))
	}
}

// piece returns the next bytes that lie in one buffer, at most n, and moves on.
func (c *Cursor) piece(n int64) []byte {
	b := c.bufs[0][c.skip:]
	if int64(len(b)) > n {
		b = b[:n]
		c.skip += int(n)
	} else {
		c.bufs, c.skip = c.bufs[1:], 0
	}
	c.left -= int64(len(b))
	return b
}

// put copies p to the next bytes.
func (c *Cursor) put(p []byte) {
	for len(p) > 0 {
		p = p[copy(c.piece(int64(len(p))), p):]
	}
}

// take fills p with the next bytes.
func (c *Cursor) take(p []byte) {
	for len(p) > 0 {
		p = p[copy(p, c.piece(int64(len(p)))):]
	}
}

// Close gives back what the cursor used.
func (c *Cursor) Close() {
	if c.part == nil {
		return
	}
	list := (*c.part)[:cap(*c.part)]
	clear(list)
	*c.part = list[:0]
	parts.Put(c.part)
	c.part = nil
}
