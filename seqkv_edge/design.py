"""What a model's keys and values look like, and the transforms and bit plan that follow from it.

Forward passes only. Notation (native/seqkv.h, docs/decisions.md): a key is coded in the RoPE frame of its origin,
r = R(offset) (k_pre - mean), as z = E r; a value as z = H diag(scale) (v - mean). Of every KV head these are gathered over
the pairs of a query t and a position s beyond the exact window (those alone are read from blocks):

  weight of a key     w_ts = p_ts^2 |W_o (v_s - o_t)|^2 / |x_t|^2   so that w_ts (scale q_t . dr_s)^2 is the squared change of
                      the residual stream x_t, relative to it, that an error dr_s of the key causes
  weight of a value   u_ts = p_ts^2 / |x_t|^2                       likewise, |W_o dv_s|^2 is the change of the output
  S = sum w r r^T, M = sum w q q^T (q in the frame of s, scaled);  for values S = sum u (v - mean)(v - mean)^T, M = sum u W_o^T W_o
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .capture import Rows, unrotate

FRAME = 64
BLOCK = 64
GRADES = ((16, 2), (16, 0), (32, -1))
"""the graded plan of a key block at b bits: (values, bits beyond b) in order of falling variance, as in native/format.md"""

_MSE = (1.0, 0.3139, 0.0887, 0.0245, 0.00656, 0.0017, 0.00043)
"""mean squared error of the trellis quantizer on the unit Gaussian at 0..6 bits (tools/make_tables.py)"""

_DAMAGE_K = {1: 27.7, 2: 4.68, 3: 1.0, 4: 0.23}
_DAMAGE_V = {1: 38.0, 2: 5.5, 3: 1.0, 4: 0.22}
"""mean KLD relative to that at 3 bits, all keys or all values coded (SmolLM2, docs/decisions.md)"""

_QUERY_STEP = 2
"""every second query is looked at"""
_CLIP = 50.0
"""weights of single positions are cut at this multiple of their mean, so that a few do not shape a transform"""
_FLOOR = 0.01
"""and raised by this share of the mean, so that every direction that occurs is in S"""


@dataclass
class Statistics:
    """Sums over all windows of one layer; H = n_head_kv, float64."""

    count: int = 0
    queries: int = 0
    k: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dk) keys before RoPE"""
    v: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dv)"""
    kw: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, 64, dk) weighted frame keys by offset"""
    kww: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dk, dk) weighted second moment of the frame keys"""
    w: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, 64) weights by offset"""
    km: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dk, dk) M of the keys"""
    vw: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dv) weighted values"""
    vww: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dv, dv)"""
    u: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H,)"""
    vm: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(H, dv, dv) M of the values"""
    rope: tuple[np.ndarray, bool] = (np.zeros(0), False)
    has_x2: bool = True


@dataclass(frozen=True)
class LayerDesign:
    """Means and transforms of one layer; f32 unless said."""

    layer: int
    k_mean: np.ndarray
    """(H, dk) before RoPE"""
    k_encode: np.ndarray
    """f16 (H, dk, dk): E; row r belongs to block r // 64"""
    v_mean: np.ndarray
    """(H, dv)"""
    v_scale: np.ndarray
    """(H, dv)"""
    k_damage: float
    """expected squared relative change of the residual stream with this layer's keys at 3 bits; nan: not measured"""
    v_damage: float


