"""The `bench` command: memory, quality and speed of KV cache types on one model."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import fit, llama, model
from .chat import kv_options
from .dropin import KvOptions
from .engine import Context, Model, devices, open_model
from .errors import LibraryError, SeqkvError, UsageError
from .llama import QUANTIZED_TYPES, KvSpec

DEFAULT_KV = "f16,q8_0,q4_0,seqkv4,seqkv3,seqkv2"
QUALITY_KV = "f16,q8_0,q5_0,q4_0,seqkv4,seqkv3,seqkv2"
QUALITY_PEERS = "q8_0+w,q5_0+w,q4_0+w"
"""llama.cpp's types with the exact window of the seqkv types; listed by default unless the window is 0"""
_BLOCK = 64  # positions compared at once: 64 x n_vocab float64
_MOST_TABLES = 0.05  # of a cache's computed size; what the library reports beyond that is no table


@dataclass(frozen=True)
class QualityRow:
    """Quality of one KV type against the f16 cache; `--json` prints these fields."""

    kv: str
    """a KV spec; with +w, llama.cpp's type with the exact window of the seqkv types"""
    bits_per_value: float
    """of the type's blocks, mean of K and V"""
    bits_per_value_at_ctx: float
    """all KV bytes (exact window and tables included) over all values, at the measured context"""
    bits_per_value_8192: float | None
    """the same at a context of 8,192 tokens; None when the sizes are not understood (a warning says so)"""
    bits_per_value_32768: float | None
    ppl: float
    ppl_base: float
    kld_mean: float
    """nats"""
    kld_sem: float | None
    """standard error of kld_mean, from the means of the windows; None with one window"""
    kld_median: float
    kld_p99: float
    tvd_mean: float
    """total variation distance, 0..1"""
    top1_agreement: float
    """share of positions with the same most likely token, 0..1"""
    tokens: int
    """positions scored"""
    kld_quarters: list[float] | None = None
    """mean KLD in each quarter of the window, with --quarters"""


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one KV type at one context; bytes; `--json` prints these fields."""

    kv: str
    ctx: int
    kv_bytes: int
    """sum of the KV tensors' buffers"""
    kv_bytes_per_token: float
    bits_per_value: float
    """at this context, exact window and tables included"""
    rss_bytes: int
    """resident memory of a process with model and context, after 512 tokens"""
    peak_rss_bytes: int
    gpu_bytes: int
    """device memory taken by model and context, 0 without a GPU"""
    kv_bytes_reported: int | None
    """what the library reports for the context; None on unpatched libraries"""
    kv_bytes_process: int
    """growth of the process (and device) when the cache is made"""


