//go:build !linux

package storage

func copyRange(int, int64, int, int64, int64) error  { return ErrNotSupported }
func cloneRange(int, int64, int, int64, int64) error { return ErrNotSupported }
