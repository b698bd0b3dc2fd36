package luks

import (
	"bytes"
	"context"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// disk is a storage that knows which sectors are durable.
type disk struct {
	now, durable []byte
	// after is called when a write or a sync has happened.
	after func()
	fail  int // the call that fails, counted from 1; 0 for none
	calls int
}

var errInjected = errors.New("injected")

func newDisk(n int64) *disk { return &disk{now: make([]byte, n), durable: make([]byte, n)} }

func (d *disk) call() error {
	d.calls++
	if d.calls == d.fail {
		return errInjected
	}
	return nil
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, d.now[min(off, int64(len(d.now))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.call(); err != nil {
		n := len(p) / 2 / SectorSize * SectorSize // sectors are whole
		copy(d.now[off:], p[:n])
		return n, err
	}
	copy(d.now[off:], p)
	if d.after != nil {
		d.after()
	}
	return len(p), nil
}

func (d *disk) Sync() error {
	if err := d.call(); err != nil {
		return err
	}
	copy(d.durable, d.now)
	if d.after != nil {
		d.after()
	}
	return nil
}

// crashed returns what may be there after a power cut: of the sectors that are not durable, those for which keep says so.
func (d *disk) crashed(keep func(sector int) bool) *disk {
	c := newDisk(int64(len(d.now)))
	copy(c.now, d.durable)
	for at := 0; at < len(d.now); at += SectorSize {
		end := min(at+SectorSize, len(d.now))
		if !bytes.Equal(d.now[at:end], d.durable[at:end]) && keep(at/SectorSize) {
			copy(c.now[at:end], d.now[at:end])
		}
	}
	copy(c.durable, c.now)
	return c
}

var cheap = Cost{Iterations: 1000}

// small are options with little key material, for speed.
var small = CreateOptions{KeyBits: 128, Mode: "cbc", Cost: cheap}

func create(t *testing.T, o CreateOptions, passphrase string) (*disk, *Volume) {
	t.Helper()
	n, err := o.Length()
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(n)
	v, err := Create(t.Context(), d, []byte(passphrase), o)
	if err != nil {
		t.Fatal(err)
	}
	return d, v
}

// opens fails the test unless the passphrase opens the volume, and to the same master key.
func opens(t *testing.T, d *disk, v *Volume, passphrase string) {
	t.Helper()
	w, err := Open(t.Context(), d, []byte(passphrase), Limits{})
	if err != nil {
		t.Fatalf("opening with %q: %v", passphrase, err)
	}
	if !bytes.Equal(v.key, w.key) {
		t.Fatalf("opening with %q: another master key", passphrase)
	}
}

func opensNot(t *testing.T, d *disk, passphrase string) {
	t.Helper()
	if _, err := Open(t.Context(), d, []byte(passphrase), Limits{}); !errors.Is(err, ErrWrongKey) {
		t.Fatalf("opening with %q: %v, not %v", passphrase, err, ErrWrongKey)
	}
}

func TestDefaultsAreQEMUs(t *testing.T) {
	n, err := CreateOptions{}.Length()
	if err != nil || n != 2068480 {
		t.Fatalf("length %d, %v; QEMU has 2068480", n, err)
	}
	d, v := create(t, CreateOptions{Cost: cheap}, "secret")
	h := v.Header()
	if h.CipherAlg() != "aes-256" || h.CipherMode != "xts-plain64" || h.Hash != "sha256" || h.KeyBytes != 64 {
		t.Errorf("%s %s %s, key of %d bytes", h.CipherAlg(), h.CipherMode, h.Hash, h.KeyBytes)
	}
	for i, s := range h.Slots {
		if want := uint32(4096+i*258048) / 512; s.KeyOffset != want || s.Stripes != 4000 || s.Active != (i == 0) {
			t.Errorf("slot %d: %+v, want offset %d", i, s, want)
		}
	}
	opens(t, d, v, "secret")
	opensNot(t, d, "Secret")
	opensNot(t, d, "")
}

func TestCreateAndOpenEverySpec(t *testing.T) {
	for _, s := range aesSpecs {
		for _, bits := range []int{128, 192, 256} {
			o := CreateOptions{Cipher: s.Cipher, KeyBits: bits, Mode: s.Mode, IVGen: s.IVGen, IVHash: s.IVHash, Cost: cheap, Hash: "sha1"}
			d, v := create(t, o, "p")
			opens(t, d, v, "p")
			if v.h.Spec() != s {
				t.Errorf("%+v became %+v", s, v.h.Spec())
			}
		}
	}
	for name := range standardHashes {
		o := small
		o.Hash = name
		d, v := create(t, o, "p")
		opens(t, d, v, "p")
		opensNot(t, d, "q")
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, o := range []CreateOptions{
		{Cipher: "serpent"}, {KeyBits: 512}, {KeyBits: 100}, {KeyBits: -8}, {Mode: "lrw"}, {IVGen: "benbi"}, {Hash: "whirlpool"},
		{IVGen: "essiv", IVHash: "sha1"}, {Cipher: strings.Repeat("x", 32)}, {IVHash: strings.Repeat("x", 32)},
	} {
		if o.Check() == nil {
			t.Errorf("%+v passes the check", o)
		}
		o.Cost = cheap
		if _, err := Create(t.Context(), newDisk(4<<20), nil, o); err == nil {
			t.Errorf("%+v: created", o)
		}
	}
}

func TestPBKDF2AgreesWithTheStandardLibrary(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, h := range []func() hash.Hash{sha1.New, sha256.New} {
		for range 20 {
			p, salt := random(rnd, rnd.IntN(100)), random(rnd, 32)
			count, n := 1+rnd.IntN(50), 1+rnd.IntN(100)
			want, err := pbkdf2.Key(h, string(p), salt, count, n)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := deriveKey(t.Context(), h, p, salt, uint32(count), n); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d iterations, %d bytes: %x, %v; want %x", count, n, got, err, want)
			}
		}
	}
}

func TestSplitAndMerge(t *testing.T) {
	key := random(rand.New(rand.NewPCG(1, 1)), 50) // not a multiple of the hash's length
	material, err := split(sha256.New, key, 7)
	if err != nil {
		t.Fatal(err)
	}
	if got := merge(sha256.New, material, len(key)); !bytes.Equal(got, key) {
		t.Fatal("merged to another key")
	}
	for at := range material {
		material[at] ^= 1
		if bytes.Equal(merge(sha256.New, material, len(key)), key) {
			t.Fatalf("the key does not depend on byte %d", at)
		}
		material[at] ^= 1
	}
}

func TestIterationsFollowTheTime(t *testing.T) {
	short, err := iterationsFor(t.Context(), sha256.New, 32, time.Nanosecond)
	if err != nil || short != minIterations {
		t.Errorf("for no time: %d, %v", short, err)
	}
	long, err := iterationsFor(t.Context(), sha256.New, 32, time.Hour)
	if err != nil || long < 1<<20 {
		t.Errorf("for an hour: %d, %v", long, err)
	}
}

func TestKeySlots(t *testing.T) {
	d, v := create(t, small, "one")
	ctx := t.Context()
	if n, err := v.AddKey(ctx, AnySlot, []byte("two"), cheap, false); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := v.AddKey(ctx, 6, []byte("six"), cheap, false); n != 6 || err != nil {
		t.Fatal(n, err)
	}
	for _, p := range []string{"one", "two", "six"} {
		opens(t, d, v, p)
	}
	if _, err := v.AddKey(ctx, 6, []byte("x"), cheap, false); !errors.Is(err, ErrSlotActive) {
		t.Errorf("overwriting: %v", err)
	}
	opens(t, d, v, "six")
	if _, err := v.AddKey(ctx, 6, []byte("SIX"), cheap, true); err != nil {
		t.Fatal(err)
	}
	opens(t, d, v, "SIX")
	opensNot(t, d, "six")
	if got, err := v.EraseKey(ctx, []byte("two"), false); err != nil || !slices.Equal(got, []int{1}) {
		t.Fatal(got, err)
	}
	opensNot(t, d, "two")
	if err := v.EraseSlot(1, false); !errors.Is(err, ErrSlotInactive) {
		t.Errorf("erasing twice: %v", err)
	}
	if n, err := v.ChangeKey(ctx, []byte("one"), []byte("ONE"), cheap); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	opensNot(t, d, "one")
	opens(t, d, v, "ONE")
	for _, slot := range []int{-2, 8} {
		if _, err := v.AddKey(ctx, slot, nil, cheap, true); !errors.Is(err, ErrNoSlot) {
			t.Errorf("adding to slot %d: %v", slot, err)
		}
		if err := v.EraseSlot(slot, true); !errors.Is(err, ErrNoSlot) {
			t.Errorf("erasing slot %d: %v", slot, err)
		}
	}
}

func TestTheLastKeyStays(t *testing.T) {
	d, v := create(t, small, "one")
	if _, err := v.AddKey(t.Context(), AnySlot, []byte("one"), cheap, false); err != nil {
		t.Fatal(err)
	}
	if _, err := v.EraseKey(t.Context(), []byte("one"), false); !errors.Is(err, ErrLastSlot) {
		t.Errorf("both slots of the only passphrase: %v", err)
	}
	if err := v.EraseSlot(0, false); err != nil {
		t.Fatal(err)
	}
	if err := v.EraseSlot(1, false); !errors.Is(err, ErrLastSlot) {
		t.Errorf("the last slot: %v", err)
	}
	opens(t, d, v, "one")
	if err := v.EraseSlot(1, true); err != nil {
		t.Fatal(err)
	}
	opensNot(t, d, "one")
}

func TestAllSlotsInUse(t *testing.T) {
	_, v := create(t, small, "0")
	for range Slots - 1 {
		if _, err := v.AddKey(t.Context(), AnySlot, []byte("x"), cheap, false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := v.AddKey(t.Context(), AnySlot, []byte("y"), cheap, false); !errors.Is(err, ErrNoSlot) {
		t.Errorf("ninth key: %v", err)
	}
	if _, err := v.ChangeKey(t.Context(), []byte("0"), []byte("y"), cheap); !errors.Is(err, ErrNoSlot) {
		t.Errorf("changing without a free slot: %v", err)
	}
}

// An erased slot leaves nothing of its key behind.
func TestErasedMaterialIsGone(t *testing.T) {
	d, v := create(t, small, "one")
	if _, err := v.AddKey(t.Context(), 1, []byte("two"), cheap, false); err != nil {
		t.Fatal(err)
	}
	s := v.h.Slots[1]
	old := bytes.Clone(d.now[s.KeyOffset*SectorSize:][:v.h.materialSize()])
	if err := v.EraseSlot(1, false); err != nil {
		t.Fatal(err)
	}
	now := d.durable[s.KeyOffset*SectorSize:][:v.h.materialSize()]
	for at := 0; at < len(old); at += 16 {
		if bytes.Equal(old[at:at+16], now[at:at+16]) {
			t.Fatalf("16 bytes at %d of the material are still there", at)
		}
	}
	if h, err := ReadHeader(d); err != nil || h.Slots[1].Iterations != 0 || h.Slots[1].Salt != [32]byte{} {
		t.Errorf("slot: %+v, %v", h.Slots[1], err)
	}
}

// slotChanges are the operations on slots, with the passphrases that must open the volume whenever power fails, and those
// that may.
var slotChanges = []struct {
	name      string
	must, may []string
	run       func(ctx context.Context, v *Volume) error
}{
	{"add", []string{"one", "two"}, []string{"new"}, func(ctx context.Context, v *Volume) error {
		_, err := v.AddKey(ctx, 6, []byte("new"), cheap, false)
		return err
	}},
	{"add by force", []string{"one"}, []string{"two", "new"}, func(ctx context.Context, v *Volume) error {
		_, err := v.AddKey(ctx, 1, []byte("new"), cheap, true)
		return err
	}},
	{"erase", []string{"one"}, []string{"two"}, func(ctx context.Context, v *Volume) error { return v.EraseSlot(1, false) }},
	{"change", []string{"one"}, []string{"two", "new"}, func(ctx context.Context, v *Volume) error {
		_, err := v.ChangeKey(ctx, []byte("two"), []byte("new"), cheap)
		return err
	}},
}

// checkSlots fails the test unless the header is valid, the passphrases that must open the volume do, and every active slot
// opens with one of all the passphrases: a slot that says active has its key.
func checkSlots(t *testing.T, what string, d *disk, must, may []string) {
	t.Helper()
	h, err := ReadHeader(d)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	v := &Volume{s: d, h: *h}
	open := 0
	for i, p := range append(slices.Clone(must), may...) {
		slots, err := v.SlotsOf(t.Context(), []byte(p))
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if slots == nil && i < len(must) {
			t.Fatalf("%s: %q does not open the volume", what, p)
		}
		open += len(slots)
	}
	if open != h.ActiveSlots() {
		t.Fatalf("%s: %d slots are active, but %d open", what, h.ActiveSlots(), open)
	}
}

func TestSlotChangesSurvivePowerCuts(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, c := range slotChanges {
		d, v := create(t, small, "one")
		if _, err := v.AddKey(t.Context(), 1, []byte("two"), cheap, false); err != nil {
			t.Fatal(err)
		}
		states := 0
		d.after = func() {
			for _, keep := range []func(int) bool{
				func(int) bool { return false },
				func(int) bool { return true },
				func(s int) bool { return s == 0 }, // the header's sectors, one without the other
				func(s int) bool { return s == 1 },
				func(s int) bool { return s <= 1 },
				func(s int) bool { return s > 1 },
				func(int) bool { return rnd.IntN(2) == 0 },
			} {
				states++
				checkSlots(t, c.name, d.crashed(keep), c.must, c.may)
			}
		}
		if err := c.run(t.Context(), v); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if states < 20 {
			t.Errorf("%s: only %d states", c.name, states)
		}
	}
}

func TestSlotChangesSurviveFailures(t *testing.T) {
	for _, c := range slotChanges {
		for fail := 1; ; fail++ {
			d, v := create(t, small, "one")
			if _, err := v.AddKey(t.Context(), 1, []byte("two"), cheap, false); err != nil {
				t.Fatal(err)
			}
			d.calls, d.fail = 0, fail
			err := c.run(t.Context(), v)
			if err == nil {
				break
			}
			if !errors.Is(err, errInjected) {
				t.Fatalf("%s: %v", c.name, err)
			}
			d.fail = 0
			checkSlots(t, c.name, d, c.must, c.may)
			if _, err := v.AddKey(t.Context(), AnySlot, []byte("next"), cheap, false); err != nil {
				t.Fatalf("%s: the next operation: %v", c.name, err)
			}
			opens(t, d, v, "next")
		}
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	d, v := create(t, small, "one")
	if !bytes.Equal(v.h.Encode(), d.now[:HeaderSize]) {
		t.Error("the header on the disk is another")
	}
	h, err := ParseHeader(d.now[:4096])
	if err != nil || *h != v.h {
		t.Errorf("parsed %+v, %v", h, err)
	}
}

func TestHostileHeaders(t *testing.T) {
	_, v := create(t, small, "one")
	good := v.h.Encode()
	u32 := func(off int, n uint32) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint32(b[off:], n) }
	}
	slot := func(i, off int, n uint32) func([]byte) { return u32(offSlots+i*slotSize+off, n) }
	for name, damage := range map[string]func([]byte){
		"magic":                 func(b []byte) { b[0]++ },
		"version":               func(b []byte) { b[7] = 2 },
		"cipher name":           func(b []byte) { copy(b[offCipherName:], strings.Repeat("a", 32)) },
		"cipher mode":           func(b []byte) { copy(b[offCipherMode:], strings.Repeat("a", 32)) },
		"mode without IV":       func(b []byte) { copy(b[offCipherMode:], "ecb\x00") },
		"hash":                  func(b []byte) { copy(b[offHash:], strings.Repeat("a", 32)) },
		"no key":                u32(offKeyBytes, 0),
		"large key":             u32(offKeyBytes, 65),
		"huge key":              u32(offKeyBytes, 1<<31),
		"payload in the header": u32(offPayload, 7),
		"payload over the keys": u32(offPayload, 8+8*128-1-3),
		"no digest iterations":  u32(offDigestIters, 0),
		"state":                 slot(3, 0, 1),
		"no iterations":         slot(0, slotOffIters, 0),
		"no stripes":            slot(7, slotOffStripes, 0),
		"more stripes":          slot(7, slotOffStripes, 4001),
		"most stripes":          slot(7, slotOffStripes, 1<<32-1),
		"key in the header":     slot(1, slotOffKeyOffset, 7),
		"key far away":          slot(1, slotOffKeyOffset, 1<<32-1),
		"same place":            slot(1, slotOffKeyOffset, 8),
		"overlap":               slot(1, slotOffKeyOffset, 8+124),
	} {
		b := bytes.Clone(good)
		damage(b)
		if h, err := ParseHeader(b); err == nil {
			t.Errorf("%s: accepted as %+v", name, h)
		}
	}
	if _, err := ParseHeader(good[:HeaderSize-1]); err == nil {
		t.Error("a short header is accepted")
	}
}

// A header must not be able to buy an hour of work.
func TestIterationLimits(t *testing.T) {
	for _, off := range []int{offDigestIters, offSlots + slotOffIters} {
		d, _ := create(t, small, "one")
		binary.BigEndian.PutUint32(d.now[off:], 1<<32-1)
		var bad *HeaderError
		if _, err := Open(t.Context(), d, []byte("one"), Limits{}); !errors.As(err, &bad) {
			t.Errorf("count at %d: %v", off, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Open(ctx, d, []byte("one"), Limits{MaxIterations: 1<<32 - 1}); !errors.Is(err, context.Canceled) {
			t.Errorf("count at %d, given up: %v", off, err)
		}
	}
}

func TestOpenRefusesWhatIsNotAvailable(t *testing.T) {
	for off, name := range map[int]string{offCipherName: "serpent\x00", offCipherMode: "pcbc-plain64\x00", offHash: "whirlpool\x00"} {
		d, _ := create(t, small, "one")
		copy(d.now[off:], name)
		var missing *UnavailableError
		if _, err := Open(t.Context(), d, []byte("one"), Limits{}); !errors.As(err, &missing) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A file that ends within the key material reads as zeroes there, which open nothing.
func TestTruncatedMaterial(t *testing.T) {
	d, _ := create(t, small, "one")
	d.now = d.now[:5000]
	opensNot(t, d, "one")
}

func FuzzHeader(f *testing.F) {
	h, err := small.withDefaults().header()
	if err != nil {
		f.Fatal(err)
	}
	h.DigestIterations = 1
	f.Add(h.Encode())
	x, err := CreateOptions{}.withDefaults().header()
	if err != nil {
		f.Fatal(err)
	}
	x.DigestIterations, x.Slots[2].Active, x.Slots[2].Iterations, x.UUID = 5, true, 7, hex.EncodeToString(make([]byte, 20))
	f.Add(x.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		again, err := ParseHeader(h.Encode())
		if err != nil || *again != *h {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
		// What an accepted header makes a reader do is bounded, whatever is in it.
		v := &Volume{s: newDisk(0), h: *h, limits: Limits{MaxIterations: 2000}}
		if h.materialSize() > maxKeyBytes*Stripes {
			t.Fatalf("key material of %d bytes", h.materialSize())
		}
		if v.check() != nil {
			return
		}
		if slots, err := v.SlotsOf(t.Context(), []byte("p")); err == nil && slots != nil {
			t.Fatalf("slots %v of nothing open", slots)
		}
	})
}
