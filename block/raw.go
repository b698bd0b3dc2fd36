package block

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/storage"
)

// FormatRaw is the name of the format that is no format: the disk is the file.
const FormatRaw = "raw"

// rawDiscardAlign is the unit in which host file systems give space back. Zeroing and punching work on any range; only
// whole units free anything.
const rawDiscardAlign = 4096

// zeroChunk bounds the buffer that zeroes are written from when the host cannot zero by itself.
const zeroChunk = 1 << 20

func init() {
	RegisterFormat(Format{
		Name:  FormatRaw,
		Probe: func([]byte) bool { return false }, // raw is what is left when nothing else is recognised
		CheckOptions: func(options map[string]string) error {
			_, err := rawOptions(FormatOptions{Options: options})
			return err
		},
		Open: func(_ context.Context, file storage.File, o FormatOptions) (Device, error) {
			ro, err := rawOptions(o)
			if err != nil {
				return nil, err
			}
			return NewRaw(file, ro)
		},
	})
}

// RawOptions say which part of a file is the disk.
type RawOptions struct {
	Name     string // for messages and extents; the file's own name when empty
	Format   string // what Info says; FormatRaw when empty
	ReadOnly bool
	Offset   int64 // where in the file the disk begins
	Size     int64 // length of the disk; 0 = up to the end of the file, rounded up to a sector

	// GuardFormat, if not nil, is asked about every change to the first sector, with the sector as it would become. When
	// it names a format the change is refused with ErrLooksLikeFormat: an image that was taken for raw only because its
	// content looked like nothing else must not be able to turn itself into something else.
	GuardFormat func(head []byte) string
}

// ErrLooksLikeFormat is returned for a change that would disguise a disk of guessed format.
var ErrLooksLikeFormat = errors.New("write to the first sector would make the disk look like an image of another format" +
	" (its own format was guessed to be raw; name the format to allow this)")

// Raw is a disk that is a file, or a part of one.
type Raw struct {
	gate  gate
	file  storage.File
	o     RawOptions
	size  atomic.Int64 // changed by Resize, alone
	info  Info
	stat  storage.Info
	headM sync.Mutex // held while the first sector changes, when GuardFormat is set

	slowZero atomic.Bool // the host has refused to zero by itself
}

func rawOptions(o FormatOptions) (RawOptions, error) {
	r := RawOptions{Name: o.Name, ReadOnly: o.ReadOnly}
	for _, key := range slices.Sorted(maps.Keys(o.Options)) {
		text := o.Options[key]
		var dst *int64
		switch key {
		case "offset":
			dst = &r.Offset
		case "size":
			dst = &r.Size
		default:
			return r, fmt.Errorf("Block format 'raw' does not support the option '%s'", key)
		}
		n, err := parseSizeOption(key, text)
		if err != nil {
			return r, err
		}
		if key == "size" && n%storage.SectorSize != 0 {
			return r, errors.New("Specified size is not multiple of 512")
		}
		*dst = n
	}
	return r, nil
}

// NewRaw makes a device of a file, which the device closes when it is closed.
func NewRaw(file storage.File, o RawOptions) (*Raw, error) {
	length, err := file.Size()
	if err != nil {
		return nil, fmt.Errorf("asking for the length of the file: %w", err)
	}
	size, err := rawSize(length, o)
	if err != nil {
		return nil, err
	}
	r := &Raw{file: file, o: o, stat: file.Stat()}
	r.size.Store(size)
	if r.o.Name == "" {
		r.o.Name = r.stat.Name
	}
	if r.o.Format == "" {
		r.o.Format = FormatRaw
	}
	if r.stat.ReadOnly {
		r.o.ReadOnly = true
	}
	minAlign := 1
	if r.stat.Direct || r.stat.Device {
		minAlign = max(r.stat.Align, 1)
	}
	r.info = Info{
		Format: r.o.Format, Name: r.o.Name, ReadOnly: r.o.ReadOnly,
		MinAlign: minAlign, PreferAlign: max(minAlign, 4096), DiscardAlign: rawDiscardAlign,
		Volatile: !r.o.ReadOnly, Survives: !r.o.ReadOnly,
	}
	if r.o.ReadOnly {
		r.info.DiscardAlign = 0
	}
	return r, nil
}

