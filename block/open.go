package block

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/droverproject/drover/storage"
)

// maxChain is the number of images that may stand on top of one another.
const maxChain = 200

// probeSize is how much of a file decides about its format.
const probeSize = 512

// OpenOptions say how Open treats an image and those it refers to.
type OpenOptions struct {
	// Format is the format of the image. Empty means that the content decides, which AllowProbe must permit: who can
	// write to a raw disk can make it look like an image that refers to any file.
	Format     string
	AllowProbe bool
	// ProbeBacking permits the same for backing files whose format the image does not record.
	ProbeBacking bool

	ReadOnly   bool
	ForceShare bool // bear other users who write; needs ReadOnly
	NoLock     bool // take no locks at all
	Direct     bool // bypass the page cache
	// WriteBehind sends what is written on its way to the disk before a Flush asks for it: for whoever writes a whole disk and
	// flushes at the end.
	WriteBehind bool

	NoBacking bool     // open the image alone; what it does not hold itself reads as zeroes
	Backing   *Backing // in place of the backing file that the image names
	DataFile  string   // in place of the external data file that the image names

	// Node, if not nil, describes the image, in place of its name. Options have no say where it has one.
	Node Options
	// Object looks up the objects that options name, by their kind and ID. nil knows none.
	Object func(kind, id string) (any, error)
	// OnBreaker, if not nil, is told of nodes that can hold requests, the lowest first.
	OnBreaker func(Breaker)
	// Print, if not nil, is told what blkdebug says about requests that it holds.
	Print func(text string)
	// Warn, if not nil, is told what QEMU would warn of.
	Warn func(text string)
	// IgnoreDiscard: discards have no effect on nodes whose option "discard" is not given.
	IgnoreDiscard bool
	// WriteDepth is how many layers below the image there is one that is opened for writing as well; 0: there is none.
	WriteDepth int
	// Policy judges the files that images name. nil is DenyAll.
	Policy Policy
	// Options are the format's runtime options for the top image, by QEMU's names. Those that begin with "backing." are for
	// the image below.
	Options map[string]string
	// Memory, if not nil, bounds the metadata caches of all images that are opened with it, together.
	Memory *CacheBudget
	// Secret looks up the secrets that options speak of, the keys of encrypted images, by their IDs. nil knows none.
	Secret func(id string) ([]byte, error)
	// NoData says that no data will be read or written, so that encrypted images may stay locked.
	NoData bool
	// OnCorrupt, if not nil, is called once for an image that has been marked corrupt because a change met impossible
	// metadata, with its name. The image is only read from then on. It must not wait for the image.
	OnCorrupt func(name string, err error)
	// OnRepair, if not nil, is told of an image that was not closed cleanly and was repaired when it was opened for writing.
	OnRepair func(name string, r Repair)
	// Keep, if not nil, has what is acknowledged survive this process, however it ends.
	Keep *Keep
}

// Backing names a backing file at the user's word, which no policy judges.
type Backing struct{ Name, Format string }

var (
	// ErrFormatUnknown is wrapped when no format was given and guessing is not allowed.
	ErrFormatUnknown = errors.New("image format is not given")
	// ErrUnknownFormat is wrapped when the format given is not known.
	ErrUnknownFormat = errors.New("unknown image format")
	// ErrProtocol is wrapped when a name is not that of a file.
	ErrProtocol = errors.New("protocol is not supported")
	// ErrNoSecret is wrapped, in QEMU's words, when an option speaks of a secret that nobody gave.
	ErrNoSecret = errors.New("No secret with id") //lint:ignore ST1005 QEMU's words
	// ErrChain is wrapped when images refer to each other in a circle or are too many.
	ErrChain = errors.New("backing chain is not usable")
)

// OpenError says which file of a chain could not be opened. Errors of deeper layers are inside those of the layers above.
type OpenError struct {
	Name string
	Kind RefKind // what the image above wanted it for; "" for the image that the user named
	Err  error
}

// Error implements error.
func (e *OpenError) Error() string {
	kind := e.Kind
	if kind == "" {
		kind = "image"
	}
	return fmt.Sprintf("opening %s %q: %v", kind, e.Name, e.Err)
}

// Unwrap returns the cause.
func (e *OpenError) Unwrap() error { return e.Err }

// Probe returns the format that the first bytes of a file look like, "raw" when like no other.
func Probe(head []byte) string {
	padded := make([]byte, probeSize)
	copy(padded, head)
	for _, name := range Formats() {
		f, ok := lookupFormat(name)
		if ok && f.Probe != nil && f.Probe(padded) {
			return name
		}
	}
	return FormatRaw
}

