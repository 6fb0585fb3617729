"""The numbers of `bench quality` and its companions, on a tiny model where one is needed; the text arithmetic of `chat`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqkv_edge import bench, bench_tiers, cli, fit, llama, speed
from seqkv_edge.bench import (
    QUALITY_KV,
    QUALITY_PEERS,
    Bits,
    Compared,
    compare,
    format_cell,
    log_softmax,
    parse_list,
    parse_numbers,
    parse_quality_list,
    print_quality,
    summarize,
)
from seqkv_edge.conversation import common_prefix, removal
from seqkv_edge.dropin import KvOptions
from seqkv_edge.engine import Model, copy_bandwidth, devices, open_model
from seqkv_edge.errors import LibraryError, MemoryLimitError, SeqkvError, UsageError

ROOT = Path(__file__).resolve().parents[1]
BITS = Bits(3.0, 4.0, 3.5, 3.1)


def tool(name: str) -> ModuleType:
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


checks, report = tool("quality_checks"), tool("report")
sys.path.insert(0, str(ROOT / "models"))
import tiny  # noqa: E402

PLAIN = KvOptions(profile=None)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A tiny llama model."""
    if not llama.library().patched:
        pytest.skip("needs the patched libraries")
    path = tiny.write(tmp_path_factory.mktemp("bench") / "llama.gguf", tiny.SPECS["llama"], "llama")
    with open_model(path, ngl=0) as model:
        yield model


def compared(kld: np.ndarray) -> Compared:
    """Positions with these KLDs."""
    zero = np.zeros(len(kld))
    return Compared(zero, zero, kld, zero, zero)


