package race

import (
	"bytes"
	"runtime"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// stageHoles makes an image with data in guest cluster 9 at the end of its file, and holes before it.
func stageHoles(t *testing.T) *stage {
	s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
	for c := range int64(10) {
		s.write(c, 'a')
	}
	must(t, s.im.Discard(t.Context(), 0, 8*s.cs))
	s.flush(3)
	return s
}

func (s *stage) compact() error {
	_, err := s.im.Compact(s.t.Context(), qcow2.CompactOptions{Step: s.cs})
	return err
}

// A writer stands before the cluster that it overwrites when that is about to be moved. What it writes must not stay behind.
func TestCompactSlowWriter(t *testing.T) {
	for _, try := range []bool{false, true} {
		s := stageHoles(t)
		old := s.host(9)
		fetching := s.hold(storage.OpRead, old, s.cs) // who refers to what is known
		mover := s.start(s.compact)
		mover.until(fetching)
		writing := s.hold(storage.OpWrite, old, s.cs)
		writer := s.start(func() error {
			p := bytes.Repeat([]byte{'w'}, int(s.cs))
			if try {
				return s.im.TryWriteAt(p, 9*s.cs)
			}
			return s.im.WriteAt(t.Context(), p, 9*s.cs, 0)
		})
		writer.until(writing)
		close(fetching.release)
		for range 20000 { // time for the mover, which has to wait
			runtime.Gosched()
		}
		close(writing.release)
		must(t, writer.end())
		must(t, mover.end())
		if s.host(9) >= old {
			t.Fatal("the cluster was not moved")
		}
		s.mustHold("what was written", s.read(9*s.cs, s.cs), 'w')
		s.mustHold("its neighbour", s.read(8*s.cs, s.cs), 'a')
		s.finish()
	}
}

// A reader stands before a cluster that is moved, and then others allocate. It must not see theirs.
func TestCompactSlowReader(t *testing.T) {
	s := stageHoles(t)
	old := s.host(9)
	reading := s.hold(storage.OpRead, old, s.cs)
	p := make([]byte, s.cs)
	reader := s.start(func() error { return s.im.ReadAt(t.Context(), p, 9*s.cs) })
	reader.until(reading)
	mover := s.start(s.compact)
	for range 20000 {
		runtime.Gosched()
	}
	close(reading.release)
	must(t, reader.end())
	must(t, mover.end())
	for c := range int64(30) {
		s.write(20+c, 'x')
	}
	s.mustHold("slow reader", p, 'a')
	s.mustHold("moved cluster", s.read(9*s.cs, s.cs), 'a')
	s.finish()
}
