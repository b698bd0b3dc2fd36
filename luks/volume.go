package luks

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// Storage is where a LUKS header and its key material lie, from the header's first byte on.
type Storage interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

var (
	// ErrWrongKey is returned when no slot opens with the passphrase.
	ErrWrongKey = errors.New("Invalid password, cannot unlock any keyslot") //lint:ignore ST1005 QEMU's words
	// ErrLastSlot is returned, unless forced, when no way to open the volume would be left.
	ErrLastSlot = errors.New("erasing the last active key slot would make the volume's data unreadable for good")
	// ErrSlotActive is returned, unless forced, when a key would take the place of another.
	ErrSlotActive = errors.New("key slot is in use; erase it first")
	// ErrSlotInactive is returned when there is no key to erase.
	ErrSlotInactive = errors.New("key slot is not in use")
	// ErrNoSlot is returned when all slots are in use, and for a slot number that does not exist.
	ErrNoSlot = errors.New("no such key slot is free")
)

// Default ways to encrypt, which are QEMU's.
const (
	DefaultIterTime = 2 * time.Second
	// DefaultMaxIterations is ten times what QEMU asks for in its default time on a fast processor.
	DefaultMaxIterations = 1 << 27
)

// Limits bound what a header may cost. Memory needs none: every length in a header is bounded by the format.
type Limits struct {
	// MaxIterations is the largest iteration count that is worked through, 0 means DefaultMaxIterations. All work ends
	// early when its context does.
	MaxIterations uint32
}

func (l Limits) check(what string, n uint32) error {
	most := l.MaxIterations
	if most == 0 {
		most = DefaultMaxIterations
	}
	if n > most {
		return headerErrorf("%s wants %d iterations, more than the limit of %d", what, n, most)
	}
	return nil
}

// Cost says how much work it shall take to try a passphrase.
type Cost struct {
	// IterTime is the time on this machine; 0 means DefaultIterTime.
	IterTime time.Duration
	// Iterations, if not 0, is the count in place of a time. Fewer than 1000 are taken as 1000.
	Iterations uint32
}

func (c Cost) iterations(ctx context.Context, hash string, n int) (uint32, error) {
	if c.Iterations != 0 {
		return max(c.Iterations, minIterations), nil
	}
	d := c.IterTime
	if d == 0 {
		d = DefaultIterTime
	}
	newHash, err := lookupHash(hash)
	if err != nil {
		return 0, err
	}
	return iterationsFor(ctx, newHash, n, d)
}

// CreateOptions say how a volume is encrypted. Empty fields mean QEMU's defaults: aes-256, xts, plain64, sha256, and
// sha256 for the vectors of essiv.
type CreateOptions struct {
	Cipher  string // "aes"
	KeyBits int    // 256: of one key, also for xts
	Mode    string
	IVGen   string
	IVHash  string
	Hash    string
	Cost    Cost
}

func (o CreateOptions) withDefaults() CreateOptions {
	for _, f := range []struct {
		to  *string
		def string
	}{{&o.Cipher, aesName}, {&o.Mode, modeXTS}, {&o.IVGen, ivPlain64}, {&o.Hash, "sha256"}} {
		if *f.to == "" {
			*f.to = f.def
		}
	}
	if o.KeyBits == 0 {
		o.KeyBits = 256
	}
	if o.IVGen == ivESSIV && o.IVHash == "" {
		o.IVHash = "sha256"
	}
	return o
}

