// Package filter_test has filters stand before images, and under them.
package filter_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/block/filter"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

const diskSize = 1 << 20

func newRaw(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, diskSize); err != nil {
		t.Fatal(err)
	}
	return path
}

func newQCOW2(t testing.TB, o qcow2.CreateOptions) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qcow2")
	file, err := storage.CreateFile(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o.Size, o.ClusterSize, o.RefcountBits, o.Version = diskSize, 4096, 16, 3
	if err := errors.Join(qcow2.Create(t.Context(), file, o), file.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// open opens a node.
func open(t testing.TB, node block.Options, change ...func(*block.OpenOptions)) block.Device {
	t.Helper()
	dev, err := tryOpen(t, node, change...)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

func tryOpen(t testing.TB, node block.Options, change ...func(*block.OpenOptions)) (block.Device, error) {
	t.Helper()
	o := block.OpenOptions{Node: node, AllowProbe: true, ProbeBacking: true, Policy: block.AllowAll()}
	o.Object = func(kind, id string) (any, error) {
		if kind != filter.ObjectThrottleGroup || id != "g" {
			return nil, block.ErrNoObject
		}
		return filter.NewThrottleGroup(nil)
	}
	for _, c := range change {
		c(&o)
	}
	return block.Open(t.Context(), "node", o)
}

// sound fails the test unless the image at path is.
func sound(t testing.TB, path string) {
	t.Helper()
	file, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	rep, err := qcow2.CheckFile(t.Context(), file, qcow2.CheckOptions{})
	if err != nil || rep.Corruptions != 0 || rep.Leaks != 0 {
		t.Errorf("%s is not sound: %+v, %v", path, rep, err)
	}
}

// TestConforms: a disk with a filter before it, or below its format, is a disk.
func TestConforms(t *testing.T) {
	for name, node := range map[string]func(t *testing.T) block.Options{
		"blkdebug under an image": func(t *testing.T) block.Options {
			return block.Options{"driver": "qcow2", "file.driver": "blkdebug", "file.image.filename": newQCOW2(t, qcow2.CreateOptions{})}
		},
		"throttle over an image": func(t *testing.T) block.Options {
			return block.Options{"driver": "throttle", "throttle-group": "g", "file.driver": "qcow2", "file.file.filename": newQCOW2(t, qcow2.CreateOptions{})}
		},
		"copy on read": func(t *testing.T) block.Options {
			return block.Options{"driver": "copy-on-read", "file.driver": "qcow2", "file.file.filename": newQCOW2(t, qcow2.CreateOptions{})}
		},
		"compress": func(t *testing.T) block.Options {
			return block.Options{"driver": "compress", "file.driver": "qcow2", "file.file.filename": newQCOW2(t, qcow2.CreateOptions{})}
		},
		"part of a file": func(t *testing.T) block.Options {
			return block.Options{"driver": "raw", "offset": "4096", "size": "512k", "file.filename": newRaw(t)}
		},
		"blkverify": func(t *testing.T) block.Options {
			return block.Options{"driver": "blkverify", "raw.filename": newRaw(t), "test.driver": "qcow2", "test.file.filename": newQCOW2(t, qcow2.CreateOptions{})}
		},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device { return open(t, node(t)) })
		})
	}
}

