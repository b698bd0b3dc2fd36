package meta

import (
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// newTestStore makes a store over an image with one refcount block and an L1 table of the given length.
func newTestStore(t *testing.T, l1Len int64) (*Store, *storage.MemFile) {
	t.Helper()
	lay := format.Layout{ClusterBits: 12, RefcountOrder: 4, Version: 3}
	_, f := newTestRefcounts(t, lay)
	blk := make([]byte, lay.ClusterSize())
	for i := range int64(4) {
		lay.SetRefcount(blk, i, 1)
	}
	if _, err := f.WriteAt(blk, int64(lay.Offset(2))); err != nil {
		t.Fatal(err)
	}
	s, err := Open(Config{File: f, Layout: lay, L1Off: lay.Offset(3), L1Len: l1Len, RefTableOff: lay.Offset(1), RefTableLen: 1,
		Writable: true, CacheBytes: 1, OnFree: func(ClusterRun) {}, Overlap: OverlapAll})
	if err != nil {
		t.Fatal(err)
	}
	return s, f
}

// mapOne maps guest cluster c to a new host cluster and returns where.
func mapOne(t *testing.T, s *Store, c GuestCluster) format.HostOff {
	t.Helper()
	e, err := s.Map.Prepare(c)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Done()
	run, _, err := s.Refs.Alloc(1)
	if err != nil {
		t.Fatal(err)
	}
	host := s.Layout.Offset(run.First)
	e.Put(0, 1, func(int64, Entry) Entry { return Entry{Word: format.MakeL2(host, true)} })
	return host
}

// TestEvictedSliceIsNotEdited evicts a slice between finding it and pinning it: the edit must go to the slice that took
// its place, or it is lost.
func TestEvictedSliceIsNotEdited(t *testing.T) {
	s, _ := newTestStore(t, 4)
	first := mapOne(t, s, 0)
	if err := s.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	found := s.Map.chunks[0].Load().tables[0].Load().slices[0].Load()
	for !s.Map.evict(found) { // the first call only takes its second chance away
	}
	if _, ok := s.Map.edit(found, 0, 0); ok {
		t.Fatal("an evicted slice was pinned")
	}
	run, err := s.Map.Lookup(0, 1, true)
	if err != nil || run.Entry.HostOffset() != first {
		t.Fatalf("after eviction: %+v (%v)", run, err)
	}
}

// TestDirtySliceStays wants a slice that waits for a flush, or is pinned, to survive any pressure.
func TestDirtySliceStays(t *testing.T) {
	s, _ := newTestStore(t, 4)
	mapOne(t, s, 0)
	dirty := s.Map.chunks[0].Load().tables[0].Load().slices[0].Load()
	for range 3 {
		if s.Map.evict(dirty) {
			t.Fatal("a dirty slice was evicted")
		}
	}
	if err := s.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	e, err := s.Map.Prepare(0)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if s.Map.evict(e.s) {
			t.Fatal("a pinned slice was evicted")
		}
	}
	e.Done()
}

// TestLookupDoesNotAllocate holds the mapping to its promise on a hit.
func TestLookupDoesNotAllocate(t *testing.T) {
	s, _ := newTestStore(t, 4)
	mapOne(t, s, 5)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := s.Map.Lookup(5, 10, false); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Fatalf("%v allocations per lookup", n)
	}
}
