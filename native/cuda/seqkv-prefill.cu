// Prefill: rows are expanded to absolute keys and values in f16, then upstream's kernels attend to them.
//
// A warp expands 16 rows of a KV head: levels by byte permutes, the inverse transform on tensor cores, the rotation in registers.
// KV heads are done in batches, so that the scratch is bounded however long the context is.
#include "seqkv-decode.cuh"

#include "../../ggml-cuda/fattn.cuh"

static constexpr size_t SCRATCH = 256u << 20; // bytes of expanded rows at a time, more only where one KV head needs more
static constexpr int    PAD     = 256;        // upstream's kernels are fastest on multiples of it
static constexpr int    SKIP_TOKENS = 1024;   // from so many tokens on they skip masked rows at the end of the axis
static constexpr int    TURNS       = 4;      // times as many cells as exact rows: with more, a copy of the mask in another order costs what it saves

static constexpr int WARP_ROWS   = 16;
static constexpr int EXPAND_ROWS = WARPS*WARP_ROWS; // of a block
static constexpr __host__ __device__ int raw_pitch(int d) { return d/2 + 16; } // bytes of a raw row: the largest cell, wherever it begins in 16 bytes
static constexpr size_t expand_smem(int d, bool dense) { return (EXPAND_ROWS + (dense ? 64 : 0))*(d + 8)*sizeof(half) + 2*EXPAND_ROWS*raw_pitch(d); }

// What a lane 4*g + t has of a warp's 16 rows: columns 8*n + 2*t, + 1 of row g in acc[n][0], [1], of row g + 8 in [2], [3]
template <int D> using row_values = float[D/8][4];

// z (16, D + 8) <- cells' values in their own domain; rows that are no cells: 0. meta: of row lane%16, -1: no cell; raw: cells of seqkv types
template <int D>
SEQKV_FN void decode_rows(const seqkv_view & a, bool is_key, int s, int h, int first, int32_t meta, const char * raw, const row_loader<raw_pitch(D)> & rows, half * z) {
    constexpr int LD = D + 8, NB = D/64;
    const int lane = threadIdx.x%WARP_SIZE, r = lane%WARP_ROWS, j = first + r;
    const int bits = is_key ? a.bits_k : a.bits_v, graded = is_key ? a.graded_k : 0;
#pragma unroll 1
    for (int b = lane/WARP_ROWS; b < NB; b += WARP_SIZE/WARP_ROWS) {
        half2 * dst = (half2 *) (z + r*LD + 64*b);
        if (meta < 0) {
            for (int i = 0; i < 32; ++i) {
                dst[i] = make_half2(0.0f, 0.0f);
            }
            continue;
        }
        if (!bits) {
            const char * cell = is_key ? a.cell_k(s, j, h) : a.cell_v(s, j, h);
            for (int i = 0; i < 32; ++i) {
                dst[i] = __floats2half2_rn(other_value(is_key ? a.type_k : a.type_v, cell, 64*b + 2*i), other_value(is_key ? a.type_k : a.type_v, cell, 64*b + 2*i + 1));
            }
            continue;
        }
        const half * pred = is_key && a.form_k == SEQKV_DENSE ? a.tables.pred(h) + (meta & 255)*D + 64*b : nullptr;
        uint32_t level[16];
        float    factor[3];
        decode_any(bits, graded, (const uint32_t *) (raw + r*raw_pitch(D)), rows.begin(j) + b*((is_key ? a.size_k : a.size_v)/NB), level, factor);
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
    __syncwarp();
}

// acc <- z H
template <int D>
SEQKV_FN void hadamard_rows(const half * z, row_values<D> & acc) {
    const int lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const uint32_t plus = hadamard8(g, 0).x ^ (__popc(g & 2*t) & 1 ? 0x80008000 : 0); // entries (g, 2t), (g, 2t + 1)
    hadamard_mma<D, 16>(z, { { plus, plus }, { plus, plus ^ 0x80008000 } }, acc);
#pragma unroll
    for (int n = 0; n < D/8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            acc[n][e] *= rsqrtf((float) D);
        }
    }
}

