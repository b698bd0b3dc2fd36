package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/droverproject/drover/block"
	_ "github.com/droverproject/drover/block/filter" // registers filters
	"github.com/droverproject/drover/nbd/client"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// source is the image that a command reads, as its flags describe it.
type source struct {
	format     string
	forceShare bool
	imageOpts  bool
	direct     bool // bypass the page cache
	noDiscard  bool // ignore discards, unless the image's options say otherwise
	policy     policyFlags

	name        string        // as given, for messages
	node        block.Options // what it stands for
	shownFormat string        // what info calls the format of a node that has none
	options     map[string]string
	objects     objectFlags
	warn        func(string) // says what qemu-img warns of; may be nil
	secrets     secrets
	noData      bool // the command needs no data: an encrypted image may stay locked
}

// policyFlags say which files an image may refer to.
type policyFlags struct {
	allowPath []string
	allowAny  bool
}

func (p *policyFlags) add(f *pflag.FlagSet) {
	f.StringArrayVar(&p.allowPath, "allow-path", nil, "let images refer to files in `DIR` and below (may be repeated)")
	f.BoolVar(&p.allowAny, "allow-any-path", false, "let images refer to any file")
}

func (p *policyFlags) policy() block.Policy {
	switch {
	case p.allowAny:
		return block.AllowAll()
	case len(p.allowPath) > 0:
		return block.AnyOf(block.BelowImageFolder(), block.Roots(p.allowPath))
	}
	return block.BelowImageFolder()
}

func (s *source) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&s.format, "format", "f", "", "`format` of the image; by default its content decides")
	f.BoolVarP(&s.forceShare, "force-share", "U", false, "open the image even if somebody else writes to it")
	f.BoolVar(&s.imageOpts, "image-opts", false, "the image is given as options: driver=FMT,file.filename=NAME")
	s.objects.add(f)
	s.warn = func(text string) {
		fmt.Fprintf(cmd.ErrOrStderr(), "%s: warning: %s\n", cmd.Root().Name(), text)
	}
}

// set takes the image argument.
func (s *source) set(arg string) error {
	var err error
	if s.secrets, err = s.objects.parse(); err != nil {
		return err
	}
	s.name = arg
	if !s.imageOpts {
		if err := s.checkFormat(); err != nil {
			return err
		}
		node, err := block.ParseName(arg, s.format)
		if err != nil {
			return openError(arg, err)
		}
		return s.describe(node)
	}
	if s.format != "" {
		return errorf("--image-opts and --format are mutually exclusive")
	}
	return s.parseImageOpts(arg)
}

func (s *source) openOptions() block.OpenOptions {
	format := s.format
	if s.node != nil {
		format = "" // the node has it
	}
	return block.OpenOptions{
		Node: s.node, Format: format, Object: s.objects.lookup, Warn: s.warn, AllowProbe: true, ProbeBacking: true,
		ReadOnly: true, ForceShare: s.forceShare, Direct: s.direct, IgnoreDiscard: s.noDiscard,
		Policy: s.policy.policy(), Options: s.options,
		Secret: s.secrets.lookup, NoData: s.noData,
	}
}

// openFile opens the image's file alone and finds out its format.
func (s *source) openFile() (storage.File, string, error) { return s.openFileAs(true) }

// openFileAs is openFile for reading or for writing.
func (s *source) openFileAs(readOnly bool) (storage.File, string, error) {
	if err := s.checkFormat(); err != nil {
		return nil, "", err
	}
	o := s.openOptions()
	o.ReadOnly = readOnly
	if !readOnly && s.forceShare {
		return nil, "", errorf("Could not open '%s': force-share=on can only be used with read-only images", s.name)
	}
	file, err := block.OpenFile(s.name, o)
	if err != nil {
		return nil, "", openError(s.name, err)
	}
	format, err := formatOf(file, s.format)
	if err == nil {
		err = block.CheckOptions(format, s.node)
	}
	if err != nil {
		return nil, "", openError(s.name, errors.Join(err, file.Close()))
	}
	return file, format, nil
}

// formatOf returns the given format if it is known, and that which the content suggests if none is given.
func formatOf(file storage.File, given string) (string, error) {
	if given == "" {
		return block.ProbeFile(file)
	}
	return given, checkFormat(given)
}

// checkFormat refuses the image when its format does not exist.
func (s *source) checkFormat() error {
	if err := checkFormat(s.format); err != nil {
		return errorf("Could not open '%s': %w", s.name, err)
	}
	return nil
}

// checkFormat refuses a format that the user gave and that does not exist. "" is none given.
func checkFormat(given string) error {
	if given == "" || slices.Contains(block.Formats(), given) || slices.Contains(block.Drivers(), given) {
		return nil
	}
	return errorf("Unknown driver '%s'", given)
}

// openError words a failure to open an image as qemu-img does.
func openError(name string, err error) error {
	if plain, perr := block.PlainName(name); perr == nil {
		name = plain // messages speak of the file, as the file's own errors do
	}
	return errorf("Could not open '%s': %s", name, openReason(name, err))
}

// openReason finds the layer of the chain that failed and words its failure.
func openReason(name string, err error) string {
	var refused *block.PolicyError
	if errors.As(err, &refused) {
		return refused.Error()
	}
	var layer *block.OpenError
	if !errors.As(err, &layer) {
		return reason(name, err)
	}
	text := openReason(layer.Name, layer.Err)
	if layer.Kind == "" {
		return text
	}
	if !strings.Contains(text, layer.Name) {
		text = fmt.Sprintf("Could not open '%s': %s", layer.Name, text)
	}
	return fmt.Sprintf("Could not open %s: %s", layer.Kind, text)
}

// reason words the failure of one file.
func reason(name string, err error) string {
	var lock *storage.LockError
	var errno syscall.Errno
	var file *block.FileError
	if errors.As(err, &file) {
		name, err = file.Name, file.Err
	}
	var unknown *block.UnknownFormatError
	var unreachable *client.ConnectError
	var readOnly *qcow2.ReadOnlyError
	switch {
	case errors.As(err, &unreachable):
		return unreachable.Error()
	case errors.As(err, &lock):
		return lock.Error()
	case errors.As(err, &unknown):
		return fmt.Sprintf("Unknown driver '%s'", unknown.Name)
	case errors.As(err, &readOnly) && slices.Contains(readOnly.Reasons, qcow2.ReasonCorrupt):
		return "qcow2: Image is corrupt; cannot be opened read/write"
	case errors.Is(err, qcow2.ErrWrongKey):
		return qcow2.ErrWrongKey.Error()
	case errors.Is(err, storage.ErrFileType):
		return fmt.Sprintf("'file' driver requires '%s' to be a regular file", name)
	case errors.Is(err, block.ErrProtocol):
		protocol, _, _ := block.SplitProtocol(name)
		return fmt.Sprintf("Unknown protocol '%s'", protocol)
	case errors.As(err, &errno):
		return fmt.Sprintf("Could not open '%s': %s", name, capital(errno.Error()))
	}
	return err.Error()
}

// capital turns an error number's text into that of the C library, which begins with a capital letter.
func capital(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}
