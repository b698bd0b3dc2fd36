// Package explore holds what the crash and fault explorers share: disks whose every sector tells which write it came
// from, requests drawn at random, and images to start from.
package explore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// SectorSize is the unit of versions, and what a power cut cannot tear.
const SectorSize = storage.SectorSize

// Version tells which write a sector's content came from; 0 is zeroes, 1 what the disk started with.
type Version uint32

// FillSector writes into b what a sector looks like at a version.
func FillSector(b []byte, sector int64, v Version) {
	if v == 0 {
		clear(b)
		return
	}
	for i := 0; i < SectorSize; i += 16 {
		binary.LittleEndian.PutUint64(b[i:], uint64(sector))
		binary.LittleEndian.PutUint64(b[i+8:], uint64(v)<<16|uint64(i))
	}
}

// VersionOf returns the version of a sector's content, and false when it is no sector of that place at any version: torn,
// misplaced or stale.
func VersionOf(b []byte, sector int64) (Version, bool) {
	v := Version(binary.LittleEndian.Uint64(b[8:]) >> 16)
	var want [SectorSize]byte
	FillSector(want[:], sector, v)
	return v, bytes.Equal(b, want[:])
}

// Kind is what a request does.
type Kind uint8

// The kinds of requests.
const (
	Write Kind = iota
	Zeroes
	ZeroesUnmap
	Compressed // a write of whole clusters, compressed
	Copied     // a write of whole clusters by the host, from another file
	Discard    // of whole clusters, so that the outcome is known
	Flush
	Read
	CreateSnapshot // called Name
	ApplySnapshot
	DeleteSnapshot
	RenameSnapshot // from Name to To
)

// Op is one request.
type Op struct {
	Kind     Kind
	First, N int64 // sectors
	Version  Version
	Name, To string // of snapshots
}

// Changes reports whether the request changes sectors.
func (op Op) Changes() bool { return op.Kind <= Discard }

// Run makes the request.
func (op Op) Run(im *qcow2.Image) error {
	ctx := context.Background()
	off, n := op.First*SectorSize, op.N*SectorSize
	switch op.Kind {
	case Write:
		return op.write(ctx, im)
	case Compressed:
		return im.WriteCompressed(ctx, op.Bytes(), off)
	case Copied:
		return op.copyIn(ctx, im)
	case Zeroes:
		return im.WriteZeroes(ctx, off, n, 0)
	case ZeroesUnmap:
		return im.WriteZeroes(ctx, off, n, block.ZeroUnmap)
	case Discard:
		return im.Discard(ctx, off, n)
	case Flush:
		return im.Flush(ctx)
	case CreateSnapshot, ApplySnapshot, DeleteSnapshot, RenameSnapshot:
		return op.runSnapshot(im)
	}
	return im.ReadAt(ctx, make([]byte, n), off)
}

// write writes the request's bytes: in one piece, or in pieces of a sector, two, three and so on.
func (op Op) write(ctx context.Context, im *qcow2.Image) error {
	p, off := op.Bytes(), op.First*SectorSize
	if op.Version%2 == 0 || op.N == 1 {
		if im.TryWriteAt(p, off) == nil {
			return nil
		}
		return im.WriteAt(ctx, p, off, 0)
	}
	var bufs [][]byte
	for k := 1; len(p) > 0; k++ {
		n := min(k*SectorSize, len(p))
		bufs, p = append(bufs, p[:n]), p[n:]
	}
	if im.TryWriteVAt(bufs, off) == nil {
		return nil
	}
	return im.WriteVAt(ctx, bufs, off, 0)
}

// copyIn has the host copy the request's bytes. What it cannot, because there are clusters that are overwritten in place, is
// written.
func (op Op) copyIn(ctx context.Context, im *qcow2.Image) error {
	p := op.Bytes()
	src := storage.NewMemFile("source")
	if err := storage.WriteFull(src, p, 0); err != nil {
		return err
	}
	off := op.First * SectorSize
	err := im.CopyFrom(ctx, off, src, 0, int64(len(p)), false)
	if errors.Is(err, storage.ErrNotSupported) {
		return im.WriteAt(ctx, p, off, 0)
	}
	return err
}

// Bytes returns what the request's sectors hold afterwards.
func (op Op) Bytes() []byte {
	p := make([]byte, op.N*SectorSize)
	for i := range op.N {
		FillSector(p[i*SectorSize:][:SectorSize], op.First+i, op.Version)
	}
	return p
}

// Start describes a disk to work on.
type Start struct {
	Name    string
	Create  qcow2.CreateOptions
	Backing bool // half the disk lies in a backing device, at version 1
	// Fill is how many bytes at the end of the disk are written before the start and left alone afterwards, so that the
	// file is as large as it takes.
	Fill int64
	// QEMU, when not empty, has qemu-img make the image by converting the disk at version 1 with these arguments, and
	// Snapshot then has it take an internal snapshot.
	QEMU     []string
	Snapshot bool
	// Data has the disk's data in an external file.
	Data bool
	// NoUnref opens it with the option to keep what is discarded.
	NoUnref bool
}

