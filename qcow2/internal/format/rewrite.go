package format

import (
	"bytes"
	"encoding/binary"
)

// HeaderWrite is bytes to be written at an offset of the file.
type HeaderWrite struct {
	Off  int64
	Data []byte
}

// HeaderPlan says how one header is replaced by another without a moment at which the file has neither.
type HeaderPlan struct {
	// Steps are made one after the other, with a sync after each. A power cut that keeps any subset of the sectors of a
	// step leaves a header that says what the old one said, or what the new one says; for a while the table of feature
	// names may be unreadable, which nothing depends on.
	Steps []HeaderWrite
	// Torn: this header has no room for that. A power cut during the first step can leave extensions or a backing file
	// name that are old in one sector and new in the next.
	Torn bool
}

// PlanHeader plans how the header in cur is replaced by next. cur is cluster 0 as it is in the file now, as far as the
// file reaches; it is a header that ParseHeader accepts. The error is that of next.Marshal.
//
// Only a sector is written as a whole, and sector 0 holds the header proper and the first extensions. So a change that
// sector 0 alone does not make is made by it: the other sectors are written where nothing of the old header lies, then
// sector 0 is switched. Where old and new overlap, the new extensions and the new name are first written behind both,
// and sector 0 skips to them with an extension that covers what lies between: a table of feature names, which readers
// look at only when they meet a feature they do not know, and which writers replace. Then what lies between is written,
// and sector 0 once more, without the detour.
func PlanHeader(cur []byte, next *Header) (*HeaderPlan, error) {
	marshalled, err := next.Marshal()
	if err != nil {
		return nil, err
	}
	clusterSize := 1 << next.ClusterBits
	cur = zeroExtend(cur, clusterSize)[:clusterSize]
	p := headerRewrite{cur: cur, want: zeroExtend(marshalled, clusterSize), end: len(marshalled), next: next, used: findUsed(cur)}
	return p.plan(), nil
}

// headerRewrite is what PlanHeader works on.
type headerRewrite struct {
	cur, want []byte // cluster 0, before and after
	end       int    // of what want says
	next      *Header
	used      usedHeader // what of cur means something
}

// usedHeader says which bytes of a header area mean something.
type usedHeader struct {
	extEnd           int // of header and extensions
	nameOff, nameEnd int // of the backing file name
}

func (u usedHeader) end() int { return max(u.extEnd, u.nameEnd) }

func (u usedHeader) has(i int) bool { return i < u.extEnd || i >= u.nameOff && i < u.nameEnd }

// findUsed finds the bytes that matter in a header area.
func findUsed(b []byte) usedHeader {
	_, f := decodeFields(b)
	if uint64(f.length) > uint64(len(b)) || f.backingOffset > uint64(len(b)) {
		return usedHeader{extEnd: len(b)} // not a header: all of it stays until it is replaced
	}
	a := extensionArea{b: b, off: uint64(f.length), end: uint64(len(b))}
	u := usedHeader{}
	if f.backingOffset != 0 {
		a.end = f.backingOffset
		u.nameOff = int(f.backingOffset)
		u.nameEnd = u.nameOff + int(min(uint64(f.backingSize), uint64(len(b))-f.backingOffset))
	}
	for {
		if _, _, ok, err := a.next(); err != nil || !ok {
			u.extEnd = int(min(a.off, uint64(len(b))))
			return u
		}
	}
}

func (p *headerRewrite) plan() *HeaderPlan {
	plan := &HeaderPlan{}
	leftover := p.used.end()
	switch first, last := p.differs(); {
	case first < 0:
	case first/SectorSize == last/SectorSize:
		at := first / SectorSize * SectorSize
		plan.add(at, p.want[at:at+SectorSize])
	case !p.overlaps():
		plan.add(SectorSize, p.want[SectorSize:p.end])
		plan.add(0, p.want[:SectorSize])
	default:
		if end, ok := p.detour(plan); ok {
			leftover = end
			break
		}
		plan.Torn = true
		plan.add(SectorSize, p.want[SectorSize:max(p.end, SectorSize)])
		plan.add(0, p.want[:SectorSize])
	}
	if leftover > p.end {
		plan.add(p.end, p.want[p.end:leftover]) // zeroes over what means nothing any more
	}
	return plan
}

func (plan *HeaderPlan) add(off int, data []byte) {
	plan.Steps = append(plan.Steps, HeaderWrite{int64(off), data})
}

// differs returns the first and the last byte that must change, -1 when none must. What lies behind the new header's end
// means nothing.
func (p *headerRewrite) differs() (first, last int) {
	first, last = -1, -1
	for i := range p.end {
		if p.cur[i] == p.want[i] {
			continue
		}
		if first < 0 {
			first = i
		}
		last = i
	}
	return first, last
}

// overlaps reports whether a byte behind sector 0 changes that the old header uses.
func (p *headerRewrite) overlaps() bool {
	for i := SectorSize; i < p.end; i++ {
		if p.cur[i] != p.want[i] && p.used.has(i) {
			return true
		}
	}
	return false
}

// detour plans the replacement by way of a copy behind both headers, and returns where that ends. It reports false when
// the cluster has no room for it, or the extensions do not begin in sector 0.
func (p *headerRewrite) detour(plan *HeaderPlan) (end int, ok bool) {
	start := p.next.encodedHeaderLength()
	if start+extensionHeadBytes > SectorSize {
		return 0, false
	}
	behind := int(roundUp8(int64(max(p.used.end(), p.end) - start)))
	at := start + extensionHeadBytes + behind

	// The names of features can wait; everything else must be there at the moment of the switch.
	short := *p.next
	short.FeatureNames = nil
	stage, err := short.appendExtensions(nil)
	if err != nil {
		return 0, false
	}
	nameAt := at + len(stage)
	stage = append(stage, p.next.BackingFile...)
	if at+len(stage) > len(p.want) {
		return 0, false
	}
	sector := bytes.Clone(p.want[:SectorSize])
	if p.next.BackingFile != "" {
		binary.BigEndian.PutUint64(sector[OffBackingOffset:], uint64(nameAt))
	}
	clear(sector[start:])
	binary.BigEndian.PutUint32(sector[start:], extFeatureNames)
	binary.BigEndian.PutUint32(sector[start+4:], uint32(behind))

	plan.add(at, stage)
	plan.add(0, sector)
	if p.end > SectorSize {
		plan.add(SectorSize, p.want[SectorSize:p.end])
	}
	plan.add(0, p.want[:SectorSize])
	return at + len(stage), true
}
