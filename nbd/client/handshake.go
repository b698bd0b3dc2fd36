package client

//lint:file-ignore ST1005 these errors say what QEMU says

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/droverproject/drover/nbd/internal/wire"
)

// Limits on what a server may say during the handshake.
const (
	maxOptReply   = 64 << 10  // bytes of one reply
	maxReplies    = 100 << 10 // replies to one option
	maxListing    = 16 << 20  // bytes of names and descriptions
	maxErrMessage = 4096
)

// Export is what a server says of an export.
type Export struct {
	Name, Description string
	Size              uint64
	Flags             uint16 // transmission flags
	// Block sizes, all 0 if the server does not say.
	MinBlock, PreferBlock, MaxBlock uint32
	Contexts                        []string
}

// Dialing says how to reach a server.
type Dialing struct {
	Address Address
	// TLS encrypts the connection; nil does not.
	TLS *tls.Config
	// Hostname is what the server's certificate has to say, if not what the address or TLS says.
	Hostname string
}

// handshake is a connection whose handshake is under way.
type handshake struct {
	nc         net.Conn
	r          *bufio.Reader
	structured bool
	encrypted  bool
	old        *Export // what a server from before there were options has said
	noZeroes   bool
}

func newReader(nc net.Conn) *bufio.Reader { return bufio.NewReaderSize(nc, readBuffer) }

// greet connects and gets as far as the options.
func (d *Dialing) greet(ctx context.Context) (*handshake, error) {
	nc, err := d.Address.dial(ctx)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = nc.SetDeadline(deadline) // what fails here fails in the first read
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	h := &handshake{nc: nc, r: newReader(nc)}
	if err := h.begin(d); err != nil {
		_ = h.abort() // why it did not come to anything is known
		return nil, err
	}
	return h, nil
}

func (h *handshake) begin(d *Dialing) error {
	var head [16]byte
	if _, err := io.ReadFull(h.r, head[:]); err != nil {
		return fmt.Errorf("Failed to read initial magic: %w", eof(err))
	}
	if m := binary.BigEndian.Uint64(head[:]); m != wire.MagicInit {
		return violation("Bad initial magic received: 0x%016x", m)
	}
	switch m := binary.BigEndian.Uint64(head[8:]); m {
	case wire.MagicOption:
	case wire.MagicOldServer:
		return h.beginOld(d)
	default:
		return violation("Bad server magic received: 0x%016x", m)
	}
	var flags [2]byte
	if _, err := io.ReadFull(h.r, flags[:]); err != nil {
		return fmt.Errorf("Failed to read server flags: %w", eof(err))
	}
	server := binary.BigEndian.Uint16(flags[:])
	if server&wire.FlagFixedNewstyle == 0 {
		return violation("server knows no fixed newstyle handshake")
	}
	client := uint32(wire.FlagFixedNewstyle)
	if server&wire.FlagNoZeroes != 0 {
		h.noZeroes = true
		client |= wire.FlagNoZeroes
	}
	if _, err := h.nc.Write(binary.BigEndian.AppendUint32(nil, client)); err != nil {
		return fmt.Errorf("Failed to send clientflags field: %w", err)
	}
	if d.TLS != nil {
		return h.startTLS(d)
	}
	return nil
}

// beginOld reads what a server says that knows one export and no options.
func (h *handshake) beginOld(d *Dialing) error {
	if d.TLS != nil {
		return errors.New("Server does not support STARTTLS")
	}
	var rest [8 + 4 + 124]byte
	if _, err := io.ReadFull(h.r, rest[:]); err != nil {
		return fmt.Errorf("Failed to read export length: %w", eof(err))
	}
	h.old = &Export{Size: binary.BigEndian.Uint64(rest[:]), Flags: uint16(binary.BigEndian.Uint32(rest[8:]))}
	return nil
}

