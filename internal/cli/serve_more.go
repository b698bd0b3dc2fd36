package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/nbd"
)

// serveMore are the flags of serve about how disks are used and how long the server lives.
type serveMore struct {
	discard, detectZeroes string
	offset                string
	temporary             bool
	description           string
	connect               string
	pidFile               string
	command               string
	untilIdle             bool
	withParent            bool
	fork                  bool

	privateDir string // of the socket that the command alone knows
	count      idleCount
}

func (m *serveMore) add(f *pflag.FlagSet) {
	f.StringVar(&m.discard, "discard", "unmap", "what becomes of discards: `MODE` unmap or ignore")
	f.StringVar(&m.detectZeroes, "detect-zeroes", "off", "what becomes of written zeroes: `MODE` off, on (zeroed) or unmap (their space is freed)")
	f.StringVar(&m.offset, "offset", "", "serve IMAGE's disk from `BYTE` on")
	f.BoolVar(&m.temporary, "temporary", false, "keep changes in a temporary file, which is gone at the end; the images stay as they are")
	f.StringVar(&m.description, "description", "", "`text` about IMAGE that clients can show")
	f.StringVar(&m.connect, "connect", "", "make IMAGE the kernel's NBD device `DEVICE`, like /dev/nbd0; the server ends with it")
	f.StringVar(&m.pidFile, "pid-file", "", "write the number of the process to `PATH` once it serves")
	f.StringVar(&m.command, "run", "",
		"run a shell `COMMAND` with $uri (and $nbd, $unixsocket, $port), end with it and with its exit code; without an address,"+
			" serve on a socket that it alone knows")
	f.BoolVar(&m.fork, "fork", false, "serve in the background, without a terminal; return once it serves")
	f.BoolVar(&m.untilIdle, "until-idle", false, "end when the last client has gone")
	f.BoolVar(&m.withParent, "exit-with-parent", false, "end when the process that started this one ends")
}

// check refuses flags that do not go together.
func (m *serveMore) check(s *server, args []string) error {
	confined := s.security.sandbox != "" || s.security.user != ""
	_, detect := detectModes[m.detectZeroes]
	switch {
	case m.discard != "unmap" && m.discard != "ignore":
		return usagef("--discard=%s: expecting unmap or ignore", m.discard)
	case !detect:
		return usagef("--detect-zeroes=%s: expecting off, on or unmap", m.detectZeroes)
	case m.detectZeroes == "unmap" && m.discard == "ignore":
		return usagef("--detect-zeroes=unmap needs --discard=unmap")
	case m.temporary && (s.readOnly || s.snapshot != ""):
		return usagef("--temporary is for disks that clients can change: not with --read-only or --load-snapshot")
	case len(args) == 0 && (m.offset != "" || m.description != "" || m.connect != ""):
		return usagef("--offset, --description and --connect need an IMAGE")
	case m.offset != "" && len(s.bitmaps) > 0:
		return usagef("--bitmap speaks of the whole disk: not with --offset")
	case m.fork && (m.command != "" || m.withParent):
		return usagef("--fork leaves behind what --run and --exit-with-parent are about")
	case confined && (m.connect != "" || m.command != ""):
		return usagef("--connect and --run need what --sandbox and --user give up")
	case m.connect != "" && s.security.tlsCreds != "":
		return usagef("--connect: the kernel does no TLS")
	}
	return nil
}

var detectModes = map[string]block.Detect{"off": block.DetectOff, "on": block.DetectOn, "unmap": block.DetectUnmap}

// adjust has an export served as the flags say.
func (m *serveMore) adjust(e *daemon.Export, isImage bool) error {
	mode := block.Mode{NoDiscard: m.discard == "ignore", DetectZeroes: detectModes[m.detectZeroes]}
	offset := int64(0)
	if isImage {
		e.Description = m.description
		if m.offset != "" {
			var err error
			if offset, err = block.ParseSize(m.offset); err != nil || offset < 0 || offset%512 != 0 {
				return usagef("--offset %s: expecting a number of bytes that is a multiple of 512", m.offset)
			}
		}
	}
	if mode == (block.Mode{}) && offset == 0 && !m.temporary {
		return nil
	}
	if m.temporary {
		e.Open.ReadOnly = true
	}
	readOnly := e.Open.ReadOnly && !m.temporary
	e.Adjust = func(ctx context.Context, disk block.Device) (block.Device, error) {
		if m.temporary {
			im, err := overTemporary(ctx, disk)
			if err != nil {
				return nil, err
			}
			disk = block.WithMode(im, block.Mode{NoFlush: true}) // what is gone at the end need not be durable before
		}
		if offset != 0 {
			part, err := block.Part(disk, offset, max(disk.Size()-offset, 0)&^511)
			if err != nil {
				return nil, errors.Join(fmt.Errorf("--offset %d: the disk has %d bytes", offset, disk.Size()), closeOverlay(m.temporary, disk))
			}
			disk = part
		}
		if readOnly {
			return disk, nil
		}
		return block.WithMode(disk, mode), nil
	}
	return nil
}

