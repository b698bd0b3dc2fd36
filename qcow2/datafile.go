package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// With an external data file a guest cluster has one place only, the same offset in that file. So a cluster that was zeroed
// is written where its old bytes are, at a time when nobody can still be using them for data (errZeroedLately); and nothing
// there is ever allocated or counted.
//
// A raw data file is moreover to read as the guest disk does at all times, whatever a crash leaves. Two rules make it so.
// Zeroes go into the data file and the mapping stays. And a cluster without data gets its mapping, durable and to
// zeroes, before a request writes to it (errNotMapped). So there is no moment at which data and mapping could disagree.

// ErrDataFile is wrapped by the errors of what cannot be done to an image with an external data file.
var ErrDataFile = errors.New("not possible with an external data file")

var (
	// errZeroedLately: a cluster can be written only where it is, and only when older requests have ended. The request is run
	// again then.
	errZeroedLately = errors.New("cluster was zeroed a moment ago")
	// errNotMapped: a cluster of a raw data file must be mapped first.
	errNotMapped = errors.New("cluster of the raw data file is not mapped")
)

// raw reports whether the image has a data file that is a raw image by itself.
func (im *Image) raw() bool {
	return im.lay.DataFile && im.hdr.Autoclear&format.AutoclearRawData != 0
}

// writeAll writes p, in as many requests as it takes.
func (im *Image) writeAll(ctx context.Context, p []byte, off int64) error {
	for {
		n := 0
		err := im.change(ctx, span{off, int64(len(p))}, func() error {
			k, err := im.write(ctx, p[n:], off+int64(n))
			n += k
			return err
		})
		p, off = p[n:], off+int64(n)
		if !errors.Is(err, errNotMapped) {
			return err
		}
		if err := im.mapRaw(ctx, span{off, int64(len(p))}); err != nil {
			return err
		}
	}
}

// awaitZeroed waits for the requests that were running when a cluster was last zeroed. It is called outside a request.
func (im *Image) awaitZeroed() error {
	if err := im.meta.Epochs.Pass(im.zeroedAt.Load()); err != nil {
		return block.ErrClosed
	}
	return nil
}

// mapRaw maps the clusters of a raw data file that s touches and makes that durable. They read as zeroes before and after.
func (im *Image) mapRaw(ctx context.Context, s span) error {
	for off, end := s.off, s.end(); off < end; {
		err := im.change(ctx, span{off, end - off}, func() error {
			run, in, err := im.lookup(off, end-off, true)
			if err != nil {
				return fmt.Errorf("looking up guest offset %#x: %w", off, err)
			}
			n := min(end-off, run.N<<im.lay.ClusterBits-in)
			if done := im.inPlacePrefix(run, in, n); done > 0 {
				off += done
				return nil
			}
			clusters := (in + n + im.lay.ClusterSize() - 1) >> im.lay.ClusterBits
			c := im.cluster(off)
			clusters = min(clusters, im.meta.Map.SliceRest(c))
			off = int64(c+meta.GuestCluster(clusters)) << im.lay.ClusterBits
			return im.mapRawRun(ctx, c, clusters)
		})
		if err != nil {
			return err
		}
	}
	return im.Flush(ctx)
}

// mapRawRun maps n clusters from c on, which lie in one slice.
func (im *Image) mapRawRun(ctx context.Context, c meta.GuestCluster, n int64) error {
	held, err := im.meta.Ranges.Lock(ctx, uint64(c), uint64(c)+uint64(n)-1)
	if err != nil {
		return err
	}
	defer im.meta.Ranges.Unlock(held)
	edit, err := im.meta.Map.Prepare(c)
	if err != nil {
		return fmt.Errorf("preparing to map guest cluster %d: %w", c, err)
	}
	defer edit.Done()
	for k := range n {
		if err := im.zeroUnmapped(edit.Entry(k), c+meta.GuestCluster(k)); err != nil {
			return err
		}
	}
	edit.Put(0, n, func(k int64, _ meta.Entry) meta.Entry {
		return im.dataEntry(format.HostOff(c+meta.GuestCluster(k)) << im.lay.ClusterBits)
	})
	return nil
}

// zeroUnmapped zeroes what the data file holds of a cluster without the mapping saying that it is data.
func (im *Image) zeroUnmapped(e meta.Entry, c meta.GuestCluster) error {
	if im.lay.Kind(e.Word) == format.KindInvalid || !im.lay.ValidBitmap(e.Word, e.Bitmap) {
		return im.invalidEntry(e, c)
	}
	start, unit := int64(c)<<im.lay.ClusterBits, im.lay.SubclusterSize()
	for i := range im.lay.Subclusters() {
		part := span{start + int64(i)*unit, unit}
		part.n = min(part.n, im.Size()-part.off)
		if im.lay.SubKind(e.Word, e.Bitmap, i) == format.SubNormal || part.n <= 0 {
			continue
		}
		if err := im.zeroData(part, true); err != nil {
			return err
		}
	}
	return nil
}

// zeroRaw zeroes a range of a raw data file. The mapping stays: data, or zeroes for which the data file has zeroes already.
func (im *Image) zeroRaw(ctx context.Context, s span, punch, fast bool) error {
	if s.n == 0 {
		return nil
	}
	// A writer that copies what it finds around its data must not bring back what is zeroed here.
	held, err := im.meta.Ranges.Lock(ctx, uint64(im.cluster(s.off)), uint64(im.cluster(s.end()-1)))
	if err != nil {
		return err
	}
	defer im.meta.Ranges.Unlock(held)
	if fast {
		return im.zeroDataFast(s)
	}
	return im.zeroData(s, punch)
}

