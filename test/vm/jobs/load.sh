# A disk is kept, enlarged and taken away while fio writes to it and checks what it wrote.
. /job/lib.sh

ctl() { drover ctl "$@"; }

start_daemon
check enable enable a qcow2//disk/a.qcow2 268435456
check attach attach a 0
[ -b "$DISK" ] || exit 1
name=${DISK#/dev/}

# The first 8 MiB are what the snapshot is to keep.
head -c 8388608 /dev/urandom > /disk/pattern
check pattern dd if=/disk/pattern of=$DISK bs=1M oflag=direct conv=notrunc

fio --name=load --filename=$DISK --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bsrange=4k-64k --offset=64M \
  --size=96M --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=128 > /tmp/fio.out 2>&1 &
writer=$!
busy() { kill -0 $writer 2> /dev/null; }
writes() { awk '{print $5}' /sys/block/$name/stat; }
started() { [ "$(writes)" -gt 300 ]; }
eventually started
check snapshot-create ctl snapshot create a before
check snapshot-list sh -c "drover ctl snapshot list a | grep -q before"
head -c 8388608 /dev/zero | tr '\0' 'x' > /tmp/other
check overwrite dd if=/tmp/other of=$DISK bs=1M oflag=direct conv=notrunc
for i in 1 2 3 4; do check snapshot-$i ctl snapshot create a more-$i; done
for i in 1 3; do check snapshot-delete-$i ctl snapshot delete a more-$i; done
busy
result fio-still-at-it $?

check grow sh -c "printf 402653184 > $CORE/user_0/a/attrib/dev_size"
told() { dmesg | grep -qi 'capacity data has changed'; }
check told-of-capacity eventually told
echo 1 > /sys/block/$name/device/rescan
[ "$(cat /sys/block/$name/size)" = 786432 ]
result grown $? "$(cat /sys/block/$name/size) sectors"
check write-beyond dd if=/tmp/other of=$DISK bs=1M seek=300 oflag=direct conv=notrunc
wait $writer
result fio-verify $? "$(grep -iE 'err|verify' /tmp/fio.out | head -n 3)"
daemon_log

# The disk goes while fio has requests under way: they fail, and nothing hangs.
fio --name=gone --filename=$DISK --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --offset=160M --size=64M --time_based \
  --runtime=120 > /tmp/fio.out 2>&1 &
writer=$!
from=$(writes)
more() { [ "$(writes)" -gt $((from + 300)) ]; }
eventually more
check hot-remove detach a 0
wait $writer
[ $? != 0 ]
result fio-told $? "$(head -n 1 /tmp/fio.out)"
[ ! -b $DISK ]
result disk-gone $?

# The snapshot as a disk of its own.
check enable-snapshot enable s 'qcow2//disk/a.qcow2;snapshot=before' 268435456
check attach-snapshot attach s 1
dd if=$DISK bs=1M count=8 iflag=direct 2> /dev/null | cmp -s - /disk/pattern
result snapshot-content $?
dd if=/tmp/other of=$DISK bs=1M count=1 oflag=direct conv=notrunc 2> /dev/null
[ $? != 0 ]
result snapshot-read-only $?
check detach-snapshot detach s 1
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
dmesg | grep -iE 'hung|BUG|oops|call trace' | tail -n 20 | sed 's/^/  k| /'
