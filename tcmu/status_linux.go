package tcmu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
)

// ErrNoDevice is wrapped when a device is not served here.
var ErrNoDevice = errors.New("no such device")

// Status describes a device that a Manager serves, or could not serve.
type Status struct {
	Device
	Disk  block.Device // nil for a device that is not served
	Stats scsi.Stats
	// Err is why it is not served, and Since when that was found out.
	Err   error
	Since time.Time
}

const (
	// maxRefused bounds the devices that are remembered because they could not be served.
	maxRefused = 64
	// keepRefused is for how long one is remembered that the kernel does not have any more: whoever wanted to create it may
	// still ask why it failed.
	keepRefused = 10 * time.Minute
)

func (d Device) same(o Device) bool { return d.HBA == o.HBA && d.Name == o.Name }

// noteRefused remembers why a device is not served.
func (m *Manager) noteRefused(d Device, err error) {
	m.forgetRefused(d)
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.refused) >= maxRefused {
		m.refused = slices.Delete(m.refused, 0, 1)
	}
	m.refused = append(m.refused, Status{Device: d, Err: err, Since: time.Now()})
}

func (m *Manager) forgetRefused(d Device) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refused = slices.DeleteFunc(m.refused, func(s Status) bool { return s.same(d) })
}

// Devices describes the devices that are served, in the order of their minor numbers, and then those that could not be.
func (m *Manager) Devices() []Status {
	m.mu.Lock()
	m.refused = slices.DeleteFunc(m.refused, func(s Status) bool {
		_, err := os.Stat(s.path())
		return errors.Is(err, fs.ErrNotExist) && time.Since(s.Since) > keepRefused
	})
	refused := slices.Clone(m.refused)
	var places []*slot
	for _, p := range m.devices {
		places = append(places, p)
	}
	m.mu.Unlock()
	var list []Status
	for _, p := range places {
		select {
		case <-p.opened:
			if s := p.s; s != nil {
				list = append(list, Status{Device: s.dev, Disk: s.disk, Stats: s.unit.Stats()})
			}
		default: // it is still being opened
		}
	}
	slices.SortFunc(list, func(a, b Status) int { return a.Minor - b.Minor })
	return append(list, refused...)
}

// Resize has the kernel tell everybody that a device has another size, this process first.
func (m *Manager) Resize(_ context.Context, d Device, size int64) error {
	s := m.taken(d.Minor, false)
	if s == nil || !s.dev.same(d) {
		return fmt.Errorf("resizing %s: %w", d.Name, ErrNoDevice)
	}
	bs, err := s.dev.BlockSize()
	if err != nil {
		return err
	}
	if size <= 0 || bs <= 0 || size%int64(bs) != 0 {
		return fmt.Errorf("resizing %s: %d is not a number of whole blocks of %d bytes", d.Name, size, bs)
	}
	m.mu.Lock()
	s.refuse = nil
	m.mu.Unlock()
	// The kernel passes it on to the handler and waits for the answer.
	err = s.dev.write(strconv.FormatInt(size, 10), "attrib", "dev_size")
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil && s.refuse != nil {
		return fmt.Errorf("resizing %s: %w", d.Name, s.refuse) // the kernel has only its number
	}
	return err
}