// eof makes an end of the stream in the middle of something an error of its own.
func eof(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// optNames are the names of options in messages.
var optNames = map[wire.Option]string{
	wire.OptExportName: "export name", wire.OptAbort: "abort", wire.OptList: "list", wire.OptStartTLS: "starttls",
	wire.OptInfo: "info", wire.OptGo: "go", wire.OptStructuredReply: "structured reply", wire.OptListMeta: "list meta context",
	wire.OptSetMeta: "set meta context",
}

// optionError is a server's refusal of an option.
type optionError struct {
	opt     wire.Option
	kind    wire.OptReply
	message string
}

// Error says what QEMU says.
func (e *optionError) Error() string {
	which := fmt.Sprintf("option %d (%s)", e.opt, optNames[e.opt])
	text := ""
	switch e.kind {
	case wire.RepErrUnsupported:
		text = "Unsupported " + which
	case wire.RepErrPolicy:
		text = "Denied by server for " + which
	case wire.RepErrInvalid:
		text = "Invalid parameters for " + which
	case wire.RepErrPlatform:
		text = "Server lacks support for " + which
	case wire.RepErrTLSRequired:
		text = "Server requires TLS for " + which + "\nDid you forget a valid tls-creds?"
	case wire.RepErrUnknown:
		text = "Requested export not available"
	case wire.RepErrShutdown:
		text = "Server shutting down before " + which
	case wire.RepErrBlockSize:
		text = "Server requires INFO_BLOCK_SIZE for " + which
	default:
		text = "Unknown error code when asking for " + which
	}
	if e.message != "" {
		text += "\nserver reported: " + e.message
	}
	return text
}

func refusedWith(err error, kind wire.OptReply) bool {
	var refusal *optionError
	return errors.As(err, &refusal) && refusal.kind == kind
}

func (h *handshake) send(opt wire.Option, data []byte) error {
	p := binary.BigEndian.AppendUint64(nil, wire.MagicOption)
	p = binary.BigEndian.AppendUint32(p, uint32(opt))
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	if _, err := h.nc.Write(append(p, data...)); err != nil {
		return fmt.Errorf("Failed to send option request header: %w", err)
	}
	return nil
}

// reply reads one reply to an option. A refusal is an *optionError.
func (h *handshake) reply(opt wire.Option) (wire.OptReply, []byte, error) {
	var head [wire.OptReplySize]byte
	if _, err := io.ReadFull(h.r, head[:]); err != nil {
		return 0, nil, fmt.Errorf("Failed to read option reply: %w", eof(err))
	}
	if m := binary.BigEndian.Uint64(head[:]); m != wire.MagicOptReply {
		return 0, nil, violation("Unexpected option reply magic %#x", m)
	}
	if got := wire.Option(binary.BigEndian.Uint32(head[8:])); got != opt {
		return 0, nil, violation("Unexpected option type %d (%s), expected %d (%s)", got, optNames[got], opt, optNames[opt])
	}
	kind := wire.OptReply(binary.BigEndian.Uint32(head[12:]))
	n := binary.BigEndian.Uint32(head[16:])
	if n > maxOptReply {
		return 0, nil, violation("option reply of %d bytes", n)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return 0, nil, fmt.Errorf("Failed to read option reply: %w", eof(err))
	}
	if kind&(1<<31) != 0 {
		return kind, nil, &optionError{opt, kind, printable(data)}
	}
	return kind, data, nil
}

// printable is a server's message fit for a terminal.
func printable(p []byte) string {
	p = p[:min(len(p), maxErrMessage)]
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(p), "?"))
}

// simple sends an option that is answered with an acknowledgement or a refusal.
func (h *handshake) simple(opt wire.Option) error {
	if err := h.send(opt, nil); err != nil {
		return err
	}
	kind, data, err := h.reply(opt)
	if err != nil {
		return err
	}
	if kind != wire.RepAck || len(data) != 0 {
		return violation("Server answered option %d (%s) with unexpected reply %d", opt, optNames[opt], kind)
	}
	return nil
}

