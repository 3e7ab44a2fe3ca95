#!/usr/bin/env bash
# Run a command of this machine with the lab's store in its environment: compose/host.sh tunemill store ls
set -euo pipefail
# shellcheck source=compose/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

export TUNEMILL_STORE=${STORE:-s3://tunemill}
if [ -n "${STORE_ENDPOINT:-}" ]; then
    export AWS_ENDPOINT_URL_S3=$STORE_ENDPOINT # the keys are found as any AWS client finds them
else
    [ -r "$credentials" ] || fail 78 "there are no keys in compose/secrets: 'make up' makes them and starts the store"
    unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_PROFILE
    export AWS_SHARED_CREDENTIALS_FILE=$credentials
    export AWS_ENDPOINT_URL_S3=http://127.0.0.1:${STORE_PORT:-7070} AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-us-east-1}
fi
exec "$@"
