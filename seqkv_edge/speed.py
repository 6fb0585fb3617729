"""`bench speed`: decode and prefill at depths, and how far the attention of cached tokens is from what the machine can do."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from . import llama, model
from .bench import format_cell, parse_list, parse_numbers, print_records, progress_bar
from .chat import kv_options
from .engine import Context, Model, open_model
from .errors import UsageError
from .llama import KvSpec

N_DECODE = 32
"""tokens of a decode measurement"""


@dataclass(frozen=True)
class SpeedRow:
    """Speed of one KV type at one depth; medians over the runs; `--json` prints these fields."""

    kv: str
    depth: int
    decode_tps: float
    decode_spread: float
    """(max - min) / median over the runs"""
    prefill_tps: float
    prefill_spread: float
    n_prefill: int
    """tokens of a prefill measurement"""
    runs: int
    us_per_1000: float | None = None
    """microseconds that a generated token costs more for each 1,000 tokens of depth, from the first depth to this one: all of
    it is attention over cached tokens"""
    read_gbs: float | None = None
    """cache bytes read in that time, GB/s"""
    read_share: float | None = None
    """read_gbs over the bandwidth of a large copy (bytes read and written) on as many threads; None on a GPU"""
    gflops: float | None = None
    """multiplications and additions of scores and weighted sums in that time, 1e9/s; what unpacking costs is not counted"""
    gflops_share: float | None = None
    """gflops over those of a large f32 matrix product on as many threads; None on a GPU"""
    store_share: float | None = None
    """share of the prefill's time spent in writing the cache (transform, gain, codes); seqkv types, at the first depth"""


@dataclass(frozen=True)
class Machine:
    """What the processor reaches on some threads: the best of several tries."""

    copy_gbs: float
    gflops: float


def measure_machine(threads: int) -> Machine:
    """Copies of 128 MiB a thread, and f32 products of 1,536 x 1,536 matrices."""
    from threadpoolctl import threadpool_limits

    n = 1 << 25
    pairs = [(np.ones(n, np.float32), np.empty(n, np.float32)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))

        copy_time = _best(copy)
    a = np.random.default_rng(0).standard_normal((1536, 1536), np.float32)
    with threadpool_limits(threads):
        product_time = _best(lambda: a @ a)
    return Machine(2 * threads * 4 * n / copy_time / 1e9, 2 * 1536**3 / product_time / 1e9)


def _best(work: Callable[[], Any], tries: int = 7) -> float:
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def per_cached_token(loaded: Model, kv: KvSpec) -> tuple[float, float]:
    """(bytes of its cells, floating-point operations) that one more cached token costs each generated one."""
    size = operations = 0.0
    for layer, heads_kv in zip(loaded.meta.layers, loaded.meta.heads_kv):
        if layer.window == 0 and heads_kv:
            size += (layer.k_values * llama.type_bits(kv.k) + layer.v_values * llama.type_bits(kv.v)) / 8
            operations += 2 * (layer.k_values + layer.v_values) * loaded.meta.n_head / heads_kv
    return size, operations


def with_slope(row: SpeedRow, first: SpeedRow, cost: tuple[float, float], machine: Machine | None) -> SpeedRow:
    """The row with what follows from its decode time beyond that of the first depth; cost: of `per_cached_token`."""
    tokens = row.depth - first.depth
    if tokens <= 0:
        return row
    seconds = (1 / row.decode_tps - 1 / first.decode_tps) / tokens
    row = replace(row, us_per_1000=1e9 * seconds)
    if seconds <= 0:  # noise
        return row
    gbs, gflops = (amount / seconds / 1e9 for amount in cost)
    if machine is None:
        return replace(row, read_gbs=gbs, gflops=gflops)
    return replace(row, read_gbs=gbs, gflops=gflops, read_share=gbs / machine.copy_gbs, gflops_share=gflops / machine.gflops)


