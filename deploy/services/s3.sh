#!/usr/bin/env bash
# A real S3 server on loopback, without containers: one Ceph monitor, one manager, one object store in memory, one gateway.
#   deploy/services/s3.sh up     installs what is missing (Debian, Ubuntu; as root), starts, prints `export AWS_...` lines
#   deploy/services/s3.sh down   stops it and removes its files
# WSI_MMM_S3_DIR (default: a folder below TMPDIR) holds everything; WSI_MMM_S3_PORT (default 9004) is where it answers, the
# next one is the monitor's: two servers at a time need two folders and two ports.
# Ends with 75 where it cannot be installed at all (no apt-get, no root, no network).
# For tests and benchmarks only: authentication inside the cluster is off, and what it stores is gone when it stops.
set -euo pipefail

dir=${WSI_MMM_S3_DIR:-${TMPDIR:-/tmp}/wsi-mmm-s3}
port=${WSI_MMM_S3_PORT:-9004}
monitor=$((port + 1))
key=wsimmm
secret=wsimmm-loopback-only
conf=$dir/ceph.conf
log=$dir/start.log

fail() { echo "error: $*" >&2; exit 1; }
cannot() { echo "skipped: $*" >&2; exit 75; }

install_packages() {
    command -v radosgw >/dev/null && command -v ceph-osd >/dev/null && return
    command -v apt-get >/dev/null || cannot "radosgw, ceph-mon, ceph-osd and ceph-mgr are not installed, and there is no apt-get"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        radosgw ceph-mon ceph-osd ceph-mgr ceph-common; } >"$log" 2>&1 || cannot "apt-get could not install radosgw, ceph-mon, ceph-osd and ceph-mgr; see $log"
}

write_config() {
    cat >"$conf" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon_host = v1:127.0.0.1:$monitor
ms_bind_msgr2 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 4294967296
mgr_initial_modules =
run_dir = $dir/run
pid_file = $dir/run/\$name.pid
admin_socket = $dir/run/\$name.asok
log_file = $dir/log/\$name.log
keyring = $dir/keyring
mon_data = $dir/mon
mgr_data = $dir/mgr
osd_data = $dir/osd
monmap = $dir/monmap
osd_crush_update_on_start = false
osd_class_update_on_start = false
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_dns_name = 127.0.0.1
CONF
}

start_cluster() {
    ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    monmaptool --create --addv a "[v1:127.0.0.1:$monitor]" --fsid "$(sed -n 's/^fsid = //p' "$conf")" "$dir/monmap"
    ceph-mon -c "$conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
    ceph-mon -c "$conf" -i a
    ceph-mgr -c "$conf" -i x
    local osd
    osd=$(cat /proc/sys/kernel/random/uuid)
    ceph -c "$conf" osd new "$osd"
    ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd"
    ceph -c "$conf" osd crush add osd.0 1.0 root=default host=loopback
    ceph-osd -c "$conf" -i 0
    radosgw -c "$conf" -n client.rgw
}

answers() {
    for _ in $(seq "$1"); do curl -s -m 5 -o /dev/null "http://127.0.0.1:$port" && return; sleep 0.5; done
    return 1
}

# One try at a new cluster. What a start that failed, or a machine that went down, left behind does not fit it.
try() {
    down
    mkdir -p "$dir"/{mon,mgr,osd,run,log}
    write_config
    start_cluster >>"$log" 2>&1 || return
    answers "$1" || return
    radosgw-admin -c "$conf" user create --uid=wsi --display-name=wsi --access-key="$key" --secret="$secret" >>"$log" 2>&1
}

up() {
    local pid
    pid=$(cat "$dir/run/client.rgw.pid" 2>/dev/null || true)
    if [ -z "$pid" ] || ! kill -0 "$pid" 2>/dev/null; then
        down
        mkdir -p "$dir"
        install_packages
        ! answers 1 || fail "something else answers on port $port; give another one in WSI_MMM_S3_PORT"
        try 60 || try 60 || try 180 || {
            tail -n 5 "$dir/log/client.rgw.log" "$log" >&2
            fail "the S3 server did not start; the last lines of its logs are above"
        }
    fi
    echo "export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=$key AWS_SECRET_ACCESS_KEY=$secret AWS_REGION=us-east-1"
}

down() {
    for name in client.rgw osd.0 mgr.x mon.a; do
        [ -f "$dir/run/$name.pid" ] || continue
        pid=$(cat "$dir/run/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
        kill -9 "$pid" 2>/dev/null || true
    done
    rm -rf "$dir"
}

case ${1:-} in
    up) up ;;
    down) down ;;
    *) fail "say: $0 up | down" ;;
esac
