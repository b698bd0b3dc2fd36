package meta

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/storage"
)

// logChunkBits is the grain in which a writeLog remembers host ranges: 256 KiB.
const logChunkBits = 18

// writeLog remembers where the file was written since the last sync that succeeded. It exists for the sync that fails:
// the host may then have dropped what was written before, and call the pages clean, so that the next sync would succeed
// without them. What is in doubt is read back, from the page cache that still has it, and written once more.
//
// Marking is on the path of every write; a range marked already costs one atomic load.
type writeLog struct {
	// seen holds, for some of the chunks marked since the last cut, their number plus one.
	seen [256]atomic.Int64

	mu    sync.Mutex
	since logCut // the last cut
	doubt logCut // before a sync that failed
}

// logCut is what a log gathered between two moments: the chunks that were written, and the ranges that were zeroed without
// writing. Those may be huge, and are all holes but for what was written to them later.
type logCut struct {
	chunks map[int64]struct{}
	zeroed []logRange
}

type logRange struct{ off, n int64 }

func (c logCut) empty() bool { return len(c.chunks) == 0 && len(c.zeroed) == 0 }

// mark notes that [off, off+n) was written. It is called after the write returned.
func (l *writeLog) mark(off, n int64) {
	if n <= 0 {
		return
	}
	for c := off >> logChunkBits; c <= (off+n-1)>>logChunkBits; c++ {
		// If the chunk is cut out between this load and our return, the write is among what that cut's sync covers: it
		// was over before.
		if slot := &l.seen[uint64(c)%uint64(len(l.seen))]; slot.Load() != c+1 {
			l.add(c, slot)
		}
	}
}

func (l *writeLog) add(c int64, slot *atomic.Int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since.chunks == nil {
		l.since.chunks = make(map[int64]struct{})
	}
	l.since.chunks[c] = struct{}{}
	slot.Store(c + 1)
}

// markZeroed notes that [off, off+n) was zeroed without writing.
func (l *writeLog) markZeroed(off, n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	z := l.since.zeroed
	if k := len(z) - 1; k >= 0 && z[k].off+z[k].n == off {
		z[k].n += n
		return
	}
	l.since.zeroed = append(z, logRange{off, n})
}

// cut returns what was marked since the last cut. A write that is marked after the cut is in the next one.
func (l *writeLog) cut() logCut {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.since
	l.since = logCut{}
	if c.chunks != nil {
		for i := range l.seen {
			l.seen[i].Store(0)
		}
	}
	return c
}

// lost notes that the sync which was to make a cut durable failed.
func (l *writeLog) lost(cut logCut) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.doubt.chunks == nil {
		l.doubt.chunks = make(map[int64]struct{})
	}
	maps.Copy(l.doubt.chunks, cut.chunks)
	l.doubt.zeroed = append(l.doubt.zeroed, cut.zeroed...)
}

// hasDoubt reports whether a failed sync left something in doubt.
func (l *writeLog) hasDoubt() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.doubt.empty()
}

func (l *writeLog) inDoubt() ([]int64, []logRange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.doubt.chunks)), slices.Clone(l.doubt.zeroed)
}

// rewrite writes once more what is in doubt. No request may be running: it would be overwritten with what was there
// before. The chunks are marked again, since only the next sync makes them durable.
func (l *writeLog) rewrite(f storage.File) error {
	buf := make([]byte, 1<<logChunkBits)
	chunks, zeroed := l.inDoubt()
	for _, z := range zeroed {
		if err := l.rezero(f, buf, z); err != nil {
			return err
		}
		l.mu.Lock()
		l.doubt.zeroed = l.doubt.zeroed[1:]
		l.mu.Unlock()
	}
	for _, c := range chunks {
		if err := l.rewriteRange(f, buf, logRange{c << logChunkBits, 1 << logChunkBits}); err != nil {
			return err
		}
		l.mu.Lock()
		delete(l.doubt.chunks, c)
		l.mu.Unlock()
	}
	return nil
}

// rewriteRange writes at most a chunk once more, as far as the file goes.
func (l *writeLog) rewriteRange(f storage.File, buf []byte, r logRange) error {
	n, err := f.ReadAt(buf[:r.n], r.off)
	if n < int(r.n) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading back what a failed sync left in doubt at host offset %#x: %w", r.off, err)
	}
	if err := storage.WriteFull(f, buf[:n], r.off); err != nil {
		return fmt.Errorf("writing again what a failed sync left in doubt at host offset %#x: %w", r.off, err)
	}
	l.mark(r.off, int64(n))
	return nil
}

// rezero zeroes the holes of a range once more and writes again what lies between them.
func (l *writeLog) rezero(f storage.File, buf []byte, r logRange) error {
	for r.n > 0 {
		end, data, err := f.NextExtent(r.off)
		if errors.Is(err, io.EOF) {
			return nil // the file has become shorter since
		}
		if err != nil {
			return fmt.Errorf("looking for what a failed sync left in doubt at host offset %#x: %w", r.off, err)
		}
		n := min(end-r.off, r.n)
		if data {
			n = min(n, int64(len(buf)))
			err = l.rewriteRange(f, buf, logRange{r.off, n})
		} else if err = storage.Zero(f, r.off, n, true); err == nil {
			l.markZeroed(r.off, n)
		}
		if err != nil {
			return err
		}
		r.off, r.n = r.off+n, r.n-n
	}
	return nil
}
