"""llama-cpp-python's own server on the session store:

    python -m seqkv_edge.server --model x.gguf [--kv seqkv3] [--store DIR] ...      # what follows are the server's own arguments

The server is not changed: its disk cache is the store, and --kv names the cache type that it takes by number.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seqkv_edge

from .errors import SeqkvError, UsageError


def use_store(path: Path | str | None = None) -> None:
    """From now on a `llama_cpp.LlamaDiskCache` that is given to `Llama.set_cache`, as the server does it, is a `StoreCache` on the store
    in `path` (default: that of `chat --session`)."""
    import llama_cpp

    from .llama_cache import StoreCache

    @dataclass
    class DiskCache:
        """Waits for its model."""

        cache_dir: str = ""
        capacity_bytes: int = 4 << 30

    original = llama_cpp.Llama.set_cache

    def set_cache(llm: Any, cache: Any) -> None:
        original(llm, StoreCache(llm, path, capacity_bytes=cache.capacity_bytes) if isinstance(cache, DiskCache) else cache)

    llama_cpp.LlamaDiskCache, llama_cpp.Llama.set_cache = DiskCache, set_cache


def arguments(given: list[str]) -> tuple[str | None, list[str]]:
    """The store, and the server's arguments. Raises SeqkvError for a wrong --kv."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kv", default="seqkv3")
    parser.add_argument("--store")
    ours, rest = parser.parse_known_args(given)
    # logits of every token are what the server keeps by default, and what a cache cannot bring back
    settings = seqkv_edge.kv(ours.kv) | {"cache": True, "cache_type": "disk", "logits_all": False}
    return ours.store, [*(word for name, value in settings.items() for word in (f"--{name}", str(value).lower())), *rest]


def main() -> None:
    try:
        store, rest = arguments(sys.argv[1:])
        try:
            from llama_cpp.server.__main__ import main as serve
        except ImportError as error:
            raise UsageError(f"the server needs {error.name}: pip install 'llama-cpp-python[server]'") from None
        use_store(store)
        sys.argv[1:] = rest
        serve()
    except SeqkvError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
