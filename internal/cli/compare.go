package cli

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
)

// Exit codes of compare beside 0, the images are identical.
const (
	exitDiffer   = 1
	exitNoOpen   = 2
	exitNoStatus = 3
	exitNoRead   = 4
)

func (a *app) compareCommand() *cobra.Command {
	var c comparison
	cmd := &cobra.Command{
		Use:   "compare [flags] FILE1 FILE2",
		Short: "Tell whether two images hold the same disk",
		Long: `Tell whether two images hold the same disk, whatever their formats. If one is
longer, the rest of it has to read as zeroes.

Exit codes: 0 identical, 1 different, 2 an image could not be opened, 3 or 4 an
image could not be read.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("Expecting two image file names")
			}
			c.app = a
			return c.run(cmd.Context(), args)
		},
	}
	c.first.add(cmd)
	f := cmd.Flags()
	f.StringVarP(&c.second.format, "second-format", "F", "", "`format` of the second image; by default its content decides")
	f.StringVarP(&c.cache, "cache", "T", "", "cache `mode` of qemu-img (accepted, without effect)")
	addProgress(f, &c.progress)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print nothing but errors")
	f.BoolVarP(&c.strict, "strict", "s", false, "want the same size and the same allocation as well")
	outputFlag(cmd, &c.output)
	c.first.policy.add(f)
	return cmd
}

// comparison is one run of compare.
type comparison struct {
	*app
	first, second source
	cache, output string
	quiet, strict bool
	progress      progressFlag
}

func (c *comparison) run(ctx context.Context, names []string) (err error) {
	if err := checkOutput(c.output); err != nil {
		return err
	}
	if err := checkCache(c.cache); err != nil {
		return &exitError{exitNoOpen, fmt.Sprintf("Invalid source cache option: %s", c.cache)}
	}
	second := c.first
	second.format = c.second.format
	c.second = second
	var devs [2]block.Device
	for i, src := range []*source{&c.first, &c.second} {
		if err := src.set(names[i]); err != nil {
			return &exitError{exitNoOpen, err.Error()}
		}
		if devs[i], err = c.openDevice(ctx, src, true); err != nil {
			return &exitError{exitNoOpen, err.Error()}
		}
		defer func() {
			if cerr := devs[i].Close(); err == nil {
				err = cerr
			}
		}()
	}
	p := c.startProgress("compare", c.progress, c.quiet || c.output != "human")
	result, err := image.Compare(ctx, devs[0], devs[1], image.CompareOptions{Strict: c.strict, Progress: p.set})
	if err != nil {
		p.newline()
		return compareError(names, err)
	}
	if result.Verdict == image.Identical {
		p.full()
	}
	if c.output == "json" {
		err = c.printResult(result)
	} else {
		c.printVerdict(result)
	}
	p.newline()
	if err == nil && result.Verdict != image.Identical {
		return &exitError{code: exitDiffer}
	}
	return err
}

func (c *comparison) printVerdict(r image.Comparison) {
	if c.quiet {
		return
	}
	if r.Longer {
		c.printf("Warning: Image size mismatch!\n")
	}
	switch r.Verdict {
	case image.Identical:
		c.printf("Images are identical.\n")
	case image.ContentDiffers:
		c.printf("Content mismatch at offset %d!\n", r.Off)
	case image.StatusDiffers:
		c.printf("Strict mode: Offset %d block status mismatch!\n", r.Off)
	case image.SizeDiffers:
		c.printf("Strict mode: Image size mismatch!\n")
	}
}

// compareResult is the JSON of compare.
type compareResult struct {
	Identical  bool   `json:"identical"`
	Difference string `json:"difference,omitempty"` // "content", "status" or "size"
	Offset     *int64 `json:"offset,omitempty"`
	SameSize   bool   `json:"same-size"`
}

func (c *comparison) printResult(r image.Comparison) error {
	if c.quiet {
		return nil
	}
	j := compareResult{Identical: r.Verdict == image.Identical, SameSize: !r.Longer && r.Verdict != image.SizeDiffers}
	switch r.Verdict {
	case image.ContentDiffers:
		j.Difference, j.Offset = "content", &r.Off
	case image.StatusDiffers:
		j.Difference, j.Offset = "status", &r.Off
	case image.SizeDiffers:
		j.Difference = "size"
	}
	return c.printJSON(j)
}

func compareError(names []string, err error) error {
	var status *image.StatusError
	var read *image.ReadError
	switch {
	case errors.As(err, &status):
		return &exitError{exitNoStatus, fmt.Sprintf("Sector allocation test failed for %s", names[status.Dev])}
	case errors.As(err, &read):
		return &exitError{exitNoRead, fmt.Sprintf("Error while reading offset %d of %s: %s", read.Off, names[read.Dev],
			readReason(read.Err))}
	}
	return err
}

// readReason words why a disk could not be read.
func readReason(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return capital(errno.Error())
	}
	return err.Error()
}
