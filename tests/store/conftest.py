"""The shared backends and drafts, as fixtures of this folder."""

from backends import (
    backend,
    directory_store,
    make_draft,
    make_provenance,
    moto,
    moto_endpoint,
    progress,
    store,
)

__all__ = [
    "backend",
    "directory_store",
    "make_draft",
    "make_provenance",
    "moto",
    "moto_endpoint",
    "progress",
    "store",
]
