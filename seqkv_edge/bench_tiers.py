"""`bench store --tiers`: rate, distortion and latency of every tier of a session, side by side.

To the rows of `bench store` come bits a value, the distance from an f16 cache, and lossy frames. Distance: the first half of a window is
evaluated and, for a lossy tier, its stored frames put in place of the live ones; the second half is scored as in `bench quality`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import bench, bench_store, coders, model, state
from .bench_store import StoreRow
from .engine import Context, Model, open_model
from .llama import KvSpec
from .lossy import STEPS
from .session import identify, read_end, read_frame, window_of
from .state import FRAME

WINDOW, CHUNKS = 2048, 2
"""tokens of a window, half of them scored, and windows"""
SHAPES = {"8B": 2 * 32 * 8 * 128, "70B": 2 * 80 * 8 * 128, "70B without shared KV heads": 2 * 80 * 64 * 128}
"""cached values of a token; the last is what the paper's 914,000 counts with (3 bits a value, 4.3 bits a token)"""


@dataclass(frozen=True)
class Ratio:
    """The paper's arithmetic: bits of a token in a KV cache / bits of its id."""

    shape: str
    values: int
    """cached values of a token"""
    tier: str
    tokens_bits: float
    """as measured"""
    ratio_to_f16: float
    ratio_to_3_bits: float
    """to a code of 3 bits a value, vector by vector"""


