package check

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"testing"

	"github.com/droverproject/drover/storage"
)

// TestPreview wants a preview to say what the repair then does, and to write nothing.
func TestPreview(t *testing.T) {
	for _, d := range crashDamages() {
		x := d.make(t)
		f := memory(t, x.b)
		saw, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll, Preview: true})
		if err != nil || !saw.Fixed() {
			t.Fatalf("%s: %v, %+v", d.name, err, saw)
		}
		if !bytes.Equal(contentOf(t, f), x.b) {
			t.Fatalf("%s: the preview has changed the image", d.name)
		}
		did, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll})
		if err != nil || !reflect.DeepEqual(saw, did) {
			t.Errorf("%s: %v\nthe preview says %+v\nthe repair does  %+v", d.name, err, saw, did)
		}
	}
}

// TestUndo takes repairs back, from every state that a power cut can leave of them.
func TestUndo(t *testing.T) {
	ctx := context.Background()
	for _, d := range crashDamages() {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			x := d.make(t)
			x.b = append(x.b, bytes.Repeat([]byte("tail"), 3000)...) // which the repair cuts off
			base := storage.NewMemFile("damaged")
			if _, err := base.WriteAt(x.b, 0); err != nil {
				t.Fatal(err)
			}
			file, log := storage.NewCrashFile(base), storage.NewMemFile("undo")
			rep, err := Repair(ctx, file, RepairOptions{Mode: RepairAll, Undo: log})
			if err != nil || !rep.After.Clean() || rep.Truncated == 0 {
				t.Fatalf("%v, %+v", err, rep)
			}
			if err := takeBack(file.Clone(), log, x.b); err != nil {
				t.Fatal(err)
			}
			err = file.Explorer().Explore(storage.ExploreOptions{Exhaustive: 6, PerFamily: 12, Samples: 12}, func(s storage.CrashState) error {
				return takeBack(s.Image, log, x.b)
			})
			if err != nil {
				t.Fatal(err)
			}
			// A log whose end was lost is that of changes that were not made.
			size, err := log.Size()
			if err != nil {
				t.Fatal(err)
			}
			for cut := int64(undoHeaderSize); cut < size; cut += 97 {
				torn := log.Clone()
				if err := torn.Truncate(cut); err != nil {
					t.Fatal(err)
				}
				if err := takeBack(base.Clone(), torn, x.b); err != nil {
					t.Fatalf("log cut at %d: %v", cut, err)
				}
			}
		})
	}
}

// takeBack restores an image and compares it with what it was.
func takeBack(image, log storage.File, want []byte) error {
	if _, err := Restore(context.Background(), image, log); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if err := storage.ReadFull(image, got, 0); err != nil {
		return err
	}
	if n, err := image.Size(); err != nil || n != int64(len(want)) || !bytes.Equal(got, want) {
		return errors.New("the restored image is not what it was")
	}
	return nil
}

func TestUndoLogComesFirst(t *testing.T) {
	x := leakyDamage(t)
	// A log that cannot be made durable: nothing is changed.
	log := storage.NewFaultFile(storage.NewMemFile("undo"))
	log.Inject(storage.Fault{Kind: storage.OpSync})
	f := memory(t, x.b)
	if _, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll, Undo: log}); err == nil {
		t.Error("a log that cannot be made durable is good enough")
	}
	if !bytes.Equal(contentOf(t, f), x.b) {
		t.Error("the image was changed before its log was durable")
	}
	full := storage.NewMemFile("undo")
	if _, err := full.WriteAt([]byte("something"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Repair(context.Background(), f, RepairOptions{Mode: RepairAll, Undo: full}); !errors.Is(err, ErrUndoExists) {
		t.Errorf("a log in a file that is not empty: %v", err)
	}
}

func TestRestoreRefuses(t *testing.T) {
	ctx := context.Background()
	x := leakyDamage(t)
	f, log := memory(t, x.b), storage.NewMemFile("undo")
	if _, err := Repair(ctx, f, RepairOptions{Mode: RepairAll, Undo: log}); err != nil {
		t.Fatal(err)
	}
	repaired := contentOf(t, f)
	refused := func(name string, image []byte, log storage.File, want error) {
		t.Helper()
		f := memory(t, image)
		if _, err := Restore(ctx, f, log); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(contentOf(t, f), image) {
			t.Errorf("%s: the image was written to", name)
		}
	}
	other := bytes.Clone(repaired)
	other[x.refEntryBlock()+3] ^= 1 // another refcount than the repair left
	refused("an image written to since", other, log, ErrUndoImage)
	refused("another image", make([]byte, len(repaired)), log, ErrUndoImage)
	refused("no log", repaired, storage.NewMemFile("empty"), ErrUndoLog)
	refused("an image as log", repaired, memory(t, x.b), ErrUndoLog)
	damaged := log.Clone()
	if _, err := damaged.WriteAt([]byte{0x5a}, undoHeaderSize+100); err != nil {
		t.Fatal(err)
	}
	refused("a log damaged in the middle", repaired, damaged, ErrUndoLog)
}

func (x *bytesOf) refEntryBlock() int { return int(x.block(0)) }

func FuzzRestore(f *testing.F) {
	x := leakyDamage(f)
	image, log := memory(f, x.b), storage.NewMemFile("undo")
	if _, err := Repair(context.Background(), image, RepairOptions{Mode: RepairAll, Undo: log}); err != nil {
		f.Fatal(err)
	}
	f.Add(contentOf(f, log), uint16(0), byte(0))
	f.Add(contentOf(f, log), uint16(undoHeaderSize+5), byte(9))
	repaired := contentOf(f, image)
	f.Fuzz(func(t *testing.T, log []byte, at uint16, v byte) {
		log = bytes.Clone(log)
		if int(at) < len(log) {
			log[at] ^= v
		}
		image := memory(t, repaired)
		if _, err := Restore(context.Background(), image, memory(t, log)); err != nil && !bytes.Equal(contentOf(t, image), repaired) {
			t.Errorf("a refused log has changed the image: %v", err)
		}
	})
}
