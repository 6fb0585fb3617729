// C API of the seqkv KV cache in libllama.
//
// A context uses the cache when type_k or type_v of its llama_context_params is a seqkv type; the other one may be any
// type that can be quantized to on the fly (f16, q8_0, ...). Sliding-window layers are kept in f16.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

    struct llama_seqkv_params {
        const char * profile;  // path of a profile GGUF; NULL: no means are subtracted
        const char * model_id; // fingerprint of the model file, at most 64 characters; NULL: not checked. A profile made for another fingerprint is refused
        int32_t      n_sink;   // first positions of a sequence that are kept exact, >= 0
        int32_t      n_window; // last positions of a sequence that are kept exact, >= 0
    };

    LLAMA_API struct llama_seqkv_params llama_seqkv_default_params(void); // no profile, 4, 64

    // Set what contexts created from now on with seqkv types use on this model. Strings are copied.
    // Returns 0, or < 0 with one line of text in err: the settings are then as they were.
    LLAMA_API int32_t llama_seqkv_configure(struct llama_model * model, const struct llama_seqkv_params * params, char * err, size_t n_err);

    // 0 if contexts of this model can have these cache types; < 0 with the reason in err.
    LLAMA_API int32_t llama_seqkv_check(const struct llama_model * model, int32_t type_k, int32_t type_v, char * err, size_t n_err);

    // Type ids by name ("seqkv3", "q8_0", ...), -1: unknown. Ids change with upstream; store names.
    LLAMA_API int32_t      llama_seqkv_type(const char * name);
    LLAMA_API const char * llama_seqkv_type_name(int32_t i);    // seqkv types by index 0, 1, ...; NULL: no more
    LLAMA_API double       llama_seqkv_type_bits(int32_t type); // bits per value: 8*sizeof(block)/values

    // Bytes of a context's KV cache, any type: all buffers, window and tables included; the part of the cells in use; the compute buffers.
    LLAMA_API size_t llama_seqkv_kv_bytes     (const struct llama_context * ctx);
    LLAMA_API size_t llama_seqkv_kv_bytes_used(const struct llama_context * ctx);
    LLAMA_API size_t llama_seqkv_compute_bytes(const struct llama_context * ctx);

    // Effective RoPE of layer il with all scaling applied: freq[i] is the angle per position of pair i, *neox the pairing
    // (1: i and i + n_rot/2, 0: 2i and 2i + 1). Returns n_rot/2 (also if n is smaller: then only n are written), 0: no rotation, < 0: no such layer.
    LLAMA_API int32_t llama_seqkv_rope(const struct llama_context * ctx, int32_t il, float * freq, int32_t n, int32_t * neox);

    // Statistics for a profile. Create a context with f16 cache, flash attention, llama_seqkv_collect as cb_eval and the collector
    // as cb_eval_user_data; bind; decode one sequence in order from position 0. The first n_skip positions are left out.
    struct llama_seqkv_collector;
    LLAMA_API struct llama_seqkv_collector * llama_seqkv_collector_init(const struct llama_model * model, int32_t n_skip);
    LLAMA_API void    llama_seqkv_collector_free(struct llama_seqkv_collector * collector);
    LLAMA_API int32_t llama_seqkv_collector_bind(struct llama_seqkv_collector * collector, const struct llama_context * ctx); // 0, < 0: another model
    LLAMA_API bool    llama_seqkv_collect(struct ggml_tensor * t, bool ask, void * collector);
    // Means of layer il over the positions seen: k_mean of R(-t) k_post, v_mean of v, both (n_head_kv, head_dim).
    // At most *n_k and *n_v floats are written, then these are set to the full counts. Returns the number of positions, 0: none seen.
    LLAMA_API int64_t llama_seqkv_collector_layer(const struct llama_seqkv_collector * collector, int32_t il,
                                                  float * k_mean, float * v_mean, int32_t * n_k, int32_t * n_v);

#ifdef __cplusplus
}
#endif
