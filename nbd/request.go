package nbd

import (
	"errors"
	"fmt"
	"time"

	"github.com/droverproject/drover/block"
)

// request is a request in the hands of a worker and then its reply on the way out. A batch of the reader's replies that
// found another goroutine sending takes the same way, without a slot.
type request struct {
	header
	buf   *buffer  // payload of the request or of the reply
	heads []byte   // headers of the reply
	vecs  [][]byte // the reply: pieces of heads and buf
	cost  int64    // bytes charged to the connection's flow
	slot  bool     // counts as in flight
	runs  []run    // of a sparse read
}

// run is a part of a read: data, or known to be zero.
type run struct {
	off  int64
	n    int
	zero bool
}

func (s *Server) newRequest() *request {
	if r, ok := s.reqs.Get().(*request); ok {
		return r
	}
	return &request{heads: make([]byte, 0, 2*maxChunkHead)}
}

// charge adds to the bytes in flight without waiting.
func (c *conn) charge(cost int64) {
	c.flow.Lock()
	c.flow.bytes += cost
	c.flow.Unlock()
}

// acquire waits until a request of that cost may be in flight. A request that costs more than the bound is let in when
// it is alone. What the reader has to say is said before it waits, since the client may wait for it.
//
// Then it waits for its share of what all connections have together.
func (c *conn) acquire(cost int64) error {
	modest := c.acquireOwn(cost)
	if cost == 0 {
		return nil
	}
	if err := c.share(cost, modest); err != nil {
		c.flow.Lock()
		c.flow.inflight--
		c.flow.bytes -= cost
		c.flow.Unlock()
		return err
	}
	return nil
}

// acquireOwn waits until the connection's own bounds allow a request of that cost, and reports whether all that it holds
// is no more than what is guaranteed.
func (c *conn) acquireOwn(cost int64) (modest bool) {
	c.flow.Lock()
	defer c.flow.Unlock()
	if c.full(cost) {
		c.flow.Unlock()
		c.sendBatch()
		c.flow.Lock()
	}
	for c.full(cost) {
		c.flow.room.Wait()
	}
	c.flow.inflight++
	c.flow.bytes += cost
	return c.flow.bytes <= guaranteed
}

// full reports whether a request of that cost has to wait; flow is locked.
func (c *conn) full(cost int64) bool {
	return c.flow.inflight >= c.srv.opts.MaxInflight ||
		c.flow.bytes > 0 && c.flow.bytes+cost > c.srv.opts.MaxMemory
}

// waitForRoom waits until no more is in flight than the bounds allow, which queued batches may have exceeded. While all
// connections together hold too much, each waits for itself to get down to what is guaranteed. A payload that is coming in
// does not count: only the reader can bring it to its end.
func (c *conn) waitForRoom() {
	var coming int64
	if c.load != nil {
		coming = c.load.cost
	}
	c.flow.Lock()
	for c.flow.bytes-coming > c.srv.opts.MaxMemory || c.flow.bytes-coming > guaranteed && c.overdrawn() {
		c.flow.room.Wait()
	}
	c.flow.Unlock()
}

// finish releases what a request held, after its reply was sent or given up.
func (c *conn) finish(r *request) {
	c.flow.Lock()
	c.flow.bytes -= r.cost
	if r.slot {
		c.flow.inflight--
	}
	c.flow.room.Signal()
	c.flow.Unlock()
	c.unshare(r.cost)
	c.srv.buffers.put(r.buf)
	clear(r.vecs)
	*r = request{heads: r.heads[:0], vecs: r.vecs[:0], runs: r.runs[:0]}
	c.srv.reqs.Put(r)
}

// decode serves every complete request in the read buffer and sends the replies that were made in place.
func (c *conn) decode() error {
	err := c.decodeAll()
	c.sendBatch()
	if err == nil {
		c.waitForRoom()
	}
	return err
}

func (c *conn) decodeAll() error {
	size := c.mode.requestSize()
	for {
		p := c.in.b[c.r:c.w]
		c.need = size
		if len(p) < size {
			return nil
		}
		h, ok := parseHeader(c.mode, p)
		if !ok {
			return fmt.Errorf("%w: request with magic %#x", ErrProtocol, p[:4])
		}
		payload := h.payload(c.mode)
		if payload > inPlaceMax {
			c.window = bulkWindow
			c.r += size
			if err := c.largePayload(h, payload); err != nil {
				return err
			}
			continue
		}
		c.need = size + int(payload)
		if len(p) < c.need {
			return nil
		}
		c.window = maxReadBuffer
		c.r += c.need
		if err := c.handle(h, p[size:c.need]); err != nil {
			return err
		}
	}
}

