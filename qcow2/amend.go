package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// AmendOptions are the properties of an image that Amend changes. Those that are nil or 0 stay as they are.
type AmendOptions struct {
	Version       int // 2 (compat 0.10) or 3 (compat 1.1)
	LazyRefcounts *bool
	RefcountBits  int    // a power of two from 1 to 64
	Size          *int64 // of the disk; a smaller one cuts off
	DataFile      *string
	DataFileRaw   *bool // only false changes anything
	// BackingFile and BackingFormat are refused when they are not what the image says: see ChangeBacking.
	BackingFile, BackingFormat *string
	// Progress is told how far the longer changes are. It must not call the image.
	Progress func(done, total int64)
}

// OptionError is what is wrong with a caller's options, in QEMU's words. It is an ErrInvalidOption.
type OptionError struct{ Msg string }

func (e *OptionError) Error() string { return e.Msg }

// Is makes every OptionError an ErrInvalidOption.
func (e *OptionError) Is(target error) bool { return target == ErrInvalidOption }

func optionErrorf(f string, args ...any) error { return &OptionError{fmt.Sprintf(f, args...)} }

// Amend changes properties of the image in place. What cannot be changed is refused before anything is: the error wraps
// ErrInvalidOption. The changes are made one after the other in this order: version 3, refcount width, data file, lazy
// refcounts, size, version 2; when one fails those before it stay. No request runs meanwhile. A crash or an error leaves a
// valid image, in which each of the changes is made or not.
//
// Version 2 has no feature bits, no header fields behind those of its own and no zero clusters: the first two are dropped,
// unknown ones too, and zero clusters, those of snapshots too, are made unallocated, or filled where there is a backing
// file. An image with dirty bitmaps, an external data file, extended L2 entries, clusters compressed by zstd, or with
// snapshots that version 2 cannot describe does not become one.
func (im *Image) Amend(ctx context.Context, o AmendOptions) error {
	if o.Progress == nil {
		o.Progress = func(_, _ int64) {}
	}
	err := im.exclusive(ctx, func() error {
		a := amendment{im: im, o: o}
		if err := a.check(); err != nil {
			return err
		}
		return im.finish(a.run(ctx))
	})
	if err != nil {
		return fmt.Errorf("amending: %w", err)
	}
	return nil
}

// amendment is one run of Amend.
type amendment struct {
	im *Image
	o  AmendOptions
}

// version returns the version that the image is to have.
func (a amendment) version() uint32 {
	if a.o.Version != 0 {
		return uint32(a.o.Version)
	}
	return a.im.hdr.Version
}

