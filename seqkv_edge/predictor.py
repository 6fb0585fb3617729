"""Fitting the predictors of the lossless coder (delta.py) to blocks of a text.

Predictions are linear. The weights are the ridge regression of a layer's x and z on the inputs, rounded to integers one
input after the other, the error of each passed on to the weights that are still to be rounded (Frantar et al. 2022,
"GPTQ", arXiv 2210.17323): inputs are strongly correlated, so most of it is made up for. The step of an output is a share of
its residual, which makes most weights 0, 1 or -1; coded at the cost of their frequencies they take about 1.7 bits each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from . import capture, delta
from .capture import Rows, unrotate
from .codec import BLOCK, quantize, unpack
from .delta import COPY_CLASSES, FRAME, GAIN_TERMS, Copies, Layer, Predictor
from .design import LayerDesign, hadamard
from .errors import ModelError

Floats = NDArray[np.float32]

_UNIT = 128.0
_RIDGE = 0.03
"""of the inputs' mean square"""
_STEP = 0.165
"""of the residual's root mean square"""
_FAST_STEP = 0.35
_MEAN_ABS = 0.75
"""of the distribution of residuals, in spreads (tools/make_entropy_tables.py)"""
REPEATS = 2
"""windows that are a passage and its second copy"""
_SKIP = 4
"""tokens at the beginning of a window that are like no others"""


@dataclass(frozen=True)
class Window:
    """Blocks of a run of tokens from position 0, of every layer with a seqkv cache, in order."""

    tokens: NDArray[np.int64]
    k: list[NDArray[np.uint8]]
    """(n, row)"""
    v: list[NDArray[np.uint8]]


def expected_bytes(designs: Sequence[LayerDesign]) -> float:
    """About what predictors of a model take in its profile (SmolLM2's take 1.34 bits a weight)."""
    n_prev = total = 0
    for d in designs:
        n_k, n_v = d.k_mean.size, d.v_mean.size
        total += n_k * n_prev + n_v * (n_prev + n_k) + n_v * n_k
        n_prev = n_k + n_v
    return total * 1.5 / 8


