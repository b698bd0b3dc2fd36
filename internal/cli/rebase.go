package cli

import (
	"context"
	"errors"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// rebaser is one run of rebase.
type rebaser struct {
	*app
	src                         source
	backing, backingFormat      string
	cache, sourceCache          string
	unsafe, showProgress, quiet bool
	backingGiven                bool
}

func (a *app) rebaseCommand() *cobra.Command {
	r := &rebaser{app: a}
	cmd := &cobra.Command{
		Use:   "rebase -u [flags] FILE",
		Short: "Change the backing file that an image names",
		Long: `Change the name and the format of the backing file in an image, without looking
at the backing file: what the image does not hold itself is read from the new
one from then on. An empty name, or none, means no backing file.`,
		Example: `  drover rebase -u -b base.qcow2 -F qcow2 overlay.qcow2
  drover rebase -u -b "" flat.qcow2`,
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
	f.BoolVarP(&r.showProgress, "progress", "p", false, "show how far it is")
	f.BoolVarP(&r.quiet, "quiet", "q", false, "print nothing but errors")
	cacheFlag(f, &r.cache)
	f.StringVarP(&r.sourceCache, "source-cache", "T", "", "cache `mode` of qemu-img for the backing file (accepted, without effect)")
	r.src.policy.add(f)
	return cmd
}

func (r *rebaser) run(cmd *cobra.Command, args []string) error {
	if err := oneImage(cmd, args); err != nil {
		return err
	}
	if !r.unsafe && !r.backingGiven {
		return usagef("Must specify backing file (-b) or use unsafe mode (-u)")
	}
	if !r.unsafe {
		return errorf("Comparing the backing files is not available in this version: use unsafe mode (-u)")
	}
	for _, cache := range []string{r.cache, r.sourceCache} {
		if err := checkCache(cache); err != nil {
			return err
		}
	}
	if err := r.src.set(args[0]); err != nil {
		return err
	}
	return r.rebase(cmd.Context())
}

func (r *rebaser) rebase(ctx context.Context) (err error) {
	dev, err := r.openAlone(ctx, &r.src)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if checkFormat(r.backingFormat) != nil {
		return errorf("Invalid format name: '%s'", r.backingFormat)
	}
	bar := newProgress(r.out, r.showProgress && !r.quiet)
	im, ok := dev.(*qcow2.Image)
	if !ok {
		return errorf("Could not change the backing file to '%s': %s", r.backing, capital(syscall.ENOTSUP.Error()))
	}
	name, format := r.backing, r.backingFormat
	if name == "" {
		format = ""
	}
	if err := im.ChangeBacking(ctx, name, format); err != nil {
		return errorf("Could not change the backing file to '%s': %s", name, backingReason(err))
	}
	bar.end()
	return nil
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
	dev, err := block.Open(ctx, src.name, o)
	if err != nil {
		return nil, openError(src.name, err)
	}
	return dev, nil
}
