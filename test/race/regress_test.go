package race

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/peer"
)

// crowd is many queues on one disk. Each sector belongs to one queue, which knows what it holds; clusters are shared, but for
// every fourth, which belongs to one queue as a whole.
type crowd struct {
	im     block.Device
	cs     int64
	queues int
	held   []value // by sector
}

func newCrowd(im block.Device, cs int64, queues int, first func(sector int64) value) *crowd {
	c := &crowd{im: im, cs: cs, queues: queues, held: make([]value, im.Size()/sectorSize)}
	for s := range c.held {
		c.held[s] = first(int64(s))
	}
	return c
}

func nothing(int64) value { return 0 }

// run has every queue make requests, and then looks at the whole disk.
func (c *crowd) run(t *testing.T, steps int, seed uint64) {
	t.Helper()
	var wg sync.WaitGroup
	for id := range c.queues {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(id)))
			for n := range steps {
				if err := c.step(t, r, id, value(seed)<<24+value(id+1)<<16+value(n)+2); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	c.verify(t, c.im)
}

func (c *crowd) step(t *testing.T, r *rand.Rand, id int, v value) error {
	per := c.cs / sectorSize
	sector := r.Int64N(int64(len(c.held)))
	if cluster := sector / per; cluster%4 == 3 && (cluster+1)*per <= int64(len(c.held)) {
		owner := cluster / 4 % int64(c.queues)
		if owner != int64(id) {
			return c.im.Flush(t.Context())
		}
		return c.whole(t, r, cluster*per, per, v)
	}
	sector = min(sector/int64(c.queues)*int64(c.queues)+int64(id), int64(len(c.held))-1)
	if sector%int64(c.queues) != int64(id) || sector/per%4 == 3 {
		return nil
	}
	if r.IntN(3) == 0 {
		return c.read(t, sector, 1)
	}
	p := make([]byte, sectorSize)
	stamp(p, sector, v)
	try, ok := c.im.(block.TryDevice)
	if !ok || try.TryWriteAt(p, sector*sectorSize) != nil {
		if err := c.im.WriteAt(t.Context(), p, sector*sectorSize, block.WriteFlags(r.IntN(20)/19)); err != nil {
			return err
		}
	}
	c.held[sector] = v
	return c.read(t, sector, 1)
}

// whole does something to a cluster that one queue owns.
func (c *crowd) whole(t *testing.T, r *rand.Rand, sector, n int64, v value) error {
	off, size := sector*sectorSize, n*sectorSize
	var err error
	switch r.IntN(4) {
	case 0:
		// Also a discard zeroes here: whole clusters, in version 3 images or without a backing file.
		v, err = 0, c.im.Discard(t.Context(), off, size)
	case 1:
		v, err = 0, c.im.WriteZeroes(t.Context(), off, size, block.ZeroFlags(r.IntN(2)))
	case 2:
		return c.read(t, sector, n)
	case 3:
		p := make([]byte, size)
		stamp(p, sector, v)
		err = c.im.WriteAt(t.Context(), p, off, 0)
	}
	for k := range n {
		c.held[sector+k] = v
	}
	return err
}

func (c *crowd) read(t *testing.T, sector, n int64) error {
	p := make([]byte, n*sectorSize)
	if err := c.im.ReadAt(t.Context(), p, sector*sectorSize); err != nil {
		return err
	}
	return c.compare(p, sector)
}

func (c *crowd) compare(p []byte, sector int64) error {
	for ; len(p) > 0; p, sector = p[sectorSize:], sector+1 {
		if v, err := unstamp(p[:sectorSize], sector); err != nil || v != c.held[sector] {
			return fmt.Errorf("sector %d holds %#x (%v), want %#x", sector, v, err, c.held[sector])
		}
	}
	return nil
}

// verify looks at every sector of a device.
func (c *crowd) verify(t *testing.T, d block.Device) {
	t.Helper()
	p := make([]byte, 1<<20)
	for off := int64(0); off < d.Size(); off += int64(len(p)) {
		p = p[:min(int64(len(p)), d.Size()-off)]
		must(t, d.ReadAt(t.Context(), p, off))
		must(t, c.compare(p, off/sectorSize))
	}
}

