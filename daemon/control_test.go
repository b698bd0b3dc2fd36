package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// newImage makes a QCOW2 image and returns its name.
func newImage(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.qcow2")
	file, err := storage.CreateFile(name, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(qcow2.Create(t.Context(), file, qcow2.CreateOptions{Size: size}), file.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

// sound wants an image in which a check finds nothing.
func sound(t *testing.T, name string) {
	t.Helper()
	file, err := storage.OpenFile(name, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	rep, err := qcow2.CheckFile(context.Background(), file, qcow2.CheckOptions{})
	if err := errors.Join(err, file.Close()); err != nil || !rep.Clean() {
		t.Errorf("%s: %+v %v", name, rep, err)
	}
}

// managedServer is a daemon with a control socket.
type managedServer struct {
	*ControlClient
	t      *testing.T
	d      *Daemon
	k      *Control
	socket string // of NBD
}

// manage starts a daemon with a control socket. The test's cleanup ends it and wants everything written and nothing left.
func manage(t *testing.T, c Config, kc ControlConfig) *managedServer {
	t.Helper()
	if !knowsPeers {
		t.Skip(errNoPeers)
	}
	before := goleak.IgnoreCurrent()
	dir := t.TempDir()
	s := &managedServer{t: t, socket: filepath.Join(dir, "nbd")}
	kc.Socket.Socket = filepath.Join(dir, "control")
	var err error
	if s.k, err = OpenControl(t.Context(), kc); err != nil {
		t.Fatal(err)
	}
	c.Control = s.k
	c.Addresses = append(c.Addresses, Address{Socket: s.socket})
	if s.d, err = Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.d.Serve(ctx) }()
	s.ControlClient = NewControlClient(kc.Socket.Socket)
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
func (s *managedServer) must(method, path string, query url.Values, in, out any) {
	s.t.Helper()
	if err := s.Call(context.Background(), method, path, query, in, out); err != nil {
		s.t.Fatalf("%s %s?%s: %v", method, path, query.Encode(), err)
	}
}

// refuse sends a request that has to be answered with a status and a reason.
func (s *managedServer) refuse(status int, reason, method, path string, query url.Values, in any) {
	s.t.Helper()
	err := s.Call(context.Background(), method, path, query, in, nil)
	var e *ControlError
	if !errors.As(err, &e) || e.Status != status || !strings.Contains(e.Message, reason) {
		s.t.Errorf("%s %s?%s: %v, want %d and %q", method, path, query.Encode(), err, status, reason)
	}
}

func q(pairs ...string) url.Values {
	v := make(url.Values)
	for i := 0; i < len(pairs); i += 2 {
		v.Set(pairs[i], pairs[i+1])
	}
	return v
}

func (s *managedServer) show(name string) DiskDetails {
	s.t.Helper()
	var d DiskDetails
	s.must("GET", "/v1/disk", q("name", name), nil, &d)
	return d
}

// TestControl walks through the life of a disk that is served.
func TestControl(t *testing.T) {
	image := newImage(t, 1<<20)
	t.Cleanup(func() { sound(t, image) })
	s := manage(t, Config{Exports: []Export{{Name: "a/b", Image: image, Open: block.OpenOptions{Format: "qcow2"}}}},
		ControlConfig{Version: "v1"})
	name := q("name", "a/b")
	const disk, snapshots, bitmaps = "/v1/disk", "/v1/disk/snapshots", "/v1/disk/bitmaps"

	var list []DiskStatus
	s.must("GET", "/v1/disks", nil, nil, &list)
	if len(list) != 1 || list[0].Name != "a/b" || list[0].Image != image || list[0].Size != 1<<20 || list[0].State != StateServing {
		t.Errorf("disks: %+v", list)
	}
	s.refuse(404, "no disk", "GET", disk, q("name", "b"), nil)
	s.refuse(400, "names no disk", "GET", disk, nil, nil)
	if d := s.show(image); d.Name != "a/b" {
		t.Errorf("by its image: %+v", d)
	}

	var snap SnapshotStatus
	s.must("POST", snapshots, name, NameRequest{"one"}, &snap)
	if snap.Name != "one" || snap.ID != "1" || snap.DiskSize != 1<<20 {
		t.Errorf("snapshot: %+v", snap)
	}
	s.refuse(409, "has a snapshot", "POST", snapshots, name, NameRequest{"one"})
	s.refuse(400, "needs a name", "POST", snapshots, name, NameRequest{})
	s.refuse(400, "unknown field", "POST", snapshots, name, map[string]string{"nmae": "x"})
	s.must("POST", snapshots, name, NameRequest{"two"}, nil)
	s.refuse(409, "has a snapshot", "PATCH", snapshots, q("name", "a/b", "snapshot", "one"), NameRequest{"two"})
	s.must("PATCH", snapshots, q("name", "a/b", "snapshot", "one"), NameRequest{"three"}, nil)
	s.must("DELETE", snapshots, q("name", "a/b", "snapshot", "2"), nil, nil)
	s.refuse(404, "no snapshot", "DELETE", snapshots, q("name", "a/b", "snapshot", "two"), nil)
	s.refuse(400, "which snapshot", "DELETE", snapshots, name, nil)
	var snaps []SnapshotStatus
	s.must("GET", snapshots, name, nil, &snaps)
	if len(snaps) != 1 || snaps[0].Name != "three" {
		t.Errorf("snapshots: %+v", snaps)
	}

	var resized ResizeReply
	s.must("POST", disk+"/resize", name, ResizeRequest{Size: 2 << 20}, &resized)
	if resized.Size != 2<<20 || resized.OldSize != 1<<20 || s.show("a/b").Size != 2<<20 {
		t.Errorf("resized: %+v", resized)
	}
	s.refuse(409, "--shrink", "POST", disk+"/resize", name, ResizeRequest{Size: 1 << 20})
	s.refuse(400, "not a size", "POST", disk+"/resize", name, ResizeRequest{Size: 1<<20 + 1})
	s.refuse(400, "preallocation", "POST", disk+"/resize", name, ResizeRequest{Size: 3 << 20, Preallocation: "some"})
	s.must("POST", disk+"/resize", name, ResizeRequest{Size: 1 << 20, Shrink: true}, nil)

	s.must("POST", bitmaps, name, BitmapRequest{Name: "b0", Granularity: 4096}, nil)
	s.must("POST", bitmaps, name, BitmapRequest{Name: "b1", Granularity: 4096, Disabled: true}, nil)
	s.must("PATCH", bitmaps, q("name", "a/b", "bitmap", "b0"), BitmapAction{Action: "merge", Source: "b1"}, nil)
	s.must("PATCH", bitmaps, q("name", "a/b", "bitmap", "b0"), BitmapAction{Action: "disable"}, nil)
	s.must("PATCH", bitmaps, q("name", "a/b", "bitmap", "b1"), BitmapAction{Action: "enable"}, nil)
	s.must("PATCH", bitmaps, q("name", "a/b", "bitmap", "b1"), BitmapAction{Action: "clear"}, nil)
	s.refuse(400, "none of", "PATCH", bitmaps, q("name", "a/b", "bitmap", "b1"), BitmapAction{Action: "shine"})
	s.refuse(404, "no dirty bitmap", "PATCH", bitmaps, q("name", "a/b", "bitmap", "b2"), BitmapAction{Action: "clear"})
	s.refuse(409, "dirty bitmaps", "POST", snapshots+"/apply", q("name", "a/b", "snapshot", "three"), nil)
	var bits []BitmapStatus
	s.must("GET", bitmaps, name, nil, &bits)
	if want := []BitmapStatus{{Name: "b0", Granularity: 4096}, {Name: "b1", Granularity: 4096, Enabled: true}}; !slices.Equal(bits, want) {
		t.Errorf("bitmaps: %+v", bits)
	}
	s.must("DELETE", bitmaps, q("name", "a/b", "bitmap", "b0"), nil, nil)
	s.must("DELETE", bitmaps, q("name", "a/b", "bitmap", "b1"), nil, nil)

	s.must("POST", disk+"/flush", name, nil, nil)
	var checked CheckReply
	s.must("POST", disk+"/check", name, nil, &checked)
	if checked.Corruptions+checked.Leaks+checked.CheckErrors != 0 || checked.ImageEndOffset == 0 {
		t.Errorf("check: %+v", checked)
	}
	var server ServerStatus
	s.must("GET", "/v1/server", nil, nil, &server)
	if server.Kind != "serve" || server.Version != "v1" || server.Disks != 1 || len(server.URIs) != 1 {
		t.Errorf("server: %+v", server)
	}
	s.refuse(http.StatusNotFound, "", "GET", "/v1/nothing", nil, nil)
	s.refuse(http.StatusMethodNotAllowed, "", "PUT", "/v1/disks", nil, nil)
}

// TestControlSettings changes what a server has of its own.
func TestControlSettings(t *testing.T) {
	image := newImage(t, 1<<20)
	level := new(slog.LevelVar)
	var reloads []string
	fail := errors.New("nothing to read")
	s := manage(t, Config{Exports: []Export{{Image: image, Open: block.OpenOptions{Format: "qcow2"}}}}, ControlConfig{
		Level: level,
		Reload: func() ([]string, error) {
			reloads = append(reloads, "one")
			if len(reloads) > 1 {
				return nil, fail
			}
			return reloads, nil
		},
	})
	var l LogLevel
	s.must("GET", "/v1/log-level", nil, nil, &l)
	if l.Level != "info" {
		t.Errorf("level %q", l.Level)
	}
	s.must("PUT", "/v1/log-level", nil, LogLevel{"debug"}, &l)
	if l.Level != "debug" || level.Level() != slog.LevelDebug {
		t.Errorf("level %q, %v", l.Level, level.Level())
	}
	s.refuse(400, "no log level", "PUT", "/v1/log-level", nil, LogLevel{"loud"})
	var r ReloadReply
	s.must("POST", "/v1/reload", nil, nil, &r)
	if !slices.Equal(r.Changes, []string{"one"}) {
		t.Errorf("reload: %+v", r)
	}
	s.refuse(409, fail.Error(), "POST", "/v1/reload", nil, nil)
}

// TestControlPeers answers nobody but root and the server's own user, whatever the socket's mode is.
func TestControlPeers(t *testing.T) {
	for uid, want := range map[any]bool{0: true, os.Geteuid(): true, 54321: false, "nobody knows": false} {
		ctx := context.Background()
		switch uid := uid.(type) {
		case int:
			ctx = context.WithValue(ctx, peerKey{}, peer{uid: uint32(uid)})
		case string:
			ctx = context.WithValue(ctx, peerKey{}, peer{err: errors.New(uid)})
		}
		if err := allowed(ctx); (err == nil) != want || err != nil && statusOf(err) != http.StatusForbidden {
			t.Errorf("%v: %v", uid, err)
		}
	}
	if allowed(context.Background()) == nil {
		t.Error("a request from nowhere is answered")
	}
	s := manage(t, Config{Exports: []Export{export(rawImage(t))}}, ControlConfig{})
	st, err := os.Stat(s.path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// TestControlRaw has a disk that can do less.
func TestControlRaw(t *testing.T) {
	image := rawImage(t)
	s := manage(t, Config{Exports: []Export{export(image)}}, ControlConfig{})
	s.must("POST", "/v1/disk/resize", q("name", ""), ResizeRequest{Size: 2 << 20}, nil)
	if st, err := os.Stat(image); err != nil || st.Size() != 2<<20 || s.show("").Size != 2<<20 {
		t.Errorf("%v, %+v", err, s.show(""))
	}
	s.must("POST", "/v1/disk/resize", q("name", ""), ResizeRequest{Size: 1 << 20, Shrink: true}, nil)
	s.must("POST", "/v1/disk/flush", q("name", ""), nil, nil)
	s.refuse(400, "convert it to qcow2", "POST", "/v1/disk/snapshots", q("name", ""), NameRequest{"s"})
	s.refuse(400, "convert it to qcow2", "POST", "/v1/disk/check", q("name", ""), nil)
	s.refuse(400, "without preallocation", "POST", "/v1/disk/resize", q("name", ""), ResizeRequest{Size: 4 << 20, Preallocation: "full"})
}

// TestControlReadOnly refuses what clients may not do either.
func TestControlReadOnly(t *testing.T) {
	image := newImage(t, 1<<20)
	s := manage(t, Config{Exports: []Export{{Image: image, Open: block.OpenOptions{Format: "qcow2", ReadOnly: true}}}}, ControlConfig{})
	name := q("name", "")
	s.refuse(409, "read-only", "POST", "/v1/disk/snapshots", name, NameRequest{"s"})
	s.refuse(409, "read-only", "POST", "/v1/disk/resize", name, ResizeRequest{Size: 2 << 20})
	s.refuse(409, "read-only", "POST", "/v1/disk/bitmaps", name, BitmapRequest{Name: "b"})
	s.must("POST", "/v1/disk/check", name, nil, nil)
}

// TestControlBitmapServed keeps a bitmap that clients read.
func TestControlBitmapServed(t *testing.T) {
	image := newImage(t, 1<<20)
	dev, err := block.Open(t.Context(), image, block.OpenOptions{Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	im, _ := block.As[*qcow2.Image](dev)
	if err := errors.Join(im.AddBitmap(t.Context(), "b", qcow2.BitmapOptions{}), dev.Close()); err != nil {
		t.Fatal(err)
	}
	s := manage(t, Config{Exports: []Export{{Image: image, Bitmaps: []string{"b"}, Open: block.OpenOptions{Format: "qcow2"}}}}, ControlConfig{})
	s.refuse(409, "read by clients", "DELETE", "/v1/disk/bitmaps", q("name", "", "bitmap", "b"), nil)
	if d := s.show(""); len(d.Bitmaps) != 1 || !d.Bitmaps[0].Served {
		t.Errorf("%+v", d.Bitmaps)
	}
}

// TestMetrics reads what Prometheus reads, over TCP and over the control socket.
func TestMetrics(t *testing.T) {
	image := newImage(t, 1<<20)
	s := manage(t, Config{Exports: []Export{{Name: "d", Image: image, Open: block.OpenOptions{Format: "qcow2"}}}},
		ControlConfig{Metrics: ":0", Version: "v9"})
	addr := s.k.MetricsAddr().(*net.TCPAddr)
	if !addr.IP.IsLoopback() {
		t.Errorf("without a host the metrics are at %v", addr)
	}
	get := func(c *http.Client, url string) string {
		resp, err := c.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(resp.StatusCode, "\n", string(b))
	}
	c := &http.Client{Transport: &http.Transport{}}
	defer c.CloseIdleConnections()
	for _, text := range []string{get(c, "http://"+addr.String()+"/metrics"), get(&s.http, "http://drover/metrics")} {
		for _, want := range []string{
			"200\n", `drover_info{kind="serve",version="v9"} 1`, "drover_disks 1",
			`drover_disk_size_bytes{disk="d",hba="",image="` + image + `"} 1.048576e+06`, "go_goroutines",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%q is not in\n%s", want, text)
			}
		}
	}
	if text := get(c, "http://"+addr.String()+"/v1/disks"); !strings.HasPrefix(text, "404") {
		t.Errorf("over TCP there is more than metrics: %s", text)
	}
}

// TestControlOpen has sockets that cannot be.
func TestControlOpen(t *testing.T) {
	ctx := t.Context()
	if _, err := OpenControl(ctx, ControlConfig{Metrics: "256.256.256.256:1"}); err == nil {
		t.Error("an address that is none")
	}
	file := rawImage(t)
	if _, err := OpenControl(ctx, ControlConfig{Socket: Address{Socket: file}}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file in the place of the socket: %v", err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	if _, err := OpenControl(ctx, ControlConfig{Socket: Address{Socket: path}, Metrics: "256.256.256.256:1"}); err == nil {
		t.Error("an address that is none")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket stayed: %v", err)
	}
	err := NewControlClient(path).Call(ctx, "GET", "/v1/disks", nil, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "is the server running") {
		t.Errorf("without a server: %v", err)
	}
}
