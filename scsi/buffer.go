package scsi

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

// each calls fn for the pieces of the n bytes from off on, with their distance from off. The buffer holds that many.
func (b Buffer) each(off, n int64, fn func(p []byte, at int64) error) error {
	done := int64(0)
	for _, piece := range b {
		if off >= int64(len(piece)) {
			off -= int64(len(piece))
			continue
		}
		p := piece[off:]
		off = 0
		if int64(len(p)) > n-done {
			p = p[:n-done]
		}
		if err := fn(p, done); err != nil {
			return err
		}
		if done += int64(len(p)); done == n {
			return nil
		}
	}
	return nil
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
