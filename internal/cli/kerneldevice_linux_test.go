package cli

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/internal/nbddev"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/client"
)

// exportOn serves a disk of 1 MiB on a unix socket until the test ends.
func exportOn(t *testing.T, e nbd.Export) (*nbd.Server, client.Target) {
	t.Helper()
	e.Device = blocktest.NewBytes(make([]byte, 1<<20))
	server := nbd.NewServer(nbd.Options{})
	if err := server.AddExport(e); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		shutDown(t, server)
		if err := <-served; !errors.Is(err, nbd.ErrServerClosed) {
			t.Error(err)
		}
	})
	return server, client.Target{Address: client.Address{Path: path}, Export: e.Name}
}

func shutDown(t *testing.T, server *nbd.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}

// TestDialConnections opens as many connections as the export allows.
func TestDialConnections(t *testing.T) {
	for _, c := range []struct {
		one       bool
		ask, want int
	}{{false, 3, 3}, {false, 1, 1}, {true, 3, 1}} {
		_, target := exportOn(t, nbd.Export{Name: "disk", Advertised: nbd.Advertised{NoMultiConn: c.one}})
		n := &nbdAttach{connections: c.ask}
		conns, x, err := n.dial(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		if len(conns) != c.want || x.Size != 1<<20 {
			t.Errorf("%+v: %d connections to %d bytes", c, len(conns), x.Size)
		}
		var fds []int
		err = withSockets(conns, func(all []int) error {
			for _, fd := range all {
				kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
				if err != nil || kind != unix.SOCK_STREAM {
					t.Errorf("descriptor %d is a socket of type %d, %v", fd, kind, err)
				}
			}
			fds = slices.Clone(all)
			return nil
		})
		if err != nil || len(fds) != c.want {
			t.Errorf("%d descriptors, %v", len(fds), err)
		}
		for _, nc := range conns {
			if _, err := nc.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a connection that was handed over is still open here: %v", err)
			}
		}
	}
	_, target := exportOn(t, nbd.Export{Name: "disk"})
	target.Export = "none"
	if _, _, err := (&nbdAttach{connections: 1}).dial(t.Context(), target); err == nil || !strings.Contains(err.Error(), "refuses") {
		t.Errorf("no such export: %v", err)
	}
	target.Address.Path = "/nowhere/s"
	if _, _, err := (&nbdAttach{connections: 1}).dial(t.Context(), target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such server: %v", err)
	}
}

// takers is the kernel's end of reconnecting.
type takers struct {
	got int
	cfg nbddev.Config
}

func (k *takers) Reconnect(cfg nbddev.Config, sockets []int) error {
	k.got, k.cfg = k.got+len(sockets), cfg
	return nil
}

// TestAgain tries until the server is back, and takes no export that has become shorter.
func TestAgain(t *testing.T) {
	_, target := exportOn(t, nbd.Export{})
	// A server that hangs up twice before it is itself again.
	front := filepath.Join(t.TempDir(), "front")
	l, err := net.Listen("unix", front)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // there is another one by then
	var visits atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if visits.Add(1) == 2 {
				// The next one comes to the real server.
				if err := os.Rename(target.Address.Path, front); err != nil {
					t.Error(err)
				}
			}
			c.Close()
		}
	}()
	n := &nbdAttach{app: &app{name: "drover", err: new(bytes.Buffer)}, pause: time.Millisecond}
	cfg := nbddev.Config{Index: 3, Size: 1 << 20, DeadTimeout: 20 * time.Second, Identifier: "me"}
	kernel := new(takers)
	if err := n.again(t.Context(), kernel, cfg, client.Target{Address: client.Address{Path: front}}); err != nil {
		t.Fatal(err)
	}
	if kernel.got != 1 || kernel.cfg != cfg || visits.Load() != 2 {
		t.Errorf("the kernel got %d connections with %+v after %d visits", kernel.got, kernel.cfg, visits.Load())
	}
	l.Close()
	<-done
	cfg.Size *= 2
	if err := n.again(t.Context(), kernel, cfg, client.Target{Address: client.Address{Path: front}}); err == nil || kernel.got != 1 || !strings.Contains(err.Error(), "shrunk") {
		t.Errorf("a shorter export is taken: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.again(ctx, kernel, cfg, client.Target{Address: client.Address{Path: "/nowhere/s"}}); err == nil || kernel.got != 1 {
		t.Errorf("a server that does not come back: %v", err)
	}
}

