#!/bin/sh
# The first process of the guest: mounts, modules, the job, the end.
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
ip link set lo up
while read -r m; do
  insmod "/modules/$m.ko" || echo "insmod $m failed"
done < /modules/order
mount -t configfs configfs /sys/kernel/config
i=0
while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
mount -t ext4 /dev/vda /disk || echo "mounting /dev/vda failed"
echo "GUEST-UP $(cut -d' ' -f1 /proc/uptime)"
sh /job/run
cd /
sync
umount /disk || mount -o remount,ro /disk
echo "JOB-DONE $(cut -d' ' -f1 /proc/uptime)"
poweroff -f
