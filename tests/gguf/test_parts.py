"""A model in several files: made, used like one, and joined into one."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace

import pytest
from click.testing import CliRunner

from tunemill.commands.stages import stage_command
from tunemill.errors import BadDataError, UsageError
from tunemill.gguf.config import ConvertConfig, QuantizeConfig
from tunemill.gguf.convert import convert
from tunemill.gguf.header import read_gguf
from tunemill.gguf.parts import read_model, read_parts
from tunemill.gguf.quantize import quantize
from tunemill.ggufs import find_gguf


@pytest.fixture(scope="module")
def both(tmp_path_factory, made, data, converter):
    """The same model in one file and in parts of at most 700 kB."""
    from tunemill.progress import Progress
    from tunemill.work import Input, Work

    directories = []
    for name, size in (("whole", "0"), ("split", "700K")):
        root = tmp_path_factory.mktemp(name)
        inputs = {
            role: Input(f"t/{role}@sha256:{'a' * 64}", "c" * 64, role, path, {})
            for role, path in (("merged", made), ("data", data))
        }
        config = ConvertConfig(outtype="f32", split_max_size=size)
        (root / "out").mkdir()
        this = Work(config, inputs, root / "out", root / "scratch", Progress(quiet=True), None)
        facts = convert(this)
        directories.append((root / "out", facts))
    return directories


def tensors(header_of):
    return {
        tensor.name: (tensor.type, tensor.shape, header.path.read_bytes()[tensor.start :][: tensor.size])
        for header in header_of
        for tensor in header.tensors
    }


def test_parts_hold_what_the_whole_file_holds(both):
    (whole, facts), (split, of_split) = both
    names = sorted(path.name for path in split.glob("*.gguf"))
    assert len(names) > 3
    assert names[0] == f"model-F32-00001-of-{len(names):05d}.gguf"
    assert of_split["file"] == names[0]
    assert of_split["tensor_types"] == facts["tensor_types"]
    assert of_split["tokens"] == facts["tokens"]
    assert tensors(read_parts(find_gguf(split))) == tensors(read_parts(find_gguf(whole)))


def test_joined_they_are_that_file_again(both, tmp_path):
    (whole, _), (split, _) = both
    parts = shutil.copytree(split, tmp_path / "parts")
    ended = CliRunner().invoke(stage_command("convert"), ["--join", str(find_gguf(parts))])
    assert ended.exit_code == 0, ended.exception
    joined = read_gguf(parts / "model-F32.gguf")
    assert ended.stdout.strip() == str(joined.path)
    assert tensors([joined]) == tensors([read_gguf(find_gguf(whole))])
    said = {key: value for key, value in joined.metadata.items() if not key.startswith("split.")}
    assert said == dict(read_gguf(find_gguf(whole)).metadata)
    assert joined.metadata["split.count"] == 0
    again = CliRunner().invoke(stage_command("convert"), ["--join", str(parts / joined.path.name)])
    assert isinstance(again.exception, UsageError)


def test_llama_cpp_reads_the_joined_file(both, tmp_path):
    import threading

    from tunemill.gguf.library import Library
    from tunemill.gguf.parts import join

    (_, facts), (split, _) = both
    told = []
    join(find_gguf(split), tmp_path / "joined.gguf", told.append)
    assert sum(told) == sum(tensor.size for tensor in read_gguf(tmp_path / "joined.gguf").tensors)
    loaded = Library(tmp_path / "scratch", threading.Event()).load(tmp_path / "joined.gguf")
    assert loaded.value["bytes"] > 0
    assert facts["architecture"] == read_gguf(tmp_path / "joined.gguf").architecture


def test_a_split_model_quantizes_to_the_same_bytes(both, work, tmp_path):
    (whole, _), (split, _) = both
    made = []
    for directory in (whole, split):
        this = work(QuantizeConfig(quant="Q8_0"), gguf=directory)
        quantize(this)
        made.append(tensors([read_gguf(this.output / "model-Q8_0.gguf")]))
        shutil.rmtree(this.output)
    assert made[0] == made[1]


def damaged(split, tmp_path, damage):
    parts = shutil.copytree(split, tmp_path / "parts")
    damage(sorted(parts.glob("*.gguf")))
    with pytest.raises(BadDataError) as caught:
        read_model(find_gguf(parts))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_part(both, tmp_path):
    assert "is missing" in damaged(both[1][0], tmp_path, lambda files: files[1].unlink())


def test_parts_in_another_order(both, tmp_path):
    def swap(files):
        aside = files[1].rename(files[1].with_name("aside"))
        files[2].rename(files[1])
        aside.rename(files[2])

    assert "says that it is part 2" in damaged(both[1][0], tmp_path, swap)


def test_a_part_of_a_model_with_other_tensors(both, tmp_path):
    def forge(files):
        content = files[1].read_bytes()
        key = b"split.tensors.count"
        place = content.index(key) + len(key) + 4
        number = struct.unpack("<I", content[place : place + 4])[0]
        files[1].write_bytes(content[:place] + struct.pack("<I", number + 1) + content[place + 4 :])

    assert "tensors" in damaged(both[1][0], tmp_path, forge)


def test_a_model_smaller_than_a_part_is_one_file(both, work, model, data):
    this = work(ConvertConfig(split_max_size="5G"), merged=model, data=data)
    convert(replace(this))
    assert [path.name for path in this.output.glob("*.gguf")] == ["model-F16.gguf"]