// TestOwnClientRefused leaves no connection behind when the kernel does not take them.
func TestOwnClientRefused(t *testing.T) {
	server, _ := exportOn(t, nbd.Export{Name: "disk"})
	var came, ended atomic.Int32
	own := ownClient{server: server, come: func() { came.Add(1) }}
	for _, c := range []struct{ device, export string }{{"/dev/null", "disk"}, {"/nowhere/disk", "disk"}, {"/nowhere/nbd0", "none"}} {
		if d, err := own.connect(t.Context(), c.device, c.export, 2, func() { ended.Add(1) }); err == nil {
			t.Fatalf("%+v: connected as %s", c, d.name)
		}
	}
	if came.Load() != 5 || ended.Load() != 0 {
		t.Errorf("%d connections came, %d devices ended", came.Load(), ended.Load())
	}
	shutDown(t, server)
}

// TestNBDCommandMistakes is refused before anything is connected.
func TestNBDCommandMistakes(t *testing.T) {
	for args, want := range map[string]string{
		"nbd":                                "Expecting a command",
		"nbd foo":                            "Command not found: nbd foo",
		"nbd attach":                         "accepts between 1 and 2 arg(s)",
		"nbd attach nope":                    "File name string for new protocols must start with 'nbd:'",
		"nbd attach nbds://host/x":           "does no TLS",
		"nbd attach --connections 0 nbd://h": "--connections must be from 1 to 16",
		"nbd attach --timeout -1s nbd://h":   "must not be negative",
		"nbd attach nbd+unix:///?socket=/nowhere": "Failed to connect to '/nowhere': No such file or directory",
		"nbd detach /nowhere/nbd0":                "/nowhere/nbd0: No such file or directory",
		"nbd detach /dev/null":                    "/dev/null is not a block device",
		"nbd status --output=x":                   "--output must be used with human or json as argument.",
		"nbd list nbd+unix:///?socket=/nowhere":   "Failed to connect to '/nowhere': No such file or directory",
		"nbd list nbds://host/x":                  "needs credentials",
	} {
		var out, errs bytes.Buffer
		if code := Run(t.Context(), strings.Fields(args), &out, &errs); code != 1 || !strings.Contains(errs.String(), want) || out.Len() > 0 {
			t.Errorf("drover %s: %d, %q, %q, want %q", args, code, &out, &errs, want)
		}
	}
}

func TestNBDList(t *testing.T) {
	_, target := exportOn(t, nbd.Export{Name: "disk", Description: "some words"})
	uri := "nbd+unix:///?socket=" + target.Address.Path
	var out, errs bytes.Buffer
	if code := Run(t.Context(), []string{"nbd", "list", uri}, &out, &errs); code != 0 || errs.Len() > 0 {
		t.Fatalf("%d, %s", code, &errs)
	}
	want := " export: 'disk'\n  description: some words\n  size:  1048576\n  flags: 0x58f ( readonly flush fua df multi cache )\n" +
		"  min block: 1\n  opt block: 4096\n  max block: 33554432\n" +
		"  available meta contexts: 2\n   base:allocation\n   qemu:allocation-depth\n"
	if out.String() != want {
		t.Errorf("got %s", &out)
	}
	out.Reset()
	if code := Run(t.Context(), []string{"nbd", "list", "--output=json", uri}, &out, &errs); code != 0 {
		t.Fatalf("%d, %s", code, &errs)
	}
	want = `[
    {
        "name": "disk",
        "description": "some words",
        "size": 1048576,
        "flags": [
            "readonly",
            "flush",
            "fua",
            "df",
            "multi",
            "cache"
        ],
        "min-block": 1,
        "prefer-block": 4096,
        "max-block": 33554432,
        "contexts": [
            "base:allocation",
            "qemu:allocation-depth"
        ]
    }
]
`
	if out.String() != want {
		t.Errorf("got %s", &out)
	}
}
