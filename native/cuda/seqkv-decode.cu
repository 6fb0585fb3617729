// Decode straight from blocks, on integer tensor cores.
//
// Three kernels an op. The first one transforms the queries into every frame (q' = D^T R(-t0) q, or H R(-t0) q), splits them in
// two signed 7-bit digits, and takes their products with the frame's 64 predictions. The second one works on tiles of 64 cells of
// one KV head: levels of K and V by byte permutes, once for all queries of the group; scores as integer products with the digits of
// the queries, a gain per key and group of values applied to each; values as integer products with the digits of p*gain. Exact
// rows are parts of their own in the same launch. The third one combines the parts.
//
// Rows of the tensor core tiles: row r is the upper digit of query r, row r + 8 its lower digit: a query's two sums are in one thread.
#include "seqkv-attn.cuh"
#include "seqkv-cells.cuh"
#include "seqkv-mma.cuh"

static constexpr int TILE    = 64;        // cells of a tile
static constexpr int WARPS   = 4;
static constexpr int THREADS = WARPS*WARP_SIZE;
static constexpr int EXACT   = 16;        // exact rows of a part
static constexpr int MAX_MT  = 4;         // tiles of 8 queries
static constexpr int DIGITS  = 127*128;   // largest value of two digits

// What the first kernel hands to the second one, by (stream, frame, KV head); MT tiles of 8 queries
//   digits: A fragments of the queries, ((tile, quad of registers), lane) of 16 bytes; register 8*block + 2*run + digit, run: 16 values
//   scale (8*MT): q' = scale*(128*upper + lower);  pred (8*MT, 64): <q', prediction by offset>
struct frame_queries {
    uint32_t * digits;
    float    * scale;
    float    * pred;
    int        n_frames;

    __device__ __forceinline__ int64_t index(const seqkv_view & a, int s, int frame, int h) const {
        return ((int64_t) s*n_frames + frame)*a.p.n_head_kv + h;
    }
};

template <int D> SEQKV_FN uint32_t * digits_of(const frame_queries & f, int64_t index, int mt) { return f.digits + index*(mt*D*4); }

//
// queries in the frames
//

static constexpr __host__ __device__ int query_rows (int d) { return d == 256 ? 32 : 64; } // rows of a block: frame x query, at most
static constexpr __host__ __device__ int query_chunk(int d) { return d == 256 ? 64 : d; }  // rows of D at a time
static constexpr __host__ __device__ bool query_resident(int d) { return d <= 128; }       // D and the predictions stay in shared memory
static constexpr int query_smem(int d, int nq) { return (2*query_rows(d) + query_chunk(d) + (query_resident(d) ? 64 : 0))*(d + 8)*2 + nq*d*4; }

