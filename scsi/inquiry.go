package scsi

import (
	"encoding/binary"
	"strings"
)

// vpdPages are the vital product data pages that a unit has.
var vpdPages = map[byte]func(*Unit) []byte{
	0x80: (*Unit).serialPage,
	0x83: (*Unit).identificationPage,
	0x86: (*Unit).extendedPage,
	0xB0: (*Unit).limitsPage,
	0xB1: (*Unit).characteristicsPage,
	0xB2: (*Unit).provisioningPage,
}

func (u *Unit) inquiry(c *call) error {
	allocated := uint32(binary.BigEndian.Uint16(c.cdb[3:]))
	if c.cdb[1]&1 == 0 {
		if c.cdb[2] != 0 {
			return badField(2, -1)
		}
		c.reply(u.standardInquiry(), allocated)
		return nil
	}
	page := c.cdb[2]
	if page == 0 {
		c.reply([]byte{0, 0, 0, byte(len(vpdPages) + 1), 0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2}, allocated)
		return nil
	}
	make, ok := vpdPages[page]
	if !ok {
		return badField(2, -1)
	}
	body := make(u)
	head := []byte{0, page, byte(len(body) >> 8), byte(len(body))}
	c.reply(append(head, body...), allocated)
	return nil
}

// padded returns s in n bytes, filled up with spaces.
func padded(s string, n int) []byte {
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7E {
			return '_'
		}
		return r
	}, s)
	return []byte(s + strings.Repeat(" ", max(n-len(s), 0)))[:n]
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

func (u *Unit) vendor() []byte { return padded(orDefault(u.o.Vendor, "DROVER"), 8) }

func (u *Unit) standardInquiry() []byte {
	b := make([]byte, 74)
	b[2] = 0x06 // SPC-4
	b[3] = 0x12 // HISUP, response format 2
	b[4] = byte(len(b) - 5)
	b[5] = 0x18 // TPGS implicit, 3PC
	b[7] = 0x02 // CMDQUE
	copy(b[8:], u.vendor())
	copy(b[16:], padded(orDefault(u.o.Product, "VIRTUAL DISK"), 16))
	copy(b[32:], padded(orDefault(u.o.Revision, "0001"), 4))
	for i, standard := range []uint16{0x00A0, 0x0460, 0x04C0, 0x0600} { // SAM-5, SPC-4, SBC-3, SBC-4
		binary.BigEndian.PutUint16(b[58+2*i:], standard)
	}
	return b
}

func (u *Unit) serialPage() []byte { return []byte(u.o.Serial()) }

// NAA returns the unit's name: the prefix that LIO gives its disks, and the serial number's hexadecimal digits. The kernel
// does so for its own backstores, so that a disk keeps its name when what serves it changes.
func (u *Unit) NAA() [16]byte { return naaExtended(u.o.Serial()) }

func naaExtended(serial string) (naa [16]byte) {
	digits := append([]byte{6, 0, 0, 1, 4, 0, 5}, make([]byte, 25)...)
	k := 7
	for i := 0; i < len(serial) && k < len(digits); i++ {
		if v := strings.IndexByte("0123456789abcdef", lower(serial[i])); v >= 0 {
			digits[k] = byte(v)
			k++
		}
	}
	for i := range naa {
		naa[i] = digits[2*i]<<4 | digits[2*i+1]
	}
	return naa
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// designator returns one designation descriptor: code set 1 is binary, 2 ASCII.
func designator(codeSet, association, kind byte, name []byte) []byte {
	return append([]byte{codeSet, association<<4 | kind, 0, byte(len(name))}, name...)
}

func (u *Unit) identificationPage() []byte {
	naa := u.NAA()
	t10 := append(u.vendor(), u.o.Serial()...)
	b := designator(1, 0, 3, naa[:])
	b = append(b, designator(2, 0, 1, t10[:min(len(t10), 255)])...)
	b = append(b, designator(1, 1, 4, []byte{0, 0, 0, 1})...) // relative target port
	return append(b, designator(1, 1, 5, []byte{0, 0, 0, portGroup})...)
}

func (u *Unit) extendedPage() []byte {
	b := make([]byte, 60)
	b[1] = 0x07 // HEADSUP, ORDSUP, SIMPSUP
	b[2] = 0x01 // V_SUP: a volatile cache
	if !u.dev.Info().Volatile {
		b[2] = 0
	}
	return b
}

// provisioned reports whether the disk gives space back.
func (u *Unit) provisioned() bool {
	return u.dev.Info().DiscardAlign > 0 && !u.o.ReadOnly && !u.dev.Info().ReadOnly
}

// granularity returns the unit in which space is given back, in blocks.
func (u *Unit) granularity() uint32 {
	return uint32(max(u.dev.Info().DiscardAlign>>u.shift, 1))
}

// Limits of what one command may ask for.
const (
	maxUnmapDescriptors = 4095         // as many as fit in a parameter list of 64 KiB
	maxUnmapBlocks      = 0xFFFFFFFF   // in one UNMAP
	maxWriteSameBlocks  = 4 << 30 >> 9 // 4 GiB of small blocks
)

func (u *Unit) limitsPage() []byte {
	b := make([]byte, 60)
	be := binary.BigEndian
	b[0] = 0x01 // WSNZ: WRITE SAME of no blocks does not mean all
	b[1] = maxCompare
	prefer := uint32(max(u.dev.Info().PreferAlign>>u.shift, 1))
	be.PutUint16(b[2:], uint16(min(prefer, 0xFFFF)))
	be.PutUint32(b[4:], u.o.MaxTransfer)
	best := uint32(1<<20) >> u.shift
	if u.o.MaxTransfer > 0 {
		best = min(best, u.o.MaxTransfer)
	}
	be.PutUint32(b[8:], best)
	if u.provisioned() {
		be.PutUint32(b[16:], maxUnmapBlocks)
		be.PutUint32(b[20:], maxUnmapDescriptors)
		be.PutUint32(b[24:], u.granularity())
		be.PutUint32(b[28:], 0x80000000) // UGAVALID, alignment 0
	}
	be.PutUint64(b[32:], maxWriteSameBlocks)
	return b
}

func (u *Unit) characteristicsPage() []byte {
	b := make([]byte, 60)
	binary.BigEndian.PutUint16(b, 1) // does not rotate
	b[3] = 0x40                      // WABEREQ: blocks that SANITIZE BLOCK ERASE erased can be read
	return b
}

func (u *Unit) provisioningPage() []byte {
	b := make([]byte, 4)
	if u.provisioned() {
		b[1] = 0xE4 // LBPU, LBPWS, LBPWS10, LBPRZ: what was given back reads as zeroes
		b[2] = 0x02 // thin
	} else {
		b[2] = 0x01 // every block has its resource
	}
	return b
}
