package client

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/wire"
)

const (
	readBuffer = 64 << 10
	// maxInflight bounds the requests that wait for answers on one connection.
	maxInflight = 64
	// maxRuns bounds how many runs of a block status reply are kept; further ones are asked for again.
	maxRuns = 4096
	// maxStatusReply bounds a block status reply.
	maxStatusReply = 4 + 8*(1<<20)
)

// run is a part of an export in one state.
type run struct {
	length, state uint32
}

// request is a request under way. Its replies are read by the connection's reader alone, until done is sent to.
type request struct {
	cmd    nbd.Command
	flags  wire.CmdFlags
	off    int64
	n      int64
	bufs   [][]byte // read into, or written from
	runs   []run    // of a block status
	failed error
	filled int64 // bytes of a read that have come
	status bool  // the runs have come
	done   chan error
}

// reset makes the request ready to be sent again.
func (r *request) reset() { r.runs, r.failed, r.filled, r.status = r.runs[:0], nil, 0, false }

// conn is a connection in transmission.
type conn struct {
	nc         net.Conn
	r          *bufio.Reader
	structured bool
	context    uint32 // number of the metadata context in use
	hasContext bool

	slots chan struct{} // one for each request that may be under way

	writeMu sync.Mutex
	head    [wire.RequestSize]byte
	vec     net.Buffers

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]*request
	lost    error // why the connection is of no more use
	ended   chan struct{}
}

func newConn(h *handshake) *conn {
	c := &conn{
		nc: h.nc, r: h.r, structured: h.structured, slots: make(chan struct{}, maxInflight),
		waiting: make(map[uint64]*request), ended: make(chan struct{}),
	}
	return c
}

// start lets the connection serve requests.
func (c *conn) start() error {
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return err
	}
	go c.receive()
	return nil
}

// do sends a request and waits for its answer. It returns an error that wraps ErrLost if no answer will come.
func (c *conn) do(r *request) error {
	c.slots <- struct{}{}
	defer func() { <-c.slots }()
	r.reset()
	cookie, err := c.register(r)
	if err != nil {
		return err
	}
	if err := c.send(cookie, r); err != nil {
		// The receiver answers all that wait, so that nobody touches their buffers afterwards.
		_ = c.nc.Close()
	}
	return <-r.done
}

// alive reports whether requests may be sent, as far as is known.
func (c *conn) alive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost == nil
}

func (c *conn) register(r *request) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lost != nil {
		return 0, c.lost
	}
	c.next++
	c.waiting[c.next] = r
	return c.next, nil
}

func (c *conn) send(cookie uint64, r *request) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	p := c.head[:]
	binary.BigEndian.PutUint32(p, wire.MagicRequest)
	binary.BigEndian.PutUint16(p[4:], uint16(r.flags))
	binary.BigEndian.PutUint16(p[6:], uint16(r.cmd))
	binary.BigEndian.PutUint64(p[8:], cookie)
	binary.BigEndian.PutUint64(p[16:], uint64(r.off))
	binary.BigEndian.PutUint32(p[24:], uint32(r.n))
	if r.cmd != nbd.CmdWrite {
		_, err := c.nc.Write(p)
		return err
	}
	vec := append(append(c.vec[:0], p), r.bufs...)
	c.vec = vec[:0]
	_, err := vec.WriteTo(c.nc)
	clear(c.vec[:cap(c.vec)])
	return err
}

// receive reads replies until the connection ends, and then answers whoever still waits.
func (c *conn) receive() {
	defer close(c.ended)
	var err error
	for err == nil {
		err = c.reply()
	}
	_ = c.nc.Close()
	c.mu.Lock()
	c.lost = fmt.Errorf("%w: %w", ErrLost, eof(err))
	waiting := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	for _, r := range waiting {
		r.done <- c.lost
	}
}

// find returns the request that a reply is for.
func (c *conn) find(cookie uint64) (*request, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.waiting[cookie]
	if r == nil {
		return nil, violation("reply to a request that was not made")
	}
	return r, nil
}

// finish answers a request.
func (c *conn) finish(cookie uint64, r *request) {
	c.mu.Lock()
	delete(c.waiting, cookie)
	c.mu.Unlock()
	r.done <- r.failed
}

