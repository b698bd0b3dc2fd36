package block

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/storage"
)

// Grow makes the disk longer, to whole sectors. What is added reads as zeroes, and the new length is durable when Grow
// returns. A disk that is a given part of a file, or a device, cannot grow.
func (r *Raw) Grow(_ context.Context, size int64) error {
	if r.o.ReadOnly {
		return fmt.Errorf("%q: %w", r.o.Name, ErrReadOnly)
	}
	if err := r.gate.enter(); err != nil {
		return err
	}
	defer r.gate.leave()
	r.headM.Lock() // one at a time
	defer r.headM.Unlock()
	switch {
	case size <= r.Size():
		return nil
	case r.o.Size != 0 || r.stat.Device:
		return fmt.Errorf("making %q longer: %w", r.o.Name, storage.ErrNotSupported)
	}
	whole, err := rawSize(size, RawOptions{})
	if err != nil {
		return err
	}
	if err := r.file.Truncate(r.o.Offset + whole); err != nil {
		return fmt.Errorf("making %q %d bytes long: %w", r.o.Name, whole, err)
	}
	if err := r.sync(); err != nil {
		return err
	}
	r.size.Store(whole)
	return nil
}
