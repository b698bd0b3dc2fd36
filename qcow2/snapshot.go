package qcow2

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// Snapshot describes an internal snapshot: the disk as it was, kept in the same file.
type Snapshot struct {
	ID, Name    string // the ID is unique and usually a number
	Date        time.Time
	VMClock     time.Duration // how long the guest had run
	VMStateSize uint64        // bytes of machine state stored with it
	DiskSize    int64
	ICount      uint64 // instructions executed; NoICount when not recorded
}

// NoICount is the value of Snapshot.ICount when none was recorded.
const NoICount = format.NoICount

var (
	// ErrNoSnapshot is wrapped by errors about a snapshot that is not there.
	ErrNoSnapshot = errors.New("no such snapshot")
	// ErrSnapshotInUse is returned when a snapshot that is open as a device is to be deleted.
	ErrSnapshotInUse = errors.New("snapshot is in use")
	// ErrNoSnapshots is wrapped when the image cannot have snapshots, because its data is in another file.
	ErrNoSnapshots = errors.New("an image with an external data file has no internal snapshots")
	// ErrBitmapsStand is wrapped when dirty bitmaps stand in the way, which would not know what changed.
	ErrBitmapsStand = errors.New("the image has dirty bitmaps, which would not know what changed: remove them first")
	// ErrRefcountOverflow is wrapped when a snapshot needs more references to a cluster than the refcount width counts.
	ErrRefcountOverflow = meta.ErrRefcountOverflow
)

func publicSnapshot(s format.Snapshot) Snapshot {
	return Snapshot{
		ID: s.ID, Name: s.Name, Date: time.Unix(int64(s.DateSec), int64(s.DateNsec)), VMClock: time.Duration(s.VMClockNsec),
		VMStateSize: s.VMStateSize, DiskSize: int64(s.DiskSize &^ (format.SectorSize - 1)), ICount: s.ICount,
	}
}

// Snapshots lists the internal snapshots in the order of the table.
func (im *Image) Snapshots() ([]Snapshot, error) {
	t, err := im.enter()
	if err != nil {
		return nil, err
	}
	defer im.meta.Epochs.Exit(t)
	list, _, err := readSnapshots(im.file, im.hdr)
	if err != nil {
		return nil, err
	}
	out := make([]Snapshot, len(list))
	for i, s := range list {
		out[i] = publicSnapshot(s)
	}
	return out, nil
}

// findSnapshot returns the index of a snapshot by its ID or, where none has that ID, by its name.
func findSnapshot(list []format.Snapshot, idOrName string) (int, error) {
	for i := range list {
		if list[i].ID == idOrName {
			return i, nil
		}
	}
	for i := range list {
		if list[i].Name == idOrName {
			return i, nil
		}
	}
	return 0, fmt.Errorf("snapshot %q: %w", idOrName, ErrNoSnapshot)
}

// newSnapshotID returns the ID of the next snapshot: one more than the largest that is a number.
func newSnapshotID(list []format.Snapshot) string {
	var most uint64
	for i := range list {
		if n, err := strconv.ParseUint(list[i].ID, 10, 32); err == nil {
			most = max(most, n)
		}
	}
	return strconv.FormatUint(most+1, 10)
}

// CreateSnapshot keeps the disk as it is now under a name. It waits for the requests that run; those that come meanwhile
// wait for it. If it fails the image is as before. With an external data file there are no snapshots.
func (im *Image) CreateSnapshot(ctx context.Context, name string) (Snapshot, error) {
	now := time.Now()
	var made format.Snapshot
	err := im.changeSnapshots(ctx, func(list []format.Snapshot) error {
		made = format.Snapshot{
			ID: newSnapshotID(list), Name: name, DateSec: uint32(now.Unix()), DateNsec: uint32(now.Nanosecond()),
			DiskSize: uint64(im.Size()), ExtraSize: format.NewSnapshotExtraSize,
		}
		return im.createSnapshot(ctx, list, &made)
	})
	if err != nil {
		return Snapshot{}, fmt.Errorf("creating snapshot %q: %w", name, err)
	}
	return publicSnapshot(made), nil
}

