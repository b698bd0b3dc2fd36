package explore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// Chain is a change of an image together with the one that it stands on, which the guest does not notice.
type Chain struct {
	Name          string
	Overlay, Base qcow2.CreateOptions
	RawBase       int64 // the length of a raw base; 0: it is a qcow2 image
	Snapshot      bool  // of the overlay
	// Other is the length of another backing device, which the change may put in place of the base.
	Other int64
	Run   func(ctx context.Context, top *qcow2.Image, other block.Device) error
	// Committed: the base holds what the disk holds afterwards.
	Committed bool
}

func commit(keep bool) func(context.Context, *qcow2.Image, block.Device) error {
	return func(ctx context.Context, top *qcow2.Image, _ block.Device) error {
		return image.Commit(ctx, top, image.CommitOptions{Keep: keep})
	}
}

func rebase(compress bool) func(context.Context, *qcow2.Image, block.Device) error {
	return func(ctx context.Context, top *qcow2.Image, other block.Device) error {
		o := image.RebaseOptions{Backing: other, Compress: compress}
		if other != nil {
			o.Name, o.Format = "other", "raw"
		}
		return image.Rebase(ctx, top, o)
	}
}

// Chains returns commits and rebases, each on the images that make it hardest.
func Chains() []Chain {
	tiny := func(size int64) qcow2.CreateOptions { return qcow2.CreateOptions{ClusterSize: 512, Size: size} }
	medium := func(size int64) qcow2.CreateOptions { return qcow2.CreateOptions{ClusterSize: 4096, Size: size} }
	v2 := func(o qcow2.CreateOptions) qcow2.CreateOptions { o.Version = 2; return o }
	lazy := func(o qcow2.CreateOptions) qcow2.CreateOptions { o.LazyRefcounts = true; return o }
	subclusters := qcow2.CreateOptions{ClusterSize: 16384, Size: 100<<10 + 512, ExtendedL2: true}
	return []Chain{
		{Name: "commit", Overlay: tiny(40 << 10), Base: tiny(40 << 10), Run: commit(false), Committed: true},
		{Name: "commit, base grows", Overlay: tiny(40 << 10), Base: medium(20<<10 + 512), Run: commit(false), Committed: true},
		{Name: "commit, raw base grows", Overlay: medium(80 << 10), RawBase: 50<<10 + 512, Run: commit(false), Committed: true},
		{Name: "commit, snapshot", Overlay: medium(120 << 10), Base: medium(120 << 10), Snapshot: true, Run: commit(false), Committed: true},
		{Name: "commit, version 2", Overlay: v2(medium(90 << 10)), Base: v2(tiny(90 << 10)), Run: commit(false), Committed: true},
		{Name: "commit, subclusters", Overlay: subclusters, Base: medium(120 << 10), Run: commit(false), Committed: true},
		{Name: "commit, lazy", Overlay: lazy(medium(90 << 10)), Base: lazy(medium(90 << 10)), Run: commit(false), Committed: true},
		{Name: "commit, keep", Overlay: medium(90 << 10), RawBase: 90 << 10, Run: commit(true), Committed: true},
		{Name: "rebase", Overlay: tiny(40 << 10), Base: tiny(30 << 10), Other: 35 << 10, Run: rebase(false)},
		{Name: "rebase, other longer", Overlay: medium(90 << 10), Base: medium(30 << 10), Other: 200 << 10, Run: rebase(false)},
		{Name: "rebase, version 2", Overlay: v2(medium(90 << 10)), Base: medium(30 << 10), Other: 80 << 10, Run: rebase(false)},
		{Name: "rebase, subclusters", Overlay: subclusters, Base: medium(60 << 10), Other: 90 << 10, Run: rebase(false)},
		{Name: "rebase, compressed", Overlay: medium(90 << 10), Base: medium(90 << 10), Other: 50 << 10, Run: rebase(true)},
		{Name: "flatten", Overlay: medium(90<<10 + 512), Base: tiny(70 << 10), Snapshot: true, Run: rebase(false)},
	}
}

// Pair is a Chain made real.
type Pair struct {
	Chain
	Top, Bottom *storage.MemFile
	Disk        []byte
}

const baseName, otherName = "base", "other"

