// Decode straight from blocks, on integer tensor cores; short contexts and what is shared with these: seqkv-short.cu, seqkv-decode.cuh.
//
// Three kernels an op. In the first one some blocks attend to the exact rows; the others transform the queries into every frame
// (q' = D^T R(-t0) q, or H R(-t0) q), split them in two signed 7-bit digits, and take their products with the frame's 64
// predictions. In the second one each warp works by itself on tiles of 64 cells of one KV head: levels of K and V by byte permutes,
// once for all queries of the group; scores as integer products with the digits of the queries, a gain per key and group of values
// applied to each; values as integer products with the two bytes of p*gain. The third one combines the parts.
//
// Keys are the rows of the tensor core tiles, values their columns turned by ldmatrix; the 8 columns are 4 queries, each with
// its upper and lower digit next to each other: lane 4*g + t has both digits of query t for keys (or dims) g and g + 8.
#pragma once

#include "seqkv-decode.cuh"

static constexpr int MAX_NQ   = 32;       // queries of a KV head

// What the first kernel hands to the second one, by (stream, frame, KV head); n4 tiles of 4 queries
//   digits: B fragments of the queries, (n4, block of 64, lane) of 16 bytes: lane 4*(2*query + digit) + t, word t of each of the 4 runs
//   scale (4*n4): q' = scale*(128*upper + lower);  pred (4*n4, 64): <q', prediction by offset>
struct frame_queries {
    uint32_t * digits;
    float    * scale;
    float    * pred;
    int        n_frames, n4;

    __device__ __forceinline__ int64_t index(const seqkv_view & a, int s, int frame, int h) const {
        return ((int64_t) s*n_frames + frame)*a.p.n_head_kv + h;
    }
};

template <int D> SEQKV_FN uint32_t * digits_of(const frame_queries & f, int64_t index) { return f.digits + index*(f.n4*D*2); }

//
// queries in the frames
//

static constexpr __host__ __device__ int query_rows (int d) { return d == 256 ? 32 : 64; } // rows of a block: frame x query, at most
static constexpr __host__ __device__ int query_threads(int d) { return 4*query_rows(d); }  // a warp: 16 rows, half of the columns
static constexpr __host__ __device__ int query_chunk(int d) { return d == 256 ? 64 : d; }  // rows of D at a time
static constexpr __host__ __device__ bool query_resident(int d) { return d <= 128; }       // D and the predictions stay in shared memory
static constexpr int query_smem(int d, int nq) { return (query_rows(d) + (query_resident(d) ? query_chunk(d) + 64 : 64))*(d + 8)*2 + nq*d*4; }

// 8 values 0 4 1 5 2 6 3 7: columns 2t, 2t + 1 of two tensor core tiles are then values t, t + 4, t + 8, t + 12, a word of the stored order
SEQKV_FN uint4 word_order(uint4 x) {
    return make_uint4(seqkv_prmt(x.x, x.z, 0x5410), seqkv_prmt(x.x, x.z, 0x7632), seqkv_prmt(x.y, x.w, 0x5410), seqkv_prmt(x.y, x.w, 0x7632));
}

