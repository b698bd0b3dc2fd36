package check

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/droverproject/drover/storage"
)

// The undo log is a file beside the image in which a repair writes what it is about to overwrite. docs/format-notes.md
// describes it.
const (
	undoMagic      = "drovundo"
	undoVersion    = 1
	undoHeaderSize = 32
	undoRecord     = 0x52454331 // "REC1"
	// undoMaxRecord bounds the bytes of one record.
	undoMaxRecord  = 1 << 20
	undoRecordHead = 16
	// undoPending is how many bytes may wait before they are put into effect.
	undoPending = 16 << 20
)

var (
	// ErrUndoLog is wrapped by the errors of an undo log that is none, or is damaged in the middle.
	ErrUndoLog = errors.New("not a usable undo log")
	// ErrUndoImage: the image is not what the repair left, so that putting old metadata back would destroy it.
	ErrUndoImage = errors.New("the image is not the one that was repaired, or it was written to since")
	// ErrUndoExists: a log is only ever written into an empty file.
	ErrUndoExists = errors.New("the undo log is not empty")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// undoFile is an image file whose every change is in the log, durably, before it is made. Changes wait in an overlay until
// the next Sync.
type undoFile struct {
	*storage.Overlay
	image, log storage.File
	end        int64 // of the log
	pending    int64 // bytes written since the last commit
}

// newUndoFile begins a log in an empty file.
func newUndoFile(image, log storage.File) (*undoFile, error) {
	if n, err := log.Size(); err != nil || n != 0 {
		return nil, errors.Join(err, ErrUndoExists)
	}
	overlay, err := storage.NewOverlay(image)
	if err != nil {
		return nil, err
	}
	return &undoFile{Overlay: overlay, image: image, log: log}, nil
}

// WriteAt implements io.WriterAt.
func (u *undoFile) WriteAt(p []byte, off int64) (int, error) { return u.WriteVAt([][]byte{p}, off) }

// WriteVAt writes, and makes changes real when too many wait.
func (u *undoFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	n, err := u.Overlay.WriteVAt(bufs, off)
	if err != nil {
		return n, err
	}
	if u.pending += int64(n); u.pending > undoPending {
		return n, u.commit()
	}
	return n, nil
}

// Truncate cuts the file off at once, for the log needs to know what goes.
func (u *undoFile) Truncate(size int64) error {
	if err := u.commit(); err != nil {
		return err
	}
	old, err := u.image.Size()
	if err != nil {
		return err
	}
	for off := size &^ (storage.SectorSize - 1); off < old; {
		end, data, err := u.image.NextExtent(off)
		if err != nil {
			return err
		}
		if !data && end-off >= storage.SectorSize {
			off = end &^ (storage.SectorSize - 1) // a hole has nothing to keep
			continue
		}
		n := min(undoMaxRecord, max(end-off, storage.SectorSize))
		if err := u.recordCut(off, n, size); err != nil {
			return err
		}
		off = (off + n + storage.SectorSize - 1) &^ (storage.SectorSize - 1)
	}
	if err := u.log.Sync(); err != nil {
		return fmt.Errorf("making the undo log durable: %w", err)
	}
	if err := u.Overlay.Truncate(size); err != nil {
		return err
	}
	return u.Apply()
}

// recordCut logs n bytes of which a new length of the image cuts some off.
func (u *undoFile) recordCut(off, n, size int64) error {
	after := make([]byte, n)
	if off < size {
		if err := storage.ReadFull(u.image, after[:min(size-off, n)], off); err != nil {
			return err
		}
	}
	return u.record(off, after)
}

// Sync makes the changes real and durable.
func (u *undoFile) Sync() error {
	if err := u.commit(); err != nil {
		return err
	}
	return u.image.Sync()
}

// commit logs what is about to be overwritten, and then writes.
func (u *undoFile) commit() error {
	changes := u.Changes()
	if len(changes) == 0 {
		return nil
	}
	for _, c := range changes {
		if err := u.record(c.Off, c.Data); err != nil {
			return err
		}
	}
	if err := u.log.Sync(); err != nil {
		return fmt.Errorf("making the undo log durable: %w", err)
	}
	u.pending = 0
	return u.Apply()
}

// record logs what the image has at off now, and what it is going to have there.
func (u *undoFile) record(off int64, after []byte) error {
	if u.end == 0 {
		if err := u.header(); err != nil {
			return err
		}
	}
	n := (len(after) + storage.SectorSize - 1) &^ (storage.SectorSize - 1)
	b := make([]byte, undoRecordHead+n, undoRecordHead+n+n/storage.SectorSize*4+4)
	binary.BigEndian.PutUint32(b, undoRecord)
	binary.BigEndian.PutUint32(b[4:], uint32(n))
	binary.BigEndian.PutUint64(b[8:], uint64(off))
	if err := storage.ReadFull(u.image, b[undoRecordHead:], off); err != nil {
		return fmt.Errorf("reading what is to be overwritten at %#x: %w", off, err)
	}
	after = append(bytes.Clone(after), make([]byte, n-len(after))...)
	for s := 0; s < n; s += storage.SectorSize {
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(after[s:s+storage.SectorSize], castagnoli))
	}
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return u.append(b)
}

