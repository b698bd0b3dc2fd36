package nbd_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

func readAll(t testing.TB, r io.Reader) []byte {
	t.Helper()
	p, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// maxRequest is the longest request of the servers that each starts.
const maxRequest = 4 << 20

// each runs a test in every mode, over devices that answer in place, never in place, and now and then in place.
func each(t *testing.T, size int64, test func(t *testing.T, m mode, dev *nbdtest.Device, c *nbdtest.Client)) {
	for _, m := range modes {
		for _, kind := range []string{"in place", "by workers", "mixed"} {
			t.Run(fmt.Sprintf("%s %s", m, kind), func(t *testing.T) {
				noLeaks(t)
				dev := nbdtest.NewDevice(size)
				var d block.Device = dev
				switch kind {
				case "by workers":
					d = nbdtest.Slow{Device: dev}
				case "mixed":
					dev.TryErr = func(write bool, off, n int64) error {
						if off/512%3 == 0 {
							return block.ErrWouldBlock
						}
						return nil
					}
				}
				s := start(t, nbd.Options{MaxRequest: maxRequest}, nbd.Export{Device: d})
				test(t, m, dev, s.open(m, ""))
			})
		}
	}
}

func TestReadWrite(t *testing.T) {
	const disk = 4 << 20
	each(t, disk, func(t *testing.T, m mode, dev *nbdtest.Device, c *nbdtest.Client) {
		noise := rand.NewChaCha8([32]byte{1, 2})
		rnd := rand.New(noise)
		want := make([]byte, disk)
		sizes := []int{0, 1, 511, 512, 4096, 65535, 65536, 65537, 200_000, 1 << 20, 1<<20 + 1}
		for i := range 60 {
			n := sizes[i%len(sizes)]
			off := rnd.IntN(disk - n + 1)
			data := make([]byte, n)
			_, _ = noise.Read(data) // it never fails
			r := nbdtest.Request{Cmd: nbdtest.Write, Off: uint64(off), Data: data}
			if i%5 == 0 {
				r.Flags = nbdtest.FUA
			}
			do(t, c, r, 0)
			copy(want[off:], data)
			n = sizes[rnd.IntN(len(sizes))]
			off = rnd.IntN(disk - n + 1)
			r = nbdtest.Request{Cmd: nbdtest.Read, Off: uint64(off), Length: uint64(n)}
			if m != simple && i%2 == 0 {
				r.Flags = nbdtest.DF
			}
			got := do(t, c, r, 0)
			if !bytes.Equal(got.Data, want[off:off+n]) {
				t.Fatalf("read of %d bytes at %d returns other data than was written", n, off)
			}
			if r.Flags != 0 && got.Chunks != 1 {
				t.Errorf("%d chunks in spite of DF", got.Chunks)
			}
		}
		if got := dev.Durable.Load(); got != 12 {
			t.Errorf("%d writes with FUA reached the device, want 12", got)
		}
		if !bytes.Equal(dev.Bytes(0, disk), want) {
			t.Error("the device holds other data than was written")
		}
	})
}

// TestPipeline keeps many requests of all sizes under way and lets the replies come in any order.
func TestPipeline(t *testing.T) {
	const slot, slots = 300_000, 64
	each(t, slot*slots, func(t *testing.T, m mode, dev *nbdtest.Device, c *nbdtest.Client) {
		sizes := []int{16, 512, 4096, 70_000, 300_000}
		content := func(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, sizes[i%len(sizes)]) }
		run := func(request func(i int) nbdtest.Request, check func(i int, r nbdtest.Reply)) {
			var list []nbdtest.Request
			for i := range slots {
				q := request(i)
				q.Off, q.Cookie = uint64(i*slot), uint64(i+1)<<32
				list = append(list, q)
			}
			sent := background(func() error { _, err := c.Send(list...); return err })
			if err := wait(t, sent, "sending"); err != nil {
				t.Fatal(err)
			}
			for range slots {
				r, err := c.Recv()
				if err != nil {
					t.Fatal(err)
				}
				if r.Errno != 0 {
					t.Fatalf("request %#x got error %d", r.Cookie, r.Errno)
				}
				check(int(r.Cookie>>32)-1, r)
			}
		}
		run(func(i int) nbdtest.Request { return nbdtest.Request{Cmd: nbdtest.Write, Data: content(i)} },
			func(i int, r nbdtest.Reply) {})
		run(func(i int) nbdtest.Request {
			return nbdtest.Request{Cmd: nbdtest.Read, Length: uint64(sizes[i%len(sizes)])}
		}, func(i int, r nbdtest.Reply) {
			if !bytes.Equal(r.Data, content(i)) {
				t.Errorf("wrong data in slot %d", i)
			}
		})
	})
}

