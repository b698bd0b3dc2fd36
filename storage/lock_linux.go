package storage

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// QEMU's lock bytes: permission i is held by a read lock on byte lockHeld+i, and denied to others by a read lock on
// byte lockDenied+i. Nobody ever takes a write lock: a conflict is found by asking whether one could be had.
const (
	lockHeld   = 100
	lockDenied = 200
)

// lockState is what this open file description has locked. The locks belong to the description, not to the process
// (F_OFD_*), so two files of one process conflict as two processes would.
type lockState struct {
	off bool // locking=off: nothing is ever locked

	mu     sync.Mutex
	held   Perm
	denied Perm
}

// change moves the locks to mode, passing through the union of the old and the new so that no instant is less
// protected than both. On a conflict the locks are again as they were.
func (l *lockState) change(fd int, name string, mode LockMode) error {
	if l.off {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	held, denied := mode.Hold&PermAll, PermAll&^mode.Share
	oldHeld, oldDenied := l.held, l.denied

	err := l.add(fd, name, held, denied)
	if err == nil {
		err = l.check(fd, name, held, denied)
	}
	if err != nil {
		return errors.Join(err, l.keepOnly(fd, name, oldHeld, oldDenied))
	}
	return l.keepOnly(fd, name, held, denied)
}

// add locks the bytes of held and denied that are not locked yet.
func (l *lockState) add(fd int, name string, held, denied Perm) error {
	for i := range permNames {
		p := Perm(1) << i
		if held&p != 0 && l.held&p == 0 {
			if err := setLock(fd, name, unix.F_RDLCK, lockHeld+i, &LockError{Name: name, Perm: p}); err != nil {
				return err
			}
			l.held |= p
		}
		if denied&p != 0 && l.denied&p == 0 {
			if err := setLock(fd, name, unix.F_RDLCK, lockDenied+i, &LockError{name, p, true}); err != nil {
				return err
			}
			l.denied |= p
		}
	}
	return nil
}

// keepOnly unlocks every byte that is not in held or denied.
func (l *lockState) keepOnly(fd int, name string, held, denied Perm) error {
	for i := range permNames {
		p := Perm(1) << i
		if l.held&p != 0 && held&p == 0 {
			if err := setLock(fd, name, unix.F_UNLCK, lockHeld+i, nil); err != nil {
				return err
			}
			l.held &^= p
		}
		if l.denied&p != 0 && denied&p == 0 {
			if err := setLock(fd, name, unix.F_UNLCK, lockDenied+i, nil); err != nil {
				return err
			}
			l.denied &^= p
		}
	}
	return nil
}

// check looks for others that deny what we hold or hold what we deny. Both sides lock first and look afterwards, so of
// two that race at least one sees the other.
func (l *lockState) check(fd int, name string, held, denied Perm) error {
	for i := range permNames {
		if p := Perm(1) << i; held&p != 0 {
			if err := testLock(fd, name, lockDenied+i, &LockError{Name: name, Perm: p}); err != nil {
				return err
			}
		}
	}
	for i := range permNames {
		if p := Perm(1) << i; denied&p != 0 {
			if err := testLock(fd, name, lockHeld+i, &LockError{name, p, true}); err != nil {
				return err
			}
		}
	}
	return nil
}

// setLock sets or clears the lock of one byte; conflict is returned when another owner has it write-locked.
func setLock(fd int, name string, typ int16, byteOff int, conflict *LockError) error {
	lk := unix.Flock_t{Type: typ, Whence: unix.SEEK_SET, Start: int64(byteOff), Len: 1}
	err := retryEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	if conflict != nil && (err == unix.EAGAIN || err == unix.EACCES) {
		return conflict
	}
	if err != nil {
		return fmt.Errorf("locking byte %d of %s: %w", byteOff, name, err)
	}
	return nil
}

// testLock returns conflict when any other owner has a lock on the byte.
func testLock(fd int, name string, byteOff int, conflict *LockError) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: int64(byteOff), Len: 1}
	err := retryEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk) })
	if err != nil {
		return fmt.Errorf("testing the lock on byte %d of %s: %w", byteOff, name, err)
	}
	if lk.Type != unix.F_UNLCK {
		return conflict
	}
	return nil
}

// retryEINTR calls fn until it is not interrupted by a signal.
func retryEINTR(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}
