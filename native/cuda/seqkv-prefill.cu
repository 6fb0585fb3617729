#include "seqkv-attn.cuh"
bool seqkv_prefill_supported(int, const ggml_tensor *) { return false; }
void seqkv_prefill(ggml_backend_cuda_context &, ggml_tensor *) {}
