package scsi

import "github.com/droverproject/drover/block"

// DataIn reports whether a command's buffer takes data for the initiator: everything but what writes or sends parameters.
func DataIn(cdb []byte) bool {
	if len(cdb) == 0 {
		return false
	}
	switch cdb[0] {
	case 0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x2F, 0xAF, 0x8F, 0x41, 0x93, 0x42, 0x48, 0x55, 0x15, 0x83, 0x89, 0x8B, 0xA4, 0x1D, 0x04:
		return false
	}
	return true
}

// TryExecute runs a plain read or write if it can be done at once, from memory. Otherwise it reports false, and Execute
// has to be called, which begins anew.
func (u *Unit) TryExecute(cdb []byte, data Buffer) (Reply, bool) {
	if len(cdb) < 6 || !u.plain(cdb) {
		return Reply{}, false
	}
	cmd, err := u.commands.find(cdb)
	if err != nil || cmd.checkBits(cdb) != nil {
		return Reply{}, false
	}
	c := &call{cdb: cdb, data: data}
	if cmd.flags&writes == 0 {
		off, n, err := u.transfer(c)
		if err != nil {
			return Reply{}, false
		}
		err = data.part(0, n, func(bufs [][]byte) error { return block.TryReadV(u.dev, bufs, off) })
		if err != nil {
			return Reply{}, false
		}
		u.counts.done(cdb, data, int(n))
		return Reply{In: int(n)}, true
	}
	off, n, err := u.outgoing(c)
	if err != nil || u.writeProtected() || !u.modeIs(modeWriteCache) {
		return Reply{}, false
	}
	held, ok := u.locks.tryShare(off, n)
	if !ok {
		return Reply{}, false
	}
	defer held.unlock()
	if u.unavailable() != nil { // since it was looked at first: see change
		return Reply{}, false
	}
	write := block.TryWriteV
	if u.o.Keep {
		write = block.TryOverwriteV // what changes the mapping has to be made durable
	}
	if data.part(0, n, func(bufs [][]byte) error { return write(u.dev, bufs, off) }) != nil {
		return Reply{}, false
	}
	u.counts.done(cdb, data, 0)
	return Reply{}, true
}

// plain reports whether a command is a read or write without FUA on a unit that has nothing else to say.
func (u *Unit) plain(cdb []byte) bool {
	switch cdb[0] {
	case 0x28, 0x2A, 0x88, 0x8A, 0xA8, 0xAA:
		return cdb[1]&bitFUA == 0 && !u.busy()
	}
	return false
}

// busy reports whether commands must be looked at more closely before they run.
func (u *Unit) busy() bool {
	if u.alua.Load() > stateNonOptimized || u.unavailable() != nil {
		return true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.attention) > 0
}
