"""The micro model and data are made once a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import micro


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return micro.make_base(tmp_path_factory.mktemp("micro") / "base")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("micro")
    return micro.make_data(root / "data", validation=[micro.row(n, "rose", "red") for n in range(100, 104)])
