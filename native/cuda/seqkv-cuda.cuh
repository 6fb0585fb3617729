// The seqkv ops (ggml-seqkv.h) on CUDA. Called by ggml-cuda.cu.
#pragma once

#include "../../ggml-cuda/common.cuh"

void ggml_cuda_seqkv_frame(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_seqkv_store(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// rows: the STORE of the window's rows that follows, to be done as well; NULL: none. overlap: the fused write of the cache was launched last
void ggml_cuda_seqkv_attn (ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_tensor * rows = nullptr, bool overlap = false);

// Runs node i with those after it that go in the same launches. Returns how many of these are done, 0: nothing was run.
int ggml_cuda_seqkv_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// FRAME, STORE, ATTN: exactly what the functions above can do. Sources may be missing: then only what is there is asked about.
bool ggml_cuda_seqkv_supported(int device, const ggml_tensor * op);
