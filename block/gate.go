package block

import "sync"

// gate lets calls in until it is closed, and closing waits for those inside.
type gate struct {
	mu     sync.RWMutex // held for reading by every call that is inside
	closed bool
}

// enter returns nil, after which the caller must leave, or ErrClosed.
func (g *gate) enter() error {
	g.mu.RLock()
	if g.closed {
		g.mu.RUnlock()
		return ErrClosed
	}
	return nil
}

func (g *gate) leave() { g.mu.RUnlock() }

// alone waits until nobody is inside and runs fn before anybody else comes in.
func (g *gate) alone(fn func() error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return ErrClosed
	}
	return fn()
}

// close waits until nobody is inside. It reports whether this call was the one that closed the gate.
func (g *gate) close() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.closed = true
	return true
}
