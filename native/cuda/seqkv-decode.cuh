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
static constexpr float LOG2_BYTES = 15.999868f; // log2(BYTES)

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

SEQKV_FN int part_index(const seqkv_view & a, const seqkv_parts & parts, int s, int h, int iq, int part) {
    const int t = a.token_of(iq);
    return ((s*a.n_tokens + t)*a.n_head + h*a.group + iq - t*a.group)*parts.n_parts + part;
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
    __device__ __forceinline__ void store(half * x) const {
        if constexpr (N == 2) {
            *(uint32_t *) x = w[0];
        } else if constexpr (N == 4) {
            *(uint2 *) x = *(const uint2 *) w;
        } else {
            *(uint4 *) x = *(const uint4 *) w;
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

// Pairs of values that are rotated together, P neighbouring ones: where their first and second values are in a head of D. A lane has V/2 pairs of V values.
// Values that are not rotated are pairs of neighbours.
template <int P> struct value_pairs {
    int  first, second, pair;
    bool rotated, turned; // turned: two pairs of neighbours, first has both values of one and second of the other

    __device__ __forceinline__ value_pairs(const ggml_seqkv_params & p, int pair) : pair(pair), rotated(pair < p.n_rot/2) {
        const bool halves = p.neox && rotated;
        first  = halves ? pair : 2*pair;
        second = halves ? pair + p.n_rot/2 : 2*pair + P;
        turned = P == 2 && !halves;
    }
    __device__ __forceinline__ void turn(float (&x)[P], float (&y)[P]) const {
        if constexpr (P == 2) {
            const float z = x[1];
            x[1] = turned ? y[0] : z;
            y[0] = turned ? z : y[0];
        }
    }
    __device__ __forceinline__ void load(const float * src, float (&x)[P], float (&y)[P]) const {
#pragma unroll
        for (int i = 0; i < P; ++i) {
            x[i] = src[first  + i];
            y[i] = src[second + i];
        }
        turn(x, y);
    }
    __device__ __forceinline__ void load(const half * src, float (&x)[P], float (&y)[P]) const {
        if constexpr (P == 2) {
            *(float2 *) x = __half22float2(*(const half2 *) (src + first));
            *(float2 *) y = __half22float2(*(const half2 *) (src + second));
        } else {
            x[0] = __half2float(src[first]);
            y[0] = __half2float(src[second]);
        }
        turn(x, y);
    }
    // cosines and sines of a row of rot
    __device__ __forceinline__ void load_rotation(const float * row, float (&cs)[2*P]) const {
#pragma unroll
        for (int i = 0; i < 2*P; ++i) {
            cs[i] = i%2 == 0 ? 1.0f : 0.0f;
        }
        if (rotated) {
            if constexpr (P == 2) {
                *(float4 *) cs = *(const float4 *) (row + 2*pair);
            } else {
                *(float2 *) cs = *(const float2 *) (row + 2*pair);
            }
        }
    }
};

// A lane's pointer. base: one that is known to be of global memory, as the result is then
template <typename T> SEQKV_FN T * from_lane(T * base, T * x, int lane) { return base + __shfl_sync(0xffffffff, (long long) (x - base), lane); }

// by the angles of cs, or back
template <int P, bool BACK> SEQKV_FN void rotate(const float (&cs)[2*P], float (&x)[P], float (&y)[P]) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
        const float c = cs[2*i], sine = BACK ? -cs[2*i + 1] : cs[2*i + 1], x0 = x[i];
        x[i] = x0*c - y[i]*sine;
        y[i] = y[i]*c + x0*sine;
    }
}

// Exact rows [j0, j0 + EXACT) of one KV head for queries [q0, q0 + nq), by one warp: plain float arithmetic, a lane D/64 pairs of a key and D/32 neighbouring
// values. Code that is run once: what counts is how much it is. Rows of this ubatch are made, as FRAME would, if a.k_new is there.
// early: no kernel before this one that may still run writes what is read here, but for what is of this ubatch
template <int D>
static __device__ void exact_part(const seqkv_view & a, const seqkv_parts & parts, int s, int h, int q0, int nq, int j0, int part, bool early) {
    constexpr int V = D/WARP_SIZE, P = V == 2 ? 1 : 2, T = V/2/P, QUERIES = 16/EXACT; // at a time
    const int lane = threadIdx.x%WARP_SIZE, n = min(EXACT, a.n_virt - j0);
    const int e_own = lane/2/QUERIES, q_own = lane/2%QUERIES; // row and query whose logit this lane gets
    const int n_old = a.p.n_kv + a.p.n_win - j0;              // rows that are not of this ubatch
    const bool waits = early && n_old < n;
    if (waits && !a.k_new) {
        ggml_cuda_pdl_sync();
    }

    // everything that is read, at once; rows behind the last one are that one
    const int     own_j    = j0 + min(lane, n - 1);
    const int32_t own_meta = a.meta[(int64_t) s*a.n_virt + own_j];
    const half  * own_row  = a.exact(s, own_j) + h*D;
    const float * own_rot  = a.rot.origin(max(0, own_meta));
    float x[EXACT][T][P], y[EXACT][T][P], cs[EXACT][T][2*P];
    half_vector<V> v[EXACT];
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
        const half * row = from_lane((const half *) a.win, own_row, e);
#pragma unroll
        for (int i = 0; i < T; ++i) {
            value_pairs<P>(a.p, P*(lane + i*WARP_SIZE)).load(row, x[e][i], y[e][i]);
        }
        v[e].load(row + a.p.n_head_kv*D + V*lane);
    }
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
        const float * row = from_lane(a.rot.base, own_rot, e);
#pragma unroll
        for (int i = 0; i < T; ++i) {
            value_pairs<P>(a.p, P*(lane + i*WARP_SIZE)).load_rotation(row, cs[e][i]);
        }
    }
    const bool used = __shfl_sync(0xffffffff, own_meta, e_own) >= 0 && e_own < n;

    if (waits && a.k_new) {
        ggml_cuda_pdl_sync();
#pragma unroll 1
        for (int e = max(0, n_old); e < n; ++e) {
            const int     t     = e - n_old;
            const int64_t token = (int64_t) s*a.n_tokens + t;
            const float * k_src = (const float *) (a.k_new + h*a.k_new_nb1 + token*a.k_new_nb2), * v_src = (const float *) (a.v_new + h*a.v_new_nb1 + token*a.v_new_nb2) + V*lane;
            const float * rot   = from_lane(a.rot.base, own_rot, e);
            half        * dst   = from_lane(a.cur, (half *) own_row, e);
#pragma unroll
            for (int i = 0; i < T; ++i) {
                const value_pairs<P> pairs(a.p, P*(lane + i*WARP_SIZE));
                float x_new[P], y_new[P], cs_new[2*P];
                pairs.load(k_src, x_new, y_new);
                pairs.load_rotation(rot, cs_new);
                rotate<P, true>(cs_new, x_new, y_new);
                pairs.turn(x_new, y_new);
#pragma unroll
                for (int c = 0; c < P; ++c) {
                    dst[pairs.first  + c] = __float2half(x_new[c]);
                    dst[pairs.second + c] = __float2half(y_new[c]);
                }
                pairs.turn(x_new, y_new);
#pragma unroll
                for (int c = 0; c < P; ++c) {
#pragma unroll
                    for (int k = 0; k < EXACT; ++k) { // and those behind the last one
                        x[k][i][c] = k >= e ? __half2float(__float2half(x_new[c])) : x[k][i][c];
                        y[k][i][c] = k >= e ? __half2float(__float2half(y_new[c])) : y[k][i][c];
                    }
                }
            }
            half_vector<V> v_new;
#pragma unroll
            for (int c = 0; c < V; c += 2) {
                const half2 both = __floats2half2_rn(v_src[c], v_src[c + 1]);
                v_new.w[c/2] = *(const uint32_t *) &both;
            }
            v_new.store(dst + a.p.n_head_kv*D + V*lane);
#pragma unroll
            for (int k = 0; k < EXACT; ++k) {
                v[k] = k >= e ? v_new : v[k];
            }
        }
    }
