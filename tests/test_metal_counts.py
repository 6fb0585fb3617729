"""What decode costs per key at head_dim 128 and 4 queries a KV head, counted by the emulator: ours beside upstream's f16, q8_0 and q4_0.

python tests/test_metal_counts.py     # the table of docs/decisions.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_metal_emulator import Attention
from test_metal_kernels import CACHE, FC_SEQKV, Cases, emulator, patched_tree, sources

KEYS = 4096
NAMES = ("load_bytes", "loads", "float_operations", "integer_operations", "matrix")
BITS = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}
Counts = dict[str, float]


def upstream(tree: Path, type_: str) -> Counts:
    attention = Attention(type_, 128, 4, 1, KEYS, 1)
    attention.mask[:] = 0
    _, counters = attention.metal(tree, vec=True, baked=True)
    return {name: counters[name] / KEYS for name in NAMES}


def ours(cases: Cases, text: str, bits: int, profile: bool) -> Counts:
    """All three kernels, on 4,096 cells that are all attended to, and the exact rows besides."""
    type_k = f"seqkv{bits}{'k' if profile else ''}"
    i = next(i for i, name in enumerate(cases.names) if f"type_k={type_k},type_v=seqkv{bits},dk=128" in name and f"n_kv={KEYS}" in name)
    handle = cases.lib.metal_open(i)
    steps = json.loads(cases.lib.metal_text(handle))["steps"]
    cases.lib.metal_close(handle)
    library = emulator.load(text, CACHE, baked={FC_SEQKV + k: value for k, value in enumerate(steps[0]["constants"])})
    error, allowed, _, counters = cases.run(i, {step["kernel"]: library for step in steps}, 0)
    assert error <= allowed
    return {name: sum(counters[step["kernel"]][name] for step in steps) / KEYS for name in NAMES}


def table() -> dict[str, Counts]:
    """Arithmetic: floats, integers, and 2 for each of a matrix operation's 512 multiply-adds."""
    tree = patched_tree()
    cases, text = Cases(tree), sources(tree)["seqkv_attn.metal"]
    rows = {name: upstream(tree, name) for name in BITS}
    for profile in (True, False):
        rows |= {f"seqkv{bits}{'' if profile else ', no profile'}": ours(cases, text, bits, profile) for bits in (4, 3, 2)}
    for row in rows.values():
        row["arithmetic"] = row["float_operations"] + row["integer_operations"] + 1024 * row["matrix"]
    return rows


@pytest.fixture(scope="module")
def rows() -> dict[str, Counts]:
    return table()


def test_upstream_is_counted(rows: dict[str, Counts]) -> None:
    """Four heads, each of which reads K and V and makes 256 multiply-adds."""
    for name, bits in BITS.items():
        assert rows[name]["load_bytes"] > 4 * 2 * 128 * bits / 8
        assert rows[name]["float_operations"] > 4 * 512
    assert rows["f16"]["float_operations"] < 1.1 * 4 * 512


@pytest.mark.parametrize(("bits", "bits_per_value"), [(4, 4.1875), (3, 3.1875), (2, 2.1875)])
def test_decode_costs_less_than_upstream(rows: dict[str, Counts], bits: int, bits_per_value: float) -> None:
    with_profile, without = rows[f"seqkv{bits}"], rows[f"seqkv{bits}, no profile"]
    for row in (with_profile, without):
        assert row["float_operations"] + row["integer_operations"] < rows["q8_0"]["arithmetic"]
        assert row["arithmetic"] < rows["q4_0"]["arithmetic"]
        for name, upstream_bits in BITS.items():
            assert row["load_bytes"] / rows[name]["load_bytes"] < bits_per_value / upstream_bits
    assert without["arithmetic"] < rows["q8_0"]["arithmetic"]  # with one, D for each frame's queries is more: 2 matrices


def test_bytes_follow_the_bits(rows: dict[str, Counts]) -> None:
    """A bit more is 32 bytes of blocks a key, and nothing else."""
    for suffix in ("", ", no profile"):
        sizes = [rows[f"seqkv{bits}{suffix}"]["load_bytes"] for bits in (2, 3, 4)]
        assert all(abs(b - a - 32) < 1 for a, b in zip(sizes, sizes[1:]))


if __name__ == "__main__":
    names = [*NAMES, "arithmetic"]
    print("| KV cache | " + " | ".join(re.sub("_", " ", name) for name in names) + " |\n|" + "---|" * (len(names) + 1))
    for label, row in table().items():
        print(f"| {label} | " + " | ".join(f"{row[name]:,.0f}" for name in names) + " |")
