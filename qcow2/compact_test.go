package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// compactShape is a kind of image to compact.
type compactShape struct {
	name string
	o    qcow2.CreateOptions
}

func compactShapes() []compactShape {
	var shapes []compactShape
	add := func(name string, o qcow2.CreateOptions) {
		o.Size = 3<<20 + 1536
		if o.ClusterSize == 0 {
			o.ClusterSize = 16 << 10
		}
		shapes = append(shapes, compactShape{name, o})
	}
	add("plain", qcow2.CreateOptions{})
	add("cluster 512", qcow2.CreateOptions{ClusterSize: 512})
	add("cluster 65536", qcow2.CreateOptions{ClusterSize: 64 << 10})
	add("version 2", qcow2.CreateOptions{Version: 2, ClusterSize: 4096})
	add("subclusters", qcow2.CreateOptions{ExtendedL2: true})
	add("refcounts of 2 bits", qcow2.CreateOptions{RefcountBits: 2, ClusterSize: 4096})
	add("refcounts of 8 bits", qcow2.CreateOptions{RefcountBits: 8, ClusterSize: 4096})
	add("refcounts of 64 bits", qcow2.CreateOptions{RefcountBits: 64, ClusterSize: 1024})
	add("lazy refcounts", qcow2.CreateOptions{LazyRefcounts: true, ClusterSize: 4096})
	add("zstd", qcow2.CreateOptions{CompressionType: qcow2.CompressionZstd, ClusterSize: 8192})
	add("aes", qcow2.CreateOptions{ClusterSize: 4096, Encrypt: &qcow2.EncryptCreateOptions{Format: qcow2.EncryptAES, Secret: []byte(secret)}})
	add("luks", qcow2.CreateOptions{ClusterSize: 4096, Encrypt: &qcow2.EncryptCreateOptions{Secret: []byte(secret),
		LUKS: luks.CreateOptions{Cost: cheapKey}}})
	return shapes
}

// compactDisk is an image, what its disk holds, and what its snapshots hold.
type compactDisk struct {
	t     *testing.T
	f     *storage.MemFile
	o     qcow2.Options
	im    *qcow2.Image
	r     *rand.Rand
	disk  []byte
	snaps map[string][]byte
	made  int  // snapshots
	plain bool // nothing is compressed
}

func newCompactDisk(t *testing.T, o qcow2.CreateOptions, seed uint64) *compactDisk {
	t.Helper()
	ctx := context.Background()
	d := &compactDisk{t: t, f: storage.NewMemFile("compact.qcow2"), r: rand.New(rand.NewPCG(seed, 3)), snaps: map[string][]byte{}}
	if err := qcow2.Create(ctx, d.f, o); err != nil {
		t.Fatal(err)
	}
	if o.Encrypt != nil {
		d.o.Encrypt = &qcow2.EncryptOptions{Secret: o.Encrypt.Secret}
		d.plain = true
	}
	d.open()
	d.disk = make([]byte, d.im.Size())
	if o.Encrypt != nil {
		copy(d.disk, wholeDisk(t, d.im))
	}
	return d
}

func (d *compactDisk) open() {
	d.t.Helper()
	im, err := qcow2.Open(context.Background(), keepOpen{d.f}, d.o)
	if err != nil {
		d.t.Fatal(err)
	}
	d.im = im
}

