//go:build !linux && !darwin

package daemon

import "net"

const knowsPeers = false

func peerUser(net.Conn) (uint32, error) { return 0, errNoPeers }
