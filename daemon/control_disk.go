package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// disk is an export or a device, as the control API found it at one moment.
type disk struct {
	name   string
	others []string // further names by which it may be asked for
	status DiskStatus
	dev    block.Device // the image; nil if it could not be opened
	served block.Device // what is served of it
	// What depends on who serves it:
	uris        []string
	description string
	bitmaps     []string // those that clients can read
	clients     []ClientStatus
	// resize, if not nil, is how the size is changed in place of asking the image alone.
	resize func(ctx context.Context, r ResizeRequest) error
	note   string // what is to be done after a resize
	// apply runs fn, which puts another content in place of the disk's, while nobody uses it; it refuses if somebody does.
	apply func(ctx context.Context, fn func() error) error
}

// key tells the disk apart from all others.
func (d *disk) key() string { return d.status.HBA + "/" + d.name }

// statusError is an error with the status that HTTP has for it.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func refusef(status int, format string, args ...any) error {
	return &statusError{status, fmt.Errorf(format, args...)}
}

func conflictf(format string, args ...any) error {
	return refusef(http.StatusConflict, format, args...)
}
func invalidf(format string, args ...any) error {
	return refusef(http.StatusBadRequest, format, args...)
}

// statusOf finds the status for an error.
func statusOf(err error) int {
	var s *statusError
	var inUse *qcow2.BitmapInUseError
	switch {
	case errors.As(err, &s):
		return s.status
	case errors.Is(err, qcow2.ErrNoSnapshot), errors.Is(err, qcow2.ErrNoBitmap):
		return http.StatusNotFound
	case errors.Is(err, qcow2.ErrSnapshotInUse), errors.Is(err, qcow2.ErrBitmapsStand), errors.As(err, &inUse),
		errors.Is(err, block.ErrReadOnly), errors.Is(err, block.ErrClosed), errors.Is(err, qcow2.ErrWouldShrink),
		errors.Is(err, block.ErrFixedSize):
		return http.StatusConflict
	case errors.Is(err, qcow2.ErrInvalidOption), errors.Is(err, errors.ErrUnsupported), errors.Is(err, qcow2.ErrNoSnapshots):
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// isServed refuses a disk whose image could not be opened.
func (d *disk) isServed() error {
	if d.dev == nil {
		return conflictf("%q is not being served: %s", d.name, d.status.Error)
	}
	return nil
}

// image returns the QCOW2 image of the disk.
func (d *disk) image() (*qcow2.Image, error) {
	if err := d.isServed(); err != nil {
		return nil, err
	}
	im, ok := block.As[*qcow2.Image](d.dev)
	if !ok {
		return nil, invalidf("%q is an image in the format %s, which has no such thing: convert it to qcow2 first", d.name,
			d.dev.Info().Format)
	}
	return im, nil
}

// writable is image for what changes it.
func (d *disk) writable() (*qcow2.Image, error) {
	im, err := d.image()
	if err == nil && im.Info().ReadOnly {
		err = conflictf("%q is served read-only: nothing of its image %q can be changed here", d.name, d.status.Image)
	}
	return im, err
}

// fill completes the status with what the image itself knows. busy is what somebody does to it as a whole.
func (d *disk) fill(busy string) {
	s := &d.status
	s.Operation = busy
	if d.dev == nil {
		return
	}
	info := d.served.Info()
	s.State, s.Format, s.Size = StateServing, info.Format, d.served.Size()
	s.ReadOnly = s.ReadOnly || info.ReadOnly
	im, ok := block.As[*qcow2.Image](d.dev)
	if !ok || busy != "" {
		return
	}
	if u, err := im.Usage(); err == nil {
		s.CacheBytes, s.ClusterCacheBytes, s.Unflushed, s.Dirty = u.CacheBytes, u.ClusterCacheBytes, u.Unflushed, u.Dirty
		if u.Corrupt != nil {
			s.Corrupt = u.Corrupt.Error()
		}
	}
	if list, err := im.Snapshots(); err == nil {
		s.SnapshotCount = len(list)
	}
	if list, err := im.Bitmaps(); err == nil {
		s.BitmapCount = len(list)
	}
}

// details returns all that is known of the disk.
func (d *disk) details(busy string) (DiskDetails, error) {
	d.fill(busy)
	out := DiskDetails{
		DiskStatus: d.status, URIs: d.uris, Description: d.description, Connections: d.clients,
		Snapshots: []SnapshotStatus{}, Bitmaps: []BitmapStatus{},
	}
	if out.Connections == nil {
		out.Connections = []ClientStatus{}
	}
	if _, ok := block.As[*qcow2.Image](d.dev); !ok || busy != "" {
		return out, nil
	}
	var err, err2 error
	out.Snapshots, err = d.snapshotList()
	out.Bitmaps, err2 = d.bitmapList()
	return out, errors.Join(err, err2)
}

func (d *disk) snapshotList() ([]SnapshotStatus, error) {
	im, err := d.image()
	if err != nil {
		return nil, err
	}
	list, err := im.Snapshots()
	if err != nil {
		return nil, err
	}
	out := make([]SnapshotStatus, len(list))
	for i, s := range list {
		out[i] = snapshotStatus(s)
	}
	return out, nil
}

func snapshotStatus(s qcow2.Snapshot) SnapshotStatus {
	return SnapshotStatus{ID: s.ID, Name: s.Name, Date: s.Date.UTC().Truncate(time.Millisecond), DiskSize: s.DiskSize, VMStateSize: s.VMStateSize}
}

func (d *disk) bitmapList() ([]BitmapStatus, error) {
	im, err := d.image()
	if err != nil {
		return nil, err
	}
	list, err := im.Bitmaps()
	if err != nil {
		return nil, err
	}
	out := make([]BitmapStatus, len(list))
	for i, b := range list {
		out[i] = BitmapStatus{
			Name: b.Name, Granularity: b.Granularity, Enabled: b.Auto, Inconsistent: b.InUse, Served: slices.Contains(d.bitmaps, b.Name),
		}
	}
	return out, nil
}

// maxSnapshotName is how long a snapshot's name may be for the stock tools to know it by.
const maxSnapshotName = 255

func checkSnapshotName(name string) error {
	switch {
	case name == "":
		return invalidf("a snapshot needs a name")
	case len(name) > maxSnapshotName:
		return invalidf("a snapshot's name has at most %d bytes, and this one has %d", maxSnapshotName, len(name))
	case strings.ContainsRune(name, 0):
		return invalidf("a snapshot's name has no zero byte")
	}
	return nil
}

func (d *disk) createSnapshot(ctx context.Context, r NameRequest) (SnapshotStatus, error) {
	if err := checkSnapshotName(r.Name); err != nil {
		return SnapshotStatus{}, err
	}
	im, err := d.writable()
	if err != nil {
		return SnapshotStatus{}, err
	}
	if err := d.nameFree(im, r.Name); err != nil {
		return SnapshotStatus{}, err
	}
	s, err := im.CreateSnapshot(ctx, r.Name)
	if err != nil {
		return SnapshotStatus{}, err
	}
	return snapshotStatus(s), nil
}

// nameFree refuses a name that a snapshot has: the format allows several of one name, which nobody could tell apart.
func (d *disk) nameFree(im *qcow2.Image, name string) error {
	list, err := im.Snapshots()
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(s qcow2.Snapshot) bool { return s.Name == name }) {
		return conflictf("%q has a snapshot %q: choose another name, or delete that one", d.name, name)
	}
	return nil
}

// snapshot finds the snapshot that is meant and may be changed: the one of that name, or the one of that ID. One whose name is
// another's ID is told apart by neither.
func (d *disk) snapshot(idOrName string) (*qcow2.Image, qcow2.Snapshot, error) {
	im, err := d.writable()
	if err != nil {
		return nil, qcow2.Snapshot{}, err
	}
	list, err := im.Snapshots()
	if err != nil {
		return nil, qcow2.Snapshot{}, err
	}
	var found []qcow2.Snapshot
	for _, s := range list {
		if s.Name == idOrName || s.ID == idOrName {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return nil, qcow2.Snapshot{}, refusef(http.StatusNotFound, "%q has no snapshot %q ('drover ctl snapshot list' shows those it has)",
			d.name, idOrName)
	case 1:
		return im, found[0], nil
	}
	return nil, qcow2.Snapshot{}, conflictf(
		"%q has %d snapshots that %q may mean: rename them with 'drover snapshot' when the image is not served", d.name, len(found), idOrName)
}

func (d *disk) deleteSnapshot(ctx context.Context, idOrName string) error {
	im, s, err := d.snapshot(idOrName)
	if err != nil {
		return err
	}
	err = im.DeleteSnapshot(ctx, s.ID)
	if errors.Is(err, qcow2.ErrSnapshotInUse) {
		return conflictf("snapshot %q of %q has clients: it can be deleted when they are gone", s.Name, d.name)
	}
	return err
}

func (d *disk) renameSnapshot(ctx context.Context, idOrName string, r NameRequest) error {
	if err := checkSnapshotName(r.Name); err != nil {
		return err
	}
	im, s, err := d.snapshot(idOrName)
	if err != nil {
		return err
	}
	if s.Name == r.Name {
		return nil
	}
	if err := d.nameFree(im, r.Name); err != nil {
		return err
	}
	return im.RenameSnapshot(ctx, s.ID, r.Name)
}

func (d *disk) applySnapshot(ctx context.Context, idOrName string) error {
	im, s, err := d.snapshot(idOrName)
	if err != nil {
		return err
	}
	return d.apply(ctx, func() error { return im.ApplySnapshot(ctx, s.ID) })
}

// preallocations are the modes by QEMU's names.
var preallocations = map[string]qcow2.Preallocation{
	"": qcow2.PreallocOff, "off": qcow2.PreallocOff, "metadata": qcow2.PreallocMetadata,
	"falloc": qcow2.PreallocFalloc, "full": qcow2.PreallocFull,
}

func (d *disk) changeSize(ctx context.Context, r ResizeRequest) (ResizeReply, error) {
	if err := d.isServed(); err != nil {
		return ResizeReply{}, err
	}
	old := d.dev.Size()
	switch {
	case r.Size <= 0 || r.Size%512 != 0:
		return ResizeReply{}, invalidf("%d is not a size: a disk has a positive number of bytes that is a multiple of 512", r.Size)
	case d.status.Snapshot != "":
		return ResizeReply{}, conflictf("%q is snapshot %q of its image: snapshots keep their size", d.name, d.status.Snapshot)
	case d.served.Info().ReadOnly:
		return ResizeReply{}, conflictf("%q is served read-only: its size cannot be changed here", d.name)
	case r.Size < old && !r.Shrink:
		return ResizeReply{}, conflictf("%q has %d bytes: shrinking it to %d deletes what is behind its new end, and was not asked for (--shrink)",
			d.name, old, r.Size)
	}
	resize := d.resize
	if resize == nil {
		resize = func(ctx context.Context, r ResizeRequest) error { return resizeDevice(ctx, d.dev, r) }
	}
	if err := resize(ctx, r); err != nil {
		return ResizeReply{}, err
	}
	return ResizeReply{OldSize: old, Size: d.dev.Size(), Note: d.note}, nil
}

// resizeDevice gives an open image another size.
func resizeDevice(ctx context.Context, dev block.Device, r ResizeRequest) error {
	mode, ok := preallocations[r.Preallocation]
	if !ok {
		return invalidf("preallocation %q is none of off, metadata, falloc and full", r.Preallocation)
	}
	if im, ok := block.As[*qcow2.Image](dev); ok {
		return im.Resize(ctx, r.Size, qcow2.ResizeOptions{Shrink: r.Shrink, Preallocation: mode})
	}
	raw, ok := block.As[block.Resizer](dev)
	if !ok {
		return invalidf("images in the format %s keep their size", dev.Info().Format)
	}
	if mode != qcow2.PreallocOff {
		return invalidf("a raw disk that is being served grows without preallocation")
	}
	return raw.Resize(ctx, r.Size)
}

func (d *disk) addBitmap(ctx context.Context, r BitmapRequest) error {
	im, err := d.writable()
	if err != nil {
		return err
	}
	return im.AddBitmap(ctx, r.Name, qcow2.BitmapOptions{Granularity: r.Granularity, Disabled: r.Disabled})
}

// bitmapOf refuses a bitmap that the image does not have.
func (d *disk) bitmapOf(name string) (*qcow2.Image, error) {
	im, err := d.writable()
	if err != nil {
		return nil, err
	}
	list, err := im.Bitmaps()
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(list, func(b qcow2.BitmapInfo) bool { return b.Name == name }) {
		return nil, refusef(http.StatusNotFound, "%q has no dirty bitmap %q ('drover ctl bitmap list' shows those it has)", d.name, name)
	}
	return im, nil
}

func (d *disk) removeBitmap(ctx context.Context, name string) error {
	im, err := d.bitmapOf(name)
	if err != nil {
		return err
	}
	if slices.Contains(d.bitmaps, name) {
		return conflictf("bitmap %q of %q can be read by clients: it cannot be removed while it is", name, d.name)
	}
	return im.RemoveBitmap(ctx, name)
}

func (d *disk) changeBitmap(ctx context.Context, name string, a BitmapAction) error {
	im, err := d.bitmapOf(name)
	if err != nil {
		return err
	}
	switch a.Action {
	case "clear":
		return im.ClearBitmap(ctx, name)
	case "enable":
		return im.EnableBitmap(ctx, name)
	case "disable":
		return im.DisableBitmap(ctx, name)
	case "merge":
		if _, err := d.bitmapOf(a.Source); err != nil {
			return err
		}
		return im.MergeBitmap(ctx, name, nil, a.Source)
	}
	return invalidf("%q is none of clear, enable, disable and merge", a.Action)
}

func (d *disk) flush(ctx context.Context) error {
	if err := d.isServed(); err != nil {
		return err
	}
	return d.dev.Flush(ctx)
}

// maxFindings bounds what a check tells.
const maxFindings = 100

func (d *disk) check(ctx context.Context) (CheckReply, error) {
	im, err := d.image()
	if err != nil {
		return CheckReply{}, err
	}
	r, err := im.Check(ctx, qcow2.CheckOptions{MaxFindings: maxFindings})
	if err != nil {
		return CheckReply{}, err
	}
	out := CheckReply{
		CheckErrors: r.CheckErrors, Corruptions: r.Corruptions, Leaks: r.Leaks, ImageEndOffset: r.ImageEndOffset,
		Total: r.TotalClusters, Allocated: r.AllocatedClusters, Fragmented: r.FragmentedClusters, Compressed: r.CompressedClusters,
		Findings: []string{}, Dropped: r.FindingsDropped,
	}
	for _, f := range r.Findings {
		out.Findings = append(out.Findings, f.Message)
	}
	return out, nil
}
