package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// owner is a client that owns some sectors of a disk others share: it alone writes them, so it knows what they hold.
type owner struct {
	t     *testing.T
	im    *qcow2.Image
	r     *rand.Rand
	id    int
	of    int // owners
	cs    int64
	model map[int64][]byte // by sector
	base  []byte
}

// sectorOwner deals sectors out so that most clusters are shared by all owners, and every fourth run of clusters belongs
// to one, which may discard or zero it whole.
func sectorOwner(sector, cs int64, of int) int {
	cluster := sector * 512 / cs
	if cluster%4 == 3 {
		return int(cluster/4) % of
	}
	return int(sector % int64(of))
}

func (o *owner) step() error {
	ctx := context.Background()
	size := o.im.Size()
	sector := o.r.Int64N(size / 512)
	for sectorOwner(sector, o.cs, o.of) != o.id {
		sector = o.r.Int64N(size / 512)
	}
	off := sector * 512
	whole := sector*512/o.cs%4 == 3
	if whole && o.r.IntN(3) == 0 {
		return o.wholeCluster(ctx, off/o.cs*o.cs)
	}
	switch o.r.IntN(8) {
	case 0, 1, 2, 3:
		p := make([]byte, 512)
		for i := 0; i < 512; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], o.r.Uint64())
		}
		if o.im.TryWriteAt(p, off) != nil {
			if err := o.im.WriteAt(ctx, p, off, block.WriteFlags(o.r.IntN(30)/29)); err != nil {
				return err
			}
		}
		o.model[sector] = p
	case 4:
		if err := o.im.WriteZeroes(ctx, off, 512, block.ZeroFlags(o.r.IntN(2))); err != nil {
			return err
		}
		o.model[sector] = make([]byte, 512)
	case 5:
		if o.r.IntN(8) == 0 {
			return o.im.Flush(ctx)
		}
		fallthrough
	default:
		return o.verify(ctx, sector)
	}
	return nil
}

func (o *owner) wholeCluster(ctx context.Context, off int64) error {
	n := min(o.cs, o.im.Size()-off)
	var err error
	switch o.r.IntN(3) {
	case 0:
		err = o.im.Discard(ctx, off, n)
	case 1:
		err = o.im.WriteZeroes(ctx, off, n, block.ZeroUnmap)
	case 2:
		err = o.im.WriteZeroes(ctx, off, n, 0)
	}
	if err != nil {
		return err
	}
	got := make([]byte, n)
	if err := o.im.ReadAt(ctx, got, off); err != nil {
		return err
	}
	if len(bytes.Trim(got, "\x00")) != 0 {
		return fmt.Errorf("cluster at %d is not zero after discard or zeroing", off)
	}
	for i := int64(0); i < n; i += 512 {
		o.model[(off+i)/512] = got[i : i+512]
	}
	return nil
}

func (o *owner) verify(ctx context.Context, sector int64) error {
	got := make([]byte, 512)
	if o.im.TryReadAt(got, sector*512) != nil {
		if err := o.im.ReadAt(ctx, got, sector*512); err != nil {
			return err
		}
	}
	want, ok := o.model[sector]
	if !ok {
		want = make([]byte, 512)
		if int(sector*512) < len(o.base) {
			copy(want, o.base[sector*512:])
		}
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("owner %d: sector %d holds %x..., want %x...", o.id, sector, got[:8], want[:8])
	}
	return nil
}

// TestConcurrentOwners has many goroutines use one image at once, with caches far too small, each knowing what its own
// sectors must hold.
func TestConcurrentOwners(t *testing.T) {
	for _, v := range []struct {
		cs      int64
		bits    int
		version int
		backing bool
	}{{512, 16, 3, true}, {4096, 1, 3, false}, {65536, 16, 3, true}, {4096, 64, 3, true}, {65536, 16, 2, false}} {
		t.Run(fmt.Sprintf("cluster=%d,refcount=%d,v%d,backing=%v", v.cs, v.bits, v.version, v.backing), func(t *testing.T) {
			t.Parallel()
			size := max(v.cs*40, 1<<20)
			file := storage.NewMemFile("concurrent.qcow2")
			o := qcow2.CreateOptions{Size: size, ClusterSize: v.cs, RefcountBits: v.bits, Version: v.version}
			opts := qcow2.Options{CacheSize: 1}
			var base []byte
			if v.backing {
				base = make([]byte, size)
				for i := range base {
					base[i] = byte(i * 7 >> 3)
				}
				opts.Backing = blocktest.NewBytes(base)
			}
			if err := qcow2.Create(context.Background(), file, o); err != nil {
				t.Fatal(err)
			}
			im, err := qcow2.Open(context.Background(), keepOpen{file}, opts)
			if err != nil {
				t.Fatal(err)
			}
			const owners, steps = 8, 1500
			all := make([]*owner, owners)
			var wg sync.WaitGroup
			for id := range owners {
				own := &owner{t: t, im: im, r: rand.New(rand.NewPCG(uint64(id), 7)), id: id, of: owners, cs: v.cs,
					model: map[int64][]byte{}, base: base}
				all[id] = own
				wg.Go(func() {
					for range steps {
						if err := own.step(); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			h := &harness{t: t, v: variant{create: o, cache: 1}, file: file, base: nil, im: im, model: make([]byte, size)}
			copy(h.model, base)
			for _, own := range all {
				for s, b := range own.model {
					copy(h.model[s*512:], b)
				}
			}
			if v.backing {
				// The harness knows the backing device by its bytes; qemu-img would need a file the image names.
				got := make([]byte, size)
				if err := im.ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, h.model) {
					t.Fatalf("content differs (%v)", err)
				}
				h.model = nil
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkFile(t, file)
			if h.model != nil {
				h.qemuCheck()
			}
		})
	}
}
