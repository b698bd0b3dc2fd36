package cli

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNodesLikeQEMU: what descriptions of nodes and names with protocols mean, and how they are refused.
func TestNodesLikeQEMU(t *testing.T) {
	images(t)
	put(t, "rules", "[inject-error]\nevent = \"none\"\nerrno = \"5\"\nsector = \"2\"\n")
	described := []string{
		"", "base", "file=base", "filename=base", "driver=qcow2", "driver=qcow2,file=base", "driver=qcow2,file.driver=file",
		"driver=file,filename=base", "driver=raw,file.filename=base", "file.filename=base,,x", "file.filename=,x=1",
		"driver=raw,file.filename=raw,offset=x", "driver=raw,file.filename=raw,size=2M", "driver=raw,file.filename=raw,size=513",
		"driver=qcow2,file.filename=base,foo=1", "driver=qcow2,file.filename=base,file.foo=1", "driver=nope,file.filename=base",
		"driver=qcow2,file.driver=nope,file.filename=base", "file.filename=base,read-only=maybe", "file.filename=base,discard=maybe",
		"file.filename=base,detect-zeroes=maybe", "file.filename=base,detect-zeroes=unmap", "file.filename=base,cache.direct=maybe",
		"file.filename=base,node-name=1x", "file.filename=base,node-name=x,file.node-name=y", "file.filename=base,file.locking=1x",
		"file.filename=base,file.locking=off", "file.filename=base,file.aio=1x", "file.filename=base,force-share=on", "file.filename=base,x",
		"driver=qcow2,file.filename=base,l2-cache-size=x", "driver=host_device,filename=base", "driver=nbd", "driver=nbd,port=1",
		"driver=nbd,path=/nonexist,host=x", "driver=nbd,path=/nonexist", "driver=nbd,server.type=foo,server.path=/nonexist",
		"driver=nbd,server.type=unix", "driver=nbd,server.type=inet,server.host=localhost", "driver=nbd,host=localhost,port=1",
		"driver=nbd,path=/nonexist,tls-creds=x", "driver=qcow2,file.driver=nbd,file.path=/nonexist",
		"driver=blkdebug", "driver=blkdebug,image.filename=base", "driver=blkdebug,image.filename=base,foo=1",
		"driver=qcow2,file.driver=blkdebug,file.image.filename=base",
		"driver=blkdebug,image.filename=base,align=3", "driver=blkdebug,image.filename=base,inject-error.0.event=foo",
		"driver=blkdebug,image.filename=base,inject-error.0.event=read_aio,inject-error.0.errno=x", "driver=null-aio",
		"driver=throttle,file.filename=base", "driver=throttle,throttle-group=x,file.filename=base", "driver=compress,file.filename=base",
		"driver=copy-on-read,file.filename=base", "driver=blkverify", "driver=blkverify,raw.filename=raw,test.driver=raw,test.file.filename=raw",
	}
	names := []string{
		`json:{"file":{"filename":"overlay"}}`, `json:{"file.filename":"overlay","driver":"qcow2"}`, `json:{'driver':'qcow2','file':{'filename':'base'}}`,
		`json:{"file":{"filename":"overlay"}`, `json:[1]`, `json:`, `json:{}`, `json:{"driver":"qcow2","file":{"filename":"base"},"foo":[1,{"a":"b"}]}`,
		"nbd:foo", "nbd:", "nbd:localhost:1", "nbd:unix:/nonexist", "nbd:unix:", "nbd://localhost:1/x", "nbd+unix:///x",
		"nbd://localhost:1/x?foo=1", "nbd+unix://host/x?socket=/n", "nbd+unix:///x?socket=/n", "blkdebug::base", "blkdebug:rules:raw",
		"blkdebug:base", "blkdebug:nofile:base", "blkdebug::nofile", "null-co://", "null-co://x", "null-co:x", "null-aio://", "blkverify:x",
		"blkverify:raw:raw",
	}
	for _, command := range []string{"info", "map"} {
		for _, d := range described {
			if d == "driver=raw,file.filename=raw,size=513" && command == "map" {
				continue // stock fails an assertion
			}
			sameAsQEMU(t, command, "--image-opts", d)
		}
		for _, name := range names {
			if name != "blkverify:raw:raw" || command != "map" {
				sameAsQEMU(t, command, name)
			}
		}
	}
	sameAsQEMU(t, "map", "--image-opts", "driver=blkdebug,image.driver=qcow2,image.file.filename=overlay")
	for _, d := range []string{
		"file.filename=overlay,backing=", "file.filename=overlay,backing=x", "file.filename=overlay,backing.driver=raw",
		"file.filename=overlay,backing.x=1", "file.filename=top,backing.backing.driver=raw", "driver=qcow2,file.filename=base,backing.file.filename=overlay",
	} {
		sameAsQEMU(t, "info", "--image-opts", d)
	}
	for _, d := range []string{"file.filename=overlay,backing=x", "file.filename=overlay,backing.driver=raw", "file.filename=top,backing.backing.driver=raw"} {
		sameAsQEMU(t, "map", "--output=json", "--image-opts", d)
	}
	sameAsQEMU(t, "map", "--output=json", `json:{"file":{"filename":"overlay"},"backing":null}`)
	sameAsQEMU(t, "map", "--output=json", "--image-opts", "driver=raw,file.filename=raw,offset=1024,size=64k")
	sameAsQEMU(t, "map", "--output=json", "--image-opts", "driver=null-co,size=1M")
	sameAsQEMU(t, "map", "--output=json", "--image-opts", "driver=null-co,size=1M,read-zeroes=on")
	sameAsQEMU(t, "compare", "--image-opts", "driver=qcow2,file.filename=overlay", "driver=qcow2,file.driver=blkdebug,file.image.filename=overlay")
	sameAsQEMU(t, "measure", "-O", "qcow2", `json:{"driver":"qcow2","file":{"filename":"overlay"}}`)
}

