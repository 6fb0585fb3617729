// Attention: the path for every type and every GPU, the end of all paths, and the choice between them.
//
// Rows are expanded to absolute K and V in float, a chunk of the virtual axis at a time, and attended to without tensor cores.
#include "seqkv-attn.cuh"
#include "seqkv-cells.cuh"

static constexpr int ROWS  = 16;   // rows expanded by a block
static constexpr int CHUNK = 4096; // rows in scratch at a time
static constexpr int TILE  = 32;   // rows of a tile of attention
static constexpr int WARPS = 8;    // query rows of a block

seqkv_view seqkv_view_of(const ggml_tensor * dst, const ggml_tensor * frame) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * win  = dst->src[5];
    const ggml_tensor * prof = dst->src[9];

    seqkv_view a;
    a.p        = seqkv_params(dst);
    a.rot      = seqkv_rot_of(dst->src[8], a.p);
    a.tables   = seqkv_tables_of(prof, a.p);
    a.q        = (const char *) q->data;    a.q_nb1   = q->nb[1];   a.q_nb2   = q->nb[2];
    a.k        = (const char *) k->data;    a.k_nb1   = k->nb[1];   a.k_nb2   = k->nb[2];
    a.v        = (const char *) v->data;    a.v_nb1   = v->nb[1];   a.v_nb2   = v->nb[2];
    a.win      = (const char *) win->data;  a.win_nb1 = win->nb[1]; a.win_nb2 = win->nb[2];
    a.cur      = (half *) dst->src[6]->data;
    a.k_new    = frame ? (const char *) frame->src[0]->data : nullptr;
    a.v_new    = frame ? (const char *) frame->src[1]->data : nullptr;
    a.k_new_nb1 = frame ? frame->src[0]->nb[1] : 0;
    a.k_new_nb2 = frame ? frame->src[0]->nb[2] : 0;
    a.v_new_nb1 = frame ? frame->src[1]->nb[1] : 0;
    a.v_new_nb2 = frame ? frame->src[1]->nb[2] : 0;
    a.mask     = (const char *) mask->data; a.mask_nb1 = mask->nb[1]; a.mask_nb3 = mask->nb[3];
    a.sinks    = dst->src[4] ? (const float *) dst->src[4]->data : nullptr;
    a.meta     = (const int32_t *) dst->src[7]->data;
    a.dst      = (float *) dst->data;
    a.type_k   = k->type;
    a.type_v   = v->type;
    a.bits_k   = ggml_seqkv_bits(k->type);
    a.bits_v   = ggml_seqkv_bits(v->type);
    a.graded_k = ggml_seqkv_graded(k->type);
    a.form_k   = seqkv_form_of(k->type, prof);
    a.form_v   = seqkv_form_of(v->type, nullptr);
    a.size_k   = (int) ggml_row_size(k->type, a.p.dk);
    a.size_v   = (int) ggml_row_size(v->type, a.p.dv);
    a.n_head   = (int) q->ne[1];
    a.group    = a.n_head/a.p.n_head_kv;
    a.inv_group = (65536 + a.group - 1)/a.group;
    a.n_stream = (int) k->ne[2];
    a.n_tokens = (int) (q->ne[2]/a.n_stream);
    a.n_virt   = a.p.n_kv + a.p.n_win + a.n_tokens;
    return a;
}

//
// expansion
//

template <int bits, int graded>
static __device__ void decode_blocks(const uint8_t * src, float * y, int d, int i, int n) {
    // a quarter of a block by each thread
    for (int item = i; item < d/16; item += n) {
        const uint8_t * b = src + item/4*seqkv_block_bytes(bits, graded);
        uint64_t q[7];
        float    f[4];
        seqkv_index_planes(bits, graded, b, q);
        seqkv_factors(bits, graded, b, f);
        float * out = y + item/4*SEQKV_BLOCK;
        switch (item % 4) {
            case 0:  seqkv_decode16(seqkv_value_bits(bits, graded, 0), 0, q, f[0], out); break;
            case 1:  seqkv_decode16(seqkv_value_bits(bits, graded, 1), 1, q, f[1], out); break;
            case 2:  seqkv_decode16(seqkv_value_bits(bits, graded, 2), 2, q, f[2], out); break;
            default: seqkv_decode16(seqkv_value_bits(bits, graded, 3), 3, q, f[3], out); break;
        }
    }
}

