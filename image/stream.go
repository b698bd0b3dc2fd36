package image

import (
	"context"
	"io"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// StreamOptions control how a disk is written as a stream of bytes.
type StreamOptions struct {
	// QCOW2, if not nil, makes the stream a qcow2 image with these options, whose size is the disk's. Otherwise it is the raw
	// disk.
	QCOW2    *qcow2.CreateOptions
	Compress bool
	Workers  int // how many pieces are in hand at a time; 0 means as many as are good
	Progress Progress
}

// Stream writes a disk to w, from the first byte to the last, with no room for a second thought: to a pipe, for example.
// What the disk knows to be zeroes takes no place in an image. A compressed one takes two passes over the data, the first to
// find out how long everything becomes; memory then holds four bytes for each cluster of data, and a few pieces.
func Stream(ctx context.Context, w io.Writer, source block.Device, o StreamOptions) error {
	s := &streamer{o: o, w: w, dev: source, unit: 1}
	if o.QCOW2 != nil {
		s.create = *o.QCOW2
		s.create.Size = source.Size()
		if s.create.ClusterSize == 0 {
			s.create.ClusterSize = 64 << 10
		}
		s.unit = s.create.ClusterSize
	}
	if o.QCOW2 == nil {
		s.total = source.Size()
		return s.pass(ctx, s.rawPieces, s.readPiece, s.writeRaw)
	}
	if err := s.findData(ctx); err != nil {
		return err
	}
	if !o.Compress {
		return s.writeImage(ctx)
	}
	s.total *= 2 // two passes
	if err := s.pass(ctx, s.dataPieces, s.compressPiece, s.learn); err != nil {
		return err
	}
	return s.writeImage(ctx)
}

type streamer struct {
	o      StreamOptions
	w      io.Writer
	dev    block.Device
	create qcow2.CreateOptions
	unit   int64 // the cluster size
	runs   []qcow2.StreamRun
	sizes  []uint32
	image  *qcow2.Stream

	done, total int64 // bytes worked on, in all passes
}

func (s *streamer) pass(ctx context.Context, produce func(context.Context, func(*piece) bool) error,
	work func(context.Context, *piece) error, done func(*piece) error) error {
	n := s.o.Workers
	if n == 0 {
		n = workers()
	}
	return inOrder(ctx, n, func(emit func(*piece) bool) error { return produce(ctx, emit) }, work, func(p *piece) error {
		if err := done(p); err != nil {
			return err
		}
		s.done += p.n
		if s.o.Progress != nil {
			s.o.Progress(s.done, s.total)
		}
		return nil
	})
}

// findData finds the clusters that may hold data.
func (s *streamer) findData(ctx context.Context) error {
	var run qcow2.StreamRun
	add := func() {
		if run.N > 0 {
			s.runs = append(s.runs, run)
		}
	}
	err := s.dev.Extents(ctx, 0, s.dev.Size(), func(e block.Extent) bool {
		if e.Zero {
			return true
		}
		first, end := e.Off/s.unit, divUp(e.End(), s.unit)
		if first <= run.First+run.N && run.N > 0 {
			run.N = max(run.N, end-run.First)
			return true
		}
		add()
		run = qcow2.StreamRun{First: first, N: end - first}
		return true
	})
	if err != nil {
		return &StatusError{0, err}
	}
	add()
	for _, r := range s.runs {
		s.total += min((r.First+r.N)*s.unit, s.dev.Size()) - r.First*s.unit
	}
	return nil
}

// dataPieces emits the clusters of the runs.
func (s *streamer) dataPieces(_ context.Context, emit func(*piece) bool) error {
	const step = pieceSize // clusters are no larger
	for _, r := range s.runs {
		end := min((r.First+r.N)*s.unit, s.dev.Size())
		for off := r.First * s.unit; off < end; off += step {
			if !emit(&piece{off: off, n: min(step, end-off)}) {
				return nil
			}
		}
	}
	return nil
}

// rawPieces emits the whole disk, what reads as zeroes by itself.
func (s *streamer) rawPieces(ctx context.Context, emit func(*piece) bool) error {
	c := newCursor(s.dev)
	state := func(ctx context.Context, off int64) (uint8, int64, error) {
		e, err := c.next(ctx, off)
		if err != nil {
			return 0, 0, &StatusError{0, err}
		}
		if e.Zero {
			return convertZero, e.End(), nil
		}
		return convertData, e.End(), nil
	}
	return emitRuns(ctx, s.total, func(uint8) bool { return true }, state, emit)
}

func (s *streamer) readPiece(ctx context.Context, p *piece) error {
	p.buf = buffers.Get().(*[]byte)
	b := (*p.buf)[:p.n]
	if p.kind == convertZero {
		clear(b)
		return nil
	}
	if err := s.dev.ReadAt(ctx, b, p.off); err != nil {
		return &ReadError{0, p.off, err}
	}
	return nil
}

func (s *streamer) writeRaw(p *piece) error {
	defer buffers.Put(p.buf)
	if _, err := s.w.Write((*p.buf)[:p.n]); err != nil {
		return &WriteError{p.off, err}
	}
	return nil
}

// compressPiece reads clusters and compresses them. What becomes of each goes to p.packed.
func (s *streamer) compressPiece(ctx context.Context, p *piece) error {
	if err := s.readPiece(ctx, p); err != nil {
		return err
	}
	defer buffers.Put(p.buf)
	p.out = buffers.Get().(*[]byte)
	for at := int64(0); at < p.n; at += s.unit {
		packed, err := s.compress((*p.out)[at:at+s.unit], (*p.buf)[at:min(at+s.unit, p.n)])
		if err != nil {
			return err
		}
		p.packed = append(p.packed, packed)
	}
	return nil
}

// compress returns how a cluster, which the end of the disk may have cut, is stored, in dst.
func (s *streamer) compress(dst, b []byte) ([]byte, error) {
	if allZero(b) {
		return nil, nil
	}
	whole := b
	if int64(len(b)) < s.unit {
		whole = make([]byte, s.unit)
		copy(whole, b)
	}
	n, ok, err := s.create.CompressCluster(dst, whole)
	switch {
	case err != nil:
		return nil, err
	case ok:
		return dst[:n], nil
	}
	copy(dst, whole)
	return dst, nil
}

// learn notes how long the clusters of a piece became.
func (s *streamer) learn(p *piece) error {
	for _, b := range p.packed {
		s.sizes = append(s.sizes, uint32(len(b)))
	}
	buffers.Put(p.out)
	return nil
}

// writeImage writes tables and data.
func (s *streamer) writeImage(ctx context.Context) error {
	var err error
	if s.image, err = qcow2.NewStream(s.w, s.create, s.runs, s.sizes); err != nil {
		return err
	}
	if err := s.image.WriteTables(); err != nil {
		return &WriteError{0, err}
	}
	work, write := s.readPiece, s.writePlain
	if s.sizes != nil {
		work, write = s.compressPiece, s.writePacked
	}
	if err := s.pass(ctx, s.dataPieces, work, write); err != nil {
		return err
	}
	if err := s.image.Close(); err != nil {
		return &WriteError{s.dev.Size(), err}
	}
	return nil
}

func (s *streamer) writePacked(p *piece) error {
	defer buffers.Put(p.out)
	for i, b := range p.packed {
		if err := s.image.Write(b); err != nil {
			return &WriteError{p.off + int64(i)*s.unit, err}
		}
	}
	return nil
}

func (s *streamer) writePlain(p *piece) error {
	defer buffers.Put(p.buf)
	for at := int64(0); at < p.n; at += s.unit {
		b := (*p.buf)[at:min(at+s.unit, p.n)]
		if short := s.unit - int64(len(b)); short > 0 { // the disk ends
			b = append(b[:len(b):len(b)], make([]byte, short)...)
		}
		if err := s.image.Write(b); err != nil {
			return &WriteError{p.off + at, err}
		}
	}
	return nil
}
