package control

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/test/harness"
)

// Shape of the load: each client writes its own slots round and round, one write after the other's answer.
const (
	clients  = 4
	slots    = 24
	slotSize = 4096
	spread   = 80 << 10 // slots lie in clusters of their own, and across their borders
	shots    = 5
)

// write is one write of a client: the moments, on one clock for all, when it was sent and when its answer was there. Zero is
// never.
type write struct{ sent, acked uint64 }

// writer is a client with its writes, the first being number 1.
type writer struct {
	id int
	mu sync.Mutex
	at []write // under mu
}

// place is where the i-th write goes.
func (w *writer) place(i int) int64 {
	return (int64(w.id)*slots + int64(i%slots)) * spread
}

// content is what it writes.
func (w *writer) content(i int) []byte {
	p := make([]byte, slotSize)
	for at := 0; at < len(p); at += 16 {
		binary.LittleEndian.PutUint64(p[at:], uint64(w.id))
		binary.LittleEndian.PutUint64(p[at+8:], uint64(i))
	}
	return p
}

// run writes until it is told to stop.
func (w *writer) run(c *harness.Client, clock *atomic.Uint64, stop <-chan struct{}) error {
	for i := 1; ; i++ {
		select {
		case <-stop:
			return nil
		default:
		}
		w.mu.Lock()
		w.at = append(w.at, write{sent: clock.Add(1)})
		w.mu.Unlock()
		if err := c.Write(w.content(i), w.place(i)); err != nil {
			return fmt.Errorf("client %d, write %d: %w", w.id, i, err)
		}
		w.mu.Lock()
		w.at[i-1].acked = clock.Add(1)
		w.mu.Unlock()
		if i%16 == 0 {
			if err := c.Flush(); err != nil {
				return err
			}
		}
	}
}

// holds finds how many of its writes a disk holds. They must be the first so many: each slot has the last one that went
// there.
func (w *writer) holds(read func([]byte, int64) error) (int, error) {
	last := 0
	found := make([]int, slots)
	p := make([]byte, slotSize)
	for slot := range slots {
		if err := read(p, (int64(w.id)*slots+int64(slot))*spread); err != nil {
			return 0, err
		}
		i := int(binary.LittleEndian.Uint64(p[8:]))
		want := make([]byte, slotSize)
		if i > 0 {
			want = w.content(i)
		}
		if i > 0 && i%slots != slot || !slices.Equal(p, want) {
			return 0, fmt.Errorf("client %d, slot %d holds a part of a write, or one from elsewhere: % x", w.id, slot, p[:32])
		}
		found[slot] = i
		last = max(last, i)
	}
	for slot, i := range found {
		want := last - (last-slot+slots)%slots // the last write to the slot, if there was one
		if want = max(want, 0); i != want {
			return 0, fmt.Errorf("client %d: write %d is there, but slot %d holds %d in place of %d", w.id, last, slot, i, want)
		}
	}
	return last, nil
}

// shot is a snapshot and the moments when it was asked for and answered.
type shot struct {
	name         string
	asked, there uint64
}

// prefix wants a snapshot that holds what was answered before it was asked for, nothing that was sent after it was there,
// and with each write all that had been answered when that was sent.
func prefix(s shot, all []*writer, read func([]byte, int64) error) error {
	count := make([]int, len(all))
	newest := uint64(0) // of the writes in it, when the latest was sent
	for k, w := range all {
		n, err := w.holds(read)
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", s.name, err)
		}
		count[k] = n
		if n > 0 {
			newest = max(newest, w.at[n-1].sent)
		}
	}
	if newest > s.there {
		return fmt.Errorf("snapshot %s holds a write of moment %d and was there at %d", s.name, newest, s.there)
	}
	for k, w := range all {
		for i, x := range w.at[count[k]:] {
			if x.acked != 0 && x.acked < max(s.asked, newest) {
				return fmt.Errorf("snapshot %s, asked for at %d, with a write sent at %d, lacks write %d of client %d, answered at %d",
					s.name, s.asked, newest, count[k]+i+1, w.id, x.acked)
			}
		}
	}
	return nil
}

// TestSnapshotUnderLoad takes snapshots of a disk while clients write to it: each is a moment of all of them, and nobody's
// write is lost.
func TestSnapshotUnderLoad(t *testing.T) {
	image := newImage(t, clients*slots*spread)
	s := start(t, export("disk", image))
	var clock atomic.Uint64
	stop := make(chan struct{})
	errs := make(chan error, clients)
	var all []*writer
	for id := range clients {
		w := &writer{id: id}
		all = append(all, w)
		c := s.dial("disk")
		go func() { errs <- w.run(c, &clock, stop) }()
	}
	var taken []shot
	for i := range shots {
		for clock.Load() < uint64(i+1)*clients*slots*3 { // everybody has come round since the last one
			if len(errs) > 0 {
				t.Fatal(<-errs)
			}
		}
		x := shot{name: fmt.Sprintf("s%d", i), asked: clock.Add(1)}
		s.must("POST", "/v1/disk/snapshots", query("name", "disk"), daemon.NameRequest{Name: x.name}, nil)
		x.there = clock.Add(1)
		taken = append(taken, x)
		if i == shots/2 { // one goes, also under load
			s.must("DELETE", "/v1/disk/snapshots", query("name", "disk", "snapshot", taken[0].name), nil, nil)
			taken = taken[1:]
		}
	}
	close(stop)
	for range clients {
		harness.OK(t, <-errs)
	}
	reader := s.dial("disk")
	for _, w := range all {
		if n, err := w.holds(reader.Read); err != nil || n != len(w.at) {
			t.Errorf("the disk holds %d of %d writes of client %d (%v)", n, len(w.at), w.id, err)
		}
	}
	for _, x := range taken {
		harness.OK(t, prefix(x, all, s.dial("disk@"+x.name).Read))
	}
	s.must("POST", "/v1/disk/check", query("name", "disk"), nil, nil)
	if d := s.show("disk"); d.SnapshotCount != shots-1 || d.IO.Writes < shots*clients*slots || d.IO.Errors > 0 {
		t.Errorf("%+v", d)
	}
	s.must("DELETE", "/v1/exports", query("name", "disk", "force", "true"), nil, nil)
	closed(t, image, taken, all)
}

// closed looks at the snapshots in the file again, without the server.
func closed(t *testing.T, image string, taken []shot, all []*writer) {
	t.Helper()
	ctx := t.Context()
	dev, err := block.Open(ctx, image, block.OpenOptions{Format: "qcow2", ReadOnly: true})
	harness.OK(t, err)
	defer func() { harness.OK(t, dev.Close()) }()
	im, _ := block.As[*qcow2.Image](dev)
	for _, x := range taken {
		view, err := im.OpenSnapshot(ctx, x.name)
		harness.OK(t, err)
		harness.OK(t, prefix(x, all, func(p []byte, off int64) error { return view.ReadAt(ctx, p, off) }))
		harness.OK(t, view.Close())
	}
}