# --- quality ---


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """f32 (n, n_vocab) -> float64 log-probabilities of the same shape."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


@dataclass(frozen=True)
class Compared:
    """Per-position comparison of two next-token distributions; all arrays (n,)."""

    nll: np.ndarray
    nll_base: np.ndarray
    kld: np.ndarray
    tvd: np.ndarray
    same_top: np.ndarray


def compare(base: np.ndarray, other: np.ndarray, targets: np.ndarray) -> Compared:
    """Compare logits f32 (n, n_vocab) of the base and of another cache; targets (n,) are the tokens that followed.

    kld is KL(base || other) in nats, as in llama-perplexity.
    """
    parts = []
    for start in range(0, len(targets), _BLOCK):
        rows = slice(start, start + _BLOCK)
        p, q = log_softmax(base[rows]), log_softmax(other[rows])
        index = np.arange(len(p)), targets[rows]
        ep = np.exp(p)
        parts.append((
            -q[index], -p[index], np.maximum((ep * (p - q)).sum(axis=1), 0.0),
            0.5 * np.abs(ep - np.exp(q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1),
        ))  # fmt: skip
    return Compared(*(np.concatenate(column) for column in zip(*parts)))


def join(parts: list[Compared]) -> Compared:
    """All positions of several comparisons."""
    names = ("nll", "nll_base", "kld", "tvd", "same_top")
    return Compared(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Bits:
    """Bits per value of a cache, as in the fields of QualityRow."""

    own: float
    at_ctx: float
    at_8192: float | None
    at_32768: float | None


def summarize(kv: str, bits: Bits, windows: list[Compared], ctx: int) -> QualityRow:
    """One row from the comparisons of all windows of `ctx` tokens.

    A window has the last ctx - 1 - ctx//2 positions, or all ctx - 1; only the second half is scored in either case, and
    the quarters are given in the latter.
    """
    n_half = ctx - 1 - ctx // 2
    halves = [Compared(*(column[-n_half:] for column in vars(window).values())) for window in windows]
    scored = join(halves)
    means = np.array([half.kld.mean() for half in halves])
    sem = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    quarters = None
    if all(len(window.kld) == ctx - 1 for window in windows):
        edges = [ctx * q // 4 for q in range(5)]
        pairs = zip(edges, edges[1:])
        quarters = [float(np.concatenate([window.kld[a:b] for window in windows]).mean()) for a, b in pairs]
    return QualityRow(
        kv, bits.own, bits.at_ctx, bits.at_8192, bits.at_32768,
        float(np.exp(scored.nll.mean())), float(np.exp(scored.nll_base.mean())),
        float(scored.kld.mean()), sem, float(np.median(scored.kld)), float(np.quantile(scored.kld, 0.99)),
        float(scored.tvd.mean()), float(scored.same_top.mean()), len(scored.kld), quarters,
    )  # fmt: skip


def window_tokens(loaded: Model, text: str, ctx: int, chunks: int) -> list[list[int]]:
    """Windows of ctx tokens, as llama-perplexity cuts them; each starts with BOS where the model wants one."""
    tokens = loaded.tokenize(text[: ctx * chunks * 64], add_special=True, parse_special=False)
    n = min(chunks, len(tokens) // ctx)
    if n < 1:
        raise UsageError(f"the text has {len(tokens)} tokens, a window needs {ctx}: use more text or a smaller --ctx")
    windows = [tokens[i * ctx : (i + 1) * ctx] for i in range(n)]
    if loaded.api.llama_vocab_get_add_bos(loaded.vocab):
        bos = int(loaded.api.llama_vocab_bos(loaded.vocab))
        windows = [[bos, *window[1:]] for window in windows]
    return windows


def window_logits(context: Context, window: list[int], first: int, advance: Callable[[int], None]) -> np.ndarray:
    """f32 (ctx - 1 - first, n_vocab): logits that predict the tokens after position `first` of the window."""
    context.clear()
    out = np.empty((len(window) - 1 - first, context.model.n_vocab), np.float32)
    row = 0
    for logits in context.logits(window, first, advance):
        n = min(len(logits), len(out) - row)  # the last position predicts beyond the window
        out[row : row + n] = logits[:n]
        row += n
    return out


def compare_window(
    base: np.ndarray, context: Context, window: list[int], first: int, advance: Callable[[int], None]
) -> Compared:
    """Run a window and compare it with the base's `window_logits` of the same `first`, batch by batch."""
    context.clear()
    targets = np.array(window[first + 1 :])
    parts, row = [], 0
    for logits in context.logits(window, first, advance):
        rows = slice(row, min(row + len(logits), len(base)))
        row = rows.stop
        if rows.stop > rows.start:
            parts.append(compare(base[rows], logits[: rows.stop - rows.start], targets[rows]))
    return join(parts)


@dataclass(frozen=True)
class QualityKv:
    """One entry of the list of `bench quality`."""

    kv: KvSpec
    windowed: bool = False
    """a type of llama.cpp inside the seqkv cache, with its exact window"""

    @staticmethod
    def parse(text: str) -> QualityKv:
        """A KV spec, or one of llama.cpp's quantized types with +w behind it. Raises UsageError."""
        spec, plus, suffix = text.strip().partition("+")
        kv = KvSpec.parse(spec)
        if plus and (suffix != "w" or kv.ours or not {kv.k, kv.v} & set(QUANTIZED_TYPES)):
            raise UsageError(f"{text.strip()!r}: +w goes behind a quantized type of llama.cpp, for example q4_0+w")
        return QualityKv(kv, bool(plus))

    def __str__(self) -> str:
        return f"{self.kv}+w" if self.windowed else str(self.kv)


