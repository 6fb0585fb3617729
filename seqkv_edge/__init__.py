"""Sequential-compressed KV cache types (seqkv2, seqkv3, seqkv4) for llama.cpp.

Importing this package makes llama-cpp-python load the patched llama.cpp libraries, so it must come first:

    import seqkv_edge
    from llama_cpp import Llama
    llm = Llama(model_path="x.gguf", n_ctx=32768, **seqkv_edge.kv("seqkv3"))

The import sets LLAMA_CPP_LIB_PATH and registers a hook that, when `llama_cpp` is imported, prepares contexts that use
one of the types (see `seqkv_edge.dropin`). It loads nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .errors import LibraryError, SeqkvError

__version__ = "0.1.0"
__all__ = ["SeqkvError", "__version__", "kv", "lib_dir"]


def lib_dir() -> Path:
    """Directory of the patched libraries (an editable install keeps them beside the other compiled files)."""
    candidates = [Path(base) / "lib" for base in __path__]
    return next((c for c in candidates if c.is_dir()), candidates[0])


def kv(
    spec: str, *, n_sink: int = 4, n_window: int = 64, profile: str | os.PathLike[str] | None = "auto"
) -> dict[str, Any]:
    """Arguments that give `llama_cpp.Llama` a KV cache of type `spec`: `Llama(..., **seqkv_edge.kv("seqkv3"))`.

    spec      `TYPE` or `KTYPE:VTYPE`; seqkv2, seqkv3, seqkv4 or any cache type of llama.cpp (f16, q8_0, q4_0, ...)
    n_sink    first tokens kept exact (f16), >= 0
    n_window  last tokens kept exact (f16), >= 0
    profile   "auto": found, or made on first use; None: no prediction; otherwise the path of a profile

    Returns `type_k` and `type_v`; `flash_attn=True` when V is a quantized type of llama.cpp, which requires it (the
    seqkv types work with and without); and, only when an option differs from its default, `kv_overrides`, which is how
    the option reaches this one model (see `seqkv_edge.dropin`). If you pass `kv_overrides` yourself, merge the two.
    Raises SeqkvError for an unknown type or a wrong option.
    """
    from .dropin import kv_arguments

    return kv_arguments(spec, n_sink=n_sink, n_window=n_window, profile=profile)


def _select_libraries() -> None:
    directory = lib_dir()
    module = sys.modules.get("llama_cpp.llama_cpp")
    if module is not None:
        loaded = Path(str(module.__dict__["_lib"]._name)).resolve().parent
        if loaded != directory.resolve():
            raise LibraryError(
                f"llama_cpp was imported before seqkv_edge and uses the libraries in {loaded}: "
                "import seqkv_edge first, then llama_cpp"
            )
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = str(directory)
    from .hook import on_import

    on_import("llama_cpp.llama_cpp")


_select_libraries()
