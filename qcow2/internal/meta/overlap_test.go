package meta

import (
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// TestPlacesAgainstModel adds, removes and replaces structures at random, overlapping ones too, and asks about random runs.
func TestPlacesAgainstModel(t *testing.T) {
	const clusters = 300
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 7))
		p := newPlaces(OverlapAll)
		counts := map[placed]int{}
		var held []placedRun
		for step := range 600 {
			kind := Structure(1) << r.IntN(9)
			run := ClusterRun{format.ClusterIdx(r.IntN(clusters)), 1 + r.Int64N(20)}
			switch {
			case step%3 == 0 && len(held) > 0:
				i := r.IntN(len(held))
				h := held[i]
				held[i] = held[len(held)-1]
				held = held[:len(held)-1]
				p.remove(h.kind, h.ClusterRun)
				for c := h.First; c < h.End(); c++ {
					if h.kind&singleKinds == 0 {
						delete(counts, placed{c, h.kind}) // runs of one structure are not counted: a cut is for all
					} else if k := (placed{c, h.kind}); counts[k] > 0 {
						counts[k]--
					}
				}
			case step%50 == 49:
				p.forget(run)
				for c := run.First; c < run.End(); c++ {
					for k := MainHeader; k <= BitmapDirectory; k <<= 1 {
						delete(counts, placed{c, k})
					}
				}
			case step%50 == 48 && kind&singleKinds == 0:
				p.replace(kind, run)
				for c := range format.ClusterIdx(clusters + 20) {
					delete(counts, placed{c, kind})
				}
				for c := run.First; c < run.End(); c++ {
					counts[placed{c, kind}]++
				}
			default:
				p.add(kind, run)
				held = append(held, placedRun{run, kind})
				for c := run.First; c < run.End(); c++ {
					counts[placed{c, kind}]++
				}
			}
			ask := ClusterRun{format.ClusterIdx(r.IntN(clusters)), 1 + r.Int64N(40)}
			but := Structure(r.IntN(1 << 9))
			var want Structure
			for c := ask.First; c < ask.End(); c++ {
				for k := MainHeader; k <= BitmapDirectory; k <<= 1 {
					if counts[placed{c, k}] > 0 {
						want |= k
					}
				}
			}
			if got := p.at(ask, but); got != want&^but {
				t.Fatalf("seed %d, step %d: %v holds %b, want %b", seed, step, ask, got, want&^but)
			}
		}
	}
}

// TestPlacesWatchOnlyWhatTheyAreTold: a structure that is not watched is not seen, and costs no memory.
func TestPlacesWatchOnlyWhatTheyAreTold(t *testing.T) {
	for kind := MainHeader; kind <= BitmapDirectory; kind <<= 1 {
		for _, on := range []Structure{kind, OverlapAll &^ kind, OverlapNone} {
			p := newPlaces(on)
			p.add(kind, ClusterRun{7, 3})
			if got, want := p.at(ClusterRun{0, 100}, 0), kind&on; got != want {
				t.Errorf("watching %b: found %b, want %b", on, got, want)
			}
			if got := p.at(ClusterRun{8, 1}, kind); got != 0 {
				t.Errorf("watching %b: found %b that was to be left out", on, got)
			}
		}
	}
}

// TestTemplates pins the membership of QEMU's templates.
func TestTemplates(t *testing.T) {
	if OverlapAll != 1<<9-1 || OverlapCached != OverlapAll&^InactiveL2 || OverlapConstant != OverlapCached&^(ActiveL2|RefcountBlock|InactiveL1) {
		t.Fatalf("constant %b, cached %b, all %b", OverlapConstant, OverlapCached, OverlapAll)
	}
}