F16 = QualityKv(KvSpec("f16", "f16"))


def parse_quality_list(text: str | None, options: KvOptions) -> list[QualityKv]:
    """The entries of a list such as "f16,seqkv3,q4_0+w", in order, without repetitions; None is the default list."""
    if text is None:
        text = f"{QUALITY_KV},{QUALITY_PEERS}" if options.n_window else QUALITY_KV
    kvs = list(dict.fromkeys(QualityKv.parse(item) for item in text.split(",")))
    if any(kv.windowed for kv in kvs) and not options.n_sink + options.n_window:
        raise UsageError("+w needs an exact window: use a --window above 0")
    return kvs


@contextmanager
def open_cache(loaded: Model, kv: QualityKv, *, n_ctx: int, options: KvOptions, **settings: Any) -> Iterator[Context]:
    """A context for the length of a `with` block; settings as for `Model.context`. Raises LibraryError for +w when the
    libraries give llama.cpp's types no exact window."""
    if not kv.windowed:
        with loaded.context(kv.kv, n_ctx=n_ctx, options=options, **settings) as context:
            yield context
        return
    assert loaded.pointer
    window = options.n_sink, options.n_window
    llama.configure(loaded.pointer, None, None, *window, any_type=True)
    try:
        context = loaded.context(kv.kv, n_ctx=n_ctx, options=options, **settings)
    finally:  # later contexts of the plain types are llama.cpp's own again
        llama.configure(loaded.pointer, None, None, *window)
    with context:
        plain, windowed = (cache_size(loaded, k, context.n_ctx, options, context.n_batch) for k in (QualityKv(kv.kv), kv))
        reported = context.kv_bytes()
        if reported is None or reported < (plain + windowed) / 2:
            raise LibraryError(
                f"the llama.cpp libraries in {llama.library().directory} give {kv.kv} no exact window: reinstall "
                f"seqkv-edge to build them (pip install .), or leave {kv} out of --kv"
            )
        yield context


def cache_size(loaded: Model, kv: QualityKv, n_ctx: int, options: KvOptions, n_batch: int) -> int:
    """Computed bytes of a cache of n_ctx tokens, exact window included."""
    meta = loaded.meta
    settings = fit.Settings(options.n_sink, options.n_window, n_batch, options.profile is not None)
    total = fit.kv_bytes(meta, kv.kv, n_ctx, llama.type_bits, settings)
    if kv.windowed:
        rows = min(fit.pad_ctx(n_ctx), options.n_sink + options.n_window)
        total += sum(2 * rows * (layer.k_values + layer.v_values) for layer in meta.layers if not layer.window)
    return total


def measure_bits(context: Context, kv: QualityKv, options: KvOptions) -> Bits:
    """Bits per value: at the context's length as the library reports, at other lengths computed.

    The part of the report that `cache_size` does not know (tables) does not depend on the length and is carried over.
    """
    loaded, n_batch = context.model, context.n_batch
    computed = cache_size(loaded, kv, context.n_ctx, options, n_batch)
    reported = context.kv_bytes()
    tables = 0 if reported is None else reported - computed
    understood = abs(tables) <= _MOST_TABLES * computed
    if not understood:
        print(
            f"warning: the library reports {reported:,} bytes for {kv} at {context.n_ctx} tokens, computed are {computed:,}: "
            "no bits per value at other lengths",
            file=sys.stderr,
        )

    def bits(n_ctx: int, batch: int) -> float:
        total = cache_size(loaded, kv, n_ctx, options, batch) + tables
        return 8 * total / fit.kv_values(loaded.meta, n_ctx, batch)

    assert context.pointer
    return Bits(
        llama.bits(context.pointer) or (llama.type_bits(kv.kv.k) + llama.type_bits(kv.kv.v)) / 2,
        bits(context.n_ctx, n_batch),
        bits(8192, n_batch) if understood else None,
        bits(32768, n_batch) if understood else None,
    )


