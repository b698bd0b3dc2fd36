package qcow2_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2"
)

// wholeStep makes one of the changes that concern the whole image.
func (h *harness) wholeStep() {
	h.t.Helper()
	switch h.r.IntN(9) {
	case 0, 1:
		h.resizeStep()
	case 2:
		h.backingStep()
	case 3:
		h.amendStep()
	case 4:
		h.compactStep()
	case 5:
		h.emptyStep()
	case 6:
		h.hideStep()
	default:
		if h.data == nil { // with an external data file there are no snapshots
			h.snapshotStep()
		}
	}
}

// compactStep moves what the image holds to the front of its file.
func (h *harness) compactStep() {
	h.t.Helper()
	_, err := h.im.Compact(context.Background(), qcow2.CompactOptions{Step: h.v.create.ClusterSize << h.r.IntN(6), DryRun: h.r.IntN(4) == 0})
	if h.data != nil && errors.Is(err, qcow2.ErrDataFile) {
		return
	}
	h.must("compact", err)
}

// emptyStep makes the image read as what it stands on.
func (h *harness) emptyStep() {
	h.t.Helper()
	err := h.im.Empty(context.Background())
	if h.v.create.DataFileRaw && errors.Is(err, qcow2.ErrDataFile) {
		return
	}
	h.must("empty", err)
	clear(h.model)
	copy(h.model, h.base)
	h.state = nil
}

// hideStep makes whole clusters zero whatever the image stands on.
func (h *harness) hideStep() {
	h.t.Helper()
	unit, size := h.v.create.ClusterSize, int64(len(h.model))
	from := h.r.Int64N(size/unit+1) * unit
	to := min(from+unit*h.r.Int64N(20), size)
	if from >= to {
		return
	}
	h.must("hide", h.im.Hide(context.Background(), from, to-from))
	clear(h.model[from:to])
}

func (h *harness) resizeStep() {
	h.t.Helper()
	size := h.r.Int64N(10<<20) &^ 511
	info, err := qcow2.ReadInfo(context.Background(), h.file)
	h.must("info", err)
	if info.Version == 2 && len(info.Snapshots) > 0 {
		return
	}
	o := qcow2.ResizeOptions{Shrink: true}
	if old := int64(len(h.model)); h.r.IntN(2) == 0 {
		size = min(size, old+3*info.ClusterSize)
	}
	if size > int64(len(h.model)) {
		o.Preallocation = qcow2.Preallocation(max(0, h.r.IntN(10)-6))
	}
	if h.data != nil && h.v.create.Encrypt != nil {
		o.Preallocation = qcow2.PreallocOff // ErrDataFile
	}
	h.must(fmt.Sprintf("resize to %d (%d)", size, o.Preallocation), h.im.Resize(context.Background(), size, o))
	model := make([]byte, size)
	copy(model, h.model)
	h.model, h.state = model, nil
	if h.im.Size() != size {
		h.t.Fatalf("%v: size %d after resizing to %d", h.v, h.im.Size(), size)
	}
}

// amendStep changes version, refcount width and laziness, or is refused because the image as it is does not allow that.
func (h *harness) amendStep() {
	h.t.Helper()
	ctx := context.Background()
	var o qcow2.AmendOptions
	if h.r.IntN(2) == 0 {
		o.Version = 2 + h.r.IntN(2)
	}
	if h.r.IntN(2) == 0 {
		o.RefcountBits = 1 << h.r.IntN(7)
	}
	if h.r.IntN(2) == 0 {
		lazy := h.r.IntN(2) == 0
		o.LazyRefcounts = &lazy
	}
	if err := h.im.Amend(ctx, o); !errors.Is(err, qcow2.ErrInvalidOption) {
		h.must(fmt.Sprintf("amend %+v", o), err)
		h.v.create.LazyRefcounts = o.LazyRefcounts != nil && *o.LazyRefcounts
	}
	info, err := qcow2.ReadInfo(ctx, h.file)
	h.must("info", err)
	h.v.create.Version, h.v.create.RefcountBits = info.Version, info.RefcountBits
}

// backingStep writes the name of the backing file anew, by ways that lead to the same file.
func (h *harness) backingStep() {
	h.t.Helper()
	if h.base == nil {
		return
	}
	name := "base.raw"
	for range h.r.IntN(4) * h.r.IntN(20) {
		name = "./" + name
	}
	if h.v.create.ClusterSize < 1024 && len(name) > 100 {
		return
	}
	h.must("change backing", h.im.ChangeBacking(context.Background(), name, "raw"))
	info, err := qcow2.ReadInfo(context.Background(), h.file)
	h.must("info", err)
	if info.BackingFile != name || info.BackingFormat != "raw" {
		h.t.Fatalf("%v: backing file %q, want %q", h.v, info.BackingFile, name)
	}
}
