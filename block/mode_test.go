package block_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
)

// traced notes the changes that reach a device.
type traced struct {
	block.Device
	calls []string
}

func (d *traced) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	d.calls = append(d.calls, "write"+map[block.WriteFlags]string{block.WriteFUA: " fua"}[flags])
	return d.Device.WriteAt(ctx, p, off, flags)
}

func (d *traced) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	call := "zero"
	if flags&block.ZeroUnmap != 0 {
		call += " unmap"
	}
	if flags&block.ZeroFast != 0 {
		call += " fast"
	}
	if flags&block.ZeroFUA != 0 {
		call += " fua"
	}
	d.calls = append(d.calls, call)
	return d.Device.WriteZeroes(ctx, off, n, flags)
}

func (d *traced) Discard(ctx context.Context, off, n int64) error {
	d.calls = append(d.calls, "discard")
	return d.Device.Discard(ctx, off, n)
}

func (d *traced) Flush(ctx context.Context) error {
	d.calls = append(d.calls, "flush")
	return d.Device.Flush(ctx)
}

func TestMode(t *testing.T) {
	zeroes, ones := make([]byte, 4096), bytes.Repeat([]byte{1}, 4096)
	last := append(make([]byte, 4095), 1)
	type call func(block.Device) error
	write := func(p []byte, flags block.WriteFlags) call {
		return func(d block.Device) error { return d.WriteAt(t.Context(), p, 4096, flags) }
	}
	zero := func(flags block.ZeroFlags) call {
		return func(d block.Device) error { return d.WriteZeroes(t.Context(), 4096, 4096, flags) }
	}
	discard := func(d block.Device) error { return d.Discard(t.Context(), 4096, 4096) }
	flush := func(d block.Device) error { return d.Flush(t.Context()) }
	for name, c := range map[string]struct {
		mode block.Mode
		do   call
		want []string
	}{
		"none":                          {block.Mode{}, write(zeroes, 0), []string{"write"}},
		"writethrough write":            {block.Mode{Writethrough: true}, write(ones, 0), []string{"write fua"}},
		"writethrough zero":             {block.Mode{Writethrough: true}, zero(block.ZeroFast), []string{"zero fast fua"}},
		"writethrough discard":          {block.Mode{Writethrough: true}, discard, []string{"discard", "flush"}},
		"no flush: write":               {block.Mode{NoFlush: true}, write(ones, block.WriteFUA), []string{"write"}},
		"no flush: zero":                {block.Mode{NoFlush: true}, zero(block.ZeroFUA | block.ZeroUnmap), []string{"zero unmap"}},
		"no flush: flush":               {block.Mode{NoFlush: true}, flush, nil},
		"no flush beats writethrough":   {block.Mode{NoFlush: true, Writethrough: true}, write(ones, 0), []string{"write"}},
		"no discard: discard":           {block.Mode{NoDiscard: true}, discard, nil},
		"no discard: zero":              {block.Mode{NoDiscard: true}, zero(block.ZeroUnmap), []string{"zero"}},
		"no discard: flush":             {block.Mode{NoDiscard: true}, flush, []string{"flush"}},
		"detect zeroes":                 {block.Mode{DetectZeroes: block.DetectOn}, write(zeroes, 0), []string{"zero"}},
		"detect zeroes, durable":        {block.Mode{DetectZeroes: block.DetectOn}, write(zeroes, block.WriteFUA), []string{"zero fua"}},
		"detect zeroes: data":           {block.Mode{DetectZeroes: block.DetectOn}, write(ones, block.WriteFUA), []string{"write fua"}},
		"detect zeroes: last byte":      {block.Mode{DetectZeroes: block.DetectUnmap}, write(last, 0), []string{"write"}},
		"detect and unmap":              {block.Mode{DetectZeroes: block.DetectUnmap}, write(zeroes, 0), []string{"zero unmap"}},
		"detect and unmap, no discards": {block.Mode{DetectZeroes: block.DetectUnmap, NoDiscard: true}, write(zeroes, 0), []string{"zero"}},
	} {
		t.Run(name, func(t *testing.T) {
			below := &traced{Device: openRaw(t, newFile(t, nil, 1<<20), false, block.RawOptions{})}
			if err := c.do(block.WithMode(below, c.mode)); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(below.calls, c.want) {
				t.Errorf("the device below got %q, want %q", below.calls, c.want)
			}
		})
	}
}

// TestModeTry hands on to the way that waits what a mode has a say in.
func TestModeTry(t *testing.T) {
	raw := openRaw(t, newFile(t, nil, 1<<20), false, block.RawOptions{})
	zeroes, ones := make([]byte, 4096), bytes.Repeat([]byte{1}, 4096)
	for _, c := range []struct {
		mode block.Mode
		p    []byte
		want error
	}{
		{block.Mode{DetectZeroes: block.DetectOn}, ones, nil},
		{block.Mode{DetectZeroes: block.DetectOn}, zeroes, block.ErrWouldBlock},
		{block.Mode{Writethrough: true}, ones, block.ErrWouldBlock},
		{block.Mode{NoFlush: true}, zeroes, nil},
	} {
		if err := block.WithMode(raw, c.mode).(block.TryDevice).TryWriteAt(c.p, 0); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v, want %v", c.mode, err, c.want)
		}
	}
}

func TestModeConforms(t *testing.T) {
	for name, mode := range map[string]block.Mode{
		"writethrough": {Writethrough: true}, "unsafe": {NoFlush: true}, "ignore": {NoDiscard: true}, "detect": {DetectZeroes: block.DetectUnmap},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				return block.WithMode(openRaw(t, newFile(t, nil, 1<<20), false, block.RawOptions{}), mode)
			})
		})
	}
}

func TestModeReadOnly(t *testing.T) {
	want := bytes.Repeat([]byte{7}, 4096)
	raw := openRaw(t, newFile(t, want, 4096), true, block.RawOptions{})
	blocktest.RunReadOnly(t, block.WithMode(raw, block.Mode{NoDiscard: true, DetectZeroes: block.DetectOn, NoFlush: true}), want)
}

func TestPart(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		dev, err := block.Part(openRaw(t, newFile(t, nil, 2<<20), false, block.RawOptions{}), 4096, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	})
	content := append(bytes.Repeat([]byte{1}, 1000), bytes.Repeat([]byte{2}, 2072)...)
	raw := openRaw(t, newFile(t, content, 3072), false, block.RawOptions{})
	dev, err := block.Part(raw, 1000, 1024)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{3}, 1024), 0, 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 3072)
	if err := raw.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	copy(content[1000:], bytes.Repeat([]byte{3}, 1024))
	if !bytes.Equal(got, content) {
		t.Error("a write through the part reached more, or less, than the part")
	}
	for _, r := range [][2]int64{{-1, 10}, {0, 3073}, {3072, 1}, {1, -1}} {
		if _, err := block.Part(raw, r[0], r[1]); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("part at %d of %d bytes: %v", r[0], r[1], err)
		}
	}
}