def score(
    loaded: Model,
    text: str,
    kvs: list[QualityKv],
    *,
    ctx: int,
    chunks: int,
    options: KvOptions,
    quarters: bool = False,
    n_batch: int = 512,
    threads: int | None = None,
    force: bool = False,
) -> list[QualityRow]:
    """One row per KV type: `chunks` windows of `ctx` tokens of the text, each compared with the f16 cache.

    quarters: the first half of the windows is run for its logits too, for `kld_quarters`. Raises SeqkvError.
    """
    if ctx < 16 or chunks < 1:
        raise UsageError("--ctx must be at least 16 and --chunks at least 1")
    windows = window_tokens(loaded, text, ctx, chunks)
    if len(windows) < chunks:
        print(f"warning: the text fills only {len(windows)} windows of {ctx}", file=sys.stderr)
    first = 0 if quarters else ctx // 2
    parts: dict[QualityKv, list[Compared]] = {kv: [] for kv in kvs}
    bits: dict[QualityKv, Bits] = {}
    settings: dict[str, Any] = {"options": options, "n_batch": n_batch, "threads": threads, "force": force}
    for kv in kvs:  # what cannot be opened fails, and missing profiles are made, before the long run
        with open_cache(loaded, kv, n_ctx=256, **settings):
            pass
    others = [kv for kv in kvs if kv != F16]
    with progress_bar("quality, tokens", len(windows) * (len(others) + 1) * ctx) as advance:
        for window in windows:
            with open_cache(loaded, F16, n_ctx=ctx, **settings) as context:
                bits[F16] = measure_bits(context, F16, options)
                base = window_logits(context, window, first, advance)
            if F16 in parts:
                parts[F16].append(compare(base, base, np.array(window[first + 1 :])))
            for kv in others:
                with open_cache(loaded, kv, n_ctx=ctx, **settings) as context:
                    if kv not in bits:
                        bits[kv] = measure_bits(context, kv, options)
                    parts[kv].append(compare_window(base, context, window, first, advance))
    return [summarize(str(kv), bits[kv], parts[kv], ctx) for kv in kvs]


def quality(args: argparse.Namespace) -> list[QualityRow]:
    """The rows of `bench quality`."""
    options = kv_options(args)
    kvs = parse_quality_list(args.kv, options)
    text = read_text(args.text)
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        return score(
            loaded, text, kvs, ctx=args.ctx, chunks=args.chunks, options=options, quarters=args.quarters,
            n_batch=args.batch, threads=args.threads, force=args.force,
        )  # fmt: skip


def print_quality(title: str, rows: list[QualityRow]) -> None:
    """The main fields as a table of at most 100 columns; the quarters in a second one."""
    names = {
        "kv": "KV cache", "bits_per_value": "bits", "bits_per_value_at_ctx": "at ctx", "bits_per_value_8192": "at 8192",
        "ppl": "PPL", "kld_mean": "KLD mean", "kld_sem": "±", "kld_p99": "99 %", "top1_agreement": "top 1",
    }  # fmt: skip
    print_table(title, rows, names)
    if any(row.kld_quarters for row in rows):
        print_records(
            "KLD by quarter of the window",
            [{"KV cache": row.kv} | {f"{i}": f"{x:.5f}" for i, x in enumerate(row.kld_quarters or [], 1)} for row in rows],
        )


def cache_bytes(context: Context, options: KvOptions) -> int:
    """Bytes of a context's cache: reported by the library, or computed where it reports none."""
    reported = context.kv_bytes()
    if reported is not None:
        return reported
    return cache_size(context.model, QualityKv(context.kv), context.n_ctx, options, context.n_batch)


# --- memory ---