// rawSize is the length of the disk in a file of the given length.
func rawSize(length int64, o RawOptions) (int64, error) {
	if length > math.MaxInt64-storage.SectorSize {
		return 0, fmt.Errorf("file of %d bytes is too long", length)
	}
	whole := (length + storage.SectorSize - 1) &^ (storage.SectorSize - 1)
	switch {
	case o.Offset < 0 || o.Size < 0:
		return 0, fmt.Errorf("negative offset %d or size %d", o.Offset, o.Size)
	case o.Size%storage.SectorSize != 0:
		return 0, fmt.Errorf("size %d is not a multiple of %d", o.Size, storage.SectorSize)
	case o.Offset > length && o.Offset > whole:
		return 0, fmt.Errorf("Offset (%d) cannot be greater than size of the containing file (%d)", o.Offset, whole)
	case o.Size > whole-o.Offset:
		return 0, fmt.Errorf("The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)",
			o.Offset, o.Size, whole)
	case o.Size != 0:
		return o.Size, nil
	}
	return (length - min(o.Offset, length) + storage.SectorSize - 1) &^ (storage.SectorSize - 1), nil
}

// Size implements Device.
func (r *Raw) Size() int64 { return r.size.Load() }

// Info implements Device.
func (r *Raw) Info() Info {
	info := r.info
	info.FastZero = !info.ReadOnly && !r.slowZero.Load()
	return info
}

// enter admits a call that reads; the caller leaves by r.gate.leave when it got nil.
func (r *Raw) enter(off, n int64) error {
	if err := r.gate.enter(); err != nil {
		return err
	}
	size := r.size.Load() // inside, where nobody makes the disk smaller
	if err := CheckRange(off, n, size); err != nil {
		r.gate.leave()
		return fmt.Errorf("%q: %d bytes at offset %d of a disk of %d: %w", r.o.Name, n, off, size, err)
	}
	return nil
}

// enterChange admits a call that changes the disk.
func (r *Raw) enterChange(off, n int64) error {
	if r.o.ReadOnly {
		return fmt.Errorf("%q: %w", r.o.Name, ErrReadOnly)
	}
	return r.enter(off, n)
}

// ReadAt implements Device.
func (r *Raw) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := r.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer r.gate.leave()
	storage.Tell(r.file, storage.EventReadAIO)
	return r.read(p, off, r.file.ReadAt)
}

// TryReadAt implements TryDevice.
func (r *Raw) TryReadAt(p []byte, off int64) error {
	nw, ok := r.file.(storage.NowaitReader)
	if !ok {
		return ErrWouldBlock
	}
	if err := r.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer r.gate.leave()
	err := r.read(p, off, nw.ReadAtNowait)
	if errors.Is(err, storage.ErrWouldBlock) {
		return ErrWouldBlock
	}
	return err
}

// TryReadDataAt implements DataDevice.
func (r *Raw) TryReadDataAt(p []byte, off int64) error {
	if err := r.enter(off, int64(len(p))); err != nil {
		return err
	}
	end, data, zero, err := r.status(r.o.Offset + off)
	r.gate.leave()
	switch whole := end >= r.o.Offset+off+int64(len(p)); {
	case err != nil:
		return ErrWouldBlock
	case !whole:
		return ErrMixed
	case zero:
		return ErrAllZero
	case !data: // nobody knows
		return ErrWouldBlock
	}
	// A hole that is made meanwhile is read as zeroes, which it is.
	return r.TryReadAt(p, off)
}