// acc <- z M^T, M (D, D) row-major, by all warps of the block. chunk: (64, D + 8) scratch
template <int D>
SEQKV_FN void dense_rows(const half * m, const half * z, half * chunk, row_values<D> & acc) {
    constexpr int LD = D + 8;
    const int lane = threadIdx.x%WARP_SIZE;
#pragma unroll
    for (int n0 = 0; n0 < D; n0 += 64) {
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < 64*D/8; i += WARPS*WARP_SIZE) {
            copy_async16(chunk + i/(D/8)*LD + i%(D/8)*8, m + n0*D + 8*i);
        }
        copy_wait();
        __syncthreads();
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                acc[n0/8 + n][e] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            uint32_t x[4];
            load_a(x, z + lane%16*LD + k + lane/16*8);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                load_a(b, chunk + (8*n + lane%8 + lane/16*8)*LD + k + (lane >> 3 & 1)*8);
                mma_f16(acc[n0/8 + n],     x, b[0], b[1]);
                mma_f16(acc[n0/8 + n + 1], x, b[2], b[3]);
            }
        }
    }
}

template <int D>
SEQKV_FN void plain_rows(const half * z, row_values<D> & acc) {
    const int lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
#pragma unroll
    for (int n = 0; n < D/8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float2 x = __half22float2(*(const half2 *) (z + (g + 8*e)*(D + 8) + 8*n + 2*t));
            acc[n][2*e]     = x.x;
            acc[n][2*e + 1] = x.y;
        }
    }
}

// Row e (g or g + 8) of acc <- a row of f16
template <int D>
SEQKV_FN void exact_row(const half * row, int e, row_values<D> & acc) {
    const int t = threadIdx.x%4;
#pragma unroll
    for (int n = 0; n < D/8; ++n) {
        const float2 x = __half22float2(*(const half2 *) (row + 8*n + 2*t));
        acc[n][2*e]     = x.x;
        acc[n][2*e + 1] = x.y;
    }
}

// acc -> 16 rows at out, by way of z; rows that are not used: 0
template <int D>
SEQKV_FN void write_rows(const row_values<D> & acc, const int32_t (&used)[2], half * z, half * out) {
    constexpr int LD = D + 8;
    const int lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D/8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            *(half2 *) (z + (g + 8*e)*LD + 8*n + 2*t) = used[e] < 0 ? make_half2(0.0f, 0.0f) : __floats2half2_rn(acc[n][2*e], acc[n][2*e + 1]);
        }
    }
    __syncwarp();
    if (out) {
#pragma unroll
        for (int i = lane; i < WARP_ROWS*D/8; i += WARP_SIZE) {
            *(uint4 *) (out + 8*i) = *(const uint4 *) (z + i/(D/8)*LD + i%(D/8)*8);
        }
        __syncwarp();
    }
}

// The order in which blocks of EXPAND_ROWS rows are expanded: the last n_turns blocks of cells and of exact rows take turns. Of a long
// ubatch a token attends to few of its exact rows, right behind the cells of about the tokens before it: what upstream's kernels
// need not look at is then at the end of the axis, which is where they skip.
struct row_order {
    int n_cells, n_exact, n_turns; // blocks

    // block of the virtual axis at place b
    __device__ __forceinline__ int operator()(int b) const {
        const int cells = n_cells - n_turns, ahead = cells + n_exact - n_turns, i = b - ahead;
        if (n_turns == 0 || b < cells || i >= 2*n_turns) {
            return b;
        }
        return i < 0 ? b + n_turns : i%2 ? n_cells + n_exact - n_turns + i/2 : cells + i/2;
    }
};

