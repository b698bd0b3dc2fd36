package storage

import (
	"io"
	"math"
	"slices"
	"sync"
	"syscall"
)

// FaultFile passes calls on to another File, except those that it was told to fail. It counts calls, and lets a test
// look at each, or hold it up, before it happens.
type FaultFile struct {
	base File

	mu     sync.Mutex
	calls  [opKinds]int
	faults []*armedFault
	hook   func(Call) error
	limit  int64 // the file may not grow past it
}

var (
	_ File         = (*FaultFile)(nil)
	_ NowaitReader = (*FaultFile)(nil)
)

// Call is what a hook sees.
type Call struct {
	Kind     OpKind
	Off, Len int64 // OpTruncate: the new length and 0
	Nth      int   // how many calls of the kind there were, this one included
}

// Whole as Fault.Partial makes a call have all of its effect and fail all the same.
const Whole = math.MaxInt

// Fault says which calls fail, and how.
type Fault struct {
	// Kind of the calls; OpAny for all.
	Kind OpKind
	// Off and Len choose calls that touch the range; Len 0 chooses all. OpTruncate touches what it cuts off or adds,
	// OpSync everything.
	Off, Len int64
	// Skip is how many of the chosen calls pass before the first that fails.
	Skip int
	// Times is how many then fail: 0 means one, a negative number all.
	Times int
	// Err is the error; nil means EIO. It comes back as it is.
	Err error
	// Partial is how many bytes a failing read or write moves all the same, from the start of its range; if that is all
	// of them, the call has its effect and fails nevertheless. Other calls have their effect if Partial is Whole and
	// none otherwise.
	Partial int
}

type armedFault struct {
	Fault
	seen int
}

// NewFaultFile returns a FaultFile over base that fails nothing yet. Close closes base.
func NewFaultFile(base File) *FaultFile {
	return &FaultFile{base: base, limit: math.MaxInt64}
}

// Inject adds a fault; it counts the calls from now on. Of several that hit a call, the one added first decides.
func (f *FaultFile) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &armedFault{Fault: fault})
}

// Clear takes back all faults and the bound of SetBudget.
func (f *FaultFile) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults, f.limit = nil, math.MaxInt64
}

// SetBudget makes the disk full n bytes from now: a call that would bring the length of the file past what it is plus n
// fails with ENOSPC. A write fills what is left first, as on a real disk; other calls do nothing. Shortening the file
// makes room again.
func (f *FaultFile) SetBudget(n int64) error {
	size, err := f.base.Size()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.limit = math.MaxInt64
	if n < math.MaxInt64-size {
		f.limit = size + n
	}
	return nil
}

// SetHook sets a function that sees every counted call before it happens; if it returns an error, the call fails with
// it and has no effect. It may block, to hold the call up, and may use the FaultFile. nil removes it.
func (f *FaultFile) SetHook(before func(Call) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = before
}

// Calls returns how many calls of the kind there were, failed ones included; OpAny returns all.
func (f *FaultFile) Calls(kind OpKind) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[kind]
}

// Base returns the file below.
func (f *FaultFile) Base() File { return f.base }