// open opens a file that the test goes on using.
func open(t testing.TB, f storage.File, o qcow2.Options) *qcow2.Image {
	t.Helper()
	im, err := qcow2.Open(t.Context(), keptOpen{f}, o)
	must(t, err)
	return im
}

// stamped makes a raw file whose sectors say who they are.
func stamped(t testing.TB, size int64) *storage.MemFile {
	f := storage.NewMemFile("stamped.raw")
	p := make([]byte, size)
	stamp(p, 0, initial)
	_, err := f.WriteAt(p, 0)
	must(t, err)
	return f
}

// converted has qemu-img make an image of a stamped disk.
func converted(t testing.TB, size int64, args ...string) string {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	raw, img := filepath.Join(dir, "stamped.raw"), filepath.Join(dir, "image.qcow2")
	save(t, stamped(t, size), raw)
	run(t, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), raw, img)...)
	return img
}

func be64(p []byte) int64 { return int64(binary.BigEndian.Uint64(p)) }

// bytesAt reads from a file.
func bytesAt(t testing.TB, f storage.File, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	_, err := f.ReadAt(p, off)
	must(t, err)
	return p
}

// cloud-hypervisor 7660: each virtio queue had a clone of the image's state, and the clones overwrote each other.
// Here one image serves eight queues at once; nobody's data and no refcount may suffer.
func TestCloudHypervisor7660(t *testing.T) {
	for _, cs := range []int64{4096, 65536} {
		t.Run(fmt.Sprint("cluster=", cs), func(t *testing.T) {
			f := storage.NewMemFile("7660.qcow2")
			must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 4 << 20, ClusterSize: cs}))
			im := open(t, f, qcow2.Options{CacheSize: 1})
			c := newCrowd(im, cs, 8, nothing)
			c.run(t, 1200, 1)
			must(t, im.Close())
			mustBeClean(t, f)
			im = open(t, f, qcow2.Options{ReadOnly: true})
			c.verify(t, im)
			must(t, im.Close())
		})
	}
}

// cloud-hypervisor 8358: guest data was written over the first cluster of the file, the header.
// Here nothing but the refcount table's pointer may change there, whatever the guest does and the refcounts claim.
func TestCloudHypervisor8358(t *testing.T) {
	const cs = 512
	mem := storage.NewMemFile("8358.qcow2")
	must(t, qcow2.Create(t.Context(), mem, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs}))
	file := storage.NewFaultFile(keptOpen{mem})
	var stray atomic.Int64
	file.SetHook(func(c storage.Call) error {
		if c.Kind != storage.OpRead && c.Kind != storage.OpSync && c.Off < cs && (c.Off < 48 || c.Off+c.Len > 60) {
			stray.Add(1)
		}
		return nil
	})
	before := bytesAt(t, mem, 0, cs)
	im, err := qcow2.Open(t.Context(), file, qcow2.Options{CacheSize: 1})
	must(t, err)
	newCrowd(im, cs, 6, nothing).run(t, 800, 2)
	must(t, im.Close())
	after := bytesAt(t, mem, 0, cs)
	copy(after[48:60], before[48:60])
	if n := stray.Load(); n > 0 || !bytes.Equal(before, after) {
		t.Fatalf("%d writes to the header; it changed: %v", n, !bytes.Equal(before, after))
	}
	mustBeClean(t, mem)

	t.Run("the header counts as free", func(t *testing.T) {
		mem := storage.NewMemFile("8358.qcow2")
		must(t, qcow2.Create(t.Context(), mem, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs}))
		table := be64(bytesAt(t, mem, 48, 8))
		block := be64(bytesAt(t, mem, table, 8))
		_, err := mem.WriteAt(make([]byte, cs), block) // every cluster is free now
		must(t, err)
		before := bytesAt(t, mem, 0, cs)
		im := open(t, mem, qcow2.Options{})
		err = im.WriteAt(t.Context(), bytes.Repeat([]byte{'x'}, 4096), 0, 0)
		var corrupt *qcow2.CorruptError
		if !errors.As(err, &corrupt) {
			t.Errorf("writing: %v, want a CorruptError", err)
		}
		_ = im.Close()
		before[79] |= 2 // it says that the image is corrupt
		if !bytes.Equal(before, bytesAt(t, mem, 0, cs)) {
			t.Error("the header was overwritten")
		}
	})
}