// overlap: the kernel before this one writes the cache and nothing that is read here: run beside it
template <int D>
static __global__ void __launch_bounds__(query_rows(D)*2) queries_kernel(seqkv_view a, frame_queries f, int mt, bool overlap) {
    constexpr int  ROWS = query_rows(D), LD = D + 8, NT = ROWS*2, CHUNK = query_chunk(D);
    constexpr bool RESIDENT = query_resident(D);
    extern __shared__ __align__(16) half smem_h[];
    half  * hi    = smem_h;         // (ROWS, LD)
    half  * lo    = hi + ROWS*LD;   // (ROWS, LD)
    half  * chunk = lo + ROWS*LD;   // (CHUNK, LD)
    half  * preds = RESIDENT ? chunk + CHUNK*LD : chunk; // (64, LD)
    float * q     = (float *) (preds + 64*LD);           // (nq, D)
    float * out   = (float *) smem_h;                    // (ROWS, D + 4), later

    const int h = blockIdx.y, s = blockIdx.z;
    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const bool dense = a.form_k == SEQKV_DENSE;

    // where a row's results go, counted from the block's first frame: words of digits, rows of pred and scale
    __shared__ int row_digits[ROWS], row_query[ROWS];
    for (int r = threadIdx.x; r < ROWS; r += NT) {
        const int frame = r/nq, iq = r%nq;
        row_digits[r] = frame*a.p.n_head_kv*mt*D*4 + (iq/8*D + iq%8*4)*4;
        row_query [r] = frame*a.p.n_head_kv*mt*8 + iq;
    }

    const auto load_chunk = [&](int k0) {
#pragma unroll 8
        for (int i = threadIdx.x; i < CHUNK*D/8; i += NT) {
            const int k = i/(D/8), n = i%(D/8)*8;
            if (dense) {
                copy_async16(chunk + k*LD + n, a.tables.dec(h) + (k0 + k)*D + n);
            } else {
                *(uint4 *) (chunk + k*LD + n) = hadamard8(k0 + k, n);
            }
        }
    };
    const auto load_preds = [&]() {
        const half * pred = a.tables.pred(h);
#pragma unroll 8
        for (int i = threadIdx.x; i < 64*D/8; i += NT) {
            copy_async16(preds + i/(D/8)*LD + i%(D/8)*8, pred + 8*i);
        }
    };
    if (RESIDENT) {
        load_chunk(0);
        if (dense) {
            load_preds();
        }
    }
    if (!overlap) {
        ggml_cuda_pdl_sync();
    }
    ggml_cuda_pdl_lc();
    for (int i = threadIdx.x; i < nq*(D/4); i += NT) {
        const int iq = i/(D/4);
        copy_async16((float4 *) q + i, (const float4 *) a.query(s, iq/a.group, h*a.group + iq%a.group) + i%(D/4));
    }

    for (int frame0 = blockIdx.x*(ROWS/nq); frame0 < f.n_frames; frame0 += gridDim.x*(ROWS/nq)) {
        const int n_frames = min(ROWS/nq, f.n_frames - frame0);
        const int n_rows   = n_frames*nq;
        if (!RESIDENT) {
            __syncthreads();
            load_chunk(0);
        }

        // rotated queries, a pair at a time
        for (int i0 = threadIdx.x; i0 - (int) threadIdx.x < n_frames*(D/2); i0 += 8*NT) {
            float2 cs[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int frame = (i0 + i*NT)/(D/2), pair = (i0 + i*NT)%(D/2);
                cs[i] = make_float2(1.0f, 0.0f);
                if (frame < n_frames && pair < a.p.n_rot/2) {
                    cs[i] = ((const float2 *) (a.rot.base + (int64_t) (SEQKV_FRAME + frame0 + frame)*a.rot.stride))[pair];
                }
            }
            copy_wait();
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int frame = (i0 + i*NT)/(D/2), pair = (i0 + i*NT)%(D/2);
                if (frame < n_frames) {
                    const int2 at = pair < a.p.n_rot/2 ? seqkv_pair(pair, a.p.n_rot, a.p.neox) : make_int2(2*pair, 2*pair + 1);
                    for (int iq = 0; iq < nq; ++iq) {
                        const float x = q[iq*D + at.x], y = q[iq*D + at.y];
                        const int   r = (frame*nq + iq)*LD;
                        uint32_t h2, l2;
                        split_f16(x*cs[i].x + y*cs[i].y, y*cs[i].x - x*cs[i].y, h2, l2);
                        if (at.y == at.x + 1) {
                            *(uint32_t *) (hi + r + at.x) = h2;
                            *(uint32_t *) (lo + r + at.x) = l2;
                        } else {
                            ((uint16_t *) hi)[r + at.x] = (uint16_t) h2;
                            ((uint16_t *) hi)[r + at.y] = (uint16_t) (h2 >> 16);
                            ((uint16_t *) lo)[r + at.x] = (uint16_t) l2;
                            ((uint16_t *) lo)[r + at.y] = (uint16_t) (l2 >> 16);
                        }
                    }
                }
            }
        }
        for (int i = n_rows*LD/2 + threadIdx.x; i < ROWS*LD/2; i += NT) {
            ((uint32_t *) hi)[i] = ((uint32_t *) lo)[i] = 0;
        }

        float acc[D/8][4] = {{ 0.0f }};
        for (int k0 = 0; k0 < D; k0 += CHUNK) {
            if (k0 > 0) {
                __syncthreads();
                load_chunk(k0);
                copy_wait();
            }
            __syncthreads(); // also: the rotated queries are there
            for (int kk = 0; kk < CHUNK; kk += 16) {
                uint32_t ah[4], al[4];
                const int at = (16*warp + g)*LD + k0 + kk + 2*t;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int o = at + (j & 1)*8*LD + (j >> 1)*8;
                    ah[j] = *(const uint32_t *) (hi + o);
                    al[j] = *(const uint32_t *) (lo + o);
                }
#pragma unroll
                for (int n0 = 0; n0 < D/8; n0 += 8) { // independent products one after the other
                    uint32_t b[16];
#pragma unroll
                    for (int n = 0; n < 8; n += 2) {
                        load_b_transposed(b + 2*n, chunk + (kk + lane%16)*LD + 8*(n0 + n) + lane/16*8);
                    }
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        mma_f16(acc[n0 + n], ah, b[2*n], b[2*n + 1]);
                    }
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        mma_f16(acc[n0 + n], al, b[2*n], b[2*n + 1]);
                    }
                }
            }
        }
        if (!dense) {
#pragma unroll
            for (int n = 0; n < D/8; ++n) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    acc[n][j] *= rsqrtf((float) D);
                }
            }
        }

        // products with the predictions
        __syncthreads();
        if (dense) {
            if (!RESIDENT) {
                load_preds();
                copy_wait();
                __syncthreads();
            }
            float sum[8][4] = {{ 0.0f }};
#pragma unroll
            for (int k = 0; k < D/16; ++k) {
                uint32_t ah[4], al[4], b0[8], b1[8];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float * c = acc[2*k + (j >> 1)] + 2*(j & 1);
                    split_f16(c[0], c[1], ah[j], al[j]);
                }
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const half * b = preds + (8*n + g)*LD + 16*k + 2*t;
                    b0[n] = *(const uint32_t *) b;
                    b1[n] = *(const uint32_t *) (b + 8);
                }
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    mma_f16(sum[n], ah, b0[n], b1[n]);
                }
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    mma_f16(sum[n], al, b0[n], b1[n]);
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = 16*warp + g + 8*e;
                if (r < n_rows) {
                    float * dst = f.pred + (f.index(a, s, frame0, h)*8*mt + row_query[r])*SEQKV_FRAME;
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        *(float2 *) (dst + 8*n + 2*t) = make_float2(sum[n][2*e], sum[n][2*e + 1]);
                    }
                }
            }
        }

        // digits; hi and lo are done with
        float inv[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float max = 0.0f;
#pragma unroll
            for (int n = 0; n < D/8; ++n) {
                max = fmaxf(max, fmaxf(fabsf(acc[n][2*e]), fabsf(acc[n][2*e + 1])));
            }
            max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
            inv[e] = max > 0.0f ? DIGITS/max : 0.0f;
            const int r = 16*warp + g + 8*e;
            if (t == 0 && r < n_rows) {
                f.scale[f.index(a, s, frame0, h)*8*mt + row_query[r]] = max/DIGITS;
            }
#pragma unroll
            for (int n = 0; n < D/8; ++n) {
                *(float2 *) (out + r*(D + 4) + 8*n + 2*t) = make_float2(acc[n][2*e]*inv[e], acc[n][2*e + 1]*inv[e]);
            }
        }
        __syncthreads();
        const int   run = threadIdx.x%(D/4)/4, tt = threadIdx.x%4;
        uint32_t  * dst = digits_of<D>(f, f.index(a, s, frame0, h), mt) + (run/2*32 + tt)*4 + run%2*2;
        const float * from = out + 16*run + tt;
