package storage

import (
	"errors"
	"io"
)

// NowaitVReader is implemented by a NowaitReader that fills several buffers at once.
type NowaitVReader interface {
	// ReadVAtNowait is ReadAtNowait for buffers that are filled in order from one contiguous range.
	ReadVAtNowait(bufs [][]byte, off int64) (int, error)
}

var (
	_ NowaitVReader = (*MemFile)(nil)
	_ NowaitVReader = (*FaultFile)(nil)
)

// ReadVNowait fills the buffers from what f has in memory, in one call where f has one for that. A file that cannot tell
// returns ErrWouldBlock.
func ReadVNowait(f File, bufs [][]byte, off int64) (int, error) {
	if v, ok := f.(NowaitVReader); ok {
		return v.ReadVAtNowait(bufs, off)
	}
	one, ok := f.(NowaitReader)
	if !ok {
		return 0, ErrWouldBlock
	}
	done := 0
	for _, b := range bufs {
		n, err := one.ReadAtNowait(b, off+int64(done))
		done += n
		if err != nil || n < len(b) {
			return done, err
		}
	}
	return done, nil
}

// ReadVFull is ReadFull for buffers that follow each other.
func ReadVFull(f File, bufs [][]byte, off int64) error {
	n, err := f.ReadVAt(bufs, off)
	if int64(n) == totalLen(bufs) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		ClearV(bufs, n)
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// ClearV zeroes what the buffers hold from their byte from on.
func ClearV(bufs [][]byte, from int) {
	for _, b := range bufs {
		if from < len(b) {
			clear(b[from:])
			from = 0
			continue
		}
		from -= len(b)
	}
}

// ReadVAtNowait is ReadVAt.
func (f *MemFile) ReadVAtNowait(bufs [][]byte, off int64) (int, error) { return f.ReadVAt(bufs, off) }

// ReadVAtNowait counts as one read. A base that cannot read without waiting is not asked and not counted.
func (f *FaultFile) ReadVAtNowait(bufs [][]byte, off int64) (int, error) {
	if _, ok := f.base.(NowaitReader); !ok {
		return 0, ErrWouldBlock
	}
	return f.partly(OpRead, bufs, off, func(bufs [][]byte, off int64) (int, error) {
		return ReadVNowait(f.base, bufs, off)
	})
}
