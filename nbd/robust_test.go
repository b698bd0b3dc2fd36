package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// gate holds up calls on a device until it is opened.
type gate struct {
	entered chan string // gets the name of each call that is held up
	open    chan struct{}
	once    sync.Once
}

// newGate puts a gate into dev that holds up the calls that match.
func newGate(t *testing.T, dev *nbdtest.Device, match func(op string, off int64) bool) *gate {
	g := &gate{entered: make(chan string, 10_000), open: make(chan struct{})}
	dev.Gate = func(ctx context.Context, op string, off, n int64) error {
		if !match(op, off) {
			return nil
		}
		g.entered <- op
		select {
		case <-g.open:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	t.Cleanup(g.release)
	return g
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func all(string, int64) bool { return true }

// TestSlowRequestDelaysNobody has fast requests overtake slow ones on the same connection.
func TestSlowRequestDelaysNobody(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(1 << 20)
	dev.TryErr = func(write bool, off, n int64) error {
		if off == 4096 {
			return block.ErrWouldBlock
		}
		return nil
	}
	g := newGate(t, dev, func(op string, off int64) bool { return op == "flush" || off == 4096 })
	s := start(t, nbd.Options{}, nbd.Export{Device: dev})
	c := s.open(simple, "")
	slow := []nbdtest.Request{
		{Cmd: nbdtest.Read, Off: 4096, Length: 4096, Cookie: 1001}, {Cmd: nbdtest.Flush, Cookie: 1002},
		{Cmd: nbdtest.Write, Off: 4096, Data: make([]byte, 4096), Cookie: 1003},
		{Cmd: nbdtest.Write, Off: 4096, Data: make([]byte, 200_000), Cookie: 1004},
		{Cmd: nbdtest.Trim, Off: 4096, Length: 1, Cookie: 1005},
	}
	if _, err := c.Send(slow...); err != nil {
		t.Fatal(err)
	}
	for range slow {
		wait(t, g.entered, "the start of a slow request")
	}
	for i := range 50 {
		for _, r := range []nbdtest.Request{
			{Cmd: nbdtest.Read, Off: 8192, Length: 4096, Cookie: uint64(i + 1)},
			{Cmd: nbdtest.Read, Off: 8192, Length: 100_000, Cookie: uint64(i + 1)},
			{Cmd: nbdtest.Write, Off: 8192, Data: []byte("fast"), Cookie: uint64(i + 1)},
		} {
			if got := do(t, c, r, 0); got.Cookie != r.Cookie {
				t.Fatalf("got the reply to %d while waiting for %d", got.Cookie, r.Cookie)
			}
		}
	}
	g.release()
	for range slow {
		if r, err := c.Recv(); err != nil || r.Errno != 0 || r.Cookie < 1001 {
			t.Fatalf("slow request: %+v, %v", r, err)
		}
	}
}

// TestShutdownDrains shuts down while requests are under way: they are answered before the connection ends.
func TestShutdownDrains(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(1 << 20)
	g := newGate(t, dev, all)
	s := start(t, nbd.Options{}, nbd.Export{Device: dev})
	idle, busy, shaking := s.open(simple, ""), s.open(structured, ""), s.dial()
	if _, err := busy.Send(nbdtest.Request{Cmd: nbdtest.Flush},
		nbdtest.Request{Cmd: nbdtest.Write, Flags: nbdtest.FUA, Data: []byte("kept")}); err != nil {
		t.Fatal(err)
	}
	wait(t, g.entered, "the flush or the write")
	wait(t, g.entered, "the flush or the write")
	down := background(func() error { return s.Shutdown(context.Background()) })
	// The idle connections end at once, which shows that the drain has begun.
	for _, c := range []*nbdtest.Client{idle, shaking} {
		if _, err := io.ReadAll(c.Conn); err != nil {
			t.Errorf("idle connection: %v", err)
		}
	}
	select {
	case err := <-down:
		t.Fatalf("Shutdown returned %v with requests under way", err)
	default:
	}
	g.release()
	for range 2 {
		if r, err := busy.Recv(); err != nil || r.Errno != 0 {
			t.Errorf("request under way: %+v, %v", r, err)
		}
	}
	if _, err := busy.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("drained connection: %v", err)
	}
	if err := wait(t, down, "the end of Shutdown"); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if got := string(dev.Bytes(0, 4)); got != "kept" {
		t.Errorf("device holds %q", got)
	}
	if _, err := net.Dial(s.network, s.addr); err == nil {
		t.Error("the listener is still open")
	}
}

// TestShutdownByForce cuts off what does not end in time, a stuck device and a client that takes no replies included.
func TestShutdownByForce(t *testing.T) {
	noLeaks(t)
	stuck, good := nbdtest.NewDevice(1<<20), nbdtest.NewDevice(32<<20)
	g := newGate(t, stuck, all)
	s := start(t, nbd.Options{}, nbd.Export{Name: "stuck", Device: stuck}, nbd.Export{Name: "good", Device: good})
	a, b := s.open(simple, "stuck"), s.open(simple, "good")
	if _, err := a.Send(nbdtest.Request{Cmd: nbdtest.Flush}); err != nil {
		t.Fatal(err)
	}
	wait(t, g.entered, "the flush")
	if _, err := b.Send(nbdtest.Request{Cmd: nbdtest.Read, Length: 32 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b.Conn, make([]byte, 16)); err != nil { // now the server is sending
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := a.Recv(); err == nil {
		t.Error("a request on a stuck device was answered")
	}
}

func TestRemoveExport(t *testing.T) {
	noLeaks(t)
	x, y := nbdtest.NewDevice(1<<20), nbdtest.NewDevice(1<<20)
	g := newGate(t, x, all)
	s := start(t, nbd.Options{}, nbd.Export{Name: "x", Device: x}, nbd.Export{Name: "y", Device: y})
	cx, cy := s.open(simple, "x"), s.open(simple, "y")
	late := s.dial()
	if _, err := cx.Send(nbdtest.Request{Cmd: nbdtest.Flush}); err != nil {
		t.Fatal(err)
	}
	wait(t, g.entered, "the flush")
	removed := background(func() error { return s.RemoveExport(context.Background(), "x") })
	for {
		if err := late.Info("x"); err != nil {
			break // the export is gone from the list
		}
	}
	select {
	case err := <-removed:
		t.Fatalf("RemoveExport returned %v while the device was in use", err)
	default:
	}
	g.release()
	if r, err := cx.Recv(); err != nil || r.Errno != 0 {
		t.Errorf("request under way: %+v, %v", r, err)
	}
	if err := wait(t, removed, "the end of RemoveExport"); err != nil {
		t.Errorf("RemoveExport: %v", err)
	}
	do(t, cy, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	if err := s.AddExport(nbd.Export{Name: "x", Device: y}); err != nil {
		t.Error(err)
	}
	if err := late.Go("x"); err != nil {
		t.Error(err)
	}
}

// TestUnplug tears connections apart at every kind of moment; the server has to get over it.
func TestUnplug(t *testing.T) {
	noLeaks(t)
	var open atomic.Int64
	ended := make(chan nbd.Stats, 100)
	o := nbd.Options{Observer: nbd.Observer{
		Connected:    func(nbd.Conn) { open.Add(1) },
		Disconnected: func(c nbd.Conn, s nbd.Stats, err error) { ended <- s },
	}}
	dev := nbdtest.NewDevice(64 << 20)
	dev.TryErr = func(write bool, off, n int64) error {
		if off >= 1<<20 {
			return block.ErrWouldBlock
		}
		return nil
	}
	s := start(t, o, nbd.Export{Device: dev})
	for name, act := range map[string]func(c *nbdtest.Client) error{
		"after half a header": func(c *nbdtest.Client) error {
			_, err := c.Conn.Write(c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Read, Length: 1})[:13])
			return err
		},
		"within a small payload": func(c *nbdtest.Client) error {
			_, err := c.Conn.Write(c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Write, Length: 4096, Data: []byte("x")}))
			return err
		},
		"within a large payload": func(c *nbdtest.Client) error {
			p := c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Write, Length: 1 << 20, Data: make([]byte, 150_000)})
			_, err := c.Conn.Write(p)
			return err
		},
		"within a payload that is skipped": func(c *nbdtest.Client) error {
			p := c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Write, Length: 33 << 20, Data: make([]byte, 150_000)})
			_, err := c.Conn.Write(p)
			return err
		},
		"with replies under way": func(c *nbdtest.Client) error {
			var list []nbdtest.Request
			for i := range 40 {
				list = append(list, nbdtest.Request{Cmd: nbdtest.Read, Off: uint64(i) << 16, Length: 1 << 20},
					nbdtest.Request{Cmd: nbdtest.Read, Off: uint64(i) << 12, Length: 4096})
			}
			if _, err := c.Send(list...); err != nil {
				return err
			}
			_, err := io.ReadFull(c.Conn, make([]byte, 1000))
			return err
		},
		"with requests under way, by DISC": func(c *nbdtest.Client) error {
			_, err := c.Send(nbdtest.Request{Cmd: nbdtest.Write, Off: 2 << 20, Data: []byte("late")},
				nbdtest.Request{Cmd: nbdtest.Disc})
			return err
		},
		"with a request and the end in one go": func(c *nbdtest.Client) error {
			_, err := c.Send(nbdtest.Request{Cmd: nbdtest.Flush})
			return err
		},
	} {
		c := s.open(simple, "")
		if err := act(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		c.Conn.Close()
		wait(t, ended, "the end of a connection unplugged "+name)
	}
	if got := string(dev.Bytes(2<<20, 4)); got != "late" {
		t.Errorf("a write before DISC got lost: %q", got)
	}
}

