package storage

import (
	"errors"
	"io"
)

// ReadFull fills p from f at off. What lies behind the end of the file reads as zeroes: image files may end anywhere.
func ReadFull(f File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// WriteFull writes p to f at off, all of it or with an error.
func WriteFull(f File, p []byte, off int64) error {
	n, err := f.WriteAt(p, off)
	return orShort(n, len(p), err)
}

// WriteVFull is WriteFull for buffers that follow each other.
func WriteVFull(f File, bufs [][]byte, off int64) error {
	want := 0
	for _, b := range bufs {
		want += len(b)
	}
	n, err := f.WriteVAt(bufs, off)
	return orShort(n, want, err)
}

func orShort(n, want int, err error) error {
	if err == nil && n < want {
		return io.ErrShortWrite
	}
	return err
}
