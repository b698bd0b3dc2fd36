package race

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/peer"
)

// exploration is one image and its clients.
type exploration struct {
	scenario
	t       *testing.T
	gallery gallery
	base    storage.File     // the image's bytes
	data    *storage.MemFile // those of the external data file, if there is one
	file    *busyFile
	im      *qcow2.Image
	time    clock

	all    []*request
	closed atomic.Bool // Close has returned
}

// client makes requests one after another.
type client struct {
	*exploration
	id   int
	r    *rand.Rand
	seen []*request
	next value
}

var errAfterClose = errors.New("a request that came after Close had returned was let in")

// note runs one call and notes it. Requests that failed may have changed what they were to change, or not; for what is not
// to have changed anything (skip) nothing is noted.
func (c *client) note(q request, call func(*request) error, skip ...error) error {
	wasClosed := c.closed.Load()
	q.client = c.id
	q.call = c.time.now()
	err := call(&q)
	q.ret = c.time.now()
	if wasClosed && !errors.Is(err, block.ErrClosed) && !errors.Is(err, block.ErrWouldBlock) {
		return fmt.Errorf("%w: %s: %v", errAfterClose, q.name, err)
	}
	if err == nil {
		c.seen = append(c.seen, &q)
		return nil
	}
	for _, s := range skip {
		if errors.Is(err, s) {
			return nil
		}
	}
	if !errors.Is(err, block.ErrClosed) && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s of sectors %d+%d: %w", q.name, q.sector, q.n, err)
	}
	if q.act != actRead {
		q.act = actMaybe
		c.seen = append(c.seen, &q)
	}
	if errors.Is(err, block.ErrClosed) {
		return block.ErrClosed
	}
	return nil
}

// span draws sectors: nearly always in the two places where everybody meets.
func (c *client) span() (sector, n int64) {
	place := int64(0)
	switch k := c.r.IntN(20); {
	case k < 4:
		place = c.r.Int64N(places)
	case k < 10:
		place = places - 1
	}
	first, total := c.place(place)
	per := c.clusterSize / sectorSize
	at := c.r.Int64N(total)
	switch c.r.IntN(6) {
	case 0, 1: // one end or the middle of a cluster
		at = min(at/per*per+pick(c.r, 0, (per-1)/2, per-1), total-1)
		return first + at, 1
	case 2, 3: // whole clusters
		at = at / per * per
		return first + at, min(per*int64(1+c.r.IntN(2)), total-at)
	case 4: // the end of one cluster and the start of the next
		at = max(at/per*per-1, 0)
		return first + at, min(2, total-at)
	}
	return first + at, 1 + c.r.Int64N(total-at)
}

// context returns one that in some requests is cancelled meanwhile.
func (c *client) context() (context.Context, func()) {
	if c.r.IntN(12) != 0 {
		return context.Background(), func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	turns := c.r.IntN(30)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range turns {
			runtime.Gosched()
		}
		cancel()
	}()
	return ctx, func() { <-done; cancel() }
}

