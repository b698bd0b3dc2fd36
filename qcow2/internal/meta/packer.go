package meta

import (
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Compressed clusters lie one behind the other, to the byte, and share host clusters; each holds one reference on every
// host cluster it touches. The end of the last one is remembered (Refcounts.tail), in memory only: what is free behind it
// when the image is closed stays unused until its cluster is free.
//
// A host cluster with compressed bytes is only ever appended to. So whoever reads what lies there already, and whatever a
// crash leaves of the new bytes, finds the old ones as they were: two that share a sector are written one after the other,
// and a sector is never torn. The count of the host cluster, which the disk may refer to already, rises in memory before
// the new entry exists, and is durable before it (step 1 of the pipeline).

// Pack writes compressed clusters and returns the entry of each. Every one of them counts as referred to. On an error
// nothing does.
func (s *Store) Pack(parts [][]byte) ([]format.L2Entry, error) {
	s.packMu.Lock()
	defer s.packMu.Unlock()
	entries := make([]format.L2Entry, 0, len(parts))
	for _, p := range parts {
		storage.Tell(s.file, storage.EventClusterAllocBytes)
		e, err := s.Refs.allocBytes(int64(len(p)))
		if err != nil {
			return nil, s.unpack(entries, err)
		}
		entries = append(entries, e)
	}
	for i := 0; i < len(parts); {
		off, _ := s.Layout.CompressedExtent(entries[i])
		end, k := off+format.HostOff(len(parts[i])), i+1
		for ; k < len(parts); k++ {
			if next, _ := s.Layout.CompressedExtent(entries[k]); next != end {
				break
			}
			end += format.HostOff(len(parts[k]))
		}
		storage.Tell(s.file, storage.EventWriteCompressed)
		err := storage.WriteVFull(s.file, parts[i:k], int64(off))
		s.Wrote(int64(off), int64(end-off))
		if err != nil {
			return nil, s.unpack(entries, fmt.Errorf("writing compressed clusters at host offset %#x: %w", off, err))
		}
		i = k
	}
	return entries, nil
}

// unpack gives back what compressed clusters that nothing refers to were to take.
func (s *Store) unpack(entries []format.L2Entry, err error) error {
	s.Refs.closeTail()
	for _, e := range entries {
		first, last := s.Layout.CompressedClusters(e)
		err = errors.Join(err, s.Refs.Release(ClusterRun{first, int64(last-first) + 1}))
	}
	return err
}

// allocBytes hands out n bytes for a compressed cluster, with one reference on each host cluster they touch.
func (rc *Refcounts) allocBytes(n int64) (format.L2Entry, error) {
	rc.mu.Lock()
	at, err := rc.appendBytes(n, rc.mostShared())
	rc.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if at == 0 {
		run, _, err := rc.Alloc(1)
		if err != nil {
			return 0, fmt.Errorf("allocating a cluster for compressed data: %w", err)
		}
		at = rc.lay.Offset(run.First)
		rc.mu.Lock()
		rc.setTail(at + format.HostOff(n))
		rc.mu.Unlock()
	}
	e, err := rc.lay.MakeCompressed(at, n)
	if err != nil {
		first, last := rc.lay.Cluster(at), rc.lay.Cluster(at+format.HostOff(n)-1)
		return 0, errors.Join(err, rc.Release(ClusterRun{first, int64(last-first) + 1}))
	}
	return e, nil
}

// appendBytes finds room for n bytes behind the last compressed cluster, and returns where, 0 when there is none: the open
// cluster is full, most compressed clusters touch it already, or what is behind it is taken. mu is held.
func (rc *Refcounts) appendBytes(n int64, most uint64) (format.HostOff, error) {
	at := rc.tail
	if at == 0 || rc.marked != nil && !rc.marked() {
		return 0, nil
	}
	c := rc.lay.Cluster(at)
	b, slot := rc.split(c)
	if err := rc.load(b); err != nil {
		return 0, err
	}
	count := rc.lay.Refcount(rc.known[b].data, slot)
	if count == 0 || count >= most {
		rc.tail = 0
		return 0, nil
	}
	if rc.lay.InCluster(at)+n > rc.lay.ClusterSize() {
		free, err := rc.isFree(c + 1)
		if err != nil {
			return 0, err
		}
		if !free {
			rc.tail = 0
			return 0, nil
		}
		rc.mark(ClusterRun{c + 1, 1})
	}
	rc.lay.SetRefcount(rc.known[b].data, slot, count+1)
	rc.touch(b, slot)
	rc.known[b].serves, rc.increased = true, true
	rc.setTail(at + format.HostOff(n))
	return at, nil
}

// mostShared is how many compressed clusters may touch one host cluster. Each snapshot counts all of them once more, so most
// of what a count can express is left to snapshots.
func (rc *Refcounts) mostShared() uint64 { return max(rc.lay.RefcountMax()/64, 1) }

// isFree reports whether a cluster may be handed out, and loads the block that counts it; mu is held.
func (rc *Refcounts) isFree(c format.ClusterIdx) (bool, error) {
	b, slot := rc.split(c)
	if c >= rc.maxClusters() || !rc.exists(b) || rc.guard(ClusterRun{c, 1}, 0) != nil {
		return false, nil
	}
	if err := rc.load(b); err != nil {
		return false, err
	}
	return rc.lay.Refcount(rc.known[b].data, slot) == 0, nil
}

// setTail notes where the next compressed cluster may begin; mu is held.
func (rc *Refcounts) setTail(at format.HostOff) {
	rc.tail = at
	if rc.lay.Aligned(at) {
		rc.tail = 0
	}
}

// leaveTail has the next compressed cluster begin elsewhere if the open cluster is c, which is about to be free; mu is held.
func (rc *Refcounts) leaveTail(c format.ClusterIdx) {
	if rc.tail != 0 && rc.lay.Cluster(rc.tail) == c {
		rc.tail = 0
	}
}

// closeTail has the next compressed cluster begin in a new host cluster.
func (rc *Refcounts) closeTail() {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.tail = 0
}
