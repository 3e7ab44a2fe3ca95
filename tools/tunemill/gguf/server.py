"""Finds llama.cpp's own server, and compiles it: ``python -m tunemill.gguf.server``.

llama-cpp-python brings llama.cpp's libraries but not its server. Its source distribution holds the server's
few files; they are compiled here and linked with the very libraries that infer uses, so both compute alike,
on a GPU too. That takes a C++ compiler and a minute or two. An image brings the server beside the libraries.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tunemill.errors import ConfigurationError, TunemillError
from tunemill.files import disk_errors, fsync_directory
from tunemill.gguf import source
from tunemill.kernels import installed

COMMAND = "python -m tunemill.gguf.server"
VARIABLE = "TUNEMILL_LLAMA_SERVER"
NAME = "llama-server"
LINKED = ("llama-common", "mtmd", "llama", "ggml", "ggml-base")
HEADERS = ("tools/server", "tools/mtmd", "", "common", "include", "ggml/include", "vendor")
SOURCES = ("tools/server/*.cpp", "vendor/cpp-httplib/httplib.cpp")
FLAGS = (
    *("-std=c++17", "-O2", "-w", "-pthread", "-fvisibility=hidden"),
    *("-DLLAMA_SUBPROCESS", "-DCPPHTTPLIB_LISTEN_BACKLOG=512", "-DCPPHTTPLIB_TCP_NODELAY=1"),
    "-Dhttplib=httplib_of_server",  # libllama-common exports its own, compiled otherwise
)
NO_PAGE = """#pragma once
#include <string>
#include <vector>
struct llama_ui_asset { std::string name; };
inline std::vector<llama_ui_asset> llama_ui_get_assets() { return {}; }
"""
"""Stands for the server's web page, which its build would get from the internet."""

log = logging.getLogger("tunemill")


def find_server() -> Path:
    """Return the program: the one named by ``TUNEMILL_LLAMA_SERVER``, beside the libraries, or compiled here.

    Raises:
        ConfigurationError: there is none.
    """
    if chosen := os.environ.get(VARIABLE):
        if not os.access(chosen, os.X_OK):
            raise ConfigurationError(f"{VARIABLE}={chosen} is no program: name llama.cpp's {NAME}")
        return Path(chosen)
    version, libraries = source.installed_version(), installed()
    places = [_target(version), *([libraries / NAME] if libraries else [])]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    raise ConfigurationError(f"llama.cpp's server for llama-cpp-python {version} is missing: run {COMMAND}")


def install(archive: Path | None = None) -> Path:
    """Compile the server of the installed llama.cpp, unless it is there, and return it.

    ``archive`` is the source distribution where there is no package index to get it from.

    Raises:
        ConfigurationError: no compiler, no libraries to link with, no package index, or no right to write.
        IntegrityError: the archive is not the released one.
    """
    version = source.installed_version()
    target = _target(version)
    if not target.exists():
        compiler, folders = _compiler(), _libraries()
        with tempfile.TemporaryDirectory(prefix="tunemill-") as temporary:
            found = source.archive_of(version, archive, Path(temporary))
            tree = Path(temporary, "source")
            source.unpack_files(found, tree, source.SERVER)
            (tree / "ui.h").write_text(NO_PAGE)
            built = _compile(compiler, folders, tree)
            _run([str(built), "--version"], "does not start")
            _place(built, target)
    return target


def _target(version: str) -> Path:
    return source.default_directory(version).with_name(f"{NAME}-{version}") / NAME


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if found is None:
        raise ConfigurationError("there is no C++ compiler: apt-get install g++, or xcode-select --install")
    return found


def _libraries() -> tuple[Path, ...]:
    """Return the folders of the libraries to link with; wheels keep those of the package and others apart."""
    folder = installed()
    if folder is None:
        raise ConfigurationError(f"{source.PACKAGE} is not installed: pip install 'tunemill[infer]'")
    folders = (folder, folder.parent.parent / "lib")
    for name in LINKED:
        if not any(next(place.glob(f"lib{name}.*"), None) for place in folders):
            raise ConfigurationError(
                f"{folder} has no lib{name}, which the server needs: install {source.PACKAGE} from its "
                f"source (pip install --no-binary :all: --force-reinstall {source.PACKAGE})"
            )
    return folders


def _compile(compiler: str, folders: Sequence[Path], tree: Path) -> Path:
    include = [f"-I{tree / folder}" for folder in HEADERS]
    sources = [path for pattern in SOURCES for path in sorted(tree.glob(pattern))]
    log.info("compiling %s: %d files", NAME, len(sources))

    def one(path: Path) -> str:
        target = path.with_suffix(".o")
        _run([compiler, *FLAGS, *include, "-c", str(path), "-o", str(target)], f"cannot compile {path.name}")
        return str(target)

    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        objects = list(workers.map(one, sources))
    built = tree / NAME
    places = [word for folder in folders for word in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    linked = [f"-l{name}" for name in LINKED]
    _run([compiler, "-pthread", "-o", str(built), *objects, *places, *linked], "cannot be linked")
    return built


def _run(command: Sequence[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise ConfigurationError(f"{NAME}: {failure}: {(lines or ['no reason given'])[0][:300]}")


def _place(built: Path, target: Path) -> None:
    """Put the program where it belongs, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{NAME}.{os.getpid()}")
        with disk_errors(target):
            shutil.copy2(built, temporary)
            temporary.replace(target)
            fsync_directory(target.parent)
    except PermissionError as error:
        raise ConfigurationError(
            f"{target.parent} cannot be written: set {VARIABLE} to a {NAME} of llama.cpp"
        ) from error


def main(arguments: list[str]) -> int:
    """Compile the server; the only argument is an archive already at hand."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        server = install(Path(arguments[0]) if arguments else None)
    except TunemillError as error:
        log.error("%s", error)
        return error.exit_code
    log.info("llama.cpp's server for %s %s is %s", source.PACKAGE, source.installed_version(), server)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
