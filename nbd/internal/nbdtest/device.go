// Package nbdtest holds what the tests of the NBD server need: a client that speaks every part of the protocol, written
// against the protocol's text and not against the server, and a device in memory whose calls can be held up.
package nbdtest

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/block"
)

// Grain is the unit in which a Device knows holes.
const Grain = 4096

// Device is a disk in memory. It never waits for anything but its Gate.
type Device struct {
	// Gate, if set, is called by every method that takes a context, and its error returned. It may wait.
	Gate func(ctx context.Context, op string, off, n int64) error
	// TryErr, if set, is called by TryReadAt and TryWriteAt, and its error returned.
	TryErr func(write bool, off, n int64) error
	// DeviceInfo is what Info returns.
	DeviceInfo block.Info

	Flushes, Durable, Tries atomic.Int64 // calls of Flush; of WriteAt and WriteZeroes with FUA; of TryReadAt and TryWriteAt

	mu    sync.RWMutex
	data  []byte
	alloc []bool
}

var (
	_ block.Device     = (*Device)(nil)
	_ block.DataDevice = (*Device)(nil)
)

// NewDevice returns a disk of size bytes, all of it a hole.
func NewDevice(size int64) *Device {
	return &Device{
		data:       make([]byte, size),
		alloc:      make([]bool, (size+Grain-1)/Grain),
		DeviceInfo: block.Info{Format: "memory", MinAlign: 1, PreferAlign: Grain, DiscardAlign: Grain, FastZero: true},
	}
}

// Slow is a Device without the methods of a block.TryDevice or block.DataDevice.
type Slow struct{ block.Device }

func (d *Device) gate(ctx context.Context, op string, off, n int64) error {
	if err := block.CheckRange(off, n, d.Size()); err != nil {
		return err
	}
	if d.Gate == nil {
		return nil
	}
	return d.Gate(ctx, op, off, n)
}

// Size implements block.Device.
func (d *Device) Size() int64 { return int64(len(d.data)) }

// Info implements block.Device.
func (d *Device) Info() block.Info { return d.DeviceInfo }

// Bytes returns a copy of a range.
func (d *Device) Bytes(off, n int64) []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return append([]byte(nil), d.data[off:off+n]...)
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.gate(ctx, "read", off, int64(len(p))); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	copy(p, d.data[off:])
	return nil
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	if err := d.gate(ctx, "write", off, int64(len(p))); err != nil {
		return err
	}
	if flags&block.WriteFUA != 0 {
		d.Durable.Add(1)
	}
	d.write(p, off)
	return nil
}

func (d *Device) write(p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.data[off:], p)
	for i := off / Grain; i*Grain < off+int64(len(p)); i++ {
		d.alloc[i] = true
	}
}

// WriteZeroes implements block.Device. It is fast for whole grains, of which it makes holes if it may.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	if err := d.gate(ctx, "zero", off, n); err != nil {
		return err
	}
	if flags&block.ZeroFast != 0 && (off%Grain != 0 || n%Grain != 0) {
		return block.ErrNoFastZero
	}
	if flags&block.ZeroFUA != 0 {
		d.Durable.Add(1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	for i := off / Grain; i*Grain < off+n; i++ {
		whole := i*Grain >= off && (i+1)*Grain <= off+n
		if !whole || flags&block.ZeroUnmap == 0 {
			d.alloc[i] = true
		} else {
			d.alloc[i] = false
		}
	}
	return nil
}

// Discard implements block.Device: whole grains become holes.
func (d *Device) Discard(ctx context.Context, off, n int64) error {
	if err := d.gate(ctx, "discard", off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := (off + Grain - 1) / Grain; (i+1)*Grain <= off+n; i++ {
		clear(d.data[i*Grain : (i+1)*Grain])
		d.alloc[i] = false
	}
	return nil
}

// Flush implements block.Device.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.gate(ctx, "flush", 0, 0); err != nil {
		return err
	}
	d.Flushes.Add(1)
	return nil
}

// Extents implements block.Device. It reports each grain by itself.
func (d *Device) Extents(ctx context.Context, off, n int64, fn func(block.Extent) bool) error {
	if err := d.gate(ctx, "extents", off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		next := min((off/Grain+1)*Grain, end)
		d.mu.RLock()
		alloc := d.alloc[off/Grain]
		d.mu.RUnlock()
		if !fn(block.Extent{Off: off, Len: next - off, Allocated: alloc, Data: alloc, Zero: !alloc}) {
			return nil
		}
		off = next
	}
	return nil
}

// TryReadAt implements block.TryDevice.
func (d *Device) TryReadAt(p []byte, off int64) error {
	d.Tries.Add(1)
	if d.TryErr != nil {
		if err := d.TryErr(false, off, int64(len(p))); err != nil {
			return err
		}
	}
	if err := block.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	copy(p, d.data[off:])
	return nil
}

// TryReadDataAt implements block.DataDevice.
func (d *Device) TryReadDataAt(p []byte, off int64) error {
	switch data, zero := d.grains(off, min(off+int64(len(p)), d.Size())); {
	case data && zero:
		return block.ErrMixed
	case zero:
		if d.TryErr != nil {
			if err := d.TryErr(false, off, int64(len(p))); err != nil {
				return err
			}
		}
		return block.ErrAllZero
	}
	return d.TryReadAt(p, off)
}

// grains reports which kinds of grains there are in [off, end).
func (d *Device) grains(off, end int64) (data, zero bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for g := off / Grain; g*Grain < end; g++ {
		data, zero = data || d.alloc[g], zero || !d.alloc[g]
	}
	return data, zero
}

// TryWriteAt implements block.TryDevice.
func (d *Device) TryWriteAt(p []byte, off int64) error {
	d.Tries.Add(1)
	if d.TryErr != nil {
		if err := d.TryErr(true, off, int64(len(p))); err != nil {
			return err
		}
	}
	if err := block.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return err
	}
	d.write(p, off)
	return nil
}

// Close implements block.Device.
func (d *Device) Close() error { return nil }
