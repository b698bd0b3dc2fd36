package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/internal/nbddev"
	"github.com/droverproject/drover/nbd/client"
)

// maxConnections bounds the connections of a device: the kernel makes a queue of each.
const maxConnections = 16

// multiConnFlag is the transmission flag of an export that may be used over several connections.
const multiConnFlag = 1 << 8

func (a *app) nbdCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "nbd COMMAND [flags]",
		Short: "Use exports of NBD servers as devices of this host, list them",
		Long: `Make exports of NBD servers devices of this host (/dev/nbd0 and so on), end that,
and list what devices and exports there are. Devices need root and the kernel's
module nbd.

For an image of this host, 'drover serve --connect DEVICE IMAGE' does both ends.`,
		Example: `  drover nbd attach nbd://server/disk /dev/nbd0
  drover nbd list nbd+unix:///?socket=/run/disk.sock
  drover nbd detach /dev/nbd0`,
		Args: cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("Expecting a command: 'drover nbd --help' lists them")
			}
			return usagef("Command not found: nbd %s", args[0])
		},
	}
	cmd.AddCommand(a.nbdAttachCommand(), a.nbdDetachCommand(), a.nbdStatusCommand(), a.nbdListCommand())
	for _, c := range cmd.Commands() {
		c.Flags().SortFlags = false
	}
	return cmd
}

// nbdAttach is one run of nbd attach.
type nbdAttach struct {
	*app
	connections int
	blockSize   int
	readOnly    bool
	timeout     time.Duration
	reconnect   time.Duration
	onClose     bool
	pause       time.Duration // after an attempt to connect again that failed
}

func (a *app) nbdAttachCommand() *cobra.Command {
	n := &nbdAttach{app: a, pause: retryPause}
	cmd := &cobra.Command{
		Use:   "attach [flags] URI [DEVICE]",
		Short: "Make an export a device",
		Long: `Make the export at URI (nbd://HOST[:PORT][/NAME] or nbd+unix:///[NAME]?socket=PATH)
a device: DEVICE, or one that is free, whose name is printed.

The program ends when the device is there; the kernel goes on alone. With
--reconnect it stays instead and puts new connections in place of those that die,
while what is read and written waits, until the device is detached or the program
interrupted, which detaches it.`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error { return n.run(cmd.Context(), args) },
	}
	f := cmd.Flags()
	f.IntVar(&n.connections, "connections", 4, "use `N` connections, 1 for exports that allow no more")
	f.BoolVarP(&n.readOnly, "read-only", "r", false, "let nobody change the device")
	f.IntVar(&n.blockSize, "block-size", 0, "`size` of the device's sectors, 512 to 4096; by default the smallest that the server takes")
	f.DurationVar(&n.timeout, "timeout", 0, "`time` after which a request's connection counts as dead, 0 for never")
	f.DurationVar(&n.reconnect, "reconnect", 0, "stay, and reconnect within a `time` of the last connection's death")
	f.BoolVar(&n.onClose, "detach-on-close", false, "detach the device when its last user has closed it")
	return cmd
}

func (n *nbdAttach) run(ctx context.Context, args []string) error {
	switch {
	case n.connections < 1 || n.connections > maxConnections:
		return usagef("--connections must be from 1 to %d", maxConnections)
	case n.reconnect < 0 || n.timeout < 0:
		return usagef("--timeout and --reconnect must not be negative")
	}
	target, err := client.ParseName(args[0])
	if err != nil {
		return errorf("%s: %w", args[0], err)
	}
	if target.TLS {
		return errorf("%s: the kernel's NBD client does no TLS", args[0])
	}
	device := ""
	if len(args) > 1 {
		device = args[1]
	}
	ctx, signals := catchSignals(ctx)
	defer signals.release()
	conns, x, err := n.dial(ctx, target)
	if err != nil {
		return err
	}
	cfg := nbddev.Config{
		Size: x.Size, Flags: x.Flags, BlockSize: n.blockSize, Timeout: n.timeout, DeadTimeout: n.reconnect, DisconnectOnClose: n.onClose,
	}
	if n.readOnly {
		cfg.Flags |= nbddev.FlagReadOnly
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = sectorSize(x)
	}
	if n.reconnect == 0 {
		d, err := connectDevice(device, cfg, conns)
		if err != nil {
			return err
		}
		n.printf("%s\n", d.name)
		return n.leave(ctx, d)
	}
	watch, err := openWatch() // first, so that nothing is missed
	if err != nil {
		for _, c := range conns {
			err = errors.Join(err, c.Close())
		}
		return err
	}
	d, err := connectDevice(device, cfg, conns)
	if err != nil {
		return errors.Join(err, watch.Close())
	}
	n.printf("%s\n", d.name)
	err = n.stay(ctx, d, watch, cfg, target)
	_ = watch.Close() // it may be closed
	return err
}

