package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Info is what an image says of itself. Names are as stored: bytes of the image's making, to be quoted where they are
// shown.
type Info struct {
	VirtualSize     int64
	ClusterSize     int64
	Version         int    // 2 or 3
	Compat          string // QEMU's name of the version: "0.10" or "1.1"
	CompressionType string // "zlib" or "zstd"
	RefcountBits    int
	LazyRefcounts   bool
	ExtendedL2      bool
	Dirty           bool // not closed cleanly: refcounts may be stale
	Corrupt         bool // known to be damaged

	BackingFile      string // "" for none
	BackingFormat    string
	HasBackingFormat bool // the image records a format, even if an empty one

	HasDataFile bool   // guest data is in another file
	DataFile    string // its name, "" when the image does not say
	DataFileRaw bool   // the data file is a raw image by itself

	Encryption *EncryptionInfo // nil when not encrypted
	Snapshots  []SnapshotInfo
	Bitmaps    []BitmapInfo
	// BitmapsDropped: there are bitmaps, but a program that did not know of them has written the image since.
	BitmapsDropped bool
}

// EncryptionInfo describes how an image is encrypted.
type EncryptionInfo struct {
	Format string    // "aes" or "luks"
	LUKS   *LUKSInfo // for "luks"
}

// LUKSInfo is what a LUKS header tells without a key.
type LUKSInfo struct {
	CipherAlg, CipherMode string // for example "aes-256", "xts"
	IVGenAlg, IVGenHash   string // for example "plain64", ""
	HashAlg               string
	UUID                  string
	PayloadOffset         int64
	MasterKeyIters        int64
	Slots                 []LUKSSlot
}

// LUKSSlot is one of the places for a wrapped master key.
type LUKSSlot struct {
	Active    bool
	Iters     int64 // when active
	Stripes   int64 // when active
	KeyOffset int64 // in the image file
}

// SnapshotInfo describes an internal snapshot.
type SnapshotInfo struct {
	ID, Name    string
	Date        time.Time
	VMClockNsec uint64 // how long the guest had run
	VMStateSize uint64
	DiskSize    uint64
	ICount      uint64 // guest instructions executed
	HasICount   bool
}

// BitmapInfo describes a persistent dirty bitmap.
type BitmapInfo struct {
	Name        string
	Granularity int64
	InUse       bool // not stored by its last user: its content means nothing
	Auto        bool // enabled: writers must keep it up to date
}

// ReadInfo reads what an image says of itself. It reads nothing but the file, and of that only the header, the snapshot
// table, the bitmap directory and the LUKS header; no file that the image names is touched.
func ReadInfo(ctx context.Context, file storage.File) (*Info, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	info := headerInfo(h)
	if info.Encryption, err = readEncryption(file, h); err != nil {
		return nil, err
	}
	snapshots, _, err := readSnapshots(file, h)
	if err != nil {
		return nil, err
	}
	for i := range snapshots {
		info.Snapshots = append(info.Snapshots, snapshotInfo(&snapshots[i]))
	}
	if info.Bitmaps, err = readBitmaps(file, h); err != nil {
		return nil, err
	}
	return info, nil
}

func headerInfo(h *format.Header) *Info {
	info := &Info{
		VirtualSize:      h.DiskSize(),
		ClusterSize:      h.Layout().ClusterSize(),
		Version:          int(h.Version),
		Compat:           "1.1",
		CompressionType:  h.CompressionType.String(),
		RefcountBits:     1 << h.RefcountOrder,
		LazyRefcounts:    h.Compat&format.CompatLazyRefcounts != 0,
		ExtendedL2:       h.Incompat&format.IncompatExtL2 != 0,
		Dirty:            h.Incompat&format.IncompatDirty != 0,
		Corrupt:          h.Incompat&format.IncompatCorrupt != 0,
		BackingFile:      h.BackingFile,
		BackingFormat:    h.BackingFormat,
		HasBackingFormat: h.HasBackingFormat,
		HasDataFile:      h.Incompat&format.IncompatDataFile != 0,
		DataFileRaw:      h.Autoclear&format.AutoclearRawData != 0,
		BitmapsDropped:   h.StaleBitmaps,
	}
	if h.Version == format.Version2 {
		info.Compat = "0.10"
	}
	if info.HasDataFile {
		info.DataFile = h.DataFileName
	}
	return info
}

func snapshotInfo(s *format.Snapshot) SnapshotInfo {
	return SnapshotInfo{
		ID: s.ID, Name: s.Name,
		Date:        time.Unix(int64(s.DateSec), int64(s.DateNsec)),
		VMClockNsec: s.VMClockNsec,
		VMStateSize: s.VMStateSize,
		DiskSize:    s.DiskSize,
		ICount:      s.ICount,
		HasICount:   s.ICount != format.NoICount,
	}
}

