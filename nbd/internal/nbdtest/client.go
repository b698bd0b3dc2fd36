package nbdtest

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// Options of the handshake.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMeta        = 9
	OptSetMeta         = 10
	OptExtendedHeaders = 11
)

// Types of the answers to options.
const (
	RepAck    = 1
	RepServer = 2
	RepInfo   = 3
	RepMeta   = 4

	RepErrTLSReqd   = 1<<31 | 5
	RepErrUnsup     = 1<<31 | 1
	RepErrPolicy    = 1<<31 | 2
	RepErrInvalid   = 1<<31 | 3
	RepErrUnknown   = 1<<31 | 6
	RepErrTooBig    = 1<<31 | 9
	RepErrExtHeader = 1<<31 | 10
)

// Commands.
const (
	Read        = 0
	Write       = 1
	Disc        = 2
	Flush       = 3
	Trim        = 4
	Cache       = 5
	WriteZeroes = 6
	BlockStatus = 7
)

// Flags of commands.
const (
	FUA        = 1
	NoHole     = 2
	DF         = 4
	ReqOne     = 8
	FastZero   = 16
	PayloadLen = 32
)

// Types of chunks.
const (
	ChunkNone      = 0
	ChunkData      = 1
	ChunkHole      = 2
	ChunkStatus    = 5
	ChunkStatusExt = 6
	ChunkError     = 0x8001
)

// Client is a connection to a server, used by one goroutine (or by one that sends and one that receives).
type Client struct {
	Conn net.Conn
	r    *bufio.Reader
	// What was negotiated.
	Structured, Extended bool
	Size                 uint64
	TxFlags              uint16
	BlockSizes           [3]uint32
	Name, Description    string

	cookie  uint64
	pending map[uint64]Request
}

// OptionReply is an answer to an option.
type OptionReply struct {
	Type uint32
	Data []byte
}

// Request is a command.
type Request struct {
	Cmd, Flags  uint16
	Cookie      uint64
	Off, Length uint64
	Data        []byte
	Magic       uint32 // instead of the right one, if not 0
}

// Chunk is a part of a reply.
type Chunk struct {
	Type uint16
	Data []byte
}

// Status is a run of a metadata context.
type Status struct {
	Length, State uint64
}

// Reply is the whole answer to a command.
type Reply struct {
	Cookie uint64
	Errno  uint32
	Data   []byte // of a READ, holes filled in
	Holes  int    // chunks that were holes
	Chunks int
	Status map[uint32][]Status
}

// Dial connects to a server and reads its greeting.
func Dial(network, addr string) (*Client, error) {
	nc, err := net.Dial(network, addr)
	if err != nil {
		return nil, err
	}
	return NewClient(nc)
}

// NewClient reads the greeting of a server and answers it.
func NewClient(nc net.Conn) (*Client, error) {
	c := &Client{Conn: nc, r: bufio.NewReaderSize(nc, 64<<10), pending: make(map[uint64]Request)}
	p := make([]byte, 18)
	if _, err := io.ReadFull(c.r, p); err != nil {
		nc.Close()
		return nil, fmt.Errorf("reading the greeting: %w", err)
	}
	if string(p[:16]) != "NBDMAGICIHAVEOPT" || binary.BigEndian.Uint16(p[16:]) != 3 {
		nc.Close()
		return nil, fmt.Errorf("greeting is %q", p)
	}
	_, err := nc.Write([]byte{0, 0, 0, 3})
	return c, err
}

// Option asks for an option and returns the answers up to the last.
func (c *Client) Option(opt uint32, data []byte) ([]OptionReply, error) {
	if err := c.SendOption(opt, data); err != nil {
		return nil, err
	}
	var list []OptionReply
	for {
		r, err := c.optionReply(opt)
		if err != nil {
			return list, err
		}
		list = append(list, r)
		if r.Type == RepAck || r.Type>>31 != 0 {
			return list, nil
		}
	}
}

// SendOption sends an option without waiting for the answer.
func (c *Client) SendOption(opt uint32, data []byte) error {
	p := append([]byte("IHAVEOPT"), 0, 0, 0, byte(opt))
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	_, err := c.Conn.Write(append(p, data...))
	return err
}