func (u *undoFile) header() error {
	size, err := u.image.Size()
	if err != nil {
		return err
	}
	b := make([]byte, undoHeaderSize)
	copy(b, undoMagic)
	binary.BigEndian.PutUint32(b[8:], undoVersion)
	binary.BigEndian.PutUint64(b[16:], uint64(size))
	binary.BigEndian.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
	return u.append(b)
}

func (u *undoFile) append(b []byte) error {
	if err := storage.WriteFull(u.log, b, u.end); err != nil {
		return fmt.Errorf("writing the undo log: %w", err)
	}
	u.end += int64(len(b))
	return nil
}

// Restore puts back what a repair with an undo log has changed, and returns how many bytes that were. The image must be
// as the repair, finished or not, has left it: nothing is written otherwise. A restoration that was cut short can be
// made again. A record at the end of the log that is not whole is left out: its change was never made.
func Restore(ctx context.Context, image, log storage.File) (int64, error) {
	r := restorer{ctx: ctx, image: image, log: log, first: make(map[int64]undoPlace), sums: make(map[int64][]uint32)}
	if err := r.load(); err != nil {
		return 0, err
	}
	if err := r.verify(); err != nil {
		return 0, err
	}
	return r.restore()
}

// restorer is one run of Restore. Its maps are by the number of a sector of the image.
type restorer struct {
	ctx        context.Context // of the one call of Restore
	image, log storage.File
	size       int64 // of the image before the repair
	records    []undoPlace
	first      map[int64]undoPlace // where in the log the oldest content is
	sums       map[int64][]uint32  // what the sector may hold: what it held before and after each change
}

// undoPlace is where in the log content of the image is.
type undoPlace struct {
	log, image, n int64
}

// load reads the log as far as it is whole.
func (r *restorer) load() error {
	head := make([]byte, undoHeaderSize)
	if err := storage.ReadFull(r.log, head, 0); err != nil {
		return fmt.Errorf("reading the undo log: %w", err)
	}
	sum := crc32.Checksum(head[:28], castagnoli)
	if string(head[:8]) != undoMagic || binary.BigEndian.Uint32(head[28:]) != sum {
		return fmt.Errorf("%w: it has no header", ErrUndoLog)
	}
	if v := binary.BigEndian.Uint32(head[8:]); v != undoVersion {
		return fmt.Errorf("%w: it is of version %d", ErrUndoLog, v)
	}
	r.size = int64(binary.BigEndian.Uint64(head[16:]))
	end, err := r.log.Size()
	if err != nil {
		return err
	}
	if r.size < 0 {
		return fmt.Errorf("%w: the image was %d bytes long", ErrUndoLog, r.size)
	}
	for at := int64(undoHeaderSize); at < end; {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n, err := r.record(at, end)
		if err != nil {
			return err
		}
		if n == 0 {
			return r.nothingAfter(at+1, end)
		}
		at += n
	}
	return nil
}

// nothingAfter makes sure that a record that is not whole is at the end of the log: behind it there must be no other, for
// the changes of that one were made.
func (r *restorer) nothingAfter(at, end int64) error {
	magic := binary.BigEndian.AppendUint32(nil, undoRecord)
	buf := make([]byte, 1<<20)
	for at < end {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(int64(len(buf)), end-at)]
		if err := storage.ReadFull(r.log, b, at); err != nil {
			return fmt.Errorf("reading the undo log at %d: %w", at, err)
		}
		i := bytes.Index(b, magic)
		if i < 0 {
			at += max(1, int64(len(b)-len(magic)+1))
			continue
		}
		n, err := r.record(at+int64(i), end)
		if err != nil {
			return err
		}
		if n > 0 {
			return fmt.Errorf("%w: it is damaged before offset %d", ErrUndoLog, at+int64(i))
		}
		at += int64(i) + 1
	}
	return nil
}

