package soak

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
)

// usage is what a process has of the host's resources.
type usage struct {
	rss     int64
	threads int
	fds     int
	sockets int // of the fds
}

// look reads what the host says of a process.
func look(pid int) (usage, error) {
	var u usage
	proc := fmt.Sprintf("/proc/%d", pid)
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		first, _, _ := strings.Cut(strings.TrimSpace(value), " ")
		switch key {
		case "VmRSS":
			kib, err := strconv.ParseInt(first, 10, 64)
			if err != nil {
				return u, err
			}
			u.rss = kib << 10
		case "Threads":
			if u.threads, err = strconv.Atoi(first); err != nil {
				return u, err
			}
		}
	}
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return u, err
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
		if err != nil {
			continue // closed since
		}
		u.fds++
		if strings.HasPrefix(to, "socket:") {
			u.sockets++
		}
	}
	if u.rss == 0 || u.threads == 0 || u.fds == 0 {
		return u, fmt.Errorf("%s makes no sense: %+v", proc, u)
	}
	return u, nil
}

const (
	listeners = 1                // sockets of a server without clients
	restLimit = 20 * time.Second // for a server to notice that all its clients have left
	lookAgain = 2 * time.Millisecond
)

// atRest waits until a server whose clients have left has no more sockets than that it listens on, and then until it has
// fds files open, if fds is not 0.
func atRest(t *testing.T, srv *harness.Server, fds int) usage {
	t.Helper()
	deadline := time.Now().Add(restLimit)
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for {
		u, err := look(srv.PID())
		if err != nil {
			t.Fatalf("looking at the server: %v\n%s", err, srv.Output())
		}
		if u.sockets == listeners && (fds == 0 || u.fds == fds) {
			return u
		}
		if time.Now().After(deadline) {
			t.Fatalf("all clients have left %v ago, and the server has %d files open, of which %d sockets; before they came it had "+
				"%d, of which %d", restLimit, u.fds, u.sockets, fds, listeners)
		}
		<-again.C
	}
}

var goroutineHead = regexp.MustCompile(`(?m)^goroutine \d+ .*\[`)

// goroutines counts the goroutines that the Go runtime has listed, but for its own.
func goroutines(t *testing.T, output string) int {
	t.Helper()
	n := 0
	for block := range strings.SplitSeq(output, "\n\n") {
		if goroutineHead.MatchString(block) && !strings.Contains(block, "\ncreated by runtime.") {
			n++
		}
	}
	if n == 0 {
		t.Fatalf("the server has not listed its goroutines:\n%s", output)
	}
	return n
}

// goroutinesAtRest returns how many goroutines a server has that has seen one client, which left.
func goroutinesAtRest(t *testing.T) int {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image.qcow2")
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", image, "1M")
	srv := harness.Start(t, harness.Serve{Image: image})
	client := srv.Dial(t)
	harness.OK(t, client.Write(make([]byte, harness.SectorSize), 0))
	harness.OK(t, client.Close())
	atRest(t, srv, 0)
	return goroutines(t, srv.Abort())
}
