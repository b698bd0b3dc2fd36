package scsi

import (
	"bytes"

	"github.com/droverproject/drover/block"
)

const (
	bitDPO, bitFUA = 0x10, 0x08 // of byte 1 of reads and writes
	chunk          = 1 << 20    // of memory that a command uses for itself at a time
)

// transfer checks the range of a medium command and returns it in bytes. What moves is cut to what the buffer holds.
func (u *Unit) transfer(c *call) (off, n int64, err error) {
	lba, blocks := extent(c.cdb)
	if err := u.inRange(lba, blocks); err != nil {
		return 0, 0, err
	}
	return u.bytes(lba), min(u.bytes(blocks), int64(c.data.Len())), nil
}

// outgoing is transfer for what is written: whole blocks only.
func (u *Unit) outgoing(c *call) (off, n int64, err error) {
	off, n, err = u.transfer(c)
	return off, n &^ (1<<u.shift - 1), err
}

func (u *Unit) readFailed(err error, off int64) error {
	return &mediumError{codeReadError, uint64(off) >> u.shift, err}
}

func (u *Unit) writeFailed(err error, off int64) error {
	return &mediumError{codeWriteError, uint64(off) >> u.shift, err}
}

func (u *Unit) read(c *call) error {
	off, n, err := u.transfer(c)
	if err != nil {
		return err
	}
	if len(c.cdb) > 6 && c.cdb[1]&bitFUA != 0 { // what is read must be on the medium
		if err := u.dev.Flush(c.ctx); err != nil {
			return u.writeFailed(err, off)
		}
	}
	err = c.data.part(0, n, func(bufs [][]byte) error { return block.ReadV(c.ctx, u.dev, bufs, off) })
	if err != nil {
		return u.readFailed(err, off)
	}
	c.in = int(n)
	return nil
}

// writeFlags: with the write cache off, every write is durable before it ends.
func (u *Unit) writeFlags(fua bool) block.WriteFlags {
	if fua || !u.modeIs(modeWriteCache) {
		return block.WriteFUA
	}
	return 0
}

func (u *Unit) write(c *call) error {
	off, n, err := u.outgoing(c)
	if err != nil {
		return err
	}
	unlock, err := u.change(off, n, false)
	if err != nil {
		return err
	}
	defer unlock()
	return u.store(c, off, n, 0, len(c.cdb) > 6 && c.cdb[1]&bitFUA != 0)
}

// store writes n bytes of the buffer, from skip on, to the device.
func (u *Unit) store(c *call, off, n, skip int64, fua bool) error {
	if n == 0 {
		return nil
	}
	err := c.data.part(skip, n, func(bufs [][]byte) error { return block.WriteV(c.ctx, u.dev, bufs, off, u.writeFlags(fua)) })
	if err != nil {
		return u.writeFailed(err, off)
	}
	return nil
}

// writeAndVerify writes and reads back. BYTCHK 0 asks that the medium can be read, 1 that it holds what was sent.
func (u *Unit) writeAndVerify(c *call) error {
	check := c.cdb[1] >> 1 & 3
	if check > 1 {
		return badField(1, 2)
	}
	off, n, err := u.outgoing(c)
	if err != nil {
		return err
	}
	unlock, err := u.change(off, n, false)
	if err != nil {
		return err
	}
	defer unlock()
	if err := u.store(c, off, n, 0, true); err != nil {
		return err
	}
	return u.compare(c, off, n, func(at int64) []byte { return c.data.slice(at, chunk) }, check == 1)
}

// slice returns up to n bytes of one piece of the buffer, from off on.
func (b Buffer) slice(off, n int64) []byte {
	for _, p := range b {
		if off < int64(len(p)) {
			return p[off:min(off+n, int64(len(p)))]
		}
		off -= int64(len(p))
	}
	return nil
}

// verify reads, and with BYTCHK compares: 1 with as many blocks as are read, 3 with one block for all.
func (u *Unit) verify(c *call) error {
	lba, blocks := extent(c.cdb)
	if err := u.inRange(lba, blocks); err != nil {
		return err
	}
	off, n := u.bytes(lba), u.bytes(blocks)
	switch check := c.cdb[1] >> 1 & 3; check {
	case 0:
		return u.compare(c, off, n, nil, false)
	case 1:
		n = min(n, int64(c.data.Len())&^(1<<u.shift-1))
		return u.compare(c, off, n, func(at int64) []byte { return c.data.slice(at, chunk) }, true)
	case 3:
		one := c.data.take(1 << u.shift)
		if blocks > 0 && len(one) < 1<<u.shift {
			return illegal(codeListLength)
		}
		return u.compare(c, off, n, func(at int64) []byte { return one[at%int64(len(one)):] }, true)
	}
	return badField(1, 2)
}

