package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/droverproject/drover/nbd/client"
	"github.com/droverproject/drover/storage"
)

// Loads with flushes are not fio's: with several requests in flight, fio 3.33 asked for 500 to 900 flushes in 2,000 writes of
// which every 32nd was to be followed by one, and for more of them the quicker the server was. Here it is one for 32.

// flushingLoad keeps w.Depth writes in flight over one connection (or to the raw file, if socket is empty). Whoever makes every
// w.Fsync-th of them has it flushed, while the others go on.
func flushingLoad(ctx context.Context, cfg config, socket, file string, w workload) (tally, error) {
	var target storage.File
	var err error
	if socket == "" {
		target, err = storage.OpenFile(file, storage.OpenOptions{})
	} else {
		target, err = client.Open(ctx, client.Options{Dialing: client.Dialing{Address: client.Address{Path: socket}}})
	}
	if err != nil {
		return tally{}, err
	}
	t, err := writeAndFlush(ctx, cfg, target, w)
	return t, errors.Join(err, target.Close())
}

// What a load with flushes writes, and where: each time a cluster that most likely has none yet.
const (
	flushedBlock = 4 << 10
	flushedAlign = 64 << 10
)

func writeAndFlush(ctx context.Context, cfg config, target storage.File, w workload) (t tally, err error) {
	length := time.Duration(cfg.seconds * float64(time.Second))
	var begun, done, flushes atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, w.Depth)
	before, err := processTime(os.Getpid())
	if err != nil {
		return t, err
	}
	start := time.Now()
	writer := func(r *rand.Rand) error {
		p := make([]byte, flushedBlock)
		for i := range p {
			p[i] = byte(r.Uint32()) | 1
		}
		for ctx.Err() == nil {
			n := begun.Add(1)
			if w.Ops > 0 && n > int64(w.Ops) || w.Ops == 0 && time.Since(start) >= length {
				return nil
			}
			if _, err := target.WriteAt(p, r.Int64N(w.size(cfg)/flushedAlign)*flushedAlign); err != nil {
				return err
			}
			done.Add(1)
			if n%int64(w.Fsync) != 0 {
				continue
			}
			if err := target.Sync(); err != nil {
				return err
			}
			flushes.Add(1)
		}
		return ctx.Err()
	}
	for i := range w.Depth {
		wg.Go(func() { errs[i] = writer(rand.New(rand.NewPCG(uint64(start.UnixNano()), uint64(i)))) })
	}
	wg.Wait()
	t = tally{ops: done.Load(), flushes: flushes.Load(), seconds: time.Since(start).Seconds()}
	after, err := processTime(os.Getpid())
	t.cpu = after - before
	return t, errors.Join(append(errs, err)...)
}
