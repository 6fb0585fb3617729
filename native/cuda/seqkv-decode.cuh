// Decode: what both of its ways share: parts of exact rows, rows on their way to shared memory, the sums of a block's warps.
#pragma once

#include "seqkv-attn.cuh"
#include "seqkv-cells.cuh"
#include "seqkv-mma.cuh"

static constexpr int TILE     = 64;       // cells of a tile
static constexpr int WARPS    = 4;
static constexpr int THREADS  = WARPS*WARP_SIZE;
static constexpr int EXACT    = 4;        // exact rows of a part, which a warp works on
static constexpr int DIGITS   = 127*256;  // largest value of two signed digits
static constexpr int BYTES    = 65530;    // largest value of two bytes, with room for rounding

// One kernel for all, seqkv-short.cu; false: not for this op, nothing was done. n_queries: of a KV head
bool seqkv_decode_short(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries);

// pieces of 16 bytes that a cell of these types has at most, where rows and heads begin at multiples of 16 bytes and of its size
static constexpr __host__ __device__ int cell_pieces(int d, int bits, int graded) {
    const int size = d/64*(1 + graded + 8*bits), aligned = size & -size;
    return bits == 0 ? 0 : (size + (aligned < 16 ? 16 - aligned : 0) + 15)/16;
}

// f(std::integral_constant of the kind): twice the bits of both types, plus 1 if keys are graded, for the types of one live type, with and without a
// profile, which have kernels of their own; 0: any types
template <typename F> static auto decode_kinds(const ggml_tensor * dst, F f) {
    const int bits = ggml_seqkv_bits(dst->src[2]->type);
    switch (ggml_seqkv_bits(dst->src[1]->type) != bits ? 0 : 2*bits + ggml_seqkv_graded(dst->src[1]->type)) {
        case 4:  return f(std::integral_constant<int, 4>());
        case 5:  return f(std::integral_constant<int, 5>());
        case 6:  return f(std::integral_constant<int, 6>());
        case 7:  return f(std::integral_constant<int, 7>());
        case 8:  return f(std::integral_constant<int, 8>());
        case 9:  return f(std::integral_constant<int, 9>());
        default: return f(std::integral_constant<int, 0>());
    }
}

SEQKV_FN int64_t part_index(const seqkv_view & a, const seqkv_parts & parts, int s, int h, int iq, int part) {
    const int t = a.token_of(iq);
    return (((int64_t) s*a.n_tokens + t)*a.n_head + h*a.group + iq - t*a.group)*parts.n_parts + part;
}

// 2*n bytes as n values
template <int N> struct half_vector {
    static_assert(N == 2 || N == 4 || N == 8, "4, 8 or 16 bytes");
    uint32_t w[N/2];
    __device__ __forceinline__ void load(const half * x) {
        if constexpr (N == 2) {
            w[0] = *(const uint32_t *) x;
        } else if constexpr (N == 4) {
            *(uint2 *) w = *(const uint2 *) x;
        } else {
            *(uint4 *) w = *(const uint4 *) x;
        }
    }
    __device__ __forceinline__ float value(int i) const {
        const float2 f = __half22float2(*(const half2 *) &w[i/2]);
        return i%2 ? f.y : f.x;
    }
};

// Four values times inv, rounded -> a word of their upper and one of their lower digits, 256*upper + lower
SEQKV_FN void digits_of_word(float x0, float x1, float x2, float x3, float inv, uint32_t & upper, uint32_t & lower) {
    const float base = 12582912.0f + 128.0f; // 1.5*2^23: the integer is in the low bytes; 128: the lower digit is signed
    const uint32_t y0 = __float_as_uint(fmaf(x0, inv, base)), y1 = __float_as_uint(fmaf(x1, inv, base));
    const uint32_t y2 = __float_as_uint(fmaf(x2, inv, base)), y3 = __float_as_uint(fmaf(x3, inv, base));
    const uint32_t y01 = seqkv_prmt(y0, y1, 0x5140), y23 = seqkv_prmt(y2, y3, 0x5140);
    upper = seqkv_prmt(y01, y23, 0x7632);
    lower = seqkv_prmt(y01, y23, 0x5410) ^ 0x80808080;
}

