package storage

// CopyRange copies n bytes of src to dst without moving them through this process. With clone set it only shares the space
// of the range, for file systems that can. ErrNotSupported means that these files cannot, or not all of the range, which
// the caller then copies itself; a part may have been copied. Like WriteAt it is durable after a Sync of dst.
func CopyRange(dst File, dstOff int64, src File, srcOff, n int64, clone bool) error {
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
