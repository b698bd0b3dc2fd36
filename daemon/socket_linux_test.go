package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestSocketMode gives sockets their mode, whatever the umask is, and their owner.
func TestSocketMode(t *testing.T) {
	for _, tc := range []struct {
		a    Address
		want os.FileMode
	}{
		{Address{}, 0o600}, {Address{Mode: 0o660}, 0o660}, {Address{Mode: 0o777}, 0o777},
	} {
		tc.a.Socket = filepath.Join(t.TempDir(), "s")
		l, err := Listen(context.Background(), tc.a)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Lstat(tc.a.Socket); err != nil || st.Mode() != tc.want|os.ModeSocket {
			t.Errorf("mode %v, want %v (%v)", st.Mode(), tc.want, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can give a socket away")
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(context.Background(), Address{Socket: path, Owner: &User{12345, 23456}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil || st.Uid != 12345 || st.Gid != 23456 {
		t.Errorf("owner %d:%d (%v)", st.Uid, st.Gid, err)
	}
}

// TestSocketNarrow looks at a socket between the moment when it gets its name and the one when it gets its mode.
func TestSocketNarrow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	lc := net.ListenConfig{Control: Address{Socket: path}.control}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// TestSocketStays has a server that may not remove its socket any more.
func TestSocketStays(t *testing.T) {
	a := Address{Socket: filepath.Join(t.TempDir(), "s")}
	l, err := Listen(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	ul, ok := l.(*unixListener)
	if !ok {
		t.Fatalf("got a %T", l)
	}
	ul.remove = func(string) error { return &os.PathError{Op: "remove", Path: a.Socket, Err: syscall.EACCES} }
	if err := l.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	// The next one takes the name over.
	next, err := Listen(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	next.(*unixListener).remove = func(string) error { return errors.New("disk on fire") }
	if err := next.Close(); err == nil {
		t.Error("another failure to remove the socket went unnoticed")
	}
}
