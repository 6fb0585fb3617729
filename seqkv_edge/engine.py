"""One model with one context, at the level of tokens: what chat and bench drive.

A `Model` is a loaded GGUF; a `Context` a KV cache on it with one sequence at positions 0..n_past-1.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import fit, llama, profile
from .dropin import KvOptions
from .errors import MemoryLimitError, ModelError, SeqkvError, StateError, UsageError
from .gguf_meta import ModelMeta, read_model
from .llama import KvSpec

Progress = Callable[[int], None]
"""called with the number of tokens just evaluated"""


@dataclass(frozen=True)
class Sampling:
    """Sampling of the next token; temp <= 0 is greedy."""

    seed: int | None = None
    temp: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64


class Interrupted(Exception):
    """An evaluation was stopped on request; the tokens that were evaluated stay in the cache."""


class Model:
    """A loaded model. Use `open_model`."""

    def __init__(self, path: Path | str, *, ngl: int | None = None) -> None:
        self.path = path = Path(path)
        self.meta: ModelMeta = read_model(path)
        self.api = llama.library().api
        llama.quiet()
        _backend_init()
        params = self.api.llama_model_default_params()
        if ngl is not None:
            params.n_gpu_layers = ngl if ngl >= 0 else 0x7FFFFFFF
        llama.log.clear()
        self.pointer: int | None = self.api.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise ModelError(f"llama.cpp cannot load {path}: {llama.log.reason() or 'no reason given'}")
        self._describe(offloaded=ngl != 0 and any(d.gpu for d in devices()))

    @classmethod
    def of(cls, pointer: int, path: Path) -> Model:
        """A model (a llama_model pointer) that someone else has loaded from `path`, and frees."""
        self = cls.__new__(cls)
        self.path, self.meta, self.api, self.pointer = path, read_model(path), llama.library().api, pointer
        self._describe(offloaded=False)
        return self

    def _describe(self, *, offloaded: bool) -> None:
        self.vocab = self.api.llama_model_get_vocab(self.pointer)
        self.n_vocab = int(self.api.llama_vocab_n_tokens(self.vocab))
        self.offloaded = offloaded
        self.profile: Path | None = None

    def close(self) -> None:
        if self.pointer:
            self.api.llama_model_free(self.pointer)
            self.pointer = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        data = text.encode("utf-8", "surrogateescape")
        capacity = len(data) + 16
        buffer = (self.api.llama_token * capacity)()
        n = self.api.llama_tokenize(self.vocab, data, len(data), buffer, capacity, add_special, parse_special)
        if n < 0:
            raise SeqkvError(f"the text of {len(data):,} bytes cannot be tokenized")
        return list(buffer[:n])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of one token; b"" for control tokens unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = int(self.api.llama_token_to_piece(self.vocab, token, buffer, size, 0, special))
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return bool(self.api.llama_vocab_is_eog(self.vocab, token))

    def check_memory(self, kv: KvSpec, n_ctx: int, options: KvOptions, n_ubatch: int) -> None:
        """Raises MemoryLimitError when the context does not fit in the free memory (weights in RAM only)."""
        import psutil

        if self.offloaded:
            return  # llama.cpp itself refuses when the device's memory does not suffice
        available = int(psutil.virtual_memory().available)
        settings = fit.Settings(options.n_sink, options.n_window, n_ubatch, options.profile is not None)
        amount = fit.need(self.meta, kv, n_ctx, llama.type_bits, settings)
        # mapped weights are already part of the page cache, which counts as available
        if amount.total > available:
            most = fit.largest_ctx(self.meta, kv, available, llama.type_bits, settings)
            size = fit.format_size
            advice = f"--ctx {most} fits" if most else "this model does not fit at all"
            raise MemoryLimitError(
                f"a context of {n_ctx} tokens in {kv} needs {size(amount.total)} (weights {size(amount.weights)}, "
                f"KV cache {size(amount.kv)}, compute {size(amount.compute)}), {size(available)} are free: {advice}, "
                "or --force to try"
            )

    def context(
        self,
        kv: KvSpec,
        *,
        n_ctx: int,
        n_batch: int = 512,
        options: KvOptions | None = None,
        threads: int | None = None,
        force: bool = False,
        node_done: Callable[[str], None] | None = None,
    ) -> Context:
        """A new context. Raises ModelError, ProfileError, MemoryLimitError.

        node_done is called with the op's name after each node of the graph has been computed. It must not raise, and
        costs a synchronization a node: for measurements.
        """
        options = options or KvOptions()
        if n_ctx <= 0 or n_batch <= 0:
            raise UsageError(f"context ({n_ctx}) and batch ({n_batch}) must be positive")
        n_batch = min(n_batch, n_ctx)
        if not force:
            self.check_memory(kv, n_ctx, options, n_batch)
        assert self.pointer
        type_k, type_v = llama.type_id(kv.k), llama.type_id(kv.v)
        llama.log.clear()
        if kv.ours:
            self.profile = profile.prepare(self.pointer, self.path, type_k, type_v, options)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch
        params.type_k, params.type_v = type_k, type_v
        params.no_perf = True
        params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
        observe = None
        if node_done is not None:
            desc = llama.library().handle.ggml_op_desc
            desc.argtypes, desc.restype = [ctypes.c_void_p], ctypes.c_char_p

            def observe_node(tensor: int, ask: bool, _data: object) -> bool:
                if not ask:
                    node_done(desc(tensor).decode())
                return True

            observe = self.api.ggml_backend_sched_eval_callback(observe_node)
            params.cb_eval = observe
        # the unwrapped function: the model was prepared just now, with options that the wrapper does not know
        init = self.api.llama_init_from_model
        pointer = getattr(init, "__wrapped__", init)(self.pointer, params)
        if not pointer:
            raise ModelError(
                f"llama.cpp cannot make a context of {n_ctx} tokens in {kv} for {self.path.name}: "
                f"{llama.log.reason() or 'no reason given'}"
            )
        return Context(self, kv, pointer, n_batch, observe)


class Context:
    """A KV cache with one sequence (id 0)."""

    def __init__(self, model: Model, kv: KvSpec, pointer: int, n_batch: int, callback: object = None) -> None:
        self.model, self.kv, self.n_batch = model, kv, n_batch
        self._callback = callback  # the library holds it as long as the context lives
        self.api = model.api
        self.pointer: int | None = pointer
        self.memory = self.api.llama_get_memory(pointer)
        if self.memory is None:
            self.close()
            raise ModelError(f"{model.path.name} ({model.meta.arch}) has no KV cache: it is not a text generator")
        self.n_ctx = int(self.api.llama_n_ctx(pointer))
        self.tokens: list[int] = []
        """what the cache holds, by position"""
        self.stop = False
        """set it (from a signal handler) to stop an evaluation in progress"""
        self.has_logits = False
        """whether the logits of the last token are at hand"""
        self.changed_from = 0
        """first position that was evaluated, removed or moved since someone (a session) last set this to n_past"""
        self.moved_from: int | None = None
        """first position whose keys and values depend on more than the tokens before it (after a shift); None: none"""
        self.before: Callable[[Sequence[int]], None] | None = None
        """called with the tokens of each evaluation before it"""
        self.after: Callable[[], None] | None = None
        """called after each evaluation"""
        self._abort = self.api.ggml_abort_callback(lambda _data: self.stop)
        self._batch = self.api.llama_batch_init(n_batch, 0, 1)

    def close(self) -> None:
        if self.pointer:
            if hasattr(self, "_batch"):
                self.api.llama_batch_free(self._batch)
            self.api.llama_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_past(self) -> int:
        """tokens in the cache"""
        return len(self.tokens)

    def _decode(self, tokens: Sequence[int], first_logits: int) -> None:
        """One llama_decode of at most n_batch tokens; logits for tokens[first_logits:]."""
        past = self.n_past
        if self.before:
            self.before(tokens)
        llama.fill(self._batch, tokens, past, first_logits)
        llama.log.clear()
        status = self.api.llama_decode(self.pointer, self._batch)
        self.has_logits = status == 0 and first_logits < len(tokens)
        if status == 0:
            self.tokens.extend(tokens)
            if self.after:
                self.after()
            return
        self._drop_tail(past)
        if status == 2:
            raise Interrupted
        if status == 1:
            raise SeqkvError(f"no room in the context of {self.n_ctx} tokens for {len(tokens)} more")
        raise SeqkvError(f"llama.cpp failed to evaluate (llama_decode returned {status}): {llama.log.reason()}")

    def _drop_tail(self, n_keep: int) -> None:
        """Remove whatever a failed evaluation left behind position n_keep."""
        if not self.api.llama_memory_seq_rm(self.memory, 0, n_keep, -1):
            self.clear()

    def evaluate(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Append tokens to the cache in batches, with logits for the last one. Raises Interrupted on `stop`."""
        if self.n_past + len(tokens) > self.n_ctx:
            raise SeqkvError(f"{self.n_past} + {len(tokens)} tokens do not fit the context of {self.n_ctx}")
        long = len(tokens) > 1  # the callback is asked at every graph node: too costly for single tokens
        if long:
            self.api.llama_set_abort_callback(self.pointer, self._abort, None)
        try:
            for start in range(0, len(tokens), self.n_batch):
                if long and self.stop:
                    raise Interrupted
                chunk = tokens[start : start + self.n_batch]
                last = start + len(chunk) == len(tokens)
                self._decode(chunk, len(chunk) - 1 if last else len(chunk))
                if progress:
                    progress(len(chunk))
            self.api.llama_synchronize(self.pointer)
        finally:
            if long:
                self.api.llama_set_abort_callback(self.pointer, self.api.ggml_abort_callback(0), None)

    def logits(self, tokens: Sequence[int], first: int, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """Append tokens; yields f32 (n, n_vocab) per batch, the logits of tokens[first:] in order.

        A yielded array is llama.cpp's own memory, valid until the next one.
        """
        for start in range(0, len(tokens), self.n_batch):
            chunk = tokens[start : start + self.n_batch]
            wanted = max(0, first - start)
            self._decode(chunk, wanted)
            if progress:
                progress(len(chunk))
            n = len(chunk) - wanted
            if n > 0:
                pointer = self.api.llama_get_logits(self.pointer)
                yield np.ctypeslib.as_array(pointer, shape=(n, self.model.n_vocab))

    def _changed(self, first: int) -> None:
        """Positions from `first` on are no longer what they were."""
        self.has_logits = False
        self.changed_from = min(self.changed_from, first)
        if self.moved_from is not None and first <= self.moved_from:
            self.moved_from = None

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.tokens.clear()
        self._changed(0)

    def keep(self, n: int) -> None:
        """Forget everything from position n on (all of it where the model cannot forget a part)."""
        if n < self.n_past:
            if n > 0 and self.api.llama_memory_seq_rm(self.memory, 0, n, -1):
                del self.tokens[n:]
                self._changed(n)
            else:
                self.clear()

    def shift(self, start: int, end: int) -> bool:
        """Remove positions start..end-1 and move the rest down. False (and nothing done) where the model cannot."""
        if not self.api.llama_memory_can_shift(self.memory):
            return False
        if self.api.llama_memory_seq_pos_min(self.memory, 0) > 0:  # a sliding window has dropped the beginning
            return False
        if not self.api.llama_memory_seq_rm(self.memory, 0, start, end):
            return False
        self.api.llama_memory_seq_add(self.memory, 0, end, -1, start - end)
        del self.tokens[start:end]
        moved = start if self.moved_from is None else min(start, self.moved_from)
        self._changed(start)
        self.moved_from = moved if moved < self.n_past else None
        return True

    def kv_bytes(self) -> int | None:
        assert self.pointer
        return llama.kv_bytes(self.pointer)

    def kv_bytes_used(self) -> int | None:
        assert self.pointer
        return llama.kv_bytes_used(self.pointer)

    def save_state(self, path: Path) -> int:
        """Write cache and tokens to `path` in llama.cpp's sequence format. Returns the bytes. Raises StateError."""
        tokens = (self.api.llama_token * max(1, self.n_past))(*self.tokens)
        llama.log.clear()
        n = int(self.api.llama_state_seq_save_file(self.pointer, os.fsencode(path), 0, tokens, self.n_past))
        if n <= 0:
            raise StateError(f"cannot write {path}: {llama.log.reason() or 'disk full?'}")
        return n

    def load_state(self, path: Path, n_tokens: int) -> None:
        """Replace cache and tokens by those of `path`. Raises StateError; the old cache is then kept or empty, and
        `tokens` says which."""
        out = (self.api.llama_token * max(1, n_tokens))()
        count = ctypes.c_size_t(0)
        llama.log.clear()
        n = self.api.llama_state_seq_load_file(self.pointer, os.fsencode(path), 0, out, n_tokens, ctypes.byref(count))
        if n and count.value == n_tokens:
            self.tokens = list(out[:n_tokens])
            self._changed(0)
            self.moved_from = 0  # its history is not known
            return
        last = int(self.api.llama_memory_seq_pos_max(self.memory, 0))
        if last != self.n_past - 1 or n:
            self.clear()
        raise StateError(f"{path} cannot be loaded into this context: {llama.log.reason() or 'other model or KV type'}")

    def set_state(self, data: bytearray, tokens: Sequence[int], moved_from: int | None = None) -> None:
        """Replace the cache by a state of sequence 0 as `state.build` makes it, and the tokens by its own. Raises StateError;
        the old cache is then kept."""
        buffer = (ctypes.c_uint8 * len(data)).from_buffer(data)
        llama.log.clear()
        n = int(self.api.llama_state_seq_set_data(self.pointer, buffer, len(data), 0))
        if n != len(data):
            raise StateError(f"a stored state was refused: {llama.log.reason() or 'other model, KV type or window'}")
        self.tokens = list(tokens)
        self._changed(0)
        self.moved_from = moved_from

    def next_logits(self) -> np.ndarray:
        """f32 (n_vocab): the logits behind the last token; llama.cpp's own memory, valid until the next evaluation."""
        if not self.has_logits:
            raise SeqkvError("the logits of the last token are not at hand")
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.pointer, -1), shape=(self.model.n_vocab,))


