package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// HostState is what a cluster of an image file is used for.
type HostState uint8

// The states.
const (
	HostFree       HostState = iota
	HostLeaked               // counted as used, and used by nobody
	HostHeader               // the header, encryption keys, L1 tables, the snapshot table
	HostRefcounts            // the refcount table and blocks
	HostMapping              // L2 tables
	HostBitmaps              // dirty bitmaps
	HostData                 // data of the disk
	HostCompressed           // compressed data of the disk
	HostReserved             // allocated, for what reads as zeroes
	HostSnapshot             // data and tables that only snapshots have
)

// maxHostLayout bounds the clusters of a HostLayout.
const maxHostLayout = 1 << 30

// HostLayout tells what each cluster of an image's file is used for.
type HostLayout struct {
	ClusterSize int64
	FileSize    int64
	States      []HostState // one for each cluster of the file
}

// HostLayout finds out what the file is used for. Requests wait meanwhile, as for a check.
func (im *Image) HostLayout(ctx context.Context) (*HostLayout, error) {
	var l *HostLayout
	err := im.meta.Still(func() (err error) {
		if im.broken != nil {
			return im.broken
		}
		l, err = im.hostLayout(ctx)
		return err
	})
	if errors.Is(err, meta.ErrClosed) {
		err = block.ErrClosed
	}
	return l, err
}

func (im *Image) hostLayout(ctx context.Context) (*HostLayout, error) {
	size, err := im.file.Size()
	if err != nil {
		return nil, fmt.Errorf("size of image file: %w", err)
	}
	l := &HostLayout{ClusterSize: im.lay.ClusterSize(), FileSize: size}
	n := im.lay.ClustersFor(size)
	if n > maxHostLayout {
		return nil, fmt.Errorf("the file has %d clusters, and at most %d are looked at", n, maxHostLayout)
	}
	l.States = make([]HostState, n)
	usage, err := im.meta.Usage()
	if err != nil {
		return nil, err
	}
	for i := range l.States {
		if usage.Has(format.ClusterIdx(i)) {
			l.States[i] = HostLeaked // until somebody turns up who uses it
		}
	}
	list, tableSize, err := readSnapshots(im.file, im.hdr)
	if err != nil {
		return nil, err
	}
	var inactive []meta.TableAt
	for i := range list {
		inactive = append(inactive, meta.TableAt{Off: list[i].L1Offset, Len: int64(list[i].L1Size)})
	}
	active := meta.TableAt{Off: im.hdr.L1Offset, Len: int64(im.hdr.L1Size)}
	err = im.meta.Paint(ctx, active, inactive, func(r meta.ClusterRun, kind meta.Painted, active bool) {
		state := HostSnapshot
		if active {
			state = [...]HostState{meta.PaintedTable: HostMapping, meta.PaintedData: HostData, meta.PaintedReserved: HostReserved,
				meta.PaintedCompressed: HostCompressed}[kind]
		}
		l.paint(r, state)
	})
	if err != nil {
		return nil, err
	}
	return l, im.paintStructures(l, append(inactive, active), tableSize)
}

// paint gives clusters a state, unless they have one: the disk's wins against that of snapshots.
func (l *HostLayout) paint(r meta.ClusterRun, state HostState) {
	for c := r.First; c < r.End() && int64(c) < int64(len(l.States)); c++ {
		if old := l.States[c]; old <= HostLeaked || old == HostSnapshot {
			l.States[c] = state
		}
	}
}

// paintStructures is for the metadata that no L1 table leads to.
func (im *Image) paintStructures(l *HostLayout, l1s []meta.TableAt, snapshotTable int64) error {
	lay := im.lay
	refs, err := im.meta.RefStructures()
	if err != nil {
		return err
	}
	for _, r := range refs {
		l.paint(r, HostRefcounts)
	}
	l.paint(meta.ClusterRun{First: 0, N: 1}, HostHeader)
	l.paint(meta.ClustersOf(lay, im.hdr.SnapshotsOffset, snapshotTable), HostHeader)
	for _, t := range l1s {
		l.paint(meta.ClustersOf(lay, t.Off, t.Len*8), HostHeader)
	}
	if x := im.hdr.Crypto; x != nil && x.Length < uint64(format.MaxHostOffset) {
		l.paint(meta.ClustersOf(lay, x.Offset, int64(x.Length)), HostHeader)
	}
	if b := im.hdr.Bitmaps; b != nil {
		l.paint(meta.ClustersOf(lay, b.DirectoryOffset, int64(b.DirectorySize)), HostBitmaps)
	}
	for _, m := range im.bm.list {
		l.paint(meta.ClustersOf(lay, m.TableOffset, int64(m.TableSize)*8), HostBitmaps)
		if im.loadTable(m) != nil {
			continue // what it leads to is nobody's, then
		}
		for _, e := range m.table {
			if e.Offset() != 0 {
				l.paint(meta.ClusterRun{First: lay.Cluster(e.Offset()), N: 1}, HostBitmaps)
			}
		}
	}
	return nil
}
