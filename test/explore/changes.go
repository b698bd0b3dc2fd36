package explore

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

// Change is a change of a whole image that keeps the disk's content, but for its length.
type Change struct {
	Name   string
	Create qcow2.CreateOptions
	// Base is the length of the backing device; 0: there is none.
	Base int64
	// Snapshot: the image has an internal snapshot, and data written since.
	Snapshot bool
	// Holes: at last as much becomes free at the beginning of the file as the disk takes.
	Holes bool
	// Prepare, if not nil, does more with the image, once its disk is written. It leaves the disk's content as it is.
	Prepare func(context.Context, *qcow2.Image) error
	Run     func(context.Context, *qcow2.Image) error
}

// Subject is an image that a Change is tried on.
type Subject struct {
	Change
	Image  *storage.MemFile
	Before State
	After  State
}

// State is what an image is, as a Change may leave it.
type State struct {
	Info     qcow2.Info
	Disk     []byte
	Snapshot []byte
}

func resizeTo(size int64, mode qcow2.Preallocation) func(context.Context, *qcow2.Image) error {
	return func(ctx context.Context, im *qcow2.Image) error {
		return im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true, Preallocation: mode})
	}
}

// writeState writes the state of a machine behind the end of the disk, twice.
func writeState(ctx context.Context, im *qcow2.Image) error {
	return errors.Join(
		im.WriteVMState(ctx, bytes.Repeat([]byte("state"), 1000), 300),
		im.Flush(ctx),
		im.WriteVMState(ctx, bytes.Repeat([]byte("other"), 300), 1000))
}

func amend(o qcow2.AmendOptions) func(context.Context, *qcow2.Image) error {
	return func(ctx context.Context, im *qcow2.Image) error { return im.Amend(ctx, o) }
}

// compact moves a cluster or two at a time.
func compact(ctx context.Context, im *qcow2.Image) error {
	_, err := im.Compact(ctx, qcow2.CompactOptions{Step: 1024})
	return err
}

// compressed writes all of the disk again, compressed, and has a snapshot keep it, too.
func compressed(ctx context.Context, im *qcow2.Image) error {
	p := make([]byte, im.Size())
	if err := im.ReadAt(ctx, p, 0); err != nil {
		return err
	}
	if err := im.WriteCompressed(ctx, p, 0); err != nil {
		return err
	}
	if _, err := im.CreateSnapshot(ctx, "compressed"); err != nil {
		return err
	}
	return im.WriteCompressed(ctx, p[:len(p)/2&^4095], 0)
}

// metadataLast has bitmaps, a longer L1 table and all refcounts stand at the end of the file.
func metadataLast(ctx context.Context, im *qcow2.Image) error {
	return errors.Join(
		im.AddBitmap(ctx, "b", qcow2.BitmapOptions{Granularity: 512}),
		im.WriteZeroes(ctx, 0, 512, 0),
		im.Resize(ctx, 3<<20, qcow2.ResizeOptions{}),
		im.Amend(ctx, qcow2.AmendOptions{RefcountBits: 64}),
		im.WriteZeroes(ctx, 1024, 512, 0),
		im.SaveBitmaps(ctx))
}