// background runs f in a goroutine.
func background(f func() error) <-chan error {
	ch := make(chan error, 1)
	go func() { ch <- f() }()
	return ch
}

func TestOtherCommands(t *testing.T) {
	each(t, 1<<20, func(t *testing.T, m mode, dev *nbdtest.Device, c *nbdtest.Client) {
		ones := bytes.Repeat([]byte{1}, 1<<20)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: ones}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Flush}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Flush, Off: 1 << 40, Length: 5}, 0)
		if dev.Flushes.Load() != 2 {
			t.Errorf("%d flushes, want 2", dev.Flushes.Load())
		}
		do(t, c, nbdtest.Request{Cmd: nbdtest.Trim, Off: 100, Length: 8192}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Trim, Off: 16384, Length: 4096, Flags: nbdtest.FUA}, 0)
		if dev.Flushes.Load() != 3 {
			t.Errorf("TRIM with FUA did not flush")
		}
		do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: 32768, Length: 5000}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: 65536, Length: 4096, Flags: nbdtest.NoHole | nbdtest.FUA}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: 131072, Length: 4096, Flags: nbdtest.FastZero}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: 1, Length: 4096, Flags: nbdtest.FastZero}, 95)
		if dev.Durable.Load() != 1 {
			t.Errorf("WRITE_ZEROES with FUA was not durable")
		}
		do(t, c, nbdtest.Request{Cmd: nbdtest.Cache, Length: 1 << 20}, 0)
		want := bytes.Clone(ones)
		for _, z := range [][2]int{{4096, 8192}, {16384, 20480}, {32768, 37768}, {65536, 69632}, {131072, 135168}} {
			clear(want[z[0]:z[1]])
		}
		if got := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1 << 20}, 0); !bytes.Equal(got.Data, want) {
			t.Error("wrong content after TRIM and WRITE_ZEROES")
		} else if m != simple && got.Holes != 4 {
			t.Errorf("%d holes in a read, want 4: all but the NO_HOLE one", got.Holes)
		}
	})
}

func TestSparseRead(t *testing.T) {
	const disk = 8 << 20
	dev := nbdtest.NewDevice(disk)
	s := start(t, nbd.Options{}, nbd.Export{Device: dev})
	c := s.open(structured, "")
	check := func(off, n uint64, chunks, holes int, flags uint16) {
		t.Helper()
		r := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Off: off, Length: n, Flags: flags}, 0)
		if r.Chunks != chunks || r.Holes != holes || !bytes.Equal(r.Data, dev.Bytes(int64(off), int64(n))) {
			t.Errorf("read %d+%d: %d chunks, %d holes (want %d, %d), right data: %v", off, n, r.Chunks, r.Holes,
				chunks, holes, bytes.Equal(r.Data, dev.Bytes(int64(off), int64(n))))
		}
	}
	check(0, 1<<20, 1, 1, 0)
	check(0, 1<<20, 1, 0, nbdtest.DF)
	check(0, 4096, 1, 0, 0) // not worth asking
	do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Off: 100_000, Data: []byte("x")}, 0)
	check(0, 1<<20, 3, 2, 0)
	check(98304, 1<<20, 2, 1, 0)
	check(98304-1, 1<<20, 2, 1, 0) // one zero byte is not worth a chunk
	for off := uint64(0); off < disk; off += 16384 {
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Off: off, Data: []byte("y")}, 0)
	}
	r := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: disk}, 0)
	if !bytes.Equal(r.Data, dev.Bytes(0, disk)) || r.Chunks > 64 || r.Holes < 16 {
		t.Errorf("fragmented read: %d chunks, %d holes", r.Chunks, r.Holes)
	}
}

