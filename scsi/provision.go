package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/bits"

	"github.com/droverproject/drover/block"
)

// unmap gives the space of block ranges back. What is not a whole unit of the device's is zeroed: every block of the ranges
// reads as zeroes afterwards, as LBPRZ says of blocks that were given back.
func (u *Unit) unmap(c *call) error {
	if c.cdb[1]&1 != 0 { // ANCHOR
		return badField(1, 0)
	}
	if !u.provisioned() {
		return illegal(codeInvalidOpcode)
	}
	n := int(binary.BigEndian.Uint16(c.cdb[7:]))
	if n == 0 {
		return nil
	}
	list := c.data.take(n)
	if n < 8 || len(list) < 8 {
		return illegal(codeListLength)
	}
	descriptors := min(int(binary.BigEndian.Uint16(list[2:])), len(list)-8) / 16
	if descriptors > maxUnmapDescriptors {
		return badParameter(2)
	}
	ranges := list[8:][:descriptors*16]
	// All are looked at before the first is acted upon.
	for at := 0; at < len(ranges); at += 16 {
		lba, blocks := binary.BigEndian.Uint64(ranges[at:]), uint64(binary.BigEndian.Uint32(ranges[at+8:]))
		if err := u.inRange(lba, blocks); err != nil {
			return err
		}
	}
	for at := 0; at < len(ranges); at += 16 {
		off := u.bytes(binary.BigEndian.Uint64(ranges[at:]))
		if err := u.giveBack(c.ctx, off, u.bytes(uint64(binary.BigEndian.Uint32(ranges[at+8:])))); err != nil {
			return err
		}
	}
	return nil
}

func (u *Unit) giveBack(ctx context.Context, off, n int64) error {
	unlock, err := u.change(off, n, false)
	if err != nil {
		return err
	}
	defer unlock()
	return u.zero(ctx, off, n, true)
}

const (
	sameUnmap, sameAnchor, sameNoData = 0x08, 0x10, 0x01 // bits of WRITE SAME
)

// writeSame writes one block many times. Zeroes are not written out where the device knows better.
func (u *Unit) writeSame(c *call) error {
	long := c.cdb[0] == 0x93
	unmap, noData := c.cdb[1]&sameUnmap != 0, long && c.cdb[1]&sameNoData != 0
	if c.cdb[1]&sameAnchor != 0 {
		return badField(1, 4)
	}
	if unmap && !u.provisioned() {
		return badField(1, 3)
	}
	lba, blocks := extent(c.cdb)
	if err := u.inRange(lba, blocks); err != nil {
		return err
	}
	if blocks == 0 || blocks > maxWriteSameBlocks { // WSNZ
		return illegal(codeInvalidField)
	}
	one := make([]byte, 1<<u.shift)
	if !noData {
		if one = c.data.take(1 << u.shift); len(one) < 1<<u.shift || c.data.Len() > 1<<u.shift {
			return illegal(codeInvalidField)
		}
	}
	off, n := u.bytes(lba), u.bytes(blocks)
	unlock, err := u.change(off, n, false)
	if err != nil {
		return err
	}
	defer unlock()
	if len(bytes.Trim(one, "\x00")) == 0 {
		return u.zero(c.ctx, off, n, unmap)
	}
	return u.repeat(c.ctx, one, off, n)
}

func (u *Unit) zero(ctx context.Context, off, n int64, unmap bool) error {
	var flags block.ZeroFlags
	if unmap {
		flags |= block.ZeroUnmap
	}
	if !u.modeIs(modeWriteCache) {
		flags |= block.ZeroFUA
	}
	if err := u.dev.WriteZeroes(ctx, off, n, flags); err != nil {
		return u.writeFailed(err, off)
	}
	return nil
}

// repeat fills [off, off+n) with copies of one block.
func (u *Unit) repeat(ctx context.Context, one []byte, off, n int64) error {
	buf := bytes.Repeat(one, int(min(n, chunk))/len(one))
	for at := int64(0); at < n; at += int64(len(buf)) {
		p := buf[:min(n-at, int64(len(buf)))]
		if err := u.dev.WriteAt(ctx, p, off+at, u.writeFlags(false)); err != nil {
			return u.writeFailed(err, off+at)
		}
	}
	return nil
}

