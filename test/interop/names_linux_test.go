package interop

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// outside is what images must not reach: a folder with a secret, and two servers that count who connects.
type outside struct {
	dir, secret, socket, port string
	calls                     atomic.Int64
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	dir, err := filepath.EvalSymlinks(harness.SocketDir(t))
	harness.OK(t, err)
	o := &outside{dir: dir, secret: filepath.Join(dir, "secret"), socket: filepath.Join(dir, "socket")}
	harness.OK(t, os.WriteFile(o.secret, bytes.Repeat([]byte("secret! "), 8192), 0o600))
	for network, address := range map[string]string{"unix": o.socket, "tcp": "127.0.0.1:0"} {
		l, err := net.Listen(network, address)
		harness.OK(t, err)
		t.Cleanup(func() { l.Close() })
		if network == "tcp" {
			_, o.port, err = net.SplitHostPort(l.Addr().String())
			harness.OK(t, err)
		}
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return // the test has ended
				}
				o.calls.Add(1)
				conn.Close()
			}
		}()
	}
	return o
}

// hostFiles are the names that hostile images store. The images lie in a folder in that of the secret.
func (o *outside) hostFiles() []string {
	return []string{
		o.secret, "../secret", "./../images/../secret", "file:" + o.secret, "file:../secret", "/proc/self/root" + o.secret,
		"/proc/self/cwd/../secret", "link", "linkdir/secret", "linkabs", "links/self/link",
		"/proc/self/fd/0", "/proc/self/fd/3", "fds/0", "fds/7", "/proc/self/mem", "/dev/stdin", "/dev/fd/0",
		"fifo", "/dev/zero", "zero", "/dev/tty", "/dev/null", "folder", ".", "/etc/passwd",
		`json:{"driver":"raw","file":{"driver":"file","filename":"` + o.secret + `"}}`,
		`json:{"driver":"raw","file.filename":"` + o.secret + `"}`,
		`json:{"driver":"nbd","path":"` + o.socket + `"}`,
		"nbd:unix:" + o.socket, "nbd+unix:///?socket=" + o.socket, "nbd://127.0.0.1:" + o.port + "/x", "nbd:127.0.0.1:" + o.port,
		"http://127.0.0.1:" + o.port + "/x", "host_device:/dev/zero", "fat:" + o.dir, "blkdebug::" + o.secret,
	}
}

// TestHostileNames: images that name files of the host as their backing or data file reach nothing, whatever is done with
// them, and hold nothing up.
func TestHostileNames(t *testing.T) {
	peer.Need(t, "qemu-img")
	o := newOutside(t)
	images := filepath.Join(o.dir, "images")
	harness.OK(t, os.MkdirAll(filepath.Join(images, "folder"), 0o700))
	for name, target := range map[string]string{
		"link": "../secret", "linkdir": "..", "linkabs": o.secret, "links": "/proc", "fds": "/proc/self/fd", "zero": "/dev/zero",
	} {
		harness.OK(t, os.Symlink(target, filepath.Join(images, name)))
	}
	fifo := filepath.Join(images, "fifo")
	harness.OK(t, syscall.Mkfifo(fifo, 0o600))
	opens := harness.WatchOpens(t, o.secret, fifo)
	for i, name := range o.hostFiles() {
		for kind, image := range map[string]string{
			"backing file": namesBacking(t, images, name), "data file": namesDataFile(t, images, name),
		} {
			if image == "" {
				continue // qemu-img cannot make it
			}
			data := kind == "data file"
			for _, args := range [][]string{
				{"map", "--output=json", image},
				{"map", "-f", "qcow2", "--allow-path", filepath.Join(images, "folder"), image},
				{"info", "--backing-chain", image},
				{"info", "--output=json", image},
				{"check", "-f", "qcow2", image},
			} {
				r := harness.Drover(t, args...)
				what := fmt.Sprintf("%d, %s %q:\n%s", i, kind, name, r)
				fails := args[0] == "map" || args[1] == "--backing-chain" && !data // the others have no use for that file
				switch {
				case r.Code < 0 || r.Code > 3 || bytes.Contains(r.Stderr, []byte("goroutine ")):
					t.Errorf("%s", what)
				case fails && (r.Code != 1 || len(r.Stderr) == 0):
					t.Errorf("not refused: %s", what)
				case bytes.Contains(append(r.Stdout, r.Stderr...), []byte("secret! ")):
					t.Errorf("the secret is out: %s", what)
				}
				mustBeUntouched(t, o, opens, what)
			}
			r := harness.Refused(t, harness.Serve{Image: image})
			mustBeUntouched(t, o, opens, fmt.Sprintf("%d, %s %q:\n%s", i, kind, name, r))
		}
	}
	// The eyes are open: at the user's word the secret is read, and that is seen.
	harness.MustDrover(t, "map", "--allow-any-path", namesBacking(t, images, "../secret"))
	if len(opens.Take(t)) == 0 {
		t.Error("the secret was read without this test seeing it")
	}
}

func mustBeUntouched(t *testing.T, o *outside, opens *harness.Opens, what string) {
	t.Helper()
	if opened := opens.Take(t); len(opened) > 0 {
		t.Errorf("%q was opened: %s", opened, what)
	}
	if n := o.calls.Swap(0); n > 0 {
		t.Errorf("%d connections were made: %s", n, what)
	}
}

// namesBacking makes an image whose backing file has the name.
func namesBacking(t *testing.T, dir, name string) string {
	t.Helper()
	image := filepath.Join(dir, "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, image, "1M")
	return image
}

// namesDataFile makes an image whose data file has the name. qemu-img creates the data file, so it gets a harmless name of
// the same length, which is exchanged afterwards.
func namesDataFile(t *testing.T, dir, name string) string {
	t.Helper()
	if len(name) > 250 {
		return ""
	}
	image := filepath.Join(dir, "data.qcow2")
	harmless := strings.Repeat("Z", len(name))
	t.Chdir(dir) // the name is relative, so that it has the length wanted
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+harmless, "data.qcow2", "1M")
	harness.OK(t, os.Remove(filepath.Join(dir, harmless)))
	text, err := os.ReadFile(image)
	harness.OK(t, err)
	if n := bytes.Count(text, []byte(harmless)); n != 1 {
		t.Fatalf("the name of the data file stands %d times in the image", n)
	}
	at := bytes.LastIndex(text[:4096], []byte(harmless))
	copy(text[at:], name)
	harness.OK(t, os.WriteFile(image, text, 0o600))
	return image
}
