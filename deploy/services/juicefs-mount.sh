#!/bin/sh
# Makes a JuiceFS file system of a bucket and a Redis, the first time, and mounts it in the foreground.
# Everything comes from the environment, so that `ps` shows no secret:
#   JUICEFS_META, such as redis://redis:6379/1 (its password in META_PASSWORD) and JUICEFS_BUCKET, such as http://s3:9000/wsi
#   (its keys in ACCESS_KEY and SECRET_KEY), JUICEFS_MOUNT, the folder, and JUICEFS_CACHE, a folder on a fast disk.
set -eu

: "${JUICEFS_META:?}" "${JUICEFS_BUCKET:?}" "${JUICEFS_MOUNT:?}" "${JUICEFS_CACHE:?}"
: "${META_PASSWORD:?set the password of Redis}" "${ACCESS_KEY:?set the keys of the bucket}" "${SECRET_KEY:?set the keys of the bucket}"
export REDIS_PASSWORD="$META_PASSWORD" # what clients before 1.0 read

juicefs status "$JUICEFS_META" >/dev/null 2>&1 ||
    juicefs format --storage s3 --bucket "$JUICEFS_BUCKET" "$JUICEFS_META" wsi
exec juicefs mount --no-usage-report --cache-dir "$JUICEFS_CACHE" --cache-size "${JUICEFS_CACHE_MB:-10240}" \
    "$JUICEFS_META" "$JUICEFS_MOUNT"
