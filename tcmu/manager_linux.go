package tcmu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
)

// rescanEvery is how often the devices are looked through for those whose notice got lost.
const rescanEvery = 10 * time.Second

// Handler opens disks for a Manager.
type Handler interface {
	// Open opens the disk that a configuration string names, without the handler's name and the slash. Its lock is held
	// while it is open.
	Open(ctx context.Context, config string) (block.Device, error)
	// Resize makes an open disk larger or smaller. It may say that it cannot.
	Resize(ctx context.Context, dev block.Device, size int64) error
}

// Options say how a Manager deals with what is not plainly its own.
type Options struct {
	// AnswerOthers refuses devices whose handler nobody here has, instead of leaving them to another server on this host.
	// Without such a server, whoever enables one waits for an answer for ever.
	AnswerOthers bool
	// WriteBack acknowledges writes that changed metadata before the image holds it, also of disks that do not survive this
	// process by themselves (block.Info). If it is killed, what was acknowledged since the last flush is lost then,
	// without initiators' noticing.
	WriteBack bool
}

// Manager serves every TCMU device of its handlers for as long as it runs: those that exist when it starts, and those that
// come.
type Manager struct {
	handlers map[string]Handler // by the first part of a configuration string
	o        Options
	log      *slog.Logger
	events   *Events

	mu      sync.Mutex
	devices map[int]*slot // by minor
	refused []Status      // devices that could not be served, the oldest first
	running sync.WaitGroup
}

// NewManager connects to the kernel.
func NewManager(handlers map[string]Handler, o Options, log *slog.Logger) (*Manager, error) {
	events, err := DialEvents()
	if err != nil {
		return nil, err
	}
	return &Manager{handlers: handlers, o: o, log: log, events: events, devices: make(map[int]*slot)}, nil
}

// slot is the place of a device that is being opened or served.
type slot struct {
	opened chan struct{} // closed when s or err is set
	s      *served
	err    error
	// answered: whoever enabled the device has been told. A second answer might be taken for that to a later question.
	answered bool
}

// served is a device that is being served. Its events are handled one after another.
type served struct {
	dev    Device
	disk   block.Device
	handle Handler
	unit   *scsi.Unit
	ring   *Ring
	uio    *uio
	ended  chan error
	refuse error // why the last resize failed, under Manager.mu
}

// Close is for a manager that never runs.
func (m *Manager) Close() error { return m.events.Close() }

// Run serves until the context ends, and then stops every device in an orderly way. ready is called when the devices that
// exist at the start are served, or have been refused.
func (m *Manager) Run(ctx context.Context, ready func()) error {
	received := make(chan error, 1)
	go func() { received <- m.receive(ctx) }()
	go func() {
		m.start(ctx)
		m.log.Info("ready", "handlers", strings.Join(slices.Sorted(maps.Keys(m.handlers)), " "))
		ready()
	}()
	tick := time.NewTicker(rescanEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return errors.Join(m.stopAll(), m.events.Close(), ignoreClosed(<-received))
		case err := <-received:
			return errors.Join(err, m.stopAll(), m.events.Close())
		case <-tick.C:
			m.rescan(ctx)
		}
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EBADF) {
		return nil
	}
	return err
}

// maxReceiveErrors in a row end the service.
const maxReceiveErrors = 100

// receive hands each notice to a goroutine of its own: the kernel sends the next about one device only after this one's
// answer, and no device waits for another's disk to open.
func (m *Manager) receive(ctx context.Context) error {
	failed := 0
	for {
		events, err := m.events.Receive()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if failed++; errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EBADF) || failed > maxReceiveErrors {
				return err
			}
			// Most often the kernel's word that nobody waited for an answer. Should it be about a lost notice, that device
			// is found by looking for it.
			m.log.Debug("netlink", "error", err)
			m.rescan(ctx)
			continue
		}
		failed = 0
		for _, ev := range events {
			m.running.Go(func() { m.handle(ctx, ev) })
		}
	}
}

func (m *Manager) handle(ctx context.Context, ev Event) {
	var err error
	switch ev.Command {
	case cmdAdded:
		err = m.add(ctx, ev.Minor, false)
	case cmdRemoved:
		err = m.remove(ev.Minor)
	case cmdReconfig:
		err = m.reconfigure(ctx, ev)
	}
	if errors.Is(err, errNotOurs) {
		if !m.o.AnswerOthers {
			return // somebody else's device: the answer is theirs
		}
		err = m.foreign(ev)
	}
	if err != nil {
		m.log.Error("device", "minor", ev.Minor, "error", err)
	} else if ev.Command == cmdAdded && !m.toAnswer(ev.Minor) {
		return
	}
	if err := m.events.Answer(ev.Command, ev.DeviceID, status(err)); err != nil {
		m.log.Error("device", "minor", ev.Minor, "error", err)
	}
}

