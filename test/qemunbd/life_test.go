//go:build unix

package qemunbd

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// timings are what qemu-io says of how long it took.
var timings = regexp.MustCompile(`[0-9.]+ sec.*`)

// startNBDKit starts nbdkit, which returns when it serves, and ends it with the test.
func startNBDKit(t *testing.T, socket, pid string, args []string) {
	t.Helper()
	harness.Must(t, "nbdkit", append([]string{"-U", socket, "-P", pid}, args...)...)
	t.Cleanup(func() { endProcess(t, awaitPID(t, pid)) })
	awaitPID(t, pid) // it is written once the server listens
}

// awaitPID waits until a server has written its number, which may be after what started it has ended.
func awaitPID(t *testing.T, file string) int {
	t.Helper()
	limit := time.After(patience)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		text, err := os.ReadFile(file)
		if pid, ok := strings.CutSuffix(string(text), "\n"); err == nil && ok {
			n, err := strconv.Atoi(pid)
			harness.OK(t, err)
			return n
		}
		select {
		case <-limit:
			t.Fatalf("no number of a process in %s (%v)", file, err)
		case <-retry.C:
		}
	}
}

// endProcess ends a process that is nobody's child.
func endProcess(t *testing.T, pid int) {
	t.Helper()
	harness.OK(t, syscall.Kill(pid, syscall.SIGTERM))
	gone(t, pid)
}

// gone waits until a process has ended.
func gone(t *testing.T, pid int) {
	t.Helper()
	limit := time.After(patience)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		state, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		// A process whose parent does not ask after it stays as a zombie.
		if err != nil || strings.Contains(string(state), ") Z ") {
			return
		}
		select {
		case <-limit:
			t.Fatalf("process %d does not end", pid)
		case <-retry.C:
		}
	}
}

// TestEndsWithLastClient serves until the last client has gone, and clients that only look do not count.
func TestEndsWithLastClient(t *testing.T) {
	for _, shared := range []string{"1", "3", "0"} {
		t.Run("-e "+shared, func(t *testing.T) {
			for _, p := range both(t) {
				dir := t.TempDir()
				images(t, dir)
				s := p.serve(t, dir, "-e", shared, "-f", "qcow2", "disk.qcow2") // whose serve has listed its exports
				harness.Must(t, "qemu-nbd", "--list", "-k", s.socket)
				if !s.running() {
					t.Fatalf("%s has ended though there was no client", p.name)
				}
				harness.Must(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", s.uri(""))
				if end := s.wait(); end.code != 0 || end.stderr != "" {
					t.Errorf("%s ends with %+v", p.name, end)
				}
			}
		})
	}
}

// TestSeveralClients lets in as many as it was told to, and ends when the last one goes, not when the first one does.
func TestSeveralClients(t *testing.T) {
	for _, p := range both(t) {
		dir := t.TempDir()
		images(t, dir)
		s := p.serve(t, dir, "-e", "2", "-f", "qcow2", "disk.qcow2")
		first, err := harness.Dial(s.socket, "")
		harness.OK(t, err)
		second, err := harness.Dial(s.socket, "")
		harness.OK(t, err)
		harness.OK(t, first.Close())
		if err := second.Read(make([]byte, 512), 0); err != nil {
			t.Errorf("%s: the second client is cut off: %v", p.name, err)
		}
		harness.OK(t, second.Close())
		if end := s.wait(); end.code != 0 {
			t.Errorf("%s ends with %+v", p.name, end)
		}
	}
}

// TestPersistent stays until it is told to go, with and without a client.
func TestPersistent(t *testing.T) {
	for _, p := range both(t) {
		dir := t.TempDir()
		images(t, dir)
		s := p.serve(t, dir, "-t", "-f", "qcow2", "disk.qcow2")
		for range 3 {
			harness.Must(t, "nbdinfo", "--size", s.uri(""))
		}
		c, err := harness.Dial(s.socket, "")
		harness.OK(t, err)
		harness.OK(t, c.Write([]byte("precious"), 0))
		if end := s.stop(); end.code != 0 || end.stderr != "" {
			t.Errorf("%s ends with %+v", p.name, end)
		}
		_ = c.Close() // the server was first
		out := harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "read -v 0 16", filepath.Join(dir, "disk.qcow2"))
		if !bytes.Contains(out, []byte("precious")) {
			t.Errorf("%s has lost a write that it had acknowledged:\n%s", p.name, out)
		}
	}
}

// TestFork returns when the server in the background serves, whose number is in the file.
func TestFork(t *testing.T) {
	for _, p := range both(t) {
		dir := t.TempDir()
		images(t, dir)
		socket, pidFile := filepath.Join(harness.SocketDir(t), "s"), filepath.Join(dir, "pid")
		got := p.run(t, dir, "--fork", "-t", "-k", socket, "--pid-file", pidFile, "-f", "qcow2", "disk.qcow2")
		if got != (outcome{}) {
			t.Fatalf("%s: %+v", p.name, got)
		}
		text, err := os.ReadFile(pidFile)
		harness.OK(t, err)
		pid, err := strconv.Atoi(strings.TrimSuffix(string(text), "\n"))
		harness.OK(t, err)
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) }) // it should have ended by then
		harness.Must(t, "nbdinfo", "--size", "nbd+unix:///?socket="+socket)
		for link, want := range map[string]string{"cwd": "/", "fd/0": "/dev/null", "fd/1": "/dev/null", "fd/2": "/dev/null"} {
			if to, err := os.Readlink("/proc/" + string(text[:len(text)-1]) + "/" + link); err != nil || to != want {
				t.Errorf("%s: %s of the server is %s, %v", p.name, link, to, err)
			}
		}
		comm, err := os.ReadFile("/proc/" + string(text[:len(text)-1]) + "/comm")
		if err != nil || string(comm) != "qemu-nbd\n" {
			t.Errorf("%s: the process is called %q, %v", p.name, comm, err)
		}
		endProcess(t, pid)
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("%s leaves its socket behind", p.name)
		}
		// Without -t it ends by itself.
		if got := p.run(t, dir, "--fork", "-k", socket, "--pid-file", pidFile, "-f", "qcow2", "disk.qcow2"); got != (outcome{}) {
			t.Fatalf("%s: %+v", p.name, got)
		}
		text, err = os.ReadFile(pidFile)
		harness.OK(t, err)
		pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
		harness.OK(t, err)
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
		harness.Must(t, "nbdinfo", "--size", "nbd+unix:///?socket="+socket)
		gone(t, pid)
	}
}

