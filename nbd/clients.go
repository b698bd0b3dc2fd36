package nbd

import (
	"errors"
	"fmt"
)

// ErrTooMany is wrapped by what an Observer and ServeConn are told of a connection that was closed at once because its
// client has too many.
var ErrTooMany = errors.New("nbd: too many connections")

// minShaking is the least number of connections in the handshake that a client may have.
const minShaking = 8

// client is what all connections of a client have together.
type client struct {
	key    string
	memory budget

	// Under Server.mu:
	conns   int
	shaking int // those that have no export yet
}

// guest is a connection at the door.
type guest struct {
	peer    Peer
	client  *client
	shaking bool // under Server.mu: counted in client.shaking
}

// admit counts a new connection to its client. A client that has too many is not let in, without waiting, because others
// wait behind it.
func (s *Server) admit(p Peer) (*guest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := p.key()
	cl := s.clients[key]
	if limit := s.opts.MaxConnectionsPerClient; cl != nil && limit > 0 && cl.conns >= limit {
		return nil, fmt.Errorf("%w: %s has %d", ErrTooMany, key, cl.conns)
	}
	if cl == nil {
		cl = &client{key: key, memory: budget{limit: s.memory.limit / 2}}
		s.clients[key] = cl
	}
	cl.conns++
	return &guest{peer: p, client: cl}, nil
}

// welcome begins the handshake of a connection that has a slot. A client may have half of all slots, no more, filled with
// connections that never got anywhere, so that silent ones do not keep others out.
func (s *Server) welcome(g *guest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := max(s.opts.MaxConnections/2, minShaking)
	if s.opts.MaxConnections > 0 && g.client.shaking >= limit {
		return fmt.Errorf("%w: %s has %d without an export", ErrTooMany, g.client.key, g.client.shaking)
	}
	g.shaking = true
	g.client.shaking++
	return nil
}

// seated ends the handshake of a connection.
func (s *Server) seated(g *guest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seatedLocked(g)
}

func (s *Server) seatedLocked(g *guest) {
	if g.shaking {
		g.shaking = false
		g.client.shaking--
	}
}

// dismiss forgets a connection that has ended, or that never began.
func (s *Server) dismiss(g *guest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seatedLocked(g)
	g.client.conns--
	if g.client.conns == 0 {
		delete(s.clients, g.client.key)
	}
}
