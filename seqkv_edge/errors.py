"""Errors of the package. The text of each is one line: what failed, what was expected, what to do."""

from __future__ import annotations


class SeqkvError(Exception):
    """Anything that seqkv_edge refuses or fails to do."""


class UsageError(SeqkvError):
    """A wrong argument (the command line exits with status 2)."""


class LibraryError(SeqkvError):
    """The patched llama.cpp libraries are missing or do not fit."""


class ModelError(SeqkvError):
    """A model file that is missing, damaged, or that the requested types cannot serve."""


class ProfileError(SeqkvError):
    """A profile that cannot be read or belongs to another model."""


class MemoryLimitError(SeqkvError):
    """A context that does not fit in memory."""


class StateError(SeqkvError):
    """A saved conversation that cannot be read or belongs to another model or KV type."""


class StoreError(SeqkvError):
    """The session store cannot be read or written, or does not hold what was asked for."""


class DamagedError(StoreError):
    """A stored chunk whose bytes are not what was written. It is never used; its tokens are evaluated again."""
