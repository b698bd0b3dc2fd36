package qcow2

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/qcow2/internal/codec"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// maxInflate bounds how many compressed clusters one step of a read unpacks.
const maxInflate = 64

// maxCached is the largest number of clusters in a row that a read leaves in the cache. Who reads more is passing through.
const maxCached = 4

// inflation is one compressed cluster of a read.
type inflation struct {
	entry format.L2Entry
	p     []byte // where its bytes go
	in    int64  // how far into the cluster they begin
}

// readCompressed reads what p holds of consecutive compressed clusters, from guest offset off on, the first of which is
// mapped by e. It unpacks them on all processors and returns how many bytes it read.
func (im *Image) readCompressed(p []byte, off int64, e format.L2Entry) (int, error) {
	cs := im.lay.ClusterSize()
	in := im.lay.GuestInCluster(format.GuestOff(off))
	n := min(int64(len(p)), cs-in)
	first := inflation{e, p[:n], in}
	if int64(len(p)) == n {
		if in == 0 {
			im.readAhead(im.cluster(off))
		}
		return int(n), im.inflate(first, true)
	}
	work := append(make([]inflation, 0, min(maxInflate, len(p)>>im.lay.ClusterBits+2)), first)
	for n < int64(len(p)) && len(work) < maxInflate {
		run, _, err := im.lookup(off+n, 1, true)
		if err != nil {
			return 0, fmt.Errorf("looking up guest offset %#x: %w", off+n, err)
		}
		if run.Kind != format.KindCompressed {
			break
		}
		part := p[n:min(int64(len(p)), n+cs)]
		work = append(work, inflation{run.Entry, part, 0})
		n += int64(len(part))
	}
	return int(n), im.inflateAll(work, len(work) <= maxCached)
}

// inflateAll unpacks clusters in parallel.
func (im *Image) inflateAll(work []inflation, cached bool) error {
	var taken atomic.Int64
	errs := make([]error, len(work))
	some := func() {
		for i := taken.Add(1) - 1; i < int64(len(work)); i = taken.Add(1) - 1 {
			errs[i] = im.inflate(work[i], cached)
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(work)) - 1 {
		wg.Go(some)
	}
	some()
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// inflate unpacks one cluster: into the cache if that is asked for or only a part of it is wanted, else to where it is wanted.
func (im *Image) inflate(w inflation, cached bool) error {
	if !cached && int64(len(w.p)) == im.lay.ClusterSize() {
		if im.clusters.peek(w.entry, w.p, 0) {
			return nil
		}
		return im.decompress(w.entry, w.p)
	}
	return im.decompressed(w.entry, w.p, w.in)
}

// decompressed reads what a compressed cluster has from in on, through the cache.
func (im *Image) decompressed(e format.L2Entry, p []byte, in int64) error {
	return im.clusters.read(e, p, in, func(dst []byte) error { return im.decompress(e, dst) })
}

// streams are buffers for compressed clusters as they lie on the host.
var streams = sync.Pool{New: func() any { return new([]byte) }}

// decompress unpacks a compressed cluster into dst.
func (im *Image) decompress(e format.L2Entry, dst []byte) error {
	host, n := im.lay.CompressedExtent(e)
	buf := streams.Get().(*[]byte)
	defer streams.Put(buf)
	if int64(cap(*buf)) < n {
		*buf = make([]byte, n)
	}
	src := (*buf)[:n]
	storage.Tell(im.file, storage.EventReadCompressed)
	if err := storage.ReadFull(im.file, src, int64(host)); err != nil {
		return fmt.Errorf("reading compressed cluster at host offset %#x: %w", host, err)
	}
	if err := codec.Decompress(uint8(im.hdr.CompressionType), dst, src); err != nil {
		return fmt.Errorf("decompressing cluster at host offset %#x: %w", host, err)
	}
	return nil
}

// readahead unpacks clusters that a sequential reader will want next.
type readahead struct {
	last    atomic.Uint64 // the cluster whose first byte was read last
	running atomic.Int32
}

// readAhead is told that the first byte of a compressed cluster is being read. If the one before was read last, it has those
// behind unpacked into the cache, each by a request of its own.
func (im *Image) readAhead(c meta.GuestCluster) {
	if meta.GuestCluster(im.ahead.last.Swap(uint64(c))) != c-1 || im.clusters.most < 16 {
		return
	}
	workers := int32(runtime.GOMAXPROCS(0))
	for k := meta.GuestCluster(1); k <= meta.GuestCluster(workers); k++ {
		run, err := im.meta.Map.Lookup(c+k, 1, false)
		if err != nil || run.Kind != format.KindCompressed || im.clusters.has(run.Entry) {
			continue
		}
		if im.ahead.running.Add(1) > workers {
			im.ahead.running.Add(-1)
			return
		}
		t, ok := im.tryEnter()
		if !ok {
			im.ahead.running.Add(-1)
			return
		}
		go func() {
			defer im.meta.Epochs.Exit(t)
			defer im.ahead.running.Add(-1)
			// The mapping may have changed since it was looked up, before this request began.
			run, err := im.meta.Map.Lookup(c+k, 1, false)
			if err == nil && run.Kind == format.KindCompressed {
				_ = im.decompressed(run.Entry, nil, 0) // who wants it will meet the error too
			}
		}()
	}
}
