package storage

import (
	"io"
	"math"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// bounceSize is how much one bounce buffer carries; a longer request goes in several steps.
	bounceSize = 256 << 10
	// directFallbackAlign serves where the kernel does not tell what it needs: no file system asks for more.
	directFallbackAlign = 4096
	// directMaxAlign is the largest unit that a bounce buffer is worth having for.
	directMaxAlign = 64 << 10
)

// directIO is the data path of an O_DIRECT descriptor. The kernel moves whole units of align bytes only, between
// memory aligned to memAlign. What is not aligned goes through a bounce buffer, and a write of part of a unit becomes
// read-modify-write.
//
// A read-modify-write owns its units alone from the read to the write: every write holds its units in ranges, a whole
// one shared, a partial one exclusive. So no write of a neighbour in the same unit is undone. A partial write of the
// file's last unit makes the file too long for a moment; it owns everything up to the end of the world until it has cut
// the file back, so nobody can grow the file meanwhile, or see the wrong size.
type directIO struct {
	fd       int
	device   bool
	align    int64
	memAlign uintptr
	ranges   rangeLock
	pool     sync.Pool // of *bounce
}

// bounce is a buffer of bounceSize bytes that the kernel takes as it is.
type bounce struct{ buf []byte }

// newDirectIO returns nil when the file system says that it cannot do direct I/O on this file.
func newDirectIO(fd int, device bool) *directIO {
	d := &directIO{fd: fd, device: device, align: directFallbackAlign, memAlign: directFallbackAlign}
	d.ranges.cond.L = &d.ranges.mu
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err == nil && st.Mask&unix.STATX_DIOALIGN != 0 {
		if !usableAlign(st.Dio_offset_align) || !usableAlign(st.Dio_mem_align) {
			return nil // 0 is the kernel's word for "not on this file"
		}
		d.align = max(int64(st.Dio_offset_align), SectorSize)
		d.memAlign = uintptr(st.Dio_mem_align)
	}
	d.pool.New = func() any { return newBounce(max(d.memAlign, directFallbackAlign)) }
	return d
}

func usableAlign(n uint32) bool { return n > 0 && n <= directMaxAlign && n&(n-1) == 0 }

func newBounce(align uintptr) *bounce {
	raw := make([]byte, bounceSize+align)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(raw))) & (align - 1)
	return &bounce{raw[skip : skip+bounceSize : skip+bounceSize]}
}

func (d *directIO) down(off int64) int64 { return off &^ (d.align - 1) }

// up saturates: the last, partial unit of the address space ends where offsets end.
func (d *directIO) up(off int64) int64 {
	if off > math.MaxInt64-d.align {
		return math.MaxInt64
	}
	return (off + d.align - 1) &^ (d.align - 1)
}

// aligned reports whether the kernel takes the request as it is.
func (d *directIO) aligned(bufs [][]byte, off int64) bool {
	if off&(d.align-1) != 0 {
		return false
	}
	for _, b := range bufs {
		if int64(len(b))&(d.align-1) != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))&(d.memAlign-1) != 0 {
			return false
		}
	}
	return true
}

func (d *directIO) read(bufs [][]byte, off int64) (int, error) {
	if !d.aligned(bufs, off) {
		return d.readBounced(bufs, off)
	}
	if len(bufs) == 1 {
		return preadFull(d.fd, bufs[0], off, d.align)
	}
	return vectorFull(d.fd, unix.SYS_PREADV, bufs, off, d.align)
}

func (d *directIO) readBounced(bufs [][]byte, off int64) (int, error) {
	b := d.pool.Get().(*bounce)
	defer d.pool.Put(b)
	v := vector{bufs: bufs}
	total, done := totalLen(bufs), int64(0)
	for done < total {
		at := off + done
		start := d.down(at)
		window := b.buf[:min(bounceSize, d.up(off+total)-start)]
		n, err := preadFull(d.fd, window, start, d.align)
		if err != nil && err != io.EOF {
			return int(done), err
		}
		got := min(start+int64(n)-at, total-done)
		if got > 0 {
			v.scatter(window[at-start : at-start+got])
			done += got
		}
		if err == io.EOF && done < total {
			return int(done), io.EOF
		}
	}
	return int(done), nil
}

func (d *directIO) write(bufs [][]byte, off int64) (int, error) {
	if !d.aligned(bufs, off) {
		return d.writeBounced(bufs, off)
	}
	end := off + totalLen(bufs)
	d.ranges.acquire(off, end, false)
	defer d.ranges.release(off, end, false)
	if len(bufs) == 1 {
		return pwriteFull(d.fd, bufs[0], off, d.align)
	}
	return vectorFull(d.fd, unix.SYS_PWRITEV, bufs, off, d.align)
}

