#!/usr/bin/env bash
# ceph_daemons.sh PORT ACCESS_KEY SECRET_KEY: one monitor, one OSD and one RGW, the last in the foreground.
#
# Runs inside the tree that ceph_rgw.sh made, as the first process of its own PID namespace: in a chroot,
# or as a container. What it stores is under $TUNEMILL_RGW_HOME (/srv/PORT); started again on the same data
# it serves them again. It listens on $TUNEMILL_RGW_ADDRESS (127.0.0.1).
set -euo pipefail

port=$1 access_key=$2 secret_key=$3
home=${TUNEMILL_RGW_HOME:-/srv/$port}
address=${TUNEMILL_RGW_ADDRESS:-127.0.0.1}
export CEPH_CONF=$home/ceph.conf

random_uuid() {
    cat /proc/sys/kernel/random/uuid
}

write_configuration() {
    local cluster=$1
    cat >"$CEPH_CONF" <<CONF
[global]
fsid = $cluster
keyring = $home/keyring
run_dir = $home/run
admin_socket = $home/run/\$name.asok
crash_dir = $home/run
log_file = $home/log/\$name.log
mon_cluster_log_file = $home/log/cluster.log
mon_data = $home/mon
osd_data = $home/osd
mon_host = [v2:127.0.0.1:$((port + 1))/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_port_min = $((port + 10))
ms_bind_port_max = $((port + 90))

# One disk, one copy, few placement groups: everything a single machine needs and no more.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
# By default the monitor ends where 5 % of the disk are free, which may be hundreds of gigabytes.
mon_data_avail_crit = -1

# A sparse file of 50 GiB stands for the disk; memory stays under 1 GiB (the least the OSD accepts
# is 896 MiB).
osd_objectstore = bluestore
bluestore_block_size = 53687091200
osd_memory_target = 939524096

# The defaults wait for slow networks: each pool made at first use would cost seconds.
paxos_propose_interval = 0.05
osd_pool_default_read_lease_ratio = 0.05
osd_client_watch_timeout = 3

[client.rgw.a]
rgw_data = $home
rgw_frontends = beast endpoint=$address:$port tcp_nodelay=1
# Deleted objects give their space back at once, not after two hours.
rgw_gc_obj_min_wait = 1
rgw_gc_processor_period = 5
rgw_gc_processor_max_time = 5
CONF
}

add_key() {
    local name=$1
    shift
    ceph-authtool "$home/keyring" --gen-key --name "$name" "$@"
}

make_monitor() {
    local cluster=$1
    : >"$home/keyring"
    add_key mon. --cap mon 'allow *'
    add_key client.admin --cap mon 'allow *' --cap osd 'allow *'
    add_key osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    add_key client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx'
    monmaptool --create --clobber --fsid "$cluster" --addv a "[v2:127.0.0.1:$((port + 1))]" "$home/monmap"
    ceph-mon --id a --mkfs --monmap "$home/monmap" --keyring "$home/keyring"
}

make_disk() {
    local disk
    disk=$(random_uuid)
    ceph osd new "$disk"
    ceph-osd --id 0 --mkfs --osd-uuid "$disk"
}

wait_for_disk() {
    until ceph daemon osd.0 status 2>/dev/null | grep -q '"state": "active"'; do
        sleep 0.1
    done
}

[ -e /proc/self ] || mount -t proc proc /proc
made=$home/made # written last, so that a half-made cluster is made anew
if [ ! -e "$made" ]; then
    rm -rf "$home/mon" "$home/osd"
    mkdir -p "$home/mon" "$home/osd" "$home/run" "$home/log"
    cluster=$(random_uuid)
    write_configuration "$cluster"
    make_monitor "$cluster"
fi
ceph-mon --id a
[ -e "$made" ] || make_disk
ceph-osd --id 0
wait_for_disk
if [ ! -e "$made" ]; then
    radosgw-admin user create --uid tests --display-name tests \
        --access-key "$access_key" --secret-key "$secret_key"
    touch "$made"
fi
exec radosgw --name client.rgw.a --foreground