// Sums of 16 values over a warp: lane l gets that of value l/2
SEQKV_FN float sum16(float (&x)[16], int lane) {
#pragma unroll
    for (int step = 3; step >= 0; --step) {
        const int  n     = 1 << step;
        const bool upper = lane & 2*n;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < n) {
                const float send = upper ? x[i] : x[i + n];
                x[i] = (upper ? x[i + n] : x[i]) + __shfl_xor_sync(0xffffffff, send, 2*n);
            }
        }
    }
    return x[0] + __shfl_xor_sync(0xffffffff, x[0], 1);
}

// FRAME: the row of token t of one KV head, by a warp
template <int D> static __device__ void frame_row(const seqkv_view & a, int s, int h, int t) {
    constexpr int V = D/WARP_SIZE;
    const int     i0 = threadIdx.x%WARP_SIZE*V, half_rot = a.p.n_rot/2;
    const int64_t token = (int64_t) s*a.n_tokens + t;
    const float * k = (const float *) (a.k_new + h*a.k_new_nb1 + token*a.k_new_nb2), * v = (const float *) (a.v_new + h*a.v_new_nb1 + token*a.v_new_nb2);
    const float2 * cs = (const float2 *) a.rot.origin(a.meta[(int64_t) s*a.n_virt + a.p.n_kv + a.p.n_win + t]);
    half * row = a.cur_row(s, t) + h*D;
#pragma unroll
    for (int c = 0; c < V; ++c) {
        const int    i      = i0 + c, pair = a.p.neox ? (i >= half_rot ? i - half_rot : i) : i/2;
        const bool   second = a.p.neox ? i >= half_rot : i & 1, rotated = i < a.p.n_rot;
        const float2 f      = rotated ? cs[pair] : make_float2(1.0f, 0.0f);
        const float  other  = k[!rotated ? i : !a.p.neox ? i ^ 1 : second ? i - half_rot : i + half_rot];
        row[i] = __float2half(k[i]*f.x + (second ? -other : other)*f.y);
        row[a.p.n_head_kv*D + i] = __float2half(v[i]);
    }
}

// Exact rows [j0, j0 + EXACT) of one KV head for queries [q0, q0 + nq), by one warp: plain float arithmetic, a lane D/32 neighbouring values.
// keys: (EXACT, D) scratch of the warp. early: no kernel before this one that may still run writes what is read here, but for what is of this ubatch
template <int D>
static __device__ void exact_part(const seqkv_view & a, const seqkv_parts & parts, float * keys, int s, int h, int q0, int nq, int j0, int part, bool early) {
    constexpr int V = D/WARP_SIZE, QUERIES = 16/EXACT; // at a time
    const int lane = threadIdx.x%WARP_SIZE, n = min(EXACT, a.n_virt - j0), half_rot = a.p.n_rot/2;
    const int e_own = lane/2/QUERIES, q_own = lane/2%QUERIES; // row and query whose logit this lane gets

    const int t0 = j0 - a.p.n_kv - a.p.n_win; // the first row's token of the ubatch
    if (early && t0 + n > 0) {
        ggml_cuda_pdl_sync();
#pragma unroll 1
        for (int t = a.k_new ? max(0, t0) : t0 + n; t < t0 + n; ++t) {
            frame_row<D>(a, s, h, t);
        }
        __syncwarp();
    }

    // everything that is read, at once
    const int32_t * meta = a.meta + (int64_t) s*a.n_virt + j0;
    half_vector<V> k_raw[EXACT], v_raw[EXACT];
    int32_t origin[EXACT];
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
        const half * row = a.exact(s, j0 + min(e, n - 1)) + h*D + V*lane;
        origin[e] = meta[min(e, n - 1)];
        k_raw[e].load(row);
        v_raw[e].load(row + a.p.n_head_kv*D);
    }
    const bool used = e_own < n && meta[min(e_own, n - 1)] >= 0;
    float2 cs[EXACT][V];
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
#pragma unroll
        for (int c = 0; c < V; ++c) {
            const int i = V*lane + c, pair = a.p.neox ? (i >= half_rot ? i - half_rot : i) : i/2;
            cs[e][c] = origin[e] >= 0 && i < a.p.n_rot ? ((const float2 *) a.rot.origin(origin[e]))[pair] : make_float2(1.0f, 0.0f);
        }
    }
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
#pragma unroll
        for (int c = 0; c < V; ++c) {
            keys[e*D + V*lane + c] = k_raw[e].value(c);
        }
    }
    __syncwarp();
    float k[EXACT][V];
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
#pragma unroll
        for (int c = 0; c < V; ++c) {
            const int  i      = V*lane + c;
            const bool second = a.p.neox ? i >= half_rot : i & 1;
            const int  other  = i >= a.p.n_rot ? i : !a.p.neox ? i ^ 1 : second ? i - half_rot : i + half_rot;
            k[e][c] = k_raw[e].value(c)*cs[e][c].x + (second ? keys[e*D + other] : -keys[e*D + other])*cs[e][c].y;
        }
    }
    if (early) {
        ggml_cuda_pdl_sync();
    }
