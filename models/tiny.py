"""Tiny random-weight GGUF models for tests.

    python models/tiny.py OUTDIR [NAME...]

Each model has 1 to 4 layers and a vocabulary of 263 byte-level tokens, and is written in a fraction of a
second, the same bytes for the same spec. The weights are shaped so that a damaged KV cache shows:

- a few dimensions of the residual stream are constant (BIAS_DIMS). Through them every key has a mean of its
  own per head before RoPE that carries most of its energy, as in trained models, and every query and value
  has a smaller one;
- attention logits have a standard deviation of about 2, so attention is neither uniform nor one-hot;
- attention writes as much to the residual stream as the embedding does;
- output logits have a standard deviation of about 2 over the printable tokens, the others are unlikely.

`exact=True` (with float16 weights) makes the keys and values of layer 0 independent of how the tokens are cut
into batches, bit by bit: their matrix products are sums that float32 holds exactly, in any order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BIAS_SHARE = 8  # 1/8 of the residual dimensions are constant
N_SPECIAL = 3  # <unk> <s> </s>
N_VOCAB = N_SPECIAL + 256 + 4

# what a model is for: the cache serves it, only some of its layers, or refuses it
SUPPORTED, MIXED, OPTIONAL, REFUSED = "supported", "mixed", "optional", "refused"


@dataclass(frozen=True)
class TinySpec:
    """Shape and metadata of one model; everything random follows from `seed`."""

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 128
    n_ctx_train: int = 4096
    rope_base: float = 10000.0
    n_rot: int = 0  # 0: head_dim
    rope_scaling: str = ""  # "", "linear", "yarn" or "longrope"
    rope_factor: float = 1.0
    n_ctx_orig: int = 0  # context before scaling; 0: n_ctx_train
    rope_freqs: bool = False  # per-pair frequency factors, as Llama 3 has them
    n_swa: int = 0  # sliding window, tokens
    swa_layers: tuple[bool, ...] = ()  # which layers slide; () leaves it to the architecture
    swa_pattern: int = 0  # every n-th layer does not slide
    softcap: float = 0.0  # attention logit soft-cap
    k_mean: float = 1.5  # size of the mean key, in standard deviations of the rest
    exact: bool = False
    dtype: str = "f32"  # of the matrices: "f16" or "f32"
    seed: int = 1
    use: str = SUPPORTED
    why: str = ""  # why the cache refuses the model, or part of it

    @property
    def n_group(self) -> int:
        """Query heads per KV head."""
        return self.n_head // self.n_head_kv


class _Weights:
    """Adds tensors to the writer. Shapes are numpy's: (out, in)."""

    def __init__(self, out: gguf.GGUFWriter, spec: TinySpec) -> None:
        self.out = out
        self.spec = spec
        self.rng = np.random.default_rng(spec.seed)
        self.n_bias = spec.n_embd // BIAS_SHARE

    def vector(self, name: str, values: np.ndarray) -> None:
        self.out.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))

    def matrix(self, name: str, values: np.ndarray) -> None:
        dtype = np.float16 if self.spec.dtype == "f16" else np.float32
        self.out.add_tensor(name, np.ascontiguousarray(values, dtype=dtype))

    def normal(self, *shape: int, std: float = 1.0) -> np.ndarray:
        return self.rng.standard_normal(shape) * std

    def reader(self, n_out: int, std: float, mean: float = 0.0) -> np.ndarray:
        """Matrix (n_out, n_embd) from a normalized residual row to `std * noise + a mean per output`."""
        n_embd, n_bias = self.spec.n_embd, self.n_bias
        means = self.normal(n_out, 1, std=mean)
        if self.spec.exact:  # multiples of 1/32 times rows of +-c: every partial sum is exact
            w = np.round(self.normal(n_out, n_embd, std=std / np.sqrt(n_embd)) * 32) / 32
            w[:, :n_bias] = np.round(means / n_bias * 32) / 32
            return w
        w = self.normal(n_out, n_embd, std=std / np.sqrt(n_embd - n_bias))
        w[:, :n_bias] = means / n_bias
        return w

    def writer(self, n_in: int, std: float) -> np.ndarray:
        """Matrix (n_embd, n_in) that leaves the constant dimensions alone."""
        w = self.normal(self.spec.n_embd, n_in, std=std / np.sqrt(n_in))
        w[: self.n_bias] = 0.0
        return w

    def norm(self, name: str, n: int, value: float = 1.0, bias: bool = False) -> None:
        self.vector(name + ".weight", np.full(n, value))
        if bias:
            self.vector(name + ".bias", np.zeros(n))

    def post_norm(self, name: str, value: float) -> None:
        """Norm of what is added to the residual stream (Gemma)."""
        w = np.full(self.spec.n_embd, value)
        w[: self.n_bias] = 0.0
        self.vector(name + ".weight", w)


