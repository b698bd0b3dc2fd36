package storage

// SharedMemory is memory that outlives the process that uses it, though not the host: a file on a tmpfs, mapped.
type SharedMemory interface {
	Bytes() []byte
	// Close gives the memory back. Nobody may be using its bytes any more. done: what it holds is needed no more.
	Close(done bool) error
}
