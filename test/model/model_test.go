// Package model draws from everything that an image can do, in one run: requests of every kind, compressed rewrites,
// snapshots, dirty bitmaps, resizes, amendments, reopening, power cuts and repairs. What the disk and every snapshot must
// hold is known from byte slices that follow along. Each run ends in both checkers and a full comparison.
package model

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

const (
	sector   = storage.SectorSize
	maxSize  = 768 << 10
	maxSnaps = 4
)

var ctx = context.Background()

// keepOpen lets the test go on using a file after the image that owns it was closed.
type keepOpen struct{ *storage.CrashFile }

func (keepOpen) Close() error { return nil }

// machine is an image and what it must hold.
type machine struct {
	*rapid.T
	create  qcow2.CreateOptions
	cache   int64
	backing []byte

	file *storage.CrashFile
	im   *qcow2.Image

	disk    []byte
	past    [][]byte // what the disk was since the last flush; after a power cut each sector is one of these
	snaps   map[string][]byte
	bitmaps map[string][]byte // what the disk was when the bitmap was made or cleared
	names   int
	bits    int  // the refcount width, which limits sharing
	leaky   bool // there was a power cut, which may leak, and no repair since
}

func (m *machine) must(what string, err error) {
	m.Helper()
	if err != nil {
		m.Fatalf("%s: %v", what, err)
	}
}

func newMachine(t *rapid.T) *machine {
	m := &machine{T: t, snaps: make(map[string][]byte), bitmaps: make(map[string][]byte)}
	pick := func(label string, of ...int64) int64 { return rapid.SampledFrom(of).Draw(t, label) }
	o := &m.create
	o.Version = int(pick("version", 3, 3, 3, 2))
	o.ClusterSize = pick("cluster size", 512, 1024, 4096, 16384, 65536)
	o.RefcountBits = 16
	if o.Version == 3 {
		o.RefcountBits = int(pick("refcount bits", 16, 1, 2, 4, 8, 32, 64))
		o.LazyRefcounts = rapid.Bool().Draw(t, "lazy")
		o.ExtendedL2 = o.ClusterSize >= 16384 && rapid.Bool().Draw(t, "extended")
		if rapid.Bool().Draw(t, "zstd") {
			o.CompressionType = qcow2.CompressionZstd
		}
	}
	o.Size = m.drawSize("size")
	if rapid.IntRange(0, 3).Draw(t, "backed") == 0 {
		m.backing = make([]byte, m.drawSize("backing size"))
		harness.Fill(m.backing, 99)
		o.BackingFile, o.BackingFormat = "base.raw", "raw"
	}
	m.cache = pick("cache", 0, 1)
	m.bits = o.RefcountBits
	base := storage.NewMemFile("model.qcow2")
	m.must("create", qcow2.Create(ctx, base, *o))
	m.file = storage.NewCrashFile(base)
	m.disk = make([]byte, o.Size)
	copy(m.disk, m.backing)
	m.open()
	return m
}

func (m *machine) drawSize(label string) int64 {
	return int64(rapid.IntRange(1, maxSize/sector).Draw(m.T, label)) * sector
}

func (m *machine) open() {
	m.Helper()
	o := qcow2.Options{CacheSize: m.cache, BitmapSaveInterval: -1, CacheCleanInterval: -1}
	if m.backing != nil {
		o.Backing = blocktest.NewBytes(m.backing)
	}
	var err error
	m.im, err = qcow2.Open(ctx, keepOpen{m.file}, o)
	m.must("open", err)
	m.settled()
}

// settled notes that all that the disk holds is durable.
func (m *machine) settled() { m.past = [][]byte{bytes.Clone(m.disk)} }

// changed notes a change that the next power cut may undo, sector by sector.
func (m *machine) changed() { m.past = append(m.past, bytes.Clone(m.disk)) }

func (m *machine) flush() {
	m.Helper()
	m.must("flush", m.im.Flush(ctx))
	m.settled()
}

// span draws a range of the disk, often on boundaries.
func (m *machine) span() (off, n int64) {
	size := int64(len(m.disk))
	cs := m.create.ClusterSize
	off = rapid.Int64Range(0, size-1).Draw(m.T, "off")
	n = rapid.Int64Range(1, 3*max(cs, 4096)).Draw(m.T, "n")
	switch rapid.IntRange(0, 2).Draw(m.T, "aligned") {
	case 0:
		off, n = off&^(cs-1), (n+cs-1)&^(cs-1)
	case 1:
		off, n = off&^(sector-1), (n+sector-1)&^(sector-1)
	}
	return off, min(n, size-off)
}