func (h *handshake) startTLS(d *Dialing) error {
	if err := h.simple(wire.OptStartTLS); err != nil {
		if refusedWith(err, wire.RepErrUnsupported) {
			return errors.New("Server does not support STARTTLS")
		}
		return err
	}
	if n := h.r.Buffered(); n != 0 {
		return violation("%d bytes in plain text follow the answer to STARTTLS", n)
	}
	config := d.TLS.Clone()
	config.DynamicRecordSizingDisabled = true
	if d.Hostname != "" {
		config.ServerName = d.Hostname
	} else if config.ServerName == "" {
		config.ServerName = d.Address.Host
	}
	tc := tls.Client(h.nc, config)
	if err := tc.Handshake(); err != nil {
		return fmt.Errorf("TLS handshake failed: %w", err)
	}
	h.nc, h.encrypted = tc, true
	h.r = newReader(tc)
	return nil
}

// wantStructured asks for structured replies, which not every server has.
func (h *handshake) wantStructured() error {
	err := h.simple(wire.OptStructuredReply)
	if refusedWith(err, wire.RepErrTLSRequired) {
		return err
	}
	var refusal *optionError
	if errors.As(err, &refusal) {
		return nil
	}
	h.structured = err == nil
	return err
}

// metaContext is a metadata context and the number that the server gave it.
type metaContext struct {
	name string
	id   uint32
}

// meta names contexts of an export, which it lists or selects.
func (h *handshake) meta(opt wire.Option, export string, queries ...string) ([]metaContext, error) {
	p := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	p = append(p, export...)
	p = binary.BigEndian.AppendUint32(p, uint32(len(queries)))
	for _, q := range queries {
		p = binary.BigEndian.AppendUint32(p, uint32(len(q)))
		p = append(p, q...)
	}
	if err := h.send(opt, p); err != nil {
		return nil, err
	}
	var found []metaContext
	size := 0
	for range maxReplies {
		kind, data, err := h.reply(opt)
		switch {
		case err != nil:
			return nil, err
		case kind == wire.RepAck:
			return found, nil
		case kind != wire.RepMeta:
			return nil, violation("Unexpected reply type %d (expected %d)", kind, wire.RepMeta)
		case len(data) < 4 || len(data) > 4+wire.MaxString:
			return nil, violation("context with a name of %d bytes", len(data)-4)
		}
		found = append(found, metaContext{string(data[4:]), binary.BigEndian.Uint32(data)})
		if size += len(data); size > maxListing {
			break
		}
	}
	return nil, violation("too many contexts")
}

// info asks for what there is to know about an export, and with OptGo enters transmission.
func (h *handshake) info(opt wire.Option, name string, wants ...uint16) (*Export, error) {
	p := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	p = append(p, name...)
	p = binary.BigEndian.AppendUint16(p, uint16(len(wants)))
	for _, w := range wants {
		p = binary.BigEndian.AppendUint16(p, w)
	}
	if err := h.send(opt, p); err != nil {
		return nil, err
	}
	e := &Export{Name: name}
	for range maxReplies {
		kind, data, err := h.reply(opt)
		switch {
		case err != nil:
			return nil, err
		case kind == wire.RepAck && e.Flags == 0:
			return nil, violation("server omitted NBD_INFO_EXPORT")
		case kind == wire.RepAck:
			return e, nil
		case kind != wire.RepInfo:
			return nil, violation("Unexpected reply type %d (expected %d)", kind, wire.RepInfo)
		case len(data) < 2:
			return nil, violation("information of %d bytes", len(data))
		}
		if err := e.take(binary.BigEndian.Uint16(data), data[2:]); err != nil {
			return nil, err
		}
	}
	return nil, violation("too much information about an export")
}

// take notes one kind of information.
func (e *Export) take(kind uint16, data []byte) error {
	switch kind {
	case wire.InfoExport:
		if len(data) != 10 {
			return violation("Remaining export list length is too short for size and flags")
		}
		e.Size, e.Flags = binary.BigEndian.Uint64(data), binary.BigEndian.Uint16(data[8:])
		if e.Flags&wire.TxHasFlags == 0 {
			return violation("export without flags")
		}
	case wire.InfoDescription:
		e.Description = printable(data)
	case wire.InfoBlockSize:
		if len(data) != 12 {
			return violation("block sizes of %d bytes", len(data))
		}
		smallest, best, largest := binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:]), binary.BigEndian.Uint32(data[8:])
		switch {
		case smallest == 0 || smallest&(smallest-1) != 0:
			return violation("server's minimum block size %d is not a power of two", smallest)
		case smallest > 64<<10:
			return violation("server's minimum block size %d is too large", smallest)
		case best == 0 || best&(best-1) != 0:
			return violation("server's preferred block size %d is not a power of two", best)
		case best < smallest:
			return violation("server's preferred block size %d is smaller than its minimum of %d", best, smallest)
		case largest < smallest:
			return violation("server's maximum block size %d is smaller than its minimum of %d", largest, smallest)
		}
		if largest != 1<<32-1 {
			largest -= largest % smallest
		}
		e.MinBlock, e.PreferBlock, e.MaxBlock = smallest, best, largest
	}
	return nil
}