// reply reads one simple reply or one chunk of a structured one.
func (c *conn) reply() error {
	var p [wire.StructuredSize]byte
	if _, err := io.ReadFull(c.r, p[:4]); err != nil {
		return err
	}
	switch magic := binary.BigEndian.Uint32(p[:]); {
	case magic == wire.MagicSimple:
		if _, err := io.ReadFull(c.r, p[4:wire.SimpleSize]); err != nil {
			return eof(err)
		}
		return c.simple(binary.BigEndian.Uint32(p[4:]), binary.BigEndian.Uint64(p[8:]))
	case magic == wire.MagicStructured && c.structured:
		if _, err := io.ReadFull(c.r, p[4:]); err != nil {
			return eof(err)
		}
		k := chunk{
			flags: binary.BigEndian.Uint16(p[4:]), kind: binary.BigEndian.Uint16(p[6:]),
			cookie: binary.BigEndian.Uint64(p[8:]), n: binary.BigEndian.Uint32(p[16:]),
		}
		return c.chunk(k)
	default:
		return violation("reply with magic %#x", magic)
	}
}

func (c *conn) simple(number uint32, cookie uint64) error {
	r, err := c.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case number != 0:
		r.failed = serverError(number, "")
	case r.cmd == nbd.CmdBlockStatus || r.cmd == nbd.CmdRead && c.structured:
		return violation("simple reply to %v", r.cmd)
	case r.cmd == nbd.CmdRead:
		if err := c.fill(r, 0, r.n); err != nil {
			return err
		}
	}
	c.finish(cookie, r)
	return nil
}

// chunk is the header of a chunk.
type chunk struct {
	flags, kind uint16
	cookie      uint64
	n           uint32
}

func (c *conn) chunk(k chunk) error {
	r, err := c.find(k.cookie)
	if err != nil {
		return err
	}
	switch {
	case k.kind == wire.ChunkNone:
		if k.n != 0 || k.flags&wire.ChunkDone == 0 {
			return violation("empty chunk of %d bytes that is not the last", k.n)
		}
	case k.kind == wire.ChunkData && r.cmd == nbd.CmdRead:
		err = c.data(r, k)
	case k.kind == wire.ChunkHole && r.cmd == nbd.CmdRead:
		err = c.hole(r, k)
	case k.kind == wire.ChunkStatus && r.cmd == nbd.CmdBlockStatus:
		err = c.status(r, k)
	case k.kind&(1<<15) != 0:
		err = c.failure(r, k)
	default:
		return violation("chunk of type %d in reply to %v", k.kind, r.cmd)
	}
	if err != nil || k.flags&wire.ChunkDone == 0 {
		return err
	}
	if r.failed == nil {
		switch {
		case r.cmd == nbd.CmdRead && r.filled != r.n:
			return violation("reply to READ of %d bytes holds %d", r.n, r.filled)
		case r.cmd == nbd.CmdBlockStatus && !r.status:
			return violation("reply to BLOCK_STATUS says nothing")
		}
	}
	c.finish(k.cookie, r)
	return nil
}

// part checks that a chunk lies in what a read asked for, and returns where.
func (r *request) part(off uint64, n int64) (int64, error) {
	at := int64(off) - r.off
	if off > 1<<63-1 || at < 0 || n <= 0 || n > r.n-at {
		return 0, violation("chunk of %d bytes at %d in reply to READ of %d bytes at %d", n, off, r.n, r.off)
	}
	if r.filled += n; r.filled > r.n { // or a server could send the same part for ever
		return 0, violation("chunks of a reply overlap")
	}
	return at, nil
}

func (c *conn) data(r *request, k chunk) error {
	var p [8]byte
	if k.n <= 8 {
		return violation("data chunk of %d bytes", k.n)
	}
	if _, err := io.ReadFull(c.r, p[:]); err != nil {
		return eof(err)
	}
	n := int64(k.n - 8)
	at, err := r.part(binary.BigEndian.Uint64(p[:]), n)
	if err != nil {
		return err
	}
	return c.fill(r, at, n)
}

// fill reads n bytes from the server into the buffers of a request, at bytes behind their begin.
func (c *conn) fill(r *request, at, n int64) error {
	return eachPart(r.bufs, at, n, func(p []byte) error {
		_, err := io.ReadFull(c.r, p)
		return eof(err)
	})
}

// eachPart calls fn for the parts of bufs that hold n bytes, at bytes behind their begin.
func eachPart(bufs [][]byte, at, n int64, fn func([]byte) error) error {
	for _, b := range bufs {
		if at >= int64(len(b)) {
			at -= int64(len(b))
			continue
		}
		part := b[at:min(int64(len(b)), at+n)]
		if err := fn(part); err != nil {
			return err
		}
		at = 0
		if n -= int64(len(part)); n == 0 {
			return nil
		}
	}
	return nil
}

