package client

//lint:file-ignore ST1005 some of these errors say what QEMU says

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/wire"
	"github.com/droverproject/drover/storage"
)

// maxPayload bounds what one request reads or writes, where the server does not say.
const maxPayload = 32 << 20

// maxExtent bounds what one request zeroes, discards or asks about: the protocol's lengths have 32 bits.
const maxExtent = 1 << 30

// retryPause is how long lies between two attempts to connect again.
const retryPause = 100 * time.Millisecond

// Options say how an export is opened.
type Options struct {
	Dialing
	Export   string
	ReadOnly bool
	// AutoReadOnly opens the export read-only if the server does not let it be written.
	AutoReadOnly bool
	// Context is asked for the state of the export in place of base:allocation: "qemu:dirty-bitmap:NAME",
	// "qemu:allocation-depth". Its lowest bit then counts as a hole.
	Context string
	// Connections is how many connections to open, if the server can serve several; 0 means one.
	Connections int
	// OpenTimeout is how long Open keeps trying to reach the server; 0 tries once.
	OpenTimeout time.Duration
	// ReconnectDelay is how long requests wait for a server that is lost; they are then sent again. 0 fails them at once.
	// Whatever it is, later requests try to connect again.
	ReconnectDelay time.Duration
}

// Client is an export that is open. It is a storage.File of fixed length.
type Client struct {
	o      Options
	export Export
	name   string
	align  int64        // the server's smallest block
	rmw    sync.RWMutex // held by writes of parts of such blocks alone
	turn   atomic.Uint64

	ctx    context.Context // ends when the client is closed
	cancel context.CancelFunc
	links  []*link
}

// link is one place for a connection.
type link struct {
	mu   sync.Mutex
	conn *conn
}

var (
	_ storage.File     = (*Client)(nil)
	_ block.StatusFile = (*Client)(nil)
	_ block.Discarder  = (*Client)(nil)
	_ block.FastZeroer = (*Client)(nil)
)

// Open connects to a server and opens an export. ctx bounds the opening only.
func Open(ctx context.Context, o Options) (*Client, error) {
	c, e, err := dialFor(ctx, &o, o.OpenTimeout)
	if err != nil {
		return nil, err
	}
	cl := &Client{o: o, export: *e, links: []*link{{conn: c}}, align: int64(max(e.MinBlock, 1))}
	cl.ctx, cl.cancel = context.WithCancel(context.Background())
	cl.name = Target{o.Address, o.Export, o.TLS != nil}.URI()
	if err := cl.check(); err != nil {
		return nil, errors.Join(err, cl.Close())
	}
	for len(cl.links) < o.Connections && e.Flags&wire.TxMultiConn != 0 {
		more, f, err := dialFor(ctx, &o, 0)
		if err == nil && (f.Size != e.Size || f.Flags != e.Flags) {
			err = errors.Join(violation("export differs between connections"), more.close())
		}
		if err != nil {
			return nil, errors.Join(err, cl.Close())
		}
		cl.links = append(cl.links, &link{conn: more})
	}
	return cl, nil
}

// check refuses an export that cannot be used as asked.
func (cl *Client) check() error {
	if cl.export.Size > math.MaxInt64-maxPayload {
		return fmt.Errorf("Export length is too big: %d bytes", cl.export.Size)
	}
	if cl.export.Flags&wire.TxReadOnly == 0 || cl.o.ReadOnly {
		return nil
	}
	if !cl.o.AutoReadOnly {
		return fmt.Errorf("request on write denied without write permission: %w", storage.ErrReadOnly)
	}
	cl.o.ReadOnly = true
	return nil
}

// dialFor connects, and tries again for as long as patience lasts if nobody is there.
func dialFor(ctx context.Context, o *Options, patience time.Duration) (*conn, *Export, error) {
	if patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	for {
		h, err := o.greet(ctx)
		if err == nil {
			return h.transmission(ctx, o)
		}
		var unreachable *ConnectError
		if patience <= 0 || !errors.As(err, &unreachable) {
			return nil, nil, err
		}
		select {
		case <-ctx.Done():
			return nil, nil, err
		case <-time.After(retryPause):
		}
	}
}

// Export returns what the server said of the export.
func (cl *Client) Export() Export { return cl.export }

