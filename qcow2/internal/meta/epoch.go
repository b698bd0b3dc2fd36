package meta

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
)

// ErrClosed is returned by Epochs.Enter after Close.
var ErrClosed = errors.New("image is closed")

// epochStripes spreads the counters of running requests over cache lines; a power of two.
const epochStripes = 8

type stripe struct {
	n atomic.Int64
	_ [56]byte
}

// Epochs knows which requests are running, without a lock on their way in or out. It answers two questions.
//
// Reclaim asks "has every request that began before this moment ended?": what was unlinked in epoch t may be reused once
// the current epoch is t+2 (Safe). Requests of the current epoch and of the one before may be running; the epoch
// advances only when nothing of the one before is left, so t+2 is reached only after everything of t has ended.
//
// Quiesce asks that nothing runs at all: it holds new requests at the door and waits for those inside.
type Epochs struct {
	current atomic.Uint64
	running [2][epochStripes]stripe // by parity of the epoch

	door atomic.Uint32 // doorOpen, doorHeld or doorClosed; changed under mu
	// empty: the door is not open and everybody inside has left. What the counts show then are requests that knock.
	empty atomic.Bool
	mu    sync.Mutex
	cond  sync.Cond
	held  int // nested Quiesce calls
}

const (
	doorOpen = iota
	doorHeld
	doorClosed
)

// Ticket stands for one running request.
type Ticket struct {
	parity, stripe uint8
}

// NewEpochs returns an Epochs with an open door.
func NewEpochs() *Epochs {
	e := &Epochs{}
	e.cond.L = &e.mu
	e.current.Store(2)
	return e
}

// Enter begins a request. It waits while the image is quiesced and fails with ErrClosed once it is closed.
func (e *Epochs) Enter() (Ticket, error) {
	s := uint8(rand.Uint32() % epochStripes)
	for {
		if e.door.Load() != doorOpen {
			if err := e.waitForDoor(); err != nil {
				return Ticket{}, err
			}
		}
		epoch := e.current.Load()
		t := Ticket{uint8(epoch & 1), s}
		e.running[t.parity][s].n.Add(1)
		// The count is up before the epoch and the door are looked at again: whoever changes either and then finds
		// the counts at zero can be sure that no request slipped in under the old value.
		if e.current.Load() == epoch && e.door.Load() == doorOpen {
			return t, nil
		}
		e.Exit(t)
	}
}

// TryEnter is Enter, but reports false where Enter would wait or fail.
func (e *Epochs) TryEnter() (Ticket, bool) {
	if e.door.Load() != doorOpen {
		return Ticket{}, false
	}
	t, err := e.Enter()
	return t, err == nil
}

// Exit ends a request.
func (e *Epochs) Exit(t Ticket) {
	e.running[t.parity][t.stripe].n.Add(-1)
	if e.door.Load() != doorOpen {
		e.mu.Lock()
		e.cond.Broadcast()
		e.mu.Unlock()
	}
}

func (e *Epochs) waitForDoor() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.door.Load() == doorHeld {
		e.cond.Wait()
	}
	if e.door.Load() == doorClosed {
		return ErrClosed
	}
	return nil
}

func (e *Epochs) drained(parity uint64) bool {
	var n int64
	for i := range e.running[parity] {
		n += e.running[parity][i].n.Load()
	}
	return n == 0
}

// Now returns the current epoch, to tag what has just been unlinked.
func (e *Epochs) Now() uint64 { return e.current.Load() }

// Safe reports whether every request that was running when Now returned tag has ended.
func (e *Epochs) Safe(tag uint64) bool {
	for e.current.Load() < tag+2 && !e.empty.Load() {
		if !e.tryAdvance() {
			return false
		}
	}
	return true
}

func (e *Epochs) tryAdvance() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	epoch := e.current.Load()
	if !e.drained((epoch + 1) & 1) {
		return false
	}
	e.current.Store(epoch + 1)
	return true
}

// Quiesce holds new requests at the door and returns once none is running. Each call is undone by Resume. It fails with
// ErrClosed, holding nothing, once the image is closed.
func (e *Epochs) Quiesce() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.door.Load() == doorClosed {
		return ErrClosed
	}
	e.held++
	e.door.Store(doorHeld)
	e.waitEmpty()
	return nil
}

// Resume undoes one Quiesce.
func (e *Epochs) Resume() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held--
	if e.held == 0 && e.door.Load() == doorHeld {
		e.empty.Store(false)
		e.door.Store(doorOpen)
	}
	e.cond.Broadcast()
}

// Pass makes Safe(tag) true for what was unlinked by now: it lets every running request end before new ones begin. It is
// called outside a request. It fails with ErrClosed once the image is closed.
func (e *Epochs) Pass(tag uint64) error {
	if e.Safe(tag) {
		return nil
	}
	if err := e.Quiesce(); err != nil {
		return err
	}
	defer e.Resume()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.current.Store(max(e.current.Load(), tag+2)) // nobody is inside, and who knocks finds the epoch changed
	return nil
}

// Close shuts the door for good and waits for the requests inside. It reports whether this call was the first.
func (e *Epochs) Close() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.door.Load() == doorClosed {
		return false
	}
	for e.held > 0 {
		e.cond.Wait()
	}
	if e.door.Load() == doorClosed {
		return false
	}
	e.door.Store(doorClosed)
	e.cond.Broadcast()
	e.waitEmpty()
	return true
}

// Closed reports whether Close was called.
func (e *Epochs) Closed() bool { return e.door.Load() == doorClosed }

// waitEmpty waits for every running request; mu is held and the door is not open.
func (e *Epochs) waitEmpty() {
	for !e.empty.Load() && (!e.drained(0) || !e.drained(1)) {
		e.cond.Wait()
	}
	e.empty.Store(true)
}