template <int N> SEQKV_FN void store_runs(uint32_t * dst, const uint32_t (&x)[N]) {
    if constexpr (N == 2) {
        *(uint2 *) dst = make_uint2(x[0], x[1]);
    } else {
        *(uint4 *) dst = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

// blockIdx: (group of frames, or behind these a part of exact rows a warp, KV head, stream). per_block: frames of a block at a time; inv_nq: 2^16/nq, rounded up
// overlap: the kernel before this one makes the frame rows, which exact rows alone need; early: and nothing else that they do
template <int D>
static __global__ void __launch_bounds__(query_threads(D), D == 256 ? 2 : 3) queries_kernel(seqkv_view a, frame_queries f, seqkv_parts parts, int groups, int per_block, int inv_nq, bool overlap, bool early) {
    constexpr int  ROWS = query_rows(D), LD = D + 8, NT = query_threads(D), CHUNK = query_chunk(D), COLUMNS = D/2;
    constexpr bool RESIDENT = query_resident(D);
    extern __shared__ __align__(16) half smem_h[];
    half  * rows  = smem_h;         // (ROWS, LD): rotated queries, then transformed ones
    half  * chunk = rows + ROWS*LD; // (CHUNK, LD)
    half  * preds = RESIDENT ? chunk + CHUNK*LD : chunk; // (64, LD)
    float * q     = (float *) (preds + 64*LD);           // (nq, D)

    const int h = blockIdx.y, s = blockIdx.z;
    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const bool dense = a.form_k == SEQKV_DENSE;

    if ((int) blockIdx.x >= groups) {
        const int part = (blockIdx.x - groups)*(NT/WARP_SIZE) + warp, j0 = a.p.n_kv + part*EXACT;
        if (!early) {
            ggml_cuda_pdl_sync();
        }
        ggml_cuda_pdl_lc();
        if (j0 < a.n_virt) {
            exact_part<D>(a, parts, (float *) smem_h + warp*EXACT*D, s, h, 0, nq, j0, parts.n_z + part, early);
        }
        if (early) {
            ggml_cuda_pdl_sync();
        }
        return;
    }

    __shared__ float row_max[2][ROWS];
    // where a row's results go, counted from the block's first frame: words of digits, rows of pred and scale
    __shared__ int row_digits[ROWS], row_query[ROWS];
    for (int r = threadIdx.x; r < ROWS; r += NT) {
        const int frame = r*inv_nq >> 16, iq = r - frame*nq;
        row_digits[r] = frame*a.p.n_head_kv*f.n4*D*2 + iq/4*D*2 + iq%4*32;
        row_query [r] = frame*a.p.n_head_kv*f.n4*4 + iq;
    }

    const auto load_chunk = [&](int k0) {
#pragma unroll 8
        for (int i = threadIdx.x; i < CHUNK*D/8; i += NT) {
            const int k = i/(D/8), n = i%(D/8)*8;
            *(uint4 *) (chunk + k*LD + n) = word_order(dense ? *(const uint4 *) (a.tables.dec(h) + (k0 + k)*D + n) : hadamard8(k0 + k, n));
        }
    };
    const auto load_preds = [&]() {
        const half * pred = a.tables.pred(h);
#pragma unroll 8
        for (int i = threadIdx.x; i < 64*D/8; i += NT) {
            *(uint4 *) (preds + i/(D/8)*LD + i%(D/8)*8) = word_order(*(const uint4 *) (pred + 8*i));
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
        copy_async16((float4 *) q + i, (const float4 *) a.query_of(s, h, iq) + i%(D/4));
    }

    for (int frame0 = blockIdx.x*per_block; frame0 < f.n_frames; frame0 += groups*per_block) {
        const int n_frames = min(per_block, f.n_frames - frame0);
        const int n_rows   = n_frames*nq;
        if (!RESIDENT) {
            __syncthreads();
            load_chunk(0);
        }

        // rotated queries: a thread has a pair of every STEP-th frame
        constexpr int STEP = NT/(D/2), FRAMES = 4; // at a time
        const int  pair = threadIdx.x%(D/2), own = threadIdx.x/(D/2);
        const int2 at   = pair < a.p.n_rot/2 ? seqkv_pair(pair, a.p.n_rot, a.p.neox) : make_int2(2*pair, 2*pair + 1);
        for (int r0 = own; r0 - own < n_frames; r0 += FRAMES*STEP) {
            float2 cs[FRAMES];
#pragma unroll
            for (int i = 0; i < FRAMES; ++i) {
                cs[i] = make_float2(1.0f, 0.0f);
                if (r0 + i*STEP < n_frames && pair < a.p.n_rot/2) {
                    cs[i] = ((const float2 *) (a.rot.base + (int64_t) (SEQKV_FRAME + frame0 + r0 + i*STEP)*a.rot.stride))[pair];
                }
            }
            copy_wait();
            __syncthreads();
            for (int iq = 0; iq < nq; ++iq) {
                const float x = q[iq*D + at.x], y = q[iq*D + at.y];
                half * row = rows + (r0*nq + iq)*LD;
#pragma unroll
                for (int i = 0; i < FRAMES; ++i) {
                    if (r0 + i*STEP < n_frames) {
                        row[i*STEP*nq*LD + at.x] = __float2half(x*cs[i].x + y*cs[i].y);
                        row[i*STEP*nq*LD + at.y] = __float2half(y*cs[i].x - x*cs[i].y);
                    }
                }
            }
        }
        for (int i = n_rows*LD/2 + threadIdx.x; i < ROWS*LD/2; i += NT) {
            ((uint32_t *) rows)[i] = 0;
        }

        const int row0 = warp/2*16, column0 = warp%2*COLUMNS;
        float acc[COLUMNS/8][4] = {{ 0.0f }};
        for (int k0 = 0; k0 < D; k0 += CHUNK) {
            if (k0 > 0) {
                __syncthreads();
                load_chunk(k0);
            }
            __syncthreads(); // also: the rotated queries are there
#pragma unroll 2
            for (int kk = 0; kk < CHUNK; kk += 16) {
                uint32_t x[4];
                load_a(x, rows + (row0 + lane%16)*LD + k0 + kk + lane/16*8);
#pragma unroll
                for (int n0 = 0; n0 < COLUMNS/8; n0 += 4) { // independent products one after the other
                    uint32_t b[8];
#pragma unroll
                    for (int n = 0; n < 4; n += 2) {
                        load_transposed(b + 2*n, chunk + (kk + lane%16)*LD + column0 + 8*(n0 + n) + lane/16*8);
                    }
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        mma_f16(acc[n0 + n], x, b[2*n], b[2*n + 1]);
                    }
                }
            }
        }

        // the largest value of each row, and its products with the predictions, are of both warps
        __syncthreads();
        float max[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            max[e] = 0.0f;
#pragma unroll
            for (int n = 0; n < COLUMNS/8; ++n) {
                max[e] = fmaxf(max[e], fmaxf(fabsf(acc[n][2*e]), fabsf(acc[n][2*e + 1])));
            }
            max[e] = fmaxf(max[e], __shfl_xor_sync(0xffffffff, max[e], 1));
            max[e] = fmaxf(max[e], __shfl_xor_sync(0xffffffff, max[e], 2));
            if (t == 0) {
                row_max[warp%2][row0 + g + 8*e] = max[e];
            }
            if (dense) {
#pragma unroll
                for (int n = 0; n < COLUMNS/8; ++n) {
                    *(half2 *) (rows + (row0 + g + 8*e)*LD + column0 + 8*n + 2*t) = __floats2half2_rn(acc[n][2*e], acc[n][2*e + 1]);
                }
            }
        }
        if (dense && !RESIDENT) {
            load_preds();
        }
        __syncthreads();
        if (dense) {
            float sum[4][4] = {{ 0.0f }};
#pragma unroll 2
            for (int k = 0; k < D/16; ++k) {
                uint32_t x[4];
                load_a(x, rows + (row0 + lane%16)*LD + 16*k + lane/16*8);
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    uint32_t b[4];
                    load_a(b, preds + (warp%2*32 + 8*n + lane%8 + lane/16*8)*LD + 16*k + (lane >> 3 & 1)*8);
                    mma_f16(sum[n],     x, b[0], b[1]);
                    mma_f16(sum[n + 1], x, b[2], b[3]);
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = row0 + g + 8*e;
                if (r < n_rows) {
                    float * dst = f.pred + (f.index(a, s, frame0, h)*4*f.n4 + row_query[r])*SEQKV_FRAME + warp%2*32;
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        *(float2 *) (dst + 8*n + 2*t) = make_float2(sum[n][2*e], sum[n][2*e + 1]);
                    }
                }
            }
        }

        // digits
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int   r   = row0 + g + 8*e;
            const float m   = fmaxf(max[e], row_max[1 - warp%2][r]);
            const float inv = m > 0.0f ? DIGITS/m : 0.0f;
            if (r >= n_rows) {
                continue;
            }
            if (t == 0 && warp%2 == 0) {
                f.scale[f.index(a, s, frame0, h)*4*f.n4 + row_query[r]] = m*((dense ? 1.0f : rsqrtf((float) D))/DIGITS);
            }
            uint32_t * dst = digits_of<D>(f, f.index(a, s, frame0, h)) + row_digits[r] + 4*t + column0/64*128 + column0%64/16;
            constexpr int RUNS = D == 64 ? 2 : 4; // neighbours
            uint32_t upper[RUNS], lower[RUNS];
#pragma unroll
            for (int i = 0; i < COLUMNS/16; ++i) {
                uint32_t u[4], l[4]; // their lowest bytes: integers of 8 bits behind 1.5*2^23
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float x = acc[2*i + j/2][2*e + (j & 1)]*inv;
                    const float y = fmaf(x, 1.0f/128, 12582912.0f);
                    u[j] = __float_as_uint(y);
                    l[j] = __float_as_uint(fmaf(y - 12582912.0f, -128.0f, x) + 12582912.0f);
                }
                upper[i%RUNS] = seqkv_prmt(seqkv_prmt(u[0], u[1], 0x0040), seqkv_prmt(u[2], u[3], 0x0040), 0x5410);
                lower[i%RUNS] = seqkv_prmt(seqkv_prmt(l[0], l[1], 0x0040), seqkv_prmt(l[2], l[3], 0x0040), 0x5410);
                if (i%RUNS == RUNS - 1) {
                    store_runs<RUNS>(dst + i/RUNS*128,      upper);
                    store_runs<RUNS>(dst + i/RUNS*128 + 16, lower);
                }
            }
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

SEQKV_FN int warp_min(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(0xffffffff, x);
#else
    for (int i = WARP_SIZE/2; i > 0; i /= 2) {
        x = min(x, __shfl_xor_sync(0xffffffff, x, i));
    }
    return x;
#endif
}
SEQKV_FN int warp_max(int x) { return ~warp_min(~x); }

static constexpr __host__ __device__ int step_keys(int d) { return d == 64 ? 32 : 16; } // keys unpacked at a time
static constexpr __host__ __device__ int max_nt   (int d) { return d == 256 ? 2 : 4; }  // tiles of 4 queries of a block
static constexpr __host__ __device__ int min_blocks(int d, int nt) { return d == 256 || nt == 4 ? 2 : nt == 2 ? 3 : 4; } // of a multiprocessor

// What a warp needs
template <int D, int NT> struct warp_smem {
    static constexpr int NB    = D/64;
    static constexpr int KEYS  = step_keys(D);
    static constexpr int ROWS  = 32;       // of half a tile, what is copied at a time
    static constexpr int PITCH = D/2 + 16; // bytes of a raw row: the largest cell, wherever it begins in 16 bytes
    static constexpr int LDK   = D + 16;   // bytes of a row of levels: conflict-free for what reads and writes them
    static constexpr int LDV   = 64 + 16;
    __align__(16) char   raw[3][ROWS*PITCH]; // K 0, K 1, V 0, V 1 and K 0 of the next tile, in turns
    union {
        __align__(16) int8_t level[KEYS*LDK > ROWS*LDV ? KEYS*LDK : ROWS*LDV]; // of keys (KEYS, LDK) or of a block of 32 values (32, LDV)
        __align__(16) float  gain_v[NB*TILE]; // of each 16 keys, i and i + 8 are neighbours
    };
    __align__(16) float  gain_k[3*NB*KEYS];
    union {
        __align__(16) float2  score[NT*4*WARP_SIZE]; // (n, 16 keys, lane): keys g and g + 8
        __align__(16) uint8_t p[NT*NB*4*128];        // (n, block, 16 keys): B fragments of p*gain
    };
};

// Tiles of a block: each of them, one more in the first rest blocks
struct block_tiles {
    int each, rest;
};

// blockIdx: (part, KV head, stream x chunk of 4*NT queries). D: head_dim of keys and values.
// KIND: of the types, see decode_kinds
// early: no kernel of this graph before this one writes cells
template <int D, int NT, int KIND>
static __global__ void __launch_bounds__(THREADS, min_blocks(D, NT)) decode_kernel(seqkv_view a, frame_queries f, seqkv_parts parts, block_tiles tiles, int n_chunks, bool early) {
    using smem_t = warp_smem<D, NT>;
    constexpr int NB = smem_t::NB, KEYS = smem_t::KEYS, ROWS = smem_t::ROWS, PITCH = smem_t::PITCH, LDK = smem_t::LDK, LDV = smem_t::LDV;
    constexpr int MT = KEYS/16, DT = D/16, BITS = KIND/2, GRADED = KIND%2;
    constexpr int AT_ONCE = BITS == 3 || KIND == 4 ? ROWS/KEYS : 1; // steps unrolled: what was fastest (H200)
    constexpr int GROUPS = BITS == 0 || GRADED ? 3 : 1; // of a block's values, with a gain each
    extern __shared__ __align__(16) char smem_raw[];

    if (!early) {
        ggml_cuda_pdl_sync();
    }
    ggml_cuda_pdl_lc();
    const int h = blockIdx.y, s = n_chunks == 1 ? blockIdx.z : blockIdx.z/n_chunks, q0 = (blockIdx.z - s*n_chunks)*4*NT;
    const int nq = a.n_tokens*a.group;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    smem_t & sm = ((smem_t *) smem_raw)[warp];
    const bool  dense   = a.form_k == SEQKV_DENSE;
    const int   tile0 = blockIdx.x*tiles.each + min((int) blockIdx.x, tiles.rest), tile1 = tile0 + tiles.each + ((int) blockIdx.x < tiles.rest);
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt;
    const int   bits_v  = BITS ? BITS : a.bits_v;
    const int   block_k = a.size_k/NB, block_v = a.size_v/NB;
    const float log2e = 1.44269504f, scale2 = a.p.scale*log2e;
    constexpr int PIECES = cell_pieces(D, BITS, GRADED);
    static_assert(cell_pieces(D, BITS, 0) <= PIECES && 16*PIECES <= PITCH, "values have no more");
    using loader = row_loader<PITCH, PIECES>;
    const loader rows_k(a.cell_k(s, 0, h), a.k_nb1, a.k_nb2, a.size_k);
    const loader rows_v(a.cell_v(s, 0, h), a.v_nb1, a.v_nb2, a.size_v);
    const auto load_piece = [&](int at, int tile, int piece) { // K 0, K 1, V 0, V 1
        const loader rows = piece < 2 ? rows_k : rows_v;
        rows.template load<ROWS>(sm.raw[at], tile*TILE + (piece & 1)*ROWS, tile < tile1 ? a.p.n_kv : 0);
    };
    const auto load_three = [&](int at, int tile) {
#pragma unroll 1
        for (int piece = 0; piece < 3; ++piece) {
            load_piece(at, tile, piece);
            at = at == 2 ? 0 : at + 1;
        }
    };

    // this lane's two cells of a tile, i = 0, 1: meta, mask of the first token, and which other tokens attend to it
    int32_t  next_meta[2];
    uint16_t next_mask[2];
    int      next_seen[2];
    const uint16_t * mask   = (const uint16_t *) a.mask_row(s, 0);
    const int64_t    mask_n = a.mask_nb1/sizeof(half);
    const auto load_meta = [&](int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int j = tile*TILE + 32*i + lane;
            next_meta[i] = -1;
            next_mask[i] = 0xffff;
            next_seen[i] = 0;
            if (tile < tile1 && j < a.p.n_kv) {
                next_meta[i] = meta[j];
                next_mask[i] = mask[j];
#pragma unroll 1
                for (int k = 1; k < a.n_tokens; ++k) {
                    next_seen[i] |= (mask[k*mask_n + j] & 0x7fff) == 0 ? 1 << k : 0;
                }
            }
        }
    };

    // the queries in the frame of an origin
    int   at = -1;
    uint4 digits[NT][NB];
    float scale[NT];
    const float * pred = nullptr;
    const auto load_queries = [&](int origin) {
        const uint32_t index = (s*f.n_frames + origin - SEQKV_FRAME)*a.p.n_head_kv + h; // and products of 32 by 32 bits
        const uint4 * from   = (const uint4 *) (f.digits + (uint64_t) index*(uint32_t) (f.n4*D*2)) + q0/4*NB*WARP_SIZE + lane;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const bool used = q0 + 4*n < nq;
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                digits[n][b] = used ? from[(n*NB + b)*WARP_SIZE] : make_uint4(0, 0, 0, 0);
            }
            scale[n] = q0 + 4*n + t < nq ? (f.scale + (uint64_t) index*(uint32_t) (4*f.n4))[q0 + 4*n + t] : 0.0f;
        }
        pred = f.pred + (uint64_t) index*(uint32_t) (4*f.n4*SEQKV_FRAME) + (q0 + t)*SEQKV_FRAME;
        at   = origin;
    };
    int  seen[NT]; // bit of this lane's query in a cell's word
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        seen[n] = q0 + 4*n + t < nq ? 256 << a.token_of(q0 + 4*n + t) : 0;
    }

    float m[NT], l[NT];
    float acc[NT][DT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        m[n] = -INFINITY;
        l[n] = 0.0f;
#pragma unroll
        for (int i = 0; i < DT; ++i) {
            acc[n][i][0] = acc[n][i][1] = 0.0f;
        }
    }

    const int first_tile = tile0 + warp;
    int place = 0; // of K 0 among the three
    load_three(place, first_tile);
    load_meta(first_tile);
    __shared__ __align__(16) uint32_t tables[2*TABLE_WORDS]; // levels of keys, of values
    load_level_tables(BITS ? BITS : a.bits_k, BITS ? GRADED : a.graded_k, bits_v, tables);
    __syncthreads();
    if (early) {
        ggml_cuda_pdl_sync();
    }
    for (int tile = first_tile; tile < tile1; tile += WARPS) {
        const int place1 = place == 2 ? 0 : place + 1, place2 = place == 0 ? 2 : place - 1;
        int cell[2], origin[2]; // offset | tokens that attend to it << 8; -1: none does
        int first = INT_MAX, last = -1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int seen = next_seen[i] | ((next_mask[i] & 0x7fff) == 0 ? 1 : 0);
            origin[i] = seen == 0 ? -1 : next_meta[i] >> 8;
            cell[i]   = (next_meta[i] & 63) | (origin[i] < 0 ? 0 : seen << 8);
            first = min(first, origin[i] < 0 ? INT_MAX : origin[i]);
            last  = max(last, origin[i]);
        }
        load_meta(tile + WARPS);
        first = warp_min(first);
        last  = warp_max(last);
        if (last < 0) { // nothing attended to
            copy_wait();
            __syncwarp();
            place = place1;
            load_three(place, tile + WARPS);
            continue;
        }
        const bool one_origin = first == last;
        if (at != first) {
            load_queries(first); // long before they are needed
        }

        // scores
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int held = half ? place1 : place;
            copy_wait_but<2>();
            __syncwarp();
