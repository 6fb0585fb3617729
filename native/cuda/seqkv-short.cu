// Decode of short contexts in one kernel: where few tiles of 64 cells are there, what counts is how long one takes.
//
// A block works on a tile of one KV head, 16 keys a warp, and brings the queries into the tile's frame itself: the levels of the
// keys are unpacked while D is on its way to shared memory, then q' = D^T R(-t0) q on tensor cores (or H R(-t0) q in registers), its two
// digits and its products with the predictions by every block anew. Scores and sums over values are those of seqkv-decode-kernels.cuh.
// Other blocks of the same launch attend to the exact rows.
#include "seqkv-decode.cuh"

template <int D, int NT> struct short_smem {
    static constexpr int NB = D/64, KEYS = 16, LD = D + 8, LDQ = D + 4, LDK = D + 16, LDV = 64 + 16;
    static constexpr int PITCH = D/2 + 16; // bytes of a raw row: the largest cell, wherever it begins in 16 bytes
    struct warp_part {
        __align__(16) char raw_k[KEYS*PITCH];
        __align__(16) char raw_v[KEYS*PITCH];
        __align__(16) int8_t level[KEYS*LDK > NB*KEYS*LDV ? KEYS*LDK : NB*KEYS*LDV]; // of keys (KEYS, LDK), then of values (NB, KEYS, LDV)
        __align__(16) float  gain_k[3*NB*KEYS]; // keys i and i + 8 are neighbours, in gain_v as well
        __align__(16) float  gain_v[NB*KEYS];
        __align__(16) uint8_t p[NT*NB*128];     // (n, block): B fragments of p*gain
    };
    warp_part warp[WARPS];
    __align__(16) half  rows[2][16*LD];  // rotated queries, transformed ones: A fragments
    __align__(16) float q   [4*NT*LDQ];  // transformed queries
    __align__(16) uint32_t digits[NT*NB*WARP_SIZE*4]; // B fragments: (n, block, lane, run), lane 4*(2*query + digit) + t has word t of each run
    float scale[4*NT];                   // q' = scale*(256*upper + lower)
    __align__(16) float pred[4*NT*TILE]; // <q', prediction by offset>
    __align__(16) uint32_t tables[2*TABLE_WORDS];
    int32_t origin[TILE], cell[TILE];    // of the tile's cells: INT_MAX where no token attends; offset | tokens that attend << 8
    __align__(16) half  dec[D*LD];       // D, with a profile
};

// Values 32*j + lane of a query, and of what each is rotated with
template <int J> struct query_values {
    float x[J], other[J];

    __device__ __forceinline__ void load(const seqkv_view & a, int s, int h, int iq, int lane) {
        const float * src = a.query_of(s, h, iq);
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const int i = WARP_SIZE*j + lane, half_rot = a.p.n_rot/2;
            x[j]     = src[i];
            other[j] = src[i >= a.p.n_rot ? i : !a.p.neox ? i ^ 1 : i >= half_rot ? i - half_rot : i + half_rot];
        }
    }
};
template <int J> SEQKV_FN void load_rotation(const seqkv_view & a, int origin, int lane, float2 (&cs)[J]) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
        const int i = WARP_SIZE*j + lane, half_rot = a.p.n_rot/2;
        cs[j] = make_float2(1.0f, 0.0f);
        if (i < a.p.n_rot) {
            cs[j] = ((const float2 *) (a.rot.base + (int64_t) origin*a.rot.stride))[!a.p.neox ? i/2 : i >= half_rot ? i - half_rot : i];
            cs[j].y = (a.p.neox ? i >= half_rot : i & 1) ? -cs[j].y : cs[j].y;
        }
    }
}