// closeOverlay drops the overlay over a disk that stays open, if there is one: whoever opened the disk closes it.
func closeOverlay(is bool, disk block.Device) error {
	if !is {
		return nil
	}
	return disk.Close()
}

// addresses changes where the server listens if the command or the kernel are its only clients.
func (m *serveMore) addresses(c *daemon.Config) error {
	if len(c.Addresses)+len(c.Listeners) > 0 {
		return nil
	}
	switch {
	case m.command != "":
		dir, err := os.MkdirTemp("", "drover-")
		if err != nil {
			return err
		}
		m.privateDir = dir
		c.Addresses = []daemon.Address{{Socket: filepath.Join(dir, "nbd.sock")}}
	case m.connect != "":
		c.NoListeners = true
	}
	return nil
}

// observe has the end of the last client noticed.
func (m *serveMore) observe(o nbd.Observer) nbd.Observer {
	return m.count.observe(o)
}

// begin does what the flags ask for once everything is open, and returns what to do at the end.
func (m *serveMore) begin(ctx context.Context, d *daemon.Daemon, stop func()) (end func() error, err error) {
	if m.withParent {
		if err := watchParent(ctx, stop); err != nil {
			return nil, err
		}
	}
	if m.untilIdle {
		m.count.whenIdle(stop)
	}
	end = func() error { return nil }
	if m.connect != "" {
		own := ownClient{server: d, come: func() {}}
		device, err := own.connect(ctx, m.connect, "", min(4, runtime.NumCPU()), stop)
		if err != nil {
			return nil, errorf("Failed to connect %s: %w", m.connect, err)
		}
		end = device.disconnect
	}
	return end, nil
}

// writePID writes the number of the process, which cannot wait until a sandbox forbids it.
func (m *serveMore) writePID() error {
	if m.pidFile == "" {
		return nil
	}
	if err := writePIDFile(m.pidFile); err != nil {
		return fmt.Errorf("writing the number of the process: %w", err)
	}
	return nil
}

// cleanUp removes what was made for the command.
func (m *serveMore) cleanUp() error {
	if m.privateDir == "" {
		return nil
	}
	return os.RemoveAll(m.privateDir)
}

// runCommand runs the command, if there is one, and calls stop when it has ended. The function that it returns waits for
// the end, for which it asks if the server ends first, and returns the exit code as an error.
func (m *serveMore) runCommand(ctx context.Context, a *app, d *daemon.Daemon, stop func()) (func() error, error) {
	if m.command == "" {
		return func() error { return nil }, nil
	}
	cmd := exec.Command("sh", "-c", m.command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, a.out, a.err
	cmd.Env = append(os.Environ(), commandEnv(d.URIs(""))...)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("--run: %w", err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		stop()
	}()
	return func() error {
		var err error
		select {
		case err = <-ended:
		default:
			_ = cmd.Process.Signal(syscall.SIGTERM) // it may end at this moment
			err = <-ended
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return &exitError{code: max(exit.ExitCode(), 1)}
		}
		return err
	}, nil
}

// commandEnv is what nbdkit tells its commands of where the server is.
func commandEnv(uris []string) []string {
	env := []string{"exportname="}
	if len(uris) == 0 {
		return env
	}
	env = append(env, "uri="+uris[0])
	u, err := url.Parse(uris[0])
	if err != nil {
		return env
	}
	if path := u.Query().Get("socket"); path != "" {
		return append(env, "unixsocket="+path, "nbd=nbd:unix:"+path)
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil {
		return env
	}
	return append(env, "port="+port, "nbd=nbd:"+host+":"+port)
}

// idleCount knows the clients that have an export.
type idleCount struct {
	mu      sync.Mutex
	clients map[uint64]bool
	served  bool
	idle    func()
}

func (c *idleCount) whenIdle(fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = fn
}

// observe counts beside another observer.
func (c *idleCount) observe(o nbd.Observer) nbd.Observer {
	connected, disconnected := o.Connected, o.Disconnected
	o.Connected = func(x nbd.Conn) {
		c.change(x.ID, true)
		if connected != nil {
			connected(x)
		}
	}
	o.Disconnected = func(x nbd.Conn, s nbd.Stats, err error) {
		if disconnected != nil {
			disconnected(x, s, err)
		}
		c.change(x.ID, false)
	}
	return o
}

func (c *idleCount) change(id uint64, here bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if here {
		if c.clients == nil {
			c.clients = make(map[uint64]bool)
		}
		c.clients[id], c.served = true, true
		return
	}
	delete(c.clients, id)
	if c.served && len(c.clients) == 0 && c.idle != nil {
		c.idle()
	}
}
