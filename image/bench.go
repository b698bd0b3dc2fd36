package image

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/droverproject/drover/block"
)

// BenchOptions say which requests a benchmark makes.
type BenchOptions struct {
	Count, Depth int // how many requests, and how many at a time
	Write        bool
	Size         int   // of each
	Step, Offset int64 // from one to the next, round and round; and where the first one is
	Pattern      byte  // that writes write
	// FlushEvery has the disk flushed after so many writes; 0: never. Unless NoDrain is set no write runs meanwhile.
	FlushEvery int
	NoDrain    bool
}

// Bench makes requests of a disk, several at a time, and returns how long that took.
func Bench(ctx context.Context, dev block.Device, o BenchOptions) (time.Duration, error) {
	b := &bench{o: o, dev: dev, size: max(dev.Size(), 1)}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	began := time.Now()
	for range min(o.Depth, o.Count) {
		wg.Go(func() {
			buf := make([]byte, o.Size)
			for i := range buf {
				buf[i] = o.Pattern
			}
			for ctx.Err() == nil {
				if more, err := b.one(ctx, buf); err != nil {
					cancel(err)
				} else if !more {
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	if ctx.Err() != nil {
		return took, context.Cause(ctx)
	}
	return took, nil
}

type bench struct {
	o     BenchOptions
	dev   block.Device
	size  int64
	next  atomic.Int64
	ended atomic.Int64 // writes
	drain sync.RWMutex // held for reading by each request, for writing by a flush that wants none beside it
}

// one makes one request. It reports false when there are no more.
func (b *bench) one(ctx context.Context, buf []byte) (more bool, err error) {
	i := b.next.Add(1) - 1
	if i >= int64(b.o.Count) {
		return false, nil
	}
	off := (b.o.Offset + i*b.o.Step%b.size) % b.size
	if i == 0 {
		off = b.o.Offset // which may lie outside, as the user said
	}
	b.drain.RLock()
	if b.o.Write {
		err = b.dev.WriteAt(ctx, buf, off, 0)
	} else {
		err = b.dev.ReadAt(ctx, buf, off)
	}
	b.drain.RUnlock()
	if err != nil || !b.o.Write || b.o.FlushEvery == 0 || b.ended.Add(1)%int64(b.o.FlushEvery) != 0 {
		return true, err
	}
	if !b.o.NoDrain {
		b.drain.Lock()
		defer b.drain.Unlock()
	}
	return true, b.dev.Flush(ctx)
}
