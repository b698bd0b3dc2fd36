package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Compression types of CreateOptions.
const (
	CompressionZlib = format.CompressionZlib
	CompressionZstd = format.CompressionZstd
)

// Preallocation says how much of a new image is allocated at once.
type Preallocation uint8

const (
	// PreallocOff allocates nothing.
	PreallocOff Preallocation = iota
	// PreallocMetadata maps every cluster, so that later writes change no metadata; the file is sparse.
	PreallocMetadata
	// PreallocFalloc reserves the host space as well.
	PreallocFalloc
	// PreallocFull writes zeroes to all of it.
	PreallocFull
)

// CreateOptions describe a new image. The zero value of each field but Size is QEMU's default.
type CreateOptions struct {
	Size            int64 // bytes, rounded up to whole sectors
	ClusterSize     int64 // a power of two from 512 to 2 MiB; 0: 64 KiB
	Version         int   // 2 (compat 0.10) or 3 (compat 1.1); 0: 3
	RefcountBits    int   // a power of two from 1 to 64; 0: 16
	LazyRefcounts   bool
	ExtendedL2      bool
	CompressionType format.CompressionType
	BackingFile     string // stored as it is
	BackingFormat   string
	Preallocation   Preallocation
	// DataFile is the stored name of an external data file, which holds the guest's data at their guest offsets; empty for
	// none. DataFileRaw keeps it a raw image by itself.
	DataFile    string
	DataFileRaw bool
	// DataStorage is the external data file, which Create empties and leaves open. The caller has locked it.
	DataStorage storage.File
	// Encrypt encrypts the guest's data; nil for none.
	Encrypt *EncryptCreateOptions
}

// ErrInvalidOption is wrapped by every error of Create that the caller's options cause.
var ErrInvalidOption = errors.New("invalid option")

// ErrTooBig is wrapped by the errors of Create for a disk that the cluster size cannot describe; ErrInvalidOption is too.
var ErrTooBig = format.ErrTooBig

func invalid(f string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalidOption, fmt.Sprintf(f, args...))
}

// Create writes a new, empty image into file, which it truncates. The caller has locked the file. The header is written
// last and synced: a crash leaves a file that is no image, or a whole one.
func Create(ctx context.Context, file storage.File, o CreateOptions) error {
	h, err := newHeader(o)
	if err != nil {
		return err
	}
	plan, err := planImage(h)
	if err != nil {
		return err
	}
	head, err := h.Marshal()
	if err != nil {
		return fmt.Errorf("making the header: %w", err)
	}
	if o.DataFile != "" {
		if err := emptyDataFile(o.DataStorage, int64(h.Size), o.preallocation()); err != nil {
			return err
		}
	}
	var crypt *encryption
	makeKeys := func() (err error) {
		crypt, err = o.Encrypt.create(ctx, file, h)
		return err
	}
	if err := writeEmpty(file, h, plan, head, makeKeys); err != nil {
		return err
	}
	if o.preallocation() == PreallocOff {
		return nil
	}
	return preallocate(ctx, file, o, crypt)
}

// Validate returns the error that Create would return for these options before it touches the file.
func (o CreateOptions) Validate() error {
	h, err := newHeader(o)
	if err != nil {
		return err
	}
	if _, err := planImage(h); err != nil {
		return err
	}
	if _, err := h.Marshal(); err != nil {
		return fmt.Errorf("making the header: %w", err)
	}
	return nil
}

