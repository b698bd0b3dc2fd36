package scripts

import (
	"os"
	"testing"

	"github.com/droverproject/drover/test/harness"
)

// TestVirtTools: the virt tools of libguestfs make, shrink and grow file systems in images, in a virtual machine of their
// own (libguestfs' appliance). That takes minutes without KVM, and an appliance: it runs with DROVER_GUESTFS=1.
func TestVirtTools(t *testing.T) {
	if os.Getenv("DROVER_GUESTFS") == "" {
		t.Skip("it starts virtual machines: DROVER_GUESTFS=1 runs it")
	}
	s := script{
		name: "virt-tools", wants: []string{"virt-make-fs", "virt-sparsify", "virt-resize", "guestfish"},
		calls: []string{"qemu-img"}, dates: true, text: virtTools,
	}
	s.skip(t)
	compare(t, s, s.run(t, stock(t)), s.run(t, links(t, harness.Binary(t))))
}

const virtTools = `
export LIBGUESTFS_BACKEND=direct
mkdir tree; seq 100000 >tree/numbers; md5sum <tree/numbers
virt-make-fs --partition=mbr -F qcow2 -t ext2 -s +20M tree made.qcow2
virt-sparsify --quiet --convert qcow2 --compress made.qcow2 sparse.qcow2
qemu-img create -q -f qcow2 grown.qcow2 80M
virt-resize --quiet --expand /dev/sda1 sparse.qcow2 grown.qcow2
guestfish --ro -a grown.qcow2 -m /dev/sda1 -- checksum md5 /numbers : blockdev-getsize64 /dev/sda1
`