const (
	sanitizeImmediate, sanitizeExit = 0x80, 0x20 // bits of SANITIZE: IMMED, AUSE
)

// sanitize makes all of the disk unreadable: zeroes with the space given back, or, for an overwrite, a pattern written out.
func (u *Unit) sanitize(c *call) error {
	var pattern []byte
	if c.cdb[1]&actionMask == 0x01 {
		var err error
		if pattern, err = u.sanitizePattern(c); err != nil {
			return err
		}
	}
	t := &task{name: "SANITIZE", running: codeSanitizeInProgress, failing: codeSanitizeFailed, exit: c.cdb[1]&sanitizeExit != 0}
	return u.begin(c, t, c.cdb[1]&sanitizeImmediate != 0, func(ctx context.Context, t *task) error {
		return u.wipe(ctx, t, pattern)
	})
}

// exitFailure gives the disk back to initiators after a SANITIZE that failed, if its own initiator has allowed for that.
func (u *Unit) exitFailure(*call) error {
	t := u.tasks.failed.Load()
	if t == nil {
		return nil
	}
	if !t.exit {
		return badField(1, 4)
	}
	u.tasks.failed.CompareAndSwap(t, nil)
	return nil
}

// sanitizePattern returns the block that an overwrite writes.
func (u *Unit) sanitizePattern(c *call) ([]byte, error) {
	n := int(binary.BigEndian.Uint16(c.cdb[7:]))
	list := c.data.take(n)
	if n < 5 || n > 4+1<<u.shift {
		return nil, badField(7, -1)
	}
	if len(list) < n {
		return nil, illegal(codeListLength)
	}
	length := int(binary.BigEndian.Uint16(list[2:]))
	if length == 0 || length > 1<<u.shift || length != len(list)-4 {
		return nil, badParameter(2)
	}
	if list[0]&0x1F == 0 || list[0]&0x80 != 0 { // no overwrite at all; inverted between passes
		return nil, badParameter(0)
	}
	return bytes.Repeat(list[4:], (1<<u.shift+length-1)/length)[:1<<u.shift], nil
}

// Bits of FORMAT UNIT and of the header of its parameter list.
const (
	formatData, formatLong, formatDefects = 0x10, 0x20, 0x07 // FMTDATA, LONGLIST, DEFECT LIST FORMAT
	formatImmediate, formatPattern        = 0x02, 0x08       // IMMED, IP
)

// formatUnit zeroes the disk: its defects and its layout are nobody's business.
func (u *Unit) formatUnit(c *call) error {
	immediate, err := c.formatHeader()
	if err != nil {
		return err
	}
	t := &task{name: "FORMAT UNIT", running: codeFormatInProgress, failing: codeFormatFailed}
	return u.begin(c, t, immediate, func(ctx context.Context, t *task) error { return u.wipe(ctx, t, nil) })
}

// formatHeader reads the parameter list of a FORMAT UNIT. It may say nothing of protection, of patterns and of defects.
func (c *call) formatHeader() (immediate bool, err error) {
	if c.cdb[4]&0x02 != 0 { // of the fast formats, only the one whose blocks are zeroes
		return false, badField(4, 1)
	}
	if c.cdb[1]&formatData == 0 {
		if wrong := c.cdb[1] & (formatLong | formatDefects | 0x08); wrong != 0 {
			return false, badField(1, int8(bits.Len8(wrong)-1))
		}
		return false, nil
	}
	if c.cdb[1]&formatDefects != 0 {
		return false, badField(1, 2)
	}
	length := 4
	if c.cdb[1]&formatLong != 0 {
		length = 8
	}
	list := c.data.take(length)
	switch {
	case len(list) < length:
		return false, illegal(codeListLength)
	case list[0] != 0: // protection information
		return false, badParameter(0)
	case list[1]&formatPattern != 0:
		return false, badParameter(1)
	case length == 8 && list[3] != 0:
		return false, badParameter(3)
	}
	for at := length - length/2; at < length; at++ {
		if list[at] != 0 { // a list of defects
			return false, badParameter(length - length/2)
		}
	}
	return list[1]&formatImmediate != 0, nil
}
