// Decode straight from blocks, on integer tensor cores; short contexts and what is shared with these: seqkv-short.cu, seqkv-decode.cuh.
//
// Three kernels an op. In the first one some blocks attend to the exact rows; the others transform the queries into every frame
// (q' = D^T R(-t0) q, or H R(-t0) q), split them in two signed 7-bit digits, and take their products with the frame's 64
// predictions. In the second one a warp works on tiles of 64 cells of one KV head, whose rows the warps of all heads of a block copy together:
// levels of K and V by byte permutes, once for all queries of the group; scores as integer products with the digits of the queries, a gain per
// key and group of values applied to each; values as integer products with the two bytes of p*gain. The third one combines the parts.
// Where each warp has many tiles (and four queries of one token at most, no predictions) there are two: the second one does what the first one would.
//
// Keys are the rows of the tensor core tiles, values their columns turned by ldmatrix; the 8 columns are 4 queries, each with
// its upper and lower digit next to each other: lane 4*g + t has both digits of query t for keys (or dims) g and g + 8.
#pragma once

#include "seqkv-decode.cuh"

static constexpr int MAX_NQ   = 32;       // queries of a KV head

// What the first kernel hands to the second one, by (stream, frame, KV head); n4 tiles of 4 queries
//   digits: B fragments of the queries, (n4, block of 64, lane) of 16 bytes: lane 4*(2*query + digit) + t, word t of each of the 4 runs
//   scale (4*n4): q' = scale.x*(256*upper + lower);  pred (4*n4, 64): <q', prediction of an offset> = scale.y*pred[pred_place(offset)]
struct frame_queries {
    uint32_t * digits;
    float2   * scale;
    int16_t  * pred;
    int        n_frames, n4;

    __device__ __forceinline__ uint32_t index(const seqkv_view & a, int s, int frame, int h) const { return (s*n_frames + frame)*a.p.n_head_kv + h; }
    // products of 32 by 32 bits
    template <int D> __device__ __forceinline__ uint32_t * digits_of(uint32_t index) const { return digits + (uint64_t) index*(uint32_t) (n4*D*2); }
    __device__ __forceinline__ float2  * scale_of(uint32_t index) const { return scale + (uint64_t) index*(uint32_t) (4*n4); }
    __device__ __forceinline__ int16_t * pred_of (uint32_t index) const { return pred  + (uint64_t) index*(uint32_t) (4*n4*SEQKV_FRAME); }
};

// A lane of the first kernel has those of offsets 8*n + 2*t, + 1: 16 neighbours
SEQKV_FN int pred_place(int offset) { return (offset & 6) << 3 | offset >> 2 & ~1 | offset & 1; }

//
// queries in the frames
//

static constexpr int QUERY_ROWS = 16; // of a warp at a time, a tensor core tile: frame x query
static constexpr __host__ __device__ int query_chunk(int d) { return d == 256 ? 64 : d; } // rows of D at a time
static constexpr __host__ __device__ bool query_resident(int d) { return d <= 128; }      // D and the predictions stay in shared memory
static constexpr int query_smem(int d, bool dense) {
    return (WARPS*QUERY_ROWS + (!dense ? 0 : query_resident(d) ? query_chunk(d) + SEQKV_FRAME : SEQKV_FRAME))*(d + 8)*(int) sizeof(half);
}

// What warps work on, one after the other: QUERY_ROWS or fewer rows of a KV head
struct query_tiles {
    int exact;     // blocks of each KV head that attend to exact rows, at the beginning of the grid
    int blocks;    // those that have tiles
    int n, frames; // tiles of a KV head; frames of a tile, whose queries are all in it, if there are no more than QUERY_ROWS; otherwise a frame has two tiles
    int inv;       // 2^16/frames, rounded up
};

// Tiles of a block: each of them, one more in the first rest blocks
struct block_tiles {
    int each, rest;

    __device__ __forceinline__ int begin(int block) const { return block*each + min(block, rest); }
    __device__ __forceinline__ int end  (int block) const { return begin(block + 1); }
};

// Tiles that the blocks of the attention begin with, n of each, to be in the L2 cache by then; 0: none
struct first_tiles {
    block_tiles tiles;
    int         blocks, n;
};

// 8 values 0 4 1 5 2 6 3 7: columns 2t, 2t + 1 of two tensor core tiles are then values t, t + 4, t + 8, t + 12, a word of the stored order
SEQKV_FN uint4 word_order(uint4 x) {
    return make_uint4(seqkv_prmt(x.x, x.z, 0x5410), seqkv_prmt(x.x, x.z, 0x7632), seqkv_prmt(x.y, x.w, 0x5410), seqkv_prmt(x.y, x.w, 0x7632));
}

// Rows iq*frames + frame of a tile, (QUERY_ROWS, D + 8): queries [q0, q0 + n_q) of a KV head, rotated to the origins of frames [frame0, frame0 + n_f), by a warp.
// A lane rotates two neighbouring pairs of four frames at a time: two values in each half of the rotated ones (NEOX), or four values.
template <int D, bool NEOX>
static __device__ void rotate_queries(const seqkv_view & a, half * rows, int s, int h, int q0, int n_q, int frame0, int n_f, int frames) {
    constexpr int LD = D + 8, LANES = D/4 < WARP_SIZE ? D/4 : WARP_SIZE, STEP = WARP_SIZE/LANES, TIMES = D/4/LANES, FRAMES = 4;
    const int lane = threadIdx.x%WARP_SIZE, own = lane%LANES;
    const char * q = a.q + (int64_t) s*a.n_tokens*a.q_nb2 + h*a.group*a.q_nb1;
    const int nb1 = (int) a.q_nb1, next_token = (int) a.q_nb2 - a.group*nb1;
    for (int f0 = lane/LANES; f0 < n_f; f0 += FRAMES*STEP) {
#pragma unroll
        for (int i = 0; i < TIMES; ++i) {
            const int  pair    = 2*(own + i*LANES);
            const bool rotated = pair < a.p.n_rot/2;
            const int  x0 = NEOX && rotated ? pair : 2*pair, y0 = NEOX && rotated ? pair + a.p.n_rot/2 : 2*pair + 2;
            const float * from = a.rot.base + (int64_t) (SEQKV_FRAME + frame0 + f0)*a.rot.stride + 2*pair;
            float4 cs[FRAMES];
#pragma unroll
            for (int j = 0; j < FRAMES; ++j) {
                cs[j] = rotated && f0 + j*STEP < n_f ? *(const float4 *) (from + j*STEP*a.rot.stride) : make_float4(1.0f, 0.0f, 1.0f, 0.0f);
            }
            half * row = rows + f0*LD;
#pragma unroll 4
            for (int iq = 0; iq < n_q; ++iq) {
                const float * src = (const float *) (q + ((q0 + iq)*nb1 + a.token_of(q0 + iq)*next_token));
                const float2 x = *(const float2 *) (src + x0), y = *(const float2 *) (src + y0);
#pragma unroll
                for (int j = 0; j < FRAMES; ++j) {
                    const float4 c = cs[j];
                    const half2 u = NEOX ? __floats2half2_rn(x.x*c.x + y.x*c.y, x.y*c.z + y.y*c.w) : __floats2half2_rn(x.x*c.x + x.y*c.y, x.y*c.x - x.x*c.y);
                    const half2 v = NEOX ? __floats2half2_rn(y.x*c.x - x.x*c.y, y.y*c.z - x.y*c.w) : __floats2half2_rn(y.x*c.z + y.y*c.w, y.y*c.z - y.x*c.w);
                    if (f0 + j*STEP < n_f) {
                        *(half2 *) (row + j*STEP*LD + x0) = u;
                        *(half2 *) (row + j*STEP*LD + y0) = v;
                    }
                }
                row += frames*LD;
            }
        }
    }
}

