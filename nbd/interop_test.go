package nbd_test

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// tool runs a program against the server and returns its output, or skips the test where the program is missing.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed: interoperation with it is not tested", name)
	}
	cmd := exec.Command(path, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// filled returns a device with data, holes and an odd piece here and there.
func filled(size int64) *nbdtest.Device {
	dev := nbdtest.NewDevice(size)
	noise := rand.NewChaCha8([32]byte{3, 4})
	for off := int64(0); off+1<<20 <= size; off += 3 << 20 {
		p := make([]byte, 1<<20-int(off>>20)*512)
		_, _ = noise.Read(p) // it never fails
		if err := dev.TryWriteAt(p, off); err != nil {
			panic(err)
		}
	}
	return dev
}

func (s *server) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + s.addr }

func TestInteropNbdinfo(t *testing.T) {
	noLeaks(t)
	dev := filled(32 << 20)
	ro := nbdtest.NewDevice(1 << 40 >> 20)
	s := start(t, nbd.Options{}, nbd.Export{Name: "disk", Description: "a disk", Device: dev},
		nbd.Export{Name: "other", Device: ro, ReadOnly: true})
	var list struct {
		Protocol   string `json:"protocol"`
		Structured bool   `json:"structured"`
		Exports    []struct {
			Name           string   `json:"export-name"`
			Description    string   `json:"description"`
			Size           int64    `json:"export-size"`
			Contexts       []string `json:"contexts"`
			ReadOnly       bool     `json:"is_read_only"`
			MultiConn      bool     `json:"can_multi_conn"`
			FastZero       bool     `json:"can_fast_zero"`
			Trim           bool     `json:"can_trim"`
			DF             bool     `json:"can_df"`
			BlockPreferred int      `json:"block_size_preferred"`
			BlockMaximum   int      `json:"block_size_maximum"`
		} `json:"exports"`
	}
	out := tool(t, "nbdinfo", "--json", "--list", s.uri(""))
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if list.Protocol != "newstyle-fixed" || !list.Structured || len(list.Exports) != 2 {
		t.Fatalf("nbdinfo says %s", out)
	}
	a, b := list.Exports[0], list.Exports[1]
	if a.Name != "disk" || a.Description != "a disk" || a.Size != 32<<20 || a.ReadOnly || !a.MultiConn || !a.FastZero ||
		!a.Trim || !a.DF || a.BlockPreferred != 4096 || a.BlockMaximum != 32<<20 ||
		strings.Join(a.Contexts, " ") != "base:allocation qemu:allocation-depth" {
		t.Errorf("nbdinfo says of the first export %+v", a)
	}
	if b.Name != "other" || !b.ReadOnly || b.Trim || b.Size != 1<<20 {
		t.Errorf("nbdinfo says of the second export %+v", b)
	}
	var runs []struct {
		Offset, Length int64
		Type           int
	}
	out = tool(t, "nbdinfo", "--json", "--map", s.uri("disk"))
	if err := json.Unmarshal([]byte(out), &runs); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(runs) < 20 || runs[0].Length != 1<<20 || runs[0].Type != 0 || runs[1].Type != 3 {
		t.Errorf("nbdinfo --map says %s", out)
	}
}

func TestInteropNbdcopy(t *testing.T) {
	noLeaks(t)
	const size = 32 << 20
	dev := filled(size)
	s := start(t, nbd.Options{}, nbd.Export{Name: "disk", Device: dev},
		nbd.Export{Name: "slow", Device: nbdtest.Slow{Device: dev}})
	dir := t.TempDir()
	want := dev.Bytes(0, size)
	for _, export := range []string{"disk", "slow"} {
		for i, args := range [][]string{{}, {"--connections=4", "--requests=64"}, {"--synchronous"}, {"--request-size=4096"}} {
			file := filepath.Join(dir, export+string(rune('0'+i)))
			tool(t, "nbdcopy", append(args, s.uri(export), file)...)
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
				t.Errorf("nbdcopy %v from %s: other data (%v)", args, export, err)
			}
		}
	}
	target := nbdtest.NewDevice(size)
	if err := s.AddExport(nbd.Export{Name: "target", Device: target}); err != nil {
		t.Fatal(err)
	}
	tool(t, "nbdcopy", "--flush", filepath.Join(dir, "disk0"), s.uri("target"))
	if !bytes.Equal(target.Bytes(0, size), want) || target.Flushes.Load() == 0 {
		t.Errorf("nbdcopy to the server: other data, or no flush (%d)", target.Flushes.Load())
	}
	target = nbdtest.NewDevice(size)
	if err := s.AddExport(nbd.Export{Name: "target2", Device: nbdtest.Slow{Device: target}}); err != nil {
		t.Fatal(err)
	}
	tool(t, "nbdcopy", s.uri("disk"), s.uri("target2"))
	if !bytes.Equal(target.Bytes(0, size), want) {
		t.Error("nbdcopy from server to server: other data")
	}
}

func TestInteropQemu(t *testing.T) {
	noLeaks(t)
	const size = 32 << 20
	dev, target := filled(size), nbdtest.NewDevice(size)
	s := start(t, nbd.Options{}, nbd.Export{Name: "disk", Device: dev}, nbd.Export{Name: "target", Device: target})
	file := filepath.Join(t.TempDir(), "copy")
	want := dev.Bytes(0, size)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri("disk"), file)
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("qemu-img convert from the server: other data (%v)", err)
	}
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", file, s.uri("target"))
	if !bytes.Equal(target.Bytes(0, size), want) {
		t.Error("qemu-img convert to the server: other data")
	}
	var extents []struct {
		Start, Length int64
		Data, Zero    bool
		Present       bool
	}
	out := tool(t, "qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+s.addr+",export=disk")
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(extents) < 20 || !extents[0].Data || extents[1].Data || !extents[1].Zero {
		t.Errorf("qemu-img map says %s", out)
	}
	tool(t, "qemu-io", "-f", "raw", s.uri("target"),
		"-c", "write -P 7 1000 3000", "-c", "write -f -P 8 1M 64k", "-c", "write -z -u 2M 1M", "-c", "write -z 4M 64k",
		"-c", "discard 5M 1M", "-c", "read -P 7 1000 3000", "-c", "read -P 8 1M 64k", "-c", "read -P 0 2M 1M",
		"-c", "aio_write -P 9 8M 4M", "-c", "aio_read 16M 4M", "-c", "aio_flush", "-c", "read -P 9 8M 4M", "-c", "flush")
	if got := target.Bytes(1000, 3000); !bytes.Equal(got, bytes.Repeat([]byte{7}, 3000)) {
		t.Error("a write by qemu-io did not arrive")
	}
	if target.Durable.Load() == 0 || target.Flushes.Load() == 0 {
		t.Error("no FUA or no flush by qemu-io arrived")
	}
}

// TestInteropTCP has a tool come over TCP.
func TestInteropTCP(t *testing.T) {
	noLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no TCP here: %v", err)
	}
	s := startOn(t, l, nbd.Options{}, nbd.Export{Device: filled(8 << 20)})
	out := tool(t, "nbdinfo", "--size", "nbd://"+s.addr)
	if strings.TrimSpace(out) != "8388608" {
		t.Errorf("nbdinfo --size says %s", out)
	}
	tool(t, "qemu-io", "-f", "raw", "nbd://"+s.addr, "-c", "write -P 1 0 8M", "-c", "read -P 1 0 8M")
}

// failing runs a program that should fail, and reports whether it did not.
func failing(t *testing.T, name string, args ...string) (string, bool) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed: interoperation with it is not tested", name)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	return string(out), err == nil
}
