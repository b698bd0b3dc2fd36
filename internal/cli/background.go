package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
)

// A process that goes into the background is this program once more, since a process with threads cannot be divided. These
// variables tell it so. Both are gone when it has read them.
const (
	backgroundEnv = "DROVER_BACKGROUND"         // the descriptor on which it says that it is ready
	passedEnv     = "DROVER_BACKGROUND_SOCKETS" // how many sockets of a service manager it has, from descriptor 3
)

// stage is what this process was started as.
type stage struct {
	ready   *os.File // nil in the foreground
	null    *os.File // opened before a sandbox may forbid it
	sockets string   // those of a service manager that a background process has, as LISTEN_FDS
}

// theStage finds out once, since the variables must not reach processes that this one starts.
var theStage = sync.OnceValue(func() *stage {
	s := new(stage)
	fd, err := strconv.Atoi(os.Getenv(backgroundEnv))
	if err == nil && fd > 2 {
		s.ready = os.NewFile(uintptr(fd), "readiness")
		s.null, _ = os.OpenFile(os.DevNull, os.O_RDWR, 0) // without it the terminal stays
		s.sockets = os.Getenv(passedEnv)
	}
	for _, name := range []string{backgroundEnv, passedEnv} {
		_ = os.Unsetenv(name) // it fails for names that are none
	}
	return s
})

// enterBackground gives the process the name by which people look for it. It reports whether this is the process that was put there.
func (a *app) enterBackground() bool {
	if theStage().ready == nil {
		return false
	}
	nameProcess(a.name)
	return true
}

// activationEnv is os.Getenv for what systemd says of sockets, which a process in the background has from its parent.
func activationEnv(name string) string {
	if s := theStage(); s.sockets != "" {
		switch name {
		case "LISTEN_PID":
			return strconv.Itoa(os.Getpid())
		case "LISTEN_FDS":
			return s.sockets
		}
	}
	return os.Getenv(name)
}

// inForce tells the process that waits that this one does its work now, and lets go of its terminal. In the foreground it
// does nothing.
func inForce() error {
	s := theStage()
	if s.ready == nil {
		return nil
	}
	if s.null != nil {
		if err := errors.Join(detachTerminal(s.null), s.null.Close()); err != nil {
			return fmt.Errorf("going into the background: %w", err)
		}
	}
	_, err := s.ready.Write([]byte{1})
	return errors.Join(err, s.ready.Close())
}

// background starts this program once more, with the same arguments and, of a service manager, so many sockets. It returns
// when that process works, or what came of it if it did not.
func (a *app) background(args []string, sockets int) (err error) {
	var ours, theirs []*os.File // ends of the three pipes: readiness, output, errors
	defer func() {
		for _, f := range append(ours, theirs...) {
			if cerr := f.Close(); cerr != nil && !errors.Is(cerr, os.ErrClosed) {
				err = errors.Join(err, cerr)
			}
		}
	}()
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		ours, theirs = append(ours, r), append(theirs, w)
	}
	cmd := exec.Command(self())
	cmd.Args = append([]string{a.name}, args...)
	cmd.Stdout, cmd.Stderr = theirs[1], theirs[2]
	cmd.SysProcAttr = ownSession()
	for fd := 3; fd < 3+sockets; fd++ {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "socket"))
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, theirs[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", backgroundEnv, 2+len(cmd.ExtraFiles)))
	if sockets > 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", passedEnv, sockets))
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	// What the process has is its own now; what it says ends when it has let go of it.
	for _, f := range theirs {
		err = errors.Join(err, f.Close())
	}
	return errors.Join(err, a.await(cmd, ours[0], ours[1], ours[2]))
}

// await passes on what a process says until it works, or has ended.
func (a *app) await(cmd *exec.Cmd, ready, output, errs *os.File) error {
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(a.out, output)
		copied <- err
	}()
	_, err := io.Copy(a.err, errs)
	err = errors.Join(err, <-copied)
	var word [1]byte
	if n, _ := ready.Read(word[:]); n > 0 { // nothing if the process has ended
		return errors.Join(err, cmd.Process.Release())
	}
	var exit *exec.ExitError
	switch werr := cmd.Wait(); {
	case errors.As(werr, &exit):
		return errors.Join(err, &exitError{code: max(exit.ExitCode(), 1)})
	default:
		return errors.Join(err, werr)
	}
}