def test_log_softmax_of_large_logits():
    rows = np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32)
    got = log_softmax(rows)
    assert got.dtype == np.float64
    np.testing.assert_allclose(np.exp(got).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(got[0, :2], [-np.log1p(np.exp(-1)), -1 - np.log1p(np.exp(-1))], rtol=1e-12)


def test_compare_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    got = compare(np.log(p)[None].astype(np.float32), np.log(q)[None].astype(np.float32) + 7, np.array([0]))
    assert got.kld[0] == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert got.tvd[0] == pytest.approx(0.25, abs=1e-6)
    assert got.nll[0] == pytest.approx(np.log(4), abs=1e-6)
    assert got.nll_base[0] == pytest.approx(np.log(2), abs=1e-6)
    assert not got.same_top[0]


def test_the_same_logits_differ_by_nothing():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(200, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 200)
    row = summarize("f16", BITS, [compare(logits, logits, targets)], 402)
    assert (row.kld_mean, row.kld_median, row.kld_p99, row.tvd_mean, row.top1_agreement) == (0, 0, 0, 0, 1)
    assert row.ppl == row.ppl_base and row.tokens == 200


def test_summary_of_windows():
    rng = np.random.default_rng(2)
    base, other = (rng.normal(size=(3, 15, 20)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 20, (3, 15))
    windows = [compare(base[i], other[i], targets[i]) for i in range(3)]
    row = summarize("x", BITS, windows, 32)
    lp, lq = log_softmax(base), log_softmax(other)
    kld = (np.exp(lp) * (lp - lq)).sum(axis=-1)
    assert row.kld_mean == pytest.approx(kld.mean()) and row.kld_median == pytest.approx(np.median(kld))
    assert row.kld_sem == pytest.approx(kld.mean(axis=1).std(ddof=1) / np.sqrt(3))
    assert row.ppl_base == pytest.approx(np.exp(-np.take_along_axis(lp, targets[..., None], -1).mean()))
    assert row.tokens == 45 and row.kld_quarters is None
    assert (row.bits_per_value, row.bits_per_value_at_ctx, row.bits_per_value_8192, row.bits_per_value_32768) == (3, 4, 3.5, 3.1)
    assert summarize("x", BITS, windows[:1], 32).kld_sem is None


def test_quarters_leave_the_score_to_the_second_half():
    kld = np.concatenate([np.full(8, 1.0), np.full(8, 2.0), np.full(8, 3.0), np.full(7, 5.0)])  # 31 positions of 32 tokens
    whole = summarize("x", BITS, [compared(kld), compared(2 * kld)], 32)
    half = summarize("x", BITS, [compared(kld[16:]), compared(2 * kld[16:])], 32)
    assert whole.kld_quarters == [1.5, 3.0, 4.5, 7.5]
    assert half.kld_quarters is None
    for name in ("kld_mean", "kld_sem", "kld_median", "kld_p99", "tokens", "ppl"):
        assert getattr(whole, name) == getattr(half, name)


def test_quality_lists():
    assert [str(kv) for kv in parse_quality_list(None, KvOptions())] == f"{QUALITY_KV},{QUALITY_PEERS}".split(",")
    assert [str(kv) for kv in parse_quality_list(None, KvOptions(n_window=0))] == QUALITY_KV.split(",")
    got = parse_quality_list("q4_0, q4_0+w,q8_0:q4_0+w,q4_0", KvOptions())
    assert [(str(kv), kv.windowed) for kv in got] == [("q4_0", False), ("q4_0+w", True), ("q8_0:q4_0+w", True)]
    for bad in ("seqkv3+w", "seqkv3:q8_0+w", "f16+w", "q4_0+x", "q4_0+", "q4_0+w+w", "+w", ""):
        with pytest.raises(UsageError):
            parse_quality_list(bad, KvOptions())
    with pytest.raises(UsageError, match="--window"):
        parse_quality_list("q4_0+w", KvOptions(0, 0))


def test_quality_table_fits_100_columns(capsys):
    kld = np.full(31, 12.5)
    rows = [summarize(kv, Bits(16.0, 16.0, 16.0, None), [compared(kld)] * 2, 32) for kv in ("seqkv4:seqkv3", "q8_0:q5_0+w")]
    print_quality("quality: SmolLM2-135M-Instruct.Q4_1.gguf", rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("seqkv4:seqkv3" in line for line in lines) == 2  # the quarters too
    assert any("12.50000" in line and "16.000" in line for line in lines)


@pytest.mark.parametrize("options", [PLAIN, KvOptions(0, 0, None), KvOptions(8, 128, None)])
def test_bits_at_other_lengths_are_the_librarys(loaded, options, capsys):
    for kv in map(bench.QualityKv.parse, ("f16", "q4_0", "q8_0:q4_0", "seqkv2", "seqkv4:f16")):
        with bench.open_cache(loaded, kv, n_ctx=512, options=options, threads=1) as context:
            got = bench.measure_bits(context, kv, options)
        real = []
        for n_ctx in (512, 8192, 32768):
            with bench.open_cache(loaded, kv, n_ctx=n_ctx, options=options, threads=1) as context:
                real.append(8 * context.kv_bytes() / fit.kv_values(loaded.meta, n_ctx))
        assert [got.at_ctx, got.at_8192, got.at_32768] == pytest.approx(real, rel=1e-3), str(kv)
    assert capsys.readouterr().err == ""


def test_sizes_that_are_not_understood_give_no_bits(loaded, capsys):
    kv = bench.QualityKv.parse("seqkv3")
    with bench.open_cache(loaded, kv, n_ctx=512, options=PLAIN, threads=1) as context:
        size = context.kv_bytes()
        context.kv_bytes = lambda: 2 * size
        got = bench.measure_bits(context, kv, PLAIN)
    assert (got.at_8192, got.at_32768) == (None, None)
    assert got.at_ctx == pytest.approx(16 * size / fit.kv_values(loaded.meta, 512))
    assert capsys.readouterr().err.startswith("warning: the library reports")


def test_the_base_is_run_once_per_window(loaded, monkeypatch):
    evaluated = []
    original = bench.Context.logits

    def logits(self, tokens, first, progress=None):
        evaluated.append((str(self.kv), first))
        return original(self, tokens, first, progress)

    monkeypatch.setattr(bench.Context, "logits", logits)
    kvs = parse_quality_list("f16,q4_0,seqkv2", PLAIN)
    text = "the quick brown fox jumps over the lazy dog. " * 40
    whole, half = (
        bench.score(loaded, text, kvs, ctx=512, chunks=2, options=PLAIN, quarters=quarters, n_batch=100, threads=1) for quarters in (True, False)
    )
    assert evaluated == [(kv, first) for first in (0, 256) for _ in range(2) for kv in ("f16", "q4_0", "seqkv2")]
    for a, b in zip(whole, half):
        assert a.kld_mean == pytest.approx(b.kld_mean, rel=1e-3) and a.ppl == pytest.approx(b.ppl, rel=1e-4)
        assert a.tokens == b.tokens == 2 * 255 and b.kld_quarters is None
        assert (a.kld_quarters[2] + a.kld_quarters[3]) / 2 == pytest.approx(a.kld_mean, rel=0.02, abs=1e-12)
    f16, *others = whole
    assert (f16.kld_mean, f16.tvd_mean, f16.top1_agreement, f16.kld_quarters) == (0, 0, 1, [0] * 4)
    assert f16.ppl == f16.ppl_base and all(row.kld_mean > 1e-4 for row in others)


def test_libraries_without_the_window_are_refused(loaded, monkeypatch):
    """What q4_0+w gets from libraries that do not know any_type; plain q4_0 is llama.cpp's own before and after."""
    q4, windowed = map(bench.QualityKv.parse, ("q4_0", "q4_0+w"))
    configure, asked = llama.configure, []

    def old(*args, any_type=False):
        asked.append(any_type)
        configure(*args)

    monkeypatch.setattr(llama, "configure", old)
    with pytest.raises(LibraryError, match="no exact window"), bench.open_cache(loaded, windowed, n_ctx=256, options=PLAIN):
        pass
    assert asked == [True, False]  # asked for, and taken back
    with bench.open_cache(loaded, q4, n_ctx=256, options=PLAIN) as context:
        assert context.kv_bytes() == bench.cache_size(loaded, q4, 256, PLAIN, 256)


def test_agreement_of_answers():
    assert checks.agreement([1, 2, 3], [1, 2, 4], 256) == 2
    assert checks.agreement([1, 2], [1, 2], 256) == 256  # both ended
    assert checks.agreement([1, 2], [1, 3, 4], 256) == 1
    assert checks.agreement([5], [6], 256) == 0


def test_numbers_in_answers():
    for answer in ("41873.", "It is 41873", "41,873", "4 1 8 7 3"):
        assert checks.found(answer, "41873")
    for answer in ("", "4187", "418730", "It was 41783.", "the number 14187"):
        assert not checks.found(answer, "41873")


@given(st.integers(1, 6), st.integers(20, 60))
def test_facts_go_between_sentences(n, n_sentences):
    text = "".join(f"Sentence {i} is here. " for i in range(n_sentences))
    got = checks.cuts(text, n)
    assert len(got) == n and got == sorted(set(got))
    for i, cut in enumerate(got):
        assert text[cut - 1 : cut + 1] == ". "
        assert abs(cut / len(text) - (i + 0.5) / n) < 2 / n_sentences
    with pytest.raises(UsageError):
        checks.cuts("no end " * 50, n)


def test_results_are_merged(tmp_path: Path):
    path = tmp_path / "checks.json"
    checks.merge(path, "drift", {"rows": [1]})
    checks.merge(path, "greedy", {"rows": [2]})
    checks.merge(path, "drift", {"rows": [3]})
    assert json.loads(path.read_text()) == {"drift": {"rows": [3]}, "greedy": {"rows": [2]}}
    for bad in ("[]", "{"):
        path.write_text(bad)
        with pytest.raises(SeqkvError, match="--json"):
            checks.merge(path, "drift", {})
        assert path.read_text() == bad


def test_tables_of_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = {
        "drift": {"kv": "seqkv3", "kld_quarters": [0.1, 0.2, 0.3, 0.25], "last_to_second": 1.25},
        "texts": {"kv": "seqkv3", "text": "a.txt", "kld_mean": 0.5, "to_first": None},
        "outliers": {"kv": "seqkv3", "kld_mean": 0.5, "kld_mean_outliers": 1.0, "to_original": 2.0},
        "greedy": {"kv": "seqkv3", "median": 24.5, "mean": 20.25, "to_the_end": 1},
        "retrieval": {"kv": "seqkv3", "successes": 3, "of": 4, "by_depth": [1, 2], "lost": 1, "gained": 0},
    }
    (tmp_path / "docs").mkdir()
    results = {name: {"rows": [row], "depths": [0.25, 0.75]} for name, row in rows.items()}
    (tmp_path / "docs/quality-checks.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    ends = {
        "drift": "| seqkv3 | 0.10000 | 0.20000 | 0.30000 | 0.25000 | 1.25 |",
        "texts": "| seqkv3 | 0.50000 (-) |",
        "outliers": "| seqkv3 | 0.50000 | 1.00000 | 2.00 |",
        "greedy": "| seqkv3 | 24.5 | 20.2 | 1 |",
        "retrieval": "| seqkv3 | 3 of 4 | 1 | 2 | 1 | 0 |",
    }
    for name, end in ends.items():
        assert report.render(f"x\n<!-- table {name} -->\nold\n<!-- end -->\n").endswith(f"{end}\n<!-- end -->\n")


def test_lists():
    assert [str(kv) for kv in parse_list("f16, seqkv3:q8_0,f16")] == ["f16", "seqkv3:q8_0"]
    assert parse_numbers("2048,8192") == [2048, 8192]
    for bad in ("", "2048,", "x", "0", "-1"):
        with pytest.raises(UsageError):
            parse_numbers(bad)


def test_cells():
    assert format_cell("kv_bytes", 3 << 20) == "3.00 MiB"
    assert format_cell("top1_agreement", 0.8951) == "89.5 %"
    assert format_cell("kv_bytes_reported", None) == "-"
    assert format_cell("kld_mean", 0.0123456) == "0.01235"


def test_slope_of_decode_times():
    first = speed.SpeedRow("f16", 0, 100.0, 0.0, 500.0, 0.0, 512, 3)
    row = speed.SpeedRow("f16", 2000, 50.0, 0.0, 400.0, 0.0, 512, 3)
    found = speed.with_slope(row, first, (1000.0, 4000.0), speed.Machine(copy_gbs=10.0, gflops=8.0))
    assert found.us_per_1000 == pytest.approx(5000)  # 10 ms more behind 2,000 tokens
    assert found.read_gbs == pytest.approx(0.2) and found.read_share == pytest.approx(0.02)
    assert found.gflops == pytest.approx(0.8) and found.gflops_share == pytest.approx(0.1)
    on_gpu = speed.with_slope(row, first, (1000.0, 4000.0), speed.Machine(copy_gbs=4.0, gflops=None))
    assert on_gpu.read_share == pytest.approx(0.05) and on_gpu.gflops == pytest.approx(0.8) and on_gpu.gflops_share is None
    nothing = speed.Machine(None, None)
    assert speed.with_slope(row, first, (1000.0, 4000.0), nothing).read_share is None
    faster = speed.with_slope(speed.SpeedRow("f16", 2000, 200.0, 0.0, 400.0, 0.0, 512, 3), first, (1.0, 1.0), nothing)
    assert faster.us_per_1000 < 0 and faster.read_gbs is None  # noise makes no bandwidth
    assert speed.with_slope(first, first, (1.0, 1.0), nothing) == first


def test_bandwidth_of_copies_within_a_device(loaded):
    """On the processor, in bytes a second; a device without room has none."""
    cpu = next(i for i, device in enumerate(devices()) if not device.gpu)
    assert 1e8 < copy_bandwidth(cpu, 1 << 26) < 1e13
    assert copy_bandwidth(cpu, 1 << 50, tries=1) is None


def test_types_are_measured_in_turns(loaded, tmp_path, monkeypatch):
    """Every run has all types one after the other, another one first; a ratio is that of one run."""
    seen = []
    timed = speed._timed

    def watched(context, depth, batches):
        if len(batches) > 1:
            seen.append((str(context.kv), depth, context.n_past))
        timed(context, depth, batches)
        return {"f16": 10.0, "q8_0": 5.0, "seqkv3": 20.0}[str(context.kv)] * (1 + len(seen) // 3)  # drifts by a factor between runs

    monkeypatch.setattr(speed, "_timed", watched)
    out = tmp_path / "speed.json"
    options = ["--model", str(loaded.path), "--no-profile", "--threads", "1", "--prefill", "8", "--runs", "3"]
    assert cli.main(["bench", "speed", *options, "--kv", "f16,q8_0,seqkv3", "--depth", "0,70", "--json", str(out)]) == 0
    turn = ["f16", "q8_0", "seqkv3"]
    assert seen == [(turn[(run + i) % 3], depth, depth) for depth in (0, 70) for run in range(3) for i in range(3)]
    rows = json.loads(out.read_text())
    assert [(r["kv"], r["depth"]) for r in rows] == [(kv, depth) for depth in (0, 70) for kv in turn]
    assert [r["prefill_ratio"] for r in rows] == [None, pytest.approx(0.5), pytest.approx(2.0)] * 2
    assert rows[0]["prefill_spread"] > 0.5  # and all of it is drift
    assert rows[2]["store_share"] > 0 and [r["store_share"] for r in rows[:2] + rows[3:]] == [None] * 5


def test_speed_says_that_the_caches_are_in_memory_together(loaded, monkeypatch, capsys):
    open_context = Model.context

    def small(self, kv, **settings):
        if str(kv) == "q8_0":
            raise MemoryLimitError("no room")
        return open_context(self, kv, **settings)

    monkeypatch.setattr(Model, "context", small)
    options = ["--model", str(loaded.path), "--no-profile", "--depth", "0", "--prefill", "8"]
    assert cli.main(["bench", "speed", *options, "--kv", "f16,q8_0"]) == 1
    assert "no room; it would be beside the caches of 1 other types: compare fewer (--kv)" in capsys.readouterr().err
    assert cli.main(["bench", "speed", *options, "--kv", "q8_0"]) == 1
    assert capsys.readouterr().err.strip().endswith("no room")


def test_cost_of_a_cached_token(loaded):
    size, operations = speed.per_cached_token(loaded, llama.KvSpec.parse("f16"))
    meta = loaded.meta
    values = sum(layer.k_values + layer.v_values for layer in meta.layers)
    assert size == 2 * values
    assert operations == 2 * values * meta.n_head / meta.heads_kv[0]
    assert speed.per_cached_token(loaded, llama.KvSpec.parse("q8_0"))[0] == pytest.approx(values * 8.5 / 8)


def test_store_share_is_measured(loaded):
    tokens = list(range(5, 69))
    settings = {"n_batch": 64, "threads": 1, "force": True, "options": KvOptions(4, 64, None)}
    assert 0 < speed.store_share(loaded, llama.KvSpec.parse("seqkv3"), tokens, settings) < 1
    assert speed.store_share(loaded, llama.KvSpec.parse("f16"), tokens, settings) == 0


def test_removal_of_a_turn():
    tokens = [b"<s>", b"sys", b"</s>", b"<u>", b"one", b"</u>", b"<a>", b"two", b"</a>", b"<u>", b"three", b"</u>"]
    old, new = b"".join(tokens), b"".join(tokens[:3] + tokens[9:])
    found = removal(old, new, list(accumulate(map(len, tokens), initial=0)))
    assert found is not None
    assert b"".join(tokens[: found[0]] + tokens[found[1] :]) == new


def test_removal_that_no_token_boundary_allows():
    assert removal(b"abcdef", b"abef", [0, 3, 6]) is None
    assert removal(b"abcdef", b"abcdef", [0, 3, 6]) is None
    assert removal(b"abcdef", b"xyz", [0, 3, 6]) is None
    assert removal(b"abcdef", b"abef", [0, 2, 4]) is None  # boundaries of another text


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=2, max_size=12), st.data())
def test_removal_finds_every_aligned_cut(tokens, data):
    first = data.draw(st.integers(0, len(tokens) - 1))
    end = data.draw(st.integers(first + 1, len(tokens)))
    old, new = b"".join(tokens), b"".join(tokens[:first] + tokens[end:])
    found = removal(old, new, list(accumulate(map(len, tokens), initial=0)))
    assert found is not None
    assert b"".join(tokens[: found[0]] + tokens[found[1] :]) == new


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix(b"abc", b"abc") == 3


def test_published_tables_are_what_the_json_gives() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, root / "tools" / "report.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tiers_of_a_tiny_model(loaded: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each tier beside the others: bits a value of all, distances from f16, and the paper's ratios from the measured bits a token."""
    out, picture = tmp_path / "tiers.json", tmp_path / "tiers.png"
    settings = ["--model", str(loaded.path), "--no-profile", "--threads", "1", "--tokens", "512", "--model-tokens", "64"]
    try:
        import matplotlib  # noqa: F401

        settings += ["--plot", str(picture)]
    except ImportError:
        pass
    assert cli.main(["bench", "store", "--tiers", "--kv", "f16,seqkv2", *settings, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "bits of a cached token" in shown and picture.exists() == ("--plot" in settings)
    rows = json.loads(out.read_text())
    tiers = {(r["kv"], r["tier"]): r for r in rows if "shape" not in r}
    assert {tier for kv, tier in tiers if kv == "seqkv2"} >= {"live", "slot file", "stored raw"}
    values = sum(layer.k_values + layer.v_values for layer in loaded.meta.layers)
    for r in tiers.values():
        assert r["bits_per_value"] == pytest.approx(8 * r["bytes_per_token"] / values)
        assert r["ratio_to_f16"] == pytest.approx(16 / r["bits_per_value"])
    assert tiers["f16", "live"]["kld_mean"] == 0 < tiers["seqkv2", "live"]["kld_mean"] == tiers["seqkv2", "stored raw"]["kld_mean"]
    live, coded = tiers["seqkv2", "live"], tiers["-", "tokens adaptive"]
    assert coded["restore_tps"] < live["prefill_tps"]  # its tokens are evaluated
    ratios = [r for r in rows if "shape" in r]
    assert {r["shape"] for r in ratios} >= {"this model", "8B", "70B"} and {r["tier"] for r in ratios} == {"tokens adaptive", "tokens model"}
    for r in ratios:
        assert r["tokens_bits"] == tiers["-", r["tier"]]["tokens_bits"]
        assert r["ratio_to_3_bits"] == pytest.approx(3 * r["values"] / r["tokens_bits"])
        assert r["ratio_to_f16"] == pytest.approx(16 * r["values"] / r["tokens_bits"])
    assert next(r["values"] for r in ratios if r["shape"] == "this model") == values
    # what the paper's headline is made of: 80 layers, 64 KV heads of 128, 3 bits a value against 4.3 bits a token
    assert round(3 * bench_tiers.SHAPES["70B without shared KV heads"] / 4.3, -3) == 914_000
