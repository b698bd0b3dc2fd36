# Every kind of image: enabled, compared with what the host says it holds, written, read again.
. /job/lib.sh
RUNNER=
[ ! -e /job/params ] || . /job/params

# Two writes inside clusters, one across, one that covers whole ones; then some blocks given back.
write_some() {
  dd if=/job/noise of=$DISK bs=4096 seek=257 count=1 oflag=direct conv=notrunc 2> /dev/null &&
    dd if=/job/noise of=$DISK bs=512 seek=3001 count=3 oflag=direct conv=notrunc 2> /dev/null &&
    dd if=/job/noise of=$DISK bs=64k seek=50 count=4 oflag=direct conv=notrunc,fsync 2> /dev/null
}

content() { dd if=$DISK bs=1M iflag=direct 2> /dev/null | md5sum | cut -d' ' -f1; }

# word STATUS BAD: how something went.
word() { [ "$1" = 0 ] && echo ok || echo "$2"; }

# with_runner: the same by tcmu-runner, of which nothing is expected. It gives no blocks back, so zeroes are written.
with_runner() {
  while read -r name size sum; do
    runner_ready > /dev/null 2>&1 || start_runner
    if ! enable "$name" "qcow//disk/$name.qcow2" "$size" 2> /tmp/out; then
      echo "ROW $name refused - -"
      continue
    fi
    if ! attach "$name" $lun; then
      echo "ROW $name unattached - -"
      continue
    fi
    echo 3 > /sys/block/${DISK#/dev/}/device/timeout
    [ "$(content)" = "$sum" ]
    read=$(word $? '**wrong**')
    write_some && dd if=/dev/zero of=$DISK bs=1M seek=8 count=1 oflag=direct conv=notrunc 2> /dev/null
    write=$(word $? '**failed**')
    kill -0 $DAEMON 2> /dev/null || write='**daemon-died**'
    echo 3 > /proc/sys/vm/drop_caches
    echo "SUM $name $(content)"
    echo "ROW $name ok $read $write"
    detach "$name" $lun
  done < /job/cases
  kill $DAEMON
  wait $DAEMON
}

lun=0
if [ "$RUNNER" = yes ]; then
  tools && start_bus && start_runner && with_runner
  exit
fi

start_daemon --allow-any-path
while read -r name size sum; do
  echo "CASE $name"
  file=$name.qcow2
  if ! enable "$name" "qcow2//disk/$file" "$size" 2> /tmp/out; then
    result "$name-enable" 1 "$(cat /tmp/out)"
    continue
  fi
  attach "$name" $lun || { result "$name-attach" 1; continue; }
  [ "$(content)" = "$sum" ]
  result "$name-content" $?
  write_some && blkdiscard -o 8388608 -l 1048576 $DISK
  result "$name-write" $?
  echo 3 > /proc/sys/vm/drop_caches
  echo "SUM $name $(content)"
  check "$name-detach" detach "$name" $lun
  [ -z "$(grep ERROR /tmp/daemon.log)" ]
  result "$name-log" $?
done < /job/cases
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
