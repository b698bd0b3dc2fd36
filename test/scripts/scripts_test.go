// Package scripts runs programs of Debian packages that call qemu-img, qemu-io and qemu-nbd themselves, with a folder of
// links to drover first in PATH: what others wrote for QEMU's tools has to work unchanged.
//
// Every script runs twice, in folders of its own: with stock tools and with the links. The programs have to say the same,
// to call the tools in the same way (parsers of one tool's output decide what is called next), and to leave images with
// the same contents, which both check programs accept.
package scripts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

func TestMain(m *testing.M) { harness.Main(m) }

// tools are the names that drover goes by.
var tools = []string{"qemu-img", "qemu-io", "qemu-nbd"}

// limit is how long a script may take: far more than any needs.
const limit = 5 * time.Minute

// script is a case: lines for bash that use a program of others.
type script struct {
	name  string
	needs []string // programs that test/peers.sh installs
	wants []string // programs that it does not: without them the case is skipped, also in CI
	asks  string   // a command that fails where something else is missing; it skips the case
	calls []string // the tools that must have been called, so that it is known whom the script has met
	dates bool     // the contents of images depend on when they were made
	as    func(*testing.T, *exec.Cmd)
	text  string
}

// side is one of the two runs of a script.
type side struct {
	dir    string
	output string // all that was said, without what differs from run to run
	calls  string // the tools' command lines, sorted
	code   int
}

func TestScripts(t *testing.T) {
	for _, s := range scripts {
		t.Run(s.name, func(t *testing.T) {
			s.skip(t)
			compare(t, s, s.run(t, stock(t)), s.run(t, links(t, harness.Binary(t))))
		})
	}
}

// skip ends the test if programs are missing.
func (s script) skip(t *testing.T) {
	t.Helper()
	peer.Need(t, "qemu-img", "qemu-io", "qemu-nbd")
	peer.Need(t, s.needs...)
	for _, name := range s.wants {
		if _, err := peer.Look(name); err != nil {
			t.Skipf("no comparison: %v", err)
		}
	}
	if s.asks == "" {
		return
	}
	cmd := exec.Command("sh", "-c", s.asks)
	cmd.Env = environment(t.TempDir(), "")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("no comparison: %s: %v\n%s", s.asks, err, out)
	}
}

// openDir is a new folder that every user may look into.
func openDir(t testing.TB) string {
	t.Helper()
	dir := harness.SocketDir(t)
	harness.OK(t, os.Chmod(dir, 0o755))
	return dir
}

// stock makes a folder with links to the installed tools.
func stock(t testing.TB) string {
	t.Helper()
	dir := openDir(t)
	for _, name := range tools {
		harness.OK(t, os.Symlink(peer.Path(name), filepath.Join(dir, name)))
	}
	return dir
}

// links makes a folder with links to a drover, as `make install-links` does.
func links(t testing.TB, drover string) string {
	t.Helper()
	dir := openDir(t)
	for _, name := range tools {
		path := filepath.Join(dir, name)
		harness.OK(t, os.Symlink(drover, path))
		says := harness.Must(t, path, "--version")
		if !bytes.Contains(says, []byte("drover")) {
			t.Fatalf("%s is not drover: it says %s", name, says)
		}
	}
	return dir
}

// wrap fills dir/bin with programs of the tools' names that write down how they were called, in dir/calls, and then become
// the tools in the folder.
func wrap(t testing.TB, dir, folder string) {
	t.Helper()
	bin := filepath.Join(dir, "bin")
	harness.OK(t, os.Mkdir(bin, 0o755))
	for _, name := range tools {
		text := fmt.Sprintf("#!/bin/sh\nprintf '%%s\\n' \"%s $*\" >>'%s/calls'\nexec '%s/%s' \"$@\"\n", name, dir, folder, name)
		harness.OK(t, os.WriteFile(filepath.Join(bin, name), []byte(text), 0o755))
	}
	harness.OK(t, os.WriteFile(filepath.Join(dir, "calls"), nil, 0o644))
}

