package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// exclusive runs fn while the image is fn's alone: the requests that were running have ended, new ones wait, everything is
// on the disk, and nothing else changes the file. Afterwards, whether fn failed or not, memory is made anew from what the
// file then says: the header, the mapping and the refcounts.
//
// fn writes with im.meta.WriteNow and im.meta.SyncNow, allocates and frees with im.meta.Refs (Alloc; Release; Retire), and
// makes counts durable with im.meta.SettleGated. It leaves im.hdr alone: header fields are written with writeField.
func (im *Image) exclusive(ctx context.Context, fn func() error) error {
	if im.readOnly {
		return block.ErrReadOnly
	}
	if err := im.meta.Corrupt(); err != nil {
		return err
	}
	err := im.meta.Exclusive(ctx, func() error {
		if err := im.mend(); err != nil {
			return err
		}
		im.wholes++
		err := fn()
		if c := ownCorruption(err); c != nil {
			im.meta.MarkCorruptGated(c)
		}
		if loadErr := im.reload(); loadErr != nil {
			im.broken = fmt.Errorf("reading the metadata again: %w", loadErr)
			return errors.Join(err, im.broken)
		}
		return err
	})
	if errors.Is(err, meta.ErrClosed) {
		return block.ErrClosed
	}
	return err
}

// mend reads the metadata again where exclusive could not: then it is read when the image is next used, since the storage
// may work again. It runs inside meta.Exclusive.
func (im *Image) mend() error {
	if im.broken == nil {
		return nil
	}
	if err := im.reload(); err != nil {
		im.broken = fmt.Errorf("reading the metadata again: %w", err)
		return im.broken
	}
	im.broken = nil
	return nil
}

// reload takes everything from the file again.
func (im *Image) reload() error {
	hdr, err := readHeader(im.file)
	if err != nil {
		return err
	}
	old, oldLay := im.hdr, im.lay
	im.hdr, im.lay = hdr, hdr.Layout()
	c, err := im.metaConfig(im.opts)
	if err == nil {
		err = im.meta.Reload(c)
	}
	if err != nil {
		im.hdr, im.lay = old, oldLay
		return err
	}
	im.clusters.clear()
	im.size.Store(hdr.DiskSize())
	im.incompat = hdr.Incompat
	im.noteInfo()
	im.journalReloaded()
	return im.bitmapsReloaded()
}

// writeField writes bytes of the header that lie in one sector, so that a power cut leaves the old ones or the new, and
// syncs them. What they point to is durable already.
func (im *Image) writeField(off int64, b []byte) error {
	if err := im.meta.WriteNow(b, format.HostOff(off)); err != nil {
		return fmt.Errorf("writing header: %w", err)
	}
	return im.meta.SyncNow()
}