// Queries of a chunk in the frame of an origin -> their digits, scales and products with the predictions. q: of query 4*n + warp.
// All threads of the block.
template <int D, int NT>
static __device__ void frame_queries_of(const seqkv_view & a, short_smem<D, NT> & sm, const query_values<D/WARP_SIZE> (&q)[NT], const float2 (&cs)[D/WARP_SIZE],
        const uint32_t (&preds)[D/16][2][2]) {
    constexpr int J = D/WARP_SIZE, LD = sm.LD, LDQ = sm.LDQ, NB = sm.NB;
    const int warp = seqkv_warp(), lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int r = 4*n + warp;
        float x[J];
#pragma unroll
        for (int j = 0; j < J; ++j) {
            x[j] = q[n].x[j]*cs[j].x + q[n].other[j]*cs[j].y;
        }
        if (a.form_k == SEQKV_DENSE) {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                sm.rows[0][r*LD + WARP_SIZE*j + lane] = __float2half(x[j]);
            }
        } else {
            seqkv_fwht_warp<J>(x, lane);
#pragma unroll
            for (int j = 0; j < J; ++j) {
                sm.q[r*LDQ + WARP_SIZE*j + lane] = rsqrtf((float) D)*x[j];
            }
        }
    }
    if (a.form_k == SEQKV_DENSE) {
        __syncthreads();
        constexpr int N = D/8/WARPS; // tiles of 8 columns of a warp
        float acc[N][4] = {{ 0.0f }};
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            uint32_t x[4];
            load_a(x, sm.rows[0] + lane%16*LD + k + lane/16*8);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[4];
                load_transposed(b, sm.dec + (k + lane%16)*LD + 8*(N*warp + n) + lane/16*8);
                mma_f16(acc[n],     x, b[0], b[1]);
                mma_f16(acc[n + 1], x, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = g + 8*e, i = 8*(N*warp + n) + 2*t;
                if (r < 4*NT) {
                    *(float2 *) (sm.q + r*LDQ + i)       = make_float2(acc[n][2*e], acc[n][2*e + 1]);
                    *(half2  *) (sm.rows[1] + r*LD + i) = __floats2half2_rn(acc[n][2*e], acc[n][2*e + 1]);
                }
            }
        }
        __syncthreads();
        float sum[2][4] = {{ 0.0f }}; // 16 offsets of a warp
#pragma unroll
        for (int k = 0; k < D/16; ++k) {
            uint32_t x[4];
            load_a(x, sm.rows[1] + lane%16*LD + 16*k + lane/16*8);
            mma_f16(sum[0], x, preds[k][0][0], preds[k][0][1]);
            mma_f16(sum[1], x, preds[k][1][0], preds[k][1][1]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (g + 8*e < 4*NT) {
                    *(float2 *) (sm.pred + (g + 8*e)*TILE + 16*warp + 8*n + 2*t) = make_float2(sum[n][2*e], sum[n][2*e + 1]);
                }
            }
        }
    } else {
        __syncwarp();
    }
    // digits: word t of run lane/4 of query 4*n + warp
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int r = 4*n + warp, run = lane/4%(4*NB);
        const float * q = sm.q + r*LDQ + 16*run + t;
        float x[4], max = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = q[4*i];
            max  = fmaxf(max, fabsf(x[i]));
        }
        max = warp_reduce_max(max);
        const float inv = max > 0.0f ? DIGITS/max : 0.0f;
        uint32_t upper, lower;
        digits_of_word(x[0], x[1], x[2], x[3], inv, upper, lower);
        uint32_t * dst = sm.digits + ((n*NB + run/4)*WARP_SIZE + 8*warp + t)*4 + run%4;
        dst[0]   = upper;
        dst[4*4] = lower;
        if (lane == 0) {
            sm.scale[r] = max/DIGITS;
        }
    }
    __syncthreads();
}