// Secret opens the disks that are encrypted.
const Secret = "a secret of the explorers"

// withLUKS encrypts with as little work and key material as there can be.
func withLUKS() *qcow2.EncryptCreateOptions {
	return &qcow2.EncryptCreateOptions{Format: qcow2.EncryptLUKS, Secret: []byte(Secret),
		LUKS: luks.CreateOptions{KeyBits: 128, Mode: "cbc", Hash: "sha1", Cost: luks.Cost{Iterations: 1000}}}
}

func withAES() *qcow2.EncryptCreateOptions {
	return &qcow2.EncryptCreateOptions{Format: qcow2.EncryptAES, Secret: []byte(Secret)}
}

// Disk is a Start made real.
type Disk struct {
	Start
	Image   *storage.MemFile
	Backing block.Device // nil when there is none; reads as version 1
	Data    storage.File // the external data file, nil when there is none
	Journal *qcow2.Journal
	data    *storage.MemFile
	Sectors int64
	Cluster int64 // sectors of a cluster
	first   int64 // sectors at version 1; the rest starts as zeroes
}

// Starts are the images that the explorers begin with: every shape of table and cluster that a write can meet.
func Starts() []Start {
	return []Start{
		{Name: "tiny clusters, block growth", Create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Size: 192 << 10}},
		// One cluster of refcount table describes 2 MiB here.
		{Name: "tiny clusters, table growth", Create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Size: 2028 << 10}, Fill: 1900 << 10},
		{Name: "tiny clusters, backing", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 96 << 10}, Backing: true},
		{Name: "4k, backing, odd size", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 256<<10 + 1536}, Backing: true},
		{Name: "4k, version 2", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, Version: 2}},
		{Name: "4k, version 2, backing", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, Version: 2}, Backing: true},
		{Name: "4k, one bit", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, RefcountBits: 1}},
		{Name: "4k, preallocated", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, Preallocation: qcow2.PreallocMetadata}},
		{Name: "subclusters of 512", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true}},
		{Name: "subclusters, backing", Create: qcow2.CreateOptions{ClusterSize: 32768, Size: 256<<10 + 1536, ExtendedL2: true}, Backing: true},
		{Name: "subclusters, compressed, snapshot", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true},
			QEMU: []string{"-c", "-o", "extended_l2=on"}, Snapshot: true},
		{Name: "64k, backing", Create: qcow2.CreateOptions{Size: 1 << 20}, Backing: true},
		{Name: "4k, LUKS", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 128 << 10, Encrypt: withLUKS()}},
		{Name: "subclusters, AES, backing", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true,
			Encrypt: withAES()}, Backing: true},
		{Name: "tiny clusters, AES, version 2", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 64 << 10, Version: 2,
			Preallocation: qcow2.PreallocMetadata, Encrypt: withAES()}},
		{Name: "tiny clusters, data file", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 96 << 10}, Data: true},
		{Name: "4k, data file, backing", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192<<10 + 1536}, Data: true, Backing: true},
		{Name: "4k, raw data file", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192<<10 + 1536, DataFileRaw: true}, Data: true},
		{Name: "subclusters, data file", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true}, Data: true},
		{Name: "4k, no unref", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10}, NoUnref: true},
		{Name: "4k, zstd", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, CompressionType: qcow2.CompressionZstd, RefcountBits: 8}},
		{Name: "tiny clusters, compressed", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 64 << 10}, QEMU: []string{"-c"}},
		{Name: "4k, compressed", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10}, QEMU: []string{"-c"}},
		{Name: "4k, zstd and snapshot", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10},
			QEMU: []string{"-c", "-o", "compression_type=zstd"}, Snapshot: true},
		{Name: "tiny clusters, snapshot", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 64 << 10}, QEMU: []string{}, Snapshot: true},
		{Name: "4k, snapshot", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10}, QEMU: []string{}, Snapshot: true},
	}
}

// Make makes the disk.
func (s Start) Make(t testing.TB) *Disk {
	t.Helper()
	cluster := s.Create.ClusterSize
	if cluster == 0 {
		cluster = 64 << 10
	}
	d := &Disk{Start: s, Sectors: (s.Create.Size - s.Fill) / SectorSize, Cluster: cluster / SectorSize}
	if s.QEMU != nil {
		d.first = d.Sectors * 3 / 4
		d.Image = s.makeByQEMU(t, d)
		return d
	}
	o := s.Create
	if s.Backing {
		d.first = d.Sectors / 2
		d.Backing = blocktest.NewBytes(d.initial()[:d.first*SectorSize])
		o.BackingFile, o.BackingFormat = "base.raw", "raw"
	}
	d.Image = storage.NewMemFile("disk.qcow2")
	if s.Data {
		d.data = storage.NewMemFile("disk.data")
		d.Data = d.data
		o.DataFile, o.DataStorage = "disk.data", d.data
	}
	if err := qcow2.Create(context.Background(), d.Image, o); err != nil {
		t.Fatalf("%s: create: %v", s.Name, err)
	}
	s.fill(t, d)
	return d
}

