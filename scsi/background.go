package scsi

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// task is an operation on the whole disk: SANITIZE or FORMAT UNIT. There is one at a time, and while it runs nothing else
// reaches the medium. With IMMED the command is answered when the task begins.
type task struct {
	name             string
	running, failing code
	exit             bool          // an initiator may end the failure that it leaves
	progress         atomic.Uint32 // in 65536ths
}

// sense is what initiators are told while the task runs.
func (t *task) sense() *senseError {
	return &senseError{key: keyNotReady, code: t.running, field: uint16(t.progress.Load()), bit: -1, hasField: true}
}

// failure is what they are told after it has failed.
func (t *task) failure() *senseError { return &senseError{key: keyMediumError, code: t.failing} }

// tasks is the task that runs, and the one that failed last.
type tasks struct {
	current, failed atomic.Pointer[task]

	mu      sync.Mutex
	running sync.WaitGroup     // those in the background
	cancel  context.CancelFunc // of the one in the background, under mu
	closed  bool
}

// unavailable returns why the medium cannot be reached now: a task runs, or has failed and may have left anything.
func (u *Unit) unavailable() error {
	if t := u.tasks.current.Load(); t != nil {
		return t.sense()
	}
	if t := u.tasks.failed.Load(); t != nil {
		return t.failure()
	}
	return nil
}

// mendsFailure reports whether a command is one of those that a failed task leaves to initiators.
func mendsFailure(op byte) bool { return op == 0x48 || op == 0x04 }

// change takes the regions of [off, off+n) for a write, alone or beside other writers. A task may have begun since the
// command was let in: it takes the same regions, and what it has wiped must stay so.
func (u *Unit) change(off, n int64, alone bool) (unlock func(), err error) {
	unlock = u.locks.lock(off, n, alone)
	if err := u.unavailable(); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// begin runs a task: here, or with immediate in the background.
func (u *Unit) begin(c *call, t *task, immediate bool, run func(ctx context.Context, t *task) error) error {
	for !u.tasks.current.CompareAndSwap(nil, t) {
		if other := u.tasks.current.Load(); other != nil {
			return other.sense()
		}
	}
	if !immediate {
		return u.runTask(c.ctx, t, run)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.ctx))
	u.tasks.mu.Lock()
	defer u.tasks.mu.Unlock()
	if u.tasks.closed {
		cancel()
		u.tasks.current.Store(nil)
		return context.Canceled // the unit goes away
	}
	u.tasks.cancel = cancel
	u.tasks.running.Go(func() {
		defer cancel()
		_ = u.runTask(ctx, t, run) // initiators are told by the next command
	})
	return nil
}

// runTask runs a task and notes how it ended. The failure is there before the task is gone, so that no command slips through
// between.
func (u *Unit) runTask(ctx context.Context, t *task, run func(ctx context.Context, t *task) error) error {
	err := run(ctx, t)
	if err != nil {
		u.counts.errors.Add(1)
		u.tasks.failed.Store(t)
	} else {
		u.tasks.failed.Store(nil)
	}
	u.tasks.current.Store(nil)
	return err
}

// Finish waits for what a command with IMMED has left to do in the background, and has no further such command begin. When
// ctx ends first, it has the work stopped, and returns an error that says what was not done. It must be called before the
// unit's device is closed.
func (u *Unit) Finish(ctx context.Context) error {
	u.tasks.mu.Lock()
	u.tasks.closed = true
	cancel := u.tasks.cancel
	u.tasks.mu.Unlock()
	done := make(chan struct{})
	go func() {
		u.tasks.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	t := u.tasks.current.Load()
	if cancel != nil {
		cancel()
	}
	<-done
	if t == nil || u.tasks.failed.Load() != t {
		return nil // it came to its end after all
	}
	percent := (t.progress.Load()*100 + 65535/2) / 65535
	return fmt.Errorf("%s was cut short after %d%% of the disk, and has to be given again: %w", t.name, percent, ctx.Err())
}

// wipe zeroes the disk, or fills it with a pattern, and makes that durable.
func (u *Unit) wipe(ctx context.Context, t *task, pattern []byte) error {
	size := u.bytes(u.blocks())
	for off := int64(0); off < size; off += wipeStep {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(wipeStep, size-off)
		if err := u.wipePart(ctx, off, n, pattern); err != nil {
			return err
		}
		t.progress.Store(uint32(float64(off+n) / float64(size) * 65535))
	}
	if err := u.dev.Flush(ctx); err != nil {
		return u.writeFailed(err, 0)
	}
	return nil
}

// wipeStep is how much of the disk is wiped between two looks at whether to go on.
const wipeStep = 64 << 20

// wipePart waits for the writes that were let in before.
func (u *Unit) wipePart(ctx context.Context, off, n int64, pattern []byte) error {
	defer u.locks.lock(off, n, true)()
	if pattern == nil {
		return u.zero(ctx, off, n, true)
	}
	return u.repeat(ctx, pattern, off, n)
}
