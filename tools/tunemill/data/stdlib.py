"""The demo's data: docstrings of the running Python's standard library, with their chapter.

Every machine with Python has them: real text with a real label (the chapter of the library
reference which documents the module), offline and free to use. They are read from the sources
with ``ast``, never by importing, so the result depends on the Python version alone. The table
of chapters lists modules of Python 3.11 to 3.14; a module it does not know is left out.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tunemill.errors import ConfigurationError

LICENSE: Final = "PSF-2.0"
"""Of Python and its standard library."""

MINIMUM_PER_CHAPTER: Final = 60
"""Chapters with fewer docstrings are left out: a fifth held out would be a dozen texts."""

MINIMUM_CHARACTERS: Final = 12
"""Shorter docstrings ("Do it.", "See above.") tell nothing about a chapter."""

SKIPPED: Final = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
"""Directories that are no part of the library, or that some installations leave out."""

_CHAPTERS: Final = {
    "Text processing": "string re difflib textwrap stringprep rlcompleter sre_compile sre_parse",
    "Binary data": "struct codecs encodings",
    "Data types": """datetime zoneinfo calendar collections heapq bisect weakref types copy pprint reprlib
        enum graphlib _collections_abc _pydatetime _strptime _weakrefset""",
    "Numbers and mathematics": "numbers decimal fractions random statistics _pydecimal _pylong",
    "Functional programming": "functools operator",
    "Files and directories": """pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob
        fnmatch linecache shutil""",
    "Data persistence": "pickle copyreg shelve dbm sqlite3 _compat_pickle",
    "Compression and archiving": "gzip bz2 lzma zipfile tarfile compression _compression",
    "File formats": "csv configparser tomllib netrc plistlib xdrlib",
    "Cryptography": "hashlib hmac secrets",
    "Operating system": """os io argparse getopt logging getpass curses platform ctypes optparse _pyio
        nturl2path _aix_support _ios_support _android_support _apple_support""",
    "Concurrent execution": """threading multiprocessing concurrent subprocess sched queue contextvars
        _threading_local dummy_threading""",
    "Networking": "asyncio socket ssl selectors signal asyncore asynchat smtpd",
    "Internet data": "email json mailbox mailcap mimetypes base64 quopri uu",
    "Markup": "html xml _markupbase",
    "Internet protocols": """webbrowser cgi cgitb wsgiref urllib http ftplib poplib imaplib nntplib smtplib
        uuid socketserver xmlrpc ipaddress telnetlib""",
    "Multimedia": "wave colorsys aifc chunk imghdr sndhdr sunau",
    "Internationalization": "gettext locale _bootlocale",
    "Program frameworks": "turtle cmd shlex",
    "Development tools": "typing pydoc pydoc_data doctest unittest _pyrepl",
    "Debugging and profiling": "bdb pdb profile cProfile pstats timeit trace tracemalloc profiling",
    "Packaging": "ensurepip venv zipapp",
    "Runtime services": """sysconfig warnings dataclasses contextlib abc traceback __future__ inspect site
        annotationlib _py_abc _sitebuiltins _py_warnings _osx_support""",
    "Interactive interpreters": "code codeop",
    "Importing modules": "zipimport pkgutil modulefinder runpy importlib imp",
    "Language services": """ast symtable token keyword tokenize tabnanny pyclbr py_compile compileall dis
        opcode pickletools _ast_unparse _opcode_metadata""",
    "Unix": "tty pty pipes crypt",
}
"""Chapter of the library reference (docs.python.org/3/library) to its modules with sources.

Tk's modules, distutils and lib2to3 are not listed: distributions package them apart, and the
demo's data should differ as little as possible from machine to machine.
"""

CHAPTERS: Final = {module: chapter for chapter, modules in _CHAPTERS.items() for module in modules.split()}
"""Top-level module to chapter."""


@dataclass(frozen=True)
class Docstring:
    """One documented module, class or function."""

    id: str
    """``module:qualified.name``, with ``#2`` and so on where a name is defined again."""
    text: str
    """The docstring without its indentation."""
    module: str
    """Dotted name of the module."""
    label: str
    """Chapter of the library reference."""


def docstrings(root: Path | None = None) -> list[Docstring]:
    """Return the docstrings of all known modules, sorted by module and place in it.

    Chapters with fewer than ``MINIMUM_PER_CHAPTER`` docstrings are left out.

    Raises:
        ConfigurationError: this Python came without the sources of its library.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = [docstring for path in _sources(root) for docstring in _of_file(root, path)]
    counts = Counter(docstring.label for docstring in found)
    kept = [docstring for docstring in found if counts[docstring.label] >= MINIMUM_PER_CHAPTER]
    if not kept:
        raise ConfigurationError(
            f"{root} holds no sources of the standard library: use a Python installed with its .py files"
        )
    return kept


def chapters(found: list[Docstring]) -> list[str]:
    """Return the labels in the order of the library reference."""
    present = {docstring.label for docstring in found}
    return [chapter for chapter in _CHAPTERS if chapter in present]


def version() -> str:
    """Return what the docstrings depend on: implementation and version of this Python."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def _sources(root: Path) -> list[Path]:
    top = [path for path in root.glob("*") if path.stem in CHAPTERS and not path.name.startswith("__pyc")]
    files = [path for path in top if path.suffix == ".py"]
    for package in (path for path in top if path.is_dir()):
        files += [path for path in package.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _of_file(root: Path, path: Path) -> Iterator[Docstring]:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    module = ".".join(parts)
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # some packages carry a template or a sample that is not Python 3
        return
    times: Counter[str] = Counter()
    for name, text in _documented(tree, ""):
        text = text.strip()
        if len(text) < MINIMUM_CHARACTERS:
            continue
        times[name] += 1
        docstring = Docstring(f"{module}:{name}", text, module, CHAPTERS[parts[0]])
        again = times[name]
        yield docstring if again == 1 else replace(docstring, id=f"{docstring.id}#{again}")


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield name, text
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{child.name}" if name else child.name
        yield from _documented(child, inner)
