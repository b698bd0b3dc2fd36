package qcow2

import (
	"fmt"
	"strings"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// ErrNotQCOW2 is returned by Open for a file that does not begin as a QCOW2 image.
var ErrNotQCOW2 = format.ErrNotQCOW2

// ErrImageFull is returned when the image file has reached the largest size that the format can describe with its
// cluster size and refcount width.
var ErrImageFull = meta.ErrImageFull

// UnsupportedError is returned by Open for an image with incompatible features that this package does not know.
type UnsupportedError = format.UnsupportedError

// CorruptError says that the image's metadata contradicts itself.
type CorruptError = meta.CorruptError

// ReadOnlyError is returned by Open for an image that can be read but not written, with the reasons.
type ReadOnlyError struct{ Reasons []string }

// ReasonCorrupt is the reason of a ReadOnlyError for an image that is marked corrupt.
const ReasonCorrupt = "it is marked corrupt"

func (e *ReadOnlyError) Error() string {
	return fmt.Sprintf("cannot be opened for writing: %s (open it read-only)", strings.Join(e.Reasons, "; "))
}
