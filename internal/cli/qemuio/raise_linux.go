package qemuio

import (
	"os"
	"os/signal"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// harmless are the signals that end nothing, the last three because QEMU's programs survive them.
var harmless = []int{
	0, int(unix.SIGCHLD), int(unix.SIGCONT), int(unix.SIGURG), int(unix.SIGWINCH), int(unix.SIGPIPE),
	int(unix.SIGUSR1), int(unix.SIGALRM),
}

// fixed are the signals that nobody can handle.
var fixed = []int{int(unix.SIGKILL), int(unix.SIGSTOP)}

// raise sends the program a signal. It dies of it as a program without handlers would: the language's runtime handles all
// signals, so what the kernel does by itself must be put back first.
func raise(n int) error {
	if slices.Contains(harmless, n) {
		return nil // their handlers are the runtime's own business
	}
	if signal.Ignored(unix.Signal(n)) {
		return nil // whoever started this program wants that, as nohup does
	}
	if !slices.Contains(fixed, n) {
		// A struct sigaction of zeroes is SIG_DFL, however its fields are arranged.
		var action [64]byte
		const maskBytes = 8
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(n), uintptr(unsafe.Pointer(&action)), 0, maskBytes, 0, 0)
		if errno != 0 {
			return errno
		}
	}
	return unix.Kill(os.Getpid(), unix.Signal(n))
}
