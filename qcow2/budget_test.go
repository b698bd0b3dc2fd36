package qcow2_test

import (
	"context"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// TestCacheBudget reads all tables of two images that share a budget: together they keep no more than it allows and what
// each needs for changes that wait for a flush, and closing gives everything back.
func TestCacheBudget(t *testing.T) {
	ctx := context.Background()
	budget := block.NewCacheBudget(64 << 10)
	var images []*qcow2.Image
	for range 2 {
		f := storage.NewMemFile("budget.qcow2")
		if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 30, ClusterSize: 4096}); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{Memory: budget, CacheCleanInterval: -1})
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, im)
		for off := int64(0); off < 200<<20; off += 2 << 20 {
			if err := im.WriteAt(ctx, []byte("x"), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := im.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 1)
	for _, im := range images {
		for off := int64(0); off < 200<<20; off += 2 << 20 {
			if err := im.ReadAt(ctx, p, off); err != nil || p[0] != 'x' {
				t.Fatalf("reading %d: %q, %v", off, p, err)
			}
		}
	}
	if n := budget.Used(); n == 0 || n > 64<<10+2*12*4096 {
		t.Errorf("%d bytes are used", n)
	}
	for _, im := range images {
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := budget.Used(); n != 0 {
		t.Errorf("%d bytes are used after closing", n)
	}
}