// a head's cell -> y[d] in its own domain, by n threads of which this is number i
static __device__ void decode_cell(ggml_type type, int bits, int graded, const char * src, float * y, int d, int i, int n) {
    const uint8_t * b = (const uint8_t *) src;
    switch (bits << 1 | graded) {
        case 2:  decode_blocks<1, 0>(b, y, d, i, n); break;
        case 3:  decode_blocks<1, 1>(b, y, d, i, n); break;
        case 4:  decode_blocks<2, 0>(b, y, d, i, n); break;
        case 5:  decode_blocks<2, 1>(b, y, d, i, n); break;
        case 6:  decode_blocks<3, 0>(b, y, d, i, n); break;
        case 7:  decode_blocks<3, 1>(b, y, d, i, n); break;
        case 8:  decode_blocks<4, 0>(b, y, d, i, n); break;
        case 9:  decode_blocks<4, 1>(b, y, d, i, n); break;
        default:
            for (int j = i; j < d; j += n) {
                y[j] = other_value(type, src, j);
            }
    }
}

// x (ROWS, d) <- H x row by row
SEQKV_FN void fwht_rows(float * x, int d) {
    for (int h = 1; h < d; h *= 2) {
        __syncthreads();
        for (int j = threadIdx.x; j < ROWS*d/2; j += blockDim.x) {
            const int   at = (j & -h) << 1 | (j & (h - 1));
            const float a = x[at], b = x[at + h];
            x[at]     = a + b;
            x[at + h] = a - b;
        }
    }
    __syncthreads();
    const float s = rsqrtf((float) d);
    for (int j = threadIdx.x; j < ROWS*d; j += blockDim.x) {
        x[j] *= s;
    }
    __syncthreads();
}

