#!/usr/bin/env python3
"""Write the tables of README.md and docs/measurements.md from the JSON files that the benchmarks wrote to docs/.

    python tools/report.py            # rewrite the tables
    python tools/report.py --check    # exit 1 if a table is not what its JSON gives

A table stands between the lines  <!-- table NAME -->  and  <!-- end -->; NAME is one of TABLES below.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/measurements.md")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def quality(file: str = "quality.json") -> str:
    body = []
    for r in json.loads((ROOT / "docs" / file).read_text()):
        sem = "" if r["kld_sem"] is None else f" ± {r['kld_sem']:.4f}"
        body.append([
            r["kv"], f"{r['bits_per_value']:.3f}", bits(r["bits_per_value_at_ctx"]), bits(r["bits_per_value_8192"]), bits(r["bits_per_value_32768"]),
            f"{r['ppl']:.3f}", f"{r['kld_mean']:.4f}{sem}", f"{r['kld_median']:.4f}", f"{r['kld_p99']:.3f}", f"{r['tvd_mean']:.4f}",
            f"{100 * r['top1_agreement']:.1f} %",
        ])
    header = ["KV cache", "bits/value", "with window, measured", "at 8,192", "at 32,768", "PPL", "KLD mean", "median", "99 %", "TVD", "same top token"]
    return table(header, body)


def speed(file: str = "speed.json") -> str:
    """A table of `bench speed` rows, or of a GPU's, which hold them under "speed"; in brackets the ratio to the first type, if measured."""
    rows = json.loads((ROOT / "docs" / file).read_text())
    if isinstance(rows, dict):
        rows = rows["speed"]["rows"]
    depths = sorted({r["depth"] for r in rows})
    kinds = list(dict.fromkeys(r["kv"] for r in rows))
    cell = {(r["kv"], r["depth"]): r for r in rows}

    def shown(row: dict[str, Any], name: str, digits: int) -> str:
        ratio = row.get(f"{name}_ratio")
        return f"{row[f'{name}_tps']:.{digits}f}" + (f" ({ratio:.2f})" if ratio else "")

    body = [
        [kv] + [shown(cell[kv, d], name, digits) for name, digits in (("decode", 1), ("prefill", 0)) for d in depths]
        + [f"{cell[kv, depths[-1]]['us_per_1000']:,.0f}"]
        for kv in kinds
    ]  # fmt: skip
    n = rows[0]["n_prefill"]
    return table(["KV cache"] + [f"{m} at {d:,}" for m in ("decode", f"prefill {n}") for d in depths] + ["us per 1,000 cached"], body)


def cuda_shapes() -> str:
    body = []
    for shape, rows in json.loads((ROOT / "docs/cuda-shapes.json").read_text()).items():
        body += [[shape, r["kv"], f"{r['depth']:,}", f"{r['decode_tps']:.0f}", "" if r["decode_ratio"] is None else f"{r['decode_ratio']:.2f}"] for r in rows]
    return table(["shape", "KV cache", "depth", "decode", "to f16"], body)


def fits() -> str:
    rows = json.loads((ROOT / "docs/fits.json").read_text())
    kinds = list(dict.fromkeys(r["kv"] for r in rows))
    cell = {(r["model"], r["memory"], r["kv"]): r for r in rows}
    body = []
    for model, memory in dict.fromkeys((r["model"], r["memory"]) for r in rows):
        row = [cell[model, memory, kv] for kv in kinds]
        used = [r["measured"] / memory for r in row if r["measured"]]
        shown = f"{100 * min(used):.0f} to {100 * max(used):.0f} %" + (", full" if row[0]["filled"] else "") if used else ""
        body.append([model, f"{memory >> 30} GiB"] + [f"{r['ctx']:,}" if r["ctx"] else "-" for r in row] + [shown])
    return table(["model", "memory", *kinds, "in use, measured"], body)


def cuda_quality() -> str:
    result = json.loads((ROOT / "docs/cuda.json").read_text())["quality"]
    body = [[a["kv"], f"{a['kld_mean']:.5f} ± {a['kld_sem']:.5f}", f"{b['kld_mean']:.5f} ± {b['kld_sem']:.5f}"] for a, b in zip(result["gpu"], result["cpu"])]
    return table(["KV cache", "KLD mean, GPU", "CPU"], body)


def store(name: str) -> str:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    body = [
        [
            r["kv"] if r["kv"] != "-" else "", r["tier"], f"{r['bytes_per_token']:,.{0 if r['bytes_per_token'] > 100 else 2}f}", f"{r['ratio_to_f16']:,.1f}",
            cell(r["tokens_bits"], ".2f"), cell(r["save_tps"], ",.0f"), cell(r["restore_tps"], ",.0f"), cell(r["prefill_tps"], ",.0f"),
            {None: "", True: "yes", False: "no"}[r["same_logits"]], "" if r["end_bytes"] is None else f"{r['end_bytes'] / 2**20:.1f} MiB",
            cell(r["dedup_overhead"], ".3f"), "" if r["first_token_speedup"] is None else f"{r['first_token_speedup']:.1f} x",
        ]
        for r in json.loads((ROOT / "docs" / name).read_text())
    ]  # fmt: skip
    return table(["KV cache", "tier", "bytes/token", "f16 /", "bits/token", "save, tokens/s", "restore", "prefill", "same logits", "and once a session", "shared", "first token"], body)


