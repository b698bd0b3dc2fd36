# Whoever waits for a daemon that died is answered by the next one: an enable, a removal, both at once. The kernel does not ask
# about a removal when nobody listens, so the daemon is stopped until it has been asked, and killed then.
. /job/lib.sh

start_daemon
for name in a b c; do check enable-$name enable $name qcow2//disk/$name.qcow2 33554432; done
check attach attach b 0
check write dd if=/dev/urandom of=$DISK bs=1M count=4 oflag=direct conv=fsync
sum=$(dd if=$DISK bs=1M count=4 iflag=direct 2> /dev/null | md5sum)
mkdir $CORE/user_0/d $CORE/user_1 $CORE/user_1/e
for path in user_0/d user_1/e; do
  printf 'dev_config=qcow2//disk/%s.qcow2' ${path#*/} > $CORE/$path/control
  printf 'dev_size=33554432' > $CORE/$path/control
done

# waits PID: it is still at it after a while.
waits() {
  sleep 1
  kill -0 $1 2> /dev/null
}

kill -STOP $DAEMON
rmdir $CORE/user_0/a &
removal=$!
waits $removal
result removal-asks $?
kill -9 $DAEMON
wait $DAEMON 2> /dev/null
waits $removal
result removal-waits $?
start_daemon
wait $removal
result removal-answered $?
[ ! -e $CORE/user_0/a ]
result removed $?
[ "$(dd if=$DISK bs=1M count=4 iflag=direct 2> /dev/null | md5sum)" = "$sum" ]
result others-go-on $?

kill -STOP $DAEMON
rmdir $CORE/user_0/c &
removal=$!
sh -c "echo 1 > $CORE/user_1/e/enable" &
enabling=$!
sleep 1
kill -9 $DAEMON
wait $DAEMON 2> /dev/null
waits $removal
result removal-waits-again $?
waits $enabling
result enable-waits $?
start_daemon
wait $removal
result removal-answered-again $?
wait $enabling
result enable-answered $?
[ "$(dd if=$DISK bs=1M count=4 iflag=direct 2> /dev/null | md5sum)" = "$sum" ]
result others-go-on-again $?
check enable-d sh -c "echo 1 > $CORE/user_0/d/enable"
check detach detach b 0
check remove-d rmdir $CORE/user_0/d
check remove-e rmdir $CORE/user_1/e
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
dmesg | grep -iE 'hung|BUG|oops|call trace' | tail -n 20 | sed 's/^/  k| /'