func (c *Client) optionReply(opt uint32) (OptionReply, error) {
	p := make([]byte, 20)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return OptionReply{}, fmt.Errorf("reading the answer to option %d: %w", opt, err)
	}
	if binary.BigEndian.Uint64(p) != 0x3e889045565a9 || binary.BigEndian.Uint32(p[8:]) != opt {
		return OptionReply{}, fmt.Errorf("answer to option %d is %x", opt, p)
	}
	r := OptionReply{Type: binary.BigEndian.Uint32(p[12:])}
	r.Data = make([]byte, binary.BigEndian.Uint32(p[16:]))
	_, err := io.ReadFull(c.r, r.Data)
	return r, err
}

// Must is Option for one that has to be acknowledged.
func (c *Client) Must(opt uint32, data []byte) ([]OptionReply, error) {
	list, err := c.Option(opt, data)
	if err != nil {
		return nil, err
	}
	if last := list[len(list)-1]; last.Type != RepAck {
		return nil, fmt.Errorf("option %d is refused with %#x: %s", opt, last.Type, last.Data)
	}
	return list[:len(list)-1], nil
}

// StartTLS encrypts the connection.
func (c *Client) StartTLS(config *tls.Config) error {
	if _, err := c.Must(OptStartTLS, nil); err != nil {
		return err
	}
	tc := tls.Client(c.Conn, config)
	if err := tc.Handshake(); err != nil {
		return fmt.Errorf("encrypting: %w", err)
	}
	c.Conn, c.r = tc, bufio.NewReaderSize(tc, 64<<10)
	c.Structured, c.Extended = false, false
	return nil
}

// WantStructured negotiates structured replies.
func (c *Client) WantStructured() error {
	_, err := c.Must(OptStructuredReply, nil)
	c.Structured = err == nil
	return err
}

// WantExtended negotiates extended headers.
func (c *Client) WantExtended() error {
	_, err := c.Must(OptExtendedHeaders, nil)
	c.Extended = err == nil
	return err
}

// GoData is the data of OptInfo and OptGo.
func GoData(name string, infos ...uint16) []byte {
	p := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	p = append(p, name...)
	p = binary.BigEndian.AppendUint16(p, uint16(len(infos)))
	for _, i := range infos {
		p = binary.BigEndian.AppendUint16(p, i)
	}
	return p
}

// MetaData is the data of OptListMeta and OptSetMeta.
func MetaData(name string, queries ...string) []byte {
	p := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	p = append(p, name...)
	p = binary.BigEndian.AppendUint32(p, uint32(len(queries)))
	for _, q := range queries {
		p = binary.BigEndian.AppendUint32(p, uint32(len(q)))
		p = append(p, q...)
	}
	return p
}

// Meta asks for metadata contexts and returns their numbers.
func (c *Client) Meta(opt uint32, name string, queries ...string) (map[string]uint32, error) {
	list, err := c.Must(opt, MetaData(name, queries...))
	if err != nil {
		return nil, err
	}
	ids := make(map[string]uint32)
	for _, r := range list {
		if r.Type != RepMeta || len(r.Data) < 4 {
			return nil, fmt.Errorf("answer %#x to a metadata option", r.Type)
		}
		ids[string(r.Data[4:])] = binary.BigEndian.Uint32(r.Data)
	}
	return ids, nil
}

// Go enters transmission.
func (c *Client) Go(name string) error { return c.info(OptGo, name) }

// Info asks about an export.
func (c *Client) Info(name string) error { return c.info(OptInfo, name) }

func (c *Client) info(opt uint32, name string) error {
	list, err := c.Must(opt, GoData(name, 1, 2, 3))
	if err != nil {
		return err
	}
	seen := false
	for _, r := range list {
		if r.Type != RepInfo || len(r.Data) < 2 {
			return fmt.Errorf("answer %#x to INFO or GO", r.Type)
		}
		d := r.Data[2:]
		switch kind := binary.BigEndian.Uint16(r.Data); {
		case kind == 0 && len(d) == 10:
			seen = true
			c.Size, c.TxFlags = binary.BigEndian.Uint64(d), binary.BigEndian.Uint16(d[8:])
		case kind == 1:
			c.Name = string(d)
		case kind == 2:
			c.Description = string(d)
		case kind == 3 && len(d) == 12:
			for i := range c.BlockSizes {
				c.BlockSizes[i] = binary.BigEndian.Uint32(d[4*i:])
			}
		default:
			return fmt.Errorf("information %x", r.Data)
		}
	}
	if !seen {
		return errors.New("no information about the size of the export")
	}
	return nil
}

