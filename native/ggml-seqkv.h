// The three ggml ops of the seqkv cache. They work on frame rows and on a virtual KV axis.
//
// Frame row: one token's K and V in f16, keys rotated to the origin of their frame: [n_head_kv*dk | n_head_kv*dv].
// Virtual KV axis of a stream, n_virt = n_kv + n_win + n_cur rows:
//     [0, n_kv)              cells of the cache: blocks
//     [n_kv, n_kv + n_win)   exact window: frame rows kept in f16 (sinks and the last tokens of each sequence)
//     [.., n_virt)           the tokens of this ubatch: frame rows
// The mask says for every query which rows it attends to; a cell and its exact row are never both attended to.
//
// Graph inputs, the same for all layers of a cache:
//     rot      F32 [n_rot, 64 + n_frames, n_sets]  rotation rows R(p) as in seqkv.h: rows 0..63 by the offsets, then by the frame origins.
//                                                  One set for each distinct set of RoPE frequencies in the model.
//     meta     I32 [n_virt, n_stream]              row of rot with the origin << 8 | offset; -1: an empty row
//     mask     F16 [n_virt, n_tokens/n_stream, 1, n_stream]  0 or -inf
// Constant of a layer:
//     prof     F32 [n_head_kv*(dk + dv)]           key means, then value means, head-major; NULL: no profile
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_SEQKV_MAX_GROUP 64 // query heads per KV head

enum ggml_seqkv_part { GGML_SEQKV_KEY = 0, GGML_SEQKV_VALUE = 1, GGML_SEQKV_ROW = 2 };

// op_params of all three ops
struct ggml_seqkv_params {
    int32_t dk, dv, n_head_kv;      // head dims, KV heads
    int32_t n_rot, neox, rot_set;   // rotated dims, pairing, set of rot
    int32_t part;                   // STORE: enum ggml_seqkv_part
    int32_t n_kv, n_win;            // cells and window rows of the virtual axis
    float   scale, softcap;         // ATTN
};

// bits of a seqkv type: 2, 3, 4; 0: another type
GGML_API int ggml_seqkv_bits(enum ggml_type type);

// rows of blocks for the type traits, n a multiple of 64
GGML_API void quantize_row_seqkv2  (const float * x, void * y, int64_t n);
GGML_API void quantize_row_seqkv3  (const float * x, void * y, int64_t n);
GGML_API void quantize_row_seqkv4  (const float * x, void * y, int64_t n);
GGML_API void dequantize_row_seqkv2(const void * x, float * y, int64_t n);
GGML_API void dequantize_row_seqkv3(const void * x, float * y, int64_t n);
GGML_API void dequantize_row_seqkv4(const void * x, float * y, int64_t n);

// Frame rows of a ubatch.
//   k F32 [dk, n_head_kv, n_tokens], v F32 [dv, n_head_kv, n_tokens]  ->  F16 [n_head_kv*(dk + dv), n_tokens]
GGML_API struct ggml_tensor * ggml_seqkv_frame(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_seqkv_params params);

// Write one part of frame rows into a cache; rows with idxs < 0 are left out.
//   dst [row, n_rows] any type with from_float; cur: frame rows; idxs I64 [n_tokens]: row of dst
//   GGML_SEQKV_KEY:   seqkv types: mean subtracted, transformed, coded; other types: the frame key as it is
//   GGML_SEQKV_VALUE: likewise
//   GGML_SEQKV_ROW:   the whole frame row is copied, dst F16
GGML_API struct ggml_tensor * ggml_seqkv_store(struct ggml_context * ctx, struct ggml_tensor * dst, struct ggml_tensor * cur,
        struct ggml_tensor * idxs, struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_tensor * prof,
        struct ggml_seqkv_params params);

// Attention over the virtual axis.
//   q F32 [dk, n_head, n_tokens]; k, v [row, n_kv, n_stream]; mask; sinks F32 [n_head] or NULL;
//   win F16 [frame row, n_win, n_stream]; cur F16 [frame row, n_tokens]  ->  F32 [dv, n_head, n_tokens]
GGML_API struct ggml_tensor * ggml_seqkv_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * mask, struct ggml_tensor * sinks, struct ggml_tensor * win,
        struct ggml_tensor * cur, struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_tensor * prof,
        struct ggml_seqkv_params params);

#ifdef __cplusplus
}
#endif
