# The same fio load on the same image by drover, by tcmu-runner, and on a raw file by the kernel's own backstore, in turns.
. /job/lib.sh
. /job/params

tools || exit 1
start_bus || exit 1

# One sysfs knob for all: a request of 1 MiB is not cut.
prepare_disk() { echo 1024 > /sys/block/${DISK#/dev/}/queue/max_sectors_kb; }

fresh() {
  rm -f /disk/fresh.qcow2
  drover create -q -f qcow2 /disk/fresh.qcow2 $FRESH
}

# settle FILE: its pages are in the page cache, active, and with all that the file system hangs on them, whoever comes first:
# what makes them so costs up to a quarter of reading or writing them. They are clean, so that nothing is written back meanwhile.
settle() {
  cat "$1" "$1" "$1" > /dev/null
  dd if="$1" of="$1" bs=1M conv=notrunc 2> /dev/null
  sync
}

# begin CONTENDER IMAGE SIZE: DISK is served by it, and DAEMON is its process, if it has one.
begin() {
  DAEMON=
  settle "$2"
  case $1 in
  drover*)
    start_daemon $([ "$1" = drover ] || echo "--write-back") --log-level info || return 1
    enable d "qcow2/$2" "$3" || return 1
    ;;
  tcmu-runner)
    start_runner || return 1
    enable d "qcow/$2" "$3" || return 1
    ;;
  fileio)
    mkdir -p $CORE/fileio_0/d
    echo "fd_dev_name=$2,fd_dev_size=$3,fd_buffered_io=1" > $CORE/fileio_0/d/control
    echo 1 > $CORE/fileio_0/d/enable
    ;;
  esac
  BACK=$CORE/user_0/d
  [ "$1" != fileio ] || BACK=$CORE/fileio_0/d
  attach_path $BACK 0 || return 1
  prepare_disk
}

finish() {
  rm $LOOP/tpgt_1/lun/lun_0/link
  rmdir $LOOP/tpgt_1/lun/lun_0
  rmdir $BACK
  [ -z "$DAEMON" ] || { kill $DAEMON; wait $DAEMON; }
  daemon_log > /tmp/last.log
}

# spent prints the processor time of the daemon's threads in nanoseconds.
spent() { [ -z "$DAEMON" ] && echo 0 || cat /proc/$DAEMON/task/*/schedstat | awk '{ns += $1} END {printf "%.0f\n", ns}'; }

# load CONTENDER ROUND CASE RW BLOCK DEPTH SIZE
load() {
  cpu=$(spent)
  fio --name=x --filename=$DISK --direct=1 --ioengine=libaio --rw=$4 --bs=$5 --iodepth=$6 --size=$7 --randrepeat=1 \
    --norandommap --randseed=$2 --time_based --runtime=${MILLISECONDS}ms --output-format=terse --terse-version=3 > /tmp/fio.out 2>&1
  code=$?
  cpu=$(($(spent) - cpu))
  # Fields of version 3: total KiB, rate, operations per second, milliseconds; of reads from 6 on, of writes from 47 on.
  echo "SAMPLE $1 $2 $3 $code $cpu $(grep '^3;' /tmp/fio.out | cut -d';' -f6,8,9,47,49,50 | tr ';' ' ')"
  [ $code = 0 ] || cat /tmp/fio.out
}

round=1
while [ $round -le $ROUNDS ]; do
  for who in $CONTENDERS; do
    file=/disk/a.qcow2
    [ $who != fileio ] || file=/disk/a.raw
    if begin $who $file $SIZE; then
      load $who $round randread-q1 randread 4k 1 $SIZE
      load $who $round randread-q32 randread 4k 32 $SIZE
      load $who $round randwrite-q1 randwrite 4k 1 $SIZE
      load $who $round randwrite-q32 randwrite 4k 32 $SIZE
      load $who $round read-1m-q8 read 1m 8 $SIZE
      load $who $round write-1m-q8 write 1m 8 $SIZE
    else
      result "begin-$who" 1 "round $round"
      cat /tmp/runner.log
    fi
    finish
    [ $who != fileio ] || continue
    fresh
    if begin $who /disk/fresh.qcow2 $FRESH; then
      load $who $round alloc-q32 randwrite 4k 32 $FRESH
    else
      result "begin-$who-fresh" 1 "round $round"
    fi
    finish
    fresh
    if begin $who /disk/fresh.qcow2 $FRESH; then
      load $who $round alloc-1m-q8 write 1m 8 $FRESH
    fi
    finish
    echo "CHECK $who $round $(drover check /disk/fresh.qcow2 2>&1 | tail -n 1)"
  done
  round=$((round + 1))
done
