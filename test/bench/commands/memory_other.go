//go:build !linux

package main

import (
	"os"
	"time"
)

// peakMemory is not found out here.
func peakMemory(*os.ProcessState) float64 { return 0 }

// ownCPU is not found out here.
func ownCPU() time.Duration { return 0 }
