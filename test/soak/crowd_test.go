package soak

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"github.com/droverproject/drover/test/harness"
)

// crowd is the clients that work at one time.
type crowd struct {
	*life
	until int64         // they leave when the life has answered so many requests
	ticks chan struct{} // a moment to look at the server
	idle  []io.Closer   // connections that are closed when the others have left
}

// worker is one client at a time, and changes the sectors of one slot.
type worker struct {
	*crowd
	slot int
	rng  *rand.Rand
}

// load has clients at work until so many requests have been answered; then it strikes, if strike is not nil. It returns the
// most that the server used meanwhile.
func (l *life) load(t *testing.T, rng *rand.Rand, requests int64, strike func()) usage {
	t.Helper()
	target := l.answered.Load() + requests
	c := &crowd{life: l, until: target, ticks: make(chan struct{}, 1)}
	if strike != nil {
		c.until = 1 << 62 // they go on until it hits them
	}
	c.loiter(t)
	var wg sync.WaitGroup
	var shared *harness.Client
	for slot := range slots {
		w := &worker{crowd: c, slot: slot, rng: rand.New(rand.NewPCG(rng.Uint64(), uint64(slot)))}
		work := w.visit
		switch {
		case slot < steady:
			if slot%2 == 0 {
				shared = c.dial(t)
			}
			client := shared
			work = func() error { return w.work(client, -1) }
		case slot >= steady+visitors:
			work = w.vanish
		}
		wg.Go(func() {
			if err := work(); err != nil {
				t.Errorf("client %d: %v", slot, err)
			}
		})
	}
	left := make(chan struct{})
	go func() {
		wg.Wait()
		close(left)
	}()
	most := c.watch(t, target, left, strike)
	for _, conn := range c.idle {
		conn.Close()
	}
	return most
}

// dial connects a client that stays until the others have left.
func (c *crowd) dial(t *testing.T) *harness.Client {
	t.Helper()
	client := c.srv.Dial(t)
	c.clients.Add(1)
	c.idle = append(c.idle, client)
	return client
}

// loiter connects clients that do nothing: one that is ready to, one that never says a word, one that says half of one.
func (c *crowd) loiter(t *testing.T) {
	t.Helper()
	c.dial(t)
	for _, word := range []string{"", "IHAVE"} {
		conn, err := net.Dial("unix", c.srv.Socket)
		harness.OK(t, err)
		_, err = io.WriteString(conn, word)
		harness.OK(t, err)
		c.clients.Add(1)
		c.idle = append(c.idle, conn)
	}
}

// watch looks at the server until the clients have left, and strikes when target requests have been answered.
func (c *crowd) watch(t *testing.T, target int64, left <-chan struct{}, strike func()) usage {
	t.Helper()
	var most usage
	for {
		select {
		case <-left:
			if strike != nil && !c.ending.Load() {
				strike() // they left because something went wrong
			}
			return most
		case <-c.ticks:
		}
		if c.ending.Load() {
			continue
		}
		u, err := look(c.srv.PID())
		if err != nil {
			t.Errorf("looking at the server: %v", err)
		}
		most.rss, most.threads, most.fds = max(most.rss, u.rss), max(most.threads, u.threads), max(most.fds, u.fds)
		if strike != nil && c.answered.Load() >= target {
			c.ending.Store(true)
			strike()
		}
	}
}

// count notes an answer, and every so often has the server looked at.
func (c *crowd) count() {
	if n := c.answered.Add(1); n%100 != 0 && n < c.until {
		return
	}
	select {
	case c.ticks <- struct{}{}:
	default:
	}
}

// over reports whether the clients are to leave.
func (c *crowd) over() bool { return c.answered.Load() >= c.until || c.ending.Load() }

// excuse returns nil for an error that comes of the end of the server.
func (c *crowd) excuse(err error) error {
	const shutdown = harness.NBDError(108)
	var content *harness.ContentError
	switch {
	case !c.ending.Load(), errors.As(err, &content):
		return err
	case harness.Answered(err) && !errors.Is(err, shutdown):
		return err
	}
	return nil
}

// pick draws a range of the worker's sectors of which none is in doubt; n is 0 if there is hardly any left.
func (w *worker) pick() (first, n int) {
	pieces := sectors / (w.piece * slots)
	for range 1000 {
		first = (w.rng.IntN(pieces)*slots + w.slot) * w.piece
		skip := w.rng.IntN(w.piece)
		n = 1 + w.rng.IntN(w.piece-skip)
		if !w.ledger.Doubtful(first+skip, n) {
			return first + skip, n
		}
	}
	return 0, 0
}

// work makes n requests on a connection, any number if n is negative.
func (w *worker) work(c *harness.Client, n int) error {
	for ; n != 0 && !w.over(); n-- {
		first, count := w.pick()
		if count == 0 {
			return nil
		}
		if err := w.ledger.Request(c, w.rng, first, count); err != nil {
			return w.excuse(err)
		}
		w.count()
	}
	return nil
}

// come connects; nil without an error means that the server has come to its end.
func (w *worker) come() (*harness.Client, error) {
	c, err := harness.Dial(w.srv.Socket, "")
	if err != nil {
		return nil, w.excuse(fmt.Errorf("connecting: %w", err))
	}
	w.clients.Add(1)
	return c, nil
}

// visit comes and goes, again and again.
func (w *worker) visit() error {
	for !w.over() {
		c, err := w.come()
		if c == nil {
			return err
		}
		err = w.work(c, 1+w.rng.IntN(30))
		if w.rng.IntN(3) == 0 {
			c.Drop()
		} else {
			c.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// vanish comes and disappears in the middle of requests; when it has left enough sectors in doubt, it visits.
func (w *worker) vanish() error {
	for range vanishings {
		if w.over() {
			return nil
		}
		c, err := w.come()
		if c == nil {
			return err
		}
		if err := w.work(c, w.rng.IntN(10)); err != nil {
			c.Drop()
			return err
		}
		first, n := w.pick()
		switch {
		case n == 0:
			c.Drop()
			return nil
		case w.rng.IntN(2) == 0:
			w.ledger.Vanish(c, w.rng, first, n)
		default:
			w.dropAmid(c, first, n)
		}
		w.vanished.Add(1)
	}
	return w.visit()
}

// dropAmid has several changes in flight when it drops the connection.
func (w *worker) dropAmid(c *harness.Client, first, n int) {
	var wg sync.WaitGroup
	parts := min(n, 4)
	for i := range parts {
		rng := rand.New(rand.NewPCG(w.rng.Uint64(), 1))
		from, to := first+n*i/parts, first+n*(i+1)/parts
		wg.Go(func() {
			// It fails, or it was quicker than the drop; the ledger knows which.
			_ = w.ledger.Change(c, rng, from, to-from)
		})
	}
	c.Drop()
	wg.Wait()
}
