"""models/speed.py: random-weight models of any shape."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from harness import Context, Model, kld, text

from seqkv_edge.gguf_meta import read_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import speed

SMALL = ["--layers", "2", "--embd", "256", "--ff", "512", "--heads", "4", "--kv-heads", "2", "--vocab", "320"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "small.gguf"
    assert speed.main(["8b", str(path), *SMALL]) == 0
    return path


def test_the_model_has_the_shape(small):
    meta = read_model(small)
    assert meta.heads_kv == (2, 2)
    assert [(layer.k_values, layer.v_values) for layer in meta.layers] == [(256, 256)] * 2


def test_it_is_the_same_each_time(small, tmp_path):
    again = tmp_path / "again.gguf"
    speed.main(["8b", str(again), *SMALL])
    assert again.read_bytes() == small.read_bytes()


def test_named_shapes_have_their_size():
    """Parameters: 1.1, 7.2 and 13.5 billion."""
    for name, billions in (("1b", 1.1), ("8b", 7.2), ("14b", 13.5)):
        shape = speed.SHAPES[name]
        n = shape.layers * sum(rows * columns for rows, columns in shape.matrices().values()) + 2 * shape.vocab * shape.embd
        assert round(n / 1e9, 1) == billions


def test_it_runs(small):
    """Its logits are finite and differ between tokens, and a cache of seqkv4 gives nearly those of f16."""
    model = Model(small)
    with Context(model, kv="f16") as context:
        expected = context.decode(text(200))
    with Context(model, kv="seqkv4") as context:
        found = context.decode(text(200))
    model.close()
    assert np.isfinite(expected).all() and expected.std() > 0.1
    assert np.abs(expected[50] - expected[150]).max() > 0.1
    assert np.mean(kld(expected, found)) < 0.01


@pytest.mark.parametrize(("arguments", "message"), [(["--embd", "100"], "multiples of 32"), (["--vocab", "100"], "260 tokens at least")])
def test_a_wrong_shape_is_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        speed.main(["8b", str(tmp_path / "x.gguf"), *arguments])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()