// changeSnapshots runs fn, which gets the snapshot table, on the settled image, with the dirty bit set: the counts and the
// COPIED flags lie in different places and cannot change in one moment. In version 2, which has no such bit, fn's order
// alone makes sure that a crash leaves nothing worse than leaks and COPIED flags that are clear without need.
func (im *Image) changeSnapshots(ctx context.Context, fn func([]format.Snapshot) error) error {
	return im.exclusive(ctx, func() error {
		if im.lay.DataFile {
			return ErrNoSnapshots
		}
		list, _, err := readSnapshots(im.file, im.hdr)
		if err != nil {
			return err
		}
		if err := im.meta.MarkDirtyGated(); err != nil {
			return err
		}
		return im.finish(fn(list))
	})
}

// finish ends an operation that set the dirty bit: if it succeeded, or failed and left nothing behind, the bit goes.
// Otherwise it stays, for the next writable open to repair what is left.
func (im *Image) finish(err error) error {
	var half *halfDoneError
	if !errors.As(err, &half) {
		settleErr := im.meta.SettleGated()
		if settleErr == nil {
			return errors.Join(err, im.meta.MarkClean())
		}
		err = errors.Join(err, settleErr)
	}
	im.meta.KeepDirty()
	return err
}

// halfDoneError is the error of an operation that could not be taken back.
type halfDoneError struct{ err error }

func (e *halfDoneError) Error() string { return e.err.Error() }
func (e *halfDoneError) Unwrap() error { return e.err }

func halfDone(err error) error {
	if err == nil {
		return nil
	}
	return &halfDoneError{err}
}

func (im *Image) activeTree() (*meta.Tree, error) {
	return im.meta.LoadTree(im.hdr.L1Offset, int64(im.hdr.L1Size))
}

