package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

func ptr[T any](v T) *T { return &v }

func mustOpen(t testing.TB, f storage.File, o qcow2.Options) *qcow2.Image {
	t.Helper()
	im, err := qcow2.Open(context.Background(), f, o)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// fill writes data of every kind to a disk, with a snapshot in between, and returns what the snapshot and the disk hold.
func fill(t testing.TB, im *qcow2.Image, zeroes bool) (snapshot, disk []byte) {
	t.Helper()
	ctx := context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(im.WriteAt(ctx, bytes.Repeat([]byte("one"), 100<<10), 0, 0))
	must(im.WriteAt(ctx, bytes.Repeat([]byte("both"), 5<<10), 900<<10, 0))
	if zeroes {
		must(im.WriteZeroes(ctx, 16<<10, 64<<10, 0))
		must(im.WriteZeroes(ctx, 128<<10, 64<<10, block.ZeroUnmap))
	}
	if _, err := im.CreateSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	snapshot = wholeDisk(t, im)
	must(im.WriteAt(ctx, bytes.Repeat([]byte("two!"), 10<<10), 70<<10, 0))
	if zeroes {
		must(im.WriteZeroes(ctx, 200<<10, 64<<10, 0))
		must(im.WriteZeroes(ctx, 0, 32<<10, 0))
		must(im.WriteZeroes(ctx, 700<<10, 64<<10, 0))
	}
	return snapshot, wholeDisk(t, im)
}

func TestAmendVersion(t *testing.T) {
	ctx := context.Background()
	for i, cs := range []int64{512, 4096, 4096, 65536} {
		for _, backed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d,cluster=%d,backed=%v", i, cs, backed), func(t *testing.T) {
				o, create := qcow2.Options{}, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs, LazyRefcounts: true}
				if i == 2 {
					create.Encrypt = encryptions[0]
					o.Encrypt = &qcow2.EncryptOptions{Secret: create.Encrypt.Secret}
				}
				if backed {
					o.Backing = blocktest.NewBytes(bytes.Repeat([]byte("base"), 1<<18))
					create.BackingFile, create.BackingFormat = "base", "raw"
				}
				f := storage.NewMemFile("amend.qcow2")
				if cs > 512 {
					f = strangeHeader(t, create)
				} else if err := qcow2.Create(ctx, f, create); err != nil {
					t.Fatal(err)
				}
				im := mustOpen(t, keepOpen{f}, o)
				snapshot, disk := fill(t, im, true)
				for _, version := range []int{2, 2, 3, 2} {
					calls := 0
					err := im.Amend(ctx, qcow2.AmendOptions{Version: version, Progress: func(done, total int64) {
						if calls++; done < 0 || done > total {
							t.Errorf("progress %d of %d", done, total)
						}
					}})
					if err != nil {
						t.Fatal(err)
					}
					if info, err := qcow2.ReadInfo(ctx, f); err != nil || info.Version != version || info.LazyRefcounts || info.Dirty {
						t.Fatalf("info %+v, %v", info, err)
					}
					checkClean(t, f)
					if !bytes.Equal(wholeDisk(t, im), disk) {
						t.Fatal("the content differs")
					}
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, f)
				im = mustOpen(t, keepOpen{f}, o)
				if !bytes.Equal(wholeDisk(t, im), disk) {
					t.Error("the content differs")
				}
				if err := im.ApplySnapshot(ctx, "s"); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(wholeDisk(t, im), snapshot) {
					t.Error("the snapshot differs")
				}
				if err := im.WriteAt(ctx, disk, 0, 0); err != nil {
					t.Fatal(err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, f)
			})
		}
	}
}