// TestPlacesAreReadWhileTheyChange asks about clusters that stay while others come and go and the table grows.
func TestPlacesAreReadWhileTheyChange(t *testing.T) {
	p := newPlaces(OverlapAll)
	p.add(ActiveL2, ClusterRun{5, 1})
	p.add(RefcountTable, ClusterRun{1000, 4})
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				if p.at(ClusterRun{5, 1}, 0) != ActiveL2 || p.at(ClusterRun{1003, 1}, 0) != RefcountTable || p.at(ClusterRun{6, 2}, 0) != 0 {
					t.Error("what did not change looked changed")
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for i := range format.ClusterIdx(20000) {
		p.add(InactiveL2, ClusterRun{10 + i*17, 1})
		p.remove(InactiveL2, ClusterRun{10 + i/2*17, 1})
		if i%100 == 0 {
			p.replace(SnapshotTable, ClusterRun{2000 + i, 3})
		}
	}
	close(stop)
	readers.Wait()
}

// TestPlacesFollowTheImage moves L2 tables and lets refcount structures grow, and wants every structure known at each step,
// and forgotten when its clusters are free.
func TestPlacesFollowTheImage(t *testing.T) {
	s, f := newTestStore(t, 64)
	// L1 entry 1 refers to a table that a snapshot shares: it is copied by the first change.
	shared := s.Layout.Offset(4)
	if _, err := f.WriteAt(make([]byte, s.Layout.ClusterSize()), int64(shared)); err != nil {
		t.Fatal(err)
	}
	e := format.EncodeUint64(uint64(format.MakeL1(shared, false)))
	if _, err := f.WriteAt(e[:], int64(s.l1.Off)+8); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Refs.Alloc(1); err != nil { // the count of the shared table
		t.Fatal(err)
	}
	perTable := GuestCluster(1) << s.Map.l2Bits
	mapOne(t, s, perTable)
	if got := s.places.at(ClusterRun{4, 1}, 0); got != ActiveL2 {
		t.Fatalf("before it is free a table that was copied counts as %q", got)
	}
	for l1 := range int64(64) {
		mapOne(t, s, GuestCluster(l1)*perTable)
		if _, _, err := s.Refs.Alloc(200); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Settle(); err != nil {
		t.Fatal(err)
	}
	if got := s.places.at(ClusterRun{4, 1}, 0); got != 0 {
		t.Fatalf("a freed table counts as %q", got)
	}
	want := map[format.ClusterIdx]Structure{0: MainHeader, s.Layout.Cluster(s.l1.Off): ActiveL1}
	for c := range clusterSet(s.Layout, s.Refs.tableOff, s.Refs.tableClusters) {
		want[c] = RefcountTable
	}
	for _, host := range s.Refs.hosts {
		if host != 0 {
			want[s.Layout.Cluster(host)] = RefcountBlock
		}
	}
	for i := range s.Map.chunks[0].Load().entries {
		if off := format.L1Entry(s.Map.chunks[0].Load().entries[i].Load()).Offset(); off != 0 {
			want[s.Layout.Cluster(off)] = ActiveL2
		}
	}
	size, _ := f.Size()
	for c := range s.Layout.Cluster(format.HostOff(size)) {
		if got := s.places.at(ClusterRun{c, 1}, 0); got != want[c] {
			t.Errorf("cluster %d counts as %b, is %b", c, got, want[c])
		}
	}
}

func clusterSet(lay format.Layout, off format.HostOff, n int64) map[format.ClusterIdx]bool {
	set := make(map[format.ClusterIdx]bool)
	for i := range n {
		set[lay.Cluster(off)+format.ClusterIdx(i)] = true
	}
	return set
}

// TestMovedRefcountTableIsForgotten grows the refcount table and wants its old place watched until it is free.
func TestMovedRefcountTableIsForgotten(t *testing.T) {
	s, _ := newTestStore(t, 4)
	mapOne(t, s, 0)
	s.Refs.mu.Lock()
	err := s.Refs.growTable(len(s.Refs.hosts))
	s.Refs.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if got := s.places.at(ClusterRun{1, 1}, 0); got != RefcountTable {
		t.Fatalf("the old table counts as %q before its clusters are free", got)
	}
	if got := s.places.at(ClusterRun{s.Layout.Cluster(s.Refs.tableOff), s.Refs.tableClusters}, 0); got != RefcountTable {
		t.Fatalf("the new table counts as %q", got)
	}
	if err := s.Settle(); err != nil {
		t.Fatal(err)
	}
	if got := s.places.at(ClusterRun{1, 1}, 0); got != 0 {
		t.Fatalf("the freed table counts as %q", got)
	}
}

// TestFindTablesReadsEachByteOnce: many snapshots that share one L1 table, or whose tables overlap, cost one reading of it,
// and a hole costs none.
func TestFindTablesReadsEachByteOnce(t *testing.T) {
	lay := format.Layout{ClusterBits: 12, RefcountOrder: 4, Version: 3}
	_, f := newTestRefcounts(t, lay)
	blk := make([]byte, lay.ClusterSize())
	for i := range int64(4) {
		lay.SetRefcount(blk, i, 1)
	}
	const far = 64 << 20
	e := format.EncodeUint64(uint64(format.MakeL1(lay.Offset(77), false)))
	last := format.EncodeUint64(uint64(format.MakeL1(lay.Offset(78), false)))
	for at, b := range map[int64][]byte{2 * 4096: blk, far + 4096: e[:], far + 16*4096 - 8: last[:]} {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	counted := storage.NewFaultFile(f)
	c := Config{File: counted, Layout: lay, L1Off: lay.Offset(3), L1Len: 4, RefTableOff: lay.Offset(1), RefTableLen: 1, Writable: true,
		CacheBytes: 1, OnFree: func(ClusterRun) {}, Overlap: OverlapAll}
	for i := range int64(1000) {
		c.InactiveL1 = append(c.InactiveL1, TableAt{far + format.HostOff(i%3)*4096, (16 - i%3) * 512})
	}
	s, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	before := counted.Calls(storage.OpRead)
	if err := s.Guard(lay.Offset(76), 4096); err != nil {
		t.Fatal(err)
	}
	if n := counted.Calls(storage.OpRead) - before; n > 4 {
		t.Errorf("the L1 tables were read in %d calls", n)
	}
	for c, want := range map[format.ClusterIdx]Structure{77: InactiveL2, 78: InactiveL2, 79: 0, far >> 12: InactiveL1, far>>12 + 15: InactiveL1} {
		if got := s.places.at(ClusterRun{c, 1}, 0); got != want {
			t.Errorf("cluster %d counts as %b, is %b", c, got, want)
		}
	}
}

func BenchmarkGuard(b *testing.B) {
	p := newPlaces(OverlapAll)
	p.add(ActiveL1, ClusterRun{3, 512})
	p.add(RefcountTable, ClusterRun{1, 1})
	for i := range format.ClusterIdx(1 << 16) {
		p.add(ActiveL2, ClusterRun{1000 + i*8192, 1})
	}
	b.RunParallel(func(pb *testing.PB) {
		c := format.ClusterIdx(rand.Uint64N(1 << 20))
		for pb.Next() {
			if p.at(ClusterRun{c*8 + 1001, 1}, 0)&ActiveL1 != 0 {
				b.Error("found what is not there")
			}
			c = (c*5 + 1) & (1<<20 - 1)
		}
	})
}
