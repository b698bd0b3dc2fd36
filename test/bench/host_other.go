//go:build !linux

package main

import (
	"errors"
	"time"
)

var errLinuxOnly = errors.New("servers are measured on Linux only")

func allocated(string) (int64, error) { return 0, errLinuxOnly }

func warm(string) error { return errLinuxOnly }

func chill(string) error { return errLinuxOnly }

func processTime(int) (time.Duration, error) { return 0, errLinuxOnly }

func processors() ([]int, error) { return nil, errLinuxOnly }
