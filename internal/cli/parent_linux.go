package cli

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// watchParent calls stop when the process that started this one has ended.
func watchParent(ctx context.Context, stop func()) error {
	parent := os.Getppid()
	fd, err := unix.PidfdOpen(parent, 0)
	if errors.Is(err, unix.ESRCH) || os.Getppid() != parent {
		stop() // it was quick
		return nil
	}
	if err != nil {
		return fmt.Errorf("watching the process that started this one: %w", err)
	}
	go func() {
		defer unix.Close(fd)  //nolint:errcheck // there is nothing in it to lose
		const patience = 1000 // milliseconds until ctx is looked at again
		for ctx.Err() == nil {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, patience)
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				stop()
				return
			}
		}
	}()
	return nil
}
