package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// ObjectThrottleGroup is the kind of object that the option "throttle-group" names, for block.OpenOptions.Object: a
// *ThrottleGroup.
const ObjectThrottleGroup = "throttle-group"

func init() {
	block.RegisterDriver(block.Driver{
		Name: "throttle", Filter: true,
		OpenFile: func(ctx context.Context, n *block.Node) (storage.File, error) {
			g, err := takeGroup(n)
			if err != nil {
				return nil, err
			}
			file, err := n.OpenFile(ctx, "file")
			if err != nil {
				return nil, err
			}
			return &throttledFile{file, g}, nil
		},
		OpenDevice: func(ctx context.Context, n *block.Node) (block.Device, error) {
			g, err := takeGroup(n)
			if err != nil {
				return nil, err
			}
			dev, err := n.OpenDevice(ctx, "file")
			if err != nil {
				return nil, err
			}
			return named{&throttled{dev, g}, n.Name, n.Driver}, nil
		},
	})
}

func takeGroup(n *block.Node) (*ThrottleGroup, error) {
	id, ok := n.Take("throttle-group")
	if !ok {
		return nil, errors.New("Please specify a throttle group")
	}
	v, err := n.Object(ObjectThrottleGroup, id)
	g, ok := v.(*ThrottleGroup)
	if err != nil || !ok {
		return nil, fmt.Errorf("Throttle group '%s' does not exist", id)
	}
	return g, nil
}

// bucket is one limit: it leaks avg units a second, and holds a burst.
type bucket struct {
	avg, max    float64
	burstLength float64 // seconds that max may be kept up
	level       float64
	last        time.Time
}

// The directions of a request.
const (
	bothWays = iota
	reading
	writing
)

// ThrottleGroup bounds what the nodes of a group do together.
type ThrottleGroup struct {
	mu     sync.Mutex
	bytes  [3]bucket // by direction
	ops    [3]bucket
	opSize float64 // a request that is n times as long counts as n; 0 counts each as one
	now    func() time.Time
	wait   func(ctx context.Context, d time.Duration) error
}

// throttleNames are the limits: KIND-DIRECTION, with -max and -max-length behind it.
var throttleNames = map[string]struct {
	ops       bool
	direction int
}{
	"bps-total": {false, bothWays}, "bps-read": {false, reading}, "bps-write": {false, writing},
	"iops-total": {true, bothWays}, "iops-read": {true, reading}, "iops-write": {true, writing},
}

// throttleMax is the largest limit that QEMU takes.
const throttleMax = 1000000000000000

// NewThrottleGroup makes a group of the properties of QEMU's object throttle-group: x-iops-total and so on, or the same
// behind "limits.".
func NewThrottleGroup(props map[string]string) (*ThrottleGroup, error) {
	g := &ThrottleGroup{now: time.Now, wait: sleep}
	for key, text := range props {
		name, ok := strings.CutPrefix(key, "x-")
		if !ok {
			if name, ok = strings.CutPrefix(key, "limits."); !ok {
				return nil, fmt.Errorf("Property 'throttle-group.%s' not found", key)
			}
		}
		v, err := strconv.ParseFloat(text, 64)
		if err != nil || v < 0 || v != math.Trunc(v) {
			return nil, fmt.Errorf("Parameter '%s' expects a number", key)
		}
		if v > throttleMax {
			return nil, fmt.Errorf("bps/iops/max values must be within [0, %d]", int64(throttleMax))
		}
		if name == "iops-size" {
			g.opSize = v
			continue
		}
		base, field := name, ""
		for _, suffix := range []string{"-max-length", "-max"} {
			if b, ok := strings.CutSuffix(name, suffix); ok {
				base, field = b, suffix
				break
			}
		}
		which, ok := throttleNames[base]
		if !ok {
			return nil, fmt.Errorf("Property 'throttle-group.%s' not found", key)
		}
		b := &g.bytes[which.direction]
		if which.ops {
			b = &g.ops[which.direction]
		}
		switch field {
		case "":
			b.avg = v
		case "-max":
			b.max = v
		default:
			b.burstLength = v
		}
	}
	return g, g.check()
}

