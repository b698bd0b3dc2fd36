package daemon

import (
	"errors"
	"runtime"
)

// errNoPeers is why there is no control API on some hosts.
var errNoPeers = errors.New("the control API must know who is asking, and " + runtime.GOOS + " does not say who connects to a unix socket")
