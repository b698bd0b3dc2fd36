package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"syscall"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
)

// Streams are drover's own: qemu-img takes "-" for the name of a file.

// isStream reports whether a name means standard input or output, or something else that is read and written in order.
func (a *app) isStream(name, std string) bool {
	if a.name != program {
		return false
	}
	if name == "-" || name == std {
		return true
	}
	st, err := os.Stat(name)
	return err == nil && st.Mode()&fs.ModeNamedPipe != 0
}

// openSink opens what a stream goes to. Closing it makes it durable where that means something.
func (a *app) openSink(name string) (io.Writer, func() error, error) {
	if name != "-" && name != "/dev/stdout" {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("opening %q: %w", name, err)
		}
		return f, f.Close, nil
	}
	if isTerminal(a.out) {
		return nil, nil, errorf("standard output is a terminal, on which an image is of no use")
	}
	return a.out, func() error {
		f, ok := a.out.(*os.File)
		if !ok {
			return nil
		}
		if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTSUP) {
			return err
		}
		return nil
	}, nil
}

// stream writes the source to the target as a stream.
func (c *conversion) stream(ctx context.Context) (err error) {
	o, err := c.streamOptions()
	if err != nil {
		return err
	}
	w, done, err := c.openSink(c.target)
	if err != nil {
		return err
	}
	c.progress.apart = true
	p := c.startProgress("convert", c.progress, c.quiet)
	o.Progress = p.set
	buffered := bufio.NewWriterSize(w, 1<<20)
	err = image.Stream(ctx, buffered, c.sources[0], o)
	if err == nil {
		err = buffered.Flush()
	}
	if err != nil {
		p.newline()
		return errors.Join(convertError(err), done())
	}
	if err := done(); err != nil {
		p.newline()
		return err
	}
	p.end()
	return nil
}

func (c *conversion) streamOptions() (image.StreamOptions, error) {
	o := image.StreamOptions{Compress: c.compress, Workers: c.copying.Workers}
	switch {
	case len(c.sources) > 1:
		return o, errorf("A stream is made of one source")
	case c.noCreate || c.bitmaps || c.backing != "" || c.salvage || c.rate != "":
		return o, errorf("-n, -B, -r, --bitmaps and --salvage cannot be used with a stream")
	case c.format == "raw" && c.compress:
		return o, errorf("Compression not supported for this file format")
	}
	cr := &c.creator
	if err := cr.parseOptions(c.known); err != nil || c.format == "raw" {
		return o, err
	}
	cr.options["size"] = strconv.FormatInt(c.sources[0].Size(), 10)
	cr.size = c.sources[0].Size()
	cr.backing, cr.backingFormat = cr.options["backing_file"], cr.options["backing_fmt"]
	if cr.encrypts() {
		return o, errorf("an encrypted image cannot be written as a stream")
	}
	q, err := cr.qcow2Options()
	o.QCOW2 = &q
	return o, err
}

// fromStandardInput opens standard input where it is a file, and spools it where it holds an image that is not read in
// order. raw is set, and nothing opened, for a raw disk that is: what was read of it already comes before the rest.
func (c *conversion) fromStandardInput(ctx context.Context, name string) (dev block.Device, raw io.Reader, err error) {
	in := c.in
	if name != "-" && name != "/dev/stdin" {
		f, err := os.Open(name)
		if err != nil {
			return nil, nil, fmt.Errorf("opening %q: %w", name, err)
		}
		c.inputs = append(c.inputs, f)
		in = f
	}
	if f, ok := in.(*os.File); ok {
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			dev, err := c.openAs(ctx, fmt.Sprintf("/dev/fd/%d", f.Fd()))
			return dev, nil, err
		}
	}
	head := make([]byte, 512)
	n, err := io.ReadFull(in, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, nil, fmt.Errorf("reading %q: %w", name, err)
	}
	in = io.MultiReader(bytes.NewReader(head[:n]), in)
	format := c.src.format
	if format == "" {
		format = block.Probe(head[:n])
	}
	if format == block.FormatRaw {
		return nil, in, nil
	}
	spooled, err := c.spoolInput(name, in)
	if err != nil {
		return nil, nil, err
	}
	dev, err = c.openAs(ctx, spooled)
	return dev, nil, err
}

// openAs opens a source under another name.
func (c *conversion) openAs(ctx context.Context, name string) (block.Device, error) {
	src := c.src
	if err := src.set(name); err != nil {
		return nil, err
	}
	return c.openDevice(ctx, &src, true)
}

// spoolInput copies a stream to a temporary file, which goes when the command ends.
func (c *conversion) spoolInput(name string, in io.Reader) (string, error) {
	dir := c.spool
	if dir == "" {
		dir = os.TempDir()
	}
	f, err := os.CreateTemp(dir, "drover-spool-")
	if err != nil {
		return "", fmt.Errorf("making a temporary file: %w", err)
	}
	c.spooled = append(c.spooled, f.Name())
	if !c.quiet {
		c.say("warning: %s is not read in order: it goes through a temporary file in %s (--spool=DIR chooses another folder)", name, dir)
	}
	_, err = io.Copy(f, in)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("spooling %s: %w", name, err)
	}
	return f.Name(), nil
}

// closeInputs closes what was opened for streams, and removes what was spooled.
func (c *conversion) closeInputs() error {
	var errs []error
	for _, f := range c.inputs {
		errs = append(errs, f.Close())
	}
	for _, name := range c.spooled {
		errs = append(errs, os.Remove(name))
	}
	return errors.Join(errs...)
}

// takeStream writes a raw disk that comes as a stream to a new image.
func (c *conversion) takeStream(ctx context.Context, in io.Reader) (err error) {
	switch {
	case c.noCreate || c.bitmaps || c.backing != "" || c.snapshot != "" || c.salvage || c.rate != "" || c.isStream(c.target, "/dev/stdout"):
		return errorf("-n, -B, -l, -r, --bitmaps, --salvage and a target that is a stream cannot be used with a stream of unknown length")
	}
	p := c.startProgress("convert", c.progress, c.quiet || c.output == "json")
	if err := c.takeInto(ctx, in, p); err != nil {
		p.newline()
		return err
	}
	p.end()
	if c.output == "json" && !c.quiet {
		return c.printResultOf(ctx, "convert", p.began, c.target, c.format)
	}
	return nil
}

func (c *conversion) takeInto(ctx context.Context, in io.Reader, p *progress) (err error) {
	if err := c.prepare(0); err != nil {
		return err
	}
	o := image.FromStreamOptions{Sparse: c.copying.Sparse, Progress: p.set}
	var target image.StreamTarget
	if c.format == "raw" {
		file, cerr := createFile(c.target)
		if cerr != nil {
			return cerr
		}
		defer func() { err = errors.Join(err, file.Close()) }()
		target = &image.FileTarget{File: file}
	} else {
		dev, oerr := c.openTarget(ctx)
		if oerr != nil {
			return oerr
		}
		defer func() { err = errors.Join(err, dev.Close()) }()
		im, ok := block.As[*qcow2.Image](dev)
		if !ok {
			return errorf("a stream of unknown length cannot be written to format '%s'", c.format)
		}
		if c.compress {
			o.Sparse = im.ClusterSize()
		}
		target = &image.ImageTarget{Image: im, Compress: c.compress}
	}
	if _, err = image.FromStream(ctx, in, target, o); err != nil {
		return convertError(err)
	}
	return c.syncNames()
}
