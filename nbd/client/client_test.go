package client_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/internal/certtest"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/client"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
	"github.com/droverproject/drover/storage"
)

// patience is how long a test waits for what must happen before it fails.
const patience = 20 * time.Second

// serve serves exports on a unix socket until the test ends, or until stop is called, and returns its address.
func serve(t testing.TB, path string, o nbd.Options, exports ...nbd.Export) (client.Address, func()) {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(o)
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	stop := sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		<-served
	})
	t.Cleanup(stop)
	return client.Address{Path: path}, stop
}

func open(t testing.TB, o client.Options) *client.Client {
	t.Helper()
	c, err := client.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // a test may have closed it
	return c
}

func TestConforms(t *testing.T) {
	for name, connections := range map[string]int{"one": 1, "three": 3} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				addr, _ := serve(t, "", nbd.Options{}, nbd.Export{Name: "x", Device: nbdtest.NewDevice(1 << 20)})
				c, err := client.Open(t.Context(), client.Options{
					Dialing: client.Dialing{Address: addr}, Export: "x", Connections: connections,
				})
				if err != nil {
					t.Fatal(err)
				}
				dev, err := block.NewRaw(c, block.RawOptions{})
				if err != nil {
					t.Fatal(err)
				}
				return dev
			})
		})
	}
}

func TestEnds(t *testing.T) {
	addr, _ := serve(t, "", nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(10000)})
	c := open(t, client.Options{Dialing: client.Dialing{Address: addr}})
	p := make([]byte, 100)
	if n, err := c.ReadAt(p, 9950); n != 50 || !errors.Is(err, io.EOF) {
		t.Errorf("reading over the end: %d, %v", n, err)
	}
	if _, err := c.WriteAt(p, 9950); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("writing over the end: %v", err)
	}
	if err := c.Truncate(20000); !errors.Is(err, storage.ErrNotSupported) || err.Error() != "Cannot grow NBD nodes" {
		t.Errorf("growing: %v", err)
	}
	if err := c.Truncate(5000); err != nil {
		t.Errorf("using less: %v", err)
	}
	if _, _, err := c.NextExtent(10000); !errors.Is(err, io.EOF) {
		t.Errorf("extent at the end: %v", err)
	}
}

func TestReadOnly(t *testing.T) {
	addr, _ := serve(t, "", nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(10000), ReadOnly: true})
	d := client.Dialing{Address: addr}
	if _, err := client.Open(t.Context(), client.Options{Dialing: d}); !errors.Is(err, storage.ErrReadOnly) {
		t.Errorf("opening for writing: %v", err)
	}
	for _, o := range []client.Options{{Dialing: d, ReadOnly: true}, {Dialing: d, AutoReadOnly: true}} {
		c := open(t, o)
		if !c.Stat().ReadOnly {
			t.Error("does not say that it is read-only")
		}
		if _, err := c.WriteAt([]byte{1}, 0); !errors.Is(err, storage.ErrReadOnly) {
			t.Errorf("writing: %v", err)
		}
		if err := c.ZeroRange(0, 10); !errors.Is(err, storage.ErrReadOnly) {
			t.Errorf("zeroing: %v", err)
		}
	}
}

func TestErrors(t *testing.T) {
	dev := nbdtest.NewDevice(1 << 20)
	addr, _ := serve(t, "", nbd.Options{}, nbd.Export{Device: nbdtest.Slow{Device: dev}})
	c := open(t, client.Options{Dialing: client.Dialing{Address: addr}})
	for _, want := range []error{syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC} {
		dev.Gate = func(context.Context, string, int64, int64) error { return want }
		_, rerr := c.ReadAt(make([]byte, 10), 0)
		_, werr := c.WriteAt(make([]byte, 10), 0)
		for what, err := range map[string]error{"read": rerr, "write": werr, "flush": c.Sync()} {
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", what, err, want)
			}
		}
	}
	dev.Gate = nil
	if _, err := c.ReadAt(make([]byte, 10), 0); err != nil {
		t.Errorf("after the errors: %v", err)
	}
}

