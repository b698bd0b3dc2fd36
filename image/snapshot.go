// Package image is work over whole disk images, of any format that package block can open.
package image

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// ErrNoSnapshots is returned for images whose format has no snapshots inside.
var ErrNoSnapshots = errors.New("image format does not support snapshots")

// SnapshotRef says which snapshot of an image is meant: the one with the ID Any or, where none has it, with the name Any;
// or else the one with both ID and Name, of which one may be empty.
type SnapshotRef struct {
	Any      string
	ID, Name string
}

// ParseSnapshotRef understands what users write: "before", or "snapshot.id=1,snapshot.name=before".
func ParseSnapshotRef(text string) (SnapshotRef, error) {
	if !strings.HasPrefix(text, "snapshot.") {
		return SnapshotRef{Any: text}, nil
	}
	var ref SnapshotRef
	for part := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "snapshot.id":
			ref.ID = value
		case "snapshot.name":
			ref.Name = value
		default:
			return ref, fmt.Errorf("cannot understand %q: expecting an ID or a name, or snapshot.id=ID,snapshot.name=NAME", text)
		}
	}
	return ref, nil
}

func (r SnapshotRef) String() string {
	switch {
	case r.ID == "" && r.Name == "":
		return r.Any
	case r.ID == "":
		return r.Name
	}
	return r.ID
}

// find returns the ID of the snapshot that is meant.
func (r SnapshotRef) find(list []qcow2.Snapshot) (string, bool) {
	for _, match := range []func(s *qcow2.Snapshot) bool{
		func(s *qcow2.Snapshot) bool { return r.Any != "" && s.ID == r.Any },
		func(s *qcow2.Snapshot) bool { return r.Any != "" && s.Name == r.Any },
		func(s *qcow2.Snapshot) bool {
			return r.Any == "" && (r.ID == "" || s.ID == r.ID) && (r.Name == "" || s.Name == r.Name)
		},
	} {
		for i := range list {
			if match(&list[i]) {
				return list[i].ID, true
			}
		}
	}
	return "", false
}

// OpenSnapshot opens a snapshot of dev as a device of its own, which may be used beside dev and must be closed before it.
// The error wraps qcow2.ErrNoSnapshot if there is none, ErrNoSnapshots if there cannot be any.
func OpenSnapshot(ctx context.Context, dev block.Device, ref SnapshotRef) (block.Device, error) {
	im, ok := block.As[*qcow2.Image](dev)
	if !ok {
		return nil, ErrNoSnapshots
	}
	list, err := im.Snapshots()
	if err != nil {
		return nil, err
	}
	id, ok := ref.find(list)
	if !ok {
		return nil, fmt.Errorf("snapshot %q: %w", ref, qcow2.ErrNoSnapshot)
	}
	view, err := im.OpenSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	return view, nil
}
