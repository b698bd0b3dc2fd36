package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// repair repairs an image, or shows what a repair would do.
func (a *app) repair(ctx context.Context, src *source, flags *checkFlags) (err error) {
	file, format, err := src.openFileAs(flags.preview)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if format != "qcow2" {
		return &exitError{exitNotCheckable, msgNotCheckable}
	}
	// There may be millions. As stock does, what is repaired is told as that, not as an error first.
	findings := bufio.NewWriterSize(a.err, 64<<10)
	o := qcow2.RepairOptions{Mode: qcow2.RepairLeaks, Preview: flags.preview, OnFinding: func(f qcow2.CheckFinding) {
		if f.Repaired {
			_, _ = findings.WriteString(f.Message)
			_ = findings.WriteByte('\n')
		}
	}}
	if flags.repair == "all" {
		o.Mode = qcow2.RepairAll
	}
	if flags.undo != "" {
		log, err := createUndoLog(flags.undo)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, closeUndoLog(log, flags.undo)) }()
		o.Undo = log
	}
	rep, err := qcow2.RepairFile(ctx, file, o)
	_ = findings.Flush()
	if err != nil && (rep == nil || rep.Before == nil) {
		return openError(src.name, err)
	}
	if err != nil {
		return errorf("Check failed: %w", err)
	}
	return a.printRepair(src, rep, flags)
}

func (a *app) printRepair(src *source, rep *qcow2.RepairReport, flags *checkFlags) error {
	human := flags.output != "json" && !flags.quiet
	for _, f := range rep.After.Findings { // what is left
		fmt.Fprintln(a.err, f.Message)
	}
	if n := rep.After.FindingsDropped; n > 0 {
		fmt.Fprintf(a.err, "(%d more are not shown)\n", n)
	}
	if human && rep.Fixed() {
		verb, end := "repaired", "Double checking the fixed image now..."
		if flags.preview {
			verb, end = "would be repaired", "The image was not changed. After the repair:"
		}
		a.printf("The following inconsistencies were found and %s:\n\n    %d leaked clusters\n    %d corruptions\n\n%s\n",
			verb, rep.LeaksFixed, rep.CorruptionsFixed, end)
	}
	result := resultOf(src.name, rep.After)
	result.Fixed, result.LeaksFixed = rep.CorruptionsFixed, rep.LeaksFixed
	if err := a.printCheck(result, rep.After, flags.output == "json", flags.quiet); err != nil {
		return err
	}
	for _, note := range rep.Notes {
		a.say("%s", note)
	}
	if human && rep.Truncated > 0 {
		verb := "was"
		if flags.preview {
			verb = "would be"
		}
		a.say("The unused end of the file %s cut off: %d bytes.", verb, rep.Truncated)
	}
	if flags.preview {
		return checkExit(rep.Before)
	}
	return checkExit(rep.After)
}

// restore puts back what a repair has overwritten.
func (a *app) restore(ctx context.Context, src *source, flags *checkFlags) (err error) {
	log, err := storage.OpenFile(flags.restore, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		return openError(flags.restore, err)
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	file, _, err := src.openFileAs(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	n, err := qcow2.RestoreFile(ctx, file, log)
	if err != nil {
		return errorf("Could not restore '%s' from '%s': %w", src.name, flags.restore, err)
	}
	if !flags.quiet {
		a.printf("Restored %d bytes.\n", n)
	}
	return nil
}

// createUndoLog makes the file of an undo log. It must be new: another repair's log is worth keeping.
func createUndoLog(name string) (*storage.OSFile, error) {
	log, err := storage.CreateFile(name, storage.OpenOptions{Exclusive: true, Mode: 0o600})
	if err != nil {
		return nil, errorf("Could not create undo log '%s': %w", name, err)
	}
	return log, nil
}

// closeUndoLog closes the log, and removes it if the repair had nothing to keep.
func closeUndoLog(log *storage.OSFile, name string) error {
	size, err := log.Size()
	err = errors.Join(err, log.Close())
	if err == nil && size == 0 {
		return os.Remove(name)
	}
	return err
}
