package meta

import (
	"errors"
	"sync/atomic"
)

// wreck is what a Store knows of impossible metadata met while something was to be changed. From then on nothing is changed
// that was not acknowledged before: no request changes anything, and nothing is freed, since what is thought to be unused
// may be somebody's. What was acknowledged still goes to the disk: its places were judged before it was accepted.
type wreck struct {
	refusal atomic.Pointer[MarkedCorruptError]
	written bool // the bit is on the disk; under gate
	told    atomic.Bool
	// write sets the corrupt bit in the header and syncs. It is called under gate.
	write func() error
	tell  func(error)
}

// MarkedCorruptError is returned by every change of an image after the first that met impossible metadata. The image has been
// marked corrupt, and is only read from then on.
type MarkedCorruptError struct{ Cause *CorruptError }

func (e *MarkedCorruptError) Error() string {
	return "image was marked corrupt and is only read now: " + e.Cause.Reason
}

// Unwrap returns what was met first.
func (e *MarkedCorruptError) Unwrap() error { return e.Cause }

// Corrupt returns the error of every change, nil while nothing impossible has been met.
func (s *Store) Corrupt() error {
	if e := s.wreck.refusal.Load(); e != nil {
		return e
	}
	return nil
}

// MarkCorrupt notes that a change met impossible metadata: the disk says so before it returns (or with the next flush, where
// that fails), and nothing is changed any more. It is called outside of every request.
func (s *Store) MarkCorrupt(cause *CorruptError) {
	if !s.condemn(cause) {
		return
	}
	defer s.tellCorrupt()
	s.gate.Lock()
	defer s.gate.Unlock()
	_ = s.writeCorrupt()
}

// MarkCorruptGated is MarkCorrupt for a flush and for Exclusive.
func (s *Store) MarkCorruptGated(cause *CorruptError) {
	if s.condemn(cause) {
		_ = s.writeCorrupt()
	}
}

// condemn refuses all changes from now on. It reports whether this is the first cause.
func (s *Store) condemn(cause *CorruptError) bool {
	return s.wreck.refusal.CompareAndSwap(nil, &MarkedCorruptError{cause})
}

// writeCorrupt makes sure that the disk says what memory knows; gate is held.
func (s *Store) writeCorrupt() error {
	if s.wreck.written || s.wreck.refusal.Load() == nil || s.wreck.write == nil {
		return nil
	}
	if err := s.wreck.write(); err != nil {
		return err
	}
	s.wreck.written = true
	return nil
}

// tellCorrupt tells the owner, once, and never under gate.
func (s *Store) tellCorrupt() {
	if e := s.wreck.refusal.Load(); e != nil && s.wreck.tell != nil && s.wreck.told.CompareAndSwap(false, true) {
		s.wreck.tell(e.Cause)
	}
}

// corruptIn returns the cause if err says that metadata is impossible.
func corruptIn(err error) *CorruptError {
	var c *CorruptError
	if errors.As(err, &c) {
		return c
	}
	return nil
}
