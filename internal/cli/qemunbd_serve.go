package cli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/qcow2"
)

// nbdBlock is the block size that qemu-nbd tells clients to prefer, whatever the image.
const nbdBlock = 4096

func (n *qemuNBD) run(ctx context.Context) error {
	activated, err := n.activation()
	if err != nil {
		return err
	}
	if n.list {
		config, err := n.clientTLS()
		if err != nil {
			return err
		}
		return n.listExports(ctx, config)
	}
	encryption, err := n.serverTLS()
	if err != nil {
		return err
	}
	switch {
	case n.disconnect:
		return n.detach()
	case (n.fork || n.connect != "" && !n.verbose) && !n.enterBackground():
		return n.background(n.args, activated)
	}
	ctx, signals := catchSignals(ctx)
	defer signals.release()
	l, err := n.listen(ctx, activated)
	if err != nil {
		return err
	}
	return errors.Join(n.serve(ctx, l, encryption, signals), closeListener(l))
}

func closeListener(l net.Listener) error {
	if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// activation returns how many sockets a service manager has passed on, which leave no choice of addresses.
func (n *qemuNBD) activation() (int, error) {
	count := passedSockets()
	if count == 0 {
		return 0, nil
	}
	for _, given := range []struct {
		is   bool
		text string
	}{
		{n.connect != "", "NBD device can't be set when using socket activation"},
		{n.socket != "", "Unix socket can't be set when using socket activation"},
		{n.bind != "", "The interface can't be set when using socket activation"},
		{n.port != "", "TCP port number can't be set when using socket activation"},
		{n.selinux != "", "SELinux label can't be set when using socket activation"},
		{n.list, "List mode is incompatible with socket activation"},
		{count > 1, "qemu-nbd does not support socket activation with LISTEN_FDS > 1"},
	} {
		if given.is {
			return 0, errorf("%s", given.text)
		}
	}
	return count, nil
}

// passedSockets counts the sockets that a service manager has opened for this process.
func passedSockets() int {
	if activationEnv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0
	}
	count, err := strconv.Atoi(activationEnv("LISTEN_FDS"))
	if err != nil || count < 0 {
		return 0
	}
	return count
}

// serverTLS finds the credentials of a server.
func (n *qemuNBD) serverTLS() (*nbd.TLS, error) {
	switch {
	case n.hostname != "" && n.creds == "":
		return nil, errorf("--tls-hostname is not permitted without --tls-creds")
	case n.hostname != "":
		return nil, errorf("TLS hostname is only supported with export list")
	case n.creds != "" && n.connect != "":
		return nil, errorf("TLS is not supported with a host device")
	}
	return n.objects.serverTLS(n.creds, n.authz)
}

// clientTLS finds the credentials of a client, nil for none.
func (n *qemuNBD) clientTLS() (*tls.Config, error) {
	switch {
	case n.creds == "" && n.authz != "":
		return nil, errorf("--tls-authz is not permitted without --tls-creds")
	case n.creds == "" && n.hostname != "":
		return nil, errorf("--tls-hostname is not permitted without --tls-creds")
	case n.creds == "":
		return nil, nil
	}
	c, err := n.objects.credentials(n.creds, false)
	if err != nil {
		return nil, err
	}
	if n.authz != "" {
		return nil, errorf("TLS authorization is incompatible with export list")
	}
	return c.config, nil
}

// listen opens the address that clients connect to.
func (n *qemuNBD) listen(ctx context.Context, activated int) (l net.Listener, err error) {
	if activated > 0 {
		list, err := daemon.Activated(activationEnv)
		if err != nil {
			return nil, errorf("Failed to use socket activation: %w", err)
		}
		return list[0], nil
	}
	err = withSocketLabel(n.selinux, func() error {
		l, err = n.listenAt(ctx)
		return err
	})
	return l, err
}

func (n *qemuNBD) listenAt(ctx context.Context) (net.Listener, error) {
	if path := n.unixSocket(); path != "" {
		l, err := daemon.Listen(ctx, daemon.Address{Socket: path, Mode: socketMode()})
		if err != nil {
			return nil, errorf("Failed to bind socket to %s: %s", path, systemReason(err))
		}
		return l, nil
	}
	l, err := daemon.Listen(ctx, daemon.Address{TCP: net.JoinHostPort(n.host(), n.portNumber())})
	addr := n.host() + ":" + n.portNumber()
	var dns *net.DNSError
	var in *net.AddrError
	switch {
	case err == nil:
		return l, nil
	case errors.As(err, &dns) && strings.HasPrefix(dns.Err, "unknown port"):
		return nil, errorf("address resolution failed for %s: Servname not supported for ai_socktype", addr)
	case errors.As(err, &dns) && dns.IsNotFound:
		return nil, errorf("address resolution failed for %s: Name or service not known", addr)
	case errors.As(err, &dns), errors.As(err, &in):
		return nil, errorf("address resolution failed for %s: %w", addr, err)
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, errorf("Failed to find an available port: Address already in use")
	}
	return nil, errorf("Failed to bind socket: %s", systemReason(err))
}

