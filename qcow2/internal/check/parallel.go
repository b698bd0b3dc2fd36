package check

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
)

// parallel calls fn for the numbers [0, n), several at a time, and returns what it returns in order. When one fails it
// returns the first error in order, with the results before it.
func parallel[T any](ctx context.Context, n int, fn func(i int) (T, error)) ([]T, error) {
	out := make([]T, n)
	errs := make([]error, n)
	var next atomic.Int64
	var failed atomic.Bool
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), n) {
		wg.Go(func() {
			for !failed.Load() {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if errs[i] = ctx.Err(); errs[i] == nil {
					out[i], errs[i] = fn(i)
				}
				if errs[i] != nil {
					failed.Store(true)
				}
			}
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			return out[:i], err
		}
	}
	return out, nil
}

// inOrder has several workers make pieces of work, and calls take with each result in the order of the pieces. No more
// than a few pieces wait. next returns the next piece, false at the end; only one call of it runs at a time, and none
// after an error.
func inOrder[P, T any](next func() (P, bool), work func(P) (T, error), take func(T) error) error {
	workers := runtime.GOMAXPROCS(0)
	if workers == 1 {
		return oneByOne(next, work, take)
	}
	type result struct {
		value T
		err   error
	}
	type job struct {
		piece P
		done  chan result
	}
	jobs, order := make(chan job), make(chan chan result, 2*workers)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(jobs)
		defer close(order)
		for {
			piece, ok := next()
			if !ok {
				return
			}
			j := job{piece, make(chan result, 1)}
			select {
			case order <- j.done:
			case <-stop:
				return
			}
			jobs <- j // a worker takes it: they only end when there are no more
		}
	})
	for range workers {
		wg.Go(func() {
			for j := range jobs {
				value, err := work(j.piece)
				j.done <- result{value, err}
			}
		})
	}
	var err error
	for done := range order {
		r := <-done
		if err = r.err; err == nil {
			err = take(r.value)
		}
		if err != nil {
			close(stop)
			break
		}
	}
	wg.Wait()
	return err
}

func oneByOne[P, T any](next func() (P, bool), work func(P) (T, error), take func(T) error) error {
	for {
		piece, ok := next()
		if !ok {
			return nil
		}
		value, err := work(piece)
		if err == nil {
			err = take(value)
		}
		if err != nil {
			return err
		}
	}
}
