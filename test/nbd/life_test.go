//go:build unix

package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// served is a small image with some content.
func served(t *testing.T) string {
	t.Helper()
	peer.Need(t, "qemu-img", "qemu-io")
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image)
	return image
}

// serveRun runs `drover serve --run`.
func serveRun(t *testing.T, command string, args ...string) harness.Result {
	t.Helper()
	return harness.Drover(t, append([]string{"serve", "--run", command}, args...)...)
}

// TestRun ends with the command, with its exit code, and tells it where the server is.
func TestRun(t *testing.T) {
	peer.Need(t, "nbdinfo")
	image := served(t)
	r := serveRun(t, `test -S "$unixsocket" && test "$nbd" = "nbd:unix:$unixsocket" && nbdinfo --size "$uri"; echo $unixsocket; exit 7`, image)
	size, socket, _ := strings.Cut(string(r.Stdout), "\n")
	if r.Code != 7 || size != strconv.Itoa(4<<20) || len(r.Stderr) != 0 {
		t.Errorf("got %s", r)
	}
	if _, err := os.Stat(filepath.Dir(strings.TrimSpace(socket))); !os.IsNotExist(err) {
		t.Errorf("the folder of the socket is left behind (%v)", err)
	}
	if r := serveRun(t, `nbdinfo --size "nbd://localhost:$port"`, "--listen", "localhost:0", image); r.Code != 0 {
		t.Errorf("over TCP: %s", r)
	}
	if r := serveRun(t, "kill -9 $$", image); r.Code != 1 {
		t.Errorf("a command that is killed: %s", r)
	}
	if r := serveRun(t, "true", filepath.Join(t.TempDir(), "none")); r.Code != 1 || !strings.Contains(string(r.Stderr), "No such file") {
		t.Errorf("no image: %s", r)
	}
}

