//go:build unix

package qemunbd

import (
	"bytes"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// freePort is a port of the host that nobody listens on, at this moment.
func freePort(t *testing.T, host string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Skipf("no %s here: %v", host, err)
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	harness.OK(t, err)
	harness.OK(t, l.Close())
	return port
}

// TestTCP listens where it is told to, and says the same where it cannot.
func TestTCP(t *testing.T) {
	programs := both(t)
	dir := t.TempDir()
	images(t, dir)
	for _, c := range []struct{ bind, host string }{{"", "127.0.0.1"}, {"127.0.0.1", "127.0.0.1"}, {"localhost", "localhost"}, {"::1", "::1"}} {
		t.Run("bind "+c.bind, func(t *testing.T) {
			var taken []outcome
			for _, p := range programs {
				port := freePort(t, c.host)
				args := []string{"-p", port, "-r", "-f", "raw", "disk.raw"}
				if c.bind != "" {
					args = append(args, "-b", c.bind)
				}
				cmd := p.command(args...)
				cmd.Dir = dir
				var said bytes.Buffer
				cmd.Stdout, cmd.Stderr = &said, &said
				harness.OK(t, cmd.Start())
				uri := "nbd://" + net.JoinHostPort(c.host, port)
				awaitURI(t, uri)
				again := p.run(t, dir, args...)
				again.stderr = strings.ReplaceAll(again.stderr, port, "PORT")
				taken = append(taken, again)
				if size := harness.Must(t, "nbdinfo", "--size", uri); string(size) != "2097152\n" {
					t.Errorf("%s: %s", p.name, size)
				}
				if err := cmd.Wait(); err != nil || said.Len() > 0 {
					t.Errorf("%s ends with %v, %s", p.name, err, &said)
				}
			}
			if taken[0] != taken[1] || taken[0].code != 1 {
				t.Errorf("a port in use: stock %+v, ours %+v", taken[0], taken[1])
			}
		})
	}
	for _, args := range [][]string{{"-b", "nowhere.invalid"}, {"-p", "nope", "-b", "::1"}, {"-b", "192.0.2.1"}} {
		args = append(args, "-f", "raw", "disk.raw")
		if want, got := programs[0].run(t, dir, args...), programs[1].run(t, dir, args...); got != want {
			t.Errorf("%q: stock %+v, ours %+v", args, want, got)
		}
	}
}

func awaitURI(t *testing.T, uri string) {
	t.Helper()
	limit := time.After(patience)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for exec.Command(peer.Path("nbdinfo"), "--list", uri).Run() != nil {
		select {
		case <-limit:
			t.Fatalf("nobody answers at %s", uri)
		case <-retry.C:
		}
	}
}