// compare reads [off, off+n) of the device and, if it must be the same, compares it with what want returns.
func (u *Unit) compare(c *call, off, n int64, want func(at int64) []byte, same bool) error {
	buf := make([]byte, min(n, chunk))
	for at := int64(0); at < n; {
		p := buf[:min(n-at, int64(len(buf)))]
		if same {
			p = p[:min(len(p), len(want(at)))]
		}
		if err := u.dev.ReadAt(c.ctx, p, off+at); err != nil {
			return u.readFailed(err, off+at)
		}
		if same {
			if k := mismatch(p, want(at)); k >= 0 {
				return withInfo(keyMiscompare, codeMiscompare, uint64(at)+uint64(k))
			}
		}
		at += int64(len(p))
	}
	return nil
}

// mismatch returns where p differs from the beginning of want, or -1.
func mismatch(p, want []byte) int {
	if bytes.Equal(p, want[:len(p)]) {
		return -1
	}
	for i := range p {
		if p[i] != want[i] {
			return i
		}
	}
	return -1
}

// maxPrefetch bounds how much one PRE-FETCH reads.
const maxPrefetch = 32 << 20

// prefetch reads what will be wanted soon, so that the host has it in memory. CONDITION MET would promise that it stays
// there, so the answer is GOOD. No number of blocks means all up to the end.
func (u *Unit) prefetch(c *call) error {
	lba, blocks := extent(c.cdb)
	if err := u.inRange(lba, blocks); err != nil {
		return err
	}
	if blocks == 0 {
		blocks = u.blocks() - lba
	}
	return u.compare(c, u.bytes(lba), min(u.bytes(blocks), maxPrefetch), nil, false)
}

// synchronize makes everything durable, whatever range it is asked for. IMMED only allows to answer earlier.
func (u *Unit) synchronize(c *call) error {
	lba, blocks := extent(c.cdb)
	if err := u.inRange(lba, blocks); err != nil {
		return err
	}
	if err := u.dev.Flush(c.ctx); err != nil {
		return u.writeFailed(err, u.bytes(lba))
	}
	return nil
}

// maxCompare is the largest COMPARE AND WRITE, in blocks: its length field has one byte.
const maxCompare = 255

// compareAndWrite writes the second half of the buffer if the blocks hold the first half. No other write comes between.
func (u *Unit) compareAndWrite(c *call) error {
	lba, n := extentCompare(c.cdb)
	if err := u.inRange(lba, n); err != nil {
		return err
	}
	off, length := u.bytes(lba), u.bytes(n)
	if int64(c.data.Len()) != 2*length { // whoever sends more means something else than these blocks
		return badField(13, -1)
	}
	unlock, err := u.change(off, length, true)
	if err != nil {
		return err
	}
	defer unlock()
	if err := u.compare(c, off, length, func(at int64) []byte { return c.data.slice(at, chunk) }, true); err != nil {
		return err
	}
	return u.store(c, off, length, length, c.cdb[1]&bitFUA != 0)
}

func extentCompare(cdb []byte) (lba, n uint64) {
	lba, _ = extent(cdb)
	return lba, uint64(cdb[13])
}

// orWrite sets bits: the blocks become what they held, or-ed with the buffer. No other write comes between.
func (u *Unit) orWrite(c *call) error {
	off, n, err := u.outgoing(c)
	if err != nil {
		return err
	}
	unlock, err := u.change(off, n, true)
	if err != nil {
		return err
	}
	defer unlock()
	buf := make([]byte, min(n, chunk))
	for at := int64(0); at < n; {
		add := c.data.slice(at, min(n-at, int64(len(buf))))
		p := buf[:len(add)]
		if err := u.dev.ReadAt(c.ctx, p, off+at); err != nil {
			return u.readFailed(err, off+at)
		}
		for i := range p {
			p[i] |= add[i]
		}
		flags := block.WriteFlags(0)
		if at+int64(len(p)) == n {
			flags = u.writeFlags(c.cdb[1]&bitFUA != 0)
		}
		if err := u.dev.WriteAt(c.ctx, p, off+at, flags); err != nil {
			return u.writeFailed(err, off+at)
		}
		at += int64(len(p))
	}
	return nil
}
