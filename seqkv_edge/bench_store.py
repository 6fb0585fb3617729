"""`bench store`: bytes, speed and exactness of the tiers between a live cache and its tokens, measured on real contexts.

One session of --tokens tokens of a text is evaluated, saved frame by frame, read back into a fresh context and compared with what the
live one continues with; then --sessions sessions share its first half. Nothing is estimated but `ratio_to_f16`, whose f16 bytes
follow from the model's shape.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import bench, coders, delta, model, model_coder, state, tokens
from .chat import kv_options
from .dropin import KvOptions
from .engine import Context, Model, open_model
from .errors import UsageError
from .llama import KvSpec
from .session import Session, identify, read_end, read_frame, window_of
from .state import FRAME
from .store import CODERS, Store, pack_tokens

CONTINUED = 256
"""tokens that are compared behind a restored state"""


@dataclass(frozen=True)
class StoreRow:
    """One tier of one type. Fields that do not apply to a tier are None. tps: tokens a second."""

    kv: str
    tier: str
    """"live"; "slot file" (llama.cpp's, window included), "slot file, zstd -19" (without the zstandard module: xz); "stored raw", ...; "tokens raw",
    "tokens adaptive", "tokens model" """
    tokens: int
    bytes_per_token: float
    """of whole frames; the end of a session is `end_bytes`"""
    ratio_to_f16: float
    """f16 bytes / these bytes"""
    end_bytes: int | None = None
    """tail and exact rows, once a session"""
    save_tps: float | None = None
    """reading the rows out of the cache, coding and writing them"""
    decode_share: float | None = None
    """time of saving / time of decoding the same tokens one by one"""
    restore_tps: float | None = None
    """from files to a context that goes on (median)"""
    prefill_tps: float | None = None
    """evaluating the same tokens (median)"""
    same_logits: bool | None = None
    """whether the restored context went on with the live one's logits, bit for bit, for 256 tokens"""
    tokens_bits: float | None = None
    """bits a token"""
    dedup_ratio: float | None = None
    """bytes of the sessions that share a prefix, each by itself / bytes of their store"""
    dedup_overhead: float | None = None
    """bytes of their store / bytes of prefix + what each has of its own"""
    first_token_speedup: float | None = None
    """time to the first token of a new session with the shared prefix: evaluated / from the store (median)"""
    bits_per_value: float | None = None
    """of `bytes_per_token`, with --tiers"""
    kld_mean: float | None = None
    """nats, against an f16 cache: what follows half a window from this tier, with --tiers"""


def _step(context: Context, ids: Sequence[int]) -> np.ndarray:
    rows = []
    for token in ids:
        context.evaluate([token])
        rows.append(context.next_logits().copy())
    return np.stack(rows)


def _compressor() -> tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    """The general compressor that is at hand: its name, and both ways."""
    try:
        import zstandard
    except ImportError:
        return "xz", lambda data: lzma.compress(data, preset=6), lzma.decompress
    return "zstd -19", zstandard.ZstdCompressor(level=19).compress, zstandard.ZstdDecompressor().decompress


class Bench:
    """The tiers of one type, on contexts of its own."""

    def __init__(self, loaded: Model, kv: KvSpec, options: KvOptions, args: argparse.Namespace, ids: list[int], folder: Path) -> None:
        self.loaded, self.kv, self.options, self.args, self.ids, self.folder = loaded, kv, options, args, ids, folder
        self.n = args.tokens // FRAME * FRAME
        self.f16 = 2.0 * sum(layer.k_values + layer.v_values for layer in loaded.meta.layers)

    def context(self) -> Context:
        n_ctx = self.n + CONTINUED
        settings = {"n_ctx": n_ctx, "n_batch": self.args.batch, "threads": self.args.threads, "force": self.args.force}
        return self.loaded.context(self.kv, options=self.options if self.kv.ours else None, **settings)

    def rows(self) -> list[StoreRow]:
        kv, n, ids = str(self.kv), self.n, self.ids
        seconds = []
        for _ in range(self.args.runs - 1):
            with self.context() as context:
                started = time.perf_counter()
                context.evaluate(ids[:n])
                seconds.append(time.perf_counter() - started)
        with self.context() as context:
            started = time.perf_counter()
            context.evaluate(ids[:n])
            prefill = n / float(np.median([*seconds, time.perf_counter() - started]))
            layout = identify(context).layout
            live = StoreRow(kv, "live", n, layout.row_bytes, self.f16 / layout.row_bytes, prefill_tps=prefill)
            slots = self._slot_file(context)
            saved = [self._save(context, level, layout) for level in self._levels(context)]
            started = time.perf_counter()  # the steps move the window: nothing is read from this context behind them
            expected = _step(context, ids[n : n + CONTINUED])
            decode = (time.perf_counter() - started) / CONTINUED
            stored = [self._stored(context, layout, prefill, decode, expected, *one) for one in saved]
        return [live, *slots, *stored]

    def _levels(self, context: Context) -> list[str]:
        """Those that this cache can be stored at."""
        with Store(self.folder / "levels") as store:
            id_ = store.context(identify(context))
            kinds: tuple[delta.Level, ...] = delta.LEVELS
            coded = [store.level(id_, context.model.profile if self.kv.ours else None, kind) for kind in kinds]
        return ["raw", *(level for level in coded if level not in CODERS)]

    def _slot_file(self, context: Context) -> list[StoreRow]:
        """llama.cpp's own file of the sequence, and what a general compressor makes of it."""
        kv, n, file = str(self.kv), self.n, self.folder / "slot"
        started = time.perf_counter()
        size = context.save_state(file)
        saved = time.perf_counter()
        with self.context() as other:
            opened = time.perf_counter()
            other.load_state(file, n)
            loaded = time.perf_counter() - opened
        data = file.read_bytes()
        file.unlink()
        name, pack, unpack = _compressor()
        packing = time.perf_counter()
        packed = pack(data)
        packing = time.perf_counter() - packing
        unpacking = time.perf_counter()
        assert unpack(packed) == data
        unpacking = time.perf_counter() - unpacking
        return [
            StoreRow(kv, "slot file", n, size / n, self.f16 * n / size, save_tps=n / (saved - started), restore_tps=n / loaded),
            StoreRow(
                kv, f"slot file, {name}", n, len(packed) / n, self.f16 * n / len(packed), save_tps=n / (saved - started + packing),
                restore_tps=n / (loaded + unpacking),
            ),
        ]  # fmt: skip

    @staticmethod
    def _in(store: Store, context: Context, level: str) -> str:
        """The level in another store, which needs its own copy of the profile."""
        split = coders.split_level(level)
        return level if split is None else store.level(store.context(identify(context)), context.model.profile, split[0])

    def _folder(self, level: str) -> Path:
        return self.folder / f"{self.kv}-{level}".replace(":", "-")

    def _save(self, context: Context, level: str, layout: state.Layout) -> tuple[str, float]:
        """The session "x" in a store of its own. Returns its level, and seconds a token."""
        n, ids = self.n, self.ids
        n_sink, n_window = window_of(layout)
        with Store(self._folder(level)) as store:
            id_ = store.context(identify(context))
            level = self._in(store, context, level)
            parent, started = None, time.perf_counter()
            for i in range(n // FRAME):
                chunk = read_frame(context, i, n_sink)
                parent = store.put(id_, parent, ids[FRAME * i : FRAME * (i + 1)], chunk, level=level)
            store.save("x", id_, parent, [], read_end(context, n_sink, n_window), {})
            return level, (time.perf_counter() - started) / n

    def _stored(
        self, live: Context, layout: state.Layout, prefill: float, decode: float, expected: np.ndarray, level: str, save: float
    ) -> StoreRow:  # fmt: skip
        n, ids = self.n, self.ids
        seconds, same = [], None
        for _ in range(self.args.runs):
            with Store(self._folder(level)) as store, self.context() as other:
                info = store.session("x")
                started = time.perf_counter()
                chunks, damaged = store.restore(store.path_to(info.node))
                assert damaged is None
                tail = store.read_tail(info)
                pieces = [(chunk, FRAME) for chunk in chunks] + ([] if tail is None else [(tail, 0)])
                exact = None if tail is None else state.check_chunk(tail, layout, 0)
                other.set_state(state.build(layout, pieces, ids[:n], exact), ids[:n])
                seconds.append(time.perf_counter() - started)
                if same is None:
                    same = bool(np.array_equal(_step(other, ids[n : n + CONTINUED]), expected))
                size = sum(node.size for node in store.nodes())
        ratio, overhead, speedup = (None, None, None) if self.args.tiers or not self.args.sessions else self._shared(live, level)
        return StoreRow(
            str(self.kv), f"stored {level.partition('-')[0]}", n, size / n, self.f16 * n / size, info.tail_size, 1 / save, save / decode,
            n / float(np.median(seconds)), prefill, same, None, ratio, overhead, speedup,
        )  # fmt: skip

    def _shared(self, live: Context, level: str) -> tuple[float, float, float]:
        """Sessions that begin with the first half of the text and go on differently, each in a context of its own. The first token
        without the store is timed thrice, on contexts that save nothing, between the sessions."""
        prefix = self.ids[: self.n // 2 // FRAME * FRAME]
        rng = np.random.default_rng(0)
        alone = own = 0
        evaluated: list[float] = []
        stored: list[float] = []
        with Store(self.folder / f"{self._folder(level).name}-shared") as store:
            for i in range(self.args.sessions):
                todo = prefix + rng.choice(self.ids, 70).tolist()
                if i < 3:
                    with self.context() as context:
                        started = time.perf_counter()
                        context.evaluate(todo)
                        context.next_logits()
                        evaluated.append(time.perf_counter() - started)
                with self.context() as context, Session(store, f"s{i}", context, level=self._in(store, live, level)) as session:
                    session.save(end=False)
                    started = time.perf_counter()
                    context.evaluate(todo[session.find_prefix(todo, 0) :])
                    context.next_logits()
                    if i > 1:  # the second one's last shared frame is a variant that the others find
                        stored.append(time.perf_counter() - started)
                    session.save(end=True)
                    session.flush()
                    info = store.session(f"s{i}")
                    nodes = store.path_to(info.node)
                    alone += sum(node.size for node in nodes) + info.tail_size
                    own += sum(node.size for node in nodes[len(prefix) // FRAME :]) + info.tail_size
            total = sum(node.size for node in store.nodes()) + sum(i.tail_size for i in store.sessions())
            shared = sum(node.size for node in store.path_to(store.session("s0").node)[: len(prefix) // FRAME])
        return alone / total, total / (shared + own), float(np.median(evaluated) / np.median(stored))


def token_rows(loaded: Model, ids: list[int], n_model: int, threads: int | None) -> list[StoreRow]:
    """Token tiers: adaptive over all ids, and with the model's probabilities over the first n_model (0: not)."""
    f16 = 2.0 * sum(layer.k_values + layer.v_values for layer in loaded.meta.layers)
    found = []
    started = time.perf_counter()
    coded = tokens.encode(ids)
    saved = time.perf_counter()
    assert tokens.decode(coded) == ids
    ended = time.perf_counter()
    size, n = len(coded), len(ids)
    raw = len(pack_tokens(ids)) / n
    found.append(StoreRow("-", "tokens raw", n, raw, f16 / raw, tokens_bits=8 * raw))
    found.append(
        StoreRow("-", "tokens adaptive", n, size / n, f16 * n / size, save_tps=n / (saved - started), restore_tps=n / (ended - saved), tokens_bits=8 * size / n)
    )
    if n_model:
        part = ids[:n_model]
        with bench.progress_bar("tokens, with the model's probabilities", 2 * len(part)) as advance:
            started = time.perf_counter()
            size, n = len(model_coder.encode(loaded, part, advance, threads=threads)), len(part)
            rate = 2 * n / (time.perf_counter() - started)
        found.append(StoreRow("-", "tokens model", n, size / n, f16 * n / size, save_tps=rate / 2, restore_tps=rate, tokens_bits=8 * size / n))
    return found


def options_of(args: argparse.Namespace) -> KvOptions:
    return replace(kv_options(args), predictors=True)


def text_of(args: argparse.Namespace) -> str:
    from .calibrate import documentation

    return bench.read_text(args.text) if args.text else documentation()


def store(args: argparse.Namespace) -> list[StoreRow]:
    """The rows of `bench store`."""
    if args.tokens < 4 * FRAME or args.sessions in (1, 2) or args.sessions < 0 or args.runs < 1:
        raise UsageError(f"--tokens must be at least {4 * FRAME}, --sessions 0 or at least 3, --runs at least 1")
    if args.plot and not args.tiers:
        raise UsageError("--plot draws the table of --tiers: add that")
    options, kvs, text = options_of(args), bench.parse_list(args.kv), text_of(args)
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded, tempfile.TemporaryDirectory() as folder:
        ids = loaded.tokenize(text, add_special=True, parse_special=False)
        need = args.tokens + CONTINUED
        if len(ids) < need:
            raise UsageError(f"the text has {len(ids)} tokens, {need} are needed: give a longer --text, or less --tokens")
        rows: list[StoreRow] = []
        for kv in kvs:
            rows += Bench(loaded, kv, options, args, ids[:need], Path(folder)).rows()
        rows += token_rows(loaded, ids[: args.tokens], args.model_tokens, args.threads)
        return rows


NAMES = {
    "kv": "KV cache", "tier": "tier", "bytes_per_token": "bytes/token", "ratio_to_f16": "f16 /", "save_tps": "save/s", "decode_share": "of decode",
    "restore_tps": "restore/s", "prefill_tps": "prefill/s", "same_logits": "exact", "tokens_bits": "bits/token", "dedup_overhead": "shared",
    "first_token_speedup": "first token", "bits_per_value": "bits/value", "kld_mean": "KLD",
}  # fmt: skip


def print_store(title: str, rows: list[StoreRow]) -> None:
    """The columns that some row has."""
    bench.print_table(title, rows, {name: text for name, text in NAMES.items() if any(getattr(row, name) is not None for row in rows)})
