#!/usr/bin/env bash
# Run one stage, or a store command, in its container: compose/run.sh train --model tiny --task stdlib
#
# The exit code is the stage's. stdout is the stage's result and nothing else.
set -euo pipefail
# shellcheck source=compose/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

stage=${1:-}
case "$stage" in
    fetch | prepare | train | merge | convert | quantize | infer | evaluate | store) service=$stage ;;
    convert-lora) service=convert ;;
    imatrix) service=infer ;;
    *) fail 2 "there is no stage '$stage': fetch, prepare, train, merge, convert, convert-lora, imatrix, quantize, infer, evaluate or store" ;;
esac

# What goes into the provenance: the digest a registry knows the image by, or the engine's own.
image_digest() {
    docker image inspect --format "{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}${1%:*}@{{.Id}}{{end}}" "$1"
}

# uid 65532 has to get into the directory that it starts in.
need_files() {
    [ -n "$(find "$TUNEMILL_FILES" -maxdepth 0 -perm -005)" ] ||
        fail 78 "the containers' user may not read $TUNEMILL_FILES: chmod o+rx it, or set TUNEMILL_FILES to another directory"
}

need_store() {
    if [ -n "${STORE_ENDPOINT:-}" ]; then
        external_credentials | put_secret credentials
        return
    fi
    [ -e "$credentials" ] || fail 78 "there are no keys in compose/secrets: 'make up' makes them and starts the store"
    [ -n "$(compose ps --status running --quiet s3)" ] || fail 75 "the store is down: start it by 'make up'"
}

need_gpu() { # need_gpu IMAGE: by trying, since an engine does not list all the ways it can have one
    local said
    said=$(docker run --rm --network none --gpus all --entrypoint /bin/true "$1" 2>&1) ||
        fail 78 "the Docker engine has no GPU for containers: install the NVIDIA Container Toolkit, or leave GPU out ($(grep -m 1 -i error <<<"$said" || reason "$said"))"
}

need_engine
image=$(need_image "$service")
need_files
need_store
case "$service" in fetch | prepare) put_hub_token ;; esac
case "${GPU:+$service}" in train | quantize | infer) need_gpu "$image" ;; esac

options=(--rm --no-deps -T -e TUNEMILL_IMAGE="$(image_digest "$image")")
if [ -n "${STORE_ENDPOINT:-}" ]; then
    options+=(-e AWS_PROFILE="${AWS_PROFILE:-default}")
    [ -z "${STORE_CA:-}" ] || options+=(-e AWS_CA_BUNDLE="/files/$STORE_CA")
fi
container=$project-$stage-$$-$RANDOM

# Compose is not exec'ed: terminated, `docker compose run` goes and leaves its container running (Docker 28 with
# Compose 2.26). So it stays a child outside the terminal's process group, and the signals go by the engine.
set -m
compose run "${options[@]}" --name "$container" "$service" "$@" </dev/null &
client=$!
set +m

# shellcheck disable=SC2329 # called by the traps
pass_on() {
    docker kill --signal "$1" "$container" >/dev/null 2>&1 || kill "$client" 2>/dev/null || true
}
# Whatever happens to the client, no stage goes on unseen. What is left is stopped with its time to save.
# shellcheck disable=SC2329 # called by the trap
leave() {
    ! docker stop "$container" >/dev/null 2>&1 || docker rm --force "$container" >/dev/null 2>&1 || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
trap leave EXIT

alive() { # alive PID: a process that has ended and that nobody has waited for is not
    kill -0 "$1" 2>/dev/null && [[ $(ps -o stat= -p "$1" 2>/dev/null) != Z* ]]
}

while kill -0 "$client" 2>/dev/null; do
    # make passes its process id: killed with -9 it tells nobody
    alive "${MAKE_PID:-$PPID}" || exit 143
    sleep 0.3 || true # Ctrl-C ends it as well
done
code=0
wait "$client" || code=$?
exit "$code"
