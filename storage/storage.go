// Package storage is the bytes under an image: the one door through which the rest of drover reaches a host file.
//
// A [File] is a flat, growable array of bytes with positional I/O. Nothing above this package opens, reads, writes or
// locks a host file by other means, so that whatever can happen to a file (a power cut, a full disk, a short write)
// can be made to happen in a test: [CrashFile] loses power, [FaultFile] fails chosen calls, [MemFile] is plain memory.
//
// # What is durable when
//
// A write is visible to every later read at once. It is durable only after a [File.Sync] that began after the write
// returned has itself returned nil. Until then a power cut may keep any subset of the written 512-byte sectors, in any
// order. After a Sync that failed, nothing written since the last good Sync may be assumed durable, not even if a
// later Sync succeeds: the caller must write again what matters.
//
// # Concurrency
//
// Every method may be called from any number of goroutines at once, Close excepted: it is called once, after all other
// calls have returned. Two overlapping writes that run at once leave, sector by sector, one or the other.
package storage

import (
	"errors"
	"io"
)

// SectorSize is the unit that a power cut cannot tear: a sector holds all of one write or none of it.
const SectorSize = 512

var (
	// ErrNotSupported is returned by an optional operation that this file, its file system or this platform lacks. The
	// file is unchanged; the caller falls back (plain zeroes for ZeroRange, nothing for PunchHole).
	ErrNotSupported = errors.New("operation not supported by the storage")
	// ErrWouldBlock is returned by NowaitReader.ReadAtNowait when the bytes are not at hand without waiting.
	ErrWouldBlock = errors.New("operation would block")
	// ErrReadOnly is returned by every changing method of a file that was opened read-only.
	ErrReadOnly = errors.New("storage is read-only")
)

// File is the bytes of one host file (or of something that behaves as one).
//
// Offsets and lengths are bytes and never negative. Buffers are not kept after the call returns.
type File interface {
	// ReadAt is io.ReaderAt: fewer bytes than asked come with a non-nil error, io.EOF at the end of the file.
	io.ReaderAt
	// WriteAt is io.WriterAt. Writing past the end grows the file; a gap reads as zeroes.
	io.WriterAt

	// ReadVAt fills the buffers in order from one contiguous range, as ReadAt would.
	ReadVAt(bufs [][]byte, off int64) (int, error)
	// WriteVAt writes the buffers in order to one contiguous range, in one system call where the host has one.
	WriteVAt(bufs [][]byte, off int64) (int, error)

	// Sync makes every completed write, truncation and hole durable (fdatasync: the size too, not the timestamps).
	Sync() error
	// Size returns the length of the file in bytes.
	Size() (int64, error)
	// Truncate sets the length; new bytes read as zeroes.
	Truncate(size int64) error

	// PunchHole gives the host space of [off, off+n) back; the range reads as zeroes afterwards and the length stays.
	PunchHole(off, n int64) error
	// ZeroRange makes [off, off+n) read as zeroes without writing them, keeping the space allocated, and grows the
	// file where the range passes its end.
	ZeroRange(off, n int64) error
	// Preallocate reserves host space for [off, off+n) without changing what it reads as, and grows the file where the
	// range passes its end.
	Preallocate(off, n int64) error

	// NextExtent describes the file at off: it returns the end of the run that holds off and whether the run is data
	// or a hole. A host that cannot tell reports one run of data up to the end of the file. off at or past the end of
	// the file returns io.EOF.
	NextExtent(off int64) (end int64, data bool, err error)

	// Lock changes which permissions this file holds and which it lets others hold (see LockMode). It never waits: a
	// conflict returns a *LockError and leaves the locks as they were.
	Lock(mode LockMode) error

	// Stat tells what the file is. It never fails: what is not known is zero.
	Stat() Info

	// Close releases the file and its locks. It does not Sync.
	Close() error
}

// NowaitReader is implemented by a File that can read without waiting for the disk.
type NowaitReader interface {
	// ReadAtNowait is ReadAt for bytes that are in memory already. It returns ErrWouldBlock, having read nothing or a
	// part, when they are not (or when the host cannot tell).
	ReadAtNowait(p []byte, off int64) (int, error)
}

// RawFile is implemented by a File that is one descriptor of the host, for system calls that move bytes inside the
// kernel (sendfile, copy_file_range).
type RawFile interface {
	// RawFD returns the descriptor and true while its bytes may be used in place of the File's. It stays the File's
	// own: never close it, never change its flags or position-dependent state, never use it after Close.
	RawFD() (fd int, ok bool)
}

// Info describes a File.
type Info struct {
	Name      string // the name it was opened under, for messages
	ReadOnly  bool
	Direct    bool  // reads and writes bypass the page cache
	Device    bool  // a block device: fixed size, no holes past the end
	Align     int   // smallest aligned unit that is fast; 1 for buffered files
	Allocated int64 // host bytes in use, negative when that cannot be known
}

// Perm is a set of permissions on an image file, numbered as QEMU numbers them in its byte-range locks.
type Perm uint8

// The permissions that QEMU's file driver locks by.
const (
	PermConsistentRead Perm = 1 << iota // reads that must see a consistent image
	PermWrite                           // writes that change the content
	PermWriteUnchanged                  // writes that leave the content as it reads now
	PermResize                          // changes of length

	PermAll = PermConsistentRead | PermWrite | PermWriteUnchanged | PermResize
)

// LockMode says what a user of a file does with it and what it bears from others.
type LockMode struct {
	Hold  Perm // what we do
	Share Perm // what others may do meanwhile
}

// The lock modes of an image's users, as QEMU takes them.
var (
	// LockNone holds nothing and bears everything.
	LockNone = LockMode{0, PermAll}
	// LockRead is a reader that wants nobody to write.
	LockRead = LockMode{PermConsistentRead, PermConsistentRead | PermWriteUnchanged}
	// LockWrite is a writer that tolerates readers only if they do not need consistency.
	LockWrite = LockMode{PermConsistentRead | PermWrite | PermResize, PermConsistentRead | PermWriteUnchanged}
	// LockForceShare is a reader that bears everything, even a writer (qemu-img's -U): what it reads may be torn.
	LockForceShare = LockMode{PermConsistentRead, PermAll}
)
