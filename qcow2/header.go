package qcow2

import (
	"fmt"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// ErrHeaderSpace is returned for a change that makes header, extensions and backing file name longer than one cluster.
const ErrHeaderSpace = format.ErrHeaderSpace

// changeHeader replaces the header by what change makes of it. It is for exclusive, which takes the new header into memory
// afterwards. What change does not touch stays: the header is read from the file, with everything in it that this package
// has no name for. What it points to must be durable before; what only the old one points to is free to go when
// changeHeader has returned nil.
//
// A power cut, or an error, leaves the old header or the new one (see format.PlanHeader, also for where that has limits).
func (im *Image) changeHeader(change func(*format.Header) error) error {
	area, err := im.readHeaderCluster()
	if err != nil {
		return err
	}
	h, err := format.ParseHeader(area)
	if err != nil {
		return fmt.Errorf("reading header: %w", err)
	}
	restoreFeatureNames(h)
	if err := change(h); err != nil {
		return err
	}
	plan, err := format.PlanHeader(area, h)
	if err != nil {
		return fmt.Errorf("making the header: %w", err)
	}
	if err := acceptable(h); err != nil {
		return err
	}
	for _, w := range plan.Steps {
		if err := im.writeField(w.Off, w.Data); err != nil {
			return err
		}
	}
	return nil
}

// acceptable makes sure that no header is written which nobody opens afterwards.
func acceptable(h *format.Header) error {
	b, err := h.Marshal()
	if err != nil {
		return fmt.Errorf("making the header: %w", err)
	}
	if _, err := format.ParseHeader(b); err != nil {
		return fmt.Errorf("making the header: %w", err)
	}
	return nil
}

// readHeaderCluster reads cluster 0, as much of it as there is.
func (im *Image) readHeaderCluster() ([]byte, error) {
	size, err := im.file.Size()
	if err != nil {
		return nil, fmt.Errorf("size of image file: %w", err)
	}
	area := make([]byte, min(size, im.lay.ClusterSize()))
	if err := storage.ReadFull(im.file, area, 0); err != nil {
		return nil, fmt.Errorf("reading header: %w", err)
	}
	return area, nil
}

// restoreFeatureNames replaces a table of feature names that is none: what stands in its place while a header is being
// replaced, and stays if that was cut short.
func restoreFeatureNames(h *format.Header) {
	nameless := func(n format.FeatureName) bool { return n.Name == "" }
	if !slices.ContainsFunc(h.FeatureNames, nameless) {
		return
	}
	h.FeatureNames = nil
	addFeatureNames(h)
}

// addFeatureNames gives a header the usual table of feature names, unless the clusters are so small that it would leave no
// room for anything else.
func addFeatureNames(h *format.Header) {
	if h.Version >= format.Version3 && h.Layout().ClusterSize() > 4096 {
		h.FeatureNames = format.DefaultFeatureNames()
	}
}
