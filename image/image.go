package image

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"github.com/droverproject/drover/block"
)

// pieceSize is how much is read at a time.
const pieceSize = 2 << 20

// workers is how many pieces are in hand at a time: enough to keep disks and processors busy, few enough for memory.
func workers() int { return max(4, min(16, 2*runtime.GOMAXPROCS(0))) }

// Progress is called now and then, by one goroutine at a time, with how much of the work is done.
type Progress func(done, total int64)

// cursor walks the extents of a device, reading some ahead.
type cursor struct {
	dev  block.Device
	buf  []block.Extent
	size int64
}

const extentsAhead = 1024

func newCursor(dev block.Device) *cursor { return &cursor{dev: dev, size: dev.Size()} }

// next returns the extent at off, of which what lies before off has been cut away. Offsets never go back.
func (c *cursor) next(ctx context.Context, off int64) (block.Extent, error) {
	for {
		for len(c.buf) > 0 && c.buf[0].End() <= off {
			c.buf = c.buf[1:]
		}
		if len(c.buf) > 0 {
			e := c.buf[0]
			if off < e.Off {
				return block.Extent{}, fmt.Errorf("extent at %d asked for behind %d", off, e.Off)
			}
			if d := off - e.Off; d > 0 {
				e.Off, e.Len, e.Host = off, e.Len-d, e.Host+d
			}
			return e, nil
		}
		c.buf = nil
		err := c.dev.Extents(ctx, off, c.size-off, func(e block.Extent) bool {
			c.buf = append(c.buf, e)
			return len(c.buf) < extentsAhead
		})
		if err != nil {
			return block.Extent{}, err
		}
	}
}

// piece is a range to work on.
type piece struct {
	off, n int64
	kind   uint8
	buf    *[]byte // what was read
	runs   []pieceRun
	packed [][]byte  // of a stream: what becomes of each cluster,
	out    *[]byte   // and where that lies
	host   []hostRun // where it lies, to be copied by the host
	err    error
	ready  chan struct{}

	found []DiffRange // by Diff
	hash  blockHash   // by Sum
}

// pieceRun is a part of a piece, from its beginning on.
type pieceRun struct {
	at, n int64
	zero  bool
}

// addRun adds a part, to the one before if it continues that.
func (p *piece) addRun(at, n int64, zero bool) {
	if k := len(p.runs); k > 0 && p.runs[k-1].zero == zero && p.runs[k-1].at+p.runs[k-1].n == at {
		p.runs[k-1].n += n
		return
	}
	p.runs = append(p.runs, pieceRun{at, n, zero})
}

// inOrder has n goroutines work on the pieces that produce emits, and looks at the outcomes in the order of the pieces: it
// returns the first error in that order, be it that of a piece or of produce, and ends the rest. done is called for each
// piece that succeeded, in order, by one goroutine.
func inOrder(ctx context.Context, n int, produce func(emit func(*piece) bool) error, work func(context.Context, *piece) error,
	done func(*piece) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	todo, order := make(chan *piece), make(chan *piece, n)
	var produced error
	wg.Go(func() {
		defer close(order)
		defer close(todo)
		produced = produce(func(p *piece) bool {
			p.ready = make(chan struct{})
			select {
			case order <- p:
			case <-ctx.Done():
				return false
			}
			select {
			case todo <- p:
				return true
			case <-ctx.Done():
				p.err = ctx.Err()
				close(p.ready)
				return false
			}
		})
	})
	for range n {
		wg.Go(func() {
			for p := range todo {
				p.err = work(ctx, p)
				close(p.ready)
			}
		})
	}
	for p := range order {
		<-p.ready
		if p.err != nil {
			return p.err
		}
		if err := done(p); err != nil {
			return err
		}
	}
	if produced == nil {
		return ctx.Err()
	}
	return produced
}

// buffers are pieces of memory of pieceSize.
var buffers = sync.Pool{New: func() any { b := make([]byte, pieceSize); return &b }}
