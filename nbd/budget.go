package nbd

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// guaranteed is what each connection may hold whatever the others do: so a client whose requests are of a usual size makes
// progress beside any number of greedy ones.
const guaranteed = 1 << 20

// budget is an amount of memory that connections share. Who has to wait for a part of it gets it in turn, so that small
// claims do not starve a large one. Claims that do not wait cost two atomic operations.
type budget struct {
	limit   int64
	used    atomic.Int64
	waiting atomic.Int32 // length of queue

	mu    sync.Mutex
	queue []*claim
}

// claim is a wish for memory that could not be granted at once.
type claim struct {
	n       int64
	granted chan struct{}
}

// force takes n bytes, beyond the limit if need be.
func (b *budget) force(n int64) { b.used.Add(n) }

// try takes n bytes if they are free and nobody waits.
func (b *budget) try(n int64) bool { return b.waiting.Load() == 0 && b.fit(n) }

// fit takes n bytes if they are free.
func (b *budget) fit(n int64) bool {
	for {
		used := b.used.Load()
		if used+n > b.limit {
			return false
		}
		if b.used.CompareAndSwap(used, used+n) {
			return true
		}
	}
}

// exceeded reports whether more was taken than there is.
func (b *budget) exceeded() bool { return b.used.Load() > b.limit }

// wait takes n bytes, at most limit, as soon as they are free and everybody who asked before has got theirs.
func (b *budget) wait(ctx context.Context, n int64) error {
	b.mu.Lock()
	// Whoever gives memory back looks at waiting afterwards: either it sees this claim, or fit sees that memory.
	b.waiting.Add(1)
	if len(b.queue) == 0 && b.fit(n) {
		b.waiting.Add(-1)
		b.mu.Unlock()
		return nil
	}
	c := &claim{n: n, granted: make(chan struct{})}
	b.queue = append(b.queue, c)
	b.mu.Unlock()
	select {
	case <-c.granted:
		return nil
	case <-ctx.Done():
	}
	if !b.forget(c) {
		b.release(n) // it came too late
	}
	return ctx.Err()
}

// forget takes a claim out of the queue, and reports false if it is not there any more.
func (b *budget) forget(c *claim) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.queue, c)
	if i < 0 {
		return false
	}
	b.queue = slices.Delete(b.queue, i, i+1)
	b.waiting.Add(-1)
	b.grant() // the next ones may fit where this one did not
	return true
}

// release gives n bytes back.
func (b *budget) release(n int64) {
	b.used.Add(-n)
	if b.waiting.Load() == 0 {
		return
	}
	b.mu.Lock()
	b.grant()
	b.mu.Unlock()
}

// grant serves the queue as far as the memory goes; mu is locked.
func (b *budget) grant() {
	for len(b.queue) > 0 && b.fit(b.queue[0].n) {
		close(b.queue[0].granted)
		b.queue = slices.Delete(b.queue, 0, 1)
		b.waiting.Add(-1)
	}
}

// share takes cost bytes from what the connection's client may hold and from what the server has. The connection's own
// flow was charged before; modest says that it holds no more than what is guaranteed. It waits only for memory that others give back, and
// ends with the connection.
func (c *conn) share(cost int64, modest bool) error {
	own, all := &c.client.memory, &c.srv.memory
	if modest {
		own.force(cost)
		all.force(cost)
		return nil
	}
	for _, b := range []*budget{own, all} {
		if b.try(cost) {
			continue
		}
		// What the reader has to say is said before it waits, since the client may wait for it.
		c.sendBatch()
		if err := b.wait(c.ctx, cost); err != nil {
			if b == all {
				own.release(cost)
			}
			return err
		}
	}
	return nil
}

// unshare gives back what share took.
func (c *conn) unshare(cost int64) {
	if cost == 0 {
		return
	}
	c.client.memory.release(cost)
	c.srv.memory.release(cost)
}

// overdrawn reports whether a budget that the connection draws on is exceeded.
func (c *conn) overdrawn() bool { return c.client.memory.exceeded() || c.srv.memory.exceeded() }
