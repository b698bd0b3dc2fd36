package qemuio

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/droverproject/drover/block"
)

// CacheModes, DiscardModes and AIOModes are the words that -t, -d and -i take.
var (
	cacheModes   = []string{"none", "off", "writeback", "writethrough", "directsync", "unsafe"}
	discardModes = []string{"ignore", "off", "unmap", "on"}
	aioModes     = []string{"threads", "native", "io_uring"}
)

// Check refuses modes that there are none of.
func (o *Opening) Check() error {
	check := func(what, value string, valid []string) error {
		if value == "" || slices.Contains(valid, value) {
			return nil
		}
		return fmt.Errorf("Invalid %s option: %s", what, value) //nolint:staticcheck // QEMU's words
	}
	return errors.Join(check("cache", o.Cache, cacheModes), check("discard", o.Discard, discardModes), check("aio", o.AIO, aioModes))
}

// Set applies an option that the program and its command open share, by its letter; it reports whether the letter is one.
func (o *Opening) Set(letter rune, value string) bool {
	switch letter {
	case 's':
		o.Snapshot = true
	case 'C':
		o.CopyOnRead = true
	case 'r':
		o.ReadOnly = true
	case 'U':
		o.ForceShare = true
	case 'n':
		o.Cache = "none"
	case 'k':
		o.AIO = "native"
	case 'i':
		o.AIO = value
	case 't':
		o.Cache = value
	case 'd':
		o.Discard = value
	default:
		return false
	}
	return true
}

// Direct reports whether the host's page cache is to be bypassed.
func (o *Opening) Direct() bool {
	return o.Cache == "none" || o.Cache == "off" || o.Cache == "directsync"
}

func runOpen(s *Shell, ctx context.Context, c command, words []string) error {
	o := Opening{Described: s.Described}
	bad := false
	f, ok := parseFlags(s.Err, words, "snCro:ki:t:d:U", func(letter rune, value string) bool {
		if !o.Set(letter, value) { // -o, the only one that is the command's alone
			o.Options = append(o.Options, value)
			bad = s.Described
		}
		return !bad
	})
	switch {
	case bad:
		return s.failf("--image-opts and 'open -o' are mutually exclusive")
	case !ok || len(f.rest) > 1:
		return s.usage(c)
	}
	if err := o.Check(); err != nil {
		return err
	}
	if s.image != nil {
		return errors.New("file open already, try 'help close'")
	}
	if len(f.rest) == 1 {
		o.Name = f.rest[0]
	}
	return s.Open(ctx, o)
}

func runClose(s *Shell, _ context.Context, _ command, _ []string) error { return s.Close() }

func runReopen(s *Shell, ctx context.Context, c command, words []string) error {
	var r Reopening
	var failure error
	f, ok := parseFlags(s.Err, words, "c:o:rw", func(letter rune, value string) bool {
		switch letter {
		case 'c':
			r.Cache = value
			failure = (&Opening{Cache: value}).Check()
		case 'o':
			if r.Options != "" {
				r.Options += ","
			}
			r.Options += value
		case 'r', 'w':
			if r.ReadOnly || r.ReadWrite {
				failure = errors.New("Only one -r/-w option may be given") //nolint:staticcheck // QEMU's words
			}
			r.ReadOnly, r.ReadWrite = letter == 'r', letter == 'w'
		}
		return failure == nil
	})
	switch {
	case failure != nil:
		return failure
	case !ok || len(f.rest) > 0:
		return s.usage(c)
	}
	s.waitRequests()
	im, err := s.Opener.Reopen(ctx, s.image, r)
	s.image = im
	return err
}

func runTruncate(s *Shell, ctx context.Context, c command, words []string) error {
	f, ok := parseFlags(s.Err, words, "m:", nil)
	if !ok || len(f.rest) == 0 {
		return s.usage(c)
	}
	mode := f.given['m']
	if f.has('m') && !slices.Contains([]string{"off", "metadata", "falloc", "full"}, mode) {
		return fmt.Errorf("Invalid preallocation mode '%s'", mode) //nolint:staticcheck // QEMU's words
	}
	n, ok := s.number(f.rest[0])
	if !ok {
		return errFailed
	}
	if s.image.Truncate == nil {
		return fmt.Errorf("Image format driver does not support resize") //nolint:staticcheck // QEMU's words
	}
	s.waitRequests()
	return s.image.Truncate(ctx, n, mode)
}

