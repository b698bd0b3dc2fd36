package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/internal/nbddev"
)

// kernelDevice is an NBD device of the kernel that this process has connected.
type kernelDevice struct {
	name    string
	index   int
	control *nbddev.Control
	old     *nbddev.Old // in place of control, for a device that was connected the old way
	gone    atomic.Bool // the kernel has let go of it; it may be another's by now
}

// connectDevice hands connections, which have been brought to an export, over to the kernel and closes them. With an empty
// name the kernel chooses the device.
func connectDevice(name string, cfg nbddev.Config, conns []net.Conn) (*kernelDevice, error) {
	d := &kernelDevice{name: name}
	err := withSockets(conns, func(fds []int) error { return d.connect(cfg, fds) })
	if err != nil {
		return nil, err
	}
	return d, nil
}

// withSockets calls fn with the descriptors of connections, and closes the connections.
func withSockets(conns []net.Conn, fn func(fds []int) error) (err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
		for _, c := range conns {
			err = errors.Join(err, c.Close())
		}
	}()
	var fds []int
	for _, c := range conns {
		filer, ok := c.(interface{ File() (*os.File, error) })
		if !ok {
			return fmt.Errorf("the kernel cannot take a connection that is a %T", c)
		}
		f, err := filer.File()
		if err != nil {
			return err
		}
		files, fds = append(files, f), append(fds, int(f.Fd()))
	}
	return fn(fds)
}

func (d *kernelDevice) connect(cfg nbddev.Config, fds []int) (err error) {
	cfg.Size -= cfg.Size % int64(max(cfg.BlockSize, 512)) // a device has whole sectors
	if err := cfg.Check(); err != nil {
		return err
	}
	cfg.Index = nbddev.AnyIndex
	if d.name != "" {
		if cfg.Index, err = nbddev.IndexOf(d.name); err != nil {
			return err
		}
	}
	d.control, err = nbddev.Open()
	if errors.Is(err, nbddev.ErrUnsupported) && d.name != "" {
		d.control = nil
		if d.old, err = nbddev.ConnectOld(d.name, cfg, fds); errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", nbddev.ErrUnsupported, err)
		}
		return err
	}
	if err != nil {
		return err
	}
	if d.index, err = d.control.Connect(cfg, fds); err != nil {
		return errors.Join(err, d.control.Close())
	}
	if d.name == "" {
		d.name = nbddev.DeviceName(d.index)
	}
	return nil
}

// disconnect ends the device unless it has ended.
func (d *kernelDevice) disconnect() error {
	if d.gone.Swap(true) {
		return d.release()
	}
	var err error
	if d.control != nil {
		err = d.control.Disconnect(d.index)
	} else if f, oerr := os.OpenFile(d.name, os.O_RDWR, 0); oerr == nil {
		nbddev.DisconnectFile(f)
		err = f.Close()
	} else {
		err = oerr
	}
	if errors.Is(err, nbddev.ErrNotConnected) {
		err = nil
	}
	return errors.Join(err, d.release())
}

func (d *kernelDevice) release() error {
	if d.control == nil {
		return nil
	}
	return d.control.Close()
}

// connServer serves connections that come some other way than over a listener.
type connServer interface {
	ServeConn(ctx context.Context, nc net.Conn) error
}

// ownClient connects the kernel to exports of a server in this process, without a way round over an address.
type ownClient struct {
	server connServer
	// come is called for each connection before the server knows of it.
	come func()
}

// connect makes a device of an export. ended is called when the kernel has let go of it.
func (o ownClient) connect(ctx context.Context, device, export string, connections int, ended func()) (*kernelDevice, error) {
	var conns []net.Conn
	var running sync.WaitGroup
	var x nbddev.Export
	fail := func(err error) (*kernelDevice, error) {
		for _, c := range conns {
			err = errors.Join(err, c.Close())
		}
		return nil, err
	}
	for range connections {
		ours, theirs, err := socketPair()
		if err != nil {
			return fail(err)
		}
		conns = append(conns, theirs)
		o.come()
		running.Go(func() {
			// Its end is what counts, and the observer of the server knows why.
			_ = o.server.ServeConn(context.WithoutCancel(ctx), ours)
		})
		if x, err = nbddev.Handshake(theirs, export); err != nil {
			return fail(err)
		}
	}
	d, err := connectDevice(device, nbddev.Config{Size: x.Size, Flags: x.Flags, BlockSize: sectorSize(x)}, conns)
	if err != nil {
		return nil, err
	}
	go func() {
		running.Wait()
		d.gone.Store(true)
		ended()
	}()
	return d, nil
}

// sectorSize is the size of a device's sectors for an export.
func sectorSize(x nbddev.Export) int { return int(max(x.MinBlock, 512)) }