// newHeader checks the options and makes a header of them, without the places of the tables.
func newHeader(o CreateOptions) (*format.Header, error) {
	cs := or(o.ClusterSize, 64<<10)
	version := uint32(or(int64(o.Version), int64(format.Version3)))
	refBits := int(or(int64(o.RefcountBits), 16))
	size := (o.Size + format.SectorSize - 1) &^ (format.SectorSize - 1)
	v3only := func(yes bool, what string) error {
		if yes && version < format.Version3 {
			return invalid("%s needs compatibility level 1.1 and above (version 3)", what)
		}
		return nil
	}
	switch {
	case version != format.Version2 && version != format.Version3:
		return nil, invalid("version %d: only 2 and 3 exist", o.Version)
	case o.Size < 0 || size < o.Size:
		return nil, invalid("size %d", o.Size)
	case cs&(cs-1) != 0 || cs < 1<<format.MinClusterBits || cs > 1<<format.MaxClusterBits:
		return nil, invalid("cluster size %d: must be a power of two between 512 and 2M", cs)
	case refBits < 1 || refBits > 64 || refBits&(refBits-1) != 0:
		return nil, invalid("refcount width %d: must be a power of two and may not exceed 64 bits", refBits)
	case o.ExtendedL2 && cs < 1<<format.MinExtendedL2ClusterBits:
		return nil, invalid("extended L2 entries need a cluster size of at least 16k")
	case len(o.BackingFile) > format.MaxBackingName:
		return nil, invalid("backing file name is longer than %d bytes", format.MaxBackingName)
	case len(o.BackingFormat) > format.MaxBackingFormat:
		return nil, invalid("backing format name is longer than %d bytes", format.MaxBackingFormat)
	case o.DataFile == "" && (o.DataFileRaw || o.DataStorage != nil):
		return nil, invalid("data-file-raw requires data-file")
	case o.DataFileRaw && o.Encrypt != nil:
		return nil, invalid("encryption and data-file-raw cannot be used at the same time: the data file would not be the disk")
	case o.DataFile != "" && o.Encrypt != nil && o.Preallocation != PreallocOff:
		return nil, invalid("encryption and preallocation of an external data file cannot be used at the same time")
	case o.DataFileRaw && o.BackingFile != "":
		return nil, invalid("backing file and data-file-raw cannot be used at the same time")
	case o.BackingFile != "" && o.Preallocation != PreallocOff && !o.ExtendedL2:
		return nil, invalid("backing file and preallocation can only be used at the same time if extended_l2 is enabled")
	}
	if err := errors.Join(v3only(refBits != 16, "a refcount width other than 16 bits"), v3only(o.LazyRefcounts, "lazy refcounts"),
		v3only(o.ExtendedL2, "extended L2 entries"), v3only(o.DataFile != "", "an external data file"), v3only(o.CompressionType != CompressionZlib, "a compression type other than zlib")); err != nil {
		return nil, err
	}
	h := &format.Header{
		Version: version, ClusterBits: uint32(bits.Len64(uint64(cs)) - 1), Size: uint64(size),
		RefcountOrder: uint32(bits.Len(uint(refBits)) - 1), CompressionType: o.CompressionType,
		BackingFile: o.BackingFile, BackingFormat: o.BackingFormat, HasBackingFormat: o.BackingFormat != "",
	}
	if o.LazyRefcounts {
		h.Compat |= format.CompatLazyRefcounts
	}
	if o.ExtendedL2 {
		h.Incompat |= format.IncompatExtL2
	}
	if o.CompressionType != CompressionZlib {
		h.Incompat |= format.IncompatCompression
	}
	if o.DataFile != "" {
		h.Incompat |= format.IncompatDataFile
		h.DataFileName, h.HasDataFileName = o.DataFile, true
	}
	if o.DataFileRaw {
		h.Autoclear |= format.AutoclearRawData
	}
	method, keys, err := o.Encrypt.prepare()
	if err != nil {
		return nil, err
	}
	h.CryptMethod = method
	if method == format.CryptLUKS {
		h.Crypto = &format.CryptoExt{Length: uint64(keys)}
	}
	addFeatureNames(h)
	return h, nil
}

// imagePlan says how many clusters of each kind an empty image has. They follow the header in this order.
type imagePlan struct{ refTable, refBlocks, keys, l1 int64 }

func (p imagePlan) total() int64 { return 1 + p.refTable + p.refBlocks + p.keys + p.l1 }

