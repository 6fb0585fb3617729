// Prefill: rows are expanded to absolute keys and values in f16, then upstream's kernels attend to them.
//
// A block expands 64 rows of a KV head: levels by byte permutes, the inverse transform on tensor cores, the rotation at the end.
// KV heads are done in batches, so that the scratch is bounded however long the context is.
#include "seqkv-attn.cuh"
#include "seqkv-cells.cuh"
#include "seqkv-mma.cuh"

#include "../../ggml-cuda/fattn.cuh"

static constexpr size_t SCRATCH = 256u << 20; // bytes of expanded rows at a time, more only where one KV head needs more
static constexpr int    PAD     = 256;        // upstream's kernels are fastest on multiples of it

static constexpr __host__ __device__ int expand_rows(int d) { return d == 256 ? 32 : 64; }
static constexpr size_t expand_smem(int d) { return (expand_rows(d) + 64)*(d + 8)*sizeof(half) + expand_rows(d)*(d + 4)*sizeof(float); }

// z (ROWS, D + 8) <- cells' values in their own domain; rows that are no cells: 0
template <int D>
static __device__ void decode_rows(const seqkv_view & a, bool is_key, int s, int h, int first, half * z) {
    constexpr int ROWS = expand_rows(D), LD = D + 8, NT = 2*ROWS, NB = D/64;
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt;
    const int bits = is_key ? a.bits_k : a.bits_v, graded = is_key ? a.graded_k : 0;
    for (int item = threadIdx.x; item < ROWS*NB; item += NT) {
        const int r = item%ROWS, b = item/ROWS, j = first + r;
        half2 * dst = (half2 *) (z + r*LD + 64*b);
        if (j >= a.p.n_kv || meta[j] < 0) {
            for (int i = 0; i < 32; ++i) {
                dst[i] = make_half2(0.0f, 0.0f);
            }
            continue;
        }
        const char * cell = is_key ? a.cell_k(s, j, h) : a.cell_v(s, j, h);
        const half * pred = is_key && a.form_k == SEQKV_DENSE ? a.tables.pred(h) + (meta[j] & 255)*D + 64*b : nullptr;
        if (!bits) {
            for (int i = 0; i < 32; ++i) {
                dst[i] = __floats2half2_rn(other_value(is_key ? a.type_k : a.type_v, cell, 64*b + 2*i), other_value(is_key ? a.type_k : a.type_v, cell, 64*b + 2*i + 1));
            }
            continue;
        }
        uint32_t level[16];
        float    factor[3];
        const int skew = (int) (uintptr_t) cell & 3;
        decode_any(bits, graded, (const uint32_t *) (cell - skew), skew + b*((is_key ? a.size_k : a.size_v)/NB), level, factor);
#pragma unroll
        for (int run = 0; run < 4; ++run) {
            const float f = factor[run < 2 ? run : 2];
#pragma unroll
            for (int half8 = 0; half8 < 2; ++half8) {
                const uint4 p = pred ? ((const uint4 *) pred)[2*run + half8] : make_uint4(0, 0, 0, 0);
                uint4 y;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int    i = 8*half8 + 2*j; // value i: word i%4, byte i/4
                    const float2 x = __half22float2(((const half2 *) &p)[j]);
                    ((half2 *) &y)[j] = __floats2half2_rn(x.x + f*(float) (int8_t) (level[4*run + i%4] >> 8*(i/4)),
                                                          x.y + f*(float) (int8_t) (level[4*run + i%4 + 1] >> 8*(i/4)));
                }
                ((uint4 *) dst)[2*run + half8] = y;
            }
        }
    }
    __syncthreads();
}

// out (ROWS, D + 4) <- z M^T, M (D, D) row-major, NULL: the Hadamard transform. chunk: (64, D + 8) scratch
template <int D>
static __device__ void transform_rows(const half * m, const half * z, half * chunk, float * out) {
    constexpr int ROWS = expand_rows(D), LD = D + 8, NT = 2*ROWS;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const float scale = m ? 1.0f : rsqrtf((float) D);
    for (int n0 = 0; n0 < D; n0 += 64) {
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < 64*D/8; i += NT) {
            const int n = i/(D/8), k = i%(D/8)*8;
            if (m) {
                copy_async16(chunk + n*LD + k, m + (n0 + n)*D + k);
            } else {
                *(uint4 *) (chunk + n*LD + k) = hadamard8(n0 + n, k);
            }
        }
        copy_wait();
        __syncthreads();
        float acc[8][4] = {{ 0.0f }};
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            uint32_t x[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[j] = *(const uint32_t *) (z + (16*warp + g + 8*(j & 1))*LD + k + 2*t + 8*(j >> 1));
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const half * b = chunk + (8*n + g)*LD + k + 2*t;
                mma_f16(acc[n], x, *(const uint32_t *) b, *(const uint32_t *) (b + 8));
            }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                *(float2 *) (out + (16*warp + g + 8*e)*(D + 4) + n0 + 8*n + 2*t) = make_float2(scale*acc[n][2*e], scale*acc[n][2*e + 1]);
            }
        }
    }
    __syncthreads();
}

