package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// zeroChunk is a source of zeroes for what must be written out.
var zeroChunk [64 << 10]byte

// WriteZeroes makes [off, off+n) read as zeroes. Whole clusters change their mapping only (in version 3 images); parts of
// clusters are written, unless they read as zeroes already.
func (im *Image) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	if err := im.writeZeroes(ctx, off, n, flags); err != nil {
		return err
	}
	if flags&block.ZeroFUA != 0 {
		return im.Flush(ctx)
	}
	return nil
}

func (im *Image) writeZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	var body span
	var plain bool // no mapping stands for these zeroes
	var z zeroing
	unmap := flags&block.ZeroUnmap != 0
	err := im.change(ctx, span{off, n}, func() error {
		if im.raw() {
			return im.zeroRaw(ctx, span{off, n}, unmap && im.passRequest(), flags&block.ZeroFast != 0)
		}
		var head, tail span
		head, body, tail = im.splitUnits(off, n)
		plain = im.lay.Version < format.Version3 && (!unmap || im.backing != nil)
		if flags&block.ZeroFast != 0 {
			if err := im.fastZero(head, body, tail); err != nil {
				return err
			}
		}
		for _, part := range append(im.compressedEdges(body), head, tail) {
			if err := im.zeroByWriting(ctx, part); err != nil {
				return err
			}
		}
		z = im.zeroing(body, unmap)
		return nil
	})
	if err != nil {
		return err
	}
	if plain {
		return im.change(ctx, body, func() error { return im.zeroByWriting(ctx, body) })
	}
	return im.zeroMapping(ctx, z)
}

// span is a range of guest bytes.
type span struct{ off, n int64 }

func (s span) end() int64 { return s.off + s.n }

// splitUnits divides a range into the whole units of allocation in it (clusters, or subclusters where there are any) and the
// parts of units before and after. The last unit is whole when the range reaches the end of the disk. A range that holds
// no whole unit is all head.
func (im *Image) splitUnits(off, n int64) (head, body, tail span) {
	unit := im.lay.SubclusterSize()
	start := (off + unit - 1) &^ (unit - 1)
	end := (off + n) &^ (unit - 1)
	if off+n == im.Size() {
		end = off + n
	}
	if start >= end {
		return span{off, n}, span{}, span{}
	}
	return span{off, start - off}, span{start, end - start}, span{end, off + n - end}
}

// compressedEdges returns the parts of s that are parts of compressed clusters. Their zeroes cannot be mapped: a compressed
// cluster has no subclusters.
func (im *Image) compressedEdges(s span) []span {
	if !im.lay.ExtendedL2 || s.n == 0 {
		return nil
	}
	cs := im.lay.ClusterSize()
	var edges []span
	for _, at := range []int64{s.off &^ (cs - 1), (s.end() - 1) &^ (cs - 1)} {
		part := span{max(at, s.off), min(at+cs, s.end()) - max(at, s.off)}
		whole := part.off == at && (part.n == cs || part.end() == im.Size())
		run, _, err := im.lookup(at, 1, true)
		if err == nil && run.Kind == format.KindCompressed && !whole {
			edges = append(edges, part)
		}
	}
	return edges
}

// fastZero returns block.ErrNoFastZero if zeroing these parts would write zeroes out.
func (im *Image) fastZero(head, body, tail span) error {
	if im.lay.Version < format.Version3 && body.n > 0 {
		return block.ErrNoFastZero
	}
	for _, part := range []span{head, tail} {
		if zero, err := im.partIsZero(part); err != nil || !zero {
			return orElse(err, block.ErrNoFastZero)
		}
	}
	return nil
}

func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// partIsZero reports whether a range reads as zeroes by its mapping alone.
func (im *Image) partIsZero(s span) (bool, error) {
	for s.n > 0 {
		run, in, err := im.lookup(s.off, s.n, true)
		if err != nil {
			return false, fmt.Errorf("looking up guest offset %#x: %w", s.off, err)
		}
		n := min(s.n, run.N<<im.lay.ClusterBits-in)
		if im.zeroPrefix(run, s.off, in, n) < n {
			return false, nil
		}
		s.off, s.n = s.off+n, s.n-n
	}
	return true, nil
}

// zeroByWriting writes zeroes out, skipping what reads as zeroes already.
func (im *Image) zeroByWriting(ctx context.Context, s span) error {
	for s.n > 0 {
		run, in, err := im.lookup(s.off, s.n, true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", s.off, err)
		}
		most := min(s.n, run.N<<im.lay.ClusterBits-in)
		n := im.zeroPrefix(run, s.off, in, most)
		if n == 0 {
			// The piece ends with a sector: of one written by two pieces a power cut may leave half.
			n = min(most, int64(len(zeroChunk))-s.off%format.SectorSize)
			if im.lay.DataFile { // not on into a unit of zeroes, which may be too young to be written
				n = min(n, im.lay.SubclusterSize()-s.off%im.lay.SubclusterSize())
			}
			if _, err := im.write(ctx, zeroChunk[:n], s.off); err != nil {
				return err
			}
		}
		s.off, s.n = s.off+n, s.n-n
	}
	return nil
}

