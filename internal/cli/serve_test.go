//go:build unix

package cli

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// serving is a run of serve in this process.
type serving struct {
	lines chan string // of standard output
	done  chan int    // the exit code
	err   lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// lineWriter sends whole lines to a channel.
type lineWriter struct {
	lines chan<- string
	rest  string
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest += string(p)
	for {
		line, rest, ok := strings.Cut(w.rest, "\n")
		if !ok {
			return len(p), nil
		}
		w.rest = rest
		w.lines <- line
	}
}

func startServe(t *testing.T, args ...string) *serving {
	t.Helper()
	s := &serving{lines: make(chan string, 100), done: make(chan int, 1)}
	go func() {
		s.done <- Run(t.Context(), append([]string{"serve"}, args...), &lineWriter{lines: s.lines}, &s.err)
		close(s.lines)
	}()
	return s
}

// line waits for the next line of output.
func (s *serving) line(t *testing.T) string {
	t.Helper()
	select {
	case l, ok := <-s.lines:
		if !ok {
			t.Fatalf("no more output; %s", &s.err)
		}
		return l
	case <-time.After(20 * time.Second):
		t.Fatalf("no output; %s", &s.err)
		return ""
	}
}

// end waits for the server to exit.
func (s *serving) end(t *testing.T) int {
	t.Helper()
	select {
	case code := <-s.done:
		return code
	case <-time.After(20 * time.Second):
		t.Fatalf("the server does not end; %s", &s.err)
		return -1
	}
}

func signalSelf(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(os.Getpid(), sig); err != nil {
		t.Fatal(err)
	}
}

// notifySocket plays the service manager and returns the messages that come.
func notifySocket(t *testing.T) <-chan string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	messages := make(chan string, 10)
	go func() {
		defer close(messages)
		buf := make([]byte, 100)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			messages <- string(buf[:n])
		}
	}()
	return messages
}

func TestServe(t *testing.T) {
	t.Chdir(t.TempDir())
	messages := notifySocket(t)
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "1M")
	mustDrover(t, "create", "-q", "-f", "qcow2", "other one", "2M")
	s := startServe(t, "--socket", "sock", "--listen", "127.0.0.1:0", "--export", "two words=other one", "disk")
	sock, err := filepath.Abs("sock")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.line(t), "nbd+unix:///?socket="+sock; got != want {
		t.Errorf("first line %q, want %q", got, want)
	}
	tcp := s.line(t)
	if !strings.HasPrefix(tcp, "nbd://127.0.0.1:") {
		t.Errorf("second line %q", tcp)
	}
	if got, want := s.line(t), `export "": disk, qcow2, 1 MiB (1048576 bytes), read-write`; got != want {
		t.Errorf("third line %q, want %q", got, want)
	}
	if got, want := s.line(t), `export "two words": other one, qcow2, 2 MiB (2097152 bytes), read-write`; got != want {
		t.Errorf("fourth line %q, want %q", got, want)
	}
	if got := <-messages; got != "READY=1" {
		t.Errorf("first notification %q", got)
	}

	// Stock clients reach both exports at both addresses.
	mustTool(t, "qemu-io", "-f", "raw", "-c", "write -P 7 100k 64k", "-c", "flush", tcp)
	mustTool(t, "qemu-io", "-f", "raw", "-c", "read -P 7 100k 64k", "nbd+unix:///?socket="+sock)
	mustTool(t, "qemu-io", "-f", "raw", "-c", "write -P 8 1M 1M", "nbd+unix:///two%20words?socket="+sock)

	o := drover(t, "serve", "--socket", "sock", "--read-only", "-U", "disk")
	if o.code != 1 || !strings.Contains(o.stderr, "listens on it") {
		t.Errorf("a second server on the socket: code %d, %s", o.code, o.stderr)
	}
	if o := drover(t, "info", "disk"); o.code != 1 || !strings.Contains(o.stderr, "lock") {
		t.Errorf("the image in service is not locked: code %d, %s", o.code, o.stderr)
	}

	signalSelf(t, syscall.SIGTERM)
	if code := s.end(t); code != 0 {
		t.Errorf("exit code %d\n%s", code, &s.err)
	}
	if got := <-messages; got != "STOPPING=1" {
		t.Errorf("last notification %q", got)
	}
	if s.err.String() != "" {
		t.Errorf("messages:\n%s", &s.err)
	}
	if _, err := os.Lstat("sock"); !os.IsNotExist(err) {
		t.Errorf("the socket is still there (%v)", err)
	}
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "read -P 7 100k 64k", "disk")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "read -P 8 1M 1M", "other one")
	for _, name := range []string{"disk", "other one"} {
		mustTool(t, "qemu-img", "check", name)
	}
}

