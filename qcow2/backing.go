package qcow2

import (
	"context"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// ErrBackingFormat is returned for a backing file whose format is not said: whoever reads the image would have to guess, and
// what is in the backing file would decide.
var ErrBackingFormat error = &OptionError{"backing format must be specified"}

// ChangeBacking has the image name another backing file, or none if name is empty, and its format. The name is stored as it
// is; nobody looks whether there is such a file or what is in it (that is a rebase). The device that this Image reads
// from stays the one it was opened with.
//
// A crash leaves the old name and format or the new ones. ErrHeaderSpace is returned when they do not fit.
func (im *Image) ChangeBacking(ctx context.Context, name, backingFormat string) error {
	switch {
	case len(name) > format.MaxBackingName:
		return invalid("backing file name is longer than %d bytes", format.MaxBackingName)
	case len(backingFormat) > format.MaxBackingFormat:
		return invalid("backing format name is longer than %d bytes", format.MaxBackingFormat)
	case name != "" && backingFormat == "":
		return ErrBackingFormat
	}
	return im.exclusive(ctx, func() error {
		return im.changeHeader(func(h *format.Header) error { return setBacking(h, name, backingFormat) })
	})
}

// setBacking changes what a header says of the backing file.
func setBacking(h *format.Header, name, backingFormat string) error {
	if name != "" && h.Autoclear&format.AutoclearRawData != 0 {
		return invalid("an image whose data file is a raw disk by itself cannot have a backing file")
	}
	h.BackingFile, h.BackingFormat, h.HasBackingFormat = name, backingFormat, backingFormat != ""
	return nil
}

// BackingFile returns the name and the format of the backing file as the image has them, "" for none or once it is closed.
func (im *Image) BackingFile() (name, format string) {
	t, err := im.enter()
	if err != nil {
		return "", ""
	}
	defer im.meta.Epochs.Exit(t)
	return im.hdr.BackingFile, im.hdr.BackingFormat
}
