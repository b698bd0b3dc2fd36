package cli

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fdOf makes a copy of a descriptor, which its user closes.
func fdOf(t *testing.T, f *os.File) string {
	t.Helper()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(fd)
}

// TestProgressBySignal: without -p a signal has a command tell once.
func TestProgressBySignal(t *testing.T) {
	errs := &tellingBuffer{wrote: make(chan struct{}, 1)}
	a := &app{name: program, out: &tellingBuffer{}, err: errs}
	p := a.startProgress("convert", progressFlag{}, false)
	p.set(1, 4)
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	select {
	case <-errs.wrote:
	case <-time.After(10 * time.Second):
		t.Fatal("nothing was told")
	}
	p.end()
	if got := errs.String(); got != "    (25.00/100%)\n" {
		t.Errorf("told: %q", got)
	}
	if out := a.out.(*tellingBuffer).String(); out != "" || strings.Contains(out, "%") {
		t.Errorf("shown: %q", out)
	}
}
