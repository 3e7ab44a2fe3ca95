"""Getting llama.cpp's converter: only from the released archive, whole or not at all."""

import io
import tarfile

import pytest

from tunemill.errors import ConfigurationError, IntegrityError
from tunemill.gguf import source
from tunemill.gguf.source import VERSION_FILE, find_source, install, installed_version, main, unpack

ROOT = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
SCRIPTS = {
    ROOT + "convert_hf_to_gguf.py": b"print('hf')",
    ROOT + "convert_lora_to_gguf.py": b"print('lora')",
    ROOT + "conversion/llama.py": b"x = 1",
    ROOT + "gguf-py/gguf/constants.py": b"y = 2",
}


def archive(path, files, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def names(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_only_the_scripts_are_unpacked(tmp_path):
    files = SCRIPTS | {ROOT + "src/llama.cpp": b"int main", "llama_cpp_python-0.3.36/setup.py": b"evil"}
    unpack(archive(tmp_path / "a.tar.gz", files), tmp_path / "share" / "llama.cpp", "0.3.36")
    found = names(tmp_path / "share" / "llama.cpp")
    assert found == {name.removeprefix(ROOT) for name in SCRIPTS} | {VERSION_FILE}


def test_paths_that_climb_and_links_are_never_unpacked(tmp_path):
    files = SCRIPTS | {
        ROOT + "conversion/../../../../../evil.py": b"evil",
        ROOT + "gguf-py/gguf/../../../../evil.py": b"evil",
        "../vendor/llama.cpp/conversion/fine.py": b"kept below the target",
    }
    links = [(ROOT + "conversion/link.py", "/etc/passwd"), (ROOT + "LICENSE", "../../../../secret")]
    unpack(archive(tmp_path / "a.tar.gz", files, links), tmp_path / "deep" / "er" / "llama.cpp", "0.3.36")
    assert not [name for name in names(tmp_path) if "evil" in name or "link" in name or "LICENSE" in name]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], id="truncated"),
        pytest.param(lambda whole: b"not an archive", id="no-archive"),
        pytest.param(lambda whole: whole[:40] + b"\xff" * 40 + whole[80:], id="damaged"),
    ],
)
def test_a_damaged_archive_leaves_nothing(tmp_path, content):
    path = archive(tmp_path / "a.tar.gz", {name: data * 3000 for name, data in SCRIPTS.items()})
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "share" / "llama.cpp", "0.3.36")
    assert not list((tmp_path / "share").iterdir())


def test_an_archive_without_scripts(tmp_path):
    path = archive(tmp_path / "a.tar.gz", {ROOT + "conversion/llama.py": b"x"})
    with pytest.raises(IntegrityError, match=r"no llama\.cpp conversion scripts"):
        unpack(path, tmp_path / "llama.cpp", "0.3.36")
    assert not (tmp_path / "llama.cpp").exists()


def test_another_archive_is_refused_by_its_hash(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(source, "default_directory", lambda version: tmp_path / "llama.cpp")
    path = archive(tmp_path / "a.tar.gz", SCRIPTS)
    with pytest.raises(IntegrityError, match="sha256 is not 832db069"):
        install(path)
    assert main([str(path)]) == 65
    assert not (tmp_path / "llama.cpp").exists()


def test_a_version_without_a_known_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "SHA256", {"0.0.1": "0" * 64})
    with pytest.raises(ConfigurationError, match=r"install 0\.0\.1"):
        install(tmp_path / "unread.tar.gz")


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "share").write_text("a file is in the way")
    with pytest.raises(ConfigurationError, match="TUNEMILL_LLAMA_CPP"):
        unpack(archive(tmp_path / "a.tar.gz", SCRIPTS), tmp_path / "share" / "llama.cpp", "0.3.36")


def test_what_is_installed_is_found_and_not_installed_again(converter):
    assert install().directory.resolve() == converter.directory or converter.directory.exists()
    assert converter.version == installed_version()


def test_another_version_is_refused(tmp_path, monkeypatch):
    unpack(archive(tmp_path / "a.tar.gz", SCRIPTS), tmp_path / "llama.cpp", "0.2.9")
    monkeypatch.setenv("TUNEMILL_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    with pytest.raises(ConfigurationError, match=r"of llama-cpp-python 0\.2\.9, but 0\.3\.36 is installed"):
        find_source()


def test_an_unpacked_source_distribution_will_do(tmp_path, monkeypatch):
    for name, data in SCRIPTS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "llama_cpp_python-0.3.36" / "PKG-INFO").write_text("Name: x\nVersion: 0.3.36\n")
    monkeypatch.setenv("TUNEMILL_LLAMA_CPP", str(tmp_path / ROOT))
    assert find_source().directory == (tmp_path / ROOT).resolve()
