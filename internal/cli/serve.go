package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/nbd"
)

// exitForced is the code of a program ended by a second signal: that of a shell for SIGINT.
const exitForced = 130

// defaultListen is used when nothing says where to listen: clients of this host only.
const defaultListen = "localhost:" + daemon.DefaultPort

func (a *app) serveCommand() *cobra.Command {
	var s server
	cmd := &cobra.Command{
		Use:   "serve [flags] [IMAGE]",
		Short: "Serve images to NBD clients",
		Long: `Serve images to NBD clients until interrupted.

IMAGE is the default export, the one of the empty name; --export adds others. A
client can reach the exports at every --socket and --listen address; without any,
at localhost:10809, or at the sockets that systemd passed on.

Each snapshot inside an image is an export of its own, read-only, called by the
name of the image's export, an "@" and the snapshot's name (or ID): disk@before.

The format of an image is found out from its content, unless --format says it. A
raw disk is exported writable only with --format raw.

A server with --control is managed by 'drover ctl' while it runs: snapshots, sizes,
bitmaps, exports. SIGHUP has it read TLS credentials, secrets and the log level of
--config again.

SIGINT and SIGTERM end the server when clients have got their answers and
everything is written and flushed; a second signal ends it at once.`,
		Example: `  drover serve --socket /run/vm.sock vm.qcow2
  drover serve --listen 0.0.0.0 --read-only --export base=base.qcow2 --export iso=cd.iso
  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/vm.sock`,
		RunE: func(cmd *cobra.Command, args []string) error {
			s.app = a
			return s.run(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&s.sockets, "socket", nil, "listen on a unix socket at `PATH` (may be repeated)")
	f.StringArrayVar(&s.listen, "listen", nil, "listen on TCP at `HOST[:PORT]` (may be repeated)")
	f.StringArrayVar(&s.exports, "export", nil, "serve an image under a name: `NAME=IMAGE` (may be repeated)")
	f.BoolVarP(&s.readOnly, "read-only", "r", false, "let clients change nothing")
	f.StringVarP(&s.format, "format", "f", "", "`format` of the images")
	f.StringVarP(&s.snapshot, "load-snapshot", "l", "", "serve `SNAPSHOT` of IMAGE instead of its disk, by ID or name, read-only")
	f.BoolVar(&s.hideSnapshots, "no-snapshots", false, "do not serve the snapshots inside the images")
	f.StringArrayVarP(&s.bitmaps, "bitmap", "B", nil, "let clients read dirty bitmap `NAME` of the images (may be repeated)")
	f.BoolVarP(&s.depth, "allocation-depth", "A", false, "let clients see which layer data comes from (they always can)")
	f.StringVar(&s.cacheSize, "cache-size", "", "`size` of the metadata cache of each image")
	f.BoolVarP(&s.forceShare, "force-share", "U", false, "serve images that somebody else writes to (needs --read-only)")
	f.IntVar(&s.maxConnections, "max-connections", 100, "serve at most `N` clients at a time, 0 for any number")
	f.DurationVar(&s.handshake, "handshake-timeout", 10*time.Second, "`time` that a client has to choose an export, 0 for ever")
	f.BoolVar(&s.imageOpts, "image-opts", false, "images are given as options: driver=FMT,file.filename=NAME")
	s.more.add(f)
	s.objects.add(f)
	s.manage.add(f, "", "")
	s.security.add(f)
	s.policy.add(f)
	return cmd
}

// server is one run of serve.
type server struct {
	*app
	sockets, listen, exports []string
	bitmaps                  []string
	depth                    bool
	format, cacheSize        string
	snapshot                 string
	readOnly, forceShare     bool
	imageOpts                bool
	objects                  objectFlags
	hideSnapshots            bool
	maxConnections           int
	handshake                time.Duration
	policy                   policyFlags
	security                 securityFlags
	manage                   manageFlags
	more                     serveMore
	*manager
}

func (s *server) run(cmd *cobra.Command, args []string) (err error) {
	if err := s.more.check(s, args); err != nil {
		return err
	}
	if s.more.fork && !s.enterBackground() {
		return s.background(s.app.args, passedSockets())
	}
	if s.manager, err = s.manage.start(); err != nil {
		return err
	}
	s.log = slog.New(newPlainHandler(s.err, s.level))
	config, err := s.config(args)
	if err != nil {
		return err
	}
	if config.Listeners, err = daemon.Activated(activationEnv); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.more.cleanUp()) }()
	if err := s.more.addresses(&config); err != nil {
		return err
	}
	if len(config.Addresses)+len(config.Listeners) == 0 && !config.NoListeners {
		config.Addresses = []daemon.Address{{TCP: defaultListen}}
	}
	if err := s.security.complete(&config); err != nil {
		return err
	}
	if s.security.sandbox == sandboxStrict {
		s.sealed = "the server is in a sandbox (--sandbox) and can read nothing any more: start it again for what has changed"
	}
	if s.security.creds != nil {
		s.reloads = append(s.reloads, s.security.creds.Reload)
	}
	// From here on a signal means to stop in order, also while images are being opened.
	ctx, signals := catchSignals(cmd.Context())
	defer signals.release()
	if config.Control, err = s.open(ctx, s.security.owner); err != nil {
		return err
	}
	d, err := daemon.Open(ctx, config)
	if err != nil {
		return serveError(err)
	}
	s.connect()
	defer s.notifier.Close()
	if err := s.more.writePID(); err != nil {
		return errors.Join(err, d.Close())
	}
	if err := s.confine(&s.security, d); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	end, err := s.more.begin(ctx, d, stop)
	if err != nil {
		return errors.Join(err, d.Close())
	}
	if s.more.command == "" { // which may have something to say itself
		s.announce(d)
	}
	if err := inForce(); err != nil {
		return errors.Join(err, end(), d.Close())
	}
	defer s.onHangup()()
	wait, err := s.more.runCommand(ctx, s.app, d, stop)
	if err != nil {
		return errors.Join(err, end(), d.Close())
	}
	return errors.Join(s.serve(ctx, d, signals, end), wait())
}

