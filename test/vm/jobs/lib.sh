# Functions for jobs.
CORE=/sys/kernel/config/target/core
LOOP=/sys/kernel/config/target/loopback/naa.5001405aabbccdd0
: > /tmp/daemon.log

# result NAME STATUS [TEXT]: what a job has found out.
result() {
  if [ "$2" = 0 ]; then
    echo "RESULT $1 ok $3"
  else
    daemon_log
    echo "RESULT $1 FAIL $3"
  fi
}

# check NAME COMMAND...: the command must succeed.
check() {
  what=$1
  shift
  if "$@" > /tmp/out 2>&1; then
    echo "RESULT $what ok"
  else
    code=$?
    tail -n 8 /tmp/out | sed 's/^/  | /'
    daemon_log
    echo "RESULT $what FAIL exit $code: $*"
  fi
}

# eventually COMMAND...: waits for the command to succeed, a minute at most.
eventually() {
  tries=0
  until "$@" > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || return 1
    sleep 0.1
  done
}

start_daemon() {
  daemon_log
  drover tcmu --dbus none --log-level debug "$@" >> /tmp/daemon.log 2>&1 &
  DAEMON=$!
  eventually daemon_ready
}

daemon_ready() { grep -q msg=ready /tmp/daemon.log; }

# daemon_log shows what the daemon has said since the last time.
daemon_log() {
  sed 's/^/  d| /' /tmp/daemon.log
  : > /tmp/daemon.log
}

# enable NAME CONFIG SIZE [BLOCK SIZE]: a backstore. Exit status: that of the write to enable.
enable() {
  mkdir -p $CORE/user_0/"$1"
  printf 'dev_config=%s' "$2" > $CORE/user_0/"$1"/control
  printf 'dev_size=%s' "$3" > $CORE/user_0/"$1"/control
  printf 'hw_max_sectors=2048' > $CORE/user_0/"$1"/control
  [ -z "$4" ] || printf 'hw_block_size=%s' "$4" > $CORE/user_0/"$1"/control
  echo "$1" | md5sum | cut -c1-32 > $CORE/user_0/"$1"/wwn/vpd_unit_serial
  echo 1 > $CORE/user_0/"$1"/enable
}

# attach NAME LUN: sets DISK to the new block device.
attach() { attach_path $CORE/user_0/"$1" "$2"; }

# attach_path BACKSTORE LUN
attach_path() {
  BEFORE=$(echo /sys/block/sd*)
  mkdir -p $LOOP/tpgt_1
  [ -n "$(cat $LOOP/tpgt_1/nexus 2>/dev/null)" ] || echo naa.5001405000000001 > $LOOP/tpgt_1/nexus
  mkdir -p $LOOP/tpgt_1/lun/lun_"$2"
  ln -s "$1" $LOOP/tpgt_1/lun/lun_"$2"/link || return 1
  eventually new_disk || return 1
  DISK=/dev/$(new_disk)
}

# new_disk names the disk that was not there BEFORE.
new_disk() {
  for path in /sys/block/sd*; do
    [ -e "$path" ] || continue
    case " $BEFORE " in
    *" $path "*) ;;
    *)
      basename "$path"
      return 0
      ;;
    esac
  done
  return 1
}

# detach NAME LUN
detach() {
  rm $LOOP/tpgt_1/lun/lun_"$2"/link
  rmdir $LOOP/tpgt_1/lun/lun_"$2"
  rmdir $CORE/user_0/"$1"
}

# tools mounts the disk of tools, for programs that run under chroot.
tools() {
  mkdir -p /tools
  mount -t ext4 -o ro /dev/vdb /tools || return 1
  for dir in proc sys dev run disk; do mount -o bind /$dir /tools/$dir; done
  mount -o bind /sys/kernel/config /tools/sys/kernel/config
  for dir in tmp root var/log var/target etc/target lib/modules; do
    mount -t tmpfs none /tools/$dir
  done
  # tcmu-runner and rtslib ask libkmod for modules, though these are loaded already.
  mkdir -p /tools/lib/modules/$(uname -r)
  cp -r /modules /tools/lib/modules/$(uname -r)/kernel
  chroot /tools /sbin/depmod 2> /dev/null
}

# start_bus starts a system bus on which everybody may do everything.
start_bus() {
  mkdir -p /run/dbus
  cat > /tmp/bus.conf << 'END'
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
  </policy>
</busconfig>
END
  dbus-daemon --config-file=/tmp/bus.conf --fork --nopidfile --nosyslog
}

# start_runner starts Debian's tcmu-runner.
start_runner() {
  chroot /tools /usr/bin/tcmu-runner "$@" > /tmp/runner.log 2>&1 &
  DAEMON=$!
  eventually runner_ready
}

runner_ready() {
  dbus-send --system --print-reply --dest=org.kernel.TCMUService1 /org/kernel/TCMUService1 \
    org.freedesktop.DBus.ObjectManager.GetManagedObjects
}
