package client

//lint:file-ignore ST1005 these errors say what QEMU says

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/droverproject/drover/nbd/internal/wire"
)

// Address is where a server listens: a path for a unix socket, else a host and a port.
type Address struct {
	Path       string
	Host, Port string
}

// String is the address as messages have it.
func (a Address) String() string {
	if a.Host == "" {
		return a.Path
	}
	return a.Host + ":" + a.Port
}

func (a Address) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	network, target := "unix", a.Path
	if a.Host != "" {
		network, target = "tcp", net.JoinHostPort(strings.Trim(a.Host, "[]"), a.Port)
	}
	if target == "" {
		return nil, &ConnectError{a, syscall.ECONNREFUSED}
	}
	nc, err := d.DialContext(ctx, network, target)
	if err != nil {
		return nil, &ConnectError{a, err}
	}
	return nc, nil
}

// ConnectError is the failure to reach a server.
type ConnectError struct {
	Address Address
	Err     error
}

// Error says what QEMU says.
func (e *ConnectError) Error() string {
	reason := e.Err.Error()
	var errno syscall.Errno
	var dns *net.DNSError
	switch {
	case errors.As(e.Err, &errno):
		reason = capital(errno.Error())
	case errors.As(e.Err, &dns):
		return fmt.Sprintf("address resolution failed for %s: %s", e.Address, lookupReason(dns))
	}
	return fmt.Sprintf("Failed to connect to '%s': %s", e.Address, reason)
}

// lookupReason is what the C library says of a name that stands for nothing.
func lookupReason(err *net.DNSError) string {
	switch {
	case strings.HasPrefix(err.Err, "unknown port"):
		return "Servname not supported for ai_socktype"
	case err.IsNotFound:
		return "Name or service not known"
	}
	return err.Err
}

// Unwrap returns the cause.
func (e *ConnectError) Unwrap() error { return e.Err }

func capital(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}

// Target is an export of a server.
type Target struct {
	Address Address
	Export  string
	TLS     bool // the name asks for encryption
}

var errURL = errors.New("No valid URL specified")

// ParseName understands the names of exports: nbd:HOST:PORT, nbd:unix:PATH, both with :exportname=NAME behind them or not,
// and nbd://HOST[:PORT]/NAME, nbd+tcp, nbd+unix:///NAME?socket=PATH; and the same with nbds for encryption.
func ParseName(name string) (Target, error) {
	if strings.Contains(name, "://") {
		return parseURI(name)
	}
	rest, ok := strings.CutPrefix(name, "nbd:")
	if !ok {
		return Target{}, fmt.Errorf("File name string for new protocols must start with 'nbd:'")
	}
	var t Target
	rest, t.Export, _ = strings.Cut(rest, ":exportname=")
	if rest == "" {
		return t, errors.New("NBD server address missing")
	}
	if path, ok := strings.CutPrefix(rest, "unix:"); ok {
		t.Address.Path = path
		return t, nil
	}
	i := strings.LastIndexByte(rest, ':')
	if i <= 0 || i == len(rest)-1 {
		return t, fmt.Errorf("error parsing address '%s'", rest)
	}
	t.Address.Host, t.Address.Port = rest[:i], rest[i+1:]
	return t, nil
}

func parseURI(name string) (Target, error) {
	u, err := url.Parse(name)
	if err != nil {
		return Target{}, errURL
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Target{}, errURL
	}
	scheme, secure := strings.CutPrefix(u.Scheme, "nbds")
	if secure {
		scheme = "nbd" + scheme
	}
	t := Target{TLS: secure, Export: strings.TrimPrefix(u.Path, "/")}
	switch scheme {
	case "nbd", "nbd+tcp":
		if len(query) > 0 {
			return t, errURL
		}
		t.Address.Host, t.Address.Port = u.Hostname(), u.Port()
		if t.Address.Host == "" {
			t.Address.Host = "localhost"
		}
		if t.Address.Port == "" {
			t.Address.Port = wire.DefaultPort
		}
	case "nbd+unix":
		if u.Host != "" || len(query) != 1 || len(query["socket"]) != 1 || query.Get("socket") == "" {
			return t, errURL
		}
		t.Address.Path = query.Get("socket")
	default:
		return t, errURL
	}
	return t, nil
}

// URI is the name of the target.
func (t Target) URI() string {
	scheme := "nbd"
	if t.TLS {
		scheme = "nbds"
	}
	if t.Address.Host == "" {
		if t.Export == "" {
			return scheme + "+unix://?socket=" + t.Address.Path
		}
		return scheme + "+unix:///" + t.Export + "?socket=" + t.Address.Path
	}
	host := t.Address.Host
	if strings.Contains(host, ":") && !strings.HasPrefix(host, "[") {
		host = "[" + host + "]"
	}
	if t.Export == "" {
		return scheme + "://" + host + ":" + t.Address.Port
	}
	return scheme + "://" + host + ":" + t.Address.Port + "/" + t.Export
}
