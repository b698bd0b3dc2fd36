package vm

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// programs that jobs use, beside busybox and drover.
var programs = []string{
	"mkfs.ext4", "e2fsck", "fio",
	"sg_inq", "sg_vpd", "sg_readcap", "sg_unmap", "sg_write_same", "sg_compare_and_write", "sg_get_lba_status", "sg_opcodes",
	"sg_luns", "sg_requests", "sg_turs", "sg_sync", "sg_verify", "sg_modes", "sg_raw", "sg_dd", "sg_rtpg", "sg_xcopy",
	"sg_sanitize", "iscsi-test-cu", "iscsi-inq", "dbus-daemon", "dbus-send",
}

// modules that the jobs need. What they depend on is found out.
var modules = []string{
	"virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "configfs", "sd_mod", "sg", "uio", "target_core_mod", "target_core_user",
	"target_core_file", "tcm_loop", "iscsi_target_mod", "nbd",
}

// VM is what Prepare has made.
type VM struct {
	kernel, initrd string
}

// kernelPackage is the metapackage of the kernel for virtual machines.
const kernelPackage = "linux-image-cloud-amd64"

// ErrMissing is wrapped when the host lacks a program.
var ErrMissing = errors.New("missing on this host")

// Prepare fills the cache folder if it is not filled already.
func Prepare(cache string) (*VM, error) {
	for _, p := range append([]string{"qemu-system-x86_64", "apt-get", "dpkg-deb", "busybox", "mke2fs", "debugfs", "ldd"}, programs...) {
		if _, err := lookup(p); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(cache, 0o777); err != nil {
		return nil, err
	}
	tree, err := fetchKernel(cache)
	if err != nil {
		return nil, fmt.Errorf("fetching a kernel: %w", err)
	}
	kernels, err := filepath.Glob(filepath.Join(tree, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return nil, fmt.Errorf("%d kernels in %s", len(kernels), tree)
	}
	vm := &VM{kernel: kernels[0], initrd: filepath.Join(cache, "initrd")}
	if err := vm.writeInitrd(tree); err != nil {
		return nil, fmt.Errorf("making the initial RAM disk: %w", err)
	}
	return vm, nil
}

// lookup finds a program, also where only root has its path.
func lookup(name string) (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode()&0o111 != 0 && !st.IsDir() {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w (see test/peers.sh)", name, ErrMissing)
}

func output(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// fetchKernel downloads and unpacks the kernel's package and returns the folder it is in.
func fetchKernel(cache string) (string, error) {
	tree := filepath.Join(cache, "kernel")
	if _, err := os.Stat(tree); err == nil {
		return tree, nil
	}
	depends, err := output(cache, "apt-cache", "depends", kernelPackage)
	if err != nil {
		return "", err
	}
	name := regexp.MustCompile(`Depends: (linux-image-\S+)`).FindStringSubmatch(depends)
	if name == nil {
		return "", fmt.Errorf("package %s depends on no kernel (is apt-get update needed?)", kernelPackage)
	}
	if _, err := output(cache, "apt-get", "download", name[1]); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(cache, name[1]+"_*.deb"))
	if err != nil || len(debs) == 0 {
		return "", fmt.Errorf("apt-get download left no %s in %s", name[1], cache)
	}
	half := tree + ".part"
	if err := os.RemoveAll(half); err != nil {
		return "", err
	}
	if _, err := output(cache, "dpkg-deb", "-x", debs[0], half); err != nil {
		return "", err
	}
	return tree, os.Rename(half, tree)
}

// writeInitrd packs everything but drover and the job.
func (vm *VM) writeInitrd(tree string) (err error) {
	f, err := os.Create(vm.initrd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a := newArchive(f)
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "disk", "run", "etc/target/pr", "var/target/pr", "usr/share"} {
		a.folder(dir)
	}
	a.link("var/run", "../run")
	if err := addPrograms(a); err != nil {
		return err
	}
	if err := addModules(a, tree); err != nil {
		return err
	}
	a.file("etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\n"))
	a.file("etc/group", []byte("root:x:0:\n"))
	return a.close()
}

func addPrograms(a *archive) error {
	box, err := lookup("busybox")
	if err != nil {
		return err
	}
	data, err := os.ReadFile(box)
	if err != nil {
		return err
	}
	a.file("bin/busybox", data)
	list, err := output("", box, "--list")
	if err != nil {
		return err
	}
	have := make(map[string]bool)
	for _, p := range programs {
		have[p] = true
	}
	for _, applet := range strings.Fields(list) {
		if applet != "busybox" && !have[applet] {
			a.link("bin/"+applet, "busybox")
		}
	}
	packed := make(map[string]bool)
	for _, p := range programs {
		if err := addProgram(a, p, packed); err != nil {
			return err
		}
	}
	return nil
}

var libraries = regexp.MustCompile(`(/\S+) \(0x`)

// addProgram packs a program and the libraries that it needs, under the names by which they are looked for.
func addProgram(a *archive, name string, packed map[string]bool) error {
	file, err := lookup(name)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	a.file("bin/"+name, data)
	needs, err := output("", "ldd", file)
	if err != nil {
		return err
	}
	for _, m := range libraries.FindAllStringSubmatch(needs, -1) {
		if packed[m[1]] {
			continue
		}
		packed[m[1]] = true
		data, err := os.ReadFile(m[1])
		if err != nil {
			return err
		}
		a.file(m[1], data)
	}
	return nil
}

// addModules packs the modules and the order to load them in.
func addModules(a *archive, tree string) error {
	files := make(map[string]string)
	err := filepath.WalkDir(filepath.Join(tree, "lib/modules"), func(name string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(name, ".ko") {
			files[strings.ReplaceAll(strings.TrimSuffix(filepath.Base(name), ".ko"), "-", "_")] = name
		}
		return err
	})
	if err != nil {
		return err
	}
	var order []string
	seen := make(map[string]bool)
	var visit func(string) error
	visit = func(name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		file, ok := files[name]
		if !ok {
			return nil // built into the kernel
		}
		needs, err := moduleNeeds(file)
		if err != nil {
			return err
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return err
			}
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		a.file("modules/"+name+".ko", data)
		order = append(order, name)
		return nil
	}
	for _, m := range modules {
		if err := visit(m); err != nil {
			return err
		}
	}
	a.file("modules/order", []byte(strings.Join(order, "\n")+"\n"))
	return nil
}

// moduleNeeds reads which modules one depends on.
func moduleNeeds(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s has no .modinfo", file)
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, entry := range strings.Split(string(data), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
