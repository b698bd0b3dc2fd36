package race

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/peer"
)

// origin is how the image of an exploration came to be.
type origin uint8

const (
	fromNothing      origin = iota // empty, made by us
	fromPrealloc                   // every cluster mapped, made by us
	fromRawBacking                 // empty over a raw device
	fromImageBacking               // empty over another qcow2 image
	fromCompressed                 // qemu-img convert -c
	fromSnapshot                   // qemu-img convert and qemu-img snapshot: every cluster and table is shared
	fromData                       // empty, with an external data file
	fromRawData                    // with a raw one
	origins
)

func (o origin) String() string {
	return [...]string{"empty", "preallocated", "raw backing", "qcow2 backing", "compressed", "snapshot", "data file", "raw data file"}[o]
}

// scenario is what a seed stands for, but for the requests themselves.
type scenario struct {
	seed        uint64
	clusterSize int64
	refBits     int
	version     int
	zstd        bool
	origin      origin
	pace        pace
	clients     int
	steps       int // requests of each client
	close       bool
	onDisk      bool // the image is a file of the host
	sweep       bool // the cache is swept all the time
	bitmap      bool // a dirty bitmap records what is written
}

func (s scenario) String() string {
	return fmt.Sprintf("seed=%d cluster=%d refcount=%d v%d zstd=%v %v pace=%v clients=%d steps=%d close=%v disk=%v sweep=%v bitmap=%v", s.seed,
		s.clusterSize, s.refBits, s.version, s.zstd, s.origin, s.pace, s.clients, s.steps, s.close, s.onDisk, s.sweep,
		s.bitmap)
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func draw(seed uint64) scenario {
	r := rand.New(rand.NewPCG(seed, 3))
	s := scenario{seed: seed}
	s.clusterSize = pick[int64](r, 512, 4096, 4096, 65536)
	s.version = pick(r, 3, 3, 3, 2)
	s.refBits = 16
	if s.version == 3 {
		s.refBits = pick(r, 1, 2, 4, 8, 16, 32, 64)
	}
	s.origin = origin(r.IntN(int(origins)))
	if s.origin == fromSnapshot {
		s.refBits = max(s.refBits, 2) // a count of 2 must fit
	}
	if s.hasData() {
		s.version = 3
	}
	s.zstd = s.version == 3 && s.origin == fromCompressed && r.IntN(2) == 0
	s.pace = pace(r.IntN(int(paces)))
	s.clients = 2 + r.IntN(15)
	s.steps = min(60, 480/s.clients)
	s.close = r.IntN(4) == 0
	s.onDisk = r.IntN(10) == 0
	s.sweep = r.IntN(4) == 0
	s.bitmap = s.version == 3 && r.IntN(3) == 0
	return s
}

// hasData reports whether the data is in an external file.
func (s scenario) hasData() bool { return s.origin == fromData || s.origin == fromRawData }

// A disk has its data in a few places that lie in as many slices of L2 tables, more than the smallest cache holds. Two of
// the places, the first and the last, are where most requests go.
const (
	places        = 22
	placeClusters = 3
)

// sliceSpan is how many bytes of the disk one slice of an L2 table maps: a slice is 4 KiB or a whole table.
func (s scenario) sliceSpan() int64 { return min(s.clusterSize, 4096) / 8 * s.clusterSize }

// size ends the disk within a cluster where a cluster has more than one sector.
func (s scenario) size() int64 {
	return (places-1)*s.sliceSpan() + placeClusters*s.clusterSize - (s.clusterSize / 2 &^ (sectorSize - 1))
}

// place returns the sectors of a place.
func (s scenario) place(i int64) (first, n int64) {
	off := i * s.sliceSpan()
	end := min(off+placeClusters*s.clusterSize, s.size())
	return off / sectorSize, (end - off) / sectorSize
}

// watched lists the sectors whose histories are judged: the ends and the middle of every cluster of every place.
func (s scenario) watched() []int64 {
	var list []int64
	per := s.clusterSize / sectorSize
	for i := range int64(places) {
		first, n := s.place(i)
		for c := int64(0); c < n; c += per {
			last := min(c+per, n) - 1
			for _, k := range []int64{c, c + (last-c)/2, last} {
				if len(list) == 0 || list[len(list)-1] != first+k {
					list = append(list, first+k)
				}
			}
		}
	}
	return list
}

// holds returns what a sector of the image holds at first: in images with content every place does but each third one.
func (s scenario) holds(sector int64) value {
	if s.origin == fromNothing || s.origin == fromPrealloc || s.hasData() {
		return 0
	}
	off := sector * sectorSize
	i := off / s.sliceSpan()
	if i%3 == 2 || off%s.sliceSpan() >= placeClusters*s.clusterSize {
		return 0
	}
	return initial
}

// content makes a sparse raw file of what the disk holds at first.
func (s scenario) content(t testing.TB) *storage.MemFile {
	f := storage.NewMemFile("content.raw")
	must(t, f.Truncate(s.size()))
	for i := range int64(places) {
		first, n := s.place(i)
		if s.holds(first) == 0 {
			continue
		}
		p := make([]byte, n*sectorSize)
		stamp(p, first, initial)
		if _, err := f.WriteAt(p, first*sectorSize); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// gallery keeps the images that qemu-img made: explorations that begin alike share one.
type gallery map[scenario]*storage.MemFile

// byQEMU returns a copy of the image that qemu-img makes for a scenario.
func (g gallery) byQEMU(t testing.TB, s scenario) *storage.MemFile {
	key := scenario{clusterSize: s.clusterSize, refBits: s.refBits, version: s.version, zstd: s.zstd, origin: s.origin}
	if g[key] == nil {
		g[key] = key.byQEMU(t)
	}
	return g[key].Clone()
}

// image makes the image and what lies below it. The backing device is nil where there is none.
func (s scenario) image(t testing.TB, g gallery, data *storage.MemFile) (*storage.MemFile, block.Device) {
	switch s.origin {
	case fromCompressed, fromSnapshot:
		return g.byQEMU(t, s), nil
	case fromRawBacking:
		raw, err := block.NewRaw(newBusyFile(s.content(t), s.pace, s.seed^1), block.RawOptions{ReadOnly: true})
		must(t, err)
		return s.create(t, nil), raw
	case fromImageBacking:
		o := qcow2.Options{ReadOnly: true, CacheSize: 1, ClusterCacheSize: 1}
		below := s
		below.origin, below.version, below.refBits, below.zstd = fromCompressed, 3, 16, false
		im, err := qcow2.Open(t.Context(), newBusyFile(g.byQEMU(t, below), s.pace, s.seed^1), o)
		must(t, err)
		return s.create(t, nil), im
	}
	return s.create(t, data), nil
}

func (s scenario) create(t testing.TB, data *storage.MemFile) *storage.MemFile {
	f := storage.NewMemFile("race.qcow2")
	o := qcow2.CreateOptions{Size: s.size(), ClusterSize: s.clusterSize, Version: s.version, RefcountBits: s.refBits}
	if s.hasData() {
		o.DataFile, o.DataStorage, o.DataFileRaw = data.Stat().Name, data, s.origin == fromRawData
	}
	if s.origin == fromPrealloc {
		o.Preallocation = qcow2.PreallocMetadata
	}
	must(t, qcow2.Create(t.Context(), f, o))
	return f
}

func (s scenario) byQEMU(t testing.TB) *storage.MemFile {
	peer.Need(t, "qemu-img")
	dir, err := os.MkdirTemp(t.TempDir(), "qemu")
	must(t, err)
	raw, img := filepath.Join(dir, "content.raw"), filepath.Join(dir, "image.qcow2")
	save(t, s.content(t), raw)
	o := fmt.Sprintf("cluster_size=%d,compat=%s,refcount_bits=%d", s.clusterSize,
		map[int]string{2: "0.10", 3: "1.1"}[s.version], s.refBits)
	if s.zstd {
		o += ",compression_type=zstd"
	}
	args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", o, raw, img}
	if s.origin == fromCompressed {
		args = append(args[:1:1], append([]string{"-c"}, args[1:]...)...)
	}
	run(t, "qemu-img", args...)
	if s.origin == fromSnapshot {
		run(t, "qemu-img", "snapshot", "-c", "before", img)
	}
	f := load(t, img)
	must(t, os.RemoveAll(dir))
	return f
}
