package qcow2

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// snapshotViews are the snapshots that are open as devices beside the image.
type snapshotViews struct {
	mu   sync.Mutex
	open map[*Image]string // the view and its snapshot's ID
}

func (v *snapshotViews) inUse(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, o := range v.open {
		if o == id {
			return true
		}
	}
	return false
}

func (v *snapshotViews) add(view *Image, id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.open == nil {
		v.open = make(map[*Image]string)
	}
	v.open[view] = id
}

func (v *snapshotViews) remove(view *Image) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.open, view)
}

func (v *snapshotViews) all() []*Image {
	v.mu.Lock()
	defer v.mu.Unlock()
	var list []*Image
	for view := range v.open {
		list = append(list, view)
	}
	return list
}

// OpenSnapshot opens a snapshot, given by ID or name, as a read-only device of its own, which may be used beside the image
// and has to be closed; closing the image closes it. While it is open the snapshot cannot be deleted.
//
// Nothing that a snapshot refers to is ever changed in place, so the view needs no lock against the image.
func (im *Image) OpenSnapshot(_ context.Context, idOrName string) (*Image, error) {
	t, err := im.enter()
	if err != nil {
		return nil, err
	}
	defer im.meta.Epochs.Exit(t) // until the view is registered nobody deletes the snapshot: that needs the image alone
	list, _, err := readSnapshots(im.file, im.hdr)
	if err != nil {
		return nil, err
	}
	i, err := findSnapshot(list, idOrName)
	if err != nil {
		return nil, err
	}
	view, err := im.newView(&list[i])
	if err != nil {
		return nil, fmt.Errorf("opening snapshot %q: %w", list[i].Name, err)
	}
	im.views.add(view, list[i].ID)
	return view, nil
}

// newView makes an image of the snapshot's L1 table and size.
func (im *Image) newView(s *format.Snapshot) (*Image, error) {
	hdr := *im.hdr
	hdr.Size, hdr.L1Offset, hdr.L1Size = s.DiskSize, s.L1Offset, s.L1Size
	if uint64(s.L1Size)*8 > format.MaxL1Bytes || !im.lay.Aligned(s.L1Offset) {
		return nil, &CorruptError{Reason: fmt.Sprintf("L1 table of %d entries at host offset %#x", s.L1Size, s.L1Offset)}
	}
	if need, err := im.lay.L1EntriesFor(hdr.DiskSize()); err != nil || need > int64(s.L1Size) {
		return nil, orElse(err, errors.New("its L1 table is too small for its size"))
	}
	hdr.SnapshotCount, hdr.SnapshotsOffset, hdr.Bitmaps = 0, 0, nil
	o := im.opts
	o.Name, o.ReadOnly = im.name+"@"+s.Name, true
	view := newImage(keptFile{im.file}, &hdr, o)
	view.backing, view.parent, view.crypt = im.backing, im, im.crypt
	if err := view.openMeta(o); err != nil {
		return nil, err
	}
	view.noteInfo()
	return view, nil
}

// closeView ends a view: the files and the backing device are its parent's.
func (im *Image) closeView() error {
	if !im.meta.Epochs.Close() {
		return block.ErrClosed
	}
	im.parent.views.remove(im)
	im.meta.Map.Forget()
	return nil
}

// keptFile is a file that stays open when the image that uses it is closed.
type keptFile struct{ storage.File }

// ReadAtNowait reads what is in memory, if the file can tell.
func (f keptFile) ReadAtNowait(p []byte, off int64) (int, error) {
	if r, ok := f.File.(storage.NowaitReader); ok {
		return r.ReadAtNowait(p, off)
	}
	return 0, storage.ErrWouldBlock
}

// Close does nothing.
func (keptFile) Close() error { return nil }

// any reports whether a snapshot is open.
func (v *snapshotViews) any() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.open) > 0
}
