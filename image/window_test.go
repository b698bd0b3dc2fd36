package image

import (
	"bytes"
	"errors"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

func TestWindow(t *testing.T) {
	ctx := t.Context()
	_, dev := fill(t, 3<<20, 8, qcow2.CreateOptions{ClusterSize: 4096})
	all := readAll(t, dev)
	for _, r := range [][2]int64{{0, 3 << 20}, {1000, 1 << 20}, {3<<20 - 7, 7}, {5, 0}} {
		w, err := Window(dev, r[0], r[1])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readAll(t, w), all[r[0]:r[0]+r[1]]) {
			t.Errorf("window %v holds something else", r)
		}
		at := int64(0)
		if err := w.Extents(ctx, 0, w.Size(), func(e block.Extent) bool {
			if e.Off != at {
				t.Errorf("window %v: extent at %d, want %d", r, e.Off, at)
			}
			if e.Zero && !bytes.Equal(all[r[0]+e.Off:][:e.Len], make([]byte, e.Len)) {
				t.Errorf("window %v: extent %+v is not zero", r, e)
			}
			at = e.End()
			return true
		}); err != nil || at != w.Size() {
			t.Errorf("window %v: extents end at %d (%v)", r, at, err)
		}
		if err := w.ReadAt(ctx, make([]byte, 1), w.Size()); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("reading behind the window: %v", err)
		}
		if err := w.WriteAt(ctx, nil, 0, 0); !errors.Is(err, block.ErrReadOnly) || !w.Info().ReadOnly {
			t.Errorf("writing: %v", err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := Window(dev, 3<<20, 1); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("a window outside: %v", err)
	}
}
