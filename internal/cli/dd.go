package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
)

func (a *app) ddCommand() *cobra.Command {
	d := dd{blockSize: 512}
	cmd := &cobra.Command{
		Use:   "dd [flags] [bs=SIZE] [count=N] [skip=N] if=FILE of=TARGET",
		Short: "Copy a part of a disk to another image",
		Long: `Copy blocks of a disk to a new image: those after the first skip=N, up to block
count=N. (As in qemu-img, count includes the blocks that are skipped.)`,
		RunE: func(cmd *cobra.Command, args []string) error {
			d.app = a
			return d.run(cmd.Context(), args)
		},
	}
	d.src.add(cmd)
	cmd.Flags().StringVarP(&d.format, "target-format", "O", "raw", "`format` of the target: raw or qcow2")
	addOwnProgress(cmd.Flags(), &d.progress)
	resultFlag(cmd, &d.output)
	d.src.policy.add(cmd.Flags())
	return cmd
}

// dd is one run of dd.
type dd struct {
	*app
	src         source
	format      string
	in, out     string
	blockSize   int64
	count, skip int64
	counted     bool
	progress    progressFlag
	output      string
}

func (d *dd) run(ctx context.Context, args []string) (err error) {
	if err := checkOutput(d.output); err != nil {
		return err
	}
	for _, arg := range args {
		if err := d.operand(arg); err != nil {
			return err
		}
	}
	if d.in == "" || d.out == "" {
		return errorf("Must specify both input and output files")
	}
	if err := d.src.set(d.in); err != nil {
		return err
	}
	known, ok := map[string][]createOption{"raw": rawOptions, "qcow2": qcow2Options}[d.format]
	dev, err := d.openDevice(ctx, &d.src, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if !ok {
		return errorf("Unknown file format")
	}
	part, err := d.window(dev)
	if err != nil {
		return err
	}
	target, err := d.create(ctx, known, part.Size())
	if err != nil {
		return err
	}
	bar := d.startProgress("dd", d.progress, d.output == "json")
	o := image.ConvertOptions{Sparse: 4096, Zero: true, Workers: 8, Progress: bar.set}
	err = image.Convert(ctx, target, []block.Device{part}, o)
	err = errors.Join(ddError(err), target.Close())
	if err == nil {
		err = syncFolder(d.out)
	}
	if err != nil {
		bar.newline()
		return err
	}
	bar.end()
	if d.output == "json" {
		return d.printResultOf(ctx, "dd", bar.began, d.out, d.format)
	}
	return nil
}

func (d *dd) operand(arg string) error {
	name, value, ok := strings.Cut(arg, "=")
	number := func(to *int64) (err error) {
		*to, err = parseSize(name, value)
		return err
	}
	switch {
	case !ok:
	case name == "if":
		d.in = value
		return nil
	case name == "of":
		d.out = value
		return nil
	case name == "bs":
		n, err := block.ParseSize(value)
		if err == nil && (n < 1 || n > math.MaxInt32) || errors.Is(err, block.ErrSizeRange) {
			return errorf("Invalid bs specified. Must be between 1 and %d.", math.MaxInt32)
		}
		return number(&d.blockSize)
	case name == "count":
		d.counted = true
		return number(&d.count)
	case name == "skip":
		return number(&d.skip)
	}
	return errorf("unrecognized operand %s", name)
}

// window is the part of the disk that is to be copied.
func (d *dd) window(dev block.Device) (block.Device, error) {
	end := dev.Size()
	if d.counted && d.count <= math.MaxInt64/d.blockSize {
		end = min(end, d.count*d.blockSize)
	}
	begin := end
	if d.skip <= end/d.blockSize {
		begin = d.skip * d.blockSize
	} else {
		d.say("%s: cannot skip to specified offset", d.in)
	}
	return image.Window(dev, begin, end-begin)
}

// create makes the target and opens it.
func (d *dd) create(ctx context.Context, known []createOption, size int64) (block.Device, error) {
	c := creator{app: d.app, format: d.format, file: d.out, size: size, hasSize: true}
	err := c.parseOptions(known)
	if err == nil {
		c.options["size"] = strconv.FormatInt(size, 10)
		err = c.create(ctx)
	}
	if err != nil {
		return nil, errorf("%s: error while creating output image: %s", d.out, createReason(d.out, err))
	}
	dev, err := openNamed(ctx, d.out, block.OpenOptions{Format: d.format, Policy: d.src.policy.policy()})
	if err != nil {
		return nil, openError(d.out, err)
	}
	return dev, nil
}

func ddError(err error) error {
	var read *image.ReadError
	var write *image.WriteError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &read):
		return errorf("error while reading from input image file: %s", readReason(read.Err))
	case errors.As(err, &write):
		return errorf("error while writing to output image file: %s", readReason(write.Err))
	}
	return fmt.Errorf("copying: %w", err)
}