// ProbeFile is Probe for an open file.
func ProbeFile(file storage.File) (string, error) {
	head := make([]byte, probeSize)
	if _, err := file.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("reading the first sector: %w", err)
	}
	return Probe(head), nil
}

func formatList() string { return strings.Join(Formats(), ", ") }

// Open opens the image called name and, under o.Policy, the files that it refers to. With o.Node the name is for messages
// only.
func Open(ctx context.Context, name string, o OpenOptions) (Device, error) {
	l, err := newTop(name, &o)
	if err != nil {
		return nil, err
	}
	if o.ForceShare && !o.ReadOnly {
		return nil, fmt.Errorf("opening %q: an image can be shared with writers only when it is opened read-only", name)
	}
	return l.open(ctx)
}

// OpenFile opens and locks the file called name as Open would, without looking into it.
func OpenFile(name string, o OpenOptions) (storage.File, error) {
	l, err := newTop(name, &o)
	if err != nil {
		return nil, err
	}
	return l.openFile(context.Background())
}

// newTop returns the layer of the image that the user named.
func newTop(name string, o *OpenOptions) (*layer, error) {
	if o.Policy == nil {
		o.Policy = DenyAll()
	}
	l := &layer{o: o, probe: o.AllowProbe, readOnly: o.ReadOnly}
	l.top = l
	if o.Node != nil {
		l.node = maps.Clone(o.Node)
		if o.Format != "" {
			l.node["driver"] = o.Format
		}
		l.name()
	} else {
		path, err := PlainName(name)
		if err != nil {
			return nil, err
		}
		l.plain(path, o.Format)
	}
	for name, value := range o.Options {
		if _, ok := l.node[name]; !ok {
			l.node[name] = value
		}
	}
	return l, nil
}

// OpenBackingFile opens the file that an image names as its backing, by the rules and the policy of Open but without
// looking into it. It returns the file and the path under which it was found, for further names relative to that. top
// is the image that the user named, image the one that holds the name.
func OpenBackingFile(ctx context.Context, top, image, name string, o OpenOptions) (storage.File, string, error) {
	if o.Policy == nil {
		o.Policy = DenyAll()
	}
	t := &layer{o: &o, path: top, base: top}
	next := &layer{o: &o, top: t, kind: RefBacking, readOnly: true}
	if err := next.follow(ctx, &layer{path: image, base: image}, name, ""); err != nil {
		return nil, "", err
	}
	f, err := next.openFile(ctx)
	return f, next.path, err
}

// layer is one image of a chain that is being opened.
type layer struct {
	o        *OpenOptions
	top      *layer
	above    []*layer // the images that stand on this one, from the top
	kind     RefKind  // what the image above wants it for
	path     string   // for messages
	base     string   // for names relative to it; "" when there can be none
	node     Options
	grant    *Grant // how the file may be opened whose name a policy has judged
	probe    bool
	readOnly bool
	id       fileID
}

// plain makes the layer that of a plain file.
func (l *layer) plain(path, format string) {
	l.path, l.base = path, path
	l.node = Options{"file.driver": "file", "file.filename": path}
	if format != "" {
		l.node["driver"] = format
	}
}

// name finds out what the layer is called from its node.
func (l *layer) name() { l.path, l.base = l.node.Describe(), l.node.LeafPath() }

func (l *layer) open(ctx context.Context) (Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dev, err := l.device(ctx, l.node, usage{readOnly: l.readOnly, forceShare: l.o.ForceShare, direct: l.o.Direct}, l.grant)
	if err != nil {
		return nil, &OpenError{Name: l.path, Kind: l.kind, Err: err}
	}
	return dev, nil
}

// openFile opens and locks the file of the layer.
func (l *layer) openFile(ctx context.Context) (storage.File, error) {
	file, err := l.bottom(ctx)
	if err != nil {
		return nil, &OpenError{Name: l.path, Kind: l.kind, Err: err}
	}
	return file, nil
}

// admit refuses a file that is in the chain already, then locks it. The order matters: the lock of a file that is in the
// chain twice conflicts with itself, and "in use by another process" would be the wrong message.
func (l *layer) admit(file storage.File, u usage, lock bool) error {
	id, err := identify(file)
	if err != nil {
		return err
	}
	l.id = id
	for _, a := range l.above {
		if a.id.same(id) {
			return fmt.Errorf("%w: the image stands on itself (%q is the same file as %q)", ErrChain, l.path, a.path)
		}
	}
	if l.o.NoLock || u.forceShare || !lock {
		return nil
	}
	mode := storage.LockWrite
	if u.readOnly {
		mode = storage.LockRead
	}
	return file.Lock(mode)
}

