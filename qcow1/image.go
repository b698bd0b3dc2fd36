package qcow1

import (
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/storage"
)

// compressed marks an entry of an L2 table whose cluster is compressed.
const compressed = 1 << 63

// pieceSize is how much of a table is read and kept together; maxPieces how many of them are kept.
const (
	pieceSize = 4096
	maxPieces = 1024
)

// errNoKey is returned by reads of an encrypted image that was opened without its key.
var errNoKey = errors.New("image is encrypted and its key was not given")

// Image is an open image, a block.Device that refuses changes.
type Image struct {
	name    string
	file    storage.File
	h       header
	backing block.Device
	cipher  luks.SectorCipher

	life   sync.RWMutex // held for reading by calls, for writing by Close
	closed atomic.Bool

	mu     sync.Mutex
	pieces map[int64][]byte // of tables, by their place in the file
	last   struct {         // the compressed cluster that was read last
		entry uint64
		data  []byte
	}
}

var _ block.Device = (*Image)(nil)

// Size implements block.Device.
func (im *Image) Size() int64 { return im.h.size }

// ClusterSize returns the unit in bytes in which the image maps the disk.
func (im *Image) ClusterSize() int64 { return 1 << im.h.clusterBits }

// Backing returns the device below, nil when there is none.
func (im *Image) Backing() block.Device { return im.backing }

// Info implements block.Device.
func (im *Image) Info() block.Info {
	return block.Info{Format: "qcow", Name: im.name, ReadOnly: true, MinAlign: 1, PreferAlign: max(4096, 1<<im.h.clusterBits)}
}

func (im *Image) enter(off, n int64) error {
	im.life.RLock()
	if im.closed.Load() {
		im.life.RUnlock()
		return block.ErrClosed
	}
	if err := block.CheckRange(off, n, im.h.size); err != nil {
		im.life.RUnlock()
		return err
	}
	return nil
}

