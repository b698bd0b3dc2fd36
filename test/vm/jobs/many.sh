# Sixty-four disks at once: enabled, used and removed at the same time.
. /job/lib.sh
COUNT=64

all() { seq 0 $((COUNT - 1)); }

start_daemon
for i in $(all); do
  (enable disk$i "qcow2//disk/$i.qcow2" 8388608 > /tmp/enable.$i 2>&1; echo $? > /tmp/enabled.$i) &
  pids="$pids $!"
done
wait $pids
failed=$(for i in $(all); do [ "$(cat /tmp/enabled.$i)" = 0 ] || echo "$i: $(cat /tmp/enable.$i)"; done)
[ -z "$failed" ]
result enabled-$COUNT $? "$failed"
[ "$(drover ctl list --output json | grep -o 'disk[0-9]*"' | sort -u | wc -l)" = $COUNT ]
result listed $?

for i in $(all); do
  attach disk$i $i || break
  echo $DISK > /tmp/disk.$i
done
[ -e /tmp/disk.$((COUNT - 1)) ]
result attached-$COUNT $?

pids=
for i in $(all); do
  (
    disk=$(cat /tmp/disk.$i)
    yes "this is disk $i" | head -c 3000000 > /tmp/pattern.$i
    dd if=/tmp/pattern.$i of=$disk bs=64k seek=$((i % 5)) conv=fsync,notrunc oflag=direct 2> /dev/null &&
      [ "$(dd if=$disk bs=64k skip=$((i % 5)) count=46 iflag=direct 2> /dev/null | head -c 3000000 | md5sum)" = \
        "$(md5sum < /tmp/pattern.$i)" ]
    echo $? > /tmp/used.$i
  ) &
  pids="$pids $!"
done
wait $pids
failed=$(for i in $(all); do [ "$(cat /tmp/used.$i)" = 0 ] || echo $i; done)
[ -z "$failed" ]
result used-$COUNT $? "$failed"

# All at once again: the last goes while others still go.
pids=
for i in $(all); do
  (detach disk$i $i > /tmp/detach.$i 2>&1; echo $? > /tmp/gone.$i) &
  pids="$pids $!"
done
wait $pids
failed=$(for i in $(all); do [ "$(cat /tmp/gone.$i)" = 0 ] || echo "$i: $(cat /tmp/detach.$i)"; done)
[ -z "$failed" ]
result removed-$COUNT $? "$failed"
[ -z "$(ls /sys/class/uio)" ]
result nothing-left $? "$(ls /sys/class/uio)"
kill $DAEMON
wait $DAEMON
result stop $?
[ -z "$(grep -E 'ERROR|WARN' /tmp/daemon.log)" ]
result log $? "$(grep -E 'ERROR|WARN' /tmp/daemon.log | head -n 3)"
