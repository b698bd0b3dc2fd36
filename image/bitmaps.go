package image

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/qcow2"
)

// BitmapError says which dirty bitmap could not be copied, and at which step.
type BitmapError struct {
	Name string
	Step string // "create" or "populate"
	Err  error
}

func (e *BitmapError) Error() string {
	return fmt.Sprintf("Failed to %s bitmap %s: %v", e.Step, e.Name, e.Err) //nolint:staticcheck // QEMU's words
}

// Unwrap returns the cause.
func (e *BitmapError) Unwrap() error { return e.Err }

// CopyBitmaps gives dst the dirty bitmaps of src, with their granularities and what they have marked. Those that are
// inconsistent are left out. When it fails, the bitmap that it failed at is not in dst; those before it are.
func CopyBitmaps(ctx context.Context, dst, src *qcow2.Image) error {
	list, err := src.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range list {
		if b.InUse {
			continue
		}
		if err := copyBitmap(ctx, dst, src, b); err != nil {
			return err
		}
	}
	return nil
}

func copyBitmap(ctx context.Context, dst, src *qcow2.Image, b qcow2.BitmapInfo) error {
	o := qcow2.BitmapOptions{Granularity: b.Granularity, Disabled: true}
	if err := dst.AddBitmap(ctx, b.Name, o); err != nil {
		return &BitmapError{b.Name, "create", err}
	}
	err := dst.MergeBitmap(ctx, b.Name, src, b.Name)
	if err == nil && b.Auto {
		err = dst.EnableBitmap(ctx, b.Name)
	}
	if err == nil {
		return nil
	}
	if undo := dst.RemoveBitmap(context.WithoutCancel(ctx), b.Name); undo != nil {
		err = fmt.Errorf("%w (and removing it: %w)", err, undo)
	}
	return &BitmapError{b.Name, "populate", err}
}
