package format

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// Sizes of a snapshot table entry: the fixed part, the extra data that version 3 requires, and what is written today.
const (
	snapshotHeaderSize = 40

	extraVMState  = 8
	extraDiskSize = 16
	extraICount   = 24

	// MinSnapshotExtraV3 is how much extra data an entry must have in version 3: both sizes.
	MinSnapshotExtraV3 = extraDiskSize
)

// NoICount is the value of Snapshot.ICount when none was recorded.
const NoICount = math.MaxUint64

// ErrSnapshotTable is wrapped by the errors of a snapshot table that cannot be understood.
var ErrSnapshotTable = errors.New("invalid snapshot table")

// Snapshot is one entry of the snapshot table.
type Snapshot struct {
	L1Offset    HostOff
	L1Size      uint32 // entries
	ID          string
	Name        string
	DateSec     uint32
	DateNsec    uint32
	VMClockNsec uint64
	VMStateSize uint64
	DiskSize    uint64
	ICount      uint64

	// ExtraSize is the length of the entry's extra data. The fields above that lie beyond it were not stored: the
	// snapshot then has the disk size of the image, a VM state size of 32 bits, and no icount.
	ExtraSize uint32
	// UnknownExtra is the extra data beyond what is known, which a rewrite must keep.
	UnknownExtra []byte
}

// NewSnapshotExtraSize is the ExtraSize of a new snapshot.
const NewSnapshotExtraSize = extraICount

// ParseSnapshots decodes a snapshot table of n entries from b, and returns how many bytes it takes (without the padding
// after the last entry). b need not hold the whole table: if it ends too soon, the error is io.ErrUnexpectedEOF, and
// the entries and bytes so far are returned. Other errors wrap ErrSnapshotTable.
//
// Where an entry's L1 table lies and whether it may be that long is not checked: that fault is the entry's alone.
func ParseSnapshots(b []byte, n int, h *Header) ([]Snapshot, int, error) {
	if n < 0 || n > MaxSnapshots {
		return nil, 0, fmt.Errorf("%w: Snapshot table too large", ErrSnapshotTable)
	}
	list := make([]Snapshot, 0, min(n, len(b)/snapshotHeaderSize))
	end := 0
	for i := range n {
		start := int(roundUp8(int64(end)))
		if start > len(b) {
			return list, end, io.ErrUnexpectedEOF
		}
		s, size, err := parseSnapshot(b[start:], h)
		if err != nil {
			return list, end, snapshotError(err, i)
		}
		if start+size > MaxSnapshotTable {
			return list, end, fmt.Errorf("%w: Snapshot table is too big", ErrSnapshotTable)
		}
		list, end = append(list, s), start+size
	}
	return list, end, nil
}

func snapshotError(err error, i int) error {
	if err == io.ErrUnexpectedEOF {
		return err
	}
	return fmt.Errorf("%w: %w in snapshot table entry %d", ErrSnapshotTable, err, i)
}

const errTooMuchExtra = codecError("Too much extra metadata")

// parseSnapshot decodes the entry at the beginning of b and returns its length without padding.
func parseSnapshot(b []byte, h *Header) (Snapshot, int, error) {
	if len(b) < snapshotHeaderSize {
		return Snapshot{}, 0, io.ErrUnexpectedEOF
	}
	u16, u32, u64 := binary.BigEndian.Uint16, binary.BigEndian.Uint32, binary.BigEndian.Uint64
	idSize, nameSize, extraSize := int(u16(b[12:])), int(u16(b[14:])), u32(b[36:])
	s := Snapshot{
		L1Offset:    HostOff(u64(b)),
		L1Size:      u32(b[8:]),
		DateSec:     u32(b[16:]),
		DateNsec:    u32(b[20:]),
		VMClockNsec: u64(b[24:]),
		VMStateSize: uint64(u32(b[32:])),
		DiskSize:    uint64(h.DiskSize()),
		ICount:      NoICount,
		ExtraSize:   extraSize,
	}
	if extraSize > MaxSnapshotExtra {
		return s, 0, errTooMuchExtra
	}
	size := snapshotHeaderSize + int(extraSize) + idSize + nameSize
	if len(b) < size {
		return s, 0, io.ErrUnexpectedEOF
	}
	extra, names := b[snapshotHeaderSize:][:extraSize], b[snapshotHeaderSize+int(extraSize):]
	s.parseExtra(extra)
	s.ID, s.Name = string(names[:idSize]), string(names[idSize:idSize+nameSize])
	return s, size, nil
}

// parseExtra decodes the extra data, whose length decides which fields are there.
func (s *Snapshot) parseExtra(extra []byte) {
	if len(extra) >= extraVMState {
		s.VMStateSize = binary.BigEndian.Uint64(extra)
	}
	if len(extra) >= extraDiskSize {
		s.DiskSize = binary.BigEndian.Uint64(extra[8:])
	}
	if len(extra) >= extraICount {
		s.ICount = binary.BigEndian.Uint64(extra[16:])
	}
	if len(extra) > extraICount {
		s.UnknownExtra = bytes.Clone(extra[extraICount:])
	}
}

// MarshalSnapshots encodes a snapshot table. As QEMU does, it gives every entry all the extra data that is known today
// (a table from an older writer grows), and keeps the unknown. The result has no padding after the last entry.
func MarshalSnapshots(list []Snapshot) ([]byte, error) {
	if len(list) > MaxSnapshots {
		return nil, fmt.Errorf("%w: %d snapshots, more than %d", ErrSnapshotTable, len(list), MaxSnapshots)
	}
	var b []byte
	for i := range list {
		b = append(b, make([]byte, roundUp8(int64(len(b)))-int64(len(b)))...)
		var err error
		if b, err = list[i].appendTo(b); err != nil {
			return nil, err
		}
		if len(b) > MaxSnapshotTable {
			return nil, fmt.Errorf("%w: Snapshot table is too big", ErrSnapshotTable)
		}
	}
	return b, nil
}

func (s *Snapshot) appendTo(b []byte) ([]byte, error) {
	if len(s.ID) > math.MaxUint16 || len(s.Name) > math.MaxUint16 {
		return nil, fmt.Errorf("%w: name or ID of snapshot %.32q is longer than %d bytes", ErrSnapshotTable, s.Name,
			math.MaxUint16)
	}
	extra := extraICount + len(s.UnknownExtra)
	if extra > MaxSnapshotExtra {
		return nil, fmt.Errorf("%w: too much extra metadata in snapshot %.32q", ErrSnapshotTable, s.Name)
	}
	be := binary.BigEndian
	b = be.AppendUint64(b, uint64(s.L1Offset))
	b = be.AppendUint32(b, s.L1Size)
	b = be.AppendUint16(b, uint16(len(s.ID)))
	b = be.AppendUint16(b, uint16(len(s.Name)))
	b = be.AppendUint32(b, s.DateSec)
	b = be.AppendUint32(b, s.DateNsec)
	b = be.AppendUint64(b, s.VMClockNsec)
	b = be.AppendUint32(b, s.vmStateSize32())
	b = be.AppendUint32(b, uint32(extra))
	b = be.AppendUint64(b, s.VMStateSize)
	b = be.AppendUint64(b, s.DiskSize)
	b = be.AppendUint64(b, s.ICount)
	b = append(b, s.UnknownExtra...)
	b = append(b, s.ID...)
	return append(b, s.Name...), nil
}

// vmStateSize32 is the old field of 32 bits, which is 0 for what it cannot hold.
func (s *Snapshot) vmStateSize32() uint32 {
	if s.VMStateSize > math.MaxUint32 {
		return 0
	}
	return uint32(s.VMStateSize)
}