// serveStock has qemu-nbd serve a file until the test ends, and returns the socket.
func serveStock(t *testing.T, args ...string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	path, err := exec.LookPath("qemu-nbd")
	if err != nil {
		t.Skip("qemu-nbd is not installed")
	}
	cmd := exec.Command(path, append([]string{"-t", "-e", "8", "-k", socket}, args...)...)
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // which reports the signal
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) { // nothing tells when another program listens
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
			return socket
		}
		if time.Now().After(deadline) {
			t.Fatalf("qemu-nbd does not listen: %v\n%s", err, &out)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	put(t, to, string(b))
}

// TestExportsLikeQEMU: images on servers, as raw disks and with a format on top.
func TestExportsLikeQEMU(t *testing.T) {
	images(t)
	copyFile(t, "base", "served")
	if err := os.Truncate("served", 8<<20); err != nil {
		t.Fatal(err)
	}
	bytesOf := "nbd:unix:" + serveStock(t, "-f", "raw", "served")
	disk := "nbd+unix:///x?socket=" + serveStock(t, "-r", "-f", "qcow2", "-A", "-B", "b0", "-x", "x", "-D", "text", "snap")
	for _, name := range []string{bytesOf, disk, strings.Replace(disk, "///x?", "///y?", 1)} {
		for _, command := range []string{
			"info", "info --output=json", "map", "map --output=json", "check", "snapshot -l", "measure -O qcow2", "compare served", "map -f raw --output=json",
		} {
			sameAsQEMU(t, append(strings.Fields(command), name)...)
		}
	}
	socket := strings.TrimPrefix(disk, "nbd+unix:///x?socket=")
	for _, context := range []string{"qemu:dirty-bitmap:b0", "qemu:allocation-depth"} {
		sameAsQEMU(t, "map", "--output=json", "--image-opts", "driver=nbd,export=x,path="+socket+",x-dirty-bitmap="+context)
	}
	if o := drover(t, "map", "--image-opts", "driver=nbd,export=x,path="+socket+",x-dirty-bitmap=foo"); o.code != 1 ||
		!strings.Contains(o.stderr, "requested x-dirty-bitmap foo not found") {
		t.Errorf("an unknown bitmap: %+v", o)
	}
	identical := func(a, b string) {
		t.Helper()
		if o := tool(t, "qemu-img", "compare", a, b); o.code != 0 {
			t.Errorf("%s and %s: %s%s", a, b, o.stdout, o.stderr)
		}
	}
	mustDrover(t, "convert", "-O", "qcow2", disk, "copy")
	identical(disk, "copy")
	mustDrover(t, "convert", "-n", "-O", "qcow2", "overlay", bytesOf)
	identical("overlay", bytesOf)
	mustTool(t, "qemu-img", "check", bytesOf)
	for _, command := range []string{
		"create -f raw TARGET 1M", "create -f raw TARGET 10G", "create -f qcow2 -o cluster_size=4k TARGET 1M", "info TARGET", "check TARGET",
		"convert -O qcow2 base TARGET", "check TARGET", "compare base TARGET", "create -f qcow2 -b TARGET -F qcow2 ontop", "info ontop",
		"resize -f raw TARGET 64k",
	} {
		sameAsQEMU(t, strings.Fields(strings.ReplaceAll(command, "TARGET", bytesOf))...)
	}
}