def add(stats: Statistics, rows: Rows, output: np.ndarray | None, *, n_sink: int, n_window: int) -> None:
    """Add one window of one layer.

    output: f32 (n_head, dv, dv), W_o,h^T W_o,h of every query head, None: the identity.
    """
    n, heads, dk = rows.k.shape
    dv = rows.v.shape[2]
    group = rows.q.shape[1] // heads
    position = np.arange(n)
    offset = position % FRAME
    frame = unrotate(rows.k, position - offset, rows.freq, rows.neox)
    if stats.count == 0:
        stats.rope = (rows.freq, rows.neox)
        for name, shape in _SHAPES.items():
            setattr(stats, name, np.zeros([{"H": heads, "dk": dk, "dv": dv, "F": FRAME}[c] for c in shape]))
    if rows.x2 is None:
        stats.has_x2 = False
    stats.count += n - n_sink
    stats.k += unrotate(rows.k, position, rows.freq, rows.neox)[n_sink:].sum(axis=0, dtype=np.float64)
    stats.v += rows.v[n_sink:].sum(axis=0, dtype=np.float64)

    t = np.arange(n_sink + n_window, n, _QUERY_STEP)  # queries that read blocks
    stats.queries += len(t)
    starts = np.arange(0, n, FRAME)
    far = (t[:, None] - position >= n_window) & (position >= n_sink)
    future = position > t[:, None]
    inverse_x2 = np.ones(len(t), np.float32) if rows.x2 is None else (1.0 / np.maximum(rows.x2[t], 1e-20)).astype(np.float32)
    factor = far * inverse_x2[:, None]
    # R(-t0): rows of C become those of R(-t0) C; the frames of a window are the same in every window
    turn = unrotate(np.broadcast_to(np.eye(dk, dtype=np.float32)[:, None], (dk, len(starts), dk)).transpose(1, 0, 2),
                    starts, rows.freq, rows.neox)  # fmt: skip  (frames, dk, dk): row i is R(-t0) e_i

    for h in range(heads):
        k, v = np.ascontiguousarray(rows.k[:, h]), np.ascontiguousarray(rows.v[:, h])
        w, u = np.zeros(n), np.zeros(n)
        moments = np.zeros((len(starts), dk, dk), np.float32)
        for g in range(group):
            q = rows.q[t, h * group + g] * np.float32(rows.scale)
            p = q @ k.T
            if rows.softcap:
                p = np.float32(rows.softcap) * np.tanh(p / np.float32(rows.softcap))
            p[future] = -np.inf
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            o = p @ v
            metric = np.eye(dv, dtype=np.float32) if output is None else output[h * group + g]
            vg, og = v @ metric, o @ metric
            np.multiply(p, p, out=p)
            p *= factor  # u_ts
            u += p.sum(axis=0)
            stats.vm[h] += metric * p.sum(dtype=np.float64)
            distance = (og @ v.T) * np.float32(-2)
            distance += (vg * v).sum(axis=1)
            distance += (og * o).sum(axis=1)[:, None]
            p *= np.maximum(distance, 0, out=distance)  # w_ts
            w += p.sum(axis=0)
            by_frame = np.add.reduceat(p, starts, axis=1)
            for f, start in enumerate(starts):
                first = int(np.searchsorted(t, start + n_window))  # earlier queries do not read this frame from blocks
                part = q[first:]
                moments[f] += (part * by_frame[first:, f, None]).T @ part
        stats.km[h] += (turn.transpose(0, 2, 1) @ moments @ turn).sum(axis=0, dtype=np.float64)
        w, u = _tame(w[n_sink:]), _tame(u[n_sink:])
        x = frame[n_sink:, h].astype(np.float64)
        stats.kww[h] += (x * w[:, None]).T @ x
        np.add.at(stats.kw[h], offset[n_sink:], x * w[:, None])
        np.add.at(stats.w[h], offset[n_sink:], w)
        y = v[n_sink:].astype(np.float64)
        stats.vww[h] += (y * u[:, None]).T @ y
        stats.vw[h] += u @ y
        stats.u[h] += u.sum()


_SHAPES = {
    "k": ("H", "dk"), "v": ("H", "dv"), "kw": ("H", "F", "dk"), "kww": ("H", "dk", "dk"), "w": ("H", "F"), "km": ("H", "dk", "dk"),
    "vw": ("H", "dv"), "vww": ("H", "dv", "dv"), "u": ("H",), "vm": ("H", "dv", "dv"),
}  # fmt: skip


def _tame(weight: np.ndarray) -> np.ndarray:
    mean = weight.mean()
    if not mean > 0.0:
        return np.ones_like(weight)
    return np.minimum(weight, _CLIP * mean) + _FLOOR * mean


