package race

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// stage is an image whose storage calls can be held up one by one, so that a test decides what happens meanwhile.
type stage struct {
	t   *testing.T
	mem *storage.MemFile
	im  *qcow2.Image
	cs  int64

	mu    sync.Mutex
	holds []*held
}

// held is a call of the storage that is to wait, before it happens or after.
type held struct {
	kind    storage.OpKind
	after   bool
	off, n  int64 // which the call touches; n 0: anywhere
	reached chan struct{}
	release chan struct{}
}

const stagedCluster = 4096

func newStage(t *testing.T, create qcow2.CreateOptions, open qcow2.Options) *stage {
	mem := storage.NewMemFile("staged.qcow2")
	if create.ClusterSize == 0 {
		create.ClusterSize = stagedCluster
	}
	if create.Size == 0 {
		create.Size = 64 * create.ClusterSize
	}
	must(t, qcow2.Create(t.Context(), mem, create))
	return openStage(t, mem, create.ClusterSize, open)
}

func openStage(t *testing.T, mem *storage.MemFile, cs int64, open qcow2.Options) *stage {
	s := &stage{t: t, mem: mem, cs: cs}
	var err error
	s.im, err = qcow2.Open(t.Context(), stageFile{mem, s}, open)
	must(t, err)
	return s
}

// stageFile shows every call to the stage before and after it happens. Close leaves the file open for the test.
type stageFile struct {
	*storage.MemFile
	s *stage
}

func (f stageFile) Close() error { return nil }

func (f stageFile) ReadAt(p []byte, off int64) (int, error) {
	defer f.s.pass(storage.OpRead, off, int64(len(p)))()
	return f.MemFile.ReadAt(p, off)
}

func (f stageFile) ReadAtNowait(p []byte, off int64) (int, error) { return f.ReadAt(p, off) }

func (f stageFile) WriteAt(p []byte, off int64) (int, error) {
	return f.WriteVAt([][]byte{p}, off)
}

func (f stageFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	defer f.s.pass(storage.OpWrite, off, int64(n))()
	return f.MemFile.WriteVAt(bufs, off)
}

func (f stageFile) Sync() error {
	defer f.s.pass(storage.OpSync, 0, 0)()
	return f.MemFile.Sync()
}

func (f stageFile) PunchHole(off, n int64) error {
	defer f.s.pass(storage.OpPunch, off, n)()
	return f.MemFile.PunchHole(off, n)
}

// pass lets a call begin, and returns what lets it end.
func (s *stage) pass(kind storage.OpKind, off, n int64) func() {
	s.wait(kind, false, off, n)
	return func() { s.wait(kind, true, off, n) }
}

// wait holds a call up if a hold is meant for it. Each hold catches one call.
func (s *stage) wait(kind storage.OpKind, after bool, off, n int64) {
	s.mu.Lock()
	var h *held
	for i, o := range s.holds {
		if o.kind == kind && o.after == after && (o.n == 0 || off < o.off+o.n && o.off < off+n) {
			h = o
			s.holds = append(s.holds[:i:i], s.holds[i+1:]...)
			break
		}
	}
	s.mu.Unlock()
	if h != nil {
		close(h.reached)
		<-h.release
	}
}

// hold makes the next call of a kind that touches a range of the file wait.
func (s *stage) hold(kind storage.OpKind, off, n int64) *held {
	return s.add(&held{kind: kind, off: off, n: n})
}

// holdAfter makes it wait after it has happened.
func (s *stage) holdAfter(kind storage.OpKind, off, n int64) *held {
	return s.add(&held{kind: kind, after: true, off: off, n: n})
}

func (s *stage) add(h *held) *held {
	h.reached, h.release = make(chan struct{}), make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holds = append(s.holds, h)
	return h
}

// act is a request that runs by itself.
type act struct {
	t    *testing.T
	done chan error
}

func (s *stage) start(f func() error) *act {
	a := &act{s.t, make(chan error, 1)}
	go func() { a.done <- f() }()
	return a
}

// until waits until the act stands at the held call.
func (a *act) until(h *held) {
	a.t.Helper()
	select {
	case <-h.reached:
	case err := <-a.done:
		a.t.Fatalf("ended (%v) without the call that was to be held up", err)
	}
}

// end waits for the end of the act.
func (a *act) end() error { return <-a.done }

func (s *stage) write(cluster int64, fill byte) {
	s.t.Helper()
	must(s.t, s.im.WriteAt(s.t.Context(), bytes.Repeat([]byte{fill}, int(s.cs)), cluster*s.cs, 0))
}

func (s *stage) flush(times int) {
	s.t.Helper()
	for range times {
		must(s.t, s.im.Flush(s.t.Context()))
	}
}