# The mean of the scores does not matter to softmax; what differs between keys does. With the noise of q at
# 1.3 and of k at 1, q.k/sqrt(head_dim) has a standard deviation of 1.3 from the noise and about the same
# again from the rotated means.
Q_STD, Q_MEAN, K_STD, V_STD, V_MEAN = 1.3, 0.7, 1.0, 1.0, 0.5


def _embedding(w: _Weights) -> np.ndarray:
    spec = w.spec
    e = w.normal(N_VOCAB, spec.n_embd)
    if spec.exact:
        e = np.where(e < 0, -1.0, 1.0)
    e[:, : w.n_bias] = 1.0
    return e


def _output(w: _Weights, std: float = 2.0, unlikely: float = 6.0) -> np.ndarray:
    o = w.normal(N_VOCAB, w.spec.n_embd, std=std / np.sqrt(w.spec.n_embd))
    o[:, : w.n_bias] = 0.0
    printable = np.zeros(N_VOCAB, dtype=bool)
    printable[N_SPECIAL + 0x20 : N_SPECIAL + 0x7F] = True
    printable[N_SPECIAL + 0x0A] = True
    o[~printable, : w.n_bias] = -unlikely / w.n_bias
    return o


def _qkv(w: _Weights, blk: str) -> None:
    spec = w.spec
    n_q, n_kv = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    parts = {
        "q": w.reader(n_q, Q_STD, Q_MEAN),
        "k": w.reader(n_kv, K_STD, spec.k_mean),
        "v": w.reader(n_kv, V_STD, V_MEAN),
    }
    if spec.arch in ("bloom", "mpt"):
        w.matrix(blk + "attn_qkv.weight", np.concatenate(list(parts.values())))
        w.vector(blk + "attn_qkv.bias", np.zeros(n_q + 2 * n_kv))
        return
    for name, value in parts.items():
        w.matrix(f"{blk}attn_{name}.weight", value)
        if spec.arch in ("qwen2", "qwen2vl"):
            w.vector(f"{blk}attn_{name}.bias", w.normal(len(value), std=1.0 if name == "k" else 0.3))


def _mla(w: _Weights, blk: str) -> None:
    """Attention of DeepSeek 2 without query compression: latent rank 64, rotary part 64."""
    rank, rope, nope, v, n_head = 64, 64, 64, 64, w.spec.n_head
    w.norm(blk + "attn_q_a_norm", rank)
    w.norm(blk + "attn_kv_a_norm", rank)
    w.matrix(blk + "attn_q_a.weight", w.reader(rank, 1.0))
    w.matrix(blk + "attn_q_b.weight", w.normal(n_head * (nope + rope), rank, std=rank**-0.5))
    w.matrix(blk + "attn_kv_a_mqa.weight", w.reader(rank + rope, 1.0))
    w.matrix(blk + "attn_k_b.weight", w.normal(n_head, rank, nope, std=nope**-0.5))
    w.matrix(blk + "attn_v_b.weight", w.normal(n_head, v, rank, std=rank**-0.5))
    w.matrix(blk + "attn_output.weight", w.writer(n_head * v, 1.0))


