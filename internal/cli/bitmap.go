package cli

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// bitmapAction is one thing to do with a bitmap.
type bitmapAction struct{ verb, source string }

// bitmapFlag appends an action: they are done in the order in which they were given.
type bitmapFlag struct {
	list *[]bitmapAction
	verb string
}

func (f bitmapFlag) String() string { return "" }

func (f bitmapFlag) Type() string { return "SOURCE" }

func (f bitmapFlag) Set(value string) error {
	*f.list = append(*f.list, bitmapAction{f.verb, value})
	return nil
}

// bitmapRun is one run of bitmap.
type bitmapRun struct {
	*app
	output                  string
	src                     source
	actions                 []bitmapAction
	from, fromFormat        string
	granularity             string
	options                 qcow2.BitmapOptions
	name                    string
	dev                     block.Device
	hasGranularity, hasFrom bool
}

func (a *app) bitmapCommand() *cobra.Command {
	r := &bitmapRun{app: a}
	cmd := &cobra.Command{
		Use:   "bitmap [flags] FILE NAME",
		Short: "Add, remove, clear, enable, disable or merge a dirty bitmap",
		Long: `Work on a persistent dirty bitmap: a record, kept in the image, of which parts of
the disk were written since it was added or cleared. An enabled bitmap is kept up
to date by every writer; a disabled one stays as it is.

Several actions are done in the order in which they are given.`,
		Example: `  drover bitmap --add disk.qcow2 backup0
  drover bitmap --merge monday --merge tuesday disk.qcow2 week
  drover bitmap --remove --add disk.qcow2 backup0`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r.hasGranularity, r.hasFrom = cmd.Flags().Changed("granularity"), cmd.Flags().Changed("source-file")
			if err := checkOutput(r.output); err != nil {
				return err
			}
			began := time.Now()
			err := r.run(cmd.Context(), args, cmd.Flags().Changed("source-format"))
			if err != nil || r.output != "json" {
				return err
			}
			return r.printResult(cmd.Context(), "bitmap", began, r.src)
		},
	}
	f := cmd.Flags()
	for _, v := range [][2]string{
		{"add", "add the bitmap NAME"}, {"remove", "remove the bitmap"}, {"clear", "make nothing marked in it"},
		{"enable", "have it record what is written"}, {"disable", "have it stay as it is"},
	} {
		f.VarPF(bitmapFlag{&r.actions, v[0]}, v[0], "", v[1]).NoOptDefVal = "true"
	}
	f.Var(bitmapFlag{&r.actions, "merge"}, "merge", "mark in it whatever the bitmap `SOURCE` has marked")
	f.StringVarP(&r.from, "source-file", "b", "", "take the bitmaps to merge from image `FILE`")
	f.StringVarP(&r.fromFormat, "source-format", "F", "", "`format` of that image")
	f.StringVarP(&r.granularity, "granularity", "g", "", "`size` that one bit of a new bitmap stands for")
	r.src.add(cmd)
	if a.name == program {
		resultFlag(cmd, &r.output)
	} else {
		r.output = "human"
	}
	r.src.policy.add(f)
	return cmd
}

// run checks the arguments in the order in which qemu-img does, and does what they say.
func (r *bitmapRun) run(ctx context.Context, args []string, hasFromFormat bool) (err error) {
	if r.hasGranularity {
		n, err := block.ParseSize(r.granularity)
		if err != nil || n < 0 {
			return thenf(errorf("Invalid granularity specified. You may use k, M, G, T, P or E suffixes for"),
				"kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.")
		}
		r.options.Granularity = n
	}
	var add, merge bool
	for _, a := range r.actions {
		add, merge = add || a.verb == "add", merge || a.verb == "merge"
	}
	switch {
	case len(r.actions) == 0:
		return errorf("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
	case len(args) != 2:
		return errorf("Expecting filename and bitmap name")
	case r.options.Granularity != 0 && !add:
		return errorf("granularity only supported with --add")
	case hasFromFormat && !r.hasFrom:
		return errorf("-F only supported with -b")
	case r.hasFrom && !merge:
		return errorf("Merge bitmap source file only supported with --merge")
	}
	if err := r.src.set(args[0]); err != nil {
		return err
	}
	r.name = args[1]
	if r.dev, err = r.openDevice(ctx, &r.src, false); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.dev.Close()) }()
	from := r.dev
	if r.hasFrom {
		src := source{format: r.fromFormat, name: r.from, policy: r.src.policy}
		if from, err = r.openDevice(ctx, &src, true); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, from.Close()) }()
	}
	return r.act(ctx, from)
}

// act does one action after the other and stops at the first that fails.
func (r *bitmapRun) act(ctx context.Context, from block.Device) error {
	im, _ := r.dev.(*qcow2.Image)
	fromImage, _ := from.(*qcow2.Image)
	for _, a := range r.actions {
		err := r.doOne(ctx, im, fromImage, a)
		var inUse *qcow2.BitmapInUseError
		hint := ""
		if errors.As(err, &inUse) {
			hint = "\nTry block-dirty-bitmap-remove to delete this bitmap from disk"
		}
		if err != nil {
			return errorf("Operation %s on bitmap %s failed: %w%s", a.verb, r.name, err, hint)
		}
	}
	return nil
}

// doOne does one action. im and from are nil for formats without bitmaps.
func (r *bitmapRun) doOne(ctx context.Context, im, from *qcow2.Image, a bitmapAction) error {
	switch {
	case im == nil && a.verb == "add":
		return fmt.Errorf("Can't store persistent bitmaps to %s: %s", r.src.name, capital(syscall.ENOTSUP.Error()))
	case im == nil:
		return fmt.Errorf("Dirty bitmap '%s' not found", r.name)
	}
	switch a.verb {
	case "add":
		return im.AddBitmap(ctx, r.name, r.options)
	case "remove":
		return im.RemoveBitmap(ctx, r.name)
	case "clear":
		return im.ClearBitmap(ctx, r.name)
	case "enable":
		return im.EnableBitmap(ctx, r.name)
	case "disable":
		return im.DisableBitmap(ctx, r.name)
	}
	if from == nil {
		return fmt.Errorf("Dirty bitmap '%s' not found", a.source)
	}
	return im.MergeBitmap(ctx, r.name, from, a.source)
}
