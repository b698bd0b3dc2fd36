package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// DefaultPort is where NBD servers are expected.
const DefaultPort = "10809"

// Address is where to listen: one of the two.
type Address struct {
	Socket string // path of a unix socket
	TCP    string // host:port, or host alone for the default port
	// Mode and Owner are those of the socket: DefaultSocketMode and who opens it, unless said otherwise. Systems that
	// know no modes ignore both.
	Mode  fs.FileMode
	Owner *User
}

// Listen opens a listener. A unix socket that nobody listens on any more is replaced, one in use is not.
func Listen(ctx context.Context, a Address) (net.Listener, error) {
	if a.Socket != "" {
		return listenUnix(ctx, a)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", withPort(a.TCP))
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", a.TCP, err)
	}
	return l, nil
}

// withPort completes an address without a port.
func withPort(addr string) string {
	if _, _, err := net.SplitHostPort(addr); err == nil {
		return addr
	}
	return net.JoinHostPort(strings.Trim(addr, "[]"), DefaultPort)
}

func listenUnix(ctx context.Context, a Address) (net.Listener, error) {
	path := a.Socket
	fail := func(err error) (net.Listener, error) {
		return nil, fmt.Errorf("listening on unix socket %q: %w", path, err)
	}
	if err := removeStale(ctx, path); err != nil {
		return fail(err)
	}
	lc := net.ListenConfig{Control: a.control}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return fail(err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return fail(errors.Join(fmt.Errorf("got a %T", l), l.Close()))
	}
	ul.SetUnlinkOnClose(false) // it would remove whatever is there by then
	if err := a.protect(); err != nil {
		return fail(errors.Join(err, ul.Close(), os.Remove(path)))
	}
	own, err := os.Lstat(path)
	if err != nil {
		return fail(errors.Join(err, ul.Close()))
	}
	return &unixListener{UnixListener: ul, path: path, own: own, remove: os.Remove}, nil
}

var (
	errNotASocket = errors.New("the name is taken by something that is not a socket")
	errInUse      = errors.New("another process listens on it")
)

// removeStale removes the socket of a server that did not live to do so.
func removeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return errNotASocket
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		return errors.Join(errInUse, c.Close())
	}
	if !refused(err) {
		return fmt.Errorf("finding out whether it is in use: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// unixListener removes its socket when it is closed, unless another one has taken its place.
type unixListener struct {
	*net.UnixListener
	path string
	own  os.FileInfo
	once sync.Once
	// remove is os.Remove.
	remove func(string) error
}

// Close closes the listener and removes its socket. The removal comes first: afterwards nobody can find a socket on
// which nobody listens.
func (l *unixListener) Close() error {
	var err error
	l.once.Do(func() {
		st, serr := os.Lstat(l.path)
		if serr == nil && os.SameFile(st, l.own) {
			err = l.remove(l.path)
		}
		if errors.Is(err, fs.ErrPermission) {
			err = nil // given up with the server's privileges; the next server replaces a socket nobody listens on
		}
	})
	return errors.Join(l.UnixListener.Close(), err)
}

// URI returns the NBD URI of an export at an address.
func URI(addr net.Addr, export string) string {
	if addr.Network() == "unix" {
		path := addr.String()
		if abs, err := filepath.Abs(path); err == nil && !strings.HasPrefix(path, "@") {
			path = abs
		}
		// A slash is allowed in a query, and a path is easier to read with it. A plus for a space is not understood.
		query := strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
		return "nbd+unix:///" + url.PathEscape(export) + "?socket=" + query
	}
	u := "nbd://" + reachable(addr.String())
	if export != "" {
		u += "/" + url.PathEscape(export)
	}
	return u
}

// reachable turns the address of a listener into one that a client can connect to.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port)
}
