"""Commands as a container starts them: what is missing or wrong around them is one line and its code.

Each case runs the real program in a process of its own, with an environment made from nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUNEMILL = [sys.executable, "-m", "tunemill.cli"]
NOBODY = 54321  # no entry in the password file
KEYS = {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
INI = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Run a program with nothing but these variables."""

    def run(
        words: Sequence[str], environment: Mapping[str, str] = {}, before: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        usual = {
            "PATH": os.environ["PATH"],
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        given = {name: value for name, value in (usual | dict(environment)).items() if value}
        return subprocess.run(
            [*before, *words],
            cwd=tmp_path,
            env=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    return run


def assert_one_line(ended: subprocess.CompletedProcess[str], code: int, *reasons: str) -> None:
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    assert ended.stderr.startswith("tunemill: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    for reason in reasons:
        assert reason in ended.stderr


class TestCredentials:
    @pytest.mark.parametrize(
        ("environment", "code", "reasons"),
        [
            pytest.param({}, 77, ["set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"], id="none"),
            pytest.param({"AWS_ACCESS_KEY_ID": "a"}, 77, ["missing: AWS_SECRET_ACCESS_KEY"], id="half"),
            pytest.param({"FILE": "absent"}, 77, ["absent, which does not exist"], id="no file"),
            pytest.param({"FILE": "."}, 77, ["which is a directory"], id="a directory in its place"),
            pytest.param({"FILE": "empty"}, 77, ["no keys for the profile 'default'"], id="empty file"),
            pytest.param(
                {"FILE": "good", "AWS_PROFILE": "lab"}, 77, ["no keys for the profile 'lab'"], id="profile"
            ),
            pytest.param({"FILE": "text"}, 78, ["text", "expected lines such as '[default]'"], id="no ini"),
        ],
    )
    def test_missing_or_malformed(
        self, call: Call, tmp_path: Path, environment: dict[str, str], code: int, reasons: list[str]
    ) -> None:
        for name, text in {"empty": "", "good": INI, "text": "secret\n"}.items():
            (tmp_path / name).write_text(text)
        file = environment.pop("FILE", "")
        environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / file) if file else ""}
        environment |= {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "HOME": str(tmp_path)}
        assert_one_line(call([*TUNEMILL, "store", "ls", "--store", "s3://lab"], environment), code, *reasons)

    def test_a_file_this_user_cannot_read(self, call: Call, tmp_path: Path) -> None:
        before = as_nobody(tmp_path)
        (tmp_path / "keys").write_text(INI)
        (tmp_path / "keys").chmod(0o600)
        environment = {
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys"),
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        }
        ended = call([*TUNEMILL, "store", "ls", "--store", "s3://lab"], environment, before)
        assert_one_line(ended, 77, f"which user {NOBODY} cannot read")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize(
    "address",
    ["localhost:9000", "http://", "http://host:port", "http://host:99999", "ftp://host", "http://a host"],
)
def test_an_endpoint_that_is_no_address(call: Call, variable: str, address: str) -> None:
    ended = call([*TUNEMILL, "store", "ls", "--store", "s3://lab"], {**KEYS, variable: address})
    assert_one_line(ended, 78, f"{variable} is '{address}', expected an address such as http://host:9000")


def test_a_server_without_tls(call: Call) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {**KEYS, "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{server.server_port}"}
    try:
        ended = call([*TUNEMILL, "store", "ls", "--store", "s3://lab"], environment)
    finally:
        server.shutdown()
        server.server_close()
    assert_one_line(ended, 78, "does not speak TLS")


PULL = [*TUNEMILL, "store", "pull", "base/oak", "out", "--store", "store"]
STAGE = [sys.executable, str(ROOT / "tests" / "toys.py"), "grow", "--model", "oak.yaml", "--run", "forest"]
STAGE += ["--store", "store"]
BOTH = pytest.mark.parametrize("words", [pytest.param(PULL, id="pull"), pytest.param(STAGE, id="stage")])


@pytest.fixture
def stored(call: Call, tmp_path: Path) -> Path:
    """A store with something to pull and to work on; returns its folder's parent."""
    (tmp_path / "oak.yaml").write_text("seed: 3\n")
    (tmp_path / "store").mkdir()
    plant = [sys.executable, str(ROOT / "tests" / "toys.py"), "plant", "--model", "oak.yaml"]
    made = call([*plant, "--store", "store"], {"TUNEMILL_CACHE": str(tmp_path / "own")})
    assert made.returncode == 0, made.stderr
    return tmp_path


@BOTH
class TestCache:
    def test_on_a_full_disk(self, call: Call, stored: Path, words: list[str]) -> None:
        ended = call(words, {"TUNEMILL_CACHE": str(stored / "disk" / "c")}, mounted(stored, "size=4k"))
        assert_one_line(ended, 75, "free some space")
        assert not (stored / "out").exists()

    def test_on_a_read_only_disk(self, call: Call, stored: Path, words: list[str]) -> None:
        ended = call(words, {"TUNEMILL_CACHE": str(stored / "disk" / "c")}, mounted(stored, "ro"))
        assert_one_line(ended, 78, "Read-only file system", "set TUNEMILL_CACHE")

    def test_without_a_home(self, call: Call, stored: Path, words: list[str]) -> None:
        ended = call(words, {}, as_nobody(stored))
        assert_one_line(ended, 78, f"user {NOBODY} has no home directory", "set TUNEMILL_CACHE")

    def test_in_a_home_of_others(self, call: Call, stored: Path, words: list[str]) -> None:
        ended = call(words, {"HOME": "/"}, as_nobody(stored))
        assert_one_line(ended, 78, "Permission denied", "set TUNEMILL_CACHE")

    def test_without_a_home_but_with_a_cache(self, call: Call, stored: Path, words: list[str]) -> None:
        cache = stored / "given"
        cache.mkdir(mode=0o777)
        cache.chmod(0o777)
        stored.chmod(0o777)
        for path in [stored / "store", *(stored / "store").rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o644)
        ended = call(words, {"TUNEMILL_CACHE": str(cache)}, as_nobody(stored))
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("mount", ["ro", "size=4k"])
def test_a_place_that_cannot_be_written(call: Call, stored: Path, mount: str) -> None:
    words = [*TUNEMILL, "store", "pull", "base/oak", str(stored / "disk" / "out"), "--store", "store"]
    ended = call(words, {"TUNEMILL_CACHE": str(stored / "own")}, mounted(stored, mount))
    if mount == "ro":
        assert_one_line(ended, 77, "disk/out cannot be made (Read-only file system)")
    else:
        assert_one_line(ended, 75, "free some space")
        assert not (stored / "own" / "blobs").exists(), "it was fetched before the place was looked at"


def mounted(folder: Path, options: str) -> list[str]:
    """Words that run a program with a small file system at ``folder/disk``, seen by it alone."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root on Linux can mount a small file system")
    (folder / "disk").mkdir()
    script = (
        f"mount -t tmpfs -o {options} none '{folder}/disk' && head -c 8192 /dev/zero >'{folder}/disk/full'"
    )
    return ["unshare", "--mount", "sh", "-c", f'{{ {script}; }} 2>/dev/null; exec "$@"', "sh"]


def as_nobody(folder: Path) -> list[str]:
    """Words that run a program as a user without a name, who may enter ``folder``."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root on Linux can become another user")
    for parent in (folder, *folder.parents):
        if parent.stat().st_mode & 0o011 != 0o011 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if subprocess.run([*words, "test", "-r", str(ROOT / "tools/tunemill/cli.py")], check=False).returncode:
        pytest.skip(f"another user cannot read {ROOT}")
    return words
