package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Limits of the handshake. Together with its timeout they bound what a client that never gets anywhere can cost.
const (
	maxOptionSize = 64 << 10
	maxOptions    = 1024
	maxQueries    = 1024
)

// errTransmission ends the handshake well: the client chose an export.
var errTransmission = errors.New("client entered transmission")

// handshake is the state of a connection before it has an export.
type handshake struct {
	c        *conn
	fixed    bool // the client speaks fixed newstyle
	noZeroes bool
	out      []byte // replies not yet sent
	opt      option // being answered
	// What the client selected. Contexts count only for the export they were selected for.
	contexts   []selected
	contextsOf *export
}

// selected is a metadata context with the number that the client knows it by.
type selected struct {
	Context
	id uint32
}

// run conducts the handshake. It returns nil when the connection has an export and errDisconnect when the client left.
func (h *handshake) run() error {
	h.uint64(magicInit)
	h.uint64(magicOption)
	h.uint16(flagFixedNewstyle | flagNoZeroes)
	p, err := h.read(4)
	if err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(p)
	if flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("%w: unknown client flags %#x", ErrProtocol, flags)
	}
	h.fixed = flags&flagFixedNewstyle != 0
	h.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		err := h.option()
		if err == errTransmission {
			return h.flush()
		}
		if err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d options", ErrHandshake, maxOptions)
}

// option reads and answers one option.
func (h *handshake) option() error {
	p, err := h.read(16)
	if err != nil {
		return err
	}
	if m := binary.BigEndian.Uint64(p); m != magicOption {
		return fmt.Errorf("%w: option with magic %#x", ErrProtocol, m)
	}
	h.opt = option(binary.BigEndian.Uint32(p[8:]))
	size := binary.BigEndian.Uint32(p[12:])
	if !h.fixed && h.opt != optExportName {
		return fmt.Errorf("%w: option %d without fixed newstyle", ErrProtocol, h.opt)
	}
	if size > maxOptionSize {
		return fmt.Errorf("%w: option %d with %d bytes", ErrHandshake, h.opt, size)
	}
	data, err := h.read(int(size))
	if err != nil {
		return err
	}
	return h.answer(data)
}

func (h *handshake) answer(data []byte) error {
	if h.plainForbidden() {
		return h.refusePlain()
	}
	switch h.opt {
	case optExportName:
		return h.exportName(string(data))
	case optAbort:
		h.reply(repAck, nil)
		// The client may be gone already, as it is free to be.
		_ = h.flush()
		return errDisconnect
	case optList:
		return h.list(data)
	case optStartTLS:
		return h.startTLS(data)
	case optInfo, optGo:
		return h.info(data)
	case optStructuredReply:
		return h.structured(data)
	case optExtendedHeaders:
		return h.extended(data)
	case optListMeta, optSetMeta:
		return h.meta(data)
	}
	return h.fail(repErrUnsupported, "option is not supported")
}

func (h *handshake) structured(data []byte) error {
	switch {
	case len(data) != 0:
		return h.fail(repErrInvalid, "option takes no data")
	case h.c.mode == modeExtended:
		return h.fail(repErrExtHeader, "extended headers are negotiated already")
	case h.c.mode == modeStructured:
		return h.fail(repErrInvalid, "structured replies are negotiated already")
	}
	h.c.mode = modeStructured
	return h.reply(repAck, nil)
}

func (h *handshake) extended(data []byte) error {
	switch {
	case len(data) != 0:
		return h.fail(repErrInvalid, "option takes no data")
	case h.c.mode == modeExtended:
		return h.fail(repErrInvalid, "extended headers are negotiated already")
	}
	h.c.mode = modeExtended
	// The form of block status replies changes with the headers, so contexts have to be selected again.
	h.contexts, h.contextsOf = nil, nil
	return h.reply(repAck, nil)
}

func (h *handshake) list(data []byte) error {
	if len(data) != 0 {
		return h.fail(repErrInvalid, "option takes no data")
	}
	for _, x := range h.c.srv.list(h.c.peer) {
		p := binary.BigEndian.AppendUint32(nil, uint32(len(x.name)))
		p = append(p, x.name...)
		if err := h.reply(repServer, append(p, x.description...)); err != nil {
			return err
		}
	}
	return h.reply(repAck, nil)
}