// serve serves until the end of ctx, and calls end before clients are cut off.
func (s *server) serve(ctx context.Context, d *daemon.Daemon, signals *signalWatch, end func() error) error {
	done := make(chan error, 1)
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	go func() { done <- d.Serve(serving) }()
	s.notify(stateReady)
	select {
	case err := <-done:
		return errors.Join(err, end())
	case <-ctx.Done():
	}
	s.notify(stateStopping)
	if err := end(); err != nil {
		s.log.Warn(err.Error())
	}
	stop()
	select {
	case err := <-done:
		return err
	case <-signals.second:
		return &exitError{exitForced, "ended by a second signal; writes that were not flushed may be lost"}
	}
}

func (s *server) config(args []string) (daemon.Config, error) {
	c := daemon.Config{NBD: nbd.Options{
		MaxConnections: orForever(s.maxConnections), HandshakeTimeout: orForever(s.handshake), Observer: s.more.observe(s.observer()),
	}}
	if s.maxConnections < 0 || s.handshake < 0 {
		return c, usagef("--max-connections and --handshake-timeout must not be negative")
	}
	if s.forceShare && !s.readOnly && s.snapshot == "" {
		return c, usagef("--force-share needs --read-only")
	}
	keys, err := newKeyring(&s.objects, "")
	if err != nil {
		return c, err
	}
	s.reloads = append(s.reloads, keys.reload)
	open := block.OpenOptions{
		Object: s.objects.lookup, Warn: s.warn,
		Secret: keys.lookup, Format: s.format, ReadOnly: s.readOnly, ForceShare: s.forceShare, Policy: s.policy.policy(),
		OnRepair: func(name string, r block.Repair) { s.log.Warn(fmt.Sprintf("%s: %v", name, r)) },
		OnCorrupt: func(name string, err error) {
			s.log.Error(fmt.Sprintf("%s: Marking image as corrupt: %v; it is only read from now on", name, err))
		},
	}
	if s.cacheSize != "" {
		if n, err := block.ParseSize(s.cacheSize); err != nil || n <= 0 {
			return c, usagef("--cache-size %s is not a size", s.cacheSize)
		}
		open.Options = map[string]string{"l2-cache-size": s.cacheSize}
	}
	c.Template = daemon.Export{Open: open, HideSnapshots: s.hideSnapshots}
	if len(args) > 1 {
		return c, usagef("Unexpected argument: %s (use --export NAME=IMAGE for more than one image)", args[1])
	}
	if len(args) == 1 {
		e := daemon.Export{Image: args[0], Open: open, HideSnapshots: s.hideSnapshots, Bitmaps: s.bitmaps}
		if err := s.describe(&e, args[0], keys.known); err != nil {
			return c, err
		}
		if s.snapshot != "" {
			ref, err := image.ParseSnapshotRef(s.snapshot)
			if err != nil {
				return c, err
			}
			e.Snapshot, e.Open.ReadOnly = &ref, true
		}
		if err := s.more.adjust(&e, true); err != nil {
			return c, err
		}
		c.Exports = append(c.Exports, e)
	} else if s.snapshot != "" {
		return c, usagef("--load-snapshot needs an IMAGE")
	}
	for _, text := range s.exports {
		name, file, ok := strings.Cut(text, "=")
		if !ok || file == "" {
			return c, usagef("--export %s: expecting NAME=IMAGE", text)
		}
		e := daemon.Export{Name: name, Image: file, Open: open, HideSnapshots: s.hideSnapshots, Bitmaps: s.bitmaps}
		if err := s.describe(&e, file, keys.known); err != nil {
			return c, err
		}
		if err := s.more.adjust(&e, false); err != nil {
			return c, err
		}
		c.Exports = append(c.Exports, e)
	}
	if len(c.Exports) == 0 {
		return c, usagef("Expecting an image file name or --export NAME=IMAGE")
	}
	for _, path := range s.sockets {
		c.Addresses = append(c.Addresses, daemon.Address{Socket: path})
	}
	for _, addr := range s.listen {
		c.Addresses = append(c.Addresses, daemon.Address{TCP: addr})
	}
	return c, nil
}

