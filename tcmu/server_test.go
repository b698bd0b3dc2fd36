package tcmu

import (
	"context"
	"errors"
	"io"
	"testing"
)

// countBell counts how often the kernel is told.
type countBell struct {
	*kernel
	rings int
}

func (b *countBell) Ring() error {
	b.rings++
	return nil
}

// TestTellsMeanwhile: the kernel is told once for many short commands, and of long ones before all of them are done.
func TestTellsMeanwhile(t *testing.T) {
	for _, c := range []struct {
		n, size, least, most int
	}{{20, 512, 1, 1}, {20, 1 << 20, 5, 20}} {
		k := newKernel(16<<10, c.size)
		ring, err := NewRing(k.mem)
		if err != nil {
			t.Fatal(err)
		}
		unit := newUnit(t, 4<<20)
		unit.Execute(context.Background(), make([]byte, 6), nil) // the unit attention
		for i := range c.n {
			if !k.send(uint16(i+1), rw(0x88, 0, uint32(c.size/512)), [][2]int{{0, c.size}}) {
				t.Fatal("the ring is full")
			}
		}
		close(k.closed)
		bell := &countBell{kernel: k}
		if err := NewServer(ring, unit, bell).Serve(context.Background()); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		got := make(map[uint16]response)
		k.take(got)
		if len(got) != c.n || bell.rings < c.least || bell.rings > c.most {
			t.Errorf("%d commands of %d bytes: %d responses, the kernel told %d times", c.n, c.size, len(got), bell.rings)
		}
	}
}