// zeroData zeroes a range of the data file. What a failure leaves is old or zero.
func (im *Image) zeroData(s span, punch bool) error {
	err := storage.Zero(im.data, s.off, s.n, punch)
	im.meta.ZeroedData(s.off, s.n)
	if err != nil {
		return fmt.Errorf("zeroing guest offset %#x in the external data file: %w", s.off, err)
	}
	return nil
}

func (im *Image) zeroDataFast(s span) error {
	err := im.data.ZeroRange(s.off, s.n)
	im.meta.ZeroedData(s.off, s.n)
	if errors.Is(err, storage.ErrNotSupported) {
		return block.ErrNoFastZero
	}
	if err != nil {
		return fmt.Errorf("zeroing guest offset %#x in the external data file: %w", s.off, err)
	}
	return nil
}

// placeInData is allocation.plan for an image with an external data file.
func (a *allocation) placeInData(most, in int64) error {
	im := a.im
	if im.raw() {
		return errNotMapped
	}
	reuse := im.mayReuseZeroed()
	for a.n = 0; a.n < most; a.n++ {
		e := a.edit.Entry(a.n)
		if im.lay.Kind(e.Word) == format.KindInvalid || !im.lay.ValidBitmap(e.Word, e.Bitmap) || im.wholeInPlace(e) {
			break
		}
		if !reuse && im.hasZeroes(e) {
			break
		}
	}
	if a.n == 0 {
		return errZeroedLately
	}
	a.host = format.HostOff(a.first) << im.lay.ClusterBits
	a.virgin = im.dataEnd.raise(int64(a.host), a.n<<im.lay.ClusterBits) && im.crypt == nil
	return nil
}

// wholeInPlace reports whether all of a cluster can be overwritten without a change of the mapping.
func (im *Image) wholeInPlace(e meta.Entry) bool {
	return im.inPlace(im.lay.Kind(e.Word), e.Word.Copied()) && (!im.lay.ExtendedL2 || e.Bitmap == format.BitmapAllAlloc)
}

// hasZeroes reports whether an entry says of some of its bytes that they are zeroes, whatever the host holds.
func (im *Image) hasZeroes(e meta.Entry) bool {
	switch im.lay.Kind(e.Word) {
	case format.KindZeroPlain, format.KindZeroAlloc:
		return true
	}
	return im.lay.ExtendedL2 && e.Bitmap&format.BitmapAllZero != 0
}

// highWater is the end of what was ever written to a file: what lies behind reads as zeroes.
type highWater struct{ end atomic.Int64 }

// raise notes that [off, off+n) is written and reports whether all of it lay behind the end.
func (h *highWater) raise(off, n int64) (virgin bool) {
	for {
		end := h.end.Load()
		if end >= off+n {
			return false
		}
		if h.end.CompareAndSwap(end, off+n) {
			return off >= end
		}
	}
}

// openData takes over the external data file, if the image has one.
func (im *Image) openData(o Options) error {
	if !im.lay.DataFile {
		return nil
	}
	im.data = o.DataFile
	stat := im.data.Stat()
	im.inFile = stat.Name
	size, err := im.data.Size()
	if err != nil {
		return fmt.Errorf("size of external data file: %w", err)
	}
	if stat.Device {
		size = math.MaxInt64 // it holds old bytes everywhere
	}
	im.dataEnd.end.Store(size)
	im.nowait, _ = im.data.(storage.NowaitReader)
	return nil
}

// refuseData returns why the image and its data file do not go together.
func (im *Image) refuseData(o Options) error {
	switch {
	case im.lay.DataFile && o.DataFile == nil:
		return errors.New("image keeps its data in an external data file, which was not given")
	case !im.lay.DataFile && o.DataFile != nil:
		return errors.New("an external data file can be given only for an image that has one")
	}
	return nil
}

// preallocation is what is allocated at once: all of the mapping when the data file is raw.
func (o CreateOptions) preallocation() Preallocation {
	if o.DataFileRaw && o.Preallocation == PreallocOff {
		return PreallocMetadata
	}
	return o.Preallocation
}

// emptyDataFile makes the data file of a new image of size bytes read as zeroes. What is preallocated is as long as the
// disk from the start.
func emptyDataFile(f storage.File, size int64, mode Preallocation) error {
	if f == nil {
		return invalid("the external data file is not given")
	}
	err := clearDataFile(f, size, mode)
	if err == nil && mode == PreallocFalloc {
		err = f.Preallocate(0, size)
	}
	if err == nil && mode == PreallocFull {
		err = zeroDevice(f, 0, size)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("emptying the external data file: %w", err)
	}
	return nil
}

func clearDataFile(f storage.File, size int64, mode Preallocation) error {
	if f.Stat().Device {
		have, err := f.Size()
		if err == nil && have < size {
			return invalid("it is a device of %d bytes and the disk has %d", have, size)
		}
		if err != nil {
			return err
		}
		return storage.Zero(f, 0, size, true)
	}
	if err := f.Truncate(0); err != nil || mode == PreallocOff {
		return err
	}
	return f.Truncate(size)
}

// holes gathers host ranges to be punched, neighbours together.
type holes []span

func (h *holes) add(s span) {
	if s.n == 0 {
		return
	}
	if k := len(*h) - 1; k >= 0 && (*h)[k].end() == s.off {
		(*h)[k].n += s.n
		return
	}
	*h = append(*h, s)
}

// punch gives the host space back. It costs space only if it fails. The ranges that map to it are held, and the mapping says
// that they read as zeroes; who reads or writes it all the same began before that.
func (h holes) punch(f storage.File) {
	for _, s := range h {
		_ = f.PunchHole(s.off, s.n)
	}
}
