"""The pipeline once more, with QLoRA and through a real S3 server.

Shortened, since what passes between the stages is the point.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import pytest

from tunemill.store import open_store
from tunemill.store.s3 import S3Backend

SHORT = (
    *("--set", "num_hidden_layers=1", "--set", "pretrain_epochs=0.1", "--set", "max_steps=4"),
    *("--set", "method=qlora", "--set", "per_device_train_batch_size=4"),
    *("--set", "save_steps=2"),
)

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def url() -> str:
    endpoint = os.environ.get("TUNEMILL_TEST_S3")
    if not endpoint:
        pytest.skip("TUNEMILL_TEST_S3 names no real S3 server; `make test-s3` starts one")
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    backend = S3Backend(f"tunemill-{uuid.uuid4().hex[:16]}", "lab")
    backend.client.create_bucket(Bucket=backend.bucket)
    return backend.url


def test_the_pipeline_runs_through_a_real_server(tunemill: Any, url: str) -> None:
    arguments = ("--model", "tiny", "--task", "stdlib", "--store", url, "--quant", "Q4_K_M", *SHORT)
    tunemill("pipeline", *arguments)
    store = open_store(url)
    assert store.resolve("tiny-stdlib/report-q4_k_m").facts["rows"] > 500
    tunemill("store", "verify", "tiny-stdlib/report-q4_k_m", "--store", url)
    again = tunemill("pipeline", *arguments)
    assert "reusing tiny-stdlib/report-q4_k_m@" in again.stderr
    tunemill("store", "doctor", "--store", url)
