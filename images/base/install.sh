# Fills an image's environment; sourced by the RUN steps that mount it, never part of a layer.
# shellcheck shell=bash
# shellcheck source=images/base/site.sh
. /base/site.sh

# install_locked LOCK [PIP OPTION...]: exactly the lock's files, each checked against its hash.
install_locked() {
    local lock=$1
    shift
    /opt/build/bin/pip --python "$venv/bin/python" install --quiet --no-deps --require-hashes \
        --find-links /wheels --requirement "/locks/$lock.txt" "$@"
}

# install_torch LOCK: the builds without CUDA have an index of their own, $TORCH_INDEX.
install_torch() {
    PIP_EXTRA_INDEX_URL=${TORCH_INDEX:-} install_locked "$1" --target /opt/torch
    rm -rf /opt/torch/torch/{include,test} /opt/torch/torch/bin/{protoc,test_}* /opt/torch/torch/bin/*Test \
        /opt/torch/torch/lib/*test*.so /opt/torch/bin
    find /opt/torch/torch -depth -type d -name tests -exec rm -rf {} +
    find /opt/torch -name '*.a' -delete
    strip --strip-unneeded /opt/torch/torch/lib/libtorch_*.so
}

# install_llama: llama.cpp's Python package, and beside it the libraries that llama.sh compiled.
install_llama() {
    /opt/build/bin/pip --python "$venv/bin/python" install --quiet --no-deps --no-index /opt/llama/*.whl
    mkdir -p "$(packages_of "$venv")/llama_cpp/lib"
    cp --no-dereference /opt/llama/lib/* "$(packages_of "$venv")/llama_cpp/lib/"
}

# install_code: Tunemill itself, from the sources at /source.
install_code() {
    cp -r /source /tmp/source # setuptools writes beside what it builds
    PATH=/opt/build/bin:$PATH pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir /tmp /tmp/source
    /opt/build/bin/pip --python "$venv/bin/python" install --quiet --no-deps --no-index \
        --target /opt/tunemill /tmp/tunemill-*.whl
    rm -rf /tmp/source /tmp/tunemill-*.whl
}

# slim_packages: leave out what packages carry for their developers, and parts that no stage uses: Arrow's
# servers and file systems, the descriptions of other services than S3 and how to log in to it, symbols.
slim_packages() {
    local packages
    packages=$(packages_of "$venv")
    find "$packages" -depth -type d \( -name tests -o -path '*/pyarrow/include' \) -exec rm -rf {} +
    find "$packages" -name '*.a' -delete
    if [ -d "$packages/pyarrow" ]; then
        find "$packages/pyarrow" \( -name '*flight*' -o -name '*s3*' \) -delete
    fi
    find "$packages/botocore/data" -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -rf {} +
    # NumPy's and SciPy's own libraries were rewritten after they were linked, and stripping breaks them.
    find "$packages" -name '*.so*' -type f ! -path '*.libs/*' -exec strip --strip-unneeded {} +
    [ ! -d "$packages/pyarrow" ] || "$venv/bin/python" -c 'import pyarrow.dataset, pyarrow.parquet, pyarrow.csv'
}