func (c *client) step() error {
	ctx, end := c.context()
	defer end()
	sector, n := c.span()
	off, length := sector*sectorSize, n*sectorSize
	q := request{sector: sector, n: n}
	switch k := c.r.IntN(100); {
	case k < 30:
		q.name, q.act = "read", actRead
		if c.r.IntN(3) == 0 {
			q.name = "read in pieces"
			return c.read(q, func(p []byte) error { return c.im.ReadVAt(ctx, c.cut(p), off) })
		}
		return c.read(q, func(p []byte) error { return c.im.ReadAt(ctx, p, off) })
	case k < 35:
		q.name, q.act = "try read", actRead
		if c.r.IntN(3) == 0 {
			q.name = "try read in pieces"
			return c.read(q, func(p []byte) error { return c.im.TryReadVAt(c.cut(p), off) })
		}
		return c.read(q, func(p []byte) error { return c.im.TryReadAt(p, off) })
	case k < 38:
		q.name, q.act = "try read data", actRead
		return c.read(q, func(p []byte) error { return tryReadData(c.im, p, off) })
	case k < 43 && !c.hasData() && c.wholeClusters(sector, n):
		q.name = "write compressed"
		// A resize may have moved the end of the disk, which alone may cut a cluster.
		return c.write(q, func(p []byte) error { return c.im.WriteCompressed(ctx, p, off) }, qcow2.ErrNotWholeClusters)
	case k < 58:
		q.name = "write"
		flags := block.WriteFlags(0)
		if c.r.IntN(15) == 0 {
			q.name, flags = "write, FUA", block.WriteFUA
		}
		if c.r.IntN(3) == 0 {
			q.name += ", in pieces"
			return c.write(q, func(p []byte) error { return c.im.WriteVAt(ctx, c.cut(p), off, flags) })
		}
		return c.write(q, func(p []byte) error { return c.im.WriteAt(ctx, p, off, flags) })
	case k < 68:
		q.name = "try write"
		if c.r.IntN(3) == 0 {
			q.name = "try write in pieces"
			return c.write(q, func(p []byte) error { return c.im.TryWriteVAt(c.cut(p), off) })
		}
		return c.write(q, func(p []byte) error { return c.im.TryWriteAt(p, off) })
	case k < 81:
		if c.r.IntN(6) == 0 && c.wholeClusters(sector, n) {
			q.name, q.act = "hide", actSet
			// As with compressed writes, a resize may have moved the end of the disk.
			return c.note(q, func(*request) error { return c.im.Hide(ctx, off, length) }, qcow2.ErrInvalidOption)
		}
		flags := block.ZeroFlags(c.r.IntN(4)) // ZeroUnmap, ZeroFast
		q.name, q.act = fmt.Sprint("zero, flags ", flags), actSet
		return c.note(q, func(*request) error { return c.im.WriteZeroes(ctx, off, length, flags) }, block.ErrNoFastZero)
	case k < 89:
		q.name, q.act = "discard", actMaybe
		return c.note(q, func(*request) error { return c.im.Discard(ctx, off, length) })
	case k < 96:
		return c.note(request{name: "flush", act: actUnknown}, func(*request) error { return c.im.Flush(ctx) })
	case k < 97 && c.bitmap:
		return c.note(request{name: "bitmap", act: actUnknown}, func(*request) error { return c.useBitmap(ctx, off, length) })
	case k < 98:
		return c.note(request{name: "extents", act: actUnknown}, func(*request) error { return c.extents(off, length) })
	case k < 99:
		return c.note(request{name: "check", act: actUnknown}, func(*request) error { return c.check(ctx) })
	}
	return c.note(request{name: "change", act: actUnknown}, func(*request) error { return c.change() }, qcow2.ErrInvalidOption)
}

// cut cuts p into pieces, of whole sectors most times.
func (c *client) cut(p []byte) [][]byte {
	if c.r.IntN(4) == 0 {
		return blocktest.Cut(c.r, p, 1+c.r.IntN(2000), false)
	}
	return blocktest.Cut(c.r, p, 1+c.r.IntN(8), true)
}

// change changes the image under everybody's feet: the disk behind the part that requests go to, the refcounts, the version.
func (c *client) change() error {
	ctx := context.Background() // a change that is broken off leaves leaks for the next open to repair
	switch c.r.IntN(6) {
	case 0, 1:
		_, err := c.im.Compact(ctx, qcow2.CompactOptions{Step: c.clusterSize << c.r.IntN(6)})
		return err
	case 2, 3:
		return c.im.Resize(ctx, c.size()+c.r.Int64N(4)*c.r.Int64N(200)*sectorSize, qcow2.ResizeOptions{Shrink: true})
	case 4:
		return c.im.Amend(ctx, qcow2.AmendOptions{RefcountBits: 16 << c.r.IntN(3)})
	}
	return c.im.Amend(ctx, qcow2.AmendOptions{Version: 2 + c.r.IntN(2)})
}

// wholeClusters reports whether sectors are whole clusters, the last of which the disk's end may cut.
func (c *client) wholeClusters(sector, n int64) bool {
	per := c.clusterSize / sectorSize
	return sector%per == 0 && (n%per == 0 || (sector+n)*sectorSize == c.size())
}

func (c *client) read(q request, call func(p []byte) error) error {
	p := make([]byte, q.n*sectorSize)
	stamp(p, 1<<31, 1) // what the caller's buffer held must not show through
	return c.note(q, func(q *request) error {
		if err := call(p); err != nil {
			return err
		}
		return q.decode(p, c.onDisk)
	}, block.ErrWouldBlock)
}

