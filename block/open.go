package block

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

	NoBacking bool     // open the image alone; what it does not hold itself reads as zeroes
	Backing   *Backing // in place of the backing file that the image names
	DataFile  string   // in place of the external data file that the image names

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

func lookupFormat(name string) (Format, bool) {
	formats.mu.RLock()
	defer formats.mu.RUnlock()
	f, ok := formats.byName[name]
	return f, ok
}

// Open opens the image called name and, under o.Policy, the files that it refers to.
func Open(ctx context.Context, name string, o OpenOptions) (Device, error) {
	path, err := PlainName(name)
	if err != nil {
		return nil, err
	}
	if o.ForceShare && !o.ReadOnly {
		return nil, fmt.Errorf("opening %q: an image can be shared with writers only when it is opened read-only", name)
	}
	if o.Policy == nil {
		o.Policy = DenyAll()
	}
	l := layer{o: &o, path: path, grant: Grant{Path: path}, format: o.Format, probe: o.AllowProbe, readOnly: o.ReadOnly}
	l.top = &l
	return l.open(ctx)
}

// OpenFile opens and locks the file called name as Open would, without looking into it.
func OpenFile(name string, o OpenOptions) (storage.File, error) {
	path, err := PlainName(name)
	if err != nil {
		return nil, err
	}
	l := layer{o: &o, path: path, grant: Grant{Path: path}, readOnly: o.ReadOnly}
	l.top = &l
	return l.openFile()
}

// OpenBackingFile opens the file that an image names as its backing, by the rules and the policy of Open but without
// looking into it. It returns the file and the path under which it was found, for further names relative to that. top
// is the image that the user named, image the one that holds the name.
func OpenBackingFile(ctx context.Context, top, image, name string, o OpenOptions) (storage.File, string, error) {
	if o.Policy == nil {
		o.Policy = DenyAll()
	}
	t := &layer{o: &o, path: top}
	next := &layer{o: &o, top: t, kind: RefBacking, readOnly: true}
	if err := next.follow(ctx, &layer{path: image}, name, ""); err != nil {
		return nil, "", err
	}
	f, err := next.openFile()
	return f, next.path, err
}

// layer is one image of a chain that is being opened.
type layer struct {
	o        *OpenOptions
	top      *layer
	above    []*layer // the images that stand on this one, from the top
	kind     RefKind  // what the image above wants it for
	path     string   // for messages and for names relative to it
	grant    Grant
	format   string
	probe    bool
	readOnly bool
	id       fileID
}

func (l *layer) open(ctx context.Context) (Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	file, err := l.openFile()
	if err != nil {
		return nil, err
	}
	dev, err := l.openFormat(ctx, file)
	if err != nil {
		return nil, l.failed(err, file)
	}
	return dev, nil
}

// failed says what could not be opened, and closes file.
func (l *layer) failed(err error, file storage.File) error {
	if cerr := file.Close(); cerr != nil {
		err = errors.Join(err, cerr)
	}
	return &OpenError{Name: l.path, Kind: l.kind, Err: err}
}

// openFile opens and locks the file of the layer.
func (l *layer) openFile() (storage.File, error) {
	file, err := openStorage(l.grant, l.readOnly, l.o.Direct)
	if err != nil {
		return nil, &OpenError{Name: l.path, Kind: l.kind, Err: err}
	}
	if err := l.admit(file); err != nil {
		return nil, l.failed(err, file)
	}
	return file, nil
}

// admit refuses a file that is in the chain already, then locks it. The order matters: the lock of a file that is in the
// chain twice conflicts with itself, and "in use by another process" would be the wrong message.
func (l *layer) admit(file storage.File) error {
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
	if l.o.NoLock || l.o.ForceShare {
		return nil
	}
	mode := storage.LockWrite
	if l.readOnly {
		mode = storage.LockRead
	}
	return file.Lock(mode)
}

func (l *layer) openFormat(ctx context.Context, file storage.File) (Device, error) {
	format, probed := l.format, false
	if format == "" {
		if !l.probe {
			return nil, fmt.Errorf("%w (known formats: %s)", ErrFormatUnknown, strings.Join(Formats(), ", "))
		}
		var err error
		if format, err = ProbeFile(file); err != nil {
			return nil, err
		}
		probed = true
	}
	f, ok := lookupFormat(format)
	if !ok {
		return nil, fmt.Errorf("%w %q (known formats: %s)", ErrUnknownFormat, format, strings.Join(Formats(), ", "))
	}
	fo := FormatOptions{Name: l.path, ReadOnly: l.readOnly, Options: l.options(), Secret: l.o.secret(), NoData: l.o.NoData,
		Memory: l.o.Memory, OpenBacking: l.openBacking, OpenDataFile: l.openData}
	if tell := l.o.OnCorrupt; tell != nil {
		fo.OnCorrupt = func(err error) { tell(l.path, err) }
	}
	if format == FormatRaw && probed && !l.readOnly {
		return openProbedRaw(file, fo)
	}
	return f.Open(ctx, file, fo)
}

// options returns the runtime options for the image of l.
func (l *layer) options() map[string]string {
	if l == l.top {
		return l.o.Options
	}
	if l.kind != RefBacking {
		return nil
	}
	options := make(map[string]string)
	prefix := strings.Repeat("backing.", len(l.above))
	for name, value := range l.o.Options {
		if name, ok := strings.CutPrefix(name, prefix); ok {
			options[name] = value
		}
	}
	return options
}

func (o *OpenOptions) secret() func(id string) ([]byte, error) {
	if o.Secret != nil {
		return o.Secret
	}
	return func(id string) ([]byte, error) { return nil, fmt.Errorf("%w '%s'", ErrNoSecret, id) }
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

// openBacking is FormatOptions.OpenBacking for the image of l.
func (l *layer) openBacking(ctx context.Context, name, format string) (Device, error) {
	if l.o.NoBacking {
		return nil, nil
	}
	next := l.below(RefBacking)
	if b := l.o.Backing; b != nil && l == l.top {
		path, err := PlainName(b.Name)
		if err != nil {
			return nil, fmt.Errorf("backing file: %w", err)
		}
		next.path, next.grant, next.format = path, Grant{Path: path}, b.Format
	} else if err := next.follow(ctx, l, name, format); err != nil {
		return nil, err
	}
	if next.format == "" && !next.probe {
		return nil, fmt.Errorf("%w: image %q does not say which format its backing file %q has; "+
			"record it with 'qemu-img rebase -u -b %s -F FORMAT %s' or give it when opening",
			ErrFormatUnknown, l.path, name, name, l.path)
	}
	if len(next.above) >= maxChain {
		return nil, fmt.Errorf("%w: more than %d images stand on one another", ErrChain, maxChain)
	}
	return next.open(ctx)
}

// openData is FormatOptions.OpenDataFile for the image of l.
func (l *layer) openData(ctx context.Context, name string) (storage.File, error) {
	next := l.below(RefData)
	next.readOnly = l.readOnly
	switch override := l.o.DataFile; {
	case override != "" && l == l.top:
		path, err := PlainName(override)
		if err != nil {
			return nil, fmt.Errorf("data file: %w", err)
		}
		next.path, next.grant = path, Grant{Path: path}
	case name == "":
		return nil, fmt.Errorf("image %q needs an external data file but does not name it", l.path)
	default:
		if err := next.follow(ctx, l, name, FormatRaw); err != nil {
			return nil, err
		}
	}
	return next.openFile()
}

// below returns the layer that an image of l refers to, its name still open.
func (l *layer) below(kind RefKind) *layer {
	return &layer{
		kind: kind, o: l.o, top: l.top, above: append(slices.Clip(l.above), l),
		probe: l.o.ProbeBacking, readOnly: true,
	}
}

// follow sets the file of l to what the image from calls name, if the policy permits it.
func (l *layer) follow(ctx context.Context, from *layer, name, format string) error {
	kind := l.kind
	ref := Ref{Kind: kind, Name: name, Image: from.path, Top: l.top.path}
	protocol, rest, plain := SplitProtocol(name)
	if !plain && protocol == "" { // not a case for the policy, which takes such a name for a plain one
		return fmt.Errorf("image %q names %s %q: %w: %q", from.path, kind, name, ErrProtocol, protocol)
	}
	ref.Protocol = protocol
	if plain {
		if rest == "" || len(rest) > maxNameLen {
			return fmt.Errorf("image %q: the name of its %s has %d bytes", from.path, kind, len(rest))
		}
		ref.Path = ResolveName(from.path, rest)
	}
	grant, err := l.o.Policy.Allow(ctx, ref)
	if err != nil {
		return err
	}
	l.path, l.grant, l.format = ref.Path, grant, format
	if plain {
		return nil
	}
	if protocol != "json" {
		return fmt.Errorf("image %q names %s %q: %w: %q", from.path, kind, name, ErrProtocol, protocol)
	}
	path, inner, err := parseJSONName(rest)
	if err != nil {
		return fmt.Errorf("image %q names %s %q: %w", from.path, kind, name, err)
	}
	l.path, l.grant = path, Grant{Path: path}
	if inner != "" {
		l.format = inner
	}
	return nil
}

// parseJSONName understands the simple form of QEMU's json: names, a format over a file, nested or with dotted keys.
func parseJSONName(text string) (path, format string, err error) {
	var top map[string]any
	if err := json.Unmarshal([]byte(text), &top); err != nil {
		return "", "", fmt.Errorf("not valid JSON: %w", err)
	}
	flat := make(map[string]string)
	if err := flatten(flat, "", top); err != nil {
		return "", "", err
	}
	format = flat["driver"]
	path = flat["file.filename"]
	if format == "file" {
		format, path = "", flat["filename"]
		delete(flat, "filename")
	}
	if d := flat["file.driver"]; d != "" && d != "file" {
		return "", "", fmt.Errorf("driver %q is not supported", d)
	}
	for _, known := range []string{"driver", "file.driver", "file.filename"} {
		delete(flat, known)
	}
	for key := range flat {
		return "", "", fmt.Errorf("key %q is not supported", key)
	}
	if path == "" {
		return "", "", errors.New("no file name in it")
	}
	return path, format, nil
}

func flatten(out map[string]string, prefix string, in map[string]any) error {
	for key, v := range in {
		switch v := v.(type) {
		case string:
			out[prefix+key] = v
		case map[string]any:
			if prefix != "" {
				return fmt.Errorf("key %q is nested too deep", prefix+key)
			}
			if err := flatten(out, key+".", v); err != nil {
				return err
			}
		default:
			return fmt.Errorf("key %q is not supported", prefix+key)
		}
	}
	return nil
}

// openStorage opens what a policy granted. Whatever is neither a regular file nor a block device is refused there.
func openStorage(g Grant, readOnly, direct bool) (storage.File, error) {
	o := storage.OpenOptions{ReadOnly: readOnly, Direct: direct}
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
