package block

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/droverproject/drover/storage"
)

// Driver makes what lies under a format, or between two nodes, from a node's options: a connection to a server, a filter.
type Driver struct {
	Name string
	// Prefixes are what stands before the colon in names that the driver understands.
	Prefixes []string
	// ParseName turns such a name into options; nil takes it whole as the option "filename".
	ParseName func(name string) (Options, error)
	// NodeName returns the name of a node that can be said without braces. nil: there is none.
	NodeName func(o Options) (string, bool)
	// Filter: the driver passes on what a child of it is, and its options are called those of a format.
	Filter bool
	// OpenFile makes the bytes under a format.
	OpenFile func(ctx context.Context, n *Node) (storage.File, error)
	// OpenDevice makes a disk; nil is a raw disk of what OpenFile makes.
	OpenDevice func(ctx context.Context, n *Node) (Device, error)
}

var drivers = registry[Driver]{kind: "driver"}

// RegisterDriver makes a driver known, as RegisterFormat does a format.
func RegisterDriver(d Driver) { drivers.register(d.Name, d) }

// Drivers returns the names of the registered drivers in alphabetical order.
func Drivers() []string { return drivers.names() }

func lookupDriver(name string) (Driver, bool) { return drivers.lookup(name) }

func driverByPrefix(prefix string) (Driver, bool) {
	for _, name := range Drivers() {
		if d, ok := lookupDriver(name); ok && slices.Contains(d.Prefixes, prefix) {
			return d, true
		}
	}
	return Driver{}, false
}

// Node is a node that is being opened, as its driver sees it. An option that the driver does not take is refused.
type Node struct {
	Name     string // for messages
	File     string // the file at its bottom, or Name
	Driver   string
	ReadOnly bool
	// AutoReadOnly: the node may turn out to be read-only where it cannot be written.
	AutoReadOnly bool

	layer *layer
	rest  Options
	use   usage
}

// Take returns an option.
func (n *Node) Take(name string) (string, bool) { return n.rest.take(name) }

// TakeSub returns all options whose names begin with prefix and a dot, without that.
func (n *Node) TakeSub(prefix string) Options {
	sub, _, _ := n.rest.takeSub(prefix)
	return sub
}

// TakeBool returns an option that is on or off.
func (n *Node) TakeBool(name string, def bool) (bool, error) { return n.rest.takeBool(name, def) }

// TakeSize returns an option that is a number of bytes.
func (n *Node) TakeSize(name string, def int64) (int64, error) {
	text, ok := n.rest.take(name)
	if !ok {
		return def, nil
	}
	return parseSizeOption(name, text)
}

// OpenFile opens a child as the bytes under a format.
func (n *Node) OpenFile(ctx context.Context, child string) (storage.File, error) {
	sub, err := n.child(child)
	if err != nil {
		return nil, err
	}
	return n.layer.file(ctx, sub, n.use, nil)
}

// HasFormat reports whether a child is a disk of some format rather than plain bytes.
func (n *Node) HasFormat(child string) bool { return isDisk(n.rest.Sub(child)) }

// OpenDevice opens a child as a disk.
func (n *Node) OpenDevice(ctx context.Context, child string) (Device, error) {
	sub, err := n.child(child)
	if err != nil {
		return nil, err
	}
	if sub["driver"] == "" && sub["filename"] != "" {
		sub["driver"] = "file"
	}
	return n.layer.inner(sub).device(ctx, sub, n.use, nil)
}

// OpenProbed is OpenDevice for a child whose format may be found out from its content.
func (n *Node) OpenProbed(ctx context.Context, child string) (Device, error) {
	sub, err := n.child(child)
	if err != nil {
		return nil, err
	}
	return n.layer.inner(sub).device(ctx, sub, n.use, nil)
}

func (n *Node) child(name string) (Options, error) {
	sub, ref, hasRef := n.rest.takeSub(name)
	if hasRef {
		return nil, noSuchNode(ref)
	}
	if len(sub) == 0 {
		return nil, fmt.Errorf("A block device must be specified for %q", name)
	}
	return sub, nil
}

// Object returns the object of the command line with this ID if it is of the kind.
func (n *Node) Object(kind, id string) (any, error) {
	if n.layer.o.Object == nil {
		return nil, ErrNoObject
	}
	return n.layer.o.Object(kind, id)
}

// Print passes a line of output to the user.
func (n *Node) Print(text string) {
	if p := n.layer.o.Print; p != nil {
		p(text)
	}
}

// Breaker says that requests can be held at this node.
func (n *Node) Breaker(b Breaker) {
	if tell := n.layer.o.OnBreaker; tell != nil {
		tell(b)
	}
}

// Breaker holds requests at an event.
type Breaker interface {
	// Break has the next request that comes to the event stop there.
	Break(event, tag string) error
	// RemoveBreak takes back what Break did, and resumes what has stopped.
	RemoveBreak(tag string) error
	// Resume resumes one request that has stopped.
	Resume(tag string) error
	// WaitBreak returns when a request has stopped.
	WaitBreak(ctx context.Context, tag string) error
	// Release resumes all that has stopped and removes all breakpoints.
	Release()
}

// Warn passes a warning to the user.
func (n *Node) Warn(format string, args ...any) { n.layer.o.warn(fmt.Sprintf(format, args...)) }

// ErrNoObject is returned for an object that does not exist.
var ErrNoObject = errors.New("no such object")

func noSuchNode(ref string) error {
	return fmt.Errorf("Cannot find device='%s' nor node-name='%s'", ref, ref)
}

func parseSizeOption(name, text string) (int64, error) {
	n, err := ParseSize(text)
	if err != nil {
		return 0, fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64\n"+
			"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.", name)
	}
	return n, nil
}

func (o Options) takeBool(name string, def bool) (bool, error) {
	text, ok := o.take(name)
	if !ok {
		return def, nil
	}
	return parseBool(name, text)
}

func parseBool(name, text string) (bool, error) {
	switch text {
	case "on", "yes", "true", "y":
		return true, nil
	case "off", "no", "false", "n":
		return false, nil
	}
	return false, fmt.Errorf("Parameter '%s' expects 'on' or 'off'", name)
}

// refuseRest refuses what the driver of a node did not take.
func refuseRest(driver string, filter bool, rest Options) error {
	if len(rest) == 0 {
		return nil
	}
	if filter {
		return fmt.Errorf("Block format '%s' does not support the option '%s'", driver, rest.names()[0])
	}
	return fmt.Errorf("Block protocol '%s' doesn't support the option '%s'", driver, rest.names()[0])
}

// StatusFile is implemented by files that know which parts of them read as zeroes apart from which have space on the host.
type StatusFile interface {
	// NextStatus is NextExtent that also tells whether the run reads as zeroes.
	NextStatus(off int64) (end int64, data, zero bool, err error)
}

// Discarder is implemented by files that can be told that bytes no longer matter without having to zero them.
type Discarder interface {
	Discard(off, n int64) error
}

// FastZeroer is implemented by files that can tell whether zeroing is faster than writing.
type FastZeroer interface {
	// ZeroFast zeroes a range, and gives its space back if unmap, or fails with ErrNoFastZero and changes nothing.
	ZeroFast(off, n int64, unmap bool) error
}
