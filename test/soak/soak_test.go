// Package soak runs drover serve for long under everything at once: clients of every temper, SIGKILL and SIGTERM, on one
// image after another. Each image is served several times. In each of the server's lives it demands that
//
//   - every read returns what the last write put there;
//   - when the clients have left, the server has as many files open as before they came, and no goroutine of theirs;
//   - its memory does not grow with the number of requests;
//
// and after each that qemu-img check finds the image sound (without even a leak after a clean stop), that QEMU reads from it
// what clients were promised, and that an internal snapshot is untouched.
//
//	go test ./test/soak -v -timeout 0 -duration 10m            # make soak
//	go test ./test/soak -v -timeout 0 -duration 10m -seed 77   # the same images, clients and ends again
//
// The seed decides what is done; it does not decide how the requests of the clients interleave.
package soak

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

var (
	duration = flag.Duration("duration", 15*time.Second, "begin no new life of the server after this time")
	seedFlag = flag.Uint64("seed", 0, "what to do; 0 chooses")
)

func TestMain(m *testing.M) {
	flag.Parse()
	harness.Main(m)
}

const (
	diskSize = 32 << 20
	sectors  = diskSize / harness.SectorSize
	// livesPerImage is how often an image is served before the next one. It has no divisor in common with the number of ends,
	// so that in time every kind of image meets every end at every age.
	livesPerImage = 3
)

// kind is an image to begin with.
type kind struct {
	name       string
	options    string
	lazy       bool // the dirty bit stands for refcounts that are not on disk
	backed     bool // half of the disk lies in a backing file
	compressed bool // half of the disk is compressed clusters
	snapshot   bool // of what is there at the start
}

var kinds = []kind{
	{name: "64K clusters", options: "cluster_size=65536"},
	{name: "4K clusters, backing file, snapshot", options: "cluster_size=4096", backed: true, snapshot: true},
	{name: "16K clusters, compressed", options: "cluster_size=16384", compressed: true},
	{name: "512 byte clusters, 1 bit refcounts", options: "cluster_size=512,refcount_bits=1"},
	{name: "64K clusters, zstd, snapshot", options: "cluster_size=65536,compression_type=zstd", compressed: true, snapshot: true},
	{name: "2M clusters, backing file", options: "cluster_size=2M", backed: true},
	{name: "4K clusters, lazy refcounts", options: "cluster_size=4096,lazy_refcounts=on", lazy: true},
}

// end is how a life of the server ends.
type end int

const (
	killBusy  end = iota // SIGKILL with requests in flight
	stopBusy             // SIGTERM with requests in flight
	stopIdle             // SIGTERM when the clients have left
	abortIdle            // SIGQUIT when the clients have left: shows the goroutines, and is else like SIGKILL
	ends
)

func (e end) String() string {
	return [...]string{"SIGKILL under load", "SIGTERM under load", "SIGTERM when idle", "SIGQUIT when idle"}[e]
}

func (e end) busy() bool  { return e == killBusy || e == stopBusy }
func (e end) clean() bool { return e == stopBusy || e == stopIdle }

// disk is an image and what it must hold.
type disk struct {
	kind
	image  string
	ledger *harness.Ledger
	kept   []byte // what the snapshot holds; nil without one
}

func (k kind) make(t *testing.T) *disk {
	t.Helper()
	dir := t.TempDir()
	d := &disk{kind: k, image: filepath.Join(dir, "image.qcow2"), ledger: harness.NewLedger(sectors)}
	create := []string{"create", "-q", "-f", "qcow2", "-o", k.options}
	size := strconv.Itoa(diskSize)
	base := filepath.Join(dir, "base")
	if k.backed || k.compressed {
		harness.OK(t, os.WriteFile(base, d.ledger.Content(0, sectors/2), 0o600))
	}
	switch {
	case k.backed:
		harness.Must(t, "qemu-img", append(create, "-b", "base", "-F", "raw", d.image, size)...)
	case k.compressed:
		harness.OK(t, os.Truncate(base, diskSize))
		harness.Must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", k.options, base, d.image)
		harness.OK(t, os.Remove(base))
	default:
		harness.Must(t, "qemu-img", append(create, d.image, size)...)
	}
	if k.snapshot {
		d.kept = harness.Raw(t, d.image, "qcow2")
		harness.Must(t, "qemu-img", "snapshot", "-c", "kept", d.image)
	}
	return d
}

