// The seqkv ops (ggml-seqkv.h) on CUDA. Called by ggml-cuda.cu.
#pragma once

#include "../../ggml-cuda/common.cuh"
#include "../../ggml-backend-impl.h"

void ggml_cuda_seqkv_frame(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_seqkv_store(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// rows: the STORE of the window's rows that follows, to be done as well; NULL: none. frame: FRAME of the ubatch, if it was not run
void ggml_cuda_seqkv_attn (ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_tensor * rows = nullptr, const ggml_tensor * frame = nullptr);

// Runs node i with those after it that go in the same launches. Returns how many of these are done, 0: nothing was run.
int ggml_cuda_seqkv_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Launches what ggml_cuda_seqkv_fuse left for later, if the last attention did not, and waits for it. At the end of every graph.
void ggml_cuda_seqkv_finish(ggml_backend_cuda_context & ctx);

// Keeps alive what is read later.
void ggml_cuda_seqkv_optimize(const ggml_cgraph * graph, ggml_backend_graph_optimize_params * params);

// FRAME, STORE, ATTN: exactly what the functions above can do. Sources may be missing: then only what is there is asked about.
bool ggml_cuda_seqkv_supported(int device, const ggml_tensor * op);