// TestServeWithClientConnected: a client that stays does not keep the server from ending, and loses nothing it flushed.
func TestServeWithClientConnected(t *testing.T) {
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "1M")
	s := startServe(t, "--socket", "sock", "disk")
	s.line(t)
	s.line(t)
	c, err := net.Dial("unix", "sock")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := io.ReadFull(c, make([]byte, 18)); err != nil { // the server's greeting
		t.Fatal(err)
	}
	signalSelf(t, syscall.SIGINT)
	if code := s.end(t); code != 0 {
		t.Errorf("exit code %d\n%s", code, &s.err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is still open")
	}
}

func TestServeReadOnlyRaw(t *testing.T) {
	t.Chdir(t.TempDir())
	put(t, "raw", strings.Repeat("x", 1<<20))
	if o := drover(t, "serve", "--socket", "sock", "raw"); o.code != 1 || !strings.Contains(o.stderr, "--format raw") {
		t.Errorf("a guessed raw disk is exported writable: code %d, %s", o.code, o.stderr)
	}
	for _, args := range [][]string{{"--read-only"}, {"--format", "raw"}, {"--format", "raw", "--cache-size", "1M"}} {
		s := startServe(t, append(args, "--socket", "sock", "raw")...)
		uri := s.line(t)
		if got := s.line(t); !strings.HasPrefix(got, `export "": raw, raw, 1 MiB`) {
			t.Errorf("%q: %s", args, got)
		}
		mustTool(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x78 0 1M", uri)
		write := tool(t, "qemu-io", "-f", "raw", "-c", "write -P 0x78 0 512", uri)
		if ro := args[0] == "--read-only"; ro != (write.code != 0) {
			t.Errorf("%q: writing ends with code %d: %s", args, write.code, write.stderr)
		}
		signalSelf(t, syscall.SIGTERM)
		if code := s.end(t); code != 0 {
			t.Errorf("%q: exit code %d\n%s", args, code, &s.err)
		}
	}
}

func TestServeWrongArguments(t *testing.T) {
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "1M")
	put(t, "file", "")
	for _, tc := range []struct{ args, want string }{
		{"", "Expecting an image"},
		{"disk file", "Unexpected argument: file"},
		{"--export disk", "expecting NAME=IMAGE"},
		{"--export a=", "expecting NAME=IMAGE"},
		{"--socket s --export a=disk --export a=disk --read-only", "exists already"},
		{"--cache-size x disk", "not a size"},
		{"--cache-size 0 disk", "not a size"},
		{"-U disk", "needs --read-only"},
		{"--max-connections -1 disk", "must not be negative"},
		{"--max-connections x disk", "--max-connections"},
		{"--handshake-timeout 5 disk", "--handshake-timeout"},
		{"--format bogus --socket s disk", "bogus"},
		{"--socket s missing", "Could not open 'missing': Could not open 'missing': No such file or directory"},
		{"--socket missing/s disk", "missing/s"},
		{"--socket file disk", "not a socket"},
		{"--listen nowhere.invalid disk", "nowhere.invalid"},
		{"--bogus disk", "unrecognized option '--bogus'"},
	} {
		o := drover(t, append([]string{"serve"}, strings.Fields(tc.args)...)...)
		if o.code != 1 || !strings.Contains(o.stderr, tc.want) || !strings.HasPrefix(o.stderr, "drover: ") {
			t.Errorf("serve %s: code %d, message %q, want one with %q", tc.args, o.code, o.stderr, tc.want)
		}
		if strings.Contains(o.stderr, "Usage:") || o.stdout != "" {
			t.Errorf("serve %s: says too much:\n%s%s", tc.args, o.stdout, o.stderr)
		}
	}
	// Whatever failed, the image is free again.
	mustDrover(t, "check", "-q", "disk")
}

// TestSecondSignal: the first signal asks, the second insists.
func TestSecondSignal(t *testing.T) {
	ctx, w := catchSignals(t.Context())
	defer w.release()
	signalSelf(t, syscall.SIGTERM)
	<-ctx.Done()
	select {
	case <-w.second:
		t.Fatal("one signal counts as two")
	default:
	}
	signalSelf(t, syscall.SIGINT)
	<-w.second
}

func TestLimiter(t *testing.T) {
	var l limiter
	now := time.Unix(1000, 0)
	if ok, dropped := l.allow(now); !ok || dropped != 0 {
		t.Errorf("first: %v, %d", ok, dropped)
	}
	for range 3 {
		if ok, _ := l.allow(now.Add(time.Millisecond)); ok {
			t.Error("a flood gets through")
		}
	}
	if ok, dropped := l.allow(now.Add(time.Second)); !ok || dropped != 3 {
		t.Errorf("after a second: %v, %d", ok, dropped)
	}
}