// Changes returns the changes that headers, resizing and amending offer, each on the images that make it hardest.
func Changes() []Change {
	yes, size := true, int64(40<<10)
	small := qcow2.CreateOptions{ClusterSize: 512, Size: 24 << 10}
	medium := qcow2.CreateOptions{ClusterSize: 4096, Size: 150 << 10}
	with := func(o qcow2.CreateOptions, change func(*qcow2.CreateOptions)) qcow2.CreateOptions {
		change(&o)
		return o
	}
	v2 := func(o *qcow2.CreateOptions) { o.Version = 2 }
	named := with(qcow2.CreateOptions{Size: 128 << 10}, func(o *qcow2.CreateOptions) {
		o.BackingFile, o.BackingFormat = strings.Repeat("old/", 150), "raw"
	})
	rename := func(ctx context.Context, im *qcow2.Image) error {
		return im.ChangeBacking(ctx, strings.Repeat("new", 200), "qcow2")
	}
	return []Change{
		{Name: "grow in place", Create: medium, Run: resizeTo(155<<10, qcow2.PreallocOff)},
		{Name: "grow, longer L1", Create: small, Run: resizeTo(3<<20, qcow2.PreallocOff)},
		{Name: "grow, longer L1, snapshot", Create: small, Snapshot: true, Run: resizeTo(3<<20, qcow2.PreallocOff)},
		{Name: "grow, metadata", Create: small, Run: resizeTo(60<<10, qcow2.PreallocMetadata)},
		{Name: "grow, full", Create: small, Run: resizeTo(60<<10, qcow2.PreallocFull)},
		{Name: "grow over backing", Create: small, Base: 50 << 10, Run: resizeTo(60<<10, qcow2.PreallocOff)},
		{Name: "grow over backing, version 2", Create: with(small, v2), Base: 50 << 10, Run: resizeTo(60<<10, qcow2.PreallocOff)},
		{Name: "grow, subclusters, backing", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 60<<10 + 512, ExtendedL2: true},
			Base: 100 << 10, Run: resizeTo(120<<10, qcow2.PreallocOff)},
		{Name: "shrink", Create: with(small, func(o *qcow2.CreateOptions) { o.Size = 80 << 10 }), Run: resizeTo(20<<10+512, qcow2.PreallocOff)},
		{Name: "shrink in a cluster", Create: medium, Run: resizeTo(70<<10+512, qcow2.PreallocOff)},
		{Name: "shrink, snapshot", Create: with(small, func(o *qcow2.CreateOptions) { o.Size = 80 << 10 }), Snapshot: true,
			Run: resizeTo(9<<10+512, qcow2.PreallocOff)},
		{Name: "backing file renamed", Create: named, Run: rename},
		{Name: "backing file renamed, small clusters", Create: with(medium, func(o *qcow2.CreateOptions) { o.BackingFile, o.BackingFormat = "old", "raw" }),
			Run: rename},
		{Name: "upgrade", Create: with(medium, v2), Snapshot: true, Run: amend(qcow2.AmendOptions{Version: 3})},
		{Name: "upgrade and all", Create: with(small, v2), Run: amend(qcow2.AmendOptions{Version: 3, LazyRefcounts: &yes, RefcountBits: 64, Size: &size})},
		{Name: "downgrade", Create: small, Snapshot: true, Run: amend(qcow2.AmendOptions{Version: 2})},
		{Name: "downgrade, backing", Create: small, Base: 50 << 10, Run: amend(qcow2.AmendOptions{Version: 2})},
		{Name: "downgrade, backing, snapshot", Create: medium, Base: 50 << 10, Snapshot: true, Run: amend(qcow2.AmendOptions{Version: 2})},
		{Name: "wider refcounts", Create: small, Snapshot: true, Run: amend(qcow2.AmendOptions{RefcountBits: 64})},
		{Name: "narrower refcounts", Create: small, Snapshot: true, Run: amend(qcow2.AmendOptions{RefcountBits: 2})},
		{Name: "compact", Create: small, Holes: true, Run: compact},
		{Name: "compact, version 2", Create: with(small, v2), Holes: true, Run: compact},
		{Name: "compact, snapshot", Create: small, Holes: true, Snapshot: true, Run: compact},
		{Name: "compact, version 2, snapshot", Create: with(small, v2), Holes: true, Snapshot: true, Run: compact},
		{Name: "compact, subclusters, snapshot", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 200 << 10, ExtendedL2: true},
			Holes: true, Snapshot: true, Run: compact},
		{Name: "compact, compressed, snapshot", Create: medium, Holes: true, Snapshot: true, Prepare: compressed, Run: compact},
		{Name: "compact, metadata", Create: small, Holes: true, Snapshot: true, Prepare: metadataLast, Run: compact},
		{Name: "compact, metadata alone", Create: small, Holes: true, Prepare: metadataLast, Run: compact},
		{Name: "machine state", Create: small, Run: writeState},
		{Name: "machine state, snapshot", Create: small, Snapshot: true, Run: writeState},
		{Name: "lazy refcounts", Create: medium, Run: amend(qcow2.AmendOptions{LazyRefcounts: &yes})},
	}
}