// Largest absolute value of row g + 8*e of C fragments, in all four lanes that have it
template <int N> SEQKV_FN float largest_of_row(const float (&c)[N][4], int e) {
    float max = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        max = fmaxf(max, fmaxf(fabsf(c[n][2*e]), fabsf(c[n][2*e + 1])));
    }
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
    return fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
}

// Each warp by itself: rotated queries to shared memory as f16, times D or H on tensor cores (of H its part within 64 values, the rest by sums and
// differences), products with the predictions, digits. early: as for exact_part
template <int D, bool DENSE>
static __global__ void __launch_bounds__(THREADS, D == 256 ? 2 : DENSE ? 3 : 5) queries_kernel(seqkv_view a, frame_queries f, seqkv_parts parts, query_tiles tiles, first_tiles ahead, bool early) {
    constexpr int  LD = D + 8, CHUNK = query_chunk(D), NB = D/64;
    constexpr bool RESIDENT = query_resident(D);
    extern __shared__ __align__(16) half smem_h[];
    half * chunk = smem_h + WARPS*QUERY_ROWS*LD; // (CHUNK, LD)
    half * preds = RESIDENT ? chunk + CHUNK*LD : chunk; // (64, LD)

    const int h = blockIdx.x, s = blockIdx.z;
    const int nq = a.n_tokens*a.group;
    const int warp = seqkv_warp(), lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    half * rows = smem_h + warp*QUERY_ROWS*LD;   // (QUERY_ROWS, LD): rotated queries

    // What the blocks of the next kernel ask for all at once. If this graph writes cells: the cache is what others read and write as well.
    for (int i = (blockIdx.y*gridDim.x + blockIdx.x)*WARPS + warp; i < ahead.blocks*ahead.n; i += gridDim.y*gridDim.x*WARPS) {
        const int block = i/ahead.n, tile = ahead.tiles.begin(block) + i - block*ahead.n;
        if (tile < ahead.tiles.end(block)) {
            const int n = min(TILE, a.p.n_kv - tile*TILE);
            prefetch(a.cell_k(s, tile*TILE, 0), n*(int) a.k_nb1);
            prefetch(a.cell_v(s, tile*TILE, 0), n*(int) a.v_nb1);
            prefetch((const char *) (a.meta + (int64_t) s*a.n_virt + tile*TILE), n*(int) sizeof(int32_t));
            prefetch((const char *) (a.mask_row(s, 0) + tile*TILE), n*(int) sizeof(half));
        }
    }

    if ((int) blockIdx.y < tiles.exact) {
        if (!early) {
            ggml_cuda_pdl_sync();
        }
        ggml_cuda_pdl_lc();
        const int n_exact = parts.n_parts - parts.n_z;
#pragma unroll 1
        for (int part = blockIdx.y*WARPS + warp; part < n_exact; part += tiles.exact*WARPS) {
            exact_part<D>(a, parts, s, h, 0, nq, a.p.n_kv + part*EXACT, parts.n_z + part, early);
        }
        if (early) {
            ggml_cuda_pdl_sync();
        }
        return;
    }

    const auto load_chunk = [&](int k0) {
#pragma unroll 8
        for (int i = threadIdx.x; i < CHUNK*D/8; i += THREADS) {
            *(uint4 *) (chunk + i/(D/8)*LD + i%(D/8)*8) = word_order(((const uint4 *) (a.tables.dec(h) + k0*D))[i]);
        }
    };
    const auto load_preds = [&]() {
#pragma unroll 8
        for (int i = threadIdx.x; i < SEQKV_FRAME*D/8; i += THREADS) {
            *(uint4 *) (preds + i/(D/8)*LD + i%(D/8)*8) = word_order(((const uint4 *) a.tables.pred(h))[i]);
        }
    };
    uint32_t h16[2][2]; // B fragments of the Hadamard matrix of 16 in the order of words
    if (!DENSE) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = 8*(i/2) + g/2 + 4*(g & 1), k = 2*t + 8*(i & 1);
            h16[i/2][i & 1] = 0x3c003c00 ^ (__popc(k & column) & 1 ? 0x80008000 : 0) ^ (column & 1) << 31;
        }
    } else if (RESIDENT) {
        load_chunk(0);
        load_preds();
    }
    ggml_cuda_pdl_lc();
    if (DENSE && RESIDENT) {
        __syncthreads();
    }
    ggml_cuda_pdl_sync();

    for (int tile0 = (blockIdx.y - tiles.exact)*WARPS; tile0 < tiles.n; tile0 += tiles.blocks*WARPS) {
        const int tile   = tile0 + warp, two = nq > QUERY_ROWS;
        const int frame0 = (two ? tile >> 1 : tile)*tiles.frames, q0 = two ? (tile & 1)*QUERY_ROWS : 0;
        const int n_q    = min(QUERY_ROWS, nq - q0), n_f = tile < tiles.n ? min(tiles.frames, f.n_frames - frame0) : 0;

        if (a.p.neox) {
            rotate_queries<D, true >(a, rows, s, h, q0, n_q, frame0, n_f, tiles.frames);
        } else {
            rotate_queries<D, false>(a, rows, s, h, q0, n_q, frame0, n_f, tiles.frames);
        }
        __syncwarp();

        float acc[D/8][4] = {{ 0.0f }};
        if constexpr (DENSE) {
            for (int k0 = 0; k0 < D; k0 += CHUNK) {
                if (!RESIDENT) {
                    __syncthreads();
                    load_chunk(k0);
                    __syncthreads();
                }
#pragma unroll 2
                for (int kk = 0; kk < CHUNK; kk += 16) {
                    uint32_t x[4];
                    load_a(x, rows + lane%16*LD + k0 + kk + lane/16*8);
#pragma unroll
                    for (int n0 = 0; n0 < D/8; n0 += 4) { // independent products one after the other
                        uint32_t b[8];
#pragma unroll
                        for (int n = 0; n < 4; n += 2) {
                            load_transposed(b + 2*n, chunk + (kk + lane%16)*LD + 8*(n0 + n) + lane/16*8);
                        }
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            mma_f16(acc[n0 + n], x, b[2*n], b[2*n + 1]);
                        }
                    }
                }
            }
        } else {
            hadamard_mma<D, 64>(rows, h16, acc);
        }

        // row g + 8*e: query and frame
        uint32_t at[2];
        int      query[2];
        bool     used[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = g + 8*e, iq = r*tiles.inv >> 16, frame = r - iq*tiles.frames;
            used [e] = iq < n_q && frame < n_f;
            query[e] = q0 + iq;
            at   [e] = f.index(a, s, frame0 + frame, h);
        }

        float pred_scale[2] = { 0.0f };
        if constexpr (DENSE) {
            if (!RESIDENT) {
                __syncthreads();
                load_preds();
                __syncthreads();
            }
            float sum[SEQKV_FRAME/8][4] = {{ 0.0f }};
#pragma unroll
            for (int k = 0; k < D/16; ++k) {
                uint32_t x[4]; // sums of two tiles are an A fragment
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const half2 y = __floats2half2_rn(acc[2*k + i/2][2*(i & 1)], acc[2*k + i/2][2*(i & 1) + 1]);
                    x[i] = *(const uint32_t *) &y;
                }
#pragma unroll
                for (int n = 0; n < SEQKV_FRAME/8; n += 2) {
                    uint32_t b[4];
                    load_a(b, preds + (8*n + lane%8 + lane/16*8)*LD + 16*k + (lane >> 3 & 1)*8);
                    mma_f16(sum[n],     x, b[0], b[1]);
                    mma_f16(sum[n + 1], x, b[2], b[3]);
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float max = largest_of_row(sum, e);
                pred_scale[e] = max/32767.0f;
                if (used[e]) {
                    const float inv = max > 0.0f ? 32767.0f/max : 0.0f, base = 12582912.0f; // 1.5*2^23: the integer is in the low bytes
                    uint32_t w[SEQKV_FRAME/8];
#pragma unroll
                    for (int n = 0; n < SEQKV_FRAME/8; ++n) {
                        w[n] = seqkv_prmt(__float_as_uint(fmaf(sum[n][2*e], inv, base)), __float_as_uint(fmaf(sum[n][2*e + 1], inv, base)), 0x5410);
                    }
                    uint4 * dst = (uint4 *) (f.pred_of(at[e]) + query[e]*SEQKV_FRAME + 16*t);
                    dst[0] = make_uint4(w[0], w[1], w[2], w[3]);
                    dst[1] = make_uint4(w[4], w[5], w[6], w[7]);
                }
            }
        }