func (s *stage) read(off, n int64) []byte {
	s.t.Helper()
	p := bytes.Repeat([]byte{0xee}, int(n))
	must(s.t, s.im.ReadAt(s.t.Context(), p, off))
	return p
}

// host returns where a guest cluster lies.
func (s *stage) host(cluster int64) int64 {
	s.t.Helper()
	host := int64(-1)
	must(s.t, s.im.Extents(s.t.Context(), cluster*s.cs, s.cs, func(x block.Extent) bool {
		if x.HasHost {
			host = x.Host
		}
		return false
	}))
	if host < 0 {
		s.t.Fatalf("guest cluster %d has no host cluster", cluster)
	}
	return host
}

// mustHold wants every byte of a range to be one of the given.
func (s *stage) mustHold(what string, p []byte, any ...byte) {
	s.t.Helper()
	for i, b := range p {
		if !bytes.Contains(any, []byte{b}) {
			s.t.Fatalf("%s: byte %d is %#x, want one of %#x", what, i, b, any)
		}
	}
}

func (s *stage) finish() {
	s.t.Helper()
	must(s.t, s.im.Close())
	mustBeClean(s.t, s.mem)
}

// gone are the ways to let go of a cluster.
var gone = map[string]func(s *stage, cluster int64) error{
	"discard": func(s *stage, c int64) error { return s.im.Discard(s.t.Context(), c*s.cs, s.cs) },
	"zero, unmap": func(s *stage, c int64) error {
		return s.im.WriteZeroes(s.t.Context(), c*s.cs, s.cs, block.ZeroUnmap)
	},
	"zero": func(s *stage, c int64) error { return s.im.WriteZeroes(s.t.Context(), c*s.cs, s.cs, 0) },
}

// A reader stands before its cluster while the cluster is freed, flushed, and others allocate. It must not see theirs.
func TestSlowReader(t *testing.T) {
	for name, free := range gone {
		for _, try := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,try=%v", name, try), func(t *testing.T) {
				s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
				s.write(0, 'a')
				s.flush(1)
				h := s.hold(storage.OpRead, s.host(0), s.cs)
				p := make([]byte, s.cs)
				reader := s.start(func() error {
					if try {
						return s.im.TryReadAt(p, 0)
					}
					return s.im.ReadAt(t.Context(), p, 0)
				})
				reader.until(h)
				must(t, free(s, 0))
				for i := range int64(6) {
					s.flush(1)
					s.write(1+i, 'x')
				}
				close(h.release)
				must(t, reader.end())
				s.mustHold("slow reader", p, 'a', 0)
				s.mustHold("freed cluster", s.read(0, s.cs), 0)
				s.flush(3)
				s.finish()
			})
		}
	}
}

// A writer stands before the cluster that it overwrites while the cluster is freed, flushed, and others allocate. It must
// not hit theirs.
func TestSlowWriter(t *testing.T) {
	for name, free := range gone {
		for _, try := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,try=%v", name, try), func(t *testing.T) {
				s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
				s.write(0, 'a')
				s.flush(1)
				h := s.hold(storage.OpWrite, s.host(0), s.cs)
				writer := s.start(func() error {
					p := bytes.Repeat([]byte{'w'}, int(s.cs))
					if try {
						return s.im.TryWriteAt(p, 0)
					}
					return s.im.WriteAt(t.Context(), p, 0, 0)
				})
				writer.until(h)
				must(t, free(s, 0))
				for i := range int64(6) {
					s.flush(1)
					s.write(1+i, 'x')
				}
				close(h.release)
				if err := writer.end(); err != nil && !errors.Is(err, block.ErrWouldBlock) {
					t.Fatal(err)
				}
				for i := range int64(6) {
					s.mustHold("another's cluster", s.read((1+i)*s.cs, s.cs), 'x')
				}
				s.mustHold("the writer's cluster", s.read(0, s.cs), 0, 'w')
				s.flush(3)
				s.finish()
			})
		}
	}
}

// A reader stands before a cluster that is zeroed but kept, and written again in another part. It may see old bytes or
// zeroes; it must not see the new write before the write is there for all.
func TestZeroedClusterWrittenAgainUnderReader(t *testing.T) {
	s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
	s.write(0, 'a')
	reading := s.hold(storage.OpRead, s.host(0), s.cs)
	p := make([]byte, sectorSize)
	reader := s.start(func() error { return s.im.ReadAt(t.Context(), p, 0) })
	reader.until(reading)
	must(t, s.im.WriteZeroes(t.Context(), 0, s.cs, 0))

	writer, linking := s.writeHeldBeforeLink(bytes.Repeat([]byte{'w'}, sectorSize), 0)
	close(reading.release)
	must(t, reader.end())
	early := p[0] == 'w'
	now := s.read(0, sectorSize)
	if early && now[0] == 0 {
		t.Error("a reader has seen a write; a later reader sees the zeroes from before the write")
	}
	close(linking.release)
	must(t, writer.end())
	s.mustHold("the write", s.read(0, sectorSize), 'w')
	s.finish()
}