// decode takes the values out of what was read. The host promises whole sectors to memory files only: a system call that
// reads while another writes may see a part, which says nothing about us.
func (q *request) decode(p []byte, tornIsFine bool) error {
	q.got = make([]value, q.n)
	for i := range q.got {
		sector := q.sector + int64(i)
		v, err := unstamp(p[i*sectorSize:][:sectorSize], sector)
		var torn errTorn
		if tornIsFine && errors.As(err, &torn) {
			q.act = actUnknown
			return nil
		}
		if err != nil {
			return err
		}
		q.got[i] = v
	}
	return nil
}

// tryReadData is TryReadDataAt that fills p with zeroes where there is nothing else.
func tryReadData(im *qcow2.Image, p []byte, off int64) error {
	err := im.TryReadDataAt(p, off)
	if errors.Is(err, block.ErrAllZero) {
		clear(p)
		return nil
	}
	if errors.Is(err, block.ErrMixed) {
		return block.ErrWouldBlock
	}
	return err
}

func (c *client) write(q request, call func(p []byte) error, skip ...error) error {
	q.act, q.v = actSet, c.next
	c.next++
	p := make([]byte, q.n*sectorSize)
	stamp(p, q.sector, q.v)
	return c.note(q, func(*request) error { return call(p) }, append(skip, block.ErrWouldBlock)...)
}

// extents must cover the range in order; what they say is out of date at once.
func (c *client) extents(off, n int64) error {
	at := off
	err := c.im.Extents(context.Background(), off, n, func(x block.Extent) bool {
		if x.Off != at || x.Len <= 0 {
			at = -1
			return false
		}
		at = x.End()
		return true
	})
	if err == nil && at != off+n {
		return fmt.Errorf("extents of %d+%d do not cover it in order", off, n)
	}
	return err
}

// check wants an image at rest to be perfect, in the middle of everything.
func (c *client) check(ctx context.Context) error {
	report, err := c.im.Check(ctx, qcow2.CheckOptions{MaxFindings: 5})
	if err != nil {
		return err
	}
	if !report.Clean() {
		return fmt.Errorf("check of the open image: %d corruptions, %d leaks: %+v", report.Corruptions, report.Leaks, report.Findings)
	}
	return nil
}