// Rows of the virtual axis and of its padding -> k_out, v_out (n_stream, heads of the batch, n_rows, D). blockIdx: (rows, head, stream)
template <int D>
static __global__ void __launch_bounds__(WARPS*WARP_SIZE, D == 256 ? 2 : 4) expand_f16_kernel(seqkv_view a, int h0, int n_rows, row_order order, half * k_out, half * v_out) {
    constexpr int LD = D + 8;
    extern __shared__ __align__(16) half smem_h[];
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    constexpr int PITCH = raw_pitch(D);
    char * raw   = (char *) smem_h + 2*warp*WARP_ROWS*PITCH; // keys, values of this warp's rows
    half * z     = smem_h + EXPAND_ROWS*PITCH + warp*WARP_ROWS*LD;
    half * chunk = smem_h + EXPAND_ROWS*(PITCH + LD);        // (64, LD), with a profile

    const int h = h0 + blockIdx.y, s = blockIdx.z, first = order(blockIdx.x)*EXPAND_ROWS + warp*WARP_ROWS;
    const auto out_at = [&]() { return (((int64_t) s*gridDim.y + blockIdx.y)*n_rows + blockIdx.x*EXPAND_ROWS + warp*WARP_ROWS)*D; }; // of k_out, v_out
    const int32_t meta = first + lane%WARP_ROWS < a.n_virt ? a.meta[(int64_t) s*a.n_virt + first + lane%WARP_ROWS] : -1;
    const int32_t cell = first + lane%WARP_ROWS < a.p.n_kv ? meta : -1;
    const bool    cells = __any_sync(0xffffffff, cell >= 0);
    const int32_t used[2] = { __shfl_sync(0xffffffff, meta, g), __shfl_sync(0xffffffff, meta, g + 8) };
    const auto exact = [&](int e) { return used[e] >= 0 && first + g + 8*e >= a.p.n_kv; };
    const auto exact_at = [&](int e) { return a.exact(s, first + g + 8*e) + h*D; };
    row_values<D> acc;
    const row_loader<PITCH> rows_k(a.cell_k(s, 0, h), a.k_nb1, a.k_nb2, a.size_k);
    const row_loader<PITCH> rows_v(a.cell_v(s, 0, h), a.v_nb1, a.v_nb2, a.size_v);
    if (cells && a.bits_k) {
        rows_k.template load<WARP_ROWS>(raw, first, a.p.n_kv);
    }
    if (cells && a.bits_v) {
        rows_v.template load<WARP_ROWS>(raw + WARP_ROWS*PITCH, first, a.p.n_kv);
    }

    // keys
    if (cells) {
        if (a.bits_v) {
            copy_wait_but<1>();
        } else {
            copy_wait();
        }
        __syncwarp();
        decode_rows<D>(a, true, s, h, first, cell, raw, rows_k, z);
    }
    if (a.form_k == SEQKV_DENSE) {
        if (first - warp*WARP_ROWS < a.p.n_kv) { // all warps of the block
            dense_rows<D>(a.tables.dec(h), z, chunk, acc);
        }
    } else if (cells && a.form_k == SEQKV_HADAMARD) {
        hadamard_rows<D>(z, acc);
    } else if (cells) {
        plain_rows<D>(z, acc);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (exact(e)) {
            exact_row<D>(exact_at(e), e, acc);
        }
    }
    const bool in_registers = !a.p.neox || a.p.n_rot == D;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (used[e] < 0 || !in_registers) {
            continue;
        }
        const float2 * cs = (const float2 *) a.rot.origin(used[e]);
        if (a.p.neox) {
#pragma unroll
            for (int n = 0; n < D/16; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float2 r = cs[8*n + 2*t + c];
                    const float  x = acc[n][2*e + c], y = acc[n + D/16][2*e + c];
                    acc[n][2*e + c]        = x*r.x - y*r.y;
                    acc[n + D/16][2*e + c] = x*r.y + y*r.x;
                }
            }
        } else {
#pragma unroll
            for (int n = 0; n < D/8; ++n) {
                if (8*n + 2*t < a.p.n_rot) {
                    const float2 r = cs[4*n + t];
                    const float  x = acc[n][2*e], y = acc[n][2*e + 1];
                    acc[n][2*e]     = x*r.x - y*r.y;
                    acc[n][2*e + 1] = x*r.y + y*r.x;
                }
            }
        }
    }
    write_rows<D>(acc, used, z, in_registers ? k_out + out_at() : nullptr);
    if (!in_registers) { // pairs of a part of the head: neighbours are in other lanes
        for (int i = lane; i < WARP_ROWS*D; i += WARP_SIZE) {
            const int r = i/D, k = i%D, half_rot = a.p.n_rot/2;
            const int32_t row = __shfl_sync(0xffffffff, meta, r);
            float x = __half2float(z[r*LD + k]);
            if (row >= 0 && k < a.p.n_rot) {
                const bool   second = k >= half_rot;
                const float2 rot    = ((const float2 *) a.rot.origin(row))[second ? k - half_rot : k];
                const float  other  = __half2float(z[r*LD + (second ? k - half_rot : k + half_rot)]);
                x = second ? other*rot.y + x*rot.x : x*rot.x - other*rot.y;
            }
            k_out[out_at() + i] = __float2half(x);
        }
        __syncwarp();
    }

    // values
    if (cells) {
        copy_wait();
        __syncwarp();
        decode_rows<D>(a, false, s, h, first, cell, raw + WARP_ROWS*PITCH, rows_v, z);
        if (a.form_v == SEQKV_HADAMARD) {
            hadamard_rows<D>(z, acc);
        } else {
            plain_rows<D>(z, acc);
        }
        if (a.bits_v && a.tables.prof) {
#pragma unroll
            for (int n = 0; n < D/8; ++n) {
                const float2 scale = __half22float2(*(const half2 *) (a.tables.v_scale(h) + 8*n + 2*t));
                const float2 mean  = __half22float2(*(const half2 *) (a.tables.v_mean (h) + 8*n + 2*t));
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    acc[n][e] = e%2 ? acc[n][e]/scale.y + mean.y : acc[n][e]/scale.x + mean.x;
                }
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (exact(e)) {
            exact_row<D>(exact_at(e) + a.p.n_head_kv*D, e, acc);
        }
    }
    write_rows<D>(acc, used, z, v_out + out_at());
}