#pragma unroll 4
        for (int r = threadIdx.x/(D/4); r < n_rows; r += NT/(D/4)) {
            uint32_t upper = 0, lower = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int x = __float2int_rn(from[r*(D + 4) + 4*j]);
                const int u = (x + 64) >> 7;
                upper |= (uint32_t) (u & 255) << 8*j;
                lower |= (uint32_t) ((x - 128*u) & 255) << 8*j;
            }
            *(uint2 *) (dst + row_digits[r]) = make_uint2(upper, lower);
        }
        __syncthreads();
    }
    if (overlap) {
        ggml_cuda_pdl_sync();
    }
}

//
// attention
//

template <int D> struct decode_smem {
    static constexpr int NB  = D/64;
    static constexpr int LDK = D + 16;            // bytes: conflict-free for what reads them
    static constexpr int LDV = D + 8;
    static constexpr int LDP = TILE + 16;
    static constexpr int RAW = (NB*34 + 6)/4 | 1; // words of a row of raw cells, odd
    uint32_t raw_k[TILE*RAW + 3];
    uint32_t raw_v[TILE*RAW + 3];
    __align__(16) int8_t k[TILE*LDK];
    __align__(16) int8_t v[TILE*LDV];
    __align__(16) int8_t p[NB*16*LDP];
    __align__(16) float  gain_k[NB*3*TILE];
    float gain_v[NB*TILE];
    float max_v[NB*2];
    float max_s[WARPS*8];
    __align__(8) int cell[TILE]; // offset | tokens that attend to it << 8
    int   origin[TILE];          // -1: not attended to
    int   first[2], last[2], next;
};

// 64 rows of the cells of a head, n of them in use -> raw words, as they are aligned in memory. Half a warp a row.
template <int RAW> SEQKV_FN void load_raw(uint32_t * raw, const char * cells, int64_t nb1, int size, int n) {
    const int r0 = threadIdx.x/16, w0 = threadIdx.x%16;
    const int words = (size + 6)/4;
    for (int w = w0; w < words; w += 16) {
        const char * at  = cells + r0*nb1 + 4*w;
        uint32_t   * dst = raw + r0*RAW + w;
        if (nb1 % 4 == 0 && n == TILE) {
            const int skew = (int) (uintptr_t) at & 3;
            at -= skew;
            if (4*w - skew < size) {
#pragma unroll
                for (int r = 0; r < TILE; r += THREADS/16) {
                    copy_async4(dst + r*RAW, at);
                    at += (THREADS/16)*nb1;
                }
            }
            continue;
        }
#pragma unroll 1
        for (int r = 0; r < TILE; r += THREADS/16) {
            const int skew = (int) (uintptr_t) at & 3; // 4*w does not change it
            if (r + r0 < n && 4*w - skew < size) {
                copy_async4(dst + r*RAW, at - skew);
            }
            at += (THREADS/16)*nb1;
        }
    }
}

SEQKV_FN int64_t part_index(const seqkv_view & a, const seqkv_parts & parts, int s, int h, int iq, int part) {
    return (((int64_t) s*a.n_tokens + iq/a.group)*a.n_head + h*a.group + iq%a.group)*parts.n_parts + part;
}

