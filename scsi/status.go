package scsi

import (
	"encoding/binary"
	"errors"
	"math/bits"

	"github.com/droverproject/drover/block"
)

// testUnitReady has nothing to do: what could be wrong was looked at before.
func (u *Unit) testUnitReady(*call) error { return nil }

// requestSense tells what is pending as data, and takes it away.
func (u *Unit) requestSense(c *call) error {
	sense := &senseError{}
	if code, ok := u.nextAttention(); ok {
		sense = &senseError{key: keyUnitAttention, code: code}
	} else if t := u.tasks.current.Load(); t != nil {
		sense = t.sense()
	} else if t := u.tasks.failed.Load(); t != nil {
		sense = t.failure()
	}
	c.reply(sense.encode(c.cdb[1]&1 != 0), uint32(c.cdb[4]))
	return nil
}

// startStop takes what a disk that is always on can do: start, and flush before a stop.
func (u *Unit) startStop(c *call) error {
	if power := c.cdb[4] >> 4; power != 0 {
		return nil // every power condition is the same here
	}
	if c.cdb[4]&0x02 != 0 { // LOEJ: nothing can be taken out
		return badField(4, 1)
	}
	if c.cdb[4]&0x01 == 0 && c.cdb[4]&0x04 == 0 {
		return u.dev.Flush(c.ctx)
	}
	return nil
}

func (u *Unit) readCapacity10(c *call) error {
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, uint32(min(u.blocks()-1, 0xFFFFFFFF)))
	binary.BigEndian.PutUint32(b[4:], 1<<u.shift)
	c.reply(b, 8)
	return nil
}

func (u *Unit) readCapacity16(c *call) error {
	b := make([]byte, 32)
	binary.BigEndian.PutUint64(b, u.blocks()-1)
	binary.BigEndian.PutUint32(b[8:], 1<<u.shift)
	b[13] = byte(bits.Len(uint(max(u.dev.Info().MinAlign, 4096)>>u.shift)) - 1) // logical blocks per physical block
	if u.provisioned() {
		b[14] = 0xC0 // LBPME, LBPRZ
	}
	c.reply(b, binary.BigEndian.Uint32(c.cdb[10:]))
	return nil
}

// Provisioning states of GET LBA STATUS.
const (
	stateMapped      = 0
	stateDeallocated = 1
)

// maxStatusDescriptors bounds one answer of GET LBA STATUS.
const maxStatusDescriptors = 1024

// getLBAStatus tells from the device's extents which blocks take space. Neighbours in one state make one descriptor.
func (u *Unit) getLBAStatus(c *call) error {
	lba := binary.BigEndian.Uint64(c.cdb[2:])
	if total := u.blocks(); lba >= total {
		return withInfo(keyIllegalRequest, codeLBAOutOfRange, lba)
	}
	allocated := binary.BigEndian.Uint32(c.cdb[10:])
	room := min(max(int(min(allocated, 1<<20))-8, 16)/16, maxStatusDescriptors)
	list, err := u.lbaStates(c, lba, room)
	if err != nil {
		return err
	}
	b := make([]byte, 8, 8+16*len(list))
	binary.BigEndian.PutUint32(b, uint32(4+16*len(list)))
	for _, s := range list {
		b = binary.BigEndian.AppendUint64(b, s.lba)
		b = binary.BigEndian.AppendUint32(b, uint32(s.n))
		b = append(b, s.state, 0, 0, 0)
	}
	c.reply(b, allocated)
	return nil
}

type lbaState struct {
	lba, n uint64
	state  byte
}

func (u *Unit) lbaStates(c *call, lba uint64, room int) ([]lbaState, error) {
	var list []lbaState
	off := u.bytes(lba)
	end := u.bytes(u.blocks())
	err := u.dev.Extents(c.ctx, off, end-off, func(x block.Extent) bool {
		state := byte(stateMapped)
		if x.Zero && !x.Data {
			state = stateDeallocated
		}
		// An extent that ends within a block leaves that block to the next, as mapped if either is.
		from, to := uint64(x.Off)>>u.shift, (uint64(x.End())+1<<u.shift-1)>>u.shift
		if state == stateDeallocated {
			to = uint64(x.End()) >> u.shift
			from = (uint64(x.Off) + 1<<u.shift - 1) >> u.shift
		}
		if k := len(list); k > 0 {
			from = max(from, list[k-1].lba+list[k-1].n)
			if list[k-1].state == state && from == list[k-1].lba+list[k-1].n && list[k-1].n+to-from <= 0xFFFFFFFF && to > from {
				list[k-1].n += to - from
				return true
			}
		}
		if to <= from {
			return true
		}
		if len(list) == room {
			return false
		}
		list = append(list, lbaState{from, min(to-from, 0xFFFFFFFF), state})
		return to-from <= 0xFFFFFFFF
	})
	if err != nil && !errors.Is(err, block.ErrOutOfRange) {
		return nil, u.readFailed(err, off)
	}
	return list, nil
}