// Rows [j0, j1) of the virtual axis -> k_out, v_out (n_stream, n_head_kv, j1 - j0, d): absolute keys and values; rows not in use are 0.
static __global__ void __launch_bounds__(256) expand_kernel(seqkv_view a, int j0, int j1, float * k_out, float * v_out) {
    extern __shared__ float smem[];
    const int dk = a.p.dk, dv = a.p.dv, h = blockIdx.y, s = blockIdx.z;
    const int d  = max(dk, dv);
    float * x = smem;           // (ROWS, d)
    float * y = smem + ROWS*d;  // (ROWS, dk)
    const int first = j0 + blockIdx.x*ROWS;
    const int n     = min(ROWS, j1 - first);
    const bool blocks_v = a.bits_v && a.tables.prof;
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, n_warps = blockDim.x/WARP_SIZE;
    const int64_t out_row = ((int64_t) s*a.p.n_head_kv + h)*(j1 - j0) + first - j0;

    // keys
    for (int r = warp; r < ROWS; r += n_warps) {
        const int j = first + r;
        for (int i = lane; i < dk; i += WARP_SIZE) {
            x[r*dk + i] = 0.0f;
        }
        __syncwarp();
        if (r >= n || meta[j] < 0 || j >= a.p.n_kv) {
            continue;
        }
        decode_cell(a.type_k, a.bits_k, a.graded_k, a.cell_k(s, j, h), x + r*dk, dk, lane, WARP_SIZE);
        __syncwarp();
        if (a.form_k == SEQKV_DENSE) {
            const half * pred = a.tables.pred(h) + (meta[j] & 255)*dk;
            for (int i = lane; i < dk; i += WARP_SIZE) {
                x[r*dk + i] += __half2float(pred[i]);
            }
        }
    }
    __syncthreads();
    if (first < a.p.n_kv) {
        if (a.form_k == SEQKV_HADAMARD) {
            fwht_rows(x, dk);
        } else if (a.form_k == SEQKV_DENSE) {
            const half * dec = a.tables.dec(h);
            for (int i = threadIdx.x/8; i < dk; i += blockDim.x/8) {
                float sum[ROWS] = { 0.0f };
                for (int c = 2*(threadIdx.x%8); c < dk; c += 16) {
                    const float2 f = __half22float2(*(const half2 *) (dec + i*dk + c));
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        sum[r] += f.x*x[r*dk + c] + f.y*x[r*dk + c + 1];
                    }
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    for (int m = 1; m < 8; m *= 2) {
                        sum[r] += __shfl_xor_sync(0xffffffff, sum[r], m);
                    }
                    if (threadIdx.x%8 == 0) {
                        y[r*dk + i] = sum[r];
                    }
                }
            }
            __syncthreads();
        }
    }
    float * keys = first < a.p.n_kv && a.form_k == SEQKV_DENSE ? y : x;
    for (int r = warp; r < n; r += n_warps) {
        const int j = first + r;
        if (meta[j] >= 0 && j >= a.p.n_kv) {
            for (int i = lane; i < dk; i += WARP_SIZE) {
                keys[r*dk + i] = __half2float(a.exact(s, j)[h*dk + i]);
            }
            __syncwarp();
        }
        for (int i = lane; i < dk; i += WARP_SIZE) {
            k_out[(out_row + r)*dk + i] = meta[j] < 0 ? 0.0f : seqkv_rotated(keys + r*dk, i, a.rot.origin(meta[j]), a.p.n_rot, a.p.neox, 0);
        }
    }
    __syncthreads();

    // values
    for (int r = warp; r < ROWS; r += n_warps) {
        const int j = first + r;
        for (int i = lane; i < dv; i += WARP_SIZE) {
            x[r*dv + i] = 0.0f;
        }
        __syncwarp();
        if (r < n && meta[j] >= 0 && j < a.p.n_kv) {
            decode_cell(a.type_v, a.bits_v, 0, a.cell_v(s, j, h), x + r*dv, dv, lane, WARP_SIZE);
        }
    }
    __syncthreads();
    if (first < a.p.n_kv && a.form_v == SEQKV_HADAMARD) {
        fwht_rows(x, dv);
    }
    for (int r = warp; r < n; r += n_warps) {
        const int j = first + r;
        for (int i = lane; i < dv; i += WARP_SIZE) {
            float v = x[r*dv + i];
            if (meta[j] < 0) {
                v = 0.0f;
            } else if (j >= a.p.n_kv) {
                v = __half2float(a.exact(s, j)[a.p.n_head_kv*dk + h*dv + i]);
            } else if (blocks_v) {
                v = v/__half2float(a.tables.v_scale(h)[i]) + __half2float(a.tables.v_mean(h)[i]);
            }
            v_out[(out_row + r)*dv + i] = v;
        }
    }
}

//
// attention over expanded rows
//

