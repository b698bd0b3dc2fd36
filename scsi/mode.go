package scsi

import "encoding/binary"

// modeBits are what initiators can set in mode pages.
type modeBits = uint32

const (
	modeWriteCache      modeBits = 1 << iota // caching page, WCE
	modeDescriptorSense                      // control page, D_SENSE
	modeWriteProtect                         // control page, SWP
)

func (u *Unit) defaultMode() modeBits {
	if u.dev.Info().Volatile {
		return modeWriteCache
	}
	return 0
}

func (u *Unit) modeIs(bit modeBits) bool { return u.mode.Load()&bit != 0 }

// Page controls of MODE SENSE.
const (
	pageCurrent = iota
	pageChangeable
	pageDefault
	pageSaved
)

// modePage makes one mode page from mode bits. In the changeable form all bits that can be changed are set.
type modePage struct {
	code byte
	make func(bits modeBits, changeable bool) []byte
}

func flag(on bool, bit byte) byte {
	if on {
		return bit
	}
	return 0
}

var modePages = []modePage{
	{0x01, func(modeBits, bool) []byte { return make([]byte, 12) }}, // read-write error recovery
	{0x08, func(bits modeBits, _ bool) []byte { // caching
		b := make([]byte, 20)
		b[2] = flag(bits&modeWriteCache != 0, 0x04)
		return b
	}},
	{0x0A, func(bits modeBits, changeable bool) []byte { // control
		b := make([]byte, 12)
		b[2] = flag(bits&modeDescriptorSense != 0, 0x04)
		b[4] = flag(bits&modeWriteProtect != 0, 0x08)
		if !changeable {
			b[3] = 0x10 // unrestricted reordering
		}
		return b
	}},
	{0x1C, func(_ modeBits, changeable bool) []byte { // informational exceptions
		b := make([]byte, 12)
		if !changeable {
			b[2] = 0x08 // DEXCPT: none are reported
		}
		return b
	}},
}

// page returns a mode page with its header.
func (u *Unit) page(p modePage, control byte) []byte {
	bits, changeable := u.mode.Load(), false
	switch control {
	case pageChangeable:
		bits, changeable = ^modeBits(0), true
	case pageDefault:
		bits = u.defaultMode()
	}
	b := p.make(bits, changeable)
	b[0], b[1] = p.code, byte(len(b)-2)
	return b
}

func (u *Unit) modeSense(c *call) error {
	ten := c.cdb[0] == 0x5A
	want, sub, control := c.cdb[2]&0x3F, c.cdb[3], c.cdb[2]>>6
	if control == pageSaved {
		return illegal(codeSavingNotSupported)
	}
	if sub != 0 && !(sub == 0xFF && want == 0x3F) {
		return badField(3, -1)
	}
	var pages []byte
	for _, p := range modePages {
		if want == 0x3F || want == p.code {
			pages = append(pages, u.page(p, control)...)
		}
	}
	if pages == nil {
		return badField(2, 5)
	}
	device := byte(0x10) // DPOFUA
	if u.writeProtected() {
		device |= 0x80
	}
	var descriptor []byte
	if c.cdb[1]&0x08 == 0 {
		descriptor = u.blockDescriptor(ten && c.cdb[1]&0x10 != 0)
	}
	if ten {
		b := make([]byte, 8)
		binary.BigEndian.PutUint16(b, uint16(6+len(descriptor)+len(pages)))
		b[3], b[7] = device, byte(len(descriptor))
		b[4] = flag(len(descriptor) == 16, 1)
		c.reply(append(append(b, descriptor...), pages...), uint32(binary.BigEndian.Uint16(c.cdb[7:])))
		return nil
	}
	b := []byte{byte(3 + len(descriptor) + len(pages)), 0, device, byte(len(descriptor))}
	c.reply(append(append(b, descriptor...), pages...), uint32(c.cdb[4]))
	return nil
}

