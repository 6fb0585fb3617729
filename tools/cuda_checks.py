#!/usr/bin/env python3
"""Everything that a machine with an NVIDIA GPU has to say about the seqkv types on CUDA, in one JSON file.

    python tools/cuda_checks.py --model FILE.gguf [--text FILE] [--speed-model FILE.gguf] [--json docs/cuda.json]

Steps (--steps takes a list of them):
    build      pip install -e . with -DGGML_CUDA=ON, and test-backend-ops
    ops        test-backend-ops: the CUDA ops against the scalar oracle, all cases
    live       pytest -m cuda: live graphs of tiny models against the CPU
    sanitizer  compute-sanitizer on some of these cases: out-of-bounds and misaligned accesses
    quality    bench quality on the GPU and on the CPU: the mean KLD of each type has to agree within four standard errors
    speed      bench speed at depths on --speed-model (default: --model)

Each step's result goes into the JSON under its name, with the command that was run. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPS = {"SEQKV_FRAME": 6, "SEQKV_STORE": 106, "SEQKV_ATTN": 386}  # least number of cases
SANITIZED = (
    "type_k=seqkv3k,type_v=seqkv4,dk=64.*n_kv=(63|65|127),|type_k=seqkv3k,type_v=seqkv3,dk=128,dv=128.*n_tokens=(3|64).*order=2"
    "|group=64,n_kv=256.*n_tokens=2,|dk=128,dv=128,n_head_kv=8,group=(4,n_kv=320|3,n_kv=590)"
)


def shown(command: list[str]) -> str:
    """A command as it is recorded: programs by name, not by where they lie on this machine."""
    return shlex.join([Path(word).name if word.startswith("/") and os.access(word, os.X_OK) else word for word in command])


def run(command: list[str], timeout: float = 1800, **env: str) -> tuple[int, str]:
    """Exit status and output of a command; -1 if it ran out of time."""
    print("$", shown(command), flush=True)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return -1, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def build(args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "pip", "install", "-e", ".[test]"]
    status, text = run(command, timeout=7200, CMAKE_ARGS="-DGGML_CUDA=ON -DSEQKV_BUILD_TESTS=ON")
    return {
        "ok": status == 0,
        "command": "CMAKE_ARGS='-DGGML_CUDA=ON -DSEQKV_BUILD_TESTS=ON' " + shown(command),
        "tail": text[-500:] if status else "",
    }


def binary_of(args: argparse.Namespace) -> str:
    found = [args.binary] if args.binary else sorted(map(str, ROOT.glob("build/*/bin/test-backend-ops")))
    if not found:
        sys.exit("no test-backend-ops under build/: run the step 'build' first, or pass --binary")
    return found[-1]


def ops(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"ok": True}
    for op, least in OPS.items():
        command = [binary_of(args), "test", "-b", "CUDA0", "-o", op]
        status, text = run(command, timeout=600)
        count = re.search(r"(\d+)/(\d+) tests passed", text)
        passed, total = map(int, count.groups()) if count else (0, 0)
        ok = status == 0 and passed == total >= least and "not supported" not in text
        result[op] = {"passed": passed, "total": total, "ok": ok, "command": shown(command)}
        result["ok"] &= ok
    return result


def live(args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda_live.py"]
    status, text = run(command, timeout=600)
    count = re.search(r"(\d+) passed", text)
    skips = [line for line in text.splitlines() if line.startswith("SKIPPED") and not line.endswith(": one GPU")]
    ok = status == 0 and count is not None and not skips
    if not ok:
        print(text[-3000:], flush=True)
    return {"ok": ok, "passed": int(count[1]) if count else 0, "command": shown(["python", *command[1:]])}


def sanitizer(args: argparse.Namespace) -> dict[str, Any]:
    command = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        binary_of(args),
        "test",
        "-b",
        "CUDA0",
        "-o",
        "SEQKV_ATTN",
        "-p",
        SANITIZED,
    ]
    status, text = run(command)
    count = re.search(r"(\d+)/(\d+) tests passed", text)
    errors = re.search(r"ERROR SUMMARY: (\d+) error", text)
    ok = status == 0 and errors is not None and errors[1] == "0" and count is not None and int(count[1]) == int(count[2]) > 0
    return {"ok": ok, "errors": int(errors[1]) if errors else None, "cases": int(count[2]) if count else 0, "command": shown(command)}


def bench(arguments: list[str]) -> tuple[Any, str]:
    """The rows of a bench command, and the command."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.json"
        command = [sys.executable, "-m", "seqkv_edge", "bench", *arguments]
        status, text = run([*command, "--json", str(path)], timeout=7200)
        if status:
            print(text[-2000:], flush=True)
        return (json.loads(path.read_text()) if status == 0 else None), shown(["python", *command[1:]])


