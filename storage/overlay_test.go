package storage_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/storage/storagetest"
)

func TestOverlayContract(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File { return overlay(t, storage.NewMemFile("base")) })
}

func overlay(t *testing.T, base storage.File) *storage.Overlay {
	t.Helper()
	o, err := storage.NewOverlay(base)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// TestOverlayModel compares an overlay over content with plain memory, puts its changes into effect now and then, and wants
// the file below untouched in between.
func TestOverlayModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	model := make([]byte, 40000)
	for i := range model {
		model[i] = byte(rng.Uint32())
	}
	base := storage.NewMemFile("base")
	if _, err := base.WriteAt(model, 0); err != nil {
		t.Fatal(err)
	}
	below := bytes.Clone(model)
	o := overlay(t, base)
	for step := range 3000 {
		off, n := rng.IntN(60000), 1+rng.IntN(6000)
		switch k := rng.IntN(20); {
		case k == 0:
			if err := o.Truncate(int64(off)); err != nil {
				t.Fatal(err)
			}
			model = append(model, make([]byte, max(0, off-len(model)))...)[:off]
		case k < 12:
			p := bytes.Repeat([]byte{byte(step)}, n)
			if _, err := o.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
			model = append(model, make([]byte, max(0, off+n-len(model)))...)
			copy(model[off:], p)
		case k == 12:
			applyOverlay(t, o, base)
			below = bytes.Clone(model)
		}
		if got := readAll(t, o); !bytes.Equal(got, model) {
			t.Fatalf("step %d: the overlay reads otherwise than the model", step)
		}
		if got := readAll(t, base); !bytes.Equal(got, below) {
			t.Fatalf("step %d: the file below has changed", step)
		}
	}
}

// applyOverlay does what a user of Changes does.
func applyOverlay(t *testing.T, o *storage.Overlay, base storage.File) {
	t.Helper()
	size, err := o.Size()
	if err != nil {
		t.Fatal(err)
	}
	changes := o.Changes()
	if err := o.Apply(); err != nil {
		t.Fatal(err)
	}
	for _, c := range changes {
		if got := make([]byte, len(c.Data)); storage.ReadFull(base, got, c.Off) != nil || !bytes.Equal(got, c.Data) {
			t.Fatalf("the change at %d has not come into effect", c.Off)
		}
	}
	if now, err := base.Size(); err != nil || now != size {
		t.Fatalf("the file below is %d bytes long, want %d (%v)", now, size, err)
	}
	if left := o.Changes(); len(left) != 0 {
		t.Fatalf("%d changes are left", len(left))
	}
}

func TestOverlayApplyFails(t *testing.T) {
	base := storage.NewFaultFile(storage.NewMemFile("base"))
	o := overlay(t, base)
	if _, err := o.WriteAt([]byte("new"), 100); err != nil {
		t.Fatal(err)
	}
	base.Inject(storage.Fault{Kind: storage.OpWrite})
	if err := o.Apply(); err == nil {
		t.Fatal("a failed write passes")
	}
	if err := o.Apply(); err != nil || len(o.Changes()) != 0 {
		t.Fatalf("the second attempt: %v", err)
	}
	if got := readAll(t, base); !bytes.Equal(got[100:], []byte("new")) {
		t.Errorf("the file below has %q", got)
	}
	if err := o.PunchHole(0, 10); !errors.Is(err, storage.ErrNotSupported) {
		t.Errorf("punching a hole: %v", err)
	}
}
