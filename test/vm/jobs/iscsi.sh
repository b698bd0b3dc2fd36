# libiscsi's conformance tests, over the kernel's iSCSI target.
. /job/lib.sh

start_daemon
check enable enable a qcow2//disk/a.qcow2 134217728
IQN=iqn.2020-01.example:drover
TPG=/sys/kernel/config/target/iscsi/$IQN/tpgt_1
mkdir -p $TPG
mkdir $TPG/np/127.0.0.1:3260
echo 0 > $TPG/attrib/authentication
echo 1 > $TPG/attrib/generate_node_acls
echo 0 > $TPG/attrib/demo_mode_write_protect
echo 1 > $TPG/attrib/cache_dynamic_acls
mkdir $TPG/lun/lun_0
ln -s $CORE/user_0/a $TPG/lun/lun_0/link
echo 1 > $TPG/enable
check inquiry iscsi-inq iscsi://127.0.0.1/$IQN/0
iscsi-test-cu --dataloss --allow-sanitize --verbose --test="${TESTS:-ALL}" iscsi://127.0.0.1/$IQN/0 2>&1
echo "iscsi-test-cu ended with $?"
kill $DAEMON
wait $DAEMON
result stop $?
daemon_log