def memory_worker(args: argparse.Namespace) -> MemoryRow:
    """Measure one type at one context in this (fresh) process.

    Growth of the cache: a small context is made twice first, so that the second shows the fixed cost of a context; what
    the large one takes beyond that, plus the small cache's own bytes, is the large cache.
    """
    import psutil

    kv, ctx = KvSpec.parse(args.kv), int(args.ctx)
    options = kv_options(args)
    process = psutil.Process()

    def used() -> int:
        return int(process.memory_info().rss) + device_used() - device_start

    device_start = 0
    device_start = device_used()
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        settings: dict[str, Any] = {"n_batch": args.batch, "threads": args.threads, "force": args.force}
        settings["options"] = options
        small, large = _Growth(used), _Growth(used)
        # all stay open until the end: memory that one gives back would be used by the next
        with loaded.context(kv, n_ctx=256, **settings), small, loaded.context(kv, n_ctx=256, **settings) as context:
            small.stop()
            small_cache = cache_bytes(context, options)
            with large, loaded.context(kv, n_ctx=ctx, **settings):
                large.stop()
        with loaded.context(kv, n_ctx=ctx, **settings) as context:
            n = min(512, context.n_ctx)
            token = max(0, int(loaded.api.llama_vocab_bos(loaded.vocab)))
            context.evaluate([token] * n)
            total = cache_bytes(context, options)
            cells = context.n_ctx
            values = fit.kv_values(loaded.meta, cells, context.n_batch)
            rss = int(process.memory_info().rss)
            return MemoryRow(
                str(kv), cells, total, total / cells, 8 * total / values, rss, max(rss, peak_rss()),
                max(0, device_used() - device_start), context.kv_bytes(), large.growth - small.growth + small_cache,
            )  # fmt: skip


