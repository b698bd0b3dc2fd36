package qcow2

import (
	"errors"
	"fmt"
	"io"

	"github.com/droverproject/drover/qcow2/internal/codec"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// StreamRun says that N clusters of a disk from First on may hold data.
type StreamRun struct{ First, N int64 }

// Stream is a new image that is written from its beginning to its end, to a pipe for example. So the tables come before the
// data, and where everything lies is known before the first byte: header, refcount table and blocks, L1 table, L2 tables,
// and then the clusters in the order of the disk.
type Stream struct {
	w     io.Writer
	h     *format.Header
	lay   format.Layout
	runs  []StreamRun
	sizes []uint32 // of each cluster of the runs; nil: all are stored as they are

	refTable, refBlocks, l1, l2 int64 // clusters
	data                        int64 // bytes behind the tables

	pos  int64 // in the file
	next int   // of sizes
	zero []byte
}

// ErrStreamChanged is returned when the data that a Stream gets is not that which it was planned for.
var ErrStreamChanged = errors.New("the source has changed while it was read")

// NewStream plans an image with the given options and the data of the given runs, which are in order, do not overlap, and
// lie inside the disk. sizes, if not nil, has a number for each of their clusters, in order: how many bytes CompressCluster
// makes of it, or the cluster size where that does not shrink it, or 0 where it is all zeroes, and is left out.
func NewStream(w io.Writer, o CreateOptions, runs []StreamRun, sizes []uint32) (*Stream, error) {
	if o.BackingFile != "" || o.DataFile != "" || o.Encrypt != nil || o.Preallocation != PreallocOff {
		return nil, invalid("an image that is written as a stream has no backing file, no external data file, no encryption and no preallocation")
	}
	h, err := newHeader(o)
	if err != nil {
		return nil, err
	}
	s := &Stream{w: w, h: h, lay: h.Layout(), runs: runs, sizes: sizes}
	s.zero = make([]byte, s.lay.ClusterSize())
	if err := s.plan(); err != nil {
		return nil, err
	}
	return s, nil
}

// CompressCluster compresses one cluster, a stream as long as src. It reports false when that does not make it smaller.
func (o CreateOptions) CompressCluster(dst, src []byte) (n int, ok bool, err error) {
	return codec.Compress(uint8(o.CompressionType), dst, src)
}

// eachCluster calls fn for every cluster that is stored: its number on the disk, its length as it is stored, and where it
// lies behind the tables.
func (s *Stream) eachCluster(fn func(c int64, size uint32, at int64) error) (end int64, err error) {
	cs := s.lay.ClusterSize()
	at, i := int64(0), 0
	for _, r := range s.runs {
		for c := r.First; c < r.First+r.N; c++ {
			size := uint32(cs)
			if s.sizes != nil {
				size = s.sizes[i]
				i++
			}
			if size == 0 {
				continue
			}
			if int64(size) == cs {
				at = roundUp(at, cs)
			}
			if err := fn(c, size, at); err != nil {
				return 0, err
			}
			at += int64(size)
		}
	}
	return at, nil
}

// plan finds out where everything lies.
func (s *Stream) plan() error {
	lay := s.lay
	l1, err := lay.L1EntriesFor(int64(s.h.Size))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidOption, err)
	}
	s.l1 = lay.ClustersFor(l1 * 8)
	last := int64(-1)
	if s.data, err = s.eachCluster(func(c int64, _ uint32, _ int64) error {
		if i := lay.L1Index(format.GuestOff(c) << lay.ClusterBits); i != last {
			last = i
			s.l2++
		}
		return nil
	}); err != nil {
		return err
	}
	s.refTable, s.refBlocks = 1, 1
	for {
		blocks := (s.total() + lay.RefcountsPerBlock() - 1) / lay.RefcountsPerBlock()
		table := lay.ClustersFor(blocks * 8)
		if blocks <= s.refBlocks && table <= s.refTable {
			break
		}
		s.refBlocks, s.refTable = max(blocks, s.refBlocks), max(table, s.refTable)
	}
	if s.refTable > lay.MaxRefTableClusters() {
		return fmt.Errorf("%w: an image of %d clusters", ErrTooBig, s.total())
	}
	s.h.RefTableOffset, s.h.RefTableLen = lay.Offset(1), uint32(s.refTable)
	s.h.L1Offset, s.h.L1Size = lay.Offset(format.ClusterIdx(1+s.refTable+s.refBlocks)), uint32(l1)
	return nil
}

// tables is how many clusters come before the data, total how many there are.
func (s *Stream) tables() int64 { return 1 + s.refTable + s.refBlocks + s.l1 + s.l2 }
func (s *Stream) total() int64  { return s.tables() + s.lay.ClustersFor(s.data) }

// Size is how long the image becomes.
func (s *Stream) Size() int64 { return s.total() << s.lay.ClusterBits }

func (s *Stream) write(b []byte) error {
	n, err := s.w.Write(b)
	s.pos += int64(n)
	if err != nil {
		return fmt.Errorf("writing at host offset %#x: %w", s.pos, err)
	}
	return nil
}

// fill writes zeroes up to a multiple of the cluster size.
func (s *Stream) fill() error {
	return s.write(s.zero[:roundUp(s.pos, s.lay.ClusterSize())-s.pos])
}

