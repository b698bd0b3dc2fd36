package scsi

import (
	"encoding/binary"
	"sync"
)

// Limits of EXTENDED COPY, as RECEIVE COPY OPERATING PARAMETERS tells them.
const (
	maxCopyTargets   = 16
	maxCopySegments  = 256
	copyTargetSize   = 32
	copySegmentSize  = 28 // block to block
	copyHeaderSize   = 16
	maxSegmentBlocks = 0xFFFF
	maxCopyList      = maxCopyTargets*copyTargetSize + maxCopySegments*copySegmentSize // all descriptors together
)

// Types of descriptors.
const (
	targetIdentification = 0xE4
	segmentBlockToBlock  = 0x02
)

// copyLog remembers how copies ended, by list identifier.
type copyLog struct {
	mu   sync.Mutex
	last map[byte]copyResult
}

type copyResult struct {
	status   byte // 1: completed, 2: with an error
	segments uint16
	bytes    uint64
	sense    []byte
}

func (l *copyLog) note(id byte, r copyResult) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == nil {
		l.last = make(map[byte]copyResult)
	}
	l.last[id] = r
}

// get returns a result; what failed is told once.
func (l *copyLog) get(id byte, forget bool) (copyResult, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.last[id]
	if forget {
		delete(l.last, id)
	}
	return r, ok
}

// copySegment is a run of blocks to be copied.
type copySegment struct {
	from, to       *Unit
	fromLBA, toLBA uint64
	blocks         uint64
}

// extendedCopy copies blocks between units that this process serves, without the initiator.
func (u *Unit) extendedCopy(c *call) error {
	n := binary.BigEndian.Uint32(c.cdb[10:])
	if n == 0 {
		return nil
	}
	if n > copyHeaderSize+maxCopyList+64<<10 {
		return illegal(codeListLength)
	}
	list := c.data.take(int(n))
	if len(list) < copyHeaderSize || len(list) < int(n) {
		return illegal(codeListLength)
	}
	segments, err := u.parseCopy(list)
	if err != nil {
		return err
	}
	id := list[0]
	result := copyResult{status: 1}
	for _, s := range segments {
		if err := u.copySegment(c, s); err != nil {
			result.status = 2
			sense := &senseError{key: keyCopyAborted, code: codeThirdPartyDeviceFail}
			if inner := u.senseOf(err); inner != nil && inner.key == keyIllegalRequest {
				sense = &senseError{key: keyCopyAborted} // the list asks for what is not there; no device failed
			}
			result.sense = sense.encode(false)
			u.copies.note(id, result)
			return sense
		}
		result.segments++
		result.bytes += uint64(s.from.bytes(s.blocks))
	}
	u.copies.note(id, result)
	return nil
}

// parseCopy decodes a parameter list.
func (u *Unit) parseCopy(list []byte) ([]copySegment, error) {
	be := binary.BigEndian
	targets, segments, inline := int(be.Uint16(list[2:])), int(be.Uint32(list[8:])), int(be.Uint32(list[12:]))
	switch {
	case targets+segments > maxCopyList:
		return nil, illegal(codeListLength)
	case targets%copyTargetSize != 0:
		return nil, badParameter(2)
	case targets/copyTargetSize > maxCopyTargets:
		return nil, illegal(codeTooManyTargets)
	case segments/copySegmentSize > maxCopySegments:
		return nil, illegal(codeTooManySegments)
	case inline != 0:
		return nil, badParameter(12)
	case copyHeaderSize+targets+segments > len(list):
		return nil, illegal(codeListLength)
	}
	var units []*Unit
	for at := copyHeaderSize; at < copyHeaderSize+targets; at += copyTargetSize {
		target, err := u.copyTarget(list[at:][:copyTargetSize], at)
		if err != nil {
			return nil, err
		}
		units = append(units, target)
	}
	var out []copySegment
	for at, end := copyHeaderSize+targets, copyHeaderSize+targets+segments; at < end; {
		if end-at < 4 {
			return nil, illegal(codeListLength)
		}
		if list[at] != segmentBlockToBlock {
			return nil, illegal(codeUnknownSegmentType)
		}
		if end-at < copySegmentSize || be.Uint16(list[at+2:]) != copySegmentSize-4 {
			return nil, badParameter(at + 2)
		}
		s, err := segmentOf(list[at:][:copySegmentSize], units)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
		at += copySegmentSize
	}
	return out, nil
}