// exportName is the old way into transmission: it has no way to say no but to hang up.
func (h *handshake) exportName(name string) error {
	if len(name) > maxString {
		return fmt.Errorf("%w: export name of %d bytes", ErrHandshake, len(name))
	}
	x := h.lookup(name)
	if x == nil || !h.c.srv.attach(h.c, x) {
		return fmt.Errorf("%w: %q", errNoExport, name)
	}
	h.c.size.Store(x.size())
	h.uint64(uint64(h.c.size.Load()))
	h.uint16(h.txFlags(x))
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, 124)...)
	}
	h.enter(x)
	return errTransmission
}

// enter hands what was negotiated to the connection, which is attached to x.
func (h *handshake) enter(x *export) {
	if h.contextsOf == x {
		h.c.contexts = h.contexts
	}
}

// info answers INFO, and GO, which enters transmission when it succeeds.
func (h *handshake) info(data []byte) error {
	d := decoder{p: data}
	name, ok := d.string()
	if !ok {
		return h.fail(repErrInvalid, "malformed export name")
	}
	n, ok := d.uint16()
	if !ok || len(d.p) != 2*int(n) {
		return h.fail(repErrInvalid, "malformed list of information requests")
	}
	if len(name) > maxString {
		return h.fail(repErrTooBig, "export name is too long")
	}
	x := h.lookup(name)
	if x == nil || h.opt == optGo && !h.c.srv.attach(h.c, x) {
		return h.fail(repErrUnknown, "no such export")
	}
	var want [4]bool
	for range n {
		if kind, _ := d.uint16(); int(kind) < len(want) {
			want[kind] = true
		}
	}
	if err := h.describe(x, want); err != nil {
		return err
	}
	if err := h.reply(repAck, nil); err != nil {
		return err
	}
	if h.opt == optInfo {
		return nil
	}
	h.enter(x)
	return errTransmission
}

// describe sends the kinds of information that a client wants, and the one that it gets unasked.
func (h *handshake) describe(x *export, want [4]bool) error {
	p := binary.BigEndian.AppendUint16(nil, infoExport)
	h.c.size.Store(x.size()) // that of GO is the last that the client is told
	p = binary.BigEndian.AppendUint64(p, uint64(h.c.size.Load()))
	p = binary.BigEndian.AppendUint16(p, h.txFlags(x))
	err := h.reply(repInfo, p)
	if err == nil && want[infoName] {
		err = h.reply(repInfo, append(binary.BigEndian.AppendUint16(nil, infoName), x.Name...))
	}
	if err == nil && want[infoDescription] && x.Description != "" {
		err = h.reply(repInfo, append(binary.BigEndian.AppendUint16(nil, infoDescription), x.Description...))
	}
	if err == nil && want[infoBlockSize] {
		p := binary.BigEndian.AppendUint16(nil, infoBlockSize)
		for _, size := range x.block {
			p = binary.BigEndian.AppendUint32(p, size)
		}
		err = h.reply(repInfo, p)
	}
	return err
}

// txFlags are what an export can do for this client. Several connections may be mixed because a device's Flush covers
// every write that had returned, whoever asked for it.
func (h *handshake) txFlags(x *export) uint16 {
	flags := uint16(txHasFlags | txFlush | txFUA | txCache)
	if !x.Advertised.NoMultiConn {
		flags |= txMultiConn
	}
	if x.ReadOnly {
		flags |= txReadOnly
	} else {
		flags |= txTrim | txZeroes | txFastZeroes
	}
	if h.c.mode != modeSimple {
		flags |= txDF
	}
	return flags
}

// meta answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) meta(data []byte) error {
	set := h.opt == optSetMeta
	if set {
		h.contexts, h.contextsOf = nil, nil
	}
	if h.c.mode == modeSimple {
		return h.fail(repErrInvalid, "structured replies are not negotiated")
	}
	d := decoder{p: data}
	name, ok := d.string()
	if !ok {
		return h.fail(repErrInvalid, "malformed export name")
	}
	queries, ok := d.queries()
	switch {
	case !ok:
		return h.fail(repErrInvalid, "malformed list of queries")
	case len(name) > maxString:
		return h.fail(repErrTooBig, "export name is too long")
	case queries == nil:
		return h.fail(repErrTooBig, "too many queries, or too long ones")
	}
	x := h.lookup(name)
	if x == nil {
		return h.fail(repErrUnknown, "no such export")
	}
	found := match(x.contexts, queries, !set)
	if set && len(found) > maxContexts {
		return h.fail(repErrTooBig, "too many contexts")
	}
	for _, s := range found {
		id := s.id
		if !set {
			id = 0 // a listed context has no number yet
		}
		p := append(binary.BigEndian.AppendUint32(nil, id), s.Name...)
		if err := h.reply(repMeta, p); err != nil {
			return err
		}
	}
	if set {
		h.contexts, h.contextsOf = found, x
	}
	return h.reply(repAck, nil)
}

