package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

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
	// diskEmpty has no data at all.
	diskEmpty
	// diskSmall and diskHuge have data in their first writtenPart, and differ in size.
	diskSmall
	diskHuge
	// diskLUKS is diskFull, encrypted.
	diskLUKS
	// diskCold is diskFull with nothing of it in the page cache.
	diskCold
)

const (
	smallSize     = 1 << 30
	hugeSize      = 2 << 50
	writtenPart   = 64 << 20
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
	case diskSmall:
		return smallSize
	case diskHuge:
		return hugeSize
	}
	return int64(cfg.sizeMiB) << 20
}

// suits reports whether the contender can serve such a disk.
func (d disk) suits(c contender) bool {
	switch d {
	case diskZlib, diskLUKS, diskSmall, diskHuge: // of the last two, the second is more than most file systems take of a raw file
		return c.format == "qcow2"
	}
	return true
}

// serving is what the contender has to know to serve the disk.
func (d disk) serving(cfg config, c contender) serving {
	s := serving{image: c.image(cfg.dir), socket: filepath.Join(cfg.dir, "socket")}
	if d == diskLUKS {
		s.secret = filepath.Join(cfg.dir, "secret")
	}
	return s
}

// prepare makes the contender's image for the rounds to come.
func (d disk) prepare(ctx context.Context, cfg config, c contender) error {
	image := c.image(cfg.dir)
	switch d {
	case diskFull, diskCold:
		return prepareFull(ctx, cfg, c)
	case diskScattered:
		return prepareScattered(ctx, image, c.format)
	case diskZlib:
		return prepareZlib(ctx, cfg, image)
	case diskEmpty:
		return createEmpty(ctx, image, c.format, d.size(cfg))
	case diskSmall, diskHuge:
		return preparePart(ctx, image, d.size(cfg))
	case diskLUKS:
		return prepareLUKS(ctx, cfg, d.serving(cfg, c))
	}
	return nil
}

// createEmpty makes an image without data.
func createEmpty(ctx context.Context, image, format string, size int64) error {
	if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return command(ctx, "qemu-img", "create", "-q", "-f", format, image, fmt.Sprint(size))
}

// beforeRun brings the image to where each run begins.
func (d disk) beforeRun(ctx context.Context, cfg config, c contender) error {
	switch d {
	case diskFresh:
		return createEmpty(ctx, c.image(cfg.dir), c.format, freshSize)
	case diskCold:
		return chill(c.image(cfg.dir))
	}
	return warm(c.image(cfg.dir))
}

func prepareFull(ctx context.Context, cfg config, c contender) error {
	image := c.image(cfg.dir)
	pattern, err := patternFile(cfg)
	if err != nil {
		return err
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

// patternFile is a raw disk's content, made once.
func patternFile(cfg config) (string, error) {
	pattern, size := filepath.Join(cfg.dir, "pattern.raw"), int64(cfg.sizeMiB)<<20
	if st, err := os.Stat(pattern); err == nil && st.Size() == size {
		return pattern, nil
	}
	if err := writePattern(pattern, size); err != nil {
		return "", fmt.Errorf("making the disk's content: %w", err)
	}
	return pattern, nil
}

// preparePart fills the first writtenPart of a sparse disk, in small writes for the reason given at rewrite4K.
func preparePart(ctx context.Context, image string, size int64) (err error) {
	if err := createEmpty(ctx, image, "qcow2", size); err != nil {
		return err
	}
	write, done, err := writer(ctx, image, "qcow2")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	rng := rand.NewChaCha8([32]byte{2})
	data := make([]byte, 4096)
	for off := int64(0); off < writtenPart; off += int64(len(data)) {
		_, _ = rng.Read(data) // never fails, as documented
		if err := write(data, off); err != nil {
			return err
		}
	}
	return nil
}

// createTries is how often qemu-img may fail to find out how fast this machine hashes keys, as it does on a busy one.
const createTries = 10

func prepareLUKS(ctx context.Context, cfg config, s serving) error {
	pattern, err := patternFile(cfg)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.secret, []byte("measured"), 0o600); err != nil {
		return err
	}
	made := s.image + ".made"
	defer os.Remove(made)
	for range createTries {
		err = command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "--object", s.object(),
			"-o", "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret="+secretID, made, fmt.Sprint(diskLUKS.size(cfg)))
		if err == nil || !strings.Contains(err.Error(), "accurate CPU usage") {
			break
		}
	}
	if err != nil {
		return err
	}
	target := serving{image: made, secret: s.secret}
	if err := command(ctx, "qemu-img", "convert", "-n", "-f", "raw", "-S", "0", "--object", s.object(), "--target-image-opts",
		pattern, target.description()); err != nil {
		return err
	}
	return rewrite4K(made, s.image)
}

// prepareScattered writes a cluster of data every scatterStep, in an order of chance so that neighbours on the disk are no
// neighbours in the file.
func prepareScattered(ctx context.Context, image, format string) (err error) {
	if err := createEmpty(ctx, image, format, scatteredSize); err != nil {
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