// foreign answers a notice about a device that is not served here.
func (m *Manager) foreign(ev Event) error {
	switch ev.Command {
	case cmdAdded:
		d, err := deviceOf(ev.Minor)
		if err != nil {
			return fmt.Errorf("a new device: %w", syscall.ENOENT)
		}
		name, _, _ := strings.Cut(d.Config, "/")
		return fmt.Errorf("%s (%s): nobody here handles %q, only %s: %w", d.Name, d.Config, name,
			strings.Join(slices.Sorted(maps.Keys(m.handlers)), ", "), syscall.ENOENT)
	case cmdReconfig:
		return fmt.Errorf("a device that is not served here: %w", syscall.EOPNOTSUPP)
	}
	return nil // it may go
}

// status is what the kernel gets: a negative error number.
func status(err error) int32 {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && errno > 0 && errno < 4096 {
		return -int32(errno)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return -int32(syscall.EOPNOTSUPP)
	}
	return -int32(syscall.EINVAL)
}

// add begins to serve a device. adopt: it has been served before, by somebody who is gone.
func (m *Manager) add(ctx context.Context, minor int, adopt bool) error {
	d, err := deviceOf(minor)
	if err != nil {
		return err
	}
	name, config, _ := strings.Cut(d.Config, "/")
	handler, ok := m.handlers[name]
	if !ok {
		return errNotOurs
	}
	m.mu.Lock()
	place, have := m.devices[minor]
	if !have {
		place = &slot{opened: make(chan struct{})}
		m.devices[minor] = place
	}
	m.mu.Unlock()
	if have { // a notice and a rescan have found the same device
		<-place.opened
		return place.err
	}
	place.s, err = m.open(ctx, d, handler, config, adopt)
	if err != nil {
		place.err = fmt.Errorf("serving %s (%s): %w", d.Name, d.Config, err)
		m.mu.Lock()
		delete(m.devices, minor)
		m.mu.Unlock()
		m.noteRefused(d, place.err)
	} else {
		m.forgetRefused(d)
		m.log.Info("serving", "device", d.Name, "config", d.Config, "size", place.s.disk.Size())
	}
	close(place.opened)
	return place.err
}

// toAnswer reports whether whoever enabled a device is still to be told, which a notice and a rescan would do both.
func (m *Manager) toAnswer(minor int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	place := m.devices[minor]
	if place == nil || place.answered {
		return false
	}
	place.answered = true
	return true
}

// taken returns the device at a minor number once it is open, nil when there is none.
func (m *Manager) taken(minor int, forget bool) *served {
	m.mu.Lock()
	place := m.devices[minor]
	if forget {
		delete(m.devices, minor)
	}
	m.mu.Unlock()
	if place == nil {
		return nil
	}
	<-place.opened
	return place.s
}

// open opens disk and ring and starts the server. With adopt, commands that somebody left behind are answered BUSY first,
// so that initiators send them again.
func (m *Manager) open(ctx context.Context, d Device, handler Handler, config string, adopt bool) (s *served, err error) {
	disk, err := handler.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, disk.Close())
		}
	}()
	s = &served{dev: d, disk: disk, handle: handler, ended: make(chan error, 1)}
	if err := m.makeUnit(s); err != nil {
		return nil, err
	}
	if s.uio, err = openUIO(d.Minor); err != nil {
		return nil, err
	}
	if adopt {
		if err := errors.Join(d.Block(true), d.ResetRing()); err != nil {
			return nil, errors.Join(err, s.uio.release())
		}
	}
	if s.ring, err = NewRing(s.uio.mem); err != nil {
		return nil, errors.Join(err, s.uio.release())
	}
	server := NewServer(s.ring, s.unit, s.uio)
	m.running.Go(func() {
		err := server.Serve(context.WithoutCancel(ctx))
		switch {
		case errors.Is(err, ErrRing):
			m.log.Error("no longer serving", "device", d.Name, "error", err)
		default: // the device goes, or we do
			m.log.Debug("end of service", "device", d.Name, "reason", err, "done at once", server.atOnce, "by workers", server.handedOn,
				"wake-ups", server.woken)
		}
		s.ended <- err
	})
	if adopt {
		if err := d.Block(false); err != nil {
			m.log.Error("unblocking", "device", d.Name, "error", err)
		}
	}
	return s, nil
}

// makeUnit makes the SCSI unit of the open disk, which must be as large as the kernel says.
func (m *Manager) makeUnit(s *served) error {
	size, err := s.dev.Size()
	if err != nil {
		return err
	}
	bs, err := s.dev.BlockSize()
	if err != nil {
		return err
	}
	if have := s.disk.Size() / int64(bs) * int64(bs); have != size {
		return fmt.Errorf("the disk has %d bytes and dev_size says %d: %w", have, size, syscall.EINVAL)
	}
	o := scsi.Options{BlockSize: bs, Serial: s.dev.Serial, ReadOnly: s.disk.Info().ReadOnly,
		Keep: !m.o.WriteBack && !s.disk.Info().Survives, Peer: m.peer}
	if most, err := s.dev.MaxBlocks(); err == nil {
		o.MaxTransfer = uint32(min(most*512/uint64(bs), math.MaxUint32))
	}
	s.unit, err = scsi.NewUnit(s.disk, o)
	return err
}

