package image

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
)

// CommitOptions control how an image is brought into one that it stands on.
type CommitOptions struct {
	// Depth is how many layers below the image the target stands; 0 means 1, its backing file.
	Depth int
	// Keep leaves the image as it is. Otherwise it is emptied when the target is durable.
	Keep bool
	// Rate bounds how many bytes are copied in a second; 0 means no bound.
	Rate     int64
	Progress Progress
}

// emptier is an image that can give up what it holds itself.
type emptier interface {
	Empty(context.Context) error
}

// Commit writes what an image and the layers between hold into a layer further down, which is open for writing, and makes
// that durable; then it empties the image. The target grows where it is shorter. What is allocated nowhere above the
// target is not looked at.
//
// At no moment does the image read otherwise: the target changes only where a layer above hides it, and the image is
// emptied only when the target is durable. So whatever stops a commit, it can be made again.
func Commit(ctx context.Context, top block.Device, o CommitOptions) error {
	depth := max(o.Depth, 1)
	layers := Layers(top)
	if depth >= len(layers) {
		return ErrNoBacking
	}
	c := &committer{o: o, top: top, base: layers[depth], depth: depth, total: top.Size(), pace: newPace(o.Rate)}
	if err := grow(ctx, c.base, c.total); err != nil {
		return err
	}
	produce := func(emit func(*piece) bool) error { return c.produce(ctx, emit) }
	done := func(p *piece) error { return c.done(ctx, p) }
	if err := inOrder(ctx, workers(), produce, c.work, done); err != nil {
		return err
	}
	if err := c.base.Flush(ctx); err != nil {
		return fmt.Errorf("making the backing file durable: %w", err)
	}
	if o.Keep {
		return nil
	}
	if e, ok := block.As[emptier](top); ok {
		return e.Empty(ctx)
	}
	return nil
}

type committer struct {
	o         CommitOptions
	top, base block.Device
	depth     int
	total     int64
	pace      pace
}

// What has to be done with a piece.
const (
	commitSkip uint8 = iota
	commitZero
	commitData
)

// produce cuts the disk into pieces. What the target reads as zeroes already need not become so.
func (c *committer) produce(ctx context.Context, emit func(*piece) bool) error {
	tops, bases := newCursor(c.top), newCursor(c.base)
	state := func(ctx context.Context, off int64) (uint8, int64, error) {
		e, err := tops.next(ctx, off)
		switch {
		case err != nil:
			return 0, 0, &StatusError{0, err}
		case e.Depth >= c.depth:
			return commitSkip, e.End(), nil
		case !e.Zero:
			return commitData, e.End(), nil
		}
		b, err := bases.next(ctx, off)
		if err != nil {
			return 0, 0, &StatusError{1, err}
		}
		end := min(e.End(), b.End())
		if b.Zero {
			return commitSkip, end, nil
		}
		return commitZero, end, nil
	}
	return emitRuns(ctx, c.total, func(kind uint8) bool { return kind == commitData }, state, emit)
}

func (c *committer) work(ctx context.Context, p *piece) error {
	if p.kind != commitData {
		return nil
	}
	p.buf = buffers.Get().(*[]byte)
	if err := c.top.ReadAt(ctx, (*p.buf)[:p.n], p.off); err != nil {
		return &ReadError{0, p.off, err}
	}
	return nil
}

// done writes a piece, in order, so that the target is laid out in order.
func (c *committer) done(ctx context.Context, p *piece) error {
	var err error
	switch p.kind {
	case commitZero:
		err = c.base.WriteZeroes(ctx, p.off, p.n, block.ZeroUnmap)
	case commitData:
		err = c.base.WriteAt(ctx, (*p.buf)[:p.n], p.off, 0)
		buffers.Put(p.buf)
		p.buf = nil
	}
	if err != nil {
		return &WriteError{p.off, err}
	}
	if c.o.Progress != nil {
		c.o.Progress(p.off+p.n, c.total)
	}
	if p.kind == commitData {
		return c.pace.spend(ctx, p.n)
	}
	return nil
}
