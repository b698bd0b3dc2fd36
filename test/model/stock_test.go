package model

import (
	"os/exec"

	"github.com/droverproject/drover/test/peer"
)

func stockCommand(args ...string) *exec.Cmd { return exec.Command(peer.Path("qemu-img"), args...) }
