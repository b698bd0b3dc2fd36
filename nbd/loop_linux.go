package nbd

import (
	"errors"
	"io"
	"os"
	"syscall"
	"time"
)

const (
	// recheckAfter is how long the reader may wait for the socket's next event when it has not seen the socket empty.
	recheckAfter = 100 * time.Millisecond
	// rearmAfter is how much of that time is over before the deadline is moved; moving it for every request costs more
	// than it is worth.
	rearmAfter = recheckAfter / 2
)

// readRaw is readLoop for sockets, with a system call less for each wait; done is false when nc is none.
//
// net.Conn's Read asks the kernel first and waits when there is nothing. After a read that did not fill its buffer the
// socket is empty, so the question is a waste: the poller's next event, which is edge-triggered, says when to read
// again. But an event that comes between two reads is kept only within one call of RawConn.Read, so the whole
// connection is served inside that call. One thing may get lost: the end of the stream, when it was announced by the
// same event as the last data. A wait that follows an unfilled read therefore has a deadline, after which the kernel is
// asked again; a wait after a read that found the socket empty needs none.
func (c *conn) readRaw() (done bool, err error) {
	sc, ok := c.nc.(syscall.Conn)
	if !ok {
		return false, nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false, nil
	}
	l := rawLoop{c: c}
	for {
		err := rc.Read(l.step)
		if l.err != nil {
			return true, l.err
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return true, c.streamError(err)
		}
		if err := c.ended(); err != nil {
			return true, err
		}
		c.idle()
		l.armed = time.Time{}
		if err := c.overdue(); err != nil {
			return true, c.streamError(err)
		}
		// step looks whether the deadline was a drain's before it waits again.
	}
}

// rawLoop is the state of readRaw.
type rawLoop struct {
	c     *conn
	armed time.Time // when the read deadline was set
	err   error     // why the connection ended
}

// step reads and serves until there is nothing to read, when it returns false, or the connection ends, when it returns
// true.
func (l *rawLoop) step(fd uintptr) bool {
	c := l.c
	for {
		if l.err = c.ended(); l.err != nil {
			return true
		}
		p := c.space()
		n, err := syscall.Read(int(fd), p)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			return l.rest()
		case err != nil:
			l.err = c.streamError(os.NewSyscallError("read", err))
			return true
		case n == 0:
			l.err = c.streamError(io.EOF)
			return true
		}
		if l.err = c.got(n); l.err != nil {
			return true
		}
		if n < len(p) {
			l.arm()
			if l.err = c.ended(); l.err != nil {
				return true
			}
			return l.late()
		}
	}
}

// rest ends a step that found the socket empty. Its wait needs a deadline only in the middle of a payload.
func (l *rawLoop) rest() bool {
	if l.c.load == nil || l.c.loadBy.IsZero() {
		return false
	}
	l.arm()
	if l.err = l.c.ended(); l.err != nil {
		return true
	}
	return l.late()
}

// late ends the connection if a payload has not come in time, however busily the client sends it byte by byte.
func (l *rawLoop) late() bool {
	if l.c.load == nil || l.c.loadBy.IsZero() || l.armed.Before(l.c.loadBy) {
		return false
	}
	l.err = l.c.overdue()
	return l.err != nil
}

// arm makes sure that the coming wait ends.
func (l *rawLoop) arm() {
	now := time.Now()
	if now.Sub(l.armed) < rearmAfter {
		return
	}
	l.armed = now
	// It fails only on a connection that is closed, and then so does the wait.
	_ = l.c.sock.SetReadDeadline(now.Add(recheckAfter))
}
