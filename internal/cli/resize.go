package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// resizer is one run of resize.
type resizer struct {
	*app
	src           source
	preallocation string
	quiet, shrink bool
	progress      progressFlag
	output        string
	bar           *progress
}

func (a *app) resizeCommand() *cobra.Command {
	r := &resizer{app: a}
	cmd := &cobra.Command{
		Use:   "resize [flags] FILE [+|-]SIZE",
		Short: "Make a disk larger or smaller",
		Long: `Give the disk inside an image another size, or one that is larger (+SIZE) or
smaller (-SIZE) by so much. What is added reads as zeroes.

Internal snapshots keep the size they were taken with. Making a disk smaller
deletes the data beyond its new end and must be asked for with --shrink.`,
		Example: `  drover resize disk.qcow2 +10G
  drover resize --shrink disk.qcow2 5G`,
		DisableFlagParsing: true, // the size may begin with a minus sign
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.name == program && (slices.Contains(args, "--help") || slices.Contains(args, "-h")) {
				return cmd.Help()
			}
			return r.run(cmd, args)
		},
	}
	f := cmd.Flags()
	r.src.add(cmd)
	f.StringVar(&r.preallocation, "preallocation", "", "how the added part is allocated: off, metadata, falloc or full")
	f.BoolVar(&r.shrink, "shrink", false, "allow the disk to become smaller")
	f.BoolVarP(&r.quiet, "quiet", "q", false, "print nothing but errors")
	addOwnProgress(f, &r.progress)
	resultFlag(cmd, &r.output)
	r.src.policy.add(f)
	return cmd
}

// preallocationModes are the modes by QEMU's names.
var preallocationModes = map[string]qcow2.Preallocation{
	"": qcow2.PreallocOff, "off": qcow2.PreallocOff, "metadata": qcow2.PreallocMetadata,
	"falloc": qcow2.PreallocFalloc, "full": qcow2.PreallocFull,
}

func (r *resizer) run(cmd *cobra.Command, args []string) error {
	if len(args) < 2 {
		return usagef("Not enough arguments")
	}
	text := args[len(args)-1]
	if err := cmd.Flags().Parse(args[:len(args)-1]); err != nil {
		return flagError(cmd, err)
	}
	mode, ok := preallocationModes[r.preallocation]
	if !ok {
		return errorf("Invalid preallocation mode '%s'", r.preallocation)
	}
	args = cmd.Flags().Args()
	if len(args) != 1 {
		return usagef("Expecting image file name and size")
	}
	sign, n, err := parseChange(text)
	if err != nil {
		return err
	}
	if err := checkOutput(r.output); err != nil {
		return err
	}
	if err := r.src.set(args[0]); err != nil {
		return err
	}
	r.bar = r.startProgress("resize", r.progress, r.quiet || r.output == "json")
	if err := r.resize(cmd.Context(), sign, n, mode); err != nil {
		r.bar.newline()
		return err
	}
	r.bar.end()
	switch {
	case r.quiet:
	case r.output == "json":
		return r.printResult(cmd.Context(), "resize", r.bar.began, r.src)
	default:
		r.printf("Image resized.\n")
	}
	return nil
}

// parseChange reads a size that a sign may stand before. One beyond every file is as good as the largest number.
func parseChange(text string) (sign, n int64, err error) {
	if rest, ok := strings.CutPrefix(text, "+"); ok {
		sign, text = 1, rest
	} else if rest, ok := strings.CutPrefix(text, "-"); ok {
		sign, text = -1, rest
	}
	n, err = block.ParseSize(text)
	if errors.Is(err, block.ErrSizeRange) {
		return sign, math.MinInt64, nil
	}
	if err != nil {
		return 0, 0, errorf("Parameter 'size' expects a non-negative number below 2^64\n" +
			"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n" +
			"and exabytes, respectively.")
	}
	return sign, n, nil
}

// newSize applies a change to a size and refuses what is no size.
func newSize(old, sign, n int64) (int64, error) {
	size := n
	switch {
	case n == math.MinInt64, sign > 0 && n > math.MaxInt64-old:
		size = 0
	case sign != 0:
		size = old + sign*n
	}
	if size <= 0 {
		return 0, errorf("New image size must be positive")
	}
	return size, nil
}

func (r *resizer) resize(ctx context.Context, sign, n int64, mode qcow2.Preallocation) (err error) {
	dev, err := r.openDevice(ctx, &r.src, false)
	if err != nil {
		return err
	}
	im, ok := dev.(*qcow2.Image)
	if !ok {
		// A raw disk is its file.
		if err := dev.Close(); err != nil {
			return err
		}
		return r.resizeRaw(sign, n, mode)
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	size, err := newSize(im.Size(), sign, n)
	if err != nil {
		return err
	}
	if err := r.allowed(im.Size(), size, mode); err != nil {
		return err
	}
	if size%storage.SectorSize != 0 {
		return errorf("The new size must be a multiple of %d", storage.SectorSize)
	}
	if err := im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: r.shrink, Preallocation: mode, Progress: r.bar.set}); err != nil {
		return errors.New(changeReason(err))
	}
	return nil
}

// allowed refuses what was not asked for.
func (r *resizer) allowed(old, size int64, mode qcow2.Preallocation) error {
	if size <= old && mode != qcow2.PreallocOff {
		return errorf("Preallocation can only be used for growing images")
	}
	if size < old && !r.shrink {
		return thenf(errorf("Use the --shrink option to perform a shrink operation."),
			"warning: Shrinking an image will delete all data beyond the shrunken image's end. "+
				"Before performing such an operation, make sure there is no important data there.")
	}
	return nil
}

func (r *resizer) resizeRaw(sign, n int64, mode qcow2.Preallocation) (err error) {
	file, _, err := r.src.openFileAs(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	old, err := file.Size()
	if err != nil {
		return err
	}
	size, err := newSize(old, sign, n)
	if err != nil {
		return err
	}
	return r.setRawFile(file, old, size, mode)
}

// setRawFile gives the file that is a disk another length.
func (r *resizer) setRawFile(file storage.File, old, size int64, mode qcow2.Preallocation) error {
	if err := r.allowed(old, size, mode); err != nil {
		return err
	}
	if file.Stat().Device {
		return errorf("Cannot resize device files")
	}
	var err error
	switch mode {
	case qcow2.PreallocMetadata:
		return errorf("Unsupported preallocation mode: metadata")
	case qcow2.PreallocFalloc:
		err = file.Preallocate(old, size-old)
	case qcow2.PreallocFull:
		err = writeZeroes(file, old, size)
	default:
		err = file.Truncate(size)
	}
	if err == nil {
		err = file.Sync()
	}
	if err != nil {
		return fmt.Errorf("Failed to resize underlying file: %s", changeReason(err)) //nolint:staticcheck // QEMU's words
	}
	return nil
}

// writeZeroes writes zeroes from old to size.
func writeZeroes(file storage.File, old, size int64) error {
	zeroes := make([]byte, 1<<20)
	for old < size {
		n := min(size-old, int64(len(zeroes)))
		if err := storage.WriteFull(file, zeroes[:n], old); err != nil {
			return err
		}
		old += n
	}
	return nil
}

// setRaw gives a raw disk, which nobody has open, a size, which may be 0.
func (r *resizer) setRaw(size int64, mode qcow2.Preallocation) (err error) {
	file, _, err := r.src.openFileAs(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	old, err := file.Size()
	if err != nil {
		return err
	}
	return r.setRawFile(file, old, size, mode)
}