// peer finds the unit of another device by its name, for copies between devices. Those still being opened have none.
func (m *Manager) peer(naa [16]byte) *scsi.Unit {
	m.mu.Lock()
	var places []*slot
	for _, p := range m.devices {
		places = append(places, p)
	}
	m.mu.Unlock()
	for _, p := range places {
		select {
		case <-p.opened:
			if p.s != nil && p.s.unit.NAA() == naa {
				return p.s.unit
			}
		default:
		}
	}
	return nil
}

// finishLimit is how long a device that goes may take for what a command with IMMED has left to do.
const finishLimit = 20 * time.Second

// close ends the service of a device: the server first, then the disk, then the memory.
func (s *served) close() error {
	err := s.uio.stop()
	<-s.ended
	ctx, cancel := context.WithTimeout(context.Background(), finishLimit)
	defer cancel()
	return errors.Join(err, s.unit.Finish(ctx), s.disk.Close(), s.uio.release())
}

// remove ends a device that the kernel takes away. Its commands have all been answered.
func (m *Manager) remove(minor int) error {
	s := m.taken(minor, true)
	if s == nil {
		return m.unserved(minor)
	}
	err := s.close()
	m.log.Info("removed", "device", s.dev.Name)
	return err
}

// unserved returns nil for a device that would be ours, had its disk been opened: nobody else answers for it.
func (m *Manager) unserved(minor int) error {
	d, err := deviceOf(minor)
	if err != nil {
		return errNotOurs
	}
	if name, _, _ := strings.Cut(d.Config, "/"); m.handlers[name] == nil {
		return errNotOurs
	}
	return nil
}

func (m *Manager) reconfigure(ctx context.Context, ev Event) error {
	s := m.taken(ev.Minor, false)
	if s == nil {
		return errNotOurs
	}
	switch {
	case ev.Size != nil:
		if int64(*ev.Size) != s.disk.Size() {
			err := s.handle.Resize(ctx, s.disk, int64(*ev.Size))
			m.mu.Lock()
			s.refuse = err
			m.mu.Unlock()
			if err != nil {
				return fmt.Errorf("resizing %s: %w", s.dev.Name, err)
			}
		}
		s.unit.CapacityChanged()
		return nil
	case ev.Config != nil && *ev.Config != s.dev.Config:
		return fmt.Errorf("%s keeps its image: %w", s.dev.Name, syscall.EOPNOTSUPP)
	}
	return nil
}

// rescan serves devices whose notice was not seen: those that exist when this process starts, and those whose notice was
// dropped. Whoever waits for an answer to it gets one.
func (m *Manager) rescan(ctx context.Context) *sync.WaitGroup {
	found := new(sync.WaitGroup)
	devices, err := Devices()
	if err != nil {
		m.log.Error("looking for devices", "error", err)
		return found
	}
	for _, d := range devices {
		m.mu.Lock()
		_, have := m.devices[d.Minor]
		m.mu.Unlock()
		if have {
			continue
		}
		found.Go(func() { m.adopt(ctx, d) })
	}
	return found
}

// adopt serves a device that is there. If it is still being enabled, whoever does so waits for an answer, which the notice
// would have asked for.
func (m *Manager) adopt(ctx context.Context, d Device) {
	enabled := d.enabled()
	err := m.add(ctx, d.Minor, enabled)
	if errors.Is(err, errNotOurs) {
		return // a notice that asks for an answer may still come
	}
	if err != nil {
		m.log.Error("adopting a device", "device", d.Name, "error", err)
	}
	if enabled || err == nil && !m.toAnswer(d.Minor) {
		return // nobody waits; an answer might be taken for that to another question
	}
	id, err2 := d.index()
	if err2 == nil {
		err2 = m.events.Answer(cmdAdded, id, status(err))
	}
	if err2 != nil {
		m.log.Error("answering for a device", "device", d.Name, "error", err2)
	}
}

// stopAll has every device drain and closes it. Initiators find it busy until the next server comes, and try again.
func (m *Manager) stopAll() error {
	m.mu.Lock()
	minors := slices.Collect(maps.Keys(m.devices))
	m.mu.Unlock()
	var list []*served
	for _, minor := range minors {
		if s := m.taken(minor, true); s != nil {
			list = append(list, s)
		}
	}
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, s := range list {
		wg.Go(func() { errs[i] = s.stop() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// drainPoll is how often a ring that is being stopped is looked at: the kernel tells nobody that it is empty.
const drainPoll = 10 * time.Millisecond

// stop keeps new commands out, waits for those in the ring, and closes the device.
func (s *served) stop() error {
	err := s.dev.Block(true)
	for !s.ring.drained() {
		time.Sleep(drainPoll) // no event comes when the last command is done
	}
	// The last completion may not have been told yet by the worker that made it.
	return errors.Join(err, s.uio.Ring(), s.close())
}