SEQKV_FN float4 unpack4(const half * x) {
    const uint2  u = *(const uint2 *) x;
    const float2 a = __half22float2(*(const half2 *) &u.x), b = __half22float2(*(const half2 *) &u.y);
    return make_float4(a.x, a.y, b.x, b.y);
}
SEQKV_FN uint2 pack4(float4 x) {
    const half2 a = __floats2half2_rn(x.x, x.y), b = __floats2half2_rn(x.z, x.w);
    return make_uint2(*(const uint32_t *) &a, *(const uint32_t *) &b);
}

// values k .. k + 3 of the key of row j before the last rotation. z, out: the row in its own domain, transformed
template <int D> SEQKV_FN float4 key_values(const seqkv_view & a, int s, int h, int j, const half * z, const float * out, int k) {
    return j >= a.p.n_kv ? unpack4(a.exact(s, j) + h*D + k) : a.form_k == SEQKV_PLAIN ? unpack4(z + k) : *(const float4 *) (out + k);
}

// Rows of the virtual axis and of its padding -> k_out, v_out (n_stream, heads of the batch, n_rows, D). blockIdx: (rows, head, stream)
template <int D>
static __global__ void __launch_bounds__(2*expand_rows(D)) expand_f16_kernel(seqkv_view a, int h0, int n_rows, half * k_out, half * v_out) {
    constexpr int ROWS = expand_rows(D), LD = D + 8, NT = 2*ROWS;
    extern __shared__ __align__(16) half smem_h[];
    half  * z     = smem_h;                      // (ROWS, LD)
    half  * chunk = z + ROWS*LD;                 // (64, LD)
    float * out   = (float *) (chunk + 64*LD);   // (ROWS, D + 4)

    const int h = h0 + blockIdx.y, s = blockIdx.z, first = blockIdx.x*ROWS;
    const int64_t at = (((int64_t) s*gridDim.y + blockIdx.y)*n_rows + first)*D;
    const bool cells = first < a.p.n_kv;
    __shared__ int32_t used[ROWS]; // meta of the rows
    for (int r = threadIdx.x; r < ROWS; r += NT) {
        used[r] = first + r < a.n_virt ? a.meta[(int64_t) s*a.n_virt + first + r] : -1;
    }
    __syncthreads();

    if (cells) {
        decode_rows<D>(a, true, s, h, first, z);
        if (a.form_k != SEQKV_PLAIN) {
            transform_rows<D>(a.form_k == SEQKV_DENSE ? a.tables.dec(h) : nullptr, z, chunk, out);
        }
    }
    // 4 values of a row by a thread, always the same ones
    const int c = threadIdx.x%(D/4)*4, r0 = threadIdx.x/(D/4), half_rot = a.p.n_rot/2;
    if (a.p.n_rot % 8 == 0 && a.rot.stride % 4 == 0) {
        const bool rotated = c < a.p.n_rot, second = a.p.neox && c >= half_rot;
        const int  partner = !rotated ? c : !a.p.neox ? c : second ? c - half_rot : c + half_rot;
        const int  pair    = !a.p.neox ? c/2 : second ? c - half_rot : c;
#pragma unroll 4
        for (int r = r0; r < ROWS; r += NT/(D/4)) {
            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (used[r] >= 0) {
                x = key_values<D>(a, s, h, first + r, z + r*LD, out + r*(D + 4), c);
                if (rotated) {
                    const float4 * cs = (const float4 *) (a.rot.origin(used[r]) + 2*pair);
                    const float4 u = cs[0];
                    if (a.p.neox) {
                        const float4 y = key_values<D>(a, s, h, first + r, z + r*LD, out + r*(D + 4), partner), v = cs[1];
                        const float  f = second ? 1.0f : -1.0f;
                        x = make_float4(x.x*u.x + f*y.x*u.y, x.y*u.z + f*y.y*u.w, x.z*v.x + f*y.z*v.y, x.w*v.z + f*y.w*v.w);
                    } else {
                        x = make_float4(x.x*u.x - x.y*u.y, x.x*u.y + x.y*u.x, x.z*u.z - x.w*u.w, x.z*u.w + x.w*u.z);
                    }
                }
            }
            *(uint2 *) (k_out + at + r*D + c) = pack4(x);
        }
    } else {
        for (int i = threadIdx.x; i < ROWS*D; i += NT) {
            const int r = i/D, k = i%D;
            float x = 0.0f;
            if (used[r] >= 0) {
                const auto value = [&](int k) {
                    const float4 v = key_values<D>(a, s, h, first + r, z + r*LD, out + r*(D + 4), k & ~3);
                    return k%4 == 0 ? v.x : k%4 == 1 ? v.y : k%4 == 2 ? v.z : v.w;
                };
                x = value(k);
                if (k < a.p.n_rot) {
                    const bool   second = a.p.neox ? k >= half_rot : k & 1;
                    const float2 rot    = ((const float2 *) a.rot.origin(used[r]))[a.p.neox ? (second ? k - half_rot : k) : k/2];
                    const float  other  = value(a.p.neox ? (second ? k - half_rot : k + half_rot) : k ^ 1);
                    x = second ? other*rot.y + x*rot.x : x*rot.x - other*rot.y;
                }
            }
            k_out[at + r*D + k] = __float2half(x);
        }
    }
    __syncthreads();

    if (cells) {
        decode_rows<D>(a, false, s, h, first, z);
        if (a.form_v != SEQKV_PLAIN) {
            transform_rows<D>(nullptr, z, chunk, out);
        }
    }
    float4 scale = make_float4(1.0f, 1.0f, 1.0f, 1.0f), mean = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (a.bits_v && a.tables.prof) {
        const float4 v = unpack4(a.tables.v_scale(h) + c);
        scale = make_float4(1.0f/v.x, 1.0f/v.y, 1.0f/v.z, 1.0f/v.w);
        mean  = unpack4(a.tables.v_mean(h) + c);
    }
#pragma unroll 4
    for (int r = r0; r < ROWS; r += NT/(D/4)) {
        const int j = first + r;
        uint2 x = make_uint2(0, 0);
        if (used[r] >= 0) {
            if (j >= a.p.n_kv) {
                x = *(const uint2 *) (a.exact(s, j) + a.p.n_head_kv*D + h*D + c);
            } else if (a.form_v == SEQKV_PLAIN) {
                x = *(const uint2 *) (z + r*LD + c);
            } else {
                const float4 y = *(const float4 *) (out + r*(D + 4) + c);
                x = pack4(make_float4(y.x*scale.x + mean.x, y.y*scale.y + mean.y, y.z*scale.z + mean.z, y.w*scale.w + mean.w));
            }
        }
        *(uint2 *) (v_out + at + r*D + c) = x;
    }
}

