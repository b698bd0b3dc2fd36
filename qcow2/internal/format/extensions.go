package format

import (
	"bytes"
	"encoding/binary"
	"strconv"
)

// Types of header extensions.
const (
	extEnd           uint32 = 0
	extBackingFormat uint32 = 0xe2792aca
	extFeatureNames  uint32 = 0x6803f857
	extBitmaps       uint32 = 0x23852875
	extCrypto        uint32 = 0x0537be77
	extDataFile      uint32 = 0x44415441
)

const (
	featureNameSize    = 46
	featureEntrySize   = 2 + featureNameSize
	bitmapsExtSize     = 24
	cryptoExtSize      = 16
	extensionHeadBytes = 8
)

// extensionArea walks the extensions between the header and the backing file name. b is the cluster from its beginning; what it
// lacks of it is zeroes.
type extensionArea struct {
	b        []byte
	off, end uint64
}

// at returns n bytes of the cluster. Most headers end long before the cluster does: only what is looked at is made.
func (a *extensionArea) at(off, n uint64) []byte {
	have := a.b[min(off, uint64(len(a.b))):]
	return zeroExtend(have, int(n))[:n]
}

// next returns the next extension; ok is false at the end of the area.
func (a *extensionArea) next() (kind uint32, data []byte, ok bool, err error) {
	if a.off >= a.end {
		return 0, nil, false, nil
	}
	if a.end-a.off < extensionHeadBytes {
		return 0, nil, false, headerErrorf("Header extension too large")
	}
	head := a.at(a.off, extensionHeadBytes)
	kind = binary.BigEndian.Uint32(head)
	n := uint64(binary.BigEndian.Uint32(head[4:]))
	a.off += extensionHeadBytes
	if n > a.end-a.off {
		return 0, nil, false, headerErrorf("Header extension too large")
	}
	data = a.at(a.off, n)
	a.off += uint64(roundUp8(int64(n)))
	return kind, data, kind != extEnd, nil
}

// parseExtensions decodes the extension area. An extension that appears twice counts as QEMU counts it: the last one
// wins.
func (h *Header) parseExtensions(a extensionArea) error {
	for {
		kind, data, ok, err := a.next()
		if err != nil || !ok {
			return err
		}
		if err := h.parseExtension(kind, data); err != nil {
			return err
		}
	}
}

func (h *Header) parseExtension(kind uint32, data []byte) error {
	switch kind {
	case extBackingFormat:
		if len(data) > MaxBackingFormat {
			return headerErrorf("ERROR: ext_backing_format: len=%d too large (>=%d)", len(data), MaxBackingFormat+1)
		}
		h.BackingFormat, h.HasBackingFormat = cString(data), true
	case extDataFile:
		h.DataFileName, h.HasDataFileName = cString(data), true
	case extFeatureNames:
		h.FeatureNames = parseFeatureNames(data)
	case extCrypto:
		return h.parseCrypto(data)
	case extBitmaps:
		return h.parseBitmaps(data)
	default:
		h.UnknownExtensions = append(h.UnknownExtensions, Extension{kind, bytes.Clone(data)})
	}
	return nil
}

func (h *Header) parseCrypto(data []byte) error {
	if h.CryptMethod != CryptLUKS {
		return headerErrorf("CRYPTO header extension only expected with LUKS encryption method")
	}
	if len(data) != cryptoExtSize {
		return headerErrorf("CRYPTO header extension size %d, but expected size %d", len(data), cryptoExtSize)
	}
	c := &CryptoExt{HostOff(binary.BigEndian.Uint64(data)), binary.BigEndian.Uint64(data[8:])}
	if !h.Layout().Aligned(c.Offset) {
		return headerErrorf("Encryption header offset '%d' is not a multiple of cluster size '%d'", c.Offset,
			h.Layout().ClusterSize())
	}
	h.Crypto = c
	return nil
}

