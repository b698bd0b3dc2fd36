package main

import (
	"os"
	"syscall"
)

// peakMemory returns how much memory a process had at the most, in MiB.
func peakMemory(p *os.ProcessState) float64 {
	u, ok := p.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0
	}
	return float64(u.Maxrss) / 1024
}
