package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sort"
	"sync"
	"time"

	"github.com/droverproject/drover/block"
)

// Limits of the protocol and of this server.
const (
	maxString     = 4096 // bytes in a name or a description, by the protocol
	maxContexts   = 256  // metadata contexts that one connection may select
	maxBlockSize  = 32 << 20
	minMaxRequest = 64 << 10
	maxMaxRequest = 256 << 20
)

// Options configure a Server. The zero value of each field stands for its default.
type Options struct {
	// MaxConnections bounds the clients served at a time, 100 by default; negative means no bound. A client beyond it
	// waits, its connection accepted by the kernel but not answered.
	MaxConnections int
	// HandshakeTimeout is how long a client may take to choose an export, 10 seconds by default; negative means for ever.
	HandshakeTimeout time.Duration
	// MaxConnectionsPerClient bounds those of one client, told by its user on a unix socket and by its address on a network,
	// without bound by default. A connection beyond it is closed at once. See also Options.MaxConnections: a client may
	// fill at most half of those, but for the first eight, with connections that have no export.
	MaxConnectionsPerClient int
	// MaxRequest is the longest read or write, 32 MiB by default, which is also what clients may assume.
	MaxRequest int
	// MaxMemory bounds, for each connection, the bytes of payload in the hands of workers and in replies not yet taken
	// by the client, 64 MiB by default. One request is always let through.
	MaxMemory int64
	// MaxTotalMemory bounds what MaxMemory does, for all connections together, 1 GiB by default and at least eight times
	// MaxRequest. One client, as MaxConnectionsPerClient tells them, gets at most half of it. Above the bound, every
	// connection may still have requests of 1 MiB in all; so that they do not exceed one client's half, it should be no
	// less than 2 MiB for each connection.
	MaxTotalMemory int64
	// MaxInflight bounds, for each connection, the requests in the hands of workers, 64 by default. It is also the
	// number of goroutines, give or take one, that the connection may occupy.
	MaxInflight int
	// StallTimeout is how long a client may take over the next MiB of its replies, or of the payload of a large write,
	// before it is cut off and the memory that it holds is free again, 5 minutes by default; negative means for ever. An
	// idle client is none that stands still.
	StallTimeout time.Duration
	// KeepAlive is how long a TCP connection is idle before the host probes whether the client is still there, one
	// minute by default; negative means never.
	KeepAlive time.Duration
	// TLS is how connections may be encrypted, or have to be. Without it, they are not.
	TLS *TLS
	// DefaultExport is the export that a client gets when it names none and there is none of the empty name.
	DefaultExport string
	// Provider has further exports, which are opened when a client asks for them.
	Provider Provider
	// Observer is told what happens.
	Observer Observer
}

