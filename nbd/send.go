package nbd

import (
	"net"
	"os"
	"slices"
	"time"
)

// reserve makes room for n more bytes in the batch and returns the batch so far, to be appended to; commit takes it back.
func (c *conn) reserve(n int) []byte {
	if c.out != nil && c.outLen+n > len(c.out.b) {
		c.sendBatch()
	}
	if c.out == nil {
		c.out = c.srv.buffers.get(batchSize)
		c.outLen = 0
	}
	return c.out.b[:c.outLen]
}

// commit takes note of the batch that reserve's caller has appended to.
func (c *conn) commit(p []byte) { c.outLen = len(p) }

// replyError answers a request from the reader.
func (c *conn) replyError(h header, e errno) {
	c.commit(appendError(c.reserve(maxErrorReply), c.mode, h, e))
}

// maxErrorReply is more than an error reply ever takes.
const maxErrorReply = extReplySize + 6 + 64

// sendBatch sends the replies that the reader has collected, or leaves them to whoever is sending.
func (c *conn) sendBatch() {
	if c.outLen == 0 || c.out == nil {
		return
	}
	c.sends.Lock()
	if !c.sends.busy {
		c.sends.busy = true
		c.sends.Unlock()
		c.write(c.out.b[:c.outLen])
		c.outLen = 0
		c.sends.Lock()
		c.sendQueue()
		return
	}
	// The buffer goes with the queue. Its cost is charged without waiting, since nothing is lost by exceeding the bound
	// by one batch; the reader waits before it reads the next.
	r := c.srv.newRequest()
	r.buf, r.cost = c.out, int64(len(c.out.b))
	r.vecs = append(r.vecs, c.out.b[:c.outLen])
	c.charge(r.cost)
	c.client.memory.force(r.cost)
	c.srv.memory.force(r.cost)
	c.out, c.outLen = nil, 0
	c.sends.queue = append(c.sends.queue, r)
	c.sends.Unlock()
}

// send sends the reply of a worker's request, or leaves it to whoever is sending.
func (c *conn) send(r *request) {
	c.sends.Lock()
	c.sends.queue = append(c.sends.queue, r)
	if c.sends.busy {
		c.sends.Unlock()
		return
	}
	c.sends.busy = true
	c.sendQueue()
}

// sendQueue sends the queue until it is empty. The caller has set busy and locked sends, which is unlocked on return.
func (c *conn) sendQueue() {
	for len(c.sends.queue) > 0 {
		batch := c.sends.queue
		c.sends.queue = c.sends.spare[:0]
		c.sends.Unlock()

		c.writeAll(batch)
		for i, r := range batch {
			c.finish(r)
			batch[i] = nil
		}
		c.sends.Lock()
		c.sends.spare = batch
	}
	c.sends.busy = false
	c.sends.Unlock()
}

// progress is what a client has to take of its replies, or send of a large payload, within Options.StallTimeout: so a slow
// one is told from one that stands still. No more than this is handed to the socket at a time, give or take the headers of a
// long reply: a few bytes left over would be a send of their own.
const (
	progress  = 1 << 20
	someHeads = 4 << 10
)

// write sends p. Only the goroutine that set busy may call it.
func (c *conn) write(p []byte) {
	if c.broken.Load() {
		return
	}
	if err := c.push(p); err != nil {
		c.sendFailed(err)
	}
}

// push writes p, at most progress bytes of it.
func (c *conn) push(p []byte) error {
	if err := c.armWrite(); err != nil {
		return err
	}
	_, err := c.nc.Write(p)
	return err
}

// armWrite makes sure that the coming write ends. Moving the deadline for every write costs more than it is worth, so it
// is set a little later than needed and left alone for as long.
func (c *conn) armWrite() error {
	limit := c.srv.opts.StallTimeout
	if limit <= 0 {
		return nil
	}
	now := time.Now()
	if now.Sub(c.sends.armed) < limit/4 {
		return nil
	}
	c.sends.armed = now
	if err := c.sock.SetWriteDeadline(now.Add(limit + limit/4)); err != nil {
		return err
	}
	// Whoever cuts the connection off sets broken and then its own deadline, which may just have been overwritten.
	if c.broken.Load() {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// writeAll sends the replies of a batch with as few vectored writes as its length allows. Only the goroutine that set
// busy may call it.
func (c *conn) writeAll(batch []*request) {
	if len(batch) == 1 && len(batch[0].vecs) == 1 && len(batch[0].vecs[0]) <= progress+someHeads {
		c.write(batch[0].vecs[0])
		return
	}
	if c.broken.Load() {
		return
	}
	all := c.sends.vecs[:0]
	for _, r := range batch {
		all = append(all, r.vecs...)
	}
	var err error
	if c.peer.Encrypted {
		err = c.gather(all)
	} else {
		all, err = c.progresss(all)
	}
	clear(all)
	c.sends.vecs = all[:0]
	if err != nil {
		c.sendFailed(err)
	}
}

// progresss writes vecs, and returns the slice, which it may have had to enlarge, for the next time.
func (c *conn) progresss(vecs net.Buffers) (net.Buffers, error) {
	first, n := 0, 0
	for i := 0; i < len(vecs); i++ {
		if cut := progress - n; len(vecs[i]) > cut+someHeads {
			vecs = slices.Insert(vecs, i+1, vecs[i][cut:])
			vecs[i] = vecs[i][:cut]
		}
		n += len(vecs[i])
		if n < progress && i < len(vecs)-1 {
			continue
		}
		if err := c.armWrite(); err != nil {
			return vecs, err
		}
		// WriteTo consumes the slice it is called on.
		c.sends.piece = vecs[first : i+1]
		if _, err := c.sends.piece.WriteTo(c.nc); err != nil {
			return vecs, err
		}
		first, n = i+1, 0
	}
	return vecs, nil
}