// enter enters transmission the way that the server knows.
func (h *handshake) enter(name string) (*Export, error) {
	if h.old != nil {
		if name != "" {
			return nil, errors.New("Server does not support non-empty export names")
		}
		return h.old, nil
	}
	e, err := h.info(wire.OptGo, name, wire.InfoBlockSize)
	if !refusedWith(err, wire.RepErrUnsupported) {
		return e, err
	}
	if err := h.send(wire.OptExportName, []byte(name)); err != nil {
		return nil, err
	}
	rest := make([]byte, 10, 10+124)
	if !h.noZeroes {
		rest = rest[:cap(rest)]
	}
	if _, err := io.ReadFull(h.r, rest); err != nil {
		return nil, fmt.Errorf("Failed to read export length: %w", eof(err))
	}
	return &Export{Name: name, Size: binary.BigEndian.Uint64(rest), Flags: binary.BigEndian.Uint16(rest[8:])}, nil
}

// abort takes leave during the handshake.
func (h *handshake) abort() error {
	if h.old == nil {
		_ = h.send(wire.OptAbort, nil) // the server may be gone
	}
	return h.nc.Close()
}

// names lists the exports of a server, with their descriptions.
func (h *handshake) names() ([]Export, error) {
	if err := h.send(wire.OptList, nil); err != nil {
		return nil, err
	}
	var list []Export
	size := 0
	for range maxReplies {
		kind, data, err := h.reply(wire.OptList)
		switch {
		case err != nil:
			return nil, err
		case kind == wire.RepAck:
			return list, nil
		case kind != wire.RepServer:
			return nil, violation("Unexpected reply type %d (expected %d)", kind, wire.RepServer)
		case len(data) < 4:
			return nil, violation("incorrect option length")
		}
		n := binary.BigEndian.Uint32(data)
		if uint64(n) > uint64(len(data)-4) || n > wire.MaxString {
			return nil, violation("incorrect option name length")
		}
		if size += len(data); size > maxListing {
			break
		}
		list = append(list, Export{Name: string(data[4 : 4+n]), Description: printable(data[4+n:])})
	}
	return nil, violation("too many exports")
}

// List asks a server for its exports and all that it says about them.
func List(ctx context.Context, d Dialing) ([]Export, error) {
	h, err := d.greet(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = h.nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	list, err := h.list()
	if cerr := h.abort(); err == nil && cerr != nil && !errors.Is(cerr, net.ErrClosed) {
		return list, nil // all has been said
	}
	return list, err
}

func (h *handshake) list() ([]Export, error) {
	if h.old != nil {
		return []Export{*h.old}, nil
	}
	if err := h.wantStructured(); err != nil {
		return nil, err
	}
	list, err := h.names()
	if err != nil {
		return nil, err
	}
	for i := range list {
		e, err := h.info(wire.OptInfo, list[i].Name, wire.InfoBlockSize, wire.InfoDescription)
		var refusal *optionError
		switch {
		case errors.As(err, &refusal):
			continue // it is there, but not for us, or the server cannot say
		case err != nil:
			return nil, err
		}
		if e.Description == "" {
			e.Description = list[i].Description
		}
		list[i] = *e
		if !h.structured {
			continue
		}
		contexts, err := h.meta(wire.OptListMeta, list[i].Name)
		if errors.As(err, &refusal) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, c := range contexts {
			list[i].Contexts = append(list[i].Contexts, c.name)
		}
	}
	return list, nil
}