// TestInFlight: requests do not wait for one another.
func TestInFlight(t *testing.T) {
	dev := nbdtest.NewDevice(1 << 20)
	const most = 8
	var mu sync.Mutex
	waiting, all := 0, make(chan struct{})
	dev.Gate = func(ctx context.Context, op string, off, n int64) error {
		mu.Lock()
		if waiting++; waiting == most {
			close(all)
		}
		mu.Unlock()
		select {
		case <-all:
			return nil
		case <-time.After(patience):
			return errors.New("nobody else came")
		}
	}
	addr, _ := serve(t, "", nbd.Options{}, nbd.Export{Device: nbdtest.Slow{Device: dev}})
	c := open(t, client.Options{Dialing: client.Dialing{Address: addr}})
	var wg sync.WaitGroup
	for i := range most {
		wg.Go(func() {
			if _, err := c.ReadAt(make([]byte, 512), int64(i)*512); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestReconnect(t *testing.T) {
	dev := nbdtest.NewDevice(1 << 20)
	path := filepath.Join(t.TempDir(), "s")
	addr, stop := serve(t, path, nbd.Options{}, nbd.Export{Device: dev})
	c := open(t, client.Options{Dialing: client.Dialing{Address: addr}, ReconnectDelay: patience})
	if _, err := c.WriteAt([]byte("before"), 0); err != nil {
		t.Fatal(err)
	}
	stop()
	done := make(chan error, 1)
	go func() { _, err := c.WriteAt([]byte("during"), 100); done <- err }()
	serve(t, path, nbd.Options{}, nbd.Export{Device: dev})
	if err := <-done; err != nil {
		t.Fatalf("a write that had to wait for the server: %v", err)
	}
	got := make([]byte, 106)
	if _, err := c.ReadAt(got, 0); err != nil || string(got[:6])+string(got[100:]) != "beforeduring" {
		t.Errorf("read %q (%v)", got, err)
	}
}

func TestLost(t *testing.T) {
	dev := nbdtest.NewDevice(1 << 20)
	path := filepath.Join(t.TempDir(), "s")
	addr, stop := serve(t, path, nbd.Options{}, nbd.Export{Device: dev})
	c := open(t, client.Options{Dialing: client.Dialing{Address: addr}})
	stop()
	if _, err := c.ReadAt(make([]byte, 10), 0); !errors.Is(err, client.ErrLost) || !errors.Is(err, syscall.EIO) {
		t.Errorf("without a server: %v", err)
	}
	_, stop = serve(t, path, nbd.Options{}, nbd.Export{Device: dev})
	if _, err := c.ReadAt(make([]byte, 10), 0); err != nil {
		t.Errorf("with the server back: %v", err)
	}
	stop()
	if _, err := c.ReadAt(make([]byte, 10), 0); !errors.Is(err, client.ErrLost) {
		t.Errorf("without a server again: %v", err)
	}
	serve(t, path, nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(1 << 10)})
	if _, err := c.ReadAt(make([]byte, 10), 0); err == nil || !strings.Contains(err.Error(), "has changed") {
		t.Errorf("with another export in its place: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.ReadAt(make([]byte, 10), 0); !errors.Is(err, client.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestOpenTimeout(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	done := make(chan error, 1)
	go func() {
		c, err := client.Open(context.Background(), client.Options{
			Dialing: client.Dialing{Address: client.Address{Path: path}}, OpenTimeout: patience,
		})
		if err == nil {
			err = c.Close()
		}
		done <- err
	}()
	serve(t, path, nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(1 << 10)})
	if err := <-done; err != nil {
		t.Error(err)
	}
	none := client.Address{Path: path + "none"}
	var unreachable *client.ConnectError
	if _, err := client.Open(t.Context(), client.Options{Dialing: client.Dialing{Address: none}}); !errors.As(err, &unreachable) {
		t.Errorf("nobody there: %v", err)
	}
}

func TestTLS(t *testing.T) {
	ca := certtest.NewCA(t)
	cert := ca.Issue(certtest.Names{CommonName: "localhost", DNS: []string{"localhost"}, Server: true})
	server := &tls.Config{Certificates: []tls.Certificate{cert}}
	addr, _ := serve(t, "", nbd.Options{TLS: &nbd.TLS{Config: server, Required: true}}, nbd.Export{Name: "x", Device: nbdtest.NewDevice(1 << 20)})
	good := &tls.Config{RootCAs: ca.Pool()}
	if _, err := client.Open(t.Context(), client.Options{Dialing: client.Dialing{Address: addr}, Export: "x"}); err == nil ||
		!strings.Contains(err.Error(), "Server requires TLS") {
		t.Errorf("in plain text: %v", err)
	}
	if _, err := client.List(t.Context(), client.Dialing{Address: addr}); err == nil {
		t.Error("listed in plain text")
	}
	for name, c := range map[string]struct {
		config   *tls.Config
		hostname string
		ok       bool
	}{
		"good":       {good, "localhost", true},
		"wrong name": {good, "elsewhere", false},
		"wrong CA":   {&tls.Config{RootCAs: x509.NewCertPool()}, "localhost", false},
	} {
		o := client.Options{Dialing: client.Dialing{Address: addr, TLS: c.config, Hostname: c.hostname}, Export: "x"}
		cl, err := client.Open(t.Context(), o)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil {
			continue
		}
		want := bytes.Repeat([]byte("encrypted "), 100000)
		got := make([]byte, len(want))
		_, werr := cl.WriteAt(want, 7)
		_, rerr := cl.ReadAt(got, 7)
		if err := errors.Join(werr, rerr, cl.Close()); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	plain, _ := serve(t, "", nbd.Options{}, nbd.Export{Device: nbdtest.NewDevice(1 << 10)})
	_, err := client.Open(t.Context(), client.Options{Dialing: client.Dialing{Address: plain, TLS: good}})
	if err == nil || err.Error() != "Server does not support STARTTLS" {
		t.Errorf("a server without TLS: %v", err)
	}
}

func TestList(t *testing.T) {
	addr, _ := serve(t, "", nbd.Options{},
		nbd.Export{Name: "a", Description: "first", Device: nbdtest.NewDevice(1 << 20)},
		nbd.Export{Name: "b", Device: nbdtest.NewDevice(512), ReadOnly: true})
	list, err := client.List(t.Context(), client.Dialing{Address: addr})
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	a, b := list[0], list[1]
	if a.Name != "a" || a.Description != "first" || a.Size != 1<<20 || a.MinBlock != 1 || a.MaxBlock != 32<<20 {
		t.Errorf("%+v", a)
	}
	if want := []string{"base:allocation", "qemu:allocation-depth"}; !slices.Equal(a.Contexts, want) {
		t.Errorf("contexts %q, want %q", a.Contexts, want)
	}
	if b.Name != "b" || b.Size != 512 || b.Flags&2 == 0 || a.Flags&2 != 0 {
		t.Errorf("%+v", b)
	}
}

func TestParseName(t *testing.T) {
	unix := func(path string) client.Address { return client.Address{Path: path} }
	tcp := func(host, port string) client.Address { return client.Address{Host: host, Port: port} }
	for name, want := range map[string]client.Target{
		"nbd:unix:/s":                       {Address: unix("/s")},
		"nbd:unix:/s:exportname=a:b":        {Address: unix("/s"), Export: "a:b"},
		"nbd:host:1":                        {Address: tcp("host", "1")},
		"nbd:host:1:exportname=x":           {Address: tcp("host", "1"), Export: "x"},
		"nbd:[::1]:1":                       {Address: tcp("[::1]", "1")},
		"nbd://host":                        {Address: tcp("host", "10809")},
		"nbd://host/":                       {Address: tcp("host", "10809")},
		"nbd://host:7/a/b":                  {Address: tcp("host", "7"), Export: "a/b"},
		"nbd://[::1]:7/a%20b":               {Address: tcp("::1", "7"), Export: "a b"},
		"nbd+tcp://host/x":                  {Address: tcp("host", "10809"), Export: "x"},
		"nbd+unix://?socket=/s":             {Address: unix("/s")},
		"nbd+unix:///x?socket=/s":           {Address: unix("/s"), Export: "x"},
		"nbds://host/x":                     {Address: tcp("host", "10809"), Export: "x", TLS: true},
		"nbds+unix:///x?socket=%2Fa%20b%2F": {Address: unix("/a b/"), Export: "x", TLS: true},
	} {
		got, err := client.ParseName(name)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", name, got, err, want)
		}
	}
	for name, want := range map[string]string{
		"nbd:": "NBD server address missing", "nbd:foo": "error parsing address 'foo'", "nbd:host:": "error parsing address 'host:'",
		"nbd+unix:///x": "No valid URL specified", "nbd://h/x?socket=/s": "No valid URL specified",
		"nbd+unix://h/x?socket=/s": "No valid URL specified", "nbd+foo://h": "No valid URL specified", "nbd://h:x/": "No valid URL specified",
	} {
		if _, err := client.ParseName(name); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
}

// need skips the test where a program is missing.
func need(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed: interoperation with it is not tested", name)
	}
}

// spawn runs a server until the test ends, and waits until it listens.
func spawn(t *testing.T, socket, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // which reports the signal
	})
	for deadline := time.Now().Add(patience); ; {
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %v\n%s", name, err, &out)
		}
		time.Sleep(10 * time.Millisecond) // nothing tells when another program listens
	}
}

// TestOtherServers has servers of others keep a disk.
func TestOtherServers(t *testing.T) {
	for name, start := range map[string]func(t *testing.T, socket string){
		"qemu-nbd": func(t *testing.T, socket string) {
			need(t, "qemu-nbd")
			file := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			spawn(t, socket, "qemu-nbd", "-t", "-e", "8", "-f", "raw", "--discard=unmap", "-k", socket, file)
		},
		"nbdkit": func(t *testing.T, socket string) {
			need(t, "nbdkit")
			spawn(t, socket, "nbdkit", "-f", "-U", socket, "memory", "1M")
		},
		"nbdkit without structured replies": func(t *testing.T, socket string) {
			need(t, "nbdkit")
			spawn(t, socket, "nbdkit", "-f", "--no-sr", "-U", socket, "memory", "1M")
		},
		"nbdkit with blocks": func(t *testing.T, socket string) {
			need(t, "nbdkit")
			spawn(t, socket, "nbdkit", "-f", "-U", socket, "--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512",
				"blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error")
		},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			start(t, socket)
			c := open(t, client.Options{Dialing: client.Dialing{Address: client.Address{Path: socket}}})
			want := make([]byte, 1<<20)
			for i, r := range [][2]int{{0, 4096}, {100, 1}, {100000, 200000}, {1<<20 - 512, 512}, {70000, 512}} {
				p := bytes.Repeat([]byte{byte(i + 1)}, r[1])
				copy(want[r[0]:], p)
				if _, err := c.WriteAt(p, int64(r[0])); err != nil {
					t.Fatal(err)
				}
			}
			clear(want[131072:196608])
			if err := storage.Zero(c, 131072, 65536, true); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(c.Discard(524288, 65536), c.Sync()); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 1<<20)
			if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the disk holds something else (%v)", err)
			}
			for off := int64(0); off < 1<<20; {
				end, data, err := c.NextExtent(off)
				if err != nil || end <= off {
					t.Fatalf("extent at %d: %d, %v", off, end, err)
				}
				if !data && !bytes.Equal(want[off:end], make([]byte, end-off)) {
					t.Errorf("%d to %d is a hole with data in it", off, end)
				}
				off = end
			}
		})
	}
}

// TestOldServer: one from before there were options. (That of nbdkit claims to zero and to flush, but refuses.)
func TestOldServer(t *testing.T) {
	need(t, "nbdkit")
	socket := filepath.Join(t.TempDir(), "s")
	spawn(t, socket, "nbdkit", "-f", "--oldstyle", "-U", socket, "memory", "1M")
	d := client.Dialing{Address: client.Address{Path: socket}}
	c := open(t, client.Options{Dialing: d})
	want, got := bytes.Repeat([]byte{7}, 100000), make([]byte, 100000)
	_, werr := c.WriteAt(want, 1000)
	_, rerr := c.ReadAt(got, 1000)
	if err := errors.Join(werr, rerr); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk holds something else (%v)", err)
	}
	if list, err := client.List(t.Context(), d); err != nil || len(list) != 1 || list[0].Size != 1<<20 {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := client.Open(t.Context(), client.Options{Dialing: d, Export: "x"}); err == nil {
		t.Error("opened an export by its name")
	}
}
