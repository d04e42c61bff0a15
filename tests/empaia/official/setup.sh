#!/usr/bin/env bash
# Makes the environment of EMPAIA's own validators, models and command line (empaia-app-test-suite), apart from the project's.
#   tests/empaia/official/setup.sh [FOLDER]     default: build/empaia; what is there already, with these versions, is kept
# Ends with 75 where it cannot be installed (no venv, no package index).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
folder=${1:-$root/build/empaia}
wanted=$here/requirements.txt
log=$folder.log

cannot() { echo "skipped: $*" >&2; exit 75; }

cmp -s "$wanted" "$folder/installed.txt" && exit
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
"$python" -m venv "$folder" >"$log" 2>&1 || cannot "python -m venv failed; see $log"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps -r "$wanted" >>"$log" 2>&1 ||
    cannot "empaia-app-test-suite cannot be installed; see $log"
cp "$wanted" "$folder/installed.txt"
