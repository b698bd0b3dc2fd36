package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// ErrNoBacking is returned when an image does not stand on as many others as was said.
var ErrNoBacking = errors.New("Image does not have a backing file") //lint:ignore ST1005 QEMU's words

// below returns the device that dev stands on, nil if there is none.
func below(dev block.Device) block.Device {
	if d, ok := block.As[interface{ Backing() block.Device }](dev); ok {
		return d.Backing()
	}
	return nil
}

// Layers returns a device and those it stands on, from the top.
func Layers(dev block.Device) []block.Device {
	var all []block.Device
	for ; dev != nil; dev = below(dev) {
		all = append(all, dev)
	}
	return all
}

// grow makes a disk at least size bytes long. What is added reads as zeroes, and the new length is durable.
func grow(ctx context.Context, dev block.Device, size int64) error {
	if dev.Size() >= size {
		return nil
	}
	if im, ok := block.As[*qcow2.Image](dev); ok {
		return im.Resize(ctx, size, qcow2.ResizeOptions{})
	}
	if d, ok := block.As[block.Resizer](dev); ok {
		return d.Resize(ctx, size)
	}
	return fmt.Errorf("a disk of format %s cannot become longer", dev.Info().Format)
}