#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float max = largest_of_row(acc, e);
            if (!used[e]) {
                continue;
            }
            const float inv = max > 0.0f ? DIGITS/max : 0.0f;
            if (t == 0) {
                f.scale_of(at[e])[query[e]] = make_float2(max*((DENSE ? 1.0f : rsqrtf((float) D))/DIGITS), pred_scale[e]);
            }
            uint32_t * dst = f.digits_of<D>(at[e]) + query[e]/4*D*2 + query[e]%4*32 + 4*t;
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                uint32_t upper[4], lower[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = 8*b + 2*i;
                    digits_of_word(acc[n][2*e], acc[n][2*e + 1], acc[n + 1][2*e], acc[n + 1][2*e + 1], inv, upper[i], lower[i]);
                }
                *(uint4 *) (dst + 128*b)      = make_uint4(upper[0], upper[1], upper[2], upper[3]);
                *(uint4 *) (dst + 128*b + 16) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
            }
        }
        __syncwarp(); // rows are read
    }
}

// Digits of up to 4 queries of a token in the frame of an origin, this lane's words of them, by a warp that attends to it. Lane 4*g + t has values
// 32*i + 16*(g & 1) + 4*t .. + 3 of query g/2, and with i and i + 1 rows g and g + 8 of A; H within 16 values by products, between these by sums and differences.
// q: the lane's query; rot: row of the origin, for all values if NEOX; inv: DIGITS/(sqrt(D)*norm of q), so that no value of H R(-t0) q is too large
template <int D> SEQKV_FN void make_queries(const float * q, const float * rot, bool neox, int n_rot, float inv, uint4 (&digits)[D/64]) {
    constexpr int NB = D/64;
    const int lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4, odd = g & 1, own = 16*odd + 4*t;
    float x[2*NB][4];
#pragma unroll
    for (int i = 0; i < 2*NB; ++i) {
        *(float4 *) x[i] = *(const float4 *) (q + 32*i + own);
    }
    const float * from = rot + (neox ? 2*own : own);
    if (neox) {
        float cs[NB][8];
#pragma unroll
        for (int i = 0; i < NB; ++i) {
            *(float4 *)  cs[i]      = *(const float4 *) (from + 64*i);
            *(float4 *) (cs[i] + 4) = *(const float4 *) (from + 64*i + 4);
        }
#pragma unroll
        for (int i = 0; i < NB; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float u = x[i][k], v = x[i + NB][k], c = cs[i][2*k], sine = cs[i][2*k + 1];
                x[i][k]      = u*c + v*sine;
                x[i + NB][k] = v*c - u*sine;
            }
        }
    } else {
        float4 cs[2*NB];
#pragma unroll
        for (int i = 0; i < 2*NB; ++i) {
            cs[i] = own < n_rot - 32*i ? *(const float4 *) (from + 32*i) : make_float4(1.0f, 0.0f, 1.0f, 0.0f);
        }
#pragma unroll
        for (int i = 0; i < 2*NB; ++i) {
            const float4 u = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
            x[i][0] = u.x*cs[i].x + u.y*cs[i].y;
            x[i][1] = u.y*cs[i].x - u.x*cs[i].y;
            x[i][2] = u.z*cs[i].z + u.w*cs[i].w;
            x[i][3] = u.w*cs[i].z - u.z*cs[i].w;
        }
    }

    // B fragments of the matrix of 16: values in the order of the lanes, columns in the order of words
    const uint32_t minus = 0x80008000;
    const uint32_t b00 = 0x3c003c00 ^ (g & t & 1 ? minus : 0) ^ (g & 2) << 30;
    const uint32_t b01 = b00 ^ (g & 4 ? minus : 0), turned = t & 2 ? minus : 0;
    const float    sign = odd ? -1.0f : 1.0f;
    float y[2*NB][4];
#pragma unroll
    for (int j = 0; j < NB; ++j) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const half2 both = __floats2half2_rn(x[2*j + i%2][i/2*2], x[2*j + i%2][i/2*2 + 1]);
            a[i] = *(const uint32_t *) &both;
        }
        float c[2][4] = {{ 0.0f }};
        mma_f16(c[0], a, b00, b01);
        mma_f16(c[1], a, b00 ^ turned, b01 ^ turned);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float u = c[i/2][i%2], v = c[i/2][i%2 + 2];
            y[2*j][i]     = u + v;
            y[2*j + 1][i] = u - v;
        }
    }
    seqkv_fwht_rows<2>(y);
#pragma unroll
    for (int i = 0; i < 2*NB; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            y[i][k] = fmaf(sign, y[i][k], __shfl_xor_sync(0xffffffff, y[i][k], 4));
        }
    }
#pragma unroll
    for (int i = 0; i < 2*NB; ++i) {
        uint32_t upper, lower; // even lanes of a query have the column of upper ones
        digits_of_word(y[i][0], y[i][1], y[i][2], y[i][3], inv, upper, lower);
        const uint32_t own_word = odd ? lower : upper, got = __shfl_xor_sync(0xffffffff, odd ? upper : lower, 4);
        uint32_t * w = (uint32_t *) &digits[i/2] + i%2*2;
        w[0] = odd ? got : own_word;
        w[1] = odd ? own_word : got;
    }
}

// ... where they are wanted now and then, and not at the cost of registers
template <int D> struct made_queries { uint4 digits[D/64]; };
template <int D> static __device__ __noinline__ made_queries<D> make_queries_apart(const float * q, const float * rot, bool neox, int n_rot, float inv) {
    made_queries<D> made;
    make_queries<D>(q, rot, neox, n_rot, inv, made.digits);
    return made;
}

// Euclidean norm of the query of this lane, as make_queries has it
template <int D> SEQKV_FN float norm_of(const float * q) {
    float sum = 0.0f;
#pragma unroll
    for (int i = threadIdx.x%8; i < D/4; i += 8) {
        const float4 x = *(const float4 *) (q + 4*i);
        sum += x.x*x.x + x.y*x.y + x.z*x.z + x.w*x.w;
    }
#pragma unroll
    for (int i = 1; i < 8; i *= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, i);
    }
    return sqrtf(sum);
}

//
// attention
//

SEQKV_FN int warp_max(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffff, x);
#else
    for (int i = WARP_SIZE/2; i > 0; i /= 2) {
        x = max(x, __shfl_xor_sync(0xffffffff, x, i));
    }
    return x;
#endif
}
SEQKV_FN int warp_min(int x) { return ~warp_max(~x); }
SEQKV_FN int warp_sum(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xffffffff, x);
#else
    for (int i = WARP_SIZE/2; i > 0; i /= 2) {
        x += __shfl_xor_sync(0xffffffff, x, i);
    }
    return x;
#endif
}

static constexpr __host__ __device__ int step_keys(int d) { return d == 64 ? 32 : 16; } // keys unpacked at a time
static constexpr __host__ __device__ int max_nt   (int d) { return d == 256 ? 2 : 4; }  // tiles of 4 queries of a block
static constexpr __host__ __device__ int max_warps(int d, int nt) { return d == 256 || nt == 4 ? 8 : nt == 2 ? 12 : 16; } // of a block: registers for all

