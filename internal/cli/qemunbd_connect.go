package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/droverproject/drover/internal/nbddev"
	"github.com/droverproject/drover/nbd"
)

// attach makes the export a device of the kernel, whose end is the program's. The function that it returns disconnects it.
func (n *qemuNBD) attach(ctx context.Context, server *nbd.Server, count *clientCount, export string) (func() error, error) {
	own := ownClient{server: server, come: count.come}
	d, err := own.connect(ctx, n.connect, export, 1, count.stop)
	var path *fs.PathError
	switch {
	case errors.As(err, &path):
		return nil, errorf("Failed to open %s: %s", n.connect, systemReason(err))
	case err != nil:
		return nil, errorf("Failed to connect %s: %w", n.connect, err)
	}
	if n.verbose {
		fmt.Fprintf(n.err, "NBD device %s is now connected to %s\n", n.connect, n.image)
	}
	return d.disconnect, nil
}

// detach disconnects a device that some process has connected.
func (n *qemuNBD) detach() error {
	f, err := os.OpenFile(n.image, os.O_RDWR, 0)
	if err != nil {
		return errorf("Cannot open %s: %s", n.image, systemReason(err))
	}
	if err := errors.Join(detachDevice(n.image, f), f.Close()); err != nil {
		return err
	}
	n.printf("%s disconnected\n", n.image)
	return nil
}

// detachDevice disconnects a device by netlink, or by calls on the device, which say nothing of how it went.
func detachDevice(name string, f *os.File) error {
	control, err := nbddev.Open()
	if err != nil {
		nbddev.DisconnectFile(f)
		return nil
	}
	index, err := nbddev.IndexOf(name)
	if err != nil {
		nbddev.DisconnectFile(f)
		return control.Close()
	}
	err = control.Disconnect(index)
	if errors.Is(err, nbddev.ErrNotConnected) {
		err = nil
	}
	return errors.Join(err, control.Close())
}