// check refuses what cannot be.
func (a amendment) check() error {
	h, o := a.im.hdr, a.o
	differs := func(p *string, s string) bool { return p != nil && *p != s }
	width := o.RefcountBits
	switch {
	case o.Version != 0 && o.Version != 2 && o.Version != 3:
		return optionErrorf("Unknown compatibility level %d", o.Version)
	case differs(o.BackingFile, h.BackingFile), differs(o.BackingFormat, h.BackingFormat):
		return optionErrorf("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
	case width < 0 || width > 64 || width&(width-1) != 0:
		return optionErrorf("Refcount width must be a power of two and may not exceed 64 bits")
	case width != 0 && width != 16 && a.version() < format.Version3:
		return optionErrorf("Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)")
	case o.LazyRefcounts != nil && *o.LazyRefcounts && h.Compat&format.CompatLazyRefcounts == 0 && a.version() < format.Version3:
		return optionErrorf("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)")
	case o.DataFile != nil && !a.im.lay.DataFile:
		return optionErrorf("data-file can only be set for images that use an external data file")
	case o.DataFileRaw != nil && *o.DataFileRaw && h.Autoclear&format.AutoclearRawData == 0:
		return optionErrorf("data-file-raw cannot be set on existing images")
	}
	if a.version() < h.Version {
		return a.checkDowngrade()
	}
	return nil
}

// checkDowngrade refuses what version 2 cannot say, as far as the header and the snapshot table tell.
func (a amendment) checkDowngrade() error {
	h := a.im.hdr
	width := a.o.RefcountBits
	if width == 0 {
		width = 1 << h.RefcountOrder
	}
	const goes = format.IncompatDirty | format.IncompatCompression
	switch {
	case width != 16:
		return optionErrorf("compat=0.10 requires refcount_bits=16")
	case a.im.lay.DataFile:
		return optionErrorf("Cannot downgrade an image with a data file")
	case h.Incompat&^goes != 0:
		return optionErrorf("Cannot downgrade an image with incompatible features %#x set", h.Incompat&^goes)
	case h.Bitmaps != nil:
		return optionErrorf("Cannot downgrade an image with dirty bitmaps: remove them first")
	}
	list, _, err := readSnapshots(a.im.file, h)
	if err != nil {
		return err
	}
	size := h.DiskSize()
	if a.o.Size != nil {
		size = *a.o.Size
	}
	for i := range list {
		if int64(list[i].DiskSize) != size || list[i].VMStateSize > 1<<32-1 {
			return optionErrorf("Internal snapshots prevent downgrade of image")
		}
	}
	return nil
}

func (a amendment) run(ctx context.Context) error {
	im, o := a.im, a.o
	// As for a resize: what a crash or a failure leaves of space that nobody uses is found when the image is opened next.
	if err := im.meta.MarkDirtyGated(); err != nil {
		return err
	}
	if a.version() > im.hdr.Version {
		if err := a.upgrade(); err != nil {
			return err
		}
		if err := im.meta.MarkDirtyGated(); err != nil { // which version 2 could not be
			return err
		}
	}
	if o.RefcountBits != 0 && o.RefcountBits != 1<<im.hdr.RefcountOrder {
		if err := a.changeWidth(ctx); err != nil {
			return err
		}
	}
	if err := a.changeFields(); err != nil {
		return err
	}
	if o.Size != nil {
		if err := im.resize(ctx, *o.Size, ResizeOptions{Shrink: true}); err != nil {
			return err
		}
	}
	if a.version() < im.hdr.Version {
		return a.downgrade(ctx)
	}
	return nil
}

// change changes the header and takes it into memory, also if it failed: the file may have the new header all the same, and
// what is written to it next must go by that.
func (a amendment) change(fn func(*format.Header) error) error {
	err := a.im.changeHeader(fn)
	if loadErr := a.im.reload(); loadErr != nil {
		return halfDone(errors.Join(err, loadErr))
	}
	return err
}

// upgrade makes version 3 of an image of version 2. Its snapshots must say how large their disks are first.
func (a amendment) upgrade() error {
	im := a.im
	list, _, err := readSnapshots(im.file, im.hdr)
	if err != nil {
		return err
	}
	silent := false
	for i := range list {
		if list[i].ExtraSize < format.NewSnapshotExtraSize {
			silent = true
			list[i].ExtraSize = format.NewSnapshotExtraSize
		}
	}
	if silent {
		if err := im.replaceSnapshots(list); err != nil {
			return err
		}
		if err := im.meta.SettleGated(); err != nil {
			return halfDone(err)
		}
	}
	return a.change(func(h *format.Header) error {
		h.Version = format.Version3
		addFeatureNames(h)
		return nil
	})
}

// changeWidth makes refcounts of another width. The header is switched within sector 0, by one write.
func (a amendment) changeWidth(ctx context.Context) error {
	im := a.im
	order := uint8(bits.Len(uint(a.o.RefcountBits)) - 1)
	w, err := im.meta.NewRewidth(order, a.o.Progress)
	if err != nil {
		var wide *meta.RewidthError
		if errors.As(err, &wide) {
			return &OptionError{wide.Error()}
		}
		return err
	}
	err = w.Run(ctx, func(off format.HostOff, clusters int64) error {
		return halfDone(a.change(func(h *format.Header) error {
			h.RefcountOrder, h.RefTableOffset, h.RefTableLen = uint32(order), off, uint32(clusters)
			return nil
		}))
	})
	if err != nil {
		return err
	}
	for _, r := range w.Old {
		im.meta.Refs.Retire(meta.Retired{ClusterRun: r, Cause: meta.CauseAlways})
	}
	return halfDone(im.meta.SettleGated())
}

// changeFields changes what the header alone says.
func (a amendment) changeFields() error {
	im, o := a.im, a.o
	if o.DataFile != nil || o.DataFileRaw != nil {
		err := a.change(func(h *format.Header) error {
			if o.DataFile != nil {
				h.DataFileName, h.HasDataFileName = *o.DataFile, *o.DataFile != ""
			}
			if o.DataFileRaw != nil && !*o.DataFileRaw {
				h.Autoclear &^= format.AutoclearRawData
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if o.LazyRefcounts == nil || *o.LazyRefcounts == (im.hdr.Compat&format.CompatLazyRefcounts != 0) {
		return nil
	}
	// The counts that were postponed are written before the header says that there are none.
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	return a.change(func(h *format.Header) error {
		h.Compat ^= format.CompatLazyRefcounts
		return nil
	})
}

// downgrade makes version 2 of an image of version 3.
func (a amendment) downgrade(ctx context.Context) error {
	im := a.im
	if im.meta.MustRepair() { // version 2 has no mark to say so
		return errors.New("an operation stopped half way before: close the image and open it again, which repairs it")
	}
	trees, err := im.allTrees()
	if err != nil {
		return err
	}
	var zero func(meta.GuestCluster, format.HostOff) error
	if im.hdr.BackingFile != "" || im.backing != nil {
		zeroes := make([]byte, im.lay.ClusterSize())
		zero = func(c meta.GuestCluster, host format.HostOff) error {
			return im.writeHost(zeroes, int64(c)<<im.lay.ClusterBits, int64(host))
		}
	}
	x := im.meta.NewExpansion(trees, zero, a.o.Progress)
	if im.hdr.CompressionType != format.CompressionZlib {
		found, err := x.HasCompressed(ctx)
		if err != nil {
			return err
		}
		if found {
			return optionErrorf("Cannot downgrade an image with zstd compression type and existing compressed clusters")
		}
	}
	// Counts go down here beside COPIED flags that speak of them: the image is marked (see run).
	if err := x.Run(ctx); err != nil {
		return halfDone(err)
	}
	if err := im.fixActive(ctx); err != nil {
		return halfDone(err)
	}
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	if err := im.writeDirty(false); err != nil { // version 2 has no such mark
		return err
	}
	return a.change(func(h *format.Header) error {
		h.Version, h.UnknownFields, h.FeatureNames = format.Version2, nil, nil
		h.Incompat, h.Compat, h.Autoclear, h.CompressionType = 0, 0, 0, format.CompressionZlib
		return nil
	})
}

// allTrees loads the active tree and those of the internal snapshots.
func (im *Image) allTrees() ([]*meta.Tree, error) {
	active, err := im.activeTree()
	if err != nil {
		return nil, err
	}
	list, _, err := readSnapshots(im.file, im.hdr)
	if err != nil {
		return nil, err
	}
	trees := []*meta.Tree{active}
	for i := range list {
		t, err := im.meta.LoadTree(list[i].L1Offset, int64(list[i].L1Size))
		if err != nil {
			return nil, fmt.Errorf("snapshot %q: %w", list[i].Name, err)
		}
		trees = append(trees, t)
	}
	return trees, nil
}
