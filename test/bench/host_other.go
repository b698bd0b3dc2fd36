//go:build !linux

package main

import "errors"

var errLinuxOnly = errors.New("servers are measured on Linux only")

func allocated(string) (int64, error) { return 0, errLinuxOnly }

func warm(string) error { return errLinuxOnly }
