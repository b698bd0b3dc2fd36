package cli

import (
	"strings"
	"testing"
)

func TestMeasureLikeQEMU(t *testing.T) {
	images(t)
	mustTool(t, "qemu-img", "bitmap", "--add", "-g", "512", "base", "a bitmap with a long name")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write 70k 1k", "-c", "write 300k 200k", "-c", "write 5G 3M", "odd")
	for _, size := range []string{"0", "1", "1000", "1M", "1G", "1.5G", "1T", "3P", "100P", "x", "-1"} {
		for _, options := range []string{"", "-O qcow2", "-O qcow2 -o cluster_size=512", "-O qcow2 -o cluster_size=2M,refcount_bits=1",
			"-O qcow2 -o extended_l2=on,cluster_size=16k", "-O qcow2 -o refcount_bits=64", "-O qcow2 -o compat=0.10",
			"-O qcow2 -o preallocation=full", "-O qcow2 -o preallocation=metadata", "-o preallocation=full"} {
			if size == "1T" && strings.Contains(options, "512") {
				continue
			}
			sameAsQEMU(t, append(append([]string{"measure"}, strings.Fields(options)...), "--size", size)...)
		}
	}
	for _, name := range []string{"raw", "plain", "v2", "odd", "extended", "base", "overlay", "top", "onraw", "snap", "compressed", "empty",
		"missing"} {
		for _, options := range []string{"", "-O qcow2", "-O qcow2 -o cluster_size=4k", "-O qcow2 -o cluster_size=2M", "-O qcow2 --output=json",
			"-O qcow2 -o compat=0.10", "-O qcow2 -o backing_file=x,backing_fmt=raw", "-O qcow2 -o preallocation=falloc", "-U", "-O raw --output=json"} {
			sameAsQEMU(t, append(append([]string{"measure"}, strings.Fields(options)...), name)...)
		}
	}
	for _, args := range []string{
		"", "base base", "--size 1M base", "-f qcow2 --size 1M", "-l one --size 1M", "-O bogus --size 1M", "-O qcow2 -o x=1 --size 1M",
		"-O qcow2 -o cluster_size=4k,extended_l2=on --size 1M", "--output=xml base", "-O qcow2 -l one snap", "-O qcow2 -l nope snap",
		"-O qcow2 -l two snap", "-f bogus base", "--image-opts driver=qcow2,file.filename=base", "-f raw -O qcow2 base",
	} {
		sameAsQEMU(t, append([]string{"measure"}, strings.Fields(args)...)...)
	}
}

func TestMeasureEncryptedLikeQEMU(t *testing.T) {
	images(t)
	const luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
	for _, args := range []string{
		luks + " --size 1G", luks + ",cluster_size=4k --size 1G", luks + " --output=json overlay",
		luks + ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256 base",
		"encrypt.format=luks --size 1G", "encrypt.format=luks,encrypt.key-secret=nosuch --size 1G", "encryption=on --size 1G",
		"encrypt.format=aes,encrypt.key-secret=s base", "encrypt.format=nosuch --size 1G",
		"encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo --size 1G",
	} {
		args := append(append([]string{"measure"}, secretFoo...), append([]string{"-O", "qcow2", "-o"}, strings.Fields(args)...)...)
		want := tool(t, "qemu-img", args...)
		if strings.Contains(want.stderr, "CPU usage") {
			continue // on a busy host qemu-img may fail to find out how fast it is
		}
		want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
		compare(t, args, drover(t, args...), want)
	}
}