func (o Options) withDefaults() Options {
	if o.MaxConnections == 0 {
		o.MaxConnections = 100
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.MaxRequest <= 0 {
		o.MaxRequest = maxBlockSize
	}
	o.MaxRequest = min(max(o.MaxRequest, minMaxRequest), maxMaxRequest)
	if o.MaxMemory <= 0 {
		o.MaxMemory = 64 << 20
	}
	if o.MaxTotalMemory <= 0 {
		o.MaxTotalMemory = 1 << 30
	}
	// Half of it has to hold two of the longest requests, of which each occupies up to twice its length.
	o.MaxTotalMemory = max(o.MaxTotalMemory, 8*int64(o.MaxRequest))
	if o.MaxInflight <= 0 {
		o.MaxInflight = 64
	}
	if o.StallTimeout == 0 {
		o.StallTimeout = 5 * time.Minute
	}
	o.TLS = o.TLS.clone()
	if o.KeepAlive == 0 {
		o.KeepAlive = time.Minute
	}
	return o
}

// Observer is a set of functions that a Server calls; each may be nil. They are called from the goroutines that serve
// clients, several at once, and delay them.
type Observer struct {
	// Connected is called for a client that chose an export, before its first request.
	Connected func(Conn)
	// Disconnected is called when a connection has ended, also one that never got past the handshake. err is nil when
	// the client left or the server drained, whether or not requests had failed.
	Disconnected func(c Conn, s Stats, err error)
	// RequestFailed is called for a request that got an error reply because the device returned err.
	RequestFailed func(c Conn, cmd Command, off, n uint64, err error)
	// Refused is called for a connection that was closed at once; err wraps ErrTooMany.
	Refused func(p Peer, err error)
	// OpenFailed is called when an export of the Provider could not be opened for a client, which is told that there is
	// none of that name.
	OpenFailed func(p Peer, name string, err error)
	// AcceptFailed is called when a listener failed to accept, before it tries again.
	AcceptFailed func(l net.Addr, err error)
}

// Conn identifies a connection to an Observer.
type Conn struct {
	ID     uint64 // counts the connections of the server
	Remote string // address of the client, often empty for a unix socket
	Export string // "" also during the handshake
	Peer   Peer
}

// Export is a device under a name.
type Export struct {
	// Name and Description are UTF-8 of at most 4096 bytes. The empty name is what clients ask for by default.
	Name, Description string
	// Device stays the caller's: it must live until RemoveExport or Shutdown has returned nil. Clients are told the size
	// that it has when they connect.
	Device block.Device
	// ReadOnly refuses changes; it is implied by a read-only device.
	ReadOnly bool
	// Allow says who may use the export; nil lets everybody. For a client that may not, the export does not exist. It is
	// called during the handshake, possibly several times, by several goroutines at once.
	Allow func(Peer) bool
	// Contexts are metadata contexts beside base:allocation and qemu:allocation-depth, which every export has.
	Contexts []Context
	// Offer changes what clients are told of the export. None of it is needed for their safety.
	Advertised Advertised
}

// Advertised is what clients are told of an export, where that differs from what the server would say.
type Advertised struct {
	// NoDepth leaves out the context qemu:allocation-depth.
	NoDepth bool
	// NoMultiConn leaves it open whether several connections see one another's flushes. They do.
	NoMultiConn bool
	// MinBlock, PreferBlock and MaxBlock are block sizes; 0 for that of the server. They must be in order, and powers of
	// two but for the last, which must be a multiple of the second and no more than Options.MaxRequest.
	MinBlock, PreferBlock, MaxBlock uint32
}

// export is an Export in service.
type export struct {
	Export
	try      block.TryDevice  // nil when the device has no such methods
	data     block.DataDevice // the same
	provided bool             // it belongs to one connection
	contexts []Context
	block    [3]uint32 // minimum, preferred and maximum block size

	// Under Server.mu:
	conns   map[*conn]struct{}
	removed bool
	unused  chan struct{} // closed when removed and conns is empty
	past    Stats         // of connections that have ended
}

// Server serves exports to clients. Its methods may be called at any time, from any goroutine.
type Server struct {
	opts    Options
	buffers bufferPool
	reqs    sync.Pool     // of *request
	slots   chan struct{} // holds a token for each connection; nil without bound
	closing chan struct{} // closed by Shutdown
	idle    chan struct{} // closed when closing and conns is empty
	memory  budget        // for payload of all connections

	mu        sync.Mutex
	closed    bool
	exports   map[string]*export
	listeners map[*net.Listener]struct{}
	conns     map[*conn]struct{}
	clients   map[string]*client // those with connections, by Peer.key
	lastID    uint64
}

// NewServer returns a server without exports.
func NewServer(o Options) *Server {
	s := &Server{
		opts:      o.withDefaults(),
		closing:   make(chan struct{}),
		idle:      make(chan struct{}),
		exports:   make(map[string]*export),
		listeners: make(map[*net.Listener]struct{}),
		conns:     make(map[*conn]struct{}),
		clients:   make(map[string]*client),
	}
	s.memory.limit = s.opts.MaxTotalMemory
	if s.opts.MaxConnections > 0 {
		s.slots = make(chan struct{}, s.opts.MaxConnections)
	}
	return s
}

// AddExport makes a device available to clients that connect from now on.
func (s *Server) AddExport(e Export) error {
	x, err := newExport(e, s.opts.MaxRequest)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	if _, ok := s.exports[e.Name]; ok {
		return fmt.Errorf("nbd: export %q exists already", e.Name)
	}
	s.exports[e.Name] = x
	return nil
}

// newExport makes an export of what the caller describes, not yet known to anybody.
func newExport(e Export, maxRequest int) (*export, error) {
	if e.Device == nil {
		return nil, fmt.Errorf("nbd: export %q has no device", e.Name)
	}
	if len(e.Name) > maxString || len(e.Description) > maxString {
		return nil, fmt.Errorf("nbd: name or description of an export is longer than %d bytes", maxString)
	}
	info := e.Device.Info()
	e.ReadOnly = e.ReadOnly || info.ReadOnly
	x := &export{
		Export:   e,
		contexts: builtinContexts(e.Device, e.Advertised),
		conns:    make(map[*conn]struct{}),
		unused:   make(chan struct{}),
	}
	if size := e.Device.Size(); size < 0 {
		return nil, fmt.Errorf("nbd: export %q: device has size %d", e.Name, size)
	}
	x.try, _ = e.Device.(block.TryDevice)
	x.data, _ = e.Device.(block.DataDevice)
	for _, c := range e.Contexts {
		if err := checkContext(x.contexts, c); err != nil {
			return nil, fmt.Errorf("nbd: export %q: %w", e.Name, err)
		}
		x.contexts = append(x.contexts, c)
	}
	x.block = blockSizes(info, maxRequest)
	if err := e.Advertised.blockSizes(&x.block, maxRequest); err != nil {
		return nil, fmt.Errorf("nbd: export %q: %w", e.Name, err)
	}
	return x, nil
}

// blockSizes derives the block sizes of an export. The minimum is 1 because a Device takes any offset and length.
func blockSizes(info block.Info, maxRequest int) [3]uint32 {
	prefer := 4096
	for prefer < info.PreferAlign && prefer < maxRequest/2 {
		prefer *= 2
	}
	return [3]uint32{1, uint32(prefer), uint32(maxRequest / prefer * prefer)}
}

// blockSizes puts the sizes that are given in place of the server's own.
func (o Advertised) blockSizes(sizes *[3]uint32, maxRequest int) error {
	for i, n := range [...]uint32{o.MinBlock, o.PreferBlock, o.MaxBlock} {
		if n != 0 {
			sizes[i] = n
		}
	}
	lo, prefer, hi := sizes[0], sizes[1], sizes[2]
	if lo&(lo-1) != 0 || prefer&(prefer-1) != 0 || lo > prefer || prefer > hi || hi%prefer != 0 || uint64(hi) > uint64(maxRequest) {
		return fmt.Errorf("block sizes %d, %d and %d do not go together", lo, prefer, hi)
	}
	return nil
}

// RemoveExport takes an export from the list, drains its connections as Shutdown does, and returns when nothing uses its
// device any more. If ctx ends first, it cuts them off and returns the context's error; then a call on the device that
// does not heed its context may still be running.
func (s *Server) RemoveExport(ctx context.Context, name string) error {
	s.mu.Lock()
	x, ok := s.exports[name]
	if !ok {
		s.mu.Unlock()
		return fmt.Errorf("%w: %q", ErrNoExport, name)
	}
	delete(s.exports, name)
	x.removed = true
	if len(x.conns) == 0 {
		close(x.unused)
	}
	conns := keys(x.conns)
	s.mu.Unlock()
	return drain(ctx, conns, x.unused)
}

// Shutdown closes all listeners, lets each connection finish and answer the requests it has read, closes it, and returns
// when the last one is gone. If ctx ends first, it cuts off what is left and returns the context's error; then a call on
// a device that does not heed its context may still be running. A server that was shut down stays so.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
		for l := range s.listeners {
			(*l).Close()
		}
		if len(s.conns) == 0 {
			close(s.idle)
		}
	}
	conns := keys(s.conns)
	s.mu.Unlock()
	return drain(ctx, conns, s.idle)
}