// One warp a query row, one lane a row of a tile. blockIdx: (split, KV head x tile of query rows, stream).
static __global__ void __launch_bounds__(WARPS*WARP_SIZE) attend_kernel(seqkv_view a, int j0, int j1, const float * k_in, const float * v_in,
        seqkv_parts parts, int first_part, int split_rows) {
    extern __shared__ float smem[];
    const int dk = a.p.dk, dv = a.p.dv, s = blockIdx.z;
    const int n_rows  = a.n_tokens*a.group;
    const int n_tiles = (n_rows + WARPS - 1)/WARPS;
    const int h    = blockIdx.y/n_tiles;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE;
    const int row  = blockIdx.y%n_tiles*WARPS + warp;
    const int t    = min(row, n_rows - 1)/a.group;
    const int head = h*a.group + min(row, n_rows - 1)%a.group;

    float * kv = smem;                                   // (TILE, dk + 1) or (TILE, dv)
    float * q  = smem + TILE*(max(dk, dv) + 1) + warp*dk; // (dk)
    for (int i = lane; i < dk; i += WARP_SIZE) {
        q[i] = a.query(s, t, head)[i];
    }
    const half * mask = a.mask_row(s, t);
    const int64_t in_row = ((int64_t) s*a.p.n_head_kv + h)*(j1 - j0) - j0;

    float m = -INFINITY, l = 0.0f;
    float acc[SEQKV_MAX_HEAD/WARP_SIZE] = { 0.0f };
    const int begin = j0 + blockIdx.x*split_rows;
    const int end   = min(j1, begin + split_rows);
    for (int j = begin; j < end; j += TILE) {
        const int n = min(TILE, end - j);
        const bool keep = lane < n && __half2float(mask[j + lane]) == 0.0f;
        if (!__syncthreads_or(keep)) {
            continue;
        }
        for (int i = threadIdx.x; i < n*dk; i += blockDim.x) {
            kv[i/dk*(dk + 1) + i%dk] = k_in[(in_row + j)*dk + i];
        }
        __syncthreads();
        float dot = 0.0f;
        if (keep) {
            for (int i = 0; i < dk; ++i) {
                dot += q[i]*kv[lane*(dk + 1) + i];
            }
        }
        const float logit = keep ? seqkv_logit(dot, a.p) : -INFINITY;
        const float max   = fmaxf(m, warp_reduce_max(logit));
        const float p     = keep ? __expf(logit - max) : 0.0f;
        const float f     = m == -INFINITY ? 0.0f : __expf(m - max);
        l = l*f + warp_reduce_sum(p);
        m = max;
        __syncthreads();
        for (int i = threadIdx.x; i < n*dv; i += blockDim.x) {
            kv[i] = v_in[(in_row + j)*dv + i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SEQKV_MAX_HEAD/WARP_SIZE; ++i) {
            acc[i] *= f;
        }
        for (int c = 0; c < n; ++c) {
            const float pc = __shfl_sync(0xffffffff, p, c);
#pragma unroll
            for (int i = 0; i < SEQKV_MAX_HEAD/WARP_SIZE; ++i) {
                if (i*WARP_SIZE < dv) {
                    acc[i] += pc*kv[c*dv + i*WARP_SIZE + lane];
                }
            }
        }
    }
    if (row < n_rows) {
        const int64_t part = (((int64_t) s*a.n_tokens + t)*a.n_head + head)*parts.n_parts + first_part + blockIdx.x;
        if (lane == 0) {
            parts.ml[part] = make_float2(m, l);
        }
#pragma unroll
        for (int i = 0; i < SEQKV_MAX_HEAD/WARP_SIZE; ++i) {
            if (i*WARP_SIZE < dv) {
                parts.acc[part*dv + i*WARP_SIZE + lane] = acc[i];
            }
        }
    }
}

static void attend_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows) {
    const seqkv_view a = seqkv_view_of(dst);
    cudaStream_t stream = ctx.stream();

    const int n_chunks  = (a.n_virt + CHUNK - 1)/CHUNK;
    const int n_tiles   = (a.n_tokens*a.group + WARPS - 1)/WARPS;
    const int splits    = n_tiles*a.p.n_head_kv*a.n_stream >= 256 ? 1 : CHUNK/128;
    const int chunk     = std::min(CHUNK, a.n_virt);
    const int64_t heads = (int64_t) a.n_stream*a.p.n_head_kv;

    seqkv_parts parts;
    parts.n_parts  = n_chunks*splits;
    parts.n_z      = 0;
    parts.permuted = 0;
    const int64_t n_out = (int64_t) a.n_stream*a.n_tokens*a.n_head*parts.n_parts;

    ggml_cuda_pool_alloc<float>  k(ctx.pool(), heads*chunk*a.p.dk);
    ggml_cuda_pool_alloc<float>  v(ctx.pool(), heads*chunk*a.p.dv);
    ggml_cuda_pool_alloc<float2> ml (ctx.pool(), n_out);
    ggml_cuda_pool_alloc<float>  acc(ctx.pool(), n_out*a.p.dv);
    parts.ml  = ml.get();
    parts.acc = acc.get();

    const size_t smem_expand = ROWS*(std::max(a.p.dk, a.p.dv) + a.p.dk)*sizeof(float);
    const size_t smem_attend = (TILE*(std::max(a.p.dk, a.p.dv) + 1) + WARPS*a.p.dk)*sizeof(float);
    for (int c = 0; c < n_chunks; ++c) {
        const int j0 = c*CHUNK, j1 = std::min(j0 + CHUNK, a.n_virt);
        expand_kernel<<<dim3((j1 - j0 + ROWS - 1)/ROWS, a.p.n_head_kv, a.n_stream), 256, smem_expand, stream>>>(a, j0, j1, k.get(), v.get());
        attend_kernel<<<dim3(splits, n_tiles*a.p.n_head_kv, a.n_stream), WARPS*WARP_SIZE, smem_attend, stream>>>(
            a, j0, j1, k.get(), v.get(), parts, c*splits, CHUNK/splits);
    }
    seqkv_combine(ctx, a, parts, rows);
}