// leave lets the kernel go on alone, where it can; where it cannot, it waits for the end of the device or of the program.
func (n *nbdAttach) leave(ctx context.Context, d *kernelDevice) error {
	if d.old == nil {
		return d.release()
	}
	select {
	case err := <-d.old.Done():
		return err
	case <-ctx.Done():
		return d.disconnect()
	}
}

// openWatch opens a connection that is told of connections that die.
func openWatch() (*nbddev.Control, error) {
	watch, err := nbddev.Open()
	if err != nil {
		return nil, err
	}
	if err := watch.Watch(); err != nil {
		return nil, errors.Join(err, watch.Close())
	}
	return watch, nil
}

// dial makes the connections, one after the other, since the first tells whether there may be more.
func (n *nbdAttach) dial(ctx context.Context, t client.Target) (conns []net.Conn, x nbddev.Export, err error) {
	defer func() {
		if err != nil {
			for _, c := range conns {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	for len(conns) < n.connections {
		c, y, err := dialExport(ctx, t)
		if err != nil {
			return conns, x, err
		}
		conns = append(conns, c)
		if len(conns) > 1 && (y.Size != x.Size || y.Flags != x.Flags) {
			return conns, x, errorf("the server says something else about the export over each connection")
		}
		if x = y; x.Flags&multiConnFlag == 0 {
			break
		}
	}
	return conns, x, nil
}

// dialTimeout is how long a server may take for a handshake.
const dialTimeout = 30 * time.Second

func dialExport(ctx context.Context, t client.Target) (net.Conn, nbddev.Export, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	network, addr := "tcp", net.JoinHostPort(t.Address.Host, t.Address.Port)
	if t.Address.Host == "" {
		network, addr = "unix", t.Address.Path
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, nbddev.Export{}, (&client.ConnectError{Address: t.Address, Err: err})
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) }) // the reads below fail
	x, err := nbddev.Handshake(c, t.Export)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, x, errors.Join(err, c.Close())
	}
	return c, x, nil
}

// reconnecter is what stay needs of the kernel.
type reconnecter interface {
	Reconnect(cfg nbddev.Config, sockets []int) error
}

// watchInterval is how often to look whether somebody has detached the device, of which the kernel says nothing.
const watchInterval = 5 * time.Second