def quality(args: argparse.Namespace) -> dict[str, Any]:
    if not args.text:
        sys.exit("the step 'quality' needs --text")
    arguments = [
        "quality",
        "--model",
        args.model,
        "--text",
        args.text,
        "--ctx",
        str(args.ctx),
        "--chunks",
        str(args.chunks),
        "--kv",
        args.kv,
        *args.profile,
    ]
    gpu, command = bench(arguments)
    cpu, _ = bench([*arguments, "--ngl", "0"])
    result: dict[str, Any] = {"ok": gpu is not None and cpu is not None, "command": command, "gpu": gpu, "cpu": cpu}
    for a, b in zip(gpu or [], cpu or []):
        error = math.hypot(a.get("kld_sem") or 0.1 * a["kld_mean"], b.get("kld_sem") or 0.1 * b["kld_mean"])
        result["ok"] &= abs(a["kld_mean"] - b["kld_mean"]) <= 4 * error
    return result


def speed(args: argparse.Namespace) -> dict[str, Any]:
    kvs = "f16,q8_0,q4_0," + args.kv
    rows, command = bench(
        [
            "speed",
            "--model",
            args.speed_model or args.model,
            "--kv",
            args.speed_kv or kvs,
            "--depth",
            args.depth,
            "--batch",
            str(args.batch),
            "--runs",
            "3",
            *args.profile,
        ]
    )
    return {"ok": rows is not None, "command": command, "rows": rows}


STEPS = {"build": build, "ops": ops, "live": live, "sanitizer": sanitizer, "quality": quality, "speed": speed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FILE.gguf")
    parser.add_argument("--speed-model", metavar="FILE.gguf", help="another model for the speed")
    parser.add_argument("--text", metavar="FILE", help="text for the quality")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="LIST")
    parser.add_argument("--kv", default="seqkv4,seqkv3,seqkv2", metavar="LIST")
    parser.add_argument("--speed-kv", metavar="LIST", help="default: f16,q8_0,q4_0 and those of --kv")
    parser.add_argument("--depth", default="0,16384,131072", metavar="LIST")
    parser.add_argument("--batch", type=int, default=2048, metavar="N")
    parser.add_argument("--ctx", type=int, default=2048, metavar="N")
    parser.add_argument("--chunks", type=int, default=4, metavar="N")
    parser.add_argument("--no-profile", dest="profile", action="store_const", const=["--no-profile"], default=[])
    parser.add_argument("--binary", metavar="FILE", help="test-backend-ops (default: the one under build/)")
    parser.add_argument("--json", default="docs/cuda.json", metavar="FILE")
    args = parser.parse_args()

    path = Path(args.json)
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results["device"] = run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])[1].strip()
    failed = []
    for name in args.steps.split(","):
        if name not in STEPS:
            sys.exit(f"unknown step {name!r}: one of {', '.join(STEPS)}")
        results[name] = STEPS[name](args)
        print(name, "ok" if results[name]["ok"] else "FAILED", flush=True)
        failed += [] if results[name]["ok"] else [name]
        path.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