#pragma unroll
    for (int e = 0; e < EXACT; ++e) {
#pragma unroll
        for (int i = 0; i < T; ++i) {
            rotate<P, false>(cs[e][i], x[e][i], y[e][i]);
        }
    }
    if (early) {
        ggml_cuda_pdl_sync();
    }
#pragma unroll 1
    for (int iq0 = 0; iq0 < nq; iq0 += QUERIES) {
        const int  own   = q0 + min(iq0 + q_own, nq - 1), token = a.token_of(own);
        const int  own_q = (int) ((const char *) a.query_of(s, h, own) - a.q), own_at = part_index(a, parts, s, h, own, part);
        const bool keep  = used && (((const uint16_t *) a.mask_row(s, token))[j0 + min(e_own, n - 1)] & 0x7fff) == 0;
        float dot[16];
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            const float * q = (const float *) (a.q + __shfl_sync(0xffffffff, own_q, 2*i));
            float qx[T][P], qy[T][P];
#pragma unroll
            for (int k = 0; k < T; ++k) {
                const value_pairs<P> pairs(a.p, P*(lane + k*WARP_SIZE));
                if constexpr (P == 2) {
                    *(float2 *) qx[k] = *(const float2 *) (q + pairs.first);
                    *(float2 *) qy[k] = *(const float2 *) (q + pairs.second);
                    pairs.turn(qx[k], qy[k]);
                } else {
                    pairs.load(q, qx[k], qy[k]);
                }
            }
#pragma unroll
            for (int e = 0; e < EXACT; ++e) {
                float sum = 0.0f;
#pragma unroll
                for (int c = 0; c < T*P; ++c) {
                    sum = fmaf(qy[c/P][c%P], y[e][c/P][c%P], fmaf(qx[c/P][c%P], x[e][c/P][c%P], sum));
                }
                dot[e*QUERIES + i] = sum;
            }
        }
        const float logit = sum16(dot, lane);
        const float z = keep ? seqkv_logit(logit, a.p) : -INFINITY;
        float m = z;