def key_moment(stats: Statistics, h: int) -> np.ndarray:
    """S of the keys of KV head h, normalised by its weights: float64 (dk, dk)."""
    mean = stats.k[h] / stats.count
    freq, neox = stats.rope
    offsets = np.arange(FRAME)
    turned = unrotate(np.broadcast_to(mean, (FRAME, 1, len(mean))), -offsets, freq, neox)[:, 0]  # R(o) mean
    cross = stats.kw[h].T @ turned
    return (stats.kww[h] - cross - cross.T + (turned * stats.w[h][:, None]).T @ turned) / stats.w[h].sum()


def value_moment(stats: Statistics, h: int) -> np.ndarray:
    """S of the values of KV head h, normalised by its weights: float64 (dv, dv)."""
    mean = stats.v[h] / stats.count
    cross = np.outer(stats.vw[h], mean)
    return (stats.vww[h] - cross - cross.T) / stats.u[h] + np.outer(mean, mean)


def hadamard(n: int) -> np.ndarray:
    """Orthonormal Walsh-Hadamard matrix, float64 (n, n), n a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


def key_transform(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """E of one head, float64 (dk, dk), from S and M (any scale).

    Karhunen-Loeve transform in the metric: L = M^(1/2), the eigenvectors of L S L by falling eigenvalue lambda. Block j gets
    coefficients j, j + dk/64, ...; in it the coefficients of a group that have equal bits are scaled by lambda^(-1/4) and
    mixed by a Hadamard transform, which makes their errors count alike; then to unit variance.
    """
    n = len(s)
    s = s + 1e-6 * np.trace(s) / n * np.eye(n)
    m = m / max(np.trace(m), 1e-300) * n
    values, vectors = np.linalg.eigh(m + 1e-4 * np.eye(n))
    root = (vectors * np.sqrt(values)) @ vectors.T
    values, vectors = np.linalg.eigh(root @ s @ root)
    order = np.argsort(values)[::-1]
    values, vectors = np.maximum(values[order], 1e-12 * values.max()), vectors[:, order]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(n)])  # a sign of no meaning, made the same everywhere
    basis = vectors.T @ root
    rows = []
    blocks = n // BLOCK
    for j in range(blocks):
        mine, variance = basis[j::blocks], values[j::blocks]
        start = 0
        for size, _ in GRADES:
            group = slice(start, start + size)
            scaled = mine[group] * variance[group, None] ** -0.25
            rows.append(hadamard(size) @ scaled / np.sqrt(np.sqrt(variance[group]).mean()))
            start += size
    return np.concatenate(rows)


def value_scale(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Diagonal balance of one head, float64 (dv,): (M_cc / S_cc)^(1/4), geometric mean 1."""
    a, b = np.diag(m), np.diag(s)
    a, b = np.maximum(a, 1e-9 * a.mean() + 1e-300), np.maximum(b, 1e-9 * b.mean() + 1e-300)
    log = (np.log(a) - np.log(b)) / 4
    return np.exp(log - log.mean())


