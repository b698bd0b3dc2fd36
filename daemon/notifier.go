package daemon

import (
	"errors"
	"fmt"
	"net"
)

// Notifier is a connection to the service manager. It is made while the process may still make one.
type Notifier struct {
	conn *net.UnixConn // nil when nobody asked to be told
}

// NewNotifier connects to the service manager, if there is one that wants to be told. getenv is os.Getenv.
func NewNotifier(getenv func(string) string) (*Notifier, error) {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return &Notifier{}, nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return &Notifier{}, fmt.Errorf("notifying the service manager: %w", err)
	}
	return &Notifier{conn: c}, nil
}

// Tell passes on a change of state ("READY=1", "STOPPING=1").
func (n *Notifier) Tell(state string) error {
	if n.conn == nil {
		return nil
	}
	if _, err := n.conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("notifying the service manager: %w", err)
	}
	return nil
}

// Close ends the connection.
func (n *Notifier) Close() error {
	if n.conn == nil {
		return nil
	}
	return n.conn.Close()
}

// Notify tells the service manager about a change of state, once.
func Notify(getenv func(string) string, state string) error {
	n, err := NewNotifier(getenv)
	if err != nil {
		return err
	}
	return errors.Join(n.Tell(state), n.Close())
}

// Reloading is the state of a server that reads its configuration again. READY=1 ends it.
func Reloading() string { return "RELOADING=1" + sinceBoot() }
