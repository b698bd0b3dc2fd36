package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/qcow2"
)

// Exit codes of check beside 0 and 1.
const (
	exitCorrupt       = 2
	exitLeaks         = 3
	exitNotCheckable  = 63
	msgNotCheckable   = "This image format does not support checks"
	msgRepairArgument = "Unknown option value for -r (expecting 'leaks' or 'all'): %s"
)

func (a *app) checkCommand() *cobra.Command {
	var src source
	var output, repair, cache string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "check [flags] FILE",
		Short: "Check an image for errors",
		Long: `Check the metadata of an image for errors. Nothing is changed.

Exit codes: 0 no errors, 1 the check could not be made, 2 errors, 3 leaked
clusters but no errors, 63 the format has nothing to check.`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("repair") {
				if repair != "leaks" && repair != "all" {
					return usagef(msgRepairArgument, repair)
				}
				return errors.New("this version does not repair images; use 'qemu-img check -r " + repair + "'")
			}
			if err := checkOutput(output); err != nil {
				return err
			}
			if err := src.set(args[0]); err != nil {
				return err
			}
			return a.check(cmd.Context(), &src, output == "json", quiet)
		},
	}
	src.add(cmd)
	outputFlag(cmd, &output)
	f := cmd.Flags()
	f.StringVarP(&repair, "repair", "r", "", "repair `leaks` or all (not in this version)")
	f.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	f.StringVarP(&cache, "cache", "T", "", "cache `mode` of qemu-img (accepted, without effect)")
	return cmd
}

// checkResult is the JSON of check, by QEMU's names. Zeroes are left out, all but the first.
type checkResult struct {
	ImageEndOffset int64  `json:"image-end-offset,omitempty"`
	TotalClusters  int64  `json:"total-clusters,omitempty"`
	Corruptions    int64  `json:"corruptions,omitempty"`
	CheckErrors    int64  `json:"check-errors"`
	Leaks          int64  `json:"leaks,omitempty"`
	Allocated      int64  `json:"allocated-clusters,omitempty"`
	Fragmented     int64  `json:"fragmented-clusters,omitempty"`
	Compressed     int64  `json:"compressed-clusters,omitempty"`
	Filename       string `json:"filename"`
	Format         string `json:"format"`
}

func (a *app) check(ctx context.Context, src *source, asJSON, quiet bool) (err error) {
	file, format, err := src.openFile()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if format != "qcow2" {
		return &exitError{exitNotCheckable, msgNotCheckable}
	}
	rep, err := qcow2.CheckFile(ctx, file, qcow2.CheckOptions{OnFinding: func(f qcow2.CheckFinding) {
		fmt.Fprintln(a.err, f.Message)
	}})
	if err != nil && rep == nil {
		return openError(src.name, err)
	}
	if err != nil {
		return errorf("Check failed: %w", err)
	}
	if err := a.printCheck(src, format, rep, asJSON, quiet); err != nil {
		return err
	}
	switch {
	case rep.CheckErrors > 0:
		return &exitError{code: 1}
	case rep.Corruptions > 0:
		return &exitError{code: exitCorrupt}
	case rep.Leaks > 0:
		return &exitError{code: exitLeaks}
	}
	return nil
}

func (a *app) printCheck(src *source, format string, rep *qcow2.CheckReport, asJSON, quiet bool) error {
	switch {
	case quiet:
		return nil
	case asJSON:
		return a.printJSON(checkResult{
			ImageEndOffset: rep.ImageEndOffset, TotalClusters: rep.TotalClusters,
			Corruptions: rep.Corruptions, CheckErrors: rep.CheckErrors, Leaks: rep.Leaks,
			Allocated: rep.AllocatedClusters, Fragmented: rep.FragmentedClusters, Compressed: rep.CompressedClusters,
			Filename: src.name, Format: format,
		})
	}
	a.printCheckText(rep)
	return nil
}

func (a *app) printCheckText(rep *qcow2.CheckReport) {
	if rep.Clean() {
		a.printf("No errors were found on the image.\n")
	}
	if rep.Corruptions > 0 {
		a.printf("\n%d errors were found on the image.\n"+
			"Data may be corrupted, or further writes to the image may corrupt it.\n", rep.Corruptions)
	}
	if rep.Leaks > 0 {
		a.printf("\n%d leaked clusters were found on the image.\n"+
			"This means waste of disk space, but no harm to data.\n", rep.Leaks)
	}
	if rep.CheckErrors > 0 {
		a.printf("\n%d internal errors have occurred during the check.\n", rep.CheckErrors)
	}
	if rep.TotalClusters > 0 && rep.AllocatedClusters > 0 {
		share := func(n, of int64) float64 { return float64(n) * 100 / float64(of) }
		a.printf("%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			rep.AllocatedClusters, rep.TotalClusters, share(rep.AllocatedClusters, rep.TotalClusters),
			share(rep.FragmentedClusters, rep.AllocatedClusters), share(rep.CompressedClusters, rep.AllocatedClusters))
	}
	if rep.ImageEndOffset > 0 {
		a.printf("Image end offset: %d\n", rep.ImageEndOffset)
	}
}
