package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// nullSize is the length of a null node that none is given for.
const nullSize = 1 << 30

func init() {
	for _, name := range []string{"null-co", "null-aio"} {
		block.RegisterDriver(block.Driver{
			Name: name, Prefixes: []string{name}, ParseName: parseNull, OpenFile: openNull,
			NodeName: func(o block.Options) (string, bool) {
				for key := range o {
					if key != "driver" && key != "filename" {
						return "", false
					}
				}
				return name + "://", true
			},
		})
	}
}

// parseNull understands null-co:// and null-aio://, which have nothing behind them.
func parseNull(name string) (block.Options, error) {
	if prefix, rest, _ := strings.Cut(name, ":"); rest != "//" {
		return nil, fmt.Errorf("The only allowed filename for this driver is '%s://'", prefix)
	}
	return block.Options{}, nil
}

// null is a file that forgets what is written to it.
type null struct {
	name     string
	size     int64
	zeroes   bool // reads are answered with zeroes, not left alone
	latency  time.Duration
	readOnly bool
}

func openNull(_ context.Context, n *block.Node) (storage.File, error) {
	f := &null{name: n.Name, readOnly: n.ReadOnly}
	n.Take("filename")
	var err error
	if f.size, err = n.TakeSize("size", nullSize); err != nil {
		return nil, err
	}
	if f.zeroes, err = n.TakeBool("read-zeroes", false); err != nil {
		return nil, err
	}
	if text, ok := n.Take("latency-ns"); ok {
		ns, err := strconv.ParseInt(text, 10, 64)
		if err != nil || ns < 0 {
			return nil, fmt.Errorf("latency-ns is invalid")
		}
		f.latency = time.Duration(ns)
	}
	return f, nil
}

func (f *null) wait() {
	if f.latency > 0 {
		time.Sleep(f.latency)
	}
}

// ReadAt implements storage.File.
func (f *null) ReadAt(p []byte, off int64) (int, error) {
	f.wait()
	n := min(int64(len(p)), max(f.size-off, 0))
	if f.zeroes {
		clear(p[:n])
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt implements storage.File.
func (f *null) WriteAt(p []byte, off int64) (int, error) {
	f.wait()
	if off+int64(len(p)) > f.size {
		return 0, syscall.ENOSPC
	}
	return len(p), nil
}

// ReadVAt implements storage.File.
func (f *null) ReadVAt(bufs [][]byte, off int64) (int, error) {
	done := 0
	for _, b := range bufs {
		n, err := f.ReadAt(b, off+int64(done))
		if done += n; err != nil {
			return done, err
		}
	}
	return done, nil
}

// WriteVAt implements storage.File.
func (f *null) WriteVAt(bufs [][]byte, off int64) (int, error) {
	f.wait()
	n := length(bufs)
	if off+int64(n) > f.size {
		return 0, syscall.ENOSPC
	}
	return n, nil
}

// Sync implements storage.File.
func (f *null) Sync() error { f.wait(); return nil }

// Size implements storage.File.
func (f *null) Size() (int64, error) { return f.size, nil }

// Truncate implements storage.File.
func (f *null) Truncate(size int64) error {
	if size <= f.size {
		return nil
	}
	return storage.ErrNotSupported
}

// PunchHole implements storage.File.
func (f *null) PunchHole(int64, int64) error { f.wait(); return nil }

// ZeroRange implements storage.File.
func (f *null) ZeroRange(int64, int64) error { f.wait(); return nil }

// Preallocate implements storage.File.
func (f *null) Preallocate(int64, int64) error { return nil }

// NextExtent implements storage.File.
func (f *null) NextExtent(off int64) (int64, bool, error) {
	end, _, zero, err := f.NextStatus(off)
	return end, !zero, err
}

// NextStatus implements block.StatusFile.
func (f *null) NextStatus(off int64) (end int64, data, zero bool, err error) {
	if off >= f.size {
		return 0, false, false, io.EOF
	}
	return f.size, false, f.zeroes, nil
}

// Lock implements storage.File.
func (f *null) Lock(storage.LockMode) error { return nil }

// Stat implements storage.File.
func (f *null) Stat() storage.Info {
	return storage.Info{Name: f.name, ReadOnly: f.readOnly, Device: true, Align: 1}
}

// Close implements storage.File.
func (f *null) Close() error { return nil }