// Exact rows [j0, j0 + EXACT) of one KV head: plain float arithmetic
template <int D, int MT>
static __device__ void exact_part(const seqkv_view & a, const seqkv_parts & parts, float * smem, int s, int h, int j0, int part) {
    constexpr int KD = D/WARP_SIZE, ND = (D + THREADS - 1)/THREADS, KR = EXACT/WARPS;
    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE;
    const int n = min(EXACT, a.n_virt - j0);
    float * q     = smem;                 // (nq, D)
    float * logit = q + 8*MT*D;           // (nq, EXACT): logits, then p
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt + j0;

    // everything that is read, at once
    for (int i = threadIdx.x; i < nq*(D/4); i += THREADS) {
        const int iq = i/(D/4);
        ((float4 *) q)[i] = ((const float4 *) a.query(s, iq/a.group, h*a.group + iq%a.group))[i%(D/4)];
    }
    float k[KR][KD], other[KR][KD];
    float2 cs[KR][KD];
    float v[ND][EXACT];
    int32_t origin[KR];
    int     seen[KR]; // tokens that attend to the row
#pragma unroll
    for (int e = 0; e < KR; ++e) {
        const int r = warp + e*WARPS;
        origin[e] = r < n ? meta[r] : -1;
        seen[e]   = 0;
        for (int i = 0; i < a.n_tokens && r < n; ++i) {
            seen[e] |= __half2float(a.mask_row(s, i)[j0 + r]) == 0.0f ? 1 << i : 0;
        }
        const half * row = a.exact(s, min(j0 + r, a.n_virt - 1)) + h*D;
#pragma unroll
        for (int c = 0; c < KD; ++c) {
            const int i = c*WARP_SIZE + lane, half_rot = a.p.n_rot/2;
            k[e][c]     = __half2float(row[i]);
            other[e][c] = i >= a.p.n_rot ? 0.0f : __half2float(row[a.p.neox ? (i >= half_rot ? i - half_rot : i + half_rot) : i ^ 1]);
        }
    }
#pragma unroll
    for (int c = 0; c < ND; ++c) {
        const int i = c*THREADS + threadIdx.x;
#pragma unroll
        for (int r = 0; r < EXACT; ++r) {
            v[c][r] = i < D && r < n ? __half2float(a.exact(s, j0 + r)[a.p.n_head_kv*D + h*D + i]) : 0.0f;
        }
    }
#pragma unroll
    for (int e = 0; e < KR; ++e) {
#pragma unroll
        for (int c = 0; c < KD; ++c) {
            const int i = c*WARP_SIZE + lane, half_rot = a.p.n_rot/2;
            const int pair = a.p.neox ? (i >= half_rot ? i - half_rot : i) : i/2;
            cs[e][c] = origin[e] < 0 || i >= a.p.n_rot ? make_float2(1.0f, 0.0f) : ((const float2 *) a.rot.origin(origin[e]))[pair];
        }
    }
#pragma unroll
    for (int e = 0; e < KR; ++e) {
#pragma unroll
        for (int c = 0; c < KD; ++c) {
            const int  i      = c*WARP_SIZE + lane;
            const bool second = a.p.neox ? i >= a.p.n_rot/2 : i & 1;
            k[e][c] = k[e][c]*cs[e][c].x + (second ? other[e][c] : -other[e][c])*cs[e][c].y;
        }
    }
    __syncthreads();
    for (int iq = 0; iq < nq; ++iq) {
        const int token = iq/a.group;
#pragma unroll
        for (int e = 0; e < KR; ++e) {
            const int r = warp + e*WARPS;
            float dot = 0.0f;
#pragma unroll
            for (int c = 0; c < KD; ++c) {
                dot += q[iq*D + c*WARP_SIZE + lane]*k[e][c];
            }
            dot = warp_reduce_sum(dot);
            if (lane == 0) {
                logit[iq*EXACT + r] = origin[e] >= 0 && (seen[e] >> token & 1) ? seqkv_logit(dot, a.p) : -INFINITY;
            }
        }
    }
    __syncthreads();
    for (int iq0 = 0; iq0 < nq; iq0 += THREADS/EXACT) {
        const int   iq = iq0 + threadIdx.x/EXACT;
        const float x  = iq < nq ? logit[iq*EXACT + threadIdx.x%EXACT] : -INFINITY;
        const float m = warp_reduce_max<EXACT>(x);
        const float p = x == -INFINITY ? 0.0f : __expf(x - m);
        const float l = warp_reduce_sum<EXACT>(p);
        if (iq < nq) {
            logit[iq*EXACT + threadIdx.x%EXACT] = p;
        }
        if (iq < nq && threadIdx.x%EXACT == 0) {
            parts.ml[part_index(a, parts, s, h, iq, part)] = make_float2(m, l);
        }
    }
    __syncthreads();
    for (int iq = 0; iq < nq; ++iq) {
        const int64_t at = part_index(a, parts, s, h, iq, part)*D;
#pragma unroll
        for (int c = 0; c < ND; ++c) {
            float sum = 0.0f;
#pragma unroll
            for (int r = 0; r < EXACT; ++r) {
                sum += logit[iq*EXACT + r]*v[c][r];
            }
            if (c*THREADS + threadIdx.x < D) {
                parts.acc[at + c*THREADS + threadIdx.x] = sum;
            }
        }
    }
}