def measure(
    model: int,
    tokens: Sequence[int],
    designs: Sequence[LayerDesign],
    k_bits: Mapping[int, int],
    v_bits: Mapping[int, int],
) -> dict[int, Layer]:
    """Layers {index in the model: layer} with predictors for the text `tokens`.

    model      a llama_model pointer
    designs    of every layer with a seqkv cache; k_bits, v_bits: their bits. Predictors made for seqkv3 serve all types

    Memory: the blocks of all tokens, twice, and one layer's inputs in f32. Raises ModelError.
    """
    by_layer = {d.layer: d for d in designs}
    values = [d.k_mean.size + d.v_mean.size for d in designs]
    if max((before + d.k_mean.size for before, d in zip(values, designs[1:])), default=0) > delta.MAX_INPUTS:
        raise ModelError(f"predictors have {delta.MAX_INPUTS} inputs at most: a layer of this model has {max(values)} keys and values a token")
    windows: list[Window] = []
    rope: dict[int, tuple[NDArray[np.float64], bool]] = {}
    now: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    runs = [list(tokens[start : start + capture.N_WINDOW]) for start in range(0, len(tokens), capture.N_WINDOW)]
    # a passage and its second copy, from different places of the text
    half = capture.N_WINDOW // 2
    runs += [list(run[:half]) * 2 for run in runs[:: max(1, len(runs) // max(1, REPEATS))] if len(run) >= half][:REPEATS]
    runs = [run for run in runs if len(run) > FRAME] or runs[:1]

    def on_layer(rows: Rows) -> None:
        design = by_layer[rows.layer]
        rope[rows.layer] = (rows.freq, rows.neox)
        now[rows.layer] = blocks(rows, design, k_bits[rows.layer], v_bits[rows.layer])
        if len(now) == len(by_layer):
            kept = [now[il] for il in sorted(now)]
            windows.append(Window(np.array(runs[len(windows)]), [k for k, _ in kept], [v for _, v in kept]))
            now.clear()

    with threadpool_limits(1):  # as in calibrate.measure
        capture.capture(model, runs, on_layer, title="predictors of this model (once)")
    order = sorted(by_layer)
    made = fit(windows, [by_layer[il] for il in order], [rope[il] for il in order], [k_bits[il] for il in order], [v_bits[il] for il in order])
    return dict(zip(order, made))


def blocks(rows: Rows, design: LayerDesign, k_bits: int, v_bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blocks (n, row) of the keys and values of captured rows, as the cache writes them."""
    n, heads, dk = rows.k.shape
    position = np.arange(n)
    mean = np.broadcast_to(design.k_mean, (n, heads, dk))
    frame = unrotate(rows.k, position - position % FRAME, rows.freq, rows.neox) - unrotate(mean, -(position % FRAME), rows.freq, rows.neox)
    z = np.einsum("hij,nhj->nhi", design.k_encode.astype(np.float32), frame, optimize=True)
    k = quantize(k_bits, z, graded=True).reshape(n, -1)
    dv = rows.v.shape[2]
    scaled = (rows.v - design.v_mean) * design.v_scale
    return k, quantize(v_bits, scaled @ hadamard(dv).astype(np.float32)).reshape(n, -1)


def fit(
    windows: Sequence[Window],
    designs: Sequence[LayerDesign],
    rope: Sequence[tuple[NDArray[np.float64], bool]],
    k_bits: Sequence[int],
    v_bits: Sequence[int],
    *,
    step: float = _STEP,
    fast_step: float = _FAST_STEP,
    ridge: float = _RIDGE,
    progress: Callable[[], None] = lambda: None,
) -> list[Layer]:
    """Layers with predictors of both levels. One layer's inputs are held at a time.

    designs, rope (freq, neox), k_bits and v_bits: of each layer, in order. Some windows should repeat a passage: nothing
    else tells what a copy is worth.
    """
    tokens = [w.tokens for w in windows]
    copies = [_copies(t) for t in tokens]
    match = np.concatenate([m for _, m in copies])
    starts = np.cumsum([0, *map(len, tokens)])
    source = np.concatenate([s + start for (s, _), start in zip(copies, starts)])
    offset = np.concatenate([np.arange(len(t)) % FRAME for t in tokens]).astype(np.uint8)
    use = np.concatenate([np.arange(len(t)) >= _SKIP for t in tokens])
    data = _Data(match, source, offset, use, np.concatenate([np.arange(len(t)) % FRAME == 0 for t in tokens]))
    layers: list[Layer] = []
    before: tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]] | None = None
    for i, design in enumerate(designs):
        k, v = np.concatenate([w.k[i] for w in windows]), np.concatenate([w.v[i] for w in windows])
        heads, dk, _ = design.k_encode.shape
        dv = design.v_mean.shape[1]
        k_gain = unpack(k_bits[i], k.reshape(-1), graded=True)[1].reshape(len(k), -1)
        v_gain = unpack(v_bits[i], v.reshape(-1))[1][:, 0].reshape(len(v), -1)
        unit = np.clip(np.rint(np.median(v_gain[use].reshape(-1, heads, dv // BLOCK), axis=(0, 2))), 1, 255).astype(np.uint8)
        freq, neox = rope[i]
        layer = delta.make_layer(design.k_encode, dv, delta.rope_table(freq), neox, unit)
        x, z = layer.inputs(k_bits[i], v_bits[i], offset, k, v)
        predictors = {}
        for level in delta.LEVELS:
            past = before if level == "small" else None
            inputs = np.concatenate([*(past[:2] if past else ()), x], axis=1).astype(np.float32)
            n_prev = inputs.shape[1] - layer.n_k
            share = fast_step if level == "fast" else step
            keys = _weights(inputs[:, :n_prev], x.astype(np.float32), use, share, ridge)
            values = _weights(inputs, z.astype(np.float32), use, share, ridge)
            predicted_x = _predict(keys, inputs[:, :n_prev], layer.n_k)
            predicted_z = _predict(values, inputs, layer.n_v)
            turn = _key_values(layer, offset)
            unit_k = np.full((1, layer.n_k // BLOCK * 3), 12.0)
            unit_v = np.repeat(unit, dv // BLOCK)[None].astype(np.float64)
            predictors[level] = (
                _predictor(keys, data, turn(x), turn(predicted_x), _gain_of_values(k_gain, True), unit_k, k_gain, past[2] if past else None,
                           3 * dk // BLOCK, True),
                _predictor(values, data, z.astype(np.float32), predicted_z, _gain_of_values(v_gain, False), unit_v, v_gain,
                           past[3] if past else None, dv // BLOCK, False),
            )  # fmt: skip
        layers.append(replace(layer, predictors=predictors))
        before = (x, z, k_gain, v_gain)
        progress()
    return layers


@dataclass(frozen=True)
class _Data:
    """Of all tokens of all windows, one after the other."""

    match: NDArray[np.uint8]
    source: NDArray[np.int64]
    offset: NDArray[np.uint8]
    use: NDArray[np.bool_]
    frame_start: NDArray[np.bool_]


def _copies(tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    copies = Copies()
    found = [copies.add(tokens[start : start + FRAME].tolist()) for start in range(0, len(tokens), FRAME)]
    return np.concatenate([s for s, _ in found]).astype(np.int64), np.concatenate([m for _, m in found])


def _weights(inputs: Floats, target: Floats, use: NDArray[np.bool_], share: float, ridge: float) -> tuple[NDArray[np.int8], NDArray[np.uint16]] | None:
    """Integer weights (n, inputs) and steps (n,)."""
    n_in = inputs.shape[1]
    if n_in == 0:
        return None
    a, b = inputs[use] / np.float32(_UNIT), target[use] / np.float32(_UNIT)
    c = (a.T @ a).astype(np.float64) / len(a)
    c += (ridge * np.trace(c) / n_in + 1e-9) * np.eye(n_in)
    w = np.linalg.solve(c, (a.T @ b).astype(np.float64) / len(a))
    residual = np.sqrt(np.mean((b - a @ w.astype(np.float32)) ** 2, axis=0, dtype=np.float64))
    # in units of 2^-16; weights end at 127
    step = np.clip(np.maximum(share * residual, np.abs(w).max(axis=0) / 100), 2.0**-16, 0.99)
    step = np.rint(step * 65536).astype(np.uint16)
    size = step / 65536.0
    upper = np.linalg.cholesky(np.linalg.inv(c)).T
    out = np.empty((n_in, target.shape[1]), np.int8)
    group = 64
    for start in range(0, n_in, group):  # errors are passed on within a group, then from all of it to what follows
        end = min(start + group, n_in)
        errors = np.empty((end - start, target.shape[1]))
        for j in range(start, end):
            out[j] = np.clip(np.rint(w[j] / size), -127, 127)
            errors[j - start] = (w[j] - out[j] * size) / upper[j, j]
            w[j + 1 : end] -= np.outer(upper[j, j + 1 : end], errors[j - start])
        w[end:] -= upper[start:end, end:].T @ errors
    return np.ascontiguousarray(out.T), step


def _predict(fitted: tuple[NDArray[np.int8], NDArray[np.uint16]] | None, inputs: Floats, n: int) -> Floats:
    if fitted is None:
        return np.zeros((len(inputs), n), np.float32)
    weight, step = fitted
    return inputs @ (weight * (step / 65536.0)[:, None]).astype(np.float32).T


def _key_values(layer: Layer, offset: NDArray[np.uint8]) -> Callable[[NDArray], Floats]:
    """x (n, n_k) -> z: E' R(offset) x"""
    encode = layer.k_encode / (2.0 ** layer.k_shift.astype(np.float64))[:, None, None]
    n_half = layer.rope.shape[1] // 2
    first, second = (slice(n_half), slice(n_half, 2 * n_half)) if layer.neox else (slice(0, 2 * n_half, 2), slice(1, 2 * n_half, 2))
    cos, sin = (layer.rope[offset][:, None, i::2].astype(np.float32) / np.float32(1 << 14) for i in (0, 1))

    def turn(x: NDArray) -> Floats:
        x = x.astype(np.float32).reshape(len(x), layer.n_head, layer.dk)
        y = x.copy()
        a, b = x[..., first], x[..., second]
        y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
        return np.einsum("hij,nhj->nhi", encode.astype(np.float32), y, optimize=True).reshape(len(x), -1)

    return turn


def _gain_of_values(gain: NDArray[np.uint8], graded: bool) -> NDArray[np.float64]:
    """Gain of each value of a row (n, values), as stored."""
    if not graded:
        return np.repeat(gain, BLOCK, axis=1).astype(np.float64)
    return np.repeat(gain, np.tile([16, 16, 32], gain.shape[1] // 3), axis=1).astype(np.float64)


def _predictor(
    fitted: tuple[NDArray[np.int8], NDArray[np.uint16]] | None,
    data: _Data,
    target: Floats,
    predicted: Floats,
    gain_of_values: NDArray[np.float64],
    unit: NDArray[np.float64],
    gain: NDArray[np.uint8],
    prev_gain: NDArray[np.uint8] | None,
    head_groups: int,
    graded: bool,
) -> Predictor:
    """What remains to be known of keys or values in z: the share of copies, spreads, and the predictor of gains."""
    n = target.shape[1]
    steps = 3 if graded else 4
    unit_of_values = 12.0 if graded else np.repeat(unit[0], BLOCK)[None]
    # residuals at gain 1: spreads grow with the root of the gain
    scale = (2.0 ** (-(np.maximum(gain_of_values, 1) - unit_of_values) / steps / 2) / _UNIT).astype(np.float32)
    residual = (target - predicted) * scale
    towards = (target[data.source] - predicted) * scale
    weigh = 1.0 / np.maximum(np.mean(np.abs(residual[data.use]), axis=0), 1e-6)
    error = residual[data.source] / scale[data.source] * scale  # what was missed there, on the scale of here
    shares, spread = np.zeros((COPY_CLASSES, 2)), np.zeros(COPY_CLASSES)
    for c in range(1, COPY_CLASSES):
        w = data.use & (data.match == c)
        if w.sum() < 16:
            shares[c] = shares[c - 1]
            continue
        limit = 9.0 / weigh  # outliers are cut, not believed
        a, e, b = (np.clip(y[w], -limit, limit) * weigh for y in (towards, error, residual))
        terms = np.stack([a.ravel(), e.ravel()]).astype(np.float64)
        if fitted is None:
            terms = terms[:1]  # the same twice
        gram = terms @ terms.T
        shares[c, : len(terms)] = np.linalg.solve(gram + 1e-3 * np.trace(gram) * np.eye(len(terms)), terms @ b.ravel())
    share = np.rint(np.clip(shares[:, 0], 0, 1) * 128).astype(np.uint8)
    copy_error = np.rint(np.clip(shares[:, 1], -0.99, 0.99) * 128).astype(np.int8)
    after = residual - towards * (share / 128.0).astype(np.float32)[data.match][:, None]
    after -= error * (copy_error / 128.0).astype(np.float32)[data.match][:, None]
    size = np.abs(after)
    base = np.maximum(np.mean(size[data.use & (data.match == 0)], axis=0), 1e-6)
    for _ in range(2):
        for c in range(COPY_CLASSES):
            w = data.use & (data.match == c)
            spread[c] = np.log2(max(np.mean(size[w] / base), 1e-4)) if w.sum() >= 16 else spread[c - 1] if c else 0.0
        spread -= spread[0]
        factor = (2.0 ** -spread[data.match]).astype(np.float32)[:, None]
        base = np.maximum(np.mean((size * factor)[data.use], axis=0), 1e-6)
    spreads = np.clip(np.rint(16 * np.log2(base / _MEAN_ABS)) + 128, 0, 255).astype(np.uint8)
    copy_spread = np.clip(np.rint(16 * spread), -127, 127).astype(np.int8)
    weight, step = fitted if fitted is not None else (None, np.zeros(n, np.uint16))
    gains = _gains(gain, prev_gain, data, share, head_groups, graded)
    return Predictor(weight, step, spreads, share, copy_error, copy_spread, gains)


def _gains(
    gain: NDArray[np.uint8],
    prev: NDArray[np.uint8] | None,
    data: _Data,
    shares: NDArray[np.uint8],
    head_groups: int,
    graded: bool,
) -> NDArray[np.int32]:
    """Predictors of the gains (groups, GAIN_TERMS)."""
    groups = gain.shape[1]
    g = gain.astype(np.float64)
    mean = g[data.use].mean(axis=0)
    d = g - mean
    before = np.concatenate([np.zeros((1, groups)), d[:-1]])
    copied = d[data.source] * (shares[data.match] / 128.0)[:, None]
    prev_mean = prev[data.use].mean(axis=0) if prev is not None else np.zeros(0)
    out = np.zeros((groups, GAIN_TERMS), np.int32)
    for q in range(groups):
        nothing = np.zeros(len(d))
        terms = np.stack([
            before[:, q], copied[:, q], d[:, q - head_groups] if q >= head_groups else nothing,
            d[:, q - 1] if graded and q % 3 else nothing,
            prev[:, q] - prev_mean[q] if prev is not None and q < prev.shape[1] else nothing,
        ], axis=1)  # fmt: skip
        a, b = terms[data.use], d[data.use, q]
        w = np.linalg.solve(a.T @ a + (1e-3 * len(a)) * np.eye(5), a.T @ b)
        w = np.rint(w * 256)
        spread = max(np.mean(np.abs(b - a @ (w / 256))) / _MEAN_ABS, 0.25)
        out[q] = [round(mean[q] * 256), *w, round(48 * np.log2(spread)), round(prev_mean[q] * 256) if q < len(prev_mean) else 0]
    return out
