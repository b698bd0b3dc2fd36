package harness

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// SectorSize is the unit in which a Ledger keeps its books.
const SectorSize = sector

const stampMagic = 0x64726f7665722121

// Ledger knows what each sector of a disk may hold while clients write to it, through flushes, kills and lost connections.
// Version 0 means zeroes; every other version is a stamp that only one write has.
//
// Its user sees to it that no two changes of one sector are in flight together, and that a sector with a change that was
// never acknowledged (see Doubtful) is not changed again before Verify has looked what became of it: the server may do
// that change at any time.
type Ledger struct {
	Sectors int

	mu  sync.Mutex
	now uint64 // counts requests and acknowledgements
	// history holds, oldest first, what each sector may be found to hold: the flushed state, then every later write.
	history [][]entry
	version uint32
}

type entry struct {
	version uint32
	acked   uint64 // when the write was acknowledged; 0 while it is in flight
	either  bool   // a trim: the sector may also hold what was there before
}

// NewLedger returns the ledger of a disk that reads as zeroes.
func NewLedger(sectors int) *Ledger {
	d := &Ledger{Sectors: sectors, history: make([][]entry, sectors), now: 1}
	for i := range d.history {
		d.history[i] = []entry{{version: 0, acked: 1}}
	}
	return d
}

// Content returns n sectors of a new version, and enters them as what the disk holds from the start: it is for content
// that is there before the first client.
func (d *Ledger) Content(first, n int) []byte {
	version := d.begin(first, n, Write)
	d.acknowledge(first, n, true)
	return stamps(first, n, version)
}

// begin notes that a change of n sectors is about to be sent, and returns its version (0 for zeroes and trims).
func (d *Ledger) begin(first, n int, kind Kind) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := entry{either: kind == Trim}
	if kind == Write || kind == WriteFUA {
		d.version++
		e.version = d.version
	}
	for s := first; s < first+n; s++ {
		d.history[s] = append(d.history[s], e)
	}
	return e.version
}

// acknowledge notes that the newest change of each of these sectors was acknowledged; durable, when it was FUA.
func (d *Ledger) acknowledge(first, n int, durable bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now++
	for s := first; s < first+n; s++ {
		d.history[s][len(d.history[s])-1].acked = d.now
		if durable {
			d.settle(s, d.now)
		}
	}
}

// clock returns the moment that a flush which is sent now will cover.
func (d *Ledger) clock() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now
}

// flushed forgets what a flush has made impossible: anything older than the newest change acknowledged by then.
func (d *Ledger) flushed(upTo uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.history {
		d.settle(s, upTo)
	}
}

func (d *Ledger) settle(s int, upTo uint64) {
	h := d.history[s]
	for i := len(h) - 1; i > 0; i-- {
		if h[i].acked == 0 || h[i].acked > upTo || h[i].either {
			continue
		}
		d.history[s] = append(h[:0], h[i:]...)
		return
	}
}

// Stopped notes that the server came to a clean end, which is a flush of everything that was acknowledged.
func (d *Ledger) Stopped() { d.flushed(d.clock()) }

// Doubtful reports whether one of n sectors has a change that was sent and never acknowledged.
func (d *Ledger) Doubtful(first, n int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := first; s < first+n; s++ {
		h := d.history[s]
		if h[len(h)-1].acked == 0 {
			return true
		}
	}
	return false
}

// allowed reports whether a sector may hold a version after the server has died.
func (d *Ledger) allowed(s int, version uint32) bool {
	for _, e := range d.history[s] {
		if e.version == version {
			return true
		}
	}
	return false
}

// visible reports whether a client of the living server may read a version from a sector: that of the newest change; with
// a trim, or a change that was never acknowledged, also what was there before.
func (d *Ledger) visible(s int, version uint32) bool {
	h := d.history[s]
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].version == version {
			return true
		}
		if h[i].acked != 0 && !h[i].either {
			return false
		}
	}
	return false
}

// adopt takes what was found for the settled state.
func (d *Ledger) adopt(s int, version uint32) {
	d.history[s] = append(d.history[s][:0], entry{version: version, acked: d.now})
}

// Request makes a random request on n sectors that nobody else changes meanwhile.
func (d *Ledger) Request(c *Client, rng *rand.Rand, first, n int) error {
	if rng.IntN(4) == 0 {
		return d.Read(c, first, n)
	}
	return d.Change(c, rng, first, n)
}

// Read reads n sectors that nobody changes meanwhile and looks whether they hold what they must.
func (d *Ledger) Read(c *Client, first, n int) error {
	buf := make([]byte, n*SectorSize)
	if err := c.Read(buf, int64(first)*SectorSize); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range n {
		version, err := readStamp(buf[i*SectorSize:(i+1)*SectorSize], first+i)
		if err == nil && !d.visible(first+i, version) {
			err = fmt.Errorf("version %d, allowed are the latest of %+v", version, d.history[first+i])
		}
		if err != nil {
			return &ContentError{first + i, err}
		}
	}
	return nil
}

// ContentError says that a sector holds what it must not.
type ContentError struct {
	Sector int
	Err    error
}

