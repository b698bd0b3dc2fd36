package scsi

import (
	"encoding/binary"
	"math/bits"
)

// flags of a command.
type flags uint8

const (
	// always: runs whatever the unit has to tell, and in every access state.
	always flags = 1 << iota
	// writes: refused where the unit is write-protected.
	writes
	// lunField: the three highest bits of byte 1 are not looked at. SCSI-2 had the LUN there, and Linux still sends it so to a
	// target that it knows nothing of.
	lunField
)

// noAction marks a command without service actions.
const noAction = -1

// command is one entry of the unit's repertoire.
type command struct {
	op     byte
	action int // service action, or noAction
	name   string
	flags  flags
	// usage has a bit set for every bit of the descriptor block that the unit evaluates. Byte 0 is the operation code
	// itself, as REPORT SUPPORTED OPERATION CODES wants it.
	usage []byte
	run   func(*Unit, *call) error
}

// actionByte and actionMask: where a descriptor block has its service action.
const (
	actionByte = 1
	actionMask = 0x1F
)

// repertoire lists the commands.
func repertoire() []command {
	const f = 0xFF
	all4, all8 := []byte{f, f, f, f}, []byte{f, f, f, f, f, f, f, f}
	cdb := func(parts ...[]byte) []byte {
		var b []byte
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	b := func(v ...byte) []byte { return v }
	return []command{
		{0x00, noAction, "TEST UNIT READY", 0, b(0x00, 0, 0, 0, 0, 0), (*Unit).testUnitReady},
		{0x03, noAction, "REQUEST SENSE", always, b(0x03, 0x01, 0, 0, f, 0), (*Unit).requestSense},
		{0x04, noAction, "FORMAT UNIT", writes, b(0x04, 0x3F, 0, 0, 0x03, 0), (*Unit).formatUnit},
		{0x08, noAction, "READ(6)", 0, b(0x08, 0x1F, f, f, f, 0), (*Unit).read},
		{0x0A, noAction, "WRITE(6)", writes, b(0x0A, 0x1F, f, f, f, 0), (*Unit).write},
		{0x12, noAction, "INQUIRY", always | lunField, b(0x12, 0x01, f, f, f, 0), (*Unit).inquiry},
		{0x15, noAction, "MODE SELECT(6)", 0, b(0x15, 0x11, 0, 0, f, 0), (*Unit).modeSelect},
		{0x1A, noAction, "MODE SENSE(6)", 0, b(0x1A, 0x08, f, f, f, 0), (*Unit).modeSense},
		{0x1B, noAction, "START STOP UNIT", 0, b(0x1B, 0x01, 0, 0x0F, 0xF7, 0), (*Unit).startStop},
		{0x1D, noAction, "SEND DIAGNOSTIC", 0, b(0x1D, 0x04, 0, 0, 0, 0), (*Unit).testUnitReady},
		{0x1E, noAction, "PREVENT ALLOW MEDIUM REMOVAL", 0, b(0x1E, 0, 0, 0, 0x03, 0), (*Unit).testUnitReady},
		{0x25, noAction, "READ CAPACITY(10)", 0, b(0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0), (*Unit).readCapacity10},
		{0x28, noAction, "READ(10)", 0, cdb(b(0x28, 0x18), all4, b(0x1F, f, f, 0)), (*Unit).read},
		{0x2A, noAction, "WRITE(10)", writes, cdb(b(0x2A, 0x18), all4, b(0x1F, f, f, 0)), (*Unit).write},
		{0x2E, noAction, "WRITE AND VERIFY(10)", writes, cdb(b(0x2E, 0x12), all4, b(0x1F, f, f, 0)), (*Unit).writeAndVerify},
		{0x2F, noAction, "VERIFY(10)", 0, cdb(b(0x2F, 0x16), all4, b(0x1F, f, f, 0)), (*Unit).verify},
		{0x34, noAction, "PRE-FETCH(10)", 0, cdb(b(0x34, 0x02), all4, b(0x1F, f, f, 0)), (*Unit).prefetch},
		{0x35, noAction, "SYNCHRONIZE CACHE(10)", 0, cdb(b(0x35, 0x02), all4, b(0x1F, f, f, 0)), (*Unit).synchronize},
		{0x41, noAction, "WRITE SAME(10)", writes, cdb(b(0x41, 0x18), all4, b(0x1F, f, f, 0)), (*Unit).writeSame},
		{0x42, noAction, "UNMAP", writes, b(0x42, 0x01, 0, 0, 0, 0, 0x1F, f, f, 0), (*Unit).unmap},
		{0x48, 0x01, "SANITIZE OVERWRITE", writes, b(0x48, 0xA1, 0, 0, 0, 0, 0, f, f, 0), (*Unit).sanitize},
		{0x48, 0x02, "SANITIZE BLOCK ERASE", writes, b(0x48, 0xA2, 0, 0, 0, 0, 0, 0, 0, 0), (*Unit).sanitize},
		{0x48, 0x1F, "SANITIZE EXIT FAILURE MODE", 0, b(0x48, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0), (*Unit).exitFailure},
		{0x55, noAction, "MODE SELECT(10)", 0, b(0x55, 0x11, 0, 0, 0, 0, 0, f, f, 0), (*Unit).modeSelect},
		{0x5A, noAction, "MODE SENSE(10)", 0, b(0x5A, 0x18, f, f, 0, 0, 0, f, f, 0), (*Unit).modeSense},
		{0x83, 0x00, "EXTENDED COPY(LID1)", 0, cdb(b(0x83, 0x00), make([]byte, 8), all4, b(0, 0)), (*Unit).extendedCopy},
		{0x84, 0x00, "RECEIVE COPY STATUS(LID1)", 0, cdb(b(0x84, 0x00, f), make([]byte, 7), all4, b(0, 0)), (*Unit).receiveCopy},
		{0x84, 0x03, "RECEIVE COPY OPERATING PARAMETERS", 0, cdb(b(0x84, 0x03, f), make([]byte, 7), all4, b(0, 0)), (*Unit).receiveCopy},
		{0x84, 0x04, "RECEIVE COPY FAILURE DETAILS(LID1)", 0, cdb(b(0x84, 0x04, f), make([]byte, 7), all4, b(0, 0)), (*Unit).receiveCopy},
		{0x88, noAction, "READ(16)", 0, cdb(b(0x88, 0x18), all8, all4, b(0x1F, 0)), (*Unit).read},
		{0x89, noAction, "COMPARE AND WRITE", writes, cdb(b(0x89, 0x18), all8, b(0, 0, 0, f, 0x1F, 0)), (*Unit).compareAndWrite},
		{0x8A, noAction, "WRITE(16)", writes, cdb(b(0x8A, 0x18), all8, all4, b(0x1F, 0)), (*Unit).write},
		{0x8B, noAction, "ORWRITE(16)", writes, cdb(b(0x8B, 0x18), all8, all4, b(0x1F, 0)), (*Unit).orWrite},
		{0x8E, noAction, "WRITE AND VERIFY(16)", writes, cdb(b(0x8E, 0x12), all8, all4, b(0x1F, 0)), (*Unit).writeAndVerify},
		{0x8F, noAction, "VERIFY(16)", 0, cdb(b(0x8F, 0x16), all8, all4, b(0x1F, 0)), (*Unit).verify},
		{0x90, noAction, "PRE-FETCH(16)", 0, cdb(b(0x90, 0x02), all8, all4, b(0x1F, 0)), (*Unit).prefetch},
		{0x91, noAction, "SYNCHRONIZE CACHE(16)", 0, cdb(b(0x91, 0x02), all8, all4, b(0x1F, 0)), (*Unit).synchronize},
		{0x93, noAction, "WRITE SAME(16)", writes, cdb(b(0x93, 0x19), all8, all4, b(0x1F, 0)), (*Unit).writeSame},
		{0x9E, 0x10, "READ CAPACITY(16)", 0, cdb(b(0x9E, 0x10), make([]byte, 8), all4, b(0, 0)), (*Unit).readCapacity16},
		{0x9E, 0x12, "GET LBA STATUS", 0, cdb(b(0x9E, 0x12), all8, all4, b(0, 0)), (*Unit).getLBAStatus},
		{0xA0, noAction, "REPORT LUNS", always, cdb(b(0xA0, 0, f, 0, 0, 0), all4, b(0, 0)), (*Unit).reportLUNs},
		{0xA3, 0x0A, "REPORT TARGET PORT GROUPS", always, cdb(b(0xA3, 0xEA, 0, 0, 0, 0), all4, b(0, 0)), (*Unit).reportPortGroups},
		{0xA3, 0x0C, "REPORT SUPPORTED OPERATION CODES", always, cdb(b(0xA3, 0x0C, 0x87, f, f, f), all4, b(0, 0)), (*Unit).reportOpcodes},
		{0xA3, 0x0D, "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", always, cdb(b(0xA3, 0x0D, 0x80, 0, 0, 0), all4, b(0, 0)), (*Unit).reportTaskManagement},
		{0xA4, 0x0A, "SET TARGET PORT GROUPS", always, cdb(b(0xA4, 0x0A, 0, 0, 0, 0), all4, b(0, 0)), (*Unit).setPortGroups},
		{0xA8, noAction, "READ(12)", 0, cdb(b(0xA8, 0x18), all4, all4, b(0x1F, 0)), (*Unit).read},
		{0xAA, noAction, "WRITE(12)", writes, cdb(b(0xAA, 0x18), all4, all4, b(0x1F, 0)), (*Unit).write},
		{0xAE, noAction, "WRITE AND VERIFY(12)", writes, cdb(b(0xAE, 0x12), all4, all4, b(0x1F, 0)), (*Unit).writeAndVerify},
		{0xAF, noAction, "VERIFY(12)", 0, cdb(b(0xAF, 0x16), all4, all4, b(0x1F, 0)), (*Unit).verify},
	}
}

// catalogue is the repertoire by operation code.
type catalogue [256][]command

func newCatalogue() *catalogue {
	byOp := new(catalogue)
	for _, c := range repertoire() {
		byOp[c.op] = append(byOp[c.op], c)
	}
	return byOp
}

// find returns the command that a descriptor block asks for.
func (all *catalogue) find(cdb []byte) (*command, error) {
	if len(cdb) < 6 {
		return nil, illegal(codeInvalidOpcode)
	}
	list := all[cdb[0]]
	if len(list) == 0 {
		return nil, illegal(codeInvalidOpcode)
	}
	for i := range list {
		c := &list[i]
		if c.action != noAction && int(cdb[actionByte]&actionMask) != c.action {
			continue
		}
		if len(cdb) < len(c.usage) {
			return nil, illegal(codeInvalidField)
		}
		return c, nil
	}
	return nil, badField(actionByte, 4)
}

// checkBits refuses bits that mean something the unit does not do.
func (c *command) checkBits(cdb []byte) error {
	for i := 1; i < len(c.usage); i++ {
		mask := c.usage[i]
		if i == actionByte && c.action != noAction {
			mask |= byte(c.action)
		}
		if i == actionByte && c.flags&lunField != 0 {
			mask |= 0xE0
		}
		if wrong := cdb[i] &^ mask; wrong != 0 {
			return badField(i, int8(bits.Len8(wrong)-1))
		}
	}
	return nil
}

// extent returns the LBA and the number of blocks that a medium command names.
func extent(cdb []byte) (lba, n uint64) {
	be := binary.BigEndian
	switch cdb[0] >> 5 {
	case 0:
		lba, n = uint64(be.Uint32(cdb)&0x1FFFFF), uint64(cdb[4])
		if n == 0 {
			n = 256
		}
	case 1, 2:
		lba, n = uint64(be.Uint32(cdb[2:])), uint64(be.Uint16(cdb[7:]))
	case 5:
		lba, n = uint64(be.Uint32(cdb[2:])), uint64(be.Uint32(cdb[6:]))
	default:
		lba, n = be.Uint64(cdb[2:]), uint64(be.Uint32(cdb[10:]))
	}
	return lba, n
}

// inRange refuses blocks that the disk does not have.
func (u *Unit) inRange(lba, n uint64) error {
	if total := u.blocks(); lba > total || n > total-lba {
		return withInfo(keyIllegalRequest, codeLBAOutOfRange, lba)
	}
	return nil
}