#pragma unroll 1
    for (int iq0 = 0; iq0 < nq; iq0 += QUERIES) {
        const int  token = a.token_of(q0 + min(iq0 + q_own, nq - 1));
        const bool keep  = used && (((const uint16_t *) a.mask_row(s, token))[j0 + min(e_own, n - 1)] & 0x7fff) == 0;
        float dot[16];
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            const float * q = a.query_of(s, h, q0 + min(iq0 + i, nq - 1)) + V*lane;
            float x[V];
#pragma unroll
            for (int c = 0; c < V; c += 2) {
                *(float2 *) (x + c) = *(const float2 *) (q + c);
            }
#pragma unroll
            for (int e = 0; e < EXACT; ++e) {
                float sum = 0.0f;
#pragma unroll
                for (int c = 0; c < V; ++c) {
                    sum += x[c]*k[e][c];
                }
                dot[e*QUERIES + i] = sum;
            }
        }
        const float logit = sum16(dot, lane);
        const float x = keep ? seqkv_logit(logit, a.p) : -INFINITY;
        float m = x;
#pragma unroll
        for (int i = 2*QUERIES; i < WARP_SIZE; i *= 2) {
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, i));
        }
        const float p = x == -INFINITY ? 0.0f : __expf(x - m);
        float l = p;
#pragma unroll
        for (int i = 2*QUERIES; i < WARP_SIZE; i *= 2) {
            l += __shfl_xor_sync(0xffffffff, l, i);
        }
        if (lane%2 == 0 && e_own == 0 && iq0 + q_own < nq) {
            parts.ml[part_index(a, parts, s, h, q0 + iq0 + q_own, part)] = make_float2(m, l);
        }
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            float sum[V] = { 0.0f };
#pragma unroll
            for (int e = 0; e < EXACT; ++e) {
                const float pe = __shfl_sync(0xffffffff, p, 2*(e*QUERIES + i));
#pragma unroll
                for (int c = 0; c < V; ++c) {
                    sum[c] += pe*v_raw[e].value(c);
                }
            }
            if (iq0 + i < nq) {
                float * dst = parts.acc + part_index(a, parts, s, h, q0 + iq0 + i, part)*D + V*lane;
#pragma unroll
                for (int c = 0; c < V; c += 2) {
                    *(float2 *) (dst + c) = make_float2(sum[c], sum[c + 1]);
                }
            }
        }
    }
}

