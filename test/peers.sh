#!/usr/bin/env bash
# Installs the programs that the tests compare with, where they are missing. It needs apt; elsewhere, and without root
# or sudo, it says what to install by hand. Exit status 0 means that everything is there.
set -euo pipefail

# program:package
needed=(
  qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils
  nbdkit:nbdkit nbdinfo:libnbd-bin nbdcopy:libnbd-bin
  cloud-localds:cloud-image-utils genisoimage:genisoimage genimage:genimage nbdsh:python3-libnbd # test/scripts
  fio:fio mke2fs:e2fsprogs
  gcc:gcc # the race detector is linked with it
)
# What the tests in a virtual machine need beside these (make test-vm).
if [ "${PEERS:-}" = vm ]; then
  needed+=(
    qemu-system-x86_64:qemu-system-x86 busybox:busybox-static e2fsck:e2fsprogs debugfs:e2fsprogs
    sg_inq:sg3-utils iscsi-test-cu:libiscsi-bin dbus-daemon:dbus-daemon dbus-send:dbus-bin
  )
fi
# What make bench-syscalls counts with.
if [ "${PEERS:-}" = bench ]; then
  needed+=(strace:strace)
fi
PATH=$PATH:/usr/sbin:/sbin

missing_packages() {
  local pair
  for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || echo "${pair##*:}"
  done
  # gcc alone cannot link: it needs the C library's headers.
  [ -e /usr/include/stdlib.h ] || echo libc6-dev
}

mapfile -t packages < <(missing_packages | sort -u)
if [ ${#packages[@]} -eq 0 ]; then
  exit 0
fi

give_up() {
  echo "test/peers.sh: $1" >&2
  echo "test/peers.sh: the tests need these packages, please install them: ${packages[*]}" >&2
  exit 1
}

command -v apt-get >/dev/null 2>&1 || give_up "there is no apt-get here"
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || give_up "neither root nor sudo"
  sudo=(sudo)
  # Without a terminal nobody can type a password.
  [ -t 0 ] || sudo+=(-n)
fi
echo "test/peers.sh: installing ${packages[*]}"
"${sudo[@]}" apt-get update -qq || give_up "apt-get update failed"
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
  give_up "apt-get install failed"
mapfile -t packages < <(missing_packages | sort -u)
[ ${#packages[@]} -eq 0 ] || give_up "still missing after the installation"
