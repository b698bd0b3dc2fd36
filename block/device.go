// Package block is the contract between an image format and whoever uses the disk inside: a [Device] is a fixed number
// of bytes that can be read, written, zeroed, discarded, flushed, and asked where its data lies.
//
// Formats register themselves with [RegisterFormat], as image decoders do in the standard library; this package knows
// none of them but raw. [Open] turns a file name into a chain of devices under an explicit [Policy] that is asked before
// any file that an image names is opened.
package block

import (
	"context"
	"errors"
)

var (
	// ErrReadOnly is returned by every changing method of a read-only device.
	ErrReadOnly = errors.New("device is read-only")
	// ErrOutOfRange is returned for a range that is not inside [0, Size()).
	ErrOutOfRange = errors.New("range is outside the device")
	// ErrNoFastZero is returned by WriteZeroes with ZeroFast when it would have to write the zeroes out.
	ErrNoFastZero = errors.New("zeroing this range is not faster than writing it")
	// ErrWouldBlock is returned by the TryDevice methods when the answer needs waiting.
	ErrWouldBlock = errors.New("operation would block")
	// ErrAllZero is returned by TryReadDataAt for a range that reads as zeroes.
	ErrAllZero = errors.New("range reads as zeroes")
	// ErrMixed is returned by TryReadDataAt for a range that holds both data and zeroes.
	ErrMixed = errors.New("range holds data and zeroes")
	// ErrNoCompression is wrapped by WriteCompressed when what is to be written cannot be stored compressed.
	ErrNoCompression = errors.New("compressed data cannot be stored here")
	// ErrClosed is returned by every method of a device after Close.
	ErrClosed = errors.New("device is closed")
)

// WriteFlags modify WriteAt.
type WriteFlags uint8

// WriteFUA makes the write durable before WriteAt returns.
const WriteFUA WriteFlags = 1

// ZeroFlags modify WriteZeroes.
type ZeroFlags uint8

const (
	// ZeroUnmap lets the device give the space of the range back.
	ZeroUnmap ZeroFlags = 1 << iota
	// ZeroFast makes WriteZeroes fail with ErrNoFastZero, having changed nothing, rather than write zeroes out.
	ZeroFast
	// ZeroFUA makes the zeroes durable before WriteZeroes returns.
	ZeroFUA
)

// Device is a disk of Size bytes.
//
// Offsets and lengths are bytes, need no alignment, and must lie inside the device: ErrOutOfRange otherwise. A call
// either does all it was asked and returns nil, or returns an error; after a failed write each sector of the range is
// old or new. Any number of calls may run at once, also on overlapping ranges: sector by sector, the outcome is that of
// some order that respects which call ended before which began. Buffers are not kept after the call returns. A context
// ends a call early only where the call waits for something; it never leaves a half-made change to metadata behind.
type Device interface {
	// Size returns the length of the disk in bytes.
	Size() int64
	// Info tells what the device can do.
	Info() Info

	// ReadAt fills p from the disk at off.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes p to the disk at off.
	WriteAt(ctx context.Context, p []byte, off int64, flags WriteFlags) error
	// WriteZeroes makes [off, off+n) read as zeroes.
	WriteZeroes(ctx context.Context, off, n int64, flags ZeroFlags) error
	// Discard says that the content of [off, off+n) no longer matters. Afterwards each sector of the range reads as
	// zeroes or as before; what cannot be discarded is left alone without an error.
	Discard(ctx context.Context, off, n int64) error
	// Flush makes every write, zeroing and discard that had returned before Flush was called durable.
	Flush(ctx context.Context) error

	// Extents calls fn for consecutive extents that together cover [off, off+n), in order and without gaps, until fn
	// returns false. Neighbouring extents may have the same state.
	Extents(ctx context.Context, off, n int64, fn func(Extent) bool) error

	// Close flushes, closes the files below and releases their locks. Calls still running are waited for; calls that
	// come later return ErrClosed.
	Close() error
}