// ExportName enters transmission the old way. The greeting's answer has asked for no zeroes.
func (c *Client) ExportName(name string) error {
	if err := c.SendOption(OptExportName, []byte(name)); err != nil {
		return err
	}
	p := make([]byte, 10)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return err
	}
	c.Size, c.TxFlags = binary.BigEndian.Uint64(p), binary.BigEndian.Uint16(p[8:])
	return nil
}

// Encode appends a request as it goes over the wire.
func (c *Client) Encode(p []byte, r Request) []byte {
	magic := uint32(0x25609513)
	if c.Extended {
		magic = 0x21e41c71
	}
	if r.Magic != 0 {
		magic = r.Magic
	}
	p = binary.BigEndian.AppendUint32(p, magic)
	p = binary.BigEndian.AppendUint16(p, r.Flags)
	p = binary.BigEndian.AppendUint16(p, r.Cmd)
	p = binary.BigEndian.AppendUint64(p, r.Cookie)
	p = binary.BigEndian.AppendUint64(p, r.Off)
	if c.Extended {
		p = binary.BigEndian.AppendUint64(p, r.Length)
	} else {
		p = binary.BigEndian.AppendUint32(p, uint32(r.Length))
	}
	return append(p, r.Data...)
}

// Send sends requests in one write, numbering those that have no cookie, and returns the last cookie.
func (c *Client) Send(list ...Request) (uint64, error) {
	var p []byte
	for _, r := range list {
		if r.Cookie == 0 {
			c.cookie++
			r.Cookie = c.cookie
		}
		if r.Cmd == Write && r.Length == 0 {
			r.Length = uint64(len(r.Data))
		}
		if c.Extended && r.Cmd == Write {
			r.Flags |= PayloadLen
		}
		if r.Cmd != Disc {
			c.pending[r.Cookie] = r
		}
		p = c.Encode(p, r)
		c.cookie = max(c.cookie, r.Cookie)
	}
	_, err := c.Conn.Write(p)
	return c.cookie, err
}

// Do sends a request and receives its reply; no other may be under way.
func (c *Client) Do(r Request) (Reply, error) {
	if _, err := c.Send(r); err != nil {
		return Reply{}, err
	}
	return c.Recv()
}

// Recv receives the next reply, whole. Chunks of several replies may not mix, as this server never mixes them.
func (c *Client) Recv() (Reply, error) {
	var p [32]byte
	if _, err := io.ReadFull(c.r, p[:4]); err != nil {
		return Reply{}, err
	}
	magic := binary.BigEndian.Uint32(p[:])
	switch {
	case magic == 0x67446698 && !c.Extended:
		return c.simple()
	case magic == 0x668e33ef && c.Structured && !c.Extended, magic == 0x6e8a278c && c.Extended:
		return c.structured(magic)
	}
	return Reply{}, fmt.Errorf("reply with magic %#x", magic)
}

func (c *Client) take(cookie uint64) (Request, error) {
	q, ok := c.pending[cookie]
	if !ok {
		return q, fmt.Errorf("reply to a request %#x that is not under way", cookie)
	}
	delete(c.pending, cookie)
	return q, nil
}

func (c *Client) simple() (Reply, error) {
	var p [12]byte
	if _, err := io.ReadFull(c.r, p[:]); err != nil {
		return Reply{}, err
	}
	r := Reply{Errno: binary.BigEndian.Uint32(p[:]), Cookie: binary.BigEndian.Uint64(p[4:])}
	q, err := c.take(r.Cookie)
	if err != nil {
		return r, err
	}
	if c.Structured && (q.Cmd == Read || q.Cmd == BlockStatus) {
		return r, fmt.Errorf("simple reply to command %d", q.Cmd)
	}
	if q.Cmd == Read && r.Errno == 0 {
		r.Data = make([]byte, q.Length)
		_, err = io.ReadFull(c.r, r.Data)
	}
	return r, err
}

