package daemon

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Versions of the kernel's Landlock interface that brought something the sandbox uses.
const (
	abiRefer    = 2
	abiTruncate = 3
	abiTCP      = 4
	abiIoctl    = 5
	abiScopes   = 6
	abiThreads  = 8
)

// fixSignals is the erratum after which threads of a process, each in a domain of its own, may signal each other. Go's
// runtime does so all the time.
const fixSignals = 1 << 1

// accessFirst is all that the first version knows about files.
const accessFirst = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
	unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR |
	unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR |
	unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO |
	unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK | unix.LANDLOCK_ACCESS_FS_MAKE_SYM

// landlock is what a kernel offers.
type landlock struct {
	abi    int
	errata int
}

// ruleset forbids all that the kernel can forbid.
func (k landlock) ruleset() unix.LandlockRulesetAttr {
	r := unix.LandlockRulesetAttr{Handled_access_fs: accessFirst}
	if k.abi >= abiRefer {
		r.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if k.abi >= abiTruncate {
		r.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if k.abi >= abiTCP {
		r.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	if k.abi >= abiIoctl {
		r.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if k.abi >= abiScopes {
		r.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		if k.errata&fixSignals != 0 || k.abi >= abiThreads {
			r.Scoped |= unix.LANDLOCK_SCOPE_SIGNAL
		}
	}
	return r
}

// notes says what this kernel cannot forbid, of what others can. What none can, UDP and multipath TCP for example, is a
// matter of the documentation.
func (k landlock) notes() []string {
	var list []string
	if k.abi < abiTruncate {
		list = append(list, "the sandbox of this kernel cannot forbid to truncate files")
	}
	if k.abi < abiTCP {
		list = append(list, "the sandbox of this kernel cannot forbid TCP connections")
	}
	return list
}

// askLandlock finds out what this kernel offers.
func askLandlock() (landlock, error) {
	abi, _, e := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch e {
	case 0:
	case syscall.ENOSYS:
		return landlock{}, fmt.Errorf("%w: this kernel has no Landlock", ErrNoSandbox)
	case syscall.EOPNOTSUPP:
		return landlock{}, fmt.Errorf("%w: Landlock is switched off in this kernel (see lsm= on its command line)", ErrNoSandbox)
	default:
		return landlock{}, fmt.Errorf("%w: asking for Landlock: %w", ErrNoSandbox, e)
	}
	// Kernels that do not know the question have none of the errata either.
	errata, _, e := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_ERRATA)
	if e != 0 {
		errata = 0
	}
	return landlock{abi: int(abi), errata: int(errata)}, nil
}

// sandbox puts the process into a Landlock domain.
func sandbox(c Confinement) (notes []string, err error) {
	k, err := askLandlock()
	if err == nil {
		err = k.enter(c.Removable)
	}
	if err == nil {
		return k.notes(), nil
	}
	if c.BestEffort && errors.Is(err, ErrNoSandbox) {
		return []string{err.Error()}, nil
	}
	return nil, err
}

// enter makes a ruleset and puts all threads under it.
func (k landlock) enter(removable []string) error {
	attr := k.ruleset()
	// A kernel that knows fewer fields takes the longer structure as long as what it does not know is zero.
	fd, _, e := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET,
		uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if e != 0 {
		return fmt.Errorf("making a Landlock ruleset: %w", e)
	}
	ruleset := os.NewFile(fd, "landlock")
	defer ruleset.Close()
	for _, dir := range removable {
		if err := allowRemoval(fd, dir); err != nil {
			return fmt.Errorf("allowing to remove the socket in %q: %w", dir, err)
		}
	}
	if k.abi >= abiThreads {
		return restrictByOne(fd)
	}
	if err := prctl("forbidding new privileges", unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return err
	}
	_, _, e = syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0)
	return threadError("entering the Landlock domain", e)
}

// restrictByOne has the kernel take all threads along, and their right to new privileges with them.
func restrictByOne(ruleset uintptr) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbidding new privileges: %w", err)
	}
	_, _, e := syscall.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, unix.LANDLOCK_RESTRICT_SELF_TSYNC, 0)
	if e != 0 {
		return fmt.Errorf("entering the Landlock domain: %w", e)
	}
	return nil
}

// allowRemoval lets files be removed in a folder and below.
func allowRemoval(ruleset uintptr, dir string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	attr := unix.LandlockPathBeneathAttr{Allowed_access: unix.LANDLOCK_ACCESS_FS_REMOVE_FILE, Parent_fd: int32(fd)}
	_, _, e := syscall.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, ruleset, unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}