func TestAmendRefcountBits(t *testing.T) {
	ctx := context.Background()
	for _, cs := range []int64{512, 65536} {
		f := storage.NewMemFile("amend.qcow2")
		create := qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs}
		if cs > 512 {
			f = strangeHeader(t, create)
		} else if err := qcow2.Create(ctx, f, create); err != nil {
			t.Fatal(err)
		}
		im := mustOpen(t, keepOpen{f}, qcow2.Options{})
		_, disk := fill(t, im, true)
		width := 0
		for _, n := range []int{32, 2, 64, 4, 8, 16, 16, 1} {
			err := im.Amend(ctx, qcow2.AmendOptions{RefcountBits: n})
			if n == 1 {
				if !errors.Is(err, qcow2.ErrInvalidOption) || !strings.Contains(err.Error(), "has a refcount of 2") {
					t.Errorf("one bit: %v", err)
				}
				n = width
			} else if err != nil {
				t.Fatal(err)
			}
			width = n
			info, err := qcow2.ReadInfo(ctx, f)
			if err != nil || info.RefcountBits != n || info.Dirty {
				t.Fatalf("info %+v, %v", info, err)
			}
			checkClean(t, f)
			if err := im.WriteAt(ctx, []byte{byte(n)}, int64(n)*5000, 0); err != nil {
				t.Fatal(err)
			}
			disk[n*5000] = byte(n)
		}
		if err := im.DeleteSnapshot(ctx, "s"); err != nil {
			t.Fatal(err)
		}
		if err := im.Amend(ctx, qcow2.AmendOptions{RefcountBits: 1}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(wholeDisk(t, im), disk) {
			t.Error("the content differs")
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		if cs > 512 {
			checkStrange(t, f)
		}
		checkClean(t, f)
	}
}

func TestAmendRefused(t *testing.T) {
	ctx := context.Background()
	yes := true
	for _, c := range []struct {
		name   string
		create qcow2.CreateOptions
		o      qcow2.AmendOptions
		want   string // "" for success
	}{
		{"version", qcow2.CreateOptions{}, qcow2.AmendOptions{Version: 4}, "Unknown compatibility level"},
		{"backing file", qcow2.CreateOptions{}, qcow2.AmendOptions{BackingFile: ptr("x")}, "Cannot amend the backing file"},
		{"same backing file", qcow2.CreateOptions{BackingFile: "x", BackingFormat: "raw"},
			qcow2.AmendOptions{BackingFile: ptr("x"), BackingFormat: ptr("raw")}, ""},
		{"backing format", qcow2.CreateOptions{BackingFile: "x", BackingFormat: "raw"}, qcow2.AmendOptions{BackingFormat: ptr("qcow2")},
			"Cannot amend the backing file"},
		{"width", qcow2.CreateOptions{}, qcow2.AmendOptions{RefcountBits: 3}, "must be a power of two"},
		{"width of version 2", qcow2.CreateOptions{Version: 2}, qcow2.AmendOptions{RefcountBits: 32}, "require compatibility level 1.1"},
		{"width and version 2", qcow2.CreateOptions{RefcountBits: 8}, qcow2.AmendOptions{Version: 2}, "compat=0.10 requires refcount_bits=16"},
		{"width with version 2", qcow2.CreateOptions{RefcountBits: 8}, qcow2.AmendOptions{Version: 2, RefcountBits: 16}, ""},
		{"lazy in version 2", qcow2.CreateOptions{Version: 2}, qcow2.AmendOptions{LazyRefcounts: &yes}, "Lazy refcounts only supported"},
		{"lazy and version 3", qcow2.CreateOptions{Version: 2}, qcow2.AmendOptions{LazyRefcounts: &yes, Version: 3}, ""},
		{"data file", qcow2.CreateOptions{}, qcow2.AmendOptions{DataFile: ptr("x")}, "data-file can only be set"},
		{"raw data file", qcow2.CreateOptions{}, qcow2.AmendOptions{DataFileRaw: &yes}, "data-file-raw cannot be set"},
		{"extended L2", qcow2.CreateOptions{ExtendedL2: true}, qcow2.AmendOptions{Version: 2}, "incompatible features 0x10"},
		{"zstd, nothing compressed", qcow2.CreateOptions{CompressionType: qcow2.CompressionZstd}, qcow2.AmendOptions{Version: 2}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.create.Size = 1 << 20
			f := storage.NewMemFile("amend.qcow2")
			if err := qcow2.Create(ctx, f, c.create); err != nil {
				t.Fatal(err)
			}
			im := mustOpen(t, keepOpen{f}, qcow2.Options{})
			if err := im.WriteAt(ctx, []byte("data"), 0, 0); err != nil {
				t.Fatal(err)
			}
			err := im.Amend(ctx, c.o)
			if (c.want == "") != (err == nil) || err != nil && (!errors.Is(err, qcow2.ErrInvalidOption) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, f)
		})
	}
}