// judge looks at the image after a life of the server.
func (d *disk) judge(t *testing.T, e end) {
	t.Helper()
	if e.clean() {
		d.ledger.Stopped()
		harness.SameCheck(t, d.image)
	} else {
		harness.MustBeSound(t, d.image, d.lazy)
	}
	raw := harness.Raw(t, d.image, "qcow2")
	d.ledger.Verify(t, func(p []byte, off int64) error {
		copy(p, raw[off:])
		return nil
	})
	if d.kept != nil && !bytes.Equal(harness.RawSnapshot(t, d.image, "kept"), d.kept) {
		t.Fatal("the snapshot's content has changed")
	}
	if !e.clean() {
		// So that the next clean stop has to leave no leak at all.
		repair := "leaks"
		if d.lazy {
			repair = "all"
		}
		harness.Must(t, "qemu-img", "check", "-q", "-f", "qcow2", "-r", repair, d.image)
	}
}

func TestSoak(t *testing.T) {
	peer.Need(t, "qemu-img")
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		t.Skip("this needs Linux's /proc to look into the server")
	}
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	sum := &summary{seed: seed, began: time.Now()}
	fmt.Printf("soak: seed %d, for %v\n", seed, *duration)
	t.Cleanup(func() { sum.print() })
	rest := goroutinesAtRest(t)
	for n := 0; n == 0 || time.Since(sum.began) < *duration; n++ {
		k := kinds[n%len(kinds)]
		t.Run(fmt.Sprintf("%d %s", n, k.name), func(t *testing.T) {
			d := k.make(t)
			sum.images++
			for l := range livesPerImage {
				if l > 0 && time.Since(sum.began) >= *duration {
					return
				}
				e := end((n*livesPerImage + l) % int(ends))
				rng := rand.New(rand.NewPCG(seed, uint64(n*livesPerImage+l)))
				live(t, d, e, rng, rest, sum)
				d.judge(t, e)
			}
		})
		if t.Failed() {
			t.Fatalf("seed %d, image %d", seed, n)
		}
	}
}

// summary is what the run has been through.
type summary struct {
	seed                        uint64
	began                       time.Time
	images                      int
	ended                       [ends]int
	requests, clients, vanished int64
	maxRSS, maxGrowth           int64
	fdsAtRest, maxFds           int
	maxThreads                  int
	goroutines, maxGoroutines   int
}

func (s *summary) print() {
	lives := 0
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "soak: seed\t%d\n", s.seed)
	fmt.Fprintf(w, "time\t%v\n", time.Since(s.began).Round(time.Second))
	fmt.Fprintf(w, "images\t%d\n", s.images)
	for e, n := range s.ended {
		fmt.Fprintf(w, "%v\t%d\n", end(e), n)
		lives += n
	}
	fmt.Fprintf(w, "lives of the server\t%d\n", lives)
	fmt.Fprintf(w, "requests answered\t%d\n", s.requests)
	fmt.Fprintf(w, "clients\t%d, of which %d vanished in mid-request\n", s.clients, s.vanished)
	fmt.Fprintf(w, "resident memory\tat most %.1f MiB; after the warm-up of a life it grew by %.1f MiB at most\n",
		mib(s.maxRSS), mib(s.maxGrowth))
	fmt.Fprintf(w, "open files\t%d without clients, before and after them; %d at most\n", s.fdsAtRest, s.maxFds)
	fmt.Fprintf(w, "threads\tat most %d\n", s.maxThreads)
	fmt.Fprintf(w, "goroutines\t%d after the first client, %d at most after the others\n", s.goroutines, s.maxGoroutines)
	w.Flush()
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }
