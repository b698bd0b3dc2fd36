package block

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"sync"

	"github.com/droverproject/drover/storage"
)

// errNodeReadOnly refuses to write to a node that its options make read-only.
var errNodeReadOnly = errors.New("Block node is read-only")

// usage is how a node is used. A node's children inherit it.
type usage struct {
	readOnly, forceShare, direct, autoReadOnly bool
}

// manner is what a node's own options make of what its driver opened.
type manner struct {
	discard      string
	detectZeroes string
}

var nodeName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z][-A-Za-z0-9._]{0,30}$`) })

// takeGeneric takes the options that every node has.
func takeGeneric(n Options, u usage) (usage, manner, error) {
	var m manner
	if name, ok := n.take("node-name"); ok && !nodeName().MatchString(name) {
		return u, m, fmt.Errorf("Invalid node-name: '%s'", name)
	}
	readOnly, err := n.takeBool("read-only", u.readOnly)
	if err != nil {
		return u, m, err
	}
	if readOnly && !u.readOnly {
		return u, m, errNodeReadOnly
	}
	if u.autoReadOnly, err = n.takeBool("auto-read-only", u.autoReadOnly); err != nil {
		return u, m, err
	}
	if u.direct, err = n.takeBool("cache.direct", u.direct); err != nil {
		return u, m, err
	}
	if _, err = n.takeBool("cache.no-flush", false); err != nil {
		return u, m, err
	}
	if u.forceShare, err = n.takeBool("force-share", u.forceShare); err != nil {
		return u, m, err
	}
	if u.forceShare && !u.readOnly {
		return u, m, errors.New("force-share=on can only be used with read-only images")
	}
	switch m.discard, _ = n.take("discard"); m.discard {
	case "", "ignore", "unmap":
	case "off":
		m.discard = "ignore"
	case "on":
		m.discard = "unmap"
	default:
		return u, m, errors.New("Invalid discard option")
	}
	switch m.detectZeroes, _ = n.take("detect-zeroes"); m.detectZeroes {
	case "", "off", "on":
	case "unmap":
		if m.discard != "unmap" {
			return u, m, errors.New("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
		}
	default:
		return u, m, badValue(m.detectZeroes)
	}
	return u, m, nil
}

func badValue(value string) error { return fmt.Errorf("invalid parameter value: %s", value) }

// CheckOptions refuses what Open would refuse in the options of a node of a format, without opening anything.
func CheckOptions(format string, node Options) error {
	f, ok := lookupFormat(format)
	if _, isDriver := lookupDriver(node["driver"]); !ok || isDriver {
		return nil
	}
	n := maps.Clone(node)
	if _, _, err := takeGeneric(n, usage{readOnly: true}); err != nil {
		return err
	}
	n.take("driver")
	for _, child := range []string{"file", "backing", "data-file"} {
		n.takeSub(child)
	}
	if f.CheckOptions == nil {
		return nil
	}
	return f.CheckOptions(n)
}

// isFileNode reports whether options say which file, or what else, a node is made of.
func isFileNode(o Options) bool {
	if o["file"] != "" || o["filename"] != "" || o["file.filename"] != "" || o["file.driver"] != "" {
		return true
	}
	_, ok := lookupDriver(o["driver"])
	return ok
}

// isDisk reports whether a node has a format, or is a filter of one that has.
func isDisk(o Options) bool {
	for range maxOptionsDepth {
		driver := o["driver"]
		d, ok := lookupDriver(driver)
		switch {
		case driver == "":
			_, hasName := o["filename"]
			return !hasName && len(o) > 0
		case !ok:
			return true
		case len(o.Sub("file")) > 0 && d.Filter:
			o = o.Sub("file")
		case len(o.Sub("image")) > 0:
			o = o.Sub("image")
		default:
			return d.OpenFile == nil
		}
	}
	return true
}

// device opens a node as a disk. grant, if not nil, is for the file at its bottom.
func (l *layer) device(ctx context.Context, node Options, u usage, grant *Grant) (Device, error) {
	n := maps.Clone(node)
	u, m, err := takeGeneric(n, u)
	if err != nil {
		return nil, err
	}
	dev, err := l.openNode(ctx, node, n, u, grant)
	if err != nil {
		return nil, err
	}
	return l.wrap(dev, m), nil
}

func (l *layer) openNode(ctx context.Context, node, n Options, u usage, grant *Grant) (Device, error) {
	driver, _ := n.take("driver")
	d, isDriver := lookupDriver(driver)
	switch {
	case isDriver && d.OpenDevice != nil:
		return openDriver(ctx, d.OpenDevice, d, l.newNode(driver, node, n, u))
	case isDriver:
		file, err := l.driverFile(ctx, d, node, n, u, grant)
		if err != nil {
			return nil, err
		}
		dev, err := NewRaw(file, RawOptions{Name: nodeFile(node), Format: driver, ReadOnly: u.readOnly})
		if err != nil {
			return nil, errors.Join(err, file.Close())
		}
		return dev, nil
	}
	if _, known := lookupFormat(driver); driver != "" && !known {
		return nil, &UnknownFormatError{driver}
	}
	sub, ref, hasRef := n.takeSub("file")
	switch {
	case hasRef:
		return nil, noSuchNode(ref)
	case len(sub) == 0 && driver == "":
		return nil, errors.New("Must specify either driver or file")
	case len(sub) == 0:
		return nil, errors.New(`A block device must be specified for "file"`)
	}
	file, err := l.file(ctx, sub, u, grant)
	if err != nil {
		return nil, err
	}
	dev, err := l.openFormat(ctx, file, driver, u, n)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return dev, nil
}

// inner returns a layer for a child of l's node that is a disk by itself: what its format names is relative to it.
func (l *layer) inner(child Options) *layer {
	c := *l
	c.node = child
	if c.name(); l == l.top {
		c.top = &c
	}
	return &c
}

// nodeFile is the name of the file at the bottom of a node, or of the node if there is none.
func nodeFile(node Options) string {
	if path := node.LeafPath(); path != "" {
		return path
	}
	return node.Describe()
}

func (l *layer) newNode(driver string, node, rest Options, u usage) *Node {
	return &Node{Name: node.Describe(), File: nodeFile(node), Driver: driver, ReadOnly: u.readOnly, AutoReadOnly: u.autoReadOnly, layer: l, rest: rest, use: u}
}

// openDriver has a driver open a node, and refuses what it did not take.
func openDriver[T interface{ Close() error }](ctx context.Context, open func(context.Context, *Node) (T, error), d Driver, n *Node) (T, error) {
	var none T
	v, err := open(ctx, n)
	if err != nil {
		return none, err
	}
	if err := refuseRest(d.Name, d.Filter, n.rest); err != nil {
		return none, errors.Join(err, v.Close())
	}
	return v, nil
}

// bottom opens the file under the format of the layer.
func (l *layer) bottom(ctx context.Context) (storage.File, error) {
	n := maps.Clone(l.node)
	u, _, err := takeGeneric(n, usage{readOnly: l.readOnly, forceShare: l.o.ForceShare, direct: l.o.Direct})
	if err != nil {
		return nil, err
	}
	if _, ok := lookupDriver(n["driver"]); ok {
		return l.file(ctx, l.node, u, l.grant)
	}
	sub, ref, hasRef := n.takeSub("file")
	switch {
	case hasRef:
		return nil, noSuchNode(ref)
	case len(sub) == 0 && n["driver"] == "":
		return nil, errors.New("Must specify either driver or file")
	case len(sub) == 0:
		return nil, errors.New(`A block device must be specified for "file"`)
	}
	return l.file(ctx, sub, u, l.grant)
}

// file opens a node as the bytes under a format.
func (l *layer) file(ctx context.Context, node Options, u usage, grant *Grant) (storage.File, error) {
	driver := node["driver"]
	if driver == "" && !isDisk(node) {
		driver = "file"
	}
	d, ok := lookupDriver(driver)
	if !ok || d.OpenFile == nil && !isHostDriver(driver) {
		dev, err := l.device(ctx, node, u, grant)
		if err != nil {
			return nil, err
		}
		return NewDeviceFile(dev), nil
	}
	n := maps.Clone(node)
	u, m, err := takeGeneric(n, u)
	if err != nil {
		return nil, err
	}
	n.take("driver")
	file, err := l.driverFile(ctx, d, node, n, u, grant)
	if err == nil && m.discard == "ignore" {
		return keepSpace{file}, nil
	}
	return file, err
}

func isHostDriver(name string) bool { return name == "file" || name == "host_device" }

func init() {
	RegisterDriver(Driver{Name: "file"})
	RegisterDriver(Driver{Name: "host_device"})
}

// driverFile opens a node as its driver's bytes.
func (l *layer) driverFile(ctx context.Context, d Driver, node, rest Options, u usage, grant *Grant) (storage.File, error) {
	if isHostDriver(d.Name) {
		return l.hostFile(d.Name, rest, u, grant)
	}
	return openDriver(ctx, d.OpenFile, d, l.newNode(d.Name, node, rest, u))
}

// hostFile opens and locks a file of the host.
func (l *layer) hostFile(driver string, n Options, u usage, grant *Grant) (storage.File, error) {
	name, _ := n.take("filename")
	if name == "" {
		return nil, fmt.Errorf("The '%s' block driver requires a file name", driver)
	}
	locking, err := n.takeChoice("locking", "auto", "on", "off")
	if err != nil {
		return nil, err
	}
	if _, err := n.takeChoice("aio", "threads", "native", "io_uring"); err != nil {
		return nil, err
	}
	// They choose how, not what.
	for _, name := range []string{"aio-max-batch", "drop-cache", "x-check-cache-dropped", "pr-manager"} {
		n.take(name)
	}
	if err := refuseRest(driver, false, n); err != nil {
		return nil, err
	}
	if grant == nil {
		grant = &Grant{Path: name}
	}
	file, err := openStorage(*grant, storage.OpenOptions{ReadOnly: u.readOnly, Direct: u.direct, WriteBehind: l.o.WriteBehind})
	if err != nil && u.autoReadOnly && !u.readOnly && errors.Is(err, fs.ErrPermission) {
		u.readOnly = true
		file, err = openStorage(*grant, storage.OpenOptions{ReadOnly: true, Direct: u.direct})
	}
	if err != nil {
		return nil, &FileError{Name: name, Err: err}
	}
	if err := l.admit(file, u, locking != "off"); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if driver == "host_device" && !file.Stat().Device {
		err := fmt.Errorf("'host_device' driver requires '%s' to be either a character or block device", name)
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// takeChoice takes an option that has a few values, the first of which is the default.
func (o Options) takeChoice(name string, values ...string) (string, error) {
	value, ok := o.take(name)
	if !ok {
		return values[0], nil
	}
	if !slices.Contains(values, value) {
		return "", badValue(value)
	}
	return value, nil
}

// FileError is the failure to open a file of the host.
type FileError struct {
	Name string
	Err  error
}

// Error implements error.
func (e *FileError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *FileError) Unwrap() error { return e.Err }

// UnknownFormatError says that there is no such format or driver.
type UnknownFormatError struct{ Name string }

// Error implements error.
func (e *UnknownFormatError) Error() string {
	return fmt.Sprintf("%v %q (known formats: %s)", ErrUnknownFormat, e.Name, formatList())
}

// Is makes the error one of ErrUnknownFormat.
func (e *UnknownFormatError) Is(target error) bool { return target == ErrUnknownFormat }

// keepSpace is a file whose space is not given back.
type keepSpace struct{ storage.File }

// PunchHole implements storage.File.
func (keepSpace) PunchHole(int64, int64) error { return storage.ErrNotSupported }
