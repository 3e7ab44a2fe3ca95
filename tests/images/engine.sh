#!/usr/bin/env bash
# A Docker engine of the tests' own, from Debian's packages, beside whatever the machine has.
#
#   engine.sh install    unpack engine, client, buildx and compose under $TUNEMILL_DOCKER_ROOT (root; once)
#   engine.sh serve      run the engine in the foreground until it is terminated
#   engine.sh env        print the shell assignments that point a client at it
#
# Debian 12's own engine is too old for build contexts and compose has no package there, so all of it
# comes from Debian 13, unpacked rather than installed: nothing of the machine's own Docker is touched.
set -euo pipefail

root=${TUNEMILL_DOCKER_ROOT:-/var/lib/tunemill-docker}
release=trixie
# Patch versions follow Debian's security updates; anything else is a decision.
packages=("docker.io=26.1.*" "docker-cli=26.1.*" "containerd=1.7.*" "tini=0.19.*"
    "docker-buildx=0.13.*" "docker-compose=2.26.*")
tree=$root/debian
socket=$root/run/docker.sock
bridge=tunemill0

fail() {
    echo "engine.sh: $1" >&2
    exit 78
}

mirror() {
    # shellcheck disable=SC2016 # apt-get expands it
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 -E '/debian/?$' ||
        fail "no Debian mirror in the apt sources"
}

# apt with its own sources and state, so that the machine's are neither read nor changed.
apt_apart() {
    apt-get -qq -o Dir::Etc::SourceList="$root/apt/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$root/apt/lists" -o Dir::Cache="$root/apt/cache" \
        -o APT::Get::List-Cleanup=0 -o Acquire::Languages=none "$@"
}

install() {
    [ "$(id -u)" = 0 ] || fail "unpacking an engine needs root"
    command -v apt-get >/dev/null || fail "only Debian's packages are known here: install docker, buildx and compose"
    [ ! -e "$root/installed" ] || return 0
    apt-get -qq install -y --no-install-recommends iproute2 iptables debian-archive-keyring >/dev/null
    rm -rf "$tree" "$root/apt"
    mkdir -p "$tree" "$root/apt/lists/partial" "$root/apt/cache" "$root/apt/debs"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) $release main" \
        >"$root/apt/sources.list"
    apt_apart update
    chmod 0777 "$root/apt/debs" # apt downloads as an unprivileged user
    (cd "$root/apt/debs" && apt_apart download "${packages[@]}")
    (cd "$root/apt/debs" && apt-get -qq download runc) # the newer one needs a newer libc
    for package in "$root/apt/debs/"*.deb; do
        dpkg-deb --extract "$package" "$tree"
    done
    mkdir -p "$root/client/cli-plugins"
    ln -sf "$tree/usr/libexec/docker/cli-plugins/"* "$root/client/cli-plugins/"
    rm -rf "$root/apt"
    touch "$root/installed"
}

serve() {
    mkdir -p "$root/run"
    # Not docker0, which may be another engine's.
    ip link show "$bridge" >/dev/null 2>&1 || ip link add name "$bridge" type bridge
    ip address replace 172.30.255.1/24 dev "$bridge"
    ip link set "$bridge" up
    export PATH="$tree/usr/sbin:$tree/usr/bin:$PATH"
    exec dockerd --host "unix://$socket" --data-root "$root/data" --exec-root "$root/run/exec" \
        --pidfile "$root/run/docker.pid" --bridge "$bridge" --default-address-pool base=172.30.0.0/17,size=24
}

environment() {
    echo "export DOCKER_HOST=unix://$socket DOCKER_CONFIG=$root/client PATH=$tree/usr/bin:\$PATH"
}

case ${1:-} in
install) install ;;
serve) serve ;;
env) environment ;;
*) fail "usage: engine.sh install|serve|env" ;;
esac
