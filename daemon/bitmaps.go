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
		c, err := BitmapContext(dev, name)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", e.Image, err)
		}
		contexts = append(contexts, c)
	}
	return contexts, nil
}

// BitmapContext makes a metadata context, qemu:dirty-bitmap:NAME, of a dirty bitmap of dev. Beyond dev's end, for a device
// served in its place that is longer, nothing is dirty.
func BitmapContext(dev block.Device, name string) (nbd.Context, error) {
	if err := usableBitmap(dev, name); err != nil {
		return nbd.Context{}, err
	}
	im, _ := block.As[bitmapped](dev)
	return nbd.Context{
		Name: "qemu:dirty-bitmap:" + name,
		BlockStatus: func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error {
			inside := min(n, max(dev.Size()-off, 0))
			more := true
			if inside > 0 {
				err := im.BitmapExtents(ctx, name, off, inside, func(n int64, dirty bool) bool {
					state := uint32(0)
					if dirty {
						state = stateDirty
					}
					more = fn(n, state)
					return more
				})
				if err != nil {
					return err
				}
			}
			if more && n > inside {
				fn(n-inside, 0)
			}
			return nil
		},
	}, nil
}

// usableBitmap returns why a bitmap cannot be served.
func usableBitmap(dev block.Device, name string) error {
	im, ok := block.As[bitmapped](dev)
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
