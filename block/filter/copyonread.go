package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"sync"

	"github.com/droverproject/drover/block"
)

func init() {
	block.RegisterDriver(block.Driver{Name: "copy-on-read", Filter: true, OpenDevice: openCopyOnRead})
}

// CopyOnRead returns dev as a disk that keeps a copy of what is read from below it. Closing it closes dev.
func CopyOnRead(dev block.Device) block.Device { return &copyOnRead{Device: dev} }

func openCopyOnRead(ctx context.Context, n *block.Node) (block.Device, error) {
	if n.ReadOnly {
		return nil, errors.New("Block node is read-only")
	}
	dev, err := n.OpenDevice(ctx, "file")
	if err != nil {
		return nil, err
	}
	return named{CopyOnRead(dev), n.Name, n.Driver}, nil
}

// copyOnRead is a disk that copies what it reads from the images below into itself. A copy of old content must not
// overtake a write of new content, so copies and changes exclude each other.
type copyOnRead struct {
	block.Device
	mu sync.RWMutex // held for writing by copies, for reading by changes
}

// Unwrap implements block.Wrapper.
func (d *copyOnRead) Unwrap() block.Device { return d.Device }

// below reports whether part of a range comes from an image below.
func (d *copyOnRead) below(ctx context.Context, off, n int64) (bool, error) {
	found := false
	err := d.Device.Extents(ctx, off, n, func(e block.Extent) bool {
		found = e.Depth > 0 && e.Allocated
		return !found
	})
	return found, err
}

// ReadAt implements block.Device.
func (d *copyOnRead) ReadAt(ctx context.Context, p []byte, off int64) error {
	if found, err := d.below(ctx, off, int64(len(p))); err != nil || !found {
		if err != nil {
			return err
		}
		return d.Device.ReadAt(ctx, p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.Device.ReadAt(ctx, p, off); err != nil {
		return err
	}
	return d.copy(ctx, p, off)
}

// copy writes the parts of p that come from below. What reads as zeroes there becomes zeroes here, without data.
func (d *copyOnRead) copy(ctx context.Context, p []byte, off int64) error {
	var parts []block.Extent
	err := d.Device.Extents(ctx, off, int64(len(p)), func(e block.Extent) bool {
		if e.Depth > 0 && e.Allocated {
			parts = append(parts, e)
		}
		return true
	})
	for _, e := range parts {
		if err != nil {
			break
		}
		if e.Zero {
			err = d.Device.WriteZeroes(ctx, e.Off, e.Len, 0)
		} else {
			err = d.Device.WriteAt(ctx, p[e.Off-off:e.End()-off], e.Off, 0)
		}
	}
	return err
}

// WriteAt implements block.Device.
func (d *copyOnRead) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.Device.WriteAt(ctx, p, off, flags)
}

// WriteZeroes implements block.Device.
func (d *copyOnRead) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.Device.WriteZeroes(ctx, off, n, flags)
}

// Discard implements block.Device.
func (d *copyOnRead) Discard(ctx context.Context, off, n int64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.Device.Discard(ctx, off, n)
}

// WriteCompressed implements block.CompressedWriter where the disk behind does.
func (d *copyOnRead) WriteCompressed(ctx context.Context, p []byte, off int64) error {
	w, ok := d.Device.(block.CompressedWriter)
	if !ok {
		return block.ErrNoCompression
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return w.WriteCompressed(ctx, p, off)
}
