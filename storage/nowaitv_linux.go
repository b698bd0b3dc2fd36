package storage

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

var _ NowaitVReader = (*OSFile)(nil)

// ReadVAtNowait reads what the page cache holds, and nothing else, in one system call for up to iovMax buffers.
func (f *OSFile) ReadVAtNowait(bufs [][]byte, off int64) (int, error) {
	if len(bufs) == 1 {
		return f.ReadAtNowait(bufs[0], off)
	}
	total := totalLen(bufs)
	if err := f.begin("reading", off, total); err != nil {
		return 0, err
	}
	if f.direct != nil || f.noNowait.Load() { // as in ReadAtNowait
		return 0, ErrWouldBlock
	}
	var few [16]unix.Iovec
	if len(bufs) <= len(few) {
		return f.nowaitLoop(few[:], bufs, off, int(total))
	}
	many := iovPool.Get().(*[iovMax]unix.Iovec)
	n, err := f.nowaitLoop(many[:], bufs, off, int(total))
	clear(many[:min(len(bufs), iovMax)])
	iovPool.Put(many)
	return n, err
}

// nowaitLoop asks until all is read: a short answer does not tell whether what follows is not cached or not there.
func (f *OSFile) nowaitLoop(iov []unix.Iovec, bufs [][]byte, off int64, total int) (int, error) {
	v := vector{bufs: bufs}
	for n := 0; n < total; {
		use := v.fill(iov)
		lo, hi := splitOffset(off + int64(n))
		r, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(f.fd), uintptr(unsafe.Pointer(&use[0])), uintptr(len(use)), lo, hi,
			unix.RWF_NOWAIT)
		m, err := f.nowaitAnswer(int(r), errno, off+int64(n))
		if err != nil {
			return n, err
		}
		v.advance(m)
		n += m
	}
	return total, nil
}
