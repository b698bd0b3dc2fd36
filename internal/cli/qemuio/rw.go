package qemuio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/droverproject/drover/block"
)

// patterned takes the options of a command among which -P is, and the pattern that it names.
func (s *Shell) patterned(c command, words []string, spec string, fallback byte) (*flags, byte, error) {
	pattern := fallback
	f, ok, told := (*flags)(nil), false, false
	f, ok = parseFlags(s.Err, words, spec, func(letter rune, value string) bool {
		if letter != 'P' {
			return true
		}
		var good bool
		pattern, good = s.pattern(value)
		told = !good
		return good
	})
	switch {
	case told:
		return nil, 0, errFailed
	case !ok:
		return nil, 0, s.usage(c)
	}
	return f, pattern, nil
}

// filled is a buffer full of one byte.
func filled(n int64, b byte) []byte { return bytes.Repeat([]byte{b}, int(n)) }

// verify compares what was read with the pattern that it should be, and tells when it is not.
func (s *Shell) verify(p []byte, pattern byte, off int64) error {
	for _, c := range p {
		if c != pattern {
			return s.failf("Pattern verification failed at offset %d, %d bytes", off, len(p))
		}
	}
	return nil
}

// reader is a "read": what its flags ask for.
type reader struct {
	*flags
	off, n   int64
	pattern  byte
	from, to int64 // of what is read, the part that the pattern is compared with
}

func runRead(s *Shell, ctx context.Context, c command, words []string) error {
	r, err := s.parseRead(c, words)
	if err != nil {
		return err
	}
	read := s.image.ReadAt
	if r.has('b') {
		if read = s.image.ReadState; read == nil {
			return s.failf("read failed: %s", reason(ErrNotSupported))
		}
	}
	buf := make([]byte, r.n)
	start := time.Now()
	if err := read(ctx, buf, r.off); err != nil {
		return s.failf("read failed: %s", reason(err))
	}
	took := time.Since(start)
	if r.has('P') {
		// A mismatch fails the command, and yet it tells all that a good one does.
		err = s.verifyPart(r, buf)
	}
	s.tellRead(r.flags, took, r.off, r.n, buf)
	return err
}

// verifyPart compares a part of what was read with the pattern. Offsets in its message count from the buffer's start.
func (s *Shell) verifyPart(r *reader, buf []byte) error {
	for _, c := range buf[r.from:r.to] {
		if c != r.pattern {
			return s.failf("Pattern verification failed at offset %d, %d bytes", r.off+r.from, r.to-r.from)
		}
	}
	return nil
}

// tellRead prints what was read, if asked for, and that it was.
func (s *Shell) tellRead(f *flags, took time.Duration, off, n int64, buf []byte) {
	if f.has('q') {
		return
	}
	if f.has('v') {
		s.dump(buf, off)
	}
	s.report("read", took, off, n, n, f.has('C'))
}

func (s *Shell) parseRead(c command, words []string) (*reader, error) {
	r := &reader{}
	failed := false
	part := map[rune]int64{}
	f, ok := parseFlags(s.Err, words, "bCl:pP:qs:v", func(letter rune, value string) bool {
		var good bool
		switch letter {
		case 'l', 's':
			part[letter], good = s.number(value)
		case 'P':
			r.pattern, good = s.pattern(value)
		default:
			good = true
		}
		failed = !good
		return good
	})
	switch {
	case failed:
		return nil, errFailed
	case !ok || len(f.rest) != 2:
		return nil, s.usage(c)
	}
	r.flags = f
	if r.off, ok = s.number(f.rest[0]); !ok {
		return nil, errFailed
	}
	if r.n, ok = s.number(f.rest[1]); !ok {
		return nil, errFailed
	}
	if r.n > maxRequest {
		return nil, s.failf("length cannot exceed %d, given %s", maxRequest, f.rest[1])
	}
	if !f.has('P') && (f.has('l') || f.has('s')) {
		return nil, s.usage(c)
	}
	r.from, r.to = part['s'], r.n
	if f.has('l') {
		if part['l'] > r.n-r.from {
			r.to = r.n + 1
		} else {
			r.to = r.from + part['l']
		}
	}
	if r.from > r.n || r.to > r.n {
		return nil, s.failf("pattern verification range exceeds end of read data")
	}
	if f.has('b') && !(s.aligned("offset", r.off) && s.aligned("count", r.n)) {
		return nil, errFailed
	}
	return r, nil
}

