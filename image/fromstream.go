package image

import (
	"context"
	"errors"
	"io"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// StreamTarget takes a disk whose length is known only when it has ended.
type StreamTarget interface {
	// Reserve makes room for a disk of at least size bytes, which reads as zeroes.
	Reserve(ctx context.Context, size int64) error
	// Write writes p, which lies at off.
	Write(ctx context.Context, p []byte, off int64) error
	// Finish gives the disk its length and makes everything durable.
	Finish(ctx context.Context, size int64) error
}

// FromStreamOptions control how a raw disk is read from a stream.
type FromStreamOptions struct {
	// Sparse is the unit in which zeroes are left out; 0 writes every byte out.
	Sparse int64
	// Progress is told how many bytes have come; of how many nobody knows.
	Progress Progress
}

// FromStream reads a raw disk from r, up to its end, into a target. It returns the length of the disk, whole sectors.
func FromStream(ctx context.Context, r io.Reader, target StreamTarget, o FromStreamOptions) (int64, error) {
	f := &fromStream{o: o, r: r, target: target}
	err := inOrder(ctx, 2, f.produce, func(context.Context, *piece) error { return nil }, func(p *piece) error { return f.write(ctx, p) })
	if err != nil {
		return f.end, err
	}
	size := roundUp(f.end, sector)
	if err := target.Reserve(ctx, size); err != nil {
		return size, err
	}
	return size, target.Finish(ctx, size)
}

type fromStream struct {
	o      FromStreamOptions
	r      io.Reader
	target StreamTarget
	end    int64
}

// produce reads pieces.
func (f *fromStream) produce(emit func(*piece) bool) error {
	for off := int64(0); ; {
		buf := buffers.Get().(*[]byte)
		n, err := io.ReadFull(f.r, *buf)
		ended := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !ended {
			return &ReadError{0, off + int64(n), err}
		}
		if n > 0 && !emit(&piece{off: off, n: int64(n), buf: buf}) || ended {
			return nil
		}
		off += int64(n)
	}
}

// write writes a piece, without its zeroes.
func (f *fromStream) write(ctx context.Context, p *piece) error {
	defer buffers.Put(p.buf)
	buf := (*p.buf)[:p.n]
	f.end = p.off + p.n
	if err := f.target.Reserve(ctx, f.end); err != nil {
		return &WriteError{p.off, err}
	}
	for at := int64(0); at < p.n; {
		n, zero := p.n, false
		if f.o.Sparse > 0 {
			n, zero = run(buf[at:], p.off+at, f.o.Sparse)
		}
		if !zero {
			if err := f.target.Write(ctx, buf[at:at+n], p.off+at); err != nil {
				return &WriteError{p.off + at, err}
			}
		}
		at += n
	}
	if f.o.Progress != nil {
		f.o.Progress(f.end, 0)
	}
	return nil
}

// ImageTarget is a new qcow2 image as the target of a stream.
type ImageTarget struct {
	Image    *qcow2.Image
	Compress bool // the stream's Sparse is then a multiple of the cluster size
}

// Reserve implements StreamTarget. The disk grows in large steps, each of which stops everything for a moment.
func (t *ImageTarget) Reserve(ctx context.Context, size int64) error {
	if size <= t.Image.Size() {
		return nil
	}
	return t.Image.Resize(ctx, roundUp(max(size+size/2, 256<<20), 2<<20), qcow2.ResizeOptions{})
}

// Write implements StreamTarget.
func (t *ImageTarget) Write(ctx context.Context, p []byte, off int64) error {
	if !t.Compress {
		return t.Image.WriteAt(ctx, p, off, 0)
	}
	if rest := int64(len(p)) % t.Image.ClusterSize(); rest != 0 { // the stream has ended: the disk is cut there later
		p = append(p[:len(p):len(p)], make([]byte, t.Image.ClusterSize()-rest)...)
	}
	if err := t.Reserve(ctx, off+int64(len(p))); err != nil {
		return err
	}
	return t.Image.WriteCompressed(ctx, p, off)
}

// Finish implements StreamTarget.
func (t *ImageTarget) Finish(ctx context.Context, size int64) error {
	if err := t.Image.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true}); err != nil {
		return err
	}
	return t.Image.Flush(ctx)
}

// FileTarget is a new raw disk as the target of a stream: an empty file.
type FileTarget struct{ File storage.File }

// Reserve implements StreamTarget: a file grows by itself.
func (t *FileTarget) Reserve(context.Context, int64) error { return nil }

// Write implements StreamTarget.
func (t *FileTarget) Write(_ context.Context, p []byte, off int64) error {
	return storage.WriteFull(t.File, p, off)
}

// Finish implements StreamTarget.
func (t *FileTarget) Finish(_ context.Context, size int64) error {
	if have, err := t.File.Size(); err != nil {
		return err
	} else if t.File.Stat().Device {
		if have < size {
			return block.ErrOutOfRange
		}
	} else if err := t.File.Truncate(size); err != nil {
		return err
	}
	return t.File.Sync()
}
