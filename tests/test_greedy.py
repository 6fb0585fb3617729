"""Greedy answers of the default model: the same for any number of threads, and between instruction sets but for near ties.

Each answer is made in a process of its own, which loads one build of the CPU backend:
    python tests/test_greedy.py MODEL PROFILE THREADS      prints the answer as JSON
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
N_TOKENS = 256
PROMPT = (ROOT / "seqkv_edge" / "prose.txt").read_text(encoding="utf-8")[:2000]  # more than the exact window, so that blocks are read

# At the first token that differs: how far behind the other answer's token is in logits. Sums in another order, of the model's own
# 8-bit activations too, move logits by some hundredths.
NEAR_TIE = 0.25


def answer(model: str, profile: str, threads: int) -> dict[str, list]:
    """Token ids of a greedy answer behind the prompt, and for each the logits of all tokens that are near the best: (id, distance)."""
    from harness import Context, Model, api

    loaded = Model(model)
    assert loaded.configure(profile=Path(profile))[0] == 0
    text = PROMPT.encode()
    buffer = (api.llama_token * len(text))()
    tokens = list(buffer[: api.llama_tokenize(loaded.vocab, text, len(text), buffer, len(buffer), True, False)])
    ids, near = [], []
    with Context(loaded, kv="seqkv3", n_ctx=2048, n_threads=threads) as context:
        logits = context.decode(tokens)[-1]
        for _ in range(N_TOKENS):
            ids.append(int(logits.argmax()))
            distance = logits.max() - logits
            near.append([(int(i), float(distance[i])) for i in np.flatnonzero(distance < NEAR_TIE)])
            logits = context.decode(ids[-1:])[-1]
    return {"prompt": [len(tokens)], "ids": ids, "near": near}


def run(libraries: Path, threads: int) -> dict[str, list]:
    """An answer of these libraries."""
    from seqkv_edge import model

    profile = ROOT / "models" / "SmolLM2-135M-Instruct.seqkv.gguf"
    command = [sys.executable, __file__, str(model.default_model()), str(profile), str(threads)]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), "MTMD_CPP_LIB": str(libraries)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["ids"]) == N_TOKENS and result["prompt"][0] > 256
    return result


def own_libraries() -> Path:
    from seqkv_edge import lib_dir

    return lib_dir()


@pytest.mark.model
@pytest.mark.slow
def test_threads() -> None:
    assert run(own_libraries(), 1)["ids"] == run(own_libraries(), 2)["ids"]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sse42", "avx2", "avx512"])
def test_instruction_sets(name: str, tmp_path: Path) -> None:
    """A set of this machine beside its best one."""
    from test_instruction_sets import SETS, X86, build

    isa = next(s for s in SETS if s.name == name)
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        pytest.skip(f"needs Linux on x86-64; this is {platform.system()} on {platform.machine()}")
    missing = isa.flags - set(cpuinfo.read_text().split())
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    binary = build(isa.name, *(f"-DGGML_{x}={'ON' if x in isa.features else 'OFF'}" for x in X86))
    shutil.copytree(own_libraries(), tmp_path / "lib")
    shutil.copy(binary.with_name("libggml-cpu.so"), tmp_path / "lib")

    mine, other = run(own_libraries(), 2), run(tmp_path / "lib", 2)
    same = next((i for i, (a, b) in enumerate(zip(mine["ids"], other["ids"])) if a != b), N_TOKENS)
    print(f"{name}: {same} of {N_TOKENS} tokens as with this machine's instruction set")
    if same < N_TOKENS:
        assert other["ids"][same] in dict(mine["near"][same]), f"token {same}: not a near tie"


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
