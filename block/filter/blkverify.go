package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/droverproject/drover/block"
)

func init() {
	block.RegisterDriver(block.Driver{
		Name: "blkverify", Prefixes: []string{"blkverify"}, ParseName: parseBlkverify, NodeName: blkverifyName,
		OpenDevice: openVerify,
	})
}

// parseBlkverify understands blkverify:RAW:TEST.
func parseBlkverify(name string) (block.Options, error) {
	rest, ok := strings.CutPrefix(name, "blkverify:")
	rawName, testName, both := strings.Cut(rest, ":")
	if !ok || !both {
		return nil, errors.New("blkverify requires raw copy and original image path")
	}
	raw, err := block.ParseFileName(rawName)
	if err != nil {
		return nil, err
	}
	test, err := block.ParseName(testName, "")
	if err != nil {
		return nil, err
	}
	o := make(block.Options)
	o.AddSub("raw", raw)
	o.AddSub("test", test)
	return o, nil
}

func blkverifyName(o block.Options) (string, bool) {
	raw, test := o.Sub("raw").Describe(), o.Sub("test").Describe()
	return "blkverify:" + raw + ":" + test, !strings.HasPrefix(raw, "json:") && !strings.HasPrefix(test, "json:")
}

// MismatchError says that the two disks of a blkverify node differ.
type MismatchError struct {
	What string // "read", "write", "flush"
	Off  int64
	Len  int64
	Text string
}

// Error says what QEMU says.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("blkverify: %s offset=%d bytes=%d %s", e.What, e.Off, e.Len, e.Text)
}

// verify is a disk that does everything twice and compares.
type verify struct {
	block.Device // the disk under test
	raw          block.Device
	mu           sync.RWMutex // held for writing by changes: both disks have to see them in one order
}

func openVerify(ctx context.Context, n *block.Node) (block.Device, error) {
	raw, err := n.OpenDevice(ctx, "raw")
	if err != nil {
		return nil, err
	}
	test, err := n.OpenProbed(ctx, "test")
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return named{&verify{Device: test, raw: raw}, n.Name, n.Driver}, nil
}

// Info implements block.Device.
func (v *verify) Info() block.Info {
	info := v.Device.Info()
	info.FastZero = false
	return info
}

// both compares the outcomes of one request on both disks.
func (v *verify) both(what string, off, n int64, fn func(block.Device) error) error {
	rawErr, err := fn(v.raw), fn(v.Device)
	if (rawErr == nil) != (err == nil) {
		return &MismatchError{what, off, n, fmt.Sprintf("return value mismatch: %v != %v", err, rawErr)}
	}
	return err
}

// ReadAt implements block.Device.
func (v *verify) ReadAt(ctx context.Context, p []byte, off int64) error {
	want := make([]byte, len(p))
	buf := want
	v.mu.RLock()
	defer v.mu.RUnlock()
	err := v.both("read", off, int64(len(p)), func(d block.Device) error {
		err := d.ReadAt(ctx, buf, off)
		buf = p
		return err
	})
	if err != nil || bytes.Equal(p, want) {
		return err
	}
	at := 0
	for p[at] == want[at] {
		at++
	}
	return &MismatchError{"read", off, int64(len(p)), fmt.Sprintf("contents mismatch at offset %d", off+int64(at))}
}

// WriteAt implements block.Device.
func (v *verify) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.both("write", off, int64(len(p)), func(d block.Device) error { return d.WriteAt(ctx, p, off, flags) })
}

// WriteZeroes implements block.Device. What is fast for one may not be for the other.
func (v *verify) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	if flags&block.ZeroFast != 0 {
		return block.ErrNoFastZero
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.both("write", off, n, func(d block.Device) error { return d.WriteZeroes(ctx, off, n, flags) })
}

// Discard implements block.Device: what a discarded range reads as may differ, so nothing is discarded.
func (v *verify) Discard(ctx context.Context, off, n int64) error {
	if err := block.CheckRange(off, n, v.Size()); err != nil {
		return err
	}
	return v.Device.Discard(ctx, off, 0)
}

// Flush implements block.Device: only the disk under test need be durable.
func (v *verify) Flush(ctx context.Context) error { return v.Device.Flush(ctx) }

// Close implements block.Device.
func (v *verify) Close() error { return errors.Join(v.Device.Close(), v.raw.Close()) }
