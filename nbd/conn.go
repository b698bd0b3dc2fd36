package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// inPlaceMax is the longest payload of a request that is answered in place out of the read buffer and into a batch.
	inPlaceMax = 64 << 10
	// bulkMax is the longest payload of a request that is answered in place with a buffer of its own: handing it to another
	// goroutine costs as much as copying it, but beyond this bound other requests could use the time.
	bulkMax = 4 << 20
	// coldReads is how many long reads go to workers unasked after one whose data was not at hand: asking in vain means
	// copying what there was of it twice.
	coldReads = 15
	// batchSize bounds the replies that are collected before they are sent. It fits into a unix socket's default buffer,
	// so that the client can start on them while the next ones are made.
	batchSize = 128 << 10
	// The read buffer starts small, for the sake of idle connections, and grows while reads fill it.
	minReadBuffer = 16 << 10
	maxReadBuffer = 256 << 10
	// bulkWindow is how much is read at a time while large writes come in: most of their payload is then read directly
	// to where it belongs.
	bulkWindow = 4 << 10
	// maxIdleWorkers is how many workers a connection keeps for its next requests.
	maxIdleWorkers = 16
)

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// conn is a connection.
type conn struct {
	srv    *Server
	sock   net.Conn // the socket; deadlines are set on it
	nc     net.Conn // the way to the client: sock, or TLS on top of it
	client *client
	ctx    context.Context
	cancel context.CancelFunc
	id     uint64

	// Set by the handshake, constant afterwards.
	peer     Peer
	exp      *export      // written under Server.mu
	size     atomic.Int64 // of the disk, as the client was told
	provided *export      // opened for this connection alone, by its own goroutine
	mode     replyMode
	contexts []selected

	draining atomic.Bool           // the reader is to stop
	broken   atomic.Bool           // replies have nowhere to go
	sendErr  atomic.Pointer[error] // why, unless the server wanted it so

	// The reader's own.
	in      *buffer   // what came from the socket
	r, w    int       // the part of in not yet decoded
	need    int       // bytes from r on that the next step of decoding needs
	window  int       // longest read
	filled  bool      // the last read filled the buffer
	load    *request  // a large write whose payload is coming in
	loaded  int       // bytes of it that came
	loadBy  time.Time // when they must have come, if not zero
	readBy  time.Time // read deadline that was set for it
	skip    uint64    // bytes of payload still to be thrown away
	skipped header    // the request they belong to
	why     errno     // and its error
	out     *buffer   // batch of replies
	outLen  int
	cold    int  // how many of the next long reads are not tried in place
	roomy   bool // the socket has been asked for room for long replies

	work    chan *request  // to idle workers
	workers sync.WaitGroup // all workers
	idlers  atomic.Int32   // workers waiting for work

	// flow bounds what is in flight.
	flow struct {
		sync.Mutex
		room     sync.Cond // signalled when something was released
		inflight int       // requests that hold a slot
		bytes    int64     // sum of the costs
	}

	// sends is the way out, shared by the reader and the workers.
	sends struct {
		sync.Mutex
		busy  bool       // a goroutine is sending; only it touches vecs
		queue []*request // what it has to take along
		spare []*request // the other half of a double buffer
		vecs  net.Buffers
		piece net.Buffers // the part of vecs being written
		armed time.Time   // when the write deadline was set
	}

	ops                     [numKinds]atomic.Uint64 // requests by kind
	errors                  atomic.Uint64
	bytesRead, bytesWritten atomic.Uint64
	since                   time.Time
}

func newConn(ctx context.Context, cancel context.CancelFunc, s *Server, nc net.Conn, g *guest) *conn {
	c := &conn{
		srv: s, sock: nc, nc: nc, peer: g.peer, client: g.client, ctx: ctx, cancel: cancel,
		work: make(chan *request), window: maxReadBuffer, since: time.Now(),
	}
	if t, ok := nc.(*tls.Conn); ok {
		c.sock = t.NetConn()
	}
	c.flow.room.L = &c.flow
	c.in = s.buffers.get(minReadBuffer)
	return c
}