// header returns the header of a new volume, without keys.
func (o CreateOptions) header() (*Header, error) {
	if o.KeyBits <= 0 || o.KeyBits%8 != 0 || o.KeyBits > maxKeyBytes*8/2 {
		return nil, headerErrorf("Algorithm '%s' with key size %d bytes not supported", printable(o.Cipher), o.KeyBits/8)
	}
	keyBytes := o.KeyBits / 8
	if o.Mode == modeXTS {
		keyBytes *= 2
	}
	h := &Header{CipherName: o.Cipher, CipherMode: o.Mode + "-" + o.IVGen, Hash: o.Hash, KeyBytes: uint32(keyBytes)}
	if o.IVHash != "" {
		h.CipherMode += ":" + o.IVHash
	}
	for _, s := range []string{h.CipherName, h.CipherMode, h.Hash} {
		if len(s) >= nameSize {
			return nil, headerErrorf("'%s' does not fit into a LUKS header", printable(s))
		}
	}
	area := areaOf(keyBytes)
	for i := range h.Slots {
		h.Slots[i] = Slot{KeyOffset: areaSectors + uint32(i)*area, Stripes: Stripes}
	}
	h.PayloadOffset = areaSectors + Slots*area
	return h, nil
}

// Check returns why a volume cannot be created with these options.
func (o CreateOptions) Check() error {
	o = o.withDefaults()
	h, err := o.header()
	if err != nil {
		return err
	}
	if _, err := lookupHash(o.Hash); err != nil {
		return err
	}
	_, err = NewSectorCipher(h.Spec(), make([]byte, h.KeyBytes))
	return err
}

// Length returns how many bytes header and key material take.
func (o CreateOptions) Length() (int64, error) {
	h, err := o.withDefaults().header()
	if err != nil {
		return 0, err
	}
	return int64(h.PayloadOffset) * SectorSize, nil
}

// Volume is an unlocked volume. Its Cipher is safe for concurrent use, everything else is not.
type Volume struct {
	s      Storage
	h      Header
	key    []byte // the master key
	cipher SectorCipher
	limits Limits
}

// Create makes a volume with a new master key, wrapped with the passphrase in slot 0. The storage must read as zeroes.
func Create(ctx context.Context, s Storage, passphrase []byte, o CreateOptions) (*Volume, error) {
	o = o.withDefaults()
	h, err := o.header()
	if err != nil {
		return nil, err
	}
	v := &Volume{s: s, h: *h, key: make([]byte, h.KeyBytes), limits: Limits{MaxIterations: 1<<32 - 1}}
	if _, err := rand.Read(v.key); err != nil {
		return nil, fmt.Errorf("making a master key: %w", err)
	}
	if v.cipher, err = NewSectorCipher(h.Spec(), v.key); err != nil {
		return nil, err
	}
	if v.h.UUID, err = newUUID(); err != nil {
		return nil, err
	}
	if err := v.setDigest(ctx, o.Cost); err != nil {
		return nil, err
	}
	w, err := v.Wrap(ctx, passphrase, o.Cost)
	if err != nil {
		return nil, err
	}
	w.slot.KeyOffset = v.h.Slots[0].KeyOffset
	v.h.Slots[0] = w.slot
	if err := v.writeMaterial(w.slot, w.material); err != nil {
		return nil, err
	}
	if _, err := s.WriteAt(v.h.Encode(), 0); err != nil {
		return nil, fmt.Errorf("writing LUKS header: %w", err)
	}
	return v, v.sync()
}

func newUUID() (string, error) {
	var u [16]byte
	if _, err := rand.Read(u[:]); err != nil {
		return "", fmt.Errorf("making a UUID: %w", err)
	}
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80 // version 4: random
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]), nil
}

// setDigest makes the digest of the master key, at an eighth of the cost of a slot: it protects a random key.
func (v *Volume) setDigest(ctx context.Context, c Cost) error {
	n, err := c.iterations(ctx, v.h.Hash, digestSize)
	if err != nil {
		return err
	}
	v.h.DigestIterations = max(n/8, minIterations)
	if _, err := rand.Read(v.h.DigestSalt[:]); err != nil {
		return fmt.Errorf("making a salt: %w", err)
	}
	digest, err := v.h.digest(ctx, v.key)
	copy(v.h.Digest[:], digest)
	return err
}

