package block

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/storage"
)

// HostFiler is implemented by devices whose places on the host, as Extents tells them of depth 0, lie in a file at hand.
type HostFiler interface {
	// HostFile returns that file, nil where there is none. It stays the device's.
	HostFile() storage.File
}

// RangeCopier is implemented by devices that can take bytes from a file without seeing them.
type RangeCopier interface {
	// CopyFrom writes n bytes of src at srcOff to the disk at off, like WriteAt. With clone set it only shares their space.
	// storage.ErrNotSupported means that this cannot be done, not so, or not here; then a part may have been written, and
	// WriteAt does it.
	CopyFrom(ctx context.Context, off int64, src storage.File, srcOff, n int64, clone bool) error
}

// HostFile implements HostFiler.
func (r *Raw) HostFile() storage.File { return r.file }

// CopyFrom implements RangeCopier.
func (r *Raw) CopyFrom(_ context.Context, off int64, src storage.File, srcOff, n int64, clone bool) error {
	if r.o.GuardFormat != nil && off < storage.SectorSize {
		return storage.ErrNotSupported
	}
	if err := r.enterChange(off, n); err != nil {
		return err
	}
	defer r.gate.leave()
	if err := storage.CopyRange(r.file, r.o.Offset+off, src, srcOff, n, clone); err != nil {
		return fmt.Errorf("copying to %q at offset %d: %w", r.o.Name, off, err)
	}
	return nil
}