// cloud-hypervisor 8606: after a reopen the free list held clusters that were live L2 tables, and gave them to guest data.
// As there: a converted image with compressed clusters, grown offline; then load, over several sessions, checked by QEMU.
func TestCloudHypervisor8606(t *testing.T) {
	const cs, size = 4096, 4 << 20
	img := converted(t, size/2, "-c", "-o", fmt.Sprint("cluster_size=", cs))
	run(t, "qemu-img", "resize", "-f", "qcow2", img, fmt.Sprint(size))
	f := load(t, img)
	var c *crowd
	for session := range uint64(4) {
		im := open(t, f, qcow2.Options{CacheSize: 1})
		if c == nil {
			c = newCrowd(im, cs, 6, func(s int64) value {
				if s < size/2/sectorSize {
					return initial
				}
				return 0
			})
		}
		c.im = im
		c.run(t, 700, session+1)
		must(t, im.Close())
		mustBeClean(t, f)
		mustBeCleanForQEMU(t, f)
	}
}

// cloud-hypervisor 8597: clusters of relocated refcount blocks were freed on disk but forgotten by the running process, so
// that the file grew with every fsync. Here a steady load of allocating, freeing and flushing must find room in the file.
func TestCloudHypervisor8597(t *testing.T) {
	const cs = 4096
	f := storage.NewMemFile("8597.qcow2")
	must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 64 << 20, ClusterSize: cs}))
	im := open(t, f, qcow2.Options{})
	p := bytes.Repeat([]byte{'x'}, 8*cs)
	round := func(n int64) {
		off := n % 50 * int64(len(p)) * 3
		must(t, im.WriteAt(t.Context(), p, off, 0))
		must(t, im.Flush(t.Context()))
		must(t, im.Discard(t.Context(), off, int64(len(p))))
		must(t, im.Flush(t.Context()))
	}
	for n := range int64(60) {
		round(n)
	}
	warm, err := f.Size()
	must(t, err)
	for n := range int64(600) {
		round(n)
	}
	end, err := f.Size()
	must(t, err)
	if end > warm {
		t.Errorf("the file grew from %d to %d bytes, though nothing more is in use", warm, end)
	}
	must(t, im.Close())
	mustBeClean(t, f)
}

// cloud-hypervisor 8621: with a backing file and several queues, copy-on-write of warm overlays lost guest writes.
// As there: an overlay whose L2 tables are there already, sixteen queues, parts of clusters.
func TestCloudHypervisor8621(t *testing.T) {
	const cs, size = 65536, 8 << 20
	below := open(t, load(t, converted(t, size, "-c")), qcow2.Options{ReadOnly: true, CacheSize: 1, ClusterCacheSize: 1})
	f := storage.NewMemFile("8621.qcow2")
	must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: size, ClusterSize: cs}))
	im := open(t, f, qcow2.Options{Backing: below, CacheSize: 1})
	c := newCrowd(im, cs, 16, func(int64) value { return initial })
	for s := int64(0); s < size/sectorSize; s += 9 * cs / sectorSize { // warm
		p := make([]byte, sectorSize)
		c.held[s] = 2
		stamp(p, s, 2)
		must(t, im.WriteAt(t.Context(), p, s*sectorSize, 0))
	}
	must(t, im.Flush(t.Context()))
	c.run(t, 500, 3)
	must(t, im.Close())
	mustBeClean(t, f)
}