def tiers(args: argparse.Namespace) -> list[StoreRow | Ratio]:
    """The rows of `bench store --tiers`."""
    rows = bench_store.store(args)
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        values = sum(layer.k_values + layer.v_values for layer in loaded.meta.layers)
        windows = bench.window_tokens(loaded, bench_store.text_of(args), min(WINDOW, args.tokens // (2 * FRAME) * 2 * FRAME), CHUNKS)
        found = _distances(loaded, bench.parse_list(args.kv), windows, args)
    out: list[StoreRow] = []
    live: StoreRow | None = None
    for row in rows:
        row = replace(row, bits_per_value=8 * row.bytes_per_token / values)
        if row.tier == "live":
            live = row
        if row.kv == "-":  # its tokens are evaluated again
            assert live and live.prefill_tps
            row = replace(row, restore_tps=1 / (1 / live.prefill_tps + (1 / row.restore_tps if row.restore_tps else 0)))
        else:
            row = replace(row, kld_mean=found[row.kv, ""].kld)
        if row.kv == "-" and not any(r.kv == "-" for r in out):
            out += [lossy for kv in dict.fromkeys(r.kv for r in out) for lossy in _lossy_rows(kv, found, values, len(windows[0]) // 2)]
        out.append(row)
    return [*out, *ratios(out)]


@dataclass(frozen=True)
class _Distance:
    kld: float
    bytes_per_token: float = 0.0
    """of frames"""
    save_tps: float = 0.0
    """making the lossy blocks and coding them"""


def _distances(loaded: Model, kvs: Sequence[KvSpec], windows: Sequence[list[int]], args: argparse.Namespace) -> dict[tuple[str, str], _Distance]:
    """By type and level; "": what the live cache has."""
    options = bench_store.options_of(args)
    settings = {"n_ctx": len(windows[0]), "n_batch": args.batch, "threads": args.threads, "force": args.force}
    half = len(windows[0]) // 2
    found: dict[tuple[str, str], list[_Distance]] = {}
    with bench.progress_bar("distances, tokens", len(windows) * (len(kvs) + 1) * len(windows[0])) as advance:
        for window in windows:
            with bench.open_cache(loaded, bench.F16, options=options, **settings) as context:
                base = bench.window_logits(context, window, half, advance)
            for kv in kvs:
                with loaded.context(kv, options=options if kv.ours else None, **settings) as context:
                    for level, distance in _of_window(context, window, half, base).items():
                        found.setdefault((str(kv), level), []).append(distance)
                advance(len(window))
    return {key: _Distance(*(float(np.mean(column)) for column in zip(*(vars(d).values() for d in each)))) for key, each in found.items()}


def _of_window(context: Context, window: list[int], half: int, base: np.ndarray) -> dict[str, _Distance]:
    layout = identify(context).layout
    n_sink, n_window = window_of(layout)
    coder = coders.predictors(context.model.profile, layout) if context.kv.ours and context.model.profile else None
    context.evaluate(window[:half])
    frames = [read_frame(context, i, n_sink) for i in range(half // FRAME)]
    end = read_end(context, n_sink, n_window)
    found = {"": _Distance(_continued(context, window, half, base))}
    for level in STEPS if coder else ():
        path, pieces, size, started = coders.path_coder(coder, level), [], 0, time.perf_counter()
        for i, chunk in enumerate(frames):
            size += len(path.encode(window[FRAME * i : FRAME * (i + 1)], chunk))
        rate = half / (time.perf_counter() - started)
        pieces = [(state.Chunk(path.stored(chunk.blocks), chunk.extra), FRAME) for chunk in frames]
        exact = None
        if end is not None:
            pieces.append((end, 0))
            exact = state.check_chunk(end, layout, 0)
        context.clear()
        context.set_state(state.build(layout, pieces, window[:half], exact), window[:half])
        found[level] = _Distance(_continued(context, window, half, base), size / half, rate)
    return found


def _continued(context: Context, window: list[int], half: int, base: np.ndarray) -> float:
    """Mean KLD from `base` over the second half of a window, whose first is in the cache."""
    targets, parts, row = np.array(window[half + 1 :]), [], 0
    for logits in context.logits(window[half:], 0):
        rows = slice(row, min(row + len(logits), len(base)))
        row = rows.stop
        if rows.stop > rows.start:
            parts.append(bench.compare(base[rows], logits[: rows.stop - rows.start], targets[rows]))
    return float(bench.join(parts).kld.mean())


def _lossy_rows(kv: str, found: dict[tuple[str, str], _Distance], values: int, n: int) -> list[StoreRow]:
    return [
        StoreRow(
            kv, f"stored {level}", n, d.bytes_per_token, 2 * values / d.bytes_per_token, save_tps=d.save_tps,
            bits_per_value=8 * d.bytes_per_token / values, kld_mean=d.kld,
        )
        for (name, level), d in found.items() if name == kv and level
    ]  # fmt: skip


def ratios(rows: Sequence[StoreRow]) -> list[Ratio]:
    """The paper's arithmetic with the measured bits a token, for this model and larger shapes."""
    out = []
    for row in rows:
        if row.tier in ("tokens adaptive", "tokens model") and row.tokens_bits:
            own = round(row.ratio_to_f16 * row.bytes_per_token / 2)
            for shape, values in ({"this model": own} | SHAPES).items():
                out.append(Ratio(shape, values, row.tier, row.tokens_bits, 16 * values / row.tokens_bits, 3 * values / row.tokens_bits))
    return out


def print_tiers(title: str, rows: Sequence[StoreRow | Ratio]) -> None:
    bench_store.print_store(title, [row for row in rows if isinstance(row, StoreRow)])
    names = {"shape": "shape", "values": "values", "tier": "tier", "tokens_bits": "bits/token", "ratio_to_f16": "f16 /", "ratio_to_3_bits": "3 bits /"}
    bench.print_table("bits of a cached token / bits of its id", [row for row in rows if isinstance(row, Ratio)], names)


def plot(rows: Sequence[StoreRow | Ratio], path: Path) -> None:
    """Distance and restoring speed over bits a value."""
    pyplot = bench.plotter()
    stored = [row for row in rows if isinstance(row, StoreRow)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(row.kv for row in stored if row.kv != "-"))
    for i, kv in enumerate(kinds):
        of = [row for row in stored if row.kv == kv]
        exact = [row for row in of if row.tier in ("live", "stored fast", "stored small")]
        points = sorted((row.bits_per_value, row.kld_mean) for row in of if row.tier.startswith("stored lossy"))
        points = [p for p in [*points, *((r.bits_per_value, r.kld_mean) for r in exact)] if p[1]]
        if points:
            left.plot(*zip(*points), marker="o", color=f"C{i}", label=kv)
        for row in of:
            if row.restore_tps:
                right.plot(row.bits_per_value, row.restore_tps, "o", color=f"C{i}")
                right.annotate(f" {row.tier}", (row.bits_per_value, row.restore_tps), fontsize=7)
        prefill = next((row.prefill_tps for row in of if row.prefill_tps), None)
        if prefill:
            right.axhline(prefill, color=f"C{i}", linestyle=":", linewidth=1)
    for row in stored:
        if row.kv == "-" and row.restore_tps:
            right.plot(row.bits_per_value, row.restore_tps, "ks")
            right.annotate(f" {row.tier}", (row.bits_per_value, row.restore_tps), fontsize=7)
    left.set(xlabel="bits a value", ylabel="mean KLD from f16, nats", xscale="log", yscale="log", title="exact (live, fast, small) and lossy")
    right.set(xlabel="bits a value", ylabel="restored tokens/s", xscale="log", yscale="log", title="dotted: prefill")
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