func (h *Header) digest(ctx context.Context, key []byte) ([]byte, error) {
	newHash, err := lookupHash(h.Hash)
	if err != nil {
		return nil, err
	}
	return deriveKey(ctx, newHash, key, h.DigestSalt[:], h.DigestIterations, digestSize)
}

// ReadHeader reads and validates the header of a volume.
func ReadHeader(r io.ReaderAt) (*Header, error) {
	b := make([]byte, HeaderSize)
	if err := readFull(r, b, 0); err != nil {
		return nil, fmt.Errorf("reading LUKS header: %w", err)
	}
	return ParseHeader(b)
}

// readFull reads all of b; bytes behind the end are zeroes, as in the last cluster of an image.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if err == io.EOF {
		err = nil
	}
	clear(b[n:])
	return err
}

// Open unlocks a volume with a passphrase. It is ErrWrongKey when no slot has the passphrase.
func Open(ctx context.Context, s Storage, passphrase []byte, limits Limits) (*Volume, error) {
	h, err := ReadHeader(s)
	if err != nil {
		return nil, err
	}
	v := &Volume{s: s, h: *h, limits: limits}
	if err := v.check(); err != nil {
		return nil, err
	}
	for i := range v.h.Slots {
		key, err := v.unwrap(ctx, i, passphrase)
		if err != nil {
			return nil, err
		}
		if key == nil {
			continue
		}
		v.key = key
		v.cipher, err = NewSectorCipher(h.Spec(), key)
		return v, err
	}
	return nil, ErrWrongKey
}

// check refuses what is not available before the costly work.
func (v *Volume) check() error {
	if _, err := NewSectorCipher(v.h.Spec(), make([]byte, v.h.KeyBytes)); err != nil {
		return err
	}
	if _, err := lookupHash(v.h.Hash); err != nil {
		return err
	}
	return v.limits.check("LUKS header", v.h.DigestIterations)
}

// Header returns the volume's header.
func (v *Volume) Header() Header { return v.h }

// SetStorage has the volume use another way to the same header and key material.
func (v *Volume) SetStorage(s Storage) { v.s = s }

// Cipher returns what encrypts the volume's sectors.
func (v *Volume) Cipher() SectorCipher { return v.cipher }

// unwrap returns the master key in a slot, nil when the slot is not active or the passphrase is not its.
func (v *Volume) unwrap(ctx context.Context, i int, passphrase []byte) ([]byte, error) {
	s := v.h.Slots[i]
	if !s.Active {
		return nil, nil
	}
	if err := v.limits.check(fmt.Sprintf("key slot %d", i), s.Iterations); err != nil {
		return nil, err
	}
	material := make([]byte, v.h.materialSectors()*SectorSize)
	defer clear(material)
	if err := readFull(v.s, material[:v.h.materialSize()], int64(s.KeyOffset)*SectorSize); err != nil {
		return nil, fmt.Errorf("reading key slot %d: %w", i, err)
	}
	c, newHash, err := v.slotCipher(ctx, s, passphrase)
	if err != nil {
		return nil, err
	}
	c.DecryptSectors(material, material, 0)
	key := merge(newHash, material[:v.h.materialSize()], int(v.h.KeyBytes))
	digest, err := v.h.digest(ctx, key)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(digest, v.h.Digest[:]) {
		return nil, nil
	}
	return key, nil
}

// slotCipher returns the cipher that wraps a slot's key with a passphrase.
func (v *Volume) slotCipher(ctx context.Context, s Slot, passphrase []byte) (SectorCipher, hashMaker, error) {
	newHash, err := lookupHash(v.h.Hash)
	if err != nil {
		return nil, nil, err
	}
	key, err := deriveKey(ctx, newHash, passphrase, s.Salt[:], s.Iterations, int(v.h.KeyBytes))
	if err != nil {
		return nil, nil, err
	}
	defer clear(key)
	c, err := NewSectorCipher(v.h.Spec(), key)
	return c, newHash, err
}