// TestHalfClose has a client that ends its side of the stream together with its last requests and still waits for the
// replies: it gets them all, and then the end. The end may come with the same event as the last request.
func TestHalfClose(t *testing.T) {
	noLeaks(t)
	s := start(t, nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(1 << 20)})
	for range 5 {
		c := s.open(simple, "")
		if _, err := c.Send(nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, nbdtest.Request{Cmd: nbdtest.Flush}); err != nil {
			t.Fatal(err)
		}
		if err := c.Conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if r, err := c.Recv(); err != nil || r.Errno != 0 {
				t.Fatalf("%+v, %v", r, err)
			}
		}
		if _, err := c.Recv(); !errors.Is(err, io.EOF) {
			t.Fatalf("after the last reply: %v", err)
		}
	}
}

// TestStuckClient has clients that send requests and take no replies: they fill their own buffers, no more, and another
// client does not notice.
func TestStuckClient(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(64 << 20)
	var inflight, most atomic.Int64
	dev.Gate = func(ctx context.Context, op string, off, n int64) error {
		for now, old := inflight.Add(1), most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
		}
		inflight.Add(-1)
		return nil
	}
	const maxInflight = 4
	s := start(t, nbd.Options{MaxInflight: maxInflight, MaxMemory: 8 << 20}, nbd.Export{Device: dev})
	flood := func(r nbdtest.Request) *nbdtest.Client {
		c := s.open(simple, "")
		var p []byte
		for len(p) < 64<<10 {
			p = c.Encode(p, r)
		}
		// The flood goes on until the server takes no more for a while.
		for {
			if err := c.Conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Conn.Write(p); errors.Is(err, os.ErrDeadlineExceeded) {
				return c
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	before := heap()
	clients := []*nbdtest.Client{
		flood(nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}),
		flood(nbdtest.Request{Cmd: nbdtest.Read, Length: 1 << 20}),
		flood(nbdtest.Request{Cmd: nbdtest.Flush}),
		flood(nbdtest.Request{Cmd: nbdtest.Write, Length: 100_000, Data: make([]byte, 100_000)}),
	}
	if grown := heap() - before; grown > 64<<20 {
		t.Errorf("%d MiB of memory were taken by clients that take no replies", grown>>20)
	}
	if n := runtime.NumGoroutine(); n > 100 {
		t.Errorf("%d goroutines", n)
	}
	if most.Load() > int64(len(clients)*maxInflight) {
		t.Errorf("%d requests were under way at once", most.Load())
	}
	c := s.open(structured, "")
	for range 100 {
		do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1 << 20}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Flush}, 0)
	}
	// The flooded connections are only stalled: their replies are all there for who takes them.
	p := make([]byte, 1<<20)
	for _, c := range clients[:2] {
		for n := 0; n < 8<<20; {
			m, err := c.Conn.Read(p)
			if err != nil {
				t.Fatal(err)
			}
			n += m
		}
	}
	for _, c := range clients {
		c.Conn.Close()
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestMaxInflight fills the slots of a connection: the next request waits, and goes on when one is free.
func TestMaxInflight(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(1 << 20)
	g := newGate(t, dev, all)
	s := start(t, nbd.Options{MaxInflight: 3}, nbd.Export{Device: dev})
	c := s.open(simple, "")
	list := []nbdtest.Request{{Cmd: nbdtest.Read, Length: 512}} // answered in place, and before the reader waits
	for range 5 {
		list = append(list, nbdtest.Request{Cmd: nbdtest.Flush})
	}
	if _, err := c.Send(list...); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Recv(); err != nil || r.Cookie != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	for range 3 {
		wait(t, g.entered, "the start of a flush")
	}
	if len(g.entered) != 0 {
		t.Error("more flushes are under way than there are slots")
	}
	g.release()
	for range 5 {
		if r, err := c.Recv(); err != nil || r.Errno != 0 {
			t.Fatalf("%+v, %v", r, err)
		}
	}
}

// TestMaxMemory has requests that cost more than the bound go one by one.
func TestMaxMemory(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(64 << 20)
	var inflight atomic.Int64
	dev.Gate = func(ctx context.Context, op string, off, n int64) error {
		defer inflight.Add(-1)
		if inflight.Add(1) > 1 {
			return errors.New("two at once")
		}
		runtime.Gosched()
		return nil
	}
	s := start(t, nbd.Options{MaxMemory: 1 << 20}, nbd.Export{Device: nbdtest.Slow{Device: dev}})
	c := s.open(simple, "")
	var list []nbdtest.Request
	for i := range 20 {
		list = append(list, nbdtest.Request{Cmd: nbdtest.Read, Off: uint64(i) << 20, Length: 2 << 20})
	}
	if _, err := c.Send(list...); err != nil {
		t.Fatal(err)
	}
	for range list {
		if r, err := c.Recv(); err != nil || r.Errno != 0 {
			t.Fatalf("error %d, %v", r.Errno, err)
		}
	}
}

func TestMaxConnections(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(512)
	s := start(t, nbd.Options{MaxConnections: 2}, nbd.Export{Device: dev})
	a, b := s.open(simple, ""), s.open(simple, "")
	third := make(chan error, 1)
	nc, err := net.Dial(s.network, s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	go func() {
		c, err := nbdtest.NewClient(nc)
		if err == nil {
			err = c.Go("")
		}
		third <- err
	}()
	do(t, a, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	do(t, b, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	select {
	case err := <-third:
		t.Fatalf("a third client was served: %v", err)
	default:
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, third, "the third client's turn"); err != nil {
		t.Error(err)
	}
}

func TestHandshakeTimeout(t *testing.T) {
	noLeaks(t)
	ended := make(chan error, 1)
	s := start(t, nbd.Options{HandshakeTimeout: time.Millisecond, Observer: nbd.Observer{
		Disconnected: func(c nbd.Conn, s nbd.Stats, err error) { ended <- err },
	}}, nbd.Export{Device: nbdtest.NewDevice(512)})
	nc, err := net.Dial(s.network, s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if err := wait(t, ended, "the end of a silent client"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("handshake ended with %v", err)
	}
}

// TestServeContext ends a listener by its context; the connections live on.
func TestServeContext(t *testing.T) {
	noLeaks(t)
	s := start(t, nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(512)})
	l, err := net.Listen("unix", t.TempDir()+"/t")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := background(func() error { return s.Serve(ctx, l) })
	c := (&server{Server: s.Server, t: t, network: "unix", addr: l.Addr().String()}).open(simple, "")
	cancel()
	if err := wait(t, served, "the end of Serve"); !errors.Is(err, context.Canceled) {
		t.Errorf("Serve returned %v", err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
}

// TestServeConnPipe serves a connection that is no socket, and cuts it off.
func TestServeConnPipe(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(4 << 20)
	s := nbd.NewServer(nbd.Options{})
	if err := s.AddExport(nbd.Export{Device: dev}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ours, theirs := net.Pipe()
	served := background(func() error { return s.ServeConn(ctx, theirs) })
	c, err := nbdtest.NewClient(ours)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	if err := c.Go(""); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("pipe"), 500_000)
	do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: data}, 0)
	if got := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: uint64(len(data))}, 0); !bytes.Equal(got.Data, data) {
		t.Error("read other data than was written")
	}
	g := newGate(t, dev, all)
	if _, err := c.Send(nbdtest.Request{Cmd: nbdtest.Flush}); err != nil {
		t.Fatal(err)
	}
	wait(t, g.entered, "the flush")
	cancel()
	if err := wait(t, served, "the end of ServeConn"); !errors.Is(err, context.Canceled) {
		t.Errorf("ServeConn returned %v", err)
	}
}

// brokenListener fails a few times before it has a connection.
type brokenListener struct {
	net.Listener
	failures int
}

func (l *brokenListener) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, fmt.Errorf("too many open files, say")
	}
	return l.Listener.Accept()
}