def tiers() -> str:
    body = []
    for r in json.loads((ROOT / "docs/tiers.json").read_text()):
        if "shape" not in r:
            kld = "" if r["kld_mean"] is None else f"{r['kld_mean']:.4f}"
            speeds = ["" if r[name] is None else f"{r[name]:,.0f}" for name in ("save_tps", "restore_tps")]
            size = r["bytes_per_token"]
            body.append([r["kv"] if r["kv"] != "-" else "", r["tier"], f"{size:,.{0 if size > 100 else 2}f}", f"{r['bits_per_value']:.{2 if r['bits_per_value'] > 0.1 else 5}f}", f"{r['ratio_to_f16']:,.1f}", kld, *speeds])
    return table(["KV cache", "tier", "bytes/token", "bits/value", "f16 /", "KLD", "save, tokens/s", "restore"], body)


def ratios() -> str:
    rows = [r for r in json.loads((ROOT / "docs/tiers.json").read_text()) if "shape" in r]
    body = [[r["shape"], f"{r['values']:,}", r["tier"], f"{r['tokens_bits']:.2f}", f"{r['ratio_to_f16']:,.0f}", f"{r['ratio_to_3_bits']:,.0f}"] for r in rows]
    return table(["shape", "values a token", "tier", "bits/token", "f16 /", "3 bits a value /"], body)


def memory() -> str:
    rows = json.loads((ROOT / "docs/memory.json").read_text())
    mib = 2**20
    body = [
        [r["kv"], f"{r['ctx']:,}", f"{r['kv_bytes'] / mib:.1f}", f"{(r['kv_bytes_reported'] or 0) / mib:.1f}", f"{r['kv_bytes_process'] / mib:.1f}",
         f"{r['bits_per_value']:.2f}", f"{r['rss_bytes'] / mib:.0f}"]
        for r in rows
    ]
    return table(["KV cache", "context", "tensors, MiB", "reported, MiB", "process growth, MiB", "bits/value", "resident, MiB"], body)


def check(name: str) -> dict:
    return json.loads((ROOT / "docs/quality-checks.json").read_text())[name]


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def drift() -> str:
    body = [[r["kv"], *(f"{x:.5f}" for x in r["kld_quarters"]), factor(r["last_to_second"])] for r in check("drift")["rows"]]
    return table(["KV cache", "1st quarter", "2nd", "3rd", "4th", "4th to 2nd"], body)


def texts() -> str:
    rows = check("texts")["rows"]
    names, kinds = (list(dict.fromkeys(r[key] for r in rows)) for key in ("text", "kv"))
    cell = {(r["kv"], r["text"]): f"{r['kld_mean']:.5f} ({factor(r['to_first'])})" for r in rows}
    return table(["KV cache", *names], [[kv, *(cell[kv, name] for name in names)] for kv in kinds])


def outliers() -> str:
    body = [[r["kv"], f"{r['kld_mean']:.5f}", f"{r['kld_mean_outliers']:.5f}", factor(r["to_original"])] for r in check("outliers")["rows"]]
    return table(["KV cache", "KLD mean", "with outliers", "ratio"], body)


def greedy() -> str:
    body = [[r["kv"], f"{r['median']:g}", f"{r['mean']:.1f}", f"{r['to_the_end']}"] for r in check("greedy")["rows"]]
    return table(["KV cache", "tokens agreed, median", "mean", "answers equal to the end"], body)


def retrieval() -> str:
    result = check("retrieval")
    header = ["KV cache", "found", *(f"at {100 * d:.0f} %" for d in result["depths"]), "lost", "gained"]
    body = [[r["kv"], f"{r['successes']} of {r['of']}", *map(str, r["by_depth"]), f"{r['lost']}", f"{r['gained']}"] for r in result["rows"]]
    return table(header, body)


TABLES = {
    "quality": quality, "quality_f32": lambda: quality("quality-f32.json"), "speed": speed, "speed_1b": lambda: speed("speed-1b.json"),
    "speed_1b_2048": lambda: speed("speed-1b-2048.json"), "speed_1b_4096": lambda: speed("speed-1b-4096.json"),
    "speed_8b": lambda: speed("speed-8b.json"), "cuda": lambda: speed("cuda.json"),
    "cuda_deep": lambda: speed("cuda-deep.json"), "cuda_2048": lambda: speed("cuda-2048.json"), "cuda_profile": lambda: speed("cuda-profile.json"), "cuda_shapes": cuda_shapes, "fits": fits,
    "cuda_quality": cuda_quality, "store": lambda: store("store.json"), "store_8b": lambda: store("store-8b.json"), "tiers": tiers, "ratios": ratios, "memory": memory, "drift": drift, "texts": texts,
    "outliers": outliers, "greedy": greedy, "retrieval": retrieval,
}  # fmt: skip


def render(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        new = render(text)
        if args.check and new != text:
            sys.exit(f"report.py: a table of {name} does not match its JSON: run python tools/report.py")
        if not args.check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