// run serves the connection from its first byte to its last reply.
func (c *conn) run(g *guest) error {
	err := c.negotiate()
	c.srv.seated(g)
	if err == nil {
		if f := c.srv.opts.Observer.Connected; f != nil {
			f(c.describe())
		}
		err = c.transmit()
	}
	c.release()
	if errors.Is(err, errDisconnect) || c.draining.Load() {
		return nil
	}
	if errors.Is(err, io.EOF) && c.exp != nil {
		return nil
	}
	return fmt.Errorf("nbd: serving %v: %w", c.sock.RemoteAddr(), err)
}

// transmit serves requests until the connection's end, and waits for those still in flight.
func (c *conn) transmit() error {
	// What the client sent along with its last option is in the buffer already.
	err := c.decode()
	if err == nil {
		err = c.readLoop()
	}
	// Requests that were answered before the end of the stream was noticed still get their replies.
	c.sendBatch()
	close(c.work)
	c.workers.Wait()
	return err
}

// release gives the reader's memory back. No worker is left.
func (c *conn) release() {
	b := &c.srv.buffers
	b.put(c.in)
	b.put(c.out)
	if c.load != nil {
		b.put(c.load.buf)
	}
	c.in, c.out, c.load = nil, nil, nil
	// A large write whose payload never came is all that can be left.
	c.flow.Lock()
	left := c.flow.bytes
	c.flow.bytes = 0
	c.flow.Unlock()
	c.unshare(left)
}

// close closes the connection, with a farewell if it is encrypted and the client still listens.
func (c *conn) close() {
	if c.nc != c.sock && !c.broken.Load() {
		_ = c.nc.Close() // it closes sock, and its error would be that of a client that has gone already
	}
	c.sock.Close()
}

// drain asks the reader to stop after the requests it has.
func (c *conn) drain() {
	c.draining.Store(true)
	// Whoever sets another read deadline looks at draining afterwards, so one of the two stops the reader.
	_ = c.sock.SetReadDeadline(longAgo)
}

// abort cuts the connection off: nothing more is read or sent, and calls on the device are asked to give up.
func (c *conn) abort() {
	c.draining.Store(true)
	c.broken.Store(true)
	_ = c.sock.SetDeadline(longAgo)
	c.cancel()
}

// sendFailed notes that the client takes no replies any more, which ends the connection.
func (c *conn) sendFailed(err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.broken.Load() {
		err = fmt.Errorf("client took nothing for %v: %w", c.srv.opts.StallTimeout, err)
	}
	c.sendErr.Store(&err)
	c.broken.Store(true)
	_ = c.sock.SetDeadline(longAgo)
}

// ended returns why the reader has to stop, if it has.
func (c *conn) ended() error {
	switch {
	case c.broken.Load():
		if err := c.sendErr.Load(); err != nil {
			return fmt.Errorf("sending replies: %w", *err)
		}
		return errDraining
	case c.draining.Load():
		return errDraining
	}
	return nil
}

func (c *conn) describe() Conn {
	d := Conn{ID: c.id, Peer: c.peer}
	if a := c.sock.RemoteAddr(); a != nil {
		d.Remote = a.String()
	}
	if c.exp != nil {
		d.Export = c.exp.Name
	}
	return d
}

// buffered is the number of bytes that have come and were not taken.
func (c *conn) buffered() int { return c.w - c.r }

