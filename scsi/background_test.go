package scsi_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
)

// gated is a disk whose zeroing waits, and can fail.
type gated struct {
	block.Device
	entered chan struct{} // a value for each zeroing that has begun
	let     chan error    // what each of them ends with
}

func (g *gated) WriteZeroes(ctx context.Context, off, n int64, f block.ZeroFlags) error {
	g.entered <- struct{}{}
	select {
	case err := <-g.let:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return g.Device.WriteZeroes(ctx, off, n, f)
}

// background makes a unit of a disk of two steps, whose zeroing the test conducts.
func background(t *testing.T) (*scsi.Unit, *gated) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	_, dev := newUnit(t, 128*mib, scsi.Options{})
	g := &gated{Device: dev, entered: make(chan struct{}), let: make(chan error)}
	u, err := scsi.NewUnit(g, scsi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	u.Execute(t.Context(), make([]byte, 6), nil) // the unit attention
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	return u, g
}

var (
	testReady   = make([]byte, 6)
	eraseIMMED  = []byte{0x48, 0x82, 0, 0, 0, 0, 0, 0, 0, 0}
	exitFailure = []byte{0x48, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0}
)

// sense asks what the unit has to say, and returns key, code and progress.
func sense(t *testing.T, u *scsi.Unit) (key byte, code, progress uint16) {
	t.Helper()
	b := in(t, u, []byte{0x03, 0, 0, 0, 252, 0})
	return b[2] & 15, binary.BigEndian.Uint16(b[12:]), binary.BigEndian.Uint16(b[16:])
}

// TestSanitizeImmediate answers at once and wipes on: meanwhile every command but those about the unit itself is told how far
// it is.
func TestSanitizeImmediate(t *testing.T) {
	u, g := background(t)
	good(t, u, rw16(0x8A, 10, 8), scsi.Buffer{bytes.Repeat([]byte{9}, 4096)})
	good(t, u, eraseIMMED, nil)
	<-g.entered
	if key, code, progress := sense(t, u); key != 2 || code != 0x041B || progress != 0 {
		t.Errorf("REQUEST SENSE: %x/%04x, progress %d", key, code, progress)
	}
	for name, c := range map[string][]byte{
		"TEST UNIT READY": testReady, "READ": rw16(0x88, 0, 1), "WRITE": rw16(0x8A, 0, 1), "SANITIZE": eraseIMMED,
		"FORMAT UNIT": {0x04, 0, 0, 0, 0, 0}, "UNMAP": cdb(10, 0x42, 7, uint16(0)), "EXIT": exitFailure,
		"SYNCHRONIZE CACHE": cdb(10, 0x35),
	} {
		r := u.Execute(t.Context(), c, scsi.Buffer{make([]byte, 512)})
		if r.Status != scsi.CheckCondition || r.Sense[2] != 2 || binary.BigEndian.Uint16(r.Sense[12:]) != 0x041B {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if _, ok := u.TryExecute(rw16(0x88, 0, 1), scsi.Buffer{make([]byte, 512)}); ok {
		t.Error("a read was served from memory")
	}
	in(t, u, []byte{0x12, 0, 0, 0, 96, 0}) // INQUIRY is answered
	g.let <- nil
	<-g.entered
	if _, _, progress := sense(t, u); progress < 32000 || progress > 33000 {
		t.Errorf("half of it: progress %d", progress)
	}
	g.let <- nil
	if err := u.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	good(t, u, testReady, nil)
	got := make([]byte, 4096)
	if err := g.ReadAt(t.Context(), got, 5120); err != nil || len(bytes.Trim(got, "\x00")) != 0 {
		t.Errorf("what was written before is still there: %v", err)
	}
}

// TestSanitizeFails leaves a disk that nobody can take for an erased one, until it is erased or its initiator says that it
// may be used.
func TestSanitizeFails(t *testing.T) {
	for _, exit := range []bool{false, true} {
		u, g := background(t)
		erase := bytes.Clone(eraseIMMED)
		if exit {
			erase[1] |= 0x20
		}
		good(t, u, erase, nil)
		<-g.entered
		g.let <- errors.New("disk on fire")
		for { // it ends in the background
			if key, _, _ := sense(t, u); key != 2 {
				break
			}
		}
		if key, code, _ := sense(t, u); key != 3 || code != 0x3103 {
			t.Errorf("REQUEST SENSE: %x/%04x", key, code)
		}
		fails(t, u, testReady, nil, 3, 0x3103)
		fails(t, u, rw16(0x88, 0, 1), scsi.Buffer{make([]byte, 512)}, 3, 0x3103)
		if _, ok := u.TryExecute(rw16(0x88, 0, 1), scsi.Buffer{make([]byte, 512)}); ok {
			t.Error("a read was served from memory")
		}
		if exit {
			good(t, u, exitFailure, nil)
		} else {
			fails(t, u, exitFailure, nil, 5, 0x2400)
			good(t, u, eraseIMMED, nil)
			<-g.entered
			g.let <- nil
			<-g.entered
			g.let <- nil
		}
		if err := u.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		good(t, u, testReady, nil)
		good(t, u, exitFailure, nil) // nothing to exit from
	}
}

// TestSanitizeCutShort ends a unit while its disk is being wiped. Whoever ends it is told so.
func TestSanitizeCutShort(t *testing.T) {
	u, g := background(t)
	good(t, u, eraseIMMED, nil)
	<-g.entered
	g.let <- nil
	<-g.entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := u.Finish(ctx); err == nil || !strings.Contains(err.Error(), "SANITIZE was cut short after 50%") {
		t.Errorf("Finish: %v", err)
	}
	fails(t, u, testReady, nil, 3, 0x3103)
	if r := u.Execute(t.Context(), eraseIMMED, nil); r.Status != scsi.Busy {
		t.Errorf("another one begins in a unit that goes away: %+v", r)
	}
}

// TestFormatUnit takes what sg_format and the kernel's tools send.
func TestFormatUnit(t *testing.T) {
	u, g := background(t)
	good(t, u, []byte{0x04, 0x18, 0, 0, 0, 0}, scsi.Buffer{{0, 0x02, 0, 0}})
	<-g.entered
	if key, code, _ := sense(t, u); key != 2 || code != 0x0404 {
		t.Errorf("REQUEST SENSE: %x/%04x", key, code)
	}
	fails(t, u, testReady, nil, 2, 0x0404)
	g.let <- nil
	<-g.entered
	g.let <- nil
	if err := u.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cdb, list []byte
		code      int
	}{
		"protection":      {[]byte{0x04, 0x10, 0, 0, 0, 0}, []byte{1, 0, 0, 0}, 0x2600},
		"pattern":         {[]byte{0x04, 0x10, 0, 0, 0, 0}, []byte{0, 8, 0, 0}, 0x2600},
		"defects":         {[]byte{0x04, 0x10, 0, 0, 0, 0}, []byte{0, 0, 0, 4}, 0x2600},
		"defects, long":   {[]byte{0x04, 0x30, 0, 0, 0, 0}, []byte{0, 0, 0, 0, 0, 0, 0, 4}, 0x2600},
		"protection, too": {[]byte{0x04, 0x30, 0, 0, 0, 0}, []byte{0, 0, 0, 1, 0, 0, 0, 0}, 0x2600},
		"short":           {[]byte{0x04, 0x10, 0, 0, 0, 0}, []byte{0, 0, 0}, 0x1A00},
		"long alone":      {[]byte{0x04, 0x20, 0, 0, 0, 0}, nil, 0x2400},
		"protected":       {[]byte{0x04, 0x80, 0, 0, 0, 0}, nil, 0x2400},
		"fast, undefined": {[]byte{0x04, 0, 0, 0, 2, 0}, nil, 0x2400},
	} {
		r := u.Execute(t.Context(), tc.cdb, scsi.Buffer{tc.list})
		if r.Status != scsi.CheckCondition || int(binary.BigEndian.Uint16(r.Sense[12:])) != tc.code {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// heldFlush is a disk whose flushes wait.
type heldFlush struct {
	block.Device
	wait func()
}

func (h *heldFlush) Flush(ctx context.Context) error {
	h.wait()
	return h.Device.Flush(ctx)
}

func (h *heldFlush) TryReadAt(p []byte, off int64) error {
	return h.Device.(block.TryDevice).TryReadAt(p, off)
}

func (h *heldFlush) TryWriteAt(p []byte, off int64) error {
	return h.Device.(block.TryDevice).TryWriteAt(p, off)
}

// TestSanitizeBesideWrites has writers that were let in before a disk is wiped: nothing of what they write survives it. The
// last step of the wiping waits for them to be refused.
func TestSanitizeBesideWrites(t *testing.T) {
	_, dev := newUnit(t, 8*mib, scsi.Options{})
	for range 20 {
		var running sync.WaitGroup
		u, err := scsi.NewUnit(&heldFlush{dev, running.Wait}, scsi.Options{})
		if err != nil {
			t.Fatal(err)
		}
		u.Execute(t.Context(), testReady, nil)
		var written atomic.Int32
		begun := make(chan struct{})
		for w := range uint64(4) {
			running.Go(func() {
				p := scsi.Buffer{bytes.Repeat([]byte{0xAA}, 4096)}
				for lba := w * 8; ; lba = (lba + 32) % (8 * mib / 512) {
					done := false
					if w%2 == 0 { // the two ways have a check each
						_, done = u.TryExecute(rw16(0x8A, lba, 8), p)
					}
					if !done {
						if r := u.Execute(context.Background(), rw16(0x8A, lba, 8), p); r.Status != scsi.Good {
							return // the wiping has begun
						}
					}
					if written.Add(1) == 100 {
						close(begun)
					}
				}
			})
		}
		<-begun
		good(t, u, eraseIMMED, nil)
		if err := u.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 8*mib)
		if err := dev.ReadAt(t.Context(), got, 0); err != nil || len(bytes.Trim(got, "\x00")) != 0 {
			t.Fatalf("a write survived: %v", err)
		}
	}
}
