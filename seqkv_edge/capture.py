"""Queries, keys and values of a running model, layer by layer: what calibration measures.

Each window of tokens is one forward pass over an empty f16 cache, in one piece, so that a layer's rows arrive together
and only those of one layer are held.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import llama
from .errors import ModelError, UsageError

N_WINDOW = 1024
"""tokens of a window: what a forward pass of a large model affords in memory, and many frames long"""


@dataclass(frozen=True)
class Rows:
    """What the attention of one layer reads in one window; token i is at position i.

    The arrays are read-only views of the library's memory, valid during the call that hands them over: copy to keep.
    """

    layer: int
    q: np.ndarray
    """f32 (n_tokens, n_head, head_dim_k), after RoPE; query head i reads KV head i // (n_head // n_head_kv)"""
    k: np.ndarray
    """f32 (n_tokens, n_head_kv, head_dim_k), after RoPE"""
    v: np.ndarray
    """f32 (n_tokens, n_head_kv, head_dim_v)"""
    x2: np.ndarray | None
    """f32 (n_tokens,): squared norm of the residual stream that the layer reads; None: not found"""
    scale: float
    """the attention score of a query and a key is scale*<q,k>, or with a softcap softcap*tanh(scale*<q,k>/softcap)"""
    softcap: float
    """0: none"""
    freq: np.ndarray
    """f64 (n_rot/2,): angle per position of every rotated pair, all RoPE scaling applied, as the seqkv cache turns the
    layer's keys; empty: no rotation"""
    neox: bool
    """a pair is (i, i + n_rot/2), otherwise (2i, 2i + 1)"""


def unrotate(x: np.ndarray, positions: np.ndarray, freq: np.ndarray, neox: bool) -> np.ndarray:
    """R(-p) x: rows before RoPE, or relative to an origin.

    x          float (n, heads, head_dim), not changed
    positions  (n,), any integers
    freq, neox as in `Rows`; dimensions from 2*len(freq) on are not rotated

    Returns an array like x. Angles, sines and cosines are computed in f64, the products in the type of x.
    """
    n_half = len(freq)
    angle = np.multiply.outer(np.asarray(positions, np.float64), np.asarray(freq, np.float64))[:, None, :]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = (slice(n_half), slice(n_half, 2 * n_half)) if neox else (slice(0, 2 * n_half, 2), slice(1, 2 * n_half, 2))
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos + b * sin
    out[..., second] = b * cos - a * sin
    return out


def capture(
    model: int,
    windows: Sequence[Sequence[int]],
    on_layer: Callable[[Rows], None],
    *,
    title: str = "capture of keys and values",
    progress: bool = True,
) -> None:
    """Run every window through the model, and call on_layer for each of its layers with full attention, in order.

    model     a llama_model pointer
    windows   token ids; each window starts at position 0. Memory grows with the longest (N_WINDOW is a good length)
    title     of the progress bar, which is drawn on a terminal (standard error) if `progress`

    Sliding-window layers, and layers that read another layer's cache, are left out. An exception in on_layer ends the
    run and is raised unchanged. So does ctrl-C, when the layer in progress is done, with KeyboardInterrupt.
    Raises ModelError for a model that the seqkv types cannot serve, or that fails.
    """
    if not windows or not all(windows):
        raise UsageError("a capture needs windows of at least one token")
    seqkv = llama.type_id(llama.OUR_TYPES[0])
    llama.check(model, seqkv, seqkv)
    _Run(model, on_layer).run(windows, title, progress)


