package codec

import (
	"fmt"
	"io"

	"github.com/klauspost/compress/flate"
)

// StreamSize returns how many bytes of src the stream that it begins with takes, which unpacks to a whole dst. dst is
// filled as by Decompress. Where a stream does not say where it ends, it is taken to be as long as src.
func StreamSize(t uint8, dst, src []byte) (int, error) {
	switch t {
	case Zlib:
		return inflatedSize(dst, src)
	case Zstd:
		return unzstdFrames(dst, src)
	}
	return 0, fmt.Errorf("%w %d", ErrUnknownType, t)
}

func inflatedSize(dst, src []byte) (int, error) {
	f := inflaters.Get().(*inflater)
	defer inflaters.Put(f)
	f.src.Reset(src)
	defer f.src.Reset(nil)
	if err := f.dec.(flate.Resetter).Reset(&f.src, nil); err != nil {
		return 0, fmt.Errorf("resetting the deflate decoder: %w", err)
	}
	if n, err := io.ReadFull(f.dec, dst); err != nil {
		return 0, fmt.Errorf("deflate stream ends or breaks after %d of %d bytes: %w: %w", n, len(dst), ErrCorrupt, err)
	}
	// What is left says that the stream is over, unless it is longer than it should be.
	var one [1]byte
	if n, err := f.dec.Read(one[:]); n != 0 || err != io.EOF {
		return len(src), nil
	}
	return len(src) - f.src.Len(), nil
}