// WrappedKey is the master key wrapped with a passphrase, for a slot to be chosen.
type WrappedKey struct {
	slot     Slot
	material []byte
}

// Wrap wraps the master key with a passphrase. It is the costly half of AddKey and writes nothing.
func (v *Volume) Wrap(ctx context.Context, passphrase []byte, c Cost) (*WrappedKey, error) {
	w := &WrappedKey{slot: Slot{Active: true, Stripes: Stripes}}
	var err error
	if w.slot.Iterations, err = c.iterations(ctx, v.h.Hash, int(v.h.KeyBytes)); err != nil {
		return nil, err
	}
	if _, err := rand.Read(w.slot.Salt[:]); err != nil {
		return nil, fmt.Errorf("making a salt: %w", err)
	}
	sc, newHash, err := v.slotCipher(ctx, w.slot, passphrase)
	if err != nil {
		return nil, err
	}
	stripes, err := split(newHash, v.key, Stripes)
	if err != nil {
		return nil, fmt.Errorf("splitting the master key: %w", err)
	}
	// A key of 24 bytes leaves the last sector in part: its rest is not stored, and no mode needs it to decrypt.
	material := make([]byte, v.h.materialSectors()*SectorSize)
	copy(material, stripes)
	clear(stripes)
	sc.EncryptSectors(material, material, 0)
	w.material = material[:v.h.materialSize()]
	return w, nil
}

func (v *Volume) writeMaterial(s Slot, material []byte) error {
	if _, err := v.s.WriteAt(material, int64(s.KeyOffset)*SectorSize); err != nil {
		return fmt.Errorf("writing key material: %w", err)
	}
	return nil
}

func (v *Volume) sync() error {
	if err := v.s.Sync(); err != nil {
		return fmt.Errorf("syncing key slots: %w", err)
	}
	return nil
}

// AnySlot stands for the first slot that is free.
const AnySlot = -1

// AddKey wraps the master key with another passphrase, in the given slot or AnySlot, and returns which one it was. A slot
// in use is overwritten only with force.
func (v *Volume) AddKey(ctx context.Context, slot int, passphrase []byte, c Cost, force bool) (int, error) {
	if _, err := v.freeSlot(slot, force); err != nil {
		return 0, err // before the work
	}
	w, err := v.Wrap(ctx, passphrase, c)
	if err != nil {
		return 0, err
	}
	return v.StoreKey(slot, w, force)
}

// StoreKey is the other half of AddKey.
//
// The new material is durable before the slot's state says active, and so are salt and count: those of one slot lie in two
// sectors, which a power cut may tear.
func (v *Volume) StoreKey(slot int, w *WrappedKey, force bool) (int, error) {
	slot, err := v.freeSlot(slot, force)
	if err != nil {
		return 0, err
	}
	// Also a slot that is not in use: an operation that failed may have left another state on the disk than in memory.
	if err := v.setState(slot, false); err != nil {
		return 0, err
	}
	s := w.slot
	s.KeyOffset, s.Active = v.h.Slots[slot].KeyOffset, false
	if err := v.writeMaterial(s, w.material); err != nil {
		return 0, err
	}
	if err := v.writeSlot(slot, s); err != nil {
		return 0, err
	}
	return slot, v.setState(slot, true)
}

func (v *Volume) freeSlot(slot int, force bool) (int, error) {
	if slot == AnySlot {
		for i := range v.h.Slots {
			if !v.h.Slots[i].Active {
				return i, nil
			}
		}
		return 0, ErrNoSlot
	}
	if slot < 0 || slot >= Slots {
		return 0, fmt.Errorf("key slot %d: %w", slot, ErrNoSlot)
	}
	if v.h.Slots[slot].Active && !force {
		return 0, fmt.Errorf("key slot %d: %w", slot, ErrSlotActive)
	}
	return slot, nil
}

