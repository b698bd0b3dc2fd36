package storage

import (
	"io"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iovMax is the most buffers that one preadv or pwritev takes (IOV_MAX).
const iovMax = 1024

// iovPool keeps arrays for calls with more buffers than fit on the stack; they hold no pointers while in the pool.
var iovPool = sync.Pool{New: func() any { return new([iovMax]unix.Iovec) }}

// vector is a position in a list of buffers.
type vector struct {
	bufs [][]byte
	i, o int // the next byte is bufs[i][o]
}

// fill describes the bytes from the position on, as many as iov has room for, and returns the part of iov in use.
func (v *vector) fill(iov []unix.Iovec) []unix.Iovec {
	k, o := 0, v.o
	for i := v.i; i < len(v.bufs) && k < len(iov); i++ {
		if b := v.bufs[i][o:]; len(b) > 0 {
			iov[k].Base = unsafe.SliceData(b)
			iov[k].SetLen(len(b))
			k++
		}
		o = 0
	}
	return iov[:k]
}

// advance moves the position by n bytes.
func (v *vector) advance(n int) {
	for n > 0 {
		left := len(v.bufs[v.i]) - v.o
		if n < left {
			v.o += n
			return
		}
		n -= left
		v.i, v.o = v.i+1, 0
	}
}

// scatter copies all of src to the buffers and moves on.
func (v *vector) scatter(src []byte) {
	for len(src) > 0 {
		n := copy(v.bufs[v.i][v.o:], src)
		src = src[n:]
		v.o += n
		if v.o == len(v.bufs[v.i]) {
			v.i, v.o = v.i+1, 0
		}
	}
}

// gather fills dst from the buffers and moves on.
func (v *vector) gather(dst []byte) {
	for len(dst) > 0 {
		n := copy(dst, v.bufs[v.i][v.o:])
		dst = dst[n:]
		v.o += n
		if v.o == len(v.bufs[v.i]) {
			v.i, v.o = v.i+1, 0
		}
	}
}

// vectorFull moves all bytes of bufs by preadv or pwritev; unit is as in preadFull and pwriteFull.
func vectorFull(fd int, sysno uintptr, bufs [][]byte, off int64, unit int64) (int, error) {
	var few [16]unix.Iovec
	if len(bufs) <= len(few) {
		return vectorLoop(fd, sysno, few[:], bufs, off, unit)
	}
	many := iovPool.Get().(*[iovMax]unix.Iovec)
	n, err := vectorLoop(fd, sysno, many[:], bufs, off, unit)
	clear(many[:min(len(bufs), iovMax)])
	iovPool.Put(many)
	return n, err
}

func vectorLoop(fd int, sysno uintptr, iov []unix.Iovec, bufs [][]byte, off int64, unit int64) (int, error) {
	total := int(totalLen(bufs))
	v := vector{bufs: bufs}
	n := 0
	for n < total {
		use := v.fill(iov)
		lo, hi := splitOffset(off + int64(n))
		r, _, errno := unix.Syscall6(sysno, uintptr(fd), uintptr(unsafe.Pointer(&use[0])), uintptr(len(use)), lo, hi, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return n, errno
		}
		m := int(r)
		if sysno == unix.SYS_PREADV {
			if m == 0 || (n+m < total && int64(n+m)%unit != 0) {
				return n + m, io.EOF
			}
		} else {
			if n+m < total {
				m -= int(int64(m) % unit)
			}
			if m <= 0 {
				return n, io.ErrShortWrite
			}
		}
		v.advance(m)
		n += m
	}
	return n, nil
}

// splitOffset makes the two offset arguments of the preadv family: the kernel joins them by the width of a long.
func splitOffset(off int64) (lo, hi uintptr) {
	const longBits = 8 * unsafe.Sizeof(uintptr(0))
	return uintptr(off), uintptr(uint64(off) >> (longBits - 1) >> 1)
}
