package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// shared is the memory of a journal.
type shared []byte

func (s shared) Bytes() []byte    { return s }
func (s shared) Close(bool) error { return nil }

// journalOf returns a journal in b, which a kill or none before left there.
func journalOf(b []byte, tell func(qcow2.JournalReport)) *qcow2.Journal {
	return &qcow2.Journal{Memory: shared(b), Identity: "the disk of this test", OnRecover: tell}
}

// newMemory returns memory for halves of so many records.
func newMemory(records int) []byte { return make([]byte, 4096+2*48*records) }

// life is the time from the start of a process to its end by SIGKILL. What it changes of files it changes one call after
// the other, and nothing any more when it is over.
type life struct {
	mu   sync.Mutex
	over bool
	left int // calls until it is over, if not negative
	// failing decides whether a sync fails, failingAll whether any call does.
	failing, failingAll func() bool
	before              func() // every call
}

var errKilled = errors.New("the process is dead")

func (l *life) call(fn func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left == 0 {
		l.over = true
	}
	if l.over {
		return errKilled
	}
	l.left--
	if l.before != nil {
		l.before()
	}
	if l.failingAll != nil && l.failingAll() {
		return syscall.EIO
	}
	return fn()
}

// mortal is a file as a process sees it that is going to be killed.
type mortal struct {
	storage.File
	l *life
}

func (m mortal) WriteAt(p []byte, off int64) (n int, err error) {
	err = m.l.call(func() error { n, err = m.File.WriteAt(p, off); return err })
	return n, err
}

func (m mortal) WriteVAt(bufs [][]byte, off int64) (n int, err error) {
	err = m.l.call(func() error { n, err = m.File.WriteVAt(bufs, off); return err })
	return n, err
}

func (m mortal) Sync() error {
	return m.l.call(func() error {
		if m.l.failing != nil && m.l.failing() {
			return syscall.EIO
		}
		return m.File.Sync()
	})
}

func (m mortal) Truncate(size int64) error {
	return m.l.call(func() error { return m.File.Truncate(size) })
}

func (m mortal) PunchHole(off, n int64) error {
	return m.l.call(func() error { return m.File.PunchHole(off, n) })
}

func (m mortal) ZeroRange(off, n int64) error {
	return m.l.call(func() error { return m.File.ZeroRange(off, n) })
}

func (m mortal) Preallocate(off, n int64) error {
	return m.l.call(func() error { return m.File.Preallocate(off, n) })
}

// killed is what a kill leaves: the files as the process wrote them, and the journal. marks is what is known of the requests.
type killed struct {
	files   []*storage.MemFile
	journal []byte
	marks   []any
}

func (k killed) clone() killed {
	c := killed{marks: k.marks, journal: append([]byte(nil), k.journal...)}
	for _, f := range k.files {
		c.files = append(c.files, f.Clone())
	}
	return c
}

// run is a disk with a journal that is used until it is killed, at many moments at once.
type journalRun struct {
	t     *testing.T
	disk  *explore.Disk
	files []*storage.MemFile
	im    *qcow2.Image
	life  life

	mu    sync.Mutex
	marks []any
	ids   int
	kills []killed
}

func (w *journalRun) mark(m any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.marks = append(w.marks, m)
}

func (w *journalRun) marksNow() []any {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.marks[:len(w.marks):len(w.marks)]
}

// kill notes what a kill at this moment leaves. No call changes a file meanwhile. What was acknowledged before must be there;
// what begins before the journal is looked at may be.
func (w *journalRun) kill() {
	if w.im == nil {
		return // it is being opened
	}
	known := w.marksNow()
	k := killed{journal: w.im.JournalSnapshot(), marks: append(known, markFlush{-1}, markAcked{-1})}
	for _, m := range w.marksNow()[len(known):] {
		if begin, ok := m.(markBegin); ok {
			k.marks = append(k.marks, begin)
		}
	}
	for _, f := range w.files {
		k.files = append(k.files, f.Clone())
	}
	w.kills = append(w.kills, k)
}

func (w *journalRun) do(r *rand.Rand) error {
	w.mu.Lock()
	w.ids++
	id := w.ids
	w.mu.Unlock()
	op := w.disk.Draw(r, explore.Version(id+1))
	if op.Kind == explore.Flush && r.IntN(3) > 0 {
		op = explore.Op{Kind: explore.Read, First: op.First, N: max(op.N, 1)}
	}
	if op.Changes() {
		w.mark(markBegin{id, op})
	}
	err := op.Run(w.im)
	if errors.Is(err, syscall.EIO) {
		return nil // of a sync that failed: nothing was promised
	}
	if err == nil && op.Changes() {
		w.mark(markDone{id})
	}
	return err
}

