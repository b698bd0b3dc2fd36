package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/filter"
	"github.com/droverproject/drover/internal/cli/getopt"
	"github.com/droverproject/drover/internal/cli/qemuio"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// Options of qemu-io that have no letter.
const (
	ioImageOpts rune = iota + 1
	ioObject
)

var qemuIOOptions = []getopt.Option{
	{ID: 'h', Short: true, Long: "help"},
	{ID: 'V', Short: true, Long: "version"},
	{ID: 'c', Short: true, Long: "cmd", Arg: getopt.Required},
	{ID: 'f', Short: true, Long: "format", Arg: getopt.Required},
	{ID: 'r', Short: true, Long: "read-only"},
	{ID: 's', Short: true, Long: "snapshot"},
	{ID: 'n', Short: true, Long: "nocache"},
	{ID: 'C', Short: true, Long: "copy-on-read"},
	{ID: 'm', Short: true, Long: "misalign"},
	{ID: 'k', Short: true, Long: "native-aio"},
	{ID: 'i', Short: true, Long: "aio", Arg: getopt.Required},
	{ID: 't', Short: true, Long: "cache", Arg: getopt.Required},
	{ID: 'd', Short: true, Long: "discard", Arg: getopt.Required},
	{ID: 'T', Short: true, Long: "trace", Arg: getopt.Required},
	{ID: 'U', Short: true, Long: "force-share"},
	{ID: ioObject, Long: "object", Arg: getopt.Required},
	{ID: ioImageOpts, Long: "image-opts"},
}

const qemuIOHelp = `Usage: %s [OPTIONS]... [-c STRING]... [file]
QEMU Disk exerciser

  --object OBJECTDEF   an object that other options refer to, such as a
                       'secret' with a password or a key
  --image-opts         the file is given as options: driver=FMT,...
  -c, --cmd STRING     run the command in the string; may be repeated
  -f, --format FMT     format of the image; by default its content decides
  -r, --read-only      open the image to read only
  -s, --snapshot       write to a temporary overlay
  -n, --nocache        bypass the host's page cache, the same as -t none
  -C, --copy-on-read   copy what is read from below into the image
  -m, --misalign       accepted, without effect
  -k, --native-aio     the same as -i native
  -i, --aio=MODE       how requests are made: threads, native or io_uring
                       (without effect)
  -t, --cache=MODE     cache mode of the image
  -d, --discard=MODE   discard mode of the image
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                       accepted, without effect
  -U, --force-share    bear other programs that write to the image
  -h, --help           print this help and exit
  -V, --version        print the version and exit

'%s -c help' lists the commands.
`

// qemuIO is a command line of qemu-io.
type qemuIO struct {
	*app
	commands []string
	opening  qemuio.Opening
	objects  objectFlags
	help     bool
	version  bool
}

// runQemuIO is drover under the name of qemu-io.
func (a *app) runQemuIO(ctx context.Context, args []string) error {
	q := &qemuIO{app: a}
	rest, err := getopt.Parse(qemuIOOptions, args, q.set)
	var mistake *getopt.Error
	switch {
	case errors.As(err, &mistake):
		a.say("%s", mistake.Text)
		fallthrough
	case err == nil && !q.help && !q.version && len(rest) > 1:
		q.usage()
		return &exitError{code: 1}
	case err != nil:
		return err
	case q.help:
		q.usage()
		return nil
	case q.version:
		a.printStandIn()
		return nil
	}
	return q.run(ctx, rest)
}

func (q *qemuIO) usage() { q.printf(qemuIOHelp, q.name, q.name) }

func (q *qemuIO) set(id rune, value string) error {
	o := &q.opening
	switch id {
	case 'h':
		q.help = true
	case 'V':
		q.version = true
	case 'c':
		q.commands = append(q.commands, value)
	case 'f':
		o.Format = value
	case ioObject:
		q.objects.texts = append(q.objects.texts, value)
	case ioImageOpts:
		o.Described = true
	default: // -m and -T are accepted without effect
		o.Set(id, value)
	}
	return o.Check()
}

