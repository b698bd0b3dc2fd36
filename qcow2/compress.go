package qcow2

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/codec"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// ErrNotWholeClusters is returned by WriteCompressed for a range that is not made of whole clusters.
var ErrNotWholeClusters = errors.New("compressed data is written in whole clusters")

var _ block.CompressedWriter = (*Image)(nil)

// WriteCompressed writes p to the disk at off, compressed. The range consists of whole clusters, the last of which may be
// cut by the end of the disk. Clusters of zeroes become zero clusters, and what does not shrink is stored as it is. Several
// clusters are compressed at the same time, on all processors. Clusters may be written again, compressed or not.
//
// An image that is encrypted or has an external data file holds nothing compressed: block.ErrNoCompression.
func (im *Image) WriteCompressed(ctx context.Context, p []byte, off int64) error {
	if err := im.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	job, err := im.compression(span{off, int64(len(p))})
	if err != nil {
		return err
	}
	// While one batch is written the next is being compressed.
	next := job.ahead(&p)
	for next != nil {
		b := next
		next = job.ahead(&p)
		<-b.done
		err := b.err
		if err == nil {
			err = im.writeBatch(ctx, b.clusters, off)
		}
		off += b.size
		im.recycle(b)
		if err != nil {
			if next != nil {
				<-next.done
				im.recycle(next)
			}
			return err
		}
	}
	return nil
}

// compression is how an image compresses.
type compression struct {
	im          *Image
	kind        uint8
	clusterSize int
	zeroes      bool // there are clusters that read as zeroes by their mapping
}

// compression returns how the range is compressed, or why it cannot be.
func (im *Image) compression(s span) (compression, error) {
	t, err := im.enter()
	if err != nil {
		return compression{}, err
	}
	defer im.meta.Epochs.Exit(t)
	switch {
	case im.lay.DataFile:
		return compression{}, fmt.Errorf("%w: %w", block.ErrNoCompression, ErrDataFile)
	case im.hdr.CryptMethod != format.CryptNone:
		return compression{}, fmt.Errorf("%w: the image is encrypted", block.ErrNoCompression)
	}
	if err := im.wholeClusters(s); err != nil {
		return compression{}, err
	}
	return compression{im, uint8(im.hdr.CompressionType), int(im.lay.ClusterSize()),
		im.lay.Version >= format.Version3 || im.backing == nil}, nil
}

func (im *Image) wholeClusters(s span) error {
	cs := im.lay.ClusterSize()
	if s.off%cs != 0 || s.n%cs != 0 && s.end() != im.Size() {
		return ErrNotWholeClusters
	}
	return nil
}

// compressed is one cluster on its way into the image.
type compressed struct {
	data []byte // as the guest has it, cut by the end of the disk
	zero bool
	buf  *[]byte // from Image.packed; nil for a cluster that does not shrink, and is stored as it is
	n    int     // the length of the stream in buf
}

// plain reports whether the cluster is stored as it is.
func (c compressed) plain() bool { return !c.zero && c.buf == nil }

// batch is what is compressed together.
type batch struct {
	clusters []compressed
	size     int64
	done     chan struct{} // closed when the clusters are ready
	err      error
}

// ahead takes the next batch from p and starts to compress it. It returns nil when nothing is left.
func (j compression) ahead(p *[]byte) *batch {
	if len(*p) == 0 {
		return nil
	}
	take := (*p)[:min(len(*p), max(maxAllocation, j.clusterSize))]
	*p = (*p)[len(take):]
	b := &batch{size: int64(len(take)), done: make(chan struct{})}
	for len(take) > 0 {
		n := min(len(take), j.clusterSize)
		b.clusters = append(b.clusters, compressed{data: take[:n]})
		take = take[n:]
	}
	if len(b.clusters) == 1 {
		b.err = j.compress(&b.clusters[0])
		close(b.done)
		return b
	}
	go j.compressAll(b)
	return b
}

func (j compression) compressAll(b *batch) {
	defer close(b.done)
	var wg sync.WaitGroup
	var taken atomic.Int64
	errs := make([]error, len(b.clusters))
	for range min(runtime.GOMAXPROCS(0), len(b.clusters)) {
		wg.Go(func() {
			for i := taken.Add(1) - 1; i < int64(len(b.clusters)); i = taken.Add(1) - 1 {
				errs[i] = j.compress(&b.clusters[i])
			}
		})
	}
	wg.Wait()
	b.err = errors.Join(errs...)
}

