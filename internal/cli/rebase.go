package cli

import (
	"context"
	"errors"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
)

// rebaser is one run of rebase.
type rebaser struct {
	*app
	src                    source
	backing, backingFormat string
	cache, sourceCache     string
	unsafe, quiet          bool
	progress               progressFlag
	output                 string
	compress, shareBacking bool
	backingGiven           bool
}

func (a *app) rebaseCommand() *cobra.Command {
	r := &rebaser{app: a}
	cmd := &cobra.Command{
		Use:   "rebase [flags] FILE",
		Short: "Put an image on another backing file",
		Long: `Put an image on another backing file. What the disk reads as stays: where the old
and the new backing file differ, the old content is copied into the image first.
An empty name means no backing file: then everything is copied.

With -u the backing file is only named: nobody looks at it, and what the image
does not hold itself is read from the new one from then on.`,
		Example: `  drover rebase -b base.qcow2 -F qcow2 overlay.qcow2
  drover rebase -b "" overlay.qcow2
  drover rebase -u -b renamed.qcow2 -F qcow2 overlay.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r.backingGiven = cmd.Flags().Changed("backing")
			return r.run(cmd, args)
		},
	}
	f := cmd.Flags()
	r.src.add(cmd)
	f.StringVarP(&r.backing, "backing", "b", "", "`FILE` that holds what the image does not")
	f.StringVarP(&r.backingFormat, "backing-format", "F", "", "`format` of the backing file")
	f.BoolVarP(&r.unsafe, "unsafe", "u", false, "change the name only; the backing file must be what it was")
	f.BoolVarP(&r.compress, "compress", "c", false, "compress what is copied into the image")
	addProgress(f, &r.progress)
	resultFlag(cmd, &r.output)
	f.BoolVarP(&r.quiet, "quiet", "q", false, "print nothing but errors")
	cacheFlag(f, &r.cache)
	f.StringVarP(&r.sourceCache, "source-cache", "T", "", "cache `mode` of qemu-img for the backing file (accepted, without effect)")
	r.src.policy.add(f)
	return cmd
}

func (r *rebaser) run(cmd *cobra.Command, args []string) error {
	// -U is about the new backing file: the image itself is written.
	r.shareBacking, r.src.forceShare = r.src.forceShare, false
	if err := checkOutput(r.output); err != nil {
		return err
	}
	if err := oneImage(cmd, args); err != nil {
		return err
	}
	if !r.unsafe && !r.backingGiven {
		return usagef("Must specify backing file (-b) or use unsafe mode (-u)")
	}
	if checkCache(r.cache) != nil {
		return errorf("Invalid cache option: %s", r.cache)
	}
	if checkCache(r.sourceCache) != nil {
		return errorf("Invalid source cache option: %s", r.sourceCache)
	}
	if err := r.src.set(args[0]); err != nil {
		return err
	}
	return r.rebase(cmd.Context())
}

func (r *rebaser) rebase(ctx context.Context) error {
	bar, err := r.rebaseImage(ctx)
	if err != nil || r.output != "json" || r.quiet {
		return err
	}
	return r.printResult(ctx, "rebase", bar.began, r.src)
}

func (r *rebaser) rebaseImage(ctx context.Context) (bar *progress, err error) {
	open := r.openDevice
	if r.unsafe {
		open = func(ctx context.Context, src *source, _ bool) (block.Device, error) { return r.openAlone(ctx, src) }
	}
	dev, err := open(ctx, &r.src, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	bar = r.startProgress("rebase", r.progress, r.quiet || r.output == "json")
	if checkFormat(r.backingFormat) != nil {
		bar.newline()
		return nil, errorf("Invalid format name: '%s'", r.backingFormat)
	}
	o := image.RebaseOptions{Name: r.backing, Format: r.backingFormat, Compress: r.compress, Progress: bar.set}
	if o.Name == "" {
		o.Format = ""
	}
	if o.Name != "" && !r.unsafe {
		if o.Backing, err = r.openNew(ctx, dev.Info().Name); err != nil {
			bar.newline()
			return nil, err
		}
		defer func() { err = errors.Join(err, o.Backing.Close()) }()
	}
	if err := r.move(ctx, dev, o); err != nil {
		bar.newline()
		return nil, rebaseError(o.Name, err)
	}
	bar.end()
	return bar, nil
}

// move gives the image its new backing file.
func (r *rebaser) move(ctx context.Context, dev block.Device, o image.RebaseOptions) error {
	im, ok := block.As[*qcow2.Image](dev)
	switch {
	case !ok:
		return syscall.ENOTSUP
	case r.unsafe:
		return im.ChangeBacking(ctx, o.Name, o.Format)
	}
	return image.Rebase(ctx, im, o)
}

// openNew opens the new backing file, whose name is relative to the image's folder. It is the user's own word.
func (r *rebaser) openNew(ctx context.Context, overlay string) (block.Device, error) {
	src := source{format: r.backingFormat, forceShare: r.shareBacking, policy: r.src.policy, objects: r.src.objects}
	name := r.backing
	if !hasProtocol(name) {
		name = block.ResolveName(overlay, name)
	}
	if err := src.set(name); err != nil {
		return nil, err
	}
	dev, err := block.Open(ctx, name, src.openOptions())
	if err != nil {
		return nil, errorf("Could not open new backing file '%s': %s", r.backing, openReason(name, err))
	}
	return dev, nil
}

func rebaseError(name string, err error) error {
	var status *image.StatusError
	var read *image.ReadError
	var write *image.WriteError
	switch {
	case errors.As(err, &status):
		return errorf("error while reading image metadata: %s", readReason(status.Err))
	case errors.As(err, &read) && read.Dev == 0:
		return errorf("error while reading from old backing file")
	case errors.As(err, &read):
		return errorf("error while reading from new backing file")
	case errors.As(err, &write):
		return errorf("Error while writing to COW image: %s", readReason(write.Err))
	}
	return errorf("Could not change the backing file to '%s': %s", name, backingReason(err))
}

func backingReason(err error) string {
	switch {
	case errors.Is(err, qcow2.ErrHeaderSpace):
		return qcow2.ErrHeaderSpace.Error()
	case errors.Is(err, qcow2.ErrBackingFormat):
		return qcow2.ErrBackingFormat.Error()
	case errors.Is(err, qcow2.ErrInvalidOption):
		return capital(syscall.EINVAL.Error())
	}
	return changeReason(err)
}

// openAlone opens an image for writing without the images below it.
func (a *app) openAlone(ctx context.Context, src *source) (block.Device, error) {
	if err := src.checkFormat(); err != nil {
		return nil, err
	}
	if src.forceShare {
		return nil, errorf("Could not open '%s': force-share=on can only be used with read-only images", src.name)
	}
	o := src.openOptions()
	o.ReadOnly, o.NoBacking = false, true
	o.OnRepair = a.tellRepair
	dev, err := block.Open(ctx, src.name, o)
	if err != nil {
		return nil, openError(src.name, err)
	}
	return dev, nil
}
