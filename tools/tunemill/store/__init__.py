"""The artifact store: what every stage reads from and publishes to.

Only ``store.py``'s ``open_store``, ``create_store`` and ``Store`` and the values below are meant for the
rest of the program; S3 is known to ``s3.py`` and its siblings alone and imported when a bucket is opened.
"""

from tunemill.store.manifest import Artifact, Draft, File
from tunemill.store.names import check_name, check_tag, parse_reference
from tunemill.store.provenance import Provenance
from tunemill.store.reference import Revision
from tunemill.store.store import Store, create_store, open_store

__all__ = [
    "Artifact",
    "Draft",
    "File",
    "Provenance",
    "Revision",
    "Store",
    "check_name",
    "check_tag",
    "create_store",
    "open_store",
    "parse_reference",
]
