package storage

import (
	"fmt"
	"slices"
	"sync"
)

// CrashFile is a file in memory that can lose power afterwards: it records, in order, everything that changes it, and
// an [Explorer] makes from the record the files that a power cut at any moment could have left.
//
// The record is a list of events. A changing call enters it at the moment its effect becomes visible to readers, and
// the record remembers how long it was when the call returned. A Sync enters it twice, as OpSync when it begins and as
// OpSynced when it is done. A power cut at point p happens after the first p events. Then
//
//   - what a Sync covers is durable if its OpSynced is among them. It covers the calls that had returned before it
//     began, and no others: not one that was still running, nor one that came while it ran;
//   - of every other call among them the disk holds any part: each 512-byte sector of a write by itself, the new length
//     of a write that passed the end by itself, all other calls as a whole;
//   - of several writes to one sector the disk holds the sector as it was after one of them, or before all.
//
// A Sync that failed (FailNextSync) leaves its calls in doubt for good: no later Sync covers them.
type CrashFile struct {
	*MemFile           // the live file: reads, Size, NextExtent, Lock, Stat and Close are its own
	rec      *crashLog // that of all files which lose power together
	index    int       // among them
	syncErr  error
	hook     func(OpKind)
}

// crashLog is the record of one file or of several.
type crashLog struct {
	mu     sync.Mutex
	log    []Op
	starts []*MemFile
}

var (
	_ File         = (*CrashFile)(nil)
	_ NowaitReader = (*CrashFile)(nil)
)

// Op is one event in the life of a CrashFile.
type Op struct {
	Kind OpKind
	File int    // which of the files that lose power together
	Off  int64  // start of the range; the new length for OpTruncate
	Len  int64  // length of the range
	Data []byte // OpWrite: what was written. Not to be changed.
	Mark any    // OpMark: the value given
	Ref  int    // OpSynced, OpSyncFailed: where in the log the Sync began
	// Done is how many events the log had when the call returned, 0 while it runs.
	Done int

	before, after int64  // the length of the file
	image         []byte // OpWrite: the whole sectors that the write touched, as they read after it
}

// String describes the event without its data.
func (op Op) String() string {
	switch op.Kind {
	case OpMark:
		return fmt.Sprintf("mark %v", op.Mark)
	case OpSync:
		return op.Kind.String()
	case OpSynced, OpSyncFailed:
		return fmt.Sprintf("%v (begun at %d)", op.Kind, op.Ref)
	case OpTruncate:
		return fmt.Sprintf("truncate %d to %d", op.before, op.Off)
	default:
		return fmt.Sprintf("%v %d+%d", op.Kind, op.Off, op.Len)
	}
}

// NewCrashFile returns a file that starts with the content of base, all of it durable. base is not used any further.
func NewCrashFile(base *MemFile) *CrashFile { return NewCrashFiles(base)[0] }

// NewCrashFiles returns files that lose power together: they have one record, and a power cut leaves of each what it may.
// A Sync is about its own file.
func NewCrashFiles(bases ...*MemFile) []*CrashFile {
	l := &crashLog{}
	files := make([]*CrashFile, len(bases))
	for i, base := range bases {
		l.starts = append(l.starts, base.Clone())
		files[i] = &CrashFile{MemFile: base.Clone(), rec: l, index: i}
	}
	return files
}

// Mark records an event of the test's own, for example that a flush was acknowledged to a guest.
func (c *CrashFile) Mark(v any) {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	c.rec.log = append(c.rec.log, Op{Kind: OpMark, Mark: v})
}

// FailNextSync makes the next Sync that begins return err.
func (c *CrashFile) FailNextSync(err error) {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	c.syncErr = err
}

// SetHook sets a function that runs inside every changing call and every Sync, after the call has entered the record
// and before it returns. There a test can hold a call up while others go on. nil removes it.
func (c *CrashFile) SetHook(hook func(OpKind)) {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	c.hook = hook
}

// Log returns the record so far. What it points to is shared and must not be changed.
func (c *CrashFile) Log() []Op {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	return slices.Clone(c.rec.log)
}

