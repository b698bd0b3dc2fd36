// Package qcow1 reads images of the first version of the qcow format, which QEMU calls "qcow": header, two levels of
// tables, compressed clusters, AES encryption, a backing file. Such images are read to be converted; nothing writes them.
//
// Importing the package registers the format with package block.
package qcow1

//lint:file-ignore ST1005 errors about the header say what QEMU says of them

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/storage"
)

const (
	magic      = 0x514649fb // "QFI\xfb"
	headerSize = 48

	minClusterBits, maxClusterBits = 9, 16
	minL2Bits, maxL2Bits           = 9 - 3, 16 - 3
	maxBackingName                 = 1023
	// maxL1 bounds the entries of the L1 table, as QEMU does.
	maxL1 = math.MaxInt32 / 8

	cryptNone = 0
	cryptAES  = 1
)

// Info is what the header of an image says.
type Info struct {
	VirtualSize int64
	ClusterSize int64
	Encrypted   bool
	BackingFile string
}

// header is a header that has been checked.
type header struct {
	size                int64
	clusterBits, l2Bits uint
	encrypted           bool
	l1Offset            int64
	l1Size              int64 // entries
	backing             string
}

// Probe reports whether the first 512 bytes of a file are those of such an image.
func Probe(head []byte) bool {
	return len(head) >= 8 && binary.BigEndian.Uint32(head) == magic && binary.BigEndian.Uint32(head[4:]) == 1
}

// ReadInfo reads the header of the image in file.
func ReadInfo(file storage.File) (*Info, error) {
	h, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	return &Info{VirtualSize: h.size, ClusterSize: 1 << h.clusterBits, Encrypted: h.encrypted, BackingFile: h.backing}, nil
}

func readHeader(file storage.File) (*header, error) {
	p := make([]byte, headerSize)
	if err := storage.ReadFull(file, p, 0); err != nil {
		return nil, fmt.Errorf("reading header: %w", err)
	}
	h, nameAt, nameLen, err := parseHeader(p)
	if err != nil || nameLen == 0 {
		return h, err
	}
	name := make([]byte, nameLen)
	if err := storage.ReadFull(file, name, nameAt); err != nil {
		return nil, fmt.Errorf("reading the name of the backing file: %w", err)
	}
	h.backing = string(name)
	return h, nil
}

// parseHeader checks a header, and returns where the name of the backing file is.
func parseHeader(p []byte) (h *header, nameAt int64, nameLen int, err error) {
	if binary.BigEndian.Uint32(p) != magic {
		return nil, 0, 0, errors.New("Image not in qcow format")
	}
	if version := binary.BigEndian.Uint32(p[4:]); version != 1 {
		hint := ""
		if version == 2 || version == 3 {
			hint = "\nTry the 'qcow2' driver instead."
		}
		return nil, 0, 0, fmt.Errorf("qcow (v%d) does not support qcow version %d%s", 1, version, hint)
	}
	size := binary.BigEndian.Uint64(p[24:])
	h = &header{size: int64(size), clusterBits: uint(p[32]), l2Bits: uint(p[33])}
	method := binary.BigEndian.Uint32(p[36:])
	switch {
	case size <= 1:
		return nil, 0, 0, errors.New("Image size is too small (must be at least 2 bytes)")
	case h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits:
		return nil, 0, 0, errors.New("Cluster size must be between 512 and 64k")
	case h.l2Bits < minL2Bits || h.l2Bits > maxL2Bits:
		return nil, 0, 0, errors.New("L2 table size must be between 512 and 64k")
	case method > cryptAES:
		return nil, 0, 0, errors.New("invalid encryption method in qcow header")
	}
	h.encrypted = method == cryptAES
	perTable := h.clusterBits + h.l2Bits
	if size > math.MaxInt64-1<<perTable {
		return nil, 0, 0, errors.New("Image too large")
	}
	h.size &^= storage.SectorSize - 1 // QEMU counts whole sectors
	h.l1Size = (int64(size) + 1<<perTable - 1) >> perTable
	if h.l1Size > maxL1 {
		return nil, 0, 0, errors.New("Image too large")
	}
	l1Offset := binary.BigEndian.Uint64(p[40:])
	if l1Offset > math.MaxInt64-8*maxL1 {
		return nil, 0, 0, fmt.Errorf("L1 table at host offset %#x is outside any file", l1Offset)
	}
	h.l1Offset = int64(l1Offset)
	at, n := binary.BigEndian.Uint64(p[8:]), binary.BigEndian.Uint32(p[16:])
	switch {
	case at == 0:
		return h, 0, 0, nil
	case n > maxBackingName:
		return nil, 0, 0, errors.New("Backing file name too long")
	case at > math.MaxInt64-maxBackingName:
		return nil, 0, 0, fmt.Errorf("name of the backing file at host offset %#x is outside any file", at)
	}
	return h, int64(at), int(n), nil
}

func init() {
	block.RegisterFormat(block.Format{Name: "qcow", Probe: Probe, Open: open, CheckOptions: checkOptions})
}

func checkOptions(options map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(options)) {
		value := options[name]
		switch name {
		case "encrypt.format":
			if value != "aes" {
				return fmt.Errorf("Header reported 'aes' encryption format but options specify '%s'", value)
			}
		case "encrypt.key-secret":
		default:
			return fmt.Errorf("Block format 'qcow' does not support the option '%s'", name)
		}
	}
	return nil
}

// ErrReadOnly is returned when an image is opened to be written.
var ErrReadOnly = fmt.Errorf("images of format qcow are only read: %w", block.ErrReadOnly)

// open opens an image for block.Open.
func open(ctx context.Context, file storage.File, o block.FormatOptions) (block.Device, error) {
	h, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	if err := checkOptions(o.Options); err != nil {
		return nil, err
	}
	if !h.encrypted && o.Options["encrypt.format"] != "" {
		return nil, fmt.Errorf("No encryption in image header, but options specified format '%s'", o.Options["encrypt.format"])
	}
	if !o.ReadOnly {
		return nil, ErrReadOnly
	}
	im := &Image{name: o.Name, file: file, h: *h}
	if h.encrypted {
		if im.cipher, err = cipher(o); err != nil {
			return nil, err
		}
	}
	if im.backing, err = o.OpenBacking(ctx, h.backing, ""); err != nil {
		return nil, fmt.Errorf("opening the backing file of %s: %w", o.Name, err)
	}
	return im, nil
}

// cipher returns what decrypts an image, nil if nothing will be read of it.
func cipher(o block.FormatOptions) (luks.SectorCipher, error) {
	id, ok := o.Options["encrypt.key-secret"]
	switch {
	case !ok && o.NoData:
		return nil, nil
	case !ok:
		return nil, errors.New("Parameter 'encrypt.key-secret' is required for cipher")
	}
	secret, err := o.Secret(id)
	if err != nil {
		return nil, err
	}
	return luks.NewLegacyAES(secret)
}