def speed(args: argparse.Namespace) -> list[SpeedRow]:
    """Prefill of --prefill tokens and decode of 32 single tokens behind every depth."""
    n_prefill = args.prefill
    if n_prefill < 1:
        raise UsageError("--prefill must be at least 1")
    kvs, depths = parse_list(args.kv), sorted(set(parse_numbers(args.depth, least=0)))
    n_ctx = depths[-1] + n_prefill + N_DECODE
    rows = []
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        filler = loaded.tokenize("The quick brown fox jumps over the lazy dog. " * 64, add_special=False, parse_special=False)

        def text(n: int) -> list[int]:
            return (filler * (n // len(filler) + 1))[:n]

        machine = None if loaded.offloaded else measure_machine(args.threads or os.cpu_count() or 1)
        settings = {"n_batch": args.batch, "threads": args.threads, "force": args.force, "options": kv_options(args)}
        with progress_bar("speed, depths", len(kvs) * len(depths)) as advance:
            for kv in kvs:
                share = store_share(loaded, kv, text(n_prefill), settings) if kv.ours else None
                cost, first = per_cached_token(loaded, kv), None
                with loaded.context(kv, n_ctx=n_ctx, **settings) as context:
                    context.evaluate(text(16))  # first-use costs
                    for depth in depths:
                        context.keep(depth)
                        context.evaluate(text(depth - context.n_past))
                        prefill = [_timed(context, depth, [text(n_prefill)]) for _ in range(args.runs)]
                        decode = [_timed(context, depth, [[t] for t in text(N_DECODE)]) for _ in range(args.runs)]
                        row = SpeedRow(str(kv), depth, *_stats(decode), *_stats(prefill), n_prefill, args.runs, store_share=None if first else share)
                        first = first or row
                        rows.append(with_slope(row, first, cost, machine))
                        advance(1)
    return rows


def store_share(loaded: Model, kv: KvSpec, tokens: list[int], settings: dict[str, Any]) -> float:
    """Share of the time of evaluating tokens in an empty cache that its writing takes, node by node of the graph."""
    times: Counter[str] = Counter()
    last = 0.0

    def node_done(op: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[op] += now - last
        last = now

    with loaded.context(kv, n_ctx=len(tokens), node_done=node_done, **settings) as context:
        for _ in range(2):  # the first one has first-use costs
            context.clear()
            times.clear()
            last = time.perf_counter()
            context.evaluate(tokens)
    return times["SEQKV_STORE"] / sum(times.values())


def _timed(context: Context, depth: int, batches: list[list[int]]) -> float:
    """Tokens per second of evaluating batches at `depth`; the cache is left as it was."""
    started = time.perf_counter()
    for batch in batches:
        context.evaluate(batch)
    elapsed = time.perf_counter() - started
    context.keep(depth)
    return sum(map(len, batches)) / elapsed


def _stats(values: list[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    return middle, (max(values) - min(values)) / middle


def print_speed(title: str, rows: list[SpeedRow]) -> None:
    """Tables on standard output: speeds; what attention over the cache costs; what writing it costs."""

    def table(title: str, names: list[str], rows: list[SpeedRow]) -> None:
        if rows:
            records = [asdict(row) for row in rows]
            print_records(title, [{name.replace("_", " "): format_cell(name, record[name]) for name in names} for record in records])

    table(title, ["kv", "depth", "decode_tps", "decode_spread", "prefill_tps", "prefill_spread", "n_prefill", "runs"], rows)
    cost = ["kv", "depth", "us_per_1000", "read_gbs", "read_share", "gflops", "gflops_share"]
    table("cost of cached tokens (us for a generated token per 1,000 cached; shares of a copy and of a matrix product)",
          cost, [row for row in rows if row.us_per_1000 is not None])  # fmt: skip
    table("writing the cache, share of a prefill in an empty cache", ["kv", "store_share"], [row for row in rows if row.store_share is not None])