func (q *qemuIO) run(ctx context.Context, files []string) (err error) {
	if q.opening.Described && q.opening.Format != "" {
		return errorf("--image-opts and -f are mutually exclusive")
	}
	shell := &qemuio.Shell{Program: q.name, Out: q.out, Err: q.err, Described: q.opening.Described}
	q.objects.others = &otherObjects{}
	shell.Opener = &ioOpener{app: q.app, objects: q.objects}
	if _, err := q.objects.parse(); err != nil {
		return err
	}
	if len(files) == 1 {
		q.opening.Name = files[0]
		if err := shell.Open(ctx, q.opening); err != nil {
			return err
		}
	}
	if len(q.commands) > 0 {
		shell.Run(ctx, q.commands)
	} else {
		shell.Interact(ctx, q.in)
	}
	if err := shell.Close(); err != nil {
		return err
	}
	if shell.Failed() {
		return &exitError{code: 1}
	}
	return nil
}

// ioOpener opens images for qemu-io.
type ioOpener struct {
	*app
	objects objectFlags
	breaker block.Breaker // of the image opened last; nil if it has no place for breakpoints
}

// Open implements qemuio.Opener.
func (p *ioOpener) Open(ctx context.Context, o qemuio.Opening) (*qemuio.Image, error) {
	im, err := p.open(ctx, o)
	if err != nil && o.Name != "" && !o.Described {
		return nil, errorf("can't open device %s: %w", o.Name, err)
	}
	if err != nil {
		return nil, errorf("can't open: %w", err)
	}
	return im, nil
}

// source is the image that an opening speaks of.
func (p *ioOpener) source(o qemuio.Opening) (*source, error) {
	src := &source{
		format: o.Format, forceShare: o.ForceShare, imageOpts: o.Described, objects: p.objects, name: o.Name,
		warn: func(text string) { p.say("warning: %s", text) },
	}
	src.policy.allowAny = true // as qemu-io does: whoever tests with an image knows what is in it
	var err error
	if src.secrets, err = p.objects.parse(); err != nil {
		return nil, err
	}
	texts := o.Options
	if o.Described && o.Name != "" {
		texts = append([]string{o.Name}, texts...)
	}
	node := block.ParseOptions(p.named(strings.Join(texts, ","), src.warn), src.warn)
	if o.Name != "" && !o.Described {
		if node, err = p.nameNode(o, node); err != nil {
			return nil, err
		}
	}
	if node["driver"] == "" && len(node.Sub("file")) == 0 {
		return nil, errorf("Must specify either driver or file")
	}
	return src, src.describe(node)
}

// nameNode is what a file's name stands for, with the given options.
func (p *ioOpener) nameNode(o qemuio.Opening, given block.Options) (block.Options, error) {
	format := o.Format
	if format == "" {
		format = given["driver"]
	}
	if err := checkFormat(format); err != nil {
		return nil, err
	}
	node, err := block.ParseName(o.Name, format)
	if err != nil {
		return nil, errors.New(openReason(o.Name, err))
	}
	maps.Copy(node, given)
	return node, nil
}

// named makes the first of a list of options a switch when it has no name: qemu-io has no option that goes without.
func (p *ioOpener) named(text string, warn func(string)) string {
	first := splitOptions(text)[0]
	if first == "" || strings.Contains(first, "=") {
		return text
	}
	warn(fmt.Sprintf("short-form boolean option '%s' deprecated\nPlease use %s=on instead", first, first))
	return first + "=on" + text[len(first):]
}

func (p *ioOpener) open(ctx context.Context, o qemuio.Opening) (*qemuio.Image, error) {
	src, err := p.source(o)
	if err != nil {
		return nil, err
	}
	switch {
	case o.AIO == "native" && !o.Direct():
		return nil, errorf("aio=native was specified, but it requires cache.direct=on, which was not specified.")
	case o.CopyOnRead && o.ReadOnly:
		return nil, errorf("Can't use copy-on-read on read-only device")
	case o.ForceShare && !o.ReadOnly && !o.Snapshot:
		return nil, errorf("force-share=on can only be used with read-only images")
	}
	dev, err := p.openMode(ctx, src, o)
	if err != nil {
		return nil, err
	}
	if o.Snapshot && !o.ReadOnly {
		over, err := overTemporary(ctx, dev)
		if err != nil {
			return nil, errors.Join(err, dev.Close())
		}
		dev = over
	}
	return p.image(o, src, dev), nil
}