// Whether decode's warps can make the queries. There are no registers for more of them, and D of a profile is loaded for many
static constexpr __host__ __device__ bool makes_queries(int nt, int kind) { return nt == 1 && kind > 0 && kind%2 == 0; }

// What a warp needs for itself
template <int D, int NT, int KIND> struct warp_smem {
    static constexpr int NB    = D/64;
    static constexpr int KEYS  = step_keys(D);
    static constexpr int VB    = NB > 1 && NT < 4 ? 2 : 1; // blocks of values at a time (4 tiles of queries leave registers for one)
    static constexpr int KEYSV = WARP_SIZE/VB;
    static constexpr int LDK   = D + 16;   // bytes of a row of levels: conflict-free for what reads and writes them
    static constexpr int LDV   = 64*VB + 16;
    static constexpr int GROUPS = KIND == 0 || KIND%2 ? 3 : 1; // of a block's values, with a gain each
    static constexpr int TABLE_K = KIND == 0 ? TABLE_WORDS : table_at(KIND/2, KIND%2, 3), TABLE_V = KIND == 0 ? TABLE_WORDS : table_at(KIND/2, 0, 1);
    union {
        __align__(16) int8_t level[KEYS*LDK > KEYSV*LDV ? KEYS*LDK : KEYSV*LDV]; // of keys (KEYS, LDK) or of values (KEYSV, LDV)
        __align__(16) float  gain_v[NB*TILE]; // (block, 64 keys): by the largest of the tile, times BYTES; of each 16 keys, i and i + 8 are neighbours
    };
    __align__(16) float  gain_k[GROUPS*NB*KEYS]; // (group, block, keys): as for values
    union {
        __align__(16) float2  score[NT*4*WARP_SIZE]; // (n, 16 keys, lane): keys g and g + 8
        __align__(16) uint8_t p[NT*NB*4*128];        // (n, block, 16 keys): B fragments of p*gain
    };
    __align__(16) uint32_t tables[TABLE_K + TABLE_V]; // levels of keys, of values
};

// How a block is made: teams of warps, one for each of its KV heads. A team has tiles of its own; rows are copied for all of its heads at once,
// since those of one head are a few bytes here and there.
struct block_plan {
    int  heads, teams;     // KV heads of a block, teams
    int  inv_heads;        // 2^16/heads, rounded up
    int  pitch_k, pitch_v; // bytes of a row in shared memory
    int  ring;             // bytes of a team: K 0, K 1, V 0, V 1 of a tile, ROWS rows each
    bool whole_k, whole_v; // rows of all KV heads, copied in one piece as they lie; otherwise each by itself, which keeps its place in 16 bytes
};
static constexpr int ROWS = TILE/2; // copied at a time

