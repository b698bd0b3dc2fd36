package nbd_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// patience is how long a test waits for what must happen before it fails.
const patience = 20 * time.Second

// server is a Server under test with one listener.
type server struct {
	*nbd.Server
	t       testing.TB
	network string
	addr    string
	served  chan error
}

// start serves exports on a unix socket, until the test ends.
func start(t testing.TB, o nbd.Options, exports ...nbd.Export) *server {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	return startOn(t, l, o, exports...)
}

func startOn(t testing.TB, l net.Listener, o nbd.Options, exports ...nbd.Export) *server {
	t.Helper()
	s := &server{Server: nbd.NewServer(o), t: t, network: l.Addr().Network(), addr: l.Addr().String()}
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	s.served = make(chan error, 1)
	go func() { s.served <- s.Serve(context.Background(), l) }()
	t.Cleanup(s.stop)
	return s
}

// stop shuts the server down and fails the test if that does not succeed.
func (s *server) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		s.t.Errorf("Shutdown: %v\n%s", err, stacks())
	}
	if s.served == nil {
		return
	}
	select {
	case err := <-s.served:
		if !errors.Is(err, nbd.ErrServerClosed) {
			s.t.Errorf("Serve returned %v", err)
		}
		s.served = nil
	case <-ctx.Done():
		s.t.Error("Serve did not return")
	}
}

// dial connects a client that fails rather than wait for ever.
func (s *server) dial() *nbdtest.Client {
	s.t.Helper()
	nc, err := net.Dial(s.network, s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		s.t.Fatal(err)
	}
	c, err := nbdtest.NewClient(nc)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// mode is the form of requests and replies that a client asks for.
type mode string

const (
	simple     mode = "simple"
	structured mode = "structured"
	extended   mode = "extended"
)

var modes = []mode{simple, structured, extended}

// open connects a client to an export.
func (s *server) open(m mode, export string) *nbdtest.Client {
	s.t.Helper()
	c := s.dial()
	var err error
	switch m {
	case structured:
		err = c.WantStructured()
	case extended:
		err = c.WantExtended()
	}
	if err == nil {
		err = c.Go(export)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// do sends a request and fails the test unless it is answered with want.
func do(t testing.TB, c *nbdtest.Client, r nbdtest.Request, want uint32) nbdtest.Reply {
	t.Helper()
	got, err := c.Do(r)
	if err != nil {
		t.Fatalf("command %d: %v", r.Cmd, err)
	}
	if got.Errno != want {
		t.Fatalf("command %d (flags %#x, offset %d, length %d) got error %d, want %d",
			r.Cmd, r.Flags, r.Off, max(r.Length, uint64(len(r.Data))), got.Errno, want)
	}
	return got
}

// noLeaks fails the test if goroutines of the server are left when everything else is cleaned up. Call it first.
func noLeaks(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		for deadline := time.Now().Add(patience); ; runtime.Gosched() {
			left := leftovers()
			if left == "" {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("goroutines are left:\n%s", left)
				return
			}
		}
	})
}

// leftovers returns the stacks of goroutines that run the server's code.
func leftovers() string {
	var left []string
	for _, g := range strings.Split(stacks(), "\n\n") {
		if strings.Contains(g, "drover/nbd.(*") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

func stacks() string {
	p := make([]byte, 1<<20)
	return string(p[:runtime.Stack(p, true)])
}

// wait fails the test if ch is not closed or sent to in time.
func wait[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("%s did not happen\n%s", what, stacks())
		panic("unreachable")
	}
}
