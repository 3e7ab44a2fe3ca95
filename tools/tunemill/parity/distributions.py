"""What a model answers to the probe set: next-token distributions, and a likelihood for each label."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.files import atomic_write

FILE = "parity.npz"
MOST_BYTES = 1 << 30  # of one array read: far above what probes.MOST_BYTES lets a stage write

Halves = npt.NDArray[np.float16]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distributions:
    """The answers of one model."""

    probes: str
    """Digest of the probe set."""
    rows: Halves
    """``(positions, vocabulary)`` log-probabilities in nats, the probes' positions one after the other.
    A log-probability near 0 keeps 11 bits; the rounding of all adds about 2e-6 nats to a divergence."""
    labels: Doubles
    """``(probes, labels)`` log-likelihoods in nats, with no labels ``(probes, 0)``. Exact wherever a
    label could be the best; an upper bound below the best elsewhere (see ``measure``)."""

    def save(self, directory: Path) -> None:
        """Write ``parity.npz``; equal values give equal bytes."""
        with atomic_write(directory / FILE) as target:
            np.savez(target, probes=np.array(self.probes), rows=self.rows, labels=self.labels)

    @classmethod
    def load(cls, directory: Path) -> Distributions:
        """Read ``parity.npz``.

        Raises:
            BadDataError: it is not what ``save`` writes.
        """
        path = directory / FILE
        try:
            with zipfile.ZipFile(path) as archive:
                if any(entry.file_size > MOST_BYTES for entry in archive.infolist()):
                    raise ValueError(f"an array is larger than {MOST_BYTES} bytes")
            with np.load(path, allow_pickle=False) as arrays:
                loaded = cls(str(arrays["probes"]), arrays["rows"], arrays["labels"])
            _check(loaded)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError) as error:
            raise BadDataError(f"{path} holds no distributions: {error}") from error
        return loaded


def _check(loaded: Distributions) -> None:
    if loaded.rows.dtype != np.float16 or loaded.rows.ndim != 2 or not loaded.rows.size:
        raise ValueError(f"rows are {loaded.rows.dtype} of shape {loaded.rows.shape}")
    if loaded.labels.dtype != np.float64 or loaded.labels.ndim != 2:
        raise ValueError(f"labels are {loaded.labels.dtype} of shape {loaded.labels.shape}")
    if np.isnan(loaded.rows).any() or np.isnan(loaded.labels).any():
        raise ValueError("a value is not a number")