// structured receives chunks up to the last; the magic of the first is read already.
func (c *Client) structured(magic uint32) (Reply, error) {
	var r Reply
	var q Request
	covered := uint64(0)
	for {
		head := make([]byte, 16)
		if c.Extended {
			head = make([]byte, 28)
		}
		if _, err := io.ReadFull(c.r, head); err != nil {
			return r, err
		}
		flags, kind := binary.BigEndian.Uint16(head), binary.BigEndian.Uint16(head[2:])
		cookie := binary.BigEndian.Uint64(head[4:])
		length := uint64(binary.BigEndian.Uint32(head[12:]))
		if r.Chunks == 0 {
			var err error
			if q, err = c.take(cookie); err != nil {
				return r, err
			}
			r.Cookie = cookie
			if q.Cmd == Read {
				r.Data = bytes.Repeat([]byte{0xa5}, int(min(q.Length, 64<<20)))
			}
		}
		if c.Extended {
			length = binary.BigEndian.Uint64(head[20:])
			if off := binary.BigEndian.Uint64(head[12:]); off != q.Off {
				return r, fmt.Errorf("extended reply echoes offset %d, not %d", off, q.Off)
			}
		}
		if cookie != r.Cookie {
			return r, errors.New("chunks of two replies are mixed")
		}
		if length > 40<<20 {
			return r, fmt.Errorf("chunk of %d bytes", length)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return r, err
		}
		r.Chunks++
		n, err := c.chunk(&r, q, kind, data)
		if err != nil {
			return r, err
		}
		covered += n
		if flags&1 != 0 {
			break
		}
		var p [4]byte
		if _, err := io.ReadFull(c.r, p[:]); err != nil {
			return r, err
		}
		if binary.BigEndian.Uint32(p[:]) != magic {
			return r, fmt.Errorf("chunk with magic %x", p)
		}
	}
	if r.Errno == 0 && q.Cmd == Read && covered != q.Length {
		return r, fmt.Errorf("read of %d bytes got %d", q.Length, covered)
	}
	return r, nil
}

// chunk takes a chunk apart and returns the bytes of a read that it covers.
func (c *Client) chunk(r *Reply, q Request, kind uint16, data []byte) (uint64, error) {
	bad := fmt.Errorf("chunk of type %#x with %d bytes in reply to command %d", kind, len(data), q.Cmd)
	switch {
	case kind == ChunkNone && len(data) == 0:
		return 0, nil
	case kind == ChunkData && q.Cmd == Read && len(data) > 8:
		at, n := binary.BigEndian.Uint64(data)-q.Off, uint64(len(data)-8)
		if at > q.Length || n > q.Length-at {
			return 0, bad
		}
		copy(r.Data[at:], data[8:])
		return n, nil
	case kind == ChunkHole && q.Cmd == Read && len(data) == 12:
		at, n := binary.BigEndian.Uint64(data)-q.Off, uint64(binary.BigEndian.Uint32(data[8:]))
		if at > q.Length || n > q.Length-at || n == 0 {
			return 0, bad
		}
		clear(r.Data[at : at+n])
		r.Holes++
		return n, nil
	case (kind == ChunkStatus && !c.Extended || kind == ChunkStatusExt && c.Extended) && q.Cmd == BlockStatus:
		return 0, c.status(r, data)
	case kind == ChunkError && len(data) >= 6 && len(data) == 6+int(binary.BigEndian.Uint16(data[4:])):
		r.Errno = binary.BigEndian.Uint32(data)
		return 0, nil
	}
	return 0, bad
}

func (c *Client) status(r *Reply, data []byte) error {
	head, size := 4, 8
	if c.Extended {
		head, size = 8, 16
	}
	if len(data) < head+size || (len(data)-head)%size != 0 {
		return fmt.Errorf("block status of %d bytes", len(data))
	}
	if r.Status == nil {
		r.Status = make(map[uint32][]Status)
	}
	id := binary.BigEndian.Uint32(data)
	if c.Extended && int(binary.BigEndian.Uint32(data[4:])) != (len(data)-head)/size {
		return errors.New("extended block status with a wrong count")
	}
	for p := data[head:]; len(p) > 0; p = p[size:] {
		s := Status{Length: uint64(binary.BigEndian.Uint32(p)), State: uint64(binary.BigEndian.Uint32(p[4:]))}
		if c.Extended {
			s = Status{Length: binary.BigEndian.Uint64(p), State: binary.BigEndian.Uint64(p[8:])}
		}
		r.Status[id] = append(r.Status[id], s)
	}
	return nil
}

// Close says goodbye and closes the connection.
func (c *Client) Close() error {
	_, _ = c.Send(Request{Cmd: Disc})
	return c.Conn.Close()
}
