package cli

import (
	"bufio"
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

// checkFlags are what check is asked to do beside checking.
type checkFlags struct {
	progress      progressFlag
	output        string
	quiet         bool
	repair        string // "", "leaks" or "all"
	preview       bool
	undo, restore string // names of undo logs
}

func (a *app) checkCommand() *cobra.Command {
	var src source
	var flags checkFlags
	var cache string
	cmd := &cobra.Command{
		Use:   "check [flags] FILE",
		Short: "Check an image for errors, and repair it",
		Long: `Check the metadata of an image for errors. Nothing is changed without -r.

With -r leaks, refcounts that are too high are lowered; with -r all, everything is
repaired that can be without making data up, and the file's unused end is cut off.
A repair never drops a snapshot, a bitmap or data that can be reached, and may lose
power at any time: the next one finishes it. --preview shows what a repair would do;
--undo keeps what it overwrites in a file, from which --restore puts it back.

Exit codes: 0 no errors (left), 1 the check or the repair could not be made, 2
errors, 3 leaked clusters but no errors, 63 the format has nothing to check. With
--preview they tell of the image as it is.`,
		Example: `  drover check disk.qcow2
  drover check -r all --preview disk.qcow2
  drover check -r all --undo disk.undo disk.qcow2
  drover check --restore disk.undo disk.qcow2`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := flags.validate(cmd.Flags().Changed("repair")); err != nil {
				return err
			}
			if checkCache(cache) != nil {
				return errorf("Invalid source cache option: %s", cache)
			}
			if err := src.set(args[0]); err != nil {
				return err
			}
			switch {
			case flags.restore != "":
				return a.restore(cmd.Context(), &src, &flags)
			case flags.repair != "":
				return a.repair(cmd.Context(), &src, &flags)
			}
			return a.check(cmd.Context(), &src, &flags)
		},
	}
	src.add(cmd)
	outputFlag(cmd, &flags.output)
	f := cmd.Flags()
	f.StringVarP(&flags.repair, "repair", "r", "", "repair `leaks` or all")
	f.BoolVar(&flags.preview, "preview", false, "show what -r would repair, and change nothing")
	f.StringVar(&flags.undo, "undo", "", "keep what -r overwrites in a new `FILE`")
	f.StringVar(&flags.restore, "restore", "", "put back what a repair has overwritten, from the `FILE` it kept that in")
	f.BoolVarP(&flags.quiet, "quiet", "q", false, "print nothing but errors")
	addOwnProgress(f, &flags.progress)
	f.StringVarP(&cache, "cache", "T", "", "cache `mode` of qemu-img (accepted, without effect)")
	return cmd
}

func (f *checkFlags) validate(repair bool) error {
	switch {
	case repair && f.repair != "leaks" && f.repair != "all":
		return usagef(msgRepairArgument, f.repair)
	case !repair && (f.preview || f.undo != ""):
		return usagef("--preview and --undo belong to a repair (-r)")
	case f.preview && f.undo != "":
		return usagef("--preview changes nothing that --undo could keep")
	case repair && f.restore != "":
		return usagef("--restore and -r cannot be used together")
	}
	return checkOutput(f.output)
}

// checkResult is the JSON of check, by QEMU's names. Zeroes are left out, all but the first.
type checkResult struct {
	ImageEndOffset int64  `json:"image-end-offset,omitempty"`
	TotalClusters  int64  `json:"total-clusters,omitempty"`
	Corruptions    int64  `json:"corruptions,omitempty"`
	Fixed          int64  `json:"corruptions-fixed,omitempty"`
	CheckErrors    int64  `json:"check-errors"`
	Leaks          int64  `json:"leaks,omitempty"`
	LeaksFixed     int64  `json:"leaks-fixed,omitempty"`
	Allocated      int64  `json:"allocated-clusters,omitempty"`
	Fragmented     int64  `json:"fragmented-clusters,omitempty"`
	Compressed     int64  `json:"compressed-clusters,omitempty"`
	Filename       string `json:"filename"`
	Format         string `json:"format"`
}

func (a *app) check(ctx context.Context, src *source, flags *checkFlags) (err error) {
	asJSON, quiet := flags.output == "json", flags.quiet
	file, format, err := src.openFile()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if format != "qcow2" {
		return &exitError{exitNotCheckable, msgNotCheckable}
	}
	findings := bufio.NewWriter(a.err) // there may be millions
	bar := a.startProgress("check", flags.progress, quiet || asJSON)
	rep, err := qcow2.CheckFile(ctx, file, qcow2.CheckOptions{Progress: bar.set, OnFinding: func(f qcow2.CheckFinding) {
		fmt.Fprintln(findings, f.Message)
	}})
	if err == nil {
		bar.end()
	} else {
		bar.newline()
	}
	_ = findings.Flush() // who does not want to hear of errors still gets the exit code
	if err != nil && rep == nil {
		return openError(src.name, err)
	}
	if err != nil {
		return errorf("Check failed: %w", err)
	}
	if err := a.printCheck(resultOf(src.name, rep), rep, asJSON, quiet); err != nil {
		return err
	}
	return checkExit(rep)
}

// checkExit is the exit code for a report.
func checkExit(rep *qcow2.CheckReport) error {
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

func resultOf(name string, rep *qcow2.CheckReport) checkResult {
	return checkResult{
		ImageEndOffset: rep.ImageEndOffset, TotalClusters: rep.TotalClusters,
		Corruptions: rep.Corruptions, CheckErrors: rep.CheckErrors, Leaks: rep.Leaks,
		Allocated: rep.AllocatedClusters, Fragmented: rep.FragmentedClusters, Compressed: rep.CompressedClusters,
		Filename: name, Format: "qcow2",
	}
}

func (a *app) printCheck(result checkResult, rep *qcow2.CheckReport, asJSON, quiet bool) error {
	switch {
	case quiet:
		return nil
	case asJSON:
		return a.printJSON(result)
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
