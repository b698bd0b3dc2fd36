// Package kill ends drover serve with SIGKILL in the middle of heavy writing, again and again, and demands after each
// round what a flush promised: the image is sound but for leaks, every sector that a flush covered is there, every other
// sector holds something that was written to it, and the image can be served again.
//
// A killed process loses what it kept in memory, not what it gave to the kernel; power cuts are simulated where the
// storage can be replaced, in the engine's own tests.
package kill

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	sectorSize = 512
	workers    = 8
	diskSize   = 48 << 20
	sectors    = diskSize / sectorSize
	stampMagic = 0x64726f7665722121
)

// rounds is KILL_ROUNDS, or 8 (2 with -short), for each image.
func rounds(t *testing.T) int {
	t.Helper()
	if s := os.Getenv("KILL_ROUNDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("KILL_ROUNDS is %q", s)
		}
		return n
	}
	if testing.Short() {
		return 2
	}
	return 8
}

func TestSIGKILLLosesNothingFlushed(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, c := range []struct {
		name     string
		options  string
		lazy     bool // the dirty bit stands for refcounts that are not on disk
		backed   bool
		snapshot bool
	}{
		{name: "64K clusters", options: "cluster_size=65536"},
		{name: "4K clusters with a snapshot", options: "cluster_size=4096", snapshot: true},
		{name: "512 byte clusters, 1 bit refcounts", options: "cluster_size=512,refcount_bits=1"},
		{name: "on a backing file with a snapshot", options: "cluster_size=16384", backed: true, snapshot: true},
		{name: "lazy refcounts", options: "cluster_size=4096,lazy_refcounts=on", lazy: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			image := filepath.Join(dir, "image.qcow2")
			args := []string{"create", "-q", "-f", "qcow2", "-o", c.options}
			if c.backed {
				// The base reads as zeroes: what is below must be copied up, and version 0 stays "zeroes".
				harness.Must(t, "qemu-img", "create", "-q", "-f", "raw", filepath.Join(dir, "base"), strconv.Itoa(diskSize/2))
				args = append(args, "-b", "base", "-F", "raw")
			}
			harness.Must(t, "qemu-img", append(args, image, strconv.Itoa(diskSize))...)
			d := newLedger()
			var kept []byte
			for round := range rounds(t) {
				if c.snapshot && round == 1 {
					kept = harness.Raw(t, image, "qcow2")
					harness.Must(t, "qemu-img", "snapshot", "-c", "kept", image)
				}
				d.round(t, image, uint64(round), c.lazy)
			}
			if kept != nil {
				got := harness.RawSnapshot(t, image, "kept")
				harness.OK(t, harness.Same(got, kept, 0))
			}
		})
	}
}

// ledger knows what each sector may hold. Version 0 means zeroes; every other version is a stamp.
type ledger struct {
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

func newLedger() *ledger {
	d := &ledger{history: make([][]entry, sectors), now: 1}
	for i := range d.history {
		d.history[i] = []entry{{version: 0, acked: 1}}
	}
	return d
}

// begin notes that a change of n sectors is about to be sent, and returns its version (0 for zeroes and trims).
func (d *ledger) begin(first, n int, kind harness.Kind) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := entry{either: kind == harness.Trim}
	if kind == harness.Write || kind == harness.WriteFUA {
		d.version++
		e.version = d.version
	}
	for s := first; s < first+n; s++ {
		d.history[s] = append(d.history[s], e)
	}
	return e.version
}

// acknowledge notes that the newest change of each of these sectors was acknowledged; durable, when it was FUA.
func (d *ledger) acknowledge(first, n int, durable bool) {
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
func (d *ledger) clock() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now
}

// flushed forgets what a flush has made impossible: anything older than the newest change acknowledged by then.
func (d *ledger) flushed(upTo uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.history {
		d.settle(s, upTo)
	}
}

func (d *ledger) settle(s int, upTo uint64) {
	h := d.history[s]
	for i := len(h) - 1; i > 0; i-- {
		if h[i].acked == 0 || h[i].acked > upTo || h[i].either {
			continue
		}
		d.history[s] = append(h[:0], h[i:]...)
		return
	}
}

// allowed reports whether a sector may hold a version.
func (d *ledger) allowed(s int, version uint32) bool {
	for _, e := range d.history[s] {
		if e.version == version {
			return true
		}
	}
	return false
}

// adopt takes what was found after a crash for the settled state.
func (d *ledger) adopt(s int, version uint32) {
	d.history[s] = append(d.history[s][:0], entry{version: version, acked: d.now})
}

// round serves the image, writes, kills the server, and verifies what it left.
func (d *ledger) round(t *testing.T, image string, seed uint64, lazy bool) {
	t.Helper()
	srv := harness.Start(t, harness.Serve{Image: image})
	rng := rand.New(rand.NewPCG(seed, 77))
	// The kill comes when this many changes have been acknowledged, with others in flight.
	life := 300 + rng.IntN(900)
	// Workers own interleaved pieces, so that no two write one sector at once but all of them share clusters.
	piece := []int{5, 24, 200}[rng.IntN(3)]
	var wg sync.WaitGroup
	acked := make(chan struct{}, 1024)
	died := make(chan struct{})
	for w := range workers {
		client := srv.Dial(t)
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := d.work(client, seed<<8|uint64(w), w, piece, acked, died); err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
		}()
	}
	for range life {
		<-acked
	}
	srv.Kill()
	close(died)
	wg.Wait()
	if t.Failed() {
		t.Fatalf("the server's output:\n%s", srv.Output())
	}
	mustBeSound(t, image, lazy)
	d.verify(t, image)
	if lazy {
		mustBeSound(t, image, false) // verify opened it for writing and closed it, which had to heal it
	}
}