// copyTarget returns the unit that a target descriptor names.
func (u *Unit) copyTarget(b []byte, at int) (*Unit, error) {
	if b[0] != targetIdentification {
		return nil, illegal(codeUnknownTargetType)
	}
	if b[1]&0x1F != 0 { // not a disk
		return nil, badParameter(at + 1)
	}
	if b[4]&0x0F != 1 || b[5]&0x3F != 3 || b[7] != 16 {
		return nil, badParameter(at + 5)
	}
	var naa [16]byte
	copy(naa[:], b[8:24])
	if naa == u.NAA() {
		return u, nil
	}
	if u.o.Peer != nil {
		if peer := u.o.Peer(naa); peer != nil {
			return peer, nil
		}
	}
	return nil, &senseError{key: keyCopyAborted, code: codeUnreachableCopyPeer}
}

func segmentOf(b []byte, units []*Unit) (copySegment, error) {
	be := binary.BigEndian
	from, to := int(be.Uint16(b[4:])), int(be.Uint16(b[6:]))
	if from >= len(units) || to >= len(units) {
		return copySegment{}, &senseError{key: keyCopyAborted, code: codeUnreachableCopyPeer}
	}
	s := copySegment{from: units[from], to: units[to], blocks: uint64(be.Uint16(b[10:])), fromLBA: be.Uint64(b[12:]), toLBA: be.Uint64(b[20:])}
	if s.from.shift != s.to.shift {
		return copySegment{}, &senseError{key: keyCopyAborted, code: codeIncorrectCopyTarget}
	}
	return s, nil
}

// copySegment copies in pieces. The source may be written meanwhile: what is copied of each block is old or new.
func (u *Unit) copySegment(c *call, s copySegment) error {
	if err := s.from.inRange(s.fromLBA, s.blocks); err != nil {
		return err
	}
	if err := s.to.inRange(s.toLBA, s.blocks); err != nil {
		return err
	}
	if s.to.writeProtected() {
		return &senseError{key: keyDataProtect, code: codeWriteProtected}
	}
	n := s.from.bytes(s.blocks)
	from, to := s.from.bytes(s.fromLBA), s.to.bytes(s.toLBA)
	buf := make([]byte, n) // at most 65535 blocks; whole, so that overlapping ranges copy as if at once
	if err := s.from.dev.ReadAt(c.ctx, buf, from); err != nil {
		return s.from.readFailed(err, from)
	}
	unlock, err := s.to.change(to, n, false)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.to.dev.WriteAt(c.ctx, buf, to, s.to.writeFlags(s.to.o.Keep)); err != nil {
		return s.to.writeFailed(err, to)
	}
	return nil
}

func (u *Unit) receiveCopy(c *call) error {
	allocated := binary.BigEndian.Uint32(c.cdb[10:])
	be := binary.BigEndian
	switch c.cdb[1] & actionMask {
	case 0x00:
		r, ok := u.copies.get(c.cdb[2], false)
		if !ok {
			return badField(2, -1)
		}
		b := make([]byte, 12)
		be.PutUint32(b, 8)
		b[4] = r.status
		be.PutUint16(b[5:], r.segments)
		b[7] = 0 // in bytes
		be.PutUint32(b[8:], uint32(min(r.bytes, 0xFFFFFFFF)))
		c.reply(b, allocated)
	case 0x03:
		c.reply(copyParameters(), allocated)
	case 0x04:
		r, ok := u.copies.get(c.cdb[2], true)
		if !ok || r.status != 2 {
			c.reply(make([]byte, 4), allocated)
			return nil
		}
		b := make([]byte, 60)
		b[56] = byte(CheckCondition)
		be.PutUint16(b[58:], uint16(len(r.sense)))
		b = append(b, r.sense...)
		be.PutUint32(b, uint32(len(b)-4))
		c.reply(b, allocated)
	}
	return nil
}

// copyParameters tells the limits of EXTENDED COPY.
func copyParameters() []byte {
	b := make([]byte, 44, 46)
	be := binary.BigEndian
	b[4] = 1 // SNLID: a list may have no identifier
	be.PutUint16(b[8:], maxCopyTargets)
	be.PutUint16(b[10:], maxCopySegments)
	be.PutUint32(b[12:], maxCopyList)
	be.PutUint32(b[16:], maxSegmentBlocks<<9)
	b[36] = 1 // one copy at a time for each list identifier
	b[37] = 9 // data segment granularity: 512 bytes
	b[38], b[39], b[40] = 9, 9, 9
	b[43] = 2
	b = append(b, segmentBlockToBlock, targetIdentification)
	be.PutUint32(b, uint32(len(b)-4))
	return b
}
