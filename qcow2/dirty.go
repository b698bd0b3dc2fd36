package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/check"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// lazy reports whether refcounts may be written late.
func (im *Image) lazy() bool {
	if im.hdr.Version < format.Version3 || im.opts.Journal != nil {
		return false
	}
	return im.opts.LazyRefcounts.or(im.hdr.Compat&format.CompatLazyRefcounts != 0)
}

// writeDirty sets or clears the dirty bit on the disk. Version 2 has none.
func (im *Image) writeDirty(on bool) error {
	if im.hdr.Version < format.Version3 {
		return nil
	}
	if on {
		return im.changeIncompat(format.IncompatDirty, 0)
	}
	return im.changeIncompat(0, format.IncompatDirty)
}

// changeIncompat sets and clears incompatible feature bits in the header on the disk and syncs: one aligned field, which a
// power cut leaves old or new. The caller holds the metadata's gate: no flush runs.
func (im *Image) changeIncompat(set, clear uint64) error {
	im.headMu.Lock()
	defer im.headMu.Unlock()
	bits := im.incompat&^clear | set
	b := format.EncodeUint64(bits)
	if err := im.meta.WriteNow(b[:], format.OffIncompat); err != nil {
		return fmt.Errorf("changing features in the header: %w", err)
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	im.incompat = bits
	return nil
}

// reopenRepaired repairs an image whose dirty bit is set and makes an Image of what its header says then. Only a repair
// that verified its work clears the bit; where it could not, the image cannot be written.
func reopenRepaired(ctx context.Context, file storage.File, o Options) (*Image, error) {
	rep, err := check.Repair(ctx, file, check.RepairOptions{Mode: check.RepairAll})
	if err != nil {
		return nil, fmt.Errorf("repairing an image that was not closed cleanly: %w", err)
	}
	if o.OnRepair != nil {
		o.OnRepair(rep)
	}
	hdr, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	if hdr.Incompat&format.IncompatDirty != 0 {
		return nil, &ReadOnlyError{[]string{"it was not closed cleanly, and what is wrong with it could not all be repaired"}}
	}
	return newImage(file, hdr, o), nil
}

// repairOf is what users of an image in general are told of a repair.
func repairOf(r *RepairReport) block.Repair {
	out := block.Repair{Errors: r.CorruptionsFixed, Leaks: r.LeaksFixed, Notes: r.Notes}
	if r.After != nil {
		out.ErrorsLeft, out.LeaksLeft = r.After.Corruptions, r.After.Leaks
	}
	return out
}