// openMode opens the disk that is read, and written unless something else takes the writes.
func (p *ioOpener) openMode(ctx context.Context, src *source, o qemuio.Opening) (block.Device, error) {
	opts := src.openOptions()
	opts.ReadOnly = o.ReadOnly || o.Snapshot
	opts.Direct = o.Direct()
	opts.OnRepair = p.tellRepair
	p.breaker = nil
	opts.Print = func(text string) { p.printf("%s\n", text) }
	opts.OnBreaker = func(b block.Breaker) { p.breaker = b }
	dev, err := block.Open(ctx, src.name, opts)
	if err != nil {
		return nil, errors.New(openReason(src.name, err))
	}
	if !opts.ReadOnly && src.format == "" && dev.Info().Format == block.FormatRaw {
		fmt.Fprintf(p.err, guessedRaw, src.name)
	}
	return dev, nil
}

// image makes a disk what the commands work on.
func (p *ioOpener) image(o qemuio.Opening, src *source, dev block.Device) *qemuio.Image {
	im := &qemuio.Image{Opened: o, Device: used(dev, o)}
	if p.breaker != nil {
		im.Break = p.breaker
	}
	im.Describe = func(ctx context.Context, w io.Writer) error {
		return describeDisk(ctx, &app{name: p.name, out: w, err: p.err}, dev)
	}
	if disk, ok := block.As[*qcow2.Image](dev); ok {
		im.Compressed = compressed(block.WithMode(dev, ioMode(o)), disk)
		im.ReadState, im.WriteState = stateIO(disk.ReadVMState), stateIO(disk.WriteVMState)
		im.Truncate = func(ctx context.Context, size int64, mode string) error { return truncateImage(ctx, disk, size, mode) }
	} else if _, ok := block.As[*block.Raw](dev); ok && isFile(src.node) {
		im.Truncate = func(ctx context.Context, size int64, mode string) error {
			changed, err := p.truncateRaw(ctx, o, src, im.Device, size, mode)
			if changed != nil {
				dev, im.Device = changed, used(changed, o)
			}
			return err
		}
	}
	return im
}

// isFile reports whether a node is a file, as it is or with a format of its own.
func isFile(node block.Options) bool {
	at := node
	if len(node.Sub("file")) > 0 {
		at = node.Sub("file")
	}
	return at["driver"] == "" || at["driver"] == "file" || at["driver"] == "host_device"
}

// compressed writes compressed clusters, by the mode of dev if it passes them on.
func compressed(dev block.Device, disk *qcow2.Image) func(context.Context, []byte, int64) error {
	w, ok := dev.(block.CompressedWriter)
	if !ok {
		w = disk
	}
	return func(ctx context.Context, p []byte, off int64) error {
		err := w.WriteCompressed(ctx, p, off)
		if errors.Is(err, qcow2.ErrNotWholeClusters) {
			return fmt.Errorf("%w: %w", qemuio.ErrNotWhole, err)
		}
		return err
	}
}

// stateIO reads or writes machine state, where the image has a place for it.
func stateIO(do func(context.Context, []byte, int64) error) func(context.Context, []byte, int64) error {
	return func(ctx context.Context, p []byte, off int64) error {
		err := do(ctx, p, off)
		if errors.Is(err, qcow2.ErrNoVMState) {
			return fmt.Errorf("%w: %w", qemuio.ErrNotSupported, err)
		}
		return err
	}
}

// used is a disk in the way in which it is used.
func used(dev block.Device, o qemuio.Opening) block.Device {
	if o.CopyOnRead {
		dev = filter.CopyOnRead(dev)
	}
	return block.WithMode(dev, ioMode(o))
}

// ioMode is how the disk is used.
func ioMode(o qemuio.Opening) block.Mode {
	return block.Mode{
		Writethrough: o.Cache == "" || o.Cache == "writethrough" || o.Cache == "directsync", // qemu-io's default
		NoFlush:      o.Cache == "unsafe",
		NoDiscard:    o.Discard == "ignore" || o.Discard == "off",
	}
}

