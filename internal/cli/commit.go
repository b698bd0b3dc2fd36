package cli

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
)

// committing is one run of commit.
type committing struct {
	*app
	src               source
	base, cache, rate string
	baseGiven, drop   bool
	quiet             bool
	progress          progressFlag
	output            string
	copying           image.CommitOptions
}

func (a *app) commitCommand() *cobra.Command {
	c := &committing{app: a}
	cmd := &cobra.Command{
		Use:   "commit [flags] FILE",
		Short: "Write what an image holds into its backing file",
		Long: `Write what an image holds into its backing file, and empty the image. Whatever
stops it, nothing is lost: commit once more.

With -b the target is BASE, further down, which then is not the image that
stands above it any more: what stood between is of no use, and so is FILE, which
is therefore not emptied.`,
		Example: `  drover commit overlay.qcow2
  drover commit -b base.qcow2 top.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.baseGiven = cmd.Flags().Changed("base")
			return c.run(cmd, args)
		},
	}
	f := cmd.Flags()
	c.src.add(cmd)
	cacheFlag(f, &c.cache)
	f.StringVarP(&c.base, "base", "b", "", "write into `BASE` further down in the chain (implies -d)")
	f.BoolVarP(&c.drop, "drop", "d", false, "do not empty FILE, which is going to be deleted")
	f.StringVarP(&c.rate, "rate-limit", "r", "", "write at most `RATE` bytes a second")
	addProgress(f, &c.progress)
	resultFlag(cmd, &c.output)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print nothing but errors")
	c.src.policy.add(f)
	return cmd
}

func (c *committing) run(cmd *cobra.Command, args []string) error {
	if c.rate != "" {
		var err error
		if c.copying.Rate, err = parseSize("rate limit", c.rate); err != nil {
			return err
		}
	}
	if err := checkOutput(c.output); err != nil {
		return err
	}
	if err := oneImage(cmd, args); err != nil {
		return err
	}
	if err := checkCache(c.cache); err != nil {
		return err
	}
	if err := c.src.set(args[0]); err != nil {
		return err
	}
	return c.commit(cmd.Context())
}

func (c *committing) commit(ctx context.Context) (err error) {
	depth := 1
	if c.baseGiven {
		if depth, err = c.findBase(ctx); err != nil {
			return err
		}
	}
	dev, err := c.openChain(ctx, &c.src, depth)
	if err != nil {
		return err
	}
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, dev.Close())
		}
	}()
	p := c.startProgress("commit", c.progress, c.quiet || c.output == "json")
	c.copying.Depth, c.copying.Keep, c.copying.Progress = depth, c.drop || c.baseGiven, p.set
	if err := image.Commit(ctx, dev, c.copying); err != nil {
		p.newline()
		return commitError(err)
	}
	closed = true
	if err := dev.Close(); err != nil {
		p.newline()
		return err
	}
	p.end()
	switch {
	case c.quiet:
	case c.output == "json":
		return c.printResult(ctx, "commit", p.began, c.src)
	default:
		c.printf("Image committed.\n")
	}
	return nil
}

// findBase returns how far down in the chain the base is that the user named.
func (c *committing) findBase(ctx context.Context) (depth int, err error) {
	dev, err := c.openDevice(ctx, &c.src, true)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if depth = findLayer(image.Layers(dev), c.base); depth == 0 {
		return 0, errorf("Did not find '%s' in the backing chain of '%s'", c.base, c.src.name)
	}
	return depth, nil
}

// findLayer returns which layer a name means, which may be relative to the image above it; 0 if there is none.
func findLayer(layers []block.Device, name string) int {
	for i := 1; i < len(layers); i++ {
		above, file := layers[i-1].Info().Name, layers[i].Info().Name
		if samePath(block.ResolveName(above, name), file) {
			return i
		}
	}
	return 0
}

// samePath reports whether two names lead to one place.
func samePath(a, b string) bool {
	for _, p := range []*string{&a, &b} {
		real, err := filepath.EvalSymlinks(*p)
		if err == nil {
			real, err = filepath.Abs(real)
		}
		if err != nil {
			return false
		}
		*p = real
	}
	return a == b
}

// openChain opens an image for writing and, for writing too, the one so many layers below it.
func (a *app) openChain(ctx context.Context, src *source, depth int) (block.Device, error) {
	if err := src.checkFormat(); err != nil {
		return nil, err
	}
	if src.forceShare {
		return nil, errorf("Could not open '%s': force-share=on can only be used with read-only images", src.name)
	}
	o := src.openOptions()
	o.ReadOnly, o.WriteDepth = false, depth
	o.OnRepair = a.tellRepair
	dev, err := block.Open(ctx, src.name, o)
	if err != nil {
		return nil, openError(src.name, err)
	}
	return dev, nil
}

func commitError(err error) error {
	if errors.Is(err, image.ErrNoBacking) {
		return image.ErrNoBacking
	}
	return errors.New(changeReason(err))
}
