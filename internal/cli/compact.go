package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/qcow2"
)

// compacting is one run of compact.
type compacting struct {
	*app
	src           source
	output        string
	dryRun, quiet bool
	progress      progressFlag
}

func (a *app) compactCommand() *cobra.Command {
	c := &compacting{app: a}
	cmd := &cobra.Command{
		Use:   "compact [flags] FILE",
		Short: "Move an image's data together and cut the free end of the file off",
		Long: `Reclaim the free space inside a qcow2 image, in place: what stands at the end of
the file is moved into holes before it, and the end is cut off. The disk and all
snapshots hold what they held. It can be interrupted at any time, even by a
power cut; what has been moved stays so.

Only space that the image itself no longer uses is reclaimed: discard what the
guest no longer uses first (fstrim in the guest), or delete snapshots. Leaked
clusters are freed on the way. An image with corruptions is refused: see
'drover check'.

An image that is being served is compacted through its server.`,
		Example: `  drover compact --dry-run disk.qcow2
  drover compact -p disk.qcow2`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(c.output); err != nil {
				return err
			}
			if err := c.src.set(args[0]); err != nil {
				return err
			}
			return c.run(cmd.Context())
		},
	}
	c.src.add(cmd)
	f := cmd.Flags()
	f.BoolVarP(&c.dryRun, "dry-run", "n", false, "change nothing, tell how much would be gained")
	addProgress(f, &c.progress)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print nothing but errors")
	outputFlag(cmd, &c.output)
	c.src.policy.add(f)
	return cmd
}

func (c *compacting) run(ctx context.Context) error {
	freed, err := c.examine(ctx)
	if err != nil {
		return err
	}
	c.src.noData = c.dryRun
	rep, err := c.compact(ctx)
	if rep == nil {
		return err
	}
	rep.OldSize += freed
	if printErr := c.print(rep); err == nil {
		err = printErr
	}
	return err
}

// examine refuses an image in which something is wrong, and frees what nobody uses. It returns how much shorter the file is
// for that.
func (c *compacting) examine(ctx context.Context) (freed int64, err error) {
	file, format, err := c.src.openFileAs(c.dryRun)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if format != "qcow2" {
		return 0, errorf("Images of format %s have nothing that could be compacted", format)
	}
	rep, err := qcow2.CheckFile(ctx, file, qcow2.CheckOptions{})
	if err != nil {
		return 0, errorf("Could not check '%s': %w", c.src.name, err)
	}
	switch {
	case rep.Dirty && !rep.Corrupt: // whoever opens it for writing repairs it first
		return 0, nil
	case rep.Corruptions > 0 || rep.CheckErrors > 0 || rep.Corrupt:
		return 0, errorf("'%s' has %d corruptions: repair it first (drover check -r all)", c.src.name, rep.Corruptions)
	case rep.Leaks == 0 || c.dryRun:
		return 0, nil
	}
	before, err := file.Size()
	if err != nil {
		return 0, err
	}
	if _, err := qcow2.RepairFile(ctx, file, qcow2.RepairOptions{Mode: qcow2.RepairLeaks}); err != nil {
		return 0, errorf("Could not free the leaked clusters of '%s': %w", c.src.name, err)
	}
	after, err := file.Size()
	return before - after, err
}

func (c *compacting) compact(ctx context.Context) (rep *qcow2.CompactReport, err error) {
	dev, err := c.openDevice(ctx, &c.src, c.dryRun)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	im, ok := dev.(*qcow2.Image)
	if !ok {
		return nil, errorf("Could not compact '%s': there is something above the image", c.src.name)
	}
	p := c.startProgress("compact", c.progress, c.quiet || c.dryRun || c.output != "human")
	rep, err = im.Compact(ctx, qcow2.CompactOptions{DryRun: c.dryRun, Progress: p.set})
	if err != nil {
		p.newline()
		return rep, errorf("Could not compact '%s': %w", c.src.name, err)
	}
	p.end()
	return rep, nil
}

// compactResult is the JSON of compact.
type compactResult struct {
	Filename string `json:"filename"`
	DryRun   bool   `json:"dry-run,omitempty"`
	OldSize  int64  `json:"old-size"`
	NewSize  int64  `json:"new-size"`
	Moved    int64  `json:"moved"`
	Free     int64  `json:"free"`
	Leaked   int64  `json:"leaked-clusters"`
}

func (c *compacting) print(r *qcow2.CompactReport) error {
	res := compactResult{c.src.name, c.dryRun, r.OldSize, r.NewSize, r.Moved, r.Free, r.Leaked}
	if c.output == "json" {
		return c.printJSON(res)
	}
	if !c.quiet {
		c.printCompacted(res)
	}
	return nil
}

func (a *app) printCompacted(r compactResult) {
	size := func(n int64) string { return humanSize(uint64(max(n, 0))) }
	verb, moved := "has become", "was"
	if r.DryRun {
		verb, moved = "would become", "would be"
	}
	if r.NewSize >= r.OldSize {
		a.printf("The file of %s has no space to be reclaimed.\n", size(r.OldSize))
	} else {
		a.printf("The file %s %s shorter: %s instead of %s; %s %s moved.\n", verb, size(r.OldSize-r.NewSize), size(r.NewSize),
			size(r.OldSize), size(r.Moved), moved)
	}
	if r.Leaked > 0 {
		a.printf("%d leaked clusters stand in the way: 'drover check -r leaks' frees them.\n", r.Leaked)
	}
	if r.Free > 0 && !r.DryRun {
		a.printf("%s could not be filled.\n", size(r.Free))
	}
}