// match returns the contexts that queries name, each once. In a listing a query that ends in a colon names all that
// begin with it, and no query at all names all there are.
func match(all []Context, queries []string, listing bool) []selected {
	exact := make(map[string]bool, len(queries))
	var prefixes []string
	for _, q := range queries {
		exact[q] = true
		if listing && strings.HasSuffix(q, ":") {
			prefixes = append(prefixes, q)
		}
	}
	var found []selected
	for i, c := range all {
		ok := exact[c.Name] || listing && len(queries) == 0
		for j := 0; j < len(prefixes) && !ok; j++ {
			ok = strings.HasPrefix(c.Name, prefixes[j])
		}
		if ok {
			found = append(found, selected{Context: c, id: uint32(i) + 1})
		}
	}
	return found
}

// decoder takes an option's data apart.
type decoder struct {
	p []byte
}

func (d *decoder) uint16() (uint16, bool) {
	if len(d.p) < 2 {
		return 0, false
	}
	n := binary.BigEndian.Uint16(d.p)
	d.p = d.p[2:]
	return n, true
}

func (d *decoder) uint32() (uint32, bool) {
	if len(d.p) < 4 {
		return 0, false
	}
	n := binary.BigEndian.Uint32(d.p)
	d.p = d.p[4:]
	return n, true
}

// string takes a string that follows its length.
func (d *decoder) string() (string, bool) {
	n, ok := d.uint32()
	if !ok || uint64(n) > uint64(len(d.p)) {
		return "", false
	}
	s := string(d.p[:n])
	d.p = d.p[n:]
	return s, true
}

// queries takes a counted list of strings, which must be all that is left. The list is nil when it is well-formed but
// exceeds the limits.
func (d *decoder) queries() ([]string, bool) {
	n, ok := d.uint32()
	if !ok || uint64(n) > uint64(len(d.p)/4) {
		return nil, false
	}
	fits := n <= maxQueries
	list := make([]string, 0, min(n, maxQueries))
	for range n {
		q, ok := d.string()
		if !ok {
			return nil, false
		}
		fits = fits && len(q) <= maxString
		if fits {
			list = append(list, q)
		}
	}
	if len(d.p) != 0 {
		return nil, false
	}
	if !fits {
		return nil, true
	}
	return list, true
}

// read returns the next n bytes from the client, valid until the next read. What has been said is sent before.
func (h *handshake) read(n int) ([]byte, error) {
	if h.c.buffered() < n {
		if err := h.flush(); err != nil {
			return nil, err
		}
	}
	return h.c.take(n)
}

func (h *handshake) uint64(n uint64) { h.out = binary.BigEndian.AppendUint64(h.out, n) }
func (h *handshake) uint16(n uint16) { h.out = binary.BigEndian.AppendUint16(h.out, n) }

// fail refuses the option; the handshake goes on.
func (h *handshake) fail(kind optReply, text string) error {
	return h.reply(kind, []byte(text))
}

// reply answers the option.
func (h *handshake) reply(kind optReply, data []byte) error {
	h.uint64(magicOptReply)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(h.opt))
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(kind))
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(data)))
	h.out = append(h.out, data...)
	if len(h.out) >= maxOptionSize {
		return h.flush()
	}
	return nil
}

// flush sends what has been said.
func (h *handshake) flush() error {
	if len(h.out) == 0 {
		return nil
	}
	_, err := h.c.nc.Write(h.out)
	h.out = h.out[:0]
	return err
}

// negotiate conducts the handshake of a connection within its time.
func (c *conn) negotiate() error {
	if d := c.srv.opts.HandshakeTimeout; d > 0 {
		if err := c.sock.SetDeadline(time.Now().Add(d)); err != nil {
			return err
		}
	}
	// A drain that came before the line above had its deadline overwritten; one that comes later has the last word.
	if err := c.ended(); err != nil {
		return err
	}
	// A listener may have encrypted the connection from its first byte.
	if tc, ok := c.nc.(*tls.Conn); ok {
		if err := c.secure(tc); err != nil {
			return err
		}
	}
	h := handshake{c: c}
	if err := h.run(); err != nil {
		return err
	}
	if err := c.sock.SetDeadline(time.Time{}); err != nil {
		return err
	}
	return c.ended()
}