// blockIdx: (part, or behind n_z a part of exact rows a warp; KV head; stream x chunk of 4*NT queries). KIND: of the types, see decode_kinds
// early: kernels before this one that may still run write nothing that is read here, but for what is of this ubatch
template <int D, int NT, int KIND>
static __global__ void __launch_bounds__(THREADS, NT == 4 ? 2 : 3) short_kernel(seqkv_view a, seqkv_parts parts, int n_chunks, bool early) {
    using smem_t = short_smem<D, NT>;
    constexpr int NB = smem_t::NB, KEYS = smem_t::KEYS, PITCH = smem_t::PITCH, LD = smem_t::LD, LDQ = smem_t::LDQ, LDK = smem_t::LDK, LDV = smem_t::LDV;
    constexpr int BITS = KIND/2, GRADED = KIND%2, GROUPS = BITS == 0 || GRADED ? 3 : 1, PIECES = cell_pieces(D, BITS, GRADED);
    extern __shared__ __align__(16) char smem_raw[];
    smem_t & all = *(smem_t *) smem_raw;
    const int h = blockIdx.y, s = n_chunks == 1 ? blockIdx.z : blockIdx.z/n_chunks, q0 = (blockIdx.z - s*n_chunks)*4*NT;
    const int nq = a.n_tokens*a.group;
    const int warp = seqkv_warp(), lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    if ((int) blockIdx.x >= parts.n_z) {
        const int part = (blockIdx.x - parts.n_z)*WARPS + warp, j0 = a.p.n_kv + part*EXACT;
        if (!early) {
            ggml_cuda_pdl_sync();
        }
        ggml_cuda_pdl_lc();
        if (j0 < a.n_virt) {
            exact_part<D>(a, parts, s, h, q0, min(4*NT, nq - q0), j0, parts.n_z + part, early);
        }
        if (early) {
            ggml_cuda_pdl_sync();
        }
        return;
    }

    typename smem_t::warp_part & sm = all.warp[warp];
    const bool dense = a.form_k == SEQKV_DENSE;
    const int  n_tiles = (a.p.n_kv + TILE - 1)/TILE;
    const int  block_k = a.size_k/NB, block_v = a.size_v/NB;
    const float log2e = 1.44269504f, scale2 = a.p.scale*log2e;
    const int  bits_v  = BITS ? BITS : a.bits_v;
    const row_loader<PITCH, PIECES> rows_k(a.cell_k(s, 0, h), a.k_nb1, a.k_nb2, a.size_k);
    const row_loader<PITCH, PIECES> rows_v(a.cell_v(s, 0, h), a.v_nb1, a.v_nb2, a.size_v);
    if (!early) {
        ggml_cuda_pdl_sync();
    }
    ggml_cuda_pdl_lc();

    constexpr int J = D/WARP_SIZE;
    const int meta0 = a.meta[(int64_t) s*a.n_virt + blockIdx.x*TILE]; // the frame that most cells of the tile have
    int own_origin = INT_MAX, own_cell = 0; // of the cell that this thread looks up
    const auto look_up = [&](int tile) {
        const int j = tile*TILE + threadIdx.x;
        if (threadIdx.x < TILE) {
            int32_t meta = -1;
            int     bits = 0;
            if (j < a.p.n_kv) {
                meta = a.meta[(int64_t) s*a.n_virt + j];
                for (int i = 0; i < a.n_tokens; ++i) {
                    bits |= (((const uint16_t *) a.mask_row(s, i))[j] & 0x7fff) == 0 ? 1 << i : 0;
                }
            }
            const bool used = meta >= 0 && bits != 0;
            own_origin = used ? meta >> 8 : INT_MAX;
            own_cell   = used ? (meta & 63) | bits << 8 : 0;
        }
    };
    look_up(blockIdx.x);
    query_values<J> q[NT];
    rows_k.template load<KEYS>(sm.raw_k, blockIdx.x*TILE + KEYS*warp, a.p.n_kv);
    rows_v.template load<KEYS>(sm.raw_v, blockIdx.x*TILE + KEYS*warp, a.p.n_kv);
    uint32_t preds[D/16][2][2]; // B fragments of 16 offsets' predictions
    if (dense) {
        const half * dec = a.tables.dec(h);
#pragma unroll 4
        for (int i = threadIdx.x; i < D*D/8; i += THREADS) {
            copy_async16(all.dec + i/(D/8)*LD + i%(D/8)*8, dec + 8*i);
        }
        const half * pred = a.tables.pred(h) + (16*warp + g)*D + 2*t;
#pragma unroll
        for (int k = 0; k < D/16; ++k) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                preds[k][n][0] = *(const uint32_t *) (pred + 8*n*D + 16*k);
                preds[k][n][1] = *(const uint32_t *) (pred + 8*n*D + 16*k + 8);
            }
        }
        for (int i = threadIdx.x; i < 16*LD; i += THREADS) { // two rows of f16 at once
            ((uint32_t *) all.rows)[i] = 0;
        }
    }
    copy_commit();
    load_level_tables(BITS ? BITS : a.bits_k, BITS ? GRADED : a.graded_k, bits_v, all.tables, TABLE_WORDS, TABLE_WORDS, threadIdx.x, THREADS);

    int  seen[NT]; // bit of this lane's query in a cell's word
    float m[NT], l[NT];
    float acc[NT][D/16][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        seen[n] = q0 + 4*n + t < nq ? 256 << a.token_of(q0 + 4*n + t) : 0;
        m[n] = -INFINITY;
        l[n] = 0.0f;
#pragma unroll
        for (int i = 0; i < D/16; ++i) {
            acc[n][i][0] = acc[n][i][1] = 0.0f;
        }
    }
    int at = -1; // the origin that digits and products with predictions are of
    int    cs_at = max(0, meta0 >> 8);
    float2 cs[J];
    load_rotation<J>(a, cs_at, lane, cs);
    const auto load_next = [&](int row0, int tile) {
        if (tile + parts.n_z < n_tiles) {
            look_up(tile + parts.n_z);
            rows_k.template load<KEYS>(sm.raw_k, row0 + parts.n_z*TILE, a.p.n_kv);
            rows_v.template load<KEYS>(sm.raw_v, row0 + parts.n_z*TILE, a.p.n_kv);
        }
    };
    for (int tile = blockIdx.x; tile < n_tiles; tile += parts.n_z) {
        const int row0 = tile*TILE + KEYS*warp; // this warp's first cell
        if (threadIdx.x < TILE) {
            all.origin[threadIdx.x] = own_origin;
            all.cell  [threadIdx.x] = own_cell;
        }
        __syncthreads();
        const auto next_origin = [&](int last) {
            const int x = all.origin[lane], y = all.origin[WARP_SIZE + lane];
            int next = min(x > last ? x : INT_MAX, y > last ? y : INT_MAX);
#pragma unroll
            for (int i = 16; i > 0; i /= 2) {
                next = min(next, __shfl_xor_sync(0xffffffff, next, i));
            }
            return next;
        };

        const int first = next_origin(-1);
        if (first == INT_MAX) { // nothing attended to
            copy_wait();
            __syncthreads();
            load_next(row0, tile);
            continue;
        }

        // levels of keys
        if (tile == (int) blockIdx.x) {
            copy_wait_but<2>();
        } else {
            copy_wait_but<1>();
        }
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < (KEYS*NB + WARP_SIZE - 1)/WARP_SIZE; ++pass) {
            const int key = lane%KEYS, b = lane/KEYS + pass*(WARP_SIZE/KEYS);
            if (b < NB) {
                uint32_t out[16];
                float    factor[3];
                const uint32_t * raw = (const uint32_t *) (sm.raw_k + key*PITCH);
                const int begin = rows_k.begin(row0 + key) + b*block_k;
                if constexpr (BITS) {
                    decode_block<BITS, GRADED, true>(raw, begin, all.tables, out, factor);
                } else {
                    decode_any<true>(a.bits_k, a.graded_k, raw, begin, out, factor, all.tables);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    *(uint4 *) (sm.level + key*LDK + 64*b + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                }
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    sm.gain_k[(GROUPS*b + i)*KEYS + 2*(key & 7) + (key >> 3)] = factor[i];
                }
            }
        }
        copy_wait();
        __syncthreads();

        // scores, an origin after the other
        float2 score[NT];
        int    c2[2], o2[2]; // keys g and g + 8
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            c2[e] = all.cell  [KEYS*warp + g + 8*e];
            o2[e] = all.origin[KEYS*warp + g + 8*e];
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            score[n] = make_float2(-INFINITY, -INFINITY);
        }
        if (at < 0) { // as late as possible
            if (early) {
                ggml_cuda_pdl_sync();
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                q[n].load(a, s, h, min(q0 + 4*n + warp, nq - 1), lane);
            }
        }
        for (int o = first; o != INT_MAX; o = next_origin(o)) {
            if (o != at) {
                if (cs_at != o) {
                    load_rotation<J>(a, o, lane, cs);
                    cs_at = o;
                }
                frame_queries_of<D, NT>(a, all, q, cs, preds);
                at = o;
            }
            if (__any_sync(0xffffffff, o2[0] == o || o2[1] == o)) {
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    float sum[2] = { 0.0f, 0.0f };
#pragma unroll
                    for (int b = 0; b < NB; ++b) {
                        const uint4 digits = ((const uint4 *) all.digits)[(n*NB + b)*WARP_SIZE + lane];
                        uint32_t k0[4], k1[4];
                        const int8_t * row = sm.level + lane%16*LDK + 64*b + lane/16*16;
                        load_a(k0, row);
                        load_a(k1, row + 32);
                        int c[GROUPS][4] = {{ 0 }};
                        if constexpr (GROUPS == 1) {
                            mma_s8_k32(c[0], k0, digits.x, digits.y);
                        } else {
                            mma_s8_k16(c[0], k0,     digits.x);
                            mma_s8_k16(c[1], k0 + 2, digits.y);
                        }
                        mma_s8_k32(c[GROUPS - 1], k1, digits.z, digits.w);
#pragma unroll
                        for (int i = 0; i < GROUPS; ++i) {
                            const float2 gain = *(const float2 *) (sm.gain_k + (GROUPS*b + i)*KEYS + 2*g);
                            sum[0] += gain.x*(float) (256*c[i][0] + c[i][1]);
                            sum[1] += gain.y*(float) (256*c[i][2] + c[i][3]);
                        }
                    }
                    const float * pred = all.pred + (4*n + t)*TILE;
                    const float scale = all.scale[4*n + t];
                    float x = scale2*(scale*sum[0] + (dense ? pred[c2[0] & 63] : 0.0f));
                    float y = scale2*(scale*sum[1] + (dense ? pred[c2[1] & 63] : 0.0f));
                    if (a.p.softcap != 0.0f) {
                        x = log2e*seqkv_logit(x*(1.0f/scale2), a.p);
                        y = log2e*seqkv_logit(y*(1.0f/scale2), a.p);
                    }
                    score[n].x = (c2[0] & seen[n]) && o2[0] == o ? x : score[n].x;
                    score[n].y = (c2[1] & seen[n]) && o2[1] == o ? y : score[n].y;
                }
            }
            __syncthreads(); // the queries of this frame are done with
        }

        // levels and gains of values
        float max_v[NB];
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            const int key = lane%KEYS;
            const int raw = (uint8_t) sm.raw_v[key*PITCH + rows_v.begin(row0 + key) + b*block_v];
            const float gain = all.origin[KEYS*warp + key] == INT_MAX ? 0.0f : gain_of(raw, 1.0f/SEQKV_GAIN_STEPS, SEQKV_GAIN_BIAS);
            sm.gain_v[b*KEYS + 2*(key & 7) + (key >> 3)] = gain;
            max_v[b] = warp_reduce_max<KEYS>(gain);
        }