#pragma unroll
        for (int i = 2*QUERIES; i < WARP_SIZE; i *= 2) {
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, i));
        }
        const float p = z == -INFINITY ? 0.0f : __expf(z - m);
        float l = p;
#pragma unroll
        for (int i = 2*QUERIES; i < WARP_SIZE; i *= 2) {
            l += __shfl_xor_sync(0xffffffff, l, i);
        }
        if (lane%2 == 0 && e_own == 0 && iq0 + q_own < nq) {
            parts.ml[own_at] = make_float2(m, l);
        }
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            float sum[V] = { 0.0f };
#pragma unroll
            for (int e = 0; e < EXACT; ++e) {
                const float pe = __shfl_sync(0xffffffff, p, 2*(e*QUERIES + i));
#pragma unroll
                for (int c = 0; c < V; ++c) {
                    sum[c] += pe*v[e].value(c);
                }
            }
            const int at = __shfl_sync(0xffffffff, own_at, 2*i);
            if (iq0 + i < nq) {
                float * dst = parts.acc + (int64_t) at*D + V*lane;
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
        const float (&acc)[NT][D/16][2], int s, int h0, int heads, int teams, int inv_heads, int q0, int part) {
    constexpr int PIECES = D/4; // of a query
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    const int team = warp*inv_heads >> 16, head = warp - team*heads, n_q = min(4*NT, a.n_tokens*a.group - q0);
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
        const int at = part_index(a, parts, s, h0 + head, q0 + query, part);
        *(float4 *) (parts.acc + (int64_t) at*D + i%PIECES*4) = x;
        if (i%PIECES == 0) {
            parts.ml[at] = make_float2(max/1.44269504f, sum);
        }
    }
}
