#!/usr/bin/env bash
# A real S3 server for the tests: Ceph's RGW from Debian's packages, in a chroot, on loopback.
#
#   ceph_rgw.sh install          unpack Debian and Ceph under $TUNEMILL_RGW_ROOT (root; minutes, once)
#   ceph_rgw.sh serve PORT       run one server in the foreground until it is killed with -9
#   ceph_rgw.sh wipe PORT        delete what that server stored
#
# It listens on 127.0.0.1 only: S3 on PORT, the monitor on PORT+1, the rest between PORT+10 and PORT+90.
# Its one user's keys are $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, fixed when its data are new.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${TUNEMILL_RGW_ROOT:-/var/lib/tunemill-rgw}
release=${TUNEMILL_RGW_RELEASE:-forky}   # the first Debian release with Ceph 20
oldest=20                                # older RGW ignores conditions on completing a multipart upload

fail() {
    echo "ceph_rgw.sh: $1" >&2
    exit 78
}

# This machine's own Debian mirror, whichever of the two formats its apt sources are written in.
mirror() {
    # shellcheck disable=SC2016 # apt-get expands it
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 -E '/debian/?$' ||
        fail "no Debian mirror in the apt sources: set TUNEMILL_RGW_MIRROR"
}

# dpkg syncs every file it unpacks; a chroot that is renamed into place when done can do without.
write_package_settings() {
    mkdir -p "$1/etc/dpkg/dpkg.cfg.d" "$1/usr/sbin"
    printf '%s\n' force-unsafe-io 'path-exclude=/usr/share/doc/*' 'path-exclude=/usr/share/man/*' \
        'path-exclude=/usr/share/locale/*' >"$1/etc/dpkg/dpkg.cfg.d/tunemill"
    printf 'APT::Install-Recommends "false";\nAcquire::Languages "none";\n' >"$1/etc/apt/apt.conf.d/90tunemill"
    printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" # packages must not start their daemons here
    chmod 0755 "$1/usr/sbin/policy-rc.d"
}

# The mounts live in a mount namespace of their own, so none is left behind however this ends.
install_ceph_into() {
    # shellcheck disable=SC2016 # the inner bash expands it
    unshare --mount bash -euo pipefail -c '
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
        chroot "$1" apt-get install --quiet --quiet --yes ceph-mon ceph-osd radosgw
        chroot "$1" apt-get clean' install "$1"
}

install() {
    [ ! -e "$root" ] || { echo "already installed: $root"; return; }
    [ "$(id -u)" = 0 ] || fail "installing needs root"
    command -v apt-get >/dev/null || fail "needs a Debian machine: there is no apt-get"
    local from partial=$root.partial log=$root.log script=()
    from=${TUNEMILL_RGW_MIRROR:-$(mirror)}
    mkdir -p "$(dirname "$root")"
    rm -rf "$partial"
    {
        if ! command -v debootstrap; then
            apt-get update --quiet --quiet
            apt-get install --quiet --quiet --yes --no-install-recommends debootstrap debian-archive-keyring
        fi
        # An older debootstrap does not know the newer release by name; all releases share one script.
        [ -e "/usr/share/debootstrap/scripts/$release" ] || script=(/usr/share/debootstrap/scripts/sid)
        debootstrap --variant=minbase --include=ca-certificates "$release" "$partial" "$from" "${script[@]}"
        write_package_settings "$partial"
        install_ceph_into "$partial"
    } >"$log" 2>&1 || fail "installation failed, see the end of $log: $(tail -n 1 "$log")"
    local version
    version=$(chroot "$partial" radosgw --version | grep -oE 'version [0-9]+' | cut -d ' ' -f 2)
    [ "$version" -ge "$oldest" ] || fail "Debian $release has Ceph $version, the tests need $oldest or newer"
    mv "$partial" "$root"
    echo "installed Ceph $version: $root"
}

serve() {
    [ -e "$root" ] || fail "not installed: run $0 install"
    [ "$(id -u)" = 0 ] || fail "serving needs root, for a chroot and a PID namespace"
    local port=$1 data=$root/srv/$1
    mkdir -p "$data"
    cp "$here/ceph_daemons.sh" "$data/ceph_daemons.sh"
    # The PID namespace ends all daemons with the one process killed; the death signal ends that one
    # with whoever started it. SIGTERM does nothing: unshare ignores it while its child runs.
    exec setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child=KILL \
        chroot "$root" bash "/srv/$port/ceph_daemons.sh" "$port" \
        "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}" >"$data/out.log" 2>&1
}

wipe() {
    rm -rf "${root:?}/srv/${1:?}"
}

case ${1:-} in
install) install ;;
serve) serve "${2:?serve needs a port}" ;;
wipe) wipe "${2:?wipe needs a port}" ;;
*) fail "usage: ceph_rgw.sh install | serve PORT | wipe PORT" ;;
esac
