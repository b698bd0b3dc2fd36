package daemon

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/qcow2"
)

// stateDirty is the bit by which a client of qemu:dirty-bitmap:NAME knows what the bitmap has marked.
const stateDirty = 1

// bitmapped is a device that has dirty bitmaps.
type bitmapped interface {
	Bitmaps() ([]qcow2.BitmapInfo, error)
	BitmapExtents(ctx context.Context, name string, off, n int64, fn func(n int64, dirty bool) bool) error
}

// bitmapContexts makes metadata contexts of the bitmaps that an export names. What clients see is the bitmap as it is at
// that moment.
func bitmapContexts(e Export, dev block.Device) ([]nbd.Context, error) {
	var contexts []nbd.Context
	for _, name := range e.Bitmaps {
		if err := usableBitmap(dev, name); err != nil {
			return nil, fmt.Errorf("%q: %w", e.Image, err)
		}
		im := dev.(bitmapped)
		contexts = append(contexts, nbd.Context{
			Name: "qemu:dirty-bitmap:" + name,
			BlockStatus: func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error {
				return im.BitmapExtents(ctx, name, off, n, func(n int64, dirty bool) bool {
					if dirty {
						return fn(n, stateDirty)
					}
					return fn(n, 0)
				})
			},
		})
	}
	return contexts, nil
}

// usableBitmap returns why a bitmap cannot be served.
func usableBitmap(dev block.Device, name string) error {
	im, ok := dev.(bitmapped)
	if !ok {
		return fmt.Errorf("bitmap '%s' is not found: images of this format have none", name)
	}
	list, err := im.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range list {
		switch {
		case b.Name != name:
			continue
		case b.InUse:
			return &qcow2.BitmapInUseError{Name: name}
		}
		return nil
	}
	return fmt.Errorf("bitmap '%s' is not found", name)
}
