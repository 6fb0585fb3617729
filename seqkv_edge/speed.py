"""`bench speed`: decode and prefill at depths, and how far the attention of cached tokens is from what the machine can do."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from . import llama, model
from .bench import format_cell, parse_list, parse_numbers, print_records, progress_bar
from .chat import kv_options
from .engine import Context, Model, copy_bandwidth, devices, open_model
from .errors import MemoryLimitError, ModelError, UsageError
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
    decode_ratio: float | None = None
    """decode over that of the first type right before or after it, median over the runs; None for the first type"""
    prefill_ratio: float | None = None
    us_per_1000: float | None = None
    """microseconds that a generated token costs more for each 1,000 tokens of depth, from the first depth to this one: all of
    it is attention over cached tokens"""
    read_gbs: float | None = None
    """cache bytes read in that time, GB/s"""
    read_share: float | None = None
    """read_gbs over the bandwidth of a large copy (bytes read and written) on as many threads, or in the memory of the first GPU"""
    gflops: float | None = None
    """multiplications and additions of scores and weighted sums in that time, 1e9/s; what unpacking costs is not counted"""
    gflops_share: float | None = None
    """gflops over those of a large f32 matrix product on as many threads; None on a GPU"""
    store_share: float | None = None
    """share of the prefill's time spent in writing the cache (transform, gain, codes); seqkv types, at the first depth"""


@dataclass(frozen=True)
class Machine:
    """What the processor on some threads, or a GPU, reaches: the best of several tries. None: not measured."""

    copy_gbs: float | None
    gflops: float | None


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


def measure_gpu() -> Machine:
    """Copies of 256 MiB within the memory of the first GPU."""
    gpus = [index for index, device in enumerate(devices()) if device.gpu]
    rate = copy_bandwidth(gpus[0]) if gpus else None
    return Machine(rate and rate / 1e9, None)


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


def with_slope(row: SpeedRow, first: SpeedRow, cost: tuple[float, float], machine: Machine) -> SpeedRow:
    """The row with what follows from its decode time beyond that of the first depth; cost: of `per_cached_token`."""
    tokens = row.depth - first.depth
    if tokens <= 0:
        return row
    seconds = (1 / row.decode_tps - 1 / first.decode_tps) / tokens
    row = replace(row, us_per_1000=1e9 * seconds)
    if seconds <= 0:  # noise
        return row
    gbs, gflops = (amount / seconds / 1e9 for amount in cost)
    read_share = gbs / machine.copy_gbs if machine.copy_gbs else None
    gflops_share = gflops / machine.gflops if machine.gflops else None
    return replace(row, read_gbs=gbs, gflops=gflops, read_share=read_share, gflops_share=gflops_share)


def speed(args: argparse.Namespace) -> list[SpeedRow]:
    """Prefill of --prefill tokens and decode of 32 single tokens behind every depth.

    The caches of all types are in memory at once, and each run measures one type after the other, so that what else a machine
    does meets them all. The first type of a run is another one each time.
    """
    n_prefill = args.prefill
    if n_prefill < 1:
        raise UsageError("--prefill must be at least 1")
    if args.runs < 1:
        raise UsageError("--runs must be at least 1")
    kvs, depths = parse_list(args.kv), sorted(set(parse_numbers(args.depth, least=0)))
    n_ctx = depths[-1] + n_prefill + N_DECODE
    rows: list[SpeedRow] = []
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded, ExitStack() as stack:
        filler = loaded.tokenize("The quick brown fox jumps over the lazy dog. " * 64, add_special=False, parse_special=False)

        def text(n: int) -> list[int]:
            return (filler * (n // len(filler) + 1))[:n]

        machine = measure_gpu() if loaded.offloaded else measure_machine(args.threads or os.cpu_count() or 1)
        settings = {"n_batch": args.batch, "threads": args.threads, "force": args.force, "options": kv_options(args)}
        shares = [store_share(loaded, kv, text(n_prefill), settings) if kv.ours else None for kv in kvs]
        contexts = [_open(stack, loaded, kv, i, n_ctx=n_ctx, **settings) for i, kv in enumerate(kvs)]
        for context in contexts:
            context.evaluate(text(16))  # first-use costs
        with progress_bar("speed, measurements", len(depths) * len(kvs) * (1 + args.runs)) as advance:
            for depth in depths:
                for context in contexts:
                    context.keep(depth)
                    context.evaluate(text(depth - context.n_past))
                    advance(1)
                prefill: list[list[float]] = [[] for _ in kvs]
                decode: list[list[float]] = [[] for _ in kvs]
                for run in range(args.runs):
                    for i in (*range(run % len(kvs), len(kvs)), *range(run % len(kvs))):
                        prefill[i].append(_timed(contexts[i], depth, [text(n_prefill)]))
                        decode[i].append(_timed(contexts[i], depth, [[t] for t in text(N_DECODE)]))
                        advance(1)
                for i, kv in enumerate(kvs):
                    ratios = (_ratio(decode[i], decode[0]), _ratio(prefill[i], prefill[0])) if i else (None, None)
                    share = None if len(rows) >= len(kvs) else shares[i]
                    row = SpeedRow(str(kv), depth, *_stats(decode[i]), *_stats(prefill[i]), n_prefill, args.runs, *ratios, store_share=share)
                    rows.append(with_slope(row, rows[i] if depth > depths[0] else row, per_cached_token(loaded, kv), machine))
    return rows


def _open(stack: ExitStack, loaded: Model, kv: KvSpec, n_open: int, **settings: Any) -> Context:
    """A context that is closed with the stack; errors name the n_open caches that are in memory already."""
    try:
        return stack.enter_context(loaded.context(kv, **settings))
    except (MemoryLimitError, ModelError) as error:
        if n_open == 0:
            raise
        raise type(error)(f"{error}; it would be beside the caches of {n_open} other types: compare fewer (--kv) or take a smaller --depth") from None


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


def _ratio(values: list[float], base: list[float]) -> float:
    return statistics.median(value / of for value, of in zip(values, base))


def print_speed(title: str, rows: list[SpeedRow]) -> None:
    """Tables on standard output: speeds; what attention over the cache costs; what writing it costs."""

    def table(title: str, names: list[str], rows: list[SpeedRow]) -> None:
        if rows:
            records = [asdict(row) for row in rows]
            print_records(title, [{name.replace("_", " "): format_cell(name, record[name]) for name in names} for record in records])

    table(title, ["kv", "depth", "decode_tps", "decode_spread", "prefill_tps", "prefill_spread", "n_prefill", "runs", "decode_ratio", "prefill_ratio"], rows)
    cost = ["kv", "depth", "us_per_1000", "read_gbs", "read_share", "gflops", "gflops_share"]
    table("cost of cached tokens (us for a generated token per 1,000 cached; shares of a copy and of a matrix product)",
          cost, [row for row in rows if row.us_per_1000 is not None])  # fmt: skip
    table("writing the cache, share of a prefill in an empty cache", ["kv", "store_share"], [row for row in rows if row.store_share is not None])