// TryDevice is implemented by devices that can often answer without waiting for a disk, a lock or another request.
// A server uses it to answer in place and hands the request to another goroutine on ErrWouldBlock, in which case
// nothing has been changed and the content of p is undefined.
type TryDevice interface {
	// TryReadAt is ReadAt if it can be done at once.
	TryReadAt(p []byte, off int64) error
	// TryWriteAt is WriteAt without flags if it can be done at once, without waiting for more than the host's page cache.
	TryWriteAt(p []byte, off int64) error
}

// OverwriteDevice is implemented by a TryDevice whose TryWriteAt may change more than data: where the data lies.
type OverwriteDevice interface {
	TryDevice
	// TryOverwriteAt is TryWriteAt if what is written has its place on the host already. Nothing of it is lost then when the
	// process dies, since the host's page cache has it.
	TryOverwriteAt(p []byte, off int64) error
}

// DataDevice is implemented by a TryDevice that tells data from zeroes, for servers that need not send zeroes.
type DataDevice interface {
	TryDevice
	// TryReadDataAt is TryReadAt of a range of which nothing is known to read as zeroes. Where all of it is, it returns
	// ErrAllZero, where some of it is ErrMixed. What takes much computing, which several processors could share, is refused with
	// ErrWouldBlock.
	TryReadDataAt(p []byte, off int64) error
}

// CompressedWriter is implemented by devices that can store data compressed.
type CompressedWriter interface {
	// WriteCompressed writes p to the disk at off, like WriteAt, and stores it compressed where that makes it smaller. What
	// units the range must consist of is the format's; its end need not be whole where the disk ends.
	WriteCompressed(ctx context.Context, p []byte, off int64) error
}

// Info describes a Device.
type Info struct {
	Format   string // "raw", "qcow2"
	Name     string // of the file, for messages
	ReadOnly bool
	// MinAlign is the smallest unit of a request that is not read-modify-write; PreferAlign the best one (both powers
	// of two); DiscardAlign the unit that Discard and zeroing without writing work in, 0 when neither does anything.
	MinAlign, PreferAlign, DiscardAlign int
	// FastZero: WriteZeroes over whole DiscardAlign units writes no zeroes out.
	FastZero bool
	// Volatile: written data needs a Flush to be durable (false for devices that keep nothing back).
	Volatile bool
	// Survives: what was acknowledged survives the end of this process, though not a power cut.
	Survives bool
}

// Extent is a run of a device whose bytes are in one state.
//
// The states, as NBD, SCSI and `map` need them:
//
//	Allocated Data Zero
//	yes       yes  no    data at Host (if HasHost) of File
//	yes       no   yes   a zero cluster: reads as zeroes whatever lies below
//	yes       yes  yes   data known to read as zeroes (host space reserved)
//	no        no   yes   allocated nowhere in the chain: reads as zeroes
type Extent struct {
	Off, Len int64
	// Depth is the layer that decides the content: 0 for the device itself, 1 for its backing, and so on; for an
	// extent that no layer allocates, the number of the last layer.
	Depth int
	// Allocated: some layer of the chain decides the content of this range (a hole in a raw bottom layer does too:
	// Allocated with Zero and without Data).
	Allocated  bool
	Data       bool // there are data bytes on the host
	Zero       bool // reads as zeroes
	Compressed bool
	// HasHost: the bytes lie uncompressed and unencrypted at Host in the file called File.
	HasHost bool
	Host    int64
	File    string
}

// End returns the offset after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// SameState reports whether b continues a: the next bytes, in the same state, with contiguous host offsets.
func (e Extent) SameState(b Extent) bool {
	return e.End() == b.Off && e.Depth == b.Depth && e.Allocated == b.Allocated && e.Data == b.Data && e.Zero == b.Zero &&
		e.Compressed == b.Compressed && e.HasHost == b.HasHost && e.File == b.File && (!e.HasHost || e.Host+e.Len == b.Host)
}

// CheckRange returns ErrOutOfRange unless [off, off+n) lies inside a device of the given size.
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return ErrOutOfRange
	}
	return nil
}
