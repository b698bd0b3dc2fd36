package nbd

import (
	"github.com/droverproject/drover/block"
)

const (
	// sparseMin is the shortest read that the device is asked about holes for, and holeMin the shortest hole that is
	// worth a chunk of its own.
	sparseMin = 64 << 10
	holeMin   = 4 << 10
	// maxReadRuns bounds the chunks of one read.
	maxReadRuns = 64
	// cacheChunk is how much CACHE reads at a time.
	cacheChunk = 256 << 10
)

// serve does what a request asks for and sends the reply.
func (c *conn) serve(r *request) {
	if c.pointless(r.header) {
		c.send(r) // which only gives back what it holds
		return
	}
	err := c.do(r)
	if err != nil {
		c.failed(r.header, err)
		clear(r.vecs)
		p := appendError(r.heads[:0], c.mode, r.header, deviceErrno(r.cmd, err))
		r.heads, r.vecs = p, append(r.vecs[:0], p)
	}
	c.send(r)
}

// do calls the device and leaves the reply of a success in r.vecs.
func (c *conn) do(r *request) error {
	var err error
	dev, off, n := c.exp.Device, int64(r.off), int64(r.length)
	switch r.cmd {
	case CmdRead:
		return c.read(r)
	case CmdBlockStatus:
		return c.blockStatus(r)
	case CmdWrite:
		var flags block.WriteFlags
		if r.flags&cmdFUA != 0 {
			flags |= block.WriteFUA
		}
		if err = dev.WriteAt(c.ctx, r.payload(), off, flags); err == nil {
			c.bytesWritten.Add(r.length)
		}
	case CmdFlush:
		err = dev.Flush(c.ctx)
	case CmdTrim:
		err = dev.Discard(c.ctx, off, n)
		if err == nil && r.flags&cmdFUA != 0 {
			err = dev.Flush(c.ctx)
		}
	case CmdWriteZeroes:
		err = dev.WriteZeroes(c.ctx, off, n, zeroFlags(r.flags))
	case CmdCache:
		err = c.prefetch(off, n)
	}
	if err != nil {
		return err
	}
	c.succeed(r)
	return nil
}

// payload is the data of a read or write.
func (r *request) payload() []byte {
	if r.length == 0 {
		return nil
	}
	return r.buf.b[:r.length]
}

// succeed makes the reply that says that all is well.
func (c *conn) succeed(r *request) {
	r.heads = appendSuccess(r.heads[:0], c.mode, r.header)
	r.vecs = append(r.vecs, r.heads)
}

func zeroFlags(f cmdFlags) block.ZeroFlags {
	var flags block.ZeroFlags
	if f&cmdNoHole == 0 {
		flags |= block.ZeroUnmap
	}
	if f&cmdFastZero != 0 {
		flags |= block.ZeroFast
	}
	if f&cmdFUA != 0 {
		flags |= block.ZeroFUA
	}
	return flags
}

// prefetch reads a range for the sake of the caches below, as much of it as one request may read: CACHE is a hint.
func (c *conn) prefetch(off, n int64) error {
	end := off + min(n, int64(c.srv.opts.MaxRequest))
	b := c.srv.buffers.get(cacheChunk)
	defer c.srv.buffers.put(b)
	for off < end {
		p := b.b[:min(cacheChunk, end-off)]
		if err := c.exp.Device.ReadAt(c.ctx, p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// read fills the reply of a READ. A long one leaves out what is known to be zero, where the client can take that.
func (c *conn) read(r *request) error {
	if r.length == 0 {
		if c.mode == modeSimple {
			r.heads = appendSimple(r.heads[:0], 0, r.cookie)
		} else {
			r.heads = appendChunk(r.heads[:0], c.mode, r.header, chunkDone, chunkNone, 0)
		}
		r.vecs = append(r.vecs, r.heads)
		return nil
	}
	r.buf = c.srv.buffers.get(int(r.length))
	if c.mode != modeSimple && r.flags&cmdDF == 0 && r.length >= sparseMin {
		if err := c.findHoles(r); err != nil {
			return err
		}
		if len(r.runs) > 1 || len(r.runs) == 1 && r.runs[0].zero {
			return c.readSparse(r, func(p []byte, off int64) error { return c.exp.Device.ReadAt(c.ctx, p, off) })
		}
	}
	if err := c.exp.Device.ReadAt(c.ctx, r.payload(), int64(r.off)); err != nil {
		return err
	}
	c.readDone(r)
	return nil
}

// findHoles divides a read into runs of data and of zeroes. What is too small or too much to be told apart is data.
func (c *conn) findHoles(r *request) error {
	r.runs = r.runs[:0]
	end := int64(r.off + r.length)
	next := int64(r.off)
	add := func(until int64, zero bool) {
		last := len(r.runs) - 1
		if last >= 0 && r.runs[last].zero == zero {
			r.runs[last].n += int(until - next)
		} else {
			r.runs = append(r.runs, run{off: next, n: int(until - next), zero: zero})
		}
		next = until
	}
	err := c.exp.Device.Extents(c.ctx, int64(r.off), int64(r.length), func(e block.Extent) bool {
		until := min(e.End(), end)
		if until > next {
			add(until, e.Zero)
		}
		return next < end && len(r.runs) < maxReadRuns-1
	})
	if err != nil {
		return err
	}
	if next < end {
		add(end, false)
	}
	r.runs = joinSmall(r.runs)
	return nil
}

// joinSmall makes holes below holeMin part of the data around them.
func joinSmall(runs []run) []run {
	kept := runs[:0]
	for _, x := range runs {
		x.zero = x.zero && x.n >= holeMin
		if last := len(kept) - 1; last >= 0 && kept[last].zero == x.zero {
			kept[last].n += x.n
			continue
		}
		kept = append(kept, x)
	}
	return kept
}

// readSparse fills the reply of a READ that findHoles has divided.
func (c *conn) readSparse(r *request, read func(p []byte, off int64) error) error {
	// The pieces of heads in vecs must not move any more.
	if need := len(r.runs) * maxChunkHead; cap(r.heads) < need {
		r.heads = make([]byte, 0, need)
	}
	p := r.heads[:0]
	for i, x := range r.runs {
		var flags uint16
		if i == len(r.runs)-1 {
			flags = chunkDone
		}
		head := len(p)
		if x.zero {
			p = appendHole(p, c.mode, r.header, flags, uint64(x.off), uint32(x.n))
			r.vecs = append(r.vecs, p[head:])
			continue
		}
		at := x.off - int64(r.off)
		data := r.buf.b[at : at+int64(x.n)]
		if err := read(data, x.off); err != nil {
			return err
		}
		p = appendDataHead(p, c.mode, r.header, flags, uint64(x.off), x.n)
		r.vecs = append(r.vecs, p[head:], data)
	}
	r.heads = p
	c.bytesRead.Add(r.length)
	return nil
}
