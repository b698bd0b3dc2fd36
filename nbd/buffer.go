package nbd

import (
	"math/bits"
	"sync"
)

// Buffers come in sizes that are powers of two.
const (
	minBufferShift = 12
	maxBufferShift = 30
)

// buffer is a piece of memory that goes back to its pool.
type buffer struct {
	b []byte
}

// bufferPool keeps buffers that are not in use. The garbage collector empties it when nobody asks for them.
type bufferPool struct {
	pools [maxBufferShift - minBufferShift + 1]sync.Pool
}

func bufferShift(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), minBufferShift)
}

// bufferSize is the length of the buffer that get(n) returns: what a request of n bytes costs.
func bufferSize(n int) int64 { return 1 << bufferShift(n) }

// get returns a buffer of at least n bytes, n being at most 1 GiB. Its content is whatever the last user left: a caller
// sends none of it that it has not written itself.
func (p *bufferPool) get(n int) *buffer {
	shift := bufferShift(n)
	if b, ok := p.pools[shift-minBufferShift].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 1<<shift)}
}

// put takes a buffer back. The caller must not touch it again.
func (p *bufferPool) put(b *buffer) {
	if b != nil {
		p.pools[bufferShift(len(b.b))-minBufferShift].Put(b)
	}
}
