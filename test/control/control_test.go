// Package control tests how a server is managed while clients use it: in this process, so that the race detector sees both.
package control

import (
	"context"
	"errors"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
)

// server is a daemon with a control socket.
type server struct {
	*daemon.ControlClient
	t      *testing.T
	d      *daemon.Daemon
	socket string // of NBD
}

// start serves exports until the test ends, and wants everything written and nothing left behind then.
func start(t *testing.T, exports ...daemon.Export) *server {
	t.Helper()
	before := goleak.IgnoreCurrent()
	dir := harness.SocketDir(t)
	s := &server{t: t, socket: filepath.Join(dir, "nbd")}
	control := filepath.Join(dir, "control")
	k, err := daemon.OpenControl(t.Context(), daemon.ControlConfig{Socket: daemon.Address{Socket: control}})
	harness.OK(t, err)
	s.d, err = daemon.Open(t.Context(), daemon.Config{
		Exports: exports, Addresses: []daemon.Address{{Socket: s.socket}}, Control: k,
		Template: daemon.Export{Open: block.OpenOptions{Format: "qcow2"}},
	})
	harness.OK(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.d.Serve(ctx) }()
	s.ControlClient = daemon.NewControlClient(control)
	t.Cleanup(func() {
		s.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		goleak.VerifyNone(t, before)
	})
	return s
}

// must sends a request that has to succeed.
func (s *server) must(method, path string, query url.Values, in, out any) {
	s.t.Helper()
	if err := s.Call(context.Background(), method, path, query, in, out); err != nil {
		s.t.Fatalf("%s %s?%s: %v", method, path, query.Encode(), err)
	}
}

// refuse sends a request that has to be answered with a status and a reason.
func (s *server) refuse(status int, reason, method, path string, query url.Values, in any) {
	s.t.Helper()
	err := s.Call(context.Background(), method, path, query, in, nil)
	var e *daemon.ControlError
	if !errors.As(err, &e) || e.Status != status || !strings.Contains(e.Message, reason) {
		s.t.Errorf("%s %s?%s: %v, want %d and %q", method, path, query.Encode(), err, status, reason)
	}
}

func (s *server) show(name string) daemon.DiskDetails {
	s.t.Helper()
	var d daemon.DiskDetails
	s.must("GET", "/v1/disk", query("name", name), nil, &d)
	return d
}

// dial connects to an export.
func (s *server) dial(export string) *harness.Client {
	s.t.Helper()
	c, err := harness.Dial(s.socket, export)
	harness.OK(s.t, err)
	s.t.Cleanup(func() { c.Drop() })
	return c
}

func query(pairs ...string) url.Values {
	v := make(url.Values)
	for i := 0; i < len(pairs); i += 2 {
		v.Set(pairs[i], pairs[i+1])
	}
	return v
}

func export(name, image string) daemon.Export {
	return daemon.Export{Name: name, Image: image, Open: block.OpenOptions{Format: "qcow2"}}
}

// newImage makes an image in which a check must find nothing when the test ends.
func newImage(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.qcow2")
	file, err := storage.CreateFile(name, storage.OpenOptions{})
	harness.OK(t, err)
	harness.OK(t, errors.Join(qcow2.Create(t.Context(), file, qcow2.CreateOptions{Size: size}), file.Close()))
	t.Cleanup(func() {
		file, err := storage.OpenFile(name, storage.OpenOptions{ReadOnly: true})
		if err != nil {
			t.Error(err)
			return
		}
		rep, err := qcow2.CheckFile(context.Background(), file, qcow2.CheckOptions{})
		if err := errors.Join(err, file.Close()); err != nil || !rep.Clean() {
			t.Errorf("%s: %+v %v", name, rep, err)
		}
		harness.MustBeSound(t, name, false)
	})
	return name
}

// TestInUse has clients in the way of what must not be done to a disk under them.
func TestInUse(t *testing.T) {
	image, second := newImage(t, 1<<20), newImage(t, 1<<20)
	s := start(t, export("disk", image))
	const snapshots = "/v1/disk/snapshots"
	s.must("POST", snapshots, query("name", "disk"), daemon.NameRequest{Name: "s"}, nil)
	c := s.dial("disk")
	harness.OK(t, c.Write([]byte(strings.Repeat("x", 512)), 0))

	d := s.show("disk")
	if d.Clients != 1 || len(d.Connections) != 1 || d.Connections[0].Export != "disk" || d.IO.Writes != 1 || d.IO.BytesWritten != 512 ||
		!d.Unflushed {
		t.Errorf("%+v", d)
	}
	s.refuse(409, "in use by 1 connections", "POST", snapshots+"/apply", query("name", "disk", "snapshot", "s"), nil)
	s.refuse(409, "in use by 1 connections", "DELETE", "/v1/exports", query("name", "disk"), nil)
	s.must("POST", "/v1/disk/flush", query("name", "disk"), nil, nil)
	if s.show("disk").Unflushed {
		t.Error("unflushed after a flush")
	}

	// A client of a snapshot is one as well.
	old := s.dial("disk@s")
	s.refuse(409, "has clients", "DELETE", snapshots, query("name", "disk", "snapshot", "s"), nil)
	harness.OK(t, c.Close())
	s.waitClients("disk", 1)
	s.refuse(409, "in use by 1 connections", "POST", snapshots+"/apply", query("name", "disk", "snapshot", "s"), nil)
	harness.OK(t, old.Close())
	s.waitClients("disk", 0)
	s.must("POST", snapshots+"/apply", query("name", "disk", "snapshot", "s"), nil, nil)
	c = s.dial("disk")
	p := make([]byte, 512)
	if harness.OK(t, c.Read(p, 0)); p[0] != 0 {
		t.Error("the disk is not what the snapshot was")
	}

	// The size is what a client is told when it connects.
	s.must("POST", "/v1/disk/resize", query("name", "disk"), daemon.ResizeRequest{Size: 2 << 20}, nil)
	if err := c.Write(p, 1<<20); err == nil {
		t.Error("a client wrote beyond the end that it was told")
	}
	if again := s.dial("disk"); again.Size != 2<<20 {
		t.Errorf("a new client sees %d bytes", again.Size)
	}

	// An image is served once, and a name stands for one.
	request := daemon.ExportRequest{Name: "more", Image: second}
	s.refuse(409, "served already, as export \"disk\"", "POST", "/v1/exports", nil, daemon.ExportRequest{Name: "more", Image: image})
	s.refuse(409, "there is an export", "POST", "/v1/exports", nil, daemon.ExportRequest{Name: "disk", Image: second})
	s.refuse(400, "absolute", "POST", "/v1/exports", nil, daemon.ExportRequest{Name: "more", Image: "disk.qcow2"})
	s.must("POST", "/v1/exports", nil, request, nil)
	harness.OK(t, s.dial("more").Write(p, 0))
	s.must("DELETE", "/v1/exports", query("name", "more", "force", "true"), nil, nil)
	if _, err := harness.Dial(s.socket, "more"); err == nil {
		t.Error("an export that was removed has clients")
	}
	s.must("POST", "/v1/exports", nil, request, nil) // its lock is gone
	s.d.Seal("sealed by the test")
	s.refuse(409, "sealed by the test", "POST", "/v1/exports", nil, daemon.ExportRequest{Name: "x", Image: second})
}

// waitClients waits until the server has noticed that a disk has so many clients left.
func (s *server) waitClients(name string, n int) {
	s.t.Helper()
	for s.show(name).Clients > n {
	}
}

func TestMain(m *testing.M) { harness.Main(m) }
