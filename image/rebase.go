package image

import (
	"bytes"
	"context"
	"os"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// RebaseOptions say what an image is to stand on.
type RebaseOptions struct {
	// Backing is the new backing file, open for reading; nil: there is to be none.
	Backing block.Device
	// Name and Format are what the image is to say of it.
	Name, Format string
	// Compress stores what has to be copied into the image compressed.
	Compress bool
	Progress Progress
}

// Rebase puts an image on another backing file without changing what it reads as. What the image does not hold itself is
// compared in the old backing file and the new, and copied into the image where they differ; then the image names the new
// one. What both get from one layer that they share, or both read as zeroes, is not read.
//
// Until its header is switched, in one step, the image stands on the old backing file, with more or less copied; what was
// copied is durable before. The open image still reads through the old one afterwards.
func Rebase(ctx context.Context, overlay *qcow2.Image, o RebaseOptions) error {
	unit := int64(overlay.Info().DiscardAlign)
	if o.Compress {
		unit = overlay.ClusterSize()
	}
	r := &rebaser{o: o, overlay: overlay, unit: max(unit, sector), total: overlay.Size()}
	r.olds, r.news = Layers(overlay), Layers(o.Backing)
	done := func(p *piece) error { return r.done(ctx, p) }
	produce := func(emit func(*piece) bool) error { return r.produce(ctx, emit) }
	if err := inOrder(ctx, workers(), produce, r.work, done); err != nil {
		return err
	}
	// It makes everything durable before it touches the header.
	return overlay.ChangeBacking(ctx, o.Name, o.Format)
}

type rebaser struct {
	o          RebaseOptions
	overlay    *qcow2.Image
	unit       int64 // what is copied at a time, so that nothing around it must be
	total      int64
	olds, news []block.Device // the layers: of the image itself, and of the new backing file

	old, new *cursor
	shared   map[[2]int]bool
}

// What has to be done with a piece.
const (
	rebaseSkip    uint8 = iota
	rebaseCompare       // the old backing file with the new
	rebaseOldZero       // zeroes with the new one
	rebaseNewZero       // the old one with zeroes
)

// Backing devices whose reading failed, as ReadError tells.
const (
	rebaseOld = 0
	rebaseNew = 1
)

func (r *rebaser) produce(ctx context.Context, emit func(*piece) bool) error {
	r.old, r.shared = newCursor(r.overlay), make(map[[2]int]bool)
	if r.o.Backing != nil {
		r.new = newCursor(r.o.Backing)
	}
	return emitRuns(ctx, r.total, func(kind uint8) bool { return kind != rebaseSkip }, r.units, emit)
}

// units tells what is to be done with whole units. One of which several things are true is compared.
func (r *rebaser) units(ctx context.Context, off int64) (uint8, int64, error) {
	kind, end, err := r.state(ctx, off)
	if err != nil {
		return 0, 0, err
	}
	if whole := end / r.unit * r.unit; whole > off || end == r.total {
		return kind, max(whole, min(end, off+r.unit)), nil
	}
	limit := min(off+r.unit, r.total)
	for end < limit {
		next, further, err := r.state(ctx, end)
		if err != nil {
			return 0, 0, err
		}
		if next != kind {
			kind = rebaseCompare
		}
		end = further
	}
	return kind, limit, nil
}

// state tells what is to be done with the bytes at an offset.
func (r *rebaser) state(ctx context.Context, off int64) (uint8, int64, error) {
	e, err := r.old.next(ctx, off)
	if err != nil {
		return 0, 0, &StatusError{rebaseOld, err}
	}
	if e.Depth == 0 && e.Allocated {
		return rebaseSkip, min(e.End(), r.total), nil
	}
	n := block.Extent{Off: off, Len: r.total - off, Zero: true}
	if r.new != nil && off < r.new.size {
		if n, err = r.new.next(ctx, off); err != nil {
			return 0, 0, &StatusError{rebaseNew, err}
		}
	}
	end := min(e.End(), n.End(), r.total)
	switch {
	case e.Zero && n.Zero:
		return rebaseSkip, end, nil
	case e.Zero:
		return rebaseOldZero, end, nil
	case n.Zero:
		return rebaseNewZero, end, nil
	case r.sameLayer(e.Depth, n.Depth):
		return rebaseSkip, end, nil
	}
	return rebaseCompare, end, nil
}

// sameLayer reports whether a layer of the image and one of the new backing file are one image, so that they hold the same.
func (r *rebaser) sameLayer(old, new int) bool {
	key := [2]int{old, new}
	same, known := r.shared[key]
	if !known {
		same = old < len(r.olds) && new < len(r.news) && sameImage(r.olds[old], r.news[new])
		r.shared[key] = same
	}
	return same
}

// sameImage reports whether two devices are the same file, seen in the same way. Both are open, and so neither changes.
func sameImage(a, b block.Device) bool {
	x, y := a.Info(), b.Info()
	if x.Format != y.Format || a.Size() != b.Size() {
		return false
	}
	s, err := os.Stat(x.Name)
	if err != nil {
		return false
	}
	t, err := os.Stat(y.Name)
	return err == nil && os.SameFile(s, t)
}

// work reads a piece of both and finds what differs. Of a piece that is the same no buffer is kept.
func (r *rebaser) work(ctx context.Context, p *piece) error {
	if p.kind == rebaseSkip {
		return nil
	}
	p.buf = buffers.Get().(*[]byte)
	old := (*p.buf)[:p.n]
	if p.kind == rebaseOldZero {
		clear(old)
	} else if err := r.overlay.ReadAt(ctx, old, p.off); err != nil {
		return &ReadError{rebaseOld, p.off, err}
	}
	err := r.findDifferences(ctx, p, old)
	if len(p.runs) == 0 {
		buffers.Put(p.buf)
		p.buf = nil
	}
	return err
}

func (r *rebaser) findDifferences(ctx context.Context, p *piece, old []byte) error {
	var next []byte
	if p.kind != rebaseNewZero && r.o.Backing != nil {
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		next = (*buf)[:p.n]
		if err := readPart(ctx, r.o.Backing, next, p.off); err != nil {
			return &ReadError{rebaseNew, p.off, err}
		}
	}
	for at := int64(0); at < p.n; {
		n := min((p.off+at)/r.unit*r.unit+r.unit-p.off-at, p.n-at)
		unit := old[at : at+n]
		zero := p.kind == rebaseOldZero || allZero(unit)
		same := zero
		if next != nil {
			same = bytes.Equal(unit, next[at:at+n])
		}
		if !same {
			p.addRun(at, n, zero)
		}
		at += n
	}
	return nil
}

// readPart reads from a device that may end before b does; zeroes follow.
func readPart(ctx context.Context, dev block.Device, b []byte, off int64) error {
	inside := max(min(int64(len(b)), dev.Size()-off), 0)
	clear(b[inside:])
	if inside == 0 {
		return nil
	}
	return dev.ReadAt(ctx, b[:inside], off)
}

// done copies what differs into the image, in order.
func (r *rebaser) done(ctx context.Context, p *piece) error {
	for _, run := range p.runs {
		if err := r.copy(ctx, p, run); err != nil {
			return &WriteError{p.off + run.at, err}
		}
	}
	if p.buf != nil {
		buffers.Put(p.buf)
		p.buf = nil
	}
	if r.o.Progress != nil {
		r.o.Progress(p.off+p.n, r.total)
	}
	return nil
}

func (r *rebaser) copy(ctx context.Context, p *piece, run pieceRun) error {
	off := p.off + run.at
	data := (*p.buf)[run.at : run.at+run.n]
	switch {
	case run.zero:
		return r.overlay.Hide(ctx, off, run.n) // which WriteZeroes does not where the old backing file has ended
	case r.o.Compress:
		return r.overlay.WriteCompressed(ctx, data, off)
	}
	return r.overlay.WriteAt(ctx, data, off, 0)
}
