package qcow2

import (
	"context"
	"fmt"
	"time"

	"github.com/droverproject/drover/luks"
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

func readEncryption(file storage.File, h *format.Header) (*EncryptionInfo, error) {
	switch h.CryptMethod {
	case format.CryptNone:
		return nil, nil
	case format.CryptAES:
		return &EncryptionInfo{Format: EncryptAES}, nil
	}
	l, err := luks.ReadHeader(keyArea{h.Crypto, file})
	if err != nil {
		return nil, fmt.Errorf("reading LUKS header at host offset %#x: %w", h.Crypto.Offset, err)
	}
	return &EncryptionInfo{Format: EncryptLUKS, LUKS: luksInfo(l)}, nil
}

func luksInfo(h *luks.Header) *LUKSInfo {
	s := h.Spec()
	l := &LUKSInfo{
		CipherAlg: h.CipherAlg(), CipherMode: s.Mode, IVGenAlg: s.IVGen, IVGenHash: s.IVHash, HashAlg: h.Hash, UUID: h.UUID,
		PayloadOffset: int64(h.PayloadOffset) * luks.SectorSize, MasterKeyIters: int64(h.DigestIterations),
	}
	for _, k := range h.Slots {
		slot := LUKSSlot{Active: k.Active, KeyOffset: int64(k.KeyOffset) * luks.SectorSize}
		if k.Active {
			slot.Iters, slot.Stripes = int64(k.Iterations), int64(k.Stripes)
		}
		l.Slots = append(l.Slots, slot)
	}
	return l
}
