package codec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
)

// deflateWindow is the window that QEMU inflates with; a stream with longer distances is readable only by luck.
const deflateWindow = 4096

// inflater is a decoder with the reader it is fed by, kept together so that a pooled one allocates nothing.
type inflater struct {
	src bytes.Reader
	dec io.ReadCloser
}

var inflaters = sync.Pool{New: func() any {
	f := new(inflater)
	f.dec = flate.NewReader(&f.src)
	return f
}}

func inflate(dst, src []byte) error {
	f := inflaters.Get().(*inflater)
	defer inflaters.Put(f)
	f.src.Reset(src)
	defer f.src.Reset(nil) // the pool must not keep the caller's bytes alive
	if err := f.dec.(flate.Resetter).Reset(&f.src, nil); err != nil {
		return fmt.Errorf("resetting the deflate decoder: %w", err)
	}
	n, err := io.ReadFull(f.dec, dst)
	if err != nil {
		return fmt.Errorf("deflate stream ends or breaks after %d of %d bytes: %w: %w", n, len(dst), ErrCorrupt, err)
	}
	return nil
}

var errNoRoom = errors.New("compressed data does not fit")

// boundedWriter appends to buf and fails rather than grow it.
type boundedWriter struct {
	buf []byte
	n   int
}

func (w *boundedWriter) Write(p []byte) (int, error) {
	if len(p) > len(w.buf)-w.n {
		return 0, errNoRoom
	}
	w.n += copy(w.buf[w.n:], p)
	return len(p), nil
}

type deflater struct {
	out boundedWriter
	enc *flate.Writer
}

var deflaters sync.Pool

func getDeflater() (*deflater, error) {
	if d, ok := deflaters.Get().(*deflater); ok {
		return d, nil
	}
	d := new(deflater)
	enc, err := flate.NewWriterWindow(&d.out, deflateWindow)
	if err != nil {
		return nil, fmt.Errorf("creating a deflate encoder: %w", err)
	}
	d.enc = enc
	return d, nil
}

func deflate(dst, src []byte) (int, bool, error) {
	d, err := getDeflater()
	if err != nil {
		return 0, false, err
	}
	defer func() {
		d.out = boundedWriter{}
		deflaters.Put(d)
	}()
	d.out = boundedWriter{buf: dst}
	d.enc.Reset(&d.out)
	_, err = d.enc.Write(src)
	if err == nil {
		err = d.enc.Close()
	}
	if errors.Is(err, errNoRoom) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("deflating a cluster: %w", err)
	}
	return d.out.n, true, nil
}
