package daemon

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// TestControlCompact compacts an image while it is served.
func TestControlCompact(t *testing.T) {
	ctx := context.Background()
	image := newImage(t, 8<<20)
	file, err := storage.OpenFile(image, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, file, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{7}, 4<<20)
	if err := errors.Join(im.WriteAt(ctx, p, 0, 0), im.WriteAt(ctx, p, 4<<20, 0), im.Discard(ctx, 0, 4<<20), im.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sound(t, image) })
	s := manage(t, Config{Exports: []Export{
		{Name: "d", Image: image, Open: block.OpenOptions{Format: "qcow2"}},
		{Name: "ro", Image: newImage(t, 1<<20), Open: block.OpenOptions{Format: "qcow2", ReadOnly: true}},
	}}, ControlConfig{})
	var dry, done CompactReply
	s.must("POST", "/v1/disk/compact", q("name", "d"), CompactRequest{DryRun: true}, &dry)
	s.must("POST", "/v1/disk/compact", q("name", "d"), CompactRequest{}, &done)
	if dry.NewSize != done.NewSize || done.NewSize >= done.OldSize-3<<20 || done.Moved == 0 || done.SnapshotsOpen {
		t.Errorf("foretold %+v, then %+v", dry, done)
	}
	s.must("POST", "/v1/disk/compact", q("name", "ro"), CompactRequest{DryRun: true}, &dry)
	s.refuse(409, "read-only", "POST", "/v1/disk/compact", q("name", "ro"), CompactRequest{})
	s.refuse(400, "unknown field", "POST", "/v1/disk/compact", q("name", "d"), map[string]string{"dry": "x"})
}
