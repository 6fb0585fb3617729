"""The `calibrate` command, and what it does: run a model over a text and make its profile (profile.py)."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from . import capture, llama, predictor, profile
from .bench import F16, QualityKv, compare_window, open_cache, read_text, window_logits
from .capture import Rows
from .design import Statistics, add, design
from .dropin import KvOptions
from .engine import Model, open_model, temporary_beside
from .errors import ModelError, SeqkvError, StateError, UsageError
from .gguf_meta import fingerprint, read_header, read_model
from .model import resolve
from .profile import N_SINK, N_WINDOW, Measured, ProfileInfo

DEFAULT_TOKENS = 4096
PREDICTOR_TOKENS = 8192
_FITTING = 1.5
"""time of predictors, running the model over the text included / time of running it alone (SmolLM2)"""
_MIN_TOKENS = 256
_QUALITY_TOKENS = 512
_DOCUMENTATION = 7800
"""characters at the beginning of the built-in text"""


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status."""
    _check_tokens(args.tokens)
    path = resolve(args.model)
    text = None if args.text is None else read_text(args.text)
    target = Path(args.output) if args.output else _target(path, args.predictors)
    with open_model(path, ngl=args.ngl) as loaded:
        assert loaded.pointer
        _check_target(target)
        if args.predictors and target.is_file():
            profile.check(target, fingerprint(path))
            return _predictors(loaded, path, target, text)
        seconds = estimate(loaded.pointer, path, args.tokens)
        print(f"calibration on {args.tokens} tokens: about {_duration(seconds)} on this machine", file=sys.stderr)
        try:
            info = make(loaded.pointer, path, target, text=text, n_tokens=args.tokens)
        except OSError as error:
            raise _cannot_write(target, error.strerror or str(error)) from None
    print(f"{target}: profile of {info.model_name} ({info.model_id[:8]}) from {info.n_tokens} tokens")
    if info.quality:
        print("mean KLD against f16 on the text behind them: "
              + ", ".join(f"{kv} {kld:.4f}" for kv, kld in info.quality.items()))  # fmt: skip
    if args.predictors:
        with open_model(path, ngl=args.ngl) as loaded:
            return _predictors(loaded, path, target, text)
    return 0


def _target(path: Path, predictors: bool) -> Path:
    """Where a model's profile goes if nothing is said: beside the model. Predictors go into the profile that is in use, where that may
    be changed: stored sessions stay good."""
    found = profile.find(path, fingerprint(path)) if predictors else None
    return found if found is not None and found.parent == profile.cache_dir() else profile.beside(path)


def _predictors(loaded: Model, path: Path, target: Path, text: str | None) -> int:
    assert loaded.pointer
    before = target.stat().st_size
    try:
        n_tokens = add_predictors(loaded.pointer, path, target, text=text)
    except OSError as error:
        raise _cannot_write(target, error.strerror or str(error)) from None
    print(f"{target}: predictors from {n_tokens} tokens, {target.stat().st_size - before:,} bytes more than before")
    return 0


def _check_target(target: Path) -> None:
    """Raises SeqkvError when a profile cannot be written there: known before the minutes that it takes."""
    if target.is_dir():
        raise _cannot_write(target, "it is a directory")
    if not target.parent.is_dir():
        raise _cannot_write(target, f"{target.parent} is not a directory")
    try:
        temporary_beside(target).unlink()
    except StateError as error:
        raise _cannot_write(target, str(error)) from None


def _cannot_write(target: Path, reason: str) -> SeqkvError:
    return SeqkvError(f"cannot write {target}: {reason}; choose another place with -o")


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _check_tokens(n_tokens: int) -> None:
    if n_tokens < _MIN_TOKENS:
        raise UsageError(f"a profile needs at least {_MIN_TOKENS} tokens, not {n_tokens}")


def make(model: int, path: Path, target: Path, *, text: str | None = None, n_tokens: int = DEFAULT_TOKENS) -> ProfileInfo:
    """Measure a profile on `text` (default: the built-in one) and write it. Raises ModelError, OSError."""
    model_id = fingerprint(path)
    profile.write(target, path, model_id, measure(model, path, default_text() if text is None else text, n_tokens=n_tokens))
    return profile.check(target, model_id)


def add_predictors(model: int, path: Path, target: Path, *, text: str | None = None, n_tokens: int = PREDICTOR_TOKENS) -> int:
    """Fit the predictors of the lossless coder (predictor.py) on `text` (default: the built-in one, English prose first) and add
    them to the profile `target` of the loaded model (a llama_model pointer). Returns the number of tokens of the text that were used.

    Raises ModelError, ProfileError, OSError.
    """
    loaded = Model.of(model, path)
    designs, bits = profile.read_designs(target)
    tokens = loaded.tokenize((predictor_text() if text is None else text)[: n_tokens * 32], add_special=True, parse_special=False)[:n_tokens]
    if len(tokens) < _MIN_TOKENS:
        raise ModelError(f"the text gives {len(tokens)} tokens, predictors need at least {_MIN_TOKENS}: use a longer text")
    profile.add_predictors(target, predictor.measure(model, tokens, designs, *bits))
    return len(tokens)