// TestActivation takes the socket of a service manager, also in the background, and leaves it where it is.
func TestActivation(t *testing.T) {
	peer.Need(t, "python3")
	for _, p := range both(t) {
		for _, more := range [][]string{nil, {"--fork"}} {
			dir := t.TempDir()
			images(t, dir)
			socket := filepath.Join(harness.SocketDir(t), "s")
			cmd := activated(p, socket, append(more, "-f", "qcow2", "disk.qcow2")...)
			cmd.Dir = dir
			var said bytes.Buffer
			cmd.Stderr = &said
			harness.OK(t, cmd.Start())
			if len(more) > 0 {
				if err := cmd.Wait(); err != nil {
					t.Fatalf("%s %q: %v\n%s", p.name, more, err, &said)
				}
			}
			awaitFile(t, socket)
			harness.Must(t, "nbdinfo", "--size", "nbd+unix:///?socket="+socket)
			if len(more) == 0 {
				if err := cmd.Wait(); err != nil {
					t.Errorf("%s: %v\n%s", p.name, err, &said)
				}
			}
			if _, err := os.Lstat(socket); err != nil {
				t.Errorf("%s has removed a socket that is not its own", p.name)
			}
		}
	}
}

// TestActivationMistakes leaves no choice of address when there is a socket already.
func TestActivationMistakes(t *testing.T) {
	peer.Need(t, "python3")
	programs := both(t)
	dir := t.TempDir()
	images(t, dir)
	for _, args := range []string{
		"-k /s disk.qcow2", "-p 5 disk.qcow2", "-b x disk.qcow2", "-c /dev/nbd0 disk.qcow2", "--selinux-label=x disk.qcow2", "-L",
	} {
		var said []string
		for _, p := range programs {
			cmd := activated(p, filepath.Join(harness.SocketDir(t), "s"), strings.Fields(args)...)
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			said = append(said, string(out))
			if err == nil {
				t.Errorf("%s takes %s", p.name, args)
			}
		}
		if said[0] != said[1] {
			t.Errorf("%s: stock says %q, ours %q", args, said[0], said[1])
		}
	}
}

// activate listens on a unix socket and becomes a program, as a service manager does.
const activate = `
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen(5)
if s.fileno() != 3:
    os.dup2(s.fileno(), 3)
os.set_inheritable(3, True)
os.environ['LISTEN_PID'], os.environ['LISTEN_FDS'] = str(os.getpid()), '1'
os.execv(sys.argv[2], ['qemu-nbd'] + sys.argv[3:])
`

func activated(p program, socket string, args ...string) *exec.Cmd {
	return exec.Command(peer.Path("python3"), append([]string{"-c", activate, socket, p.path}, args...)...)
}

func awaitFile(t *testing.T, name string) {
	t.Helper()
	limit := time.After(patience)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		if _, err := os.Lstat(name); err == nil {
			return
		}
		select {
		case <-limit:
			t.Fatalf("%s does not appear", name)
		case <-retry.C:
		}
	}
}

// TestSocketOfOthers is where drover differs on purpose: stock removes whatever is in the way.
func TestSocketOfOthers(t *testing.T) {
	p := program{"ours", ours(t)}
	peer.Need(t, "qemu-img", "qemu-io", "nbdinfo")
	dir := t.TempDir()
	images(t, dir)
	s := p.serve(t, dir, "-t", "-f", "qcow2", "disk.qcow2")
	if got := p.run(t, dir, "-k", s.socket, "-f", "raw", "disk.raw"); got.code != 1 || !strings.Contains(got.stderr, "another process listens on it") {
		t.Errorf("a socket in use: %+v", got)
	}
	image := filepath.Join(dir, "disk.raw")
	if got := p.run(t, dir, "-k", image, "-f", "raw", "disk.raw"); got.code != 1 || !strings.Contains(got.stderr, "not a socket") {
		t.Errorf("an image in place of a socket: %+v", got)
	}
	if st := stat(t, image); st.Size() != 2<<20 {
		t.Errorf("the image has %d bytes now", st.Size())
	}
	// A socket that has taken the place of the server's is not removed.
	harness.OK(t, os.Remove(s.socket))
	harness.OK(t, os.WriteFile(s.socket, nil, 0o600))
	harness.OK(t, s.cmd.Process.Signal(syscall.SIGTERM))
	<-s.ended
	if _, err := os.Lstat(s.socket); err != nil {
		t.Errorf("the server has removed what was not its own: %v", err)
	}
}