class _Growth:
    """Growth of a quantity from entering a `with` block to `stop`."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read, self._start, self.growth = read, 0, 0

    def __enter__(self) -> _Growth:
        self._start = self._read()
        return self

    def stop(self) -> None:
        self.growth = self._read() - self._start

    def __exit__(self, *_: object) -> None:
        pass


def device_used() -> int:
    """Bytes in use on all GPUs (by anyone)."""
    return sum(d.memory_total - d.memory_free for d in devices() if d.gpu)


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def memory(args: argparse.Namespace) -> list[MemoryRow]:
    """One fresh process per type and context."""
    kvs, contexts = parse_list(args.kv), parse_numbers(args.ctx)
    rows = []
    with progress_bar("memory, measurements", len(kvs) * len(contexts)) as advance:
        for kv in kvs:
            for ctx in contexts:
                rows.append(_run_worker(args, kv, ctx))
                advance(1)
    return rows


def _run_worker(args: argparse.Namespace, kv: KvSpec, ctx: int) -> MemoryRow:
    command = [sys.executable, "-m", "seqkv_edge", "bench", "memory", "--worker", "--kv", str(kv), "--ctx", str(ctx)]
    command += ["--batch", str(args.batch)]
    for name in ("model", "ngl", "threads", "sink", "window", "profile"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name}", str(value)]
    for name in ("no_profile", "force"):
        if getattr(args, name):
            command.append("--" + name.replace("_", "-"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise SeqkvError(lines[-1].removeprefix("error: ") if lines else f"a measurement of {kv} at {ctx} failed")
    return MemoryRow(**json.loads(done.stdout.strip().splitlines()[-1]))


def plotter() -> Any:
    """matplotlib.pyplot, drawing to files. Raises UsageError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_memory(rows: list[MemoryRow], path: Path) -> None:
    """KV bytes over context, one line per type."""
    pyplot = plotter()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kv in dict.fromkeys(row.kv for row in rows):
        points = sorted((row.ctx, row.kv_bytes / 2**20) for row in rows if row.kv == kv)
        axes.plot(*zip(*points), marker="o", label=kv)
    axes.set(xlabel="context, tokens", ylabel="KV cache, MiB", xscale="log", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- command ---


def parse_list(text: str) -> list[KvSpec]:
    """The specs of a list such as "f16,seqkv3:q8_0", in order, without repetitions."""
    return list(dict.fromkeys(KvSpec.parse(item) for item in text.split(",")))


def parse_numbers(text: str, least: int = 1) -> list[int]:
    """The numbers of a list such as "2048,8192"."""
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers such as 2048,8192") from None
    if min(numbers) < least:
        raise UsageError(f"{text!r}: numbers must be at least {least}")
    return numbers


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read --text {path}: {error.strerror or error}") from None


class progress_bar:
    """A rich progress bar on standard error; gives a function to advance it."""

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda n: self._progress.advance(self._task, n)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


_FORMATS: dict[str, Callable[[Any], str]] = {
    "top1_agreement": lambda v: f"{100 * v:.1f} %",
    "ppl": lambda v: f"{v:.3f}",
    "ppl_base": lambda v: f"{v:.3f}",
    "bits_per_value": lambda v: f"{v:.3f}",
    "bits_per_value_at_ctx": lambda v: f"{v:.2f}",
    "bits_per_value_8192": lambda v: f"{v:.2f}",
    "bits_per_value_32768": lambda v: f"{v:.2f}",
    "kv_bytes_per_token": lambda v: f"{v:.0f}",
    "decode_tps": lambda v: f"{v:.1f}",
    "prefill_tps": lambda v: f"{v:.0f}",
    "decode_spread": lambda v: f"{100 * v:.0f} %",
    "prefill_spread": lambda v: f"{100 * v:.0f} %",
    "bytes_per_token": lambda v: f"{v:,.1f}" if v < 100 else f"{v:,.0f}",
    "ratio_to_f16": lambda v: f"{v:,.1f}",
    "save_tps": lambda v: f"{v:,.0f}",
    "restore_tps": lambda v: f"{v:,.0f}",
    "decode_share": lambda v: f"{100 * v:.1f} %",
    "same_logits": lambda v: "yes" if v else "no",
    "tokens_bits": lambda v: f"{v:.2f}",
    "dedup_overhead": lambda v: f"{v:.3f} x",
    "first_token_speedup": lambda v: f"{v:.1f} x",
    "decode_ratio": lambda v: f"{v:.2f}",
    "prefill_ratio": lambda v: f"{v:.2f}",
    "us_per_1000": lambda v: f"{v:.0f}",
    "read_gbs": lambda v: f"{v:.2f}",
    "read_share": lambda v: f"{100 * v:.1f} %",
    "gflops": lambda v: f"{v:.1f}",
    "gflops_share": lambda v: f"{100 * v:.1f} %",
    "store_share": lambda v: f"{100 * v:.1f} %",
}


def format_cell(name: str, value: Any) -> str:
    """One cell of a table."""
    if value is None:
        return "-"
    if name in _FORMATS:
        return _FORMATS[name](value)
    if name.endswith("_bytes") or name.startswith("kv_bytes"):
        return fit.format_size(value)
    return f"{value:.5f}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: Iterable[Any], names: dict[str, str] | None = None) -> None:
    """A table of dataclass rows on standard output; names: the fields to show and their headers (default: all)."""
    records = [asdict(row) for row in rows]
    names = names or {name: name.replace("_", " ") for name in records[0]}
    print_records(title, [{names[n]: format_cell(n, record[n]) for n in names} for record in records])


def print_records(title: str, records: list[dict[str, str]]) -> None:
    """A table of cells on standard output, one column per key; the first column is text, the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(records[0]):
        table.add_column(name, justify="right" if i else "left")
    for record in records:
        table.add_row(*record.values())
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def write_json(rows: Iterable[Any], path: str) -> None:
    """Rows as a JSON list; "-" is standard output."""
    text = json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SeqkvError(f"cannot write {path}: {error.strerror or error}") from None


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status."""
    if args.what == "memory" and args.worker:
        print(json.dumps(asdict(memory_worker(args))))
        return 0
    if getattr(args, "plot", None):
        plotter()  # that it is missing is known before the minutes of a measurement
    from . import bench_tiers
    from .bench_store import print_store, store
    from .speed import print_speed, speed

    measures: dict[str, Callable[[argparse.Namespace], list[Any]]]
    measures = {"memory": memory, "quality": quality, "speed": speed, "store": store}
    if args.what == "store" and args.tiers:
        measures["store"], print_store = bench_tiers.tiers, bench_tiers.print_tiers
    rows = measures[args.what](args)
    if args.json != "-":
        shows: dict[str, Callable[[str, list[Any]], None]]
        shows = {"memory": print_table, "quality": print_quality, "speed": print_speed, "store": print_store}
        show = shows[args.what]
        show(f"{args.what}: {model.resolve(args.model).name}", rows)
    if args.json:
        write_json(rows, args.json)
    if args.what == "memory" and args.plot:
        plot_memory(rows, Path(args.plot))
    if args.what == "store" and args.plot:
        bench_tiers.plot(rows, Path(args.plot))
    return 0
