# The kernel's own NBD client against drover serve: our own way of attaching, then nbd-client's.
. /job/lib.sh
SOCKET=/run/disk.sock
URI="nbd+unix:///?socket=$SOCKET"

start_server() {
  rm -f $SOCKET
  drover serve --socket $SOCKET /disk/a.qcow2 >> /tmp/daemon.log 2>&1 &
  SERVER=$!
  eventually [ -S $SOCKET ]
}

verify() {
  fio --filename=/dev/nbd0 --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 "$@"
}

attached() { [ "$(cat /sys/block/nbd0/size)" = 524288 ]; }
detached() { [ "$(cat /sys/block/nbd0/size)" = 0 ]; }

start_server
check attach drover nbd attach "$URI" /dev/nbd0
check attached eventually attached
check status sh -c "drover nbd status | grep -q nbd0"
check fio verify --name=fio --rw=randwrite --bsrange=4k-64k --size=24M --offset=96M
check trim fio --name=trim --filename=/dev/nbd0 --direct=1 --ioengine=libaio --iodepth=8 --rw=randtrim --bs=64k --size=16M --offset=96M
check mkfs mkfs.ext4 -q -F /dev/nbd0 96M
mkdir -p /mnt
check mount mount -o discard /dev/nbd0 /mnt
check files fio --name=files --directory=/mnt --nrfiles=8 --size=12M --rw=randwrite --bs=4k --fsync=32 --verify=crc32c \
  --verify_fatal=1 --do_verify=1
head -c 8388608 /dev/urandom > /mnt/kept
sum=$(md5sum < /mnt/kept)
check fstrim fstrim /mnt
check umount umount /mnt
check fsck e2fsck -f -n /dev/nbd0
check detach drover nbd detach /dev/nbd0
check detached eventually detached

# Reconnected, with nothing lost; then the server goes and comes while the device is in use.
drover nbd attach --reconnect 60s "$URI" /dev/nbd0 > /tmp/attach.log 2>&1 &
attach=$!
check attached-again eventually attached
check mount-again mount /dev/nbd0 /mnt
[ "$(md5sum < /mnt/kept)" = "$sum" ]
result kept $?
umount /mnt
verify --name=across --rw=randwrite --bs=4k --size=16M --offset=128M > /tmp/fio.out 2>&1 &
writer=$!
writes() { awk '{print $5}' /sys/block/nbd0/stat; }
from=$(writes)
more() { [ "$(writes)" -gt $((from + 300)) ]; }
eventually more
kill $SERVER
wait $SERVER
result server-stopped $?
start_server
wait $writer
result fio-across-restart $? "$(grep -iE 'err|verify' /tmp/fio.out | head -n 3)"
check fsck-after e2fsck -f -n /dev/nbd0
check detach-again drover nbd detach /dev/nbd0
wait $attach
result attach-ended $? "$(tail -n 1 /tmp/attach.log)"

# The usual client.
if tools; then
  check nbd-client chroot /tools /sbin/nbd-client -unix $SOCKET /dev/nbd0
  check attached-by-client eventually attached
  check fsck-client e2fsck -f -n /dev/nbd0
  check fio-client verify --name=client --rw=randwrite --bs=16k --size=8M --offset=192M
  check nbd-client-ends chroot /tools /sbin/nbd-client -d /dev/nbd0
  check detached-client eventually detached
fi
kill $SERVER
wait $SERVER
result stop $?
daemon_log
dmesg | grep -iE 'hung|BUG|oops|call trace' | tail -n 20 | sed 's/^/  k| /'