// do has a request answered, over another connection if one is lost and may be waited for.
func (cl *Client) do(r *request) error {
	if r.done == nil {
		r.done = make(chan error, 1)
	}
	l := cl.links[0]
	if len(cl.links) > 1 {
		l = cl.links[cl.turn.Add(1)%uint64(len(cl.links))]
	}
	var deadline time.Time
	for {
		c, err := l.get(cl, deadline)
		if err == nil {
			err = c.do(r)
		}
		if !errors.Is(err, ErrLost) || cl.o.ReconnectDelay <= 0 {
			return err
		}
		if cl.ctx.Err() != nil {
			return ErrClosed
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(cl.o.ReconnectDelay)
		} else if time.Now().After(deadline) {
			return err
		}
	}
}

// get returns a connection, a new one if the last was lost. It tries until the deadline, at least once.
func (l *link) get(cl *Client, deadline time.Time) (*conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cl.ctx.Err() != nil {
		return nil, ErrClosed
	}
	if l.conn.alive() {
		return l.conn, nil
	}
	c, e, err := dialFor(cl.ctx, &cl.o, time.Until(deadline))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLost, err)
	}
	if e.Size != cl.export.Size || e.Flags&wire.TxReadOnly != 0 && !cl.o.ReadOnly || max(e.MinBlock, 1) != uint32(cl.align) {
		return nil, errors.Join(fmt.Errorf("%w: the export has changed", ErrLost), c.close())
	}
	l.conn = c
	return c, nil
}

