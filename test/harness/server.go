package harness

import (
	"bytes"
	"context"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	startLimit = 30 * time.Second // for a server to answer on its socket
	stopLimit  = 60 * time.Second // for a server to end after SIGTERM
	retryPause = 2 * time.Millisecond
)

// Serve says what `drover serve` is to export.
type Serve struct {
	Image    string
	Format   string // "" means qcow2
	ReadOnly bool
	Args     []string // further flags
}

// Args returns the command line of `drover serve` for one image on a unix socket.
func (s Serve) args(socket string) []string {
	format := s.Format
	if format == "" {
		format = "qcow2"
	}
	args := []string{"serve", "--socket", socket, "--format", format}
	if s.ReadOnly {
		args = append(args, "--read-only")
	}
	args = append(args, s.Args...)
	return append(args, s.Image)
}

// Server is a running `drover serve`.
type Server struct {
	Socket string
	t      testing.TB
	cmd    *exec.Cmd
	line   string
	output lockedBuffer
	ended  chan struct{} // closed when the process has ended and been waited for
}

// Start runs `drover serve` and returns when its socket answers. The test's cleanup ends it.
func Start(t testing.TB, s Serve) *Server {
	t.Helper()
	srv := launch(t, s)
	if !srv.awaitSocket() {
		t.Fatalf("the server did not come up:\n$ %s\n%s", srv.line, srv.output.String())
	}
	return srv
}

// Refused runs `drover serve` for an image that it has to refuse and returns what it said. A server that comes up
// instead fails the test.
func Refused(t testing.TB, s Serve) Result {
	t.Helper()
	srv := launch(t, s)
	if srv.awaitSocket() {
		srv.Kill()
		t.Fatalf("the server took an image that it has to refuse:\n$ %s\n%s", srv.line, srv.output.String())
	}
	<-srv.ended
	code := srv.cmd.ProcessState.ExitCode()
	if code == 0 {
		t.Fatalf("a refusal must not exit with 0:\n$ %s\n%s", srv.line, srv.output.String())
	}
	return Result{Line: srv.line, Code: code, Stderr: []byte(srv.output.String())}
}

func launch(t testing.TB, s Serve) *Server {
	t.Helper()
	socket := filepath.Join(SocketDir(t), "s")
	args := s.args(socket)
	srv := &Server{Socket: socket, t: t, line: commandLine("drover", args), ended: make(chan struct{})}
	srv.cmd = exec.Command(Binary(t), args...)
	srv.cmd.Stdout, srv.cmd.Stderr = &srv.output, &srv.output
	if err := srv.cmd.Start(); err != nil {
		t.Fatalf("starting %s: %v", srv.line, err)
	}
	go func() {
		// How it ended is in ProcessState; Stop and Refused judge it.
		_ = srv.cmd.Wait()
		close(srv.ended)
	}()
	t.Cleanup(srv.Kill)
	return srv
}

// awaitSocket connects until the server answers or has ended.
func (s *Server) awaitSocket() bool {
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	retry := time.NewTicker(retryPause)
	defer retry.Stop()
	for {
		// Dialling alone would leave a client behind that never said a word; some servers count it.
		if c, err := Dial(s.Socket, ""); err == nil {
			c.Close()
			return true
		}
		select {
		case <-s.ended:
			return false
		case <-ctx.Done():
			s.t.Errorf("%s neither answered nor ended within %v", s.line, startLimit)
			s.Kill()
			return false
		case <-retry.C:
		}
	}
}

// URI is the server's address for libnbd and QEMU.
func (s *Server) URI() string { return "nbd+unix:///?socket=" + s.Socket }

// PID is the server's process.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Output is what the server has said so far.
func (s *Server) Output() string { return s.output.String() }

// Dial connects a client.
func (s *Server) Dial(t testing.TB) *Client {
	t.Helper()
	c, err := Dial(s.Socket, "")
	if err != nil {
		t.Fatalf("connecting to the server: %v\n$ %s\n%s", err, s.line, s.Output())
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Stop ends the server as a service manager does, with SIGTERM, and fails the test unless it exits with 0.
func (s *Server) Stop() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatalf("SIGTERM to the server: %v\n%s", err, s.Output())
	}
	select {
	case <-s.ended:
	case <-time.After(stopLimit):
		s.Kill()
		s.t.Fatalf("the server did not end within %v of SIGTERM\n$ %s\n%s", stopLimit, s.line, s.Output())
	}
	if !s.cmd.ProcessState.Success() {
		s.t.Fatalf("the server ended badly: %v\n$ %s\n%s", s.cmd.ProcessState, s.line, s.Output())
	}
}

// Kill ends the server with SIGKILL, as a crash of the process does, and waits until it is gone.
func (s *Server) Kill() {
	select {
	case <-s.ended:
		return
	default:
	}
	_ = s.cmd.Process.Kill() // fails only when the process has just ended by itself
	<-s.ended
}

// Abort ends the server with SIGQUIT, upon which the Go runtime says what every goroutine is doing and ends the process as
// a crash does. It returns what the server has said.
func (s *Server) Abort() string {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		s.t.Fatalf("SIGQUIT to the server: %v\n%s", err, s.Output())
	}
	select {
	case <-s.ended:
	case <-time.After(stopLimit):
		s.Kill()
		s.t.Fatalf("the server did not end within %v of SIGQUIT\n$ %s\n%s", stopLimit, s.line, s.Output())
	}
	return s.Output()
}

// lockedBuffer is a bytes.Buffer that a process writes while a test reads.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