// read fills p with what fn reads; what lies past the end of the file reads as zeroes, since the last sector of the disk
// may be longer than the file.
func (r *Raw) read(p []byte, off int64, fn func([]byte, int64) (int, error)) error {
	n, err := fn(p, r.o.Offset+off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	if err == storage.ErrWouldBlock { // the hot answer: not worth wrapping
		return err
	}
	return fmt.Errorf("reading %q at offset %d: %w", r.o.Name, off, err)
}

// WriteAt implements Device.
func (r *Raw) WriteAt(_ context.Context, p []byte, off int64, flags WriteFlags) error {
	if err := r.enterChange(off, int64(len(p))); err != nil {
		return err
	}
	defer r.gate.leave()
	if err := r.write(p, off); err != nil {
		return err
	}
	if flags&WriteFUA != 0 {
		return r.sync()
	}
	return nil
}

// TryWriteAt implements TryDevice.
func (r *Raw) TryWriteAt(p []byte, off int64) error {
	if r.stat.Direct || r.o.GuardFormat != nil && off < storage.SectorSize {
		return ErrWouldBlock
	}
	if err := r.enterChange(off, int64(len(p))); err != nil {
		return err
	}
	defer r.gate.leave()
	return r.write(p, off)
}

func (r *Raw) write(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	return r.guarded(off, p, int64(len(p)), func() error {
		storage.Tell(r.file, storage.EventWriteAIO)
		if _, err := r.file.WriteAt(p, r.o.Offset+off); err != nil {
			return fmt.Errorf("writing %q at offset %d: %w", r.o.Name, off, err)
		}
		return nil
	})
}

// guarded runs change, which makes [off, off+n) equal to p (or zero, for a nil p), unless GuardFormat objects.
func (r *Raw) guarded(off int64, p []byte, n int64, change func() error) error {
	if r.o.GuardFormat == nil || off >= storage.SectorSize {
		return change()
	}
	// Two writes that are harmless alone may be harmful together, so the check and the change are one step.
	r.headM.Lock()
	defer r.headM.Unlock()
	head := make([]byte, min(storage.SectorSize, r.Size()))
	if err := r.read(head, 0, r.file.ReadAt); err != nil {
		return err
	}
	part := head[off:min(off+n, int64(len(head)))]
	if p == nil {
		clear(part)
	} else {
		copy(part, p)
	}
	if name := r.o.GuardFormat(head); name != "" {
		return fmt.Errorf("%q: %w (%s)", r.o.Name, ErrLooksLikeFormat, name)
	}
	return change()
}

// WriteZeroes implements Device.
func (r *Raw) WriteZeroes(ctx context.Context, off, n int64, flags ZeroFlags) error {
	if err := r.enterChange(off, n); err != nil {
		return err
	}
	defer r.gate.leave()
	if n > 0 {
		err := r.guarded(off, nil, n, func() error { return r.zero(ctx, off, n, flags) })
		if err != nil {
			return err
		}
	}
	if flags&ZeroFUA != 0 {
		return r.sync()
	}
	return nil
}

func (r *Raw) zero(ctx context.Context, off, n int64, flags ZeroFlags) error {
	if flags&ZeroFast != 0 && !r.aligned(off, n) {
		return ErrNoFastZero
	}
	if f, ok := r.file.(FastZeroer); ok && flags&ZeroFast != 0 {
		return f.ZeroFast(r.o.Offset+off, n, flags&ZeroUnmap != 0)
	}
	head, body, tail := r.split(off, n)
	if err := r.writeOutZeroes(ctx, off, head); err != nil {
		return err
	}
	if err := r.zeroBody(ctx, off+head, body, flags); err != nil {
		return err
	}
	return r.writeOutZeroes(ctx, off+head+body, tail)
}

// unit is the alignment that the host asks of zeroing and punching: any byte of a file, whole blocks of a device.
func (r *Raw) unit() int64 {
	if r.stat.Device {
		return int64(max(r.stat.Align, storage.SectorSize))
	}
	return 1
}

func (r *Raw) aligned(off, n int64) bool {
	return (r.o.Offset+off)%r.unit() == 0 && n%r.unit() == 0
}

// split cuts [off, off+n) into a part before the first unit, whole units, and the rest.
func (r *Raw) split(off, n int64) (head, body, tail int64) {
	unit := r.unit()
	start := r.o.Offset + off
	head = min(n, (unit-start%unit)%unit)
	body = (n - head) / unit * unit
	return head, body, n - head - body
}

func (r *Raw) zeroBody(ctx context.Context, off, n int64, flags ZeroFlags) error {
	if n == 0 {
		return nil
	}
	err := storage.ErrNotSupported
	if flags&ZeroUnmap != 0 {
		err = r.punch(off, n)
	}
	if errors.Is(err, storage.ErrNotSupported) {
		err = r.file.ZeroRange(r.o.Offset+off, n)
	}
	if err == nil {
		return nil
	}
	if !errors.Is(err, storage.ErrNotSupported) {
		return fmt.Errorf("zeroing %d bytes of %q at offset %d: %w", n, r.o.Name, off, err)
	}
	r.slowZero.Store(true)
	if flags&ZeroFast != 0 {
		return ErrNoFastZero
	}
	return r.writeOutZeroes(ctx, off, n)
}

// punch frees [off, off+n) as far as the file reaches; past its end everything reads as zeroes already.
func (r *Raw) punch(off, n int64) error {
	length, err := r.file.Size()
	if err != nil {
		return err
	}
	start := r.o.Offset + off
	if n = min(n, length-start); n <= 0 {
		return nil
	}
	return r.file.PunchHole(start, n)
}

func (r *Raw) writeOutZeroes(ctx context.Context, off, n int64) error {
	if n == 0 {
		return nil
	}
	buf := make([]byte, min(n, zeroChunk))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		chunk := buf[:min(n, zeroChunk)]
		if _, err := r.file.WriteAt(chunk, r.o.Offset+off); err != nil {
			return fmt.Errorf("writing zeroes to %q at offset %d: %w", r.o.Name, off, err)
		}
		off += int64(len(chunk))
		n -= int64(len(chunk))
	}
	return nil
}