// each cuts a range into requests of at most most bytes.
func each(off, n, most int64, fn func(off, n int64) error) error {
	for n > 0 {
		part := min(n, most)
		if err := fn(off, part); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

func (cl *Client) payload() int64 {
	if m := int64(cl.export.MaxBlock); m > 0 {
		return min(m, maxPayload)
	}
	return maxPayload
}

func (cl *Client) fail(doing string, off, n int64, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrLost) {
		err = errors.Join(err, syscall.EIO)
	}
	return fmt.Errorf("%s %d bytes at offset %d of %s: %w", doing, n, off, cl.name, err)
}

func (cl *Client) size() int64 { return int64(cl.export.Size) }

// ReadAt implements storage.File.
func (cl *Client) ReadAt(p []byte, off int64) (int, error) { return cl.ReadVAt([][]byte{p}, off) }

// ReadVAt implements storage.File.
func (cl *Client) ReadVAt(bufs [][]byte, off int64) (int, error) {
	want := total(bufs)
	n := min(want, max(cl.size()-off, 0))
	if n > 0 {
		if err := cl.fail("reading", off, n, cl.read(cut(bufs, 0, n), off, n)); err != nil {
			return 0, err
		}
	}
	if n < want {
		return int(n), io.EOF
	}
	return int(n), nil
}

// read fills bufs, whose length is n.
func (cl *Client) read(bufs [][]byte, off, n int64) error {
	if off%cl.align != 0 || n%cl.align != 0 {
		start, end := cl.around(off, n)
		whole := make([]byte, end-start)
		if err := cl.read([][]byte{whole}, start, end-start); err != nil {
			return err
		}
		rest := whole[off-start:]
		for _, b := range bufs {
			rest = rest[copy(b, rest):]
		}
		return nil
	}
	if n <= cl.payload() {
		return cl.do(&request{cmd: nbd.CmdRead, off: off, n: n, bufs: bufs})
	}
	return each(off, n, cl.payload(), func(o, m int64) error {
		return cl.do(&request{cmd: nbd.CmdRead, off: o, n: m, bufs: cut(bufs, o-off, m)})
	})
}

// around returns the server's blocks that a range touches.
func (cl *Client) around(off, n int64) (start, end int64) {
	start = off &^ (cl.align - 1)
	end = (off + n + cl.align - 1) &^ (cl.align - 1)
	return start, min(end, cl.size())
}

func total(bufs [][]byte) int64 {
	n := int64(0)
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// cut returns the parts of bufs that hold n bytes, at bytes behind their begin.
func cut(bufs [][]byte, at, n int64) [][]byte {
	if at == 0 && n == total(bufs) {
		return bufs
	}
	var parts [][]byte
	_ = eachPart(bufs, at, n, func(p []byte) error { parts = append(parts, p); return nil })
	return parts
}

// WriteAt implements storage.File. The export does not grow: what would reach past its end fails whole.
func (cl *Client) WriteAt(p []byte, off int64) (int, error) { return cl.WriteVAt([][]byte{p}, off) }

// WriteVAt implements storage.File.
func (cl *Client) WriteVAt(bufs [][]byte, off int64) (int, error) {
	n := total(bufs)
	if n == 0 {
		return 0, nil
	}
	if err := cl.change("writing", off, n); err != nil {
		return 0, err
	}
	if err := cl.fail("writing", off, n, cl.write(bufs, off, n)); err != nil {
		return 0, err
	}
	return int(n), nil
}

// change refuses a change that cannot be.
func (cl *Client) change(doing string, off, n int64) error {
	switch {
	case cl.o.ReadOnly:
		return fmt.Errorf("%s %s: %w", doing, cl.name, storage.ErrReadOnly)
	case off < 0 || n < 0 || off > cl.size() || n > cl.size()-off:
		return cl.fail(doing, off, n, syscall.ENOSPC)
	}
	return nil
}

func (cl *Client) write(bufs [][]byte, off, n int64) error {
	if cl.align > 1 {
		if off%cl.align != 0 || n%cl.align != 0 && off+n != cl.size() {
			return cl.writePart(bufs, off, n)
		}
		cl.rmw.RLock()
		defer cl.rmw.RUnlock()
	}
	return cl.writeWhole(bufs, off, n)
}

// writePart writes a range that begins or ends inside one of the server's blocks.
func (cl *Client) writePart(bufs [][]byte, off, n int64) error {
	cl.rmw.Lock()
	defer cl.rmw.Unlock()
	start, end := cl.around(off, n)
	whole := make([]byte, end-start)
	if err := cl.read([][]byte{whole}, start, end-start); err != nil {
		return err
	}
	at := off - start
	for _, b := range bufs {
		at += int64(copy(whole[at:], b))
	}
	return cl.writeWhole([][]byte{whole}, start, end-start)
}

func (cl *Client) writeWhole(bufs [][]byte, off, n int64) error {
	if n <= cl.payload() {
		return cl.do(&request{cmd: nbd.CmdWrite, off: off, n: n, bufs: bufs})
	}
	return each(off, n, cl.payload(), func(o, m int64) error {
		return cl.do(&request{cmd: nbd.CmdWrite, off: o, n: m, bufs: cut(bufs, o-off, m)})
	})
}

// Sync implements storage.File. It covers the writes over all connections: a server that serves several promises that.
func (cl *Client) Sync() error {
	if cl.o.ReadOnly || cl.export.Flags&wire.TxFlush == 0 {
		return nil
	}
	return cl.fail("flushing", 0, cl.size(), cl.do(&request{cmd: nbd.CmdFlush}))
}

// Size implements storage.File.
func (cl *Client) Size() (int64, error) { return cl.size(), nil }

// growError is the refusal of an export to become longer.
type growError struct{}

// Error says what QEMU says.
func (growError) Error() string { return "Cannot grow NBD nodes" }

// Unwrap returns the kind of error.
func (growError) Unwrap() error { return storage.ErrNotSupported }

// Truncate implements storage.File: like a device, an export stays as long as it is, and holds what is shorter.
func (cl *Client) Truncate(size int64) error {
	if size <= cl.size() {
		return nil
	}
	return growError{}
}

// PunchHole implements storage.File.
func (cl *Client) PunchHole(off, n int64) error {
	return cl.zero(off, min(n, cl.size()-off), 0)
}

// ZeroRange implements storage.File.
func (cl *Client) ZeroRange(off, n int64) error {
	if err := cl.change("zeroing", off, n); err != nil {
		return err
	}
	return cl.zero(off, n, wire.CmdNoHole)
}

// ZeroFast zeroes if that is faster than writing, and else fails with block.ErrNoFastZero.
func (cl *Client) ZeroFast(off, n int64, unmap bool) error {
	if cl.export.Flags&wire.TxFastZeroes == 0 || !cl.aligned(off, n) {
		return block.ErrNoFastZero
	}
	flags := wire.CmdFastZero
	if !unmap {
		flags |= wire.CmdNoHole
	}
	err := cl.zero(off, n, flags)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return block.ErrNoFastZero
	}
	return err
}

func (cl *Client) aligned(off, n int64) bool {
	return off%cl.align == 0 && (n%cl.align == 0 || off+n == cl.size())
}

func (cl *Client) zero(off, n int64, flags wire.CmdFlags) error {
	if n <= 0 {
		return nil
	}
	if cl.o.ReadOnly {
		return fmt.Errorf("zeroing %s: %w", cl.name, storage.ErrReadOnly)
	}
	if cl.export.Flags&wire.TxZeroes == 0 || !cl.aligned(off, n) {
		return storage.ErrNotSupported
	}
	return cl.extent("zeroing", nbd.CmdWriteZeroes, flags, off, n)
}

// Discard implements block.Discarder.
func (cl *Client) Discard(off, n int64) error {
	if n = min(n, cl.size()-off); n <= 0 || cl.o.ReadOnly || cl.export.Flags&wire.TxTrim == 0 {
		return nil
	}
	start, end := (off+cl.align-1)&^(cl.align-1), (off+n)&^(cl.align-1)
	if off+n == cl.size() {
		end = off + n
	}
	if start >= end {
		return nil
	}
	return cl.extent("discarding", nbd.CmdTrim, 0, start, end-start)
}

// extent has a range changed without a payload.
func (cl *Client) extent(doing string, cmd nbd.Command, flags wire.CmdFlags, off, n int64) error {
	cl.rmw.RLock()
	defer cl.rmw.RUnlock()
	err := each(off, n, maxExtent, func(off, n int64) error {
		return cl.do(&request{cmd: cmd, flags: flags, off: off, n: n})
	})
	return cl.fail(doing, off, n, err)
}

// Preallocate implements storage.File.
func (cl *Client) Preallocate(off, n int64) error {
	if err := cl.change("preallocating", off, n); err != nil {
		return err
	}
	return storage.ErrNotSupported
}

// NextExtent implements storage.File. What is a hole there may hold anything: only zeroes are a hole here.
func (cl *Client) NextExtent(off int64) (end int64, data bool, err error) {
	end, data, zero, err := cl.NextStatus(off)
	return end, data || !zero || cl.o.Context != "", err
}

// NextStatus implements block.StatusFile.
func (cl *Client) NextStatus(off int64) (end int64, data, zero bool, err error) {
	if off < 0 || off >= cl.size() {
		return 0, false, false, io.EOF
	}
	r := &request{cmd: nbd.CmdBlockStatus, flags: wire.CmdReqOne, off: off &^ (cl.align - 1)}
	r.n = min(cl.size()-r.off, maxExtent)
	if !cl.hasContext() {
		return cl.size(), true, false, nil
	}
	if err := cl.do(r); err != nil {
		return 0, false, false, cl.fail("asking for the state of", off, r.n, err)
	}
	end = min(r.off+int64(r.runs[0].length), cl.size())
	state := r.runs[0].state
	if cl.o.Context == contextDepth && state > 2 {
		state = 2
	}
	if end <= off { // of a server that does not keep to its own block size
		return 0, false, false, cl.fail("asking for the state of", off, r.n, violation("run that ends at %d", end))
	}
	return end, state&wire.StateHole == 0, state&wire.StateZero != 0, nil
}

const contextDepth = "qemu:allocation-depth"

func (cl *Client) hasContext() bool {
	l := cl.links[0]
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn.hasContext
}

// Lock implements storage.File: who else may use an export is the server's affair.
func (cl *Client) Lock(storage.LockMode) error { return nil }

// Stat implements storage.File.
func (cl *Client) Stat() storage.Info {
	return storage.Info{Name: cl.name, ReadOnly: cl.o.ReadOnly, Device: true, Align: int(cl.align), Allocated: -1}
}

// Close implements storage.File.
func (cl *Client) Close() error {
	if cl.ctx.Err() != nil {
		return ErrClosed
	}
	cl.cancel()
	var errs []error
	for _, l := range cl.links {
		l.mu.Lock()
		errs = append(errs, l.conn.close())
		l.mu.Unlock()
	}
	return errors.Join(errs...)
}