func (u *Unit) reportLUNs(c *call) error {
	allocated := binary.BigEndian.Uint32(c.cdb[6:])
	if allocated < 16 {
		return badField(6, -1)
	}
	b := make([]byte, 16)
	if c.cdb[2] == 0x01 { // only well-known units, of which there are none
		c.reply(b[:8], allocated)
		return nil
	}
	if c.cdb[2] > 0x02 {
		return badField(2, -1)
	}
	b[3] = 8
	c.reply(b, allocated)
	return nil
}

// Forms of REPORT SUPPORTED OPERATION CODES.
const (
	reportAll           = 0
	reportOp            = 1
	reportOpAction      = 2
	reportOpMaybeAction = 3
)

func (u *Unit) reportOpcodes(c *call) error {
	allocated := binary.BigEndian.Uint32(c.cdb[6:])
	timeouts := c.cdb[2]&0x80 != 0
	op, action := c.cdb[3], int(binary.BigEndian.Uint16(c.cdb[4:]))
	switch form := c.cdb[2] & 7; form {
	case reportAll:
		c.reply(u.commands.all(timeouts), allocated)
		return nil
	case reportOp, reportOpAction, reportOpMaybeAction:
		b, err := u.commands.one(form, op, action, timeouts)
		if err != nil {
			return err
		}
		c.reply(b, allocated)
		return nil
	}
	return badField(2, 2)
}

// timeoutDescriptor says that no timeout is known.
var timeoutDescriptor = []byte{0, 0x0A, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

func (all *catalogue) all(timeouts bool) []byte {
	b := make([]byte, 4)
	for _, list := range all {
		for _, cmd := range list {
			d := []byte{cmd.op, 0, 0, 0, 0, flag(cmd.action != noAction, 1), 0, byte(len(cmd.usage))}
			if cmd.action != noAction {
				binary.BigEndian.PutUint16(d[2:], uint16(cmd.action))
			}
			if timeouts {
				d[5] |= 2
				d = append(d, timeoutDescriptor...)
			}
			b = append(b, d...)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// one answers whether a command is there: SUPPORT 1 is no, 3 is as the standard says.
func (all *catalogue) one(form, op byte, action int, timeouts bool) ([]byte, error) {
	list := all[op]
	actions := len(list) > 0 && list[0].action != noAction
	switch {
	case form == reportOp && actions:
		return nil, badField(2, 2)
	case form == reportOpAction && len(list) > 0 && !actions:
		return nil, badField(2, 2)
	case form == reportOpMaybeAction && !actions && action != 0:
		list = nil
	}
	for _, cmd := range list {
		if cmd.action != noAction && cmd.action != action {
			continue
		}
		b := append([]byte{0, 3, 0, byte(len(cmd.usage))}, cmd.usage...)
		if cmd.action != noAction {
			b[4+actionByte] |= actionMask
		}
		if timeouts {
			b[1] |= 0x80
			b = append(b, timeoutDescriptor...)
		}
		return b, nil
	}
	return []byte{0, 1, 0, 0}, nil
}

func (u *Unit) reportTaskManagement(c *call) error {
	allocated := binary.BigEndian.Uint32(c.cdb[6:])
	if allocated < 4 {
		return badField(6, -1)
	}
	b := make([]byte, 16)
	b[0] = 0xC8 // ATS, ABORT TASK SET… LOGICAL UNIT RESET: ABORT TASK, ABORT TASK SET, LOGICAL UNIT RESET
	n := 4
	if c.cdb[2]&0x80 != 0 {
		n, b[3] = 16, 12
	}
	c.reply(b[:n], allocated)
	return nil
}
