package qcow2

import (
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// MarkedCorruptError is returned by every change of an image in which an earlier one met impossible metadata: the image has
// been marked corrupt (in its header, where its version can say so), and is only read from then on. It wraps the
// *CorruptError of the first.
type MarkedCorruptError = meta.MarkedCorruptError

// markCorrupt sets the corrupt bit on the disk. Version 2 has none.
func (im *Image) markCorrupt() error {
	if im.hdr.Version < format.Version3 {
		return nil
	}
	return im.changeIncompat(format.IncompatCorrupt, 0)
}

// judge looks at the outcome of a change, after its request has ended: whoever met impossible metadata has the image marked
// corrupt before the client hears of it. An error of the host, or of another image below this one, is no such thing.
func (im *Image) judge(err error) error {
	if c := ownCorruption(err); c != nil {
		im.meta.MarkCorrupt(c)
	}
	return err
}

// tellCorrupt is called once, when the image has been marked corrupt.
func (im *Image) tellCorrupt(err error) {
	for {
		old := im.info.Load()
		now := *old
		now.ReadOnly = true
		if im.info.CompareAndSwap(old, &now) {
			break
		}
	}
	if im.opts.OnCorrupt != nil {
		im.opts.OnCorrupt(err)
	}
}

// belowError is an error of the backing device.
type belowError struct{ err error }

func (e *belowError) Error() string { return "reading backing file: " + e.err.Error() }
func (e *belowError) Unwrap() error { return e.err }

// ownCorruption returns the *CorruptError in err's tree unless it is about the image below.
func ownCorruption(err error) *CorruptError {
	switch e := err.(type) {
	case *CorruptError:
		return e
	case *belowError:
		return nil
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return ownCorruption(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, one := range e.Unwrap() {
			if c := ownCorruption(one); c != nil {
				return c
			}
		}
	}
	return nil
}
