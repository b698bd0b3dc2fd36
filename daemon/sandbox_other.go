//go:build !linux

package daemon

import (
	"fmt"
	"runtime"
)

// confine knows the means of Linux only.
func confine(c Confinement) ([]string, error) {
	if c.User != nil || !c.BestEffort {
		return nil, fmt.Errorf("%w: there is none for %s", ErrNoSandbox, runtime.GOOS)
	}
	return []string{"there is no sandbox for " + runtime.GOOS}, nil
}
