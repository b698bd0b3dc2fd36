package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/tcmu"
)

// TCMUConfig says how images are served to the kernel's target.
type TCMUConfig struct {
	// Policy judges the files that images name.
	Policy block.Policy
	// Secret looks up the keys of encrypted images by their IDs; nil knows none.
	Secret func(id string) ([]byte, error)
	// ReadOnly has every disk served read-only.
	ReadOnly bool
	// Memory bounds the metadata caches of all images together; 0 is block.DefaultCacheBudget.
	Memory int64
	// AnswerOthers refuses devices of handlers that are not here, so that enabling them does not wait for ever.
	AnswerOthers bool
	// WriteBack is faster, and loses acknowledged writes if this process is killed: see tcmu.Options.
	WriteBack bool
	// JournalDir is where journals lie that have what is acknowledged survive this process; empty: block.DefaultJournalDir.
	// NoJournal has every change of metadata flushed instead.
	JournalDir string
	NoJournal  bool
	// Bus is where the D-Bus service is offered; nil: nowhere.
	Bus *TCMUBus
	// Control is the management API, which ServeTCMU serves and closes; nil: none.
	Control *Control
	Log     *slog.Logger
}

// tcmuFormats are the handlers by the name that a configuration string begins with, and the format of their images.
var tcmuFormats = map[string]string{"qcow": "qcow2", "qcow2": "qcow2", "raw": block.FormatRaw}

// ServeTCMU serves the disks of the kernel's target until the context ends. ready is called when devices are served.
func ServeTCMU(ctx context.Context, c TCMUConfig, ready func()) error {
	if err := loadTCMU(c.Log); err != nil {
		return err
	}
	waitCheaply()
	memory := c.Memory
	if memory == 0 {
		memory = block.DefaultCacheBudget
	}
	budget := block.NewCacheBudget(memory)
	handlers := make(map[string]tcmu.Handler)
	for name, format := range tcmuFormats {
		handlers[name] = &tcmuHandler{format: format, c: c, memory: budget}
	}
	m, err := tcmu.NewManager(handlers, tcmu.Options{AnswerOthers: c.AnswerOthers, WriteBack: c.WriteBack}, c.Log)
	if err != nil {
		return err
	}
	if c.Bus != nil {
		c.Bus.probe = func(config string) error { return probeDisk(ctx, handlers, config) }
		if err := c.Bus.Serve(); err != nil {
			return errors.Join(err, m.Close())
		}
	}
	if c.Control == nil {
		return m.Run(ctx, ready)
	}
	served := make(chan error, 1)
	go func() { served <- c.Control.Serve(&tcmuService{m, budget, memory}) }()
	// The API ends first: a resize waits in the kernel for an answer that only a manager that still runs can give.
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var closed error
	stop := context.AfterFunc(ctx, func() {
		closed = c.Control.Close()
		cancel()
	})
	err = m.Run(running, ready)
	if stop() { // the manager has failed
		closed = c.Control.Close()
	} else {
		<-running.Done()
	}
	return errors.Join(err, closed, <-served)
}

// waitCheaply has the runtime leave threads alone that wait for commands. Where it may use one processor only, it takes that away
// from every system call that lasts longer than 20 microseconds, and wakes another thread to do so, for each command.
func waitCheaply() {
	if runtime.GOMAXPROCS(0) == 1 && os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2)
	}
}

const (
	tcmuModule = "/sys/module/target_core_user"
	targetRoot = "/sys/kernel/config/target"
)

// loadTCMU loads the kernel's module if it is not there.
func loadTCMU(log *slog.Logger) error {
	if _, err := os.Stat(tcmuModule); err == nil {
		return nil
	}
	out, err := exec.Command("modprobe", "target_core_user").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: modprobe: %w: %s", tcmu.ErrNoTCMU, err, strings.TrimSpace(string(out)))
	}
	log.Info("loaded the kernel module target_core_user")
	if _, err := os.Stat(targetRoot); err != nil {
		return fmt.Errorf("the kernel's target is not to be configured: is configfs mounted at %s? %w", filepath.Dir(targetRoot), err)
	}
	return nil
}

// tcmuHandler opens the images of one handler.
type tcmuHandler struct {
	format string
	c      TCMUConfig
	memory *block.CacheBudget
}

// probeDisk finds out whether the image of a configuration can be opened now. It is opened for reading only: nothing is
// repaired on account of a question.
func probeDisk(ctx context.Context, handlers map[string]tcmu.Handler, config string) error {
	name, rest, _ := strings.Cut(config, "/")
	h, ok := handlers[name].(*tcmuHandler)
	if !ok {
		return fmt.Errorf("nobody here handles %q", name)
	}
	asked := *h
	asked.c.ReadOnly, asked.c.WriteBack = true, true // nor is a journal looked at
	dev, err := asked.Open(ctx, rest)
	if err != nil {
		return err
	}
	return dev.Close()
}

