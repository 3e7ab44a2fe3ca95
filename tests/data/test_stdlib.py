"""The demo's docstrings: read from sources, labelled by chapter, the same every time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tunemill.data import stdlib
from tunemill.errors import ConfigurationError

ENOUGH = "".join(f'def f{n}():\n    """Do the thing number {n}."""\n' for n in range(60))


@pytest.fixture(scope="module")
def found() -> list[stdlib.Docstring]:
    return stdlib.docstrings()


def test_there_are_thousands_in_about_twenty_chapters(found: list[stdlib.Docstring]) -> None:
    assert 4000 < len(found) < 9000
    counts = Counter(one.label for one in found)
    assert 18 <= len(counts) <= 23
    assert min(counts.values()) >= stdlib.MINIMUM_PER_CHAPTER
    assert counts.most_common(1)[0][1] / len(found) < 0.2
    assert set(stdlib.chapters(found)) == set(counts)


def test_ids_are_unique_and_modules_belong_to_their_chapter(found: list[stdlib.Docstring]) -> None:
    assert len({one.id for one in found}) == len(found)
    by_id = {one.id: one for one in found}
    assert by_id["json.decoder:JSONDecoder"].label == "Internet data"
    assert by_id["json:dumps"].text.startswith("Serialize ``obj``")
    assert by_id["argparse:"].label == "Operating system"


def test_no_module_is_in_two_chapters_and_none_is_imported() -> None:
    modules = [module for names in stdlib._CHAPTERS.values() for module in names.split()]
    assert len(set(modules)) == len(modules)
    assert "turtle" not in sys.modules


def test_the_table_knows_every_public_module_with_documented_sources() -> None:
    """A new module of a new Python is to be put into its chapter, not silently left out."""
    left_out = {"antigravity", "this", "tkinter", "idlelib", "turtledemo", "distutils", "lib2to3", "nt"}
    root = Path(stdlib.sysconfig.get_paths()["stdlib"])
    public = {
        name
        for name in sys.stdlib_module_names
        if not name.startswith("_")
        and any((root / path).exists() for path in (f"{name}.py", f"{name}/__init__.py"))
    }
    assert public - stdlib.CHAPTERS.keys() <= left_out | {"sre_constants"}


def library(root: Path, **modules: str) -> Path:
    for name, source in modules.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


def test_small_chapters_short_texts_and_strangers_are_left_out(tmp_path: Path) -> None:
    root = library(
        tmp_path,
        json=ENOUGH + 'class C:\n    """Short."""\n',
        csv='"""A chapter with one docstring only."""',
        numpy=ENOUGH,
        email__test__test_mail=ENOUGH,
    )
    assert {one.module for one in stdlib.docstrings(root)} == {"json"}
    assert len(stdlib.docstrings(root)) == 60


def test_a_name_defined_again_is_numbered(tmp_path: Path) -> None:
    method = '    def m(self):\n        """The same name again."""\n'
    again = f"class C:\n{method}{method}"
    ids = [one.id for one in stdlib.docstrings(library(tmp_path, json=ENOUGH + again))]
    assert ids[-2:] == ["json:C.m", "json:C.m#2"]


def test_a_python_without_sources_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no sources of the standard library"):
        stdlib.docstrings(tmp_path)
