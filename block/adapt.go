package block

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// IO is a device seen as the standard library's positional reader and writer, with the standard library's rules at the
// end: a read that reaches it returns what there is and io.EOF. Use it with io.NewSectionReader, io.NewOffsetWriter.
type IO struct {
	ctx context.Context
	dev Device
}

var (
	_ io.ReaderAt = (*IO)(nil)
	_ io.WriterAt = (*IO)(nil)
)

// NewIO adapts dev. Every call passes ctx on.
func NewIO(ctx context.Context, dev Device) *IO { return &IO{ctx, dev} }

// Size returns the length of the disk.
func (a *IO) Size() int64 { return a.dev.Size() }

// ReadAt implements io.ReaderAt.
func (a *IO) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("reading at offset %d: %w", off, ErrOutOfRange)
	}
	if len(p) == 0 {
		return 0, nil
	}
	n := int64(len(p))
	if rest := a.dev.Size() - off; n > rest {
		n = max(rest, 0)
	}
	if n > 0 {
		if err := a.dev.ReadAt(a.ctx, p[:n], off); err != nil {
			return 0, err
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt implements io.WriterAt. What reaches past the end is not written, and the error is ErrOutOfRange.
func (a *IO) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("writing at offset %d: %w", off, ErrOutOfRange)
	}
	n := min(int64(len(p)), max(a.dev.Size()-off, 0))
	if n > 0 {
		if err := a.dev.WriteAt(a.ctx, p[:n], off, 0); err != nil {
			return 0, err
		}
	}
	if n < int64(len(p)) {
		return int(n), fmt.Errorf("writing %d bytes at offset %d: %w", len(p), off, errors.Join(ErrOutOfRange, io.ErrShortWrite))
	}
	return int(n), nil
}