// cloud-hypervisor 8624: the hole of a freed cluster was punched after the cluster had become an L2 table.
// Here the punch is held up while others allocate data and tables; it must still own what it punches.
func TestCloudHypervisor8624(t *testing.T) {
	s := newStage(t, qcow2.CreateOptions{Size: 2048 * stagedCluster}, qcow2.Options{})
	for c := range int64(4) {
		s.write(c, 'a')
	}
	s.flush(1)
	h := s.hold(storage.OpPunch, 0, 0)
	must(t, s.im.Discard(t.Context(), 0, 4*s.cs))
	flusher := s.start(func() error {
		for range 3 {
			if err := s.im.Flush(t.Context()); err != nil {
				return err
			}
		}
		return nil
	})
	flusher.until(h)
	for c := int64(500); c < 520; c++ { // over the end of one L2 table
		s.write(c, 'x')
	}
	close(h.release)
	must(t, flusher.end())
	for c := int64(1020); c < 1040; c++ {
		s.write(c, 'y')
	}
	s.flush(3)
	s.mustHold("written during the punch", s.read(500*s.cs, 20*s.cs), 'x')
	s.mustHold("written after the punch", s.read(1020*s.cs, 20*s.cs), 'y')
	s.finish()
}

// E1: the refcount table of another engine never grew: files stopped at 8 MiB with 512-byte clusters, earlier with wide
// counts. Here it moves to a larger place as often as needed.
func TestE1RefcountTableGrows(t *testing.T) {
	for _, v := range []struct {
		bits int
		size int64
	}{{16, 10 << 20}, {32, 5 << 20}, {64, 3 << 20}} {
		t.Run(fmt.Sprint("refcount=", v.bits), func(t *testing.T) {
			f := storage.NewMemFile("e1.qcow2")
			must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: v.size, ClusterSize: 512, RefcountBits: v.bits}))
			table := bytesAt(t, f, 48, 12)
			im := open(t, f, qcow2.Options{})
			p := make([]byte, 64<<10)
			for off := int64(0); off < v.size; off += int64(len(p)) {
				stamp(p, off/sectorSize, initial)
				must(t, im.WriteAt(t.Context(), p, off, 0))
				if off%(1<<20) == 0 {
					must(t, im.Flush(t.Context()))
				}
			}
			newCrowd(im, 512, 1, func(int64) value { return initial }).verify(t, im)
			must(t, im.Close())
			if bytes.Equal(table, bytesAt(t, f, 48, 12)) {
				t.Error("the refcount table never moved: this test is too small")
			}
			mustBeClean(t, f)
			peer.Need(t, "qemu-img")
			mustBeCleanForQEMU(t, f)
		})
	}
}

// E2: counts of less than a byte were laid out as if they took one, and hundreds of clusters counted wrong.
// Here every width must pass QEMU's check after allocating and freeing.
func TestE2NarrowRefcounts(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, bits := range []int{1, 2, 4, 8} {
		t.Run(fmt.Sprint("refcount=", bits), func(t *testing.T) {
			f := storage.NewMemFile("e2.qcow2")
			must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 2 << 20, ClusterSize: 512, RefcountBits: bits}))
			im := open(t, f, qcow2.Options{})
			newCrowd(im, 512, 4, nothing).run(t, 1500, 4)
			must(t, im.Close())
			mustBeClean(t, f)
			mustBeCleanForQEMU(t, f)
		})
	}
}

// E3: compressed clusters were not counted, so that the host clusters they share were given away.
// Here each is rewritten in part by turns; its neighbours in the same host cluster must stay, and QEMU's check be clean.
func TestE3CompressedClustersAreCounted(t *testing.T) {
	const cs, size = 4096, 1 << 20
	f := load(t, converted(t, size, "-c", "-o", fmt.Sprint("cluster_size=", cs)))
	im := open(t, f, qcow2.Options{ClusterCacheSize: 1})
	c := newCrowd(im, cs, 1, func(int64) value { return initial })
	const per = cs / sectorSize
	for _, turn := range []int64{1, 3, 0, 2} {
		for s := turn * per; s < size/sectorSize; s += 4 * per {
			p := make([]byte, sectorSize)
			c.held[s+5] = 7
			stamp(p, s+5, 7)
			must(t, im.WriteAt(t.Context(), p, (s+5)*sectorSize, 0))
		}
		must(t, im.Flush(t.Context()))
		must(t, im.Flush(t.Context()))
		c.verify(t, im)
		report, err := im.Check(t.Context(), qcow2.CheckOptions{})
		must(t, err)
		if !report.Clean() {
			t.Fatalf("check: %+v", report.Findings)
		}
	}
	must(t, im.Close())
	mustBeCleanForQEMU(t, f)
}