// Discard gives the space of whole clusters back; they read as zeroes afterwards, also where the backing file has data.
// Parts of clusters are left alone, and so is all of a version 2 image with a backing file: it has no zero clusters, so
// the backing file would show through.
func (im *Image) Discard(ctx context.Context, off, n int64) error {
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	var z zeroing
	err := im.change(ctx, span{off, n}, func() error {
		if im.raw() {
			return im.zeroRaw(ctx, span{off, n}, im.passRequest(), false)
		}
		if im.lay.Version >= format.Version3 || im.backing == nil {
			_, body, _ := im.splitUnits(off, n)
			z = im.zeroing(body, true)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return im.zeroMapping(ctx, z)
}

// zeroing makes whole units of body read as zeroes by their mapping.
type zeroing struct {
	im    *Image
	body  span
	unmap bool // give host clusters up
	punch bool // give the space of host clusters back that are not given up, or not counted
	own   bool // also where nothing below holds data, and so zeroes are read without a mapping
}

// Hide makes [off, off+n) zeroes that the image holds itself. WriteZeroes leaves alone what reads as zeroes because nothing
// below has data there; another backing file might. Unlike WriteZeroes, Hide wants whole clusters, or whole subclusters of
// an image that has them, up to the end of the disk.
func (im *Image) Hide(ctx context.Context, off, n int64) error {
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	var z zeroing
	plain := false
	err := im.change(ctx, span{off, n}, func() error {
		if im.raw() { // nothing is below, and what the mapping says must be true of the data file by itself
			return im.zeroRaw(ctx, span{off, n}, false, false)
		}
		head, body, tail := im.splitUnits(off, n)
		if head.n != 0 || tail.n != 0 {
			return invalid("%d bytes at guest offset %#x are not whole units of allocation", n, off)
		}
		for _, part := range im.compressedEdges(body) {
			if err := im.zeroByWriting(ctx, part); err != nil {
				return err
			}
		}
		plain = im.lay.Version < format.Version3
		z = zeroing{im: im, body: body, own: true}
		return nil
	})
	if err == nil && plain {
		return im.writeOutZeroes(ctx, off, n)
	}
	if err != nil {
		return err
	}
	return im.zeroMapping(ctx, z)
}

// writeOutZeroes writes zeroes as data.
func (im *Image) writeOutZeroes(ctx context.Context, off, n int64) error {
	for n > 0 {
		k := min(n, int64(len(zeroChunk)))
		if err := im.writeAll(ctx, zeroChunk[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// zeroing returns how body is zeroed by the mapping when the guest asks for it.
func (im *Image) zeroing(body span, unmap bool) zeroing {
	keep := im.opts.DiscardNoUnref && im.lay.Version >= format.Version3
	// A hole in a cluster that something still maps, on the disk or for a reader that began before, reads as zeroes; with
	// encryption it would read as noise.
	punch := unmap && im.passRequest() && im.crypt == nil
	return zeroing{im: im, body: body, unmap: unmap && !keep, punch: punch}
}

// passRequest reports whether the host gets the space back that the guest gives up.
func (im *Image) passRequest() bool { return im.opts.passDiscard().Request }

// entry returns what the entry of the cluster at guest offset off becomes, and whether its host clusters are given up. For
// a run of entries that are alike, one that stays as it is means that those behind it do too.
func (z zeroing) entry(e meta.Entry, off int64) (entry meta.Entry, giveUp bool) {
	im := z.im
	if im.lay.ExtendedL2 {
		return z.extendedEntry(e, off)
	}
	kind := im.lay.Kind(e.Word)
	switch {
	case z.own && kind == format.KindUnallocated:
		return meta.Entry{Word: format.L2Zero}, false
	case im.zeroRead(kind, off) && !(z.unmap && kind == format.KindZeroAlloc):
		return e, false
	case im.lay.Version < format.Version3: // with unmap, and nothing below that would show through
		return meta.Entry{}, true
	case !z.unmap && (kind == format.KindNormal || kind == format.KindZeroAlloc):
		return meta.Entry{Word: format.MakeL2ZeroAlloc(e.Word.HostOffset(), e.Word.Copied())}, false
	}
	return meta.Entry{Word: format.L2Zero}, true
}

// extendedEntry is entry for images with subclusters, of which body may cover a part.
func (z zeroing) extendedEntry(e meta.Entry, off int64) (entry meta.Entry, giveUp bool) {
	im := z.im
	cs, unit := im.lay.ClusterSize(), im.lay.SubclusterSize()
	from := int(max(z.body.off-off, 0) / unit)
	to := int((min(z.body.end()-off, cs) + unit - 1) / unit)
	if z.body.end() == im.Size() && z.body.end()-off <= cs {
		to = im.lay.Subclusters() // nothing of the disk is behind
	}
	kind := im.lay.Kind(e.Word)
	whole := from == 0 && to == im.lay.Subclusters()
	switch {
	case kind == format.KindCompressed && whole:
		return meta.Entry{Bitmap: format.BitmapAllZero}, true
	case kind == format.KindCompressed, kind == format.KindUnallocated && e.Bitmap == 0 && im.zeroRead(kind, off) && !z.own:
		return e, false
	}
	e.Bitmap = e.Bitmap.SetZero(from, to)
	if kind == format.KindNormal && z.unmap && e.Bitmap&format.BitmapAllAlloc == 0 {
		e.Word, giveUp = 0, true
	}
	return e, giveUp
}

// left returns where the host has bytes of a cluster that was e and is zeroed, which no reference that is given up covers.
func (z zeroing) left(e meta.Entry, off int64) span {
	switch kind := z.im.lay.Kind(e.Word); {
	case kind != format.KindNormal && kind != format.KindZeroAlloc, !e.Word.Copied() && !z.im.lay.DataFile:
		return span{}
	}
	from, to := max(z.body.off, off), min(z.body.end(), off+z.im.lay.ClusterSize())
	return span{int64(e.Word.HostOffset()) + from - off, to - from}
}

// zeroMapping changes the entries of the clusters that body touches. It is many requests, not one: between two of them a
// flush may run.
func (im *Image) zeroMapping(ctx context.Context, z zeroing) error {
	for off := z.body.off; off < z.body.end(); {
		err := im.changeMapping(ctx, span{off, z.body.end() - off}, func() error {
			if cut := z.body.end() % im.lay.SubclusterSize(); cut != 0 && z.body.end() != im.Size() {
				// The disk has grown: what was its end lies within a unit now.
				part := span{z.body.end() - cut, cut}
				im.mark(part)
				if err := im.zeroByWriting(ctx, part); err != nil {
					return err
				}
				z.body.n -= cut // last, as all this may be done twice
				return nil
			}
			c, last := im.cluster(off), im.cluster(z.body.end()-1)
			n, err := im.zeroSome(ctx, c, int64(last-c)+1, z)
			off = int64(c+meta.GuestCluster(n)) << im.lay.ClusterBits
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// zeroSome skips a run that reads as zeroes already, or changes the entries of one slice. It returns how many clusters it
// went over.
func (im *Image) zeroSome(ctx context.Context, c meta.GuestCluster, n int64, z zeroing) (int64, error) {
	off := int64(c) << im.lay.ClusterBits
	run, err := im.meta.Map.Lookup(c, n, true)
	if err != nil {
		return 0, fmt.Errorf("looking up guest offset %#x: %w", off, err)
	}
	e := meta.Entry{Word: run.Entry, Bitmap: run.Bitmap}
	if entry, _ := z.entry(e, off); entry == e {
		return run.N, nil
	}
	return im.zeroEntries(ctx, c, min(n, im.meta.Map.SliceRest(c)), z)
}

// zeroEntries changes the entries of n clusters of one slice.
func (im *Image) zeroEntries(ctx context.Context, c meta.GuestCluster, n int64, z zeroing) (int64, error) {
	held, err := im.meta.Ranges.Lock(ctx, uint64(c), uint64(c)+uint64(n)-1)
	if err != nil {
		return 0, err
	}
	defer im.meta.Ranges.Unlock(held)
	edit, err := im.meta.Map.Prepare(c)
	if err != nil {
		return 0, fmt.Errorf("preparing to map guest cluster %d: %w", c, err)
	}
	defer edit.Done()
	for k := range n {
		if e := edit.Entry(k); im.lay.Kind(e.Word) == format.KindInvalid || im.lay.ExtendedL2 && !im.lay.ValidBitmap(e.Word, e.Bitmap) {
			return 0, im.invalidEntry(e, c+meta.GuestCluster(k))
		}
	}
	var old retireList
	var left holes
	from, to := max(int64(c)<<im.lay.ClusterBits, z.body.off), min(int64(c+meta.GuestCluster(n))<<im.lay.ClusterBits, z.body.end())
	im.mark(span{from, to - from})
	edit.Put(0, n, func(k int64, e meta.Entry) meta.Entry {
		off := int64(c+meta.GuestCluster(k)) << im.lay.ClusterBits
		entry, giveUp := z.entry(e, off)
		if giveUp {
			old.add(im.lay, e.Word, meta.CauseRequest)
		}
		if z.punch && entry != e && (!giveUp || im.lay.DataFile) {
			left.add(z.left(e, off))
		}
		return entry
	})
	old.retire(im.meta.Refs)
	im.noteZeroed()
	left.punch(im.data)
	return n, nil
}

// noteZeroed remembers the epoch in which entries became zero. It is called while their range is still held, so whoever
// finds one of them later finds the epoch too.
func (im *Image) noteZeroed() {
	for {
		then, now := im.zeroedAt.Load(), im.meta.Epochs.Now()
		if now <= then || im.zeroedAt.CompareAndSwap(then, now) {
			return
		}
	}
}
