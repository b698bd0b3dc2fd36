package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

type sharedBytes []byte

func (s sharedBytes) Bytes() []byte    { return s }
func (s sharedBytes) Close(bool) error { return nil }

// keptFile is a file that its image does not close, whose syncs can be made to wait.
type keptFile struct {
	*storage.MemFile
	mu   sync.Mutex
	wait chan struct{} // a sync waits for it, if not nil
	in   chan struct{} // and says so here
}

func (f *keptFile) Close() error { return nil }

func (f *keptFile) Sync() error {
	f.mu.Lock()
	wait, in := f.wait, f.in
	f.mu.Unlock()
	if wait != nil {
		in <- struct{}{}
		<-wait
	}
	return f.MemFile.Sync()
}

// hold makes syncs wait. It returns what is sent to by each, and what lets them go.
func (f *keptFile) hold() (in <-chan struct{}, release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wait, f.in = make(chan struct{}), make(chan struct{}, 16)
	wait := f.wait
	return f.in, func() {
		f.mu.Lock()
		f.wait = nil
		f.mu.Unlock()
		close(wait)
	}
}

func journaled(t *testing.T, o qcow2.CreateOptions) *keptFile {
	t.Helper()
	f := &keptFile{MemFile: storage.NewMemFile("kept.qcow2")}
	if o.Size == 0 {
		o.Size = 4 << 20
	}
	if err := qcow2.Create(context.Background(), f, o); err != nil {
		t.Fatal(err)
	}
	return f
}

