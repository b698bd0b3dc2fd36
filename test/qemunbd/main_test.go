//go:build unix

// Package qemunbd runs stock qemu-nbd and drover under that name side by side, option by option, and compares what they say,
// how they end, what clients see, and what becomes of the image.
package qemunbd

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

func TestMain(m *testing.M) { harness.Main(m) }

// patience is how long a program may take for what must happen.
const patience = 30 * time.Second

// program is one of the two: stock, or ours.
type program struct {
	name string
	path string
}

// both returns stock and ours.
func both(t testing.TB) []program {
	t.Helper()
	peer.Need(t, "qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
	return []program{{"stock", peer.Path("qemu-nbd")}, {"ours", ours(t)}}
}

// ours is a link to drover under the name of qemu-nbd.
func ours(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "qemu-nbd")
	harness.OK(t, os.Symlink(harness.Binary(t), path))
	return path
}

// command makes a run of the program under its bare name, as a shell does that finds it in PATH.
func (p program) command(args ...string) *exec.Cmd {
	return &exec.Cmd{Path: p.path, Args: append([]string{"qemu-nbd"}, args...)}
}

// outcome is what a run left behind.
type outcome struct {
	code           int
	stdout, stderr string
}

// run runs the program to its end, in a folder.
func (p program) run(t testing.TB, dir string, args ...string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := p.command(args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	harness.OK(t, cmd.Start())
	limit := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // it may have ended meanwhile
	err := cmd.Wait()
	if !limit.Stop() {
		t.Fatalf("%s: qemu-nbd %q does not end\n%s%s", p.name, args, &stdout, &stderr)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: qemu-nbd %q: %v", p.name, args, err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// server is a running qemu-nbd.
type server struct {
	program
	t      testing.TB
	socket string
	cmd    *exec.Cmd
	said   bytes.Buffer // read once ended is closed
	ended  chan struct{}
}

// serve starts the program on a unix socket and returns when it answers there.
func (p program) serve(t testing.TB, dir string, args ...string) *server {
	t.Helper()
	s := p.start(t, dir, args...)
	s.await(func() bool { return exec.Command(peer.Path("nbdinfo"), "--list", s.uri("")).Run() == nil })
	return s
}

// start is serve for a server that does not answer everybody: it returns when the server takes connections.
func (p program) start(t testing.TB, dir string, args ...string) *server {
	t.Helper()
	s := &server{program: p, t: t, socket: filepath.Join(harness.SocketDir(t), "s"), ended: make(chan struct{})}
	s.cmd = p.command(append([]string{"-k", s.socket}, args...)...)
	s.cmd.Dir, s.cmd.Stdout, s.cmd.Stderr = dir, &s.said, &s.said
	harness.OK(t, s.cmd.Start())
	go func() {
		_ = s.cmd.Wait() // how it ended is in ProcessState
		close(s.ended)
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill() // it may have ended
		<-s.ended
	})
	s.await(func() bool {
		c, err := net.Dial("unix", s.socket)
		return err == nil && c.Close() == nil
	})
	return s
}

// await asks until there is an answer. Whoever asks for a list, or leaves at once, is no client for a server that counts them.
func (s *server) await(answers func() bool) {
	s.t.Helper()
	limit := time.After(patience)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		if _, err := os.Lstat(s.socket); err == nil && answers() {
			return
		}
		select {
		case <-s.ended:
			s.t.Fatalf("%s ended instead of serving:\n%s", s.name, &s.said)
		case <-limit:
			s.t.Fatalf("%s does not answer", s.name)
		case <-retry.C:
		}
	}
}

func (s *server) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + s.socket }

// stop ends the server with SIGTERM and returns how that went.
func (s *server) stop() outcome {
	s.t.Helper()
	harness.OK(s.t, s.cmd.Process.Signal(syscall.SIGTERM))
	return s.wait()
}

// earlyLeavers is what stock says of some clients that leave early, and of others not.
var earlyLeavers = regexp.MustCompile(`qemu-nbd: (write failed|option negotiation failed|read failed): .*\n`)

// wait waits for the server to end by itself.
func (s *server) wait() outcome {
	s.t.Helper()
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.t.Fatalf("%s does not end", s.name)
	}
	if _, err := os.Lstat(s.socket); !errors.Is(err, os.ErrNotExist) {
		s.t.Errorf("%s leaves its socket behind (%v)", s.name, err)
	}
	return outcome{s.cmd.ProcessState.ExitCode(), "", earlyLeavers.ReplaceAllString(s.said.String(), "")}
}

// running reports whether the server has not ended.
func (s *server) running() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// info is what nbdinfo says of an export, with what differs by nature taken out.
func (s *server) info(export string) string {
	s.t.Helper()
	return s.anonymous(string(harness.Must(s.t, "nbdinfo", "--json", s.uri(export))))
}

func (s *server) anonymous(text string) string { return strings.ReplaceAll(text, s.socket, "SOCKET") }

// images makes the images that the cases use, the same for both.
func images(t testing.TB, dir string) {
	t.Helper()
	in := func(name string, args ...string) {
		t.Helper()
		cmd := exec.Command(peer.Path(name), args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
	}
	in("qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "8M")
	in("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 512k", "disk.qcow2")
	in("qemu-img", "snapshot", "-c", "before", "disk.qcow2")
	in("qemu-img", "bitmap", "--add", "disk.qcow2", "b1")
	in("qemu-img", "bitmap", "--add", "-g", "4096", "disk.qcow2", "b2")
	in("qemu-io", "-f", "qcow2", "-c", "write -P 3 512k 1M", "-c", "write -z 6M 64k", "-c", "write -P 4 5000k 100", "disk.qcow2")
	in("qemu-img", "bitmap", "--disable", "disk.qcow2", "b1")
	in("qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "over.qcow2")
	in("qemu-io", "-f", "qcow2", "-c", "write -P 5 2M 128k", "over.qcow2")
	in("qemu-img", "create", "-q", "-f", "raw", "disk.raw", "2M")
	in("qemu-io", "-f", "raw", "-c", "write -P 6 1M 64k", "disk.raw")
	harness.OK(t, os.WriteFile(filepath.Join(dir, "odd.raw"), bytes.Repeat([]byte{7}, 1000), 0o600))
}

// twice calls fn for stock and for ours, each with a folder of the same images.
func twice[T any](t *testing.T, fn func(p program, dir string) T) (stock, mine T) {
	t.Helper()
	var got []T
	for _, p := range both(t) {
		dir := t.TempDir()
		images(t, dir)
		got = append(got, fn(p, dir))
	}
	return got[0], got[1]
}
