package image

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// ExportOptions say what a backup consists of.
type ExportOptions struct {
	// Bitmap is the dirty bitmap of Marks that says what has changed since the backup that this one stands on; "" for a
	// full backup.
	Bitmap string
	Marks  *qcow2.Image
	// Base is the file name of the backup that this one stands on, recorded as its backing file; it is not opened.
	Base, BaseFormat string
	// BaseManifest, if not nil, is that of Base: then only what has changed is hashed.
	BaseManifest *Manifest
	ClusterSize  int64 // of the backup; 0 is 64 KiB
	Progress     Progress
}

// ErrBaseManifest is returned when the manifest of the base is that of another disk.
var ErrBaseManifest = errors.New("the manifest of the base does not fit")

// Export writes a backup of source, which is an image or a snapshot of one, into file: everything, or what a bitmap marks, as
// a QCOW2 image that has the backup before it as its backing file. What is marked and reads as zeroes becomes zeroes, not a
// hole that the base shows through. The content of source must not change meanwhile. The file is durable when Export
// returns; it stays open.
func Export(ctx context.Context, source block.Device, file storage.File, o ExportOptions) (*Manifest, error) {
	x := exporter{o: o, source: source, cursor: newCursor(source), size: source.Size()}
	if err := x.check(); err != nil {
		return nil, err
	}
	create := qcow2.CreateOptions{Size: x.size, ClusterSize: o.ClusterSize, BackingFile: o.Base, BackingFormat: o.BaseFormat}
	if err := qcow2.Create(ctx, file, create); err != nil {
		return nil, err
	}
	open := qcow2.Options{}
	if o.Base != "" {
		open.Backing = unread{x.size}
	}
	target, err := qcow2.Open(ctx, unclosed{file}, open)
	if err != nil {
		return nil, err
	}
	x.target, x.unit = target, target.ClusterSize()
	if err := errors.Join(x.copy(ctx), target.Close()); err != nil {
		return nil, err
	}
	return x.manifest(ctx, file)
}

type exporter struct {
	o      ExportOptions
	source block.Device
	cursor *cursor
	target *qcow2.Image
	unit   int64 // the cluster size of target
	size   int64
	dirty  []span // what the bitmap marks, in whole clusters
}

type span struct{ off, end int64 }

func (x *exporter) check() error {
	o := x.o
	switch {
	case o.Bitmap == "" && o.Base != "":
		return errors.New("a backup that stands on another needs a bitmap that says what has changed")
	case o.Bitmap != "" && o.Base == "":
		return errors.New("a backup of what a bitmap marks needs a base to stand on")
	case o.Bitmap != "" && o.Marks.Size() != x.size:
		return fmt.Errorf("the disk has %d bytes, and the bitmap is about one of %d", x.size, o.Marks.Size())
	case o.BaseManifest != nil && o.BaseManifest.Size != x.size:
		return fmt.Errorf("%w: it is about a disk of %d bytes, and this one has %d", ErrBaseManifest, o.BaseManifest.Size, x.size)
	}
	return nil
}

// copy writes what is to be in the backup.
func (x *exporter) copy(ctx context.Context) error {
	if x.o.Bitmap == "" {
		x.dirty = []span{{0, x.size}}
	} else if err := x.findDirty(ctx); err != nil {
		return err
	}
	done := func(p *piece) error {
		err := x.write(ctx, p)
		if p.buf != nil {
			buffers.Put(p.buf)
		}
		if err == nil && x.o.Progress != nil {
			x.o.Progress(p.off+p.n, x.size)
		}
		return err
	}
	if err := inOrder(ctx, workers(), x.produce, x.read, done); err != nil {
		return err
	}
	return x.target.Flush(ctx)
}

// findDirty gathers what the bitmap marks. A cluster of the backup is there as a whole or not at all: what is around marks is
// as in the base, and comes along.
func (x *exporter) findDirty(ctx context.Context) error {
	off := int64(0)
	return x.o.Marks.BitmapExtents(ctx, x.o.Bitmap, 0, x.size, func(n int64, dirty bool) bool {
		if dirty {
			from, to := off/x.unit*x.unit, min(roundUp(off+n, x.unit), x.size)
			if k := len(x.dirty) - 1; k >= 0 && from <= x.dirty[k].end {
				x.dirty[k].end = max(to, x.dirty[k].end)
			} else {
				x.dirty = append(x.dirty, span{from, to})
			}
		}
		off += n
		return true
	})
}

