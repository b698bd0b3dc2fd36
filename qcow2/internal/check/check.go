// Package check finds out from an image's file alone whether the image is consistent.
//
// # The model
//
// Everything in an image that is in use is referred to by something: the header by its place, tables by the header,
// L2 tables by L1 tables, data clusters by L2 tables, refcount blocks by the refcount table, and so on. The check
// walks all of it and counts the references to each host cluster. Then it compares: a refcount above the references
// that were found is a leak, one below is a corruption. The COPIED flags of the active tables must say of each cluster
// whether its stored refcount is exactly one. On the way it reports everything that the format forbids.
//
// The numbers are those of qemu-img check for the same file.
//
// # What differs from qemu-img check
//
//   - An L2 table is read once, in the order of the file, however many snapshots share it, and each of its faults counts
//     as often as the table is referred to. The totals are the same, the order of messages is not.
//   - A bitmap directory or bitmap table that cannot be understood is a corruption, and the check goes on. qemu-img does
//     not open such an image.
//   - There is no limit on the number of clusters. qemu-img gives up at 1<<31 of them.
//   - An L2 table at an unaligned offset is walked only while such tables do not take more bytes than the file has.
//   - A snapshot's L1 table at an offset that no file can have (1<<63 less 1 GiB and more) reads as zeroes, as everything
//     behind the end of the file does, and is a corruption. qemu-img fails to read it and gives up.
//
// # Bounds
//
// Memory and time are proportional to the length of the file, whatever the fields of the image say: tables are read
// only as far as the file goes, overlapping tables are read once, and references to places outside the file are
// reported, not counted. Every loop ends early when the context does.
package check

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// checker is one run of a check.
type checker struct {
	ctx         context.Context // of the one call of Run
	file        storage.File
	opts        Options
	maxFindings int
	rep         *Report

	h        *format.Header
	l        format.Layout
	fileSize int64
	maxCount uint64 // the largest refcount
	clusters uint64 // host clusters of the file; a table that ends beyond the file's end may add one

	refs   *counts
	tables tableRefs
	stored *storedRefcounts

	// Of a part of a walk: the references found, in place of refs, and why it ended early.
	runs    *refRuns
	failure error

	walked, toWalk int64 // L2 tables

	repairFacts
}

// repairFacts is what a walk finds out for the repair beside its report.
type repairFacts struct {
	// blind: something refers to a place that cannot be followed (outside the file, unaligned, in a broken directory), so
	// that clusters without a known reference may be in use all the same.
	blind bool
	// far is the lowest offset outside the file that something refers to, 0 if nothing does.
	far format.HostOff
	// copied is how many of the corruptions are COPIED flags.
	copied int64
	// brokenRefs: the refcount structures cannot be mended in place: a block or the table is not where it should be, or
	// its clusters are something else besides.
	brokenRefs bool
	// overflowed holds clusters with more references than can be counted; with tooMany of them it does not hold all.
	overflowed map[format.ClusterIdx]bool
	tooMany    bool
	// missingBlock: a cluster is in use for whose refcount there is no block.
	missingBlock bool
	// tableBytes is the length of the snapshot table.
	tableBytes int
	// incomplete is how many of its entries lack what version 3 requires. With recover, a table that cannot be read
	// otherwise is read by guessing: tableFaults is what was wrong, mendableTable that it worked.
	incomplete    int
	recover       bool
	tableFaults   format.SnapshotFaults
	mendableTable bool
	snapshots     []format.Snapshot
	// bitmapTables and snapshotL1s are the clusters of those tables.
	bitmapTables, snapshotL1s []span
	// withoutRefs leaves the refcount structures out of the walk: the counts are then those of everything else.
	withoutRefs bool
}

// Run checks the image in file. It reads the file and changes nothing.
//
// The error is that of a file that is not an image (see format.ParseHeader), of a snapshot table that cannot be read
// (without it every cluster of a snapshot would seem to be leaked), of a read that failed, or of the context. The report
// is then nil or counts what was found until then, and must not be taken for the whole.
func Run(ctx context.Context, file storage.File, o Options) (*Report, error) {
	c := newChecker(ctx, file, o)
	if err := c.open(); err != nil {
		return nil, err
	}
	return c.rep, c.run()
}

