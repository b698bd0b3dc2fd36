package crash

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// keyChanges change the key slots of an image that opens with the explorers' secret (slot 0) and with "second" (slot 1).
// Keys that must open it stay good whatever a power cut leaves; done are those that open it afterwards, gone those that do
// not.
var keyChanges = []struct {
	name       string
	must       []string
	done, gone string
	run        func(context.Context, *qcow2.Image) error
}{
	{"add", []string{explore.Secret, "second"}, "third", "", func(ctx context.Context, im *qcow2.Image) error {
		_, err := im.AddKey(ctx, 6, []byte("third"), luks.Cost{Iterations: 1000}, false) // slot 6 lies in two sectors
		return err
	}},
	{"erase", []string{explore.Secret}, "", "second", func(ctx context.Context, im *qcow2.Image) error {
		return im.EraseKeySlot(ctx, 1, false)
	}},
	{"change", []string{explore.Secret}, "third", "second", func(ctx context.Context, im *qcow2.Image) error {
		return im.ChangeKey(ctx, []byte("second"), []byte("third"), luks.Cost{Iterations: 1000})
	}},
}

// TestKeySlots cuts the power while key slots of an image in use change: the other keys open it still, its data are
// there, and no slot is active whose key is gone.
func TestKeySlots(t *testing.T) {
	for _, c := range keyChanges {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := start(t, "4k, LUKS")
			secondKey(t, d)
			w := newWorkload(t, d, false)
			op := explore.Op{Kind: explore.Write, First: 3, N: 70, Version: 5}
			for _, err := range []error{op.Run(w.im), w.im.Flush(t.Context())} {
				if err != nil {
					t.Fatal(err)
				}
			}
			w.file.Mark("written")
			if err := c.run(t.Context(), w.im); err != nil {
				t.Fatal(err)
			}
			w.file.Mark("changed")
			if err := w.im.Close(); err != nil {
				t.Fatal(err)
			}
			o := storage.ExploreOptions{Exhaustive: 4, PerFamily: 12, Samples: 12}
			err := w.file.Explorer().Explore(o, func(s storage.CrashState) error {
				total.Add(1)
				if len(s.Marks) == 0 {
					return nil
				}
				if err := sound(s.Image); err != nil {
					return err
				}
				for _, key := range c.must {
					if err := opensWith(s.Image, key, op); err != nil {
						return fmt.Errorf("key %q: %w", key, err)
					}
				}
				if len(s.Marks) < 2 {
					return activeSlotsOpen(s.Image)
				}
				if c.done != "" {
					if err := opensWith(s.Image, c.done, op); err != nil {
						return fmt.Errorf("key %q: %w", c.done, err)
					}
				}
				if c.gone != "" {
					if err := opensWith(s.Image, c.gone, op); !errors.Is(err, qcow2.ErrWrongKey) {
						return fmt.Errorf("key %q, which was erased: %v", c.gone, err)
					}
				}
				return activeSlotsOpen(s.Image)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

func start(t *testing.T, name string) *explore.Disk {
	t.Helper()
	for _, s := range explore.Starts() {
		if s.Name == name {
			return s.Make(t)
		}
	}
	t.Fatalf("no start is called %q", name)
	return nil
}

func secondKey(t *testing.T, d *explore.Disk) {
	t.Helper()
	im, err := d.Open(d.Image, false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = im.AddKey(t.Context(), 1, []byte("second"), luks.Cost{Iterations: 1000}, false)
	if err := errors.Join(err, im.Close()); err != nil {
		t.Fatal(err)
	}
}

func openWith(f *storage.MemFile, key string) (*qcow2.Image, error) {
	return qcow2.Open(context.Background(), explore.KeepOpen{File: f}, qcow2.Options{ReadOnly: true, CacheCleanInterval: -1,
		Encrypt: &qcow2.EncryptOptions{Secret: []byte(key)}})
}

// opensWith opens an image with a key and compares what op wrote.
func opensWith(f *storage.MemFile, key string, op explore.Op) error {
	im, err := openWith(f, key)
	if err != nil {
		return err
	}
	defer im.Close()
	got := make([]byte, op.N*explore.SectorSize)
	if err := im.ReadAt(context.Background(), got, op.First*explore.SectorSize); err != nil {
		return err
	}
	if string(got) != string(op.Bytes()) {
		return errors.New("the data differ")
	}
	return nil
}

// activeSlotsOpen makes sure that every slot that says it is active opens with one of the keys there ever were.
func activeSlotsOpen(f *storage.MemFile) error {
	im, err := openWith(f, explore.Secret)
	if err != nil {
		return err
	}
	defer im.Close()
	open := make(map[int]bool)
	for _, key := range []string{explore.Secret, "second", "third"} {
		slots, err := im.KeySlotsOf(context.Background(), []byte(key))
		if err != nil {
			return err
		}
		for _, s := range slots {
			open[s] = true
		}
	}
	info, err := im.Encryption()
	if err != nil {
		return err
	}
	for i, s := range info.LUKS.Slots {
		if s.Active && !open[i] {
			return fmt.Errorf("key slot %d is active, but no key opens it", i)
		}
	}
	return nil
}