#pragma unroll
        for (int pass = 0; pass < (KEYS*NB + WARP_SIZE - 1)/WARP_SIZE; ++pass) {
            const int key = lane%KEYS, b = lane/KEYS + pass*(WARP_SIZE/KEYS);
            if (b < NB) {
                uint32_t out[16];
                const uint32_t * raw = (const uint32_t *) (sm.raw_v + key*PITCH);
                const int begin = rows_v.begin(row0 + key) + b*block_v;
                if constexpr (BITS) {
                    decode_levels<BITS, 0, true>(raw, begin, all.tables + TABLE_WORDS, out);
                } else {
                    decode_uniform(bits_v, raw, begin, out, all.tables + TABLE_WORDS);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    *(uint4 *) (sm.level + (b*KEYS + key)*LDV + 16*i) = make_uint4(out[4*i], out[4*i + 1], out[4*i + 2], out[4*i + 3]);
                }
            }
        }
        __syncwarp();
        load_next(row0, tile);

        // softmax
        float p[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float max = fmaxf(score[n].x, score[n].y);
#pragma unroll
            for (int i = 4; i < WARP_SIZE; i *= 2) {
                max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, i));
            }
            max = fmaxf(max, m[n]);
            const float base = max == -INFINITY ? 0.0f : max, old = exp2f(m[n] - base);
            m[n] = max;
            p[n][0] = exp2f(score[n].x - base);
            p[n][1] = exp2f(score[n].y - base);
            l[n] = l[n]*old + p[n][0] + p[n][1];
