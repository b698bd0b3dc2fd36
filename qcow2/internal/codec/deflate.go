package codec

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/flate"
)

// deflateWindow is the window that QEMU inflates with; a stream with longer distances is readable only by luck.
const deflateWindow = 4096

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