// mask rows -> rows of n_rows, -inf behind their end
static __global__ void pad_mask_kernel(const char * mask, int64_t nb1, int64_t nb3, int n_virt, half * dst, int n_rows) {
    const half * row = (const half *) (mask + blockIdx.z*nb3 + blockIdx.y*nb1);
    const int j = blockIdx.x*blockDim.x + threadIdx.x;
    if (j < n_rows) {
        dst[((int64_t) blockIdx.z*gridDim.y + blockIdx.y)*n_rows + j] = j < n_virt ? row[j] : __float2half(-INFINITY);
    }
}

// output (tokens, heads of the batch, dv) -> dst (tokens, n_head, dv)
static __global__ void scatter_kernel(const float4 * src, float4 * dst, int width, int stride, int offset) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        dst[(int64_t) blockIdx.x*stride + offset + i] = src[(int64_t) blockIdx.x*width + i];
    }
}

// upstream's op over expanded rows of n_heads KV heads
struct expanded_op {
    ggml_tensor q = {}, k = {}, v = {}, mask = {}, sinks = {}, dst = {};

    static void set(ggml_tensor & t, ggml_type type, void * data, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
        t.type  = type;
        t.data  = data;
        t.ne[0] = n0; t.ne[1] = n1; t.ne[2] = n2; t.ne[3] = n3;
        t.nb[0] = ggml_type_size(type);
        for (int i = 1; i < GGML_MAX_DIMS; ++i) {
            t.nb[i] = t.nb[i - 1]*t.ne[i - 1];
        }
    }

