package format

import (
	"fmt"
	"strings"
)

// ErrNotQCOW2 is returned for a file that does not begin with the format's magic.
const ErrNotQCOW2 = codecError("Image is not in qcow2 format")

// ErrHeaderSpace is returned when the header, its extensions and the backing file name do not fit in one cluster.
const ErrHeaderSpace = codecError("No space left in the file header")

// codecError is an error that is a constant, worded as QEMU words it.
type codecError string

func (e codecError) Error() string { return string(e) }

// HeaderError is returned for a header that QEMU refuses too, in QEMU's words.
type HeaderError struct{ Msg string }

func (e *HeaderError) Error() string { return e.Msg }

func headerErrorf(f string, a ...any) error { return &HeaderError{fmt.Sprintf(f, a...)} }

// UnsupportedError is returned for an image that may be sound but needs something this codec does not know.
type UnsupportedError struct {
	// Features holds the names that the image gives to the unknown incompatible features it has.
	Features []string
	// Mask holds the unknown incompatible feature bits that the image gives no name to.
	Mask uint64
	// Msg is set instead of the two when it is not about feature bits.
	Msg string
}

func (e *UnsupportedError) Error() string {
	if e.Msg != "" {
		return e.Msg
	}
	names := append([]string(nil), e.Features...)
	if e.Mask != 0 {
		names = append(names, fmt.Sprintf("Unknown incompatible feature: %x", e.Mask))
	}
	return "Unsupported qcow2 feature(s): " + strings.Join(names, ", ")
}
