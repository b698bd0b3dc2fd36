// Package qcow2 opens, creates, reads and writes QCOW2 disk images.
//
// # Model
//
// An [Image] is a disk inside a file. It implements [block.Device]: ReadAt, WriteAt, WriteZeroes, Discard, Flush, Extents
// and Close, by guest offset, in bytes, without alignment rules. The file below is a [storage.File]; the image reaches
// it through nothing else.
//
//	f, err := storage.OpenFile("disk.qcow2", storage.OpenOptions{})
//	im, err := qcow2.Open(ctx, f, qcow2.Options{})
//	err = im.WriteAt(ctx, data, 1<<20, 0)
//	err = im.Flush(ctx)
//	err = im.Close()
//
// Programs that open whole chains (overlay, backing files) by name use [block.Open], with this package imported for its
// registration of the format "qcow2".
//
// # What is durable when
//
// A write is visible to every later read when WriteAt returns, and durable when a Flush that was called after that has
// returned nil (or at once with [block.WriteFUA]). A power cut at any moment leaves an image in which every flushed
// write is there, every sector written since is old or new, and no cluster is counted lower than it is referenced: space
// may leak, data never does. After an error each sector of the failed write is old or new, and the image goes on.
//
// # Concurrency
//
// Every method may be called from any number of goroutines. Requests wait for each other only where they change the
// mapping of the same clusters; reads never wait for writes or flushes.
//
// # Errors
//
// [ErrNotQCOW2] and [*UnsupportedError] come from Open; [*CorruptError] says that the image contradicts itself, and that
// nothing was changed on account of it; errors of the file below are wrapped with what was being done and where.
package qcow2