func TestAcceptFailures(t *testing.T) {
	noLeaks(t)
	l, err := net.Listen("unix", t.TempDir()+"/b")
	if err != nil {
		t.Fatal(err)
	}
	var failures atomic.Int64
	s := startOn(t, &brokenListener{l, 3}, nbd.Options{Observer: nbd.Observer{
		AcceptFailed: func(net.Addr, error) { failures.Add(1) },
	}}, nbd.Export{Device: nbdtest.NewDevice(512)})
	do(t, s.open(simple, ""), nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	if failures.Load() != 3 {
		t.Errorf("observer was told of %d failures, not of 3", failures.Load())
	}
}

// TestManyClients has clients come and go from all sides at once, each with a piece of the disk to itself.
func TestManyClients(t *testing.T) {
	noLeaks(t)
	const clients, rounds, piece = 24, 4, 256 << 10
	dev := nbdtest.NewDevice(clients * piece)
	dev.TryErr = func(write bool, off, n int64) error {
		if off/4096%2 == 0 {
			return block.ErrWouldBlock
		}
		return nil
	}
	s := start(t, nbd.Options{MaxConnections: 8}, nbd.Export{Device: dev})
	visit := func(i, round int) error {
		c, err := nbdtest.Dial(s.network, s.addr)
		if err != nil {
			return err
		}
		defer c.Conn.Close()
		if round%2 == 1 {
			if err := c.WantStructured(); err != nil {
				return err
			}
		}
		if err := c.Go(""); err != nil {
			return err
		}
		var writes, reads []nbdtest.Request
		for j := range 32 {
			off, data := uint64(i*piece+j*8192+j%2*4096), bytes.Repeat([]byte{byte(i + j + round)}, 4096)
			writes = append(writes, nbdtest.Request{Cmd: nbdtest.Write, Off: off, Data: data})
			reads = append(reads, nbdtest.Request{Cmd: nbdtest.Read, Off: off, Length: 4096})
		}
		wrote := uint64(len(writes))
		for _, list := range [][]nbdtest.Request{writes, reads} {
			if _, err := c.Send(list...); err != nil {
				return err
			}
			for range list {
				r, err := c.Recv()
				if err != nil || r.Errno != 0 {
					return fmt.Errorf("error %d, %w", r.Errno, err)
				}
				if j := int(r.Cookie - wrote - 1); r.Cookie > wrote && r.Data[4095] != byte(i+j+round) {
					return fmt.Errorf("client %d read other data than it wrote", i)
				}
			}
		}
		if round%2 == 0 {
			// Leave in the middle of things.
			_, err = c.Send(reads[:5]...)
		}
		return err
	}
	errs := make(chan error, clients)
	for i := range clients {
		go func() {
			var err error
			for round := 0; round < rounds && err == nil; round++ {
				err = visit(i, round)
			}
			errs <- err
		}()
	}
	for range clients {
		if err := wait(t, errs, "a client's end"); err != nil {
			t.Error(err)
		}
	}
}
