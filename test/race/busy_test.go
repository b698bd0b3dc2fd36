package race

import (
	"math/rand/v2"
	"runtime"
	"sync/atomic"

	"github.com/droverproject/drover/storage"
)

// pace says how a busyFile treats its callers.
type pace uint8

const (
	paceFree  pace = iota // no delays
	paceYield             // each call gives way a few times before and after
	paceHold              // some calls wait until a number of others have gone by
	paces
)

func (p pace) String() string { return [...]string{"free", "yield", "hold"}[p] }

// busyFile delays the calls to the file below at random, and notices calls that come after Close.
//
// Under paceYield it draws without any state of its own: whatever the callers shared here would order them in the eyes of
// the race detector and hide races between them.
type busyFile struct {
	storage.File
	pace  pace
	seed  uint64
	calls atomic.Uint64 // paceHold: calls begun

	closed atomic.Bool
	late   atomic.Int64 // calls after Close
}

var (
	_ storage.File         = (*busyFile)(nil)
	_ storage.NowaitReader = (*busyFile)(nil)
)

func newBusyFile(base storage.File, p pace, seed uint64) *busyFile {
	return &busyFile{File: base, pace: p, seed: seed}
}

// Most turns that a held call waits: a caller that nobody passes must get on too.
const holdTurns = 400

func (f *busyFile) delay() {
	switch f.pace {
	case paceYield:
		for range rand.IntN(6) {
			runtime.Gosched()
		}
	case paceHold:
		nth := f.calls.Add(1)
		draw := mix(f.seed + nth)
		if draw%8 != 0 {
			return
		}
		until := nth + draw>>8%64
		for range holdTurns {
			if f.calls.Load() >= until {
				return
			}
			runtime.Gosched()
		}
	}
}

// mix spreads a counter over all bits.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (f *busyFile) begin() {
	f.delay()
	if f.closed.Load() {
		f.late.Add(1)
	}
}

func (f *busyFile) ReadAt(p []byte, off int64) (int, error) {
	f.begin()
	defer f.delay()
	return f.File.ReadAt(p, off)
}

func (f *busyFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	f.begin()
	defer f.delay()
	return f.File.ReadVAt(bufs, off)
}

func (f *busyFile) ReadAtNowait(p []byte, off int64) (int, error) {
	nowait, ok := f.File.(storage.NowaitReader)
	if !ok {
		return 0, storage.ErrWouldBlock
	}
	f.begin()
	defer f.delay()
	return nowait.ReadAtNowait(p, off)
}

func (f *busyFile) WriteAt(p []byte, off int64) (int, error) {
	f.begin()
	defer f.delay()
	return f.File.WriteAt(p, off)
}

func (f *busyFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	f.begin()
	defer f.delay()
	return f.File.WriteVAt(bufs, off)
}

func (f *busyFile) Sync() error {
	f.begin()
	defer f.delay()
	return f.File.Sync()
}

func (f *busyFile) PunchHole(off, n int64) error {
	f.begin()
	defer f.delay()
	return f.File.PunchHole(off, n)
}

func (f *busyFile) Truncate(size int64) error {
	f.begin()
	defer f.delay()
	return f.File.Truncate(size)
}

// Close leaves the file below open for the test to look at.
func (f *busyFile) Close() error {
	f.closed.Store(true)
	return nil
}
