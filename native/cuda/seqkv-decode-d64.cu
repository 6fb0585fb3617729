#include "seqkv-decode-kernels.cuh"

template void seqkv_decode_heads<64>(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries);
