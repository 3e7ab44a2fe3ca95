#!/usr/bin/env bash
# Install quantize, infer and evaluate on this machine itself, for where no container reaches its GPU.
#
#   images/native/install.sh [--prefix DIR] [--backend auto|metal|cuda|cpu]
#
# DIR is a virtual environment, .venv-native in the current folder unless given. Run it again after an
# update or a kill: what is done is kept. Works with the bash 3.2 of macOS. Exit codes: docs/exit-codes.md.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
locks=$checkout/images/locks
prefix=.venv-native
backend=auto

fail() { # fail CODE MESSAGE
    printf 'install.sh: %s\n' "$2" >&2
    exit "$1"
}

read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        --prefix | --backend) [ $# -gt 1 ] || fail 2 "$1 needs a value (see --help)" ;;
        *) fail 2 "unknown argument '$1' (see --help)" ;;
        esac
        if [ "$1" = --prefix ]; then prefix=$2; else backend=$2; fi
        shift 2
    done
    case $backend in
    auto | metal | cuda | cpu) ;;
    *) fail 2 "--backend $backend: expected auto, metal, cuda or cpu" ;;
    esac
}

# What this machine is; sets system, chip, nvcc and gpu (each empty where there is none).
look_around() {
    system=$(uname -s) machine=$(uname -m) nvcc='' gpu=''
    if [ "$system" = Darwin ]; then
        chip=$(sysctl -n machdep.cpu.brand_string 2>/dev/null || echo unknown)
    else
        chip=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)
        nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
        gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
    fi
    echo "system: $system $machine, ${chip:-unknown processor}${gpu:+, $gpu}"
}

choose_backend() {
    local apple=no reason=''
    [ "$system $machine" != 'Darwin arm64' ] || apple=yes
    if [ "$backend" = auto ]; then
        backend=cpu
        if [ $apple = yes ]; then backend=metal; fi
        if [ -n "$gpu" ] && [ -n "$nvcc" ]; then backend=cuda; fi
        if [ -n "$gpu" ] && [ -z "$nvcc" ]; then reason=' (install the CUDA toolkit to use the GPU: no nvcc was found)'; fi
    fi
    case $backend in
    metal) [ $apple = yes ] || fail 78 "Metal needs macOS on Apple silicon, this is $system $machine: take another --backend" ;;
    cuda)
        [ -n "$gpu" ] || fail 78 "nvidia-smi shows no GPU: install NVIDIA's driver, or take --backend cpu"
        [ -n "$nvcc" ] || fail 78 "there is no nvcc: install the CUDA toolkit and put it on the PATH, or take --backend cpu"
        ;;
    esac
    echo "backend: $backend$reason"
}

# The first Python that is new enough and can make virtual environments.
find_python() {
    local candidate how='apt-get install python3 python3-venv, or see https://www.python.org'
    [ "$system" != Darwin ] || how='brew install python@3.13, or see https://www.python.org'
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.14 python3.11; do
        if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            echo "Python: $(command -v "$python"), $("$python" --version)"
            return
        fi
    done
    fail 78 "no Python 3.11 or newer with venv was found: $how, and set PYTHON to it"
}

find_compiler() {
    local how='apt-get install g++' name
    [ "$system" != Darwin ] || how='xcode-select --install'
    for name in "${CXX:-c++}" g++ clang++; do
        if command -v "$name" >/dev/null && "$name" --version >/dev/null 2>&1; then
            echo "compiler: $("$name" --version | head -n 1)"
            return
        fi
    done
    fail 78 "there is no C++ compiler to build llama.cpp with: $how"
}

# run WHAT COMMAND...: quietly; a failure is one line, and the log holds the rest.
run() {
    local what=$1 log=$prefix/install.log
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        fail 78 "$what failed: $(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-200); all of it is in $log"
    fi
}

make_environment() {
    if [ -e "$prefix" ] && [ ! -e "$prefix/pyvenv.cfg" ] && [ -n "$(ls -A "$prefix" 2>/dev/null || echo file)" ]; then
        fail 78 "$prefix is there already and no virtual environment: give another --prefix"
    fi
    mkdir -p "$prefix" 2>/dev/null || fail 78 "$prefix cannot be made: give another --prefix"
    prefix=$(cd "$prefix" && pwd)
    touch "$prefix/install.log" 2>/dev/null || fail 78 "$prefix cannot be written: give another --prefix"
    if ! "$prefix/bin/python" -m pip --version >/dev/null 2>&1; then
        run 'making the virtual environment' "$python" -m venv "$prefix"
    fi
}

pip() { # pip WHAT ARGUMENT...
    local what=$1
    shift
    run "$what" env PIP_DISABLE_PIP_VERSION_CHECK=1 "$prefix/bin/python" -m pip "$@"
}

# Compile llama.cpp unless this very build is there. pip's cache of what it compiled before knows nothing
# of options, so it serves only the build that has none.
install_llama() {
    local options='' fresh=--no-cache-dir made=$prefix/llama.built wanted
    case $system-$backend in
    *-metal) options=-DGGML_METAL=on ;;
    *-cuda) options=-DGGML_CUDA=on ;;
    Darwin-cpu) options=-DGGML_METAL=off ;;
    *) [ -n "${CMAKE_ARGS:-}" ] || fresh='' ;;
    esac
    wanted="$(cat "$locks/llama.txt") $backend ${CMAKE_ARGS:-}"
    [ "$wanted" != "$(cat "$made" 2>/dev/null || true)" ] || return 0
    rm -f "$made"
    echo "llama.cpp: compiling for $backend, which takes some minutes"
    [ "$backend" != cuda ] || export CUDACXX="${CUDACXX:-$nvcc}"
    CMAKE_ARGS="$options ${CMAKE_ARGS:-}" pip "compiling llama.cpp for $backend" install --no-deps \
        --force-reinstall --require-hashes ${fresh:+"$fresh"} --no-binary llama-cpp-python --requirement "$locks/llama.txt"
    printf '%s\n' "$wanted" >"$made"
}

read_arguments "$@"
look_around
choose_backend
find_python
find_compiler
make_environment
echo "environment: $prefix"
pip 'installing packages' install --no-deps --require-hashes --requirement "$locks/infer.txt"
install_llama
pip 'installing Tunemill' install --no-deps --editable "$checkout"
"$prefix/bin/python" -m tunemill.gguf.selfcheck "$backend" 2>"$prefix/install.log" || {
    rm -f "$prefix/llama.built"
    fail 78 "the check failed: $(tail -n 1 "$prefix/install.log"); PIP_NO_CACHE_DIR=1 and this again compiles llama.cpp anew"
}
echo "ready: $prefix/bin/tunemill"