// churn writes, compresses, discards and takes and deletes snapshots, so that holes are everywhere.
func (d *compactDisk) churn(steps int) {
	d.t.Helper()
	ctx := context.Background()
	cs := d.im.ClusterSize()
	must := func(err error) {
		d.t.Helper()
		if err != nil && !errors.Is(err, qcow2.ErrRefcountOverflow) {
			d.t.Fatal(err)
		}
	}
	for i := range steps {
		off := d.r.Int64N(d.im.Size())
		n := min(1+d.r.Int64N(200<<10), d.im.Size()-off)
		switch k := d.r.IntN(20); {
		case k < 8:
			p := make([]byte, n)
			for j := range p {
				p[j] = byte(d.r.IntN(4) + i)
			}
			must(d.im.WriteAt(ctx, p, off, 0))
			copy(d.disk[off:], p)
		case k < 11 && !d.plain:
			off = off / cs * cs
			n = min((n+cs-1)/cs*cs, d.im.Size()-off)
			p := make([]byte, n)
			for j := range p {
				p[j] = byte(d.r.IntN(2) + i)
			}
			must(d.im.WriteCompressed(ctx, p, off))
			copy(d.disk[off:], p)
		case k < 16:
			off = off / cs * cs
			n = min((n+cs-1)/cs*cs, d.im.Size()-off)
			must(d.im.Discard(ctx, off, n))
			clear(d.disk[off : off+n])
		case k == 16:
			must(d.im.WriteZeroes(ctx, off, n, 0))
			clear(d.disk[off : off+n])
		case k == 17 && len(d.snaps) < 4:
			d.made++
			name := fmt.Sprint("s", d.made)
			_, err := d.im.CreateSnapshot(ctx, name)
			must(err)
			if err == nil {
				d.snaps[name] = bytes.Clone(d.disk)
			}
		case k == 18 && len(d.snaps) > 2:
			for name := range d.snaps {
				must(d.im.DeleteSnapshot(ctx, name))
				delete(d.snaps, name)
				break
			}
		case k == 19:
			must(d.im.Flush(ctx))
		}
	}
}

// holds compares everything with the model.
func (d *compactDisk) holds() {
	d.t.Helper()
	if !bytes.Equal(wholeDisk(d.t, d.im), d.disk) {
		d.t.Fatal("the disk differs")
	}
	for name, want := range d.snaps {
		view, err := d.im.OpenSnapshot(context.Background(), name)
		if err != nil {
			d.t.Fatal(err)
		}
		if !bytes.Equal(wholeDisk(d.t, view), want) {
			d.t.Fatalf("snapshot %s differs", name)
		}
		if err := view.Close(); err != nil {
			d.t.Fatal(err)
		}
	}
}

func (d *compactDisk) close() {
	d.t.Helper()
	if err := d.im.Close(); err != nil {
		d.t.Fatal(err)
	}
	checkClean(d.t, d.f)
}

// TestCompact makes images full of holes and closes the holes, with snapshots and without, again and again.
func TestCompact(t *testing.T) {
	for _, s := range compactShapes() {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("%s/%d", s.name, seed), func(t *testing.T) {
				t.Parallel()
				ctx := context.Background()
				d := newCompactDisk(t, s.o, seed)
				for range 3 {
					d.churn(60)
					if d.o.Encrypt != nil { // zeroes that were never written are noise in some layers
						d.disk = wholeDisk(t, d.im)
					}
					d.holds()
					before, err := d.im.Compact(ctx, qcow2.CompactOptions{DryRun: true})
					if err != nil {
						t.Fatal(err)
					}
					rep, err := d.im.Compact(ctx, qcow2.CompactOptions{Step: 64 << 10})
					if err != nil {
						t.Fatal(err)
					}
					size, _ := d.f.Size()
					if rep.NewSize != size || rep.NewSize > rep.OldSize || rep.Leaked != 0 {
						t.Fatalf("%+v, and the file has %d bytes", rep, size)
					}
					// Tables of several clusters need a hole of their length; nothing else stays behind.
					if cs := d.im.ClusterSize(); cs >= 4096 && rep.Free > 2*cs || rep.NewSize > before.NewSize+before.NewSize/8+8*cs {
						t.Fatalf("%+v, foretold %+v", rep, before)
					}
					d.holds()
				}
				d.close()
				d.open()
				d.holds()
				d.close()
			})
		}
	}
}