// createSnapshot adds s to the table. The counts and the copy of the L1 table are durable before the COPIED flags are
// cleared, and those are clear before the header names the new table: from then on both trees share everything.
func (im *Image) createSnapshot(ctx context.Context, list []format.Snapshot, s *format.Snapshot) (err error) {
	tree, err := im.activeTree()
	if err != nil {
		return err
	}
	var undo undoList
	defer func() { err = undo.unless(err == nil, err) }()
	l1 := tree.Encode(int64(im.hdr.L1Size))
	place, err := im.placeNew(&undo, l1)
	if err != nil {
		return err
	}
	s.L1Offset, s.L1Size = place, im.hdr.L1Size
	table, err := im.placeSnapshots(&undo, append(list[:len(list):len(list)], *s))
	if err != nil {
		return err
	}
	if err := tree.Share(ctx); err != nil {
		return err
	}
	undo.add(func() error { return im.unshare(tree) })
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	if err := tree.ClearCopied(ctx); err != nil {
		return err
	}
	if err := im.clearL1Copied(l1); err != nil {
		return err
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	if err := im.unmarkJournal(); err != nil {
		return err
	}
	return im.switchSnapshots(&undo, table, len(list)+1)
}

// clearL1Copied writes the active L1 table without COPIED flags.
func (im *Image) clearL1Copied(l1 []byte) error { return im.meta.WriteNow(l1, im.hdr.L1Offset) }

// unshare undoes Share, and makes the active tree's COPIED flags what they were.
func (im *Image) unshare(tree *meta.Tree) error {
	ctx := context.Background() // to undo something must not be cancelled
	if err := tree.Drop(ctx, meta.CauseNever); err != nil {
		return err
	}
	return im.fixActive(ctx)
}

// undoList is what has to be taken back if a later step fails, in reverse order.
type undoList []func() error

func (u *undoList) add(fn func() error) { *u = append(*u, fn) }

// forget is called at the point of no return.
func (u *undoList) forget() { *u = nil }

// unless takes everything back when ok is not set.
func (u undoList) unless(ok bool, err error) error {
	for i := len(u) - 1; i >= 0 && !ok; i-- {
		if undoErr := u[i](); undoErr != nil {
			return halfDone(fmt.Errorf("%w (and taking it back: %w)", err, undoErr))
		}
	}
	return err
}

// placeNew writes b to newly allocated clusters, which are given back by undo.
func (im *Image) placeNew(undo *undoList, b []byte) (format.HostOff, error) {
	if len(b) == 0 {
		return 0, nil
	}
	run, err := im.meta.Refs.AllocRow(im.lay.ClustersFor(int64(len(b))))
	if err != nil {
		return 0, err
	}
	undo.add(func() error { return im.meta.Refs.Release(run) })
	at := im.lay.Offset(run.First)
	whole := make([]byte, run.N<<im.lay.ClusterBits)
	copy(whole, b)
	return at, im.meta.WriteNow(whole, at)
}

// placeSnapshots writes a snapshot table to new clusters.
func (im *Image) placeSnapshots(undo *undoList, list []format.Snapshot) (format.HostOff, error) {
	b, err := format.MarshalSnapshots(list)
	if err != nil {
		return 0, err
	}
	return im.placeNew(undo, b)
}

// switchSnapshots has the header name the new snapshot table, which is durable with all it refers to, and lets go of the
// old one.
func (im *Image) switchSnapshots(undo *undoList, table format.HostOff, n int) error {
	old, err := im.snapshotTableRun()
	if err != nil {
		return err
	}
	b := format.EncodeSnapshotsPointer(uint32(n), table)
	err = im.writeField(format.OffSnapshots, b[:])
	undo.forget() // also after a failure: the header may say one or the other now, and what both need stays
	if err != nil {
		return halfDone(err)
	}
	if old.N > 0 {
		im.meta.Refs.Retire(meta.Retired{ClusterRun: old, Cause: meta.CauseOther})
	}
	return nil
}

// snapshotTableRun returns the clusters of the snapshot table that the header names.
func (im *Image) snapshotTableRun() (meta.ClusterRun, error) {
	_, size, err := readSnapshots(im.file, im.hdr)
	if err != nil || size == 0 {
		return meta.ClusterRun{}, err
	}
	return meta.ClustersOf(im.lay, im.hdr.SnapshotsOffset, size), nil
}

// DeleteSnapshot removes a snapshot, given by ID or name, and frees what it alone held.
func (im *Image) DeleteSnapshot(ctx context.Context, idOrName string) error {
	err := im.changeSnapshots(ctx, func(list []format.Snapshot) error {
		i, err := findSnapshot(list, idOrName)
		if err != nil {
			return err
		}
		return im.deleteSnapshot(ctx, list, i)
	})
	if err != nil {
		return fmt.Errorf("deleting snapshot: %w", err)
	}
	return nil
}

// deleteSnapshot takes the snapshot out of the table first; counts go down when nothing on the disk names it, and COPIED
// flags are set when the counts that allow it are durable.
func (im *Image) deleteSnapshot(ctx context.Context, list []format.Snapshot, i int) (err error) {
	gone := list[i]
	if im.views.inUse(gone.ID) {
		return fmt.Errorf("snapshot %q: %w", gone.Name, ErrSnapshotInUse)
	}
	tree, err := im.meta.LoadTree(gone.L1Offset, int64(gone.L1Size))
	if err != nil {
		return err
	}
	if err := im.replaceSnapshots(append(append([]format.Snapshot{}, list[:i]...), list[i+1:]...)); err != nil {
		return err
	}
	if err := tree.Drop(context.WithoutCancel(ctx), meta.CauseSnapshot); err != nil {
		return halfDone(err)
	}
	if gone.L1Size > 0 {
		run := meta.ClustersOf(im.lay, gone.L1Offset, int64(gone.L1Size)*8)
		im.meta.Refs.Retire(meta.Retired{Cause: meta.CauseSnapshot, ClusterRun: run})
	}
	return halfDone(im.fixActive(ctx))
}

// fixActive makes the counts durable and then the COPIED flags of the active tree say what they say.
func (im *Image) fixActive(ctx context.Context) error {
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	tree, err := im.activeTree()
	if err != nil {
		return err
	}
	if err := tree.FixCopied(context.WithoutCancel(ctx), im.hdr.L1Offset); err != nil {
		return err
	}
	return im.meta.SyncNow()
}

// replaceSnapshots writes a new snapshot table and has the header name it.
func (im *Image) replaceSnapshots(list []format.Snapshot) (err error) {
	var undo undoList
	defer func() { err = undo.unless(err == nil, err) }()
	table, err := im.placeSnapshots(&undo, list)
	if err != nil {
		return err
	}
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	return im.switchSnapshots(&undo, table, len(list))
}

// RenameSnapshot gives a snapshot, given by ID or name, another name.
func (im *Image) RenameSnapshot(ctx context.Context, idOrName, name string) error {
	err := im.changeSnapshots(ctx, func(list []format.Snapshot) error {
		i, err := findSnapshot(list, idOrName)
		if err != nil {
			return err
		}
		list[i].Name = name
		return im.replaceSnapshots(list)
	})
	if err != nil {
		return fmt.Errorf("renaming snapshot: %w", err)
	}
	return nil
}

// ApplySnapshot makes the disk what it was when the snapshot, given by ID or name, was taken, its size included. What the
// disk held is lost unless another snapshot keeps it. It fails where dirty bitmaps exist, which could not say what changed.
func (im *Image) ApplySnapshot(ctx context.Context, idOrName string) error {
	err := im.changeSnapshots(ctx, func(list []format.Snapshot) error {
		i, err := findSnapshot(list, idOrName)
		if err != nil {
			return err
		}
		if im.hdr.Bitmaps != nil {
			return ErrBitmapsStand
		}
		return im.applySnapshot(ctx, &list[i])
	})
	if err != nil {
		return fmt.Errorf("applying snapshot: %w", err)
	}
	return nil
}

// applySnapshot shares the snapshot's tree, writes a new active L1 table beside the old one, and switches the header with
// one write of size and L1 pointer; then the old tree goes.
func (im *Image) applySnapshot(ctx context.Context, s *format.Snapshot) (err error) {
	entries, err := im.lay.L1EntriesFor(int64(s.DiskSize))
	if err != nil {
		return err
	}
	old, err := im.activeTree()
	if err != nil {
		return err
	}
	tree, err := im.meta.LoadTree(s.L1Offset, int64(s.L1Size))
	if err != nil {
		return err
	}
	l1Size := max(entries, int64(s.L1Size))
	var undo undoList
	defer func() { err = undo.unless(err == nil, err) }()
	l1, err := im.placeNew(&undo, tree.Encode(l1Size))
	if err != nil {
		return err
	}
	if err := tree.Share(ctx); err != nil {
		return err
	}
	undo.add(func() error { return tree.Drop(context.Background(), meta.CauseNever) })
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	// The snapshot's own tables may carry flags from the days when they were the active ones.
	if err := tree.ClearCopied(ctx); err != nil {
		return err
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	if err := im.switchL1(&undo, s.DiskSize, uint32(l1Size), l1); err != nil {
		return err
	}
	return halfDone(old.Drop(context.WithoutCancel(ctx), meta.CauseSnapshot))
}

// switchL1 has the header name another L1 table and disk size, in one write within one sector, and lets go of the old
// table's clusters.
func (im *Image) switchL1(undo *undoList, size uint64, entries uint32, off format.HostOff) error {
	old := meta.ClustersOf(im.lay, im.hdr.L1Offset, int64(im.hdr.L1Size)*8)
	b := format.EncodeSizeAndL1(size, im.hdr.CryptMethod, entries, off)
	err := im.writeField(format.OffSize, b[:])
	undo.forget() // also after a failure, as in switchSnapshots
	if err != nil {
		return halfDone(err)
	}
	if old.N > 0 {
		im.meta.Refs.Retire(meta.Retired{ClusterRun: old, Cause: meta.CauseOther})
	}
	im.hdr.Size, im.hdr.L1Size, im.hdr.L1Offset = size, entries, off
	return nil
}