// Make makes the image, and finds out what the change is to lead to.
func (c Change) Make(t testing.TB) *Subject {
	t.Helper()
	ctx := context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", c.Name, err)
		}
	}
	s := &Subject{Change: c, Image: storage.NewMemFile("change.qcow2")}
	if c.Base > 0 {
		s.Create.BackingFile, s.Create.BackingFormat = "base", "raw"
	}
	must(qcow2.Create(ctx, s.Image, s.Create))
	im, err := s.Open(s.Image, false)
	must(err)
	n := im.Size()
	if c.Holes {
		must(im.WriteAt(ctx, bytes.Repeat([]byte{'h'}, int(n)), 0, 0))
		_, err := im.CreateSnapshot(ctx, "holes")
		must(err)
		must(im.WriteZeroes(ctx, 0, n, 0))
	}
	must(im.WriteAt(ctx, bytes.Repeat([]byte("first data "), int(n/2/11)), n/3, 0))
	must(im.WriteZeroes(ctx, n/2, n/8, block.ZeroUnmap))
	must(im.WriteZeroes(ctx, 2*n/3, n/8, 0))
	if c.Snapshot {
		_, err := im.CreateSnapshot(ctx, "s")
		must(err)
		must(im.WriteAt(ctx, bytes.Repeat([]byte("second"), int(n/4/6)), n-n/4, 0))
		must(im.WriteZeroes(ctx, n/4, n/4, 0))
	}
	if c.Prepare != nil {
		must(c.Prepare(ctx, im))
	}
	if c.Holes {
		must(im.DeleteSnapshot(ctx, "holes"))
	}
	must(im.Close())
	s.Before, err = s.Look(s.Image.Clone())
	must(err)
	after := s.Image.Clone()
	im, err = s.Open(after, false)
	must(err)
	must(s.Run(ctx, im))
	must(im.Close())
	s.After, err = s.Look(after)
	must(err)
	short := min(len(s.Before.Disk), len(s.After.Disk))
	if !bytes.Equal(s.Before.Disk[:short], s.After.Disk[:short]) || !allZero(s.After.Disk[short:]) {
		t.Fatalf("%s: the change changes the disk", c.Name)
	}
	return s
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// Open opens the image.
func (s *Subject) Open(f storage.File, readOnly bool) (*qcow2.Image, error) {
	o := qcow2.Options{ReadOnly: readOnly, CacheSize: 1, CacheCleanInterval: -1}
	if s.Base > 0 {
		o.Backing = blocktest.NewBytes(bytes.Repeat([]byte("base"), int(s.Base/4)))
	}
	return qcow2.Open(context.Background(), KeepOpen{f}, o)
}

// Look finds out what an image is. One that is marked dirty is repaired by opening it for writing.
func (s *Subject) Look(f storage.File) (st State, err error) {
	ctx := context.Background()
	info, err := qcow2.ReadInfo(ctx, f)
	if err != nil {
		return st, err
	}
	im, err := s.Open(f, !info.Dirty)
	if err != nil {
		return st, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	st.Info = *info
	st.Info.Dirty, st.Info.Snapshots = false, nil
	st.Disk = make([]byte, im.Size())
	if err := im.ReadAt(ctx, st.Disk, 0); err != nil {
		return st, err
	}
	if !s.Snapshot {
		return st, nil
	}
	view, err := im.OpenSnapshot(ctx, "s")
	if err != nil {
		return st, err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	st.Snapshot = make([]byte, view.Size())
	return st, view.ReadAt(ctx, st.Snapshot, 0)
}

// Judge returns what is wrong with a state in which a change that was begun may have left an image, or, if done is set, one
// that was completed. Of a change in several steps any may have been made.
func (s *Subject) Judge(st State, done bool) error {
	b, a := s.Before, s.After
	if done {
		b = a
	}
	either := func(what string, got, before, after any) error {
		if got != before && got != after {
			return fmt.Errorf("%s is %v, not %v or %v", what, got, before, after)
		}
		return nil
	}
	i := st.Info
	if err := errors.Join(either("version", i.Version, b.Info.Version, a.Info.Version),
		either("refcount width", i.RefcountBits, b.Info.RefcountBits, a.Info.RefcountBits),
		either("lazy refcounts", i.LazyRefcounts, b.Info.LazyRefcounts, a.Info.LazyRefcounts),
		either("backing file", i.BackingFile+" "+i.BackingFormat, b.Info.BackingFile+" "+b.Info.BackingFormat, a.Info.BackingFile+" "+a.Info.BackingFormat),
		either("size", i.VirtualSize, b.Info.VirtualSize, a.Info.VirtualSize)); err != nil {
		return err
	}
	want := b.Disk
	if int64(len(a.Disk)) == i.VirtualSize {
		want = a.Disk
	}
	if !bytes.Equal(st.Disk, want) {
		return fmt.Errorf("the disk of %d bytes has changed", i.VirtualSize)
	}
	if !bytes.Equal(st.Snapshot, s.Before.Snapshot) {
		return errors.New("the snapshot has changed")
	}
	return nil
}
