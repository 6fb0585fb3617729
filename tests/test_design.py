"""design.py: the sums against their definitions, and what transforms and plans are chosen for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from seqkv_edge.capture import Rows, unrotate
from seqkv_edge.design import (
    _CLIP,
    _FLOOR,
    GRADES,
    LayerDesign,
    Statistics,
    add,
    design,
    hadamard,
    key_damage,
    key_moment,
    key_transform,
    plan_bits,
    value_damage,
    value_moment,
    value_scale,
)  # fmt: skip

N_SINK, N_WINDOW = 3, 20


def rows(seed: int, n: int, *, heads: int = 2, group: int = 2, dk: int = 64, dv: int = 64, softcap: float = 0.0, neox: bool = True) -> Rows:
    random = np.random.default_rng(seed)
    q = random.standard_normal((n, heads * group, dk)).astype(np.float32)
    k = (random.standard_normal((n, heads, dk)) * np.linspace(0.2, 2, dk) + 1).astype(np.float32)
    v = (random.standard_normal((n, heads, dv)) * np.linspace(2, 0.1, dv) - 0.5).astype(np.float32)
    freq = 10000.0 ** (-np.arange(dk // 4) / (dk // 4))  # half of the dimensions are rotated
    x2 = random.uniform(1, 4, n).astype(np.float32)
    return Rows(5, q, k, v, x2, dk**-0.5, softcap, freq, neox)


def reference(windows: list[Rows], metric: np.ndarray) -> dict[str, np.ndarray]:
    """The same sums, pair by pair in float64, from the definitions at the head of design.py."""
    heads, dk, dv = windows[0].k.shape[1], windows[0].k.shape[2], windows[0].v.shape[2]
    group = windows[0].q.shape[1] // heads
    pre = [unrotate(r.k.astype(np.float64), np.arange(len(r.k)), r.freq, r.neox) for r in windows]
    k_mean = np.concatenate([p[N_SINK:] for p in pre]).mean(axis=0)
    v_mean = np.concatenate([r.v[N_SINK:] for r in windows]).astype(np.float64).mean(axis=0)
    s, m, vs, vm = np.zeros((heads, dk, dk)), np.zeros((heads, dk, dk)), np.zeros((heads, dv, dv)), np.zeros((heads, dv, dv))
    total, v_total = np.zeros(heads), np.zeros(heads)
    for r, p in zip(windows, pre):
        n = len(r.k)
        for h in range(heads):
            w, u = np.zeros(n), np.zeros(n)
            for t in range(N_SINK + N_WINDOW, n, 2):
                for g in range(group):
                    query = r.q[t, h * group + g].astype(np.float64)
                    score = r.scale * (r.k[: t + 1, h].astype(np.float64) @ query)
                    if r.softcap:
                        score = r.softcap * np.tanh(score / r.softcap)
                    prob = np.exp(score - score.max())
                    prob /= prob.sum()
                    output = prob @ r.v[: t + 1, h]
                    gram = metric[h * group + g]
                    for pos in range(N_SINK, t - N_WINDOW + 1):
                        d = r.v[pos, h] - output
                        u_ts = prob[pos] ** 2 / r.x2[t]
                        w_ts = u_ts * (d @ gram @ d)
                        u[pos] += u_ts
                        w[pos] += w_ts
                        vm[h] += u_ts * gram
                        frame_query = unrotate(query[None, None], np.array([pos // 64 * 64]), r.freq, r.neox)[0, 0] * r.scale
                        m[h] += w_ts * np.outer(frame_query, frame_query)
            w, u = w[N_SINK:], u[N_SINK:]
            w, u = (np.minimum(x, _CLIP * x.mean()) + _FLOOR * x.mean() for x in (w, u))
            offset = np.arange(N_SINK, n) % 64
            residual = unrotate((p[N_SINK:, h] - k_mean[h])[:, None], -offset, r.freq, r.neox)[:, 0]
            s[h] += (residual * w[:, None]).T @ residual
            values = r.v[N_SINK:, h] - v_mean[h]
            vs[h] += (values * u[:, None]).T @ values
            total[h] += w.sum()
            v_total[h] += u.sum()
    return {"k_mean": k_mean, "v_mean": v_mean, "s": s / total[:, None, None], "m": m, "vs": vs / v_total[:, None, None], "vm": vm}


@pytest.mark.parametrize(("softcap", "neox"), [(0.0, True), (5.0, False)])
def test_sums_are_their_definitions(softcap: float, neox: bool) -> None:
    windows = [rows(i, n, softcap=softcap, neox=neox) for i, n in enumerate((150, 97))]
    random = np.random.default_rng(9)
    weight = random.standard_normal((4, 80, 64)).astype(np.float32)
    metric = weight.transpose(0, 2, 1) @ weight
    stats = Statistics()
    for window in windows:
        add(stats, window, metric, n_sink=N_SINK, n_window=N_WINDOW)
    expected = reference(windows, metric.astype(np.float64))
    got = {
        "k_mean": stats.k / stats.count, "v_mean": stats.v / stats.count, "m": stats.km, "vm": stats.vm,
        "s": np.array([key_moment(stats, h) for h in range(2)]), "vs": np.array([value_moment(stats, h) for h in range(2)]),
    }  # fmt: skip
    for name, value in expected.items():
        assert np.abs(got[name] - value).max() <= 2e-4 * np.abs(value).max(), name


def covariance(seed: int, n: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.standard_normal((n, n)))[0]
    return basis @ np.diag(np.exp(-spread * np.arange(n) / n)) @ basis.T


@pytest.mark.parametrize("n", [64, 128, 256])
def test_key_transform_has_unit_variance_and_beats_a_plain_hadamard(n: int) -> None:
    s, m = 30 * covariance(1, n, 6), covariance(2, n, 4)
    encode = key_transform(s, m)
    variance = np.diag(encode @ s @ encode.T)
    start = 0
    for size, _ in GRADES * (n // 64):
        assert np.isclose(variance[start : start + size].mean(), 1.0, rtol=1e-3)
        assert np.ptp(variance[start : start + size]) < 0.05  # mixed: the group's values are alike
        start += size
    plain = hadamard(n) / np.sqrt(np.trace(s) / n)
    # both at 3 bits on average; the plain one has no groups: 3 bits everywhere
    flat = float((np.diag(np.linalg.inv(plain).T @ m @ np.linalg.inv(plain)) * 0.0245 * np.diag(plain @ s @ plain.T)).sum())
    assert key_damage(encode, s, m, 3) < 0.5 * flat
    damages = [key_damage(encode, s, m, b) for b in (1, 2, 3, 4)]
    assert damages == sorted(damages, reverse=True)


def test_key_transform_does_not_depend_on_the_scale_of_the_metric() -> None:
    s, m = covariance(3, 64, 5), covariance(4, 64, 5)
    assert np.allclose(key_transform(s, m), key_transform(s, 1e-9 * m))


def test_value_scale_minimises_the_damage() -> None:
    s, m = covariance(5, 64, 5), covariance(6, 64, 3)
    s, m = s * np.outer(np.linspace(1, 3, 64), np.linspace(1, 3, 64)), m * np.outer(np.linspace(2, 1, 64), np.linspace(2, 1, 64))
    best = value_damage(value_scale(s, m), s, m, 3)
    assert np.isclose(np.exp(np.log(value_scale(s, m)).mean()), 1.0)
    random = np.random.default_rng(7)
    for _ in range(20):
        assert best <= value_damage(value_scale(s, m) * np.exp(0.2 * random.standard_normal(64)), s, m, 3)


def test_dead_heads_and_short_windows_give_a_usable_design() -> None:
    stats = Statistics()
    window = rows(1, 15)  # no query reads a block
    add(stats, window, None, n_sink=N_SINK, n_window=N_WINDOW)
    made = design(5, stats)
    assert np.isnan(made.k_damage) and np.isfinite(made.k_encode.astype(np.float64)).all()
    zero = dataclasses.replace(rows(1, 150), k=np.zeros((150, 2, 64), np.float32), v=np.zeros((150, 2, 64), np.float32))
    stats = Statistics()
    add(stats, zero, None, n_sink=N_SINK, n_window=N_WINDOW)
    made = design(5, stats)
    assert np.isfinite(made.v_scale).all() and np.isfinite(made.k_encode.astype(np.float64)).all()


def test_not_finite_is_an_error() -> None:
    stats = Statistics()
    bad = rows(1, 150)
    v = bad.v.copy()
    v[40] = np.nan
    add(stats, dataclasses.replace(bad, v=v), None, n_sink=N_SINK, n_window=N_WINDOW)
    with pytest.raises(ValueError, match="layer 5"):
        design(5, stats)


@pytest.mark.parametrize(("mean", "spread", "what"), [(1000.0, 1e-3, "layer 5, head 0"), (1e6, 1.0, "keys of layer 5")])
def test_keys_beyond_the_range_of_a_cache_are_an_error(mean: float, spread: float, what: str) -> None:
    """What the library would refuse in the file is not made in the first place."""
    stats, window = Statistics(), rows(1, 150)
    still = dataclasses.replace(window, k=np.float32(mean) + np.float32(spread) * window.k, freq=np.zeros_like(window.freq))
    add(stats, still, None, n_sink=N_SINK, n_window=N_WINDOW)
    with pytest.raises(ValueError, match=what):
        design(5, stats)


def layer(i: int, k_damage: float, v_damage: float, heads: int = 2) -> LayerDesign:
    mean = np.zeros((heads, 64), np.float32)
    return LayerDesign(i, mean, np.zeros((heads, 64, 64), np.float16), mean, np.ones((heads, 64), np.float32), k_damage, v_damage)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_plan_has_the_size_of_the_type_and_favours_what_hurts(bits: int) -> None:
    damages = 10.0 ** np.random.default_rng(bits).uniform(-4, 0, (12, 2))
    designs = [layer(i, *d) for i, d in enumerate(damages)]
    keys, values = plan_bits(designs, bits)
    assert sum(keys.values()) + sum(values.values()) == 24 * bits
    assert all(max(1, bits - 1) <= b <= min(4, bits + 1) for b in [*keys.values(), *values.values()])
    order = np.argsort(damages[:, 0])
    assert [keys[i] for i in order] == sorted(keys.values())
    if bits < 4:
        assert keys[order[-1]] > keys[order[0]]


def test_plan_weighs_layers_by_size() -> None:
    designs = [layer(0, 1e-3, 1e-3, heads=1), layer(1, 1e-3, 1e-3, heads=4)]
    keys, values = plan_bits(designs, 3)
    assert (keys[0] + values[0]) * 64 + (keys[1] + values[1]) * 256 <= 6 * 64 + 6 * 256
    assert keys[0] >= keys[1]


def test_plan_without_measured_damage_is_the_type() -> None:
    designs = [layer(0, 1e-3, 1e-3), layer(1, float("nan"), float("nan"))]
    assert plan_bits(designs, 3) == ({0: 3, 1: 3}, {0: 3, 1: 3})
