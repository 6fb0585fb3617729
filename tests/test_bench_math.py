"""The numbers of `bench quality` and the text arithmetic of `chat`, without a model."""

from __future__ import annotations

import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqkv_edge.bench import compare, format_cell, log_softmax, parse_list, parse_numbers, summarize
from seqkv_edge.conversation import common_prefix, removal
from seqkv_edge.errors import UsageError


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
    row = summarize("f16", 16.0, 16.0, [compare(logits, logits, targets)])
    assert (row.kld_mean, row.kld_median, row.kld_p99, row.tvd_mean, row.top1_agreement) == (0, 0, 0, 0, 1)
    assert row.ppl == row.ppl_base and row.tokens == 200


def test_summary_joins_windows():
    rng = np.random.default_rng(2)
    base, other = (rng.normal(size=(150, 20)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 20, 150)
    whole = summarize("x", 3, 4, [compare(base, other, targets)])
    split = summarize(
        "x", 3, 4, [compare(base[:70], other[:70], targets[:70]), compare(base[70:], other[70:], targets[70:])]
    )
    assert whole == split
    lp = log_softmax(base)
    assert whole.ppl_base == pytest.approx(np.exp(-lp[np.arange(150), targets].mean()))


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