    expanded_op(const ggml_tensor * op, int h0, int n_heads, int n_rows, void * k_data, void * v_data, void * mask_data, void * dst_data) {
        const ggml_seqkv_params p = seqkv_params(op);
        const ggml_tensor * from = op->src[0];
        const int64_t n_stream = op->src[1]->ne[2], n_tokens = from->ne[2]/n_stream, group = from->ne[1]/p.n_head_kv;
        set(q,    GGML_TYPE_F32, (char *) from->data + h0*group*from->nb[1], p.dk, n_tokens, n_heads*group, n_stream);
        q.nb[1] = from->nb[2];
        q.nb[2] = from->nb[1];
        q.nb[3] = n_tokens*from->nb[2];
        set(k,    GGML_TYPE_F16, k_data,    p.dk, n_rows, n_heads, n_stream);
        set(v,    GGML_TYPE_F16, v_data,    p.dv, n_rows, n_heads, n_stream);
        set(mask, GGML_TYPE_F16, mask_data, n_rows, n_tokens, 1, n_stream);
        set(dst,  GGML_TYPE_F32, dst_data,  p.dv, n_heads*group, n_tokens, n_stream);
        dst.op = GGML_OP_FLASH_ATTN_EXT;
        dst.src[0] = &q;
        dst.src[1] = &k;
        dst.src[2] = &v;
        dst.src[3] = &mask;
        if (op->src[4]) {
            set(sinks, GGML_TYPE_F32, (float *) op->src[4]->data + h0*group, n_heads*group, 1, 1, 1);
            dst.src[4] = &sinks;
        }
        const float params[3] = { p.scale, 0.0f, p.softcap };
        memcpy(dst.op_params, params, sizeof(params));
        ((int32_t *) dst.op_params)[3] = GGML_PREC_F32;
    }
    expanded_op(const expanded_op &) = delete;
};

bool seqkv_prefill_supported(int device, const ggml_tensor * dst) {
    const ggml_seqkv_params p = seqkv_params(dst);
    const auto & info = ggml_cuda_info().devices[device];
    if (!turing_mma_available(info.cc) || p.dk != p.dv || expand_smem(p.dk) > info.smpbo) {
        return false;
    }
    if (p.softcap != 0.0f && p.dk == 64) { // upstream's kernels have it for 128 and 256 alone, and do not say so when asked
        return false;
    }
    const expanded_op op(dst, 0, p.n_head_kv, PAD, nullptr, nullptr, nullptr, nullptr);
    return ggml_cuda_flash_attn_ext_supported(device, &op.dst);
}

template <int D> static void expand(const seqkv_view & a, int h0, int n_heads, int n_rows, half * k, half * v, cudaStream_t stream) {
    constexpr size_t smem = expand_smem(D);
    CUDA_SET_SHARED_MEMORY_LIMIT((expand_f16_kernel<D>), smem);
    expand_f16_kernel<D><<<dim3(n_rows/expand_rows(D), n_heads, a.n_stream), 2*expand_rows(D), smem, stream>>>(a, h0, n_rows, k, v);
}

void seqkv_prefill(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const seqkv_view a = seqkv_view_of(dst);
    cudaStream_t stream = ctx.stream();

    const int     n_rows   = GGML_PAD(a.n_virt, PAD);
    const int64_t head     = (int64_t) a.n_stream*n_rows*a.p.dk;
    const int     n_heads  = (int) std::max<int64_t>(1, std::min<int64_t>(a.p.n_head_kv, SCRATCH/(2*sizeof(half)*head)));
    const int64_t n_tokens = (int64_t) a.n_stream*a.n_tokens;

    ggml_cuda_pool_alloc<half>  k   (ctx.pool(), n_heads*head);
    ggml_cuda_pool_alloc<half>  v   (ctx.pool(), n_heads*head);
    ggml_cuda_pool_alloc<half>  mask(ctx.pool());
    ggml_cuda_pool_alloc<float> out (ctx.pool());
    if (dst->src[3]->ne[0] < n_rows) {
        mask.alloc(n_tokens*n_rows);
        pad_mask_kernel<<<dim3((n_rows + 255)/256, a.n_tokens, a.n_stream), 256, 0, stream>>>(a.mask, a.mask_nb1, a.mask_nb3, a.n_virt, mask.get(), n_rows);
    }
    if (n_heads < a.p.n_head_kv) {
        out.alloc(n_tokens*n_heads*a.group*a.p.dv);
    }

    for (int h0 = 0; h0 < a.p.n_head_kv; h0 += n_heads) {
        const int n = std::min(n_heads, a.p.n_head_kv - h0);
        switch (a.p.dk) {
            case 64:  expand< 64>(a, h0, n, n_rows, k.get(), v.get(), stream); break;
            case 128: expand<128>(a, h0, n, n_rows, k.get(), v.get(), stream); break;
            default:  expand<256>(a, h0, n, n_rows, k.get(), v.get(), stream); break;
        }
        expanded_op op(dst, h0, n, n_rows, k.get(), v.get(), mask.ptr ? mask.get() : (void *) a.mask, out.ptr ? out.get() : a.dst);
        if (!mask.ptr) {
            memcpy(op.mask.nb, dst->src[3]->nb, sizeof(op.mask.nb));
        }
        ggml_cuda_flash_attn_ext(ctx, &op.dst);
        if (out.ptr) {
            scatter_kernel<<<n_tokens, 256, 0, stream>>>((const float4 *) out.get(), (float4 *) a.dst,
                n*a.group*a.p.dv/4, a.n_head*a.p.dv/4, h0*a.group*a.p.dv/4);
        }
    }
}
