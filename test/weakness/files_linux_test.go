package weakness

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// TestFilesAreNotDisclosed (A9): an image that names a file of the host does not get at its bytes.
func TestFilesAreNotDisclosed(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	harness.OK(t, os.WriteFile(secret, bytes.Repeat([]byte("do not tell anyone!!"), 1<<12), 0o600))
	images := filepath.Join(dir, "images")
	harness.OK(t, os.Mkdir(images, 0o700))
	for name, options := range map[string][]string{
		"data file":    {"-o", "data_file=" + secret + ",data_file_raw=on"},
		"backing file": {"-F", "raw", "-b", secret},
		"json backing": {"-u", "-F", "raw", "-b", `json:{"driver":"raw","file":{"driver":"file","filename":"` + secret + `"}}`},
	} {
		path := filepath.Join(images, strings.ReplaceAll(name, " ", "-"))
		content, err := os.ReadFile(secret)
		harness.OK(t, err)
		harness.Must(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, options...), path, "64k")...)
		harness.OK(t, os.WriteFile(secret, content, 0o600)) // creating an image with a data file empties it
		if name == "data file" {
			harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", path)
			harness.OK(t, os.WriteFile(secret, content, 0o600))
		}
		copied := filepath.Join(dir, "copied")
		r := harness.Run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, copied)
		got, err := os.ReadFile(copied)
		t.Logf("%s: stock's convert ends with %d, and discloses the file: %t (%v)", name, r.Code, bytes.Contains(got, []byte("do not tell")), err)

		opens := harness.WatchOpens(t, secret)
		harness.Drover(t, "info", "-f", "qcow2", path)
		harness.Drover(t, "check", "-f", "qcow2", path)
		if r := harness.Drover(t, "map", "-f", "qcow2", path); r.Code != 1 {
			t.Errorf("%s: %s", name, r)
		}
		harness.Refused(t, harness.Serve{Image: path})
		if names := opens.Take(t); len(names) > 0 {
			t.Errorf("%s: drover has opened %q", name, names)
		}
		if dev, err := block.Open(ctx, path, block.OpenOptions{Format: "qcow2", ReadOnly: true}); err == nil {
			dev.Close()
			t.Errorf("%s: the library follows a stored name that nobody allowed", name)
		}
	}
}
