package block

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/storage"
)

// ErrFixedSize is wrapped when the size of a disk is not its own to change.
var ErrFixedSize = errors.New("the size of this disk cannot be changed")

// Resize implements Resizer: it makes the file of the disk longer or shorter, to whole sectors. What is added reads as
// zeroes, unless the file was longer than the disk: then it is what the file holds there. A device gets its size elsewhere;
// the disk takes as much of it as there is now. Requests wait meanwhile.
func (r *Raw) Resize(_ context.Context, size int64) error {
	if r.o.ReadOnly {
		return fmt.Errorf("resizing %q: %w", r.o.Name, ErrReadOnly)
	}
	if r.o.Size != 0 {
		return fmt.Errorf("resizing %q: %w: it is a part of a file that was given with its size", r.o.Name, ErrFixedSize)
	}
	const largest = 1<<63 - storage.SectorSize
	if size < 0 || size > largest-r.o.Offset {
		return fmt.Errorf("resizing %q: %w: size %d", r.o.Name, ErrOutOfRange, size)
	}
	size = (size + storage.SectorSize - 1) &^ (storage.SectorSize - 1)
	if err := r.gate.alone(func() error { return r.resize(size) }); err != nil {
		return fmt.Errorf("resizing %q: %w", r.o.Name, err)
	}
	return nil
}

// resize is Resize while nobody else is in. The disk follows the file: an error of the sync leaves it as long as the file.
func (r *Raw) resize(size int64) error {
	old := r.size.Load()
	have, err := r.file.Size()
	if err != nil {
		return fmt.Errorf("asking for the length of the file: %w", err)
	}
	end := r.o.Offset + size
	switch {
	case r.stat.Device && end > have:
		return fmt.Errorf("%w: the device has %d bytes", ErrFixedSize, have)
	case r.stat.Device, size == old:
	case size > old && have < end, size < old:
		if err := r.file.Truncate(end); err != nil {
			return fmt.Errorf("making the file %d bytes long: %w", end, err)
		}
	}
	r.size.Store(size)
	return r.sync()
}

var _ Resizer = (*Raw)(nil)