func TestInjectedErrors(t *testing.T) {
	path := newQCOW2(t, qcow2.CreateOptions{})
	node := block.Options{
		"driver": "qcow2", "file.driver": "blkdebug", "file.image.filename": path,
		"file.inject-error.0.event": "l2_update", "file.inject-error.0.errno": "28", "file.inject-error.0.once": "on",
	}
	dev := open(t, node)
	want := bytes.Repeat([]byte{5}, 8192)
	if err := dev.WriteAt(t.Context(), want, 4096, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Flush(t.Context()); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("the flush that writes the table: %v", err)
	}
	if err := dev.Flush(t.Context()); err != nil {
		t.Errorf("the next one: %v", err)
	}
	got := make([]byte, len(want))
	if err := dev.ReadAt(t.Context(), got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Errorf("reading back: %v", err)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	sound(t, path)
}

// TestEvents: the engine says what it does when it does it.
func TestEvents(t *testing.T) {
	for event, do := range map[string]func(t *testing.T, dev block.Device) error{
		"read_aio":         func(t *testing.T, dev block.Device) error { return dev.ReadAt(t.Context(), make([]byte, 512), 0) },
		"write_aio":        func(t *testing.T, dev block.Device) error { return dev.WriteAt(t.Context(), make([]byte, 512), 0, 0) },
		"pwritev":          func(t *testing.T, dev block.Device) error { return dev.WriteAt(t.Context(), make([]byte, 512), 0, 0) },
		"cluster_alloc":    func(t *testing.T, dev block.Device) error { return dev.WriteAt(t.Context(), []byte{1}, 65536, 0) },
		"cow_read":         func(t *testing.T, dev block.Device) error { return dev.WriteAt(t.Context(), []byte{1}, 40960, 0) },
		"read_backing_aio": func(t *testing.T, dev block.Device) error { return dev.ReadAt(t.Context(), make([]byte, 1), 40960) },
		"l2_load":          func(t *testing.T, dev block.Device) error { return dev.ReadAt(t.Context(), make([]byte, 1), 0) },
		"flush_to_os":      func(t *testing.T, dev block.Device) error { return dev.Flush(t.Context()) },
	} {
		t.Run(event, func(t *testing.T) {
			base := newRaw(t)
			if err := os.WriteFile(base, bytes.Repeat([]byte{9}, diskSize), 0o600); err != nil {
				t.Fatal(err)
			}
			path := newQCOW2(t, qcow2.CreateOptions{BackingFile: base, BackingFormat: "raw"})
			plain := open(t, block.Options{"driver": "qcow2", "file.filename": path})
			if err := errors.Join(plain.WriteAt(t.Context(), make([]byte, 4096), 0, 0), plain.Close()); err != nil {
				t.Fatal(err)
			}
			var breaker block.Breaker
			dev := open(t, block.Options{"driver": "qcow2", "file.driver": "blkdebug", "file.image.filename": path},
				func(o *block.OpenOptions) { o.OnBreaker = func(b block.Breaker) { breaker = b } })
			if err := breaker.Break(event, "x"); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- do(t, dev) }()
			waited := make(chan error, 1)
			go func() { waited <- breaker.WaitBreak(t.Context(), "x") }()
			select {
			case err := <-waited:
				if err != nil {
					t.Fatal(err)
				}
			case err := <-done:
				t.Fatalf("the request ended (%v) and nobody said %s", err, event)
			}
			if err := breaker.Resume("x"); err != nil {
				t.Error(err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := dev.Close(); err != nil {
				t.Error(err)
			}
			sound(t, path)
		})
	}
}

func TestVerify(t *testing.T) {
	raw, image := newRaw(t), newQCOW2(t, qcow2.CreateOptions{})
	node := block.Options{"driver": "blkverify", "raw.filename": raw, "test.driver": "qcow2", "test.file.filename": image}
	dev := open(t, node)
	if got := dev.Info(); got.Name != "blkverify:"+raw+":"+image || got.Format != "blkverify" {
		t.Errorf("it is called %q, of format %s", got.Name, got.Format)
	}
	if err := errors.Join(dev.WriteAt(t.Context(), []byte("same"), 1000, 0), dev.Close()); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(raw, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("S"), 1002)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	dev = open(t, node)
	var mismatch *filter.MismatchError
	err = dev.ReadAt(t.Context(), make([]byte, 512), 900)
	if !errors.As(err, &mismatch) || err.Error() != "blkverify: read offset=900 bytes=512 contents mismatch at offset 1002" {
		t.Errorf("reading what differs: %v", err)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	sound(t, image)
}

func TestCopyOnRead(t *testing.T) {
	base := newRaw(t)
	if err := os.WriteFile(base, append(bytes.Repeat([]byte{9}, 8192), make([]byte, diskSize-8192)...), 0o600); err != nil {
		t.Fatal(err)
	}
	path := newQCOW2(t, qcow2.CreateOptions{BackingFile: base, BackingFormat: "raw"})
	dev := open(t, block.Options{"driver": "copy-on-read", "file.driver": "qcow2", "file.file.filename": path})
	if err := dev.ReadAt(t.Context(), make([]byte, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	alone := open(t, block.Options{"driver": "qcow2", "file.filename": path, "backing": block.Null})
	want := append(make([]byte, 4096), bytes.Repeat([]byte{9}, 4096)...)
	got := make([]byte, 8192)
	if err := errors.Join(alone.ReadAt(t.Context(), got, 0), alone.Close()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("without its backing file the image holds something else (%v)", err)
	}
	sound(t, path)
}

func TestCompress(t *testing.T) {
	path := newQCOW2(t, qcow2.CreateOptions{})
	dev := open(t, block.Options{"driver": "compress", "file.driver": "qcow2", "file.file.filename": path})
	if err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{7}, 10000), 3000, block.WriteFUA); err != nil {
		t.Fatal(err)
	}
	compressed := int64(0)
	err := dev.Extents(t.Context(), 0, 16384, func(e block.Extent) bool {
		if e.Compressed {
			compressed += e.Len
		}
		return true
	})
	if err != nil || compressed != 16384 {
		t.Errorf("%d bytes are compressed (%v)", compressed, err)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	sound(t, path)
	_, err = tryOpen(t, block.Options{"driver": "compress", "file.filename": newRaw(t)})
	if err == nil || !strings.Contains(err.Error(), "Compression is not supported for underlying format: file") {
		t.Errorf("over a file: %v", err)
	}
}

func TestNull(t *testing.T) {
	dev := open(t, block.Options{"driver": "null-co", "size": "1M", "read-zeroes": "on"})
	p := []byte{1, 2, 3}
	if err := errors.Join(dev.WriteAt(t.Context(), p, 100, 0), dev.ReadAt(t.Context(), p, 100)); err != nil || !bytes.Equal(p, make([]byte, 3)) {
		t.Errorf("read %v (%v)", p, err)
	}
	if text, err := blocktest.Describe(context.Background(), dev); err != nil || dev.Size() != 1<<20 {
		t.Errorf("%d bytes: %s, %v", dev.Size(), text, err)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	image := open(t, block.Options{"driver": "raw", "file.driver": "null-co"})
	if image.Size() != 1<<30 {
		t.Errorf("without a size: %d bytes", image.Size())
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	raw := newRaw(t)
	for want, node := range map[string]block.Options{
		"Throttle group 'x' does not exist":                        {"driver": "throttle", "throttle-group": "x", "file.filename": raw},
		"Please specify a throttle group":                          {"driver": "throttle", "file.filename": raw},
		"Block format 'throttle' does not support the option 'x'":  {"driver": "throttle", "throttle-group": "g", "x": "1", "file.filename": raw},
		"Block protocol 'blkdebug' doesn't support the option 'x'": {"driver": "blkdebug", "x": "1", "image.filename": raw},
		`A block device must be specified for "image"`:             {"driver": "blkdebug"},
		"Cannot meet constraints with align 3":                     {"driver": "blkdebug", "align": "3", "image.filename": raw},
		"Could not read blkdebug config file":                      {"driver": "blkdebug", "config": raw + "none", "image.filename": raw},
		"Cannot find device='x' nor node-name='x'":                 {"driver": "blkdebug", "image": "x"},
		"prealloc-align parameter of preallocate filter":           {"driver": "preallocate", "prealloc-align": "7", "file.filename": raw},
		"expects a non-negative number":                            {"driver": "null-co", "size": "x"},
	} {
		if _, err := tryOpen(t, node); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", node, err, want)
		}
	}
}