// Open implements tcmu.Handler.
func (h *tcmuHandler) Open(ctx context.Context, config string) (block.Device, error) {
	d, err := parseDisk(h.format, config)
	if err != nil {
		return nil, err
	}
	dev, err := h.open(ctx, d)
	if err != nil {
		return nil, withErrno(err)
	}
	return dev, nil
}

func (h *tcmuHandler) open(ctx context.Context, d diskConfig) (block.Device, error) {
	dev, err := block.Open(ctx, d.path, block.OpenOptions{
		Format: h.format, ReadOnly: d.readOnly || h.c.ReadOnly || d.snapshot != "", Policy: h.c.Policy,
		Options: d.options, Memory: h.memory, Secret: h.c.Secret,
		OnRepair: func(name string, r block.Repair) {
			h.c.Log.Warn(r.String(), "image", name)
		},
		OnCorrupt: func(name string, err error) {
			h.c.Log.Error("image marked corrupt, only read from now on", "image", name, "error", err)
		},
		Keep: h.keep(),
	})
	if err != nil || d.snapshot == "" {
		return dev, err
	}
	ref, err := image.ParseSnapshotRef(d.snapshot)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	disk, err := image.OpenSnapshot(ctx, dev, ref)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("loading snapshot of %q: %w", d.path, err), dev.Close())
	}
	return &snapshotDisk{Device: disk, image: dev}, nil
}

// keep has what is acknowledged survive this process: initiators do not notice its end, and send nothing again.
func (h *tcmuHandler) keep() *block.Keep {
	if h.c.WriteBack {
		return nil
	}
	return &block.Keep{Dir: h.c.JournalDir, NoJournal: h.c.NoJournal, OnJournal: func(name string, r block.JournalReport) {
		switch {
		case r.None != nil:
			h.c.Log.Warn("no journal: every change of the mapping is flushed before it is acknowledged, which is slower",
				"image", name, "reason", r.None)
		case r.Lost != nil && r.Changes > 0:
			h.c.Log.Error("acknowledged writes that were not flushed are lost", "image", name, "changes", r.Changes, "reason", r.Lost)
		case r.Lost != nil:
			h.c.Log.Warn("journal", "image", name, "reason", r.Lost)
		default:
			h.c.Log.Info("brought back what the last server had acknowledged and not flushed", "image", name,
				"changes", r.Changes, "clusters", r.Clusters)
		}
	}}
}

// snapshotDisk is a snapshot with the image that it lies in.
type snapshotDisk struct {
	block.Device
	image block.Device
}

// ReadVAt implements block.VectorDevice.
func (s *snapshotDisk) ReadVAt(ctx context.Context, bufs [][]byte, off int64) error {
	return block.ReadV(ctx, s.Device, bufs, off)
}

// WriteVAt implements block.VectorDevice: a snapshot is only read.
func (s *snapshotDisk) WriteVAt(context.Context, [][]byte, int64, block.WriteFlags) error {
	return block.ErrReadOnly
}

// TryReadAt implements block.TryDevice.
func (s *snapshotDisk) TryReadAt(p []byte, off int64) error {
	if dev, ok := s.Device.(block.TryDevice); ok {
		return dev.TryReadAt(p, off)
	}
	return block.ErrWouldBlock
}

// TryReadVAt implements block.TryVectorDevice.
func (s *snapshotDisk) TryReadVAt(bufs [][]byte, off int64) error {
	return block.TryReadV(s.Device, bufs, off)
}

// TryWriteAt implements block.TryDevice: a snapshot is only read.
func (s *snapshotDisk) TryWriteAt([]byte, int64) error { return block.ErrReadOnly }

// TryWriteVAt implements block.TryVectorDevice: a snapshot is only read.
func (s *snapshotDisk) TryWriteVAt([][]byte, int64) error { return block.ErrReadOnly }

// Close closes the snapshot first.
func (s *snapshotDisk) Close() error { return errors.Join(s.Device.Close(), s.image.Close()) }