def key_damage(encode: np.ndarray, s: np.ndarray, m: np.ndarray, bits: int) -> float:
    """Expected sum of w (q . dr)^2 of one head with keys of this many bits: M weighted error of the quantizer model."""
    decode = np.linalg.inv(encode)
    energy = np.einsum("ij,jk,ik->i", encode, s, encode)
    error = np.array([_MSE[max(bits + more, 0)] for size, more in GRADES for _ in range(size)] * (len(s) // BLOCK))
    return float((np.einsum("ji,jk,ki->i", decode, m, decode) * error * energy).sum())


def value_damage(scale: np.ndarray, s: np.ndarray, m: np.ndarray, bits: int) -> float:
    """Likewise for values: the Hadamard transform spreads the error evenly over the scaled values."""
    return float(_MSE[bits] * np.mean(np.diag(s) * scale**2) * (np.diag(m) / scale**2).sum())


@np.errstate(over="ignore", invalid="ignore")  # what comes of it is not finite, which is seen in the end
def design(layer: int, stats: Statistics) -> LayerDesign:
    """Means and transforms of a layer. Raises ValueError when they are not finite, or beyond what a cache can hold."""
    heads = len(stats.k)
    encodes, scales = [], []
    k_damage = v_damage = 0.0
    for h in range(heads):
        s, m = key_moment(stats, h), stats.km[h] if stats.queries else np.eye(stats.k.shape[1])
        vs, vm = value_moment(stats, h), stats.vm[h] if stats.queries else np.eye(stats.v.shape[1])
        if not all(np.isfinite(a).all() for a in (s, m, vs, vm)):
            raise ValueError(f"layer {layer} has keys or values that are not finite")
        s, m, vs, vm = (a if np.trace(a) > 0.0 else np.eye(len(a)) for a in (s, m, vs, vm))
        encode, scale = key_transform(s, m), value_scale(vs, vm)
        k_damage += key_damage(encode, s, m, 3)
        v_damage += value_damage(scale, vs, vm, 3)
        encodes.append(encode)
        scales.append(scale)
    if not (stats.has_x2 and stats.queries):
        k_damage = v_damage = float("nan")
    n = max(stats.queries, 1)
    made = LayerDesign(
        layer, (stats.k / stats.count).astype(np.float32), np.array(encodes).astype(np.float16),
        (stats.v / stats.count).astype(np.float32), np.array(scales, np.float32), k_damage / n, v_damage / n,
    )  # fmt: skip
    _check_range(made)
    return made


def _check_range(made: LayerDesign) -> None:
    """Raises ValueError unless the numbers and the predictions made from them are in the range of f16, in which caches hold them."""
    for name, array in (("keys", made.k_mean), ("keys", made.k_encode), ("values", made.v_mean), ("values", made.v_scale)):
        if not np.isfinite(array.astype(np.float16)).all():
            raise ValueError(f"the {name} of layer {made.layer} are beyond the range of f16")
    # |E R(offset) mean| <= |row of E| |mean|, as llama_seqkv_configure bounds it
    rows = np.linalg.norm(made.k_encode.astype(np.float64), axis=2).max(axis=1)
    beyond = np.flatnonzero(rows * np.linalg.norm(made.k_mean.astype(np.float64), axis=1) > np.finfo(np.float16).max)
    if beyond.size:
        raise ValueError(f"the keys of layer {made.layer}, head {beyond[0]} vary too little around their mean for the range of f16")


def plan_bits(designs: list[LayerDesign], bits: int) -> tuple[dict[int, int], dict[int, int]]:
    """Bits of every layer's keys and values for the type of `bits` bits: {layer: bits} twice.

    Keys and values of a layer get one bit more or less than the type, within 1..4, where that lowers the sum of the
    expected damages most per bit; the whole cache has exactly the type's size. Damage is additive over layers, and its
    growth with fewer bits is taken from a measurement. Without measured damages every layer has `bits`.
    """
    levels = [b for b in (bits - 1, bits, bits + 1) if 1 <= b <= 4]
    keys, values = ({d.layer: bits for d in designs} for _ in range(2))
    if not all(np.isfinite(d.k_damage) and np.isfinite(d.v_damage) for d in designs):
        return keys, values
    items = [(table, d.layer, damage, curve, size) for d in designs for table, damage, curve, size in (
        (keys, d.k_damage, _DAMAGE_K, d.k_mean.size), (values, d.v_damage, _DAMAGE_V, d.v_mean.size))]  # fmt: skip
    left = sum(size for *_, size in items) * (bits - levels[0])
    for table, layer, *_ in items:
        table[layer] = levels[0]
    while True:
        best = None
        for table, layer, damage, curve, size in items:
            now = table[layer]
            for more in range(1, levels[-1] - now + 1):
                if more * size <= left:
                    gain = damage * (curve[now] - curve[now + more]) / (more * size)
                    if best is None or gain > best[0]:
                        best = (gain, table, layer, more, size)
        if best is None:
            return keys, values
        _, table, layer, more, size = best
        table[layer] += more
        left -= more * size
