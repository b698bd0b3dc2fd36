package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// toolPackages are what the jobs need that is too large for the initial RAM disk: a small Debian of its own, for tcmu-runner
// and for targetcli with its Python. The list is written out, so that nothing comes along but what runs.
var toolPackages = []string{
	"libc6", "libgcc-s1", "zlib1g", "liblzma5", "libzstd1", "libssl3", "libffi8", "libpcre2-8-0", "libmount1", "libselinux1", "libblkid1",
	"libglib2.0-0", "libnl-3-200", "libnl-genl-3-200", "libkmod2", "kmod", "libudev1",
	"tcmu-runner", "libtcmu2",
	"targetcli-fb", "python3-rtslib-fb", "python3-configshell-fb", "python3-pyparsing", "python3-urwid", "python3-six", "python3-pyudev",
	"python3-gi", "gir1.2-glib-2.0", "libgirepository-1.0-1", "python3-minimal", "python3.11-minimal", "libpython3.11-minimal",
	"libpython3.11-stdlib", "libexpat1", "libbz2-1.0", "libncursesw6", "libtinfo6", "libreadline8", "libuuid1", "libcrypt1",
	"nbd-client", "libgnutls30", "libhogweed6", "libnettle8", "libgmp10", "libtasn1-6", "libp11-kit0", "libidn2-0", "libunistring2",
}

const toolsSize = "256M"

// PrepareTools makes a disk with the tools, if the cache has none. A guest mounts it at /tools and runs them under chroot: they
// bring their own C library, so the host's version does not matter.
func PrepareTools(cache string) (string, error) {
	disk := filepath.Join(cache, "tools.ext4")
	stamp := filepath.Join(cache, "tools.packages")
	list := strings.Join(toolPackages, "\n") + "\n"
	if have, err := os.ReadFile(stamp); err == nil && string(have) == list {
		if _, err := os.Stat(disk); err == nil {
			return disk, nil
		}
	}
	if err := makeTools(cache, disk); err != nil {
		return "", fmt.Errorf("making the disk of tools: %w", err)
	}
	return disk, os.WriteFile(stamp, []byte(list), 0o666)
}

func makeTools(cache, disk string) error {
	debs, tree := filepath.Join(cache, "debs"), filepath.Join(cache, "tools")
	for _, dir := range []string{debs, tree} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o777); err != nil {
			return err
		}
	}
	if _, err := output(debs, "apt-get", append([]string{"download", "-q"}, toolPackages...)...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	if len(files) != len(toolPackages) {
		return fmt.Errorf("%d packages downloaded of %d", len(files), len(toolPackages))
	}
	for _, f := range files {
		if _, err := output("", "dpkg-deb", "-x", f, tree); err != nil {
			return err
		}
	}
	if err := trimTools(tree); err != nil {
		return err
	}
	mke2fs, err := lookup("mke2fs")
	if err != nil {
		return err
	}
	half := disk + ".part"
	if _, err := output("", mke2fs, "-q", "-F", "-t", "ext4", "-d", tree, half, toolsSize); err != nil {
		return err
	}
	return os.Rename(half, disk)
}

// trimTools takes away what nobody reads and makes the places that a guest mounts something at.
func trimTools(tree string) error {
	for _, dir := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/run"} {
		if err := os.RemoveAll(filepath.Join(tree, dir)); err != nil {
			return err
		}
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "disk", "root", "var/log", "var/target", "etc/target", "lib/modules"} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o777); err != nil {
			return err
		}
	}
	if err := os.Symlink("../run", filepath.Join(tree, "var/run")); err != nil {
		return err
	}
	return nil
}
