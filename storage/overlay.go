package storage

import (
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// Overlay is a file whose changes stay in memory: what is written, cut off or added shows in every read, and the file
// below is as it was. Changes tells what differs, and Apply puts it into effect.
//
// It takes memory for the pieces of 4 KiB that were written. It has no holes to punch: that, like ZeroRange and
// Preallocate, is not supported.
type Overlay struct {
	base   File
	name   string
	closed atomic.Bool

	mu     sync.RWMutex
	size   int64
	shown  int64 // so much of the base shows through: what was cut off once reads as zeroes when it is added again
	pieces map[int64]*overlayPiece
}

const overlayPieceSize = 4096

type overlayPiece struct {
	data    [overlayPieceSize]byte
	changed [overlayPieceSize / SectorSize]bool // by sector: written and not yet put into effect
}

var _ File = (*Overlay)(nil)

// NewOverlay returns an overlay over base, which must not change while it is in use. Closing it leaves base open.
func NewOverlay(base File) (*Overlay, error) {
	size, err := base.Size()
	if err != nil {
		return nil, err
	}
	return &Overlay{base: base, name: base.Stat().Name, size: size, shown: size, pieces: make(map[int64]*overlayPiece)}, nil
}

func (o *Overlay) begin(doing string, off, n int64) error {
	if o.closed.Load() {
		return fileError(doing, o.name, fs.ErrClosed)
	}
	if err := checkRange(off, n); err != nil {
		return opError(doing, o.name, off, err)
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if err := o.begin("reading", off, int64(len(p))); err != nil {
		return 0, err
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	n := min(int64(len(p)), max(o.size-off, 0))
	if err := o.read(p[:n], off); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// read reads what lies inside the file.
func (o *Overlay) read(p []byte, off int64) error {
	below := min(int64(len(p)), max(o.shown-off, 0))
	if below > 0 {
		if err := ReadFull(o.base, p[:below], off); err != nil {
			return err
		}
	}
	clear(p[below:])
	if len(o.pieces) == 0 {
		return nil
	}
	for at := off; at < off+int64(len(p)); {
		in := at % overlayPieceSize
		n := min(overlayPieceSize-in, off+int64(len(p))-at)
		if piece := o.pieces[at/overlayPieceSize]; piece != nil {
			copy(p[at-off:][:n], piece.data[in:])
		}
		at += n
	}
	return nil
}

// ReadVAt reads one contiguous range into the buffers.
func (o *Overlay) ReadVAt(bufs [][]byte, off int64) (int, error) {
	if err := o.begin("reading", off, totalLen(bufs)); err != nil {
		return 0, err
	}
	done := 0
	for _, b := range bufs {
		n, err := o.ReadAt(b, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// WriteAt implements io.WriterAt.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) { return o.WriteVAt([][]byte{p}, off) }

// WriteVAt writes the buffers to one contiguous range.
func (o *Overlay) WriteVAt(bufs [][]byte, off int64) (int, error) {
	total := totalLen(bufs)
	if err := o.begin("writing", off, total); err != nil || total == 0 {
		return 0, err
	}
	if off+total > MaxMemSize {
		return 0, opError("writing", o.name, off, syscall.EFBIG)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	done := int64(0)
	for _, p := range bufs {
		for len(p) > 0 {
			n, err := o.write(p, off+done)
			if err != nil {
				return int(done), err
			}
			p, done = p[n:], done+n
		}
	}
	return int(done), nil
}

// write writes the part of p that lies in the first piece.
func (o *Overlay) write(p []byte, off int64) (int64, error) {
	num, in := off/overlayPieceSize, off%overlayPieceSize
	piece := o.pieces[num]
	if piece == nil {
		piece = new(overlayPiece)
		if err := o.read(piece.data[:min(overlayPieceSize, max(o.size-num*overlayPieceSize, 0))], num*overlayPieceSize); err != nil {
			return 0, err
		}
		o.pieces[num] = piece
	}
	n := int64(copy(piece.data[in:], p))
	for s := in / SectorSize; s <= (in+n-1)/SectorSize; s++ {
		piece.changed[s] = true
	}
	o.size = max(o.size, off+n)
	return n, nil
}

// Truncate sets the length.
func (o *Overlay) Truncate(size int64) error {
	if err := o.begin("truncating", size, 0); err != nil {
		return err
	}
	if size > MaxMemSize {
		return opError("truncating", o.name, size, syscall.EFBIG)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for num, piece := range o.pieces {
		switch at := num * overlayPieceSize; {
		case at >= size:
			delete(o.pieces, num)
		case at+overlayPieceSize > size:
			clear(piece.data[size-at:])
			clear(piece.changed[(size-at+SectorSize-1)/SectorSize:])
		}
	}
	o.size, o.shown = size, min(o.shown, size)
	return nil
}

// Sync does nothing: memory has nothing durable.
func (o *Overlay) Sync() error { return o.begin("syncing", 0, 0) }

// Size returns the length.
func (o *Overlay) Size() (int64, error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.size, o.begin("measuring", 0, 0)
}

// PunchHole is not supported.
func (o *Overlay) PunchHole(off, n int64) error { return o.unsupported("punching", off, n) }

// ZeroRange is not supported.
func (o *Overlay) ZeroRange(off, n int64) error { return o.unsupported("zeroing", off, n) }

// Preallocate is not supported.
func (o *Overlay) Preallocate(off, n int64) error { return o.unsupported("preallocating", off, n) }

func (o *Overlay) unsupported(doing string, off, n int64) error {
	if err := o.begin(doing, off, n); err != nil {
		return err
	}
	return opError(doing, o.name, off, ErrNotSupported)
}

// NextExtent reports one run of data.
func (o *Overlay) NextExtent(off int64) (end int64, data bool, err error) {
	if err := o.begin("examining", off, 0); err != nil {
		return 0, false, err
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	if off >= o.size {
		return 0, false, io.EOF
	}
	return o.size, true, nil
}

// Lock always succeeds: nobody else sees the changes.
func (o *Overlay) Lock(LockMode) error { return o.begin("locking", 0, 0) }

// Stat describes the file below as one that can be written.
func (o *Overlay) Stat() Info {
	info := o.base.Stat()
	info.ReadOnly = false
	return info
}

// Close forgets the changes.
func (o *Overlay) Close() error {
	if o.closed.Swap(true) {
		return fileError("closing", o.name, fs.ErrClosed)
	}
	return nil
}

// Change is a run of whole sectors that were written.
type Change struct {
	Off  int64
	Data []byte // as they read now, up to the end of the file
}

// Changes returns what was written since the last call of Apply, in order, cut at pieces of 4 KiB.
func (o *Overlay) Changes() []Change {
	o.mu.RLock()
	defer o.mu.RUnlock()
	var list []Change
	for _, num := range slices.Sorted(maps.Keys(o.pieces)) {
		piece := o.pieces[num]
		for s := 0; s < len(piece.changed); s++ {
			if !piece.changed[s] {
				continue
			}
			from := s
			for s+1 < len(piece.changed) && piece.changed[s+1] {
				s++
			}
			off := num*overlayPieceSize + int64(from)*SectorSize
			end := min(num*overlayPieceSize+int64(s+1)*SectorSize, o.size)
			list = append(list, Change{off, slices.Clone(piece.data[from*SectorSize:][:end-off])})
		}
	}
	return list
}

// Apply puts the changes and the length into effect. When it fails they are in effect in part, and Apply can be called
// again.
func (o *Overlay) Apply() error {
	changes := o.Changes()
	o.mu.Lock()
	defer o.mu.Unlock()
	size, err := o.base.Size()
	if err != nil {
		return err
	}
	if o.shown < min(size, o.size) { // cut off, and added again as zeroes
		if err := o.base.Truncate(o.shown); err != nil {
			return err
		}
		size = o.shown
	}
	if size != o.size {
		if err := o.base.Truncate(o.size); err != nil {
			return err
		}
	}
	for _, c := range changes {
		if err := WriteFull(o.base, c.Data, c.Off); err != nil {
			return err
		}
	}
	clear(o.pieces)
	o.shown = o.size
	return nil
}