// check refuses limits that contradict each other.
func (g *ThrottleGroup) check() error {
	for _, kind := range []*[3]bucket{&g.bytes, &g.ops} {
		if kind[bothWays].avg > 0 && (kind[reading].avg > 0 || kind[writing].avg > 0) ||
			kind[bothWays].max > 0 && (kind[reading].max > 0 || kind[writing].max > 0) {
			return errors.New("bps/iops/max total values and read/write values cannot be used at the same time")
		}
		for i := range kind {
			b := &kind[i]
			switch {
			case b.max > 0 && b.avg == 0:
				return errors.New("bps_max/iops_max require corresponding bps/iops values")
			case b.max > 0 && b.max < b.avg:
				return errors.New("bps_max/iops_max cannot be lower than bps/iops")
			case b.burstLength > 1 && b.max == 0:
				return errors.New("burst length set without burst rate")
			}
		}
	}
	if g.opSize > 0 && g.ops[bothWays].avg == 0 && g.ops[reading].avg == 0 && g.ops[writing].avg == 0 {
		return errors.New("iops size requires an iops value to be set")
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// room is how much a bucket holds before requests have to wait.
func (b *bucket) room() float64 {
	switch {
	case b.max == 0:
		return b.avg / 10 // QEMU's: a tenth of a second
	case b.burstLength > 1:
		return b.max * b.burstLength
	}
	return b.max
}

// add puts units in and returns how long the request has to wait for what is above the brim to leak.
func (b *bucket) add(units float64, now time.Time) time.Duration {
	if b.avg == 0 {
		return 0
	}
	if !b.last.IsZero() {
		b.level = max(b.level-b.avg*now.Sub(b.last).Seconds(), 0)
	}
	b.last = now
	over := b.level - b.room()
	b.level += units
	if over <= 0 {
		return 0
	}
	return time.Duration(over / b.avg * float64(time.Second))
}

// pass waits until a request of n bytes may run.
func (g *ThrottleGroup) pass(ctx context.Context, direction int, n int64) error {
	g.mu.Lock()
	now := g.now()
	ops := 1.0
	if g.opSize > 0 {
		ops = max(float64(n)/g.opSize, 1)
	}
	var delay time.Duration
	for _, d := range []int{bothWays, direction} {
		delay = max(delay, g.bytes[d].add(float64(n), now), g.ops[d].add(ops, now))
	}
	g.mu.Unlock()
	if delay == 0 {
		return nil
	}
	return g.wait(ctx, delay)
}

// throttled is a disk whose requests wait for their group.
type throttled struct {
	block.Device
	g *ThrottleGroup
}

// ReadAt implements block.Device.
func (d *throttled) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.g.pass(ctx, reading, int64(len(p))); err != nil {
		return err
	}
	return d.Device.ReadAt(ctx, p, off)
}

// WriteAt implements block.Device.
func (d *throttled) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	if err := d.g.pass(ctx, writing, int64(len(p))); err != nil {
		return err
	}
	return d.Device.WriteAt(ctx, p, off, flags)
}

// WriteZeroes implements block.Device.
func (d *throttled) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	if err := d.g.pass(ctx, writing, n); err != nil {
		return err
	}
	return d.Device.WriteZeroes(ctx, off, n, flags)
}

// Discard implements block.Device.
func (d *throttled) Discard(ctx context.Context, off, n int64) error {
	if err := d.g.pass(ctx, writing, n); err != nil {
		return err
	}
	return d.Device.Discard(ctx, off, n)
}

// WriteCompressed implements block.CompressedWriter where the disk behind does.
func (d *throttled) WriteCompressed(ctx context.Context, p []byte, off int64) error {
	w, ok := d.Device.(block.CompressedWriter)
	if !ok {
		return block.ErrNoCompression
	}
	if err := d.g.pass(ctx, writing, int64(len(p))); err != nil {
		return err
	}
	return w.WriteCompressed(ctx, p, off)
}

// ReadVAt implements block.VectorDevice: pieces are one request.
func (d *throttled) ReadVAt(ctx context.Context, bufs [][]byte, off int64) error {
	if err := d.g.pass(ctx, reading, block.LenV(bufs)); err != nil {
		return err
	}
	return block.ReadV(ctx, d.Device, bufs, off)
}

// WriteVAt implements block.VectorDevice.
func (d *throttled) WriteVAt(ctx context.Context, bufs [][]byte, off int64, flags block.WriteFlags) error {
	if err := d.g.pass(ctx, writing, block.LenV(bufs)); err != nil {
		return err
	}
	return block.WriteV(ctx, d.Device, bufs, off, flags)
}

// throttledFile is a file whose requests wait for their group.
type throttledFile struct {
	storage.File
	g *ThrottleGroup
}

func (f *throttledFile) pass(direction int, n int64) error {
	return f.g.pass(context.Background(), direction, n)
}

// Event implements storage.Eventer.
func (f *throttledFile) Event(e storage.Event) { storage.Tell(f.File, e) }

// ReadAt implements storage.File.
func (f *throttledFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.pass(reading, int64(len(p))); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

// WriteAt implements storage.File.
func (f *throttledFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.pass(writing, int64(len(p))); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

// ReadVAt implements storage.File.
func (f *throttledFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	if err := f.pass(reading, int64(length(bufs))); err != nil {
		return 0, err
	}
	return f.File.ReadVAt(bufs, off)
}

// WriteVAt implements storage.File.
func (f *throttledFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	if err := f.pass(writing, int64(length(bufs))); err != nil {
		return 0, err
	}
	return f.File.WriteVAt(bufs, off)
}

// PunchHole implements storage.File.
func (f *throttledFile) PunchHole(off, n int64) error {
	if err := f.pass(writing, n); err != nil {
		return err
	}
	return f.File.PunchHole(off, n)
}

// ZeroRange implements storage.File.
func (f *throttledFile) ZeroRange(off, n int64) error {
	if err := f.pass(writing, n); err != nil {
		return err
	}
	return f.File.ZeroRange(off, n)
}