//
// the end
//

// frame rows of the ubatch that go into the window
struct window_rows {
    char          * dst; // NULL: none
    const int64_t * idxs;
    int64_t         nb1;
};

// 2, 4 or 8 floats, aligned to their size or to 16 bytes; zeros if they are not there
template <int N> SEQKV_FN void load_floats(float (&x)[N], const float * src, bool there) {
    if constexpr (N == 2) {
        *(float2 *) x = there ? *(const float2 *) src : make_float2(0.0f, 0.0f);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            *(float4 *) (x + i) = there ? *(const float4 *) (src + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}
template <int N> SEQKV_FN void store_floats(float * dst, const float (&x)[N]) {
    if constexpr (N == 2) {
        *(float2 *) dst = *(const float2 *) x;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            *(float4 *) (dst + i) = *(const float4 *) (x + i);
        }
    }
}

// Sums of x and of y over a warp, in the lower and in the upper half of its lanes
SEQKV_FN float warp_sum2(float x, float y, int lane) {
    const bool  upper = lane & 16;
    const float sum   = (upper ? y : x) + __shfl_xor_sync(0xffffffff, upper ? x : y, 16);
    return warp_reduce_sum<16>(sum);
}

// One block a query row: parts -> dst. H of the sums over transformed values, their mean and scale, the sink. D: head_dim of values.
// Each of W warps sums every W-th part by its own maximum, a lane D/32 values of it; of some of these parts at a time a lane has the weight of one. AHEAD:
// parts whose values are on their way at a time. It takes longer to fetch this code, which nothing else of a layer keeps in a cache, than to run it.
// FEW: there are no more than W*AHEAD parts, 32. Then blocks are there before the parts are, and all of it is run once for nothing meanwhile.
template <int D, int W, int AHEAD, bool FEW>
static __global__ void __launch_bounds__(W*WARP_SIZE, 1) combine_kernel(seqkv_view a, seqkv_parts parts, window_rows rows) {
    constexpr int V = D/WARP_SIZE, AT_ONCE = WARP_SIZE/AHEAD*AHEAD; // parts of a warp whose weights are there at a time
    __shared__ __align__(16) float sums[2][W][D]; // of transformed values, of values
    __shared__ float total[2*D], warp_m[W], warp_l[2][W];
    const int warp = seqkv_warp(), lane = threadIdx.x%WARP_SIZE;
    const int head = blockIdx.x, h = a.token_of(head);
    const int row  = blockIdx.y*a.n_head + head;
    const float2 * ml  = parts.ml  + (int64_t) row*parts.n_parts + warp;
    const float  * acc = parts.acc + ((int64_t) row*parts.n_parts + warp)*D + V*lane;

    // what no kernel writes
    const bool prof = a.bits_v && a.tables.prof;
    float scale[V], mean[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        scale[j] = prof && warp == 0 ? 1.0f/__half2float(a.tables.v_scale(h)[WARP_SIZE*j + lane]) : 1.0f;
        mean [j] = prof && warp == 0 ? __half2float(a.tables.v_mean(h)[WARP_SIZE*j + lane]) : 0.0f;
    }
    const float   sink = a.sinks ? a.sinks[head] : -INFINITY;
    const int64_t idx  = rows.dst ? rows.idxs[blockIdx.y] : -1;
    const auto combine = [&](int n_parts, bool for_good) {
        const int n = (n_parts - warp + W - 1)/W, n_z = (min(n_parts, parts.n_z) - warp + W - 1)/W; // of the warp
        float m = -INFINITY, l = 0.0f, l_z = 0.0f, sum_z[V] = { 0.0f }, sum_x[V] = { 0.0f };
#pragma unroll 1
        for (int k0 = 0; k0 < (FEW ? 1 : n); k0 += AT_ONCE) {
            const int    own    = k0 + lane; // part whose weight this lane has
            const float2 own_ml = lane < AT_ONCE && own < n ? ml[W*own] : make_float2(-INFINITY, 0.0f);
            float x[AHEAD][V];
            const auto load = [&](int k) {
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    load_floats<V>(x[i], acc + (k + i)*W*D, k + i < n);
                }
            };
            load(k0);
            const float old = m;
            m = fmaxf(m, warp_reduce_max(own_ml.x));
            const float f = own_ml.x == -INFINITY ? 0.0f : __expf(own_ml.x - m);
            if (!FEW) {
                const float f_old = old == -INFINITY ? 0.0f : __expf(old - m);
                l   *= f_old;
                l_z *= f_old;
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    sum_z[j] *= f_old;
                    sum_x[j] *= f_old;
                }
            }
            l   += f*own_ml.y;
            l_z += own < n_z ? f*own_ml.y : 0.0f;
#pragma unroll 1
            for (int k = k0; k < (FEW ? 1 : min(n, k0 + AT_ONCE)); k += AHEAD) {
                if (k > k0) {
                    load(k);
                }
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    const float w = __shfl_sync(0xffffffff, f, k - k0 + i), w_z = k + i < n_z ? w : 0.0f;
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        sum_z[j] += w_z*x[i][j];
                        sum_x[j] += (w - w_z)*x[i][j];
                    }
                }
            }
        }
        store_floats<V>(&sums[0][warp][V*lane], sum_z);
        store_floats<V>(&sums[1][warp][V*lane], sum_x);
        l = warp_sum2(l, l_z, lane);
        if (lane == 0) {
            warp_m[warp] = m;
        }
        if (lane%16 == 0) {
            warp_l[lane/16][warp] = l;
        }
        if (for_good && idx >= 0) {
            const int width = a.p.n_head_kv*(a.p.dk + a.p.dv)/2;
            const half2 * from = (const half2 *) a.cur + (int64_t) blockIdx.y*width;
            half2       * to   = (half2 *) (rows.dst + idx*rows.nb1);
#pragma unroll 1
            for (int c = head*W*WARP_SIZE + threadIdx.x; c < width; c += a.n_head*W*WARP_SIZE) {
                to[c] = from[c];
            }
        }
        __syncthreads();
        m = lane < W ? warp_m[lane] : -INFINITY;
        const float top = fmaxf(sink, warp_reduce_max(m)), f = m == -INFINITY ? 0.0f : __expf(m - top); // of warp lane