// Discard implements Device.
func (r *Raw) Discard(_ context.Context, off, n int64) error {
	if err := r.enterChange(off, n); err != nil {
		return err
	}
	defer r.gate.leave()
	if r.o.GuardFormat != nil && off < storage.SectorSize {
		// Whether a discarded byte turns to zero is up to the host, so the guard could not tell what it would be.
		skip := min(n, storage.SectorSize-off)
		off, n = off+skip, n-skip
	}
	var err error
	if f, ok := r.file.(Discarder); ok {
		err = f.Discard(r.o.Offset+off, n)
	} else if head, body, _ := r.split(off, n); body > 0 {
		err = r.punch(off+head, body)
	}
	if err != nil && !errors.Is(err, storage.ErrNotSupported) {
		return fmt.Errorf("discarding %d bytes of %q at offset %d: %w", n, r.o.Name, off, err)
	}
	return nil
}

// Flush implements Device.
func (r *Raw) Flush(context.Context) error {
	if err := r.gate.enter(); err != nil {
		return err
	}
	defer r.gate.leave()
	return r.sync()
}

func (r *Raw) sync() error {
	if r.o.ReadOnly {
		return nil
	}
	if err := r.file.Sync(); err != nil {
		return fmt.Errorf("flushing %q: %w", r.o.Name, err)
	}
	return nil
}

// Extents implements Device.
func (r *Raw) Extents(ctx context.Context, off, n int64, fn func(Extent) bool) error {
	if err := r.enter(off, n); err != nil {
		return err
	}
	defer r.gate.leave()
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		run, data, zero, err := r.status(r.o.Offset + off)
		run -= r.o.Offset
		switch {
		case errors.Is(err, io.EOF): // the last sector sticks out of the file
			run, data, zero = end, false, true
		case err != nil:
			return fmt.Errorf("asking %q for the extent at offset %d: %w", r.o.Name, off, err)
		case run <= off:
			return fmt.Errorf("asking %q for the extent at offset %d: the host says that it ends at %d", r.o.Name, off, run)
		}
		run = min(run, end)
		e := Extent{
			Off: off, Len: run - off, Allocated: data || zero, Data: data, Zero: zero,
			HasHost: data || zero, Host: r.o.Offset + off, File: r.o.Name,
		}
		if !fn(e) {
			return nil
		}
		off = run
	}
	return nil
}

// status describes the file at off.
func (r *Raw) status(off int64) (end int64, data, zero bool, err error) {
	if f, ok := r.file.(StatusFile); ok {
		return f.NextStatus(off)
	}
	end, data, err = r.file.NextExtent(off)
	return end, data, !data, err
}

// Close implements Device.
func (r *Raw) Close() error {
	if !r.gate.close() {
		return ErrClosed
	}
	err := r.sync()
	if cerr := r.file.Close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("closing %q: %w", r.o.Name, cerr))
	}
	return err
}
