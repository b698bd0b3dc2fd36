package harness

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// The parts of the NBD protocol that the client speaks: fixed newstyle, NBD_OPT_GO, simple replies.
const (
	magicInit   = 0x4e42444d41474943
	magicOption = 0x49484156454f5054
	magicOptRep = 0x3e889045565a9
	magicReq    = 0x25609513
	magicSimple = 0x67446698

	optGo         = 7
	repAck        = 1
	repInfo       = 3
	repErrorBit   = 1 << 31
	infoExport    = 0
	flagFixed     = 1
	flagNoZeroes  = 2
	maxOptionLen  = 1 << 16
	nbdRead       = 0
	nbdWrite      = 1
	nbdDisconnect = 2
	nbdFlush      = 3
	nbdTrim       = 4
	nbdZero       = 6
	cmdFUA        = 1 << 0
	cmdNoHole     = 1 << 1
)

// Transmission flags of an export.
const (
	HasReadOnly   = 1 << 1
	HasFlush      = 1 << 2
	HasFUA        = 1 << 3
	HasTrim       = 1 << 5
	HasZeroes     = 1 << 6
	HasMultiConn  = 1 << 8
	HasFastZeroes = 1 << 11
)

// NBDError is an error code that the server answered with.
type NBDError uint32

func (e NBDError) Error() string {
	return fmt.Sprintf("the server answered with NBD error %d", uint32(e))
}

// Client is one NBD connection. Its methods may be called from several goroutines at once; the requests are then in
// flight together. It is written for the tests, apart from any NBD code of the product, so that a misreading of the
// protocol is not made twice.
type Client struct {
	Size  int64
	Flags uint16

	conn    net.Conn
	sending sync.Mutex

	mu      sync.Mutex
	pending map[uint64]*call
	cookie  uint64
	broken  error // set once the connection is of no more use
}

type call struct {
	into []byte // where the payload of a read goes
	done chan error
}

// Dial connects to an export on a unix socket.
func Dial(socket, export string) (*Client, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, pending: make(map[uint64]*call)}
	if err := c.handshake(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("NBD handshake: %w", err)
	}
	go c.receive()
	return c, nil
}

func (c *Client) handshake(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(c.conn, hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return fmt.Errorf("not a newstyle NBD server: % x", hello)
	}
	offered := binary.BigEndian.Uint16(hello[16:])
	if offered&flagFixed == 0 {
		return errors.New("not a fixed newstyle server")
	}
	msg := binary.BigEndian.AppendUint32(nil, uint32(offered&(flagFixed|flagNoZeroes)))
	msg = binary.BigEndian.AppendUint64(msg, magicOption)
	msg = binary.BigEndian.AppendUint32(msg, optGo)
	msg = binary.BigEndian.AppendUint32(msg, uint32(4+len(export)+2))
	msg = binary.BigEndian.AppendUint32(msg, uint32(len(export)))
	msg = append(msg, export...)
	msg = binary.BigEndian.AppendUint16(msg, 0) // no information requests
	if _, err := c.conn.Write(msg); err != nil {
		return err
	}
	return c.readGoReplies()
}

func (c *Client) readGoReplies() error {
	for {
		var head [20]byte
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(head[:]) != magicOptRep {
			return fmt.Errorf("bad option reply: % x", head)
		}
		kind, n := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if n > maxOptionLen {
			return fmt.Errorf("option reply of %d bytes", n)
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.conn, data); err != nil {
			return err
		}
		switch {
		case kind&repErrorBit != 0:
			return fmt.Errorf("the export was refused (reply %#x): %s", kind, data)
		case kind == repInfo && n == 12 && binary.BigEndian.Uint16(data) == infoExport:
			c.Size = int64(binary.BigEndian.Uint64(data[2:]))
			c.Flags = binary.BigEndian.Uint16(data[10:])
		case kind == repAck:
			if c.Flags == 0 {
				return errors.New("the server acknowledged without export information")
			}
			return nil
		}
	}
}

// Read fills p from the export at off.
func (c *Client) Read(p []byte, off int64) error {
	return c.do(nbdRead, 0, off, len(p), nil, p)
}

// Write writes p at off.
func (c *Client) Write(p []byte, off int64) error {
	return c.do(nbdWrite, 0, off, len(p), p, nil)
}

