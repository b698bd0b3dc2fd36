package daemon

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// snapshotImage makes an image whose snapshot "one" holds ones and whose disk holds twos.
func snapshotImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	f, err := storage.CreateFile(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Create(t.Context(), f, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), f, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fill(t, im, 1)
	if _, err := im.CreateSnapshot(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	fill(t, im, 2)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func fill(t *testing.T, dev block.Device, b byte) {
	t.Helper()
	if err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{b}, int(dev.Size())), 0, 0); err != nil {
		t.Fatal(err)
	}
}

// holds fails the test unless the device is full of b.
func holds(t *testing.T, dev block.Device, b byte) {
	t.Helper()
	got := make([]byte, dev.Size())
	if err := dev.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{b}, len(got))) {
		t.Errorf("the device holds %d..., want %d", got[0], b)
	}
}

func openDaemon(t *testing.T, exports ...Export) *Daemon {
	t.Helper()
	d, err := Open(t.Context(), Config{Exports: exports, Addresses: []Address{{Socket: filepath.Join(t.TempDir(), "s")}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := d.Serve(ctx); err != nil {
			t.Error(err)
		}
	})
	return d
}

func offered(d *Daemon) []string {
	var names []string
	for _, o := range (snapshots{d}).Offers() {
		names = append(names, o.Name)
	}
	return names
}

func TestSnapshotsAreOffered(t *testing.T) {
	path := snapshotImage(t)
	d := openDaemon(t, Export{Name: "disk", Image: path})
	if got := offered(d); !slices.Equal(got, []string{"disk@one"}) {
		t.Fatalf("offered: %q", got)
	}
	im := d.exports[0].dev.(*qcow2.Image)
	for _, name := range []string{"disk@one", "disk@1"} {
		o, ok := snapshots{d}.Find(name)
		if !ok {
			t.Fatalf("%q is not found", name)
		}
		dev, err := o.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		holds(t, dev, 1)
		if !dev.Info().ReadOnly {
			t.Error("a snapshot can be written")
		}
		if err := im.DeleteSnapshot(t.Context(), "one"); !errors.Is(err, qcow2.ErrSnapshotInUse) {
			t.Errorf("deleting a snapshot that is served: %v", err)
		}
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}
	// Those that come later are there, and those that go are not.
	if _, err := im.CreateSnapshot(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	o, _ := snapshots{d}.Find("disk@one")
	if err := im.DeleteSnapshot(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if dev, err := o.Open(t.Context()); !errors.Is(err, qcow2.ErrNoSnapshot) {
		t.Errorf("opening a snapshot that was deleted meanwhile: %v %v", dev, err)
	}
	if got := offered(d); !slices.Equal(got, []string{"disk@two"}) {
		t.Errorf("offered: %q", got)
	}
	for _, name := range []string{"disk@one", "disk@1", "disk@", "disk", "", "@two", "other@two"} {
		if _, ok := (snapshots{d}).Find(name); ok {
			t.Errorf("%q is found", name)
		}
	}
}

// TestSnapshotLabels: every snapshot has one name in the list, whatever it is called.
func TestSnapshotLabels(t *testing.T) {
	var list []qcow2.Snapshot
	for _, s := range [][2]string{{"1", "a"}, {"2", "a"}, {"3", ""}, {"4", "\xff"}, {"5", "4"}, {"6", "with\x00zero"}, {"7", "6"}} {
		list = append(list, qcow2.Snapshot{ID: s[0], Name: s[1]})
	}
	want := map[string]string{"x@a": "1", "x@1": "1 too", "x@2": "2", "x@3": "3", "x@4": "5", "x@5": "5 too", "x@6": "7", "x@7": "7 too"}
	for _, l := range labels("x", list) {
		id := l.ID
		if l.byID {
			id += " too"
		}
		if want[l.name] != id {
			t.Errorf("%q is snapshot %s, want %q", l.name, id, want[l.name])
		}
		delete(want, l.name)
	}
	if len(want) > 0 {
		t.Errorf("not reached: %v", want)
	}
}

func TestLongestExportNameWins(t *testing.T) {
	a, ab := snapshotImage(t), snapshotImage(t)
	d := openDaemon(t, Export{Name: "a", Image: a}, Export{Name: "a@b", Image: ab})
	im := d.exports[0].dev.(*qcow2.Image)
	if _, err := im.CreateSnapshot(t.Context(), "b@one"); err != nil {
		t.Fatal(err)
	}
	if got := offered(d); !slices.Equal(got, []string{"a@b@one", "a@one"}) {
		t.Errorf("offered: %q", got)
	}
	o, ok := snapshots{d}.Find("a@b@one")
	if !ok {
		t.Fatal("not found")
	}
	dev, err := o.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	holds(t, dev, 1) // the other holds twos
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
}

func TestServeSnapshotAlone(t *testing.T) {
	path := snapshotImage(t)
	e := Export{Image: path, Snapshot: &image.SnapshotRef{Name: "one"}, Open: block.OpenOptions{ReadOnly: true}}
	d := openDaemon(t, e)
	holds(t, d.exports[0].disk, 1)
	if got := d.Exports()[0]; !got.ReadOnly || got.Size != 1<<20 {
		t.Errorf("status: %+v", got)
	}
	if got := offered(d); len(got) != 0 {
		t.Errorf("offered beside it: %q", got)
	}
	for _, e := range []Export{
		{Image: path, Snapshot: &image.SnapshotRef{Any: "missing"}, Open: block.OpenOptions{ReadOnly: true}},
		{Image: rawImage(t), Snapshot: &image.SnapshotRef{Any: "one"}, Open: block.OpenOptions{ReadOnly: true}},
	} {
		_, err := Open(t.Context(), Config{Exports: []Export{e}})
		if !errors.Is(err, qcow2.ErrNoSnapshot) && !errors.Is(err, image.ErrNoSnapshots) {
			t.Errorf("opening %+v: %v", e, err)
		}
	}
	hidden := openDaemon(t, Export{Image: snapshotImage(t), HideSnapshots: true})
	if got := offered(hidden); len(got) != 0 {
		t.Errorf("offered though hidden: %q", got)
	}
}

// TestSnapshotRights: whoever may use the image, and nobody else, may use its snapshots.
func TestSnapshotRights(t *testing.T) {
	allow := func(p nbd.Peer) bool { return p.Addr == "friend" }
	d := openDaemon(t, Export{Image: snapshotImage(t), Allow: allow})
	for _, o := range (snapshots{d}).Offers() {
		if o.Allow == nil || o.Allow(nbd.Peer{}) || !o.Allow(nbd.Peer{Addr: "friend"}) {
			t.Errorf("%q is not for whom the image is", o.Name)
		}
	}
}
