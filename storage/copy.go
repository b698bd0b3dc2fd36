package storage

import "fmt"

// copier is a File that stands for one of the host in tests: it copies as the host would.
type copier interface {
	copyFrom(off int64, src File, srcOff, n int64) error
}

func (c *CrashFile) copyFrom(off int64, src File, srcOff, n int64) error {
	return copyBytes(c, off, src, srcOff, n)
}

func (f *FaultFile) copyFrom(off int64, src File, srcOff, n int64) error {
	return copyBytes(f, off, src, srcOff, n)
}

func copyBytes(dst File, off int64, src File, srcOff, n int64) error {
	b := make([]byte, n)
	if err := ReadFull(src, b, srcOff); err != nil {
		return err
	}
	if err := WriteFull(dst, b, off); err != nil {
		return fmt.Errorf("copying %d bytes to offset %d: %w", n, off, err)
	}
	return nil
}

// CopyRange copies n bytes of src to dst without moving them through this process. With clone set it only shares the space
// of the range, for file systems that can. ErrNotSupported means that these files cannot, or not all of the range, which
// the caller then copies itself; a part may have been copied. Like WriteAt it is durable after a Sync of dst.
func CopyRange(dst File, dstOff int64, src File, srcOff, n int64, clone bool) error {
	if d, ok := dst.(copier); ok {
		return d.copyFrom(dstOff, src, srcOff, n)
	}
	to, ok := dst.(RawFile)
	from, isRaw := src.(RawFile)
	if !ok || !isRaw || dst.Stat().Direct || src.Stat().Direct {
		return ErrNotSupported
	}
	toFD, ok := to.RawFD()
	fromFD, open := from.RawFD()
	if !ok || !open {
		return ErrNotSupported
	}
	if clone {
		return cloneRange(toFD, dstOff, fromFD, srcOff, n)
	}
	return copyRange(toFD, dstOff, fromFD, srcOff, n)
}
