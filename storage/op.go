package storage

import "fmt"

// OpKind names a call on a File, or an event in the log of a CrashFile.
type OpKind uint8

// The calls that FaultFile counts and CrashFile records, and CrashFile's own events.
const (
	OpAny OpKind = iota // in a Fault: every kind of call
	OpRead
	OpWrite
	OpSync
	OpTruncate
	OpPunch
	OpZero
	OpPreallocate
	OpSynced     // a Sync returned nil
	OpSyncFailed // a Sync returned an error
	OpMark       // a note of the test
	opKinds
)

var opNames = [opKinds]string{
	"any", "read", "write", "sync", "truncate", "punch", "zero", "preallocate", "synced", "sync failed", "mark",
}

// String returns the kind in words.
func (k OpKind) String() string {
	if k >= opKinds {
		return fmt.Sprintf("OpKind(%d)", uint8(k))
	}
	return opNames[k]
}
