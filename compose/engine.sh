# shellcheck shell=bash
# Sourced by the scripts beside it: what they say when something is missing, and how they call Compose.
#
#   STORE_ENDPOINT     a store of your own instead of the bundled server
#   STORE_CA           the file of its certificate's authority, below where make is called
#   GPU                not empty: the stages that use a GPU get one
#   COMPOSE_OVERLAY    one more overlay file, read last
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # used where this is sourced
credentials=$here/secrets/credentials
project=${COMPOSE_PROJECT_NAME:-tunemill}
export TUNEMILL_FILES=${TUNEMILL_FILES:-$PWD}
unset COMPOSE_FILE # the user's own for another project would take the place of ours

files=(-f "$here/compose.yaml")
[ -z "${GPU:-}" ] || files+=(-f "$here/cuda.yaml")
[ -z "${STORE_ENDPOINT:-}" ] || files+=(-f "$here/external.yaml")
[ -z "${COMPOSE_OVERLAY:-}" ] || files+=(-f "$COMPOSE_OVERLAY")

# fail CODE MESSAGE: codes as in docs/exit-codes.md
fail() {
    echo "compose: $2" >&2
    exit "$1"
}

case "${STORE:-s3://}" in
    s3://*) ;;
    *) fail 2 "containers share no directory but an S3 store: STORE=s3://bucket/prefix instead of '$STORE'" ;;
esac

compose() {
    docker compose --progress quiet --project-name "$project" "${files[@]}" "$@"
}

# The line of an error text that holds the reason: the last one.
reason() {
    tail -n 1 <<<"$1"
}

need_engine() {
    local said
    command -v docker >/dev/null ||
        fail 78 "there is no docker here: install Docker Engine, or run without WHERE=compose"
    said=$(docker version --format '{{.Server.Version}}' 2>&1) ||
        fail 78 "no Docker engine answers; start it, join the group docker, or set DOCKER_HOST ($(reason "$said"))"
    docker compose version >/dev/null 2>&1 ||
        fail 78 "this docker has no Compose v2: install docker-compose-plugin (Debian: docker-compose)"
}

# need_image SERVICE: prints its name. Only a name with a host in it is pulled; "tunemill/…" is built here.
need_image() {
    local image said
    image=$(compose config --images "$1" 2>&1) || fail 78 "Compose does not take its files: $(reason "$image")"
    if ! docker image inspect "$image" >/dev/null 2>&1; then
        case "${image%%/*}" in
            *.* | *:* | localhost)
                said=$(docker pull --quiet "$image" 2>&1) ||
                    fail 78 "there is no image $image here and it cannot be pulled: $(reason "$said")" ;;
            *) fail 78 "there is no image $image: build it by 'make images', or set REGISTRY to where it is" ;;
        esac
    fi
    echo "$image"
}

# put_secret NAME <BYTES: where the containers find it, readable for their user alone
put_secret() {
    compose run --rm --no-deps -T seed-secret "$1" ||
        fail 78 "the containers cannot be given the secret '$1'"
}

put_hub_token() { # a token for gated models, when there is one
    [ ! -e "$here/secrets/hub-token" ] || put_secret hub-token <"$here/secrets/hub-token"
}

# The credentials for a store of your own: from the environment, as an AWS client would, else from a file.
external_credentials() {
    local file=${AWS_SHARED_CREDENTIALS_FILE:-$HOME/.aws/credentials}
    if [ -n "${AWS_ACCESS_KEY_ID:-}" ]; then
        printf '[%s]\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
            "${AWS_PROFILE:-default}" "$AWS_ACCESS_KEY_ID" "${AWS_SECRET_ACCESS_KEY:-}"
        [ -z "${AWS_SESSION_TOKEN:-}" ] || printf 'aws_session_token = %s\n' "$AWS_SESSION_TOKEN"
    else
        cat "$file" 2>/dev/null ||
            fail 78 "no credentials for $STORE_ENDPOINT: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE"
    fi
}
