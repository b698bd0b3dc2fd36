package nbd

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// queued waits until n claims are in the queue.
func (b *budget) queued(t *testing.T, n int32) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); b.waiting.Load() != n; {
		if time.Now().After(end) {
			t.Fatalf("%d claims are waiting, not %d", b.waiting.Load(), n)
		}
	}
}

// TestBudgetTurns grants claims in the order in which they were made, also small ones behind a large one.
func TestBudgetTurns(t *testing.T) {
	b := budget{limit: 10}
	if !b.try(8) || b.try(3) {
		t.Fatal("8 of 10 and then 3 more")
	}
	granted := make(chan int64, 3)
	for i, n := range []int64{9, 1, 1} {
		go func() {
			if err := b.wait(context.Background(), n); err == nil {
				granted <- n
			}
		}()
		b.queued(t, int32(i)+1)
	}
	if b.try(1) {
		t.Error("a claim got ahead of those that wait")
	}
	b.release(8)
	if n := <-granted + <-granted; n != 10 {
		t.Errorf("claims of %d bytes were granted first, not 9 and 1", n)
	}
	b.queued(t, 1)
	b.release(9)
	<-granted
	if got := b.used.Load(); got != 2 {
		t.Errorf("%d bytes are in use, not 2", got)
	}
}

// TestBudgetCancel gives up a claim: those behind it go ahead.
func TestBudgetCancel(t *testing.T) {
	b := budget{limit: 10}
	b.force(8)
	ctx, cancel := context.WithCancel(context.Background())
	large, small := make(chan error, 1), make(chan error, 1)
	go func() { large <- b.wait(ctx, 10) }()
	b.queued(t, 1)
	go func() { small <- b.wait(context.Background(), 2) }()
	b.queued(t, 2)
	cancel()
	if err := <-large; !errors.Is(err, context.Canceled) {
		t.Errorf("the claim that was given up: %v", err)
	}
	if err := <-small; err != nil {
		t.Error(err)
	}
	b.release(10)
	if b.used.Load() != 0 || b.waiting.Load() != 0 {
		t.Errorf("%d bytes in use, %d claims at the end", b.used.Load(), b.waiting.Load())
	}
}

// TestBudgetTogether has many claims at once: never more than the limit is granted, and nobody waits for ever.
func TestBudgetTogether(t *testing.T) {
	const limit = 100
	b := budget{limit: limit}
	var held atomic.Int64
	var all sync.WaitGroup
	for i := range 16 {
		all.Add(1)
		go func() {
			defer all.Done()
			random := rand.New(rand.NewPCG(uint64(i), 1))
			for range 500 {
				n := 1 + random.Int64N(limit)
				ctx, cancel := context.WithCancel(context.Background())
				if random.IntN(4) == 0 {
					cancel() // may come before or after the grant
				}
				if b.try(n) || b.wait(ctx, n) == nil {
					if got := held.Add(n); got > limit {
						t.Errorf("%d bytes are granted", got)
					}
					held.Add(-n)
					b.release(n)
				}
				cancel()
			}
		}()
	}
	all.Wait()
	if b.used.Load() != 0 || b.waiting.Load() != 0 {
		t.Errorf("%d bytes in use, %d claims at the end", b.used.Load(), b.waiting.Load())
	}
}

func TestPeerKey(t *testing.T) {
	for _, tc := range []struct {
		peer Peer
		want string
	}{
		{Peer{Network: "unix", Process: &Process{UID: 7, PID: 1}}, "uid 7"},
		{Peer{Network: "tcp", Addr: "10.0.0.1:5000"}, "10.0.0.1"},
		{Peer{Network: "tcp", Addr: "[::ffff:10.0.0.1]:5001"}, "10.0.0.1"},
		{Peer{Network: "tcp", Addr: "[fe80::1%eth0]:5001"}, "fe80::1%eth0"},
		{Peer{Network: "unix", Addr: "@"}, "unix"},
	} {
		if got := tc.peer.key(); got != tc.want {
			t.Errorf("key of %+v is %q, want %q", tc.peer, got, tc.want)
		}
	}
}
