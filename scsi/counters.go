package scsi

import "sync/atomic"

// Stats counts what a unit did.
type Stats struct {
	Commands uint64 // of every kind, those below and others

	Reads, Writes, Flushes uint64 // Writes are those that bring data
	Unmaps                 uint64 // UNMAP and WRITE SAME
	BytesRead              uint64
	BytesWritten           uint64
	Errors                 uint64 // commands that the device below failed
	Inflight               int    // commands that run
}

type counters struct {
	commands, reads, writes, flushes, unmaps, bytesRead, bytesWritten, errors atomic.Uint64
	inflight                                                                  atomic.Int64
}

// Stats returns what the unit did since it was made.
func (u *Unit) Stats() Stats {
	c := &u.counts
	return Stats{
		Commands: c.commands.Load(), Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(),
		Unmaps: c.unmaps.Load(), BytesRead: c.bytesRead.Load(), BytesWritten: c.bytesWritten.Load(),
		Errors: c.errors.Load(), Inflight: int(c.inflight.Load()),
	}
}

// done counts a command that succeeded and answered with so many bytes.
func (c *counters) done(cdb []byte, data Buffer, in int) {
	c.commands.Add(1)
	switch cdb[0] {
	case 0x08, 0x28, 0x88, 0xA8: // READ
		c.reads.Add(1)
		c.bytesRead.Add(uint64(in))
	case 0x0A, 0x2A, 0x8A, 0xAA, 0x2E, 0x8E, 0xAE, 0x89, 0x8B: // WRITE, WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE
		c.writes.Add(1)
		n := data.Len()
		if cdb[0] == 0x89 {
			n /= 2 // half of it was compared with
		}
		c.bytesWritten.Add(uint64(n))
	case 0x35, 0x91: // SYNCHRONIZE CACHE
		c.flushes.Add(1)
	case 0x41, 0x42, 0x93: // WRITE SAME, UNMAP
		c.unmaps.Add(1)
	}
}

// fail counts a command that did not succeed. What an initiator has asked for wrongly, or was told for its information, is
// not the device's failure.
func (c *counters) fail(sense *senseError) {
	c.commands.Add(1)
	if sense == nil {
		return
	}
	switch sense.key {
	case keyMediumError, keyHardwareError:
		c.errors.Add(1)
	case keyDataProtect:
		if sense.code == codeSpaceExhausted {
			c.errors.Add(1)
		}
	}
}