// E4: a check that did not know compressed clusters and snapshots found 22 errors in a sound image, and "repaired" them.
// Here the check must find nothing in one, and change nothing; and it must find what is broken in such an image.
func TestE4CheckKnowsSnapshotsAndCompression(t *testing.T) {
	img := converted(t, 1<<20, "-c", "-o", "cluster_size=4096")
	run(t, "qemu-img", "snapshot", "-c", "one", img)
	run(t, "qemu-img", "snapshot", "-c", "two", img)
	f := load(t, img)
	size, err := f.Size()
	must(t, err)
	before := bytesAt(t, f, 0, size)
	mustBeClean(t, f)
	if !bytes.Equal(before, bytesAt(t, f, 0, size)) {
		t.Error("the check changed the image")
	}
	im := open(t, f, qcow2.Options{})
	must(t, im.WriteAt(t.Context(), []byte("over it"), 5000, 0))
	must(t, im.Close())
	mustBeClean(t, f)
	mustBeCleanForQEMU(t, f)

	table := be64(bytesAt(t, f, 48, 8))
	_, err = f.WriteAt(make([]byte, 2), be64(bytesAt(t, f, table, 8))) // the header's cluster counts 0
	must(t, err)
	report, err := qcow2.CheckFile(t.Context(), f, qcow2.CheckOptions{})
	must(t, err)
	if report.Corruptions == 0 {
		t.Error("the check misses a cluster that is in use and counts as free")
	}
}

// E5: a read past the end of a short backing file returned without an error and left the caller's old bytes in the buffer.
// Here what lies behind the end reads as zeroes.
func TestE5ShortBackingFile(t *testing.T) {
	for _, length := range []int64{1000, 1024, 4096 + 512} {
		raw := storage.NewMemFile("short.raw")
		_, err := raw.WriteAt(bytes.Repeat([]byte{'b'}, int(length)), 0)
		must(t, err)
		below, err := block.NewRaw(raw, block.RawOptions{ReadOnly: true})
		must(t, err)
		f := storage.NewMemFile("e5.qcow2")
		must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096}))
		im := open(t, f, qcow2.Options{Backing: below})
		want := make([]byte, 16384)
		copy(want, bytes.Repeat([]byte{'b'}, int(length)))
		for _, off := range []int64{0, 700, 999, 1000, 4000} {
			for _, try := range []bool{false, true} {
				p := bytes.Repeat([]byte{'!'}, 8192)
				err := errors.New("not tried")
				if try {
					err = im.TryReadAt(p, off)
				}
				if err != nil {
					must(t, im.ReadAt(t.Context(), p, off))
				}
				if !bytes.Equal(p, want[off:][:len(p)]) {
					t.Fatalf("backing file of %d bytes: read at %d (try %v) differs", length, off, try)
				}
			}
		}
		must(t, im.WriteAt(t.Context(), []byte("w"), length-1, 0)) // copies the rest of the cluster
		want[length-1] = 'w'
		p := bytes.Repeat([]byte{'!'}, 8192)
		must(t, im.ReadAt(t.Context(), p, 0))
		if !bytes.Equal(p, want[:len(p)]) {
			t.Fatalf("backing file of %d bytes: copy-on-write at its end differs", length)
		}
		must(t, im.Close())
	}
}