// Make makes the images.
func (c Chain) Make(t testing.TB) *Pair {
	t.Helper()
	ctx := context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", c.Name, err)
		}
	}
	p := &Pair{Chain: c, Top: storage.NewMemFile("top"), Bottom: storage.NewMemFile(baseName)}
	format := "qcow2"
	if c.RawBase > 0 {
		format = "raw"
		must(p.Bottom.Truncate(c.RawBase))
	} else {
		must(qcow2.Create(ctx, p.Bottom, c.Base))
	}
	p.Overlay.BackingFile, p.Overlay.BackingFormat = baseName, format
	must(qcow2.Create(ctx, p.Top, p.Overlay))
	base, err := p.openBase(p.Bottom, false)
	must(err)
	n := base.Size()
	must(base.WriteAt(ctx, bytes.Repeat([]byte("base data "), int(n/2/10)), n/8, 0))
	must(base.WriteAt(ctx, bytes.Repeat([]byte("at the end"), int(n/10/10)), n-n/10/10*10, 0))
	must(base.Close())
	top, err := p.Open(p.Top, p.Bottom, false)
	must(err)
	n = top.Size()
	must(top.WriteAt(ctx, bytes.Repeat([]byte("top data!"), int(n/4/9)), n/3, 0))
	must(top.WriteZeroes(ctx, n/5, n/8, 0))
	if c.Snapshot {
		_, err := top.CreateSnapshot(ctx, "s")
		must(err)
		must(top.WriteAt(ctx, bytes.Repeat([]byte("second"), int(n/4/6)), n-n/4, 0))
	}
	p.Disk = make([]byte, n)
	must(top.ReadAt(ctx, p.Disk, 0))
	must(top.Close())
	return p
}

func (c Chain) openBase(f storage.File, readOnly bool) (block.Device, error) {
	if c.RawBase > 0 {
		return block.NewRaw(KeepOpen{f}, block.RawOptions{ReadOnly: readOnly})
	}
	return qcow2.Open(context.Background(), KeepOpen{f}, qcow2.Options{ReadOnly: readOnly, CacheSize: 1, CacheCleanInterval: -1})
}

// OtherDevice returns the other backing device: the base's bytes in part, and others.
func (c Chain) OtherDevice() block.Device {
	if c.Other == 0 {
		return nil
	}
	b := bytes.Repeat([]byte("other data, not the same."), int(c.Other/25)+1)[:c.Other]
	clear(b[c.Other/3 : c.Other/2])
	return blocktest.NewBytes(b)
}

// Open opens the chain, the base for writing as well.
func (c Chain) Open(top, bottom storage.File, readOnly bool) (*qcow2.Image, error) {
	ctx := context.Background()
	info, err := qcow2.ReadInfo(ctx, top)
	if err != nil {
		return nil, err
	}
	o := qcow2.Options{ReadOnly: readOnly, CacheSize: 1, CacheCleanInterval: -1}
	switch info.BackingFile {
	case "":
	case otherName:
		o.Backing = c.OtherDevice()
	case baseName:
		if o.Backing, err = c.openBase(bottom, readOnly); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("the image names %q", info.BackingFile)
	}
	im, err := qcow2.Open(ctx, KeepOpen{top}, o)
	if err != nil && o.Backing != nil {
		err = errors.Join(err, o.Backing.Close())
	}
	return im, err
}

// Judge returns what is wrong with a chain that a change was made of, or, if done is not set, begun. What is marked dirty
// is repaired by opening it for writing.
func (p *Pair) Judge(top, bottom *storage.MemFile, done bool) (err error) {
	ctx := context.Background()
	readOnly := true
	for _, f := range []*storage.MemFile{top, bottom} {
		if info, err := qcow2.ReadInfo(ctx, f); err == nil && info.Dirty {
			readOnly = false
		}
	}
	im, err := p.Open(top, bottom, readOnly)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	disk := make([]byte, im.Size())
	if err := im.ReadAt(ctx, disk, 0); err != nil {
		return err
	}
	if !bytes.Equal(disk, p.Disk) {
		return errors.New("the disk has changed")
	}
	info, err := qcow2.ReadInfo(ctx, top)
	if err != nil || !done {
		return err
	}
	if p.Committed {
		return p.judgeBase(ctx, im.Backing())
	}
	want := otherName
	if p.Other == 0 {
		want = ""
	}
	if info.BackingFile != want {
		return fmt.Errorf("the image names %q", info.BackingFile)
	}
	return nil
}

// judgeBase compares the beginning of the base with the disk.
func (p *Pair) judgeBase(ctx context.Context, base block.Device) error {
	b := make([]byte, len(p.Disk))
	if err := base.ReadAt(ctx, b, 0); err != nil {
		return err
	}
	if !bytes.Equal(b, p.Disk) {
		return errors.New("the base does not hold what was committed")
	}
	return nil
}

// Again makes the change once more on what was left, where it is still to be made.
func (p *Pair) Again(top, bottom *storage.MemFile) error {
	im, err := p.Open(top, bottom, false)
	if err != nil {
		return err
	}
	if err := p.Run(context.Background(), im, p.OtherDevice()); err != nil {
		return errors.Join(fmt.Errorf("once more: %w", err), im.Close())
	}
	if err := im.Close(); err != nil {
		return err
	}
	return p.Judge(top, bottom, true)
}