// before counts a call, shows it to the hook and asks the faults. It returns how many bytes may take effect and the
// error to return then; nil means that nothing is wrong.
func (f *FaultFile) before(kind OpKind, off, n int64) (allowed int, err error) {
	call := Call{Kind: kind, Off: off, Len: n}
	f.mu.Lock()
	f.calls[OpAny]++
	f.calls[kind]++
	call.Nth = f.calls[kind]
	hook := f.hook
	f.mu.Unlock()

	if hook != nil {
		if err := hook(call); err != nil {
			return 0, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fault := range f.faults {
		if !fault.hits(call) {
			continue
		}
		if fault.Err == nil {
			return fault.Partial, syscall.EIO
		}
		return fault.Partial, fault.Err
	}
	return f.room(call)
}

// hits reports whether the fault is for this call and its turn has come.
func (a *armedFault) hits(c Call) bool {
	if a.Kind != OpAny && a.Kind != c.Kind || !a.touches(c) {
		return false
	}
	a.seen++
	nth := a.seen - a.Skip
	return nth >= 1 && (a.Times < 0 || nth <= max(a.Times, 1))
}

func (a *armedFault) touches(c Call) bool {
	switch {
	case a.Len == 0 || c.Kind == OpSync:
		return true
	case c.Kind == OpTruncate:
		return c.Off < a.Off+a.Len
	default:
		return c.Off < a.Off+a.Len && a.Off < c.Off+c.Len
	}
}

// room applies the budget.
func (f *FaultFile) room(c Call) (allowed int, err error) {
	switch c.Kind {
	case OpWrite, OpTruncate, OpZero, OpPreallocate:
	default:
		return 0, nil
	}
	if c.Off <= f.limit && c.Len <= f.limit-c.Off {
		return 0, nil
	}
	if c.Kind == OpWrite {
		allowed = int(min(max(f.limit-c.Off, 0), c.Len))
	}
	return allowed, syscall.ENOSPC
}

// ReadAt implements io.ReaderAt.
func (f *FaultFile) ReadAt(p []byte, off int64) (int, error) {
	return f.partly(OpRead, [][]byte{p}, off, f.base.ReadVAt)
}

// ReadVAt reads one contiguous range into the buffers.
func (f *FaultFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	return f.partly(OpRead, bufs, off, f.base.ReadVAt)
}

// ReadAtNowait counts as a read. A base that cannot read without waiting is not asked and not counted.
func (f *FaultFile) ReadAtNowait(p []byte, off int64) (int, error) {
	nowait, ok := f.base.(NowaitReader)
	if !ok {
		return 0, ErrWouldBlock
	}
	return f.partly(OpRead, [][]byte{p}, off, func(bufs [][]byte, off int64) (int, error) {
		return nowait.ReadAtNowait(bufs[0], off)
	})
}

// WriteAt implements io.WriterAt.
func (f *FaultFile) WriteAt(p []byte, off int64) (int, error) {
	return f.partly(OpWrite, [][]byte{p}, off, f.base.WriteVAt)
}

// WriteVAt writes the buffers to one contiguous range.
func (f *FaultFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	return f.partly(OpWrite, bufs, off, f.base.WriteVAt)
}

// partly moves all bytes, or those that a fault allows. What the base says about those counts before the fault does.
func (f *FaultFile) partly(
	kind OpKind, bufs [][]byte, off int64, move func([][]byte, int64) (int, error),
) (int, error) {
	total := totalLen(bufs)
	allowed, fault := f.before(kind, off, total)
	if fault == nil {
		return move(bufs, off)
	}
	n, err := 0, error(nil)
	if allowed = int(min(int64(allowed), total)); allowed > 0 {
		n, err = move(firstBytes(bufs, allowed), off)
	}
	if err != nil && err != io.EOF {
		return n, err
	}
	return n, fault
}

// firstBytes returns the buffers cut after n bytes.
func firstBytes(bufs [][]byte, n int) [][]byte {
	cut := slices.Clone(bufs)
	for i, b := range cut {
		if len(b) >= n {
			cut[i] = b[:n]
			return cut[:i+1]
		}
		n -= len(b)
	}
	return cut
}

// wholly makes the call unless a fault forbids it.
func (f *FaultFile) wholly(kind OpKind, off, n int64, call func() error) error {
	allowed, fault := f.before(kind, off, n)
	if fault != nil && allowed != Whole {
		return fault
	}
	if err := call(); err != nil {
		return err
	}
	return fault
}

// Sync syncs the base.
func (f *FaultFile) Sync() error { return f.wholly(OpSync, 0, 0, f.base.Sync) }

// Size returns the length.
func (f *FaultFile) Size() (int64, error) { return f.base.Size() }

// Truncate sets the length.
func (f *FaultFile) Truncate(size int64) error {
	return f.wholly(OpTruncate, size, 0, func() error { return f.base.Truncate(size) })
}

// PunchHole gives space back.
func (f *FaultFile) PunchHole(off, n int64) error {
	return f.wholly(OpPunch, off, n, func() error { return f.base.PunchHole(off, n) })
}

// ZeroRange zeroes without writing.
func (f *FaultFile) ZeroRange(off, n int64) error {
	return f.wholly(OpZero, off, n, func() error { return f.base.ZeroRange(off, n) })
}

// Preallocate reserves space.
func (f *FaultFile) Preallocate(off, n int64) error {
	return f.wholly(OpPreallocate, off, n, func() error { return f.base.Preallocate(off, n) })
}

// NextExtent asks the base.
func (f *FaultFile) NextExtent(off int64) (end int64, data bool, err error) {
	return f.base.NextExtent(off)
}

// Lock asks the base.
func (f *FaultFile) Lock(mode LockMode) error { return f.base.Lock(mode) }

// Stat describes the base.
func (f *FaultFile) Stat() Info { return f.base.Stat() }

// Close closes the base.
func (f *FaultFile) Close() error { return f.base.Close() }
