package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

func init() {
	block.RegisterDriver(block.Driver{
		Name: "blkdebug", Prefixes: []string{"blkdebug"}, ParseName: parseBlkdebug, NodeName: blkdebugName,
		OpenFile:   func(ctx context.Context, n *block.Node) (storage.File, error) { return openDebugFile(ctx, n) },
		OpenDevice: openDebugDevice,
	})
}

func capital(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}

// parseBlkdebug understands blkdebug:CONFIG:FILE.
func parseBlkdebug(name string) (block.Options, error) {
	rest, ok := strings.CutPrefix(name, "blkdebug:")
	config, file, both := strings.Cut(rest, ":")
	if !ok || !both {
		return nil, errors.New("blkdebug requires both config file and image path")
	}
	o := make(block.Options)
	if config != "" {
		o["config"] = config
	}
	image, err := block.ParseFileName(file)
	if err != nil {
		return nil, err
	}
	o.AddSub("image", image)
	return o, nil
}

// blkdebugName is the name of a node that has no options but a configuration.
func blkdebugName(o block.Options) (string, bool) {
	for name := range o {
		if name != "driver" && name != "config" && !strings.HasPrefix(name, "image.") {
			return "", false
		}
	}
	image := o.Sub("image").Describe()
	return "blkdebug:" + o["config"] + ":" + image, !strings.HasPrefix(image, "json:")
}

// limits are the sizes of requests that a node bears.
type limits struct {
	align, maxTransfer int64
}

// takeDebug takes what there is to take but the child.
func takeDebug(n *block.Node) (*rules, limits, error) {
	var list []*rule
	if name, ok := n.Take("config"); ok && name != "" {
		from, err := readConfig(name)
		if err != nil {
			return nil, limits{}, err
		}
		list = from
	}
	for _, section := range []string{"inject-error", "set-state"} {
		more, err := takeRules(section, n.TakeSub(section))
		if err != nil {
			return nil, limits{}, err
		}
		list = append(list, more...)
	}
	// Whoever shares a file with others is asked by the locks of the file itself.
	n.TakeSub("take-child-perms")
	n.TakeSub("unshare-child-perms")
	l, err := takeLimits(n)
	if err != nil {
		return nil, l, err
	}
	return newRules(list, n.Print), l, nil
}

func takeLimits(n *block.Node) (limits, error) {
	l := limits{align: 1}
	align, err := n.TakeSize("align", 0)
	if err != nil {
		return l, err
	}
	if align != 0 {
		if align > 1<<31-1 || align&(align-1) != 0 {
			return l, fmt.Errorf("Cannot meet constraints with align %d", align)
		}
		l.align = align
	}
	for _, name := range []string{"max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"} {
		v, err := n.TakeSize(name, 0)
		if err != nil {
			return l, err
		}
		if v != 0 && (v > 1<<31-1 || v%l.align != 0) {
			return l, fmt.Errorf("Cannot meet constraints with %s %d", name, v)
		}
		if name == "max-transfer" {
			l.maxTransfer = v
		}
	}
	return l, nil
}

// debugFile is a file whose requests rules make fail, or hold up.
type debugFile struct {
	storage.File
	*rules
	limits limits
	name   string
}

func openDebugFile(ctx context.Context, n *block.Node) (*debugFile, error) {
	r, l, err := takeDebug(n)
	if err != nil {
		return nil, err
	}
	file, err := n.OpenFile(ctx, "image")
	if err != nil {
		return nil, err
	}
	n.Breaker(r)
	return &debugFile{file, r, l, n.Name}, nil
}

// Event implements storage.Eventer: what a filter below wants to know of, it is told, too.
func (d *debugFile) Event(e storage.Event) {
	d.rules.Event(e)
	storage.Tell(d.File, e)
}

// pieces has fn do a request in parts that are not longer than the limit.
func (d *debugFile) pieces(p []byte, off int64, fn func([]byte, int64) (int, error)) (int, error) {
	most := d.limits.maxTransfer
	if most == 0 || int64(len(p)) <= most {
		return fn(p, off)
	}
	done := 0
	for done < len(p) {
		n, err := fn(p[done:min(int64(len(p)), int64(done)+most)], off+int64(done))
		if done += n; err != nil {
			return done, err
		}
	}
	return done, nil
}

// ReadAt implements storage.File.
func (d *debugFile) ReadAt(p []byte, off int64) (int, error) {
	return d.pieces(p, off, func(p []byte, off int64) (int, error) {
		if err := d.check(ioRead, off, int64(len(p))); err != nil {
			return 0, err
		}
		return d.File.ReadAt(p, off)
	})
}

// WriteAt implements storage.File.
func (d *debugFile) WriteAt(p []byte, off int64) (int, error) {
	return d.pieces(p, off, func(p []byte, off int64) (int, error) {
		d.Event(storage.EventPwritev)
		defer d.Event(storage.EventPwritevDone)
		if err := d.check(ioWrite, off, int64(len(p))); err != nil {
			return 0, err
		}
		return d.File.WriteAt(p, off)
	})
}

