# The daemon is killed while fio writes where nothing was written before, and started again; fio goes on and checks what it wrote.
. /job/lib.sh
. /job/params # ROUNDS

# load ROUND MORE...: a region of its own for each round, so that its writes allocate.
load() {
  number=$1
  shift
  fio --name=kill --filename=$DISK --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-32k \
    --size=6M --offset=$((number * 6))M --randseed=$number --verify=crc32c --verify_fatal=1 --do_verify=1 "$@"
}

written() { cat /sys/block/${DISK#/dev/}/stat | awk '{print $7}'; }

# some SECTORS: waits until so many more have been written, a few seconds at most.
some() {
  from=$(written)
  i=0
  while [ $i -lt 300 ] && [ $(($(written) - from)) -lt $1 ]; do
    sleep 0.02
    i=$((i + 1))
  done
}

start_daemon
check enable enable a qcow2//disk/a.qcow2 268435456
check attach attach a 0
[ -b "$DISK" ] || exit 1
round=1
while [ $round -le $ROUNDS ]; do
  load $round > /tmp/fio.out 2>&1 &
  writer=$!
  some $((round % 7 * 700 + 200))
  kill -9 $DAEMON
  wait $DAEMON 2> /dev/null
  start_daemon
  wait $writer
  result "round-$round" $? "$(grep -iE 'err|verify' /tmp/fio.out | head -n 3)"
  round=$((round + 1))
done
# Everything once more, after all the kills.
round=1
while [ $round -le $ROUNDS ]; do
  load $round --verify_only > /tmp/fio.out 2>&1
  result "reread-$round" $? "$(grep -iE 'err|verify' /tmp/fio.out | head -n 3)"
  round=$((round + 1))
done
check detach detach a 0 # else the guest's end would wait for the disk's cache to be written
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
dmesg | grep -iE 'hung|BUG|oops|call trace' | tail -n 20 | sed 's/^/  k| /'
