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
	sockets string   // those of a service manager that a background process has, as LISTEN_FDS
}

// theStage finds out once, since the variables must not reach processes that this one starts.
var theStage = sync.OnceValue(func() *stage {
	s := new(stage)
	fd, err := strconv.Atoi(os.Getenv(backgroundEnv))
	if err == nil && fd > 2 {
		s.ready = os.NewFile(uintptr(fd), "readiness")
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
	if err := detachTerminal(); err != nil {
		return fmt.Errorf("going into the background: %w", err)
	}
	_, err := s.ready.Write([]byte{1})
	return errors.Join(err, s.ready.Close())
}

// background starts this program once more, with the same arguments and, of a service manager, so many sockets. It returns
// when that process works, or what came of it if it did not.
func (a *app) background(args []string, sockets int) error {
	ready, readyEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	said, sayEnd, err := os.Pipe()
	if err != nil {
		return errors.Join(err, ready.Close(), readyEnd.Close())
	}
	cmd := exec.Command(self())
	cmd.Args = append([]string{a.name}, args...)
	cmd.Stdout, cmd.Stderr = sayEnd, sayEnd
	cmd.SysProcAttr = ownSession()
	for fd := 3; fd < 3+sockets; fd++ {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "socket"))
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, readyEnd)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", backgroundEnv, 2+len(cmd.ExtraFiles)))
	if sockets > 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", passedEnv, sockets))
	}
	err = cmd.Start()
	// What the process has is its own now; what it says ends when it has let go of it.
	err = errors.Join(err, readyEnd.Close(), sayEnd.Close())
	if err != nil {
		return errors.Join(err, ready.Close(), said.Close())
	}
	return a.await(cmd, ready, said)
}

// await passes on what a process says until it works, or has ended.
func (a *app) await(cmd *exec.Cmd, ready, said *os.File) error {
	_, err := io.Copy(a.err, said)
	var word [1]byte
	n, _ := ready.Read(word[:]) // nothing if the process has ended
	err = errors.Join(err, ready.Close(), said.Close())
	if n > 0 {
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