// Explorer returns an explorer of the record so far.
func (c *CrashFile) Explorer() *Explorer { return newExplorer(c.rec.starts, c.Log()) }

// record makes a change and enters it, in one step, so that the record has overlapping changes in their order.
func (c *CrashFile) record(op Op, apply func() error) error {
	at, hook, err := c.enter(op, apply)
	if err != nil {
		return err
	}
	if hook != nil {
		hook(op.Kind)
	}
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	c.rec.log[at].Done = len(c.rec.log)
	return nil
}

func (c *CrashFile) enter(op Op, apply func() error) (at int, hook func(OpKind), err error) {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	op.File = c.index
	op.before, _ = c.MemFile.Size()
	if err := apply(); err != nil {
		return 0, nil, err
	}
	op.after, _ = c.MemFile.Size()
	if op.Kind == OpWrite {
		if err := c.takeImage(&op); err != nil {
			return 0, nil, err
		}
	}
	c.rec.log = append(c.rec.log, op)
	return len(c.rec.log) - 1, c.hook, nil
}

// takeImage copies the sectors that a write has touched. Data becomes a part of the copy.
func (c *CrashFile) takeImage(op *Op) error {
	lo := op.Off &^ (SectorSize - 1)
	hi := (op.Off + op.Len + SectorSize - 1) &^ (SectorSize - 1)
	op.image = make([]byte, hi-lo)
	inFile := min(hi, op.after) - lo
	if _, err := c.MemFile.ReadAt(op.image[:inFile], lo); err != nil {
		return fmt.Errorf("recording a write: %w", err)
	}
	op.Data = op.image[op.Off-lo:][:op.Len:op.Len]
	return nil
}

// WriteAt implements io.WriterAt.
func (c *CrashFile) WriteAt(p []byte, off int64) (int, error) { return c.WriteVAt([][]byte{p}, off) }

// WriteVAt is one write in the record.
func (c *CrashFile) WriteVAt(bufs [][]byte, off int64) (n int, err error) {
	total := totalLen(bufs)
	if total == 0 {
		return c.MemFile.WriteVAt(bufs, off)
	}
	err = c.record(Op{Kind: OpWrite, Off: off, Len: total}, func() error {
		n, err = c.MemFile.WriteVAt(bufs, off)
		return err
	})
	return n, err
}

// Truncate sets the length.
func (c *CrashFile) Truncate(size int64) error {
	return c.record(Op{Kind: OpTruncate, Off: size}, func() error { return c.MemFile.Truncate(size) })
}

// PunchHole makes a hole.
func (c *CrashFile) PunchHole(off, n int64) error {
	return c.record(Op{Kind: OpPunch, Off: off, Len: n}, func() error { return c.MemFile.PunchHole(off, n) })
}

// ZeroRange makes a hole, and the file longer where needed.
func (c *CrashFile) ZeroRange(off, n int64) error {
	return c.record(Op{Kind: OpZero, Off: off, Len: n}, func() error { return c.MemFile.ZeroRange(off, n) })
}

// Preallocate makes the file longer where needed.
func (c *CrashFile) Preallocate(off, n int64) error {
	return c.record(Op{Kind: OpPreallocate, Off: off, Len: n}, func() error { return c.MemFile.Preallocate(off, n) })
}

// Sync makes durable what had returned before it began.
func (c *CrashFile) Sync() error {
	begun, hook, fail, err := c.beginSync()
	if err != nil {
		return err
	}
	if hook != nil {
		hook(OpSync)
	}
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	kind := OpSynced
	if fail != nil {
		kind = OpSyncFailed
	}
	c.rec.log = append(c.rec.log, Op{Kind: kind, File: c.index, Ref: begun})
	c.rec.log[begun].Done = len(c.rec.log)
	return fail
}

func (c *CrashFile) beginSync() (begun int, hook func(OpKind), fail, err error) {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	if err := c.MemFile.Sync(); err != nil {
		return 0, nil, nil, err
	}
	fail, c.syncErr = c.syncErr, nil
	c.rec.log = append(c.rec.log, Op{Kind: OpSync, File: c.index})
	return len(c.rec.log) - 1, c.hook, fail, nil
}