func keys(m map[*conn]struct{}) []*conn {
	list := make([]*conn, 0, len(m))
	for c := range m {
		list = append(list, c)
	}
	return list
}

// drain asks connections to end and waits for done, with force once ctx has ended.
func drain(ctx context.Context, conns []*conn, done <-chan struct{}) error {
	for _, c := range conns {
		c.drain()
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	for _, c := range conns {
		c.abort()
	}
	select {
	case <-done:
		return nil
	default:
		return ctx.Err()
	}
}

// Serve accepts connections from l and serves them until Shutdown, when it returns ErrServerClosed, or until ctx ends or
// l fails for good, when it returns why. It closes l. Connections that it accepted live on until Shutdown. Several
// listeners may be served at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		l.Close()
		return ErrServerClosed
	}
	s.listeners[&l] = struct{}{}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		s.mu.Lock()
		delete(s.listeners, &l)
		s.mu.Unlock()
	}()
	return s.accept(ctx, l)
}

func (s *Server) accept(ctx context.Context, l net.Listener) error {
	const firstDelay, lastDelay = 5 * time.Millisecond, time.Second
	delay := firstDelay
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
		case s.isClosed():
			return ErrServerClosed
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: accepting on %v: %w", l.Addr(), err)
		default:
			// Out of file descriptors, or a client that left before it was accepted: neither is the listener's end.
			if f := s.opts.Observer.AcceptFailed; f != nil {
				f(l.Addr(), err)
			}
			if !s.pause(ctx, delay) {
				continue
			}
			delay = min(2*delay, lastDelay)
			continue
		}
		delay = firstDelay
		p := peerOf(nc)
		g, err := s.admit(p)
		if err != nil {
			s.refuse(nc, p, err)
			continue
		}
		if err := s.takeSlot(ctx); err != nil {
			s.dismiss(g)
			nc.Close()
			return err
		}
		if err := s.welcome(g); err != nil {
			s.releaseSlot()
			s.dismiss(g)
			s.refuse(nc, p, err)
			continue
		}
		go func() {
			defer s.releaseSlot()
			// The error went to the observer.
			_ = s.serve(context.WithoutCancel(ctx), nc, g)
		}()
	}
}

