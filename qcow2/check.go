package qcow2

import (
	"context"
	"errors"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/check"
	"github.com/droverproject/drover/qcow2/internal/meta"
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
func (im *Image) Check(ctx context.Context, o CheckOptions) (report *CheckReport, err error) {
	err = im.meta.Still(func() error {
		report, err = CheckFile(ctx, im.file, o)
		return err
	})
	if errors.Is(err, meta.ErrClosed) {
		return nil, block.ErrClosed
	}
	return report, err
}

// RepairReport is the outcome of RepairFile.
type RepairReport = check.RepairReport

// RepairOptions control a repair.
type RepairOptions = check.RepairOptions

// RepairMode says what a repair may change.
type RepairMode = check.RepairMode

// The modes of a repair.
const (
	RepairLeaks = check.RepairLeaks // lower refcounts that are too high
	RepairAll   = check.RepairAll   // mend all that can be mended without making data up
)

// What RepairLeaks refuses; nothing is changed then.
var (
	ErrDirtyLeaks  = check.ErrDirtyLeaks
	ErrNeedRebuild = check.ErrNeedRebuild
)

// Errors of RestoreFile, and of RepairFile with an undo log.
var (
	ErrUndoLog    = check.ErrUndoLog
	ErrUndoImage  = check.ErrUndoImage
	ErrUndoExists = check.ErrUndoExists
)

// RestoreFile puts back what RepairFile has changed in the image, from the undo log that it wrote. It returns how many
// bytes that were. The image must be as the repair left it, be that finished or not, and locked for writing by the caller;
// otherwise it stays as it is and the error wraps ErrUndoImage.
func RestoreFile(ctx context.Context, image, log storage.File) (int64, error) {
	return check.Restore(ctx, image, log)
}

// RepairFile mends the image in file, which must not be open elsewhere and must be locked for writing by the caller. It
// never drops a snapshot, a bitmap or a cluster that can be reached, marks the image clean only after another pass over
// it has found nothing wrong, and may lose power at any time: the next repair finishes the work. It looks at no other
// file. With an error the report is incomplete, or nil in parts.
func RepairFile(ctx context.Context, file storage.File, o RepairOptions) (*RepairReport, error) {
	return check.Repair(ctx, file, o)
}
