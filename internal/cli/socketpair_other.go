//go:build !unix

package cli

import (
	"net"

	"github.com/droverproject/drover/internal/nbddev"
)

func socketPair() (a, b net.Conn, err error) { return nil, nil, nbddev.ErrUnsupported }