// TestQCOW1LikeQEMU: images of the first version of the format.
func TestQCOW1LikeQEMU(t *testing.T) {
	images(t)
	mustTool(t, "qemu-img", "convert", "-O", "qcow", "overlay", "old")
	_ = exec.Command("qemu-img", "convert", "-c", "-O", "qcow", "overlay", "oldcompressed").Run() // makes it, and then fails without a word
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow", "-b", "overlay", "-F", "qcow2", "oldtop")
	mustTool(t, "qemu-io", "-f", "qcow", "-c", "write -P 9 10k 5k", "oldtop")
	mustTool(t, "qemu-img", "create", "-q", "-u", "-f", "qcow", "-b", "missing", "-F", "raw", "oldorphan", "1M")
	for _, name := range []string{"old", "oldcompressed", "oldtop", "oldorphan"} {
		for _, command := range []string{"info", "info --output=json", "info -f qcow", "info -f qcow2", "info --backing-chain", "map", "map --output=json", "check",
			"measure -O qcow2", "compare overlay"} {
			switch {
			case name == "oldcompressed" && command == "map":
				continue // the same, but the error comes before the output there
			case name == "oldorphan" && command == "check":
				continue // stock opens what is below before it says that it has nothing to check
			}
			sameAsQEMU(t, append(strings.Fields(command), name)...)
		}
	}
	sameAsQEMU(t, "info", "-f", "qcow", "base")
	sameAsQEMU(t, "info", "-f", "qcow", "raw")
	sameAsQEMU(t, "info", "--image-opts", "driver=qcow,file.filename=old,x=1")
	for _, name := range []string{"old", "oldcompressed", "oldtop"} {
		mustDrover(t, "convert", "-O", "qcow2", name, "new")
		mustTool(t, "qemu-img", "compare", name, "new")
		mustTool(t, "qemu-img", "check", "new")
	}
}

// TestDebuggingLikeQEMU: requests that are made to fail, to wait, or to be compared.
func TestDebuggingLikeQEMU(t *testing.T) {
	all := ioImages(t)
	all["rules"] = "[inject-error]\nevent = \"write_aio\"\nerrno = \"5\"\nonce = \"on\"\n\n[set-state]\nevent = \"read_aio\"\nstate = \"1\"\nnew_state = \"2\"\n"
	const node = "driver=qcow2,file.driver=blkdebug,file.image.filename=disk"
	const work = "read 0 4k; write -P 3 0 4k; write -P 3 768k 4k; flush; read -P 3 768k 4k"
	var cases []ioCase
	for _, event := range []string{"write_aio", "read_aio", "l2_update", "l2_load", "cluster_alloc", "flush_to_os", "pwritev", "refblock_load", "cow_read", "l1_update"} {
		file := node + ",file.inject-error.0.event=" + event + ",file.inject-error.0.errno=28,file.inject-error.0.once=on"
		cases = append(cases, ioCase{args: "--image-opts", commands: work, file: file})
	}
	cases = append(cases,
		ioCase{args: "--image-opts", file: node, commands: "break write_aio A; aio_write -P 7 0 64k; wait_break A; resume A; aio_flush; read -P 7 0 64k"},
		ioCase{args: "--image-opts", file: node, commands: "break foo A; resume A; remove_break A; break write_aio A; remove_break A; write 0 1k"},
		ioCase{
			args: "--image-opts", commands: "read 0 64k; write 0 1k; read 64k 64k",
			file: node + ",file.inject-error.0.event=none,file.inject-error.0.sector=640,file.inject-error.0.iotype=read",
		},
		ioCase{commands: "write 0 1k; write 0 1k", file: "blkdebug:rules:disk"},
		ioCase{args: "-f raw", commands: "write 0 1k; write 0 1k", file: "blkdebug:rules:raw"},
		ioCase{commands: "read 0 1k; write 0 1k; write -z 0 4M; discard 0 1M", file: "null-co://"},
		ioCase{args: "--image-opts", commands: "read -P 0 0 1k; write 900k 200k", file: "driver=null-co,size=1M,read-zeroes=on"},
		ioCase{args: "--image-opts", commands: "read 64k 128k; alloc 0 1M; map", file: "driver=copy-on-read,file.driver=qcow2,file.file.filename=over"},
		ioCase{args: "--image-opts --object throttle-group,id=g,x-iops-total=1000", commands: "write -P 6 0 64k; read -P 6 0 64k",
			file: "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename=disk"},
		ioCase{args: "--image-opts", commands: "write -P 6 0 64k; read -P 6 0 64k", file: "driver=qcow2,file.driver=preallocate,file.file.filename=disk"},
		ioCase{args: "--image-opts", commands: "write -P 6 0 64k; read -P 6 0 64k; length", file: "driver=raw,offset=64k,size=512k,file.filename=raw"},
		ioCase{args: "--image-opts", commands: "write 0 64k", file: "driver=qcow2,read-only=on,file.filename=disk"},
		ioCase{args: "--image-opts", commands: "write -P 0 0 64k; map", file: "driver=qcow2,detect-zeroes=on,file.filename=disk"},
		ioCase{args: "--image-opts", commands: "write -P 0 0 64k; map", file: "driver=qcow2,detect-zeroes=unmap,discard=unmap,file.filename=disk"},
	)
	for _, c := range cases {
		sameIO(t, all, c)
	}
}