func (h *Header) parseBitmaps(data []byte) error {
	if len(data) != bitmapsExtSize {
		return headerErrorf("bitmaps_ext: Invalid extension length")
	}
	if h.Autoclear&AutoclearBitmaps == 0 {
		h.StaleBitmaps = true
		return nil
	}
	ext := &BitmapsExt{
		Count:           binary.BigEndian.Uint32(data),
		DirectorySize:   binary.BigEndian.Uint64(data[8:]),
		DirectoryOffset: HostOff(binary.BigEndian.Uint64(data[16:])),
	}
	switch {
	case binary.BigEndian.Uint32(data[4:]) != 0:
		return headerErrorf("bitmaps_ext: Reserved field is not zero")
	case ext.Count > MaxBitmaps:
		return headerErrorf("bitmaps_ext: image has %d bitmaps, exceeding the QEMU supported maximum of %d", ext.Count,
			MaxBitmaps)
	case ext.Count == 0:
		return headerErrorf("found bitmaps extension with zero bitmaps")
	case !h.Layout().Aligned(ext.DirectoryOffset):
		return headerErrorf("bitmaps_ext: invalid bitmap directory offset")
	case ext.DirectorySize > MaxBitmapDirectory:
		return headerErrorf("bitmaps_ext: bitmap directory size (%d) exceeds the maximum supported size (%d)",
			ext.DirectorySize, MaxBitmapDirectory)
	}
	h.Bitmaps = ext
	return nil
}

// parseFeatureNames decodes the feature name table. A part of an entry at its end is ignored.
func parseFeatureNames(data []byte) []FeatureName {
	var names []FeatureName
	for ; len(data) >= featureEntrySize; data = data[featureEntrySize:] {
		names = append(names, FeatureName{FeatureSet(data[0]), data[1], cString(data[2:featureEntrySize])})
	}
	return names
}

// unsupportedFeatures names unknown incompatible features as far as the image itself does. Faults in the extensions do
// not matter: the image is refused either way.
func unsupportedFeatures(mask uint64, a extensionArea) error {
	e := &UnsupportedError{}
	for {
		kind, data, ok, err := a.next()
		if err != nil || !ok {
			break
		}
		if kind != extFeatureNames {
			continue
		}
		for _, n := range parseFeatureNames(data) {
			if n.Set != FeatureIncompatible || n.Bit > 63 || mask>>n.Bit&1 == 0 || n.Name == "" {
				continue
			}
			e.Features = append(e.Features, printable(n.Name))
			mask &^= 1 << n.Bit
		}
	}
	e.Mask = mask
	return e
}

// printable makes a name from an image fit to show: an image must not send control sequences to a terminal.
func printable(s string) string {
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

// appendExtensions encodes the extensions in the order in which QEMU writes them.
func (h *Header) appendExtensions(b []byte) ([]byte, error) {
	if h.HasBackingFormat {
		if len(h.BackingFormat) > MaxBackingFormat {
			return nil, headerErrorf("ERROR: ext_backing_format: len=%d too large (>=%d)", len(h.BackingFormat),
				MaxBackingFormat+1)
		}
		b = appendExtension(b, extBackingFormat, []byte(h.BackingFormat))
	}
	if h.HasDataFileName {
		b = appendExtension(b, extDataFile, []byte(h.DataFileName))
	}
	if h.Crypto != nil {
		data := binary.BigEndian.AppendUint64(nil, uint64(h.Crypto.Offset))
		b = appendExtension(b, extCrypto, binary.BigEndian.AppendUint64(data, h.Crypto.Length))
	}
	if len(h.FeatureNames) > 0 {
		data, err := encodeFeatureNames(h.FeatureNames)
		if err != nil {
			return nil, err
		}
		b = appendExtension(b, extFeatureNames, data)
	}
	if h.Bitmaps != nil {
		b = appendExtension(b, extBitmaps, encodeBitmapsExt(h.Bitmaps))
	}
	for _, e := range h.UnknownExtensions {
		b = appendExtension(b, e.Type, e.Data)
	}
	return appendExtension(b, extEnd, nil), nil
}

func encodeFeatureNames(names []FeatureName) ([]byte, error) {
	data := make([]byte, len(names)*featureEntrySize)
	for i, n := range names {
		e := data[i*featureEntrySize:]
		if len(n.Name) > featureNameSize {
			return nil, headerErrorf("feature name %q is longer than %d bytes", n.Name, featureNameSize)
		}
		e[0], e[1] = byte(n.Set), n.Bit
		copy(e[2:featureEntrySize], n.Name)
	}
	return data, nil
}

func encodeBitmapsExt(e *BitmapsExt) []byte {
	data := binary.BigEndian.AppendUint32(nil, e.Count)
	data = binary.BigEndian.AppendUint32(data, 0)
	data = binary.BigEndian.AppendUint64(data, e.DirectorySize)
	return binary.BigEndian.AppendUint64(data, uint64(e.DirectoryOffset))
}

func appendExtension(b []byte, kind uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, roundUp8(int64(len(data)))-int64(len(data)))...)
}
