// Attention: what its paths share.
#pragma once

#include "seqkv-common.cuh"

// The op as kernels see it. Strides in bytes; s: stream, t: token of a stream, h: KV head, j: row of the virtual axis.
struct seqkv_view {
    ggml_seqkv_params p;
    seqkv_rot    rot;
    seqkv_tables tables;

    const char * q;       int64_t q_nb1, q_nb2;
    const char * k;       int64_t k_nb1, k_nb2;
    const char * v;       int64_t v_nb1, v_nb2;
    const char * win;     int64_t win_nb1, win_nb2;
    half * cur;
    // NULL, or keys and values of the ubatch, (head_dim, heads, tokens) floats: their frame rows are made by the exact parts and not by a FRAME before
    const char * k_new;   int64_t k_new_nb1, k_new_nb2;
    const char * v_new;   int64_t v_new_nb1, v_new_nb2;
    const char * mask;    int64_t mask_nb1, mask_nb3;
    const float * sinks;  // NULL: none
    const int32_t * meta; // (n_stream, n_virt)
    float * dst;          // (tokens, n_head, dv)

    ggml_type type_k, type_v;
    int bits_k, graded_k, bits_v, form_k, form_v;
    int size_k, size_v;   // bytes of a head's cell
    int n_head, group, n_stream, n_tokens, n_virt; // tokens per stream
    int inv_group;        // 2^16/group, rounded up

    __device__ __forceinline__ const char * cell_k(int s, int64_t j, int h) const { return k + s*k_nb2 + j*k_nb1 + h*size_k; }
    __device__ __forceinline__ const char * cell_v(int s, int64_t j, int h) const { return v + s*v_nb2 + j*v_nb1 + h*size_v; }
    __device__ __forceinline__ half * cur_row(int s, int t) const { return cur + ((int64_t) s*n_tokens + t)*p.n_head_kv*(p.dk + p.dv); }
    __device__ __forceinline__ const half * exact(int s, int64_t j) const {
        return j < p.n_kv + p.n_win ? (const half *) (win + s*win_nb2 + (j - p.n_kv)*win_nb1) : cur_row(s, (int) j - p.n_kv - p.n_win);
    }
    __device__ __forceinline__ const float * query(int s, int t, int head) const {
        return (const float *) (q + head*q_nb1 + ((int64_t) s*n_tokens + t)*q_nb2);
    }
    // iq/group, for a query iq < 256 of a KV head: (token, head of its group). A division takes long in a short kernel.
    __device__ __forceinline__ int token_of(int iq) const { return iq*inv_group >> 16; }
    __device__ __forceinline__ const float * query_of(int s, int h, int iq) const {
        const int t = token_of(iq);
        return query(s, t, h*group + iq - t*group);
    }
    __device__ __forceinline__ const half * mask_row(int s, int t) const { return (const half *) (mask + s*mask_nb3 + t*mask_nb1); }
};

seqkv_view seqkv_view_of(const ggml_tensor * dst, const ggml_tensor * frame = nullptr); // frame: a FRAME that was not run

// logits: scale and softcap
SEQKV_FN float seqkv_logit(float dot, const ggml_seqkv_params & p) {
    const float s = dot*p.scale;
    if (p.softcap == 0.0f) {
        return s;
    }
    return p.softcap*(1.0f - 2.0f/(__expf(2.0f*s/p.softcap) + 1.0f)); // not tanhf: with fast math that has 11 bits
}

// Partial results of a query row (token, head): part c of n_parts at ((token*n_head + head)*n_parts + c)
//   ml: running maximum, sum of p. acc: sum of p v, (dv) floats; parts from n_z on are sums in the value domain, those before n_z sums
//   over transformed values, in the order of the permutation seqkv_stored_value if they are permuted
struct seqkv_parts {
    float2 * ml;
    float  * acc;
    int      n_parts, n_z, permuted;
};

// all parts -> dst; rows: STORE of the window's rows, or NULL
void seqkv_combine(ggml_backend_cuda_context & ctx, const seqkv_view & a, const seqkv_parts & parts, const ggml_tensor * rows);

// Decode straight from blocks on tensor cores. frame: NULL, or FRAME of the ubatch, which is left to it. Then nothing in this graph writes cells.
bool seqkv_decode_supported(int device, const ggml_tensor * dst);
void seqkv_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame);

// Prefill: rows expanded to f16, then upstream's kernels.
bool seqkv_prefill_supported(int device, const ggml_tensor * dst);
void seqkv_prefill(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
