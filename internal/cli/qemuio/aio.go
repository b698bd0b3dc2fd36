package qemuio

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/droverproject/drover/block"
)

// requests are those that run beside the commands. What they have to tell is told by the shell, between commands: of those
// that ended meanwhile in the order in which they were made, since two that ended at the same time, one having waited for
// the other's cluster, say, come from goroutines that chance puts in order.
type requests struct {
	running sync.WaitGroup
	made    int // so far; only the shell's goroutine counts
	mu      sync.Mutex
	ended   []ended
}

// ended is a request that has ended.
type ended struct {
	number int
	tell   func()
}

// submit runs do beside the commands. tell, run by the shell afterwards, gets how it ended and how long it took.
func (s *Shell) submit(do func() error, tell func(err error, took time.Duration)) {
	start := time.Now()
	number := s.aio.next()
	s.aio.running.Add(1)
	go func() {
		defer s.aio.running.Done()
		err := do()
		took := time.Since(start)
		s.aio.end(number, func() { tell(err, took) })
	}()
}

// next numbers the requests.
func (r *requests) next() int {
	r.made++
	return r.made
}

func (r *requests) end(number int, tell func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = append(r.ended, ended{number, tell})
}

// reapRequests tells of the requests that have ended.
func (s *Shell) reapRequests() {
	s.aio.mu.Lock()
	all := s.aio.ended
	s.aio.ended = nil
	s.aio.mu.Unlock()
	slices.SortFunc(all, func(a, b ended) int { return a.number - b.number })
	for _, e := range all {
		e.tell()
	}
}

// finishRequests waits for all requests, also for those that nobody would resume any more.
func (s *Shell) finishRequests() {
	if s.image != nil && s.image.Break != nil {
		s.image.Break.Release()
	}
	s.waitRequests()
}

func (s *Shell) waitRequests() {
	s.aio.running.Wait()
	s.reapRequests()
}

func runAIOFlush(s *Shell, _ context.Context, _ command, _ []string) error {
	s.waitRequests()
	return nil
}

// inject notes a request that was never made: -i is for what QEMU counts of a device, which nobody can ask for here.
func (s *Shell) inject(what string) { s.printf("injecting invalid %s request\n", what) }

func runAIORead(s *Shell, ctx context.Context, c command, words []string) error {
	f, pattern, err := s.patterned(c, words, "CP:iqv", 0)
	if err != nil {
		return err
	}
	if f.has('i') {
		s.inject("read")
		return nil
	}
	if len(f.rest) < 2 {
		return s.usage(c)
	}
	off, _, n, err := s.vector(f.rest)
	if err != nil {
		return err
	}
	im := s.image
	buf := make([]byte, n)
	tell := func(err error, took time.Duration) {
		if err != nil {
			s.printf("readv failed: %s\n", reason(err))
			return
		}
		if f.has('P') {
			_ = s.verify(buf, pattern, off) // it has told; nobody waits for the outcome
		}
		s.tellRead(f, took, off, n, buf)
	}
	s.start(im, off, n, func() error { return im.ReadAt(ctx, buf, off) }, tell)
	return nil
}

func runAIOWrite(s *Shell, ctx context.Context, c command, words []string) error {
	f, pattern, err := s.patterned(c, words, "CfiP:quz", 0xcd)
	if err != nil {
		return err
	}
	if f.has('i') {
		s.inject("write")
		return nil
	}
	switch {
	case len(f.rest) < 2:
		return s.usage(c)
	case f.has('z') && len(f.rest) != 2:
		return s.failf("-z supports only a single length parameter")
	case f.has('u') && !f.has('z'):
		return s.failf("-u requires -z to be specified")
	}
	im := s.image
	var off, n int64
	var do func() error
	if f.has('z') {
		var ok bool
		if off, ok = s.number(f.rest[0]); !ok {
			return errFailed
		}
		if n, ok = s.number(f.rest[1]); !ok {
			return errFailed
		}
		do = func() error { return im.WriteZeroes(ctx, off, n, f.zeroFlags()) }
	} else {
		if off, _, n, err = s.vector(f.rest); err != nil {
			return err
		}
		buf := filled(n, pattern)
		do = func() error { return im.WriteAt(ctx, buf, off, f.writeFlags()) }
	}
	s.start(im, off, n, do, func(err error, took time.Duration) {
		if err != nil {
			s.printf("aio_write failed: %s\n", reason(err))
			return
		}
		if !f.has('q') {
			s.report("wrote", took, off, n, n, f.has('C'))
		}
	})
	return nil
}

// start submits a request, or notes its failure at once when it lies outside the disk.
func (s *Shell) start(im *Image, off, n int64, do func() error, tell func(error, time.Duration)) {
	if err := block.CheckRange(off, n, im.Size()); err != nil {
		s.aio.end(s.aio.next(), func() { tell(err, 0) })
		return
	}
	s.submit(do, tell)
}

func runBreak(s *Shell, _ context.Context, _ command, words []string) error {
	err := ErrNotSupported
	if s.image.Break != nil {
		err = s.image.Break.Break(words[1], words[2])
	}
	if err != nil {
		return s.failf("Could not set breakpoint: %s", reason(err))
	}
	return nil
}

func runRemoveBreak(s *Shell, _ context.Context, _ command, words []string) error {
	err := ErrNotSupported
	if s.image.Break != nil {
		err = s.image.Break.RemoveBreak(words[1])
	}
	if err != nil {
		return s.failf("Could not remove breakpoint %s: %s", words[1], reason(err))
	}
	return nil
}

func runResume(s *Shell, _ context.Context, _ command, words []string) error {
	err := ErrNotSupported
	if s.image.Break != nil {
		err = s.image.Break.Resume(words[1])
	}
	if err != nil {
		return s.failf("Could not resume request: %s", reason(err))
	}
	return nil
}

// runWaitBreak waits until a request has stopped. An image without breakpoints would make it wait for ever.
func runWaitBreak(s *Shell, ctx context.Context, _ command, words []string) error {
	if s.image.Break == nil {
		return s.failf("Could not wait for breakpoint: %s", reason(ErrNotSupported))
	}
	if err := s.image.Break.WaitBreak(ctx, words[1]); err != nil {
		return fmt.Errorf("waiting for breakpoint %s: %w", strings.TrimSpace(words[1]), err)
	}
	return nil
}
