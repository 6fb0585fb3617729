// What the Metal kernels and their host code share: constants of a pipeline and arguments. Plain C, included by both.
#pragma once

#ifdef __METAL_VERSION__
#define SEQKV_TABLE constant // of tables.h, which follows
#endif

// How a cell stores values
enum seqkv_cell {
    SEQKV_CELL_BLOCKS, // the seqkv types
    SEQKV_CELL_F32, SEQKV_CELL_F16, SEQKV_CELL_BF16,
    SEQKV_CELL_Q8_0, SEQKV_CELL_Q4_0, SEQKV_CELL_Q4_1, SEQKV_CELL_Q5_0, SEQKV_CELL_Q5_1, SEQKV_CELL_IQ4_NL,
};

// In which domain
enum seqkv_form {
    SEQKV_PLAIN,    // as they are
    SEQKV_HADAMARD, // of H: quantized types
    SEQKV_DENSE,    // of E, a prediction subtracted: graded types with a profile
};

// Function constants: FC_SEQKV + one of these. STORE has the part that it writes as K.
#define FC_SEQKV 9000
enum seqkv_fc {
    SEQKV_FC_DK, SEQKV_FC_CELL_K, SEQKV_FC_BITS_K, SEQKV_FC_GRADED_K, SEQKV_FC_FORM_K,
    SEQKV_FC_DV, SEQKV_FC_CELL_V, SEQKV_FC_BITS_V, SEQKV_FC_FORM_V,
    SEQKV_FC_HEADS, // query heads that a threadgroup of decode serves at once
    SEQKV_FC_COUNT,
};

#define SEQKV_MAX_D        256
#define SEQKV_MAX_HEADS    8    // of SEQKV_FC_HEADS
#define SEQKV_QUERY_SIZE   6144 // values of the query vectors that a threadgroup transforms; D is read once for them
#define SEQKV_DECODE_SG    4    // simdgroups of a threadgroup of decode, each with a frame of rows at a time
#define SEQKV_DECODE_TILE  2048 // values of the rows that a simdgroup unpacks at a time
#define SEQKV_STORE_SG     4    // simdgroups of a threadgroup of STORE
#define SEQKV_EXPAND_ROWS  8    // rows that a threadgroup expands
#define SEQKV_TILE         32   // rows that a simdgroup of prefill attends to at a time
#define SEQKV_PREFILL_SG   4    // tiles of 8 queries, one a simdgroup, of a threadgroup of prefill

// query vectors that a threadgroup transforms: a multiple of 8
#define SEQKV_QUERY_COLS(dk) ((dk) > 128 ? SEQKV_QUERY_SIZE/256 : SEQKV_QUERY_SIZE/128)

// threadgroup memory of a tile of prefill: queries (8, dk) f16, logits (8, TILE) and factors (8, 8) f32
#define SEQKV_PREFILL_BYTES(dk) (8*(dk)*2 + 8*SEQKV_TILE*4 + 64*4)

// FRAME and STORE. Sizes in elements, strides in bytes.
typedef struct {
    int32_t  n_head_kv, dk, dv;
    int32_t  n_virt, first, n_tokens; // of meta: rows a stream, the first one of the ubatch, tokens a stream
    int32_t  n_rot, neox, rot_stride;
    int32_t  head_size, is_key, has_prof; // STORE: bytes of a head's cell
    uint64_t k_nb1, k_nb2, v_nb1, v_nb2;  // FRAME
    uint64_t nb1;                         // STORE: of a cell's row, of the window's row
} ggml_metal_kargs_seqkv_store;

// ATTN. Chunk: the query heads of one KV head that are served at once. Part: rows of the virtual axis that one threadgroup of decode attends to.
typedef struct {
    int32_t  n_head_kv, group, n_chunks;
    int32_t  n_stream, n_tokens;          // tokens a stream
    int32_t  n_kv, n_win, n_virt, n_frames;
    int32_t  n_rot, neox, rot_stride;
    int32_t  has_prof, has_sinks;
    int32_t  size_k, size_v;              // bytes of a head's cell
    int32_t  part_rows, n_parts, n_cells; // decode: n_cells parts over cells, the others over exact rows
    int32_t  j0, j1, pad;                 // prefill: rows [j0, j1) of the virtual axis, in scratch up to a multiple of TILE
    float    scale, softcap;
    uint64_t q_nb1, q_nb2, k_nb1, k_nb2, v_nb1, v_nb2, win_nb1, win_nb2, mask_nb1, mask_nb3;
} ggml_metal_kargs_seqkv_attn;