#pragma unroll (AT_ONCE)
            for (int sub = 0; sub < ROWS; sub += KEYS) {
                int   c2[MT][2], o2[MT][2]; // keys g and g + 8 of each 16: cell, origin, and predictions if there is one origin
                float pred2[NT][MT][2];
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int from = sub + 16*mt + g + 8*e;
                        c2[mt][e] = __shfl_sync(0xffffffff, half ? cell[1] : cell[0], from);
                        o2[mt][e] = one_origin ? first : __shfl_sync(0xffffffff, half ? origin[1] : origin[0], from);
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            pred2[n][mt][e] = dense ? pred[4*n*SEQKV_FRAME + (c2[mt][e] & 63)] : 0.0f;
                        }
                    }
                }
#pragma unroll 1
                for (int pass = 0; pass < KEYS*NB/WARP_SIZE; ++pass) {
                    const int key = lane%KEYS, b = lane/KEYS + pass*(WARP_SIZE/KEYS);
                    const uint32_t * raw = (const uint32_t *) (sm.raw[held] + (sub + key)*PITCH);
                    const int begin = rows_k.begin(tile*TILE + half*ROWS + sub + key) + b*block_k;
                    uint32_t out[16];
                    float    factor[3];
                    if constexpr (BITS) {
                        decode_block<BITS, GRADED, true>(raw, begin, tables, out, factor);
                    } else {
                        decode_any<true>(a.bits_k, a.graded_k, raw, begin, out, factor, tables);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        *(uint4 *) (sm.level + key*LDK + 64*b + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                    }
#pragma unroll
                    for (int i = 0; i < GROUPS; ++i) {
                        sm.gain_k[(GROUPS*b + i)*KEYS + (key & ~15) + 2*(key & 7) + (key >> 3 & 1)] = factor[i];
                    }
                }
                __syncwarp();
                if (sub + KEYS == ROWS) { // the rows are done with
                    load_piece(held, half ? tile + WARPS : tile, half ? 0 : 3);
                }

#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    const int j0 = half*ROWS + sub + 16*mt; // of the tile
                    float2 score[NT];
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        score[n] = make_float2(-INFINITY, -INFINITY);
                    }
                    int o = first;
                    while (true) {
                        if (!one_origin) { // the next origin of these keys
                            int next = INT_MAX;
                            if (o2[mt][0] >= o) { next = o2[mt][0]; }
                            if (o2[mt][1] >= o) { next = min(next, o2[mt][1]); }
                            next = warp_min(next);
                            if (next == INT_MAX) {
                                break;
                            }
                            o = next;
                        }
                        if (!one_origin) {
                            if (at != o) {
                                load_queries(o);
                            }
#pragma unroll
                            for (int n = 0; n < NT; ++n) {
#pragma unroll
                                for (int e = 0; e < 2; ++e) {
                                    pred2[n][mt][e] = dense ? pred[4*n*SEQKV_FRAME + (c2[mt][e] & 63)] : 0.0f;
                                }
                            }
                        }
                        float sum[NT][2];
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            sum[n][0] = sum[n][1] = 0.0f;
                        }