func readBitmaps(file storage.File, h *format.Header) ([]BitmapInfo, error) {
	list, err := readBitmapDirectory(file, h)
	if err != nil {
		return nil, err
	}
	return bitmapInfos(list), nil
}

func bitmapInfos(list []format.Bitmap) []BitmapInfo {
	if list == nil {
		return nil
	}
	infos := make([]BitmapInfo, len(list))
	for i, m := range list {
		infos[i] = BitmapInfo{
			Name: m.Name, Granularity: m.Granularity(),
			InUse: m.Flags&format.BitmapInUse != 0, Auto: m.Flags&format.BitmapAuto != 0,
		}
	}
	return infos
}

// readBitmapDirectory reads the directory that the header names, nil when it names none.
func readBitmapDirectory(file storage.File, h *format.Header) ([]format.Bitmap, error) {
	if h.Bitmaps == nil {
		return nil, nil
	}
	off := int64(h.Bitmaps.DirectoryOffset)
	size, err := file.Size()
	if err != nil {
		return nil, fmt.Errorf("size of image file: %w", err)
	}
	// The header's word for the length is good for what the file can hold, not for an allocation.
	if off < 0 || off > size || int64(h.Bitmaps.DirectorySize) > size-off {
		return nil, fmt.Errorf("bitmap directory of %d bytes at host offset %#x reaches past the end of the file",
			h.Bitmaps.DirectorySize, off)
	}
	dir := make([]byte, h.Bitmaps.DirectorySize)
	if err := storage.ReadFull(file, dir, off); err != nil {
		return nil, fmt.Errorf("reading bitmap directory at host offset %#x: %w", off, err)
	}
	list, err := format.ParseBitmapDirectory(dir, h)
	if err != nil {
		return nil, fmt.Errorf("reading bitmap directory at host offset %#x: %w", off, err)
	}
	return list, nil
}

// The layout of a LUKS1 header.
const (
	luksHeaderSize = 592
	luksSlots      = 8
	luksSlotOffset = 208
	luksSlotSize   = 48
	luksSlotActive = 0x00AC71F3
)

var luksMagic = []byte("LUKS\xba\xbe\x00\x01") // with the version, 1

func readEncryption(file storage.File, h *format.Header) (*EncryptionInfo, error) {
	switch h.CryptMethod {
	case format.CryptNone:
		return nil, nil
	case format.CryptAES:
		return &EncryptionInfo{Format: "aes"}, nil
	}
	off := int64(h.Crypto.Offset)
	b := make([]byte, luksHeaderSize)
	if off < 0 {
		return nil, fmt.Errorf("LUKS header at host offset %#x is outside the file", h.Crypto.Offset)
	}
	if err := storage.ReadFull(file, b, off); err != nil {
		return nil, fmt.Errorf("reading LUKS header at host offset %#x: %w", off, err)
	}
	if !bytes.HasPrefix(b, luksMagic) {
		return nil, fmt.Errorf("reading LUKS header at host offset %#x: Volume is not in LUKS format", off)
	}
	return &EncryptionInfo{Format: "luks", LUKS: parseLUKS(b)}, nil
}

func parseLUKS(b []byte) *LUKSInfo {
	u32 := func(off int) int64 { return int64(binary.BigEndian.Uint32(b[off:])) }
	text := func(off, n int) string {
		s, _, _ := bytes.Cut(b[off:off+n], []byte{0})
		return string(s)
	}
	const sector = 512
	l := &LUKSInfo{
		HashAlg:        text(72, 32),
		PayloadOffset:  u32(104) * sector,
		MasterKeyIters: u32(164),
		UUID:           text(168, 40),
	}
	// The mode field is "mode-ivgen" or "mode-ivgen:hash", for example "xts-plain64".
	mode, iv, _ := strings.Cut(text(40, 32), "-")
	l.CipherMode = mode
	l.IVGenAlg, l.IVGenHash, _ = strings.Cut(iv, ":")
	keyBits := u32(108) * 8
	if mode == "xts" {
		keyBits /= 2 // xts has two keys
	}
	l.CipherAlg = fmt.Sprintf("%s-%d", text(8, 32), keyBits)
	for i := range luksSlots {
		s := luksSlotOffset + i*luksSlotSize
		slot := LUKSSlot{Active: u32(s) == luksSlotActive, KeyOffset: u32(s+40) * sector}
		if slot.Active {
			slot.Iters, slot.Stripes = u32(s+4), u32(s+44)
		}
		l.Slots = append(l.Slots, slot)
	}
	return l
}