// blockIdx: (part, heads KV heads, stream x chunk of 4*NT queries). D: head_dim of keys and values.
// KIND: of the types, see decode_kinds
// early: kernels before this one that may still run write no cells
// MAKES: makes the queries in the frames and attends to exact rows, too, without a kernel before it; f is not used then
template <int D, int NT, int KIND, bool MAKES>
static __global__ void __launch_bounds__(max_warps(D, NT)*WARP_SIZE, 1) decode_kernel(seqkv_view a, frame_queries f, seqkv_parts parts, block_plan plan, block_tiles tiles, int n_chunks, bool early) {
    using smem_t = warp_smem<D, NT, KIND>;
    constexpr int NB = smem_t::NB, KEYS = smem_t::KEYS, LDK = smem_t::LDK, LDV = smem_t::LDV;
    constexpr int VB = smem_t::VB, KEYSV = smem_t::KEYSV, GROUPS = smem_t::GROUPS, TABLE_K = smem_t::TABLE_K;
    constexpr int MT = KEYS/16, DT = D/16, BITS = KIND/2, GRADED = KIND%2;
    constexpr bool CROSSED = BITS == 2 || (KEYS == 32 && BITS == 3); // two lanes in a bank instead of four; for 4 bits it costs more than that
    extern __shared__ __align__(16) char smem_raw[];
    __shared__ uint64_t barriers[max_warps(D, NT)][8]; // of teams: of each piece, that it is there, and that it is done with

    if (!early) {
        ggml_cuda_pdl_sync();
    }
    ggml_cuda_pdl_lc();
    const int warp = seqkv_warp(), lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const int team = warp*plan.inv_heads >> 16, local = warp - team*plan.heads;
    const int h0 = blockIdx.y*plan.heads, h = h0 + local, s = n_chunks == 1 ? blockIdx.z : blockIdx.z/n_chunks, q0 = (blockIdx.z - s*n_chunks)*4*NT;
    const int nq = a.n_tokens*a.group;
    smem_t & sm = *kept((smem_t *) smem_raw + warp);
    char * ring = kept(smem_raw + plan.heads*plan.teams*sizeof(smem_t) + team*plan.ring);
    const bool  dense   = (KIND == 0 || GRADED) && a.form_k == SEQKV_DENSE; // graded keys alone have predictions
    const int   tile0 = tiles.begin(blockIdx.x), tile1 = tiles.end(blockIdx.x);
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt;
    const int   bits_v  = BITS ? BITS : a.bits_v;
    const int   block_k = a.size_k/NB, block_v = a.size_v/NB;
    const float log2e = 1.44269504f, scale2 = a.p.scale*log2e;

    // pieces 0..3 of a tile: K 0, K 1, V 0, V 1
    uint64_t * barrier = barriers[team];
    uint32_t turn_k = 0, turn_v = 0; // of the barriers of keys and of values: parity of the phase that this tile's pieces are there
    int fills = bulk_copies ? 0 : 15; // pieces that this warp copies (its share of them, if these are no bulk copies), a bit each
    for (int piece = local; bulk_copies && piece < 4; piece += plan.heads) {
        fills |= 1 << piece;
    }
    const auto team_barrier = [&]() { // before compute capability 8.0
        if (plan.heads == 1) {
            __syncwarp();
        } else {
            named_barrier(team + 1, plan.heads*WARP_SIZE); // at most 8 teams; 0 is that of the block
        }
    };
    // rows of a piece, once all warps of the team are done with those before; parity: of the phase that they are. Tensors end at multiples of 16 bytes
    const auto fill = [&](int piece, int tile, bool first, uint32_t parity) {
        if (tile >= tile1 || !(fills >> piece & 1)) {
            return;
        }
        if (!first) {
            if constexpr (async_barriers) {
                barrier_wait(barrier + 4 + piece, parity);
            } else {
                team_barrier();
            }
        }
        const bool   key   = piece < 2, whole = key ? plan.whole_k : plan.whole_v;
        const int    j0    = tile*TILE + (piece & 1)*ROWS, n = max(0, min(ROWS, a.p.n_kv - j0));
        const int    pitch = key ? plan.pitch_k : plan.pitch_v;
        const int    nb1   = (int) (key ? a.k_nb1 : a.v_nb1), size = plan.heads*(key ? a.size_k : a.size_v);
        const char * src   = key ? a.cell_k(s, j0, h0) : a.cell_v(s, j0, h0);
        char       * dst   = ring + (key ? 0 : 2*ROWS*plan.pitch_k) + (piece & 1)*ROWS*pitch;
        if constexpr (bulk_copies) { // lane 0 all rows, or each lane one
            const char * row   = whole ? src : src + (int64_t) lane*nb1;
            const int    skew  = (int) (uintptr_t) row & 15;
            const int    bytes = ((whole ? (lane == 0 ? n*nb1 : 0) : lane < n ? skew + size : 0) + 15) & ~15;
            const int    all   = whole ? bytes : warp_sum(bytes);
            if (lane == 0) {
                barrier_arrive_expect(barrier + piece, all);
            }
            __syncwarp();
            if (bytes > 0) {
                bulk_copy(dst + lane*pitch, row - skew, bytes, barrier + piece);
            }
            __syncwarp();
        } else {
            if (whole) {
#pragma unroll 4
                for (int i = 16*(local*WARP_SIZE + lane); i < n*nb1; i += 16*WARP_SIZE*plan.heads) {
                    copy_async16(dst + i, src + i);
                }
            } else {
                for (int r = local; r < n; r += plan.heads) {
                    const char * row  = src + (int64_t) r*nb1;
                    const int    skew = (int) (uintptr_t) row & 15;
                    for (int i = 16*lane; i < skew + size; i += 16*WARP_SIZE) {
                        copy_async16(dst + r*pitch + i, row - skew + i);
                    }
                }
            }
            barrier_arrive_copied(barrier + piece);
        }
    };
    const auto wait_for = [&](int piece) {
        if constexpr (async_barriers) {
            barrier_wait(barrier + piece, piece < 2 ? turn_k : turn_v);
        } else {
            team_barrier();
        }
    };
    const auto done_with = [&](int piece) { // behind a barrier of the warp
        if (lane == 0) {
            barrier_arrive(barrier + 4 + piece);
        }
        __syncwarp();
    };
    // Bytes of the ring: what this lane unpacks of the first step of keys and of values, and the gain of its first value. Rows of a step begin at
    // multiples of 16 of the virtual axis, so their places in 16 bytes are those of the first ones.
    const auto begin_of = [&](const char * row, int r, int pitch, bool whole, int size) {
        return r*pitch + (whole ? 0 : (int) (uintptr_t) row & 15) + local*size;
    };
    int begin_k = begin_of(a.cell_k(s, lane%KEYS, h0), lane%KEYS, plan.pitch_k, plan.whole_k, a.size_k) + lane/KEYS*block_k;
    const int key_v = (lane%KEYSV & 16) + lane%16/2 + 8*(lane & 1); // in rows of levels, keys i and i + 8 are neighbours
    int begin_v = 2*ROWS*plan.pitch_k + begin_of(a.cell_v(s, key_v, h0), key_v, plan.pitch_v, plan.whole_v, a.size_v) + (VB == 1 ? 0 : lane/KEYSV)*block_v;
    const int begin_g = 2*ROWS*plan.pitch_k + begin_of(a.cell_v(s, lane, h0), lane, plan.pitch_v, plan.whole_v, a.size_v);
    // As words and a byte of the first one. What is kept from here on is what there are registers for; more would spill
    const uint32_t * own_k = (const uint32_t *) kept(ring + (begin_k & ~3)), * own_v = (const uint32_t *) kept(ring + (begin_v & ~3));
    begin_k &= 3;
    begin_v &= 3;
    // Bytes of what the warp has for itself: the gain of this lane's key, upper bytes of its p in a B fragment, its row for ldmatrix of keys and of values
    int at_gain  = 4*((lane & 16) + 2*(lane & 7) + (lane >> 3 & 1));
    int at_p     = 32*t + 4*(g & 3) + 2*(g >> 2);
    int at_row_k = lane%16*LDK + lane/16*16;
    int at_row_v = (lane & 7 | lane >> 1 & 8)*LDV + (lane & 8)*2;
    int at_pair  = 8*g; // gains of keys g and g + 8
    keep(at_gain);
    keep(at_p);
    keep(at_row_k);
    keep(at_row_v);
    keep(at_pair);
    if (threadIdx.x < 8*plan.teams) {
        barrier_init(&barriers[threadIdx.x/8][threadIdx.x%8], threadIdx.x%8 >= 4 ? plan.heads : bulk_copies ? 1 : plan.heads*WARP_SIZE);
    }
    if constexpr (BITS) {
        make_level_tables<BITS, GRADED>(sm.tables, lane);
    } else {
        load_level_tables(a.bits_k, a.graded_k, bits_v, sm.tables, TABLE_K, smem_t::TABLE_V, lane, WARP_SIZE);
    }
    __syncthreads();

    // this lane's two cells of a tile, i = 0, 1: meta and mask of the first token
    int32_t  next_meta[2];
    uint16_t next_mask[2];
    const int from_mask = s*(int) (a.mask_nb3/sizeof(half)) + lane;
    int from_meta = s*a.n_virt + lane, n_seen = min(a.p.n_kv, tile1*TILE) - lane;
    keep(from_meta);
    keep(n_seen);
    const auto load_meta = [&](int tile) {
        const int32_t  * src_meta = a.meta + (uint32_t) (from_meta + tile*TILE);
        const uint16_t * src_mask = (const uint16_t *) a.mask + (uint32_t) (from_mask + tile*TILE);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            next_meta[i] = -1;
            next_mask[i] = 0xffff;
            if (tile*TILE + 32*i < n_seen) {
                next_meta[i] = src_meta[32*i];
                next_mask[i] = src_mask[32*i];
            }
        }
    };

    // the queries in the frame of an origin
    uint4 digits[NT][NB];
    float2 scale[NT];
    const int16_t * pred = nullptr;
    const int index0 = (int) f.index(a, s, -SEQKV_FRAME, h), of_origin = f.n4*a.p.n_head_kv;
    int from_digits = 0, from_scale = 0; // modulo 2^32, of which there are fewer
    if constexpr (!MAKES) {
        from_digits = (index0*f.n4 + q0/4)*NB*WARP_SIZE + lane;
        from_scale  = index0*f.n4*4 + q0 + t;
        keep(from_digits);
        keep(from_scale);
    }
    const int own_q = MAKES ? (int) ((const char *) a.query_of(s, h, min(g/2, nq - 1)) - a.q) : 0;
    float inv_q = 0.0f; // see make_queries
    const auto get_queries = [&](int origin) {
        if constexpr (MAKES) {
            make_queries<D>((const float *) (a.q + own_q), a.rot.base + (int64_t) origin*a.rot.stride, a.p.neox, a.p.n_rot, inv_q, digits[0]);
            return; // scale is that of all frames
        }
        const uint32_t query = from_scale + origin*of_origin*4;
        const uint4 * from   = (const uint4 *) f.digits + (uint32_t) (from_digits + origin*of_origin*NB*WARP_SIZE);
        const float2 * factor = f.scale + query;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const bool used = n == 0 || q0 + 4*n < nq;
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                digits[n][b] = used ? from[(n*NB + b)*WARP_SIZE] : make_uint4(0, 0, 0, 0);
            }
            scale[n] = used ? factor[4*n] : make_float2(0.0f, 0.0f); // of a lane without a query: something
        }
        pred = f.pred + (uint64_t) query*SEQKV_FRAME;
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

    const int first_tile = tile0 + team;
