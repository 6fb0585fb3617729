"""tools/make_outlier_model.py: outliers in the keys, the same model otherwise."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from harness import FA_OFF, FA_ON, Context, Model, kld, max_diff, text, tiny

from seqkv_edge.gguf_meta import fingerprint

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "make_outlier_model.py"
_spec = importlib.util.spec_from_file_location("make_outlier_model", TOOL)
outliers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(outliers)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model (2 layers, 4 heads, 2 KV heads, float32) and its outlier model."""
    folder = tmp_path_factory.mktemp("outliers")
    source, target = folder / "plain.gguf", folder / "outliers.gguf"
    tiny.write(source, tiny.SPECS["llama"], "llama")
    outliers.make(source, target)
    return source, target


@pytest.fixture(scope="module")
def models(pair: tuple[Path, Path]) -> Iterator[tuple[Model, Model]]:
    loaded = Model(pair[0]), Model(pair[1])
    yield loaded
    for model in loaded:
        model.close()


def weights(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def logits(model: Model, kv: str, flash_attn: int) -> np.ndarray:
    with Context(model, kv=kv, flash_attn=flash_attn) as context:
        return context.decode(text(300))


def test_the_function_is_the_same(models):
    plain, other = models
    assert max_diff(logits(plain, "f32", FA_OFF), logits(other, "f32", FA_OFF)) == 0
    assert max_diff(logits(plain, "f16", FA_ON), logits(other, "f16", FA_ON)) < 1e-3


def test_keys_alone_would_show(pair, tmp_path):
    """That the function is the same says something: with the original's queries it is another one."""
    source, target = pair
    half = tmp_path / "half.gguf"
    half.write_bytes(target.read_bytes())
    plain = weights(source)
    for tensor in gguf.GGUFReader(half, "r+").tensors:
        if "attn_q." in tensor.name:
            tensor.data[:] = plain[tensor.name].data
            tensor.data.base.flush()
    models = Model(source), Model(half)
    try:
        assert max_diff(*(logits(model, "f32", FA_OFF) for model in models)) > 0.1
    finally:
        for model in models:
            model.close()


def test_rows_are_scaled_in_pairs(pair):
    before, after = map(weights, pair)
    seen = []
    for il in range(2):
        k, q = (after[f"blk.{il}.attn_{x}.weight"].data / before[f"blk.{il}.attn_{x}.weight"].data for x in "kq")
        assert (k == k[:, :1]).all() and (q == q[:, :1]).all()
        keys = k[:, 0].reshape(2, 32, 2)  # KV heads, pairs
        assert (keys[..., 0] == keys[..., 1]).all()
        for head in keys[..., 0]:
            scaled = head[head != 1]
            assert len(scaled) == outliers.N_PAIRS and set(scaled) <= set(outliers.FACTORS)
        queries = q[:, 0].reshape(2, 2, 64)  # KV head, query head of its group
        assert (queries * k[:, 0].reshape(2, 1, 64) == 1).all()
        seen += [tuple(head) for head in keys[..., 0]]
    assert len(set(seen)) == 4  # every head has its own


def test_a_quantized_cache_suffers(models):
    """The factors reach the keys in the cache: their common scale in a block is spent on few channels."""
    costs = [kld(logits(model, "f32", FA_OFF), logits(model, "q4_0", FA_ON)).mean() for model in models]
    assert costs[1] > 2 * costs[0]


def test_other_tensors_are_copied(tmp_path):
    rng = np.random.default_rng(1)
    kind = gguf.GGMLQuantizationType.Q8_0
    source, target = tmp_path / "quantized.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_name("small")
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, 1.5])
    for name, rows in (("attn_k", 64), ("attn_q", 256), ("attn_v", 64), ("ffn_up", 96)):
        matrix = gguf.quants.quantize(rng.normal(size=(rows, 256)).astype(np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", matrix, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_k.bias", rng.normal(size=64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    outliers.make(source, target, seed=3)
    before, after = weights(source), weights(target)
    assert list(before) == list(after)
    for name in ("blk.0.attn_v.weight", "blk.0.ffn_up.weight"):
        assert after[name].tensor_type == kind and after[name].data.tobytes() == before[name].data.tobytes()
    ratio = {}
    for x in ("k.weight", "q.weight", "k.bias"):
        name = f"blk.0.attn_{x}"
        plain = gguf.quants.dequantize(before[name].data, before[name].tensor_type)
        assert after[name].tensor_type == gguf.GGMLQuantizationType.F32
        ratio[x] = (after[name].data[plain != 0] / plain[plain != 0]).max()
    assert ratio["k.weight"] == ratio["k.bias"] >= 8 and ratio["q.weight"] == 1
    old, new = (gguf.GGUFReader(path).fields for path in (source, target))
    assert list(old) == list(new)
    changed = {name for name in old if old[name].contents() != new[name].contents() or old[name].types != new[name].types}
    assert changed == {"general.name"}


def test_seeds_and_identity(pair, tmp_path):
    source, target = pair
    again, other = tmp_path / "again.gguf", tmp_path / "other.gguf"
    outliers.make(source, again)
    outliers.make(source, other, seed=1)
    assert again.read_bytes() == target.read_bytes()
    assert len({fingerprint(path) for path in (source, target, other)}) == 3


@pytest.mark.parametrize(("name", "words"), [("qwen2", "only llama"), ("mpt", "only llama")])
def test_refusals(tmp_path, name, words):
    source = tmp_path / "x.gguf"
    tiny.write(source, tiny.SPECS[name], name)
    with pytest.raises(ValueError, match=words):
        outliers.make(source, tmp_path / "y.gguf")
    assert not (tmp_path / "y.gguf").exists()


def test_a_model_is_not_overwritten(pair):
    with pytest.raises(ValueError, match="another file"):
        outliers.make(pair[0], pair[0])
