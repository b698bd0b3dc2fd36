# One disk's life: made, used, shrunk of its free space, its server killed, resized, removed.
. /job/lib.sh

start_daemon
check enable enable a qcow2//disk/a.qcow2 268435456
check attach attach a 0
[ -b "$DISK" ] || exit 1
echo "  disk $DISK, size $(cat /sys/block/${DISK#/dev/}/size)"

check inquiry sg_inq $DISK
for page in sv sn di ei bl bdc lbpv; do check vpd-$page sg_vpd --page=$page $DISK; done
check readcap10 sg_readcap $DISK
check readcap16 sg_readcap --16 $DISK
sg_readcap --16 $DISK | sed 's/^/  | /'
check opcodes sg_opcodes $DISK
check luns sg_luns $DISK
check modes sg_modes -a $DISK
check turs sg_turs $DISK

# The file system.
check mkfs mkfs.ext4 -q -F $DISK
mkdir -p /mnt
check mount mount -o discard $DISK /mnt
head -c 10000000 /dev/urandom > /mnt/random
check sync sync
sum=$(md5sum < /mnt/random)
head -c 30000000 /dev/urandom > /mnt/gone
sync
echo "  image takes $(du -k /disk/a.qcow2 | cut -f1) KiB with both files"
before=$(du -k /disk/a.qcow2 | cut -f1)
rm /mnt/gone
sync
check fstrim fstrim -v /mnt
check umount umount /mnt
sync
after=$(du -k /disk/a.qcow2 | cut -f1)
[ $after -lt $((before - 25000)) ]
result space-given-back $? "$before KiB before, $after KiB after"
check fsck e2fsck -f -n $DISK
echo 3 > /proc/sys/vm/drop_caches
mount $DISK /mnt
[ "$(md5sum < /mnt/random)" = "$sum" ]
result reread $?
umount /mnt

# Commands that a file system does not send. The last MiB of the disk is theirs.
end=$(($(cat /sys/block/${DISK#/dev/}/size) - 2048))
head -c 1048576 /dev/urandom > /tmp/mib
dd if=/tmp/mib of=$DISK bs=512 seek=$end oflag=direct 2> /dev/null
head -c 512 /dev/urandom > /tmp/new
dd if=/tmp/mib bs=512 count=1 of=/tmp/caw 2> /dev/null
cat /tmp/new >> /tmp/caw
check compare-and-write sg_compare_and_write --in=/tmp/caw --lba=$end --num=1 --xferlen=1024 $DISK
dd if=$DISK bs=512 skip=$end count=1 iflag=direct of=/tmp/got 2> /dev/null
cmp -s /tmp/new /tmp/got
result compare-and-write-wrote $?
sg_compare_and_write --in=/tmp/caw --lba=$end --num=1 --xferlen=1024 $DISK > /tmp/out 2>&1
[ $? = 14 ]
result miscompare $? "$(tail -n 1 /tmp/out)"
check write-same sg_write_same --16 --in=/tmp/new --lba=$end --num=64 --xferlen=512 $DISK
check write-same-unmap sg_write_same --16 --unmap --lba=$((end + 128)) --num=128 --xferlen=512 $DISK
check unmap sg_unmap --lba=$((end + 1024)) --num=1024 $DISK
[ "$(dd if=$DISK bs=512 skip=$((end + 1024)) count=1024 iflag=direct 2> /dev/null | tr -d '\0' | wc -c)" = 0 ]
result unmapped-reads-zeroes $?
check get-lba-status sg_get_lba_status --lba=$((end + 1024)) $DISK
sg_get_lba_status --lba=$end $DISK | sed 's/^/  | /'
check verify sg_verify --lba=0 --count=128 $DISK
check synchronize sg_sync $DISK
check blkdiscard blkdiscard -o 134217728 -l 67108864 $DISK

# The server is killed under writes; the next one takes over, and nothing is lost.
head -c 25000000 /dev/urandom > /tmp/big
dd if=/tmp/big of=$DISK bs=64k oflag=direct conv=fsync 2> /tmp/dd.err &
writer=$!
sleep 0.3
kill -9 $DAEMON
wait $DAEMON 2> /dev/null
start_daemon
wait $writer
result write-across-kill $? "$(tail -n 1 /tmp/dd.err)"
echo 3 > /proc/sys/vm/drop_caches
dd if=$DISK bs=1M count=24 iflag=direct 2> /dev/null | head -c 25000000 | cmp -s - /tmp/big
result reread-after-kill $?

# The same in order.
dd if=/tmp/big of=$DISK bs=64k oflag=direct conv=fsync 2> /tmp/dd.err &
writer=$!
sleep 0.3
kill $DAEMON
wait $DAEMON
result stop $?
sleep 1
start_daemon
wait $writer
result write-across-restart $? "$(tail -n 1 /tmp/dd.err)"
dd if=$DISK bs=1M count=24 iflag=direct 2> /dev/null | head -c 25000000 | cmp -s - /tmp/big
result reread-after-restart $?

daemon_log

# Larger, and the initiator is told.
check grow sh -c "printf 536870912 > $CORE/user_0/a/attrib/dev_size"
sg_turs $DISK > /tmp/out 2>&1
echo 1 > /sys/block/${DISK#/dev/}/device/rescan
[ "$(cat /sys/block/${DISK#/dev/}/size)" = 1048576 ]
result grown $? "$(cat /sys/block/${DISK#/dev/}/size) sectors"
check write-beyond dd if=/tmp/big of=$DISK bs=1M seek=400 count=20 oflag=direct
sh -c "printf 134217728 > $CORE/user_0/a/attrib/dev_size" 2> /dev/null
[ $? != 0 ]
result no-shrinking $?

daemon_log

# What does not work says why, and nothing hangs.
enable twice qcow2//disk/a.qcow2 536870912 > /tmp/out 2>&1
[ $? != 0 ] && grep -q busy /tmp/out
result same-image-twice $? "$(cat /tmp/out)"
enable gone qcow2//disk/no-such.qcow2 1048576 > /tmp/out 2>&1
[ $? != 0 ] && grep -q 'No such file' /tmp/out
result missing-image $? "$(cat /tmp/out)"
enable size qcow2//disk/b.qcow2 1048576 > /tmp/out 2>&1
[ $? != 0 ] && grep -q 'nvalid' /tmp/out
result wrong-size $? "$(cat /tmp/out)"
enable other glfs/volume@host/file 1048576 > /tmp/out 2>&1
[ $? != 0 ]
result other-handler $? "$(cat /tmp/out)"
rmdir $CORE/user_0/twice $CORE/user_0/gone $CORE/user_0/size $CORE/user_0/other

check detach detach a 0
[ ! -b $DISK ]
result removed $?

# An enable that waits for a server which died is answered by the next one.
kill -9 $DAEMON
wait $DAEMON 2> /dev/null
enable b qcow//disk/b.qcow2 33554432 > /tmp/out 2>&1 &
waiting=$!
sleep 1
start_daemon
wait $waiting
result orphaned-enable $? "$(cat /tmp/out)"
check attach-b attach b 1 # with no LUN 0 beside it
check read-b dd if=$DISK of=/dev/null bs=1M iflag=direct
check detach-b detach b 1
kill $DAEMON
wait $DAEMON
result stop-idle $?
daemon_log
dmesg | grep -iE 'hung|BUG|oops|tcmu|call trace' | tail -n 20 | sed 's/^/  k| /'