#pragma unroll 1
    for (int piece = 0; piece < 4; ++piece) {
        fill(piece, first_tile, true, 0);
    }
    load_meta(first_tile);
    const auto rotation_ahead = [&]() { // of the queries of the next tile, as its first cell has it
        if constexpr (MAKES) {
            const int32_t meta = __shfl_sync(0xffffffff, next_meta[0], 0);
            if (meta >= 0 && 4*lane < a.p.n_rot) {
                prefetch_to_l1(a.rot.origin(meta) + 4*lane);
            }
        }
    };
    __syncwarp();
    rotation_ahead();
    if constexpr (MAKES) { // a part of the exact rows each for the last teams of the last blocks, which have fewer tiles than others
        if (team == plan.teams - 1) {
#pragma unroll 1
            for (int part = parts.n_z - 1 - blockIdx.x; part < parts.n_parts - parts.n_z; part += parts.n_z) {
                exact_part<D>(a, parts, s, h, 0, nq, a.p.n_kv + part*EXACT, parts.n_z + part, early);
            }
        }
    }
    if (early) {
        ggml_cuda_pdl_sync();
    }
    if constexpr (MAKES) {
        const float norm = norm_of<D>((const float *) (a.q + own_q));
        inv_q      = norm > 0.0f ? DIGITS/sqrtf((float) D)/norm : 0.0f;
        scale[0].x = __shfl_sync(0xffffffff, norm*(1.0f/DIGITS), 8*t);
    }
    for (int tile = first_tile; tile < tile1; tile += plan.teams) {
        int cell[2]; // place of its prediction | tokens that attend to it << 8
        int first = INT_MAX, last = -1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int seen = (next_mask[i] & 0x7fff) == 0 ? 1 : 0;
            if (a.n_tokens > 1) {
                const uint16_t * mask = (const uint16_t *) a.mask_row(s, 0) + min(tile*TILE + 32*i + lane, a.p.n_kv - 1);
#pragma unroll 1
                for (int k = 1; k < a.n_tokens; ++k) {
                    mask += a.mask_nb1/sizeof(half);
                    seen |= (*mask & 0x7fff) == 0 ? 1 << k : 0;
                }
            }
            seen = next_meta[i] < 0 ? 0 : seen;
            cell[i] = (dense ? pred_place(next_meta[i] & 63) : 0) | seen << 8;
            first = min(first, seen ? next_meta[i] >> 8 : INT_MAX);
            last  = max(last,  seen ? next_meta[i] >> 8 : -1);
        }
        load_meta(tile + plan.teams);
        first = warp_min(first);
        last  = warp_max(last);
        if (last < 0) { // nothing attended to
            const int there = tile == first_tile ? 4 : 2;
#pragma unroll 1
            for (int piece = 0; piece < there; ++piece) {
                wait_for(piece);
                done_with(piece);
            }
#pragma unroll 1
            for (int piece = 0; piece < 2; ++piece) {
                fill(piece, tile + plan.teams, false, turn_k);
            }
            turn_k ^= 1;
            turn_v ^= there/4;
            continue;
        }
        const bool one_origin = first == last;
        int at = first; // the origin of the queries
        get_queries(at); // long before they are needed

        // scores
        const uint32_t * raw = own_k;
        float2 * scores = sm.score + lane; // 16 keys after the other, 4 of each n
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            wait_for(half);
#pragma unroll 1
            for (int sub = 0; sub < ROWS; sub += KEYS, raw += KEYS*plan.pitch_k/4, scores += MT*WARP_SIZE) {
                const auto cell_of = [&](int mt, int e) { // of keys g and g + 8 of each 16
                    return __shfl_sync(0xffffffff, half ? cell[1] : cell[0], sub + 16*mt + g + 8*e);
                };
                int   pred2[NT][MT][2]; // their predictions if there is one origin, long before they are needed
                if (dense && one_origin) {
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int offset = cell_of(mt, e) & 63;
#pragma unroll
                            for (int n = 0; n < NT; ++n) {
                                pred2[n][mt][e] = pred[4*n*SEQKV_FRAME + offset];
                            }
                        }
                    }
                }
#pragma unroll 1
                for (int pass = 0; pass < KEYS*NB/WARP_SIZE; ++pass) {
                    const int key = lane%KEYS, b = lane/KEYS + pass*(WARP_SIZE/KEYS);
                    const int begin = begin_k + pass*(WARP_SIZE/KEYS)*block_k;
                    uint32_t out[16];
                    float    factor[3];
                    if constexpr (BITS) {
                        decode_block<BITS, GRADED, true, CROSSED>(raw, begin, sm.tables, out, factor);
                    } else {
                        decode_any<true>(a.bits_k, a.graded_k, raw, begin, out, factor, sm.tables);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        *(uint4 *) (sm.level + key*LDK + 64*b + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                    }
#pragma unroll
                    for (int i = 0; i < GROUPS; ++i) {
                        *(float *) ((char *) (sm.gain_k + i*NB*KEYS + pass*WARP_SIZE) + at_gain) = factor[i];
                    }
                }
                __syncwarp();
                if (sub + KEYS == ROWS) {
                    done_with(half);
                }
                if (half == 0 && sub == 0 && tile != first_tile) { // other warps are done with the values before
#pragma unroll 1
                    for (int piece = 2; piece < 4; ++piece) {
                        fill(piece, tile, false, turn_v ^ 1);
                    }
                }

                // <levels, digits> by gain, of keys g and g + 8
                const auto products = [&](int mt, float (&sum)[NT][2]) {
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        sum[n][0] = sum[n][1] = 0.0f;
                    }
#pragma unroll
                    for (int b = 0; b < NB; ++b) {
                        uint32_t k0[4], k1[4];
                        const int8_t * row = sm.level + 16*mt*LDK + 64*b + at_row_k;
                        load_a(k0, row);
                        load_a(k1, row + 32);
                        float2 gain[GROUPS];
#pragma unroll
                        for (int i = 0; i < GROUPS; ++i) {
                            gain[i] = *(const float2 *) ((const char *) (sm.gain_k + (i*NB + b)*KEYS + 16*mt) + at_pair);
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
                                sum[n][0] += gain[i].x*(float) (256*c[i][0] + c[i][1]);
                                sum[n][1] += gain[i].y*(float) (256*c[i][2] + c[i][3]);
                            }
                        }
                    }
                };
                if (one_origin) {
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
                        float sum[NT][2];
                        products(mt, sum);
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            const float f = scale2*scale[n].x, f_pred = scale2*scale[n].y;
                            const float2 x = make_float2(f*sum[n][0], f*sum[n][1]);
                            scores[(4*n + mt)*WARP_SIZE] = dense ? make_float2(x.x + f_pred*(float) pred2[n][mt][0], x.y + f_pred*(float) pred2[n][mt][1]) : x;
                        }
                    }
                } else {
#pragma unroll 1
                    for (int mt = 0; mt < MT; ++mt) {
                        int cell2[2], origin2[2];
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int from = sub + 16*mt + g + 8*e;
                            cell2  [e] = cell_of(mt, e);
                            origin2[e] = cell2[e] >> 8 ? meta[tile*TILE + half*ROWS + from] >> 8 : -1;
                        }
                        int o = first;
                        while (true) {
                            int next = INT_MAX; // the next origin of these keys
                            if (origin2[0] >= o) { next = origin2[0]; }
                            if (origin2[1] >= o) { next = min(next, origin2[1]); }
                            next = warp_min(next);
                            if (next == INT_MAX) {
                                break;
                            }
                            o = next;
                            if (at != o) {
                                at = o;
                                if constexpr (MAKES) {
                                    const made_queries<D> x = make_queries_apart<D>((const float *) (a.q + own_q), a.rot.base + (int64_t) at*a.rot.stride, a.p.neox, a.p.n_rot, inv_q);
#pragma unroll
                                    for (int b = 0; b < NB; ++b) {
                                        digits[0][b] = x.digits[b];
                                    }
                                } else {
                                    get_queries(at);
                                }
                            }
                            float sum[NT][2];
                            products(mt, sum);
#pragma unroll
                            for (int n = 0; n < NT; ++n) {
#pragma unroll
                                for (int e = 0; e < 2; ++e) {
                                    if (origin2[e] == o) {
                                        const float x = scale2*(scale[n].x*sum[n][e] + (dense ? scale[n].y*(float) pred[4*n*SEQKV_FRAME + (cell2[e] & 63)] : 0.0f));
                                        float2 & score = scores[(4*n + mt)*WARP_SIZE];
                                        (e ? score.y : score.x) = x;
                                    }
                                }
                            }
                            if (o == last) {
                                break;
                            }
                            ++o;
                        }
                    }
                }
                __syncwarp(); // levels and gains are done with
            }
        }

        fill(0, tile + plan.teams, false, turn_k);
        rotation_ahead();

        // gains of the values
        wait_for(2);
        wait_for(3);
        float f_v[NB];
        int   gain[NB][2];
