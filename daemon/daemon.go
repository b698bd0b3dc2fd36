// Package daemon is the long-running process behind 'drover serve': it opens images, offers them to NBD clients on one
// or more listeners, and closes everything in the right order when it is told to stop.
//
// # Life
//
// [Open] opens the images, in the order given, and then the listeners: a client that can connect finds everything in
// place, and whatever is wrong comes to light before anybody depends on it. [Daemon.Serve] serves until its context
// ends; then listeners close, connections finish what they have begun, and each image is flushed and closed, whatever
// the others do. Serve returns nil only if every acknowledged write is durable.
//
// # Snapshots
//
// Each snapshot inside an image is an export of its own, read-only, whose name is that of the image's export, an "@", and
// the snapshot's name. Snapshots that are created while the daemon runs are found as well. Every connection opens the
// snapshot for itself; while one has it open, it cannot be deleted.
//
// # What it may do
//
// Between the two, [Confine] can take from the process what it does not need any more: it opens nothing after Open, so it
// can live without access to files, without privileges, and as another user. [LoadTLS] reads credentials, and [Rules] say
// which clients may use an export.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/nbd"
)

// DefaultDrain is how long Serve waits for connections to finish.
const DefaultDrain = 30 * time.Second

// Export is an image under the name by which clients ask for it.
type Export struct {
	Name, Description string
	Image             string // file name
	// Open says how the image is opened. With no Format the content decides between the formats that can be told by it;
	// a disk that looks like none of them is accepted as raw only read-only.
	Open block.OpenOptions
	// Snapshot, if not nil, has only that snapshot of the image served, read-only.
	Snapshot *image.SnapshotRef
	// HideSnapshots keeps the snapshots inside the image from being served beside it.
	HideSnapshots bool
	// Allow says who may use it; nil lets everybody.
	Allow func(nbd.Peer) bool
	// Bitmaps are dirty bitmaps of the image that clients can read, each as the metadata context qemu:dirty-bitmap:NAME.
	Bitmaps []string
	// Adjust, if not nil, makes of the opened disk what is served, which may be writable where the image is open read-only.
	// Closing that closes the disk.
	Adjust func(ctx context.Context, disk block.Device) (block.Device, error)
}

// Config says what to serve where.
type Config struct {
	Exports []Export
	// Addresses are opened by Open, Listeners are there already (from a service manager); Serve closes both.
	Addresses []Address
	Listeners []net.Listener
	NBD       nbd.Options
	Drain     time.Duration // 0 is DefaultDrain
	// Control is the management API, which Serve serves and closes; nil: none.
	Control *Control
	// NoListeners permits neither addresses nor listeners: all connections come by Daemon.ServeConn.
	NoListeners bool
	// Template is what exports that are added by the control API have in common: the policy, the secrets, who may use them.
	Template Export
}

// Daemon serves images.
type Daemon struct {
	server    *nbd.Server
	drain     time.Duration
	listeners []net.Listener
	encrypted bool               // clients have to use TLS
	memory    *block.CacheBudget // of all images together
	limit     int64              // of memory
	template  Export             // of exports that are added while the daemon runs
	control   *Control
	sealed    string // why no export can be added, "" if they can; under mu

	mu      sync.Mutex
	exports []*openExport
	adding  map[string]bool // names of exports that are being opened or removed
}

type openExport struct {
	Export
	dev  block.Device // the image
	disk block.Device // what is served of it: the image, or one of its snapshots
}

// close flushes and closes the image; it is the last to know of a write that could not be kept.
func (x *openExport) close() error {
	if x.Adjust != nil && x.Snapshot == nil {
		return x.disk.Close()
	}
	return x.dev.Close()
}

// readOnly reports whether clients may change nothing.
func (x *openExport) readOnly() bool {
	return x.disk.Info().ReadOnly || x.Open.ReadOnly && x.Adjust == nil
}

// marked is the disk whose bitmaps clients may ask for.
func (x *openExport) marked() block.Device {
	if x.Adjust != nil {
		return x.dev
	}
	return x.disk
}

// Open opens all that the configuration names. After an error nothing stays open.
func Open(ctx context.Context, c Config) (d *Daemon, err error) {
	d = &Daemon{drain: c.Drain, listeners: c.Listeners, limit: block.DefaultCacheBudget, template: c.Template,
		control: c.Control, adding: make(map[string]bool)}
	d.memory = block.NewCacheBudget(d.limit)
	c.NBD.Provider = snapshots{d}
	d.server = nbd.NewServer(c.NBD)
	d.encrypted = c.NBD.TLS != nil && c.NBD.TLS.Required
	if d.drain == 0 {
		d.drain = DefaultDrain
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.release())
			d = nil
		}
	}()
	for _, e := range c.Exports {
		x, err := d.open(ctx, e)
		if err != nil {
			return d, err
		}
		d.exports = append(d.exports, x)
		if err := d.offer(x); err != nil {
			return d, err
		}
	}
	for _, a := range c.Addresses {
		l, err := Listen(ctx, a)
		if err != nil {
			return d, err
		}
		d.listeners = append(d.listeners, l)
	}
	if len(d.listeners) == 0 && !c.NoListeners {
		return d, errors.New("no address to listen on")
	}
	return d, nil
}