func (m *machine) write() {
	off, n := m.span()
	harness.Fill(m.disk[off:off+n], rapid.Uint64().Draw(m.T, "seed"))
	m.must("write", m.im.WriteAt(ctx, m.disk[off:off+n], off, 0))
	m.changed()
}

func (m *machine) writeCompressed() {
	off, n := m.span()
	off &^= m.create.ClusterSize - 1
	n = min((n+m.create.ClusterSize-1)&^(m.create.ClusterSize-1), int64(len(m.disk))-off)
	seed := rapid.Uint64().Draw(m.T, "seed")
	p := m.disk[off : off+n]
	clear(p)
	for i := 0; i+4 <= len(p); i += 64 {
		harness.Fill(p[i:i+4], seed+uint64(i))
	}
	m.must("write compressed", m.im.WriteCompressed(ctx, p, off))
	m.changed()
}

func (m *machine) zero() {
	off, n := m.span()
	flags := block.ZeroFlags(0)
	if rapid.Bool().Draw(m.T, "unmap") {
		flags = block.ZeroUnmap
	}
	m.must("write zeroes", m.im.WriteZeroes(ctx, off, n, flags))
	clear(m.disk[off : off+n])
	m.changed()
}

func (m *machine) discard() {
	off, n := m.span()
	m.must("discard", m.im.Discard(ctx, off, n))
	got := make([]byte, n)
	m.must("read after discard", m.im.ReadAt(ctx, got, off))
	for i, b := range got {
		if b != 0 && b != m.disk[off+int64(i)] {
			m.Fatalf("byte %d is neither old nor zero after a discard", off+int64(i))
		}
	}
	copy(m.disk[off:], got)
	m.changed()
}

func (m *machine) reopen() {
	m.must("close", m.im.Close())
	m.check("after closing")
	m.open()
	m.compare("after reopening")
}

func (m *machine) createSnapshot() {
	if len(m.snaps) == maxSnaps {
		return
	}
	m.names++
	name := fmt.Sprint("snapshot ", m.names)
	m.flush()
	if _, err := m.im.CreateSnapshot(ctx, name); err != nil {
		// Widths of 1 and 2 bits count no further than 1 and 3, and compressed clusters share theirs.
		if m.bits > 4 {
			m.Fatalf("creating a snapshot: %v", err)
		}
		return
	}
	m.snaps[name] = bytes.Clone(m.disk)
}

// snapshot draws one of the snapshots, "" if there are none.
func (m *machine) snapshot() string {
	if len(m.snaps) == 0 {
		return ""
	}
	return rapid.SampledFrom(sorted(m.snaps)).Draw(m.T, "snapshot")
}

func sorted(of map[string][]byte) []string {
	var names []string
	for i := range 1 << 10 { // names end in small numbers
		for _, prefix := range []string{"snapshot ", "bitmap "} {
			if name := fmt.Sprint(prefix, i); of[name] != nil {
				names = append(names, name)
			}
		}
	}
	return names
}

func (m *machine) applySnapshot() {
	name := m.snapshot()
	if name == "" {
		return
	}
	m.flush()
	err := m.im.ApplySnapshot(ctx, name)
	if len(m.bitmaps) > 0 || m.bits <= 4 && err != nil {
		if err == nil {
			m.Fatalf("a snapshot was applied beside dirty bitmaps")
		}
		return
	}
	m.must("applying a snapshot", err)
	m.disk = bytes.Clone(m.snaps[name])
	m.settled()
}

func (m *machine) deleteSnapshot() {
	name := m.snapshot()
	if name == "" {
		return
	}
	m.flush()
	m.must("deleting a snapshot", m.im.DeleteSnapshot(ctx, name))
	delete(m.snaps, name)
}

func (m *machine) resize() {
	if m.create.Version == 2 && len(m.snaps) > 0 {
		return
	}
	size := m.drawSize("new size")
	m.flush()
	m.must("resize", m.im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true}))
	m.disk = sized(m.disk, size)
	for name, was := range m.bitmaps {
		m.bitmaps[name] = sized(was, size)
	}
	m.settled()
}

// sized returns p, cut or with zeroes behind it.
func sized(p []byte, size int64) []byte {
	q := make([]byte, size)
	copy(q, p)
	return q
}

