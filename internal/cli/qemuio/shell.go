// Package qemuio is the command language of qemu-io, which exercises an open disk by small commands ("write -P 7 0 64k"):
// their flags, output and errors are those of qemu-io 7.2, word for word, because test suites compare them.
//
// The package knows nothing of formats. It works on an Image that an Opener makes, and tells an image's further abilities
// (VM state, breakpoints, another size) by the functions that the Image has.
package qemuio

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/droverproject/drover/block"
)

// Opening says how an image is to be opened.
type Opening struct {
	Name    string   // of the file, or the options that describe it; "" when Options do
	Options []string // the texts of -o
	// Described: Name is a list of options (--image-opts).
	Described bool
	Format    string
	ReadOnly  bool
	// Snapshot: what is written goes to a temporary overlay.
	Snapshot   bool
	CopyOnRead bool
	ForceShare bool
	Cache      string // "" for the default, else a valid mode
	Discard    string // likewise
	AIO        string // likewise
}

// Reopening says what reopen changes.
type Reopening struct {
	ReadOnly  bool
	ReadWrite bool
	Cache     string
	Options   string
}

// Opener opens images for a Shell. Its errors are complete messages but for the program's name.
type Opener interface {
	Open(ctx context.Context, o Opening) (*Image, error)
	// Reopen changes how an image is open. It returns the image that is open afterwards, which is the given one unless
	// something changed; nil when it is lost.
	Reopen(ctx context.Context, im *Image, r Reopening) (*Image, error)
}

// Image is a disk with all that qemu-io can ask of one. A nil function is something that this image cannot do.
type Image struct {
	block.Device
	// Opened is how it was opened.
	Opened Opening
	// Truncate gives the disk another size. preallocation is one of qemu's modes, "" for none.
	Truncate func(ctx context.Context, size int64, preallocation string) error
	// Describe writes what "info" tells.
	Describe func(ctx context.Context, w io.Writer) error
	// Compressed writes data compressed.
	// It returns ErrNotWhole for what is not whole clusters.
	Compressed func(ctx context.Context, p []byte, off int64) error
	// ReadState and WriteState reach the VM state of a snapshot to be.
	ReadState, WriteState func(ctx context.Context, p []byte, off int64) error
	// Break holds requests at an event, if the image has a place to set breakpoints.
	Break Breaker
}

// Breaker sets breakpoints: a request that comes to the event stops there until it is resumed.
type Breaker interface {
	Break(event, tag string) error
	RemoveBreak(tag string) error
	Resume(tag string) error
	// WaitBreak returns when a request is stopped at the breakpoint.
	WaitBreak(ctx context.Context, tag string) error
	// Release resumes all that is stopped and removes all breakpoints.
	Release()
}

// errFailed says that a command has failed and has told the user already.
var errFailed = errors.New("command failed")

// Shell runs commands on one image at a time.
type Shell struct {
	Program  string // the name before messages
	Out, Err io.Writer
	Opener   Opener
	// Described: names that "open" gets are lists of options (--image-opts).
	Described bool

	image  *Image
	aio    requests
	failed bool
	done   bool
}

// Open opens the image that commands work on.
func (s *Shell) Open(ctx context.Context, o Opening) error {
	im, err := s.Opener.Open(ctx, o)
	if err != nil {
		return err
	}
	s.image = im
	return nil
}

// Failed reports whether a command has failed.
func (s *Shell) Failed() bool { return s.failed }

// Run runs the commands of a list until one of them ends the program.
func (s *Shell) Run(ctx context.Context, commands []string) {
	for _, text := range commands {
		if s.done {
			return
		}
		s.run(ctx, text)
	}
}

const prompt = "qemu-io> "

// Interact runs the lines of in, after a prompt for each.
func (s *Shell) Interact(ctx context.Context, in io.Reader) {
	lines := bufio.NewReader(in)
	for !s.done {
		fmt.Fprint(s.Out, prompt)
		line, err := lines.ReadString('\n')
		if err != nil && line == "" {
			return
		}
		s.run(ctx, strings.TrimSuffix(line, "\n"))
	}
}

// Close waits for what still runs and closes the image.
func (s *Shell) Close() error {
	s.finishRequests()
	if s.image == nil {
		return nil
	}
	im := s.image
	s.image = nil
	return im.Close()
}

// run runs one command line and notes whether it failed.
func (s *Shell) run(ctx context.Context, line string) {
	words := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' })
	if len(words) == 0 {
		return
	}
	c, ok := lookup(words[0])
	if !ok {
		fmt.Fprintf(s.Err, "command \"%s\" not found\n", words[0])
		s.failed = true
		return
	}
	if err := s.call(ctx, c, words); err != nil {
		s.failed = true
		if !errors.Is(err, errFailed) {
			s.say("%s", err)
		}
	}
	s.reapRequests()
}

// call runs a command if image and arguments allow it.
func (s *Shell) call(ctx context.Context, c command, words []string) error {
	if s.image == nil && !c.noFile {
		fmt.Fprintln(s.Err, "no file open, try 'help open'")
		return errFailed
	}
	if n := len(words) - 1; n < c.least || c.most >= 0 && n > c.most {
		s.wrongCount(c, words[0], n)
		return errFailed
	}
	if c.changes && s.image.Info().ReadOnly {
		return errors.New("Block node is read-only") //nolint:staticcheck // QEMU's words
	}
	return c.run(s, ctx, c, words)
}

func (s *Shell) wrongCount(c command, word string, n int) {
	want := fmt.Sprintf("between %d and %d", c.least, c.most)
	switch {
	case c.most < 0:
		want = fmt.Sprintf("at least %d", c.least)
	case c.least == c.most:
		want = fmt.Sprintf("%d", c.least)
	}
	fmt.Fprintf(s.Err, "bad argument count %d to %s, expected %s arguments\n", n, word, want)
}

// say writes a message for the user to standard error.
func (s *Shell) say(format string, args ...any) {
	fmt.Fprintf(s.Err, s.Program+": "+format+"\n", args...)
}

// printf writes output.
func (s *Shell) printf(format string, args ...any) { fmt.Fprintf(s.Out, format, args...) }

// failf tells on standard output, where qemu-io tells most, why a command failed.
func (s *Shell) failf(format string, args ...any) error {
	s.printf(format+"\n", args...)
	return errFailed
}

// usage is the failure of a command with flags or arguments that it does not know.
func (s *Shell) usage(c command) error { return s.failf("%s", c.line()) }

// reason words the failure of a request as the C library words its error number.
func reason(err error) string {
	return capital(errnoOf(err).Error())
}

// errnoOf is the error number that QEMU would have for a failure.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case errors.Is(err, ErrNotSupported), errors.Is(err, block.ErrNoFastZero):
		return syscall.ENOTSUP
	case errors.Is(err, block.ErrNoCompression):
		return syscall.ENOTSUP
	case errors.Is(err, block.ErrLooksLikeFormat):
		return syscall.EPERM
	case errors.Is(err, block.ErrReadOnly):
		return syscall.EACCES
	case errors.Is(err, ErrNotWhole):
		return syscall.EINVAL
	case errors.As(err, &errno):
		return errno
	}
	return syscall.EIO
}

// ErrNotWhole is wrapped by the errors of Image.Compressed for a range that cannot be compressed by itself.
var ErrNotWhole = errors.New("range is not made of whole units")

// ErrNotSupported is wrapped by the errors of an Image's functions for what this image cannot do.
var ErrNotSupported = errors.New("not supported by this image")

// capital makes a number's text begin as the C library's does.
func capital(text string) string { return strings.ToUpper(text[:1]) + text[1:] }
