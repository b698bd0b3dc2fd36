# fio checks what it wrote; then a file system, whose checker judges the disk.
. /job/lib.sh

start_daemon
check enable enable a qcow2//disk/a.qcow2 268435456
check attach attach a 0
[ -b "$DISK" ] || exit 1
verify="--filename=$DISK --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 --size=24M"
check mixed fio --name=mixed --rw=randwrite --bsrange=512-96k $verify --offset=0
check small fio --name=small --rw=randwrite --bs=4k $verify --offset=32M
check again fio --name=again --rw=randwrite --bs=4k --randseed=7 $verify --offset=32M
check fsyncs fio --name=fsyncs --rw=randwrite --bs=16k --fsync=16 $verify --offset=64M
check sequential fio --name=sequential --rw=write --bs=1M $verify --offset=128M
# Blocks go on one side while they are written on the other. What went reads as zeroes.
check filled fio --name=filled --rw=write --bs=256k $verify --offset=96M
fio --name=trim --rw=randtrim --bs=32k --filename=$DISK --direct=1 --ioengine=libaio --iodepth=8 --size=24M --offset=96M > /tmp/trim.out 2>&1 &
trim=$!
check beside-trim fio --name=beside --rw=randwrite --bs=8k $verify --offset=64M
wait $trim
result trim $? "$(tail -n 1 /tmp/trim.out)"
[ "$(dd if=$DISK bs=1M skip=96 count=24 iflag=direct 2> /dev/null | tr -d '\0' | wc -c)" = 0 ]
result trimmed-reads-zeroes $?
check clients fio --name=clients --filename=$DISK --rw=randwrite --bs=8k --numjobs=3 --size=8M --offset=160M --offset_increment=8M \
  --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1

check mkfs mkfs.ext4 -q -F $DISK
mkdir -p /mnt
check mount mount -o discard $DISK /mnt
check files fio --name=files --directory=/mnt --nrfiles=16 --size=16M --rw=randwrite --bs=4k --fsync=32 --verify=crc32c \
  --verify_fatal=1 --do_verify=1
check fstrim fstrim /mnt
check umount umount /mnt
check fsck e2fsck -f -n $DISK
daemon_log > /tmp/said
[ -z "$(grep -E 'ERROR|WARN' /tmp/said)" ]
result log $? "$(grep -E 'ERROR|WARN' /tmp/said)"
check detach detach a 0
kill $DAEMON
wait $DAEMON
result stop $?
