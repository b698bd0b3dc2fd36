package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
)

// differing is one run of diff.
type differing struct {
	*app
	first, second       source
	granularity, output string
	extents, data       bool
	progress            progressFlag
	quiet               bool
	ranges, bytes       int64
	sizes               [2]int64
}

func (a *app) diffCommand() *cobra.Command {
	d := &differing{app: a}
	cmd := &cobra.Command{
		Use:   "diff [flags] FILE1 FILE2",
		Short: "List where two images, or snapshots of one, differ",
		Long: `List the ranges in which two disks differ, whatever the formats of the images.
` + sideHelp + `

By default (--data) what the guest reads is compared: "added" is data where the
first disk reads as zeroes, "removed" where the second does, "changed" anything
else. If one disk is longer, the other reads as zeroes behind its end. What both
take from the same place of the same file, as snapshots do, is not even read.

With --extents nothing is read: the ranges are listed that the images keep in
different ways (data, compressed, zero, unallocated), whatever they hold.

Exit codes: 0 no difference, 1 differences, 2 an image could not be opened, 3 or
4 an image could not be read.`,
		Example: `  drover diff disk.qcow2@before disk.qcow2
  drover diff --output=json old.qcow2 new.raw`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("Expecting two image file names")
			}
			return d.run(cmd.Context(), args)
		},
	}
	d.first.add(cmd)
	f := cmd.Flags()
	f.StringVarP(&d.second.format, "second-format", "F", "", "`format` of the second image; by default its content decides")
	f.BoolVar(&d.data, "data", false, "compare what the guest reads (the default)")
	f.BoolVar(&d.extents, "extents", false, "compare how ranges are kept, and read nothing")
	f.StringVarP(&d.granularity, "granularity", "g", "4k", "compare in units of `SIZE`, a multiple of 512")
	d.progress.apart = true
	addProgress(f, &d.progress)
	f.BoolVarP(&d.quiet, "quiet", "q", false, "print no ranges")
	outputFlag(cmd, &d.output)
	d.first.policy.add(f)
	return cmd
}

func (d *differing) run(ctx context.Context, names []string) (err error) {
	if err := checkOutput(d.output); err != nil {
		return err
	}
	if d.data && d.extents {
		return usagef("--data and --extents are mutually exclusive")
	}
	o := image.DiffOptions{Status: d.extents}
	if o.Granularity, err = parseSize("granularity", d.granularity); err != nil {
		return err
	}
	second := d.first
	second.format = d.second.format
	d.second = second
	var devs [2]block.Device
	for i, src := range []*source{&d.first, &d.second} {
		if devs[i], err = d.openSide(ctx, src, names[i]); err != nil {
			return &exitError{exitNoOpen, err.Error()}
		}
		defer func() { err = errors.Join(err, devs[i].Close()) }()
		d.sizes[i] = devs[i].Size()
	}
	p := d.startProgress("diff", d.progress, d.quiet)
	o.Progress = p.set
	d.begin()
	err = image.Diff(ctx, devs[0], devs[1], o, d.add)
	if err != nil {
		p.newline()
		return compareError(names, err)
	}
	p.end()
	d.finish()
	if d.ranges > 0 {
		return &exitError{code: exitDiffer}
	}
	return nil
}

func (d *differing) begin() {
	switch {
	case d.quiet:
	case d.output == "json":
		d.printf("{\n    \"sizes\": [%d, %d],\n    \"ranges\": [", d.sizes[0], d.sizes[1])
	case d.sizes[0] != d.sizes[1]:
		d.printf("The sizes differ: %d and %d bytes\n", d.sizes[0], d.sizes[1])
	}
}

// add prints a range, as soon as it is found: there may be millions.
func (d *differing) add(r image.DiffRange) error {
	first := d.ranges == 0
	d.ranges++
	d.bytes += r.Len
	what := r.Kind.String()
	switch {
	case d.quiet:
		return nil
	case d.output == "json":
		sep := ","
		if first {
			sep = ""
		}
		if d.extents {
			what = fmt.Sprintf(`"first": %q, "second": %q`, r.States[0], r.States[1])
		} else {
			what = fmt.Sprintf(`"change": %q`, what)
		}
		d.printf("%s\n        { \"start\": %d, \"length\": %d, %s }", sep, r.Off, r.Len, what)
		return nil
	}
	if d.extents {
		what = r.States[0] + " / " + r.States[1]
	}
	if first {
		d.printf("%-16s%-16s%s\n", "Offset", "Length", "Difference")
	}
	d.printf("%-16s%-16s%s\n", hex(r.Off), hex(r.Len), what)
	return nil
}

func (d *differing) finish() {
	switch {
	case d.quiet:
	case d.output == "json":
		end := "\n    "
		if d.ranges == 0 {
			end = ""
		}
		d.printf("%s],\n    \"bytes\": %d\n}\n", end, d.bytes)
	case d.ranges == 0:
		d.printf("No differences.\n")
	default:
		d.printf("%s in %d ranges\n", humanSize(uint64(d.bytes)), d.ranges)
	}
}
