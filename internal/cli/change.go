package cli

import (
	"errors"
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
