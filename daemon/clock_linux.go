package daemon

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// sinceBoot is the time that a service manager wants to know with a change of state.
func sinceBoot() string {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return ""
	}
	return fmt.Sprintf("\nMONOTONIC_USEC=%d", ts.Nano()/1000)
}
