package nbd

import (
	"context"

	"github.com/droverproject/drover/block"
)

// Provider has exports that come and go by themselves, beside those that were added to a Server. Its methods are called
// during handshakes, by several goroutines at once.
type Provider interface {
	// Offers lists what there is now.
	Offers() []Offer
	// Find returns what is offered under a name, which need not be in the list.
	Find(name string) (Offer, bool)
}

// Offer is an export that is opened when a client asks for it.
type Offer struct {
	// Name and Description are UTF-8 of at most 4096 bytes. An export that was added under the name takes precedence.
	Name, Description string
	// Allow says who may use the export, as Export.Allow does.
	Allow func(Peer) bool
	// Open opens the device. Each connection opens its own, and closes it at its end.
	Open func(context.Context) (block.Device, error)
}

func (o *Offer) allows(p Peer) bool { return o.Allow == nil || o.Allow(p) }

// listed is an export in a list.
type listed struct{ name, description string }

// offers returns what a client may use of what the provider has.
func (s *Server) offers(p Peer) []listed {
	if s.opts.Provider == nil {
		return nil
	}
	var list []listed
	for _, o := range s.opts.Provider.Offers() {
		if len(o.Name) <= maxString && len(o.Description) <= maxString && o.allows(p) && s.named(o.Name) == nil {
			list = append(list, listed{o.Name, o.Description})
		}
	}
	return list
}

// lookup finds the export that the client means by name, if it may use it.
func (h *handshake) lookup(name string) *export {
	if x := h.c.srv.lookup(name, h.c.peer); x != nil {
		return x
	}
	return h.provided(name)
}

// provided opens what the provider offers under a name. A handshake has one such export open at a time: a client that asks
// for one after the other makes the server hold no more than one.
func (h *handshake) provided(name string) *export {
	s, c := h.c.srv, h.c
	if x := c.provided; x != nil && x.Name == name && x.allows(c.peer) {
		return x
	}
	if s.opts.Provider == nil || s.named(name) != nil {
		return nil // an export of this name exists, but not for this client
	}
	o, ok := s.opts.Provider.Find(name)
	if !ok || !o.allows(c.peer) {
		return nil
	}
	dev, err := o.Open(c.ctx)
	if err != nil {
		if f := s.opts.Observer.OpenFailed; f != nil {
			f(c.peer, name, err)
		}
		return nil
	}
	x, err := newExport(Export{Name: name, Description: o.Description, Device: dev, Allow: o.Allow}, s.opts.MaxRequest)
	if err != nil {
		_ = dev.Close() // it has not been used
		return nil
	}
	c.closeProvided()
	if h.contextsOf != nil && h.contextsOf.provided {
		h.contexts, h.contextsOf = nil, nil // they were those of the device just closed
	}
	x.provided = true
	c.provided = x
	return x
}

// closeProvided closes the device that the connection opened for itself, which nothing uses any more.
func (c *conn) closeProvided() {
	if c.provided == nil {
		return
	}
	// Whoever closes the server's devices may have been first, and that is no failure.
	_ = c.provided.Device.Close()
	c.provided = nil
}
