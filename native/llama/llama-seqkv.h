// C API of the seqkv KV cache in libllama.
//
// A context uses the cache when type_k or type_v of its llama_context_params is seqkv2, seqkv3 or seqkv4; the other one may be
// any type that can be quantized to on the fly (f16, q8_0, ...). Sliding-window layers are kept in f16. With a profile,
// layers have seqkv types of their own: keys a graded one, and the bits that the profile gives to the layer.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

    struct llama_seqkv_params {
        const char * profile;  // path of a profile GGUF; NULL: none
        const char * model_id; // fingerprint of the model file, at most 64 characters; NULL: not checked. A profile made for another fingerprint is refused
        int32_t      n_sink;   // first positions of a sequence that are kept exact, >= 0
        int32_t      n_window; // last positions of a sequence that are kept exact, >= 0
        bool         any_type; // contexts with any quantized cache type use this cache, so that these get the exact window as well
    };

    LLAMA_API struct llama_seqkv_params llama_seqkv_default_params(void); // no profile, 4, 64, false

    // Set what contexts created from now on with seqkv types use on this model. Strings are copied.
    // Returns 0, or < 0 with one line of text in err: the settings are then as they were.
    LLAMA_API int32_t llama_seqkv_configure(struct llama_model * model, const struct llama_seqkv_params * params, char * err, size_t n_err);

    // 0 if contexts of this model can have these cache types; < 0 with the reason in err.
    LLAMA_API int32_t llama_seqkv_check(const struct llama_model * model, int32_t type_k, int32_t type_v, char * err, size_t n_err);

    // Type ids by name ("seqkv3", "q8_0", ...), -1: unknown. Ids change with upstream; store names.
    LLAMA_API int32_t      llama_seqkv_type(const char * name);
    LLAMA_API const char * llama_seqkv_type_name(int32_t i);    // seqkv types by index 0, 1, ...; NULL: no more
    LLAMA_API double       llama_seqkv_type_bits(int32_t type); // bits per value: 8*sizeof(block)/values; of a context with a profile: llama_seqkv_bits

    // Bytes of a context's KV cache, any type: all buffers, window and tables included; the part of the cells in use; the compute buffers.
    LLAMA_API size_t llama_seqkv_kv_bytes     (const struct llama_context * ctx);
    LLAMA_API size_t llama_seqkv_kv_bytes_used(const struct llama_context * ctx);
    LLAMA_API size_t llama_seqkv_compute_bytes(const struct llama_context * ctx);
    LLAMA_API size_t llama_seqkv_profile_bytes(const struct llama_context * ctx); // tables of the profile, part of kv_bytes

    // Bits per value of K and V of a context's seqkv cache, window and tables not counted; 0: it has no seqkv cache.
    LLAMA_API double llama_seqkv_bits(const struct llama_context * ctx);

    // State of the positions p0..p1-1 of a sequence alone, p0 < p1, in the format of llama_state_seq_get_data behind its first 8 bytes,
    // in the order of the positions: what a session store saves piece by piece. exact: with the exact rows that are held for them. For memories
    // that are one KV cache with full attention, of any types.
    // Returns the bytes needed; they were written if size suffices (buf NULL, size 0: none). < 0 with the reason in err: another
    // kind of memory, or a position that the sequence does not have.
    LLAMA_API int64_t llama_seqkv_range_get(struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool exact,
            void * buf, size_t size, char * err, size_t n_err);

    // Effective RoPE of layer il with all scaling applied: freq[i] is the angle per position of pair i, *neox the pairing
    // (1: i and i + n_rot/2, 0: 2i and 2i + 1). Returns n_rot/2 (also if n is smaller: then only n are written), 0: no rotation, < 0: no such layer.
    LLAMA_API int32_t llama_seqkv_rope(const struct llama_context * ctx, int32_t il, float * freq, int32_t n, int32_t * neox);

    // Queries, keys and values of a running model, as its attention reads and its cache stores them.
    // All rows f32 and contiguous, in the order of the ubatch's tokens, valid only during the call.
    struct llama_seqkv_rows {
        int32_t       il;        // layer
        int32_t       n_tokens;  // of the ubatch
        int32_t       n_head;    // query heads; query head i reads KV head i/(n_head/n_head_kv)
        int32_t       n_head_kv;
        int32_t       dk;        // values per key
        int32_t       dv;        // values per value row
        const float * q;         // (n_tokens, n_head,    dk), after RoPE
        const float * k;         // (n_tokens, n_head_kv, dk), after RoPE
        const float * v;         // (n_tokens, n_head_kv, dv)
        const float * x2;        // (n_tokens) |x|^2 of the layer's input; NULL: not found
        float         scale;     // attention score of q and k: scale*<q,k>,
        float         softcap;   // or softcap*tanh(scale*<q,k>/softcap) if this is not 0
    };

    // Returns false to stop.
    typedef bool (*llama_seqkv_rows_t)(void * user, const struct llama_seqkv_rows * rows);

    // Hands the rows of every layer with full attention to a function: one call per layer and ubatch, in layer order.
    // Create a context with one sequence, f16 cache, flash attention, llama_seqkv_collect as cb_eval and the collector as
    // cb_eval_user_data, and decode. Memory: the rows of one layer and ubatch. A layer that reads another layer's cache is
    // not reported. After a stop llama_decode skips the rest and returns as if it had succeeded: its results are undefined.
    struct llama_seqkv_collector;
    LLAMA_API struct llama_seqkv_collector * llama_seqkv_collector_init(const struct llama_model * model, llama_seqkv_rows_t rows, void * user); // NULL: no model or function
    LLAMA_API void    llama_seqkv_collector_free(struct llama_seqkv_collector * collector);
    LLAMA_API int32_t llama_seqkv_collector_n_layer(const struct llama_seqkv_collector * collector); // layers that it reports
    LLAMA_API bool    llama_seqkv_collect(struct ggml_tensor * t, bool ask, void * collector);
    // To be called after llama_decode. Returns the number of tokens that were reported of each layer since the last call;
    // 0 if the function stopped it; < 0 with the reason in err if a layer's rows were not found.
    LLAMA_API int32_t llama_seqkv_collector_finish(struct llama_seqkv_collector * collector, char * err, size_t n_err);

#ifdef __cplusplus
}
#endif
