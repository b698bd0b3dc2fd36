//go:build !unix

package storage

// openSafely is empty where an open cannot wait for anything.
const openSafely = 0
