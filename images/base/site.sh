# The site that an image is built at; sourced by the RUN steps that mount it, never part of a layer. Its own
# package indexes arrive as build secrets, all optional: pip_conf (pip's configuration file), apt_sources (a
# sources.list in place of the base image's), ca_bundle (certificates to trust).
# shellcheck shell=bash
set -euo pipefail

secrets=/run/secrets
venv=/opt/venv
[ ! -f "$secrets/pip_conf" ] || export PIP_CONFIG_FILE=$secrets/pip_conf
[ ! -f "$secrets/ca_bundle" ] || export PIP_CERT=$secrets/ca_bundle SSL_CERT_FILE=$secrets/ca_bundle
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive

# install_system PACKAGE...: packages of the base image's distribution, and nothing of apt's left behind.
install_system() {
    local sources=()
    [ ! -f "$secrets/apt_sources" ] ||
        sources=(-o "Dir::Etc::SourceList=$secrets/apt_sources" -o Dir::Etc::SourceParts=/dev/null)
    apt-get "${sources[@]}" -qq update
    apt-get "${sources[@]}" -qq install --yes --no-install-recommends "$@" >/dev/null
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old
}

# make_environments: one to build in, with pip, and the empty one that images get. Folders of their own
# for PyTorch and for Tunemill make layers that images share and that change apart.
make_environments() {
    python3 -m venv /opt/build
    /opt/build/bin/pip install --quiet --no-deps --require-hashes --find-links /wheels \
        --requirement /locks/build.txt
    python3 -m venv --without-pip "$venv"
    printf '%s\n' /opt/tunemill /opt/torch >"$(packages_of "$venv")/tunemill.pth"
}

packages_of() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}
