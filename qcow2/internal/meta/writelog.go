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

	mu     sync.Mutex
	chunks map[int64]struct{} // written since the last cut
	doubt  map[int64]struct{} // written before a sync that failed
}

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
	if l.chunks == nil {
		l.chunks = make(map[int64]struct{})
	}
	l.chunks[c] = struct{}{}
	slot.Store(c + 1)
}

// cut returns what was marked since the last cut. A write that is marked after the cut is in the next one.
func (l *writeLog) cut() map[int64]struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.chunks
	l.chunks = nil
	if c != nil {
		for i := range l.seen {
			l.seen[i].Store(0)
		}
	}
	return c
}

// lost notes that the sync which was to make a cut durable failed.
func (l *writeLog) lost(cut map[int64]struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.doubt == nil {
		l.doubt = make(map[int64]struct{})
	}
	maps.Copy(l.doubt, cut)
}

func (l *writeLog) inDoubt() []int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.doubt))
}

// rewrite writes once more what is in doubt. No request may be running: it would be overwritten with what was there
// before. The chunks are marked again, since only the next sync makes them durable.
func (l *writeLog) rewrite(f storage.File) error {
	buf := make([]byte, 1<<logChunkBits)
	for _, c := range l.inDoubt() {
		off := c << logChunkBits
		n, err := f.ReadAt(buf, off)
		if n < len(buf) && !errors.Is(err, io.EOF) {
			return fmt.Errorf("reading back what a failed sync left in doubt at host offset %#x: %w", off, err)
		}
		if err := storage.WriteFull(f, buf[:n], off); err != nil {
			return fmt.Errorf("writing again what a failed sync left in doubt at host offset %#x: %w", off, err)
		}
		l.mark(off, int64(n))
		l.mu.Lock()
		delete(l.doubt, c)
		l.mu.Unlock()
	}
	return nil
}