func (s Start) fill(t testing.TB, d *Disk) {
	t.Helper()
	if s.Fill == 0 {
		return
	}
	im, err := d.Open(d.Image, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(context.Background(), bytes.Repeat([]byte{'f'}, int(s.Fill)), d.Sectors*SectorSize, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

func (s Start) makeByQEMU(t testing.TB, d *Disk) *storage.MemFile {
	t.Helper()
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "in.raw"), filepath.Join(dir, "disk.qcow2")
	if err := os.WriteFile(raw, d.initial(), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", d.Cluster*SectorSize)}
	args = append(append(args, s.QEMU...), raw, path)
	harness.Must(t, "qemu-img", args...)
	if s.Snapshot {
		harness.Must(t, "qemu-img", "snapshot", "-c", "before", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := storage.NewMemFile("disk.qcow2")
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// initial returns the disk's content before any request.
func (d *Disk) initial() []byte {
	b := make([]byte, d.Sectors*SectorSize)
	for s := range d.Sectors {
		FillSector(b[s*SectorSize:][:SectorSize], s, d.Initial(s))
	}
	return b
}

// Initial returns the version of a sector before any request.
func (d *Disk) Initial(sector int64) Version {
	if sector < d.first {
		return 1
	}
	return 0
}

// Open opens the disk in a file that stays open when the image is closed.
func (d *Disk) Open(f storage.File, readOnly bool) (*qcow2.Image, error) {
	o := qcow2.Options{ReadOnly: readOnly, CacheSize: 1, ClusterCacheSize: 1, CacheCleanInterval: -1, BitmapSaveInterval: -1,
		Backing: d.Backing, DiscardNoUnref: d.NoUnref, Journal: d.Journal}
	if d.Data != nil {
		o.DataFile = KeepOpen{d.Data}
	}
	if d.Create.Encrypt != nil {
		o.Encrypt = &qcow2.EncryptOptions{Secret: []byte(Secret)}
	}
	return qcow2.Open(context.Background(), KeepOpen{f}, o)
}

// Files returns copies of the disk's files as they were at first: the image, and the data file if there is one.
func (d *Disk) Files() []*storage.MemFile {
	files := []*storage.MemFile{d.Image.Clone()}
	if d.data != nil {
		files = append(files, d.data.Clone())
	}
	return files
}

// With returns the disk with its data in the second of some files, if it has a data file.
func (d *Disk) With(files []*storage.MemFile) *Disk {
	c := *d
	if d.data != nil {
		c.Data = files[1]
	}
	return &c
}

// RawDiffers compares the raw data file, where there is one, with the disk.
func (d *Disk) RawDiffers(disk []byte) error {
	if !d.Create.DataFileRaw {
		return nil
	}
	b := make([]byte, len(disk))
	if err := storage.ReadFull(d.Data, b, 0); err != nil {
		return err
	}
	if !bytes.Equal(b, disk) {
		return errors.New("the raw data file is not what the guest reads")
	}
	return nil
}

// Draw draws a request. Versions must be at least 2.
func (d *Disk) Draw(r *rand.Rand, v Version) Op {
	first := r.Int64N(d.Sectors)
	n := 1 + r.Int64N(min(d.Sectors-first, 1+r.Int64N(3*d.Cluster+8)))
	op := Op{First: first, N: n, Version: v}
	switch k := r.IntN(24); {
	case k < 3 && !d.Start.Data && d.Create.Encrypt == nil:
		op.Kind = Compressed
		if k == 2 {
			op.Kind = Copied
		}
		op.First = first / d.Cluster * d.Cluster
		op.N = min((n+d.Cluster-1)/d.Cluster*d.Cluster, d.whole()-op.First)
		if op.N == 0 {
			op = Op{Kind: Flush}
		}
	case k < 11:
		op.Kind = Write
	case k < 13:
		op.Kind = Zeroes
	case k < 15:
		op.Kind = ZeroesUnmap
	case k < 18 && (d.Create.Version != 2 || d.Backing == nil): // there, discards are left alone
		op.Kind = Discard
		op.First = first / d.Cluster * d.Cluster
		op.N = min((n+d.Cluster-1)/d.Cluster*d.Cluster, d.Sectors-op.First)
	case k < 22:
		op.Kind = Flush
	default:
		op.Kind = Read
	}
	if op.Kind != Write && op.Kind != Compressed && op.Kind != Copied {
		op.Version = 0
	}
	return op
}

// whole returns where compressed writes end: where the disk does, or with the last whole cluster before what is left alone.
func (d *Disk) whole() int64 {
	if d.Fill == 0 {
		return d.Sectors
	}
	return d.Sectors / d.Cluster * d.Cluster
}

// KeepOpen is a file that outlives the image that owns it.
type KeepOpen struct{ storage.File }

// Close does nothing.
func (KeepOpen) Close() error { return nil }