// WriteTables writes everything that comes before the data.
func (s *Stream) WriteTables() error {
	head, err := s.h.Marshal()
	if err != nil {
		return fmt.Errorf("making the header: %w", err)
	}
	for _, step := range []func() error{
		func() error { return s.write(head) }, s.fill, s.writeRefTable, s.fill, s.writeRefBlocks, s.writeL1, s.fill, s.writeL2,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (s *Stream) writeRefTable() error {
	b := make([]byte, s.refTable<<s.lay.ClusterBits)
	for i := range s.refBlocks {
		e := format.EncodeUint64(uint64(format.MakeRefTable(s.lay.Offset(format.ClusterIdx(1 + s.refTable + i)))))
		copy(b[i*8:], e[:])
	}
	return s.write(b)
}

// countWriter makes refcount blocks of counts that come in the order of the file.
type countWriter struct {
	s     *Stream
	block []byte
	at    int64 // of the next cluster
	count uint64
}

// add gives the next cluster its count.
func (c *countWriter) add(n uint64) error {
	lay := c.s.lay
	if n > lay.RefcountMax() {
		return fmt.Errorf("%w: %d compressed clusters share one on the host", ErrRefcountOverflow, n)
	}
	lay.SetRefcount(c.block, c.at%lay.RefcountsPerBlock(), n)
	c.at++
	if c.at%lay.RefcountsPerBlock() == 0 {
		return c.flush()
	}
	return nil
}

func (c *countWriter) flush() error {
	err := c.s.write(c.block)
	clear(c.block)
	return err
}

// refer counts a reference to data clusters first to last; those before first are complete.
func (c *countWriter) refer(first, last int64) error {
	for c.at < first {
		if err := c.add(c.count); err != nil {
			return err
		}
		c.count = 0
	}
	c.count++
	for c.at < last {
		if err := c.add(c.count); err != nil {
			return err
		}
		c.count = 1
	}
	return nil
}

func (s *Stream) writeRefBlocks() error {
	c := countWriter{s: s, block: make([]byte, s.lay.ClusterSize())}
	for range s.tables() {
		if err := c.add(1); err != nil {
			return err
		}
	}
	if _, err := s.eachCluster(func(_ int64, size uint32, at int64) error {
		return c.refer(s.tables()+at>>s.lay.ClusterBits, s.tables()+(at+int64(size)-1)>>s.lay.ClusterBits)
	}); err != nil {
		return err
	}
	if c.count > 0 {
		if err := c.add(c.count); err != nil {
			return err
		}
	}
	for s.pos < int64(s.h.L1Offset) {
		if err := c.flush(); err != nil {
			return err
		}
	}
	return nil
}

func (s *Stream) writeL1() error {
	lay := s.lay
	b := make([]byte, int64(s.h.L1Size)*8)
	next := format.ClusterIdx(s.tables() - s.l2)
	last := int64(-1)
	if _, err := s.eachCluster(func(c int64, _ uint32, _ int64) error {
		if i := lay.L1Index(format.GuestOff(c) << lay.ClusterBits); i != last {
			e := format.EncodeUint64(uint64(format.MakeL1(lay.Offset(next), true)))
			copy(b[i*8:], e[:])
			last = i
			next++
		}
		return nil
	}); err != nil {
		return err
	}
	return s.write(b)
}

func (s *Stream) writeL2() error {
	lay := s.lay
	table := make([]byte, lay.ClusterSize())
	last := int64(-1)
	start := format.HostOff(s.tables()) << lay.ClusterBits
	if _, err := s.eachCluster(func(c int64, size uint32, at int64) error {
		guest := format.GuestOff(c) << lay.ClusterBits
		if i := lay.L1Index(guest); i != last {
			if last >= 0 {
				if err := s.write(table); err != nil {
					return err
				}
				clear(table)
			}
			last = i
		}
		word, bitmap := format.MakeL2(start+format.HostOff(at), true), format.BitmapAllAlloc
		if int64(size) != lay.ClusterSize() {
			var err error
			if word, err = lay.MakeCompressed(start+format.HostOff(at), int64(size)); err != nil {
				return err
			}
			bitmap = 0
		}
		e := table[lay.L2Index(guest)*lay.L2EntrySize():]
		w := format.EncodeUint64(uint64(word))
		copy(e, w[:])
		if lay.ExtendedL2 {
			w = format.EncodeUint64(uint64(bitmap))
			copy(e[8:], w[:])
		}
		return nil
	}); err != nil {
		return err
	}
	if last < 0 {
		return nil
	}
	return s.write(table)
}

// Write writes the next cluster of the runs as it is stored: nothing for one that is left out.
func (s *Stream) Write(b []byte) error {
	cs := s.lay.ClusterSize()
	want := cs
	if s.sizes != nil {
		if s.next >= len(s.sizes) {
			return ErrStreamChanged
		}
		want = int64(s.sizes[s.next])
	}
	s.next++
	if int64(len(b)) != want {
		return ErrStreamChanged
	}
	if want == cs {
		if err := s.fill(); err != nil {
			return err
		}
	}
	return s.write(b)
}

// Close writes the end of the image, when all clusters have been written.
func (s *Stream) Close() error {
	if err := s.fill(); err != nil {
		return err
	}
	if s.pos != s.Size() {
		return ErrStreamChanged
	}
	return nil
}
