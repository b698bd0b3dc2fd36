package tcmu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
	"github.com/droverproject/drover/storage"
)

// kernel is the other side of a ring: it appends entries, wraps around with padding, and takes responses from the tail as
// target_core_user.c does.
type kernel struct {
	mem      []byte
	ringOff  uint32
	ringSize uint32
	dataOff  int
	head     uint32
	seen     uint32 // how far responses have been taken

	toUs, toKernel chan struct{}
	closed         chan struct{}
}

// alignedMem returns memory aligned to 8 bytes.
func alignedMem(n int) []byte {
	words := make([]uint64, n/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), n)
}

func newKernel(ringSize uint32, data int) *kernel {
	return kernelIn(alignedMem(dataPlace(ringSize)+data), ringSize)
}

// dataPlace is where the data area begins.
func dataPlace(ringSize uint32) int { return (mailboxSize + int(ringSize) + 4095) &^ 4095 }

// kernelIn makes a ring in memory that is zero.
func kernelIn(mem []byte, ringSize uint32) *kernel {
	const ringOff = mailboxSize
	k := &kernel{mem: mem, ringOff: ringOff, ringSize: ringSize, dataOff: dataPlace(ringSize),
		toUs: make(chan struct{}, 1), toKernel: make(chan struct{}, 1), closed: make(chan struct{})}
	ne := binary.NativeEndian
	ne.PutUint16(k.mem[offVersion:], mailboxVersion)
	ne.PutUint16(k.mem[offFlags:], CapOutOfOrder|CapReadLen|CapTaskNotice)
	ne.PutUint32(k.mem[offRing:], ringOff)
	ne.PutUint32(k.mem[offRingSize:], ringSize)
	return k
}

func (k *kernel) word(off int) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&k.mem[off])) }

func (k *kernel) at(off uint32) []byte { return k.mem[k.ringOff+off : k.ringOff+k.ringSize] }

// room returns how many bytes the ring can take: what lies before the responses that were taken is free, not what the tail
// has passed.
func (k *kernel) room() uint32 {
	return (k.seen + k.ringSize - k.head - 8) % k.ringSize
}

// reserve makes room for an entry of n bytes at one place, with padding if the end of the ring is too near.
func (k *kernel) reserve(n uint32) ([]byte, bool) {
	if left := k.ringSize - k.head; left < n {
		if k.room() < left+n {
			return nil, false
		}
		binary.NativeEndian.PutUint32(k.at(k.head), left|opPad)
		k.advance(left)
	}
	if k.room() < n {
		return nil, false
	}
	e := k.at(k.head)[:n]
	clear(e)
	return e, true
}

func (k *kernel) advance(n uint32) {
	k.head = (k.head + n) % k.ringSize
	k.word(offHead).Store(k.head)
}

// send appends a command. The vectors are places of the data area.
func (k *kernel) send(id uint16, cdb []byte, vectors [][2]int) bool {
	n := uint32(reqIOV + iovSize*len(vectors) + len(cdb))
	n = max((n+7)&^7, minCommand)
	e, ok := k.reserve(n)
	if !ok {
		return false
	}
	ne := binary.NativeEndian
	ne.PutUint32(e, n|opCommand)
	ne.PutUint16(e[entID:], id)
	ne.PutUint32(e[reqVectors:], uint32(len(vectors)))
	at := reqIOV
	for _, v := range vectors {
		ne.PutUint64(e[at:], uint64(k.dataOff+v[0]))
		ne.PutUint64(e[at+8:], uint64(v[1]))
		at += iovSize
	}
	copy(e[at:], cdb)
	ne.PutUint64(e[reqCDB:], uint64(k.ringOff)+uint64(k.head)+uint64(at))
	k.advance(n)
	return true
}

func (k *kernel) notice(ids ...uint16) bool {
	n := uint32(tmrIDs+2*len(ids)+7) &^ 7
	e, ok := k.reserve(n)
	if !ok {
		return false
	}
	ne := binary.NativeEndian
	ne.PutUint32(e, n|opTask)
	e[tmrType] = 1
	ne.PutUint32(e[tmrCount:], uint32(len(ids)))
	for i, id := range ids {
		ne.PutUint16(e[tmrIDs+2*i:], id)
	}
	k.advance(n)
	return true
}

// response is what came back for a command.
type response struct {
	status byte
	sense  [senseSize]byte
	in     int // -1: the whole buffer
}

