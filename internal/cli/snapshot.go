package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/qcow2"
)

// maxTag is how much of a new snapshot's name is taken: more than qemu-img can handle would only make it unreachable.
const maxTag = 255

// snapshotAction is what snapshot was asked to do.
type snapshotAction struct {
	kind snapshotKind
	name string // of the snapshot, "" for a list
	to   string // its new name
	more bool   // more than one action was asked for
}

type snapshotKind uint8

const (
	snapshotDefault snapshotKind = iota // a list, too
	snapshotList
	snapshotApply
	snapshotCreate
	snapshotDelete
	snapshotRename
)

func (k snapshotKind) changes() bool { return k >= snapshotApply }

// actionFlag is a flag that chooses the action.
type actionFlag struct {
	action *snapshotAction
	kind   snapshotKind
}

func (f actionFlag) String() string { return "" }

func (f actionFlag) Type() string { return "NAME" }

func (f actionFlag) Set(value string) error {
	if f.action.kind != snapshotDefault {
		f.action.more = true
	}
	f.action.kind, f.action.name = f.kind, value
	return nil
}

func (a *app) snapshotCommand() *cobra.Command {
	var src source
	var action snapshotAction
	var output string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "snapshot [flags] FILE",
		Short: "List, create, apply, rename or delete internal snapshots",
		Long: `List the snapshots inside an image, or create, apply, rename or delete one.

A snapshot is applied and renamed by its ID or, where none has that ID, by its
name; it is deleted by its name only. Several may have the same name: then the
oldest is meant.`,
		Example: `  drover snapshot -c before-update disk.qcow2
  drover snapshot --output=json disk.qcow2
  drover snapshot -r before-update golden disk.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if action.more {
				return usagef("Cannot mix '-l', '-a', '-c', '-d'")
			}
			if action.kind == snapshotRename {
				if len(args) == 0 {
					return usagef("Expecting the new name of the snapshot")
				}
				action.to, args = args[0], args[1:]
			}
			if err := oneImage(cmd, args); err != nil {
				return err
			}
			if err := checkOutput(output); err != nil {
				return err
			}
			if err := src.set(args[0]); err != nil {
				return err
			}
			src.noData = action.kind == snapshotList
			began := time.Now()
			err := a.snapshot(cmd.Context(), &src, &action, output == "json")
			if err != nil || output != "json" || !action.kind.changes() || action.kind == snapshotCreate {
				return err
			}
			return a.printResult(cmd.Context(), "snapshot", began, src)
		},
	}
	f := cmd.Flags()
	f.VarPF(actionFlag{&action, snapshotList}, "list", "l", "list the snapshots (the default)").NoOptDefVal = "true"
	f.VarP(actionFlag{&action, snapshotApply}, "apply", "a", "make the disk what it was when snapshot `NAME` was taken")
	f.VarP(actionFlag{&action, snapshotCreate}, "create", "c", "keep the disk as it is as snapshot `NAME`")
	f.VarP(actionFlag{&action, snapshotDelete}, "delete", "d", "delete snapshot `NAME`")
	f.VarP(actionFlag{&action, snapshotRename}, "rename", "r", "give snapshot `OLD` the name that follows: -r OLD NEW FILE")
	src.add(cmd)
	outputFlag(cmd, &output)
	f.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors and what was asked for")
	src.policy.add(f)
	return cmd
}

func (a *app) snapshot(ctx context.Context, src *source, act *snapshotAction, asJSON bool) (err error) {
	dev, err := a.openDevice(ctx, src, !act.kind.changes())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	im, _ := dev.(*qcow2.Image)
	switch act.kind {
	case snapshotApply:
		return applySnapshot(ctx, im, act.name)
	case snapshotCreate:
		return a.createSnapshot(ctx, im, act.name, asJSON)
	case snapshotDelete:
		return deleteSnapshot(ctx, im, act.name)
	case snapshotRename:
		return renameSnapshot(ctx, im, act.name, act.to)
	}
	return a.listSnapshots(im, asJSON)
}

// listSnapshots prints the snapshots of im, which is nil for formats that have none.
func (a *app) listSnapshots(im *qcow2.Image, asJSON bool) error {
	list := []listedSnapshot{}
	if im != nil {
		snapshots, err := im.Snapshots()
		if err != nil {
			return err
		}
		for _, s := range snapshots {
			list = append(list, listSnapshot(s))
		}
	}
	if asJSON {
		return a.printJSON(list)
	}
	if len(list) == 0 {
		return nil
	}
	a.printf("Snapshot list:\n")
	plain := make([]jsonSnapshot, len(list))
	for i := range list {
		plain[i] = list[i].jsonSnapshot
	}
	a.printSnapshots(plain)
	return nil
}

// listedSnapshot is the JSON of a snapshot by QEMU's names, and the size of the disk that it keeps.
type listedSnapshot struct {
	jsonSnapshot
	DiskSize int64 `json:"disk-size"`
}

func listSnapshot(s qcow2.Snapshot) listedSnapshot {
	j := listedSnapshot{DiskSize: s.DiskSize, jsonSnapshot: jsonSnapshot{
		ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize, DateSec: s.Date.Unix(), DateNsec: s.Date.Nanosecond(),
		VMClockSec: uint64(s.VMClock) / 1e9, VMClockNsec: uint64(s.VMClock) % 1e9,
	}}
	if s.ICount != qcow2.NoICount {
		j.ICount = &s.ICount
	}
	return j
}

func (a *app) createSnapshot(ctx context.Context, im *qcow2.Image, name string, asJSON bool) error {
	name = name[:min(len(name), maxTag)]
	if im == nil {
		return errorf("Could not create snapshot '%s': %s", name, numbered(syscall.ENOTSUP))
	}
	s, err := im.CreateSnapshot(ctx, name)
	if err != nil {
		return errorf("Could not create snapshot '%s': %s", name, snapshotReason(err))
	}
	if asJSON {
		return a.printJSON(listSnapshot(s))
	}
	return nil
}

// snapshotReason words why a snapshot could not be created; qemu-img gives error numbers.
func snapshotReason(err error) string {
	var errno syscall.Errno
	switch {
	case errors.Is(err, qcow2.ErrNoSnapshots):
		return numbered(syscall.ENOTSUP)
	case errors.Is(err, qcow2.ErrRefcountOverflow):
		return numbered(syscall.EINVAL)
	case errors.As(err, &errno):
		return numbered(errno)
	}
	return err.Error()
}

func numbered(errno syscall.Errno) string {
	return fmt.Sprintf("-%d (%s)", int(errno), capital(errno.Error()))
}

func applySnapshot(ctx context.Context, im *qcow2.Image, name string) error {
	if im == nil {
		return errorf("Could not apply snapshot '%s': Block driver does not support snapshots", name)
	}
	err := im.ApplySnapshot(ctx, name)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qcow2.ErrNoSnapshot) && !hasBitmaps(im):
		return errorf("Could not apply snapshot '%s': Failed to load snapshot: %s", name, capital(syscall.ENOENT.Error()))
	case errors.Is(err, qcow2.ErrBitmapsStand), errors.Is(err, qcow2.ErrNoSnapshot):
		return errorf("Could not apply snapshot '%s': Device has active dirty bitmaps", name)
	}
	return errorf("Could not apply snapshot '%s': %w", name, err)
}

func hasBitmaps(im *qcow2.Image) bool {
	list, err := im.Bitmaps()
	return err == nil && len(list) > 0
}

// badSnapshotParameter says what is wrong with a description of a snapshot: one of its keys, or all of it.
func badSnapshotParameter(text string) error {
	bad := text
	for part := range strings.SplitSeq(text, ",") {
		if key, _, _ := strings.Cut(part, "="); key != "snapshot.id" && key != "snapshot.name" {
			bad = key
			break
		}
	}
	return errorf("Invalid parameter '%s'", bad)
}

// deleteSnapshot deletes a snapshot by its name. An ID will not do, as in qemu-img: where one snapshot's name is another's
// ID, too much would be lost by a misunderstanding.
func deleteSnapshot(ctx context.Context, im *qcow2.Image, name string) error {
	var list []qcow2.Snapshot
	if im != nil {
		var err error
		if list, err = im.Snapshots(); err != nil {
			return err
		}
	}
	for _, s := range list {
		if s.Name != name {
			continue
		}
		if err := im.DeleteSnapshot(ctx, s.ID); err != nil {
			return errorf("Could not delete snapshot '%s': %w", name, err)
		}
		return nil
	}
	return errorf("Could not delete snapshot '%s': snapshot not found", name)
}

func renameSnapshot(ctx context.Context, im *qcow2.Image, from, to string) error {
	if im == nil {
		return errorf("Could not rename snapshot '%s': Block driver does not support snapshots", from)
	}
	if len(to) > maxTag {
		return errorf("Could not rename snapshot '%s': the new name is longer than %d bytes", from, maxTag)
	}
	err := im.RenameSnapshot(ctx, from, to)
	if errors.Is(err, qcow2.ErrNoSnapshot) {
		return errorf("Could not rename snapshot '%s': snapshot not found", from)
	}
	if err != nil {
		return errorf("Could not rename snapshot '%s': %w", from, err)
	}
	return nil
}
