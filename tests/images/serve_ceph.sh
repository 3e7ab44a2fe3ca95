#!/usr/bin/env bash
# The tests' S3 server in a container: Ceph RGW on port 7070 with the lab's keys and volume.
set -euo pipefail

key() {
    sed -n "s/^$1 *= *//p" /run/secrets/credentials
}
export TUNEMILL_RGW_HOME=/data/ceph TUNEMILL_RGW_ADDRESS=0.0.0.0
mkdir -p "$TUNEMILL_RGW_HOME"
exec /ceph_daemons.sh 7070 "$(key aws_access_key_id)" "$(key aws_secret_access_key)"