// A writer stands before a cluster that is zeroed but kept, and another part is written. What the slow writer writes must
// not appear once it has been seen not to be there.
func TestZeroedClusterWrittenAgainUnderWriter(t *testing.T) {
	s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
	s.write(0, 'a')
	writing := s.hold(storage.OpWrite, s.host(0), s.cs)
	slow := s.start(func() error {
		return s.im.WriteAt(t.Context(), bytes.Repeat([]byte{'s'}, sectorSize), 0, 0)
	})
	slow.until(writing)
	must(t, s.im.WriteZeroes(t.Context(), 0, s.cs, 0))

	writer, linking := s.writeHeldBeforeLink(bytes.Repeat([]byte{'w'}, sectorSize), sectorSize)
	close(writing.release)
	must(t, slow.end())
	before := s.read(0, sectorSize)
	close(linking.release)
	must(t, writer.end())
	after := s.read(0, sectorSize)
	if before[0] != after[0] {
		t.Errorf("after the slow write the sector read %q, then %q, and nobody wrote it between", before[0], after[0])
	}
	s.mustHold("the other write", s.read(sectorSize, sectorSize), 'w')
	s.finish()
}

// A write goes into a zero cluster that kept its host cluster, and the cluster is given back meanwhile: one must wait for
// the other, lest the host cluster be given back and used.
func TestKeptClusterGivenBackUnderWriter(t *testing.T) {
	for _, how := range []string{"discard", "zero, unmap"} {
		t.Run(how, func(t *testing.T) {
			s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
			s.write(0, 'a')
			s.write(1, 'b')
			must(t, s.im.WriteZeroes(t.Context(), 0, s.cs, 0))
			must(t, s.im.Close())
			s = openStage(t, s.mem, s.cs, qcow2.Options{})
			s.read(0, s.cs) // the tables
			writer, linking := s.writeHeldBeforeLink(bytes.Repeat([]byte{'w'}, sectorSize), 0)
			freeing := s.start(func() error { return gone[how](s, 0) })
			for range 1000 { // as far as it can
				runtime.Gosched()
			}
			close(linking.release)
			must(t, writer.end())
			must(t, freeing.end())
			s.flush(3)
			for c := int64(8); c < 16; c++ {
				s.write(c, 'x')
			}
			s.mustHold("the write", s.read(0, sectorSize), 'w', 0)
			s.finish()
		})
	}
}

// writeHeldBeforeLink starts a write and returns when its data is on the host but the mapping does not show it yet. The
// write goes on when release is closed.
func (s *stage) writeHeldBeforeLink(p []byte, off int64) (*act, *held) {
	s.t.Helper()
	h := s.holdAfter(storage.OpWrite, 0, 0)
	a := s.start(func() error { return s.im.WriteAt(s.t.Context(), p, off, 0) })
	a.until(h)
	return a, h
}

// Two writers fill one unallocated cluster. The second waits for the first, and is cancelled, or goes on and finds the
// cluster there: one host cluster, both data.
func TestWritersOfOneCluster(t *testing.T) {
	for _, cancelled := range []bool{false, true} {
		t.Run(fmt.Sprint("cancelled=", cancelled), func(t *testing.T) {
			s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
			s.write(1, 'a') // so that the L2 table is there
			write := func(ctx context.Context, sector int64, fill byte) *act {
				return s.start(func() error {
					return s.im.WriteAt(ctx, bytes.Repeat([]byte{fill}, sectorSize), sector*sectorSize, 0)
				})
			}
			h := s.hold(storage.OpWrite, 0, 0)
			first := write(t.Context(), 0, '1')
			first.until(h)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			second := write(ctx, 1, '2')
			if cancelled {
				cancel()
				if err := second.end(); !errors.Is(err, context.Canceled) {
					t.Fatalf("cancelled write returned %v", err)
				}
				second = write(t.Context(), 1, '2')
			}
			for range 1000 { // the second gets as far as it can
				runtime.Gosched()
			}
			close(h.release)
			must(t, first.end())
			must(t, second.end())
			s.mustHold("first", s.read(0, sectorSize), '1')
			s.mustHold("second", s.read(sectorSize, sectorSize), '2')
			s.mustHold("rest", s.read(2*sectorSize, s.cs-2*sectorSize), 0)
			s.finish()
		})
	}
}

