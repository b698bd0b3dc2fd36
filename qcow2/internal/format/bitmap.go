package format

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// BitmapFlags are the flags of a bitmap directory entry.
type BitmapFlags uint32

// The flags of a bitmap.
const (
	// BitmapInUse: a writer had the bitmap in memory and did not store it since; its content means nothing.
	BitmapInUse BitmapFlags = 1 << iota
	// BitmapAuto: the bitmap is enabled: every write to the disk must be recorded in it.
	BitmapAuto
	// BitmapExtraCompatible: whoever does not know the extra data may use the bitmap all the same.
	BitmapExtraCompatible

	bitmapKnownFlags = BitmapInUse | BitmapAuto // as QEMU has it, which refuses the third
)

// bitmapTypeDirty is the only type of bitmap that exists: dirty tracking.
const bitmapTypeDirty = 1

const bitmapEntrySize = 24

// ErrBitmapDirectory is wrapped by the errors of a bitmap directory that cannot be understood.
var ErrBitmapDirectory = errors.New("broken bitmap directory")

// Bitmap is one entry of the bitmap directory.
type Bitmap struct {
	TableOffset     HostOff
	TableSize       uint32 // entries
	Flags           BitmapFlags
	GranularityBits uint8
	Name            string
}

// Granularity returns how many guest bytes one bit stands for.
func (m *Bitmap) Granularity() int64 { return 1 << m.GranularityBits }

// bitmapFlagsAt is where in a directory entry the flags are: an aligned field, which a power cut leaves old or new.
const bitmapFlagsAt = 12

// EntrySize returns how many bytes of the directory the entry takes.
func (m *Bitmap) EntrySize() int64 { return roundUp8(bitmapEntrySize + int64(len(m.Name))) }

// FlagsField returns where in a directory entry its flags are, and what they look like there.
func (m *Bitmap) FlagsField(flags BitmapFlags) (off int64, b [4]byte) {
	return bitmapFlagsAt, EncodeUint32(uint32(flags))
}

// BitmapDataSize returns how many bytes the bits of a bitmap take: one bit for each granule of the disk, in whole bytes.
func BitmapDataSize(diskSize int64, granularityBits uint8) int64 {
	if diskSize <= 0 {
		return 0
	}
	bits := (diskSize-1)>>granularityBits + 1
	return (bits-1)/8 + 1
}

// BitmapTableEntries returns how many entries the bitmap's table needs for a disk: one for each cluster of bits.
func (l Layout) BitmapTableEntries(diskSize int64, granularityBits uint8) int64 {
	return l.ClustersFor(BitmapDataSize(diskSize, granularityBits))
}

// ParseBitmapDirectory decodes the bitmap directory, whose place and length h.Bitmaps gives. It refuses what QEMU
// refuses; errors wrap ErrBitmapDirectory.
func ParseBitmapDirectory(b []byte, h *Header) ([]Bitmap, error) {
	if h.Bitmaps == nil {
		return nil, fmt.Errorf("%w: the image has no bitmaps", ErrBitmapDirectory)
	}
	if len(b) == 0 || len(b) > MaxBitmapDirectory {
		return nil, fmt.Errorf("%w: it is %d bytes long", ErrBitmapDirectory, len(b))
	}
	count := int(h.Bitmaps.Count)
	list := make([]Bitmap, 0, min(count, len(b)/bitmapEntrySize))
	seen := make(map[string]bool, cap(list))
	for len(b) > 0 {
		if len(list) == count {
			return nil, fmt.Errorf("%w: More bitmaps found than specified in header extension", ErrBitmapDirectory)
		}
		m, size, err := parseBitmap(b, h)
		if err != nil {
			return nil, fmt.Errorf("%w: entry %d: %w", ErrBitmapDirectory, len(list), err)
		}
		if seen[m.Name] {
			return nil, fmt.Errorf("%w: Bitmap already exists: %.64q", ErrBitmapDirectory, m.Name)
		}
		seen[m.Name] = true
		list, b = append(list, m), b[size:]
	}
	if len(list) != count {
		return nil, fmt.Errorf("%w: Less bitmaps found than specified in header extension", ErrBitmapDirectory)
	}
	return list, nil
}