// blockIdx: (part, KV head, stream). D: head_dim of keys and values, MT: tiles of 8 queries.
template <int D, int MT>
static __global__ void __launch_bounds__(THREADS, MT == 1 && D <= 128 ? 6 : 1) decode_kernel(seqkv_view a, frame_queries f, seqkv_parts parts) {
    using smem_t = decode_smem<D>;
    constexpr int NB = smem_t::NB, LDK = smem_t::LDK, LDV = smem_t::LDV, LDP = smem_t::LDP, RAW = smem_t::RAW;
    constexpr int SLABS = (D + 127)/128;               // slabs of 32 dims of a warp
    constexpr int KEY_PARTS = D == 64 ? 2 : 1;         // warps that share a slab, each with its half of the keys
    extern __shared__ __align__(16) char smem_raw[];
    smem_t & sm = *(smem_t *) smem_raw;
    uint32_t * sm_q    = (uint32_t *) (smem_raw + (sizeof(smem_t) + 15)/16*16); // digits of one origin
    float    * sm_pred  = (float *) (sm_q + MT*D*4);                            // (8*MT, 72)
    float    * sm_scale = sm_pred + 8*MT*72;                                    // (8*MT)

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    const int h = blockIdx.y, s = blockIdx.z;
    if ((int) blockIdx.x >= parts.n_z) {
        exact_part<D, MT>(a, parts, (float *) smem_raw, s, h, a.p.n_kv + (blockIdx.x - parts.n_z)*EXACT, blockIdx.x);
        return;
    }

    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const bool dense = a.form_k == SEQKV_DENSE;
    const int n_tiles = (a.p.n_kv + TILE - 1)/TILE;
    const int tile0 = (int64_t) blockIdx.x*n_tiles/parts.n_z, tile1 = (int64_t) (blockIdx.x + 1)*n_tiles/parts.n_z;
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt;

    for (int i = threadIdx.x; i < MT*D*4 + 8*MT*73; i += THREADS) {
        sm_q[i] = 0; // rows without a query stay 0
    }
    const auto load_tile = [&](int tile) {
        const int n = min(TILE, a.p.n_kv - tile*TILE);
        load_raw<RAW>(sm.raw_k, a.cell_k(s, (int64_t) tile*TILE, h), a.k_nb1, a.size_k, n);
        load_raw<RAW>(sm.raw_v, a.cell_v(s, (int64_t) tile*TILE, h), a.v_nb1, a.size_v, n);
    };
    // a cell of a tile for this thread: its meta, and which tokens attend to it
    int32_t next_meta = -1, next_seen = 0;
    const auto load_meta = [&](int tile) {
        const int j = tile*TILE + threadIdx.x;
        next_seen = 0;
        if (threadIdx.x < TILE && tile < tile1 && j < a.p.n_kv) {
            next_meta = meta[j];
            for (int i = 0; i < a.n_tokens; ++i) {
                next_seen |= __half2float(a.mask_row(s, i)[j]) == 0.0f ? 1 << i : 0;
            }
        }
    };
    const auto load_queries = [&](int origin) {
        const int64_t index = f.index(a, s, origin - SEQKV_FRAME, h);
        const uint4 * digits = (const uint4 *) digits_of<D>(f, index, MT);
        for (int i = threadIdx.x; i < MT*D; i += THREADS) {
            if (i/D*8 + i%32/4 < nq) {
                copy_async16((uint4 *) sm_q + i, digits + i);
            }
        }
        if (threadIdx.x < 8*MT && threadIdx.x < nq) {
            copy_async4(sm_scale + threadIdx.x, f.scale + index*8*MT + threadIdx.x);
        }
        if (dense) {
            for (int i = threadIdx.x; i < nq*16; i += THREADS) {
                copy_async16(sm_pred + i/16*72 + i%16*4, f.pred + index*8*MT*SEQKV_FRAME + 4*i);
            }
        }
    };

    float m[MT], l[MT];
    float acc[MT][SLABS][4][2];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
        m[i] = -INFINITY;
        l[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < SLABS*4; ++j) {
            acc[i][j/4][j%4][0] = acc[i][j/4][j%4][1] = 0.0f;
        }
    }

    if (tile0 < tile1) {
        load_tile(tile0);
    }
    load_meta(tile0);
    for (int tile = tile0; tile < tile1; ++tile) {
        if (threadIdx.x < TILE) {
            const int origin = next_seen == 0 ? -1 : next_meta >> 8;
            sm.cell  [threadIdx.x] = (next_meta & 63) | (origin < 0 ? 0 : next_seen << 8);
            sm.origin[threadIdx.x] = origin;
            int first = origin < 0 ? INT_MAX : origin, last = origin;
            for (int i = 16; i > 0; i /= 2) {
                first = min(first, __shfl_xor_sync(0xffffffff, first, i));
                last  = max(last,  __shfl_xor_sync(0xffffffff, last,  i));
            }
            if (lane == 0) {
                sm.first[warp] = first;
                sm.last [warp] = last;
            }
        }
        copy_wait();
        __syncthreads();
        int       origin = min(sm.first[0], sm.first[1]);
        const int last   = max(sm.last [0], sm.last [1]);
        const bool one_origin = origin == last;
        if (last < 0) { // nothing attended to
            __syncthreads();
            load_meta(tile + 1);
            if (tile + 1 < tile1) {
                load_tile(tile + 1);
            }
            continue;
        }
        load_queries(origin);

        // levels and gains
#pragma unroll 1
        for (int item = threadIdx.x; item < 2*NB*TILE; item += THREADS) {
            const int r = item%TILE, b = item/TILE%NB;
            uint32_t out[16];
            float    factor[3];
            if (item < NB*TILE) {
                const int byte = (int) ((uintptr_t) a.cell_k(s, (int64_t) tile*TILE + r, h) & 3) + b*(a.size_k/NB);
                decode_any(a.bits_k, a.graded_k, sm.raw_k + r*RAW, byte, out, factor);
                const bool used = sm.origin[r] >= 0;
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                    sm.gain_k[(3*b + i)*TILE + r] = used ? factor[i] : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    *(uint4 *) (sm.k + r*LDK + 64*b + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                }
            } else {
                const int byte = (int) ((uintptr_t) a.cell_v(s, (int64_t) tile*TILE + r, h) & 3) + b*(a.size_v/NB);
                decode_any(a.bits_v, 0, sm.raw_v + r*RAW, byte, out, factor);
                const float gain = sm.origin[r] >= 0 ? factor[0] : 0.0f;
                const float max  = warp_reduce_max(gain);
                sm.gain_v[b*TILE + r] = gain;
                if (lane == 0) {
                    sm.max_v[2*b + r/WARP_SIZE] = max;
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    *(uint2 *) (sm.v + r*LDV + 64*b + 8*i) = make_uint2(out[2*i], out[2*i + 1]);
                }
            }
        }
        copy_wait();
        __syncthreads();
        load_meta(tile + 1);
        if (tile + 1 < tile1) {
            load_tile(tile + 1);
        }

        // scores: this warp's 16 keys, one pass for each origin in the tile
        float sc[MT][2][2];
#pragma unroll
        for (int i = 0; i < MT*4; ++i) {
            sc[i/4][i/2%2][i%2] = -INFINITY;
        }
        while (true) {
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                const int   iq     = 8*i + g;
                const float factor = sm_scale[iq];
                const int   seen   = iq < nq ? 256 << iq/a.group : 0;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int key = 16*warp + 8*n;
                    const int8_t * row = sm.k + (key + g)*LDK + 4*t;
                    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
                    for (int b = 0; b < NB; ++b) {
                        const uint4 q0 = ((const uint4 *) sm_q)[(i*2*NB + 2*b)*32 + lane];
                        const uint4 q1 = ((const uint4 *) sm_q)[(i*2*NB + 2*b + 1)*32 + lane];
                        const uint32_t q[8] = { q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w };
                        int c[3][4] = {{ 0 }};
                        mma_s8_k16(c[0], q,     *(const uint32_t *) (row + 64*b));
                        mma_s8_k16(c[1], q + 2, *(const uint32_t *) (row + 64*b + 16));
                        mma_s8_k32(c[2], q + 4, *(const uint32_t *) (row + 64*b + 32), *(const uint32_t *) (row + 64*b + 48));
#pragma unroll
                        for (int k = 0; k < 3; ++k) {
                            const float2 gain = *(const float2 *) (sm.gain_k + (3*b + k)*TILE + key + 2*t);
                            sum0 += gain.x*(float) (128*c[k][0] + c[k][2]);
                            sum1 += gain.y*(float) (128*c[k][1] + c[k][3]);
                        }
                    }
                    const float sum[2] = { sum0, sum1 };
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int j    = key + 2*t + e;
                        const int cell = sm.cell[j];
                        if ((cell & seen) && (one_origin || sm.origin[j] == origin)) {
                            sc[i][n][e] = seqkv_logit(factor*sum[e] + (dense ? sm_pred[iq*72 + (cell & 63)] : 0.0f), a.p);
                        }
                    }
                }
            }
            if (origin == last) {
                break;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                sm.next = INT_MAX;
            }
            __syncthreads();
            if (threadIdx.x < TILE && sm.origin[threadIdx.x] > origin) {
                atomicMin(&sm.next, sm.origin[threadIdx.x]);
            }
            __syncthreads();
            origin = sm.next;
            load_queries(origin);
            copy_wait();
            __syncthreads();
        }

        // softmax and digits of p*gain, MT tiles one after the other
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            float max = fmaxf(fmaxf(sc[i][0][0], sc[i][0][1]), fmaxf(sc[i][1][0], sc[i][1][1]));
            max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
            if (t == 0) {
                sm.max_s[warp*8 + g] = max;
            }
            __syncthreads();
            const float m_tile = fmaxf(fmaxf(sm.max_s[g], sm.max_s[8 + g]), fmaxf(sm.max_s[16 + g], sm.max_s[24 + g]));
            const float m_new  = fmaxf(m[i], m_tile);
            const float f_old  = m[i]   == -INFINITY ? 0.0f : __expf(m[i]   - m_new);
            const float f_tile = m_tile == -INFINITY ? 0.0f : __expf(m_tile - m_new);
            m[i] = m_new;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float p[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    p[e] = sc[i][n][e] == -INFINITY ? 0.0f : __expf(sc[i][n][e] - m_tile);
                    sum += p[e];
                }
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    const float  max_v = fmaxf(sm.max_v[2*b], sm.max_v[2*b + 1]);
                    const float  inv   = max_v > 0.0f ? DIGITS/max_v : 0.0f;
                    const float2 gain  = *(const float2 *) (sm.gain_v + b*TILE + 16*warp + 8*n + 2*t);
                    const int x = __float2int_rn(p[0]*(gain.x*inv)), y = __float2int_rn(p[1]*(gain.y*inv));
                    const int u = (x + 64) >> 7, v = (y + 64) >> 7;
                    int8_t * dst = sm.p + (b*16 + g)*LDP + 16*warp + 8*n + 2*t;
                    *(uint16_t *) dst           = (uint16_t) ((u & 255) | (v & 255) << 8);
                    *(uint16_t *) (dst + 8*LDP) = (uint16_t) (((x - 128*u) & 255) | ((y - 128*v) & 255) << 8);
                }
            }
            l[i] = l[i]*f_old + sum*f_tile;
            __syncthreads();

            // values