// newJournalRun opens a disk with room for so many records in a half.
func newJournalRun(t *testing.T, d *explore.Disk, records int) *journalRun {
	t.Helper()
	w := &journalRun{t: t, disk: d, files: d.Files(), life: life{left: -1}}
	opened := *d
	opened.Journal = journalOf(newMemory(records), func(r qcow2.JournalReport) { t.Errorf("new memory held %+v", r) })
	if len(w.files) > 1 {
		opened.Data = mortal{w.files[1], &w.life}
	}
	im, err := opened.Open(mortal{w.files[0], &w.life}, false)
	if err != nil {
		t.Fatal(err)
	}
	w.im = im
	return w
}

// TestJournalKills: a process that is killed at any moment loses nothing that it acknowledged, flushed or not.
func TestJournalKills(t *testing.T) {
	for i, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for n := range *seeds {
				k := n + i // so that every kind of disk meets other conditions
				seed := *seed0 + uint64(n) + uint64(i)<<32
				r := rand.New(rand.NewPCG(seed, 1000))
				w := newJournalRun(t, d, []int{1000, 2, 24}[k%3])
				w.life.before = func() {
					if r.IntN(12) == 0 {
						w.kill()
					}
				}
				clients := []int{1, 3}[k%2]
				if k%4 >= 2 {
					fails := rand.New(rand.NewPCG(seed, 1001))
					w.life.failing = func() bool { return fails.IntN(4) == 0 }
				}
				var wg sync.WaitGroup
				for c := range clients {
					wg.Go(func() {
						r := rand.New(rand.NewPCG(seed, uint64(c)))
						for range 72 / clients {
							if err := w.do(r); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				w.life.mu.Lock()
				w.kill()
				w.life.before, w.life.failing = nil, nil
				w.life.mu.Unlock()
				if err := w.im.Close(); err != nil {
					t.Fatal(err)
				}
				for n, state := range w.kills {
					if err := judgeKill(d, state, r, n%5 == 0); err != nil {
						t.Fatalf("seed %d, kill %d of %d: %v", seed, n, len(w.kills), err)
					}
				}
			}
		})
	}
}

// TestJournalKilledInOperations: nor is anything lost by a kill in the middle of an operation on the whole image.
func TestJournalKilledInOperations(t *testing.T) {
	for _, start := range wholeStarts {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			r := rand.New(rand.NewPCG(*seed0, 9))
			w := newJournalRun(t, d, 300)
			for _, o := range wholeOperations() {
				w.doSome(r, 12)
				w.life.mu.Lock()
				w.life.before = w.kill
				w.life.mu.Unlock()
				err := o.run(w.im)
				w.life.mu.Lock()
				w.life.before = nil
				w.life.mu.Unlock()
				if err != nil {
					t.Fatalf("%s: %v", o.name, err)
				}
				w.judgeKills(o.name)
			}
			if err := w.im.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestJournalAfterFailedOperations: nor by a kill after one that failed.
func TestJournalAfterFailedOperations(t *testing.T) {
	for _, start := range wholeStarts {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for i, o := range wholeOperations() {
				for at, failed := 0, true; failed && at < 40; at += 1 + at/4 {
					r := rand.New(rand.NewPCG(*seed0, uint64(at)))
					w := newJournalRun(t, d, 300)
					if i == 2 { // what is deleted must be there
						if err := wholeOperations()[0].run(w.im); err != nil {
							t.Fatal(err)
						}
					}
					w.doSome(r, 12)
					n := 0
					w.life.mu.Lock()
					w.life.failingAll = func() bool { n++; return n == 1+at }
					w.life.mu.Unlock()
					failed = o.run(w.im) != nil
					w.life.mu.Lock()
					w.life.failingAll = nil
					w.life.mu.Unlock()
					w.doSome(r, 12)
					w.life.mu.Lock()
					w.kill()
					w.life.mu.Unlock()
					w.judgeKills(fmt.Sprintf("%s that failed at call %d", o.name, at))
					_ = w.im.Close()
				}
			}
		})
	}
}

// doSome makes requests.
func (w *journalRun) doSome(r *rand.Rand, n int) {
	w.t.Helper()
	for range n {
		if err := w.do(r); err != nil {
			w.t.Fatal(err)
		}
	}
}

// judgeKills brings back what kills in the middle of something left, each once.
func (w *journalRun) judgeKills(of string) {
	w.t.Helper()
	for n, state := range w.kills {
		h := replay(w.disk, state.marks)
		if _, err := bringBack(w.disk, state, -1, nil); err != nil {
			w.t.Fatalf("%s, kill %d of %d: %v", of, n, len(w.kills), err)
		}
		if err := lives(w.disk, state, h, false); err != nil {
			w.t.Fatalf("%s, kill %d of %d: %v", of, n, len(w.kills), err)
		}
		total.Add(1)
	}
	w.kills = nil
}

// wholeOperation is an operation on the whole image, after which the disk is as before.
type wholeOperation struct {
	name string
	run  func(im *qcow2.Image) error
}

func wholeOperations() []wholeOperation {
	ctx := context.Background()
	return []wholeOperation{
		{"snapshot", func(im *qcow2.Image) error { _, err := im.CreateSnapshot(ctx, "s"); return err }},
		{"resize", func(im *qcow2.Image) error {
			return im.Resize(ctx, 4<<20, qcow2.ResizeOptions{Preallocation: qcow2.PreallocMetadata})
		}},
		{"delete", func(im *qcow2.Image) error { return im.DeleteSnapshot(ctx, "s") }},
		{"compact", func(im *qcow2.Image) error { _, err := im.Compact(ctx, qcow2.CompactOptions{}); return err }},
	}
}

var wholeStarts = []explore.Start{
	{Name: "tiny clusters", Create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Size: 96 << 10}},
	{Name: "4k", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10}},
	{Name: "subclusters", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true}},
}