// vector reads an offset and lengths.
func (s *Shell) vector(args []string) (off int64, lengths []int64, total int64, err error) {
	var ok bool
	if off, ok = s.number(args[0]); !ok {
		return 0, nil, 0, errFailed
	}
	for _, text := range args[1:] {
		n, ok := s.number(text)
		switch {
		case !ok:
			return 0, nil, 0, errFailed
		case n > maxRequest:
			return 0, nil, 0, s.failf("Argument '%s' exceeds maximum size %d", text, maxRequest)
		case total > maxRequest-n:
			return 0, nil, 0, s.failf("The total number of bytes exceed the maximum size %d", maxRequest)
		}
		lengths = append(lengths, n)
		total += n
	}
	return off, lengths, total, nil
}

func runReadv(s *Shell, ctx context.Context, c command, words []string) error {
	f, pattern, err := s.patterned(c, words, "CP:qv", 0)
	if err != nil {
		return err
	}
	if len(f.rest) < 2 {
		return s.usage(c)
	}
	off, _, n, err := s.vector(f.rest)
	if err != nil {
		return err
	}
	buf := make([]byte, n)
	start := time.Now()
	if err := s.image.ReadAt(ctx, buf, off); err != nil {
		return s.failf("readv failed: %s", reason(err))
	}
	took := time.Since(start)
	if f.has('P') {
		err = s.verify(buf, pattern, off)
	}
	s.tellRead(f, took, off, n, buf)
	return err
}

// writeFlags are those of a write of data.
func (f *flags) writeFlags() block.WriteFlags {
	if f.has('f') {
		return block.WriteFUA
	}
	return 0
}

// zeroFlags are those of a write of zeroes.
func (f *flags) zeroFlags() block.ZeroFlags {
	var z block.ZeroFlags
	if f.has('u') {
		z |= block.ZeroUnmap
	}
	if f.has('n') {
		z |= block.ZeroFast
	}
	if f.has('f') {
		z |= block.ZeroFUA
	}
	return z
}

func runWrite(s *Shell, ctx context.Context, c command, words []string) error {
	f, pattern, err := s.patterned(c, words, "bcCfnpP:qs:uz", 0xcd)
	if err != nil {
		return err
	}
	off, n, err := s.parseWrite(c, f)
	if err != nil {
		return err
	}
	var buf []byte
	if !f.has('z') {
		if buf, err = s.content(f, n, pattern); err != nil {
			return err
		}
	}
	start := time.Now()
	if err := s.write(ctx, f, buf, off, n); err != nil {
		return s.failf("write failed: %s", reason(err))
	}
	if !f.has('q') {
		s.report("wrote", time.Since(start), off, n, n, f.has('C'))
	}
	return nil
}