// open opens the image of an export. After an error nothing stays open.
func (d *Daemon) open(ctx context.Context, e Export) (*openExport, error) {
	if e.Open.Format == "" {
		format, err := guessFormat(e)
		if err != nil {
			return nil, err
		}
		e.Open.Format = format
	}
	if e.Open.Format == block.FormatRaw {
		e.Open.Options = nil // they are for formats that have caches
	}
	if e.Open.Memory == nil {
		e.Open.Memory = d.memory
	}
	dev, err := block.Open(ctx, e.Image, e.Open)
	if err != nil {
		return nil, err
	}
	x := &openExport{e, dev, dev}
	if e.Snapshot != nil {
		if x.disk, err = image.OpenSnapshot(ctx, dev, *e.Snapshot); err != nil {
			return nil, errors.Join(fmt.Errorf("loading snapshot of %q: %w", e.Image, err), dev.Close())
		}
	}
	if e.Adjust != nil {
		if x.disk, err = e.Adjust(ctx, x.disk); err != nil {
			return nil, errors.Join(fmt.Errorf("%q: %w", e.Image, err), dev.Close())
		}
	}
	return x, nil
}

// offer makes an open export available to clients.
func (d *Daemon) offer(x *openExport) error {
	contexts, err := bitmapContexts(x.Export, x.marked())
	if err != nil {
		return err
	}
	return d.server.AddExport(nbd.Export{
		Name: x.Name, Description: x.Description, Device: x.disk, ReadOnly: x.readOnly(), Allow: x.Allow, Contexts: contexts,
	})
}

// ErrGuessedRaw is wrapped when a disk would be exported writable as raw only because nothing else is known of it.
var ErrGuessedRaw = errors.New("it looks like a raw disk, and a client could make a raw disk look like an image" +
	" that names other files; say --format raw (or --read-only)")

// guessFormat looks at the content of an image. It takes no lock: opening the image will.
func guessFormat(e Export) (string, error) {
	o := e.Open
	o.ReadOnly, o.NoLock = true, true
	file, err := block.OpenFile(e.Image, o)
	if err != nil {
		return "", err
	}
	format, err := block.ProbeFile(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return "", fmt.Errorf("finding out the format of %q: %w", e.Image, err)
	}
	if format == block.FormatRaw && !e.Open.ReadOnly {
		return "", fmt.Errorf("%q: %w", e.Image, ErrGuessedRaw)
	}
	return format, nil
}

// all lists the exports there are now.
func (d *Daemon) all() []*openExport {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.exports)
}

// Status describes an export in service.
type Status struct {
	Name, Image, Format string
	Size                int64
	ReadOnly            bool
}

// Exports lists the exports in the order in which they came.
func (d *Daemon) Exports() []Status {
	exports := d.all()
	list := make([]Status, len(exports))
	for i, e := range exports {
		info := e.disk.Info()
		list[i] = Status{
			Name: e.Name, Image: e.Image, Format: info.Format, Size: e.disk.Size(),
			ReadOnly: e.readOnly(),
		}
	}
	return list
}

// URIs lists where clients find the export of the given name, one URI for each listener.
func (d *Daemon) URIs(export string) []string {
	list := make([]string, len(d.listeners))
	for i, l := range d.listeners {
		list[i] = URI(l.Addr(), export)
		if d.encrypted {
			list[i] = "nbds" + strings.TrimPrefix(list[i], "nbd")
		}
	}
	return list
}

// Serve serves until ctx ends or a listener fails, then drains, flushes and closes. It is called once.
func (d *Daemon) Serve(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	failures := make(chan error, len(d.listeners)+1)
	var running sync.WaitGroup
	for _, l := range d.listeners {
		running.Add(1)
		go func() {
			defer running.Done()
			// The server ends when Shutdown is called, so the context must not cut connections off before.
			err := d.server.Serve(context.WithoutCancel(ctx), l)
			if err != nil && !errors.Is(err, nbd.ErrServerClosed) {
				failures <- err
				stop()
			}
		}()
	}
	if d.control != nil {
		running.Go(func() {
			if err := d.control.Serve(d); err != nil {
				failures <- err
				stop()
			}
		})
	}
	<-ctx.Done()
	err := d.closeControl() // first: what it has begun needs the images, and nothing new begins
	err = errors.Join(err, d.shutdown(context.WithoutCancel(ctx)))
	running.Wait()
	close(failures)
	for failure := range failures {
		err = errors.Join(err, failure)
	}
	return errors.Join(err, d.release())
}

// ServeConn serves one connection that came some other way than over a listener, as nbd.Server.ServeConn does.
func (d *Daemon) ServeConn(ctx context.Context, nc net.Conn) error {
	return d.server.ServeConn(ctx, nc)
}

// shutdown drains the server within the time allowed.
func (d *Daemon) shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.drain)
	defer cancel()
	if err := d.server.Shutdown(ctx); err != nil {
		return fmt.Errorf("waiting for clients to finish: %w", err)
	}
	return nil
}

// closeControl ends the management API.
func (d *Daemon) closeControl() error {
	if d.control == nil {
		return nil
	}
	return d.control.Close()
}

// release closes listeners and images.
func (d *Daemon) release() error {
	errs := []error{d.closeControl()}
	for _, l := range d.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, fmt.Errorf("closing listener %v: %w", l.Addr(), err))
		}
	}
	for _, e := range d.all() {
		if err := e.close(); err != nil {
			errs = append(errs, fmt.Errorf("closing %q: %w", e.Image, err))
		}
	}
	return errors.Join(errs...)
}