// judgeKill brings back what a kill left, in one go, and after another kill or a failure in the middle.
func judgeKill(d *explore.Disk, k killed, r *rand.Rand, stock bool) error {
	total.Add(1)
	h := replay(d, k.marks)
	if err := sound(k.files[0]); err != nil {
		return fmt.Errorf("without the journal: %w", err)
	}
	whole := k.clone()
	calls, err := bringBack(d, whole, -1, nil)
	if err != nil {
		return err
	}
	if err := lives(d, whole, h, stock); err != nil {
		return err
	}
	if calls == 0 {
		return nil
	}
	again := k.clone()
	at := r.IntN(calls)
	if _, err := bringBack(d, again, at, nil); err == nil {
		return fmt.Errorf("killed at call %d of %d, and no error", at, calls)
	}
	if _, err := bringBack(d, again, -1, nil); err != nil {
		return fmt.Errorf("after a second kill, at call %d: %w", at, err)
	}
	if err := lives(d, again, h, false); err != nil {
		return fmt.Errorf("after a second kill, at call %d: %w", at, err)
	}
	failed := k.clone()
	n := 0
	if _, err := bringBack(d, failed, -1, func() bool { n++; return n == 1+at }); err != nil && !errors.Is(err, syscall.EIO) {
		return err
	}
	if _, err := bringBack(d, failed, -1, nil); err != nil {
		return fmt.Errorf("after call %d failed: %w", at, err)
	}
	if err := lives(d, failed, h, false); err != nil {
		return fmt.Errorf("after call %d failed: %w", at, err)
	}
	return nil
}

// bringBack opens a disk with what is left of it, and lets it be killed again. It returns how many calls changed something
// until the disk was open.
func bringBack(d *explore.Disk, k killed, after int, failing func() bool) (calls int, err error) {
	l := &life{left: after, failingAll: failing}
	l.before = func() { calls++ }
	opened := *d
	var lost error
	opened.Journal = journalOf(k.journal, func(r qcow2.JournalReport) { lost = r.Lost })
	if k.journal == nil { // version 2
		opened.Journal = nil
	}
	if len(k.files) > 1 {
		opened.Data = mortal{k.files[1], l}
	}
	im, err := opened.Open(mortal{k.files[0], l}, false)
	if err != nil {
		return calls, err
	}
	if lost != nil {
		return calls, fmt.Errorf("the journal was not used: %w", lost)
	}
	opens := calls
	l.mu.Lock()
	l.over = true // what was acknowledged is there already, and not because of a close
	l.mu.Unlock()
	_ = im.Close()
	return opens, nil
}