func (n *qemuNBD) host() string {
	if n.bind == "" {
		return "0.0.0.0"
	}
	return n.bind
}

func (n *qemuNBD) portNumber() string {
	if n.port == "" {
		return daemon.DefaultPort
	}
	return n.port
}

// systemReason is what the system says of an error, in the words of the C library.
func systemReason(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return capital(errno.Error())
	}
	return err.Error()
}

// nbdDisk is what is served.
type nbdDisk struct {
	dev block.Device // as clients see it
	// marked are the images whose bitmaps clients may ask for, from the top.
	marked []block.Device
	closed []func() error // in this order
}

func (d *nbdDisk) close() error {
	var err error
	for _, f := range d.closed {
		err = errors.Join(err, f())
	}
	return err
}

// openDisk opens the image and makes of it what the options say.
func (n *qemuNBD) openDisk(ctx context.Context) (d *nbdDisk, err error) {
	d = new(nbdDisk)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	dev, err := n.openImage(ctx)
	if err != nil {
		return d, err
	}
	d.dev, d.closed = dev, []func() error{dev.Close}
	d.marked = chain(dev)
	size := dev.Size()
	if n.offset != 0 {
		off, err := n.checkedOffset(size)
		if err != nil {
			return d, err
		}
		// A disk has whole sectors.
		if d.dev, err = block.Part(dev, off, (size-off)&^511); err != nil {
			return d, err
		}
		d.marked = nil
	}
	if n.snapshot != nil {
		view, err := n.openSnapshot(ctx, d.dev)
		if err != nil {
			return d, err
		}
		d.dev, d.closed = view, slices.Insert(d.closed, 0, view.Close)
	}
	d.dev = block.WithMode(d.dev, n.mode)
	return d, nil
}

// chain lists a device and those below it.
func chain(dev block.Device) []block.Device {
	var list []block.Device
	for dev != nil {
		list = append(list, dev)
		over, ok := block.As[interface{ Backing() block.Device }](dev)
		if !ok {
			break
		}
		dev = over.Backing()
	}
	return list
}

func (n *qemuNBD) openImage(ctx context.Context) (block.Device, error) {
	fail := func(err error) (block.Device, error) {
		// Other programs say once more that they could not open it.
		text := strings.TrimPrefix(err.Error(), fmt.Sprintf("Could not open '%s': ", n.image))
		return nil, errorf("Failed to blk_new_open '%s': %s", n.image, text)
	}
	if n.source.imageOpts && n.source.format != "" {
		return nil, errorf("--image-opts and -f are mutually exclusive")
	}
	if n.nativeAIO && !n.source.direct {
		return fail(errorf("aio=native was specified, but it requires cache.direct=on, which was not specified."))
	}
	n.source.objects = objectFlags{texts: n.objects.secrets.texts, others: &otherObjects{made: true, netObjects: n.objects}}
	n.source.objects.others = &otherObjects{made: true, netObjects: n.objects}
	n.source.policy.allowAny = true
	if err := n.source.set(n.image); err != nil {
		return fail(err)
	}
	dev, err := n.openDevice(ctx, &n.source, n.readOnly || n.overlay)
	if err != nil {
		return fail(err)
	}
	if !n.overlay {
		return dev, nil
	}
	top, err := overTemporary(ctx, dev)
	if err != nil {
		return fail(errors.Join(err, dev.Close()))
	}
	return block.WithMode(top, block.Mode{NoDiscard: n.source.noDiscard, NoFlush: true}), nil
}

func (n *qemuNBD) openSnapshot(ctx context.Context, dev block.Device) (block.Device, error) {
	view, err := image.OpenSnapshot(ctx, dev, *n.snapshot)
	switch {
	case errors.Is(err, image.ErrNoSnapshots):
		return nil, errorf("Failed to load snapshot: Block format '%s' used by device '' does not support temporarily loading internal snapshots",
			dev.Info().Format)
	case errors.Is(err, qcow2.ErrNoSnapshot):
		return nil, errorf("Failed to load snapshot: Can't find snapshot")
	case err != nil:
		return nil, errorf("Failed to load snapshot: %w", err)
	}
	return view, nil
}

