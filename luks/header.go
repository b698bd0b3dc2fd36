package luks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// The layout of a LUKS1 header. All numbers are big-endian.
const (
	// HeaderSize is the length of the header itself; key material follows at offsets it names.
	HeaderSize = 592
	// SectorSize is the unit of encryption and of all offsets in the header.
	SectorSize = 512
	// Slots is the number of key slots.
	Slots = 8
	// Stripes is how many times the length of the key each slot's material has. The format leaves it open; QEMU writes
	// and accepts this only.
	Stripes = 4000

	version     = 1
	digestSize  = 20
	saltSize    = 32
	uuidSize    = 40
	nameSize    = 32
	maxKeyBytes = 64
	// areaAlign is what the header and each slot's material are padded to, areaSectors the same in sectors.
	areaAlign   = 4096
	areaSectors = areaAlign / SectorSize

	offCipherName    = 8
	offCipherMode    = 40
	offHash          = 72
	offPayload       = 104
	offKeyBytes      = 108
	offDigest        = 112
	offDigestSalt    = 132
	offDigestIters   = 164
	offUUID          = 168
	offSlots         = 208
	slotSize         = 48
	slotOffIters     = 4
	slotOffSalt      = 8
	slotOffKeyOffset = 40
	slotOffStripes   = 44

	slotEnabled  = 0x00AC71F3
	slotDisabled = 0x0000DEAD
)

var magic = []byte("LUKS\xba\xbe")

// ErrNotLUKS is returned for what does not begin as a LUKS header.
var ErrNotLUKS = errors.New("Volume is not in LUKS format")

// A HeaderError is a header that cannot be used as it is, in QEMU's words.
type HeaderError struct{ Reason string }

func (e *HeaderError) Error() string { return e.Reason }

func headerErrorf(format string, args ...any) error {
	return &HeaderError{fmt.Sprintf(format, args...)}
}

// Header is a LUKS1 header. Offsets are from the header's own first byte.
type Header struct {
	CipherName    string // "aes"
	CipherMode    string // mode, IV generator and its hash as one text: "xts-plain64", "cbc-essiv:sha256"
	Hash          string // of key derivation, key splitting and the digest: "sha256"
	PayloadOffset uint32 // in sectors: where header and key material end
	KeyBytes      uint32 // length of the master key

	Digest           [digestSize]byte // of the master key
	DigestSalt       [saltSize]byte
	DigestIterations uint32

	UUID  string
	Slots [Slots]Slot
}

// Slot is a place for the master key, wrapped with a passphrase.
type Slot struct {
	Active     bool
	Iterations uint32
	Salt       [saltSize]byte
	KeyOffset  uint32 // in sectors: where the wrapped key lies
	Stripes    uint32
}

// ParseHeader decodes and validates a header. b may be longer than HeaderSize.
func ParseHeader(b []byte) (*Header, error) {
	if len(b) < HeaderSize || !bytes.HasPrefix(b, magic) {
		return nil, ErrNotLUKS
	}
	if v := binary.BigEndian.Uint16(b[len(magic):]); v != version {
		return nil, headerErrorf("LUKS version %d is not supported", v)
	}
	h := &Header{
		PayloadOffset:    binary.BigEndian.Uint32(b[offPayload:]),
		KeyBytes:         binary.BigEndian.Uint32(b[offKeyBytes:]),
		Digest:           [digestSize]byte(b[offDigest:]),
		DigestSalt:       [saltSize]byte(b[offDigestSalt:]),
		DigestIterations: binary.BigEndian.Uint32(b[offDigestIters:]),
	}
	h.UUID, _ = text(b[offUUID : offUUID+uuidSize])
	for _, f := range []struct {
		to   *string
		off  int
		what string
	}{{&h.CipherName, offCipherName, "name"}, {&h.CipherMode, offCipherMode, "mode"}, {&h.Hash, offHash, "hash spec"}} {
		s, ok := text(b[f.off : f.off+nameSize])
		if !ok {
			return nil, headerErrorf("LUKS header cipher %s is not NUL terminated", f.what)
		}
		*f.to = s
	}
	for i := range h.Slots {
		if err := h.parseSlot(i, b[offSlots+i*slotSize:]); err != nil {
			return nil, err
		}
	}
	return h, h.Validate()
}

// text returns a NUL-terminated string, and whether it is terminated.
func text(b []byte) (string, bool) {
	s, _, ok := bytes.Cut(b, []byte{0})
	return string(s), ok
}

func (h *Header) parseSlot(i int, b []byte) error {
	s := &h.Slots[i]
	state := binary.BigEndian.Uint32(b)
	if state != slotEnabled && state != slotDisabled {
		return headerErrorf("Keyslot %d state (active/disable) is corrupted", i)
	}
	*s = Slot{
		Active:     state == slotEnabled,
		Iterations: binary.BigEndian.Uint32(b[slotOffIters:]),
		Salt:       [saltSize]byte(b[slotOffSalt:]),
		KeyOffset:  binary.BigEndian.Uint32(b[slotOffKeyOffset:]),
		Stripes:    binary.BigEndian.Uint32(b[slotOffStripes:]),
	}
	return nil
}

