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

// shared are the regions that a writer has by tryShare: one, or two that follow each other.
type shared [2]*sync.RWMutex

func (s shared) unlock() {
	for _, region := range s {
		if region != nil {
			region.RUnlock()
		}
	}
}

// tryShare is lock for a writer to at most two regions, if it need not wait.
func (l *regionLocks) tryShare(off, n int64) (shared, bool) {
	first, last := off>>regionShift, (off+max(n, 1)-1)>>regionShift
	a, b := &l[first%regions], &l[last%regions]
	if last > first+1 || !a.TryRLock() {
		return shared{}, false
	}
	if first == last {
		return shared{a}, true
	}
	if !b.TryRLock() {
		a.RUnlock()
		return shared{}, false
	}
	return shared{a, b}, true
}
