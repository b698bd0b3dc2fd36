# Debian's targetcli, as an administrator uses it, with the service on the bus.
. /job/lib.sh

tools || exit 1
start_bus || exit 1
export HOME=/root # its settings go there
tc() { chroot /tools /usr/bin/targetcli "$@"; }
start_daemon --dbus system

check ls sh -c "chroot /tools /usr/bin/targetcli ls > /tmp/ls && grep -q user:qcow2 /tmp/ls && grep -q 'user:qcow ' /tmp/ls && grep -q user:raw /tmp/ls"
sed 's/^/  t| /' /tmp/ls
check help sh -c "chroot /tools /usr/bin/targetcli /backstores/user:qcow2 help create | grep -q 'path of a QCOW2 image'"
check create tc /backstores/user:qcow2 create disk0 256M /disk/a.qcow2 hw_max_sectors=2048
check create-qcow tc /backstores/user:qcow create disk1 32M /disk/b.qcow2
check loopback tc /loopback create naa.5001405000000011
BEFORE=$(echo /sys/block/sd*)
check lun tc /loopback/naa.5001405000000011/luns create /backstores/user:qcow2/disk0
check disk eventually new_disk
DISK=/dev/$(new_disk)
check mkfs mkfs.ext4 -q -F $DISK
mkdir -p /mnt
mount $DISK /mnt
head -c 4000000 /dev/urandom > /mnt/file
sum=$(md5sum < /mnt/file)
check umount umount /mnt
check fsck e2fsck -f -n $DISK
serial=$(sg_vpd --page=sn $DISK | tail -n 1)
check serial-shown sh -c "chroot /tools /usr/bin/targetcli /backstores/user:qcow2/disk0 info | grep -q '${serial##* }'"

# refused NAME TEXT ARGUMENTS...: targetcli fails and shows why.
refused() {
  what=$1 why=$2
  shift 2
  tc "$@" > /tmp/out 2>&1
  [ $? != 0 ] && grep -q "$why" /tmp/out
  result refused-$what $? "$(tail -n 1 /tmp/out)"
}
refused relative 'absolute path' /backstores/user:qcow create bad 32M disk/b.qcow2
refused option 'no option' /backstores/user:qcow2 create bad 32M '/disk/b.qcow2;nonsense=1'
refused missing 'o such file' /backstores/user:qcow2 create bad 32M /disk/missing.qcow2
refused twice 'usy\|in use\|lock' /backstores/user:qcow2 create bad 256M /disk/a.qcow2
# The kernel's EINVAL is all that reaches targetcli, which keeps it to itself; the reason is in the daemon's log and in drover ctl.
refused size 'creation failed' /backstores/user:qcow2 create bad 64M /disk/c.qcow2
daemon_log
[ ! -e $CORE/user_2 ] || ls $CORE/user_* | sed 's/^/  t| /'

check saveconfig tc saveconfig /tmp/saved.json
grep -q 'qcow2//disk/a.qcow2' /tools/tmp/saved.json
result saved $?
check clearconfig tc clearconfig confirm=True
[ ! -b $DISK ] && [ -z "$(ls /sys/class/uio)" ]
result cleared $?
BEFORE=$(echo /sys/block/sd*)
check restoreconfig tc restoreconfig /tmp/saved.json
check disk-restored eventually new_disk
DISK=/dev/$(new_disk)
check mount-restored mount $DISK /mnt
[ "$(md5sum < /mnt/file)" = "$sum" ]
result content-restored $?
umount /mnt
[ "$(sg_vpd --page=sn $DISK | tail -n 1)" = "$serial" ]
result serial-restored $?

check delete-loopback tc /loopback delete naa.5001405000000011
check delete tc /backstores/user:qcow2 delete disk0
check delete-qcow tc /backstores/user:qcow delete disk1
[ -z "$(ls /sys/class/uio)" ]
result nothing-left $?
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
