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
    SEQKV_ESHAPE      = -3, // heads, head_dim, tokens, offsets or copies are out of their ranges
    SEQKV_EDATA       = -4, // coded bytes that no encoder has written
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

// ---- Lossless coding of live blocks, integers only: the same bytes on every machine (native/format.md, "Stored frames")
//
// One call codes one layer of one frame: the keys and values of up to 64 tokens at consecutive positions. A value is
// predicted, its level then coded given the prediction. What is predicted from is decoded first:
//     K  the previous layer's K and V (if there is one)         V  the same, and this layer's K
//     both  the token's copy: a token of an earlier frame after the same tokens
// Predictions of keys are made before RoPE, in x = R(-offset) D' z, D' the rows of D scaled to unit length in pairs.
// Numbers are fixed-point, 2^-7 of what the profile makes unit variance.

#define SEQKV_COPY_CLASSES 7    // 0: no copy; 1..6: the same 1, 2, 3.., 5.., 9.., 17.. tokens end there
#define SEQKV_GAIN_TERMS   8    // numbers of a gain's predictor
#define SEQKV_MAX_INPUTS   4096 // inputs of a prediction

// Constants of a layer. Heads are KV heads.
typedef struct {
    int32_t n_head;
    int32_t dk, dv;             // head_dim of K and V: 64, 128, 256
    int32_t n_rot, neox;        // RoPE as above; n_rot 0: none
    const int16_t * rope;       // (64, n_rot) 2^14 (cos, sin) of offset 0..63
    const int16_t * k_encode;   // (n_head, dk, dk) 2^k_shift E', x -> z
    const int16_t * k_decode;   // (n_head, dk, dk) 2^13 D', z -> R(offset) x
    const uint8_t * k_shift;    // (n_head) 0..11
    const uint8_t * v_gain;     // (n_head) gain of uniform blocks that counts as 1
} seqkv_layer;

// Predictor of the K or the V of a layer; n values in a row.
typedef struct {
    const int8_t   * weight;      // (n, inputs), NULL: 0 is predicted. Inputs: previous layer's x and z of V, then this layer's x
    const uint16_t * step;        // (n) 2^-16: prediction = step * <weight, inputs>
    const uint8_t  * spread;      // (n) of z around its prediction at gain 1: 2^((spread - 128)/16)
    const uint8_t  * copy;        // (SEQKV_COPY_CLASSES) 2^-7: share of the copy, 0..128
    const int8_t   * copy_error;  // (SEQKV_COPY_CLASSES) 2^-7: share of what the prediction missed at the copy
    const int8_t   * copy_spread; // (SEQKV_COPY_CLASSES) added to spread
    const int32_t  * gain;        // (groups of a row, SEQKV_GAIN_TERMS), see format.md
} seqkv_predictor;

// One layer of a frame. Rows are a token's blocks, one after the other: keys graded, values uniform.
typedef struct {
    int32_t n_past, n;            // tokens before the frame and in it, n = 1..64
    int32_t k_bits, v_bits;       // of this layer
    int32_t prev_k_bits, prev_v_bits;
    const uint8_t * offset;       // (n_past + n) 0..63
    const int32_t * source;       // (n) token copied from, 0..n_past-1; not read where match is 0
    const uint8_t * match;        // (n) class of the copy
    const uint8_t * k_past, * v_past; // (n_past, row) of this layer
    const uint8_t * prev_k, * prev_v; // (n_past + n, row) of the previous layer
} seqkv_frame;

// The transforms of a head: enc (n, n) = E -> k_encode, k_decode, k_shift. work: 2*n*n doubles.
// Computed in IEEE doubles in a fixed order: equal on every machine. SEQKV_ESHAPE: n, n_rot, or E has no inverse.
SEQKV_API int64_t seqkv_delta_transform(const float * enc, int n, int n_rot, int neox, int16_t * k_encode, int16_t * k_decode,
                                        uint8_t * k_shift, double * work);

// Inputs that a row of blocks gives: k (n_rows, row) -> x (n_rows, n_head*dk), v (n_rows, row) -> z (n_rows, n_head*dv).
// offset (n_rows). k or v may be NULL.
SEQKV_API int64_t seqkv_delta_inputs(const seqkv_layer * layer, int k_bits, int v_bits, const uint8_t * offset, int64_t n_rows,
                                     const uint8_t * k, const uint8_t * v, int16_t * x, int16_t * z);

// Bytes of work that coding needs (8-byte aligned), and the largest size of a coded layer of a frame; < 0: a status.
// prev: constants of the previous layer, NULL: nothing is predicted from one.
SEQKV_API int64_t seqkv_delta_work(const seqkv_layer * layer, const seqkv_layer * prev);
SEQKV_API int64_t seqkv_delta_bound(const seqkv_layer * layer, int n);

// k, v (n, row) -> bytes at dst. Returns their number, < 0: a status (SEQKV_ELENGTH: n_dst or n_work is too small, SEQKV_EDATA: a
// key block has its reserved bit set).
// The pointers of layer, prev, the predictors and the frame are preconditions, their numbers are checked.
SEQKV_API int64_t seqkv_delta_encode(const seqkv_layer * layer, const seqkv_layer * prev, const seqkv_predictor * pk,
                                     const seqkv_predictor * pv, const seqkv_frame * frame, const uint8_t * k, const uint8_t * v,
                                     uint8_t * dst, int64_t n_dst, void * work, int64_t n_work);

// The inverse: all n_src bytes at src -> k, v. Returns n_src, < 0: a status. Safe on any bytes: SEQKV_EDATA is returned unless
// the coder ends exactly as an encoder begins; k and v then hold valid blocks of no meaning. Bytes damaged by chance are found
// with a probability of 1 - 2^-100, but a checksum of the blocks is what tells that context and bytes belong together.
SEQKV_API int64_t seqkv_delta_decode(const seqkv_layer * layer, const seqkv_layer * prev, const seqkv_predictor * pk,
                                     const seqkv_predictor * pv, const seqkv_frame * frame, uint8_t * k, uint8_t * v,
                                     const uint8_t * src, int64_t n_src, void * work, int64_t n_work);

// w[n] -> bytes, each weight at the cost of its frequency, and back. work: 4*n bytes. Returns the bytes written or read,
// < 0: a status. seqkv_weights_bound: the most that is written.
SEQKV_API int64_t seqkv_weights_bound(int64_t n);
SEQKV_API int64_t seqkv_weights_encode(const int8_t * w, int64_t n, uint8_t * dst, int64_t n_dst, uint32_t * work);
SEQKV_API int64_t seqkv_weights_decode(const uint8_t * src, int64_t n_src, int8_t * w, int64_t n);
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