#pragma unroll
            for (int sl = 0; sl < SLABS; ++sl) {
                const int slab = D == 64 ? warp%2 : SLABS*warp + sl;
                const int b    = slab/2;
                const float f_v = f_tile*fmaxf(sm.max_v[2*b], sm.max_v[2*b + 1])*(1.0f/DIGITS);
                int c[4][4] = {{ 0 }};
#pragma unroll
                for (int ks = 0; ks < 2/KEY_PARTS; ++ks) {
                    const int k0 = 32*(KEY_PARTS == 2 ? warp/2 : ks);
                    uint32_t pa[4], vb[2][4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        pa[j] = *(const uint32_t *) (sm.p + (b*16 + g + 8*(j & 1))*LDP + k0 + 4*t + 16*(j >> 1));
                    }
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        uint32_t r[4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            r[j] = *(const uint32_t *) (sm.v + (k0 + 16*e + 4*t + j)*LDV + 32*slab + 4*g);
                        }
                        const uint32_t x0 = seqkv_prmt(r[0], r[1], 0x5140), x1 = seqkv_prmt(r[2], r[3], 0x5140);
                        const uint32_t x2 = seqkv_prmt(r[0], r[1], 0x7362), x3 = seqkv_prmt(r[2], r[3], 0x7362);
                        vb[e][0] = seqkv_prmt(x0, x1, 0x5410);
                        vb[e][1] = seqkv_prmt(x0, x1, 0x7632);
                        vb[e][2] = seqkv_prmt(x2, x3, 0x5410);
                        vb[e][3] = seqkv_prmt(x2, x3, 0x7632);
                    }
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        mma_s8_k32(c[j], pa, vb[0][j], vb[1][j]);
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    acc[i][sl][j][0] = acc[i][sl][j][0]*f_old + f_v*(float) (128*c[j][0] + c[j][2]);
                    acc[i][sl][j][1] = acc[i][sl][j][1]*f_old + f_v*(float) (128*c[j][1] + c[j][3]);
                }
            }
            if (i + 1 < MT) {
                __syncthreads();
            }
        }
    }

    copy_wait();
    __syncthreads();
    float * sum = (float *) smem_raw; // (WARPS, 8) of l, then (2, 8, 64) of acc for D = 64