// E6: opening a zstd image for writing rewrote its header without the compression type, and it never opened again.
// Here two bytes are written; the header must stay, and the image open, here and with QEMU.
func TestE6ZstdImageSurvivesWriting(t *testing.T) {
	img := converted(t, 1<<20, "-c", "-o", "compression_type=zstd")
	header := bytesAt(t, load(t, img), 0, 4096)
	for range 2 {
		d, err := block.Open(t.Context(), img, block.OpenOptions{Format: "qcow2"})
		must(t, err)
		must(t, d.WriteAt(t.Context(), []byte("ab"), 100000, 0))
		must(t, d.Close())
	}
	if !bytes.Equal(header, bytesAt(t, load(t, img), 0, 4096)) {
		t.Error("the header changed")
	}
	run(t, "qemu-img", "check", "-f", "qcow2", img)
	run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 0x61 100000 1", "-c", "read -P 0x62 100001 1", img)
	info, err := qcow2.ReadInfo(t.Context(), load(t, img))
	must(t, err)
	if info.CompressionType != "zstd" {
		t.Errorf("compression type is %q now", info.CompressionType)
	}
}

// E7: every opening for writing set the dirty bit, and Close cleared it, also where somebody else's crash had set it and
// nothing had been repaired. Here a clean image stays clean, and a dirty one stays dirty until a repair has verified it.
func TestE7DirtyBit(t *testing.T) {
	f := storage.NewMemFile("e7.qcow2")
	must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 1 << 20}))
	dirty := func() bool { return bytesAt(t, f, 79, 1)[0]&1 != 0 }
	im := open(t, f, qcow2.Options{})
	must(t, im.WriteAt(t.Context(), []byte("x"), 0, 0))
	must(t, im.Flush(t.Context()))
	if dirty() {
		t.Error("writing made the image dirty, though its refcounts are kept")
	}
	must(t, im.Close())

	_, err := f.WriteAt([]byte{1}, 79)
	must(t, err)
	read := func(o qcow2.Options) {
		im := open(t, f, o)
		p := make([]byte, 1)
		must(t, im.ReadAt(t.Context(), p, 0))
		must(t, im.Close())
		if p[0] != 'x' {
			t.Errorf("the image holds %q", p)
		}
	}
	read(qcow2.Options{ReadOnly: true})
	if !dirty() {
		t.Error("reading made a dirty image clean")
	}
	repaired := false
	read(qcow2.Options{OnRepair: func(*qcow2.RepairReport) { repaired = true }})
	if !repaired || dirty() {
		t.Errorf("opened for writing, a dirty image was repaired: %v, and is dirty afterwards: %v", repaired, dirty())
	}
}

