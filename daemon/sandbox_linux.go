package daemon

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// confine goes from what needs privileges to giving them up: the ruleset with its folders, then groups, capabilities that
// might come back, the user, and what capabilities are left.
func confine(c Confinement) (notes []string, err error) {
	if c.User != nil && os.Geteuid() != 0 && !c.User.already() {
		return nil, fmt.Errorf("becoming user %d: only root can", c.User.UID)
	}
	if c.Sandbox {
		if notes, err = sandbox(c); err != nil {
			return notes, err
		}
	}
	strip := c.Sandbox || c.User.UID != 0
	if err := dropGroups(c.User); err != nil {
		return notes, err
	}
	if strip {
		err := dropBounding()
		if c.BestEffort && errors.Is(err, ErrNoSandbox) {
			// The user can still be dropped, and the capabilities that are in force go with it.
			return append(notes, err.Error()), dropUser(c.User)
		}
		if err != nil {
			return notes, err
		}
	}
	if err := dropUser(c.User); err != nil {
		return notes, err
	}
	if strip {
		return notes, dropCapabilities()
	}
	return notes, nil
}

func (u *User) already() bool {
	return os.Geteuid() == int(u.UID) && os.Getuid() == int(u.UID) && os.Getegid() == int(u.GID)
}

// threadError explains a system call made on all threads, which Go can do only in a program without C.
func threadError(what string, e syscall.Errno) error {
	switch e {
	case 0:
		return nil
	case syscall.ENOTSUP:
		return fmt.Errorf("%w: %s needs a program built with CGO_ENABLED=0", ErrNoSandbox, what)
	}
	return fmt.Errorf("%s: %w", what, e)
}

// prctl makes the call on all threads of the process.
func prctl(what string, option, arg uintptr) error {
	_, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, arg, 0, 0, 0, 0)
	return threadError(what, e)
}

// dropGroups becomes the user's group and leaves all others.
func dropGroups(u *User) error {
	if u == nil || os.Geteuid() != 0 {
		return nil
	}
	if err := syscall.Setgroups([]int{int(u.GID)}); err != nil {
		return fmt.Errorf("leaving all groups but %d: %w", u.GID, err)
	}
	if err := syscall.Setresgid(int(u.GID), int(u.GID), int(u.GID)); err != nil {
		return fmt.Errorf("becoming group %d: %w", u.GID, err)
	}
	return nil
}

func dropUser(u *User) error {
	if u == nil || os.Geteuid() != 0 {
		return nil
	}
	if err := syscall.Setresuid(int(u.UID), int(u.UID), int(u.UID)); err != nil {
		return fmt.Errorf("becoming user %d: %w", u.UID, err)
	}
	// The kernel would have to be wrong, but nothing that follows is worth anything if it is.
	if u.UID != 0 && syscall.Setresuid(-1, 0, -1) == nil {
		return fmt.Errorf("becoming user %d: the way back to root is open", u.UID)
	}
	return nil
}

// dropBounding makes sure that no program that the process may start has a capability. A process that may not say so has
// nothing that it could pass on but what dropCapabilities takes.
func dropBounding() error {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		return fmt.Errorf("reading capabilities: %w", err)
	}
	if data[unix.CAP_SETPCAP/32].Effective&(1<<(unix.CAP_SETPCAP%32)) == 0 {
		return nil
	}
	for c := uintptr(0); ; c++ {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil {
			return nil // past the last capability of this kernel
		}
		if has == 0 {
			continue
		}
		if err := prctl("dropping a capability", unix.PR_CAPBSET_DROP, c); err != nil {
			return err
		}
	}
}

// dropCapabilities gives up all capabilities, also those that a service manager had passed on.
func dropCapabilities() error {
	err := prctl("dropping ambient capabilities", unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL)
	if err != nil {
		return err
	}
	head := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	none := &[2]unix.CapUserData{}
	// Pointers have to become numbers in the call itself, where the compiler keeps them in place.
	_, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(head)), uintptr(unsafe.Pointer(none)), 0)
	return threadError("dropping all capabilities", e)
}