// work sends changes until the server dies. An error that comes before that is the server's fault.
func (d *ledger) work(c *harness.Client, seed uint64, worker, piece int, acked chan<- struct{}, died <-chan struct{}) error {
	rng := rand.New(rand.NewPCG(seed, 78))
	pieces := sectors / (piece * workers)
	for {
		first := (rng.IntN(pieces)*workers + worker) * piece
		skip := rng.IntN(piece)
		n := 1 + rng.IntN(piece-skip)
		if err := d.change(c, rng, first+skip, n); err != nil {
			var answered harness.NBDError
			if errors.As(err, &answered) {
				// Let the round go on to its kill: the server lives and refuses.
				go func() {
					for {
						select {
						case acked <- struct{}{}:
						case <-died:
							return
						}
					}
				}()
				return err
			}
			return nil // the connection broke: the kill
		}
		select {
		case acked <- struct{}{}:
		case <-died:
		}
	}
}

func (d *ledger) change(c *harness.Client, rng *rand.Rand, first, n int) error {
	off, length := int64(first)*sectorSize, n*sectorSize
	switch p := rng.IntN(100); {
	case p < 3:
		upTo := d.clock()
		if err := c.Flush(); err != nil {
			return err
		}
		d.flushed(upTo)
		return nil
	case p < 8:
		d.begin(first, n, harness.Zero)
		if err := c.Zero(off, length, p < 5); err != nil {
			return err
		}
	case p < 14:
		d.begin(first, n, harness.Trim)
		if err := c.Trim(off, length); err != nil {
			return err
		}
	case p < 18:
		version := d.begin(first, n, harness.WriteFUA)
		if err := c.WriteFUA(stamps(first, n, version), off); err != nil {
			return err
		}
		d.acknowledge(first, n, true)
		return nil
	default:
		version := d.begin(first, n, harness.Write)
		if err := c.Write(stamps(first, n, version), off); err != nil {
			return err
		}
	}
	d.acknowledge(first, n, false)
	return nil
}

// stamps returns n sectors that tell where they belong and which write they come from, in every byte.
func stamps(first, n int, version uint32) []byte {
	p := make([]byte, n*sectorSize)
	for i := range n {
		stamp(p[i*sectorSize:(i+1)*sectorSize], first+i, version)
	}
	return p
}

func stamp(p []byte, sector int, version uint32) {
	x := uint64(sector)<<32 | uint64(version)
	binary.LittleEndian.PutUint64(p, stampMagic)
	binary.LittleEndian.PutUint64(p[8:], x)
	for i := 16; i < sectorSize; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

// readStamp returns the version that a sector holds.
func readStamp(p []byte, sector int) (uint32, error) {
	if [sectorSize]byte(p) == [sectorSize]byte{} {
		return 0, nil
	}
	x := binary.LittleEndian.Uint64(p[8:])
	var want [sectorSize]byte
	stamp(want[:], sector, uint32(x))
	if [sectorSize]byte(p) != want {
		return 0, fmt.Errorf("neither zeroes nor a stamp of its own: % x ...", p[:16])
	}
	return uint32(x), nil
}

// mustBeSound demands of stock QEMU that the image has nothing worse than leaks. With lazy refcounts QEMU's check has to
// repair first, on a copy.
func mustBeSound(t *testing.T, image string, lazy bool) {
	t.Helper()
	if lazy {
		healed := filepath.Join(t.TempDir(), "copy.qcow2")
		harness.CopyFile(t, image, healed)
		harness.Must(t, "qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", healed)
		harness.OK(t, os.Remove(healed))
		return
	}
	const sound, leaks = 0, 3
	r := harness.Run(t, "qemu-img", "check", "-f", "qcow2", image)
	if r.Code != sound && r.Code != leaks {
		t.Fatalf("after the kill:\n%.4000s", r.String())
	}
	if got := harness.Drover(t, "check", "-f", "qcow2", image); got.Code != r.Code {
		t.Errorf("drover check judges otherwise than QEMU (%d):\n%.4000s", r.Code, got.String())
	}
}

// verify serves the image again and compares every sector with the ledger.
func (d *ledger) verify(t *testing.T, image string) {
	t.Helper()
	srv := harness.Start(t, harness.Serve{Image: image})
	client := srv.Dial(t)
	const step = 1 << 20
	buf := make([]byte, step)
	wrong := 0
	for off := int64(0); off < diskSize; off += step {
		harness.OK(t, client.Read(buf, off))
		for i := range step / sectorSize {
			s := int(off/sectorSize) + i
			version, err := readStamp(buf[i*sectorSize:(i+1)*sectorSize], s)
			if err == nil && !d.allowed(s, version) {
				err = fmt.Errorf("version %d, allowed are %+v", version, d.history[s])
			}
			if err != nil {
				if wrong++; wrong <= 5 {
					t.Errorf("sector %d (offset %#x): %v", s, s*sectorSize, err)
				}
				continue
			}
			d.adopt(s, version)
		}
	}
	harness.OK(t, client.Close())
	srv.Stop()
	if wrong > 0 {
		t.Fatalf("%d sectors hold what they must not hold", wrong)
	}
}
