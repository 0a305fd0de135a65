"""The errors this library raises on purpose; each names the argument, what was expected and what came."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run this case; the message says why."""


class UnsupportedWeight(ValueError):
    """A base weight cannot be read without loss or guesswork; the message says why."""


class UnsupportedLayer(ValueError):
    """A layer cannot be replaced by a fused one; the message says why."""