#pragma unroll
            for (int i = 0; i < D/16; ++i) {
                acc[n][i][0] *= old;
                acc[n][i][1] *= old;
            }
        }
        const int place = 32*t + 4*(g & 3) + 2*(g >> 2); // of keys g and g + 8 in a B fragment, upper byte of query t
        float f_v[NB];
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            const float inv = max_v[b] > 0.0f ? BYTES/max_v[b] : 0.0f;
            f_v[b] = max_v[b]*(seqkv_scale_of(bits_v)/BYTES);
            const float2 gain = *(const float2 *) (sm.gain_v + b*KEYS + 2*g);
#pragma unroll
            for (int n = 0; n < NT; ++n) { // 2^23 + an integer
                const uint32_t u = __float_as_uint(fmaf(p[n][0], gain.x*inv, 8388608.0f)), v = __float_as_uint(fmaf(p[n][1], gain.y*inv, 8388608.0f));
                uint8_t * dst = sm.p + (n*NB + b)*128 + place;
                *(uint16_t *) dst        = (uint16_t) seqkv_prmt(u, v, 0x0051);
                *(uint16_t *) (dst + 16) = (uint16_t) seqkv_prmt(u, v, 0x0040);
            }
        }
        __syncwarp();

        // values
#pragma unroll
        for (int b = 0; b < NB; ++b) {
            uint32_t pb[NT];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                pb[n] = *(const uint32_t *) (sm.p + (n*NB + b)*128 + 4*lane);
            }
            // rows 2i and 2i + 1 of a matrix are keys i and i + 8, so that a register has the keys of one place of p
            const int8_t * row = sm.level + (b*KEYS + (lane >> 1 & 3) + 8*(lane & 1) + 4*(lane >> 3 & 1))*LDV + (lane >> 4)*16;
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                uint32_t r[4];
                load_transposed(r, row + 16*i);
                const uint32_t v0[2] = { seqkv_prmt(r[0], r[1], 0x6420), seqkv_prmt(r[0], r[1], 0x7531) };
                const uint32_t v1[2] = { seqkv_prmt(r[2], r[3], 0x6420), seqkv_prmt(r[2], r[3], 0x7531) };
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    int c0[4] = { 0 }, c1[4] = { 0 };
                    mma_s8u8_k16(c0, v0, pb[n]);
                    mma_s8u8_k16(c1, v1, pb[n]);
                    acc[n][4*b + i][0]     += f_v[b]*(float) (256*c0[0] + c0[1]);
                    acc[n][4*b + i][1]     += f_v[b]*(float) (256*c0[2] + c0[3]);
                    acc[n][4*b + i + 1][0] += f_v[b]*(float) (256*c1[0] + c1[1]);
                    acc[n][4*b + i + 1][1] += f_v[b]*(float) (256*c1[2] + c1[3]);
                }
            }
        }
        __syncthreads();
    }
    copy_wait();
    static_assert(WARPS*4*NT*merge_pitch(D)*sizeof(float) <= offsetof(smem_t, dec), "sums of the warps");
    merge_warps<D, NT, WARPS>(a, parts, (float *) smem_raw, m, l, acc, s, h, 1, WARPS, 65536, q0, blockIdx.x);
    if (early) {
        ggml_cuda_pdl_sync();
    }
}