// Resize implements tcmu.Handler. A disk grows; it shrinks only before the kernel is told, with 'drover resize', so that no
// slip of the administrator's cuts off data of an initiator.
func (h *tcmuHandler) Resize(ctx context.Context, dev block.Device, size int64) error {
	if size < dev.Size() {
		return fmt.Errorf("the disk has %d bytes; it is not shrunk to %d while it is served: %w", dev.Size(), size, syscall.EINVAL)
	}
	if dev.Info().ReadOnly {
		return fmt.Errorf("a disk that is only read keeps its size: %w", syscall.EOPNOTSUPP)
	}
	return withErrno(resizeDevice(ctx, dev, ResizeRequest{Size: size}))
}

// errnoError gives an error a number for the kernel.
type errnoError struct {
	error
	errno syscall.Errno
}

func (e *errnoError) Unwrap() []error { return []error{e.error, e.errno} }

// withErrno gives errors without a number that of what they mean. The number is all that an administrator sees who does not
// look into the log.
func withErrno(err error) error {
	var errno syscall.Errno
	if err == nil || errors.As(err, &errno) {
		return err
	}
	var lock *storage.LockError
	var refused *block.PolicyError
	switch {
	case errors.Is(err, block.ErrNoSecret):
		return &errnoError{err, syscall.ENOKEY}
	case errors.Is(err, qcow2.ErrWrongKey):
		return &errnoError{err, syscall.EKEYREJECTED}
	case errors.As(err, &lock):
		return &errnoError{err, syscall.EBUSY}
	case errors.As(err, &refused):
		return &errnoError{err, syscall.EACCES}
	case errors.Is(err, errors.ErrUnsupported):
		return &errnoError{err, syscall.EOPNOTSUPP}
	}
	return &errnoError{err, syscall.EINVAL}
}

// diskConfig is what a configuration string says.
type diskConfig struct {
	path     string
	readOnly bool
	snapshot string
	options  map[string]string // of the format
}

// tcmuTimeout is an option of tcmu-runner's that is in many configurations. The kernel's own setting does the same.
const tcmuTimeout = "tcmur_cmd_time_out"

// parseDisk reads the part of a configuration string behind the handler's name: PATH[;OPTION[=VALUE]]…
func parseDisk(format, text string) (diskConfig, error) {
	parts := strings.Split(text, ";")
	d := diskConfig{path: parts[0]}
	fail := func(f string, a ...any) (diskConfig, error) {
		return diskConfig{}, fmt.Errorf("configuration %q: %s: %w", text, fmt.Sprintf(f, a...), syscall.EINVAL)
	}
	if !filepath.IsAbs(d.path) {
		return fail("it begins with the absolute path of an image")
	}
	seen := make(map[string]bool)
	for _, option := range parts[1:] {
		name, value, valued := strings.Cut(option, "=")
		if seen[name] {
			return fail("option %q is there twice", name)
		}
		seen[name] = true
		switch {
		case name == "read-only" && !valued:
			d.readOnly = true
		case name == "snapshot" && value != "" && format != block.FormatRaw:
			d.snapshot = value
		case name == tcmuTimeout && valued:
		case !valued || name == "" || name == "read-only" || name == "snapshot":
			return fail("option %q is not NAME=VALUE", option)
		case !knownOption(format, name):
			return fail("there is no option %q", name)
		default:
			if d.options == nil {
				d.options = make(map[string]string)
			}
			d.options[name] = value
		}
	}
	return d, nil
}

// diskOptions are the runtime options of images in the format qcow2, whose values the format itself judges. A key is only ever
// named: configurations are for everybody to read.
var diskOptions = map[string]bool{
	"cache-size": true, "l2-cache-size": true, "refcount-cache-size": true, "l2-cache-entry-size": true,
	"cache-clean-interval": true, "lazy-refcounts": true, "pass-discard-request": true, "pass-discard-snapshot": true,
	"pass-discard-other": true, "discard-no-unref": true, "overlap-check": true,
	"encrypt.format": true, "encrypt.key-secret": true,
}

func knownOption(format, name string) bool {
	return format != block.FormatRaw && (diskOptions[name] || strings.HasPrefix(name, "overlap-check."))
}

// CheckTCMUConfig judges a whole configuration string by its syntax alone: whoever asks need not be allowed to know which
// files exist.
func CheckTCMUConfig(text string) error {
	name, rest, ok := strings.Cut(text, "/")
	format, known := tcmuFormats[name]
	if !ok || !known {
		return fmt.Errorf("configuration %q does not begin with the name of a handler and a slash", text)
	}
	if len(text) > maxTCMUConfig {
		return fmt.Errorf("configuration of %d bytes: the kernel takes %d", len(text), maxTCMUConfig)
	}
	_, err := parseDisk(format, rest)
	return err
}

// maxTCMUConfig is what fits into the kernel's field beside the final zero.
const maxTCMUConfig = 255
