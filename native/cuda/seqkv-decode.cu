// Decode: which kernels. Those of a head_dim are compiled in a file of their own, seqkv-decode-d*.cu.
#include "seqkv-decode-kernels.cuh"

extern template void seqkv_decode_heads< 64>(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries);
extern template void seqkv_decode_heads<128>(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries);
extern template void seqkv_decode_heads<256>(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries);

void seqkv_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame) {
    const ggml_seqkv_params p = seqkv_params(dst);
    const int n_queries = (int) (dst->src[0]->ne[2]/dst->src[1]->ne[2]*dst->src[0]->ne[1]/p.n_head_kv);
    if (seqkv_decode_short(ctx, dst, rows, frame, n_queries)) {
        return;
    }
    switch (p.dk) {
        case 64:  seqkv_decode_heads< 64>(ctx, dst, rows, frame, n_queries); break;
        case 128: seqkv_decode_heads<128>(ctx, dst, rows, frame, n_queries); break;
        default:  seqkv_decode_heads<256>(ctx, dst, rows, frame, n_queries); break;
    }
}

bool seqkv_decode_supported(int device, const ggml_tensor * dst) {
    const auto & info = ggml_cuda_info().devices[device];
    const ggml_seqkv_params p = seqkv_params(dst);
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const int64_t n_queries = q->ne[2]/k->ne[2]*q->ne[1]/p.n_head_kv;
    if (!turing_mma_available(info.cc) || p.dk != p.dv || n_queries > MAX_NQ || p.n_kv == 0 || p.n_rot%4 != 0 ||
            !ggml_seqkv_bits(k->type) || !ggml_seqkv_bits(v->type) || ggml_seqkv_graded(v->type)) {
        return false;
    }
    return (size_t) query_smem(p.dk, true) <= info.smpbo; // decode_kernel takes less, with one KV head a block
}
