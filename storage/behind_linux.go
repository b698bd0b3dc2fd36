package storage

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// behindBytes is how much is written before the host is asked to begin with it: enough for the disk to get long runs.
const behindBytes = 16 << 20

// writeBehind has the host write to the disk what is in the page cache, while more is written into that. Left alone it does
// so only when memory fills or half a minute is over, and whoever then syncs waits for all of it.
type writeBehind struct {
	unsent  atomic.Int64
	sending sync.Mutex
}

// wrote tells of n more bytes in the page cache. The host is asked, not waited for; what comes of it is known by the next Sync,
// for errors of writing back stay with the file until then.
func (b *writeBehind) wrote(fd, n int) {
	if b == nil || b.unsent.Add(int64(n)) < behindBytes || !b.sending.TryLock() {
		return
	}
	defer b.sending.Unlock()
	b.unsent.Store(0)
	_ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE) // of everything: only what is dirty costs
}