// planImage lays an empty image out and puts the places into the header.
func planImage(h *format.Header) (imagePlan, error) {
	lay := h.Layout()
	l1, err := lay.L1EntriesFor(int64(h.Size))
	if err != nil {
		return imagePlan{}, fmt.Errorf("%w: %w", ErrInvalidOption, err)
	}
	p := imagePlan{refTable: 1, refBlocks: 1, l1: lay.ClustersFor(l1 * 8)}
	if h.Crypto != nil {
		p.keys = lay.ClustersFor(int64(h.Crypto.Length))
	}
	for {
		blocks := (p.total() + lay.RefcountsPerBlock() - 1) / lay.RefcountsPerBlock()
		table := lay.ClustersFor(blocks * 8)
		if blocks <= p.refBlocks && table <= p.refTable {
			break
		}
		p.refBlocks, p.refTable = max(blocks, p.refBlocks), max(table, p.refTable)
	}
	h.RefTableOffset, h.RefTableLen = lay.Offset(1), uint32(p.refTable)
	keysAt := format.ClusterIdx(1 + p.refTable + p.refBlocks)
	if h.Crypto != nil {
		h.Crypto.Offset = lay.Offset(keysAt)
	}
	h.L1Offset, h.L1Size = lay.Offset(keysAt+format.ClusterIdx(p.keys)), uint32(l1)
	return p, nil
}

// writeEmpty writes the tables and has makeKeys write its part, then, when they are durable, the header that makes them an
// image.
func writeEmpty(file storage.File, h *format.Header, p imagePlan, head []byte, makeKeys func() error) error {
	lay := h.Layout()
	if err := file.Truncate(0); err != nil {
		return fmt.Errorf("emptying the file: %w", err)
	}
	table := make([]byte, p.refTable*lay.ClusterSize())
	for i := range p.refBlocks {
		e := format.EncodeUint64(uint64(format.MakeRefTable(lay.Offset(format.ClusterIdx(1 + p.refTable + i)))))
		copy(table[i*8:], e[:])
	}
	if err := storage.WriteFull(file, table, int64(h.RefTableOffset)); err != nil {
		return fmt.Errorf("writing refcount table: %w", err)
	}
	block := make([]byte, lay.ClusterSize())
	for i := range p.refBlocks {
		clear(block)
		for k := range min(lay.RefcountsPerBlock(), p.total()-i*lay.RefcountsPerBlock()) {
			lay.SetRefcount(block, k, 1)
		}
		if err := storage.WriteFull(file, block, int64(lay.Offset(format.ClusterIdx(1+p.refTable+i)))); err != nil {
			return fmt.Errorf("writing refcount block: %w", err)
		}
	}
	// The L1 table is all zeroes: the file's length alone makes it.
	if err := file.Truncate(int64(h.L1Offset) + int64(h.L1Size)*8); err != nil {
		return fmt.Errorf("extending the file over the L1 table: %w", err)
	}
	if file.Stat().Device {
		if err := zeroDevice(file, int64(h.L1Offset), int64(h.L1Size)*8); err != nil {
			return fmt.Errorf("writing L1 table: %w", err)
		}
		if err := zeroDevice(file, int64(h.L1Offset)-p.keys*lay.ClusterSize(), p.keys*lay.ClusterSize()); err != nil {
			return fmt.Errorf("clearing the place of the key slots: %w", err)
		}
	}
	if err := makeKeys(); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return fmt.Errorf("syncing image file: %w", err)
	}
	if err := storage.WriteFull(file, head, 0); err != nil {
		return fmt.Errorf("writing header: %w", err)
	}
	if err := file.Sync(); err != nil {
		return fmt.Errorf("syncing image file: %w", err)
	}
	return nil
}

// zeroDevice writes zeroes where a file's length cannot stand for them.
func zeroDevice(file storage.File, off, n int64) error {
	for n > 0 {
		part := min(n, int64(len(zeroChunk)))
		if err := storage.WriteFull(file, zeroChunk[:part], off); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// preallocate maps every cluster of the new image in file and makes room for it on the host.
func preallocate(ctx context.Context, file storage.File, o CreateOptions, crypt *encryption) error {
	im, err := Open(ctx, file, Options{CacheCleanInterval: -1, DataFile: o.DataStorage, LazyRefcounts: SwitchOff})
	if err != nil {
		return fmt.Errorf("preallocating: %w", err)
	}
	im.crypt = crypt // unlocked, without the work of deriving its key again
	// The file stays the caller's: the image is flushed and left, not closed.
	if err := im.mapAll(ctx, o.preallocation()); err != nil {
		return fmt.Errorf("preallocating: %w", err)
	}
	if err := im.meta.Settle(); err != nil {
		return fmt.Errorf("preallocating: %w", err)
	}
	return nil
}