def estimate_seconds(model: int, n_tokens: int, n_window: int = N_WINDOW) -> float:
    """Expected time of the forward passes of a capture of n_tokens in windows of n_window tokens, from a short trial.

    model: a llama_model pointer. The trial is 32 tokens, and four times as many until it takes a moment and its time
    grows with its length. The estimate is right within a factor of 2 unless other programs compete for the processor, and
    does not include on_layer. Raises ModelError.
    """
    api = llama.library().api
    n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
    with _context(model, n_window) as ctx:

        def seconds(n: int) -> float:
            start = time.perf_counter()
            _decode(ctx, [i * n_vocab // n for i in range(n)])
            return time.perf_counter() - start

        n = min(8, n_window)
        seconds(n)  # loads the weights from disk
        before = now = seconds(n)
        while n < n_window and (now < 0.5 or now < 2 * before):
            n = min(4 * n, n_window)
            before, now = now, seconds(n)
    return now / n * n_tokens


@contextlib.contextmanager
def _context(model: int, n_tokens: int, callback: Any = None, user: int | None = None) -> Iterator[int]:
    """A llama_context pointer: one sequence of n_tokens in one ubatch, f16 cache, flash attention. Raises ModelError."""
    api = llama.library().api
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.n_outputs_max = 1  # no logits are wanted: no room for them
    params.type_k = params.type_v = llama.type_id("f16")
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.no_perf = True
    if callback is not None:
        params.cb_eval = ctypes.cast(callback, api.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = user
    llama.log.clear()
    ctx = api.llama_init_from_model(model, params)
    if not ctx:
        raise ModelError(f"llama.cpp cannot make a context of {n_tokens} tokens in f16: {llama.log.reason() or 'no reason given'}")
    try:
        yield ctx
    finally:
        api.llama_free(ctx)


def _decode(ctx: int, tokens: Sequence[int]) -> None:
    """Evaluate tokens at positions 0, 1, ... of an emptied cache, without logits. Raises ModelError."""
    api = llama.library().api
    api.llama_memory_clear(api.llama_get_memory(ctx), True)
    batch = api.llama_batch_init(len(tokens), 0, 1)
    try:
        llama.fill(batch, tokens, 0, len(tokens))
        llama.log.clear()
        status = api.llama_decode(ctx, batch)
        api.llama_synchronize(ctx)
    finally:
        api.llama_batch_free(batch)
    if status != 0:
        raise ModelError(f"the model failed on {len(tokens)} tokens (llama_decode returned {status}): {llama.log.reason()}")


class _Run:
    """One capture. Nothing may be raised into the library, which calls `_rows`: it is kept, and raised afterwards."""

    def __init__(self, model: int, on_layer: Callable[[Rows], None]) -> None:
        self._model, self._on_layer = model, on_layer
        self._handle = llama.library().handle
        self._error: BaseException | None = None
        self._interrupted = False
        self._rope: dict[int, tuple[np.ndarray, bool]] = {}
        self._ctx = 0
        self._advance: Callable[[], None] = lambda: None

    def run(self, windows: Sequence[Sequence[int]], title: str, progress: bool) -> None:
        handle = self._handle
        function = llama.RowsFunction(self._rows)  # alive as long as the collector
        collector = handle.llama_seqkv_collector_init(self._model, function, None)
        if not collector:
            raise ModelError("the library cannot capture from this model")
        try:
            total = len(windows) * handle.llama_seqkv_collector_n_layer(collector)
            longest = max(len(window) for window in windows)
            with self._deferred_interrupt(), _context(self._model, longest, handle.llama_seqkv_collect, collector) as self._ctx:
                with _progress(title, total, progress) as self._advance:
                    for window in windows:
                        self._window(collector, window)
        finally:
            handle.llama_seqkv_collector_free(collector)

    def _window(self, collector: int, window: Sequence[int]) -> None:
        if not self._interrupted:
            _decode(self._ctx, window)
        err = ctypes.create_string_buffer(512)
        n = self._handle.llama_seqkv_collector_finish(collector, err, len(err))
        if self._interrupted:
            raise KeyboardInterrupt from self._error
        if self._error is not None:
            raise self._error
        if n < 0:
            raise ModelError(err.value.decode("utf-8", "replace"))
        if n != len(window):
            raise ModelError(f"{n} of {len(window)} tokens of a window were captured")

    def _rows(self, _user: int | None, pointer: Any) -> bool:
        """llama_seqkv_rows_t"""
        try:
            if self._interrupted:
                return False
            c = pointer.contents
            if c.il not in self._rope:
                self._rope[c.il] = _layer_rope(self._ctx, c.il)
            freq, neox = self._rope[c.il]

            def view(values: Any, *shape: int) -> np.ndarray:
                array = np.ctypeslib.as_array(values, shape)
                array.flags.writeable = False
                return array

            self._on_layer(Rows(
                c.il, view(c.q, c.n_tokens, c.n_head, c.dk), view(c.k, c.n_tokens, c.n_head_kv, c.dk),
                view(c.v, c.n_tokens, c.n_head_kv, c.dv), view(c.x2, c.n_tokens) if c.x2 else None, c.scale, c.softcap, freq, neox,
            ))  # fmt: skip
            self._advance()
            return not self._interrupted
        except BaseException as error:  # noqa: BLE001  raised by _window
            self._error = error
            return False

    @contextlib.contextmanager
    def _deferred_interrupt(self) -> Iterator[None]:
        """ctrl-C sets a flag.

        Python runs signal handlers when the library calls back, before the first line of the callback: an exception
        from there could not be caught, and ctypes would drop it.
        """

        def handler(_signal: int, _frame: Any) -> None:
            self._interrupted = True

        old = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(old):
            yield
            return
        signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)
        if self._interrupted:  # after the last layer
            raise KeyboardInterrupt


def _layer_rope(ctx: int, layer: int) -> tuple[np.ndarray, bool]:
    """`freq` and `neox` of `Rows`."""
    handle = llama.library().handle
    neox = ctypes.c_int32(0)
    n = handle.llama_seqkv_rope(ctx, layer, None, 0, ctypes.byref(neox))
    freq = (ctypes.c_float * max(n, 1))()
    handle.llama_seqkv_rope(ctx, layer, freq, n, ctypes.byref(neox))
    return np.array(freq[:n], np.float64), bool(neox.value)


@contextlib.contextmanager
def _progress(title: str, total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; gives a function that advances it by one layer of a window."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