// pause waits, and reports false when it was cut short.
func (s *Server) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.closing:
	case <-ctx.Done():
	}
	return false
}

func (s *Server) takeSlot(ctx context.Context) error {
	if s.slots == nil {
		return nil
	}
	select {
	case s.slots <- struct{}{}:
		return nil
	case <-s.closing:
		return ErrServerClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Server) releaseSlot() {
	if s.slots != nil {
		<-s.slots
	}
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// ServeConn serves one connection and closes it. It returns nil when the client left or the server drained it, and the
// error that ended the connection otherwise. When ctx ends, the connection is cut off, and ServeConn returns why ctx
// ended. The connection counts against MaxConnections, and is closed at once if its client has too many.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	p := peerOf(nc)
	g, err := s.admit(p)
	if err != nil {
		s.refuse(nc, p, err)
		return err
	}
	if err := s.takeSlot(ctx); err != nil {
		s.dismiss(g)
		nc.Close()
		return err
	}
	defer s.releaseSlot()
	if err := s.welcome(g); err != nil {
		s.dismiss(g)
		s.refuse(nc, p, err)
		return err
	}
	if err := s.serve(ctx, nc, g); err != nil {
		return err
	}
	return ctx.Err()
}

// refuse closes a connection whose client has too many.
func (s *Server) refuse(nc net.Conn, p Peer, err error) {
	nc.Close()
	if f := s.opts.Observer.Refused; f != nil {
		f(p, err)
	}
}

// serve serves a connection that was admitted and welcomed.
func (s *Server) serve(ctx context.Context, nc net.Conn, g *guest) error {
	defer s.dismiss(g)
	s.keepAlive(nc)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := newConn(ctx, cancel, s, nc, g)
	if err := s.register(c); err != nil {
		nc.Close()
		return err
	}
	stop := context.AfterFunc(ctx, c.abort)
	err := c.run(g)
	stop()
	c.close()
	c.closeProvided()
	if f := s.opts.Observer.Disconnected; f != nil {
		f(c.describe(), c.stats(), err)
	}
	s.unregister(c)
	return err
}

func (s *Server) keepAlive(nc net.Conn) {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	t, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	// Keepalive is a courtesy: a host that cannot do it serves the client all the same.
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: s.opts.KeepAlive > 0, Idle: s.opts.KeepAlive})
}

func (s *Server) register(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	s.lastID++
	c.id = s.lastID
	s.conns[c] = struct{}{}
	return nil
}

func (s *Server) unregister(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.closed && len(s.conns) == 0 {
		close(s.idle)
	}
	if x := c.exp; x != nil {
		delete(x.conns, c)
		x.past.add(c.stats())
		if x.removed && len(x.conns) == 0 {
			close(x.unused)
		}
	}
}

// lookup finds the export that a client means by name, if it may use it.
func (s *Server) lookup(name string, p Peer) *export {
	x := s.named(name)
	if x.allows(p) {
		return x
	}
	if name != "" {
		return nil
	}
	if x = s.named(s.opts.DefaultExport); x.allows(p) {
		return x
	}
	return nil
}

func (s *Server) named(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name]
}

// allows reports whether there is an export and a client may use it. It is called without Server.mu, since Allow is not
// the server's.
func (x *export) allows(p Peer) bool {
	return x != nil && (x.Allow == nil || x.Allow(p))
}

// attach binds a connection to an export, so that RemoveExport waits for it. The connection's handshake looked x up
// before, so x may have been removed meanwhile: then attach reports false.
func (s *Server) attach(c *conn, x *export) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.removed {
		return false
	}
	x.conns[c] = struct{}{}
	c.exp = x
	return true
}

// list returns the exports that a client may use, in the order of their names.
func (s *Server) list(p Peer) []listed {
	s.mu.Lock()
	all := make([]*export, 0, len(s.exports))
	for _, x := range s.exports {
		all = append(all, x)
	}
	s.mu.Unlock()
	list := s.offers(p)
	for _, x := range all {
		if x.allows(p) {
			list = append(list, listed{x.Name, x.Description})
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].name < list[j].name })
	return list
}
