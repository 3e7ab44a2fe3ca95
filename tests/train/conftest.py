"""The micro model and data are made once a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import micro


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On a busy machine, threads that wait for each other over a micro model take minutes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return micro.make_base(tmp_path_factory.mktemp("micro") / "base")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("micro")
    return micro.make_data(root / "data", validation=[micro.row(n, "rose", "red") for n in range(100, 104)])