// largePayload takes what is there of a payload that is too long to be served from the read buffer, and leaves the rest
// to got.
func (c *conn) largePayload(h header, payload uint64) error {
	c.ops[kindOf(h.cmd)].Add(1)
	there := c.in.b[c.r:c.w]
	there = there[:min(uint64(len(there)), payload)]
	c.r += len(there)
	if e := c.check(h); e != 0 {
		if payload > 2*uint64(c.srv.opts.MaxRequest) {
			return fmt.Errorf("%w: %v request with %d bytes of payload", ErrProtocol, h.cmd, payload)
		}
		c.skip, c.skipped, c.why = payload-uint64(len(there)), h, e
		if c.skip == 0 {
			c.replyError(h, e)
		}
		return nil
	}
	r, err := c.accept(h)
	if err != nil {
		return err
	}
	r.buf = c.srv.buffers.get(int(payload))
	c.loaded = copy(r.buf.b, there)
	if c.loaded == int(payload) {
		c.begin(r)
		return nil
	}
	c.load = r
	if limit := c.srv.opts.StallTimeout; limit > 0 {
		c.loadBy = time.Now().Add(limit * time.Duration(1+payload/progress))
	}
	return nil
}

// check returns the error of a request that no device needs to be asked about.
func (c *conn) check(h header) errno {
	if h.cmd != CmdWrite && h.payload(c.mode) > 0 {
		return errnoINVAL // no command but WRITE has a payload here
	}
	valid := cmdFUA // meaningless with most commands, and then ignored, but never wrong
	past := errnoINVAL
	changes := false
	switch h.cmd {
	case CmdRead:
		valid |= cmdDF
	case CmdWrite:
		past, changes = errnoNOSPC, true
		if c.mode == modeExtended {
			valid |= cmdPayloadLen
		}
	case CmdWriteZeroes:
		past, changes = errnoNOSPC, true
		valid |= cmdNoHole | cmdFastZero
	case CmdTrim:
		changes = true
	case CmdCache:
	case CmdBlockStatus:
		valid |= cmdReqOne
		if len(c.contexts) == 0 || h.length == 0 {
			return errnoINVAL
		}
	case CmdFlush:
		if h.flags&^valid != 0 {
			return errnoINVAL
		}
		return 0 // its range means nothing
	default:
		return errnoINVAL
	}
	switch {
	case changes && c.exp.ReadOnly:
		return errnoPERM
	case h.flags&^valid != 0 || h.flags&cmdDF != 0 && c.mode == modeSimple:
		return errnoINVAL
	case (h.cmd == CmdRead || h.cmd == CmdWrite) && h.length > uint64(c.srv.opts.MaxRequest):
		return errnoINVAL
	case h.off > uint64(c.size.Load()) || h.length > uint64(c.size.Load())-h.off:
		return past
	}
	return 0
}

// handle serves a request whose payload, if any, is in the read buffer.
func (c *conn) handle(h header, payload []byte) error {
	if h.cmd == CmdDisconnect {
		return errDisconnect
	}
	c.ops[kindOf(h.cmd)].Add(1)
	if e := c.check(h); e != 0 {
		c.replyError(h, e)
		return nil
	}
	if c.pointless(h) {
		return nil
	}
	if try := c.exp.try; try != nil {
		switch {
		case h.cmd == CmdRead && h.length-1 < inPlaceMax: // zero bytes wrap round: they are a worker's
			if c.readInPlace(try, h) {
				return nil
			}
		case h.cmd == CmdWrite && h.flags&cmdFUA == 0:
			if c.writeInPlace(try, h, payload) {
				return nil
			}
		}
	}
	r, err := c.accept(h)
	if err != nil {
		return err
	}
	if h.cmd == CmdWrite {
		r.buf = c.srv.buffers.get(len(payload))
		copy(r.buf.b, payload)
	}
	if h.length > inPlaceMax {
		c.begin(r)
	} else {
		c.dispatch(r) // it has been tried
	}
	return nil
}

// begin serves a request that is too long for a batch: in place if that can be done at once, otherwise by a worker.
func (c *conn) begin(r *request) {
	if r.cmd == CmdRead {
		c.makeRoom()
	}
	if r.length <= bulkMax && (r.cmd == CmdRead && c.readBulk(r) || r.cmd == CmdWrite && c.writeBulk(r)) {
		return
	}
	c.dispatch(r)
}

// readBulk answers a long read if the device has the bytes at hand, and either all are to be sent or none.
func (c *conn) readBulk(r *request) bool {
	if c.cold > 0 {
		c.cold--
		return false
	}
	if c.exp.try == nil || c.pointless(r.header) {
		return false
	}
	r.buf = c.srv.buffers.get(int(r.length))
	var err error
	switch {
	case c.mode == modeSimple || r.flags&cmdDF != 0:
		err = c.exp.try.TryReadAt(r.payload(), int64(r.off))
	case c.exp.data != nil:
		err = c.exp.data.TryReadDataAt(r.payload(), int64(r.off))
	default:
		err = block.ErrWouldBlock
	}
	switch {
	case err == nil:
		c.readDone(r)
		c.send(r)
		return true
	case errors.Is(err, block.ErrMixed) && c.readMixed(r):
		c.send(r)
		return true
	case errors.Is(err, block.ErrAllZero):
		c.bytesRead.Add(r.length)
		c.commit(appendHole(c.reserve(maxChunkHead), c.mode, r.header, chunkDone, r.off, uint32(r.length)))
		c.finish(r)
		return true
	}
	c.srv.buffers.put(r.buf)
	r.buf = nil
	c.cold = coldReads
	return false // a worker meets it, too, if it is an error
}