static constexpr int MAX_TILES = 4; // of a block; with more the way in several kernels is faster

template <int D, int NT> static size_t short_smem_bytes(bool dense) {
    using smem_t = short_smem<D, NT>;
    return dense ? sizeof(smem_t) : offsetof(smem_t, dec);
}

template <int D, int NT, int KIND>
static bool short_case(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame) {
    const seqkv_view a = seqkv_view_of(dst, frame);
    const bool   dense = a.form_k == SEQKV_DENSE;
    const size_t smem  = short_smem_bytes<D, NT>(dense);
    if (smem > ggml_cuda_info().devices[ctx.device].smpbo) {
        return false;
    }
    CUDA_SET_SHARED_MEMORY_LIMIT((short_kernel<D, NT, KIND>), sizeof(short_smem<D, NT>));
    static int per_sm[GGML_CUDA_MAX_DEVICES][2] = {{ 0 }};
    int & resident = per_sm[ctx.device][dense];
    if (resident == 0) {
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, short_kernel<D, NT, KIND>, THREADS, smem));
    }
    const int n_chunks = (a.n_tokens*a.group + 4*NT - 1)/(4*NT);
    const int n_tiles  = (a.p.n_kv + TILE - 1)/TILE;
    const int n_exact  = (a.n_virt - a.p.n_kv + EXACT - 1)/EXACT;
    const int exact    = (n_exact + WARPS - 1)/WARPS; // blocks
    const int blocks   = ggml_cuda_info().devices[ctx.device].nsm*resident/(a.p.n_head_kv*a.n_stream*n_chunks) - exact;
    if (n_tiles > MAX_TILES*blocks) {
        return false;
    }

    seqkv_parts parts;
    parts.n_z      = std::min(n_tiles, blocks);
    parts.n_parts  = parts.n_z + n_exact;
    parts.permuted = 1;
    const int64_t n_out = (int64_t) a.n_stream*a.n_tokens*a.n_head*parts.n_parts;
    ggml_cuda_pool_alloc<float2> ml (ctx.pool(), n_out);
    ggml_cuda_pool_alloc<float>  acc(ctx.pool(), n_out*D);
    parts.ml  = ml.get();
    parts.acc = acc.get();
    ggml_cuda_kernel_launch((short_kernel<D, NT, KIND>),
        ggml_cuda_kernel_launch_params(dim3(parts.n_z + exact, a.p.n_head_kv, a.n_stream*n_chunks), dim3(THREADS), smem, ctx.stream()),
        a, parts, n_chunks, frame != nullptr);
    seqkv_combine(ctx, a, parts, rows);
    return true;
}

template <int D, int NT> static bool short_types(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame) {
    return decode_kinds(dst, [&](auto kind) { return short_case<D, NT, decltype(kind)::value>(ctx, dst, rows, frame); });
}

template <int D> static bool short_heads(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries) {
    return n_queries <= 4 ? short_types<D, 1>(ctx, dst, rows, frame) : n_queries <= 8 ? short_types<D, 2>(ctx, dst, rows, frame)
                                                                                      : short_case<D, 4, 0>(ctx, dst, rows, frame);
}

bool seqkv_decode_short(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rows, const ggml_tensor * frame, int n_queries) {
    switch (seqkv_params(dst).dk) {
        case 64:  return short_heads< 64>(ctx, dst, rows, frame, n_queries);
        case 128: return short_heads<128>(ctx, dst, rows, frame, n_queries);
        default:  return false; // D does not fit in shared memory
    }
}
