package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// Measurement says how large the file of a new image would become. The numbers are those of qemu-img measure.
type Measurement struct {
	Required       int64 // with the data that the disk has now
	FullyAllocated int64 // with data everywhere
	Bitmaps        int64 // for the bitmaps of the source, if HasBitmaps
	HasBitmaps     bool
}

// ErrMeasureTooBig is returned for disks that no image with these options can hold.
var ErrMeasureTooBig = errors.New("the disk is too large for the cluster size")

// Limits of the format that decide sizes.
const (
	maxL1Size          = 32 << 20
	tableEntry         = 8 // bytes of an entry of an L1, refcount or bitmap table
	bitmapDirectoryFix = 24
)

// MeasureQCOW2 tells how large a qcow2 image with the options would become: empty and of o.Size bytes if source is nil,
// else a copy of the source with the bitmaps of whole, which is the source or the image that the source is a snapshot of.
func MeasureQCOW2(ctx context.Context, source, whole block.Device, o qcow2.CreateOptions) (Measurement, error) {
	cs := o.ClusterSize
	size := o.Size
	if source != nil {
		size = source.Size()
	}
	if size < 0 || size > 1<<62 {
		return Measurement{}, ErrMeasureTooBig
	}
	virtual := roundUp(size, cs)
	perTable := cs / l2Entry(o)
	if divUp(virtual/cs, perTable) > maxL1Size/tableEntry {
		return Measurement{}, ErrMeasureTooBig
	}
	var m Measurement
	var data int64
	var err error
	switch {
	case source != nil && o.BackingFile != "": // nobody knows how much of it the backing file has
		data = virtual
	case source != nil:
		if data, err = dataClusters(ctx, source, cs); err != nil {
			return m, err
		}
	}
	if o.Preallocation == qcow2.PreallocFalloc || o.Preallocation == qcow2.PreallocFull {
		data = virtual
	}
	m.FullyAllocated = virtual + metadataSize(virtual, o)
	if o.Encrypt != nil && o.Encrypt.Format == qcow2.EncryptLUKS {
		keys, err := o.Encrypt.LUKS.Length()
		if err != nil {
			return m, err
		}
		m.FullyAllocated += roundUp(keys, cs)
	}
	m.Required = m.FullyAllocated - virtual + data
	if im, ok := block.As[*qcow2.Image](whole); ok && o.Version >= 3 && im.Version() >= 3 {
		m.HasBitmaps = true
		if m.Bitmaps, err = bitmapsSize(im, size, cs); err != nil {
			return m, err
		}
	}
	return m, nil
}

func l2Entry(o qcow2.CreateOptions) int64 {
	if o.ExtendedL2 {
		return 16
	}
	return 8
}

func divUp(n, d int64) int64   { return (n + d - 1) / d }
func roundUp(n, d int64) int64 { return divUp(n, d) * d }

// metadataSize is what header, tables and refcounts of a fully allocated image take.
func metadataSize(virtual int64, o qcow2.CreateOptions) int64 {
	cs, entry := o.ClusterSize, l2Entry(o)
	l2 := roundUp(virtual/cs, cs/entry) * entry
	l1 := roundUp(l2/cs, cs/tableEntry) * tableEntry
	n := cs + l2 + l1
	return n + refcountsSize((n+virtual)/cs, o)
}

// refcountsSize is what refcount blocks and table take that count so many clusters, and themselves.
func refcountsSize(clusters int64, o qcow2.CreateOptions) int64 {
	cs := o.ClusterSize
	perBlock := cs * 8 / int64(o.RefcountBits)
	var table, blocks int64
	for last := int64(-1); clusters+table+blocks != last; {
		last = clusters + table + blocks
		blocks = divUp(last, perBlock)
		table = divUp(blocks, cs/tableEntry)
	}
	return (blocks + table) * cs
}

// dataClusters returns how many bytes the clusters take in which a disk has data.
func dataClusters(ctx context.Context, dev block.Device, cs int64) (int64, error) {
	var sum, end int64 // end: up to where clusters have been counted
	err := dev.Extents(ctx, 0, dev.Size(), func(e block.Extent) bool {
		if !e.Zero && e.Data && e.Allocated {
			first, last := max(e.Off/cs*cs, end), roundUp(e.End(), cs)
			if last > first {
				sum, end = sum+last-first, last
			}
		}
		return true
	})
	if err != nil {
		return 0, fmt.Errorf("finding out what is allocated: %w", err)
	}
	return sum, nil
}

// bitmapsSize is what the consistent bitmaps of an image take in another.
func bitmapsSize(im *qcow2.Image, size, cs int64) (int64, error) {
	list, err := im.Bitmaps()
	if err != nil {
		return 0, err
	}
	var sum, directory int64
	for _, b := range list {
		if b.InUse {
			continue
		}
		bits := divUp(size, b.Granularity)
		clusters := divUp(divUp(bits, 8), cs)
		sum += clusters*cs + roundUp(clusters*tableEntry, cs)
		directory += roundUp(bitmapDirectoryFix+int64(len(b.Name)), 8)
	}
	return sum + roundUp(directory, cs), nil
}
