package qcow2

import (
	"context"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/check"
	"github.com/droverproject/drover/storage"
)

// CheckReport is the outcome of CheckFile.
type CheckReport = check.Report

// CheckFinding is one fault that a check found.
type CheckFinding = check.Finding

// CheckOptions control a check.
type CheckOptions = check.Options

// The kinds of a CheckFinding.
const (
	CheckCorruption = check.Corruption // using the image may lose data
	CheckLeak       = check.Leak       // space is lost, nothing else
	CheckFailure    = check.Failure    // something could not be checked
)

// CheckFile finds out whether the image in file is consistent. It changes nothing and looks at no other file; an image
// that somebody writes to meanwhile seems to have faults. The report counts what qemu-img check counts. With an error the
// report is nil or incomplete.
func CheckFile(ctx context.Context, file storage.File, o CheckOptions) (*CheckReport, error) {
	return check.Run(ctx, file, o)
}

// Check is CheckFile for an open image: it holds new requests back, waits for those running, makes everything durable,
// checks, and lets the requests go on.
func (im *Image) Check(ctx context.Context, o CheckOptions) (*CheckReport, error) {
	if err := im.meta.Epochs.Quiesce(); err != nil {
		return nil, block.ErrClosed
	}
	defer im.meta.Epochs.Resume()
	if err := im.meta.Settle(); err != nil {
		return nil, err
	}
	return CheckFile(ctx, im.file, o)
}