def _mamba(w: _Weights, blk: str) -> None:
    n_embd, inner, conv, state, rank = w.spec.n_embd, 2 * w.spec.n_embd, 4, 16, 4
    w.norm(blk + "attn_norm", n_embd)
    w.matrix(blk + "ssm_in.weight", w.reader(2 * inner, 1.0))
    w.vector(blk + "ssm_conv1d.weight", w.normal(inner, conv, std=0.5))
    w.vector(blk + "ssm_conv1d.bias", np.zeros(inner))
    w.matrix(blk + "ssm_x.weight", w.normal(rank + 2 * state, inner, std=inner**-0.5))
    w.matrix(blk + "ssm_dt.weight", w.normal(inner, rank, std=0.5))
    w.vector(blk + "ssm_dt.bias", np.full(inner, -2.0))
    w.vector(blk + "ssm_a", -np.tile(np.arange(1.0, state + 1), (inner, 1)))
    w.vector(blk + "ssm_d", np.ones(inner))
    w.matrix(blk + "ssm_out.weight", w.writer(inner, 1.0))


def _ffn(w: _Weights, blk: str) -> None:
    spec = w.spec
    if spec.arch == "phi3":  # gate and up in one
        w.matrix(blk + "ffn_up.weight", w.reader(2 * spec.n_ff, 1.0))
    else:
        w.matrix(blk + "ffn_up.weight", w.reader(spec.n_ff, 1.0))
        if spec.arch in ("bloom", "mpt", "bert"):
            w.vector(blk + "ffn_up.bias", np.zeros(spec.n_ff))
            w.vector(blk + "ffn_down.bias", np.zeros(spec.n_embd))
        else:
            w.matrix(blk + "ffn_gate.weight", w.reader(spec.n_ff, 1.0))
    w.matrix(blk + "ffn_down.weight", w.writer(spec.n_ff, 0.8))


