//go:build !linux

package storage

import "fmt"

// OpenShared is for Linux, which tells when its memory is another's.
func OpenShared(path string, _ int64, _ bool) (SharedMemory, error) {
	return nil, fmt.Errorf("opening shared memory %q: %w", path, ErrNotSupported)
}

// BootID is for Linux, too.
func BootID() (string, error) { return "", ErrNotSupported }