func truncateImage(ctx context.Context, im *qcow2.Image, size int64, preallocation string) error {
	mode := preallocationModes[preallocation]
	if size < im.Size() && mode != qcow2.PreallocOff {
		return errorf("Preallocation can't be used for shrinking an image")
	}
	if size%storage.SectorSize != 0 {
		return errorf("The new size must be a multiple of %d", storage.SectorSize)
	}
	if err := im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true, Preallocation: mode}); err != nil {
		return errors.New(changeReason(err))
	}
	return nil
}

// truncateRaw gives a raw disk, which is its file, another length. The disk is closed meanwhile and returned anew.
func (p *ioOpener) truncateRaw(
	ctx context.Context, o qemuio.Opening, src *source, dev block.Device, size int64, preallocation string,
) (block.Device, error) {
	if _, ok := src.node["size"]; ok {
		return nil, errorf("Cannot resize fixed-size raw disks")
	}
	if _, ok := src.node["offset"]; ok {
		return nil, errorf("Cannot resize a part of a file")
	}
	if err := dev.Close(); err != nil {
		return nil, err
	}
	r := &resizer{app: p.app, src: *src, shrink: true}
	err := r.setRaw(size, preallocationModes[preallocation])
	changed, openErr := p.openMode(ctx, src, o)
	if openErr != nil {
		return nil, errors.Join(err, fmt.Errorf("opening the disk again: %w", openErr))
	}
	return changed, err
}

// Reopen implements qemuio.Opener.
func (p *ioOpener) Reopen(ctx context.Context, im *qemuio.Image, r qemuio.Reopening) (*qemuio.Image, error) {
	o, err := reopening(im.Opened, r)
	if err != nil {
		return im, err
	}
	if err := im.Close(); err != nil {
		return nil, err
	}
	changed, err := p.open(ctx, o)
	if err == nil {
		return changed, nil
	}
	if _, option, ok := strings.Cut(err.Error(), " does not support the option "); ok {
		err = errorf("Cannot change the option %s", option)
	}
	old, oldErr := p.open(ctx, im.Opened)
	if oldErr != nil {
		return nil, errors.Join(err, oldErr)
	}
	return old, err
}

// reopening is an opening with some things changed.
func reopening(o qemuio.Opening, r qemuio.Reopening) (qemuio.Opening, error) {
	for _, part := range splitOptions(r.Options) {
		name, _, _ := strings.Cut(part, "=")
		switch {
		case name == "read-only" && (r.ReadOnly || r.ReadWrite):
			return o, errorf("Cannot set both -r/-w and 'read-only'")
		case strings.HasPrefix(name, "cache.") && r.Cache != "":
			return o, errorf("Cannot set both -c and the cache options")
		case name == "driver" || name == "filename" || name == "file":
			return o, errorf("Cannot change the option '%s'", name)
		}
	}
	if r.Options != "" {
		o.Options = append(slices.Clone(o.Options), r.Options)
	}
	if r.Cache != "" {
		o.Cache = r.Cache
	}
	o.ReadOnly = (o.ReadOnly || r.ReadOnly) && !r.ReadWrite
	return o, nil
}

// describeDisk writes what qemu-io's "info" tells of a disk.
func describeDisk(ctx context.Context, a *app, dev block.Device) error {
	var cluster, state int64
	var detail *qcow2.Info
	if im, ok := block.As[*qcow2.Image](dev); ok {
		info, err := im.FileInfo(ctx)
		if err != nil {
			return err
		}
		cluster, detail, state = info.ClusterSize, info, im.VMStateOffset()
	}
	name := dev.Info().Format
	a.printf("format name: %s\n", name)
	if slices.Contains([]string{"file", "host_device", "null-co", "null-aio"}, name) {
		a.printf("format name: %s\n", name) // of the protocol, which is the same
	}
	if strings.HasPrefix(name, "null-") {
		return nil // nothing more is known of it
	}
	a.printf("cluster size: %s\nvm state offset: %s\n", qemuio.Size(cluster), qemuio.Size(state))
	if detail == nil {
		return nil
	}
	var info imageInfo
	fillQCOW2(&info, detail)
	a.printf("Format specific information:\n")
	a.printQCOW2(&info.FormatDetail.Data)
	return nil
}
