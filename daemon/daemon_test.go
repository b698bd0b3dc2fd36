package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

func rawImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func export(image string) Export {
	return Export{Image: image, Open: block.OpenOptions{Format: block.FormatRaw}}
}

// free reports whether nobody has the image open.
func free(t *testing.T, image string) bool {
	t.Helper()
	dev, err := block.Open(t.Context(), image, block.OpenOptions{Format: block.FormatRaw})
	var lock *storage.LockError
	if errors.As(err, &lock) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	return true
}

func TestLife(t *testing.T) {
	image := rawImage(t)
	sock := filepath.Join(t.TempDir(), "sock")
	d, err := Open(t.Context(), Config{
		Exports:   []Export{export(image)},
		Addresses: []Address{{Socket: sock}, {TCP: "127.0.0.1:0"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if free(t, image) {
		t.Error("the image is not locked")
	}
	if list := d.Exports(); len(list) != 1 || list[0] != (Status{Image: image, Format: "raw", Size: 1 << 20}) {
		t.Errorf("Exports = %+v", list)
	}
	uris := d.URIs("")
	if len(uris) != 2 || uris[0] != "nbd+unix:///?socket="+sock || !strings.HasPrefix(uris[1], "nbd://127.0.0.1:") {
		t.Errorf("URIs = %q", uris)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // to serve under a context that has ended is to close
	if err := d.Serve(ctx); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if !free(t, image) {
		t.Error("the image is still locked")
	}
	if _, err := os.Lstat(sock); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestOpenAllOrNothing: whatever is wrong, nothing stays behind.
func TestOpenAllOrNothing(t *testing.T) {
	image := rawImage(t)
	sock := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addresses := []Address{{Socket: sock}}
	for name, c := range map[string]Config{
		"missing image":    {Exports: []Export{export(image), export(image + ".missing")}, Addresses: addresses},
		"image twice":      {Exports: []Export{export(image), export(image)}, Addresses: addresses},
		"no format":        {Exports: []Export{export(image), {Image: image}}, Addresses: addresses},
		"address taken":    {Exports: []Export{export(image)}, Addresses: append(addresses, Address{TCP: l.Addr().String()})},
		"no folder":        {Exports: []Export{export(image)}, Addresses: append(addresses, Address{Socket: sock + "/x"})},
		"nowhere to serve": {Exports: []Export{export(image)}},
	} {
		d, err := Open(t.Context(), c)
		if err == nil || d != nil {
			t.Errorf("%s: no error", name)
		}
		if !free(t, image) {
			t.Errorf("%s: the image is still locked", name)
		}
		if _, err := os.Lstat(sock); !os.IsNotExist(err) {
			t.Errorf("%s: the socket is still there", name)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestGuessedRaw(t *testing.T) {
	image := rawImage(t)
	l := func() []Address { return []Address{{Socket: filepath.Join(t.TempDir(), "sock")}} }
	if _, err := Open(t.Context(), Config{Exports: []Export{{Image: image}}, Addresses: l()}); !errors.Is(err, ErrGuessedRaw) {
		t.Errorf("writable: %v", err)
	}
	o := block.OpenOptions{ReadOnly: true, Options: map[string]string{"l2-cache-size": "1M"}}
	d, err := Open(t.Context(), Config{Exports: []Export{{Image: image, Open: o}}, Addresses: l()})
	if err != nil {
		t.Fatal(err)
	}
	if !d.Exports()[0].ReadOnly {
		t.Error("not read-only")
	}
	if err := d.release(); err != nil {
		t.Error(err)
	}
}

func TestUnixSocketOwnership(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sock")
	first, err := Listen(t.Context(), Address{Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), Address{Socket: sock}); !errors.Is(err, errInUse) {
		t.Errorf("a live socket is replaced: %v", err)
	}

	// The name goes to another server: the first must leave it alone when it closes.
	if err := os.Remove(sock); err != nil {
		t.Fatal(err)
	}
	second, err := Listen(t.Context(), Address{Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Errorf("closing the first: %v", err)
	}
	if _, err := os.Lstat(sock); err != nil {
		t.Errorf("the second server's socket is gone: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Errorf("closing the second: %v", err)
	}
	if _, err := os.Lstat(sock); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := second.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Errorf("closing twice: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false) // a server that crashes removes nothing
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), Address{Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestNoSocketIsOverwritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := file + ".link"
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{file, link, filepath.Dir(file)} {
		if _, err := Listen(t.Context(), Address{Socket: name}); !errors.Is(err, errNotASocket) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

func TestURI(t *testing.T) {
	for _, tc := range []struct {
		addr   net.Addr
		export string
		want   string
	}{
		{&net.UnixAddr{Name: "/run/x.sock", Net: "unix"}, "", "nbd+unix:///?socket=/run/x.sock"},
		{&net.UnixAddr{Name: "/run/a b&c", Net: "unix"}, "a/b c", "nbd+unix:///a%2Fb%20c?socket=/run/a%20b%26c"},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}, "", "nbd://127.0.0.1:10809"},
		{&net.TCPAddr{IP: net.IPv4zero, Port: 1}, "x", "nbd://localhost:1/x"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 1}, "", "nbd://[::1]:1"},
	} {
		if got := URI(tc.addr, tc.export); got != tc.want {
			t.Errorf("URI(%v, %q) = %q, want %q", tc.addr, tc.export, got, tc.want)
		}
	}
}

func TestWithPort(t *testing.T) {
	for in, want := range map[string]string{
		"localhost": "localhost:10809", "1.2.3.4:5": "1.2.3.4:5", "::1": "[::1]:10809", "[::1]": "[::1]:10809",
		"[::1]:7": "[::1]:7",
		"":        ":10809", ":7": ":7",
	} {
		if got := withPort(in); got != want {
			t.Errorf("withPort(%q) = %q, want %q", in, got, want)
		}
	}
}