def _decoder(w: _Weights) -> None:
    spec = w.spec
    n_embd = spec.n_embd
    gemma = spec.arch in ("gemma2", "gemma3")
    layer_norm = spec.arch in ("bloom", "mpt")
    e = _embedding(w)
    if gemma or spec.arch == "cohere2":  # embedding and output are one matrix; Gemma multiplies the embedding by sqrt(n_embd)
        w.matrix("token_embd.weight", e * (2.0 / np.sqrt(n_embd)) if gemma else e)
        signs = np.where(w.normal(n_embd) < 0, -1.0, 1.0)
        signs[: w.n_bias] = 0.0
        w.vector("output_norm.weight", signs)
    else:
        w.matrix("token_embd.weight", e)
        w.norm("output_norm", n_embd, bias=layer_norm)
        w.matrix("output.weight", _output(w))
    if spec.arch == "bloom":
        w.norm("token_embd_norm", n_embd, bias=True)
    if spec.rope_freqs:
        w.vector("rope_freqs.weight", np.geomspace(1.0, 8.0, spec.head_dim // 2))
    if spec.rope_scaling == "longrope":
        n_pair = (spec.n_rot or spec.head_dim) // 2
        w.vector("rope_factors_long.weight", np.geomspace(1.0, 6.0, n_pair))
        w.vector("rope_factors_short.weight", np.geomspace(1.0, 1.5, n_pair))

    for il in range(spec.n_layer):
        blk = f"blk.{il}."
        if spec.arch == "mamba":
            _mamba(w, blk)
            continue
        w.norm(blk + "attn_norm", n_embd, bias=layer_norm)
        if spec.arch == "deepseek2":
            _mla(w, blk)
        else:
            _qkv(w, blk)
            w.matrix(blk + "attn_output.weight", w.writer(spec.n_head * spec.head_dim, 2.0))
        if layer_norm:
            w.vector(blk + "attn_output.bias", np.zeros(n_embd))
        if spec.arch in ("qwen3", "gemma3"):
            w.norm(blk + "attn_q_norm", spec.head_dim, 1.5)
            w.vector(blk + "attn_k_norm.weight", np.linspace(1.0, 2.0, spec.head_dim))
        if spec.arch == "granite_swa":
            w.vector(blk + "attn_sinks.weight", np.linspace(0.0, 4.0, spec.n_head))
        if spec.arch != "cohere2":
            w.norm(blk + "ffn_norm", n_embd, bias=layer_norm)
        _ffn(w, blk)
        if gemma:
            w.post_norm(blk + "post_attention_norm", 1.5)
            w.post_norm(blk + "post_ffw_norm", 0.8)


def _bert(w: _Weights) -> None:
    spec = w.spec
    n_embd = spec.n_embd
    w.matrix("token_embd.weight", _embedding(w))
    w.vector("token_types.weight", w.normal(2, n_embd))
    w.vector("position_embd.weight", w.normal(spec.n_ctx_train, n_embd))
    w.norm("token_embd_norm", n_embd, bias=True)
    for il in range(spec.n_layer):
        blk = f"blk.{il}."
        _qkv(w, blk)
        w.matrix(blk + "attn_output.weight", w.writer(n_embd, 1.0))
        w.norm(blk + "attn_output_norm", n_embd, bias=True)
        _ffn(w, blk)
        w.norm(blk + "layer_output_norm", n_embd, bias=True)


def _t5(w: _Weights) -> None:
    spec = w.spec
    n_embd = spec.n_embd
    w.matrix("token_embd.weight", _embedding(w))
    w.matrix("output.weight", _output(w))
    for side in ("enc", "dec"):
        w.norm(f"{side}.output_norm", n_embd)
        for il in range(spec.n_layer):
            blk = f"{side}.blk.{il}."
            for kind in ("attn",) if side == "enc" else ("attn", "cross_attn"):
                w.norm(f"{blk}{kind}_norm", n_embd)
                for name in "qkv":
                    w.matrix(f"{blk}{kind}_{name}.weight", w.reader(n_embd, 0.3))
                w.matrix(f"{blk}{kind}_o.weight", w.writer(n_embd, 1.0))
            w.vector(f"{blk}attn_rel_b.weight", w.normal(32, spec.n_head))
            w.norm(blk + "ffn_norm", n_embd)
            w.matrix(blk + "ffn_up.weight", w.reader(spec.n_ff, 1.0))
            w.matrix(blk + "ffn_gate.weight", w.reader(spec.n_ff, 1.0))
            w.matrix(blk + "ffn_down.weight", w.writer(spec.n_ff, 0.8))


def _vocab(out: gguf.GGUFWriter) -> None:
    """SentencePiece vocabulary of single bytes: token 3 + b is byte b."""
    kind = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256
    tokens += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "\u2581"]  # the last is a space
    types += [kind.CONTROL] * 3 + [kind.NORMAL]
    assert len(tokens) == N_VOCAB
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([0.0] * len(tokens))
    out.add_token_types(types)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_add_bos_token(True)
    out.add_add_eos_token(False)
    out.add_add_space_prefix(False)
    out.add_chat_template(CHAT_TEMPLATE)


def _metadata(out: gguf.GGUFWriter, spec: TinySpec, name: str) -> None:
    a = spec.arch
    out.add_name(name)
    out.add_context_length(spec.n_ctx_train)
    out.add_embedding_length(spec.n_embd)
    out.add_block_count(spec.n_layer)
    out.add_feed_forward_length(spec.n_ff)
    out.add_layer_norm_eps(1e-5)
    out.add_layer_norm_rms_eps(1e-6)
    if a == "mamba":
        out.add_head_count(0)
        out.add_ssm_conv_kernel(4)
        out.add_ssm_inner_size(2 * spec.n_embd)
        out.add_ssm_state_size(16)
        out.add_ssm_time_step_rank(4)
        return
    out.add_head_count(spec.n_head)
    out.add_head_count_kv(spec.n_head_kv)
    if a == "deepseek2":
        out.add_leading_dense_block_count(spec.n_layer)
        out.add_q_lora_rank(64)
        out.add_kv_lora_rank(64)
        out.add_key_length(128)
        out.add_value_length(64)
        out.add_key_length_mla(128)
        out.add_value_length_mla(64)
        out.add_expert_feed_forward_length(spec.n_ff)
        out.add_expert_shared_count(0)
        out.add_rope_dimension_count(64)
        return
    out.add_key_length(spec.head_dim)
    out.add_value_length(spec.head_dim)
    if a == "bert":
        out.add_causal_attention(False)
        out.add_pooling_type(gguf.PoolingType.MEAN)
        out.add_token_type_count(2)
        return
    if a == "t5":
        out.add_relative_attn_buckets_count(32)
        out.add_decoder_start_token_id(0)
        return
    if a == "mpt":
        out.add_max_alibi_bias(8.0)
    if a in ("bloom", "mpt"):
        return
    out.add_rope_dimension_count(spec.n_rot or spec.head_dim)
    out.add_rope_freq_base(spec.rope_base)
    if spec.rope_scaling:
        out.add_rope_scaling_type(gguf.RopeScalingType(spec.rope_scaling))
        if spec.rope_scaling != "longrope":
            out.add_rope_scaling_factor(spec.rope_factor)
        out.add_rope_scaling_orig_ctx_len(spec.n_ctx_orig or spec.n_ctx_train)
    if a == "qwen2vl":
        quarter = spec.head_dim // 8
        out.add_rope_dimension_sections([2 * quarter, quarter, quarter, 0])
    if a == "granite_swa":
        out.add_logit_scale(1.0)
    if a == "cohere2":
        out.add_logit_scale(2.0 / spec.n_embd**0.5)
    if spec.n_swa:
        out.add_sliding_window(spec.n_swa)
    if spec.swa_layers:
        out.add_array(f"{a}.attention.sliding_window_pattern", list(spec.swa_layers))
    elif spec.swa_pattern:
        out.add_uint32(f"{a}.attention.sliding_window_pattern", spec.swa_pattern)
    if spec.softcap:
        out.add_attn_logit_softcapping(spec.softcap)


def write(path: str | Path, spec: TinySpec, name: str = "tiny") -> Path:
    """Write the model of `spec` to `path`; the same spec and name give the same bytes."""
    out = gguf.GGUFWriter(str(path), spec.arch)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if spec.dtype == "f16" else gguf.LlamaFileType.ALL_F32)
    _metadata(out, spec, name)
    _vocab(out)
    {"bert": _bert, "t5": _t5}.get(spec.arch, _decoder)(_Weights(out, spec))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return Path(path)