// produce cuts what is dirty into pieces that read as zeroes and pieces to be read, at clusters of the target.
func (x *exporter) produce(emit func(*piece) bool) error {
	for _, d := range x.dirty {
		for off := d.off; off < d.end; {
			e, err := x.cursor.next(context.Background(), off)
			if err != nil {
				return &StatusError{0, err}
			}
			if n := (min(e.End(), d.end) - off) / x.unit * x.unit; e.Zero && (n > 0 || e.End() >= x.size) {
				if e.End() >= x.size && d.end == x.size {
					n = x.size - off
				}
				if n > 0 {
					if !emit(&piece{off: off, n: n, kind: sumZero}) {
						return nil
					}
					off += n
					continue
				}
			}
			n := min(max(pieceSize, x.unit), d.end-off, max(roundUp(e.End(), x.unit)-off, x.unit))
			if !emit(&piece{off: off, n: n, kind: sumRead}) {
				return nil
			}
			off += n
		}
	}
	return nil
}

func (x *exporter) read(ctx context.Context, p *piece) error {
	if p.kind == sumZero {
		return nil
	}
	buf := buffers.Get().(*[]byte)
	if err := x.source.ReadAt(ctx, (*buf)[:p.n], p.off); err != nil {
		buffers.Put(buf)
		return &ReadError{0, p.off, err}
	}
	p.buf = buf
	return nil
}

// write puts a piece into the backup, in which zeroes are no data.
func (x *exporter) write(ctx context.Context, p *piece) error {
	if p.kind == sumZero {
		return x.zero(ctx, p.off, p.n)
	}
	for b, off := (*p.buf)[:p.n], p.off; len(b) > 0; {
		n, zero := run(b, 0, x.unit)
		var err error
		if zero {
			err = x.zero(ctx, off, n)
		} else if err = x.target.WriteAt(ctx, b[:n], off, 0); err != nil {
			err = &WriteError{off, err}
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

func (x *exporter) zero(ctx context.Context, off, n int64) error {
	if x.o.Base == "" {
		return nil // nothing is there already
	}
	if err := x.target.WriteZeroes(ctx, off, n, block.ZeroUnmap); err != nil {
		return &WriteError{off, err}
	}
	return nil
}

// manifest describes the backup.
func (x *exporter) manifest(ctx context.Context, file storage.File) (*Manifest, error) {
	m := &Manifest{Version: manifestVersion, Size: x.size, Base: x.o.Base, Bitmap: x.o.Bitmap}
	for _, d := range x.dirty {
		m.Exported += d.end - d.off
	}
	var known func(int64) (blockHash, bool)
	if base := x.o.BaseManifest; base != nil {
		m.BaseSum = base.Sum
		hashes, err := base.blockHashes()
		if err != nil {
			return nil, err
		}
		dirty := x.dirty
		known = func(i int64) (blockHash, bool) { // it is asked in order
			for len(dirty) > 0 && dirty[0].end <= i*sumBlock {
				dirty = dirty[1:]
			}
			if len(dirty) > 0 && dirty[0].off < (i+1)*sumBlock {
				return blockHash{}, false
			}
			return hashes[i], true
		}
	}
	blocks, err := blockSums(ctx, x.source, nil, known)
	if err != nil {
		return nil, err
	}
	m.setBlocks(blocks)
	layer, err := qcow2.Open(ctx, unclosed{file}, qcow2.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	sum, err := LayerSum(ctx, layer)
	m.LayerSum = sumText(sum)
	return m, errors.Join(err, layer.Close())
}

func sumText(sum []byte) string { return string(SumBlocks) + ":" + hex.EncodeToString(sum) }

// unclosed is a file that stays open when the image in it is closed.
type unclosed struct{ storage.File }

// Close does nothing.
func (unclosed) Close() error { return nil }

// unread stands for the base of a backup, which is not at hand: whole clusters are written over it, and zeroes must hide it.
type unread struct{ size int64 }

var errUnread = errors.New("the base of a backup is not read")

func (u unread) Size() int64      { return u.size }
func (u unread) Info() block.Info { return block.Info{Format: "base", ReadOnly: true} }
func (unread) ReadAt(context.Context, []byte, int64) error {
	return errUnread
}
func (unread) WriteAt(context.Context, []byte, int64, block.WriteFlags) error {
	return block.ErrReadOnly
}
func (unread) WriteZeroes(context.Context, int64, int64, block.ZeroFlags) error {
	return block.ErrReadOnly
}
func (unread) Discard(context.Context, int64, int64) error { return block.ErrReadOnly }
func (unread) Flush(context.Context) error                 { return nil }
func (unread) Extents(_ context.Context, off, n int64, fn func(block.Extent) bool) error {
	fn(block.Extent{Off: off, Len: n, Allocated: true, Data: true})
	return nil
}
func (unread) Close() error { return nil }
