package nbd_test

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/droverproject/drover/internal/certtest"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// startTCP serves on the loopback interface, where clients can come from different addresses.
func startTCP(t *testing.T, o nbd.Options, exports ...nbd.Export) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no TCP here: %v", err)
	}
	return startOn(t, l, o, exports...)
}

// dialFrom connects from an address of the loopback network, which makes another client.
func (s *server) dialFrom(addr string) net.Conn {
	s.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}
	nc, err := d.Dial(s.network, s.addr)
	if err != nil {
		s.t.Skipf("cannot connect from %s: %v", addr, err)
	}
	s.t.Cleanup(func() { nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		s.t.Fatal(err)
	}
	return nc
}

func (s *server) openFrom(addr string) (*nbdtest.Client, error) {
	s.t.Helper()
	c, err := nbdtest.NewClient(s.dialFrom(addr))
	if err == nil {
		err = c.Go("")
	}
	return c, err
}

// refusals collects the connections that are closed at once.
func refusals(o nbd.Options) (nbd.Options, <-chan error) {
	refused := make(chan error, 1000)
	o.Observer.Refused = func(_ nbd.Peer, err error) { refused <- err }
	return o, refused
}

func TestMaxConnectionsPerClient(t *testing.T) {
	noLeaks(t)
	o, refused := refusals(nbd.Options{MaxConnectionsPerClient: 2})
	o, ended := endings(o)
	s := startTCP(t, o, nbd.Export{Device: nbdtest.NewDevice(4096)})
	open := func(from string) *nbdtest.Client {
		c, err := s.openFrom(from)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := open("127.0.0.1")
	open("127.0.0.1")
	if _, err := s.openFrom("127.0.0.1"); err == nil {
		t.Error("a third connection was served")
	}
	if err := wait(t, refused, "the refusal"); !errors.Is(err, nbd.ErrTooMany) {
		t.Errorf("refused with %v", err)
	}
	do(t, open("127.0.0.2"), nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	wait(t, ended, "the end of the first connection")
	for {
		// The place is free a moment after the end was told.
		if c, err := s.openFrom("127.0.0.1"); err == nil {
			do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
			break
		}
		wait(t, refused, "the refusal")
	}
	// A connection that is handed over counts as well.
	ours, theirs := net.Pipe()
	defer ours.Close()
	served := background(func() error { return s.ServeConn(t.Context(), theirs) })
	c, err := nbdtest.NewClient(ours)
	if err == nil {
		err = c.Go("")
	}
	if err != nil {
		t.Fatal(err)
	}
	leave(t, c)
	if err := wait(t, served, "the end of the pipe"); err != nil {
		t.Errorf("ServeConn: %v", err)
	}
}

// TestSilentClients has one client open connections and say nothing: it gets half of them all, and another one is served
// meanwhile.
func TestSilentClients(t *testing.T) {
	noLeaks(t)
	o, refused := refusals(nbd.Options{MaxConnections: 20, HandshakeTimeout: -1})
	s := startTCP(t, o, nbd.Export{Device: nbdtest.NewDevice(4096)})
	for range 30 {
		s.dialFrom("127.0.0.1")
	}
	for range 20 {
		if err := wait(t, refused, "the refusal of a silent connection"); !errors.Is(err, nbd.ErrTooMany) {
			t.Errorf("refused with %v", err)
		}
	}
	c, err := s.openFrom("127.0.0.2")
	if err != nil {
		t.Fatal(err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)
}

// TestSlowLoris has a client that sends its handshake byte by byte: its time runs all the same.
func TestSlowLoris(t *testing.T) {
	noLeaks(t)
	o, ended := endings(nbd.Options{HandshakeTimeout: 300 * time.Millisecond})
	s := start(t, o, nbd.Export{Device: nbdtest.NewDevice(4096)})
	c := s.dial()
	for option := optionBytes(nbdtest.OptList, nil); ; {
		var err error
		for i := 0; i < len(option) && err == nil; i++ {
			_, err = c.Conn.Write(option[i : i+1])
		}
		if err != nil {
			break
		}
	}
	if err := wait(t, ended, "the end of a slow client"); err == nil {
		t.Error("the handshake of a slow client ended well")
	}
}

// TestFloodTotal has one client fill the memory of all connections: another client is served.
func TestFloodTotal(t *testing.T) {
	noLeaks(t)
	const request = 2 << 20
	// 16 MiB for all, 8 for the flood; bounds of the connections themselves would let it have ten times 64.
	o := nbd.Options{MaxRequest: request, MaxTotalMemory: 8 * request, StallTimeout: -1}
	dev := nbdtest.NewDevice(4 * request)
	s := startTCP(t, o, nbd.Export{Device: nbdtest.Slow{Device: dev}})
	before := heap()
	for i := range 10 {
		c, err := s.openFrom("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		var p []byte
		for range 1000 {
			p = c.Encode(p, nbdtest.Request{Cmd: nbdtest.Read, Length: request})
		}
		// The socket takes in all of it.
		if _, err := c.Conn.Write(p); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			continue // the first has taken all that the client gets
		}
		if _, err := io.ReadFull(c.Conn, make([]byte, 16)); err != nil { // the server is sending now
			t.Fatal(err)
		}
	}
	c, err := s.openFrom("127.0.0.2")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Off: uint64(i), Data: make([]byte, request)}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: request}, 0)
	}
	// Buffers in pools and of the test itself come on top.
	if grown := heap() - before; grown > 64<<20 {
		t.Errorf("the flood took %d MiB", grown>>20)
	}
}