func newChecker(ctx context.Context, file storage.File, o Options) *checker {
	c := &checker{ctx: ctx, file: file, opts: o, maxFindings: o.MaxFindings, rep: &Report{}, refs: newCounts()}
	if c.maxFindings <= 0 {
		c.maxFindings = defaultMaxFindings
	}
	return c
}

// open reads the header and the refcount table.
func (c *checker) open() error {
	var err error
	if c.fileSize, err = c.file.Size(); err != nil {
		return fmt.Errorf("asking for the size of the image file: %w", err)
	}
	first, err := c.read(0, format.SectorSize)
	if err != nil {
		return fmt.Errorf("reading the header: %w", err)
	}
	area, err := format.HeaderArea(first)
	if err != nil {
		return err
	}
	b, err := c.read(0, area)
	if err != nil {
		return fmt.Errorf("reading the header: %w", err)
	}
	if c.h, err = format.ParseHeaderForCheck(b); err != nil {
		return err
	}
	c.l = c.h.Layout()
	c.maxCount = c.l.RefcountMax()
	c.clusters = uint64(c.l.ClustersFor(c.fileSize))
	c.rep.ImageEndOffset = c.l.ClusterSize() // the header is always there
	c.rep.TotalClusters = c.l.ClustersFor(c.h.DiskSize())
	c.rep.Dirty = c.h.Incompat&format.IncompatDirty != 0
	c.rep.Corrupt = c.h.Incompat&format.IncompatCorrupt != 0
	c.stored, err = c.loadRefcountTable()
	return err
}

// run does the check, in the order in which qemu-img counts.
func (c *checker) run() error {
	snapshots, tableLen, err := c.readSnapshots()
	if c.recover {
		snapshots, tableLen, err = c.recoverSnapshots(snapshots, tableLen, err)
	}
	if err != nil {
		c.found(Failure, 1, at(c.h.SnapshotsOffset), "ERROR failed to read the snapshot table: %v", err)
		return fmt.Errorf("reading the snapshot table at host offset %#x: %w", c.h.SnapshotsOffset, err)
	}
	c.snapshots, c.tableBytes = snapshots, tableLen
	c.reference(0, uint64(c.l.ClusterSize()), 1)
	steps := []func() error{
		c.walkActiveL1,
		func() error { return c.walkSnapshots(snapshots) },
		c.walkL2Tables,
		func() error { c.referenceTables(); return nil },
		c.walkBitmaps,
	}
	if !c.withoutRefs {
		steps = append(steps, c.walkRefcountTable, c.compare)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return c.ctx.Err()
}

// referenceTables counts what the header points to and nothing else walks.
func (c *checker) referenceTables() {
	c.reference(c.h.SnapshotsOffset, uint64(c.tableBytes), 1)
	if !c.withoutRefs {
		facts := c.repairFacts
		c.reference(c.h.RefTableOffset, uint64(c.h.RefTableLen)<<c.l.ClusterBits, 1)
		c.repairFacts = facts // a refcount table that is not there hides nothing
	}
	if c.h.Crypto != nil {
		c.reference(c.h.Crypto.Offset, c.h.Crypto.Length, 1)
	}
}

// reference counts times references to every cluster of a range. A range that ends a whole cluster or more beyond the
// end of the file is a fault instead: only the last cluster of a file may be incomplete.
func (c *checker) reference(off format.HostOff, n, times uint64) {
	if n == 0 || times == 0 {
		return
	}
	if !c.inFile(off, n) {
		c.lostSight(off)
		c.corrupt(times, at(off), "ERROR: counting reference for region exceeding the end of the file by one cluster or "+
			"more: offset 0x%x size 0x%x", off, n)
		return
	}
	first := c.l.Cluster(off)
	c.referenceClusters(first, uint64(c.l.Cluster(off+format.HostOff(n)-1)-first)+1, times)
}

// lostSight notes a reference that cannot be followed.
func (c *checker) lostSight(off format.HostOff) {
	c.blind = true
	off = max(off, format.HostOff(c.fileSize)) // what begins inside goes on outside
	if c.far == 0 || off < c.far {
		c.far = off
	}
}

// inFile reports whether a range ends less than a cluster behind the end of the file.
func (c *checker) inFile(off format.HostOff, n uint64) bool {
	end := uint64(c.fileSize) + uint64(c.l.ClusterSize())
	return n < end && uint64(off) < end-n
}

// referenceCluster counts references to one cluster, which is known to be in the file.
func (c *checker) referenceCluster(i format.ClusterIdx, times uint64) {
	c.referenceClusters(i, 1, times)
}

// referenceClusters counts references to each of n clusters.
func (c *checker) referenceClusters(first format.ClusterIdx, n, times uint64) {
	if c.runs != nil {
		c.runs.add(first, n, times)
		return
	}
	end := first + format.ClusterIdx(n)
	c.clusters = max(c.clusters, uint64(end))
	for i := first; i < end; {
		page := c.refs.touch(uint64(i) / pageClusters)
		for stop := min(end, (i/pageClusters+1)*pageClusters); i < stop; i++ {
			if sum := uint64(page[i%pageClusters]) + times; sum < manyRefs && sum <= c.maxCount {
				page[i%pageClusters] = uint16(sum)
			} else if lost := c.refs.addTo(page, i, times, c.maxCount); lost > 0 {
				c.overflow(i)
				c.corrupt(lost, at(c.l.Offset(i)), "ERROR: overflow cluster offset=0x%x", c.l.Offset(i))
			}
		}
	}
}

// maxOverflowed is how many clusters with too many references are remembered.
const maxOverflowed = 1 << 16

func (c *checker) overflow(i format.ClusterIdx) {
	if c.overflowed == nil {
		c.overflowed = make(map[format.ClusterIdx]bool)
	}
	if len(c.overflowed) < maxOverflowed {
		c.overflowed[i] = true
	} else {
		c.tooMany = true
	}
}

// counted reports whether exactly n references to a cluster were found.
func (c *checker) counted(i format.ClusterIdx, n uint64) bool {
	return c.refs.get(i) == n && !c.overflowed[i] && !c.tooMany
}

// read reads n bytes; what is behind the end of the file reads as zeroes. n is bounded by the caller.
func (c *checker) read(off format.HostOff, n int64) ([]byte, error) {
	b := make([]byte, n)
	return b, c.readInto(b, off)
}

func (c *checker) readInto(b []byte, off format.HostOff) error {
	if uint64(off) >= uint64(c.fileSize) {
		clear(b)
		return nil
	}
	n, err := c.file.ReadAt(b, int64(off))
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		clear(b[n:])
		return nil
	}
	return err
}