// openFormat makes a device of the file of a node whose driver is a format, or not known yet.
func (l *layer) openFormat(ctx context.Context, file storage.File, format string, u usage, rest Options) (Device, error) {
	probed := false
	if format == "" {
		if !l.probe {
			return nil, fmt.Errorf("%w (known formats: %s)", ErrFormatUnknown, formatList())
		}
		var err error
		if format, err = ProbeFile(file); err != nil {
			return nil, err
		}
		probed = true
	}
	f, ok := lookupFormat(format)
	if !ok {
		return nil, &UnknownFormatError{format}
	}
	refs := l.references(rest)
	name := l.path
	if l.base != "" {
		name = l.base
	}
	fo := FormatOptions{Name: name, ReadOnly: u.readOnly, Options: rest, Secret: l.o.secret(), NoData: l.o.NoData,
		Memory: l.o.Memory, OpenBacking: refs.openBacking, OpenDataFile: refs.openData}
	if tell := l.o.OnCorrupt; tell != nil {
		fo.OnCorrupt = func(err error) { tell(l.path, err) }
	}
	if tell := l.o.OnRepair; tell != nil {
		fo.OnRepair = func(r Repair) { tell(l.path, r) }
	}
	l.keep(&fo, file)
	if format == FormatRaw && probed && !u.readOnly {
		return openProbedRaw(file, fo)
	}
	dev, err := f.Open(ctx, file, fo)
	if err == nil && refs.unused() {
		return nil, errors.Join(fmt.Errorf("Block format '%s' does not support the option 'backing'", format), dev.Close())
	}
	return dev, err
}

func (o *OpenOptions) secret() func(id string) ([]byte, error) {
	if o.Secret != nil {
		return o.Secret
	}
	return func(id string) ([]byte, error) { return nil, fmt.Errorf("%w '%s'", ErrNoSecret, id) }
}

func (o *OpenOptions) warn(text string) {
	if o.Warn != nil {
		o.Warn(text)
	}
}

func openProbedRaw(file storage.File, fo FormatOptions) (Device, error) {
	ro, err := rawOptions(fo)
	if err != nil {
		return nil, err
	}
	ro.GuardFormat = func(head []byte) string {
		if name := Probe(head); name != FormatRaw {
			return name
		}
		return ""
	}
	return NewRaw(file, ro)
}

// references are the files that an image names, and what the options say of them.
type references struct {
	l           *layer
	backing     Options
	backingRef  *string // Null for none
	data        Options
	backingUsed bool
}

// references takes the options of other files out of those of a format.
func (l *layer) references(rest Options) *references {
	r := &references{l: l}
	ref, hasRef := "", false
	if r.backing, ref, hasRef = rest.takeSub("backing"); hasRef {
		r.backingRef = &ref
	}
	r.data, _, _ = rest.takeSub("data-file")
	return r
}

// unused reports whether there are options for a backing file, of which the format knows nothing.
func (r *references) unused() bool {
	return !r.backingUsed && (len(r.backing) > 0 || r.backingRef != nil && *r.backingRef != Null && *r.backingRef != "")
}

// openBacking is FormatOptions.OpenBacking.
func (r *references) openBacking(ctx context.Context, name, format string) (Device, error) {
	l := r.l
	r.backingUsed = true
	next := l.below(RefBacking)
	named := isFileNode(r.backing) // by the options
	switch {
	case l.o.NoBacking || r.backingRef != nil && (*r.backingRef == "" || *r.backingRef == Null):
		if r.backingRef != nil && *r.backingRef == "" {
			l.o.warn(`Use of "backing": "" is deprecated; use "backing": null instead`)
		}
		return nil, nil
	case r.backingRef != nil:
		return nil, &OpenError{Name: *r.backingRef, Kind: RefBacking, Err: noSuchNode(*r.backingRef)}
	case named:
		next.node = maps.Clone(r.backing)
		if _, ok := next.node["driver"]; !ok && format != "" {
			next.node["driver"] = format
		}
		next.probe = next.probe || l.o.AllowProbe
		next.name()
	case name == "" && len(r.backing) == 0:
		return nil, nil
	case name == "":
		return nil, &OpenError{Name: l.path, Kind: RefBacking, Err: errors.New(`A block device must be specified for "file"`)}
	default:
		if err := r.findBacking(ctx, next, name, format); err != nil {
			return nil, err
		}
	}
	if next.node["driver"] == "" && !next.probe {
		return nil, fmt.Errorf("%w: image %q does not say which format its backing file %q has; "+
			"record it with 'qemu-img rebase -u -b %s -F FORMAT %s' or give it when opening",
			ErrFormatUnknown, l.path, name, name, l.path)
	}
	if len(next.above) >= maxChain {
		return nil, fmt.Errorf("%w: more than %d images stand on one another", ErrChain, maxChain)
	}
	return next.open(ctx)
}