func (d *directIO) writeBounced(bufs [][]byte, off int64) (int, error) {
	b := d.pool.Get().(*bounce)
	defer d.pool.Put(b)
	v := vector{bufs: bufs}
	total, done := totalLen(bufs), int64(0)
	for done < total {
		at := off + done
		end := min(off+total, d.down(at)+bounceSize)
		n, err := d.writeWindow(b.buf, &v, at, end)
		done += n
		if err != nil {
			return int(done), err
		}
	}
	return int(done), nil
}

// writeWindow writes the next end-off bytes of v to [off, end), which buf has room for in whole units.
func (d *directIO) writeWindow(buf []byte, v *vector, off, end int64) (int64, error) {
	start, stop := d.down(off), d.up(end)
	if stop == math.MaxInt64 {
		return 0, unix.EFBIG
	}
	size, limit, err := d.ownWindow(start, stop)
	if err != nil {
		return 0, err
	}
	defer d.ranges.release(start, limit, true)
	if d.device && end > size {
		return 0, unix.ENOSPC
	}
	window := buf[:stop-start]
	if err := d.readEdges(window, start, off, end); err != nil {
		return 0, err
	}
	v.gather(window[off-start : end-start])
	n, err := pwriteFull(d.fd, window, start, d.align)
	written := min(max(start+int64(n)-off, 0), end-off)
	if stop <= size || d.device {
		return written, err
	}
	if cutErr := d.cut(max(size, off+written)); err == nil {
		err = cutErr
	}
	return written, err
}

// readEdges reads the units of the window that [off, end) covers in part. What lies past the end of the file is zero.
func (d *directIO) readEdges(window []byte, start, off, end int64) error {
	stop := start + int64(len(window))
	head, tail := off > start, end < stop
	if head || (tail && int64(len(window)) == d.align) {
		if err := d.readUnit(window[:d.align], start); err != nil {
			return err
		}
		tail = tail && int64(len(window)) > d.align
	}
	if tail {
		return d.readUnit(window[int64(len(window))-d.align:], stop-d.align)
	}
	return nil
}

func (d *directIO) readUnit(unit []byte, off int64) error {
	n, err := preadFull(d.fd, unit, off, d.align)
	if err != nil && err != io.EOF {
		return err
	}
	clear(unit[n:])
	return nil
}

// ownWindow takes [start, stop) for a read-modify-write, or everything from start on if the file ends before stop. It
// returns the size of the file, which cannot move across stop while the window is owned.
func (d *directIO) ownWindow(start, stop int64) (size, limit int64, err error) {
	size, err = fdSize(d.fd, d.device)
	if err != nil {
		return 0, 0, err
	}
	for {
		limit = stop
		if stop > size {
			limit = math.MaxInt64
		}
		d.ranges.acquire(start, limit, true)
		size, err = fdSize(d.fd, d.device)
		if err == nil && (stop <= size || limit == math.MaxInt64) {
			return size, limit, nil
		}
		d.ranges.release(start, limit, true)
		if err != nil {
			return 0, 0, err
		}
	}
}

// cut brings the file back to the length that it should have after its last unit was written whole.
func (d *directIO) cut(size int64) error {
	now, err := fdSize(d.fd, d.device)
	if err != nil || now <= size {
		return err
	}
	return retryEINTR(func() error { return unix.Ftruncate(d.fd, size) })
}

// size waits for a file that is too long for a moment to be cut back.
func (d *directIO) size() (int64, error) {
	defer d.exclude(math.MaxInt64-1, math.MaxInt64)()
	return fdSize(d.fd, d.device)
}

// exclude owns the units of [start, end) until the returned function is called.
func (d *directIO) exclude(start, end int64) func() {
	start, end = d.down(start), d.up(end)
	d.ranges.acquire(start, end, true)
	return func() { d.ranges.release(start, end, true) }
}

// rangeLock lends out ranges, shared or exclusive. Those that do not overlap never wait for each other.
type rangeLock struct {
	mu      sync.Mutex
	cond    sync.Cond
	waiters int
	active  []heldRange
}

type heldRange struct {
	start, end int64
	exclusive  bool
}

func (l *rangeLock) acquire(start, end int64, exclusive bool) {
	r := heldRange{start, end, exclusive}
	l.mu.Lock()
	for l.conflicts(r) {
		l.waiters++
		l.cond.Wait()
		l.waiters--
	}
	l.active = append(l.active, r)
	l.mu.Unlock()
}

func (l *rangeLock) conflicts(r heldRange) bool {
	for _, a := range l.active {
		if a.start < r.end && r.start < a.end && (a.exclusive || r.exclusive) {
			return true
		}
	}
	return false
}

func (l *rangeLock) release(start, end int64, exclusive bool) {
	r := heldRange{start, end, exclusive}
	l.mu.Lock()
	for i, a := range l.active {
		if a == r {
			last := len(l.active) - 1
			l.active[i] = l.active[last]
			l.active = l.active[:last]
			break
		}
	}
	if l.waiters > 0 {
		l.cond.Broadcast()
	}
	l.mu.Unlock()
}