#pragma unroll 1
        for (int i0 = warp*WARP_SIZE; i0 < 2*D; i0 += W*WARP_SIZE) {
            const int i = i0 + lane;
            const float * column = &sums[0][0][0] + (i < D ? 0 : (W - 1)*D) + (i < D && parts.permuted ? (i & ~15) | (i & 3) << 2 | (i >> 2 & 3) : i); // stored place within 16 values: 4*(value%4) + value/4
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                sum += __shfl_sync(0xffffffff, f, w)*column[w*D];
            }
            total[i] = sum;
        }
        __syncthreads();
        if (warp > 0) {
            return;
        }
        l   = warp_sum2(lane < W ? f*warp_l[0][lane] : 0.0f, lane < W ? f*warp_l[1][lane] : 0.0f, lane);
        l_z = __shfl_sync(0xffffffff, l, 16);
        l   = __shfl_sync(0xffffffff, l, 0) + (a.sinks ? __expf(sink - top) : 0.0f);
        float x[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            x[j] = total[WARP_SIZE*j + lane];
        }
        seqkv_fwht_warp<V>(x, lane); // H
        const float inv = l > 0.0f ? 1.0f/l : 0.0f;
        float * dst = a.dst + (int64_t) row*D + lane;
        if (for_good) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                dst[WARP_SIZE*j] = inv*(total[D + WARP_SIZE*j + lane] + (parts.n_z > 0 ? rsqrtf((float) D)*x[j]*scale[j] + l_z*mean[j] : 0.0f));
            }
        }
    };
    if (FEW) {
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            if (pass == 1) {
                ggml_cuda_pdl_sync();
                ggml_cuda_pdl_lc();
            }
            combine(pass == 1 ? parts.n_parts : 0, pass == 1); // at first no parts, lest what is in their place now comes into the cache
        }
    } else {
        ggml_cuda_pdl_sync();
        ggml_cuda_pdl_lc();
        combine(parts.n_parts, true);
    }
}

