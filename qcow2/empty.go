package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/storage"
)

// Empty gives up everything that the image itself holds of its disk, which then reads as what stands below it, or as zeroes.
// Internal snapshots and the size stay, and so do dirty bitmaps: it is for an image whose content has been brought into its
// backing file (see image.Commit), so that nothing that the guest reads changes.
//
// No request runs meanwhile. A crash or an error leaves each L2 table in its place or gone, with the image sound: whoever
// made sure that both read the same has lost nothing. What then still takes up space is found when the image is opened next.
func (im *Image) Empty(ctx context.Context) error {
	err := im.exclusive(ctx, func() error {
		storage.Tell(im.file, storage.EventEmptyImagePrepare)
		if im.raw() {
			return fmt.Errorf("%w: it is a raw disk by itself", ErrDataFile)
		}
		if err := im.meta.MarkDirtyGated(); err != nil {
			return err
		}
		return im.finish(halfDone(im.empty(ctx)))
	})
	if err != nil {
		return fmt.Errorf("emptying the image: %w", err)
	}
	return nil
}

// empty clears the L1 table before anything that it named is given up.
func (im *Image) empty(ctx context.Context) error {
	if err := im.dropTables(ctx, 0); err != nil {
		return err
	}
	if im.lay.DataFile {
		if err := im.cutData(0); err != nil {
			return err
		}
	}
	return im.meta.TruncateFree()
}