// parseWrite checks a write's options against each other and returns where it goes.
func (s *Shell) parseWrite(c command, f *flags) (off, n int64, err error) {
	content := 0
	for _, letter := range "zPs" {
		if f.has(letter) {
			content++
		}
	}
	switch {
	case len(f.rest) != 2:
		return 0, 0, s.usage(c)
	case f.has('b') && f.has('z'):
		return 0, 0, s.failf("-b and -z cannot be specified at the same time")
	case f.has('f') && (f.has('b') || f.has('c')):
		return 0, 0, s.failf("-f and -b or -c cannot be specified at the same time")
	case f.has('n') && !f.has('z'):
		return 0, 0, s.failf("-n requires -z to be specified")
	case f.has('u') && !f.has('z'):
		return 0, 0, s.failf("-u requires -z to be specified")
	case content > 1:
		return 0, 0, s.failf("Only one of -z, -P, and -s can be specified at the same time")
	}
	var ok bool
	if off, ok = s.number(f.rest[0]); !ok {
		return 0, 0, errFailed
	}
	if n, ok = s.number(f.rest[1]); !ok {
		return 0, 0, errFailed
	}
	if n > maxRequest && !f.has('n') {
		return 0, 0, s.failf("length cannot exceed %d without -n, given %s", maxRequest, f.rest[1])
	}
	if (f.has('b') || f.has('c')) && !(s.aligned("offset", off) && s.aligned("count", n)) {
		return 0, 0, errFailed
	}
	return off, n, nil
}

// write does what the flags say. What is to be in the VM state is, with -c or without, and zeroes are not compressed.
func (s *Shell) write(ctx context.Context, f *flags, buf []byte, off, n int64) error {
	im := s.image
	switch {
	case f.has('b'):
		if im.WriteState == nil {
			return ErrNotSupported
		}
		return im.WriteState(ctx, buf, off)
	case f.has('z'):
		return im.WriteZeroes(ctx, off, n, f.zeroFlags())
	case f.has('c'):
		if im.Compressed == nil {
			return ErrNotSupported
		}
		return im.Compressed(ctx, buf, off)
	}
	return im.WriteAt(ctx, buf, off, f.writeFlags())
}

// content is what a write writes: a pattern, or a file again and again.
func (s *Shell) content(f *flags, n int64, pattern byte) ([]byte, error) {
	if !f.has('s') {
		return filled(n, pattern), nil
	}
	name := f.given['s']
	unit, err := readSome(name, n)
	if err != nil {
		fmt.Fprintf(s.Err, "%s: %s\n", name, reason(err))
		return nil, errFailed
	}
	if len(unit) == 0 {
		fmt.Fprintf(s.Err, "%s: file is empty\n", name)
		return nil, errFailed
	}
	buf := make([]byte, n)
	for done := 0; done < len(buf); {
		done += copy(buf[done:], unit)
	}
	return buf, nil
}

// readSome reads at most n bytes of a file.
func readSome(name string, n int64) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	p, err := io.ReadAll(io.LimitReader(file, max(n, 1)))
	if err := errors.Join(err, file.Close()); err != nil {
		var errno syscall.Errno
		if errors.As(err, &errno) {
			return nil, errno
		}
		return nil, err
	}
	return p, nil
}

func runWritev(s *Shell, ctx context.Context, c command, words []string) error {
	f, pattern, err := s.patterned(c, words, "CfqP:", 0xcd)
	if err != nil {
		return err
	}
	if len(f.rest) < 2 {
		return s.usage(c)
	}
	off, _, n, err := s.vector(f.rest)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := s.image.WriteAt(ctx, filled(n, pattern), off, f.writeFlags()); err != nil {
		return s.failf("writev failed: %s", reason(err))
	}
	if !f.has('q') {
		s.report("wrote", time.Since(start), off, n, n, f.has('C'))
	}
	return nil
}

func runDiscard(s *Shell, ctx context.Context, c command, words []string) error {
	f, ok := parseFlags(s.Err, words, "Cq", nil)
	if !ok || len(f.rest) != 2 {
		return s.usage(c)
	}
	off, ok := s.number(f.rest[0])
	if !ok {
		return errFailed
	}
	n, ok := s.number(f.rest[1])
	if !ok {
		return errFailed
	}
	if n > maxRequest {
		return s.failf("length cannot exceed %d, given %s", maxRequest, f.rest[1])
	}
	start := time.Now()
	if err := s.image.Discard(ctx, off, n); err != nil {
		return s.failf("discard failed: %s", reason(err))
	}
	if !f.has('q') {
		s.report("discard", time.Since(start), off, n, n, f.has('C'))
	}
	return nil
}