// TestCompactBitmaps moves bitmaps, and their marks stay.
func TestCompactBitmaps(t *testing.T) {
	ctx := context.Background()
	d := newCompactDisk(t, qcow2.CreateOptions{Size: 3 << 20, ClusterSize: 512}, 1)
	d.churn(40)
	for _, name := range []string{"a", "b"} {
		if err := d.im.AddBitmap(ctx, name, qcow2.BitmapOptions{Granularity: 512, Disabled: name == "b"}); err != nil {
			t.Fatal(err)
		}
		d.churn(20)
	}
	dirty := func(name string) (list []int64) {
		err := d.im.BitmapExtents(ctx, name, 0, d.im.Size(), func(n int64, dirty bool) bool {
			for range n / 512 {
				if list = append(list, 0); dirty {
					list[len(list)-1] = 1
				}
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	if err := d.im.Discard(ctx, 0, 2<<20); err != nil {
		t.Fatal(err)
	}
	clear(d.disk[:2<<20])
	a, b := dirty("a"), dirty("b")
	rep, err := d.im.Compact(ctx, qcow2.CompactOptions{})
	if err != nil || rep.NewSize >= rep.OldSize {
		t.Fatalf("%+v, %v", rep, err)
	}
	for range 2 {
		if fmt.Sprint(dirty("a")) != fmt.Sprint(a) || fmt.Sprint(dirty("b")) != fmt.Sprint(b) {
			t.Fatal("a bitmap has changed")
		}
		d.holds()
		d.close()
		d.open()
	}
	d.close()
}

// TestCompactOpenSnapshot leaves the clusters of snapshots alone while one is open.
func TestCompactOpenSnapshot(t *testing.T) {
	ctx := context.Background()
	d := newCompactDisk(t, qcow2.CreateOptions{Size: 3 << 20, ClusterSize: 4096}, 2)
	for i := range int64(3) {
		p := bytes.Repeat([]byte{byte(9 + i)}, 1<<20)
		if err := d.im.WriteAt(ctx, p, i<<20, 0); err != nil {
			t.Fatal(err)
		}
		copy(d.disk[i<<20:], p)
	}
	if err := d.im.Discard(ctx, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	clear(d.disk[:1<<20])
	if _, err := d.im.CreateSnapshot(ctx, "kept"); err != nil {
		t.Fatal(err)
	}
	d.snaps["kept"] = bytes.Clone(d.disk)
	view, err := d.im.OpenSnapshot(ctx, "kept")
	if err != nil {
		t.Fatal(err)
	}
	if err := view.ReadAt(ctx, make([]byte, 1), 2<<20); err != nil { // it knows where its clusters are
		t.Fatal(err)
	}
	rep, err := d.im.Compact(ctx, qcow2.CompactOptions{})
	if err != nil || !rep.Open {
		t.Fatalf("%+v, %v", rep, err)
	}
	if !bytes.Equal(wholeDisk(t, view), d.snaps["kept"]) {
		t.Fatal("the open snapshot reads otherwise")
	}
	if err := view.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err = d.im.Compact(ctx, qcow2.CompactOptions{})
	if err != nil || rep.Open || rep.Free > 8192 || rep.NewSize > rep.OldSize-1<<20+64<<10 {
		t.Fatalf("%+v, %v", rep, err)
	}
	d.holds()
	d.close()
}

// TestCompactRefused has errors for what cannot be, and stops when it is told to, with the image whole.
func TestCompactRefused(t *testing.T) {
	ctx := context.Background()
	d := newCompactDisk(t, qcow2.CreateOptions{Size: 3 << 20, ClusterSize: 4096}, 5)
	d.churn(60)
	d.close()
	ro := d.o
	ro.ReadOnly = true
	im, err := qcow2.Open(ctx, keepOpen{d.f}, ro)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.Compact(ctx, qcow2.CompactOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Fatal(err)
	}
	rep, err := im.Compact(ctx, qcow2.CompactOptions{DryRun: true})
	if err != nil || rep.NewSize > rep.OldSize || rep.Moved == 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	d.open()
	stop, cancel := context.WithCancel(ctx)
	_, err = d.im.Compact(stop, qcow2.CompactOptions{Step: 4096, Progress: func(done, total int64) {
		if done > total/2 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	d.holds()
	d.close()
	d.open()
	if _, err := d.im.Compact(ctx, qcow2.CompactOptions{}); err != nil {
		t.Fatal(err)
	}
	d.holds()
	d.close()
	if _, err := d.im.Compact(ctx, qcow2.CompactOptions{}); !errors.Is(err, block.ErrClosed) {
		t.Fatal(err)
	}
}