// Validate returns why the header's fields do not fit together. It does not ask whether its algorithms are available.
func (h *Header) Validate() error {
	if h.KeyBytes == 0 || h.KeyBytes > maxKeyBytes {
		return headerErrorf("LUKS header key length %d is not between 1 and %d bytes", h.KeyBytes, maxKeyBytes)
	}
	if h.PayloadOffset < areaSectors {
		return headerErrorf("LUKS payload is overlapping with the header")
	}
	if h.DigestIterations == 0 {
		return headerErrorf("LUKS key iteration count is zero")
	}
	if !strings.Contains(h.CipherMode, "-") {
		return headerErrorf("Unexpected cipher mode string format '%s'", printable(h.CipherMode))
	}
	for i := range h.Slots {
		if err := h.validateSlot(i); err != nil {
			return err
		}
	}
	return nil
}

func (h *Header) validateSlot(i int) error {
	s := &h.Slots[i]
	start, n := uint64(s.KeyOffset), h.materialSectors()
	switch {
	case s.Stripes != Stripes:
		return headerErrorf("Keyslot %d is corrupted (stripes %d != %d)", i, s.Stripes, Stripes)
	case start < areaSectors:
		return headerErrorf("Keyslot %d is overlapping the LUKS header", i)
	case s.Active && s.Iterations == 0:
		return headerErrorf("Keyslot %d iteration count is zero", i)
	case start+n > uint64(h.PayloadOffset):
		return headerErrorf("Keyslot %d is overlapping with the encrypted payload", i)
	}
	for j := range i {
		other := uint64(h.Slots[j].KeyOffset)
		if start < other+n && other < start+n {
			return headerErrorf("Keyslots %d and %d are overlapping in the header", j, i)
		}
	}
	return nil
}

// materialSize is the length of a slot's wrapped key; materialSectors that of the sectors that hold it.
func (h *Header) materialSize() int { return int(h.KeyBytes) * Stripes }
func (h *Header) materialSectors() uint64 {
	return (uint64(h.materialSize()) + SectorSize - 1) / SectorSize
}

// areaOf returns how many sectors a slot with a key of that length is given.
func areaOf(keyBytes int) uint32 {
	sectors := (uint32(keyBytes)*Stripes + SectorSize - 1) / SectorSize
	return (sectors + areaSectors - 1) / areaSectors * areaSectors
}

// Encode returns the header's bytes.
func (h *Header) Encode() []byte {
	b := make([]byte, HeaderSize)
	copy(b, magic)
	binary.BigEndian.PutUint16(b[len(magic):], version)
	copy(b[offCipherName:offCipherName+nameSize], h.CipherName)
	copy(b[offCipherMode:offCipherMode+nameSize], h.CipherMode)
	copy(b[offHash:offHash+nameSize], h.Hash)
	binary.BigEndian.PutUint32(b[offPayload:], h.PayloadOffset)
	binary.BigEndian.PutUint32(b[offKeyBytes:], h.KeyBytes)
	copy(b[offDigest:], h.Digest[:])
	copy(b[offDigestSalt:], h.DigestSalt[:])
	binary.BigEndian.PutUint32(b[offDigestIters:], h.DigestIterations)
	copy(b[offUUID:offUUID+uuidSize], h.UUID)
	for i := range h.Slots {
		s := h.Slots[i].encode()
		copy(b[offSlots+i*slotSize:], s[:])
	}
	return b
}

func (s *Slot) encode() [slotSize]byte {
	var b [slotSize]byte
	binary.BigEndian.PutUint32(b[:], slotState(s.Active))
	binary.BigEndian.PutUint32(b[slotOffIters:], s.Iterations)
	copy(b[slotOffSalt:], s.Salt[:])
	binary.BigEndian.PutUint32(b[slotOffKeyOffset:], s.KeyOffset)
	binary.BigEndian.PutUint32(b[slotOffStripes:], s.Stripes)
	return b
}

func slotState(active bool) uint32 {
	if active {
		return slotEnabled
	}
	return slotDisabled
}

// Spec returns how sectors are encrypted.
func (h *Header) Spec() Spec {
	s := Spec{Cipher: h.CipherName}
	mode, iv, _ := strings.Cut(h.CipherMode, "-")
	s.Mode = mode
	s.IVGen, s.IVHash, _ = strings.Cut(iv, ":")
	return s
}

// CipherAlg returns the cipher's name with the length of its key, as QEMU names it: "aes-256".
func (h *Header) CipherAlg() string {
	bits := h.KeyBytes * 8
	if h.Spec().Mode == modeXTS {
		bits /= 2 // it has two keys
	}
	return fmt.Sprintf("%s-%d", h.CipherName, bits)
}

// ActiveSlots returns how many slots hold a key.
func (h *Header) ActiveSlots() int {
	n := 0
	for i := range h.Slots {
		if h.Slots[i].Active {
			n++
		}
	}
	return n
}

// printable makes bytes of an image's making fit for a message.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
