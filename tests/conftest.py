"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

Maker = Callable[..., Path]


@pytest.fixture
def make_gguf(tmp_path: Path) -> Maker:
    """Writes a GGUF file with the metadata of a small llama model and one tensor; keyword arguments replace fields.

    A field given as None is left out; `arch`, `name` (of the file) and `tensors` (name -> array) are special.
    """

    def make(
        name: str = "model.gguf", arch: str = "llama", tensors: dict[str, Any] | None = None, **fields: Any
    ) -> Path:
        values: dict[str, Any] = {
            "block_count": 4,
            "context_length": 8192,
            "embedding_length": 256,
            "feed_forward_length": 512,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "vocab_size": 1000,
        } | {key.replace("__", "."): value for key, value in fields.items()}
        path = tmp_path / name
        writer = GGUFWriter(path, arch)
        writer.add_name("a small model")
        for key, value in values.items():
            full = f"{arch}.{key}"
            if value is None:
                continue
            if isinstance(value, list):
                writer.add_array(full, value)
            elif isinstance(value, str):
                writer.add_string(full, value)
            else:
                writer.add_uint32(full, value)
        for tensor, data in (tensors or {"token_embd.weight": np.arange(4096, dtype=np.float32)}).items():
            writer.add_tensor(tensor, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
