package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
)

// TLS says how a Server encrypts.
type TLS struct {
	// Config holds the server's certificate, and says whether clients need one. It is copied.
	Config *tls.Config
	// Required makes encryption a condition: a client in plain text learns nothing and gets nowhere but to STARTTLS.
	// Otherwise it may ask for encryption or go without; Peer.Encrypted tells an export which.
	Required bool
}

// clone returns a copy of the server's own, set up for long transfers.
func (t *TLS) clone() *TLS {
	if t == nil || t.Config == nil {
		return nil
	}
	config := t.Config.Clone()
	// Small first records make web pages appear sooner; here they are only more records.
	config.DynamicRecordSizingDisabled = true
	return &TLS{Config: config, Required: t.Required}
}

// ErrTLS is wrapped by the errors that end a connection because encryption failed or was missing.
var ErrTLS = errors.New("nbd: TLS")

// plainForbidden reports whether the option being answered has to wait until the connection is encrypted.
func (h *handshake) plainForbidden() bool {
	t := h.c.srv.opts.TLS
	return t != nil && t.Required && !h.c.peer.Encrypted && h.opt != optStartTLS && h.opt != optAbort
}

// refusePlain answers an option that needs encryption, without a word about its content.
func (h *handshake) refusePlain() error {
	if h.opt == optExportName {
		return fmt.Errorf("%w: client asked for an export in plain text", ErrTLS)
	}
	return h.fail(repErrTLSRequired, "TLS is required: say STARTTLS first")
}

// startTLS encrypts the connection. A client that has said anything beyond the option would have said it in plain text,
// or somebody in between has: none of it may count as said under encryption, so such a connection ends. What comes later
// is read as TLS and nothing else.
func (h *handshake) startTLS(data []byte) error {
	t := h.c.srv.opts.TLS
	switch {
	case len(data) != 0:
		return h.fail(repErrInvalid, "option takes no data")
	case h.c.peer.Encrypted:
		return h.fail(repErrInvalid, "TLS is in use already")
	case t == nil:
		return h.fail(repErrUnsupported, "TLS is not configured")
	}
	if n := h.c.buffered(); n != 0 {
		return fmt.Errorf("%w: %d bytes in plain text came along with STARTTLS", ErrProtocol, n)
	}
	if err := h.reply(repAck, nil); err != nil {
		return err
	}
	if err := h.flush(); err != nil {
		return err
	}
	if err := h.c.secure(tls.Server(h.c.nc, t.Config)); err != nil {
		return err
	}
	// What was agreed on in plain text may have been agreed on with somebody else.
	h.c.mode, h.contexts, h.contextsOf = modeSimple, nil, nil
	return nil
}

// secure conducts the TLS handshake and makes tc the way to the client. The deadline of the handshake counts for this one
// too.
func (c *conn) secure(tc *tls.Conn) error {
	if err := tc.HandshakeContext(c.ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrTLS, err)
	}
	c.nc = tc
	c.peer.Encrypted = true
	if state := tc.ConnectionState(); len(state.VerifiedChains) > 0 {
		c.peer.Certificate = state.PeerCertificates[0]
	}
	return nil
}

// recordRun is how much is collected for an encrypted connection before it is sent.
const recordRun = 64 << 10

// gather writes the pieces of replies to an encrypted connection, where each write makes records of its own: the short
// ones are sent together.
func (c *conn) gather(vecs net.Buffers) error {
	b := c.srv.buffers.get(recordRun)
	defer c.srv.buffers.put(b)
	n := 0
	for _, v := range vecs {
		for len(v) > 0 {
			m := copy(b.b[n:recordRun], v)
			n, v = n+m, v[m:]
			if n < recordRun {
				continue
			}
			if err := c.push(b.b[:n]); err != nil {
				return err
			}
			n = 0
		}
	}
	if n == 0 {
		return nil
	}
	return c.push(b.b[:n])
}
