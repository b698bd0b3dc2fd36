package storage

import (
	"fmt"
	"strings"
)

// permNames are QEMU's names for its permissions, in bit order; they appear in its error messages.
var permNames = [...]string{"consistent read", "write", "write unchanged", "resize"}

// String returns QEMU's names of the permissions in p, joined by commas.
func (p Perm) String() string {
	var names []string
	for i, name := range permNames {
		if p&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

// LockError says that another user of the file holds what we cannot bear, or does not bear what we want to do.
type LockError struct {
	Name   string // the file
	Perm   Perm   // the one permission in conflict
	Shared bool   // false: somebody does not let us have Perm; true: somebody has it, and we do not let others have it
}

// Error returns QEMU's message for the conflict and, on a second line, its hint.
func (e *LockError) Error() string { return e.Message() + "\n" + e.Hint() }

// Message returns the first line of Error: which lock could not be had.
func (e *LockError) Message() string {
	if e.Shared {
		return fmt.Sprintf("Failed to get shared %q lock", e.Perm.String())
	}
	return fmt.Sprintf("Failed to get %q lock", e.Perm.String())
}

// Hint returns the second line of Error: which file it is about.
func (e *LockError) Hint() string {
	return fmt.Sprintf("Is another process using the image [%s]?", e.Name)
}
