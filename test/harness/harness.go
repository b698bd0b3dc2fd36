// Package harness is what the tests that cross rooms share: it runs programs and keeps what they said, starts and stops
// `drover serve`, speaks NBD to it, and keeps a model of what the disk must hold.
//
// Tests here know drover by its command line only. What a test expects never comes from drover: it comes from the model
// (bytes in memory that follow the same operations) or from stock QEMU.
//
// A package that uses the harness has a TestMain that calls [Main]. The binary under test is the one named by
// DROVER_BIN, or is built once per test process.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/droverproject/drover/test/peer"
)

// commandLimit is how long one program may take: far more than any needs, so that only a hang meets it.
const commandLimit = 5 * time.Minute

// Main runs the tests of a package and removes the binary that was built for them.
func Main(m *testing.M) {
	code := m.Run()
	if dir := buildDir(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// buildDir is the folder of the binary built for this process, made at most once.
var buildDir = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "drover-bin-")
	if err != nil {
		return ""
	}
	return dir
})

type built struct {
	path string
	err  error
}

var build = sync.OnceValue(func() built {
	if path := os.Getenv("DROVER_BIN"); path != "" {
		abs, err := filepath.Abs(path)
		if err == nil {
			_, err = os.Stat(abs)
		}
		return built{abs, err}
	}
	dir := buildDir()
	if dir == "" {
		return built{err: errors.New("no temporary folder for the binary")}
	}
	path := filepath.Join(dir, "drover")
	cmd := exec.Command("go", "build", "-o", path, "github.com/droverproject/drover/cmd/drover")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return built{err: fmt.Errorf("%w\n%s", err, out)}
	}
	return built{path: path}
})

// Binary returns the path of the drover under test.
func Binary(t testing.TB) string {
	t.Helper()
	b := build()
	if b.err != nil {
		t.Fatalf("building drover: %v", b.err)
	}
	return b.path
}

// Result is what a program left behind.
type Result struct {
	Line   string // the command line, for messages
	Code   int    // exit status; -1 when a signal ended it
	Stdout []byte
	Stderr []byte
}

// String shows the command with all it said.
func (r Result) String() string {
	return fmt.Sprintf("$ %s\n(exit status %d)\n%s%s", r.Line, r.Code, r.Stdout, r.Stderr)
}

// Run runs a program to its end, whatever its exit status.
func Run(t testing.TB, name string, args ...string) Result {
	t.Helper()
	return RunInput(t, nil, name, args...)
}

// RunFor is Run for a program that is meant to run that long.
func RunFor(t testing.TB, d time.Duration, name string, args ...string) Result {
	t.Helper()
	return run(t, d+commandLimit, nil, name, args)
}

// RunInput is Run with a standard input.
func RunInput(t testing.TB, input []byte, name string, args ...string) Result {
	t.Helper()
	return run(t, commandLimit, input, name, args)
}

func run(t testing.TB, limit time.Duration, input []byte, name string, args []string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, peer.Path(name), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &stdout, &stderr
	err := cmd.Run()
	r := Result{Line: commandLine(name, args), Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s did not end within %v\n%s", r.Line, limit, r)
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		t.Fatalf("running %s: %v", r.Line, err)
	}
	return r
}

// Must is Run for a program that has to succeed; it returns its standard output.
func Must(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	r := Run(t, name, args...)
	if r.Code != 0 {
		t.Fatalf("unexpected failure:\n%s", r)
	}
	return r.Stdout
}

// Drover runs the drover under test, whatever its exit status.
func Drover(t testing.TB, args ...string) Result {
	t.Helper()
	return Run(t, Binary(t), args...)
}

// MustDrover is Drover for a command that has to succeed; it returns its standard output.
func MustDrover(t testing.TB, args ...string) []byte {
	t.Helper()
	return Must(t, Binary(t), args...)
}

// OK fails the test if err is not nil.
func OK(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// SocketDir returns a new folder with a path short enough for a unix socket (about 100 bytes), which t.TempDir with a
// long test name is not.
func SocketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "drv")
	OK(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func commandLine(name string, args []string) string {
	line := filepath.Base(name)
	for _, a := range args {
		if a == "" || strings.ContainsAny(a, " '\"$&?*") {
			a = "'" + a + "'"
		}
		line += " " + a
	}
	if len(line) > 2000 {
		line = line[:2000] + " ..."
	}
	return line
}