// blockDescriptor tells capacity and block length; the long one has room for large disks.
func (u *Unit) blockDescriptor(long bool) []byte {
	be := binary.BigEndian
	if long {
		b := make([]byte, 16)
		be.PutUint64(b, u.blocks())
		be.PutUint32(b[12:], 1<<u.shift)
		return b
	}
	b := make([]byte, 8)
	be.PutUint32(b, uint32(min(u.blocks(), 0xFFFFFFFF)))
	be.PutUint32(b[4:], 1<<u.shift) // the upper byte is reserved, and 0
	return b
}

// modeSelect takes the bits that can be changed, and nothing else that differs from what is so.
func (u *Unit) modeSelect(c *call) error {
	if c.cdb[1]&0x01 != 0 { // SP: nothing is saved
		return badField(1, 0)
	}
	length, header := int(c.cdb[4]), 4
	if c.cdb[0] == 0x55 {
		length, header = int(binary.BigEndian.Uint16(c.cdb[7:])), 8
	}
	if length == 0 {
		return nil
	}
	list := c.data.take(length)
	if len(list) < header {
		return illegal(codeListLength)
	}
	descriptors := int(list[3])
	if header == 8 {
		descriptors = int(binary.BigEndian.Uint16(list[6:]))
	}
	at := header + descriptors
	if at > len(list) {
		return illegal(codeListLength)
	}
	if err := u.acceptDescriptor(list[header:at], header); err != nil {
		return err
	}
	bits := u.mode.Load()
	old := bits
	for at < len(list) {
		n, next, err := u.selectPage(list[at:], at, bits)
		if err != nil {
			return err
		}
		at, bits = at+n, next
	}
	if bits != old {
		u.mode.Store(bits)
		if old&modeWriteCache != 0 && bits&modeWriteCache == 0 {
			return u.dev.Flush(c.ctx) // what was cached until now must not stay so
		}
	}
	return nil
}

// acceptDescriptor takes a block descriptor that says what is so.
func (u *Unit) acceptDescriptor(b []byte, at int) error {
	switch len(b) {
	case 0:
		return nil
	case 8:
		if n := binary.BigEndian.Uint32(b[4:]) & 0xFFFFFF; n != 0 && n != 1<<u.shift {
			return badParameter(at + 5)
		}
		return nil
	case 16:
		if n := binary.BigEndian.Uint32(b[12:]); n != 0 && n != 1<<u.shift {
			return badParameter(at + 12)
		}
		return nil
	}
	return badParameter(at)
}

// selectPage takes one page and returns its length and the mode with it.
func (u *Unit) selectPage(b []byte, at int, bits modeBits) (int, modeBits, error) {
	if len(b) < 2 {
		return 0, 0, illegal(codeListLength)
	}
	for _, p := range modePages {
		if b[0]&0x7F != p.code {
			continue
		}
		now, can := p.make(bits, false), p.make(^modeBits(0), true)
		if int(b[1]) != len(now)-2 {
			return 0, 0, badParameter(at + 1)
		}
		if len(b) < len(now) {
			return 0, 0, illegal(codeListLength)
		}
		for i := 2; i < len(now); i++ {
			if (b[i]^now[i])&^can[i] != 0 {
				return 0, 0, badParameter(at + i)
			}
		}
		return len(now), setPage(p.code, b, bits), nil
	}
	return 0, 0, badParameter(at)
}

// setPage returns the mode with what a page says of it.
func setPage(page byte, b []byte, bits modeBits) modeBits {
	set := func(on bool, bit modeBits) {
		bits &^= bit
		if on {
			bits |= bit
		}
	}
	switch page {
	case 0x08:
		set(b[2]&0x04 != 0, modeWriteCache)
	case 0x0A:
		set(b[2]&0x04 != 0, modeDescriptorSense)
		set(b[4]&0x08 != 0, modeWriteProtect)
	}
	return bits
}