// compress finds out what becomes of a cluster.
func (j compression) compress(c *compressed) error {
	if j.zeroes && allZero(c.data) {
		c.zero = true
		return nil
	}
	src := c.data
	if len(src) < j.clusterSize { // a stream is as long as a cluster, whatever the disk ends
		src = make([]byte, j.clusterSize)
		copy(src, c.data)
	}
	buf, ok := j.im.packed.Get().(*[]byte)
	if !ok || len(*buf) != j.clusterSize {
		b := make([]byte, j.clusterSize)
		buf = &b
	}
	n, ok, err := codec.Compress(j.kind, *buf, src)
	if err != nil || !ok {
		j.im.packed.Put(buf)
		return err
	}
	c.buf, c.n = buf, n
	return nil
}

// recycle takes the buffers of a batch back.
func (im *Image) recycle(b *batch) {
	for _, c := range b.clusters {
		if c.buf != nil {
			im.packed.Put(c.buf)
		}
	}
}

// writeBatch writes clusters that follow each other from guest offset off on.
func (im *Image) writeBatch(ctx context.Context, list []compressed, off int64) error {
	for len(list) > 0 {
		n, size := 0, int64(0)
		for n < len(list) && !list[n].plain() {
			size += int64(len(list[n].data))
			n++
		}
		if n == 0 {
			if err := im.writeAll(ctx, list[0].data, off); err != nil {
				return err
			}
			n, size = 1, int64(len(list[0].data))
		} else {
			done := 0
			err := im.change(ctx, span{off, size}, func() (err error) {
				if err := im.wholeClusters(span{off, size}); err != nil {
					return err // the disk has become longer
				}
				done, err = im.linkCompressed(ctx, list[:n], im.cluster(off))
				return err
			})
			if errors.Is(err, format.ErrTooBig) {
				// The file is longer than what a compressed cluster's entry can express.
				done, err = 1, im.writeAll(ctx, list[0].data, off)
			}
			if err != nil {
				return err
			}
			n, size = done, 0
			for _, c := range list[:n] {
				size += int64(len(c.data))
			}
		}
		list, off = list[n:], off+size
	}
	return nil
}

// linkCompressed writes the streams of the first of a list of clusters, which begins at guest cluster first, and then
// points the mapping to them. It returns how many clusters it did: those of one slice.
func (im *Image) linkCompressed(ctx context.Context, list []compressed, first meta.GuestCluster) (int, error) {
	n := min(int64(len(list)), im.meta.Map.SliceRest(first))
	list = list[:n]
	held, err := im.meta.Ranges.Lock(ctx, uint64(first), uint64(first)+uint64(n)-1)
	if err != nil {
		return 0, err
	}
	defer im.meta.Ranges.Unlock(held)
	edit, err := im.meta.Map.Prepare(first)
	if err != nil {
		return 0, fmt.Errorf("preparing to map guest cluster %d: %w", first, err)
	}
	defer edit.Done()
	var streams [][]byte
	for k, c := range list {
		if e := edit.Entry(int64(k)); im.lay.Kind(e.Word) == format.KindInvalid || !im.lay.ValidBitmap(e.Word, e.Bitmap) {
			return 0, im.invalidEntry(e, first+meta.GuestCluster(k))
		}
		if !c.zero {
			streams = append(streams, (*c.buf)[:c.n])
		}
	}
	words, err := im.meta.Pack(streams)
	if err != nil {
		return 0, fmt.Errorf("writing guest cluster %d: %w", first, err)
	}
	var old retireList
	edit.Put(0, n, func(k int64, e meta.Entry) meta.Entry {
		entry, giveUp := meta.Entry{}, true
		if c := list[k]; c.zero {
			off := int64(first+meta.GuestCluster(k)) << im.lay.ClusterBits
			z := zeroing{im: im, body: span{off, int64(len(c.data))}, unmap: true}
			entry, giveUp = z.entry(e, off)
		} else {
			entry.Word, words = words[0], words[1:]
		}
		if giveUp {
			old.add(im.lay, e.Word, meta.CauseOther)
		}
		return entry
	})
	old.retire(im.meta.Refs)
	return int(n), nil
}
