package soak

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
)

// The clients of a life. Each owns every slots-th piece of the disk, so that no two change one sector at once but all of
// them share clusters.
const (
	steady   = 6 // work from start to end, two to a connection
	visitors = 3 // come, make some requests, and leave in order or not
	vanisher = 2 // come, make some requests, and are gone in the middle of one
	slots    = steady + visitors + vanisher
	// vanishings bounds how often a vanisher does it in one life: what it leaves is written no more in that life.
	vanishings = 15
)

// The bounds of a server's memory. What it holds for the image does not grow with time once it has been warm: the same
// clients use the same disk. So what is live is bounded, and Go's collector lets the heap grow to twice that at most; the
// rest is room for the requests in flight (those of slots clients, 350 KiB each) and for pages that the runtime has not
// given back yet. In a long life, of some 200,000 requests, a leak of a hundred and fifty bytes for each passes that bound.
const (
	allowedGrowth = 24 << 20
	allowedRSS    = 128 << 20
	allowedThread = 64 // each request that waits for the disk may hold one
)

// life is one server and its clients.
type life struct {
	srv      *harness.Server
	ledger   *harness.Ledger
	piece    int
	answered atomic.Int64 // requests
	clients  atomic.Int64
	vanished atomic.Int64
	ending   atomic.Bool // the server is being ended: connections break
}

// live serves the disk once: it lets clients warm the server up and leave, lets them come again for three times as many
// requests, and ends the server.
func live(t *testing.T, d *disk, e end, rng *rand.Rand, rest int, sum *summary) {
	t.Helper()
	l := &life{
		srv: harness.Start(t, harness.Serve{Image: d.image}), ledger: d.ledger,
		piece: []int{5, 24, 200, 700}[rng.IntN(4)],
	}
	sum.ended[e]++
	first := l.srv.Dial(t)
	d.ledger.Verify(t, first.Read)
	harness.OK(t, first.Close())
	base := atRest(t, l.srv, 0)

	requests := int64(500 + rng.IntN(1500))
	if rng.IntN(6) == 0 && *duration >= time.Minute {
		requests *= 40
	}
	warm := l.load(t, rng, requests, nil)
	atRest(t, l.srv, base.fds)
	var strike func()
	switch e {
	case killBusy:
		strike = l.srv.Kill
	case stopBusy:
		strike = l.srv.Stop
	}
	hot := l.load(t, rng, 3*requests, strike)
	if !e.busy() {
		atRest(t, l.srv, base.fds)
		if e == stopIdle {
			l.srv.Stop()
		} else if n := goroutines(t, l.srv.Abort()); n > rest {
			t.Errorf("all clients have left, and there are %d goroutines; after one client there were %d:\n%s", n, rest, l.srv.Output())
		} else {
			sum.maxGoroutines = max(sum.maxGoroutines, n)
		}
	}
	growth := hot.rss - warm.rss
	switch most := max(hot.rss, warm.rss); {
	case growth > allowedGrowth:
		t.Errorf("the server's memory grew from %.1f to %.1f MiB", mib(warm.rss), mib(hot.rss))
	case most > allowedRSS:
		t.Errorf("the server's memory grew to %.1f MiB", mib(most))
	case max(hot.threads, warm.threads) > allowedThread:
		t.Errorf("the server had %d threads", max(hot.threads, warm.threads))
	}
	sum.note(l, base, warm, hot, rest)
	if t.Failed() {
		t.Fatalf("%v; the server's output:\n%s", e, l.srv.Output())
	}
}

func (s *summary) note(l *life, base, warm, hot usage, rest int) {
	s.requests += l.answered.Load()
	s.clients += l.clients.Load()
	s.vanished += l.vanished.Load()
	s.maxRSS = max(s.maxRSS, warm.rss, hot.rss)
	s.maxGrowth = max(s.maxGrowth, hot.rss-warm.rss)
	s.fdsAtRest = max(s.fdsAtRest, base.fds)
	s.maxFds = max(s.maxFds, warm.fds, hot.fds)
	s.maxThreads = max(s.maxThreads, warm.threads, hot.threads)
	s.goroutines = rest
}