def estimate_predictors(model: int, n_tokens: int) -> float:
    """Expected seconds of `add_predictors`, from a short trial. Raises ModelError."""
    n_captured = n_tokens + predictor.REPEATS * capture.N_WINDOW
    return _FITTING * capture.estimate_seconds(model, n_captured)


def predictor_text() -> str:
    """What predictors are fitted to: English prose, about 2,000 tokens, then the built-in text. Residuals on prose are those that
    documentation teaches least about (docs/decisions.md)."""
    return (Path(__file__).parent / "prose.txt").read_text(encoding="utf-8").strip() + "\n\n" + default_text()


def documentation() -> str:
    """Technical English at hand everywhere: Python's own language documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def default_text() -> str:
    """What a profile is made from: documentation, then sentences in twelve other languages, then source code, then documentation.

    The first three are about 2,000, 900 and 1,100 tokens of SmolLM2. Other languages lower the error on languages, also on those
    that are not among them, by a quarter and more; English does not suffer (docs/decisions.md).
    """
    import heapq
    import inspect
    import queue

    text = documentation()
    cut = text.index("\n\n", _DOCUMENTATION)
    languages = (Path(__file__).parent / "languages.txt").read_text(encoding="utf-8")
    try:
        code = [inspect.getsource(function).rstrip() for function in (heapq.merge, queue.Queue.get)]
    except OSError:
        code = []
        _tell("Python's source code is not installed here: profiles are made without a sample of code")
    return "\n\n".join([text[:cut], languages.strip(), *code, text[cut + 2 :]])


def measure(model: int, path: Path, text: str, *, n_tokens: int = DEFAULT_TOKENS, quality: bool = True) -> Measured:
    """Run the loaded model (a llama_model pointer, from the file `path`) over the first n_tokens tokens of `text`.

    Memory: one layer's rows of a window of capture.N_WINDOW tokens, and for each layer the sums and a matrix of W_o per query
    head (220 MB for an 8B model). With `quality`, the types are then tried on the 512 tokens that follow, which leaves the model
    configured without a profile. What limits the profile is told as a RuntimeWarning. Raises UsageError, and ModelError when the
    text is too short or the model fails.
    """
    _check_tokens(n_tokens)
    loaded = Model.of(model, path)
    wanted = n_tokens + (_QUALITY_TOKENS if quality else 0)
    tokens = loaded.tokenize(text[: wanted * 32], add_special=True, parse_special=False)[:wanted]
    n = min(n_tokens, len(tokens))
    if n < _MIN_TOKENS:
        raise ModelError(f"the text gives {n} tokens, a profile needs at least {_MIN_TOKENS}: use a longer text")
    windows = [tokens[start : min(start + capture.N_WINDOW, n)] for start in range(0, n, capture.N_WINDOW)]
    if len(windows[-1]) <= N_SINK + N_WINDOW:  # nothing of it is read from blocks
        windows.pop()
    outputs = _OutputMetrics(path)
    layers: dict[int, Statistics] = {}

    def on_layer(rows: Rows) -> None:
        stats = layers.setdefault(rows.layer, Statistics())
        add(stats, rows, outputs.of(rows), n_sink=N_SINK, n_window=N_WINDOW)

    # one thread for numpy: its others would wait in loops, on the cores that the model's threads wait for in loops
    with threadpool_limits(1):
        capture.capture(model, windows, on_layer, title="profile of this model (once)")
    try:
        designs = [design(layer, stats) for layer, stats in sorted(layers.items())]
    except (ValueError, np.linalg.LinAlgError) as error:
        raise ModelError(f"no profile can be made of this model: {error}; use --no-profile") from None
    if outputs.missing:
        _tell(f"attention outputs of {path.name} (layers {_ranges(outputs.missing)}) have no matrix that can be read: "
              "their values count alike in the profile")  # fmt: skip
    if without := [layer for layer, stats in layers.items() if not stats.has_x2]:
        _tell(f"the norms of the residual stream of {path.name} (layers {_ranges(without)}) were not found: "
              "every layer gets the same bits")  # fmt: skip
    made = Measured(designs, sum(map(len, windows)), hashlib.sha256(text.encode("utf-8")).hexdigest())
    if not quality:
        return made
    if len(tokens) < wanted:
        _tell(f"the text has {len(tokens)} tokens, {n_tokens} and {_QUALITY_TOKENS} more to measure the profile's quality were "
              f"wanted: it was made from {made.n_tokens}, its quality was not measured")  # fmt: skip
        return made
    return replace(made, quality=_quality(loaded, made, tokens[n:]))


def estimate(model: int, path: Path, n_tokens: int) -> float:
    """Expected seconds of `measure`, from short trials. Raises ModelError."""
    meta = read_model(path)
    forward = capture.estimate_seconds(model, n_tokens)
    shapes: dict[tuple[int, int], int] = {}
    for layer, heads in zip(meta.layers, meta.heads_kv):
        if layer.k_values and not layer.window and heads:
            key = (layer.k_values // heads, layer.v_values // heads)
            shapes[key] = shapes.get(key, 0) + 1
    random = np.random.default_rng(0)
    trial = min(capture.N_WINDOW, n_tokens)
    seconds = 0.0
    for (dk, dv), count in shapes.items():  # the sums of one query head
        q, k, v = (random.standard_normal((trial, 1, d), np.float32) for d in (dk, dk, dv))
        rows = Rows(0, q, k, v, None, dk**-0.5, 0.0, np.ones(dk // 2), True)
        start = time.perf_counter()
        with threadpool_limits(1):
            add(Statistics(), rows, None, n_sink=N_SINK, n_window=N_WINDOW)
        seconds += (time.perf_counter() - start) * count * meta.n_head * n_tokens / trial
    return forward * (1 + 4 * _QUALITY_TOKENS / n_tokens) + seconds


def _tell(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _ranges(layers: Collection[int]) -> str:
    """Layers 0, 1, 2, 3 and 7 as 0-3, 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class _OutputMetrics:
    """W_o,h^T W_o,h of the query heads of every layer, from the model's file; each matrix is read once."""

    def __init__(self, path: Path) -> None:
        self._tensors = {t.name: (part, t) for part in read_model(path).parts for t in read_header(part).tensors}
        self._grams: dict[int, np.ndarray | None] = {}

    @property
    def missing(self) -> list[int]:
        """layers asked for whose weights have another form"""
        return [layer for layer, gram in self._grams.items() if gram is None]

    def of(self, rows: Rows) -> np.ndarray | None:
        """f32 (n_head, dv, dv) of the rows' layer; None where the weights have another form."""
        if rows.layer not in self._grams:
            self._grams[rows.layer] = self._gram(rows.layer, rows.q.shape[1], rows.v.shape[2])
        return self._grams[rows.layer]

    def _gram(self, layer: int, heads: int, dv: int) -> np.ndarray | None:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        found = self._tensors.get(f"blk.{layer}.attn_output.weight")
        if found is None or found[1].n_bytes is None or len(found[1].shape) != 2 or found[1].shape[0] != heads * dv:
            return None
        part, tensor = found
        data = np.memmap(part, np.uint8, "r", tensor.offset, (tensor.shape[1], tensor.n_bytes // tensor.shape[1]))
        try:
            weight = dequantize(data, GGMLQuantizationType(tensor.type))  # (n_embd, n_head*dv)
        except (NotImplementedError, ValueError):
            return None
        columns = np.ascontiguousarray(weight.reshape(-1, heads, dv).transpose(1, 0, 2), np.float32)
        return columns.transpose(0, 2, 1) @ columns


def _quality(loaded: Model, made: Measured, tokens: list[int]) -> dict[str, float]:
    """Mean KLD of every type against f16 over the second half of `tokens`, with the profile in use."""
    assert loaded.pointer
    first = len(tokens) // 2
    handle, name = tempfile.mkstemp(suffix=".seqkv.gguf")
    os.close(handle)
    settings: dict[str, Any] = {"n_ctx": len(tokens), "n_batch": len(tokens), "force": True}
    options = KvOptions(N_SINK, N_WINDOW, name)

    def advance(_n: int) -> None:
        pass

    try:
        try:
            profile.write(Path(name), loaded.path, fingerprint(loaded.path), made)
        except OSError as error:
            raise SeqkvError(f"cannot write in {tempfile.gettempdir()}: {error.strerror or error}; free some space") from None
        with open_cache(loaded, F16, options=options, **settings) as context:
            base = window_logits(context, tokens, first, advance)
        found = {}
        for kv in llama.OUR_TYPES:
            with open_cache(loaded, QualityKv.parse(kv), options=options, **settings) as context:
                found[kv] = float(compare_window(base, context, tokens, first, advance).kld.mean())
        return found
    finally:
        Path(name).unlink(missing_ok=True)
        llama.configure(loaded.pointer, None, None, N_SINK, N_WINDOW)
