package meta

import (
	"encoding/binary"
	"fmt"
)

// CorruptError says that the image's metadata is impossible: using it could destroy data.
type CorruptError struct{ Reason string }

func (e *CorruptError) Error() string { return "image is corrupt: " + e.Reason }

func corrupt(f string, args ...any) error { return &CorruptError{fmt.Sprintf(f, args...)} }

func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }
