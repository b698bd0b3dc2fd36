package cli

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
)

// sideHelp tells in a command's help how a snapshot is named.
const sideHelp = `FILE@SNAPSHOT is the disk as an internal snapshot keeps it, by its ID or name.`

// splitSide divides FILE@SNAPSHOT. A file that has all of the text as its name is meant by it.
func splitSide(arg string, imageOpts bool) (name, snapshot string) {
	i := strings.LastIndexByte(arg, '@')
	if i <= 0 || imageOpts {
		return arg, ""
	}
	if _, err := os.Lstat(arg); err == nil {
		return arg, ""
	}
	return arg[:i], arg[i+1:]
}

// openSide opens a disk for reading, or the snapshot of one that the argument names.
func (a *app) openSide(ctx context.Context, src *source, arg string) (block.Device, error) {
	name, snapshot := splitSide(arg, src.imageOpts)
	if err := src.set(name); err != nil {
		return nil, err
	}
	dev, err := a.openDevice(ctx, src, true)
	if err != nil || snapshot == "" {
		return dev, err
	}
	view, err := image.OpenSnapshot(ctx, dev, image.SnapshotRef{Any: snapshot})
	if errors.Is(err, qcow2.ErrNoSnapshot) {
		err = errors.New("there is none of this ID or name")
	}
	if err != nil {
		return nil, errors.Join(errorf("Could not open snapshot '%s' of '%s': %w", snapshot, name, err), dev.Close())
	}
	return &sideView{view, dev}, nil
}

// sideView is a snapshot that is closed with its image.
type sideView struct {
	block.Device
	whole block.Device
}

// Close closes both.
func (v *sideView) Close() error { return errors.Join(v.Device.Close(), v.whole.Close()) }