// TestRunIsEnded ends the command when the server is told to end.
func TestRunIsEnded(t *testing.T) {
	cmd := exec.Command(harness.Binary(t), "serve", "--run", `trap 'kill $!; echo ended; exit 3' TERM; echo begun; sleep 600 & wait`, served(t))
	out, err := cmd.StdoutPipe()
	harness.OK(t, err)
	harness.OK(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended
	line := make([]byte, 6)
	if _, err := out.Read(line); err != nil || string(line) != "begun\n" {
		t.Fatalf("%q, %v", line, err)
	}
	harness.OK(t, cmd.Process.Signal(syscall.SIGTERM))
	var rest bytes.Buffer
	_, err = rest.ReadFrom(out)
	harness.OK(t, err)
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 3 || rest.String() != "ended\n" {
		t.Errorf("%v, %q", err, &rest)
	}
}

// TestTemporary takes changes and leaves the image as it was.
func TestTemporary(t *testing.T) {
	image := served(t)
	before, err := os.ReadFile(image)
	harness.OK(t, err)
	r := serveRun(t, `qemu-io -f raw -c "write -P 9 0 64k" -c "write -z 64k 64k" -c flush "$uri" && qemu-io -f raw -r -c "read -P 9 0 64k" -c "read -P 0 64k 64k" -c "read -P 1 128k 64k" "$uri"`,
		"--temporary", image)
	if r.Code != 0 || bytes.Contains(r.Stdout, []byte("failed")) {
		t.Errorf("got %s", r)
	}
	after, err := os.ReadFile(image)
	harness.OK(t, err)
	if !bytes.Equal(before, after) {
		t.Error("the image has changed")
	}
	if r := serveRun(t, "true", "--temporary", "--read-only", image); r.Code != 1 {
		t.Errorf("--temporary with --read-only: %s", r)
	}
}

// TestManner serves a disk in a certain manner and looks at what became of the image.
func TestManner(t *testing.T) {
	for _, c := range []struct {
		args    string
		command string
		data    string // where the image has data then, in units of 64 KiB
		check   string
	}{
		{"", "write -P 0 0 64k", "0-16", "read -P 0 0 64k"},
		{"--detect-zeroes=on", "write -P 0 0 64k", "1-16", "read -P 0 0 64k"},
		{"--detect-zeroes=unmap", "write -P 0 64k 64k", "0-1 2-16", "read -P 0 64k 64k"},
		{"", "discard 64k 64k", "0-1 2-16", "read -P 1 0 64k"},
		{"--discard=ignore", "discard 64k 64k", "0-16", "read -P 1 64k 64k"},
		{"--offset=64k", "write -z 0 64k", "0-1 2-16", "read -P 1 0 64k"},
		{"--offset=1M --description=words", "write -P 5 0 64k", "0-17", "read -P 5 1M 64k"},
	} {
		t.Run(c.args+" "+c.command, func(t *testing.T) {
			image := served(t)
			r := serveRun(t, fmt.Sprintf(`qemu-io -f raw -c "%s" "$uri"`, c.command), append(strings.Fields(c.args), image)...)
			if r.Code != 0 || bytes.Contains(r.Stdout, []byte("failed")) {
				t.Fatalf("got %s", r)
			}
			harness.Must(t, "qemu-img", "check", "-q", image)
			if out := harness.Must(t, "qemu-io", "-r", "-f", "qcow2", "-c", c.check, image); bytes.Contains(out, []byte("failed")) {
				t.Errorf("%s", out)
			}
			var data []string
			for _, s := range harness.ParseMap(t, harness.Must(t, "qemu-img", "map", "-f", "qcow2", "--output=json", image)) {
				from, to := s.Start>>16, (s.Start+s.Length)>>16
				if !s.Data {
					continue
				}
				if n := len(data); n > 0 && strings.HasSuffix(data[n-1], fmt.Sprintf("-%d", from)) {
					first, _, _ := strings.Cut(data[n-1], "-")
					data[n-1] = fmt.Sprintf("%s-%d", first, to)
					continue
				}
				data = append(data, fmt.Sprintf("%d-%d", from, to))
			}
			if got := strings.Join(data, " "); got != c.data {
				t.Errorf("data at %s, want %s", got, c.data)
			}
		})
	}
}

// TestUntilIdle ends when the last client has gone, and writes the number of its process.
func TestUntilIdle(t *testing.T) {
	peer.Need(t, "nbdinfo")
	pid := filepath.Join(t.TempDir(), "pid")
	s := harness.Start(t, harness.Serve{Image: served(t), Args: []string{"--pid-file", pid}})
	if text, err := os.ReadFile(pid); err != nil || string(text) != fmt.Sprintf("%d\n", s.PID()) {
		t.Errorf("the process %d says %q, %v", s.PID(), text, err)
	}
	s.Stop()
	socket := filepath.Join(harness.SocketDir(t), "s")
	cmd := exec.Command(harness.Binary(t), "serve", "--until-idle", "--socket", socket, served(t))
	harness.OK(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended
	uri := "nbd+unix:///?socket=" + socket
	for exec.Command(peer.Path("nbdinfo"), "--list", uri).Run() != nil {
		if cmd.ProcessState != nil {
			t.Fatal("the server has ended")
		}
	}
	harness.Must(t, "qemu-io", "-f", "raw", "-c", "write 0 64k", uri)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestExitWithParent ends when the shell that started it does.
func TestExitWithParent(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	harness.Must(t, "sh", "-c", fmt.Sprintf(
		`%s serve --exit-with-parent --pid-file %s --listen localhost:0 %s >/dev/null 2>&1 & until [ -s %s ]; do sleep 0.01; done`,
		harness.Binary(t), file, served(t), file))
	text, err := os.ReadFile(file)
	harness.OK(t, err)
	pid := strings.TrimSpace(string(text))
	n, err := strconv.Atoi(pid)
	harness.OK(t, err)
	ended(t, n)
}

// TestFork returns once the server in the background serves, and with what is wrong if it does not.
func TestFork(t *testing.T) {
	peer.Need(t, "nbdinfo")
	image := served(t)
	dir := t.TempDir()
	socket, file := filepath.Join(harness.SocketDir(t), "s"), filepath.Join(dir, "pid")
	for _, args := range [][]string{nil, {"--sandbox=best-effort"}} {
		r := harness.Drover(t, append([]string{"serve", "--fork", "--pid-file", file, "--socket", socket, image}, args...)...)
		if r.Code != 0 || !bytes.Contains(r.Stdout, []byte("nbd+unix:")) {
			t.Fatalf("got %s", r)
		}
		text, err := os.ReadFile(file)
		harness.OK(t, err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		harness.OK(t, err)
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) }) // it has ended
		harness.Must(t, "nbdinfo", "--size", "nbd+unix:///?socket="+socket)
		if r := harness.Drover(t, "serve", "--fork", "--socket", socket+"2", image); r.Code != 1 || !bytes.Contains(r.Stderr, []byte("lock")) {
			t.Errorf("an image in use: %s", r)
		}
		harness.OK(t, syscall.Kill(pid, syscall.SIGTERM))
		ended(t, pid)
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("the socket is left behind (%v)", err)
		}
	}
}

// ended waits until a process that is nobody's child has ended.
func ended(t *testing.T, pid int) {
	t.Helper()
	limit := time.After(30 * time.Second)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(state), ") Z ") {
			return
		}
		select {
		case <-limit:
			t.Fatalf("the server lives on: %s", state)
		case <-retry.C:
		}
	}
}