// Error implements error.
func (e *ContentError) Error() string {
	return fmt.Sprintf("sector %d (offset %#x): %v", e.Sector, e.Sector*SectorSize, e.Err)
}

// Unwrap returns the cause.
func (e *ContentError) Unwrap() error { return e.Err }

// Change makes a random change of n sectors that nobody else changes meanwhile, or a flush.
func (d *Ledger) Change(c *Client, rng *rand.Rand, first, n int) error {
	off, length := int64(first)*SectorSize, n*SectorSize
	switch p := rng.IntN(100); {
	case p < 3:
		upTo := d.clock()
		if err := c.Flush(); err != nil {
			return err
		}
		d.flushed(upTo)
		return nil
	case p < 8:
		d.begin(first, n, Zero)
		if err := c.Zero(off, length, p < 5); err != nil {
			return err
		}
	case p < 14:
		d.begin(first, n, Trim)
		if err := c.Trim(off, length); err != nil {
			return err
		}
	case p < 18:
		version := d.begin(first, n, WriteFUA)
		if err := c.WriteFUA(stamps(first, n, version), off); err != nil {
			return err
		}
		d.acknowledge(first, n, true)
		return nil
	default:
		version := d.begin(first, n, Write)
		if err := c.Write(stamps(first, n, version), off); err != nil {
			return err
		}
	}
	d.acknowledge(first, n, false)
	return nil
}

// Vanish begins to write n sectors and has the connection break in the middle of the request.
func (d *Ledger) Vanish(c *Client, rng *rand.Rand, first, n int) {
	version := d.begin(first, n, Write)
	c.Break(stamps(first, n, version), int64(first)*SectorSize, rng.IntN(28+n*SectorSize))
}

// stamps returns n sectors that tell where they belong and which write they come from, in every byte.
func stamps(first, n int, version uint32) []byte {
	p := make([]byte, n*SectorSize)
	for i := range n {
		stamp(p[i*SectorSize:(i+1)*SectorSize], first+i, version)
	}
	return p
}

func stamp(p []byte, sector int, version uint32) {
	x := uint64(sector)<<32 | uint64(version)
	binary.LittleEndian.PutUint64(p, stampMagic)
	binary.LittleEndian.PutUint64(p[8:], x)
	for i := 16; i < SectorSize; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

// readStamp returns the version that a sector holds.
func readStamp(p []byte, sector int) (uint32, error) {
	if [SectorSize]byte(p) == [SectorSize]byte{} {
		return 0, nil
	}
	x := binary.LittleEndian.Uint64(p[8:])
	var want [SectorSize]byte
	stamp(want[:], sector, uint32(x))
	if [SectorSize]byte(p) != want {
		return 0, fmt.Errorf("neither zeroes nor a stamp of its own; it begins with % x", p[:16])
	}
	return uint32(x), nil
}

// Verify compares every sector with the ledger; read fills its argument from an offset of the disk. It is called when
// nothing changes the disk any more, and what it finds is settled from then on.
func (d *Ledger) Verify(t testing.TB, read func(p []byte, off int64) error) {
	t.Helper()
	const step = 2048
	wrong := 0
	buf := make([]byte, step*SectorSize)
	for first := 0; first < d.Sectors; first += step {
		n := min(step, d.Sectors-first)
		OK(t, read(buf[:n*SectorSize], int64(first)*SectorSize))
		for i := range n {
			s := first + i
			version, err := readStamp(buf[i*SectorSize:(i+1)*SectorSize], s)
			if err == nil && !d.allowed(s, version) {
				err = fmt.Errorf("version %d, allowed are %+v", version, d.history[s])
			}
			if err != nil {
				if wrong++; wrong <= 5 {
					t.Error(&ContentError{s, err})
				}
				continue
			}
			d.adopt(s, version)
		}
	}
	if wrong > 0 {
		t.Fatalf("%d sectors hold what they must not hold", wrong)
	}
}

// Exit statuses of `qemu-img check`.
const (
	checkSound = 0
	checkLeaks = 3
)

// MustBeSound demands of stock QEMU that an image whose server was killed has nothing worse than leaks, and of drover that
// it judges likewise. With lazy refcounts QEMU's check has to repair first, on a copy.
func MustBeSound(t testing.TB, image string, lazy bool) {
	t.Helper()
	if lazy {
		healed := filepath.Join(t.TempDir(), "copy.qcow2")
		CopyFile(t, image, healed)
		Must(t, "qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", healed)
		OK(t, os.Remove(healed))
		return
	}
	r := Run(t, "qemu-img", "check", "-f", "qcow2", image)
	if r.Code != checkSound && r.Code != checkLeaks {
		t.Fatalf("after the kill:\n%.4000s", r.String())
	}
	if got := Drover(t, "check", "-f", "qcow2", image); got.Code != r.Code {
		t.Errorf("drover check judges otherwise than QEMU (%d):\n%.4000s", r.Code, got.String())
	}
}

// Answered reports whether err is an answer of the server, in contrast to a connection that broke.
func Answered(err error) bool {
	var answer NBDError
	return errors.As(err, &answer)
}