func (m *machine) amend() {
	if m.create.Version == 2 {
		return
	}
	var o qcow2.AmendOptions
	lazy := rapid.Bool().Draw(m.T, "lazy")
	o.LazyRefcounts = &lazy
	o.RefcountBits = rapid.SampledFrom([]int{0, 1, 4, 16, 64}).Draw(m.T, "refcount bits")
	m.flush()
	if err := m.im.Amend(ctx, o); err != nil {
		if o.RefcountBits == 0 || o.RefcountBits > 4 {
			m.Fatalf("amend: %v", err)
		}
		return // counts that do not fit
	}
	if o.RefcountBits != 0 {
		m.bits = o.RefcountBits
	}
}

func (m *machine) addBitmap() {
	if m.create.Version == 2 || len(m.bitmaps) == 3 {
		return
	}
	m.names++
	name := fmt.Sprint("bitmap ", m.names)
	m.flush()
	m.must("adding a bitmap", m.im.AddBitmap(ctx, name, qcow2.BitmapOptions{
		Granularity: rapid.SampledFrom([]int64{0, 512, 4096}).Draw(m.T, "granularity"),
	}))
	m.bitmaps[name] = bytes.Clone(m.disk)
}

func (m *machine) changeBitmap() {
	if len(m.bitmaps) == 0 {
		return
	}
	name := rapid.SampledFrom(sorted(m.bitmaps)).Draw(m.T, "bitmap")
	switch rapid.IntRange(0, 2).Draw(m.T, "change") {
	case 0:
		m.flush()
		m.must("removing a bitmap", m.im.RemoveBitmap(ctx, name))
		delete(m.bitmaps, name)
	case 1:
		m.flush()
		m.must("clearing a bitmap", m.im.ClearBitmap(ctx, name))
		m.bitmaps[name] = bytes.Clone(m.disk)
	default:
		m.must("saving the bitmaps", m.im.SaveBitmaps(ctx))
	}
}

// powerCut loses what is not durable, or part of it, and opens what is left; or repairs it first.
func (m *machine) powerCut() {
	e := m.file.Explorer()
	m.must("going to the end of the record", e.Seek(e.Len()))
	o := storage.ExploreOptions{Exhaustive: 2, PerFamily: 3, Samples: 6, Seed: rapid.Uint64().Draw(m.T, "cut")}
	left := rapid.IntRange(0, 20).Draw(m.T, "state")
	var file *storage.MemFile
	for _, state := range e.States(o) {
		file = state
		if left--; left < 0 {
			break
		}
	}
	_ = m.im.Close() // the old file does not matter any more
	m.file = storage.NewCrashFile(file)
	m.leaky = true
	if rapid.Bool().Draw(m.T, "repair") {
		m.repair()
	}
	size, past := len(m.disk), m.past
	m.open()
	got := make([]byte, size)
	m.must("read after a power cut", m.im.ReadAt(ctx, got, 0))
	for off := 0; off < size; off += sector {
		if !isOne(got[off:off+sector], past, off) {
			m.Fatalf("after a power cut the sector at %#x is nothing that was ever written there since the last flush", off)
		}
	}
	m.disk = got
	m.settled()
	m.dropUsedBitmaps()
	m.compare("after a power cut")
}

func (m *machine) repair() {
	m.Helper()
	_, err := qcow2.RepairFile(ctx, keepOpen{m.file}, qcow2.RepairOptions{Mode: qcow2.RepairAll})
	m.must("repair", err)
	m.leaky = false
	m.check("after a repair")
}

func isOne(p []byte, past [][]byte, off int) bool {
	for _, disk := range past {
		if bytes.Equal(p, disk[off:off+len(p)]) {
			return true
		}
	}
	return false
}

// dropUsedBitmaps removes the bitmaps that the power cut has made useless, as every owner of one has to.
func (m *machine) dropUsedBitmaps() {
	list, err := m.im.Bitmaps()
	m.must("listing bitmaps", err)
	if len(list) != len(m.bitmaps) {
		m.Fatalf("%d bitmaps after a power cut, want %d", len(list), len(m.bitmaps))
	}
	for _, b := range list {
		if b.InUse {
			m.must("removing a bitmap in use", m.im.RemoveBitmap(ctx, b.Name))
			delete(m.bitmaps, b.Name)
		}
	}
}