// Close waits for who is inside, keeps everybody else out, and makes durable what was acknowledged.
func TestCloseWaits(t *testing.T) {
	s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
	s.write(0, 'a')
	read, write := s.hold(storage.OpRead, s.host(0), s.cs), s.hold(storage.OpWrite, 0, 0)
	p := make([]byte, s.cs)
	reader := s.start(func() error { return s.im.ReadAt(t.Context(), p, 0) })
	reader.until(read)
	writer := s.start(func() error { return s.im.WriteAt(t.Context(), bytes.Repeat([]byte{'w'}, 100), 8*s.cs, 0) })
	writer.until(write)
	closer := s.start(s.im.Close)
	for s.im.Flush(t.Context()) == nil { // until the door is shut
		runtime.Gosched()
	}
	if err := s.im.WriteAt(t.Context(), p, 0, 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("write after Close began: %v", err)
	}
	select {
	case err := <-closer.done:
		t.Fatalf("Close returned (%v) before the requests inside", err)
	default:
	}
	close(read.release)
	close(write.release)
	must(t, reader.end())
	must(t, writer.end())
	must(t, closer.end())
	s.mustHold("reader", p, 'a')
	mustBeClean(t, s.mem)
	s = openStage(t, s.mem, s.cs, qcow2.Options{})
	s.mustHold("after reopening", s.read(8*s.cs, 100), 'w')
	s.finish()
}

// Requests knock while an image is closed or checked. What was freed before must not leak on their account.
func TestKnockingDoesNotLeak(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	for i := range rounds {
		s := newStage(t, qcow2.CreateOptions{}, qcow2.Options{})
		for c := range int64(8) {
			s.write(c, 'a')
		}
		s.flush(1)
		must(t, s.im.Discard(t.Context(), 0, 8*s.cs))
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				p := make([]byte, 1)
				for {
					select {
					case <-stop:
						return
					default:
						_ = s.im.ReadAt(t.Context(), p, 0)
					}
				}
			})
		}
		var err error
		if i%2 == 0 {
			var report *qcow2.CheckReport
			report, err = s.im.Check(t.Context(), qcow2.CheckOptions{})
			if err == nil && !report.Clean() {
				t.Errorf("check of the open image: %+v", report.Findings)
			}
		}
		err = errors.Join(err, s.im.Close())
		close(stop)
		wg.Wait()
		must(t, err)
		mustBeClean(t, s.mem)
		if t.Failed() {
			return
		}
	}
}

// Lookups, edits and evictions of many more slices than the cache holds, as fast as they go: each writer owns clusters in
// every slice and knows what they hold.
func TestEvictionStorm(t *testing.T) {
	const slices, writers, readers, cs = 40, 24, 2, 4096
	rounds := 600
	if testing.Short() {
		rounds = 150
	}
	// The windows are a few instructions wide: only the host's scheduler, which stops anybody anywhere, gets into them.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(8, runtime.GOMAXPROCS(0))))
	// Long slices: freezing one keeps its lock for a while, and whoever waits for it finds it evicted.
	perSlice := int64(cs / 8)
	s := newStage(t, qcow2.CreateOptions{ClusterSize: cs, Size: slices * perSlice * cs},
		qcow2.Options{CacheSize: 1, CacheCleanInterval: 100 * time.Microsecond})
	var wg, readersDone sync.WaitGroup
	stop := make(chan struct{})
	for id := range writers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(id)))
			held := make([]value, slices)
			p := make([]byte, sectorSize)
			for n := range rounds {
				i := r.IntN(slices)
				cluster := int64(i)*perSlice + int64(id)
				if err := s.im.ReadAt(t.Context(), p, cluster*cs); err != nil {
					t.Error(err)
					return
				}
				if v, err := unstamp(p, cluster); err != nil || v != held[i] {
					t.Errorf("cluster %d holds %#x (%v), want %#x", cluster, v, err, held[i])
					return
				}
				var err error
				if held[i] = value(n + 2); r.IntN(3) == 0 {
					held[i], err = 0, s.im.Discard(t.Context(), cluster*cs, cs)
				} else {
					stamp(p, cluster, held[i])
					err = s.im.WriteAt(t.Context(), p, cluster*cs, 0)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	readersDone.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.im.Flush(t.Context()); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for id := range readers {
		readersDone.Go(func() {
			r := rand.New(rand.NewPCG(2, uint64(id)))
			p := make([]byte, sectorSize)
			for {
				select {
				case <-stop:
					return
				default:
				}
				cluster := r.Int64N(slices)*perSlice + r.Int64N(writers)
				if err := s.im.ReadAt(t.Context(), p, cluster*cs); err != nil {
					t.Error(err)
					return
				}
				if _, err := unstamp(p, cluster); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	readersDone.Wait()
	s.finish()
}