// inside cuts the length of a table down to what the file has of it.
func (c *checker) inside(off format.HostOff, n uint64) int64 {
	if uint64(off) >= uint64(c.fileSize) {
		return 0
	}
	return int64(min(n, uint64(c.fileSize)-uint64(off)))
}

// chunkBytes is how much of the file is read at once where tables are in a row.
const chunkBytes = 1 << 20

// wordBytes is how much of one table is decoded at once. It is small: most tables are empty but for their beginning, and to
// touch memory costs more than to read.
const wordBytes = 32 << 10

// words calls fn for the words of a table of n bytes that are in the file, some of them at a time; first is the index
// of the first of them. A part of a word at the end of the file is extended with zeroes.
func (c *checker) words(off format.HostOff, n uint64, fn func(first int64, words []uint64) error) error {
	length := (c.inside(off, n) + 7) &^ 7
	buf := make([]byte, min(length, wordBytes))
	words := make([]uint64, len(buf)/8)
	for done := int64(0); done < length; done += wordBytes {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(length-done, wordBytes)]
		if err := c.readInto(b, off+format.HostOff(done)); err != nil {
			return err
		}
		part := words[:len(b)/8]
		format.DecodeTable(part, b)
		if err := fn(done/8, part); err != nil {
			return err
		}
	}
	return nil
}

// failed counts a read that failed and describes it.
func (c *checker) failed(what string, off format.HostOff, err error) error {
	if c.ctx.Err() != nil {
		return c.ctx.Err()
	}
	c.found(Failure, 1, at(off), "ERROR: I/O error reading %s at 0x%x: %v", what, off, err)
	return fmt.Errorf("reading %s at host offset %#x: %w", what, off, err)
}