// TestLongRequestsInPlace counts which long requests reach the methods of a device that may wait.
func TestLongRequestsInPlace(t *testing.T) {
	const disk, long = 8 << 20, 1 << 20
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			dev := nbdtest.NewDevice(disk)
			var waited atomic.Int64
			dev.Gate = func(_ context.Context, op string, _, _ int64) error {
				if op == "read" || op == "write" {
					waited.Add(1)
				}
				return nil
			}
			var cold atomic.Bool
			dev.TryErr = func(write bool, off, n int64) error {
				if cold.Load() {
					return block.ErrWouldBlock
				}
				return nil
			}
			s := start(t, nbd.Options{}, nbd.Export{Device: dev})
			c := s.open(m, "")
			expect := func(what string, want int64) {
				t.Helper()
				if got := waited.Swap(0); got != want {
					t.Errorf("%s: %d calls that may wait, want %d", what, got, want)
				}
			}
			read := func() {
				t.Helper()
				r := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Off: 512, Length: long}, 0)
				if !bytes.Equal(r.Data, dev.Bytes(512, long)) {
					t.Error("wrong data")
				}
			}
			data := bytes.Repeat([]byte("data"), long/2)
			do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: data}, 0)
			expect("a write", 0)
			do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: data, Flags: nbdtest.FUA}, 0)
			expect("a write with FUA", 1)
			if dev.Durable.Load() != 1 {
				t.Error("a write with FUA was not durable")
			}
			read()
			expect("a read", 0)

			cold.Store(true)
			do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: data}, 0)
			expect("a write that has to wait", 1)
			tries := dev.Tries.Load()
			for range 10 {
				read()
			}
			expect("reads of what is not at hand", 10)
			if got := dev.Tries.Load() - tries; got != 1 {
				t.Errorf("10 reads of what is not at hand were tried %d times, want 1", got)
			}
			cold.Store(false)
			for range 20 {
				read()
			}
			if waited.Swap(0) > 10 {
				t.Error("after reads that had to wait, reads of what is at hand are not tried again")
			}

			waited.Store(0)
			r := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Off: 4 << 20, Length: long}, 0)
			if m != simple && r.Holes != 1 || !bytes.Equal(r.Data, make([]byte, long)) {
				t.Errorf("a read of nothing: %d holes sent, want 1", r.Holes)
			}
			expect("a read of nothing", 0)
			do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: 4096, Length: 65536}, 0)
			r = do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: long}, 0)
			if m != simple && r.Holes != 1 || !bytes.Equal(r.Data, dev.Bytes(0, long)) {
				t.Errorf("a read with a hole: %d holes sent, want 1", r.Holes)
			}
			expect("a read with a hole", 0)
		})
	}
}

func TestErrors(t *testing.T) {
	each(t, 100_000, func(t *testing.T, m mode, dev *nbdtest.Device, c *nbdtest.Client) {
		const size = 100_000
		for _, q := range []struct {
			r    nbdtest.Request
			want uint32
		}{
			{nbdtest.Request{Cmd: nbdtest.Read, Off: size - 1, Length: 2}, 22},
			{nbdtest.Request{Cmd: nbdtest.Read, Off: 1<<64 - 1, Length: 2}, 22},
			{nbdtest.Request{Cmd: nbdtest.Read, Off: 0, Length: maxRequest + 1}, 22},
			{nbdtest.Request{Cmd: nbdtest.Write, Off: size - 1, Data: []byte("xy")}, 28},
			{nbdtest.Request{Cmd: nbdtest.Write, Off: 1 << 63, Data: []byte("xy")}, 28},
			{nbdtest.Request{Cmd: nbdtest.Write, Off: 1, Data: make([]byte, size)}, 28},   // skipped
			{nbdtest.Request{Cmd: nbdtest.Write, Data: make([]byte, maxRequest+1)}, 22},   // skipped
			{nbdtest.Request{Cmd: nbdtest.Write, Flags: nbdtest.DF, Data: []byte{1}}, 22}, // wrong flag
			{nbdtest.Request{Cmd: nbdtest.Write, Flags: 1 << 9, Data: []byte{1}}, 22},
			{nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: size, Length: 1}, 28},
			{nbdtest.Request{Cmd: nbdtest.Trim, Off: size, Length: 1}, 22},
			{nbdtest.Request{Cmd: nbdtest.Cache, Off: size, Length: 1}, 22},
			{nbdtest.Request{Cmd: nbdtest.Flush, Flags: nbdtest.NoHole}, 22},
			{nbdtest.Request{Cmd: nbdtest.BlockStatus, Length: 1}, 22}, // no context
			{nbdtest.Request{Cmd: 8, Length: 1}, 22},
			{nbdtest.Request{Cmd: 4711}, 22},
			{nbdtest.Request{Cmd: nbdtest.Read, Length: 10}, 0}, // it still lives
		} {
			do(t, c, q.r, q.want)
		}
		if m == simple {
			do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Flags: nbdtest.DF, Length: 1}, 22)
		}
		if m == extended {
			// A payload where none belongs is skipped, however long.
			payload := make([]byte, 1<<20)
			for _, n := range []int{0, 5, 1 << 20} {
				do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Flags: nbdtest.PayloadLen, Length: uint64(n),
					Data: payload[:n]}, 22)
			}
			do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Length: 1 << 40}, 28)
			do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1<<64 - 1}, 22)
		}
		if !bytes.Equal(dev.Bytes(0, size), make([]byte, size)) {
			t.Error("a refused request changed the device")
		}
	})
}

