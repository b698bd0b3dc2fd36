package storage

import "errors"

// zeroes is a source of zeroes for what must be written out.
var zeroes [64 << 10]byte

// Zero makes [off, off+n) of f read as zeroes, as cheaply as the file can: by a hole (if punch is set), by marking the
// range, or else by writing. What lies behind the end of the file reads as zeroes already; a hole does not grow the file.
func Zero(f File, off, n int64, punch bool) error {
	if n <= 0 {
		return nil
	}
	if punch {
		if err := f.PunchHole(off, n); !errors.Is(err, ErrNotSupported) {
			return err
		}
	}
	if err := f.ZeroRange(off, n); !errors.Is(err, ErrNotSupported) {
		return err
	}
	for n > 0 {
		part := min(n, int64(len(zeroes)))
		if err := WriteFull(f, zeroes[:part], off); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}