#pragma unroll
        for (int b = 0; b < NB; ++b) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                gain[b][i] = (uint8_t) ring[begin_g + i*ROWS*plan.pitch_v + b*block_v];
                gain[b][i] = cell[i] >> 8 ? gain[b][i] : 0;
            }
        }
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            const int   largest = warp_max(max(gain[b][0], gain[b][1]));
            const float most    = LOG2_BYTES - (1.0f/SEQKV_GAIN_STEPS)*largest;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = exp2f(fmaf((float) gain[b][i], 1.0f/SEQKV_GAIN_STEPS, most));
                *(float *) ((char *) (sm.gain_v + b*TILE + 32*i) + at_gain) = gain[b][i] ? x : 0.0f;
            }
            f_v[b] = gain_of(largest, 1.0f/SEQKV_GAIN_STEPS, SEQKV_GAIN_BIAS)*(seqkv_scale_of(bits_v)/BYTES);
        }

        // softmax; the scores are read before p is written over them
        const uint32_t ballot[2] = { __ballot_sync(0xffffffff, cell[0] >> 8), __ballot_sync(0xffffffff, cell[1] >> 8) };
        float p[NT][4][2], f_old[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float max = m[n];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = sm.score[(n*4 + i)*WARP_SIZE + lane];
                p[n][i][0] = x.x;
                p[n][i][1] = x.y;
            }
            if (a.p.softcap != 0.0f) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    p[n][i/2][i%2] = log2e*seqkv_logit(p[n][i/2][i%2]*(1.0f/scale2), a.p);
                }
            }
            if (a.n_tokens == 1) {
                if ((ballot[0] & ballot[1]) != 0xffffffff) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        p[n][i/2][i%2] = ballot[i/4] >> (16*(i/2%2) + 8*(i%2)) >> g & 1 ? p[n][i/2][i%2] : -INFINITY;
                    }
                }
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int c = __shfl_sync(0xffffffff, cell[i/4], 16*(i/2%2) + 8*(i%2) + g);
                    p[n][i/2][i%2] = c & seen[n] ? p[n][i/2][i%2] : -INFINITY;
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                max = fmaxf(max, p[n][i/2][i%2]);
            }
#pragma unroll
            for (int i = 4; i < WARP_SIZE; i *= 2) {
                max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, i));
            }
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
#pragma unroll
        for (int b = 0; b < NB; ++b) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 gain = *(const float2 *) ((const char *) (sm.gain_v + b*TILE + 16*i) + at_pair);
#pragma unroll
                for (int n = 0; n < NT; ++n) { // 2^23 + an integer
                    const uint32_t u = __float_as_uint(fmaf(p[n][i][0], gain.x, 8388608.0f)), v = __float_as_uint(fmaf(p[n][i][1], gain.y, 8388608.0f));
                    uint8_t * dst = sm.p + ((n*NB + b)*4 + i)*128 + at_p;
                    *(uint16_t *) dst        = (uint16_t) seqkv_prmt(u, v, 0x0051);
                    *(uint16_t *) (dst + 16) = (uint16_t) seqkv_prmt(u, v, 0x0040);
                }
            }
        }

        __syncwarp();

        fill(1, tile + plan.teams, false, turn_k);

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
        for (int b0 = 0; b0 < NB; b0 += VB) {
            int c[NT][4*VB][4] = {{{ 0 }}};
            const uint32_t * raw = own_v, * p_at = (const uint32_t *) sm.p + lane;
#pragma unroll 1
            for (int j = 0; j < TILE; j += KEYSV, raw += KEYSV*plan.pitch_v/4, p_at += KEYSV/16*WARP_SIZE) {
                const int key = lane%KEYSV, b = VB == 1 ? 0 : lane/KEYSV;
                const int begin = begin_v + b0*block_v;
                uint32_t out[16];
                if constexpr (BITS) {
                    decode_levels<BITS, 0, true, CROSSED>(raw, begin, sm.tables + TABLE_K, out);
                } else {
                    decode_uniform(bits_v, raw, begin, out, sm.tables + TABLE_K);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    *(uint4 *) (sm.level + key*LDV + 64*b + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                }
                __syncwarp();
#pragma unroll
                for (int mt = 0; mt < KEYSV/16; ++mt) {
                    // registers have two dims of keys i and i + 8, multiplied by p of each key and 0 for the other dim
                    const int8_t * row = sm.level + 16*mt*LDV + at_row_v;
#pragma unroll
                    for (int v = 0; v < VB; ++v) {
                        uint32_t pb[NT][2];
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            const uint32_t w = p_at[((n*NB + b0 + v)*4 + mt)*WARP_SIZE];
                            pb[n][0] = seqkv_prmt(w, 0, 0x4140);
                            pb[n][1] = seqkv_prmt(w, 0, 0x4342);
                        }
#pragma unroll
                        for (int i = 0; i < 4; i += 2) {
                            uint32_t r[4]; // keys 0..3, 8..11: dims 16*i.., 16*(i + 1)..; then keys 4..7, 12..15
                            load_transposed(r, row + 64*v + 16*i);
#pragma unroll
                            for (int n = 0; n < NT; ++n) {
                                mma_s8u8_k32(c[n][4*v + i],     r, pb[n][0],      pb[n][1]);
                                mma_s8u8_k32(c[n][4*v + i + 1], r, pb[n][0] << 8, pb[n][1] << 8);
                            }
                        }
                    }
                }
                __syncwarp();
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int i = 0; i < 4*VB; ++i) { // c[even]: even dims of 16 and of the next 16; c[odd]: odd ones
                    const float f = f_v[b0 + i/4];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int (&sum)[4] = c[n][i/2*2 + e];
                        acc[n][4*b0 + i][e] += f*(float) (256*sum[i%2*2] + sum[i%2*2 + 1]);
                    }
                }
            }
        }
        done_with(2);
        done_with(3);
        turn_k ^= 1;
        turn_v ^= 1;
    }

    merge_warps<D, NT, max_warps(D, NT)>(a, parts, (float *) smem_raw, m, l, acc, s, h0, plan.heads, plan.teams, plan.inv_heads, q0, blockIdx.x);
}

// Static shared memory of decode_kernel: barriers, maxima and sums
static constexpr size_t static_smem(int d, int nt) { return max_warps(d, nt)*(8*sizeof(uint64_t) + 2*4*nt*sizeof(float)); }

// The block with most warps that registers and dynamic shared memory allow; smem: what it takes of that
template <int D, int NT, int KIND> static block_plan plan_block(const seqkv_view & a, size_t smem_max, size_t & smem) {
    using smem_t = warp_smem<D, NT, KIND>;
    block_plan best = {};
    for (int heads = std::min(max_warps(D, NT), a.p.n_head_kv); heads > 0; --heads) {
        if (a.p.n_head_kv%heads != 0) {
            continue;
        }
        block_plan plan = {};
        plan.heads     = heads;
        plan.inv_heads = (65536 + heads - 1)/heads;
        const auto rows = [&](const char * cells, int64_t nb1, int64_t nb2, int size, int & pitch, bool & whole) {
            whole = heads == a.p.n_head_kv && nb1 == (int64_t) size*heads && (((uintptr_t) cells | nb2) & 15) == 0;
            pitch = whole ? (int) nb1 : 16*((15 + size*heads + 15)/16 | 1); // an odd number of 16 bytes: fewer conflicts
        };
        rows(a.k, a.k_nb1, a.k_nb2, a.size_k, plan.pitch_k, plan.whole_k);
        rows(a.v, a.v_nb1, a.v_nb2, a.size_v, plan.pitch_v, plan.whole_v);
        plan.ring  = (2*ROWS*(plan.pitch_k + plan.pitch_v) + 31)/16*16; // and some words that are read behind the last row
        const size_t team = std::max(heads*sizeof(smem_t) + plan.ring, heads*4*NT*merge_pitch(D)*sizeof(float));
        plan.teams = std::min(max_warps(D, NT)/heads, (int) (smem_max/team));
        if (plan.teams > 0 && plan.teams*heads > best.teams*best.heads) {
            best = plan;
            smem = plan.teams*team;
        }
    }
    GGML_ASSERT(best.teams > 0);
    return best;
}