// WriteFUA writes p at off, durable when it returns.
func (c *Client) WriteFUA(p []byte, off int64) error {
	return c.do(nbdWrite, cmdFUA, off, len(p), p, nil)
}

// Zero makes n bytes at off read as zeroes; noHole forbids giving their space back.
func (c *Client) Zero(off int64, n int, noHole bool) error {
	var flags uint16
	if noHole {
		flags = cmdNoHole
	}
	return c.do(nbdZero, flags, off, n, nil, nil)
}

// Trim says that n bytes at off no longer matter.
func (c *Client) Trim(off int64, n int) error { return c.do(nbdTrim, 0, off, n, nil, nil) }

// Flush makes all that has been acknowledged durable.
func (c *Client) Flush() error { return c.do(nbdFlush, 0, 0, 0, nil, nil) }

// Close says goodbye and closes the connection.
func (c *Client) Close() error {
	c.sending.Lock()
	_, _ = c.conn.Write(request(nbdDisconnect, 0, 0, 0, 0)) // the server may be gone, which is what Close is for
	c.sending.Unlock()
	return c.conn.Close()
}

// Drop closes the connection without a word. Requests in flight end with an error, and may or may not be done.
func (c *Client) Drop() { c.conn.Close() }

// Break begins to write p at off, sends as many bytes of that request as sent says, and closes the connection.
func (c *Client) Break(p []byte, off int64, sent int) {
	msg := append(request(nbdWrite, 0, 0, off, len(p)), p...)
	c.sending.Lock()
	_, _ = c.conn.Write(msg[:sent]) // whether the server is still there is all the same
	c.sending.Unlock()
	c.conn.Close()
}

func request(kind, flags uint16, cookie uint64, off int64, n int) []byte {
	msg := binary.BigEndian.AppendUint32(make([]byte, 0, 28), magicReq)
	msg = binary.BigEndian.AppendUint16(msg, flags)
	msg = binary.BigEndian.AppendUint16(msg, kind)
	msg = binary.BigEndian.AppendUint64(msg, cookie)
	msg = binary.BigEndian.AppendUint64(msg, uint64(off))
	return binary.BigEndian.AppendUint32(msg, uint32(n))
}

func (c *Client) do(kind, flags uint16, off int64, n int, payload, into []byte) error {
	cl := &call{into: into, done: make(chan error, 1)}
	c.mu.Lock()
	if c.broken != nil {
		c.mu.Unlock()
		return c.broken
	}
	c.cookie++
	cookie := c.cookie
	c.pending[cookie] = cl
	c.mu.Unlock()

	c.sending.Lock()
	bufs := net.Buffers{request(kind, flags, cookie, off, n)}
	if len(payload) > 0 {
		bufs = append(bufs, payload)
	}
	_, err := bufs.WriteTo(c.conn)
	c.sending.Unlock()
	if err != nil {
		c.fail(fmt.Errorf("sending an NBD request: %w", err))
	}
	return <-cl.done
}

// receive hands replies to their callers until the connection ends.
func (c *Client) receive() {
	for {
		if err := c.receiveOne(); err != nil {
			c.fail(fmt.Errorf("receiving an NBD reply: %w", err))
			return
		}
	}
}

func (c *Client) receiveOne() error {
	var head [16]byte
	if _, err := io.ReadFull(c.conn, head[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(head[:]) != magicSimple {
		return fmt.Errorf("bad reply: % x", head)
	}
	cookie := binary.BigEndian.Uint64(head[8:])
	c.mu.Lock()
	cl := c.pending[cookie]
	delete(c.pending, cookie)
	c.mu.Unlock()
	if cl == nil {
		return fmt.Errorf("reply to an unknown request %d", cookie)
	}
	if code := binary.BigEndian.Uint32(head[4:]); code != 0 {
		cl.done <- NBDError(code)
		return nil
	}
	_, err := io.ReadFull(c.conn, cl.into)
	cl.done <- err
	return err
}

// fail ends every request that still waits.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken == nil {
		c.broken = err
	}
	for cookie, cl := range c.pending {
		delete(c.pending, cookie)
		cl.done <- c.broken
	}
}