// ReadVAt implements storage.File.
func (d *debugFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	joined := make([]byte, length(bufs))
	n, err := d.ReadAt(joined, off)
	rest := joined[:n]
	for _, b := range bufs {
		rest = rest[copy(b, rest):]
	}
	return n, err
}

// WriteVAt implements storage.File.
func (d *debugFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	joined := make([]byte, 0, length(bufs))
	for _, b := range bufs {
		joined = append(joined, b...)
	}
	return d.WriteAt(joined, off)
}

func length(bufs [][]byte) int {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n
}

// Sync implements storage.File.
func (d *debugFile) Sync() error {
	if err := d.check(ioFlush, 0, 0); err != nil {
		return err
	}
	return d.File.Sync()
}

// PunchHole implements storage.File.
func (d *debugFile) PunchHole(off, n int64) error {
	if (off|n)&(d.limits.align-1) != 0 {
		return storage.ErrNotSupported
	}
	if err := d.check(ioDiscard, off, n); err != nil {
		return err
	}
	return d.File.PunchHole(off, n)
}

// ZeroRange implements storage.File.
func (d *debugFile) ZeroRange(off, n int64) error {
	if (off|n)&(d.limits.align-1) != 0 {
		return storage.ErrNotSupported
	}
	d.Event(storage.EventPwritevZero)
	if err := d.check(ioWriteZeroes, off, n); err != nil {
		return err
	}
	return d.File.ZeroRange(off, n)
}

// NextExtent implements storage.File.
func (d *debugFile) NextExtent(off int64) (int64, bool, error) {
	if err := d.check(ioStatus, off, 1); err != nil {
		return 0, false, err
	}
	return d.File.NextExtent(off)
}

// Stat implements storage.File.
func (d *debugFile) Stat() storage.Info {
	info := d.File.Stat()
	info.Name, info.Allocated = d.name, -1
	return info
}

// Close implements storage.File.
func (d *debugFile) Close() error {
	d.Release()
	return d.File.Close()
}

// debugDevice is a disk whose requests rules make fail, or hold up.
type debugDevice struct {
	block.Device
	*rules
}

func openDebugDevice(ctx context.Context, n *block.Node) (block.Device, error) {
	if !n.HasFormat("image") {
		file, err := openDebugFile(ctx, n)
		if err != nil {
			return nil, err
		}
		return rawOver(file, n)
	}
	r, _, err := takeDebug(n)
	if err != nil {
		return nil, err
	}
	dev, err := n.OpenDevice(ctx, "image")
	if err != nil {
		return nil, err
	}
	n.Breaker(r)
	return named{&debugDevice{dev, r}, n.Name, n.Driver}, nil
}

// rawOver makes a file the disk of a node.
func rawOver(file storage.File, n *block.Node) (block.Device, error) {
	dev, err := block.NewRaw(file, block.RawOptions{Name: n.File, Format: n.Driver, ReadOnly: n.ReadOnly})
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return dev, nil
}

// ReadAt implements block.Device.
func (d *debugDevice) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.check(ioRead, off, int64(len(p))); err != nil {
		return err
	}
	return d.Device.ReadAt(ctx, p, off)
}

// WriteAt implements block.Device.
func (d *debugDevice) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	d.Event(storage.EventPwritev)
	defer d.Event(storage.EventPwritevDone)
	if err := d.check(ioWrite, off, int64(len(p))); err != nil {
		return err
	}
	return d.Device.WriteAt(ctx, p, off, flags)
}

// WriteZeroes implements block.Device.
func (d *debugDevice) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	d.Event(storage.EventPwritevZero)
	if err := d.check(ioWriteZeroes, off, n); err != nil {
		return err
	}
	return d.Device.WriteZeroes(ctx, off, n, flags)
}

// Discard implements block.Device.
func (d *debugDevice) Discard(ctx context.Context, off, n int64) error {
	if err := d.check(ioDiscard, off, n); err != nil {
		return err
	}
	return d.Device.Discard(ctx, off, n)
}

// Flush implements block.Device.
func (d *debugDevice) Flush(ctx context.Context) error {
	if err := d.check(ioFlush, 0, 0); err != nil {
		return err
	}
	return d.Device.Flush(ctx)
}

// Extents implements block.Device.
func (d *debugDevice) Extents(ctx context.Context, off, n int64, fn func(block.Extent) bool) error {
	if err := d.check(ioStatus, off, n); err != nil {
		return err
	}
	return d.Device.Extents(ctx, off, n, fn)
}

// Close implements block.Device.
func (d *debugDevice) Close() error {
	d.Release()
	return d.Device.Close()
}

// named is a device under another name. It has none of the optional methods of the one behind it.
type named struct {
	block.Device
	name, format string
}

// Info implements block.Device.
func (d named) Info() block.Info {
	info := d.Device.Info()
	info.Name, info.Format = d.name, d.format
	return info
}

var _ io.ReaderAt = (*debugFile)(nil)
