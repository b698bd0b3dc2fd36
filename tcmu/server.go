package tcmu

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/scsi"
)

// workers bounds how many commands of one device run at once.
const workers = 64

// Doorbell is how the two sides of a ring get each other's attention.
type Doorbell interface {
	// Wait returns when the kernel may have added entries. An error ends the service.
	Wait() error
	// Ring has the kernel look at the completions.
	Ring() error
}

// Server runs the commands of one ring on a unit.
type Server struct {
	ring *Ring
	unit *scsi.Unit
	bell Doorbell

	pending atomic.Bool // completions that the kernel was not told of
	telling sync.Mutex
	failed  atomic.Pointer[error]
	todo    chan *Command
	running sync.WaitGroup

	// What Serve did so far: commands done at once, commands given to a worker, and how often it was woken.
	atOnce, handedOn, woken uint64
}

// NewServer makes a server. Nothing runs before Serve.
func NewServer(ring *Ring, unit *scsi.Unit, bell Doorbell) *Server {
	return &Server{ring: ring, unit: unit, bell: bell, todo: make(chan *Command, workers)}
}

// restEvery is after how many wake-ups Serve passes through the scheduler. A goroutine that does not for 10 ms counts as one that keeps
// others from running: the runtime's monitor takes its processor away in the next system call, and then looks every 20
// microseconds for a while.
const restEvery = 128

// Serve runs commands until the doorbell fails or the ring breaks, waits for those that run, and returns why.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for range workers {
		s.running.Go(func() {
			for c := range s.todo {
				s.complete(c, s.unit.Execute(ctx, c.CDB, c.Data))
			}
		})
	}
	defer s.running.Wait()
	defer close(s.todo)
	for {
		if err := s.drain(); err != nil {
			return err
		}
		if err := s.bell.Wait(); err != nil {
			return err
		}
		if s.woken++; s.woken%restEvery == 0 {
			runtime.Gosched()
		}
		if err := s.failed.Load(); err != nil {
			return *err
		}
	}
}

// tellAfter is how many bytes are moved for commands before the kernel is told of those that are done, though there are more:
// an initiator goes on meanwhile.
const tellAfter = 2 << 20

// drain takes every entry there is. What can be answered from memory is answered here, and the kernel is told once for
// all of it, or for so much of it.
func (s *Server) drain() error {
	moved := 0
	defer func() {
		if moved > 0 {
			s.tell()
		}
	}()
	for {
		c, _, err := s.ring.Next()
		if err != nil {
			return err
		}
		if c == nil {
			if s.ring.idle() {
				return nil
			}
			continue // a notice: aborted commands are completed like all others
		}
		r, ok := s.unit.TryExecute(c.CDB, c.Data)
		if !ok {
			s.handedOn++
			s.todo <- c
			continue
		}
		s.atOnce++
		moved += 1 + c.Data.Len()
		if err := s.ring.Complete(c.ID, result(c, r)); err != nil {
			return err
		}
		s.ring.Release(c)
		if moved >= tellAfter {
			s.tell()
			moved = 0
		}
	}
}

// complete ends a command from a worker.
func (s *Server) complete(c *Command, r scsi.Reply) {
	if err := s.ring.Complete(c.ID, result(c, r)); err != nil {
		s.fail(err)
		return
	}
	s.ring.Release(c)
	s.tell()
}

// fail has Serve end with err, unless something has failed before.
func (s *Server) fail(err error) { s.failed.CompareAndSwap(nil, &err) }

// tell has the kernel look at completions. One goroutine at a time does so, for all that complete meanwhile: whoever finds it
// at work leaves, and it looks again before and after it lets go.
func (s *Server) tell() {
	s.pending.Store(true)
	for s.pending.Load() {
		if !s.telling.TryLock() {
			return
		}
		for s.pending.Swap(false) {
			if err := s.bell.Ring(); err != nil {
				s.fail(err)
			}
		}
		s.telling.Unlock()
	}
}

// result says how much of the buffer the initiator may see. The rest of it is memory that other commands used before; where
// the kernel would copy it too, it is cleared.
func result(c *Command, r scsi.Reply) Result {
	res := Result{Reply: r}
	if scsi.DataIn(c.CDB) && r.In < c.Data.Len() {
		res.Truncate = r.In > 0
		c.Data.Clear(r.In)
	}
	return res
}
