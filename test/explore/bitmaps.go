package explore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// The bitmaps of a disk that AddBitmaps prepared: one that records everything from the start, one that nothing is to
// happen to, and one that comes and goes.
const (
	BitmapKept  = "kept"
	BitmapStill = "still"
	bitmapLoose = "loose"
)

// BitmapStarts are the starts that can have bitmaps.
func BitmapStarts() []Start {
	var list []Start
	for _, s := range Starts() {
		if s.Create.Version != 2 {
			list = append(list, s)
		}
	}
	return list
}

// AddBitmaps gives the disk's image its bitmaps, in which nothing is marked.
func (d *Disk) AddBitmaps(t testing.TB) {
	t.Helper()
	ctx := context.Background()
	im, err := d.Open(d.Image, false)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		im.AddBitmap(ctx, BitmapKept, qcow2.BitmapOptions{Granularity: 512}),
		im.AddBitmap(ctx, BitmapStill, qcow2.BitmapOptions{Disabled: true}),
		im.Close())
	if err != nil {
		t.Fatal(err)
	}
}

// DrawBitmapOp draws a change of the bitmaps. What is to be done may be impossible (see BitmapOpMayFail).
func DrawBitmapOp(r *rand.Rand) func(*qcow2.Image) error {
	ctx := context.Background()
	granularity := int64(512) << r.IntN(6)
	return []func(*qcow2.Image) error{
		func(im *qcow2.Image) error { return im.SaveBitmaps(ctx) },
		func(im *qcow2.Image) error {
			return im.AddBitmap(ctx, bitmapLoose, qcow2.BitmapOptions{Granularity: granularity})
		},
		func(im *qcow2.Image) error { return im.MergeBitmap(ctx, bitmapLoose, nil, BitmapKept) },
		func(im *qcow2.Image) error { return im.RemoveBitmap(ctx, bitmapLoose) },
		func(im *qcow2.Image) error { return im.ClearBitmap(ctx, bitmapLoose) },
		func(im *qcow2.Image) error { return im.DisableBitmap(ctx, bitmapLoose) },
		func(im *qcow2.Image) error { return im.EnableBitmap(ctx, bitmapLoose) },
	}[r.IntN(7)]
}

// BitmapOpMayFail reports whether a change of the bitmaps was refused because the loose bitmap is there, or is not.
func BitmapOpMayFail(err error) bool {
	return errors.Is(err, qcow2.ErrNoBitmap) || err != nil && err.Error() == "Bitmap already exists: "+bitmapLoose
}

// CheckBitmaps looks at the bitmaps of an image that may have lost power. A bitmap that does not say that it is in use must
// have marked every sector that is not what it was at the start; one that was not touched must be as it was. With saved set
// none may be in use.
func (d *Disk) CheckBitmaps(f storage.File, saved bool) error {
	ctx := context.Background()
	info, err := qcow2.ReadInfo(ctx, f)
	if err != nil {
		return err
	}
	found := map[string]bool{}
	im, err := d.Open(f, true)
	if err != nil {
		return err
	}
	defer im.Close()
	for _, b := range info.Bitmaps {
		found[b.Name] = true
		if b.InUse && (saved || b.Name == BitmapStill) {
			return fmt.Errorf("bitmap %q is in use", b.Name)
		}
		if b.InUse {
			continue
		}
		if err := d.checkBitmap(im, b.Name); err != nil {
			return fmt.Errorf("bitmap %q: %w", b.Name, err)
		}
	}
	if !found[BitmapKept] || !found[BitmapStill] {
		return fmt.Errorf("bitmaps are lost; there are %v", found)
	}
	return nil
}

func (d *Disk) checkBitmap(im *qcow2.Image, name string) error {
	disk := make([]byte, d.Sectors*SectorSize)
	if err := im.ReadAt(context.Background(), disk, 0); err != nil {
		return err
	}
	at := int64(0)
	var wrong error
	err := im.BitmapExtents(context.Background(), name, 0, int64(len(disk)), func(n int64, dirty bool) bool {
		for s := at; s < at+n/SectorSize && wrong == nil; s++ {
			v, ok := VersionOf(disk[s*SectorSize:][:SectorSize], s)
			switch {
			case name == BitmapKept && !dirty && (!ok || v != d.Initial(s)):
				wrong = fmt.Errorf("sector %d has changed and is not marked", s)
			case name == BitmapStill && dirty:
				wrong = fmt.Errorf("sector %d is marked", s)
			}
		}
		at += n / SectorSize
		return wrong == nil
	})
	return errors.Join(err, wrong)
}