#pragma unroll
    for (int i = 0; i < MT; ++i) {
        float li = l[i] + __shfl_xor_sync(0xffffffff, l[i], 1);
        li += __shfl_xor_sync(0xffffffff, li, 2);
        if (t == 0) {
            sum[warp*8 + g] = li;
        }
        if (KEY_PARTS == 2) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    sum[64 + (warp/2*8 + g)*64 + 32*(warp%2) + 4*(2*t + e) + j] = acc[i][0][j][e];
                }
            }
        }
        __syncthreads();
        const int iq = 8*i + g;
        if (iq < nq) {
            const int64_t part = part_index(a, parts, s, h, iq, blockIdx.x);
            if (warp == 0 && t == 0) {
                parts.ml[part] = make_float2(m[i], sum[g] + sum[8 + g] + sum[16 + g] + sum[24 + g]);
            }
            if (KEY_PARTS == 2) {
                for (int j = 4*warp + t; j < 64; j += 16) {
                    parts.acc[part*D + j] = sum[64 + g*64 + j] + sum[64 + (8 + g)*64 + j];
                }
            } else {
#pragma unroll
                for (int sl = 0; sl < SLABS; ++sl) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        *(float4 *) (parts.acc + part*D + 32*(SLABS*warp + sl) + 4*(2*t + e)) =
                            make_float4(acc[i][sl][0][e], acc[i][sl][1][e], acc[i][sl][2][e], acc[i][sl][3][e]);
                    }
                }
            }
        }
        __syncthreads();
    }
}

template <int D> static constexpr size_t decode_smem_bytes(int mt) {
    return (sizeof(decode_smem<D>) + 15)/16*16 + mt*D*16 + 8*mt*73*sizeof(float);
}

