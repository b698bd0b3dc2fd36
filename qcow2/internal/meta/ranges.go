package meta

import (
	"context"
	"sync"
)

// Ranges holds the guest cluster ranges whose mapping is being changed. Whoever changes the mapping of a guest cluster
// (allocation, copy-on-write, zeroing, discard) holds a range over it from before it looks at the old mapping until the
// new one is in place. Overwriting a cluster in place changes no mapping and takes no range.
//
// Ranges are granted in the order of asking: a newcomer waits for exactly those earlier ranges, held or waiting, that
// overlap its own, so nobody starves and nobody waits for a stranger.
type Ranges struct {
	mu   sync.Mutex
	head *Range // oldest
	tail *Range
}

// Range is a run of guest clusters [First, Last] held or waited for.
type Range struct {
	First, Last uint64
	prev, next  *Range
	done        chan struct{} // made by the first waiter; closed when the range is given up
}

var rangePool = sync.Pool{New: func() any { return new(Range) }}

// Lock waits until no earlier range overlaps [first, last]. It fails only with the context's error.
func (r *Ranges) Lock(ctx context.Context, first, last uint64) (*Range, error) {
	g := newRange(first, last)
	r.mu.Lock()
	var wait []chan struct{}
	for o := r.head; o != nil; o = o.next {
		if o.First > last || o.Last < first {
			continue
		}
		if o.done == nil {
			o.done = make(chan struct{})
		}
		wait = append(wait, o.done)
	}
	r.push(g)
	r.mu.Unlock()
	for _, c := range wait {
		select {
		case <-c:
		case <-ctx.Done():
			r.Unlock(g)
			return nil, ctx.Err()
		}
	}
	return g, nil
}

// TryLock is Lock, but reports false instead of waiting.
func (r *Ranges) TryLock(first, last uint64) (*Range, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for o := r.head; o != nil; o = o.next {
		if o.First <= last && o.Last >= first {
			return nil, false
		}
	}
	g := newRange(first, last)
	r.push(g)
	return g, true
}

// Unlock gives the range up; g must not be used afterwards.
func (r *Ranges) Unlock(g *Range) {
	r.mu.Lock()
	if g.prev != nil {
		g.prev.next = g.next
	} else {
		r.head = g.next
	}
	if g.next != nil {
		g.next.prev = g.prev
	} else {
		r.tail = g.prev
	}
	if g.done != nil {
		close(g.done)
	}
	r.mu.Unlock()
	*g = Range{}
	rangePool.Put(g)
}

func newRange(first, last uint64) *Range {
	g := rangePool.Get().(*Range)
	g.First, g.Last = first, last
	return g
}

func (r *Ranges) push(g *Range) {
	g.prev = r.tail
	if r.tail != nil {
		r.tail.next = g
	} else {
		r.head = g
	}
	r.tail = g
}