// environment is that of a script which runs in the folder dir: the folder bin comes first in PATH, then Debian's own ones,
// so that its programs find the interpreters they were made for.
func environment(dir, bin string) []string {
	path := strings.Trim(bin+":/usr/sbin:/usr/bin:/sbin:/bin:"+os.Getenv("PATH"), ":")
	return append(os.Environ(), "PATH="+path, "HOME="+dir, "TMPDIR="+dir, "LC_ALL=C", "PYTHONWARNINGS=ignore")
}

func (s script) run(t *testing.T, folder string) side {
	t.Helper()
	dir := openDir(t)
	wrap(t, dir, folder)
	harness.OK(t, os.Mkdir(filepath.Join(dir, "work"), 0o755))
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", prelude+s.text)
	cmd.Dir = filepath.Join(dir, "work")
	cmd.Env = environment(dir, filepath.Join(dir, "bin"))
	if s.as != nil {
		s.as(t, cmd)
	}
	// A tool that outlives its script keeps the pipe of its words.
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		t.Fatalf("running the script: %v (%v)\n%s", err, ctx.Err(), out)
	}
	return side{
		dir: cmd.Dir, output: settle(dir, string(out)), calls: called(t, dir), code: cmd.ProcessState.ExitCode(),
	}
}

// passing are the parts of words that differ from run to run: names of temporary folders, and how long things took.
var passing = []struct {
	pattern *regexp.Regexp
	instead string
}{
	{regexp.MustCompile(`\b(cloud-localds\.|nbdkit|libguestfs|sparsify)\w{6}\b`), "${1}XXXXXX"},
	{regexp.MustCompile(`[\d.]+ sec \(.*\)`), "N sec"},
}

func settle(dir, text string) string {
	text = strings.ReplaceAll(text, dir, "DIR")
	for _, p := range passing {
		text = p.pattern.ReplaceAllString(text, p.instead)
	}
	return text
}

// called returns the tools' command lines. They are sorted: programs run several tools at once.
func called(t testing.TB, dir string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "calls"))
	harness.OK(t, err)
	lines := strings.Split(strings.TrimSpace(settle(dir, string(data))), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func compare(t *testing.T, s script, want, got side) {
	t.Helper()
	if want.code != 0 {
		t.Fatalf("the script fails with stock tools, status %d:\n%s", want.code, want.output)
	}
	if got.code != 0 {
		t.Errorf("the script fails, status %d", got.code)
	}
	if got.output != want.output {
		t.Errorf("it says:\n%s\nand with stock tools:\n%s", got.output, want.output)
	}
	if got.calls != want.calls {
		t.Errorf("the tools' calls:\n%s\nand those of stock tools:\n%s", got.calls, want.calls)
	}
	for _, name := range s.calls {
		if !strings.Contains("\n"+got.calls, "\n"+name+" ") {
			t.Errorf("%s was not called", name)
		}
	}
	sameImages(t, want.dir, got.dir, !s.dates)
}

// sameImages checks the images that two runs left, and compares their contents. The name's ending tells the format.
func sameImages(t *testing.T, want, got string, contents bool) {
	t.Helper()
	names := images(t, want)
	if len(names) == 0 {
		t.Errorf("the script leaves no image to look at")
	}
	if ours := images(t, got); !slices.Equal(ours, names) {
		t.Errorf("images %q; stock tools made %q", ours, names)
		return
	}
	for _, name := range names {
		a, b := filepath.Join(want, name), filepath.Join(got, name)
		format := strings.TrimPrefix(filepath.Ext(name), ".")
		if format == "qcow2" {
			harness.MustDrover(t, "check", "-q", a)
			harness.MustDrover(t, "check", "-q", b)
			harness.Must(t, "qemu-img", "check", "-q", b)
		}
		if contents {
			harness.Must(t, "qemu-img", "compare", "-f", format, "-F", format, a, b)
		}
	}
}

func images(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	harness.OK(t, err)
	var names []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext == ".qcow2" || ext == ".raw" {
			names = append(names, e.Name())
		}
	}
	return names
}