func (c *conn) hole(r *request, k chunk) error {
	var p [12]byte
	if k.n != uint32(len(p)) {
		return violation("hole chunk of %d bytes", k.n)
	}
	if _, err := io.ReadFull(c.r, p[:]); err != nil {
		return eof(err)
	}
	n := int64(binary.BigEndian.Uint32(p[8:]))
	at, err := r.part(binary.BigEndian.Uint64(p[:]), n)
	if err != nil {
		return err
	}
	return eachPart(r.bufs, at, n, func(p []byte) error { clear(p); return nil })
}

// status reads a chunk of block status. Runs beyond what is kept are read and dropped.
func (c *conn) status(r *request, k chunk) error {
	if k.n < 12 || k.n > maxStatusReply || (k.n-4)%8 != 0 {
		return violation("block status chunk of %d bytes", k.n)
	}
	var p [8]byte
	if _, err := io.ReadFull(c.r, p[:4]); err != nil {
		return eof(err)
	}
	if id := binary.BigEndian.Uint32(p[:]); !c.hasContext || id != c.context {
		return violation("block status of context %d, which was not asked for", id)
	}
	if r.status {
		return violation("several block status chunks for one context")
	}
	r.status = true
	total := int64(0)
	for range (k.n - 4) / 8 {
		if _, err := io.ReadFull(c.r, p[:]); err != nil {
			return eof(err)
		}
		x := run{binary.BigEndian.Uint32(p[:]), binary.BigEndian.Uint32(p[4:])}
		if x.length == 0 {
			return violation("block status run without length")
		}
		if len(r.runs) < maxRuns && total < r.n {
			x.length = uint32(min(int64(x.length), r.n-total)) // the last run may be longer than asked for
			total += int64(x.length)
			r.runs = append(r.runs, x)
		}
	}
	return nil
}

// failure reads a chunk that says that something went wrong. What it is, and where, can be more than is known here.
func (c *conn) failure(r *request, k chunk) error {
	if k.n < 6 || k.n > 6+8+wire.MaxString {
		return violation("error chunk of %d bytes", k.n)
	}
	p := make([]byte, k.n)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return eof(err)
	}
	number, n := binary.BigEndian.Uint32(p), int(binary.BigEndian.Uint16(p[4:]))
	if number == 0 || n > len(p)-6 {
		return violation("error chunk with number %d and a message of %d bytes", number, n)
	}
	if r.failed == nil {
		r.failed = serverError(number, printable(p[6:6+n]))
	}
	return nil
}

// close says goodbye and waits until nobody reads from the connection any more.
func (c *conn) close() error {
	r := &request{cmd: nbd.CmdDisconnect}
	_ = c.nc.SetWriteDeadline(time.Now().Add(goodbye))
	_ = c.send(0, r) // the server may be gone, or stuck
	err := c.nc.Close()
	<-c.ended
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// goodbye is how long the last word may take.
const goodbye = time.Second

// transmission makes a connection ready for requests.
func (h *handshake) transmission(ctx context.Context, o *Options) (*conn, *Export, error) {
	stop := context.AfterFunc(ctx, func() { _ = h.nc.SetDeadline(time.Unix(1, 0)) })
	c, e, err := h.negotiate(o)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = c.start()
	}
	if err != nil {
		_ = h.abort() // why it did not come to anything is known
		return nil, nil, err
	}
	return c, e, nil
}

func (h *handshake) negotiate(o *Options) (*conn, *Export, error) {
	c := newConn(h)
	if h.old == nil {
		if err := h.wantStructured(); err != nil {
			return nil, nil, err
		}
		c.structured = h.structured
	}
	wanted := contextAllocation
	if o.Context != "" {
		wanted = o.Context
	}
	if h.structured {
		found, err := h.meta(wire.OptSetMeta, o.Export, wanted)
		var refusal *optionError
		switch {
		case errors.As(err, &refusal) && refusal.kind != wire.RepErrTLSRequired && refusal.kind != wire.RepErrUnknown:
		case err != nil:
			return nil, nil, err
		case len(found) > 1 || len(found) == 1 && found[0].name != wanted:
			return nil, nil, violation("server selects contexts that were not asked for")
		case len(found) == 1:
			c.context, c.hasContext = found[0].id, true
		}
	}
	if o.Context != "" && !c.hasContext {
		return nil, nil, fmt.Errorf("requested x-dirty-bitmap %s not found", o.Context)
	}
	e, err := h.enter(o.Export)
	return c, e, err
}

const contextAllocation = "base:allocation"