func runLength(s *Shell, _ context.Context, _ command, _ []string) error {
	s.printf("%s\n", size(float64(s.image.Size())))
	return nil
}

func runInfo(s *Shell, ctx context.Context, _ command, _ []string) error {
	return s.image.Describe(ctx, s.Out)
}

// Size writes a number of bytes as "info" and others do.
func Size(n int64) string { return size(float64(n)) }

func runFlush(s *Shell, ctx context.Context, _ command, _ []string) error {
	if err := s.image.Flush(ctx); err != nil {
		return s.failf("flush failed: %s", reason(err))
	}
	return nil
}

// own reports whether the image itself decides what an extent holds, not one below it.
func own(e block.Extent) bool { return e.Allocated && e.Depth == 0 }

func runAlloc(s *Shell, ctx context.Context, _ command, words []string) error {
	start, ok := s.number(words[1])
	if !ok {
		return errFailed
	}
	n := int64(sectorSize)
	if len(words) == 3 {
		if n, ok = s.number(words[2]); !ok {
			return errFailed
		}
	}
	n = max(min(n, s.image.Size()-start), 0)
	var sum int64
	err := s.image.Extents(ctx, min(start, s.image.Size()), n, func(e block.Extent) bool {
		if own(e) {
			sum += e.Len
		}
		return true
	})
	if err != nil {
		return s.failf("is_allocated failed: %s", reason(err))
	}
	s.printf("%d/%d bytes allocated at offset %s\n", sum, n, size(float64(start)))
	return nil
}

func runMap(s *Shell, ctx context.Context, _ command, _ []string) error {
	var from, to int64
	var allocated bool
	show := func() {
		if to == from {
			return
		}
		state := "not allocated"
		if allocated {
			state = "    allocated"
		}
		s.printf("%s (0x%x) bytes %s at offset %s (0x%x)\n", size(float64(to-from)), to-from, state, size(float64(from)), from)
	}
	err := s.image.Extents(ctx, 0, s.image.Size(), func(e block.Extent) bool {
		if own(e) != allocated {
			show()
			from, allocated = e.Off, own(e)
		}
		to = e.End()
		return true
	})
	if err != nil {
		return s.failf("is_allocated failed: %s", reason(err))
	}
	show()
	return nil
}

func runSleep(s *Shell, ctx context.Context, _ command, words []string) error {
	ms, err := strconv.ParseUint(words[1], 0, 31)
	if err != nil {
		return s.failf("%s is not a valid number", words[1])
	}
	select {
	case <-time.After(time.Duration(ms) * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lastSignal is the largest number of a signal.
const lastSignal = 64

func runSigraise(s *Shell, _ context.Context, _ command, words []string) error {
	n, ok := s.number(words[1])
	if !ok {
		return errFailed
	}
	if n > lastSignal {
		return s.failf("signal argument '%s' is too large to be a valid signal", words[1])
	}
	if err := raise(int(n)); err != nil {
		return s.failf("raising signal %d: %s", n, reason(err))
	}
	return nil
}

func runAbort(*Shell, context.Context, command, []string) error { return raise(sigabrt) }

const sigabrt = 6

func runQuit(s *Shell, _ context.Context, _ command, _ []string) error {
	s.done = true
	return nil
}

func runHelp(s *Shell, _ context.Context, _ command, words []string) error {
	if len(words) == 1 {
		for _, c := range commands() {
			s.printf("%s\n", c.line())
		}
		s.printf("\nUse 'help commandname' for extended help.\n")
		return nil
	}
	c, ok := lookup(words[1])
	if !ok {
		s.printf("command %s not found\n", words[1])
		return nil
	}
	c.name = words[1] // it may be the short one
	s.printf("%s\n", c.line())
	if c.long != "" {
		s.printf("\n%s\n\n", strings.TrimSpace(c.long))
	}
	return nil
}
