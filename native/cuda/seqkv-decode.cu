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
#include "seqkv-mma.cuh"
#include "seqkv-unpack.cuh"

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

static constexpr __host__ __device__ int query_rows(int d) { return d == 256 ? 32 : 64; } // rows of a block: frame x query
static constexpr __host__ __device__ int query_smem(int d) { return (2*query_rows(d) + 64)*(d + 8)*2; }

template <int D>
static __global__ void __launch_bounds__(query_rows(D)*2) queries_kernel(seqkv_view a, frame_queries f, int mt) {
    constexpr int ROWS = query_rows(D), LD = D + 8, NT = ROWS*2;
    extern __shared__ __align__(16) half smem_h[];
    half * hi    = smem_h;         // (ROWS, LD)
    half * lo    = hi + ROWS*LD;   // (ROWS, LD)
    half * chunk = lo + ROWS*LD;   // (64, LD)
    float * out  = (float *) smem_h; // (ROWS, D + 4), later

    const int h = blockIdx.y, s = blockIdx.z;
    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const int row0   = blockIdx.x*ROWS;
    const int n_rows = min(ROWS, f.n_frames*nq - row0);
    const bool dense = a.form_k == SEQKV_DENSE;

    // rotated queries, a pair at a time
    for (int i = threadIdx.x; i < ROWS*(D/2); i += NT) {
        const int r = i/(D/2), pair = i%(D/2);
        int2   at = make_int2(2*pair, 2*pair + 1);
        float2 x  = make_float2(0.0f, 0.0f);
        if (r < n_rows) {
            const int frame = (row0 + r)/nq, iq = (row0 + r)%nq;
            const float * q = a.query(s, iq/a.group, h*a.group + iq%a.group);
            const bool rotated = pair < a.p.n_rot/2;
            at = rotated ? seqkv_pair(pair, a.p.n_rot, a.p.neox) : at;
            x  = make_float2(q[at.x], q[at.y]);
            if (rotated) {
                const float2 cs = ((const float2 *) (a.rot.base + (int64_t) (SEQKV_FRAME + frame)*a.rot.stride))[pair];
                x = make_float2(x.x*cs.x + x.y*cs.y, x.y*cs.x - x.x*cs.y);
            }
        }
        const half u = __float2half(x.x), v = __float2half(x.y);
        hi[r*LD + at.x] = u;
        hi[r*LD + at.y] = v;
        lo[r*LD + at.x] = __float2half(x.x - __half2float(u));
        lo[r*LD + at.y] = __float2half(x.y - __half2float(v));
    }

    float acc[D/8][4] = {{ 0.0f }};
    for (int k0 = 0; k0 < D; k0 += 64) {
        __syncthreads();
        for (int i = threadIdx.x; i < 64*D/8; i += NT) {
            const int k = i/(D/8), n = i%(D/8)*8;
            uint4 x;
            if (dense) {
                x = *(const uint4 *) (a.tables.dec(h) + (k0 + k)*D + n);
            } else {
                uint32_t * w = (uint32_t *) &x;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    w[j] = 0x3c003c00 | (__popc((k0 + k) & (n + 2*j)) & 1) << 15 | (uint32_t) (__popc((k0 + k) & (n + 2*j + 1)) & 1) << 31;
                }
            }
            *(uint4 *) (chunk + k*LD + n) = x;
        }
        __syncthreads();
        for (int kk = 0; kk < 64; kk += 16) {
            uint32_t ah[4], al[4];
            const int at = (16*warp + g)*LD + k0 + kk + 2*t;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int o = at + (j & 1)*8*LD + (j >> 1)*8;
                ah[j] = *(const uint32_t *) (hi + o);
                al[j] = *(const uint32_t *) (lo + o);
            }
#pragma unroll
            for (int n = 0; n < D/8; ++n) {
                uint32_t b0, b1;
                load_b_transposed(b0, b1, chunk + (kk + lane%16)*LD + 8*n);
                mma_f16(acc[n], ah, b0, b1);
                mma_f16(acc[n], al, b0, b1);
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
        const half * pred = a.tables.pred(h);
        for (int i = threadIdx.x; i < 64*D/8; i += NT) {
            *(uint4 *) (chunk + i/(D/8)*LD + i%(D/8)*8) = *(const uint4 *) (pred + 8*i);
        }
        __syncthreads();
        float sum[8][4] = {{ 0.0f }};
#pragma unroll
        for (int k = 0; k < D/16; ++k) {
            uint32_t ah[4], al[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float * c = acc[2*k + (j >> 1)] + 2*(j & 1);
                split_f16(c[0], c[1], ah[j], al[j]);
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const half * b = chunk + (8*n + g)*LD + 16*k + 2*t;
                const uint32_t b0 = *(const uint32_t *) b, b1 = *(const uint32_t *) (b + 8);
                mma_f16(sum[n], ah, b0, b1);
                mma_f16(sum[n], al, b0, b1);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = 16*warp + g + 8*e;
            if (r < n_rows) {
                const int frame = (row0 + r)/nq, iq = (row0 + r)%nq;
                float * dst = f.pred + (f.index(a, s, frame, h)*8*mt + iq)*SEQKV_FRAME;
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
            f.scale[f.index(a, s, (row0 + r)/nq, h)*8*mt + (row0 + r)%nq] = max/DIGITS;
        }
#pragma unroll
        for (int n = 0; n < D/8; ++n) {
            *(float2 *) (out + r*(D + 4) + 8*n + 2*t) = make_float2(acc[n][2*e]*inv[e], acc[n][2*e + 1]*inv[e]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS*(D/4); i += NT) {
        const int r = i/(D/4), run = i%(D/4)/4, tt = i%4;
        if (r >= n_rows) {
            break;
        }
        uint32_t upper = 0, lower = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int x = __float2int_rn(out[r*(D + 4) + 16*run + 4*j + tt]);
            const int u = (x + 64) >> 7;
            upper |= (uint32_t) (u & 255) << 8*j;
            lower |= (uint32_t) ((x - 128*u) & 255) << 8*j;
        }
        const int frame = (row0 + r)/nq, iq = (row0 + r)%nq, reg = 2*run;
        uint32_t * dst = digits_of<D>(f, f.index(a, s, frame, h), mt) + (((iq/8*(D/32) + reg/4)*32 + iq%8*4 + tt)*4 + reg%4);
        *(uint2 *) dst = make_uint2(upper, lower);
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
    int   offset[TILE];
    int   origin[TILE]; // -1: not attended to
    int   first[2], last[2], next;
};

// rows [j0, j0 + 64) of the cells of a head -> raw words, as they are aligned in memory
template <int RAW> SEQKV_FN void load_raw(uint32_t * raw, const char * cells, int64_t nb1, int size, int n) {
    const int words = (size + 6)/4;
    for (int i = threadIdx.x; i < TILE*words; i += THREADS) {
        const int r = i/words, w = i - r*words;
        const uintptr_t at  = (uintptr_t) (cells + r*nb1);
        const uintptr_t src = (at & ~(uintptr_t) 3) + 4*w;
        if (r < n && src < at + size) {
            copy_async4(raw + r*RAW + w, (const void *) src);
        }
    }
}

// block at a byte of raw words -> 16 words of levels in stored order
template <int bits, int graded> SEQKV_FN void unpack_raw(const uint32_t * raw, int byte, uint32_t & gain, uint32_t * out) {
    const int at = byte + 1 + graded;
    gain = raw[byte/4] >> 8*(byte%4);
    if (graded && byte%4 == 3) {
        gain = (gain & 255) | raw[byte/4 + 1] << 8;
    }
    const int shift = at%4*8;
    uint32_t w[2*bits];
    uint32_t x = raw[at/4];
#pragma unroll
    for (int i = 0; i < 2*bits; ++i) {
        const uint32_t y = i < 2*bits - 1 || shift ? raw[at/4 + i + 1] : 0;
        w[i] = __funnelshift_r(x, y, shift);
        x = y;
    }
    seqkv_unpack_block<bits, graded>(w, out);
}

// One row's block: levels -> dst, factors of its groups -> factor[3]
template <int bits, int graded> SEQKV_FN void decode_block(const uint32_t * raw, int byte, uint32_t * out, float (&factor)[3]) {
    uint32_t gain;
    unpack_raw<bits, graded>(raw, byte, gain, out);
    if (graded) {
        factor[0] = seqkv_gain_graded[gain       & 31]*seqkv_scale[bits + 2];
        factor[1] = seqkv_gain_graded[gain >>  5 & 31]*seqkv_scale[bits];
        factor[2] = seqkv_gain_graded[gain >> 10 & 31]*seqkv_scale[bits - 1];
    } else {
        factor[0] = factor[1] = factor[2] = seqkv_gain[gain & 255]*seqkv_scale[bits];
    }
}

SEQKV_FN void decode_any(int bits, int graded, const uint32_t * raw, int byte, uint32_t * out, float (&factor)[3]) {
    switch (bits << 1 | graded) {
        case 2:  decode_block<1, 0>(raw, byte, out, factor); break;
        case 3:  decode_block<1, 1>(raw, byte, out, factor); break;
        case 4:  decode_block<2, 0>(raw, byte, out, factor); break;
        case 5:  decode_block<2, 1>(raw, byte, out, factor); break;
        case 6:  decode_block<3, 0>(raw, byte, out, factor); break;
        case 7:  decode_block<3, 1>(raw, byte, out, factor); break;
        case 8:  decode_block<4, 0>(raw, byte, out, factor); break;
        default: decode_block<4, 1>(raw, byte, out, factor); break;
    }
}

SEQKV_FN int64_t part_index(const seqkv_view & a, const seqkv_parts & parts, int s, int h, int iq, int part) {
    return (((int64_t) s*a.n_tokens + iq/a.group)*a.n_head + h*a.group + iq%a.group)*parts.n_parts + part;
}

// Exact rows [j0, j0 + EXACT) of one KV head: plain float arithmetic
template <int D, int MT>
static __device__ void exact_part(const seqkv_view & a, const seqkv_parts & parts, float * smem, int s, int h, int j0, int part) {
    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE;
    const int n = min(EXACT, a.n_virt - j0);
    float * logit = smem;                 // (EXACT, nq)
    float * max   = logit + EXACT*8*MT;   // (nq)
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt + j0;
    for (int r = warp; r < EXACT; r += WARPS) {
        const bool used = r < n && meta[r] >= 0;
        float k[D/WARP_SIZE];
        if (used) {
            const half  * row = a.exact(s, j0 + r) + h*D;
            const float * cs  = a.rot.origin(meta[r]);
#pragma unroll
            for (int c = 0; c < D/WARP_SIZE; ++c) {
                const int i = c*WARP_SIZE + lane;
                k[c] = __half2float(row[i]);
                if (i < a.p.n_rot) {
                    const int    half_rot = a.p.n_rot/2;
                    const bool   second   = a.p.neox ? i >= half_rot : i & 1;
                    const int    pair     = a.p.neox ? i - (second ? half_rot : 0) : i/2;
                    const int    other    = a.p.neox ? (second ? i - half_rot : i + half_rot) : i ^ 1;
                    const float2 rot      = ((const float2 *) cs)[pair];
                    const float  y        = __half2float(row[other]);
                    k[c] = second ? y*rot.y + k[c]*rot.x : k[c]*rot.x - y*rot.y;
                }
            }
        }
        for (int iq = 0; iq < nq; ++iq) {
            float l = -INFINITY;
            if (used && __half2float(a.mask_row(s, iq/a.group)[j0 + r]) == 0.0f) {
                const float * q = a.query(s, iq/a.group, h*a.group + iq%a.group);
                float dot = 0.0f;
#pragma unroll
                for (int c = 0; c < D/WARP_SIZE; ++c) {
                    dot += q[c*WARP_SIZE + lane]*k[c];
                }
                l = seqkv_logit(warp_reduce_sum(dot), a.p);
            }
            if (lane == 0) {
                logit[r*nq + iq] = l;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < nq) {
        float m = -INFINITY, l = 0.0f;
        for (int r = 0; r < n; ++r) {
            m = fmaxf(m, logit[r*nq + threadIdx.x]);
        }
        for (int r = 0; r < n && m > -INFINITY; ++r) {
            l += __expf(logit[r*nq + threadIdx.x] - m);
        }
        max[threadIdx.x] = m;
        parts.ml[part_index(a, parts, s, h, threadIdx.x, part)] = make_float2(m, l);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D; i += THREADS) {
        float v[EXACT];
#pragma unroll
        for (int r = 0; r < EXACT; ++r) {
            v[r] = r < n && meta[r] >= 0 ? __half2float(a.exact(s, j0 + r)[a.p.n_head_kv*D + h*D + i]) : 0.0f;
        }
        for (int iq = 0; iq < nq; ++iq) {
            float sum = 0.0f;
            if (max[iq] > -INFINITY) {
#pragma unroll
                for (int r = 0; r < EXACT; ++r) {
                    sum += r < n ? __expf(logit[r*nq + iq] - max[iq])*v[r] : 0.0f;
                }
            }
            parts.acc[part_index(a, parts, s, h, iq, part)*D + i] = sum;
        }
    }
}

// blockIdx: (part, KV head, stream). D: head_dim of keys and values, MT: tiles of 8 queries.
template <int D, int MT>
static __global__ void __launch_bounds__(THREADS) decode_kernel(seqkv_view a, frame_queries f, seqkv_parts parts) {
    using smem_t = decode_smem<D>;
    constexpr int NB = smem_t::NB, LDK = smem_t::LDK, LDV = smem_t::LDV, LDP = smem_t::LDP, RAW = smem_t::RAW;
    constexpr int SLABS = (D + 127)/128;               // slabs of 32 dims of a warp
    constexpr int KEY_PARTS = D == 64 ? 2 : 1;         // warps that share a slab, each with its half of the keys
    extern __shared__ __align__(16) char smem_raw[];
    smem_t & sm = *(smem_t *) smem_raw;
    uint32_t * sm_q    = (uint32_t *) (smem_raw + (sizeof(smem_t) + 15)/16*16); // digits of one origin
    float    * sm_pred = (float *) (sm_q + MT*D*4);                             // (8*MT, 72)

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

    for (int i = threadIdx.x; i < MT*D*4 + 8*MT*72; i += THREADS) {
        sm_q[i] = 0; // rows without a query stay 0
    }
    const auto load_tile = [&](int tile) {
        const int n = min(TILE, a.p.n_kv - tile*TILE);
        load_raw<RAW>(sm.raw_k, a.cell_k(s, (int64_t) tile*TILE, h), a.k_nb1, a.size_k, n);
        load_raw<RAW>(sm.raw_v, a.cell_v(s, (int64_t) tile*TILE, h), a.v_nb1, a.size_v, n);
    };
    // cell of a tile for this thread: its meta, -1 if no query attends to it
    const auto load_meta = [&](int tile) {
        const int j = tile*TILE + threadIdx.x;
        if (threadIdx.x >= TILE || tile >= tile1 || j >= a.p.n_kv) {
            return -1;
        }
        bool any = false;
        for (int i = 0; i < a.n_tokens; ++i) {
            any |= __half2float(a.mask_row(s, i)[j]) == 0.0f;
        }
        return any ? meta[j] : -1;
    };
    const auto load_queries = [&](int origin) {
        const int64_t index = f.index(a, s, origin - SEQKV_FRAME, h);
        const uint4 * digits = (const uint4 *) digits_of<D>(f, index, MT);
        for (int i = threadIdx.x; i < MT*D; i += THREADS) {
            if (i/D*8 + i%32/4 < nq) {
                copy_async16((uint4 *) sm_q + i, digits + i);
            }
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
    int32_t mt_next = load_meta(tile0);
    for (int tile = tile0; tile < tile1; ++tile) {
        if (threadIdx.x < TILE) {
            const int origin = mt_next < 0 ? -1 : mt_next >> 8;
            sm.offset[threadIdx.x] = mt_next & 63;
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
        if (last < 0) { // nothing attended to
            __syncthreads();
            mt_next = load_meta(tile + 1);
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
        mt_next = load_meta(tile + 1);
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
            const float * scale = f.scale + f.index(a, s, origin - SEQKV_FRAME, h)*8*MT;
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                const int   iq     = 8*i + g;
                const float factor = iq < nq ? scale[iq] : 0.0f;
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
                        const int j = key + 2*t + e;
                        if (iq < nq && sm.origin[j] == origin && __half2float(a.mask_row(s, iq/a.group)[tile*TILE + j]) == 0.0f) {
                            sc[i][n][e] = seqkv_logit(factor*sum[e] + (dense ? sm_pred[iq*72 + sm.offset[j]] : 0.0f), a.p);
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
    return (sizeof(decode_smem<D>) + 15)/16*16 + mt*D*16 + 8*mt*72*sizeof(float);
}

template <int D, int MT>
static void decode_case(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
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

    constexpr size_t smem_q = query_smem(D);
    constexpr size_t smem   = decode_smem_bytes<D>(MT);
    static_assert((size_t) query_rows(D)*(D + 4)*4 <= smem_q, "the rotated queries make room for the transformed ones");
    CUDA_SET_SHARED_MEMORY_LIMIT((queries_kernel<D>), smem_q);
    CUDA_SET_SHARED_MEMORY_LIMIT((decode_kernel<D, MT>), smem);

    const int rows = f.n_frames*a.n_tokens*a.group;
    queries_kernel<D><<<dim3((rows + query_rows(D) - 1)/query_rows(D), a.p.n_head_kv, a.n_stream), query_rows(D)*2, smem_q, stream>>>(a, f, MT);

    static int per_sm[GGML_CUDA_MAX_DEVICES] = { 0 };
    if (per_sm[ctx.device] == 0) {
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm[ctx.device], decode_kernel<D, MT>, THREADS, smem));
    }
    const int n_tiles = (a.p.n_kv + TILE - 1)/TILE;
    const int blocks  = ggml_cuda_info().devices[ctx.device].nsm*std::max(1, per_sm[ctx.device]);

    seqkv_parts parts;
    parts.n_z      = std::max(1, std::min(n_tiles, blocks/(a.p.n_head_kv*a.n_stream)));
    parts.n_parts  = parts.n_z + (a.n_virt - a.p.n_kv + EXACT - 1)/EXACT;
    parts.permuted = 1;
    const int64_t n_out = (int64_t) a.n_stream*a.n_tokens*a.n_head*parts.n_parts;
    ggml_cuda_pool_alloc<float2> ml (ctx.pool(), n_out);
    ggml_cuda_pool_alloc<float>  acc(ctx.pool(), n_out*D);
    parts.ml  = ml.get();
    parts.acc = acc.get();

    decode_kernel<D, MT><<<dim3(parts.n_parts, a.p.n_head_kv, a.n_stream), THREADS, smem, stream>>>(a, f, parts);
    seqkv_combine(ctx, a, parts);
}

template <int D> static void decode_tiles(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, int n_queries) {
    if (n_queries <= 8) {
        decode_case<D, 1>(ctx, dst);
    } else if (n_queries <= 16) {
        decode_case<D, 2>(ctx, dst);
    } else {
        decode_case<D, MAX_MT>(ctx, dst);
    }
}

void seqkv_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_seqkv_params p = seqkv_params(dst);
    const int n_queries = (int) (dst->src[0]->ne[2]/dst->src[1]->ne[2]*dst->src[0]->ne[1]/p.n_head_kv);
    switch (p.dk) {
        case 64:  decode_tiles< 64>(ctx, dst, n_queries); break;
        case 128: decode_tiles<128>(ctx, dst, n_queries); break;
        default:  decode_tiles<256>(ctx, dst, n_queries); break;
    }
}

bool seqkv_decode_supported(int cc, const ggml_tensor * dst) {
    const ggml_seqkv_params p = seqkv_params(dst);
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const int64_t n_queries = q->ne[2]/k->ne[2]*q->ne[1]/p.n_head_kv;
    return turing_mma_available(cc) && p.dk == p.dv && (p.dk <= 128 || cc >= GGML_CUDA_CC_AMPERE) && n_queries <= 8*MAX_MT &&
        ggml_seqkv_bits(k->type) && ggml_seqkv_bits(v->type) && !ggml_seqkv_graded(v->type) && p.n_kv > 0;
}
