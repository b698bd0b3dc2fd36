package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/droverproject/drover/qcow2"
)

// What the commands that change an image have in common.

// changeReason words why an image could not be changed.
func changeReason(err error) string {
	var option *qcow2.OptionError
	var errno syscall.Errno
	switch {
	case errors.As(err, &option):
		return option.Msg
	case errors.Is(err, qcow2.ErrTooBig):
		return "Failed to grow the L1 table: File too large"
	case errors.As(err, &errno):
		return capital(errno.Error())
	}
	return err.Error()
}

// cacheFlag adds -t, which chooses how QEMU reaches the file. Here every mode is as safe as the safest of them.
func cacheFlag(f *pflag.FlagSet, cache *string) {
	f.StringVarP(cache, "cache", "t", "", "cache `mode` of qemu-img (accepted, without effect)")
}

func checkCache(cache string) error {
	modes := []string{"", "none", "off", "directsync", "writeback", "unsafe", "writethrough"}
	if !slices.Contains(modes, cache) {
		return errorf("Invalid cache option: %s", cache)
	}
	return nil
}

// progress shows how far a command is, as qemu-img -p does.
type progress struct {
	out   io.Writer // nil for none
	shown float64
}

func newProgress(out io.Writer, yes bool) *progress {
	p := &progress{}
	if yes {
		p.out = out
		p.show(0)
	}
	return p
}

func (p *progress) show(percent float64) {
	p.shown = percent
	if p.out != nil {
		fmt.Fprintf(p.out, "    (%.2f/100%%)\r", percent)
	}
}

// set shows done of total, when that is a percent or more from what is shown.
func (p *progress) set(done, total int64) {
	percent := 100 * float64(done) / float64(max(total, 1))
	if percent-p.shown >= 1 || percent < p.shown {
		p.show(percent)
	}
}

// end shows that the command is at its end.
func (p *progress) end() {
	if p.out != nil {
		p.show(100)
		fmt.Fprintln(p.out)
	}
}