// mask rows -> rows of n_rows in that order, -inf behind their end; 8 columns a thread
static __global__ void order_mask_kernel(const char * mask, int64_t nb1, int64_t nb3, int n_virt, half * dst, int n_rows, row_order order) {
    const half * row = (const half *) (mask + blockIdx.z*nb3 + blockIdx.y*nb1);
    const int i = 8*(blockIdx.x*blockDim.x + threadIdx.x);
    if (i >= n_rows) {
        return;
    }
    const int j = order(i/EXPAND_ROWS)*EXPAND_ROWS + i%EXPAND_ROWS;
    __align__(16) half x[8];
    if (j + 8 <= n_virt && ((uintptr_t) (row + j) & 15) == 0) {
        *(uint4 *) x = *(const uint4 *) (row + j);
    } else {
        for (int k = 0; k < 8; ++k) {
            x[k] = j + k < n_virt ? row[j + k] : __float2half(-INFINITY);
        }
    }
    *(uint4 *) (dst + ((int64_t) blockIdx.z*gridDim.y + blockIdx.y)*n_rows + i) = *(const uint4 *) x;
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
    if (!turing_mma_available(info.cc) || p.dk != p.dv || expand_smem(p.dk, true) > info.smpbo) {
        return false;
    }
    if (p.softcap != 0.0f && p.dk == 64) { // upstream's kernels have it for 128 and 256 alone, and do not say so when asked
        return false;
    }
    const expanded_op op(dst, 0, p.n_head_kv, PAD, nullptr, nullptr, nullptr, nullptr);
    return ggml_cuda_flash_attn_ext_supported(device, &op.dst);
}

template <int D> static void expand(const seqkv_view & a, int h0, int n_heads, int n_rows, row_order order, half * k, half * v, cudaStream_t stream) {
    CUDA_SET_SHARED_MEMORY_LIMIT((expand_f16_kernel<D>), expand_smem(D, true));
    expand_f16_kernel<D><<<dim3(n_rows/EXPAND_ROWS, n_heads, a.n_stream), WARPS*WARP_SIZE, expand_smem(D, a.form_k == SEQKV_DENSE), stream>>>(a, h0, n_rows, order, k, v);
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
    row_order order = { a.p.n_kv/EXPAND_ROWS, (a.n_virt - a.p.n_kv + EXPAND_ROWS - 1)/EXPAND_ROWS, 0 };
    if (a.n_tokens >= SKIP_TOKENS && a.p.n_kv%EXPAND_ROWS == 0 && order.n_cells <= TURNS*order.n_exact) {
        order.n_turns = std::min(order.n_cells, order.n_exact);
    }
    if (dst->src[3]->ne[0] < n_rows || order.n_turns) {
        mask.alloc(n_tokens*n_rows);
        order_mask_kernel<<<dim3((n_rows/8 + 127)/128, a.n_tokens, a.n_stream), 128, 0, stream>>>(a.mask, a.mask_nb1, a.mask_nb3, a.n_virt, mask.get(), n_rows, order);
    }
    if (n_heads < a.p.n_head_kv) {
        out.alloc(n_tokens*n_heads*a.group*a.p.dv);
    }

    for (int h0 = 0; h0 < a.p.n_head_kv; h0 += n_heads) {
        const int n = std::min(n_heads, a.p.n_head_kv - h0);
        switch (a.p.dk) {
            case 64:  expand< 64>(a, h0, n, n_rows, order, k.get(), v.get(), stream); break;
            case 128: expand<128>(a, h0, n, n_rows, order, k.get(), v.get(), stream); break;
            default:  expand<256>(a, h0, n, n_rows, order, k.get(), v.get(), stream); break;
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
