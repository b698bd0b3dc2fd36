//go:build unix

package qemunbd

import (
	"strings"
	"testing"
)

// TestMistakes compares what the two say of command lines that they refuse. DIR stands for the folder with the images.
func TestMistakes(t *testing.T) {
	programs := both(t)
	dir := t.TempDir()
	images(t, dir)
	long := strings.Repeat("n", 4097)
	for _, args := range []string{
		"", "--nope", "--nope=x", "-y", "-ry", "-p", "--port", "--s disk.qcow2", "--snap", "--read-only=x disk.qcow2", "a b", "-- -r -t",
		"-e x disk.qcow2", "-e -1 disk.qcow2", "-e 0x disk.qcow2", "-k s disk.qcow2", "-o x disk.qcow2", "-o 20M disk.qcow2",
		"-n --cache=none disk.qcow2", "--cache=none --cache=none disk.qcow2", "--cache=foo disk.qcow2", "--aio=foo disk.qcow2",
		"--aio=native --aio=native disk.qcow2", "--discard=foo disk.qcow2", "--discard=on --discard=on disk.qcow2",
		"--detect-zeroes=foo disk.qcow2", "--detect-zeroes=unmap disk.qcow2", "--detect-zeroes=unmap --discard=unmap disk.qcow2",
		"-x " + long + " disk.qcow2", "-D " + long + " disk.qcow2",
		"-l snapshot.id=1,foo=2 disk.qcow2", "-l snapshot.foo=2 disk.qcow2",
		"-L disk.qcow2", "-L -f raw", "-L -A", "-L -B x", "-L -x n", "-L -D d", "-L -o 512", "-L -c /dev/nbd0", "-L -d", "-L -l s",
		"-L -n", "-L --aio=threads", "-L --discard=on", "-L --fork",
		"--tls-creds=t disk.qcow2", "--tls-authz=t disk.qcow2", "--tls-hostname=t disk.qcow2", "--tls-hostname=t --tls-creds=t disk.qcow2",
		"-L --tls-authz=t", "-L --tls-hostname=t", "-L --tls-creds=t",
		"--object foo", "--object foo,id=x", "--object tls-creds-x509", "--object tls-creds-x509,id=t",
		"--object tls-creds-x509,id=1", "--object tls-creds-x509,id=t,endpoint=x", "--object tls-creds-x509,id=t,foo=x",
		"--object tls-creds-x509,id=t,dir=/nowhere,endpoint=server", "--object tls-creds-x509,id=t,dir=/nowhere",
		"--object authz-simple,id=z", "--object authz-list,id=z,policy=x", "--object authz-listfile,id=z", "--object authz-pam,id=z,service=x",
		"--object authz-list,id=z --object authz-list,id=z", "--object secret,id=s,data=x --tls-creds s disk.qcow2",
		"--object authz-simple,id=z,identity=x --tls-authz z disk.qcow2", "--object secret,id=s", "--object secret,data=x",
		"-d", "-d /nowhere/nbd0", "-c /nowhere/nbd0 -v disk.qcow2", "-c /nowhere/nbd0 disk.qcow2",
		"-L -k DIR/none", "-L -p nope", "-L -b nowhere.invalid", "-p nope disk.qcow2", "-b nowhere.invalid disk.qcow2",
		"-k /nowhere/s disk.qcow2", "--selinux-label=x -k DIR/s disk.qcow2",
		"-k DIR/s none.qcow2", "-k DIR/s -f foo disk.qcow2", "-k DIR/s -f qcow2 disk.raw", "-k DIR/s --image-opts -f raw disk.raw",
		"-k DIR/s --image-opts foo=1", "-k DIR/s --image-opts driver=foo", "-k DIR/s --image-opts driver=qcow2,file.filename=none",
		"-k DIR/s --aio=native disk.qcow2", "-k DIR/s -f raw -o 2097153 disk.raw", "-k DIR/s -f raw -o -1 disk.raw",
		"-k DIR/s -f raw -l x disk.raw", "-k DIR/s -l x disk.qcow2", "-k DIR/s -l snapshot.id=7 disk.qcow2",
		"-k DIR/s -l snapshot.name=x,snapshot.id=1 disk.qcow2", "-k DIR/s -s -l before disk.qcow2",
		"-k DIR/s -B x disk.qcow2", "-k DIR/s -B b1 disk.raw", "-k DIR/s -B b1 -o 512 disk.qcow2", "-k DIR/s --pid-file=/nowhere/pid disk.qcow2",
		"--fork -k DIR/s none.qcow2", "--fork -k /nowhere/s disk.qcow2", "--fork -k DIR/s --pid-file=/nowhere/pid disk.qcow2",
	} {
		t.Run(strings.ReplaceAll(strings.ReplaceAll(args, long, "LONG"), "/", "|"), func(t *testing.T) {
			line := strings.Fields(strings.ReplaceAll(args, "DIR", dir))
			want, got := programs[0].run(t, dir, line...), programs[1].run(t, dir, line...)
			if got != want {
				t.Errorf("qemu-nbd %.200s\nstock %+v\nours  %+v", args, want, got)
			}
			if want.code == 0 {
				t.Error("stock takes it")
			}
		})
	}
}

// TestDetachOfNoDevice says that what cannot be connected is disconnected.
func TestDetachOfNoDevice(t *testing.T) {
	programs := both(t)
	want, got := programs[0].run(t, "", "-d", "/dev/null"), programs[1].run(t, "", "-d", "/dev/null")
	if got != want || want.code != 0 {
		t.Errorf("stock %+v, ours %+v", want, got)
	}
}
