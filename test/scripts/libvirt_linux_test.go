package scripts

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/droverproject/drover/test/harness"
)

// nobody is whom libvirt's daemon runs as when the test is root's: root's daemon would be that of the whole host.
const nobody = 65534

// TestLibvirt: libvirt's storage driver makes, clones and resizes volumes with qemu-img. Its daemon runs for one user, in a
// folder of its own, without any virtual machine.
func TestLibvirt(t *testing.T) {
	s := script{name: "libvirt", wants: []string{"libvirtd", "virsh"}, calls: []string{"qemu-img"}, as: unprivileged, text: volumes}
	s.skip(t)
	compare(t, s, s.run(t, stock(t)), s.run(t, links(t, reachable(t))))
}

// reachable is a copy of drover that every user may run, wherever the one under test is.
func reachable(t *testing.T) string {
	t.Helper()
	path := filepath.Join(openDir(t), "drover")
	harness.CopyFile(t, harness.Binary(t), path)
	harness.OK(t, os.Chmod(path, 0o755))
	return path
}

// unprivileged gives a script of root and its folder to nobody.
func unprivileged(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	harness.OK(t, os.Chown(cmd.Dir, nobody, nobody))
	harness.OK(t, os.Chmod(filepath.Join(cmd.Dir, "..", "calls"), 0o666))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}

// The daemon ends by itself when nobody has called it for a while, should the script be killed.
const volumes = `
export HOME=$PWD XDG_RUNTIME_DIR=$PWD/run XDG_CACHE_HOME=$PWD/cache XDG_CONFIG_HOME=$PWD/config LIBVIRT_AUTOSTART=0
mkdir -m 700 run pool
libvirtd --timeout 30 2>daemon.log &
daemon=$!
trap 'kill $daemon; wait $daemon || true' EXIT
volume() { virsh -q -c storage:///session "$@"; }
until volume pool-list >/dev/null 2>&1; do
  kill -0 $daemon || { cat daemon.log; exit 1; }
  sleep 0.1
done
volume pool-create-as p dir --target $PWD/pool
volume vol-create-as p base.qcow2 64M --format qcow2
volume vol-create-as p ahead.qcow2 8M --allocation 8M --format qcow2 --prealloc-metadata
volume vol-create-as p plain.raw 8M --allocation 1M --format raw
printf 'drove%.0s' $(seq 200000) >words
volume vol-upload plain.raw words --pool p
volume vol-create-as p top.qcow2 64M --format qcow2 --backing-vol base.qcow2 --backing-vol-format qcow2
volume vol-clone base.qcow2 clone.qcow2 --pool p
volume vol-resize clone.qcow2 128M --pool p
volume vol-resize clone.qcow2 4096b --delta --pool p
fails volume vol-resize ahead.qcow2 4M --pool p --shrink
cat >features.xml <<'END'
<volume>
  <name>features.qcow2</name><capacity unit='M'>32</capacity>
  <target>
    <format type='qcow2'/><compat>1.1</compat><clusterSize unit='KiB'>128</clusterSize>
    <features><lazy_refcounts/><extended_l2/></features>
  </target>
</volume>
END
volume vol-create p features.xml
sed 's/features.qcow2/converted.qcow2/' features.xml >converted.xml
volume vol-create-from p converted.xml plain.raw --inputpool p
sed 's/features.qcow2/back.raw/; s/qcow2/raw/; /<features>/d; s/<compat>.*//' features.xml >back.xml
volume vol-create-from p back.xml converted.qcow2 --inputpool p
volume pool-refresh p
volume vol-list p --details | awk 'NF { print $1, $2, $4, $5 }'
for image in top features converted; do
  volume vol-dumpxml $image.qcow2 --pool p | grep -E '<(format|capacity|compat|clusterSize|lazy_refcounts|extended_l2)'
done
mv pool/* .
# Where the base was is stored in the image.
qemu-img rebase -u -b base.qcow2 -F qcow2 top.qcow2
`
