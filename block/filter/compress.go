package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

func init() {
	block.RegisterDriver(block.Driver{Name: "compress", Filter: true, OpenDevice: openCompress})
	block.RegisterDriver(block.Driver{
		Name: "preallocate", Filter: true,
		OpenFile: func(ctx context.Context, n *block.Node) (storage.File, error) {
			if err := takePreallocate(n); err != nil {
				return nil, err
			}
			return n.OpenFile(ctx, "file")
		},
		OpenDevice: func(ctx context.Context, n *block.Node) (block.Device, error) {
			if err := takePreallocate(n); err != nil {
				return nil, err
			}
			dev, err := n.OpenDevice(ctx, "file")
			if err != nil {
				return nil, err
			}
			return named{dev, n.Name, n.Driver}, nil
		},
	})
}

// takePreallocate takes what says how space is to be had ahead. The engine sees to that by itself.
func takePreallocate(n *block.Node) error {
	align, err := n.TakeSize("prealloc-align", 1<<20)
	if err != nil {
		return err
	}
	size, err := n.TakeSize("prealloc-size", 128<<20)
	switch {
	case err != nil:
		return err
	case align <= 0 || align%storage.SectorSize != 0:
		return fmt.Errorf("prealloc-align parameter of preallocate filter is not aligned to %d", storage.SectorSize)
	case size%storage.SectorSize != 0:
		return fmt.Errorf("prealloc-size parameter of preallocate filter is not aligned to %d", storage.SectorSize)
	}
	return nil
}

// clustered is an image that tells the unit of its mapping.
type clustered interface{ ClusterSize() int64 }

// compressing is a disk that stores compressed what is written to it.
type compressing struct {
	block.Device
	w    block.CompressedWriter
	unit int64
	mu   sync.RWMutex // held for writing by changes of parts of units
}

func openCompress(ctx context.Context, n *block.Node) (block.Device, error) {
	dev, err := n.OpenDevice(ctx, "file")
	if err != nil {
		return nil, err
	}
	w, ok := dev.(block.CompressedWriter)
	c, sized := block.As[clustered](dev)
	if !ok || !sized {
		err := fmt.Errorf("Compression is not supported for underlying format: %s", dev.Info().Format)
		return nil, errors.Join(err, dev.Close())
	}
	return named{&compressing{Device: dev, w: w, unit: c.ClusterSize()}, n.Name, n.Driver}, nil
}

// WriteAt implements block.Device.
func (d *compressing) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	if err := block.CheckRange(off, int64(len(p)), d.Size()); err != nil || len(p) == 0 {
		return err
	}
	start := off / d.unit * d.unit
	end := min((off+int64(len(p))+d.unit-1)/d.unit*d.unit, d.Size())
	if err := d.store(ctx, p, off, start, end); err != nil {
		return err
	}
	if flags&block.WriteFUA != 0 {
		return d.Flush(ctx)
	}
	return nil
}

func (d *compressing) store(ctx context.Context, p []byte, off, start, end int64) error {
	if start == off && end == off+int64(len(p)) {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return d.w.WriteCompressed(ctx, p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	whole := make([]byte, end-start)
	if err := d.Device.ReadAt(ctx, whole, start); err != nil {
		return err
	}
	copy(whole[off-start:], p)
	return d.w.WriteCompressed(ctx, whole, start)
}

// WriteZeroes implements block.Device.
func (d *compressing) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.Device.WriteZeroes(ctx, off, n, flags)
}
