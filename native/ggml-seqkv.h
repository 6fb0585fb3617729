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
//     mask     F16 [>= n_virt, n_tokens/n_stream, 1, n_stream]  0 or -inf; behind n_virt -inf
// Constant of a layer:
//     prof     F16 [n_head_kv*ggml_seqkv_prof_stride]  tables of the profile, see there; NULL: no profile
//
// What a cell holds depends on its type:
//     graded seqkv types (keys)     blocks of z = E k_frame - E R(offset) mean; without a profile of z = H k_frame
//     seqkv types, keys             blocks of z = H k_frame
//     seqkv types, values           blocks of z = H (scale*(v - mean)), mean and scale of the profile; without: 0 and 1
//     other quantized types         z = H k_frame, z = H v in their own blocks
//     f16, bf16, f32                k_frame and v as they are
// H: orthonormal Hadamard transform of a whole head.
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
    int32_t stored_before;          // 1: no query attends to a cell that its own graph stores, so that STORE and ATTN need no order
};

// The types: X(enum suffix, name, bits, graded)
#define GGML_SEQKV_TYPES(X) \
    X(SEQKV1,  seqkv1,  1, 0) X(SEQKV2,  seqkv2,  2, 0) X(SEQKV3,  seqkv3,  3, 0) X(SEQKV4,  seqkv4,  4, 0) \
    X(SEQKV1K, seqkv1k, 1, 1) X(SEQKV2K, seqkv2k, 2, 1) X(SEQKV3K, seqkv3k, 3, 1) X(SEQKV4K, seqkv4k, 4, 1)

#define GGML_SEQKV_CASE(type, name, bits, graded) case GGML_TYPE_##type:
#define GGML_SEQKV_CASES GGML_SEQKV_TYPES(GGML_SEQKV_CASE)

// entries of the tables of type traits; the first one needs block.h
#define GGML_SEQKV_TRAITS(type, name, bits, graded) \
    [GGML_TYPE_##type] = { \
        .type_name      = #name, \
        .blck_size      = SEQKV_BLOCK, \
        .type_size      = sizeof(block_##name), \
        .is_quantized   = true, \
        .to_float       = dequantize_row_##name, \
        .from_float_ref = quantize_row_##name, \
    },
#define GGML_SEQKV_TYPE_TRAITS GGML_SEQKV_TYPES(GGML_SEQKV_TRAITS)

#define GGML_SEQKV_TRAITS_CPU(type, name, bits, graded) [GGML_TYPE_##type] = { .from_float = quantize_row_##name },
#define GGML_SEQKV_TYPE_TRAITS_CPU GGML_SEQKV_TYPES(GGML_SEQKV_TRAITS_CPU)

// bits of a seqkv type: 1, 2, 3, 4; 0: another type
GGML_API int  ggml_seqkv_bits  (enum ggml_type type);
// a seqkv type of keys with a profile
GGML_API bool ggml_seqkv_graded(enum ggml_type type);
// the type of given bits, 1 to 4
GGML_API enum ggml_type ggml_seqkv_type(int bits, bool graded);

// rows of blocks for the type traits, n a multiple of 64
#define GGML_SEQKV_ROWS(type, name, bits, graded) \
    GGML_API void quantize_row_##name  (const float * x, void * y, int64_t n); \
    GGML_API void dequantize_row_##name(const void * x, float * y, int64_t n);
GGML_SEQKV_TYPES(GGML_SEQKV_ROWS)

// Values of one KV head in prof, head-major:
//     enc (dk, dk)   E, row-major
//     dec (dk, dk)   D, the inverse of E
//     pred (64, dk)  E R(offset) mean by offset
//     v_mean (dv), v_scale (dv)
static inline int64_t ggml_seqkv_prof_stride(int64_t dk, int64_t dv) { return 2*dk*dk + 64*dk + 2*dv; }

// Frame rows of a ubatch.
//   k F32 [dk, n_head_kv, n_tokens], v F32 [dv, n_head_kv, n_tokens]  ->  F16 [n_head_kv*(dk + dv), n_tokens]
GGML_API struct ggml_tensor * ggml_seqkv_frame(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_seqkv_params params);

// Write one part of frame rows into a cache; rows with idxs < 0 are left out.
//   dst [row, n_rows] any type with from_float; cur: frame rows; idxs I64 [n_tokens]: row of dst
//   GGML_SEQKV_KEY, GGML_SEQKV_VALUE: what a cell holds, see above
//   GGML_SEQKV_ROW: the whole frame row is copied, dst F16
GGML_API struct ggml_tensor * ggml_seqkv_store(struct ggml_context * ctx, struct ggml_tensor * dst, struct ggml_tensor * cur,
        struct ggml_tensor * idxs, struct ggml_tensor * meta, struct ggml_tensor * prof, struct ggml_seqkv_params params);

// Attention over the virtual axis.
//   q F32 [dk, n_head, n_tokens]; k, v [row, n_kv, n_stream]; mask; sinks F32 [n_head] or NULL;
//   win F16 [frame row, n_win, n_stream]; cur F16 [frame row, n_tokens]  ->  F32 [dv, n_head, n_tokens]
GGML_API struct ggml_tensor * ggml_seqkv_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * mask, struct ggml_tensor * sinks, struct ggml_tensor * win,
        struct ggml_tensor * cur, struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_tensor * prof,
        struct ggml_seqkv_params params);

// Inputs of a graph that is computed again and again, of which little changes: their copies on other backends are kept and get the bytes [begin, end) alone.
// What an input holds has a version, 1 and up; the change is from version base to this one (0: all of it may have changed).
GGML_API void ggml_seqkv_keep_input(struct ggml_tensor * input); // when the graph is built
GGML_API bool ggml_seqkv_is_kept   (const struct ggml_tensor * input);
GGML_API void ggml_seqkv_set_change(struct ggml_tensor * input, int32_t version, int32_t base, size_t begin, size_t end);
// Brings the version of a copy up to that of a kept input. Returns whether the bytes [*begin, *end) are all that the caller has to copy; otherwise it is everything
GGML_API bool ggml_seqkv_take_change(const struct ggml_tensor * input, struct ggml_tensor * copy, size_t * begin, size_t * end);

#ifdef __cplusplus
}
#endif