// readMixed fills the reply of a long read of data and zeroes, if the data is at hand. The device has just looked up where is
// what, so asking it again takes no wait worth a change of goroutine.
func (c *conn) readMixed(r *request) bool {
	if c.findHoles(r) == nil && c.readSparse(r, c.exp.try.TryReadAt) == nil {
		return true
	}
	clear(r.vecs)
	r.vecs, r.heads, r.runs = r.vecs[:0], r.heads[:0], r.runs[:0]
	return false
}

// readDone makes the reply of a read whose bytes are in r.buf.
func (c *conn) readDone(r *request) {
	c.bytesRead.Add(r.length)
	r.heads = appendReadHead(r.heads[:0], c.mode, r.header)
	r.vecs = append(r.vecs, r.heads, r.payload())
}

// writeBulk serves a long write if the device can take the bytes at once.
func (c *conn) writeBulk(r *request) bool {
	if c.exp.try == nil || r.flags&cmdFUA != 0 || c.exp.try.TryWriteAt(r.payload(), int64(r.off)) != nil {
		return false // a worker meets an error, too
	}
	c.bytesWritten.Add(r.length)
	c.commit(appendSuccess(c.reserve(maxChunkHead), c.mode, r.header))
	c.finish(r)
	return true
}

// readInPlace answers a read if the device has the bytes at hand.
func (c *conn) readInPlace(try block.TryDevice, h header) bool {
	n := int(h.length)
	batch := c.reserve(maxChunkHead + n)
	p := appendReadHead(batch, c.mode, h)
	head := len(p)
	p = p[:head+n]
	err := try.TryReadAt(p[head:], int64(h.off))
	switch {
	case err == nil:
		c.bytesRead.Add(h.length)
		c.commit(p)
	case wouldBlock(err):
		return false
	default:
		c.failed(h, err)
		c.replyError(h, deviceErrno(h.cmd, err))
	}
	return true
}

// writeInPlace serves a write if the device can take the bytes at once.
func (c *conn) writeInPlace(try block.TryDevice, h header, payload []byte) bool {
	err := try.TryWriteAt(payload, int64(h.off))
	switch {
	case err == nil:
		c.bytesWritten.Add(h.length)
		c.commit(appendSuccess(c.reserve(maxChunkHead), c.mode, h))
	case wouldBlock(err):
		return false
	default:
		c.failed(h, err)
		c.replyError(h, deviceErrno(h.cmd, err))
	}
	return true
}

// pointless reports whether a request has no effect but an answer, and nobody is there any more to take it: a client that
// asked for much and went must not keep the device busy. What changes something is done all the same.
func (c *conn) pointless(h header) bool {
	if !c.broken.Load() {
		return false
	}
	return h.cmd == CmdRead || h.cmd == CmdCache || h.cmd == CmdBlockStatus
}

func wouldBlock(err error) bool {
	return err == block.ErrWouldBlock || errors.Is(err, block.ErrWouldBlock)
}

func (c *conn) failed(h header, err error) {
	c.errors.Add(1)
	if f := c.srv.opts.Observer.RequestFailed; f != nil {
		f(c.describe(), h.cmd, h.off, h.length, err)
	}
}

// accept makes a request for a worker, once there is room for it. It fails only when the connection is cut off first.
func (c *conn) accept(h header) (*request, error) {
	// A block status for many contexts may cost more than there is; it counts for all there is then.
	cost := min(c.cost(h), c.client.memory.limit)
	if err := c.acquire(cost); err != nil {
		return nil, err
	}
	r := c.srv.newRequest()
	r.header, r.cost, r.slot = h, cost, true
	return r, nil
}

// cost is the memory that a request occupies.
func (c *conn) cost(h header) int64 {
	switch h.cmd {
	case CmdRead, CmdWrite:
		return bufferSize(int(h.length))
	case CmdCache:
		return cacheChunk
	case CmdBlockStatus:
		return int64(c.maxRuns(h)) * int64(c.runSize()) * int64(len(c.contexts))
	}
	return 0
}

// dispatch hands a request to a worker. There is always one: each that is busy works on a request that holds a slot, but
// for one that may be sending the last replies of others.
func (c *conn) dispatch(r *request) {
	select {
	case c.work <- r:
	default:
		c.workers.Add(1)
		go c.worker(r)
	}
}

// worker serves r and then whatever comes, until the connection ends or there are enough idle workers.
func (c *conn) worker(r *request) {
	defer c.workers.Done()
	for {
		c.serve(r)
		if c.idlers.Add(1) > maxIdleWorkers {
			c.idlers.Add(-1)
			return
		}
		var ok bool
		r, ok = <-c.work
		c.idlers.Add(-1)
		if !ok {
			return
		}
	}
}
