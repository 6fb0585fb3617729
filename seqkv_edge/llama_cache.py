"""The session store as a cache of llama-cpp-python: `llm.set_cache(StoreCache(llm))`.

After every completion the state goes to the store, frame by frame, shared with whatever begins the same; before every completion
the longest stored beginning of the prompt is loaded. It survives the process, and nothing is deleted by being found.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_cpp.llama_cache import BaseLlamaCache

from . import state
from .dropin import profile_of
from .errors import DamagedError, StateError, StoreError, UsageError
from .gguf_meta import read_model
from .session import identity_of, window_of
from .state import FRAME, Chunk
from .store import SessionInfo, Store, address_of, default_path

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama import LlamaState

_PREFIX = "llama-cpp-python "


class StoreCache(BaseLlamaCache):
    """A `BaseLlamaCache` on a `Store`, for one `Llama`."""

    def __init__(self, llm: Llama, path: Path | str | None = None, *, capacity_bytes: int = 4 << 30, salt: str = "") -> None:
        """path: directory of the store (default: that of `chat --session`). capacity_bytes: what the whole store may take. salt: tells
        apart what the model's file does not (adapters).

        A cache that holds nothing yet is asked what its rows are with one evaluation. Raises UsageError for logits_all=True, whose logits
        are not stored; StateError for a context made without flash attention and with types that need it (f16: flash_attn=True).
        """
        super().__init__(capacity_bytes)
        if llm._logits_all:
            raise UsageError("a Llama with logits_all=True cannot use this cache: logits are not stored")
        self.llm, self.store = llm, Store(default_path() if path is None else path)
        empty = llm.n_tokens == 0
        if empty:
            llm.eval([max(0, llm.token_bos())])
        try:
            pointer = int(getattr(llm._ctx.ctx, "value", llm._ctx.ctx))
            layout = state.read_range(pointer, 0, 1, exact=False).layout
        finally:
            if empty:
                llm.reset()
                llm._ctx.kv_cache_clear()
        file = Path(llm.model_path)
        meta = read_model(file)
        kv = ":".join(dict.fromkeys((layout.k[0].type, layout.v[0].type)))
        self._arch = meta.arch.encode()
        self.identity = identity_of(pointer, file, meta.n_layer, kv, layout, salt)
        self.context = self.store.context(self.identity)
        self._n_sink, self._n_window = window_of(layout)
        used = profile_of(int(getattr(llm._model.model, "value", llm._model.model))) if layout.header else None
        self.level = self.store.level(self.context, used)

    @property
    def cache_size(self) -> int:
        return self.store.bytes()

    def _entries(self) -> list[SessionInfo]:
        return [i for i in self.store.sessions() if i.name.startswith(_PREFIX) and i.context == self.context and i.coder is None]

    def _find(self, key: Sequence[int]) -> tuple[SessionInfo | None, list[Any]]:
        """The stored whole state that is the longest beginning of `key`, and the longest path of frames."""
        path = self.store.longest_prefix(self.context, key)
        best = None
        for info in self._entries():
            if info.tail_size and FRAME * len(path) <= info.n_tokens <= len(key) and (best is None or info.n_tokens > best.n_tokens):
                if self.store.tokens(info) == list(key[: info.n_tokens]):
                    best = info
        return best, path

    def __contains__(self, key: Sequence[int]) -> bool:
        whole, path = self._find(list(key))
        return whole is not None or len(path) > 1

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The state of the longest stored beginning of `key`. Raises KeyError."""
        key = list(key)
        whole, path = self._find(key)
        pieces: list[tuple[Chunk, int]] = []
        exact = None
        if whole is not None:
            nodes = self.store.path_to(whole.node)
            try:
                tail = self.store.read_tail(whole)
                chunks, damaged = self.store.restore(nodes)
                if tail is not None and damaged is None:
                    pieces = [(chunk, FRAME) for chunk in chunks] + [(tail, len(whole.tail_tokens))]
                    exact = state.check_chunk(tail, self.identity.layout, len(whole.tail_tokens))
            except DamagedError:
                pass  # marked as gone; the frames that are whole are used
        if not pieces:
            # the last frame is evaluated again for the exact window
            again = int(self._n_window > 0)
            chunks, damaged = self.store.restore(path[: len(path) - again])
            pieces = [(chunk, FRAME) for chunk in (chunks if damaged is None else chunks[: max(0, len(chunks) - again)])]
        n = sum(count for _, count in pieces)
        if not n:
            raise KeyError("no stored state begins these tokens")
        return self._state(state.build(self.identity.layout, pieces, key[:n], exact), key[:n])

    def _state(self, data: bytearray, tokens: list[int]) -> LlamaState:
        from llama_cpp.llama import LlamaState

        llm, n = self.llm, len(tokens)
        # llama.cpp's state of a whole context: the architecture, then what a sequence's has behind its first 8 bytes
        whole = struct.pack("<I", len(self._arch)) + self._arch + bytes(data[8:])
        ids = np.full(llm.n_ctx(), -1, np.intc)
        ids[:n] = tokens
        scores = np.zeros((min(n, llm.scores.shape[0]), llm.scores.shape[1]), np.single)
        return LlamaState(ids, scores, n, whole, len(whole), llm._seed)

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Store a state of this cache's `Llama`; key: its tokens, of which the state may lack the last."""
        (n_arch,) = struct.unpack("<I", value.llama_state[:4])
        piece = state.parse(memoryview(value.llama_state)[4 + n_arch :])
        n = len(piece.positions)
        tokens = np.asarray(value.input_ids[:n]).tolist()
        if piece.layout != self.identity.layout or not (piece.positions == np.arange(n)).all():
            raise StateError("a state of another context, or with holes, cannot be stored")
        parent = None
        for i in range(n // FRAME):
            frame = state.part(piece, FRAME * i, FRAME * (i + 1))
            sinks = piece.exact.where((piece.exact.positions < self._n_sink) & (piece.exact.positions // FRAME == i))
            chunk, ids = state.to_chunk(replace(frame, exact=sinks)), tokens[FRAME * i : FRAME * (i + 1)]
            # what is there already is not coded again
            same = self.store.find_same(self.context, parent, ids, chunk)
            parent = same or self.store.put(self.context, parent, ids, chunk, level=self.level)
        rest = tokens[n // FRAME * FRAME :]
        tail = state.to_chunk(replace(state.part(piece, n - len(rest), n), exact=piece.exact))
        name = _PREFIX + address_of(None, self.identity.key, tokens).hex()[:24]
        self.store.save(name, self.context, parent, rest, tail, {})
        for info in self._entries():  # what the new state continues is no longer needed by itself
            if info.name != name and info.n_tokens <= n and self.store.tokens(info) == tokens[: info.n_tokens]:
                try:
                    self.store.delete(info.name)
                except StoreError:
                    continue  # in use, or gone already
        if self.store.bytes() > self.capacity_bytes:
            self.store.gc(self.capacity_bytes)
