"""Finds llama.cpp's own converter, and installs it: ``python -m tunemill.gguf.source``.

The wheel of llama-cpp-python holds the compiled llama.cpp but not its conversion scripts; the source
distribution of the same version does. So converter, quantizer and inference always come from one
llama.cpp. Only the scripts are unpacked, from an archive whose sha256 is written here.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from tunemill.errors import ConfigurationError, IntegrityError, TunemillError
from tunemill.files import disk_errors, fsync_directory, sha256_file

PACKAGE = "llama-cpp-python"
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""Source distributions by version; a new version of the library needs a line here."""
COMMAND = "python -m tunemill.gguf.source"
VARIABLE = "TUNEMILL_LLAMA_CPP"
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
WANTED = re.compile(r"(convert_[a-z_]+\.py|conversion/[^/]+\.py|gguf-py/gguf/.+\.py|LICENSE)")
SERVER = re.compile(
    r"(tools/server/[^/]+\.(cpp|h)|(tools/mtmd|common|include|ggml/include)/[^/]+\.h(pp)?|common/jinja/[^/]+\.h"
    r"|src/llama-ext\.h|vendor/(cpp-httplib|nlohmann|sheredom)/[^/]+|LICENSE)"
)
"""What llama.cpp's server is compiled of, beside the libraries."""
MAX_FILE = 4 << 20
MAX_FILES = 2000
VERSION_FILE = "VERSION"

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Source:
    """llama.cpp's conversion scripts."""

    directory: Path
    version: str
    """Of llama-cpp-python, whose source distribution they come from."""


def installed_version() -> str:
    """Return the version of the installed llama-cpp-python.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ConfigurationError(f"{PACKAGE} is not installed: pip install 'tunemill[convert]'") from None


def default_directory(version: str) -> Path:
    """Return where the scripts of a version belong: beside the environment they serve."""
    return Path(sys.prefix) / "share" / "tunemill" / f"llama.cpp-{version}"


def find_source() -> Source:
    """Return the converter that matches the installed llama.cpp.

    Raises:
        ConfigurationError: it is missing, or of another version.
    """
    version = installed_version()
    chosen = os.environ.get(VARIABLE)
    directory = Path(chosen) if chosen else default_directory(version)
    missing = [name for name in SCRIPTS if not (directory / name).is_file()]
    if missing:
        where = f"{VARIABLE}={chosen} has no {missing[0]}" if chosen else "llama.cpp's converter is missing"
        raise ConfigurationError(f"{where}: run {COMMAND}")
    found = _version_of(directory)
    if found != version:
        raise ConfigurationError(
            f"the converter in {directory} is of {PACKAGE} {found}, but {version} is installed: run {COMMAND}"
        )
    return Source(directory.resolve(), version)


def _version_of(directory: Path) -> str:
    """Read which release a tree is from: our own note, or the source distribution around it."""
    note, package = directory / VERSION_FILE, directory.resolve().parent.parent / "PKG-INFO"
    if note.is_file():
        return note.read_text("utf-8").strip()
    if package.is_file():
        match = re.search(r"^Version: (\S+)$", package.read_text("utf-8"), re.MULTILINE)
        return match[1] if match else "unknown"
    return "unknown version"


def install(archive: Path | None = None) -> Source:
    """Install the converter of the installed llama.cpp, unless it is there.

    ``archive`` is the source distribution where there is no package index to get it from.

    Raises:
        ConfigurationError: no known hash, no package index, or no right to write.
        IntegrityError: the archive is not the released one.
    """
    version = installed_version()
    _known(version)
    target = default_directory(version)
    if not (target / VERSION_FILE).is_file():
        with tempfile.TemporaryDirectory(prefix="tunemill-") as temporary:
            unpack(archive_of(version, archive, Path(temporary)), target, version)
    return Source(target, version)


def archive_of(version: str, archive: Path | None, temporary: Path) -> Path:
    """Return the source distribution of a version: ``archive`` if given, else downloaded to ``temporary``.

    Raises:
        ConfigurationError: no known hash, or no package index.
        IntegrityError: it is not the released one.
    """
    expected = _known(version)
    found = archive or _download(version, expected, temporary)
    if sha256_file(found) != expected:
        raise IntegrityError(f"{found} is not {PACKAGE} {version}: its sha256 is not {expected}")
    return found


def _known(version: str) -> str:
    """Return the sha256 of a version's source distribution."""
    if version not in SHA256:
        raise ConfigurationError(
            f"{PACKAGE} {version} is not a version this Tunemill knows: install {', '.join(SHA256)}"
        )
    return SHA256[version]


def _download(version: str, expected: str, directory: Path) -> Path:
    """Get the source distribution through pip, which knows the configured index."""
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={version} --hash=sha256:{expected}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    command += ["--require-hashes", "--dest", str(directory)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*command, "-r", str(requirement)], env=environment, capture_output=True, text=True, check=False
    )
    archives = sorted(directory.glob("*.tar.gz"))
    if not archives:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigurationError(f"pip cannot download the source of {PACKAGE} {version}: {reason}")
    return archives[0]


def unpack(archive: Path, target: Path, version: str) -> None:
    """Unpack the scripts of a source distribution to ``target``, which appears whole or not at all.

    Raises:
        IntegrityError: the archive is damaged or lacks the scripts.
        ConfigurationError: ``target`` cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigurationError(
            f"{target.parent} cannot be written ({error.strerror}): set {VARIABLE} to an unpacked llama.cpp"
        ) from error
    try:
        with disk_errors(target):
            unpack_files(archive, temporary, WANTED)
            if not all((temporary / name).is_file() for name in SCRIPTS):
                raise IntegrityError(f"{archive} holds no llama.cpp conversion scripts")
            (temporary / VERSION_FILE).write_text(version + "\n")
            temporary.chmod(0o755)
            shutil.rmtree(target, ignore_errors=True)  # only ever an incomplete or foreign one
            temporary.rename(target)
            fsync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unpack_files(archive: Path, target: Path, wanted: re.Pattern[str]) -> None:
    """Write the files of llama.cpp whose paths match ``wanted`` below ``target``.

    Raises:
        IntegrityError: the archive is damaged.
    """
    for name, data in _wanted_files(archive, wanted):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _wanted_files(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Yield path below llama.cpp and bytes of each file; links and climbing paths are never wanted."""
    count = 0
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                _, _, name = member.name.partition("/vendor/llama.cpp/")
                safe = ".." not in PurePosixPath(name).parts and not name.startswith("/")
                if not (member.isreg() and safe and wanted.fullmatch(name) and member.size <= MAX_FILE):
                    continue
                count += 1
                content = members.extractfile(member)
                if content is None or count > MAX_FILES:
                    raise IntegrityError(f"{archive} holds more than {MAX_FILES} wanted files")
                yield name, content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise IntegrityError(f"{archive} is damaged: {error}") from error


def main(arguments: list[str]) -> int:
    """Install the converter; the only argument is an archive already at hand."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        source = install(Path(arguments[0]) if arguments else None)
    except TunemillError as error:
        log.error("%s", error)
        return error.exit_code
    log.info("llama.cpp's converter for %s %s is in %s", PACKAGE, source.version, source.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