// compare reads the disk and every snapshot, and demands of every bitmap that it has marked what changed.
func (m *machine) compare(when string) {
	m.Helper()
	if m.im.Size() != int64(len(m.disk)) {
		m.Fatalf("%s: the disk is %d bytes long, want %d", when, m.im.Size(), len(m.disk))
	}
	same := func(what string, im *qcow2.Image, want []byte) {
		got := make([]byte, len(want))
		m.must(when+": reading "+what, im.ReadAt(ctx, got, 0))
		m.must(when+": "+what, harness.Same(got, want, 0))
	}
	same("the disk", m.im, m.disk)
	list, err := m.im.Snapshots()
	m.must("listing snapshots", err)
	if len(list) != len(m.snaps) {
		m.Fatalf("%s: %d snapshots, want %d", when, len(list), len(m.snaps))
	}
	for _, name := range sorted(m.snaps) {
		view, err := m.im.OpenSnapshot(ctx, name)
		m.must("opening a snapshot", err)
		same(name, view, m.snaps[name])
		m.must("closing a snapshot", view.Close())
	}
	for _, name := range sorted(m.bitmaps) {
		was, at := m.bitmaps[name], int64(0)
		err := m.im.BitmapExtents(ctx, name, 0, m.im.Size(), func(n int64, dirty bool) bool {
			if !dirty && !bytes.Equal(was[at:at+n], m.disk[at:at+n]) {
				m.Fatalf("%s: %s does not know of a change in [%#x, +%#x)", when, name, at, n)
			}
			at += n
			return true
		})
		m.must("reading a bitmap", err)
	}
}

// check has our own checker look at the file of an image that is closed.
func (m *machine) check(when string) {
	m.Helper()
	rep, err := qcow2.CheckFile(ctx, m.file, qcow2.CheckOptions{})
	m.must(when+": check", err)
	if rep.Corruptions > 0 || rep.CheckErrors > 0 || rep.Leaks > 0 && !m.leaky {
		m.Fatalf("%s: %d corruptions, %d leaks, %.500v", when, rep.Corruptions, rep.Leaks, rep.Findings)
	}
}

// finish compares everything once more, here and with stock QEMU.
func (m *machine) finish(dir string) {
	m.compare("at the end")
	m.must("close", m.im.Close())
	m.check("at the end")
	if m.leaky {
		m.repair()
	}
	if _, err := peer.Look("qemu-img"); err != nil {
		return
	}
	size, err := m.file.Size()
	m.must("size", err)
	data := make([]byte, size)
	m.must("reading the file", storage.ReadFull(m.file, data, 0))
	image, raw := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "raw")
	m.must("saving", errors.Join(os.WriteFile(image, data, 0o600), os.WriteFile(raw, m.disk, 0o600)))
	if m.backing != nil {
		m.must("saving", os.WriteFile(filepath.Join(dir, "base.raw"), m.backing, 0o600))
	}
	m.stock("check", "-q", "-f", "qcow2", image)
	m.stock("compare", "-q", "-f", "qcow2", "-F", "raw", image, raw)
	for _, name := range sorted(m.snaps) {
		out := filepath.Join(dir, "snapshot.raw")
		m.stock("convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name="+name, image, out)
		got, err := os.ReadFile(out)
		m.must("reading what stock made of a snapshot", err)
		// Stock converts as many bytes as the disk has today, whatever the snapshot's size.
		n := min(len(got), len(m.snaps[name]))
		m.must("stock: "+name, harness.Same(got[:n], m.snaps[name][:n], 0))
	}
}

func (m *machine) stock(args ...string) {
	m.Helper()
	if out, err := stockCommand(args...).CombinedOutput(); err != nil {
		m.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

// TestEverything is one run of everything after another.
func TestEverything(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		m := newMachine(rt)
		for range rapid.IntRange(1, 40).Draw(rt, "steps") {
			switch rapid.IntRange(0, 21).Draw(rt, "step") {
			case 0, 1, 2, 3:
				m.write()
			case 4, 5:
				m.writeCompressed()
			case 6, 7:
				m.zero()
			case 8, 9:
				m.discard()
			case 10:
				m.flush()
			case 11:
				m.reopen()
			case 12, 13:
				m.createSnapshot()
			case 14:
				m.applySnapshot()
			case 15:
				m.deleteSnapshot()
			case 16:
				m.resize()
			case 17:
				m.amend()
			case 18:
				m.addBitmap()
			case 19:
				m.changeBitmap()
			case 20:
				m.powerCut()
			default:
				m.compare("in between")
			}
		}
		m.finish(dir)
	})
}