// describe finds out what the text that names an image stands for.
func (s *server) describe(e *daemon.Export, text string, known secrets) error {
	src := source{secrets: known, format: s.format, warn: s.warn}
	if !s.imageOpts {
		if _, err := block.PlainName(text); err == nil {
			return nil
		}
		node, err := block.ParseName(text, s.format)
		if err != nil {
			return openError(text, err)
		}
		e.Open.Node, e.Open.Format = node, ""
		return nil
	}
	if s.format != "" {
		return errorf("--image-opts and --format are mutually exclusive")
	}
	if err := src.parseImageOpts(text); err != nil {
		return err
	}
	e.Open.Node, e.Open.Format = src.node, ""
	return nil
}

// orForever translates the zero of a flag, no bound, into that of nbd.Options, a negative number.
func orForever[T int | time.Duration](n T) T {
	if n == 0 {
		return -1
	}
	return n
}

// announce says where clients find what.
func (s *server) announce(d *daemon.Daemon) {
	exports := d.Exports()
	for _, uri := range d.URIs("") {
		s.printf("%s\n", uri)
	}
	for _, e := range exports {
		mode := "read-write"
		if e.ReadOnly {
			mode = "read-only"
		}
		s.printf("export %q: %s, %s, %s (%d bytes), %s\n", e.Name, e.Image, e.Format, humanSize(uint64(e.Size)), e.Size, mode)
	}
}

// observer reports what an administrator should know, not what a client does every day.
func (s *server) observer() nbd.Observer {
	say := func(level slog.Level, format string, args ...any) {
		if s.log.Enabled(context.Background(), level) {
			s.log.Log(context.Background(), level, fmt.Sprintf(format, args...))
		}
	}
	var failures, turnedAway limiter
	return nbd.Observer{
		Connected: func(c nbd.Conn) { say(slog.LevelDebug, "client %d (%v) of export %q came", c.ID, c.Peer, c.Export) },
		Disconnected: func(c nbd.Conn, _ nbd.Stats, err error) {
			switch {
			case err == nil:
				say(slog.LevelDebug, "client %d (%v) of export %q left", c.ID, c.Peer, c.Export)
			case c.Export != "":
				say(slog.LevelWarn, "client %d (%v) of export %q: %v", c.ID, c.Peer, c.Export, err)
			case errors.Is(err, nbd.ErrTLS):
				if ok, dropped := turnedAway.allow(time.Now()); ok {
					say(slog.LevelWarn, "client %d (%v): %v%s", c.ID, c.Peer, err, andDropped(dropped))
				}
			}
		},
		Refused: func(p nbd.Peer, err error) {
			if ok, dropped := turnedAway.allow(time.Now()); ok {
				say(slog.LevelWarn, "client (%v): %v%s", p, err, andDropped(dropped))
			}
		},
		RequestFailed: func(c nbd.Conn, cmd nbd.Command, off, n uint64, err error) {
			if ok, dropped := failures.allow(time.Now()); ok {
				say(slog.LevelError, "export %q: %v of %d bytes at offset %d failed: %v%s", c.Export, cmd, n, off, err, andDropped(dropped))
			}
		},
		OpenFailed: func(p nbd.Peer, name string, err error) {
			if ok, dropped := failures.allow(time.Now()); ok {
				say(slog.LevelError, "export %q for client (%v): %v%s", name, p, err, andDropped(dropped))
			}
		},
		AcceptFailed: func(_ net.Addr, err error) { say(slog.LevelWarn, "accepting a client: %v", err) },
	}
}

// limiter lets one message a second through and counts the rest, so that a broken disk cannot fill the log's disk.
type limiter struct {
	mu      sync.Mutex
	last    time.Time
	dropped int
}

func (l *limiter) allow(now time.Time) (ok bool, dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.last) < time.Second {
		l.dropped++
		return false, 0
	}
	dropped, l.dropped, l.last = l.dropped, 0, now
	return true, dropped
}

func andDropped(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" (and %d more)", n)
}

// serveError words failures to open as the other commands do.
func serveError(err error) error {
	var layer *block.OpenError
	if errors.As(err, &layer) && layer.Kind == "" {
		return openError(layer.Name, err)
	}
	return err
}

// signalWatch turns the first signal into the end of a context and the second into the end of patience.
type signalWatch struct {
	second chan struct{}
	stop   func()
}

func catchSignals(parent context.Context) (context.Context, *signalWatch) {
	ctx, cancel := context.WithCancel(parent)
	incoming := make(chan os.Signal, 2)
	signal.Notify(incoming, os.Interrupt, syscall.SIGTERM)
	w := &signalWatch{second: make(chan struct{})}
	quit := make(chan struct{})
	w.stop = func() {
		signal.Stop(incoming)
		close(quit)
		cancel()
	}
	go func() {
		for n := 0; n < 2; n++ {
			select {
			case <-quit:
				return
			case <-incoming:
			}
			if n == 0 {
				cancel()
			} else {
				close(w.second)
			}
		}
	}()
	return ctx, w
}

func (w *signalWatch) release() { w.stop() }