template <int D> static void launch_combine(ggml_backend_cuda_context & ctx, const seqkv_view & a, const seqkv_parts & parts, const window_rows & rows) {
    const dim3 grid(a.n_head, a.n_stream*a.n_tokens);
    if (parts.n_parts <= 32) {
        ggml_cuda_kernel_launch((combine_kernel<D,  8, 4, true>), ggml_cuda_kernel_launch_params(grid, dim3( 8*WARP_SIZE), 0, ctx.stream()), a, parts, rows);
    } else {
        ggml_cuda_kernel_launch((combine_kernel<D, 16, 640/D, false>), ggml_cuda_kernel_launch_params(grid, dim3(16*WARP_SIZE), 0, ctx.stream()), a, parts, rows);
    }
}

void seqkv_combine(ggml_backend_cuda_context & ctx, const seqkv_view & a, const seqkv_parts & parts, const ggml_tensor * rows) {
    window_rows w = { nullptr, nullptr, 0 };
    if (rows) {
        w = { (char *) rows->data, (const int64_t *) rows->src[1]->data, (int64_t) rows->nb[1] };
    }
    switch (a.p.dv) {
        case 64:  launch_combine< 64>(ctx, a, parts, w); break;
        case 128: launch_combine<128>(ctx, a, parts, w); break;
        default:  launch_combine<256>(ctx, a, parts, w); break;
    }
}

void ggml_cuda_seqkv_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_tensor * rows, const ggml_tensor * frame) {
    if (ggml_nelements(dst) == 0) {
        return;
    }
    const int64_t n_tokens = dst->src[0]->ne[2]/dst->src[1]->ne[2];
    if (n_tokens <= SEQKV_MAX_DECODE && seqkv_decode_supported(ctx.device, dst)) {
        seqkv_decode(ctx, dst, rows, frame);
    } else if (n_tokens > SEQKV_MAX_DECODE && seqkv_prefill_supported(ctx.device, dst)) {
        seqkv_prefill(ctx, dst);
        if (rows) {
            ggml_cuda_seqkv_store(ctx, rows);
        }
    } else {
        attend_rows(ctx, dst, rows);
    }
}

bool ggml_cuda_seqkv_supported(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    const ggml_seqkv_params p = seqkv_params(op);
    const auto head  = [](int d) { return d == 0 || d == 64 || d == 128 || d == 256; };
    const auto cells = [](const ggml_tensor * t) { return !t || ggml_seqkv_bits(t->type) || seqkv_other_type(t->type); };
    if (!head(p.dk) || !head(p.dv)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_SEQKV_FRAME: return true;
        case GGML_OP_SEQKV_STORE: return cells(op);
        case GGML_OP_SEQKV_ATTN:  return cells(op->src[1]) && cells(op->src[2]);
        default:                  return false;
    }
}
