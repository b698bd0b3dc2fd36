package nbd

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// TestSnapshotExports: the snapshots inside an image are served beside its disk, and hold what QEMU says they do.
func TestSnapshotExports(t *testing.T) {
	for _, tool := range []string{"qemu-io", "nbdinfo", "nbdcopy"} {
		peer.Need(t, tool)
	}
	_, image, _ := disk(t)
	dir := t.TempDir()
	harness.Must(t, "qemu-img", "snapshot", "-c", "one", image)
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 17 1M 5M", "-c", "discard 20M 10M", image)
	harness.Must(t, "qemu-img", "snapshot", "-c", "two", image)
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 18 2M 1M", image)
	want := make(map[string][]byte)
	for _, name := range []string{"one", "two"} {
		out := filepath.Join(dir, name)
		harness.Must(t, "qemu-img", "convert", "-l", name, "-f", "qcow2", "-O", "raw", image, out)
		want[name] = readFile(t, out)
	}

	srv := harness.Start(t, harness.Serve{Image: image, Args: []string{"--export", "b=" + blank(t)}})
	uri := func(name string) string { return "nbd+unix:///" + name + "?socket=" + srv.Socket }
	var list struct {
		Exports []struct {
			Name     string `json:"export-name"`
			ReadOnly bool   `json:"is_read_only"`
			Size     int64  `json:"export-size"`
		}
	}
	out := harness.Must(t, "nbdinfo", "--list", "--json", srv.URI())
	harness.OK(t, json.Unmarshal(out, &list))
	var names []string
	for _, e := range list.Exports {
		names = append(names, e.Name)
		if snapshot := e.Name != "" && e.Name != "b"; e.ReadOnly != snapshot {
			t.Errorf("export %q: read-only: %v", e.Name, e.ReadOnly)
		}
	}
	if !slices.Equal(names, []string{"", "@one", "@two", "b"}) {
		t.Errorf("the exports are %q", names)
	}
	for name, content := range want {
		// The disk changes while its snapshot is read.
		harness.Must(t, "qemu-io", "-f", "raw", "-c", "write -P 19 0 8M", "-c", "write -z -u 30M 5M", srv.URI())
		out := filepath.Join(dir, "copy")
		harness.Must(t, "nbdcopy", uri("@"+name), out)
		harness.OK(t, harness.Same(readFile(t, out), content, 0))
		harness.Must(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri("@"+name), out)
		harness.OK(t, harness.Same(readFile(t, out), content, 0))
	}
	harness.Must(t, "qemu-io", "-f", "raw", "-r", "-c", "read -P 17 5M 1M", "-c", "read -P 0 21M 1M", uri("@2"))
	if r := harness.Run(t, "nbdinfo", uri("@three")); r.Code == 0 {
		t.Error("a snapshot that does not exist is served")
	}
	srv.Stop()
	harness.Must(t, "qemu-img", "check", image)
	for name, content := range want {
		out := filepath.Join(dir, "after")
		harness.Must(t, "qemu-img", "convert", "-l", name, "-f", "qcow2", "-O", "raw", image, out)
		harness.OK(t, harness.Same(readFile(t, out), content, 0))

		srv := harness.Start(t, harness.Serve{Image: image, Args: []string{"-l", "snapshot.name=" + name}})
		harness.Must(t, "nbdcopy", srv.URI(), out)
		harness.OK(t, harness.Same(readFile(t, out), content, 0))
		srv.Stop()
	}
	harness.Refused(t, harness.Serve{Image: image, Args: []string{"--load-snapshot", "three"}})
	srv = harness.Start(t, harness.Serve{Image: image, Args: []string{"--no-snapshots"}})
	if r := harness.Run(t, "nbdinfo", "nbd+unix:///@one?socket="+srv.Socket); r.Code == 0 {
		t.Error("a snapshot is served though it was not to be")
	}
	srv.Stop()
}

// blank makes an empty image.
func blank(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blank.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	return path
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	harness.OK(t, err)
	return b
}
