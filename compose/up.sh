#!/usr/bin/env bash
# Start the bundled store: keys, server, bucket, and the judgement of `tunemill store doctor`.
set -euo pipefail
# shellcheck source=compose/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

[ -z "${STORE_ENDPOINT:-}" ] ||
    fail 2 "STORE_ENDPOINT names a store of your own, so there is no server to start: 'make pipeline WHERE=compose'"
need_engine
need_image store >/dev/null
"$here/secrets.sh"
put_secret credentials <"$credentials"
compose run --rm --no-deps -T seed-store </dev/null || fail 78 "the store's volume cannot be made"

need_image s3 >/dev/null
compose up --detach --wait --wait-timeout 120 s3 || {
    compose logs --no-log-prefix --tail 20 s3 >&2 || true
    fail 75 "the store's server did not become healthy; its last lines are above"
}
"$here/run.sh" store create >&2
"$here/run.sh" store doctor >&2
echo "the store is up at http://127.0.0.1:${STORE_PORT:-7070}, its keys are in compose/secrets/credentials" >&2