// lives finds every sector as it may be, and the image usable.
func lives(d *explore.Disk, k killed, h history, stock bool) error {
	if err := sound(k.files[0]); err != nil {
		return err
	}
	with := d.With(k.files)
	if err := content(with, k.files[0], h); err != nil {
		return err
	}
	if stock {
		if err := stockCheck(with, k.files[0]); err != nil {
			return err
		}
	}
	return goOn(with, k.files[0])
}

// TestJournalPowerCuts: with a journal, and while one is brought back, a power cut leaves what it leaves without.
func TestJournalPowerCuts(t *testing.T) {
	for i, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for n := range (*seeds + 2) / 3 {
				k, seed := n+i, *seed0+uint64(n)
				files := storage.NewCrashFiles(d.Files()...)
				w := &workload{t: t, disk: d, file: files[0], all: files, samples: *samples / 4}
				memory := newMemory([]int{100, 4, 24}[k%3])
				for range 3 {
					memory = w.oneLife(memory, seed, 24)
				}
				opened := *d
				opened.Journal = journalOf(memory, nil)
				if len(files) > 1 {
					opened.Data = files[1]
				}
				w.file.Mark(markFlush{-1})
				im, err := opened.Open(w.file, false)
				if err != nil {
					t.Fatal(err)
				}
				if im.Version() > 2 {
					w.file.Mark(markAcked{-1})
				}
				w.im = im
				w.close()
				judge(t, w, seed+uint64(i)<<32)
			}
		})
	}
}

// oneLife uses the disk and has itself killed. It returns what the journal held.
func (w *workload) oneLife(memory []byte, seed uint64, steps int) []byte {
	w.t.Helper()
	l := &life{left: -1}
	opened := *w.disk
	opened.Journal = journalOf(memory, nil)
	if len(w.all) > 1 {
		opened.Data = mortal{w.all[1], l}
	}
	w.file.Mark(markFlush{-2})
	im, err := opened.Open(mortal{w.file, l}, false)
	if err != nil {
		w.t.Fatal(err)
	}
	if im.Version() > 2 { // all that was acknowledged before the kill is durable now
		w.file.Mark(markAcked{-2})
	}
	w.im = im
	r := rand.New(rand.NewPCG(seed, uint64(w.ids.Load())))
	for range steps {
		if err := w.do(r); err != nil {
			w.t.Fatal(err)
		}
	}
	l.mu.Lock()
	left := im.JournalSnapshot()
	l.over = true
	l.mu.Unlock()
	_ = im.Close()
	if left == nil { // without a journal, a kill loses nothing that was acknowledged either: it was flushed
		left = memory
	}
	return left
}

// TestJournalOfAnother: a journal is brought back into no image but its own, and into none that somebody changed since.
func TestJournalOfAnother(t *testing.T) {
	d := explore.Start{Name: "4k", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10}}.Make(t)
	w := newJournalRun(t, d, 100)
	write := explore.Op{Kind: explore.Write, First: 3, N: 40, Version: 9}
	if err := write.Run(w.im); err != nil {
		t.Fatal(err)
	}
	w.life.mu.Lock()
	w.kill()
	w.life.over = true
	w.life.mu.Unlock()
	_ = w.im.Close()
	state := w.kills[0]

	open := func(k killed, j *qcow2.Journal) (lost error) {
		t.Helper()
		told := false
		j.OnRecover = func(r qcow2.JournalReport) { told, lost = true, r.Lost }
		opened := *d
		opened.Journal = j
		im, err := opened.Open(k.files[0], false)
		if err != nil {
			t.Fatal(err)
		}
		if !told {
			t.Error("nobody was told of the journal")
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		return lost
	}
	same := state.clone()
	if lost := open(same, journalOf(same.journal, nil)); lost != nil {
		t.Errorf("lost: %v", lost)
	}
	other := state.clone()
	if lost := open(other, &qcow2.Journal{Memory: shared(other.journal), Identity: "another disk"}); !errors.Is(lost, qcow2.ErrJournalForeign) {
		t.Errorf("journal of another disk: %v", lost)
	}
	changed := state.clone()
	im, err := d.Open(changed.files[0], false) // without the journal
	if err == nil {
		err = im.WriteAt(context.Background(), make([]byte, 4096), 8192, 0)
	}
	if err == nil {
		err = im.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if lost := open(changed, journalOf(changed.journal, nil)); !errors.Is(lost, qcow2.ErrJournalStale) {
		t.Errorf("journal of an image that was changed since: %v", lost)
	}
}