#pragma unroll
                        for (int b = 0; b < NB; ++b) {
                            uint32_t k0[4], k1[4];
                            const int8_t * row = sm.level + (16*mt + lane%16)*LDK + 64*b + lane/16*16;
                            load_a(k0, row);
                            load_a(k1, row + 32);
                            float2 gain[GROUPS];
#pragma unroll
                            for (int i = 0; i < GROUPS; ++i) {
                                gain[i] = *(const float2 *) (sm.gain_k + (GROUPS*b + i)*KEYS + 16*mt + 2*g);
                            }
#pragma unroll
                            for (int n = 0; n < NT; ++n) {
                                int c[GROUPS][4] = {{ 0 }};
                                if constexpr (GROUPS == 1) {
                                    mma_s8_k32(c[0], k0, digits[n][b].x, digits[n][b].y);
                                } else {
                                    mma_s8_k16(c[0], k0,     digits[n][b].x);
                                    mma_s8_k16(c[1], k0 + 2, digits[n][b].y);
                                }
                                mma_s8_k32(c[GROUPS - 1], k1, digits[n][b].z, digits[n][b].w);
#pragma unroll
                                for (int i = 0; i < GROUPS; ++i) {
                                    sum[n][0] += gain[i].x*(float) (128*c[i][0] + c[i][1]);
                                    sum[n][1] += gain[i].y*(float) (128*c[i][2] + c[i][3]);
                                }
                            }
                        }
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            float x = scale2*(scale[n]*sum[n][0] + pred2[n][mt][0]);
                            float y = scale2*(scale[n]*sum[n][1] + pred2[n][mt][1]);
                            if (a.p.softcap != 0.0f) {
                                x = log2e*seqkv_logit(x*(1.0f/scale2), a.p);
                                y = log2e*seqkv_logit(y*(1.0f/scale2), a.p);
                            }
                            score[n].x = (c2[mt][0] & seen[n]) && o2[mt][0] == o ? x : score[n].x;
                            score[n].y = (c2[mt][1] & seen[n]) && o2[mt][1] == o ? y : score[n].y;
                        }
                        if (one_origin || o == last) {
                            break;
                        }
                        ++o;
                    }
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        sm.score[(n*4 + j0/16)*WARP_SIZE + lane] = score[n];
                    }
                }
                __syncwarp(); // levels and gains are done with
            }
        }

        // gains of the values
        copy_wait_but<1>();
        __syncwarp();
        float max_v[NB];
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            max_v[b] = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int  key = 32*i + lane;
                const int  raw = (uint8_t) sm.raw[i ? place : place2][lane*PITCH + rows_v.begin(tile*TILE + key) + b*block_v];
                const float gain = origin[i] < 0 ? 0.0f : gain_of(raw, 1.0f/SEQKV_GAIN_STEPS, SEQKV_GAIN_BIAS);
                sm.gain_v[b*TILE + (key & ~15) + 2*(key & 7) + (key >> 3 & 1)] = gain;
                max_v[b] = fmaxf(max_v[b], gain);
            }
            max_v[b] = warp_reduce_max(max_v[b]);
        }

        // softmax; the scores are read before p is written over them
        float p[NT][4][2], f_old[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float max = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = sm.score[(n*4 + i)*WARP_SIZE + lane];
                p[n][i][0] = x.x;
                p[n][i][1] = x.y;
                max = fmaxf(max, fmaxf(x.x, x.y));
            }
