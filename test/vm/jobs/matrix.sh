# Every kind of image: enabled, compared with what the host says it holds, written, read again.
. /job/lib.sh

start_daemon --allow-any-path
lun=0
while read -r name size sum; do
  echo "CASE $name"
  file=$name.qcow2
  if ! enable "$name" "qcow2//disk/$file" "$size" 2> /tmp/out; then
    result "$name-enable" 1 "$(cat /tmp/out)"
    continue
  fi
  attach "$name" $lun || { result "$name-attach" 1; continue; }
  [ "$(dd if=$DISK bs=1M iflag=direct 2> /dev/null | md5sum | cut -d' ' -f1)" = "$sum" ]
  result "$name-content" $?
  # Two writes inside clusters, one across, one that covers whole ones; then some blocks given back.
  dd if=/job/noise of=$DISK bs=4096 seek=257 count=1 oflag=direct conv=notrunc 2> /dev/null &&
    dd if=/job/noise of=$DISK bs=512 seek=3001 count=3 oflag=direct conv=notrunc 2> /dev/null &&
    dd if=/job/noise of=$DISK bs=64k seek=50 count=4 oflag=direct conv=notrunc,fsync 2> /dev/null &&
    blkdiscard -o 8388608 -l 1048576 $DISK
  result "$name-write" $?
  echo 3 > /proc/sys/vm/drop_caches
  echo "SUM $name $(dd if=$DISK bs=1M iflag=direct 2> /dev/null | md5sum | cut -d' ' -f1)"
  check "$name-detach" detach "$name" $lun
  [ -z "$(grep ERROR /tmp/daemon.log)" ]
  result "$name-log" $?
done < /job/cases
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
