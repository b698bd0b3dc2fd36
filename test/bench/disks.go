package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// disk is a kind of disk that servers are measured on.
type disk int

const (
	// diskFull is wholly allocated and in the page cache.
	diskFull disk = iota
	// diskFresh is empty, and made anew for each run.
	diskFresh
	// diskScattered is large, with a cluster of data every scatterStride.
	diskScattered
	// diskZlib is wholly compressed: text that shrinks to a third or so.
	diskZlib
)

const (
	freshSize     = 64 << 30
	scatteredSize = 1 << 40
	scatterStep   = 5 << 20 // 209,715 clusters
	scatterStride = "5m"
)

func (d disk) size(cfg config) int64 {
	switch d {
	case diskFresh:
		return freshSize
	case diskScattered:
		return scatteredSize
	}
	return int64(cfg.sizeMiB) << 20
}

// suits reports whether the contender can serve such a disk.
func (d disk) suits(c contender) bool { return d != diskZlib || c.format == "qcow2" }

// prepare makes the contender's image for the rounds to come.
func (d disk) prepare(ctx context.Context, cfg config, c contender) error {
	image := c.image(cfg.dir)
	switch d {
	case diskFull:
		return prepareFull(ctx, cfg, c)
	case diskScattered:
		return prepareScattered(ctx, image, c.format)
	case diskZlib:
		return prepareZlib(ctx, cfg, image)
	}
	return nil
}

// beforeRun brings the image to where each run begins.
func (d disk) beforeRun(ctx context.Context, cfg config, c contender) error {
	image := c.image(cfg.dir)
	if d != diskFresh {
		return warm(image)
	}
	if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return command(ctx, "qemu-img", "create", "-q", "-f", c.format, image, fmt.Sprint(int64(freshSize)))
}

func prepareFull(ctx context.Context, cfg config, c contender) error {
	image := c.image(cfg.dir)
	pattern := filepath.Join(cfg.dir, "pattern.raw")
	if st, err := os.Stat(pattern); err != nil || st.Size() != int64(cfg.sizeMiB)<<20 {
		if err := writePattern(pattern, int64(cfg.sizeMiB)<<20); err != nil {
			return fmt.Errorf("making the disk's content: %w", err)
		}
	}
	if c.format == "raw" {
		return rewrite4K(pattern, image)
	}
	made := image + ".made"
	defer os.Remove(made)
	if err := command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "0", pattern, made); err != nil {
		return err
	}
	return rewrite4K(made, image)
}

// prepareScattered writes a cluster of data every scatterStep, in an order of chance so that neighbours on the disk are no
// neighbours in the file.
func prepareScattered(ctx context.Context, image, format string) (err error) {
	if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := command(ctx, "qemu-img", "create", "-q", "-f", format, image, fmt.Sprint(int64(scatteredSize))); err != nil {
		return err
	}
	write, done, err := writer(ctx, image, format)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	data := make([]byte, 64<<10)
	rng := rand.New(rand.NewPCG(1, 2))
	for _, i := range rng.Perm(scatteredSize / scatterStep) {
		data[0] = byte(i) | 1
		if err := write(data[:4096], int64(i)*scatterStep); err != nil {
			return err
		}
	}
	return nil
}

// writer opens an image to be written by the library.
func writer(ctx context.Context, image, format string) (write func(p []byte, off int64) error, done func() error, err error) {
	if format == "raw" {
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			return nil, nil, err
		}
		return func(p []byte, off int64) error { _, err := f.WriteAt(p, off); return err }, func() error { return errors.Join(f.Sync(), f.Close()) }, nil
	}
	f, err := storage.OpenFile(image, storage.OpenOptions{})
	if err != nil {
		return nil, nil, err
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return func(p []byte, off int64) error { return im.WriteAt(ctx, p, off, 0) }, im.Close, nil
}

// words make text that shrinks like prose.
var words = []string{"cluster ", "table ", "refcount ", "snapshot ", "the ", "of ", "a ", "host ", "guest ", "offset ", "\n", "image ", "is ", "0x"}

func prepareZlib(ctx context.Context, cfg config, image string) error {
	text := filepath.Join(cfg.dir, "text.raw")
	size := int64(cfg.sizeMiB) << 20
	if st, err := os.Stat(text); err != nil || st.Size() != size {
		if err := writeText(text, size); err != nil {
			return err
		}
	}
	return command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-m", "16", "-W", text, image)
}

func writeText(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(3, 4))
	buf := make([]byte, 0, 1<<20)
	for off := int64(0); off < size && err == nil; off += 1 << 20 {
		buf = buf[:0]
		for len(buf) < 1<<20-16 {
			buf = append(buf, words[rng.IntN(len(words))]...)
			if rng.IntN(4) == 0 {
				buf = fmt.Appendf(buf, "%x ", rng.Uint32())
			}
		}
		_, err = f.WriteAt(buf[:cap(buf)][:1<<20], off)
	}
	return errors.Join(err, f.Close())
}

// writePattern writes a raw disk without a zero block, so that no server answers from knowing of holes.
func writePattern(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	rng := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size && err == nil; off += int64(len(buf)) {
		_, _ = rng.Read(buf) // never fails, as documented
		_, err = f.WriteAt(buf, off)
	}
	return errors.Join(err, f.Close())
}

// rewrite4K copies a file in writes of 4 KiB, which leaves its page cache in small pieces, and waits for the disk, so
// that write-back of the preparation does not run into the measurement.
func rewrite4K(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	// The wrappers hide ReadFrom and WriteTo, which would copy in larger pieces.
	_, err = io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{in}, make([]byte, 4096))
	if err == nil {
		err = out.Sync()
	}
	return errors.Join(err, out.Close())
}
