"""The shared backends, as fixtures of this folder."""

from backends import make_draft, moto, moto_endpoint

__all__ = ["make_draft", "moto", "moto_endpoint"]