// Rows of cells on their way to shared memory. They keep their place in 16 bytes of global memory, or in 4 if rows are not aligned.
// PIECES: of 16 bytes, that a row has at most (0: as many as it has)
template <int PITCH, int PIECES = 0> struct row_loader {
    const char * cells; // row 0 of the head
    int          nb1, size, skew;
    uint32_t     lane;  // row | piece << 8 | rows at a time << 16: what this lane copies of rows that are pieces of 16 bytes; 0: rows are copied by words

    __device__ __forceinline__ row_loader(const char * cells, int64_t nb1, int64_t nb2, int size) : cells(cells), nb1((int) nb1), size(size) {
        skew = (int) (uintptr_t) cells & 15;
        lane = 0;
        const int own = (skew + size + 15)/16;
        if (((nb1 | nb2) & 15) == 0 && (PIECES == 0 || own <= PIECES)) {
            const int pieces = PIECES ? PIECES : own, at_a_time = WARP_SIZE/pieces, i = threadIdx.x%WARP_SIZE;
            lane = (i/pieces < at_a_time && i%pieces < own ? i/pieces : 255) | i%pieces << 8 | at_a_time << 16;
        }
    }
    // byte of row j's cell in its raw row
    __device__ __forceinline__ int begin(int j) const { return lane ? skew : ((int) (uintptr_t) cells + j*nb1) & 3; }

    // rows [j0, j0 + N) below end
    template <int N> __device__ __forceinline__ void load(char * raw, int j0, int end) const {
        const char * base = cells + (int64_t) j0*nb1;
        const int    n    = min(N, end - j0);
        if (lane) {
            const int row = lane & 255, piece = 16*(lane >> 8 & 255), at_a_time = lane >> 16;
            const char * src = base + (row*nb1 + piece - skew);
            char       * dst = raw + row*PITCH + piece;
            if constexpr (PIECES > 0) {
#pragma unroll
                for (int i = 0; i < N; i += WARP_SIZE/PIECES) {
                    if (row + i < n) {
                        copy_async16(dst + i*PITCH, src + i*nb1);
                    }
                }
            } else {
#pragma unroll 2
                for (int r = row; r < n; r += at_a_time) {
                    copy_async16(dst, src);
                    dst += at_a_time*PITCH;
                    src += at_a_time*nb1;
                }
            }
        } else {
            const int i = threadIdx.x%WARP_SIZE;
#pragma unroll 1
            for (int r = i/16; r < n; r += 2) {
                const char * src = base + r*nb1;
                const int    at  = (int) (uintptr_t) src & 3;
#pragma unroll 1
                for (int w = 4*(i%16); w - at < size; w += 64) {
                    copy_async4(raw + r*PITCH + w, src - at + w);
                }
            }
        }
        copy_commit();
    }
};

static constexpr __host__ __device__ int merge_pitch(int d) { return d + 8; } // free of conflicts for what writes and reads sums

// The sums of a block's warps -> a part. Warps i, i + heads, ... (one of each team) have sums of KV head h0 + i. all: (warps, 4*NT, merge_pitch(D)) scratch
// that others may still read; m, l of lane 4*g + t: of query t of each n, m of base 2, l over this lane's keys; acc: its values 16*i + 2*g, + 1.
// The warps of a KV head share its queries. Nothing else runs meanwhile, so what counts is how long the longest chain takes.
template <int D, int NT, int MAX_WARPS>
SEQKV_FN void merge_warps(const seqkv_view & a, const seqkv_parts & parts, float * all, const float (&m)[NT], const float (&l)[NT],
        const float (&acc)[NT][D/16][2], int s, int h0, int heads, int teams, int q0, int part) {
    constexpr int PIECES = D/4; // of a query
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const int team = warp/heads, head = warp - team*heads, n_q = min(4*NT, a.n_tokens*a.group - q0);
    __shared__ float2 warp_ml[MAX_WARPS][4*NT];
    float sum_l[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        sum_l[n] = l[n];
#pragma unroll
        for (int i = 4; i < WARP_SIZE; i *= 2) {
            sum_l[n] += __shfl_xor_sync(0xffffffff, sum_l[n], i);
        }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        if (g == 0) {
            warp_ml[warp][4*n + t] = make_float2(m[n], sum_l[n]);
        }
#pragma unroll
        for (int i = 0; i < D/16; ++i) {
            *(float2 *) (all + (warp*4*NT + 4*n + t)*merge_pitch(D) + 16*i + 2*g) = make_float2(acc[n][i][0], acc[n][i][1]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = lane, query = team + i/PIECES*teams; query < n_q; i += WARP_SIZE, query = team + i/PIECES*teams) {
        float max = -INFINITY, sum = 0.0f;
        for (int w = head; w < teams*heads; w += heads) {
            max = fmaxf(max, warp_ml[w][query].x);
        }
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int w = head; w < teams*heads; w += heads) {
            const float2 ml = warp_ml[w][query];
            const float  f  = ml.x == -INFINITY ? 0.0f : exp2f(ml.x - max);
            const float4 y  = *(const float4 *) (all + (w*4*NT + query)*merge_pitch(D) + i%PIECES*4);
            x = make_float4(x.x + f*y.x, x.y + f*y.y, x.z + f*y.z, x.w + f*y.w);
            sum += f*ml.y;
        }
        const int64_t at = part_index(a, parts, s, h0 + head, q0 + query, part);
        *(float4 *) (parts.acc + at*D + i%PIECES*4) = x;
        if (i%PIECES == 0) {
            parts.ml[at] = make_float2(max/1.44269504f, sum);
        }
    }
}