// word reads an entry of a table. What lies behind the end of the file is zero.
func (im *Image) word(at int64) (uint64, error) {
	place := at / pieceSize * pieceSize
	in := at - place
	if in > pieceSize-8 { // a table need not be aligned
		var b [8]byte
		if err := storage.ReadFull(im.file, b[:], at); err != nil {
			return 0, err
		}
		return binary.BigEndian.Uint64(b[:]), nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	p, ok := im.pieces[place]
	if !ok {
		p = make([]byte, pieceSize)
		if err := storage.ReadFull(im.file, p, place); err != nil {
			return 0, err
		}
		if im.pieces == nil || len(im.pieces) >= maxPieces {
			im.pieces = make(map[int64][]byte)
		}
		im.pieces[place] = p
	}
	return binary.BigEndian.Uint64(p[in:]), nil
}

// table returns where the L2 table for a guest offset is, 0 if there is none, and which part of the disk it maps.
func (im *Image) table(off int64) (host, start, n int64, err error) {
	bits := im.h.clusterBits + im.h.l2Bits
	i := off >> bits
	at := im.h.l1Offset + i*8
	w, err := im.word(at)
	if err != nil {
		return 0, 0, 0, fmt.Errorf("reading L1 table at host offset %#x: %w", at, err)
	}
	if w > math.MaxInt64-8<<maxL2Bits {
		return 0, 0, 0, fmt.Errorf("L2 table at host offset %#x is outside any file", w)
	}
	if w != 0 {
		size, err := im.file.Size()
		if err != nil {
			return 0, 0, 0, err
		}
		if int64(w) >= size {
			w = 0 // all of it would read as zero
		}
	}
	return int64(w), i << bits, 1 << bits, nil
}

// entry returns what an L2 table says of the cluster at a guest offset.
func (im *Image) entry(table, off int64) (uint64, error) {
	i := off >> im.h.clusterBits & (1<<im.h.l2Bits - 1)
	w, err := im.word(table + i*8)
	if err != nil {
		return 0, fmt.Errorf("reading L2 table at host offset %#x: %w", table, err)
	}
	if w&compressed == 0 && w > math.MaxInt64-1<<maxClusterBits {
		return 0, fmt.Errorf("guest offset %#x is mapped to host offset %#x, which is outside any file", off, w)
	}
	return w, nil
}

// run is a part of the disk whose clusters are of one kind and, if they are plain, lie one behind the other.
type run struct {
	off, n int64
	entry  uint64 // of the first cluster; 0 for what is not allocated
}

// host returns where a guest offset of a plain run is.
func (r run) host(off int64) int64 { return int64(r.entry) + off - r.off }

// lookup returns the run that begins at the cluster of off, and reaches to the end of its L2 table at most, or over several
// tables that are not there, up to limit.
func (im *Image) lookup(off, limit int64) (run, error) {
	cs := im.ClusterSize()
	table, start, n, err := im.table(off)
	if err != nil {
		return run{}, err
	}
	if table == 0 {
		r := run{off: start, n: n}
		for r.off+r.n < limit {
			skip, err := im.noTables(r.off + r.n)
			if err != nil || skip == 0 {
				return r, err
			}
			r.n += skip
		}
		return r, nil
	}
	first := off &^ (cs - 1)
	e, err := im.entry(table, first)
	if err != nil {
		return run{}, err
	}
	r := run{off: first, n: cs, entry: e}
	if e&compressed != 0 {
		return r, nil
	}
	for next := first + cs; next < min(start+n, limit); next += cs {
		f, err := im.entry(table, next)
		if err != nil || f&compressed != 0 || e == 0 && f != 0 || e != 0 && (f == 0 || int64(f) != r.host(next)) {
			break // an error is met again where it counts
		}
		r.n += cs
	}
	return r, nil
}

// noTables returns how much of the disk from off on, where a table's part begins, has no table. Behind the end of the file
// there are no entries.
func (im *Image) noTables(off int64) (int64, error) {
	table, _, n, err := im.table(off)
	if err != nil || table != 0 {
		return 0, nil // met again where it counts
	}
	size, err := im.file.Size()
	if err != nil {
		return 0, err
	}
	bits := im.h.clusterBits + im.h.l2Bits
	if im.h.l1Offset+off>>bits*8 >= size {
		return max(im.h.size-off, n), nil
	}
	return n, nil
}

// ReadAt implements block.Device.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := im.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer im.life.RUnlock()
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := im.lookup(off, off+int64(len(p)))
		if err != nil {
			return err
		}
		n := min(int64(len(p)), r.off+r.n-off)
		if err := im.readRun(ctx, p[:n], off, r); err != nil {
			return fmt.Errorf("reading guest offset %#x: %w", off, err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (im *Image) readRun(ctx context.Context, p []byte, off int64, r run) error {
	switch {
	case r.entry == 0:
		return im.readBacking(ctx, p, off)
	case im.h.encrypted && im.cipher == nil:
		return errNoKey
	case r.entry&compressed != 0:
		return im.readCompressed(p, off-r.off, r.entry)
	case im.cipher != nil:
		return im.readEncrypted(p, off, r)
	}
	return storage.ReadFull(im.file, p, r.host(off))
}

func (im *Image) readBacking(ctx context.Context, p []byte, off int64) error {
	if im.backing != nil && off < im.backing.Size() {
		n := min(int64(len(p)), im.backing.Size()-off)
		if err := im.backing.ReadAt(ctx, p[:n], off); err != nil {
			return err
		}
		p = p[n:]
	}
	clear(p)
	return nil
}

// readEncrypted decrypts whole sectors, one cluster at a time.
func (im *Image) readEncrypted(p []byte, off int64, r run) error {
	cs := im.ClusterSize()
	buf := make([]byte, cs)
	for len(p) > 0 {
		start := off &^ (cs - 1)
		if err := storage.ReadFull(im.file, buf, r.host(start)); err != nil {
			return err
		}
		im.cipher.DecryptSectors(buf, buf, uint64(start/storage.SectorSize))
		n := copy(p, buf[off-start:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// readCompressed fills p from a compressed cluster, in bytes into it.
func (im *Image) readCompressed(p []byte, in int64, entry uint64) error {
	im.mu.Lock()
	data := im.last.data
	if im.last.entry != entry {
		data = nil
	}
	im.mu.Unlock()
	if data == nil {
		var err error
		if data, err = im.inflate(entry); err != nil {
			return err
		}
		im.mu.Lock()
		im.last.entry, im.last.data = entry, data
		im.mu.Unlock()
	}
	copy(p, data[in:])
	return nil
}

// inflate unpacks a compressed cluster. Its entry holds its place in the file and, above that, its length.
func (im *Image) inflate(entry uint64) ([]byte, error) {
	shift := 63 - im.h.clusterBits
	host := int64(entry & (1<<shift - 1))
	n := entry >> shift & (1<<im.h.clusterBits - 1)
	src := make([]byte, n)
	if err := storage.ReadFull(im.file, src, host); err != nil {
		return nil, fmt.Errorf("reading compressed cluster at host offset %#x: %w", host, err)
	}
	dst := make([]byte, im.ClusterSize())
	if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(src)), dst); err != nil {
		return nil, fmt.Errorf("decompressing cluster at host offset %#x: %w", host, err)
	}
	return dst, nil
}

// Extents implements block.Device.
func (im *Image) Extents(ctx context.Context, off, n int64, fn func(block.Extent) bool) error {
	if err := im.enter(off, n); err != nil {
		return err
	}
	defer im.life.RUnlock()
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := im.lookup(off, end)
		if err != nil {
			return err
		}
		part := min(end, r.off+r.n) - off
		more, err := im.extent(ctx, off, part, r, fn)
		if err != nil || !more {
			return err
		}
		off += part
	}
	return nil
}

// extent reports a part of a run.
func (im *Image) extent(ctx context.Context, off, n int64, r run, fn func(block.Extent) bool) (bool, error) {
	if r.entry == 0 {
		return im.backingExtents(ctx, off, n, fn)
	}
	x := block.Extent{Off: off, Len: n, Allocated: true, Data: true, Compressed: r.entry&compressed != 0}
	if !x.Compressed && !im.h.encrypted {
		x.HasHost, x.Host, x.File = true, r.host(off), im.file.Stat().Name
	}
	return fn(x), nil
}

// backingExtents reports what the devices below say of a range that this image does not allocate.
func (im *Image) backingExtents(ctx context.Context, off, n int64, fn func(block.Extent) bool) (bool, error) {
	inside := int64(0)
	if im.backing != nil {
		inside = max(min(n, im.backing.Size()-off), 0)
	}
	if inside > 0 {
		more := true
		err := im.backing.Extents(ctx, off, inside, func(x block.Extent) bool {
			x.Depth++
			more = fn(x)
			return more
		})
		if err != nil || !more {
			return false, err
		}
	}
	if inside == n {
		return true, nil
	}
	return fn(block.Extent{Off: off + inside, Len: n - inside, Zero: true}), nil
}

func (im *Image) refuse(off, n int64) error {
	if err := im.enter(off, n); err != nil {
		return err
	}
	im.life.RUnlock()
	return fmt.Errorf("%q: %w", im.name, block.ErrReadOnly)
}

// WriteAt implements block.Device.
func (im *Image) WriteAt(_ context.Context, p []byte, off int64, _ block.WriteFlags) error {
	return im.refuse(off, int64(len(p)))
}

// WriteZeroes implements block.Device.
func (im *Image) WriteZeroes(_ context.Context, off, n int64, _ block.ZeroFlags) error {
	return im.refuse(off, n)
}

// Discard implements block.Device.
func (im *Image) Discard(_ context.Context, off, n int64) error { return im.refuse(off, n) }

// Flush implements block.Device.
func (im *Image) Flush(context.Context) error {
	if err := im.enter(0, 0); err != nil {
		return err
	}
	im.life.RUnlock()
	return nil
}

// Close implements block.Device.
func (im *Image) Close() error {
	im.life.Lock()
	defer im.life.Unlock()
	if im.closed.Swap(true) {
		return block.ErrClosed
	}
	err := im.file.Close()
	if im.backing != nil {
		err = errors.Join(err, im.backing.Close())
	}
	return err
}
