//go:build !linux

package nbddev

import "os"

// Control is a connection to the kernel's NBD client, which only Linux has.
type Control struct{}

// Open returns ErrUnsupported.
func Open() (*Control, error) { return nil, ErrUnsupported }

// Close does nothing.
func (*Control) Close() error { return nil }

// Connect returns ErrUnsupported.
func (*Control) Connect(Config, []int) (int, error) { return 0, ErrUnsupported }

// Reconnect returns ErrUnsupported.
func (*Control) Reconnect(Config, []int) error { return ErrUnsupported }

// Disconnect returns ErrUnsupported.
func (*Control) Disconnect(int) error { return ErrUnsupported }

// Status returns ErrUnsupported.
func (*Control) Status() ([]Status, error) { return nil, ErrUnsupported }

// Watch returns ErrUnsupported.
func (*Control) Watch() error { return ErrUnsupported }

// Receive returns ErrUnsupported.
func (*Control) Receive() ([]int, error) { return nil, ErrUnsupported }

// IndexOf returns ErrUnsupported.
func IndexOf(string) (int, error) { return 0, ErrUnsupported }

// Old is a device that was connected by calls on itself.
type Old struct{}

// ConnectOld returns ErrUnsupported.
func ConnectOld(string, Config, []int) (*Old, error) { return nil, ErrUnsupported }

// Done delivers how the connection ended.
func (*Old) Done() <-chan error { return nil }

// DisconnectFile does nothing.
func DisconnectFile(*os.File) {}