// setState makes a slot active or not, durably: one word, which no power cut tears.
func (v *Volume) setState(slot int, active bool) error {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], slotState(active))
	if _, err := v.s.WriteAt(b[:], int64(offSlots+slot*slotSize)); err != nil {
		return fmt.Errorf("writing state of key slot %d: %w", slot, err)
	}
	if err := v.sync(); err != nil {
		return err
	}
	v.h.Slots[slot].Active = active
	return nil
}

// writeSlot writes a slot that is not active, durably.
func (v *Volume) writeSlot(slot int, s Slot) error {
	b := s.encode()
	if _, err := v.s.WriteAt(b[:], int64(offSlots+slot*slotSize)); err != nil {
		return fmt.Errorf("writing key slot %d: %w", slot, err)
	}
	if err := v.sync(); err != nil {
		return err
	}
	v.h.Slots[slot] = s
	return nil
}

// EraseSlot makes a slot's key unusable and wipes its material. The last active slot is erased only with force; the data
// is then lost, though this Volume still reads it.
//
// The slot is inactive, durably, before its material goes: no active slot is ever without its key.
func (v *Volume) EraseSlot(slot int, force bool) error {
	if slot < 0 || slot >= Slots {
		return fmt.Errorf("key slot %d: %w", slot, ErrNoSlot)
	}
	active := v.h.Slots[slot].Active
	switch {
	case !active && !force:
		return fmt.Errorf("key slot %d: %w", slot, ErrSlotInactive)
	case active && v.h.ActiveSlots() == 1 && !force:
		return fmt.Errorf("key slot %d: %w", slot, ErrLastSlot)
	}
	if err := v.setState(slot, false); err != nil {
		return err
	}
	return v.wipe(slot)
}

// wipe overwrites what an inactive slot was.
func (v *Volume) wipe(slot int) error {
	s := v.h.Slots[slot]
	material := make([]byte, v.h.materialSize())
	if _, err := rand.Read(material); err != nil {
		return fmt.Errorf("wiping key slot %d: %w", slot, err)
	}
	if err := v.writeMaterial(s, material); err != nil {
		return err
	}
	s.Iterations, s.Salt = 0, [saltSize]byte{}
	return v.writeSlot(slot, s)
}

// SlotsOf returns the active slots that a passphrase opens.
func (v *Volume) SlotsOf(ctx context.Context, passphrase []byte) ([]int, error) {
	var slots []int
	for i := range v.h.Slots {
		key, err := v.unwrap(ctx, i, passphrase)
		if err != nil {
			return nil, err
		}
		if key != nil {
			clear(key)
			slots = append(slots, i)
		}
	}
	return slots, nil
}

// EraseKey erases every slot that a passphrase opens and returns which ones. It is ErrWrongKey when there is none. All
// that are active are erased only with force.
func (v *Volume) EraseKey(ctx context.Context, passphrase []byte, force bool) ([]int, error) {
	slots, err := v.SlotsOf(ctx, passphrase)
	if err != nil {
		return nil, err
	}
	if slots == nil {
		return nil, ErrWrongKey
	}
	return slots, v.EraseSlots(slots, force)
}

// EraseSlots erases several slots. All that are active are erased only with force.
func (v *Volume) EraseSlots(slots []int, force bool) error {
	if len(slots) >= v.h.ActiveSlots() && !force {
		return ErrLastSlot
	}
	for _, slot := range slots {
		if err := v.EraseSlot(slot, force); err != nil {
			return err
		}
	}
	return nil
}

// ChangeKey replaces a passphrase: the new one is in a free slot before those of the old one are erased. It returns the
// new slot.
func (v *Volume) ChangeKey(ctx context.Context, old, passphrase []byte, c Cost) (int, error) {
	slots, err := v.SlotsOf(ctx, old)
	if err != nil {
		return 0, err
	}
	if slots == nil {
		return 0, ErrWrongKey
	}
	slot, err := v.AddKey(ctx, AnySlot, passphrase, c, false)
	if err != nil {
		return 0, err
	}
	return slot, v.EraseSlots(slots, false)
}