// parseBitmap decodes the entry at the beginning of b and returns its length with padding.
func parseBitmap(b []byte, h *Header) (Bitmap, int, error) {
	if len(b) < bitmapEntrySize {
		return Bitmap{}, 0, errors.New("it is cut off")
	}
	m := Bitmap{
		TableOffset:     HostOff(binary.BigEndian.Uint64(b)),
		TableSize:       binary.BigEndian.Uint32(b[8:]),
		Flags:           BitmapFlags(binary.BigEndian.Uint32(b[12:])),
		GranularityBits: b[17],
	}
	nameSize, extraSize := uint64(binary.BigEndian.Uint16(b[18:])), uint64(binary.BigEndian.Uint32(b[20:]))
	size := (bitmapEntrySize + extraSize + nameSize + 7) &^ 7
	if size > uint64(len(b)) {
		return Bitmap{}, 0, errors.New("it is cut off")
	}
	if extraSize != 0 {
		return Bitmap{}, 0, codecError("Bitmap extra data is not supported")
	}
	m.Name = string(b[bitmapEntrySize:][:nameSize])
	if b[16] != bitmapTypeDirty {
		return Bitmap{}, 0, fmt.Errorf("bitmap %.64q is of type %d", m.Name, b[16])
	}
	if err := m.validate(h.Layout(), h.DiskSize()); err != nil {
		return Bitmap{}, 0, err
	}
	return m, int(size), nil
}

// validate checks an entry against the limits and against the disk it is for.
func (m *Bitmap) validate(l Layout, diskSize int64) error {
	tableBytes := uint64(m.TableSize) << l.ClusterBits
	switch {
	case m.TableSize == 0 || m.TableSize > MaxBitmapTable || tableBytes > MaxBitmapBytes:
		return fmt.Errorf("bitmap %.64q has a table of %d entries", m.Name, m.TableSize)
	case m.TableOffset == 0 || !l.Aligned(m.TableOffset):
		return fmt.Errorf("bitmap %.64q has its table at %#x", m.Name, m.TableOffset)
	case m.GranularityBits < MinBitmapGranularityBits || m.GranularityBits > MaxBitmapGranularityBits:
		return fmt.Errorf("bitmap %.64q has a granularity of 1<<%d bytes", m.Name, m.GranularityBits)
	case m.Flags&^bitmapKnownFlags != 0:
		return fmt.Errorf("bitmap %.64q has flags %#x", m.Name, uint32(m.Flags))
	case m.Name == "" || len(m.Name) > MaxBitmapName:
		return fmt.Errorf("bitmap name of %d bytes", len(m.Name))
	case m.Flags&BitmapInUse == 0 && uint64(BitmapDataSize(diskSize, m.GranularityBits)) > tableBytes:
		return fmt.Errorf("bitmap %.64q is too short for the disk", m.Name)
	}
	return nil
}

// MarshalBitmapDirectory encodes a bitmap directory for an image with h's geometry and disk size.
func MarshalBitmapDirectory(list []Bitmap, h *Header) ([]byte, error) {
	if len(list) == 0 || len(list) > MaxBitmaps {
		return nil, fmt.Errorf("%w: %d bitmaps", ErrBitmapDirectory, len(list))
	}
	var b []byte
	be := binary.BigEndian
	for i := range list {
		m := &list[i]
		if err := m.validate(h.Layout(), h.DiskSize()); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrBitmapDirectory, err)
		}
		b = be.AppendUint64(b, uint64(m.TableOffset))
		b = be.AppendUint32(b, m.TableSize)
		b = be.AppendUint32(b, uint32(m.Flags))
		b = append(b, bitmapTypeDirty, m.GranularityBits)
		b = be.AppendUint16(b, uint16(len(m.Name)))
		b = be.AppendUint32(b, 0)
		b = append(b, m.Name...)
		b = append(b, make([]byte, roundUp8(int64(len(b)))-int64(len(b)))...)
	}
	return b, nil
}

// BitmapEntry is one word of a bitmap table, in host byte order.
type BitmapEntry uint64

const bitmapEntryReservedMask = 0xff000000000001fe

// Entries of a bitmap table that need no cluster.
const (
	BitmapEntryZeroes BitmapEntry = 0
	BitmapEntryOnes   BitmapEntry = 1
)

// MakeBitmapEntry returns the entry for a cluster of bits at off.
func MakeBitmapEntry(off HostOff) BitmapEntry { return BitmapEntry(off & offsetMask) }

// Offset returns where the bits are; 0 when they are all zero or all one (see AllOnes).
func (e BitmapEntry) Offset() HostOff { return HostOff(e & offsetMask) }

// AllOnes reports whether the bits are all one, without a cluster.
func (e BitmapEntry) AllOnes() bool { return e == BitmapEntryOnes }

// Valid reports whether the entry has no reserved bits and an aligned offset.
func (e BitmapEntry) Valid(l Layout) bool {
	if e&bitmapEntryReservedMask != 0 {
		return false
	}
	return e.Offset() == 0 || e&1 == 0 && l.Aligned(e.Offset())
}

// TrimBitmap clears the bits of the last byte that stand for no part of the disk, as the format demands. b is the whole
// bitmap, BitmapDataSize bytes.
func TrimBitmap(b []byte, diskSize int64, granularityBits uint8) {
	if len(b) == 0 || diskSize <= 0 {
		return
	}
	if bits := ((diskSize-1)>>granularityBits + 1) % 8; bits != 0 {
		b[len(b)-1] &= byte(1<<bits) - 1
	}
}
