"""Push and pull of one large file, beside s3transfer alone and cp, in one run.

    python tests/bench/bench_transfer.py [--mib 1024] [--rounds 3] [--folder FOLDER]

With TUNEMILL_TEST_S3 (and AWS keys) set, as under ``tests/s3/run.py``, the store is a bucket there;
otherwise a directory. Every method takes its turn in every round and the best round counts. s3transfer
hashes nothing but its own CRC; a publish hashes the whole file and every part, a pull the whole file. All
reads come from the page cache, so the figures compare programs, not disks; each write is flushed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tunemill.progress import Progress
from tunemill.store import Draft, Provenance, Store, open_store

BLOCK = 1 << 20


def make_file(path: Path, mib: int) -> None:
    with path.open("wb") as target:
        for _ in range(mib):
            target.write(os.urandom(BLOCK))


def refresh(path: Path) -> None:
    """Give the file new content cheaply, so that no store has it already."""
    with path.open("r+b") as target:
        target.write(os.urandom(64))


def draft(folder: Path, name: str) -> Draft:
    now = datetime.now(UTC)
    made = Provenance("bench", "0", {}, {}, {}, {}, "0", None, None, now, now)
    return Draft(f"bench/{name}", "base", folder, {}, made)


def timed(work: Callable[[], object]) -> float:
    os.sync()  # what the method before left to the kernel is not this one's
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    with target.open("rb") as written:
        os.fsync(written.fileno())


def open_target(folder: Path) -> tuple[Store, str | None]:
    """Return the store, and the bucket when it is one."""
    endpoint = os.environ.get("TUNEMILL_TEST_S3")
    if not endpoint:
        return open_store(str(folder / "store"), create=True), None
    import boto3

    os.environ["AWS_ENDPOINT_URL"] = endpoint
    bucket = f"bench-{uuid.uuid4().hex[:12]}"
    boto3.session.Session().client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
    return open_store(f"s3://{bucket}/bench"), bucket


def s3transfer_alone(bucket: str, source: Path, target: Path, workers: int) -> tuple[float, float]:
    """Seconds up and down with the library's manager, at our part size and workers."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.session.Session().client(
        "s3", region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
    )
    config = TransferConfig(
        multipart_threshold=16 * BLOCK, multipart_chunksize=16 * BLOCK, max_concurrency=workers
    )

    def down() -> None:
        client.download_file(bucket, "alone", str(target), Config=config)
        with target.open("rb") as written:
            os.fsync(written.fileno())

    up = timed(lambda: client.upload_file(str(source), bucket, "alone", Config=config))
    seconds = timed(down)
    client.delete_object(Bucket=bucket, Key="alone")
    return up, seconds


def one_round(store: Store, bucket: str | None, folder: Path, name: str) -> dict[str, float]:
    source = folder / "source" / "model.safetensors"
    refresh(source)
    times: dict[str, float] = {}
    times["cp"] = timed(lambda: copy(source, folder / "copy"))
    if bucket is not None:
        up, down = s3transfer_alone(bucket, source, folder / "down", store.transfer.workers)
        times["s3transfer up"], times["s3transfer down"] = up, down
    times["push"] = timed(lambda: store.publish(draft(source.parent, name), Progress(quiet=True)))
    artifact = store.resolve(f"bench/{name}")
    times["pull"] = timed(lambda: store.pull(artifact, folder / "pulled", Progress(quiet=True)))
    times["push again"] = timed(lambda: store.publish(draft(source.parent, name), Progress(quiet=True)))
    for left in ("pulled", "cache"):
        shutil.rmtree(folder / left)
    for entry in store.backend.list("blobs/sha256/"):
        store.backend.delete(entry.key)
    return times


def report(best: dict[str, float], mib: int) -> None:
    print(f"{'method':18}{'seconds':>9}{'MiB/s':>9}{'to cp':>8}{'to s3transfer':>15}")
    for method, seconds in best.items():
        peer = {"push": "s3transfer up", "pull": "s3transfer down"}.get(method, "")
        ratio = f"{seconds / best[peer]:.2f}" if peer in best else ""
        print(f"{method:18}{seconds:9.2f}{mib / seconds:9.0f}{seconds / best['cp']:8.2f}{ratio:>15}")
    print(f"peak resident of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        os.environ["TUNEMILL_CACHE"] = str(folder / "cache")
        (folder / "source").mkdir()
        make_file(folder / "source" / "model.safetensors", arguments.mib)
        store, bucket = open_target(folder)
        print(f"{arguments.mib} MiB, {store.url if bucket else 'a directory store'}")
        rounds = [one_round(store, bucket, folder, f"round-{n}") for n in range(arguments.rounds)]
        report({method: min(each[method] for each in rounds) for method in rounds[0]}, arguments.mib)


if __name__ == "__main__":
    main()