// work is a client's life. After Close it knocks a few times more.
func (c *client) work(steps int) error {
	knocks := 0
	for range steps {
		err := c.step()
		if errors.Is(err, block.ErrClosed) {
			if knocks++; knocks < 20 {
				continue
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// explore runs one scenario and fails the test if anything is wrong.
func explore(t *testing.T, s scenario, g gallery) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	data := storage.NewMemFile("race.data")
	mem, backing := s.image(t, g, data)
	e := &exploration{scenario: s, t: t, gallery: g, base: mem, data: data, time: clock{time.Now()}}
	if s.onDisk {
		e.base = hostFile(t, mem)
		defer e.base.Close()
	}
	e.file = newBusyFile(e.base, s.pace, s.seed)
	o := qcow2.Options{Backing: backing, CacheSize: 1, ClusterCacheSize: 1}
	if s.hasData() {
		o.DataFile = newBusyFile(data, s.pace, s.seed^2)
	}
	if s.sweep {
		o.CacheCleanInterval = 500 * time.Microsecond
	}
	var err error
	e.im, err = qcow2.Open(t.Context(), e.file, o)
	must(t, err)
	if s.bitmap {
		must(t, e.im.AddBitmap(t.Context(), bitmapName, qcow2.BitmapOptions{Granularity: sectorSize}))
	}

	failure := e.runClients()
	if err := e.im.Close(); err != nil && (!s.close || !errors.Is(err, block.ErrClosed)) {
		t.Errorf("%v: close: %v", s, err)
	}
	if failure != nil {
		t.Fatalf("%v: %v", s, failure)
	}
	if n := e.file.late.Load(); n > 0 {
		t.Fatalf("%v: %d calls to the file after it was closed", s, n)
	}
	e.readBack(backing)
	e.judge()
	if s.bitmap {
		e.judgeBitmap(backing)
	}
	mustBeClean(t, e.base)
	if s.seed%4 == 0 || s.origin == fromSnapshot {
		e.askQEMU()
	}
	if err := goleak.Find(before); err != nil {
		t.Fatalf("%v: %v", s, err)
	}
}

// hostFile puts the image into a file of the host.
func hostFile(t *testing.T, mem *storage.MemFile) storage.File {
	t.Helper()
	host, err := storage.CreateFile(filepath.Join(t.TempDir(), "image.qcow2"), storage.OpenOptions{})
	must(t, err)
	must(t, storage.CopyContent(host, mem))
	return host
}

// runClients lets all clients work and gathers what they saw.
func (e *exploration) runClients() error {
	clients := make([]*client, e.clients)
	failures := make([]error, e.clients+1)
	var wg sync.WaitGroup
	for id := range clients {
		c := &client{exploration: e, id: id, r: rand.New(rand.NewPCG(e.seed, uint64(id)+100)), next: value(id+1) << 20}
		clients[id] = c
		wg.Go(func() { failures[id] = c.work(e.steps) })
	}
	if e.close {
		turns := int(mix(e.seed) % 5000)
		wg.Go(func() {
			for range turns {
				runtime.Gosched()
			}
			failures[e.clients] = e.im.Close()
			e.closed.Store(true)
		})
	}
	wg.Wait()
	for _, c := range clients {
		e.all = append(e.all, c.seen...)
	}
	return errors.Join(failures...)
}

// readBack opens the image anew and adds what every place holds to the history: what the requests left must be on the
// disk.
func (e *exploration) readBack(backing block.Device) {
	e.t.Helper()
	o := qcow2.Options{ReadOnly: true}
	if e.hasData() {
		o.DataFile = keptOpen{e.data}
	}
	if backing != nil {
		// The first image closed the backing device with itself.
		_, o.Backing = e.image(e.t, e.gallery, nil)
	}
	im, err := qcow2.Open(e.t.Context(), keptOpen{e.base}, o)
	must(e.t, err)
	defer im.Close()
	for i := range int64(places) {
		first, n := e.place(i)
		q := &request{client: e.clients, name: "read back", act: actRead, sector: first, n: n, call: e.time.now()}
		p := make([]byte, n*sectorSize)
		must(e.t, im.ReadAt(e.t.Context(), p, first*sectorSize))
		if err := q.decode(p, false); err != nil {
			e.t.Fatalf("%v: reading back: %v", e.scenario, err)
		}
		q.ret = e.time.now()
		e.all = append(e.all, q)
	}
}

func (e *exploration) judge() {
	e.t.Helper()
	if why := impossible(e.all); why != "" {
		e.t.Fatalf("%v: %s", e.scenario, why)
	}
	for _, sector := range e.watched() {
		if why := judge(e.all, sector, e.holds(sector)); why != "" {
			e.t.Fatalf("%v: %s", e.scenario, why)
		}
	}
}

// askQEMU has qemu-img check the image, and its snapshot still hold what it held.
func (e *exploration) askQEMU() {
	e.t.Helper()
	if _, err := peer.Look("qemu-img"); err != nil && !peer.InCI() || e.hasData() { // which stock would look for elsewhere
		return // our own check has been done
	}
	dir, err := os.MkdirTemp(e.t.TempDir(), "after")
	must(e.t, err)
	defer os.RemoveAll(dir)
	img := filepath.Join(dir, "image.qcow2")
	save(e.t, e.base, img)
	run(e.t, "qemu-img", "check", "-f", "qcow2", img)
	if e.origin != fromSnapshot {
		return
	}
	want, got := filepath.Join(dir, "want.raw"), filepath.Join(dir, "got.raw")
	save(e.t, e.content(e.t), want)
	run(e.t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name=before", img, got)
	run(e.t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, got)
}

// seeds says which explorations to run: until the time is over where DROVER_LONG is set, else the first few.
func seeds(t *testing.T, each func(seed uint64)) {
	var only uint64
	if text := os.Getenv("DROVER_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 0, 64)
		must(t, err)
		only = n
	}
	text := os.Getenv("DROVER_LONG")
	if text == "" {
		if only != 0 {
			each(only)
			return
		}
		n := uint64(150)
		if testing.Short() {
			n = 30
		}
		for seed := uint64(1); seed <= n; seed++ {
			each(seed)
		}
		return
	}
	long, err := time.ParseDuration(text)
	must(t, err)
	runs := 0
	for end := time.Now().Add(long); time.Now().Before(end) && !t.Failed(); runs++ {
		seed := only
		if seed == 0 {
			seed = rand.Uint64()
		}
		each(seed)
	}
	t.Logf("%d explorations", runs)
}

// TestExplore runs explorations; see the package's comment for long runs and replay.
func TestExplore(t *testing.T) {
	g := gallery{}
	seeds(t, func(seed uint64) {
		s := draw(seed)
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { explore(t, s, g) })
	})
}
