#!/usr/bin/env bash
# Runs a command with the real services of this folder up, then stops those that it started:
#   deploy/services/with.sh make bench-read
# S3 is started unless AWS_ENDPOINT_URL names one, JuiceFS unless WSI_MMM_JUICEFS does. Without JuiceFS (said in one line)
# the command runs all the same; where S3 cannot be installed it does not run, and this ends with 75.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
started=()

stop() {
    for ((n = ${#started[@]} - 1; n >= 0; n--)); do "$here/${started[n]}.sh" down; done
}

start() {
    local exports status
    exports=$("$here/$1.sh" up)
    status=$?
    # Also after a failure: half of it may run. What could not be installed has nothing to stop, and a log to be read.
    [ "$status" -eq 75 ] || started+=("$1")
    eval "$exports"
    return "$status"
}

trap stop EXIT
trap 'exit 130' INT TERM
if [ -z "${AWS_ENDPOINT_URL:-}" ]; then
    start s3 || exit
fi
if [ -z "${WSI_MMM_JUICEFS:-}" ]; then
    start juicefs || [ $? -eq 75 ] || exit 1
fi
"$@"
