package scsi

import "sync"

const (
	regions     = 64
	regionShift = 20 // a region lock covers every 64th MiB
)

// regionLocks let writers run side by side and give COMPARE AND WRITE and ORWRITE the regions that they touch alone.
type regionLocks [regions]sync.RWMutex

// lock takes the regions of [off, off+n) for a writer, alone for a command that reads and writes as one. It returns how
// to give them back. Regions are taken in ascending order, so nobody waits in a circle.
func (l *regionLocks) lock(off, n int64, alone bool) func() {
	first, last := off>>regionShift, (off+max(n, 1)-1)>>regionShift
	var set [regions]bool
	for r := first; r <= last && r < first+regions; r++ {
		set[r%regions] = true
	}
	for i := range set {
		switch {
		case set[i] && alone:
			l[i].Lock()
		case set[i]:
			l[i].RLock()
		}
	}
	return func() {
		for i := range set {
			switch {
			case set[i] && alone:
				l[i].Unlock()
			case set[i]:
				l[i].RUnlock()
			}
		}
	}
}

// tryShare is lock for a writer, if it need not wait and one lock is all. nil: it would have to wait.
func (l *regionLocks) tryShare(off, n int64) *sync.RWMutex {
	first, last := off>>regionShift, (off+max(n, 1)-1)>>regionShift
	if first != last || !l[first%regions].TryRLock() {
		return nil
	}
	return &l[first%regions]
}