// findBacking makes next the image that an image names, or that the caller put in its place.
func (r *references) findBacking(ctx context.Context, next *layer, name, format string) error {
	l := r.l
	if b := l.o.Backing; b != nil && l == l.top {
		path, err := PlainName(b.Name)
		if err != nil {
			return fmt.Errorf("backing file: %w", err)
		}
		next.plain(path, b.Format)
	} else if err := next.follow(ctx, l, name, format); err != nil {
		return err
	}
	maps.Copy(next.node, r.backing)
	return nil
}

// openData is FormatOptions.OpenDataFile.
func (r *references) openData(ctx context.Context, name string) (storage.File, error) {
	l := r.l
	next := l.below(RefData)
	next.readOnly = l.readOnly
	switch override := l.o.DataFile; {
	case isFileNode(Options{"file.filename": r.data["filename"], "file.driver": r.data["driver"]}):
		next.node = make(Options)
		next.node.AddSub("file", r.data)
		next.path, next.base = r.data.Describe(), r.data.LeafPath()
	case override != "" && l == l.top:
		path, err := PlainName(override)
		if err != nil {
			return nil, fmt.Errorf("data file: %w", err)
		}
		next.plain(path, "")
	case name == "":
		return nil, fmt.Errorf("image %q needs an external data file but does not name it", l.path)
	default:
		if err := next.follow(ctx, l, name, FormatRaw); err != nil {
			return nil, err
		}
		next.node.AddSub("file", r.data)
	}
	return next.openFile(ctx)
}

// below returns the layer that an image of l refers to, its name still open.
func (l *layer) below(kind RefKind) *layer {
	above := append(slices.Clip(l.above), l)
	return &layer{
		kind: kind, o: l.o, top: l.top, above: above, probe: l.o.ProbeBacking,
		readOnly: kind != RefBacking || len(above) != l.o.WriteDepth,
	}
}

// follow sets the file of l to what the image from calls name, if the policy permits it.
func (l *layer) follow(ctx context.Context, from *layer, name, format string) error {
	kind := l.kind
	ref := Ref{Kind: kind, Name: name, Image: from.path, Top: l.top.base}
	protocol, rest, plain := SplitProtocol(name)
	if !plain && protocol == "" { // not a case for the policy, which takes such a name for a plain one
		return fmt.Errorf("image %q names %s %q: %w: %q", from.path, kind, name, ErrProtocol, protocol)
	}
	ref.Protocol = protocol
	if plain {
		if rest == "" || len(rest) > maxNameLen {
			return fmt.Errorf("image %q: the name of its %s has %d bytes", from.path, kind, len(rest))
		}
		if from.base == "" && !filepath.IsAbs(rest) {
			return fmt.Errorf("Cannot use relative %s names for '%s'", kind, from.path)
		}
		ref.Path = ResolveName(from.base, rest)
	}
	grant, err := l.o.Policy.Allow(ctx, ref)
	if err != nil {
		return err
	}
	if plain {
		l.plain(ref.Path, format)
		l.grant = &grant
		return nil
	}
	if l.node, err = ParseName(name, ""); err != nil {
		return fmt.Errorf("image %q names %s %q: %w", from.path, kind, name, err)
	}
	if _, ok := l.node["driver"]; !ok && format != "" {
		l.node["driver"] = format
	}
	l.name()
	return nil
}

// openStorage opens what a policy granted. Whatever is neither a regular file nor a block device is refused there.
func openStorage(g Grant, o storage.OpenOptions) (storage.File, error) {
	if g.Root != "" {
		return openBeneath(g, o)
	}
	f, err := storage.OpenFile(g.Path, o)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func openBeneath(g Grant, o storage.OpenOptions) (storage.File, error) {
	f, err := storage.OpenBeneath(g.Root, g.Path, o)
	if err != nil {
		return nil, err
	}
	return f, nil
}
