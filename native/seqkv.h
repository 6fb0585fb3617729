// libseqkv: the codec of the seqkv KV-cache types in scalar C. It is the oracle of every SIMD, CUDA and Metal kernel.
//
// Notation (design: docs/decisions.md, bytes: native/format.md)
//   position t, frame origin t0 = t - offset, offset = t mod 64 at the time of writing (0..63)
//   R(p)      RoPE rotation by position p
//   k_frame   R(-t0) k_post: a key in the RoPE frame of its origin
//   H         orthonormal Walsh-Hadamard transform of size head_dim
//   key       z = E k_frame - pred,  k_frame = D (z + pred)     E, D = E^-1: transform of the KV head, H without a profile
//                                                               pred = E R(offset) mean: prediction at the key's offset
//   value     z = H (scale * (v - mean)),  v = mean + (H z)/scale
// z is stored as head_dim/64 blocks of 64 values, in order. bits is 1..4 everywhere, graded 0 or 1: the plans of block.h.
//
// Rotation rows: R(p) is given as cs[n_rot] = { cos a_0, sin a_0, cos a_1, sin a_1, ... }, a_i = p * freq_i.
// Pair i is (x[2i], x[2i+1]), or with neox (x[i], x[i + n_rot/2]); values from n_rot on are not rotated.
//
// No function allocates, keeps state or aborts. Buffers are the caller's; lengths are preconditions unless a status is
// returned. head_dim is 64, 128 or 256.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(SEQKV_IN_GGML) || defined(GGML_API)
#    include "ggml.h"
#    define SEQKV_API GGML_API
#else
#    define SEQKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    SEQKV_OK          =  0,
    SEQKV_EBITS       = -1, // bits is not 1, 2, 3 or 4
    SEQKV_ELENGTH     = -2, // n is not a positive multiple of 64, or a buffer is too small
};

// Text of a status, never NULL.
SEQKV_API const char * seqkv_strerror(int64_t status);

// Bytes of n values (n/64 blocks); < 0: a status.
SEQKV_API int64_t seqkv_bound(int bits, int graded, int64_t n);

// x[n] -> n/64 blocks at dst. Returns the bytes written, < 0: a status.
// Non-finite inputs count as 0; magnitudes beyond the gain range saturate. A block's bytes depend on its 64 values alone.
SEQKV_API int64_t seqkv_quantize(int bits, int graded, const float * x, int64_t n, void * dst, int64_t n_dst);

// n/64 blocks at src -> y[n]. Returns the bytes read, < 0: a status. Every byte pattern is a valid block.
SEQKV_API int64_t seqkv_dequantize(int bits, int graded, const void * src, int64_t n_src, float * y, int64_t n);

// Codes of n/64 blocks as bytes codes[n], 0..2^B-1 for a value of B bits (bit 0: the trellis path), and their gains as stored,
// gains[3*(n/64)]: one byte a group, 0 for groups that the plan does not have. Returns the bytes read, < 0: a status.
SEQKV_API int64_t seqkv_unpack(int bits, int graded, const void * src, int64_t n_src, uint8_t * codes, uint8_t * gains, int64_t n);

// x <- H x, n = 2^k.
SEQKV_API void seqkv_fwht(float * x, int n);

// x <- R(p) x, or R(-p) x if inverse. cs: n_rot floats, see above.
SEQKV_API void seqkv_rotate(float * x, const float * cs, int n_rot, int neox, int inverse);

// One key head vector k_frame[head_dim] -> blocks, and back.
// enc, dec: (head_dim, head_dim) row-major E and D, row r of E makes z[r]; NULL: H. pred: (head_dim), NULL: 0.
SEQKV_API void seqkv_encode_key(int bits, int graded, const float * k_frame, int head_dim, const float * enc, const float * pred,
                                void * dst);
SEQKV_API void seqkv_decode_key(int bits, int graded, const void * src, int head_dim, const float * dec, const float * pred,
                                float * k_frame);

// One value head vector v[head_dim] -> blocks of the uniform plan, and back. mean, scale: (head_dim), NULL: 0 and 1; scale > 0.
SEQKV_API void seqkv_encode_value(int bits, const float * v, int head_dim, const float * mean, const float * scale, void * dst);
SEQKV_API void seqkv_decode_value(int bits, const void * src, int head_dim, const float * mean, const float * scale, float * v);

// Softmax attention of one query head over n rows: out = sum_j p_j v_j,
// p = softmax(cap(scale * <q, k_j>) + mask_j), with sink (if not NULL) one more logit without a value.
// cap(x) = softcap * tanh(x / softcap) if softcap != 0. mask[n] may be NULL; -INFINITY leaves a row out.
// k (n, dk) and v (n, dv) rows are absolute, i.e. after RoPE. Rows left out are not read. out: dv floats, 0 if nothing is attended.
SEQKV_API void seqkv_attention(const float * q, const float * k, const float * v, const float * mask, int64_t n, int dk, int dv,
                               float scale, float softcap, const float * sink, float * out);

// Token ids without a model: n ids of n_bits bits each (1..32), adaptive, integers alone: the same bytes on every machine. work is
// memory of the caller's, of seqkv_tokens_work() bytes; its contents do not matter. n is at most SEQKV_TOKENS_MAX.
// bound: bytes that suffice for any ids. encode returns the bytes written; decode gives n ids for any bytes (a checksum is
// the caller's) and returns n. < 0: a status.
#define SEQKV_TOKENS_MAX (1 << 27)
SEQKV_API int64_t seqkv_tokens_work (int64_t n, int n_bits);
SEQKV_API int64_t seqkv_tokens_bound(int64_t n, int n_bits);
SEQKV_API int64_t seqkv_tokens_encode(const uint32_t * tokens, int64_t n, int n_bits, void * work, int64_t n_work, void * dst, int64_t n_dst);
SEQKV_API int64_t seqkv_tokens_decode(const void * src, int64_t n_src, int n_bits, void * work, int64_t n_work, uint32_t * tokens, int64_t n);

#ifdef __cplusplus
}
#endif