// TestAmendSnapshotsPreventDowngrade: version 2 does not say how large a snapshot's disk is.
func TestAmendSnapshotsPreventDowngrade(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("amend.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	im := mustOpen(t, keepOpen{f}, qcow2.Options{})
	if _, err := im.CreateSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	if err := im.Resize(ctx, 2<<20, qcow2.ResizeOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := im.Amend(ctx, qcow2.AmendOptions{Version: 2}); !errors.Is(err, qcow2.ErrInvalidOption) {
		t.Errorf("got %v", err)
	}
	if err := im.Amend(ctx, qcow2.AmendOptions{Version: 2, Size: ptr(int64(1 << 20))}); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}

// TestAmendAllAtOnce changes everything in one call, and back.
func TestAmendAllAtOnce(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("amend.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, Version: 2, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	im := mustOpen(t, keepOpen{f}, qcow2.Options{})
	data := bytes.Repeat([]byte("data"), 1<<18)
	if err := im.WriteAt(ctx, data, 0, 0); err != nil {
		t.Fatal(err)
	}
	up := qcow2.AmendOptions{Version: 3, LazyRefcounts: ptr(true), RefcountBits: 64, Size: ptr(int64(3 << 20))}
	if err := im.Amend(ctx, up); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, data, 2<<20, 0); err != nil {
		t.Fatal(err)
	}
	if info, err := qcow2.ReadInfo(ctx, f); err != nil || !info.LazyRefcounts || info.RefcountBits != 64 || info.VirtualSize != 3<<20 {
		t.Fatalf("info %+v, %v", info, err)
	}
	down := qcow2.AmendOptions{Version: 2, LazyRefcounts: ptr(false), RefcountBits: 16, Size: ptr(int64(2<<20 + 512))}
	if err := im.Amend(ctx, down); err != nil {
		t.Fatal(err)
	}
	if info, err := qcow2.ReadInfo(ctx, f); err != nil || info.Version != 2 || info.VirtualSize != 2<<20+512 {
		t.Fatalf("info %+v, %v", info, err)
	}
	want := make([]byte, 2<<20+512)
	copy(want, data)
	copy(want[2<<20:], data)
	if !bytes.Equal(wholeDisk(t, im), want) {
		t.Error("the content differs")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}

// TestDowngradeSetsFlags: a cluster that a snapshot holds as zeroes and the disk as data is the disk's alone afterwards, and its
// entry must say so.
func TestDowngradeSetsFlags(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("flags.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	im := mustOpen(t, keepOpen{f}, qcow2.Options{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	snapshot := func(name string) {
		t.Helper()
		_, err := im.CreateSnapshot(ctx, name)
		must(err)
	}
	must(im.WriteAt(ctx, bytes.Repeat([]byte("data"), 16<<10), 0, 0))
	snapshot("data")
	must(im.WriteZeroes(ctx, 0, 64<<10, 0))
	snapshot("zeroes")
	must(im.ApplySnapshot(ctx, "data"))
	must(im.DeleteSnapshot(ctx, "data"))
	must(im.Amend(ctx, qcow2.AmendOptions{Version: 2}))
	checkClean(t, f)
	if got := wholeDisk(t, im); !bytes.HasPrefix(got, []byte("data")) {
		t.Error("the data is gone")
	}
	must(im.Close())
	checkClean(t, f)
}
