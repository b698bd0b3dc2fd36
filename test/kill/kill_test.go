// Package kill ends drover serve with SIGKILL in the middle of heavy writing, again and again, and demands after each
// round what a flush promised: the image is sound but for leaks, every sector that a flush covered is there, every other
// sector holds something that was written to it, and the image can be served again.
//
// A killed process loses what it kept in memory, not what it gave to the kernel; power cuts are simulated where the
// storage can be replaced, in the engine's own tests.
package kill

import (
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

func TestMain(m *testing.M) {
	if dir := os.Getenv("DROVER_KILL_CHILD"); dir != "" {
		fmt.Fprintln(os.Stderr, child(dir))
		os.Exit(1)
	}
	harness.Main(m)
}

const (
	workers  = 8
	diskSize = 48 << 20
	sectors  = diskSize / harness.SectorSize
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
			d := harness.NewLedger(sectors)
			var kept []byte
			for n := range rounds(t) {
				if c.snapshot && n == 1 {
					kept = harness.Raw(t, image, "qcow2")
					harness.Must(t, "qemu-img", "snapshot", "-c", "kept", image)
				}
				round(t, d, image, uint64(n), c.lazy)
			}
			if kept != nil {
				got := harness.RawSnapshot(t, image, "kept")
				harness.OK(t, harness.Same(got, kept, 0))
			}
		})
	}
}

// round serves the image, writes, kills the server, and verifies what it left.
func round(t *testing.T, d *harness.Ledger, image string, seed uint64, lazy bool) {
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
			if err := work(d, client, seed<<8|uint64(w), w, piece, acked, died); err != nil {
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
	harness.MustBeSound(t, image, lazy)
	verify(t, d, image)
	if lazy {
		harness.MustBeSound(t, image, false) // verify opened it for writing and closed it, which had to heal it
	}
}

// work sends changes until the server dies. An error that comes before that is the server's fault.
func work(d *harness.Ledger, c *harness.Client, seed uint64, worker, piece int, acked chan<- struct{}, died <-chan struct{}) error {
	rng := rand.New(rand.NewPCG(seed, 78))
	pieces := sectors / (piece * workers)
	for {
		first := (rng.IntN(pieces)*workers + worker) * piece
		skip := rng.IntN(piece)
		n := 1 + rng.IntN(piece-skip)
		if err := d.Change(c, rng, first+skip, n); err != nil {
			if harness.Answered(err) {
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

// verify serves the image again and compares every sector with the ledger.
func verify(t *testing.T, d *harness.Ledger, image string) {
	t.Helper()
	srv := harness.Start(t, harness.Serve{Image: image})
	client := srv.Dial(t)
	d.Verify(t, client.Read)
	harness.OK(t, client.Close())
	srv.Stop()
}