// contexts makes the metadata contexts of the bitmaps, in the order in which qemu-nbd lists them: the last one first.
func (n *qemuNBD) contexts(d *nbdDisk) ([]nbd.Context, error) {
	var list []nbd.Context
	for _, name := range n.bitmaps {
		if slices.ContainsFunc(list, func(c nbd.Context) bool { return c.Name == "qemu:dirty-bitmap:"+name }) {
			continue
		}
		c, err := bitmapOf(d.marked, name)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	slices.Reverse(list)
	return list, nil
}

func bitmapOf(devices []block.Device, name string) (nbd.Context, error) {
	for _, dev := range devices {
		im, ok := block.As[*qcow2.Image](dev)
		if !ok {
			continue
		}
		all, err := im.Bitmaps()
		if err != nil {
			return nbd.Context{}, err
		}
		i := slices.IndexFunc(all, func(b qcow2.BitmapInfo) bool { return b.Name == name })
		switch {
		case i < 0:
			continue
		case all[i].InUse:
			return nbd.Context{}, errorf("Bitmap '%s' is inconsistent and cannot be used\n"+
				"Try block-dirty-bitmap-remove to delete this bitmap from disk", name)
		}
		return daemon.BitmapContext(im, name)
	}
	return nbd.Context{}, errorf("Bitmap '%s' is not found", name)
}

func (n *qemuNBD) serve(ctx context.Context, l net.Listener, encryption *nbd.TLS, signals *signalWatch) (err error) {
	disk, err := n.openDisk(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.close()) }()
	contexts, err := n.contexts(disk)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	count := newClientCount(l, !n.persistent, stop)
	server := nbd.NewServer(nbd.Options{
		MaxConnections: orForever(n.shared), TLS: encryption, Observer: count.observer(),
	})
	var name string
	if n.export != nil {
		name = *n.export
	}
	err = server.AddExport(nbd.Export{
		Name: name, Description: n.description, Device: disk.dev, ReadOnly: n.readOnly, Contexts: contexts,
		Advertised: nbd.Advertised{NoDepth: !n.depth, NoMultiConn: n.shared == 1, PreferBlock: nbdBlock},
	})
	if err != nil {
		return err
	}
	detach := func() error { return nil }
	if n.connect != "" {
		if detach, err = n.attach(ctx, server, count, name); err != nil {
			return err
		}
	}
	if err = n.writePID(); err == nil && theStage().ready != nil {
		err = os.Chdir("/") // somebody may want to unmount the folder that it was started in
	}
	if err == nil {
		err = inForce()
	}
	if err != nil {
		return errors.Join(err, detach())
	}
	return n.untilStopped(ctx, server, count, signals, detach)
}

// untilStopped serves until the end of ctx. Then the kernel is told before anybody is cut off from anything.
func (n *qemuNBD) untilStopped(ctx context.Context, server *nbd.Server, l net.Listener, signals *signalWatch, detach func() error) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(context.WithoutCancel(ctx), l) }()
	select {
	case err := <-failed:
		return errors.Join(err, detach())
	case <-ctx.Done():
	}
	if err := detach(); err != nil {
		n.say("%v", err)
	}
	drained := make(chan error, 1)
	go func() {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), daemon.DefaultDrain)
		defer cancel()
		drained <- server.Shutdown(limit)
	}()
	select {
	case err := <-drained:
		return err
	case <-signals.second:
		return &exitError{exitForced, "ended by a second signal; writes that were not flushed may be lost"}
	}
}

func (n *qemuNBD) writePID() error {
	if n.pidFile == "" {
		return nil
	}
	if err := writePIDFile(n.pidFile); err != nil {
		return errorf("Could not create '%s': %s", n.pidFile, systemReason(err))
	}
	return nil
}

// writePIDFile stores the number of this process.
func writePIDFile(name string) error {
	return os.WriteFile(name, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644)
}

// clientCount is a listener that knows how many clients are connected, and ends a server when the last of them has gone that
// got as far as an export.
type clientCount struct {
	net.Listener
	last bool // end when the last client has gone
	stop func()

	mu        sync.Mutex
	connected int
	served    bool // one had an export
}

func newClientCount(l net.Listener, last bool, stop func()) *clientCount {
	return &clientCount{Listener: l, last: last, stop: stop}
}

// Accept counts the clients that come.
func (c *clientCount) Accept() (net.Conn, error) {
	nc, err := c.Listener.Accept()
	if err == nil {
		c.come()
	}
	return nc, err
}

func (c *clientCount) come() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connected++
}

func (c *clientCount) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connected--
	if c.last && c.served && c.connected == 0 {
		c.stop()
	}
}

func (c *clientCount) observer() nbd.Observer {
	return nbd.Observer{
		Connected: func(nbd.Conn) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.served = true
		},
		Disconnected: func(nbd.Conn, nbd.Stats, error) { c.leave() },
		Refused:      func(nbd.Peer, error) { c.leave() },
	}
}

// socketMode is that of a new unix socket: everybody's, but for what the user masks.
func socketMode() fs.FileMode { return 0o777 &^ umask() }
