package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// TestHostLayout counts the clusters of an image with some of everything.
func TestHostLayout(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("layout.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte("some data"), 20<<10)
	_, snapErr := im.Snapshots()
	for _, err := range []error{
		snapErr, im.WriteAt(ctx, p[:40<<10], 0, 0), im.WriteCompressed(ctx, p[:8192], 512<<10),
		im.WriteAt(ctx, p[:8192], 600<<10, 0), im.WriteZeroes(ctx, 600<<10, 8192, 0), im.AddBitmap(ctx, "b", qcow2.BitmapOptions{}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := im.CreateSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, p[:8192], 0, 0); err != nil {
		t.Fatal(err)
	}
	l, err := im.HostLayout(ctx)
	if err != nil {
		t.Fatal(err)
	}
	count := map[qcow2.HostState]int{}
	for _, s := range l.States {
		count[s]++
	}
	// The first L2 table was copied after the snapshot, which keeps it with two clusters of data.
	want := map[qcow2.HostState]int{qcow2.HostData: 10, qcow2.HostCompressed: 1, qcow2.HostReserved: 2, qcow2.HostSnapshot: 3}
	for s, n := range want {
		if count[s] != n {
			t.Errorf("%d clusters in state %d, want %d (%v)", count[s], s, n, count)
		}
	}
	if count[qcow2.HostLeaked] != 0 || count[qcow2.HostMapping] == 0 || count[qcow2.HostRefcounts] < 2 || count[qcow2.HostBitmaps] < 2 ||
		l.ClusterSize != 4096 || int64(len(l.States)) != (l.FileSize+4095)/4096 {
		t.Errorf("%v", count)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
	if im, err = qcow2.Open(ctx, keepOpen{f}, qcow2.Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	again, err := im.HostLayout(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for s, n := range want { // all but the bits of the bitmap, which Close has stored
		if got := bytes.Count(states(again), []byte{byte(s)}); got != n {
			t.Errorf("opened read-only: %d clusters in state %d, want %d", got, s, n)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := im.HostLayout(ctx); !errors.Is(err, block.ErrClosed) {
		t.Fatal(err)
	}
}

func states(l *qcow2.HostLayout) []byte {
	b := make([]byte, len(l.States))
	for i, s := range l.States {
		b[i] = byte(s)
	}
	return b
}