func TestReadOnly(t *testing.T) {
	for _, byDevice := range []bool{false, true} {
		dev := nbdtest.NewDevice(1 << 20)
		dev.DeviceInfo.ReadOnly = byDevice
		s := start(t, nbd.Options{}, nbd.Export{Device: dev, ReadOnly: !byDevice})
		c := s.open(structured, "")
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: []byte("x")}, 1)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: make([]byte, 100_000)}, 1)
		do(t, c, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Length: 1}, 1)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Trim, Length: 1}, 1)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Flush}, 0)
		do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
		if !bytes.Equal(dev.Bytes(0, 1<<20), make([]byte, 1<<20)) {
			t.Error("a read-only export changed")
		}
	}
}

// TestDeviceErrors has the device fail in place and in a worker.
func TestDeviceErrors(t *testing.T) {
	var fail error
	dev := nbdtest.NewDevice(1 << 20)
	dev.Gate = func(ctx context.Context, op string, off, n int64) error { return fail }
	dev.TryErr = func(write bool, off, n int64) error { return fail }
	failed := make(chan nbd.Command, 100)
	s := start(t, nbd.Options{Observer: nbd.Observer{
		RequestFailed: func(c nbd.Conn, cmd nbd.Command, off, n uint64, err error) { failed <- cmd },
	}}, nbd.Export{Device: dev})
	for _, m := range modes {
		c := s.open(m, "")
		for _, q := range []struct {
			err  error
			want uint32
		}{
			{syscall.ENOSPC, 28}, {syscall.EDQUOT, 28}, {syscall.EIO, 5}, {syscall.ENOMEM, 12}, {syscall.EPERM, 1},
			{fmt.Errorf("deep down: %w", syscall.ENOSPC), 28}, {fmt.Errorf("strange"), 5}, {block.ErrClosed, 108},
			{block.ErrReadOnly, 1}, {syscall.EOPNOTSUPP, 95},
		} {
			fail = q.err
			for _, r := range []nbdtest.Request{
				{Cmd: nbdtest.Read, Length: 4096}, {Cmd: nbdtest.Read, Length: 100_000}, {Cmd: nbdtest.Write, Data: []byte("x")},
				{Cmd: nbdtest.Write, Flags: nbdtest.FUA, Data: []byte("x")}, {Cmd: nbdtest.Flush}, {Cmd: nbdtest.Trim, Length: 1},
			} {
				do(t, c, r, q.want)
				if got := wait(t, failed, "the observer's call"); got != nbd.Command(r.Cmd) {
					t.Errorf("observer was told of %v, not of %v", got, nbd.Command(r.Cmd))
				}
			}
		}
	}
	fail = nil
}

// TestProtocolViolations ends connections that cannot be understood any more, and no others.
func TestProtocolViolations(t *testing.T) {
	noLeaks(t)
	ended := make(chan error, 10)
	s := start(t, nbd.Options{Observer: nbd.Observer{
		Disconnected: func(c nbd.Conn, s nbd.Stats, err error) { ended <- err },
	}}, nbd.Export{Device: nbdtest.NewDevice(1 << 20)})
	for name, r := range map[string]nbdtest.Request{
		"wrong magic":      {Cmd: nbdtest.Read, Length: 1, Magic: 0x25609514},
		"monstrous write":  {Cmd: nbdtest.Write, Length: 1<<32 - 1},
		"extended request": {Cmd: nbdtest.Read, Length: 1, Magic: 0x21e41c71},
	} {
		c := s.open(simple, "")
		do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
		if _, err := c.Send(r); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Recv(); err == nil {
			t.Errorf("%s was answered", name)
		}
		if err := wait(t, ended, "the end of the connection"); err == nil {
			t.Errorf("%s ended the connection without an error", name)
		}
	}
}

// TestTCP serves the same server on two listeners.
func TestTCP(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(1 << 20)
	s := start(t, nbd.Options{}, nbd.Export{Device: dev})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no TCP here: %v", err)
	}
	served := background(func() error { return s.Serve(context.Background(), l) })
	unix := s.open(simple, "")
	tcp := (&server{Server: s.Server, t: t, network: "tcp", addr: l.Addr().String()}).open(structured, "")
	do(t, tcp, nbdtest.Request{Cmd: nbdtest.Write, Data: bytes.Repeat([]byte("tcp "), 50_000)}, 0)
	if got := do(t, unix, nbdtest.Request{Cmd: nbdtest.Read, Off: 4, Length: 3}, 0); string(got.Data) != "tcp" {
		t.Errorf("read %q", got.Data)
	}
	s.stop()
	if err := wait(t, served, "the second Serve's return"); err != nbd.ErrServerClosed {
		t.Errorf("Serve returned %v", err)
	}
}
