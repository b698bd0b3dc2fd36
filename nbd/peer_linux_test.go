package nbd_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// dialAs connects as another user. Users are a matter of threads to the kernel: this one becomes another user's, and is not
// used for anything else afterwards.
func dialAs(uid, gid uintptr, network, addr string) (net.Conn, error) {
	type result struct {
		nc  net.Conn
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESGID, gid, gid, gid); e != 0 {
			done <- result{nil, e}
			return
		}
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); e != 0 {
			done <- result{nil, e}
			return
		}
		nc, err := net.Dial(network, addr)
		done <- result{nc, err}
	}()
	r := <-done
	return r.nc, r.err
}

// TestPeerProcess tells users apart by what the kernel says about the other end of a unix socket.
func TestPeerProcess(t *testing.T) {
	noLeaks(t)
	if os.Geteuid() != 0 {
		t.Skip("only root can connect as somebody else")
	}
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	const uid, gid = 12345, 23456
	peers := make(chan nbd.Peer, 100)
	o := nbd.Options{MaxConnectionsPerClient: 1}
	s := startOn(t, l, o, nbd.Export{Device: nbdtest.NewDevice(512), Allow: func(p nbd.Peer) bool {
		peers <- p
		return p.Process != nil && p.Process.UID == uid
	}})
	open := func(uid, gid uintptr) (*nbdtest.Client, error) {
		nc, err := dialAs(uid, gid, "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		c, err := nbdtest.NewClient(nc)
		if err == nil {
			err = c.Go("")
		}
		return c, err
	}
	c, err := open(uid, gid)
	if err != nil {
		t.Fatalf("the right user: %v", err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	p := wait(t, peers, "the question about the right user").Process
	if p == nil || p.UID != uid || p.GID != gid || p.PID != os.Getpid() {
		t.Errorf("the server knows %+v of its peer", p)
	}
	if _, err := open(54321, gid); err == nil {
		t.Error("the wrong user was served")
	}
	if _, err := s.dial().Must(nbdtest.OptGo, nbdtest.GoData("")); err == nil {
		t.Error("root was served, whom nobody has let in")
	}
	// The limit is each user's own.
	if _, err := open(uid, gid); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a second connection of the user: %v", err)
	}
}
