"""The version of the package, below everything: what the command line, manifests and videos call it."""

from __future__ import annotations

__version__ = "0.1.0"
