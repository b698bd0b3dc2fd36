package cli

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// replaceFD puts the file of one descriptor in place of that of another.
func replaceFD(from, to int) error { return unix.Dup3(from, to, 0) }

// withSocketLabel makes sockets with an SELinux label, if there is one: fn's, and nobody else's meanwhile.
func withSocketLabel(label string, fn func() error) error {
	if label == "" {
		return fn()
	}
	// The label is the thread's.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const file = "/proc/thread-self/attr/sockcreate"
	if err := os.WriteFile(file, []byte(label), 0); err != nil {
		return errorf("Cannot set SELinux socket create context to %s: %s", label, systemReason(err))
	}
	err := fn()
	if cerr := os.WriteFile(file, nil, 0); cerr != nil {
		return errors.Join(err, errorf("Cannot clear SELinux socket create context: %s", systemReason(cerr)))
	}
	return err
}

// nameProcess sets the name that ps shows and pkill looks for, which would be that of the link it was started by.
func nameProcess(name string) {
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0) // without /proc it has another name, no more
}
