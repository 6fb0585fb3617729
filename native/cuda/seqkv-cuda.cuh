// The seqkv ops (ggml-seqkv.h) on CUDA. Called by ggml-cuda.cu.
#pragma once

#include "../../ggml-cuda/common.cuh"

void ggml_cuda_seqkv_frame(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_seqkv_store(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_seqkv_attn (ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// FRAME, STORE, ATTN: exactly what the functions above can do. Sources may be missing: then only what is there is asked about.
bool ggml_cuda_seqkv_supported(int device, const ggml_tensor * op);