// record reads the record at that place of the log and returns its length, 0 if it is not whole.
func (r *restorer) record(at, end int64) (int64, error) {
	head := make([]byte, undoRecordHead)
	if end-at < undoRecordHead {
		return 0, nil
	}
	if err := storage.ReadFull(r.log, head, at); err != nil {
		return 0, fmt.Errorf("reading the undo log at %d: %w", at, err)
	}
	n := int64(binary.BigEndian.Uint32(head[4:]))
	off := int64(binary.BigEndian.Uint64(head[8:]))
	length := undoRecordHead + n + n/storage.SectorSize*4 + 4
	if binary.BigEndian.Uint32(head) != undoRecord || n == 0 || n > undoMaxRecord || n%storage.SectorSize != 0 || off < 0 ||
		off%storage.SectorSize != 0 || length > end-at {
		return 0, nil
	}
	b := make([]byte, length)
	if err := storage.ReadFull(r.log, b, at); err != nil {
		return 0, fmt.Errorf("reading the undo log at %d: %w", at, err)
	}
	if crc32.Checksum(b[:length-4], castagnoli) != binary.BigEndian.Uint32(b[length-4:]) {
		return 0, nil
	}
	for s := int64(0); s < n; s += storage.SectorSize {
		num := (off + s) / storage.SectorSize
		old := crc32.Checksum(b[undoRecordHead+s:][:storage.SectorSize], castagnoli)
		after := binary.BigEndian.Uint32(b[undoRecordHead+n+s/storage.SectorSize*4:])
		r.sums[num] = append(r.sums[num], old, after)
		if _, ok := r.first[num]; !ok {
			r.first[num] = undoPlace{log: at + undoRecordHead + s, image: off + s, n: storage.SectorSize}
		}
	}
	r.records = append(r.records, undoPlace{at + undoRecordHead, off, n})
	return length, nil
}

// verify compares the image with what a repair may have left.
func (r *restorer) verify() error {
	return r.each(func(p undoPlace, _, now []byte) error {
		for s := int64(0); s < p.n; s += storage.SectorSize {
			if !contains(r.sums[(p.image+s)/storage.SectorSize], crc32.Checksum(now[s:s+storage.SectorSize], castagnoli)) {
				return fmt.Errorf("%w: it differs at %#x", ErrUndoImage, p.image+s)
			}
		}
		return nil
	})
}

func contains(sums []uint32, sum uint32) bool {
	for _, s := range sums {
		if s == sum {
			return true
		}
	}
	return false
}

// each calls fn for every record, with the content in the log and that of the image.
func (r *restorer) each(fn func(p undoPlace, old, now []byte) error) error {
	for _, p := range r.records {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		b := make([]byte, 2*p.n)
		if err := storage.ReadFull(r.log, b[:p.n], p.log); err != nil {
			return fmt.Errorf("reading the undo log at %d: %w", p.log, err)
		}
		if err := storage.ReadFull(r.image, b[p.n:], p.image); err != nil {
			return fmt.Errorf("reading the image at %#x: %w", p.image, err)
		}
		if err := fn(p, b[:p.n], b[p.n:]); err != nil {
			return err
		}
	}
	return nil
}

// restore writes back what the log has. What belongs behind the old end of the file goes with the length.
func (r *restorer) restore() (int64, error) {
	written := int64(0)
	err := r.each(func(p undoPlace, old, now []byte) error {
		for s := int64(0); s < p.n; s += storage.SectorSize {
			place := r.first[(p.image+s)/storage.SectorSize]
			if place.log != p.log+s || place.image >= r.size { // not the oldest
				continue
			}
			sector := old[s : s+min(storage.SectorSize, r.size-place.image)]
			if bytes.Equal(sector, now[s:s+int64(len(sector))]) {
				continue
			}
			if err := storage.WriteFull(r.image, sector, place.image); err != nil {
				return fmt.Errorf("writing the image at %#x: %w", place.image, err)
			}
			written += int64(len(sector))
		}
		return nil
	})
	if err != nil {
		return written, err
	}
	size, err := r.image.Size()
	if err != nil {
		return written, err
	}
	if size != r.size {
		if err := r.image.Truncate(r.size); err != nil {
			return written, fmt.Errorf("giving the image its length back: %w", err)
		}
	}
	return written, r.image.Sync()
}
