package qcow2

import (
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// The functions below are the only ways of guest data from and to the host. Whatever is to happen to every byte of it
// happens here. Compressed clusters have their own, decompress.

// readHost fills p, which lies at guest offset off, from the host.
func (im *Image) readHost(p []byte, off, host int64) error {
	if err := im.checkPlace(off, host); err != nil {
		return err
	}
	storage.Tell(im.file, storage.EventReadAIO)
	var err error
	if im.crypt != nil {
		err = im.crypt.read(im.data, p, off, host)
	} else {
		err = storage.ReadFull(im.data, p, host)
	}
	if err != nil {
		return fmt.Errorf("reading guest offset %#x at host offset %#x: %w", off, host, err)
	}
	return nil
}

// tryReadHost is readHost if it can be done without waiting for the disk.
func (im *Image) tryReadHost(p []byte, off, host int64) error {
	if im.nowait == nil || im.checkPlace(off, host) != nil || im.crypt != nil && !im.crypt.ready(host, len(p)) {
		return block.ErrWouldBlock
	}
	n, err := im.nowait.ReadAtNowait(p, host)
	if n == len(p) {
		if im.crypt != nil {
			im.crypt.decrypt(p, off, host)
		}
		return nil
	}
	if err == nil {
		err = storage.ErrWouldBlock
	}
	return err
}

// writeHost writes p, which lies at guest offset off, to the host, and notes that a flush must make it durable.
func (im *Image) writeHost(p []byte, off, host int64) error {
	if err := im.checkPlace(off, host); err != nil {
		return err
	}
	if im.crypt != nil {
		return im.writeEncrypted([][]byte{p}, int64(len(p)), off, host)
	}
	storage.Tell(im.file, storage.EventWriteAIO)
	err := storage.WriteFull(im.data, p, host)
	im.wroteHost(host, int64(len(p))) // also after a failure, which may have written a part
	if err != nil {
		return fmt.Errorf("writing guest offset %#x at host offset %#x: %w", off, host, err)
	}
	return nil
}

// writeHostV is writeHost for bytes in several pieces, the first of which lies at guest offset off.
func (im *Image) writeHostV(vec [][]byte, off, host int64) error {
	if len(vec) == 1 {
		return im.writeHost(vec[0], off, host)
	}
	if err := im.checkPlace(off, host); err != nil {
		return err
	}
	var n int64
	for _, p := range vec {
		n += int64(len(p))
	}
	if im.crypt != nil {
		return im.writeEncrypted(vec, n, off, host)
	}
	storage.Tell(im.file, storage.EventWriteAIO)
	err := storage.WriteVFull(im.data, vec, host)
	im.wroteHost(host, n)
	if err != nil {
		return fmt.Errorf("writing guest offset %#x at host offset %#x: %w", off, host, err)
	}
	return nil
}

// writeEncrypted is writeHostV for encrypted images. What it notes includes the rest of the sectors at either end.
func (im *Image) writeEncrypted(vec [][]byte, n, off, host int64) error {
	if im.crypt.cipher == nil {
		return fmt.Errorf("writing guest offset %#x: %w", off, ErrNoKey)
	}
	storage.Tell(im.file, storage.EventWriteAIO)
	err := im.crypt.write(im.data, vec, n, off, host)
	start := host &^ (storage.SectorSize - 1)
	im.wroteHost(start, roundUp(host+n, storage.SectorSize)-start)
	if err != nil {
		return fmt.Errorf("writing guest offset %#x at host offset %#x: %w", off, host, err)
	}
	return nil
}

// wroteHost notes a write of guest data, complete or not.
func (im *Image) wroteHost(host, n int64) {
	im.meta.WroteData(host, n)
	if im.lay.DataFile {
		im.dataEnd.raise(host, n)
	}
}

// checkPlace refuses a mapping into the external data file that does not lead to the same offset.
func (im *Image) checkPlace(off, host int64) error {
	if im.lay.DataFile && host != off {
		return &CorruptError{Reason: fmt.Sprintf("guest offset %#x is mapped to offset %#x of the data file, not to the same", off, host)}
	}
	return nil
}

// overwrite writes to a cluster that is this image's alone, in place.
func (im *Image) overwrite(p []byte, off, host int64) error {
	if im.lay.DataFile {
		return im.writeHost(p, off, host)
	}
	if err := im.meta.Guard(format.HostOff(host), int64(len(p))); err != nil {
		return fmt.Errorf("writing guest offset %#x: %w", off, err)
	}
	return im.writeHost(p, off, host)
}