def _specs() -> Iterator[tuple[str, TinySpec]]:
    # plain
    yield "llama", TinySpec()
    yield "llama-other", TinySpec(seed=2)  # same shape, other weights
    yield "llama-3l", TinySpec(n_layer=3, seed=3)  # other shape
    yield "llama-f16", TinySpec(dtype="f16")
    yield "llama-exact", TinySpec(n_layer=1, exact=True, dtype="f16")
    yield "llama-d128", TinySpec(n_head=3, n_head_kv=1, head_dim=128)
    yield "llama-d256", TinySpec(n_head=2, n_head_kv=2, head_dim=256)
    for n_group in (1, 2, 3, 4, 7, 8, 16):
        n_kv = 2 if n_group <= 4 else 1
        yield f"llama-g{n_group}", TinySpec(n_head=n_group * n_kv, n_head_kv=n_kv, seed=10 + n_group)
    # RoPE
    yield "llama-freqs", TinySpec(rope_freqs=True, rope_base=500000.0)
    yield "llama-linear", TinySpec(rope_scaling="linear", rope_factor=4.0, n_ctx_orig=1024)
    yield "llama-yarn", TinySpec(rope_scaling="yarn", rope_factor=8.0, n_ctx_orig=512)
    yield "llama-longrope", TinySpec(rope_scaling="longrope", n_ctx_orig=512)
    yield "one-norm", TinySpec(n_layer=1, seed=4)  # one layer: keys depend on token and position alone
    yield "one-yarn", TinySpec(n_layer=1, rope_scaling="yarn", rope_factor=8.0, n_ctx_orig=512, seed=5)
    yield "one-neox", TinySpec("qwen2", n_layer=1, n_embd=256, rope_base=1e6, seed=6)
    yield "qwen2", TinySpec("qwen2", n_embd=256, n_head=4, n_head_kv=1, rope_base=1e6)
    yield "qwen2-yarn", TinySpec("qwen2", n_embd=256, rope_scaling="yarn", rope_factor=4.0, n_ctx_orig=1024)
    yield "qwen3", TinySpec("qwen3", n_head=2, n_head_kv=1, head_dim=128, rope_base=1e6)
    yield "smollm3", TinySpec("smollm3", n_layer=4, why="layer 3 has no RoPE")
    yield "phi3", TinySpec("phi3", n_embd=256, n_head_kv=4, rope_scaling="longrope", n_ctx_orig=512)
    yield "phi3-partial", TinySpec("phi3", n_embd=256, n_rot=32, use=OPTIONAL, why="partial RoPE")
    # attention variants
    yield "gemma2", TinySpec("gemma2", n_swa=96, softcap=5.0, head_dim=128, n_head=2, n_head_kv=1, use=MIXED, why="layer 0 slides")
    yield "gemma2-d256", TinySpec("gemma2", n_swa=96, softcap=5.0, head_dim=256, n_head=2, n_head_kv=1, use=MIXED, why="layer 0 slides")
    yield "gemma3", TinySpec("gemma3", n_layer=3, n_swa=96, swa_pattern=3, rope_base=1e6, use=MIXED, why="layers 0 and 1 slide")
    yield "cohere2", TinySpec("cohere2", n_layer=3, n_embd=256, n_swa=96, swa_layers=(True, False, False), use=MIXED, why="layer 0 slides, the others have no RoPE")
    yield "sinks", TinySpec("granite_swa", n_layer=3, n_swa=96, swa_layers=(True, False, False), use=MIXED, why="layer 0 slides")
    # refusals
    yield "llama-d80", TinySpec(head_dim=80, use=REFUSED, why="head_dim 80")
    yield "llama-d96", TinySpec(head_dim=96, use=REFUSED, why="head_dim 96")
    yield "llama-d32", TinySpec(head_dim=32, use=REFUSED, why="head_dim 32")
    yield "deepseek2", TinySpec("deepseek2", n_head_kv=1, use=REFUSED, why="MLA")
    yield "qwen2vl", TinySpec("qwen2vl", n_embd=256, n_head_kv=1, use=REFUSED, why="multi-section RoPE")
    yield "bloom", TinySpec("bloom", n_head=2, n_head_kv=2, use=REFUSED, why="ALiBi")
    yield "mpt", TinySpec("mpt", n_head=2, n_head_kv=2, use=REFUSED, why="ALiBi")
    yield "mamba", TinySpec("mamba", use=REFUSED, why="recurrent, no attention")
    yield "bert", TinySpec("bert", n_head=2, n_head_kv=2, n_ctx_train=512, use=REFUSED, why="encoder, no cache")
    yield "t5", TinySpec("t5", n_head=2, n_head_kv=2, use=REFUSED, why="relative position bias, encoder")


SPECS: dict[str, TinySpec] = dict(_specs())


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__.split("\n\n")[1].strip(), file=sys.stderr)
        return 2
    unknown = [name for name in argv[1:] if name not in SPECS]
    if unknown:
        print(f"unknown model {unknown[0]}; one of: {' '.join(SPECS)}", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in argv[1:] or SPECS:
        path = write(folder / f"{name}.gguf", SPECS[name], name)
        print(f"{path} {path.stat().st_size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