// take returns the responses since it was last called.
func (k *kernel) take(got map[uint16]response) {
	ne := binary.NativeEndian
	for tail := k.word(offTail).Load(); k.seen != tail; {
		e := k.at(k.seen)
		lenOp := ne.Uint32(e)
		if lenOp&opMask == opCommand {
			r := response{status: e[rspStatus], in: -1}
			copy(r.sense[:], e[rspSense:])
			if e[entFlags]&flagReadLen != 0 {
				r.in = int(ne.Uint32(e[rspReadLen:]))
			}
			got[ne.Uint16(e[entID:])] = r
		}
		k.seen = (k.seen + lenOp&^opMask) % k.ringSize
	}
}

// Wait and Ring are the doorbell as the server sees it.
func (k *kernel) Wait() error {
	select {
	case <-k.toUs:
		return nil
	case <-k.closed:
		return io.EOF
	}
}

func (k *kernel) Ring() error { poke(k.toKernel); return nil }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func newUnit(t testing.TB, size int64) *scsi.Unit {
	t.Helper()
	f := storage.NewMemFile("disk.raw")
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	dev, err := block.NewRaw(f, block.RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	u, err := scsi.NewUnit(dev, scsi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func rw(op byte, lba uint64, n uint32) []byte {
	b := make([]byte, 16)
	b[0] = op
	binary.BigEndian.PutUint64(b[2:], lba)
	binary.BigEndian.PutUint32(b[10:], n)
	return b
}

// TestServer runs thousands of commands through small rings, so that they wrap around with and without padding, completed
// in whatever order they end, and compares the disk with a model. Each command has blocks of its own while it runs.
func TestServer(t *testing.T) {
	for _, ringSize := range []uint32{1024, 2048 + 8, 8192 - 128} {
		const blocks, slot = 2048, 8
		k := newKernel(ringSize, 64*slot*512)
		ring, err := NewRing(k.mem)
		if err != nil {
			t.Fatal(err)
		}
		unit := newUnit(t, blocks*512)
		s := NewServer(ring, unit, k)
		done := make(chan error)
		go func() { done <- s.Serve(context.Background()) }()
		c := &client{t: t, k: k, r: rand.New(rand.NewPCG(7, uint64(ringSize))), model: make([]byte, blocks*512), got: map[uint16]response{}}
		c.run(6000)
		close(k.closed)
		if err := <-done; !errors.Is(err, io.EOF) {
			t.Fatalf("Serve: %v", err)
		}
		if ring.Outstanding() != 0 {
			t.Errorf("%d commands never completed", ring.Outstanding())
		}
	}
}

// client is an initiator with 16 slots, each of which has blocks and data pages of its own.
type client struct {
	t     *testing.T
	k     *kernel
	r     *rand.Rand
	model []byte
	got   map[uint16]response
	slots [16]*pending
	sent  int
}

type pending struct {
	id    uint16
	write bool
	off   int // in the disk
	n     int
	data  int // in the data area
}

func (c *client) run(total int) {
	attention := true
	id := uint16(0)
	for finished := 0; finished < total; {
		for i := range c.slots {
			if c.slots[i] == nil && c.sent < total {
				id++
				if id == 0 {
					id = 1
				}
				if !c.start(i, id) {
					break
				}
			}
		}
		poke(c.k.toUs)
		<-c.k.toKernel
		c.k.take(c.got)
		for i, p := range c.slots {
			if p == nil {
				continue
			}
			if r, ok := c.got[p.id]; ok {
				delete(c.got, p.id)
				c.slots[i] = nil
				finished++
				if attention && r.status == 2 && r.sense[2] == 6 {
					attention = false // told once, to whoever came first
					continue
				}
				c.finish(p, r)
			}
		}
		if len(c.got) > 0 {
			c.t.Fatalf("responses to commands that were never sent: %v", c.got)
		}
		if c.r.IntN(20) == 0 {
			c.k.notice(1, 2, 3)
		}
	}
}

func (c *client) start(i int, id uint16) bool {
	n := 512 * (1 + c.r.IntN(4))
	p := &pending{id: id, write: c.r.IntN(2) == 0, off: i*128*512 + 512*c.r.IntN(120), n: n, data: i * 8 * 512}
	page := c.k.mem[c.k.dataOff+p.data:][:n]
	vectors := [][2]int{{p.data, n}}
	if n > 512 && c.r.IntN(2) == 0 {
		vectors = [][2]int{{p.data, 512}, {p.data + 512, n - 512}}
	}
	op := byte(0x88)
	if p.write {
		op = 0x8A
		for k := range page {
			page[k] = byte(c.r.Uint32())
		}
	}
	if !c.k.send(id, rw(op, uint64(p.off/512), uint32(n/512)), vectors) {
		return false
	}
	c.slots[i] = p
	c.sent++
	return true
}

func (c *client) finish(p *pending, r response) {
	c.t.Helper()
	if r.status != 0 {
		c.t.Fatalf("command %d: status %d, sense % x", p.id, r.status, r.sense[:18])
	}
	page := c.k.mem[c.k.dataOff+p.data:][:p.n]
	if p.write {
		copy(c.model[p.off:], page)
		return
	}
	if !bytes.Equal(page, c.model[p.off:][:p.n]) {
		c.t.Fatalf("command %d read something else than was written", p.id)
	}
}

// TestNoStaleMemory reads less than the buffer holds: the rest of the pages, which other commands used, must not be shown.
func TestNoStaleMemory(t *testing.T) {
	k := newKernel(4096, 8192)
	ring, err := NewRing(k.mem)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(ring, newUnit(t, 1<<20), k)
	done := make(chan error)
	go func() { done <- s.Serve(context.Background()) }()
	page := k.mem[k.dataOff:][:4096]
	for i := range page {
		page[i] = 0xAA
	}
	k.send(1, []byte{0x12, 0, 0, 0, 36, 0}, [][2]int{{0, 4096}})
	poke(k.toUs)
	got := map[uint16]response{}
	for len(got) == 0 {
		<-k.toKernel
		k.take(got)
	}
	if r := got[1]; r.status != 0 || r.in != 36 {
		t.Errorf("%+v", r)
	}
	if bytes.Contains(page, []byte{0xAA}) {
		t.Error("old memory is left in the buffer")
	}
	close(k.closed)
	<-done
}

// TestTwice completes a command twice and one that was never sent.
func TestTwice(t *testing.T) {
	k := newKernel(4096, 4096)
	ring, err := NewRing(k.mem)
	if err != nil {
		t.Fatal(err)
	}
	k.send(5, make([]byte, 6), nil)
	c, _, err := ring.Next()
	if err != nil || c == nil || c.ID != 5 {
		t.Fatalf("%+v %v", c, err)
	}
	if err := ring.Complete(6, Result{}); !errors.Is(err, ErrRing) {
		t.Errorf("a command that was never sent: %v", err)
	}
	if err := ring.Complete(5, Result{}); err != nil {
		t.Error(err)
	}
	if err := ring.Complete(5, Result{}); !errors.Is(err, ErrRing) {
		t.Errorf("a second completion: %v", err)
	}
}

// TestOutOfOrder completes in the reverse order: responses stand at the tail, whoever's entry that is, and what a command
// needs is its own by then.
func TestOutOfOrder(t *testing.T) {
	k := newKernel(4096, 4096)
	ring, err := NewRing(k.mem)
	if err != nil {
		t.Fatal(err)
	}
	var cmds []*Command
	for id := uint16(1); id <= 5; id++ {
		k.send(id, rw(0x88, uint64(id), 1), [][2]int{{0, 512}})
		k.notice(id)
		c, _, err := ring.Next()
		if err != nil || c == nil {
			t.Fatal(err)
		}
		if _, n, err := ring.Next(); err != nil || n == nil || len(n.IDs) != 1 || n.IDs[0] != id {
			t.Fatalf("notice: %+v %v", n, err)
		}
		cmds = append(cmds, c)
	}
	got := map[uint16]response{}
	for i := len(cmds) - 1; i >= 0; i-- {
		if lba := binary.BigEndian.Uint64(cmds[i].CDB[2:]); lba != uint64(cmds[i].ID) {
			t.Errorf("command %d was overwritten: LBA %d", cmds[i].ID, lba)
		}
		if err := ring.Complete(cmds[i].ID, Result{Reply: scsi.Reply{Status: scsi.Status(i)}}); err != nil {
			t.Fatal(err)
		}
		k.take(got)
		if r := got[cmds[i].ID]; int(r.status) != i {
			t.Errorf("command %d: %+v", cmds[i].ID, r)
		}
	}
}

// FuzzRing lets the other side write anything: nothing may be reached outside the mapping, and nothing may panic.
func FuzzRing(f *testing.F) {
	k := newKernel(1024, 4096)
	k.send(1, rw(0x88, 0, 1), [][2]int{{0, 512}})
	k.notice(1)
	f.Add(bytes.Clone(k.mem[:2048]))
	f.Fuzz(func(t *testing.T, raw []byte) {
		mem := alignedMem(8192)
		copy(mem, raw)
		ring, err := NewRing(mem)
		if err != nil {
			return
		}
		for range 100 {
			c, n, err := ring.Next()
			if err != nil || c == nil && n == nil {
				return
			}
			if c == nil {
				continue
			}
			c.Data.Clear(0)
			if err := ring.Complete(c.ID, Result{}); err != nil {
				return
			}
		}
	})
}
