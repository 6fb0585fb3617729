"""Decode allocates nothing in the kernels: counted in a process of its own, with malloc and its kin replaced (glibc)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seqkv_edge import llama

HERE = Path(__file__).resolve().parent
N = 80
"""tokens that are counted: more than the exact window, so that rows leave it"""

PROGRAM = """
import contextlib, ctypes, json, sys
from pathlib import Path
import harness, tiny
counter = ctypes.CDLL(sys.argv[1])
counter.allocations_own.restype = counter.allocations_others.restype = ctypes.c_long
folder, spec, found = Path(sys.argv[2]), tiny.SPECS["llama"], {}
layers = {il: harness.random_layer(spec, il) for il in range(spec.n_layer)}
profile = harness.write_profile(folder / "profile", layers)
path = tiny.write(folder / "llama.gguf", spec, "llama")
with contextlib.closing(harness.Model(path)) as model:
    for kv, settings in (("f16", {}), ("seqkv3", {}), ("seqkv3", {"profile": profile, "model_id": "ab" * 16})):
        assert model.configure(**settings) == (0, "")
        with harness.Context(model, kv=kv, n_threads=2) as context:
            context.decode(harness.text(200))
            for token in harness.text(8, 1):
                context.decode([token])
            counter.allocations_reset()
            for token in harness.text(%d, 2):
                context.decode([token])
            found[kv + " with a profile" * bool(settings)] = counter.allocations_own(), counter.allocations_others()
print(json.dumps(found))
"""


def test_no_allocation_in_the_kernels(tmp_path):
    """Worker threads run the same ops as the main thread, and nothing else: they allocate nothing, and the main thread about as often as with f16."""
    if not llama.library().patched:
        pytest.skip("needs the patched libraries")
    if platform.libc_ver()[0] != "glibc" or not shutil.which("cc"):
        pytest.skip("needs glibc and a C compiler")
    library = tmp_path / "allocations.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "allocations.c", "-lpthread"], check=True)
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "models", HERE.parent, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % N, library, tmp_path],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {others for _, others in found.values()} == {0}
    f16 = found.pop("f16")[0]
    assert f16 > N  # the counter works: llama.cpp builds its graphs with allocations
    assert len(found) == 2 and all((own - f16) / N < 20 for own, _ in found.values()), (f16, found)