#pragma unroll
            for (int i = 4; i < WARP_SIZE; i *= 2) {
                max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, i));
            }
            max = fmaxf(max, m[n]);
            const float base = max == -INFINITY ? 0.0f : max;
            f_old[n] = exp2f(m[n] - base);
            m[n] = max;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    p[n][i][e] = exp2f(p[n][i][e] - base);
                    sum += p[n][i][e];
                }
            }
            l[n] = l[n]*f_old[n] + sum;
        }
        __syncwarp();
        const int p_place = 32*t + 4*(g & 3) + 2*(g >> 2); // of keys g and g + 8 in a B fragment, upper byte of query t
        float f_v[NB];
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            const float inv = max_v[b] > 0.0f ? BYTES/max_v[b] : 0.0f;
            f_v[b] = max_v[b]*(seqkv_scale_of(bits_v)/BYTES);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 gain = *(const float2 *) (sm.gain_v + b*TILE + 16*i + 2*g);
                const float  x = gain.x*inv, y = gain.y*inv;
#pragma unroll
                for (int n = 0; n < NT; ++n) { // 2^23 + an integer
                    const uint32_t u = __float_as_uint(fmaf(p[n][i][0], x, 8388608.0f)), v = __float_as_uint(fmaf(p[n][i][1], y, 8388608.0f));
                    uint8_t * dst = sm.p + ((n*NB + b)*4 + i)*128 + p_place;
                    *(uint16_t *) dst        = (uint16_t) seqkv_prmt(u, v, 0x0051);
                    *(uint16_t *) (dst + 16) = (uint16_t) seqkv_prmt(u, v, 0x0040);
                }
            }
        }

        __syncwarp();

        // values, a block of 64 dims after the other
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < DT; ++i) {
                acc[n][i][0] *= f_old[n];
                acc[n][i][1] *= f_old[n];
            }
        }
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            int c[NT][4][4] = {{{ 0 }}};
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
                const uint32_t * raw = (const uint32_t *) (sm.raw[half ? place : place2] + lane*PITCH);
                const int begin = rows_v.begin(tile*TILE + half*ROWS + lane) + b*block_v;
                uint32_t out[16];
                if constexpr (BITS) {
                    decode_levels<BITS, 0, true>(raw, begin, tables + TABLE_WORDS, out);
                } else {
                    decode_uniform(bits_v, raw, begin, out, tables + TABLE_WORDS);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    *(uint4 *) (sm.level + lane*LDV + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                }
                __syncwarp();
#pragma unroll
                for (int mt = 0; mt < 2; ++mt) {
                    uint32_t pb[NT];
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        pb[n] = *(const uint32_t *) (sm.p + ((n*NB + b)*4 + 2*half + mt)*128 + 4*lane);
                    }
                    // rows 2i and 2i + 1 of a matrix are keys i and i + 8, so that a register has the keys of one place of p
                    const int8_t * row = sm.level + (16*mt + (lane >> 1 & 3) + 8*(lane & 1) + 4*(lane >> 3 & 1))*LDV + (lane >> 4)*16;
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        uint32_t r[4];
                        load_transposed(r, row + 16*i);
                        const uint32_t v0[2] = { seqkv_prmt(r[0], r[1], 0x6420), seqkv_prmt(r[0], r[1], 0x7531) };
                        const uint32_t v1[2] = { seqkv_prmt(r[2], r[3], 0x6420), seqkv_prmt(r[2], r[3], 0x7531) };
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            mma_s8u8_k16(c[n][i],     v0, pb[n]);
                            mma_s8u8_k16(c[n][i + 1], v1, pb[n]);
                        }
                    }
                }
                __syncwarp();
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[n][4*b + i][0] += f_v[b]*(float) (256*c[n][i][0] + c[n][i][1]);
                    acc[n][4*b + i][1] += f_v[b]*(float) (256*c[n][i][2] + c[n][i][3]);
                }
            }
        }
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            load_piece(i ? place : place2, tile + WARPS, 1 + i);
        }
        place = place1;
    }

    copy_wait();
    static_assert(4*NT*merge_pitch(D)*sizeof(float) <= sizeof(smem_t), "sums of a warp");
    merge_warps<D, NT>(a, parts, (float *) smem_raw, m, l, acc, s, h, q0, blockIdx.x);
}