// TestLargePayload has writes come in that cost more than the connection's bound, which lets them through one by one.
func TestLargePayload(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(8 << 20)
	s := start(t, nbd.Options{MaxMemory: 1 << 20}, nbd.Export{Device: dev})
	c := s.open(simple, "")
	for i := range 3 {
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Off: uint64(i) << 20, Data: make([]byte, 3<<20)}, 0)
	}
}

// TestStall cuts off clients that stand still with something of the server's in their hands, and no others.
func TestStall(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	const limit = 100 * time.Millisecond
	o, ended := endings(nbd.Options{StallTimeout: limit, TLS: serverTLS(ca, false, false)})
	s := start(t, o, nbd.Export{Device: nbdtest.NewDevice(32 << 20)})
	idle := s.open(structured, "")
	do(t, idle, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)
	for _, encrypted := range []bool{false, true} {
		for name, p := range map[string]nbdtest.Request{
			"replies": {Cmd: nbdtest.Read, Length: 32 << 20},
			"payload": {Cmd: nbdtest.Write, Length: 1 << 20, Data: make([]byte, 200_000)},
		} {
			c := s.dial()
			var err error
			if encrypted {
				err = c.StartTLS(clientTLS(ca))
			}
			if err == nil {
				err = c.Go("")
			}
			if err == nil {
				_, err = c.Conn.Write(c.Encode(nil, p))
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := wait(t, ended, "the end of a client that stands still"); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s (encrypted: %v): ended with %v", name, encrypted, err)
			}
		}
	}
	// The deadlines of an idle client's past do it no harm.
	do(t, idle, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)
}

// TestStallTrickle has a client send a payload so slowly that it never ends, but never stand still.
func TestStallTrickle(t *testing.T) {
	noLeaks(t)
	o, ended := endings(nbd.Options{StallTimeout: 100 * time.Millisecond})
	s := start(t, o, nbd.Export{Device: nbdtest.NewDevice(4 << 20)})
	c := s.open(simple, "")
	p := c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Write, Length: 1 << 20, Data: make([]byte, 1)})
	var err error
	for end := time.Now().Add(patience); err == nil && time.Now().Before(end); p = p[:1] {
		if _, err = c.Conn.Write(p); err == nil {
			time.Sleep(time.Millisecond) // the client is slow: this is what is tested
		}
	}
	if err := wait(t, ended, "the end of a client that trickles"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("ended with %v", err)
	}
}