// L1: without a cache of decompressed clusters, reading in pieces inflated each cluster again and again, 16 MB/s.
// Here a cluster is read from the host once however small the pieces, also when many ask at once.
func TestL1CompressedClusterIsReadOnce(t *testing.T) {
	const cs, clusters = 65536, 16
	for _, readers := range []int{1, 8} {
		t.Run(fmt.Sprint("readers=", readers), func(t *testing.T) {
			file := storage.NewFaultFile(load(t, converted(t, clusters*cs, "-c")))
			im, err := qcow2.Open(t.Context(), file, qcow2.Options{ReadOnly: true})
			must(t, err)
			p := make([]byte, 1)
			must(t, im.ReadAt(t.Context(), p, 0)) // the tables, and the first cluster
			before := file.Calls(storage.OpRead)
			var wg sync.WaitGroup
			for range readers {
				wg.Go(func() {
					p := make([]byte, 4096)
					for off := int64(0); off < clusters*cs; off += int64(len(p)) {
						if err := im.ReadAt(t.Context(), p, off); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if n := file.Calls(storage.OpRead) - before; n != clusters-1 {
				t.Errorf("reading %d compressed clusters in pieces took %d reads", clusters-1, n)
			}
			must(t, im.Close())
		})
	}
}

// L2: opening an image disclosed whatever file its header named as backing file.
// Here a file outside is read only at the user's word, not by its name, not through "..", a link or a json: name.
func TestL2BackingFileIsNotDisclosed(t *testing.T) {
	peer.Need(t, "qemu-img")
	outside, inside := t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	must(t, os.WriteFile(secret, bytes.Repeat([]byte("secret. "), 64), 0o600))
	up, err := filepath.Rel(inside, secret)
	must(t, err)
	link := filepath.Join(inside, "link")
	if err := os.Symlink(secret, link); err != nil {
		link = secret // a host without links
	}
	json := fmt.Sprintf(`json:{"driver":"raw","file":{"driver":"file","filename":%q}}`, secret)
	for name, backing := range map[string]string{"absolute": secret, "dots": up, "link": link, "json": json} {
		t.Run(name, func(t *testing.T) {
			img := filepath.Join(inside, name+".qcow2")
			run(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, img, "64k")
			for what, policy := range map[string]block.Policy{"none": nil, "folder": block.BelowImageFolder(), "deny": block.DenyAll()} {
				d, err := block.Open(t.Context(), img, block.OpenOptions{Format: "qcow2", ReadOnly: true, Policy: policy})
				if err == nil {
					_ = d.Close()
					t.Errorf("policy %s: the image opened", what)
					continue
				}
				if bytes.Contains([]byte(err.Error()), []byte("secret. secret. ")) {
					t.Errorf("policy %s: the error tells the content", what)
				}
			}
			im := open(t, load(t, img), qcow2.Options{ReadOnly: true})
			p := make([]byte, sectorSize)
			must(t, im.ReadAt(t.Context(), p, 0))
			must(t, im.Close())
			if len(bytes.Trim(p, "\x00")) > 0 {
				t.Error("qcow2.Open followed the name by itself")
			}
			if name == "json" {
				return
			}
			d, err := block.Open(t.Context(), img, block.OpenOptions{Format: "qcow2", ReadOnly: true, Policy: block.AllowAll()})
			must(t, err)
			must(t, d.ReadAt(t.Context(), p, 0))
			must(t, d.Close())
			if !bytes.HasPrefix(p, []byte("secret. ")) {
				t.Error("at the user's word the backing file is not read: the refusals above show nothing")
			}
		})
	}
}

// R1: an engine opened only images it had made itself.
// Here images of every kind that qemu-img makes must open, take writes, and satisfy QEMU afterwards.
func TestR1OpensImagesOfQEMU(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, o := range []string{
		"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "refcount_bits=1", "refcount_bits=64",
		"lazy_refcounts=on", "compression_type=zstd", "preallocation=metadata", "preallocation=falloc", "preallocation=full",
	} {
		t.Run(o, func(t *testing.T) {
			img := filepath.Join(t.TempDir(), "image.qcow2")
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, img, "5M")
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x71 1M 300k", img)
			d, err := block.Open(t.Context(), img, block.OpenOptions{Format: "qcow2"})
			must(t, err)
			p := make([]byte, 300<<10)
			must(t, d.ReadAt(t.Context(), p, 1<<20))
			if len(bytes.Trim(p, "\x71")) > 0 {
				t.Error("what QEMU wrote reads differently")
			}
			must(t, d.WriteAt(t.Context(), bytes.Repeat([]byte{0x72}, 100<<10), 1<<20+1000, 0))
			must(t, d.Discard(t.Context(), 3<<20, 2<<20))
			must(t, d.Close())
			run(t, "qemu-img", "check", "-f", "qcow2", img)
			run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 0x71 1M 1000", "-c", "read -P 0x72 1049576 100k",
				"-c", "read -P 0 3M 2M", img)
		})
	}
}

// D1: refcounts were looked up by the guest's offset instead of the host's: ten writes, 23 errors.
// Here ten writes all over a large disk must leave a clean image.
func TestD1RefcountsGoByHostOffset(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, cs := range []int64{4096, 65536} {
		f := storage.NewMemFile("d1.qcow2")
		must(t, qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 1 << 30, ClusterSize: cs}))
		im := open(t, f, qcow2.Options{})
		for n := range int64(10) {
			p := make([]byte, 3*sectorSize)
			sector := (9 - n) * 200003
			stamp(p, sector, initial)
			must(t, im.WriteAt(t.Context(), p, sector*sectorSize, 0))
		}
		must(t, im.Close())
		mustBeClean(t, f)
		mustBeCleanForQEMU(t, f)
	}
}
