package nbd_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// BenchmarkRead4K measures 4 KiB reads at several depths through a unix socket. Client and server share the process and
// neither allocates anything per request, so allocs/op has to be 0.
func BenchmarkRead4K(b *testing.B) {
	for _, depth := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) { benchmark(b, depth, nbdtest.Read, 4096) })
	}
}

// BenchmarkWrite4K is the same for writes.
func BenchmarkWrite4K(b *testing.B) {
	for _, depth := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) { benchmark(b, depth, nbdtest.Write, 4096) })
	}
}

// BenchmarkLarge measures 1 MiB transfers, which go through workers.
func BenchmarkLarge(b *testing.B) {
	b.Run("read", func(b *testing.B) { benchmark(b, 8, nbdtest.Read, 1<<20) })
	b.Run("write", func(b *testing.B) { benchmark(b, 8, nbdtest.Write, 1<<20) })
}

func benchmark(b *testing.B, depth int, cmd uint16, size int) {
	const disk = 64 << 20
	s := start(b, nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(disk)})
	c := s.open(simple, "")
	if err := c.Conn.SetDeadline(time.Time{}); err != nil {
		b.Fatal(err)
	}
	request := nbdtest.Request{Cmd: cmd, Length: uint64(size)}
	replySize := 16 + size
	if cmd == nbdtest.Write {
		request.Data = make([]byte, size)
		replySize = 16
	}
	one := c.Encode(nil, request)
	batch := make([]byte, 0, depth*len(one))
	replies := make([]byte, depth*replySize)
	sent := make(chan error, 1)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	// Half of the depth is asked anew while the other half is under way.
	b.ResetTimer()
	off := uint64(0)
	outstanding := 0
	for left := b.N; left > 0 || outstanding > 0; {
		batch = batch[:0]
		for ; outstanding < depth && left > 0; outstanding++ {
			n := len(batch)
			batch = append(batch, one...)
			off = (off + 7919*4096) % (disk - uint64(size)) &^ 4095
			binary.BigEndian.PutUint64(batch[n+16:], off)
			left--
		}
		if len(batch) > 128<<10 {
			go func() {
				_, err := c.Conn.Write(batch)
				sent <- err
			}()
		} else if _, err := c.Conn.Write(batch); err != nil {
			b.Fatal(err)
		} else {
			sent <- nil
		}
		take := (outstanding + 1) / 2
		if left == 0 {
			take = outstanding
		}
		if _, err := io.ReadFull(c.Conn, replies[:take*replySize]); err != nil {
			b.Fatal(err)
		}
		if err := <-sent; err != nil {
			b.Fatal(err)
		}
		outstanding -= take
	}
	b.StopTimer()
	if err := c.Close(); err != nil {
		b.Fatal(err)
	}
}

// TestNoAllocations sends batches of requests that are answered in place: none of them may cost an allocation.
func TestNoAllocations(t *testing.T) {
	const depth = 16
	s := start(t, nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(1 << 20)})
	for _, m := range modes {
		c := s.open(m, "")
		head, ack := 16, 16
		switch m {
		case structured:
			head = 20 + 8
		case extended:
			head, ack = 32+8, 32
		}
		var p []byte
		for i := range depth {
			r := nbdtest.Request{Cmd: nbdtest.Read, Off: uint64(i) << 12, Length: 4096}
			if i%2 == 1 {
				r.Cmd, r.Data = nbdtest.Write, make([]byte, 4096)
			}
			p = c.Encode(p, r)
		}
		replies := make([]byte, depth/2*(head+4096+ack))
		got := testing.AllocsPerRun(500, func() {
			if _, err := c.Conn.Write(p); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c.Conn, replies); err != nil {
				t.Fatal(err)
			}
		})
		if got != 0 {
			t.Errorf("%s: %v allocations for %d requests", m, got, depth)
		}
	}
}