template <int D, int NT> static constexpr size_t decode_smem_bytes() { return WARPS*sizeof(warp_smem<D, NT>); }

template <int D, int NT, int KIND>
static void decode_case(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, bool overlap) {
    const seqkv_view a = seqkv_view_of(dst);
    cudaStream_t stream = ctx.stream();

    const int nq       = a.n_tokens*a.group;
    const int n_chunks = (nq + 4*NT - 1)/(4*NT);
    frame_queries f;
    f.n_frames = (int) dst->src[8]->ne[1] - SEQKV_FRAME;
    f.n4       = n_chunks*NT;
    const int64_t n = (int64_t) a.n_stream*f.n_frames*a.p.n_head_kv*f.n4;
    ggml_cuda_pool_alloc<uint32_t> digits(ctx.pool(), n*D*2);
    ggml_cuda_pool_alloc<float>    scale (ctx.pool(), n*4);
    ggml_cuda_pool_alloc<float>    pred  (ctx.pool(), a.form_k == SEQKV_DENSE ? n*4*SEQKV_FRAME : 1);
    f.digits = digits.get();
    f.scale  = scale.get();
    f.pred   = pred.get();

    const size_t     smem_q = query_smem(D, nq);
    constexpr size_t smem   = decode_smem_bytes<D, NT>();
    static_assert(query_threads(D)/WARP_SIZE*EXACT*D*sizeof(float) <= query_smem(D, 0), "exact rows work in the same memory");
    CUDA_SET_SHARED_MEMORY_LIMIT((queries_kernel<D>), query_smem(D, MAX_NQ));
    CUDA_SET_SHARED_MEMORY_LIMIT((decode_kernel<D, NT, KIND>), smem);

    static int per_sm[GGML_CUDA_MAX_DEVICES] = { 0 };
    if (per_sm[ctx.device] == 0) {
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm[ctx.device], decode_kernel<D, NT, KIND>, THREADS, smem));
    }
    const int nsm     = ggml_cuda_info().devices[ctx.device].nsm;
    const int blocks  = nsm*std::max(1, per_sm[ctx.device]);
    const int n_exact = (a.n_virt - a.p.n_kv + EXACT - 1)/EXACT;
    const int n_tiles = (a.p.n_kv + TILE - 1)/TILE;

    seqkv_parts parts;
    parts.n_z      = std::max(1, std::min((n_tiles + WARPS - 1)/WARPS, blocks/(a.p.n_head_kv*a.n_stream*n_chunks)));
    parts.n_parts  = parts.n_z + n_exact;
    parts.permuted = 1;
    const int64_t n_out = (int64_t) a.n_stream*a.n_tokens*a.n_head*parts.n_parts;
    ggml_cuda_pool_alloc<float2> ml (ctx.pool(), n_out);
    ggml_cuda_pool_alloc<float>  acc(ctx.pool(), n_out*D);
    parts.ml  = ml.get();
    parts.acc = acc.get();

    const int frames = query_rows(D)/nq; // of a block at a time
    const int exact  = (n_exact + query_threads(D)/WARP_SIZE - 1)/(query_threads(D)/WARP_SIZE);
    const int groups = std::min((f.n_frames + frames - 1)/frames, std::max(1, 3*nsm/(a.p.n_head_kv*a.n_stream) - exact));
    ggml_cuda_kernel_launch(queries_kernel<D>, ggml_cuda_kernel_launch_params(dim3(groups + exact, a.p.n_head_kv, a.n_stream), dim3(query_threads(D)), smem_q, stream),
        a, f, parts, groups, frames, (65536 + nq - 1)/nq, overlap, overlap && a.p.stored_before);
    ggml_cuda_kernel_launch((decode_kernel<D, NT, KIND>), ggml_cuda_kernel_launch_params(dim3(parts.n_z, a.p.n_head_kv, a.n_stream*n_chunks), dim3(THREADS), smem, stream),
        a, f, parts, block_tiles { n_tiles/parts.n_z, n_tiles%parts.n_z }, n_chunks, overlap && a.p.stored_before);
    seqkv_combine(ctx, a, parts, rows);
}

template <int D, int NT> static void decode_types(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, bool overlap) {
    if constexpr (D < 256) {
        decode_kinds(dst, [&](auto kind) { decode_case<D, NT, decltype(kind)::value>(ctx, dst, rows, overlap); });
    } else {
        decode_case<D, NT, 0>(ctx, dst, rows, overlap);
    }
}

template <int D> void seqkv_decode_heads(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, bool overlap, int n_queries) {
    if (n_queries <= 4) {
        decode_types<D, 1>(ctx, dst, rows, overlap);
    } else if (n_queries <= 8 || max_nt(D) == 2) {
        decode_types<D, 2>(ctx, dst, rows, overlap);
    } else {
        decode_case<D, max_nt(D), 0>(ctx, dst, rows, overlap);
    }
}
