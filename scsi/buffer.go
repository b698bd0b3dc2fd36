package scsi

import "github.com/droverproject/drover/block"

// Buffer is the memory that a command's data moves in, in pieces.
type Buffer [][]byte

// Len returns the bytes in all pieces.
func (b Buffer) Len() int {
	n := 0
	for _, p := range b {
		n += len(p)
	}
	return n
}

// put copies p to the beginning of the buffer, as much as fits, and returns how much that was.
func (b Buffer) put(p []byte) int {
	n := 0
	for _, piece := range b {
		k := copy(piece, p[n:])
		n += k
		if n == len(p) {
			break
		}
	}
	return n
}

// take returns a copy of the first n bytes, or of all if there are fewer.
func (b Buffer) take(n int) []byte {
	out := make([]byte, 0, min(n, b.Len()))
	for _, piece := range b {
		out = append(out, piece[:min(len(piece), n-len(out))]...)
		if len(out) == n {
			break
		}
	}
	return out
}

// part calls fn with the pieces of the n bytes from off on, or of those that the buffer has.
func (b Buffer) part(off, n int64, fn func(bufs [][]byte) error) error {
	if off == 0 && n == int64(b.Len()) {
		return fn(b)
	}
	c := block.NewCursor(b)
	defer c.Close()
	c.Skip(min(off, c.Left()))
	return fn(c.Next(min(n, c.Left())))
}

// Clear zeroes the buffer from a place on.
func (b Buffer) Clear(from int) {
	for _, p := range b {
		if from < len(p) {
			clear(p[from:])
			from = 0
			continue
		}
		from -= len(p)
	}
}
