package format

import (
	"encoding/binary"
	"unicode"
	"unicode/utf8"
)

// SnapshotFaults says what RecoverSnapshots had to get over.
type SnapshotFaults struct {
	// LongExtra is the number of entries whose extra data was cut to the limit.
	LongExtra int
	// Resized is the number of entries whose extra data has another length than they say.
	Resized int
	// Overhang is the number of entries at the end of the table that are none: they name nothing.
	Overhang int64
	// Hopeless: no entry makes sense, or more than the format allows do.
	Hopeless bool
}

// Any reports whether there is anything that a table written anew would not have.
func (f SnapshotFaults) Any() bool { return f.LongExtra > 0 || f.Resized > 0 || f.Overhang > 0 }

// RecoverSnapshots decodes a snapshot table as ParseSnapshots does, but gets over what a damaged length or count does to
// it, so that no snapshot is lost to a fault of its neighbour: where an entry's extra data would lead to an entry that
// makes no sense, the lengths that writers use are tried, and entries at the end that are none are left out. b is as much
// of the table as there can be, fileSize the length of the image file.
func RecoverSnapshots(b []byte, n int64, h *Header, fileSize int64) ([]Snapshot, int, SnapshotFaults) {
	r := snapshotRecovery{b: b, h: h, fileSize: fileSize}
	var list []Snapshot
	var ends []int
	var faults []SnapshotFaults // up to each entry
	end := 0
	for i := range min(n, MaxSnapshots) {
		s, size, ok := r.entry(int(roundUp8(int64(end))), i == n-1)
		if !ok {
			break
		}
		end = int(roundUp8(int64(end))) + size
		if end > MaxSnapshotTable {
			break
		}
		list, ends, faults = append(list, s), append(ends, end), append(faults, r.faults)
	}
	kept := len(list)
	for kept > 0 && !r.plausible(&list[kept-1]) {
		kept--
	}
	if kept == 0 || kept == MaxSnapshots && n > MaxSnapshots {
		return nil, 0, SnapshotFaults{Hopeless: true}
	}
	f := faults[kept-1]
	f.Overhang = n - int64(kept)
	return list[:kept], ends[kept-1], f
}

type snapshotRecovery struct {
	b        []byte
	h        *Header
	fileSize int64
	faults   SnapshotFaults
}

// entry decodes the entry at off and returns its length. last: nothing follows it that could tell.
func (r *snapshotRecovery) entry(off int, last bool) (Snapshot, int, bool) {
	if off+snapshotHeaderSize > len(r.b) {
		return Snapshot{}, 0, false
	}
	said := int64(binary.BigEndian.Uint32(r.b[off+36:]))
	for _, extra := range []int64{said, extraICount, extraDiskSize, 0} {
		s, size, ok := r.with(off, extra)
		if !ok || !r.plausible(&s) || !last && !r.leadsOn(off+size) {
			continue
		}
		if extra != said {
			r.faults.Resized++
		} else if extra > MaxSnapshotExtra {
			r.faults.LongExtra++
		}
		return s, size, true
	}
	s, size, ok := r.with(off, said)
	if ok && said > MaxSnapshotExtra {
		r.faults.LongExtra++
	}
	return s, size, ok
}

// with decodes an entry as if it had extra data of that length.
func (r *snapshotRecovery) with(off int, extra int64) (Snapshot, int, bool) {
	b := r.b[off:]
	names := int64(binary.BigEndian.Uint16(b[12:])) + int64(binary.BigEndian.Uint16(b[14:]))
	size := snapshotHeaderSize + extra + names
	if size > int64(len(b)) {
		return Snapshot{}, 0, false
	}
	keep := min(extra, MaxSnapshotExtra)
	entry := make([]byte, 0, snapshotHeaderSize+keep+names)
	entry = append(entry, b[:snapshotHeaderSize+keep]...)
	entry = append(entry, b[snapshotHeaderSize+extra:size]...)
	binary.BigEndian.PutUint32(entry[36:], uint32(keep))
	s, _, err := parseSnapshot(entry, r.h)
	return s, int(size), err == nil
}

// plausible reports whether an entry names a snapshot. Where its L1 table lies may be damaged.
func (r *snapshotRecovery) plausible(s *Snapshot) bool {
	return s.ID != "" && isPrintable(s.ID) && isPrintable(s.Name)
}

func isPrintable(s string) bool {
	for _, c := range s {
		if !unicode.IsPrint(c) {
			return false
		}
	}
	return utf8.ValidString(s)
}

// leadsOn reports whether what follows an entry that ends at end can be the next one.
func (r *snapshotRecovery) leadsOn(end int) bool {
	off := int(roundUp8(int64(end)))
	if off+snapshotHeaderSize > len(r.b) {
		return false
	}
	b := r.b[off:]
	l1, idSize := HostOff(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint16(b[12:])
	nothing := isZeroBytes(b[:snapshotHeaderSize])
	return nothing || idSize > 0 && l1 != 0 && r.h.Layout().Aligned(l1) && uint64(l1) < uint64(r.fileSize)
}

func isZeroBytes(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