template <int D, int MT>
static void decode_case(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, bool overlap) {
    const seqkv_view a = seqkv_view_of(dst);
    cudaStream_t stream = ctx.stream();

    frame_queries f;
    f.n_frames = (int) dst->src[8]->ne[1] - SEQKV_FRAME;
    const int64_t n = (int64_t) a.n_stream*f.n_frames*a.p.n_head_kv;
    ggml_cuda_pool_alloc<uint32_t> digits(ctx.pool(), n*MT*D*4);
    ggml_cuda_pool_alloc<float>    scale (ctx.pool(), n*MT*8);
    ggml_cuda_pool_alloc<float>    pred  (ctx.pool(), a.form_k == SEQKV_DENSE ? n*MT*8*SEQKV_FRAME : 1);
    f.digits = digits.get();
    f.scale  = scale.get();
    f.pred   = pred.get();

    const int nq = a.n_tokens*a.group;
    const size_t     smem_q = query_smem(D, nq);
    constexpr size_t smem   = decode_smem_bytes<D>(MT);
    static_assert(8*MT*(D + EXACT)*sizeof(float) <= smem, "exact rows work in the same memory");
    CUDA_SET_SHARED_MEMORY_LIMIT((queries_kernel<D>), query_smem(D, 8*MAX_MT));
    CUDA_SET_SHARED_MEMORY_LIMIT((decode_kernel<D, MT>), smem);

    const int nsm    = ggml_cuda_info().devices[ctx.device].nsm;
    const int frames = query_rows(D)/nq; // of a block at a time
    const int groups = std::min((f.n_frames + frames - 1)/frames, std::max(1, 2*nsm/(a.p.n_head_kv*a.n_stream)));
    ggml_cuda_kernel_launch(queries_kernel<D>, ggml_cuda_kernel_launch_params(dim3(groups, a.p.n_head_kv, a.n_stream), dim3(query_rows(D)*2), smem_q, stream),
        a, f, MT, overlap);

    static int per_sm[GGML_CUDA_MAX_DEVICES] = { 0 };
    if (per_sm[ctx.device] == 0) {
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm[ctx.device], decode_kernel<D, MT>, THREADS, smem));
    }
    const int n_tiles = (a.p.n_kv + TILE - 1)/TILE;
    const int blocks  = nsm*std::max(1, per_sm[ctx.device]);

    seqkv_parts parts;
    parts.n_z      = std::max(1, std::min(n_tiles, blocks/(a.p.n_head_kv*a.n_stream)));
    parts.n_parts  = parts.n_z + (a.n_virt - a.p.n_kv + EXACT - 1)/EXACT;
    parts.permuted = 1;
    const int64_t n_out = (int64_t) a.n_stream*a.n_tokens*a.n_head*parts.n_parts;
    ggml_cuda_pool_alloc<float2> ml (ctx.pool(), n_out);
    ggml_cuda_pool_alloc<float>  acc(ctx.pool(), n_out*D);
    parts.ml  = ml.get();
    parts.acc = acc.get();

    ggml_cuda_kernel_launch(decode_kernel<D, MT>, ggml_cuda_kernel_launch_params(dim3(parts.n_parts, a.p.n_head_kv, a.n_stream), dim3(THREADS), smem, stream),
        a, f, parts);
    seqkv_combine(ctx, a, parts, rows);
}

template <int D> static void decode_tiles(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, bool overlap, int n_queries) {
    if (n_queries <= 8) {
        decode_case<D, 1>(ctx, dst, rows, overlap);
    } else if (n_queries <= 16) {
        decode_case<D, 2>(ctx, dst, rows, overlap);
    } else {
        decode_case<D, MAX_MT>(ctx, dst, rows, overlap);
    }
}

void seqkv_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * rows, bool overlap) {
    const ggml_seqkv_params p = seqkv_params(dst);
    const int n_queries = (int) (dst->src[0]->ne[2]/dst->src[1]->ne[2]*dst->src[0]->ne[1]/p.n_head_kv);
    switch (p.dk) {
        case 64:  decode_tiles< 64>(ctx, dst, rows, overlap, n_queries); break;
        case 128: decode_tiles<128>(ctx, dst, rows, overlap, n_queries); break;
        default:  decode_tiles<256>(ctx, dst, rows, overlap, n_queries); break;
    }
}

bool seqkv_decode_supported(int device, const ggml_tensor * dst) {
    const auto & info = ggml_cuda_info().devices[device];
    const ggml_seqkv_params p = seqkv_params(dst);
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const int64_t n_queries = q->ne[2]/k->ne[2]*q->ne[1]/p.n_head_kv;
    if (!turing_mma_available(info.cc) || p.dk != p.dv || n_queries > 8*MAX_MT || p.n_kv == 0 ||
            !ggml_seqkv_bits(k->type) || !ggml_seqkv_bits(v->type) || ggml_seqkv_graded(v->type)) {
        return false;
    }
    const int    mt   = n_queries <= 8 ? 1 : n_queries <= 16 ? 2 : MAX_MT;
    const size_t smem = p.dk == 64 ? decode_smem_bytes<64>(mt) : p.dk == 128 ? decode_smem_bytes<128>(mt) : decode_smem_bytes<256>(mt);
    return std::max(smem, (size_t) query_smem(p.dk, 8*MAX_MT)) <= info.smpbo;
}
