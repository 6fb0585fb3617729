// CPU backend of the seqkv ops (ggml-seqkv.h).
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void   ggml_compute_forward_seqkv_frame(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void   ggml_compute_forward_seqkv_store(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void   ggml_compute_forward_seqkv_attn (const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of work buffer of a SEQKV_STORE or SEQKV_ATTN on n_tasks threads
size_t ggml_seqkv_work_size(const struct ggml_tensor * dst, int n_tasks);

#ifdef __cplusplus
}
#endif