// stay puts new connections in place of those that die, until the device or the program ends.
func (n *nbdAttach) stay(ctx context.Context, d *kernelDevice, watch *nbddev.Control, cfg nbddev.Config, t client.Target) (err error) {
	defer func() { err = errors.Join(err, d.disconnect()) }()
	if d.control == nil {
		return errorf("--reconnect: %w", nbddev.ErrUnsupported)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		n.untilDetached(ctx, d)
		cancel()
	}()
	stop := context.AfterFunc(ctx, func() { _ = watch.Close() }) // Receive fails
	defer stop()
	cfg.Index = d.index
	for {
		dead, err := watch.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		for _, index := range dead {
			if index != d.index {
				continue
			}
			n.say("%s: a connection to the server died; trying again", d.name)
			if err := n.again(ctx, d.control, cfg, t); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

// untilDetached returns when somebody has detached the device, or ctx has ended.
func (n *nbdAttach) untilDetached(ctx context.Context, d *kernelDevice) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if connected, err := isConnected(d.index); err == nil && !connected {
			d.gone.Store(true)
			return
		}
	}
}

// isConnected asks over a connection of its own, since others may be in use.
func isConnected(index int) (bool, error) {
	c, err := nbddev.Open()
	if err != nil {
		return false, err
	}
	list, err := c.Status()
	if err := errors.Join(err, c.Close()); err != nil {
		return false, err
	}
	for _, s := range list {
		if s.Index == index {
			return s.Connected, nil
		}
	}
	return false, nil
}

// retryPause is nbdAttach.pause.
const retryPause = time.Second

// again makes one new connection within the time that the kernel waits for it.
func (n *nbdAttach) again(ctx context.Context, control reconnecter, cfg nbddev.Config, t client.Target) error {
	ctx, cancel := context.WithTimeout(ctx, cfg.DeadTimeout)
	defer cancel()
	for {
		c, x, err := dialExport(ctx, t)
		switch {
		case err != nil:
		case x.Size < cfg.Size:
			return errors.Join(errorf("the export has shrunk: %d bytes", x.Size), c.Close())
		default:
			return withSockets([]net.Conn{c}, func(fds []int) error { return control.Reconnect(cfg, fds) })
		}
		select {
		case <-ctx.Done():
			return errorf("the server did not come back: %w", err)
		case <-time.After(n.pause):
		}
	}
}

func (a *app) nbdDetachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "detach DEVICE...",
		Short: "End devices",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var errs []error
			for _, name := range args {
				errs = append(errs, a.detachOne(name))
			}
			return errors.Join(errs...)
		},
	}
}

func (a *app) detachOne(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return errorf("%s: %s", name, systemReason(err))
	}
	if _, err := nbddev.IndexOf(name); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(detachDevice(name, f), f.Close())
}

func (a *app) nbdStatusCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "List the devices",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return a.nbdStatus(output == "json")
		},
	}
	outputFlag(cmd, &output)
	return cmd
}

// deviceStatus is a device in a list.
type deviceStatus struct {
	Device    string `json:"device"`
	Connected bool   `json:"connected"`
}

func (a *app) nbdStatus(asJSON bool) error {
	control, err := nbddev.Open()
	if err != nil {
		return err
	}
	list, err := control.Status()
	if err := errors.Join(err, control.Close()); err != nil {
		return err
	}
	devices := make([]deviceStatus, len(list))
	for i, s := range list {
		devices[i] = deviceStatus{nbddev.DeviceName(s.Index), s.Connected}
	}
	if asJSON {
		return a.printJSON(devices)
	}
	for _, d := range devices {
		state := "free"
		if d.Connected {
			state = "connected"
		}
		a.printf("%s %s\n", d.Device, state)
	}
	return nil
}

func (a *app) nbdListCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "list URI",
		Short: "List the exports of a server",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return a.nbdList(cmd.Context(), args[0], output == "json")
		},
	}
	outputFlag(cmd, &output)
	return cmd
}

// listedExport is an export in a list.
type listedExport struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Size        uint64   `json:"size"`
	Flags       []string `json:"flags"`
	MinBlock    uint32   `json:"min-block,omitempty"`
	PreferBlock uint32   `json:"prefer-block,omitempty"`
	MaxBlock    uint32   `json:"max-block,omitempty"`
	Contexts    []string `json:"contexts"`
}

func (a *app) nbdList(ctx context.Context, uri string, asJSON bool) error {
	t, err := client.ParseName(uri)
	if err != nil {
		return errorf("%s: %w", uri, err)
	}
	d := client.Dialing{Address: t.Address}
	if t.TLS {
		return fmt.Errorf("%s: listing over TLS needs credentials: use the name qemu-nbd, with --list and --tls-creds", uri)
	}
	list, err := client.List(ctx, d)
	if err != nil {
		return err
	}
	if !asJSON {
		for i := range list {
			(&qemuNBD{app: a}).listExport(&list[i])
		}
		return nil
	}
	out := make([]listedExport, len(list))
	for i, e := range list {
		out[i] = listedExport{e.Name, e.Description, e.Size, flagNames(e.Flags), e.MinBlock, e.PreferBlock, e.MaxBlock, e.Contexts}
	}
	return a.printJSON(out)
}