template <int D, bool DENSE>
static void launch_queries(ggml_backend_cuda_context & ctx, const seqkv_view & a, const frame_queries & f, const seqkv_parts & parts, const first_tiles & ahead) {
    constexpr size_t smem = query_smem(D, DENSE);
    CUDA_SET_SHARED_MEMORY_LIMIT((queries_kernel<D, DENSE>), smem);
    const int nq = a.n_tokens*a.group, n_q = std::min(nq, QUERY_ROWS), n_exact = parts.n_parts - parts.n_z, heads = a.p.n_head_kv*a.n_stream;
    static int fits[GGML_CUDA_MAX_DEVICES] = { 0 }; // blocks of a multiprocessor
    int & fit = fits[ctx.device];
    if (fit == 0) {
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, queries_kernel<D, DENSE>, THREADS, smem));
    }
    const int at_once = ggml_cuda_info().devices[ctx.device].nsm*std::max(1, fit)/heads; // blocks of a KV head that run at the same time
    query_tiles tiles;
    tiles.frames = QUERY_ROWS/n_q;
    tiles.n      = (f.n_frames + tiles.frames - 1)/tiles.frames*((nq + QUERY_ROWS - 1)/QUERY_ROWS);
    tiles.inv    = (65536 + tiles.frames - 1)/tiles.frames;
    tiles.blocks = (tiles.n + WARPS - 1)/WARPS;
    tiles.exact  = (n_exact + WARPS - 1)/WARPS;
    if (DENSE) { // each block loads D
        tiles.blocks = std::min(tiles.blocks, std::max(1, at_once - tiles.exact));
    } else if (at_once > 0) { // exact rows in two or three goes, if there are no more blocks then than can run one after the other in whole waves
        const int rest = (at_once - tiles.blocks%at_once)%at_once;
        tiles.exact = 3*rest >= tiles.exact ? std::min(rest, tiles.exact) : tiles.exact;
    }
    ggml_cuda_kernel_launch((queries_kernel<D, DENSE>), ggml_cuda_kernel_launch_params(dim3(a.p.n_head_kv, tiles.blocks + tiles.exact, a.n_stream), dim3(THREADS), smem, ctx.stream()),
        a, f, parts, tiles, ahead, a.k_new != nullptr);
}

template <int D, int NT, int KIND>
static void decode_case(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame) {
    const seqkv_view a = seqkv_view_of(dst, frame);
    cudaStream_t stream = ctx.stream();

    const int nq       = a.n_tokens*a.group;
    const int n_chunks = (nq + 4*NT - 1)/(4*NT);
    const auto & info = ggml_cuda_info().devices[ctx.device];
    const size_t smem_max = info.smpbo - static_smem(D, NT);
    size_t smem = 0;
    const block_plan plan = plan_block<D, NT, KIND>(a, smem_max, smem);
    const int n_threads = plan.heads*plan.teams*WARP_SIZE;
    CUDA_SET_SHARED_MEMORY_LIMIT((decode_kernel<D, NT, KIND, false>), smem_max);

    static struct { int threads, blocks; size_t smem; } fits[GGML_CUDA_MAX_DEVICES] = {}; // blocks of a multiprocessor, as asked last
    auto & fit = fits[ctx.device];
    if (fit.threads != n_threads || fit.smem != smem) {
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit.blocks, decode_kernel<D, NT, KIND, false>, n_threads, smem));
        fit.threads = n_threads;
        fit.smem    = smem;
    }
    const int most    = std::max(1, info.nsm*std::max(1, fit.blocks)/(a.p.n_head_kv/plan.heads*a.n_stream*n_chunks)); // blocks that run at the same time
    const int n_exact = (a.n_virt - a.p.n_kv + EXACT - 1)/EXACT;
    const int n_tiles = (a.p.n_kv + TILE - 1)/TILE;

    // With more than two tiles a team, that takes less time than a kernel of its own for the queries
    const bool made = makes_queries(NT, KIND) && n_tiles > 2*plan.teams*most && a.n_tokens == 1 && a.form_k != SEQKV_DENSE &&
        (!a.p.neox || a.p.n_rot == D) && (((uintptr_t) a.q | a.q_nb1 | a.q_nb2) & 15) == 0;

    frame_queries f = {};
    ggml_cuda_pool_alloc<uint32_t> digits(ctx.pool());
    ggml_cuda_pool_alloc<float2>   scale (ctx.pool());
    ggml_cuda_pool_alloc<int16_t>  pred  (ctx.pool());
    if (!made) {
        f.n_frames = (int) dst->src[8]->ne[1] - SEQKV_FRAME;
        f.n4       = n_chunks*NT;
        const int64_t n = (int64_t) a.n_stream*f.n_frames*a.p.n_head_kv*f.n4;
        f.digits = digits.alloc(n*D*2);
        f.scale  = scale.alloc(n*4);
        f.pred   = a.form_k == SEQKV_DENSE ? pred.alloc(n*4*SEQKV_FRAME) : nullptr;
    }

    seqkv_parts parts;
    parts.n_z      = std::max(1, std::min((n_tiles + plan.teams - 1)/plan.teams, most));
    parts.n_parts  = parts.n_z + n_exact;
    parts.permuted = 1;
    const int64_t n_out = (int64_t) a.n_stream*a.n_tokens*a.n_head*parts.n_parts;
    ggml_cuda_pool_alloc<float2> ml (ctx.pool(), n_out);
    ggml_cuda_pool_alloc<float>  acc(ctx.pool(), n_out*D);
    parts.ml  = ml.get();
    parts.acc = acc.get();

    const block_tiles tiles = { n_tiles/parts.n_z, n_tiles%parts.n_z };
    if (!made) {
        static int l2[GGML_CUDA_MAX_DEVICES] = { 0 }; // bytes of the L2 cache
        if (l2[ctx.device] == 0) {
            CUDA_CHECK(cudaDeviceGetAttribute(&l2[ctx.device], cudaDevAttrL2CacheSize, ctx.device));
        }
        const bool ahead_fits = 2*a.n_stream*parts.n_z*plan.teams*TILE*(a.k_nb1 + a.v_nb1) <= l2[ctx.device];
        const first_tiles ahead = { tiles, parts.n_z, ahead_fits ? plan.teams : 0 };
        if (a.form_k == SEQKV_DENSE) {
            launch_queries<D, true>(ctx, a, f, parts, ahead);
        } else {
            launch_queries<D, false>(ctx, a, f, parts, ahead);
        }
    }
    const ggml_cuda_kernel_launch_params launch(dim3(parts.n_z, a.p.n_head_kv/plan.heads, a.n_stream*n_chunks), dim3(n_threads), smem, stream);
    if (!made) {
        ggml_cuda_kernel_launch((decode_kernel<D, NT, KIND, false>), launch, a, f, parts, plan, tiles, n_chunks, frame != nullptr);
    } else if constexpr (makes_queries(NT, KIND)) {
        CUDA_SET_SHARED_MEMORY_LIMIT((decode_kernel<D, NT, KIND, true>), smem_max);
        ggml_cuda_kernel_launch((decode_kernel<D, NT, KIND, true>), launch, a, f, parts, plan, tiles, n_chunks, frame != nullptr);
    }
    seqkv_combine(ctx, a, parts, rows);
}

template <int D, int NT> static void decode_types(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame) {
    decode_kinds(dst, [&](auto kind) { decode_case<D, NT, decltype(kind)::value>(ctx, dst, rows, frame); });
}

template <int D> void seqkv_decode_heads(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries) {
    if (n_queries <= 4) {
        decode_types<D, 1>(ctx, dst, rows, frame);
    } else if (n_queries <= 8 || max_nt(D) == 2) {
        decode_types<D, 2>(ctx, dst, rows, frame);
    } else {
        decode_case<D, max_nt(D), 0>(ctx, dst, rows, frame);
    }
}