// take returns the next n bytes of the handshake, reading until they are there. They are valid until the next take.
func (c *conn) take(n int) ([]byte, error) {
	for c.buffered() < n {
		c.need = n
		m, err := c.nc.Read(c.space())
		c.w += m
		if err != nil && c.buffered() < n {
			if err == io.EOF && c.buffered() > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	p := c.in.b[c.r : c.r+n]
	c.r += n
	return p, nil
}

// space returns where the next bytes of the stream belong; it is never empty.
func (c *conn) space() []byte {
	switch {
	case c.load != nil:
		return c.load.buf.b[c.loaded:c.load.length]
	case c.skip > 0:
		// Decoding went on until the buffer was empty, so all of it is free for what nobody wants.
		return c.in.b[:min(uint64(len(c.in.b)), c.skip)]
	}
	size := len(c.in.b)
	if c.filled && size < maxReadBuffer {
		size *= 4
	}
	size = max(size, c.need)
	if size > len(c.in.b) {
		b := c.srv.buffers.get(size)
		c.w = copy(b.b, c.in.b[c.r:c.w])
		c.srv.buffers.put(c.in)
		c.in, c.r = b, 0
	} else if c.r > 0 {
		// At most one incomplete request is moved.
		c.w = copy(c.in.b, c.in.b[c.r:c.w])
		c.r = 0
	}
	end := len(c.in.b)
	if c.need <= c.window {
		end = min(end, c.w+c.window)
	}
	return c.in.b[c.w:end]
}

// got takes note of n bytes that came to where space pointed, and does everything that can be done with them.
func (c *conn) got(n int) error {
	switch {
	case c.load != nil:
		c.loaded += n
		if c.loaded == int(c.load.length) {
			r := c.load
			c.load = nil
			c.begin(r)
			c.sendBatch()
		}
		return nil
	case c.skip > 0:
		c.skip -= uint64(n)
		if c.skip == 0 {
			c.replyError(c.skipped, c.why)
			c.sendBatch()
		}
		return nil
	}
	c.w += n
	c.filled = c.w == len(c.in.b)
	return c.decode()
}

// idle is called when nothing came for a while: the connection gives up most of its memory.
func (c *conn) idle() {
	if c.load != nil || c.skip > 0 || c.r != c.w {
		return
	}
	b := &c.srv.buffers
	b.put(c.out)
	c.out = nil
	if len(c.in.b) > minReadBuffer {
		b.put(c.in)
		c.in = b.get(minReadBuffer)
	}
	c.r, c.w, c.filled = 0, 0, false
}

// readLoop feeds the stream to got until the connection ends.
func (c *conn) readLoop() error {
	if done, err := c.readRaw(); done {
		return err
	}
	for {
		if err := c.armLoad(); err != nil {
			return err
		}
		n, err := c.nc.Read(c.space())
		if n > 0 {
			if err := c.got(n); err != nil {
				return err
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && c.ended() == nil {
			err = c.overdue()
		}
		if err != nil {
			return c.streamError(err)
		}
		if err := c.ended(); err != nil {
			return err
		}
	}
}

// armLoad makes sure that the wait for a large payload ends. The deadline may outlive the payload.
func (c *conn) armLoad() error {
	if c.load == nil || c.loadBy.Equal(c.readBy) {
		return nil
	}
	c.readBy = c.loadBy
	if err := c.sock.SetReadDeadline(c.loadBy); err != nil {
		return err
	}
	return c.ended()
}

// overdue is called when the read deadline has passed, which is no drain's. It fails if it was a payload's that has still
// not come, and sets the deadline that counts now.
func (c *conn) overdue() error {
	c.readBy = time.Time{}
	if c.load != nil {
		c.readBy = c.loadBy
	}
	if !c.readBy.IsZero() && !time.Now().Before(c.readBy) {
		return fmt.Errorf("payload of a write of %d bytes did not come: %w", c.load.length, os.ErrDeadlineExceeded)
	}
	return c.sock.SetReadDeadline(c.readBy)
}

// streamError explains the end of the stream: io.EOF is for one that ended between two requests.
func (c *conn) streamError(err error) error {
	if e := c.ended(); e != nil {
		return e
	}
	if err == io.EOF && (c.load != nil || c.skip > 0 || c.r != c.w) {
		return io.ErrUnexpectedEOF
	}
	return err
}
