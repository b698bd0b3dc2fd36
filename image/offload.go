package image

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// offload has the host copy what it can by itself: by sharing the space where the file systems can do that, or else, if
// it is asked for, inside the kernel.
type offload struct {
	to      block.RangeCopier // nil: the target cannot
	layers  [][]block.Device  // of each source
	copies  bool              // not only by sharing
	worked  atomic.Bool
	refused atomic.Bool
}

func newOffload(target block.Device, sources []block.Device, copies bool) *offload {
	o := &offload{copies: copies}
	o.to, _ = target.(block.RangeCopier) // not one behind a filter, which wants to see what is written
	for _, s := range sources {
		o.layers = append(o.layers, Layers(s))
	}
	return o
}

// hostRun is a part of a piece that lies in one place of a file.
type hostRun struct {
	at, n int64 // from the beginning of the piece
	file  storage.File
	off   int64
}

// find returns where n bytes at off of a source lie, nil unless all of them lie in files as they are.
func (o *offload) find(ctx context.Context, source int, off, n int64) ([]hostRun, error) {
	if o.to == nil || o.refused.Load() {
		return nil, nil
	}
	var runs []hostRun
	all := true
	layers := o.layers[source]
	err := layers[0].Extents(ctx, off, n, func(e block.Extent) bool {
		all = e.Data && e.HasHost && !e.Zero && e.Depth < len(layers)
		if !all {
			return false
		}
		f, ok := layers[e.Depth].(block.HostFiler) // not one behind a filter, which wants to see what is read
		if all = ok && f.HostFile() != nil; !all {
			return false
		}
		run := hostRun{e.Off - off, e.Len, f.HostFile(), e.Host}
		if k := len(runs); k > 0 && runs[k-1].file == run.file && runs[k-1].off+runs[k-1].n == run.off {
			runs[k-1].n += run.n
			return true
		}
		runs = append(runs, run)
		return true
	})
	if err != nil {
		return nil, &StatusError{source, err}
	}
	if !all {
		return nil, nil
	}
	return runs, nil
}

// copy has the host copy a piece of the target at off. It reports false when it cannot: then the piece is to be read and
// written.
func (o *offload) copy(ctx context.Context, runs []hostRun, off int64) (bool, error) {
	for _, r := range runs {
		err := o.copyRun(ctx, r, off)
		if errors.Is(err, storage.ErrNotSupported) {
			if !o.worked.Load() {
				o.refused.Store(true)
			}
			return false, nil
		}
		if err != nil {
			return false, &WriteError{off + r.at, err}
		}
		o.worked.Store(true)
	}
	return true, nil
}

func (o *offload) copyRun(ctx context.Context, r hostRun, off int64) error {
	err := o.to.CopyFrom(ctx, off+r.at, r.file, r.off, r.n, true)
	if o.copies && errors.Is(err, storage.ErrNotSupported) {
		return o.to.CopyFrom(ctx, off+r.at, r.file, r.off, r.n, false)
	}
	return err
}