func openJournaled(t *testing.T, f storage.File, j *qcow2.Journal) *qcow2.Image {
	t.Helper()
	im, err := qcow2.Open(context.Background(), f, qcow2.Options{Journal: j})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// TestInPlaceOnUnkept: what is neither recorded nor durable yet may not be built upon: a write in place to a cluster whose
// mapping could be lost is not acknowledged either.
func TestInPlaceOnUnkept(t *testing.T) {
	ctx := context.Background()
	f := journaled(t, qcow2.CreateOptions{})
	im := openJournaled(t, f, &qcow2.Journal{})
	defer im.Close()
	if !im.Info().Survives {
		t.Error("without memory nothing survives, the image says")
	}
	// Another cluster of the same table first, so that the table is there.
	if err := im.WriteAt(ctx, make([]byte, 512), 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	in, release := f.hold()
	done := make(chan error, 2)
	go func() { done <- im.WriteAt(ctx, bytes.Repeat([]byte{1}, 512), 0, 0) }()
	<-in
	if err := im.TryWriteAt(bytes.Repeat([]byte{2}, 512), 512); !errors.Is(err, block.ErrWouldBlock) {
		t.Errorf("a write in place was acknowledged before its cluster's mapping is kept: %v", err)
	}
	pieces := [][]byte{bytes.Repeat([]byte{2}, 512), bytes.Repeat([]byte{3}, 512)}
	if err := im.TryWriteVAt(pieces, 512); !errors.Is(err, block.ErrWouldBlock) {
		t.Errorf("a write in pieces was acknowledged before its cluster's mapping is kept: %v", err)
	}
	go func() { done <- im.WriteAt(ctx, bytes.Repeat([]byte{2}, 512), 512, 0) }()
	release()
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if err := im.TryWriteAt(bytes.Repeat([]byte{3}, 512), 512); err != nil {
		t.Errorf("a write in place when everything is kept: %v", err)
	}
	if err := im.TryWriteVAt(pieces, 512); err != nil {
		t.Errorf("a write in pieces when everything is kept: %v", err)
	}
}

// crash returns copies of file and journal as a kill leaves them.
func crash(f *keptFile, im *qcow2.Image) (*keptFile, []byte) {
	return &keptFile{MemFile: f.MemFile.Clone()}, im.JournalSnapshot()
}

// TestJournalOnce: who keeps no journal brings back what another left, and leaves nothing behind.
func TestJournalOnce(t *testing.T) {
	ctx := context.Background()
	f := journaled(t, qcow2.CreateOptions{})
	im := openJournaled(t, f, &qcow2.Journal{Memory: make(sharedBytes, 64<<10), Identity: "a"})
	want := bytes.Repeat([]byte{7}, 100<<10)
	if err := im.WriteAt(ctx, want, 300<<10, 0); err != nil {
		t.Fatal(err)
	}
	left, memory := crash(f, im)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	var report qcow2.JournalReport
	once := &qcow2.Journal{Memory: sharedBytes(memory), Identity: "a", Once: true, OnRecover: func(r qcow2.JournalReport) { report = r }}
	im = openJournaled(t, left, once)
	if report.Lost != nil || report.Clusters != 3 {
		t.Errorf("report %+v", report)
	}
	if im.Info().Survives || im.JournalSnapshot() != nil {
		t.Error("a journal is kept that was to be used once")
	}
	got := make([]byte, len(want))
	if err := im.ReadAt(ctx, got, 300<<10); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was acknowledged is not there: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	report = qcow2.JournalReport{}
	im = openJournaled(t, left, once)
	if report.Changes != 0 || report.Lost != nil {
		t.Errorf("the second time: %+v", report)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := qcow2.CheckFile(ctx, left, qcow2.CheckOptions{}); err != nil || r.Corruptions+r.Leaks > 0 {
		t.Errorf("check: %+v, %v", r, err)
	}
}

// TestJournalAcrossWholeImageOperations: records from before an operation on the whole image do not come back after it, and
// changes after it are recorded.
func TestJournalAcrossWholeImageOperations(t *testing.T) {
	ctx := context.Background()
	for name, operate := range map[string]func(im *qcow2.Image) error{
		"snapshot": func(im *qcow2.Image) error {
			_, err := im.CreateSnapshot(ctx, "one")
			return err
		},
		"resize": func(im *qcow2.Image) error { return im.Resize(ctx, 6<<20, qcow2.ResizeOptions{}) },
		"resize and preallocate": func(im *qcow2.Image) error {
			return im.Resize(ctx, 6<<20, qcow2.ResizeOptions{Preallocation: qcow2.PreallocMetadata})
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := journaled(t, qcow2.CreateOptions{})
			im := openJournaled(t, f, &qcow2.Journal{Memory: make(sharedBytes, 64<<10), Identity: "a"})
			write := func(b byte, off int64) {
				t.Helper()
				if err := im.WriteAt(ctx, bytes.Repeat([]byte{b}, 64<<10), off, 0); err != nil {
					t.Fatal(err)
				}
			}
			write(1, 0)
			write(2, 128<<10)
			if err := operate(im); err != nil {
				t.Fatal(err)
			}
			write(3, 0)
			write(4, 256<<10)
			left, memory := crash(f, im)
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			var report qcow2.JournalReport
			if memory == nil { // it was given up; then all is in the file
				memory = make([]byte, 64<<10)
			}
			im = openJournaled(t, left, &qcow2.Journal{Memory: sharedBytes(memory), Identity: "a",
				OnRecover: func(r qcow2.JournalReport) { report = r }})
			if report.Lost != nil {
				t.Errorf("report %+v", report)
			}
			for off, b := range map[int64]byte{0: 3, 128 << 10: 2, 256 << 10: 4} {
				got := make([]byte, 64<<10)
				if err := im.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{b}, 64<<10)) {
					t.Errorf("at %d: %d..., not %d (%v)", off, got[0], b, err)
				}
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if r, err := qcow2.CheckFile(ctx, left, qcow2.CheckOptions{}); err != nil || r.Corruptions > 0 {
				t.Errorf("check: %+v, %v", r, err)
			}
		})
	}
}

// TestJournalMissing: an image that was used with a journal says so if that is not there, and a downgrade to version 2 ends
// the use of it.
func TestJournalMissing(t *testing.T) {
	ctx := context.Background()
	f := journaled(t, qcow2.CreateOptions{})
	im := openJournaled(t, f, &qcow2.Journal{Memory: make(sharedBytes, 64<<10), Identity: "a"})
	left, _ := crash(f, im)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	var lost error
	j := &qcow2.Journal{Memory: make(sharedBytes, 64<<10), Identity: "a", OnRecover: func(r qcow2.JournalReport) { lost = r.Lost }}
	im = openJournaled(t, left, j)
	if !errors.Is(lost, qcow2.ErrJournalMissing) {
		t.Errorf("lost: %v", lost)
	}
	if err := im.Amend(ctx, qcow2.AmendOptions{Version: 2}); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, make([]byte, 512), 0, 0); err != nil {
		t.Fatal(err)
	}
	if im.JournalSnapshot() != nil {
		t.Error("version 2 has a journal")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	lost = nil
	im = openJournaled(t, f, &qcow2.Journal{Memory: make(sharedBytes, 64<<10), Identity: "a", OnRecover: j.OnRecover})
	defer im.Close()
	if lost != nil {
		t.Errorf("after a close in order: %v", lost)
	}
}