class Sampler:
    """llama.cpp's sampler chain."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self.api = api = model.api
        self.pointer = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        seed = api.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
        chain = []
        if sampling.repeat_penalty != 1.0:
            numbers = (sampling.repeat_last_n, sampling.repeat_penalty, 0.0, 0.0)
            chain.append(api.llama_sampler_init_penalties(model.n_vocab, *numbers))
        if sampling.temp <= 0:
            chain.append(api.llama_sampler_init_greedy())
        else:
            chain += [
                api.llama_sampler_init_top_k(sampling.top_k),
                api.llama_sampler_init_top_p(sampling.top_p, 1),
                api.llama_sampler_init_min_p(sampling.min_p, 1),
                api.llama_sampler_init_temp(sampling.temp),
                api.llama_sampler_init_dist(seed),
            ]
        for part in chain:
            api.llama_sampler_chain_add(self.pointer, part)

    def sample(self, context: Context) -> int:
        """Next token from the logits of the last evaluation."""
        return int(self.api.llama_sampler_sample(self.pointer, context.pointer, -1))

    def close(self) -> None:
        if self.pointer:
            self.api.llama_sampler_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True)
class Device:
    """A compute device of the loaded libraries."""

    name: str
    description: str
    gpu: bool
    memory_free: int
    memory_total: int


def devices() -> list[Device]:
    """Devices of the backends that are compiled in and usable here."""
    handle = llama.library().handle
    _backend_init()
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    handle.ggml_backend_dev_count.restype = ctypes.c_size_t
    for name, result in (("name", text), ("description", text), ("type", ctypes.c_int)):
        function = getattr(handle, f"ggml_backend_dev_{name}")
        function.argtypes, function.restype = [pointer], result
    handle.ggml_backend_dev_get.argtypes, handle.ggml_backend_dev_get.restype = [ctypes.c_size_t], pointer
    sizes = ctypes.POINTER(ctypes.c_size_t)
    handle.ggml_backend_dev_memory.argtypes, handle.ggml_backend_dev_memory.restype = [pointer, sizes, sizes], None
    found = []
    for i in range(handle.ggml_backend_dev_count()):
        device = handle.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        handle.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        kind = handle.ggml_backend_dev_type(device)
        found.append(
            Device(
                (handle.ggml_backend_dev_name(device) or b"").decode(),
                (handle.ggml_backend_dev_description(device) or b"").decode(),
                kind in (1, 2),  # ggml_backend_dev_type: CPU 0, GPU 1, IGPU 2
                free.value,
                total.value,
            )
        )
    return found


class _InitParams(ctypes.Structure):  # ggml_init_params
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def copy_bandwidth(index: int, size: int = 1 << 28, tries: int = 7) -> float | None:
    """Bytes read and written a second when `size` bytes are copied within the memory of device `index` of `devices()`.

    The best of several tries. None where the device does not have 2 * size bytes left.
    """
    handle = llama.library().handle
    _backend_init()
    pointer, integer = ctypes.c_void_p, ctypes.c_int

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(handle, name)
        found.restype, found.argtypes = result, list(arguments)
        return found

    tensor = function("ggml_new_tensor_1d", pointer, pointer, integer, ctypes.c_int64)
    copy = function("ggml_cpy", pointer, pointer, pointer, pointer)
    expand = function("ggml_build_forward_expand", None, pointer, pointer)
    compute = function("ggml_backend_graph_compute", integer, pointer, pointer)
    n_copies = 4
    memory = function("ggml_graph_overhead", ctypes.c_size_t)() + (2 + n_copies) * function("ggml_tensor_overhead", ctypes.c_size_t)()
    ctx = function("ggml_init", pointer, _InitParams)(_InitParams(memory, None, True))
    device = function("ggml_backend_dev_get", pointer, ctypes.c_size_t)(index)
    backend = function("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)(device, None)
    buffer = None
    try:
        source, target = (tensor(ctx, 0, size // 4) for _ in range(2))  # GGML_TYPE_F32
        graph = function("ggml_new_graph", pointer, pointer)(ctx)
        for _ in range(n_copies):
            expand(graph, copy(ctx, source, target))
        buffer = function("ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer)(ctx, backend)
        if not buffer:
            return None
        function("ggml_backend_buffer_clear", None, pointer, ctypes.c_uint8)(buffer, 0)
        best = 0.0
        for _ in range(tries):
            started = time.perf_counter()
            if compute(backend, graph) != 0:  # GGML_STATUS_SUCCESS; returns when all is done
                return None
            best = max(best, n_copies * 2 * size / (time.perf_counter() - started))
        return best
    finally:
        if buffer:
            function("ggml_backend_buffer_free", None, pointer)(buffer)
        function("ggml_backend_free", None, pointer)(backend)
        function("ggml_free", None, pointer)(ctx)


_initialized = False


def _backend_init() -> None:
    global _initialized
    if not _initialized:
        llama.library().api.llama_backend_init()
        _initialized = True


@contextmanager
def open_model(path: Path | str, *, ngl: int | None = None) -> Iterator[Model]:
    """Load a model for the length of a `with` block. Raises ModelError."""
    model = Model(path, ngl=ngl)
    try:
        yield model
    finally:
        model.close()


def temporary_beside(target: Path) -> Path:
    """An empty temporary file in the directory of `target`. Raises StateError when it cannot be written."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    except OSError as error:
        raise StateError(f"cannot write in {target.parent}: {error.strerror or error}") from None
    os.close(handle)
    return Path(name)
