// Attention on Metal. A key is R(t0) D (z + prediction), so its product with a query is that of (z + prediction) with D^T R(-t0) q.
//   decode   these transformed queries for every frame (query), blocks straight into the softmax, part by part (decode), the parts (reduce)
//   prefill  rows to absolute K and V in f16, a chunk of the virtual axis at a time (expand), attention with simdgroup matrices (prefill)
#include "seqkv_common.h"

// none of a row's logits yet; infinities may be folded away by fast math, so masks are compared as bits
#define SEQKV_NO_LOGIT (-FLT_MAX/2)

static inline float seqkv_logit(float scale, float softcap, float dot) {
    const float s = dot*scale;
    return softcap == 0.0f ? s : softcap*precise::tanh(s/softcap);
}

// exact row j of a stream: of the window, then of the ubatch
static inline device const half * seqkv_exact(device const char * win, uint64_t win_nb1, int n_win, device const half * cur, int64_t cur_stride, int j) {
    return j < n_win ? (device const half *) (win + j*win_nb1) : cur + (j - n_win)*cur_stride;
}

// Queries of a chunk for frames: dst (2, tokens, n_head_kv, n_chunks, n_frames, HEADS, DK), first in the domain of the cells, then R(-t0) q.
// threadgroup: (frames, KV head and chunk, token); DK threads
kernel void kernel_seqkv_query(
        constant ggml_metal_kargs_seqkv_attn & args,
        device const char  * q,
        device const float * rot,
        device const half  * prof,
        device       half  * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        uint3   tgpg[[threadgroups_per_grid]],
        ushort     i[[thread_index_in_threadgroup]]) {
    threadgroup float x[SEQKV_QUERY_SIZE]; // (frames, HEADS, DK)

    const int h = tgpig.y/args.n_chunks, chunk = tgpig.y%args.n_chunks;
    const int frames = SEQKV_QUERY_COLS(DK)/HEADS, f0 = tgpig.x*frames, n = min(frames, args.n_frames - f0);
    const int cols   = (n*HEADS + 7)/8*8; // query vectors
    const int64_t at0 = (((int64_t) tgpig.z*tgpg.y + tgpig.y)*args.n_frames + f0)*HEADS*DK;
    device half * rotated = dst + (int64_t) tgpg.z*tgpg.y*args.n_frames*HEADS*DK + at0;
    dst += at0;

    // a thread has a pair of values that R turns, in every other frame
    const int  pair = i%(DK/2);
    const bool turned = pair < args.n_rot/2;
    const int  a = turned && args.neox ? pair : 2*pair, b = turned && args.neox ? pair + args.n_rot/2 : 2*pair + 1;
    float qa[SEQKV_MAX_HEADS], qb[SEQKV_MAX_HEADS];
    FOR_UNROLL (int g = 0; g < HEADS; ++g) {
        device const float * row = (device const float *) (q + tgpig.z*args.q_nb2 + (h*args.group + min(chunk*HEADS + g, args.group - 1))*args.q_nb1);
        qa[g] = row[a];
        qb[g] = row[b];
    }
    for (int f = i/(DK/2); f < n; f += 2) {
        const float2 cs = turned ? ((device const float2 *) (rot + (int64_t) (64 + f0 + f)*args.rot_stride))[pair] : float2(1.0f, 0.0f);
        FOR_UNROLL (int g = 0; g < HEADS; ++g) {
            const int   c  = (f*HEADS + g)*DK;
            const float ya = qa[g]*cs.x + qb[g]*cs.y, yb = qb[g]*cs.x - qa[g]*cs.y;
            x[c + a] = ya;
            x[c + b] = yb;
            rotated[c + a] = (half) ya;
            rotated[c + b] = (half) yb;
        }
    }
    for (int c = n*HEADS*DK + i; c < cols*DK; c += DK) {
        x[c] = 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (FORM_K == SEQKV_HADAMARD) {
        seqkv_fwht(x, n*HEADS*DK, DK, i, DK);
    } else if (FORM_K == SEQKV_DENSE) { // x <- x D, 32 columns by a simdgroup
        device const half * dec = seqkv_dec(prof, h, DK, DV) + i/32*32;
        simdgroup_float8x8 sum[SEQKV_QUERY_COLS(0)/8][4], y[SEQKV_QUERY_COLS(0)/8];
        FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS(DK)/8*4; ++k) {
            sum[k/4][k%4] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
        for (int r = 0; r < DK; r += 8) {
            FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS(DK)/8; ++k) {
                if (8*k < cols) {
                    simdgroup_load(y[k], x + 8*k*DK + r, DK, 0, false);
                }
            }
            FOR_UNROLL (int c = 0; c < 4; ++c) {
                simdgroup_half8x8 d;
                simdgroup_load(d, dec + r*DK + 8*c, DK, 0, false);
                FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS(DK)/8; ++k) {
                    if (8*k < cols) {
                        simdgroup_multiply_accumulate(sum[k][c], y[k], d, sum[k][c]);
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS(DK)/8*4; ++k) {
            if (k/4*8 < cols) {
                simdgroup_store(sum[k/4][k%4], x + k/4*8*DK + i/32*32 + k%4*8, DK, 0, false);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int c = i; c < n*HEADS*DK; c += DK) {
        dst[c] = (half) x[c];
    }
}

// Decode goes through rows as bytes, DK or DV each, of which a lane has n next to each other. For blocks, byte b is what seqkv_unpack makes
// of value seqkv_value_of(true, b); the lane's i-th value is seqkv_value_step(true, i) behind its first.
static inline int seqkv_value_of  (bool blocks, int b) { return blocks ? b/32*32 + b%4*8 + b%32/4 : b; }
static inline int seqkv_value_step(bool blocks, int i) { return blocks ? i%4*8 + i/4 : i; }

// a lane's n values of each head's query
static inline void seqkv_load_queries(device const half * from, bool blocks, int n, thread half (* q)[SEQKV_MAX_D/32]) {
    FOR_UNROLL (int g = 0; g < HEADS; ++g) {
        FOR_UNROLL (int i = 0; i < n; ++i) {
            q[g][i] = from[g*DK + seqkv_value_step(blocks, i)];
        }
    }
}

// a block -> its 64 bytes
static inline void seqkv_unpack_block(int bits, int graded, device const uchar * b, threadgroup uint * bytes) {
    FOR_UNROLL (int h = 0; h < 2; ++h) {
        uint w[8];
        seqkv_unpack(bits, graded, b, h, w);
        FOR_UNROLL (int i = 0; i < 8; ++i) {
            bytes[8*h + i] = w[i];
        }
    }
}

// The query heads of a chunk and a part of the rows. A simdgroup takes 64 rows at a time and ROWS of these to threadgroup memory, as
// indices of levels; then all of its lanes share one row after the other. The simdgroups are at the same rows of different frames and
// share the predictions there, as long as rows are in the order of their offsets.
// ml (rows of out, n_parts): maximum, sum of p. acc (.., DV): sum of p v, in the domain of the cells for the parts over cells.
// threadgroup: (part, KV head and chunk, token)
kernel void kernel_seqkv_decode(
        constant ggml_metal_kargs_seqkv_attn & args,
        device const uchar  * k,
        device const uchar  * v,
        device const char   * mask,
        device const char   * win,
        device const half   * cur,
        device const int    * meta,
        device const half   * prof,
        device const half   * query,
        device       float2 * ml,
        device       float  * acc,
        uint3  tgpig[[threadgroup_position_in_grid]],
        uint3   tgpg[[threadgroups_per_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]],
        ushort  lane[[thread_index_in_simdgroup]]) {
    threadgroup uint   tiles[SEQKV_DECODE_SG][SEQKV_DECODE_TILE/4 + 32];          // (ROWS, d/4 + 1), of keys, then of values
    threadgroup float  factors[SEQKV_DECODE_SG][SEQKV_DECODE_TILE/16];            // (ROWS, DK/16), of keys
    threadgroup float  ps[SEQKV_DECODE_SG][SEQKV_MAX_HEADS*SEQKV_DECODE_TILE/64]; // (HEADS, DV/64, ROWS), with the factors of values
    threadgroup half2  preds[SEQKV_DECODE_TILE/2];                                // (ROWS, DK/2)
    threadgroup float2 mls[SEQKV_DECODE_SG][SEQKV_MAX_HEADS];
    threadgroup uint  * tile   = tiles[sgitg];
    threadgroup float * factor = factors[sgitg];
    threadgroup float * p      = ps[sgitg];

    const ggml_metal_kargs_seqkv_attn a = args;
    const int  ROWS = SEQKV_DECODE_TILE/max(DK, DV), NK = DK/32, NV = DV/32;
    const int  h = tgpig.y/a.n_chunks, chunk = tgpig.y%a.n_chunks, part = tgpig.x;
    const int  s = tgpig.z/a.n_tokens, t = tgpig.z%a.n_tokens;
    const bool exact = part >= a.n_cells;
    const int  begin = exact ? a.n_kv + (part - a.n_cells)*a.part_rows : part*a.part_rows;
    const int  end   = min(begin + a.part_rows, exact ? a.n_virt : a.n_kv);
    const bool blocks_k = CELL_K == SEQKV_CELL_BLOCKS && !exact, blocks_v = CELL_V == SEQKV_CELL_BLOCKS && !exact;
    const bool predicted = FORM_K == SEQKV_DENSE && !exact;

    k += s*a.k_nb2 + h*a.size_k;
    v += s*a.v_nb2 + h*a.size_v;
    win += s*a.win_nb2;
    const int64_t cur_stride = a.n_head_kv*(DK + DV);
    cur += s*a.n_tokens*cur_stride;
    device const ushort * mask_row = (device const ushort *) (mask + s*a.mask_nb3 + t*a.mask_nb1);
    device const int    * meta_row = meta + (int64_t) s*a.n_virt;
    const int k0 = seqkv_value_of(blocks_k, NK*lane), v0 = seqkv_value_of(blocks_v, NV*lane);
    device const half * queries = query + k0 + (exact ? (int64_t) tgpg.z*tgpg.y*a.n_frames*HEADS*DK : 0)
        + (((int64_t) tgpig.z*tgpg.y + tgpig.y)*a.n_frames - 64)*HEADS*DK;
    device const half * pred = FORM_K == SEQKV_DENSE ? seqkv_pred(prof, h, DK, DV) : prof;

    // of each 4 of the lane's values: where the factors of the first and the last 2 are in the row's, and their levels
    const int q0 = NK*lane/32*2 + (NK == 2 ? lane%2 : 0), q1 = NK == 2 ? q0 : q0 + 1;
    constant int8_t * level0 = seqkv_level_table(seqkv_value_bits(BITS_K, GRADED_K, q0%4*2));
    constant int8_t * level1 = seqkv_level_table(seqkv_value_bits(BITS_K, GRADED_K, q1%4*2));
    constant int8_t * level  = seqkv_level_table(BITS_V);

    float m[SEQKV_MAX_HEADS], l[SEQKV_MAX_HEADS], sum[SEQKV_MAX_HEADS][SEQKV_MAX_D/32];
    half  q[SEQKV_MAX_HEADS][SEQKV_MAX_D/32];
    FOR_UNROLL (int g = 0; g < HEADS; ++g) {
        m[g] = SEQKV_NO_LOGIT;
        l[g] = 0.0f;
        FOR_UNROLL (int i = 0; i < NV; ++i) {
            sum[g][i] = 0.0f;
        }
    }
    int held = -1; // frame whose queries are in q

    const int n_steps = (end - begin + 64*SEQKV_DECODE_SG - 1)/(64*SEQKV_DECODE_SG)*(64/ROWS);
    for (int step = 0; step < n_steps; ++step) {
        const int o = step*ROWS%64, j0 = begin + (step*ROWS/64*SEQKV_DECODE_SG + sgitg)*64 + o;
        if (predicted) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const int c = 4*tiitg%DK, to = c/32*32 + c%8*4 + c%32/8; // seqkv_value_of(true, to) = c
            for (int r = 4*tiitg/DK; r < ROWS; r += 128*SEQKV_DECODE_SG/DK) {
                const half4 add = *(device const half4 *) (pred + (o + r)*DK + c);
                FOR_UNROLL (int i = 0; i < 4; ++i) {
                    ((threadgroup half *) preds)[r*DK + to + 4*i] = add[i];
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        const int  j    = j0 + lane;
        const bool keep = (int) lane < ROWS && j < end && mask_row[j] == 0;
        const int  mt   = keep ? meta_row[j] : -1;
        const int  last = simd_max(mt);
        if (last < 0) {
            continue;
        }
        // whether these rows are of one frame, in order
        const bool regular = simd_all(!keep || mt == (last & ~255) + (predicted ? o + lane : mt & 255));
        // rows as the lanes unpack them, a block each
        const int row = lane%ROWS, block = lane/ROWS;
        const bool used = simd_shuffle(mt, (ushort) row) >= 0;

        if (blocks_k && used && block < DK/64) {
            device const uchar * b = k + (j0 + row)*a.k_nb1 + block*(1 + GRADED_K + 8*BITS_K);
            const float f[4] = { seqkv_factor(BITS_K, GRADED_K, b, 0), seqkv_factor(BITS_K, GRADED_K, b, 1),
                seqkv_factor(BITS_K, GRADED_K, b, 2), seqkv_factor(BITS_K, GRADED_K, b, 3) };
            FOR_UNROLL (int i = 0; i < 4; ++i) {
                factor[row*(DK/16) + 4*block + i] = f[i];
            }
            seqkv_unpack_block(BITS_K, GRADED_K, b, tile + row*(DK/4 + 1) + 16*block);
        }
        if (last >> 8 != held) {
            held = last >> 8;
            seqkv_load_queries(queries + (int64_t) held*HEADS*DK, blocks_k, NK, q);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        FOR_UNROLL (int r = 0; r < ROWS; ++r) {
            const int mr = simd_shuffle(mt, (ushort) r);
            if (mr < 0) {
                continue;
            }
            if (!regular && mr >> 8 != held) {
                held = mr >> 8;
                seqkv_load_queries(queries + (int64_t) held*HEADS*DK, blocks_k, NK, q);
            }
            float x[SEQKV_MAX_D/32];
            if (blocks_k) {
                threadgroup const uchar2 * w = (threadgroup const uchar2 *) ((threadgroup const uchar *) (tile + r*(DK/4 + 1)) + NK*lane);
                const float f0 = factor[r*(DK/16) + q0], f1 = factor[r*(DK/16) + q1];
                FOR_UNROLL (int i = 0; i < NK; i += 2) {
                    const uchar2 b = w[i/2];
                    x[i]     = i%4 == 0 ? f0*level0[b.x] : f1*level1[b.x];
                    x[i + 1] = i%4 == 0 ? f0*level0[b.y] : f1*level1[b.y];
                }
                if (predicted && regular) {
                    FOR_UNROLL (int i = 0; i < NK; i += 2) {
                        const half2 add = preds[(r*DK + NK*lane + i)/2];
                        x[i]     += add.x;
                        x[i + 1] += add.y;
                    }
                } else if (predicted) {
                    FOR_UNROLL (int i = 0; i < NK; ++i) {
                        x[i] += pred[(mr & 255)*DK + k0 + seqkv_value_step(true, i)];
                    }
                }
            } else {
                device const uchar * cell = exact ? (device const uchar *) (seqkv_exact(win, a.win_nb1, a.n_win, cur, cur_stride, j0 + r - a.n_kv) + h*DK) : k + (j0 + r)*a.k_nb1;
                FOR_UNROLL (int i = 0; i < NK; ++i) {
                    x[i] = seqkv_value(exact ? SEQKV_CELL_F16 : CELL_K, cell, k0 + i);
                }
            }
            FOR_UNROLL (int g = 0; g < HEADS; ++g) {
                float dot = q[g][0]*x[0];
                FOR_UNROLL (int i = 1; i < NK; ++i) {
                    dot += q[g][i]*x[i];
                }
                dot = simd_sum(dot);
                if (lane == 0) {
                    p[g*(DV/64)*ROWS + r] = dot;
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        float gain[SEQKV_MAX_D/64]; // of the blocks of this row's values
        FOR_UNROLL (int b = 0; b < DV/64; ++b) {
            gain[b] = blocks_v && keep ? seqkv_factor(BITS_V, 0, v + j*a.v_nb1 + b*(1 + 8*BITS_V), 0) : 1.0f;
        }
        FOR_UNROLL (int g = 0; g < HEADS; ++g) {
            const float logit   = keep ? seqkv_logit(a.scale, a.softcap, p[g*(DV/64)*ROWS + lane]) : SEQKV_NO_LOGIT;
            const float highest = simd_max(logit);
            if (highest > m[g]) { // the same in all lanes
                const float f = exp(m[g] - highest);
                m[g]  = highest;
                l[g] *= f;
                FOR_UNROLL (int i = 0; i < NV; ++i) {
                    sum[g][i] *= f;
                }
            }
            const float e = keep ? exp(logit - m[g]) : 0.0f;
            l[g] += simd_sum(e);
            FOR_UNROLL (int b = 0; b < DV/64; ++b) {
                if ((int) lane < ROWS) {
                    p[(g*(DV/64) + b)*ROWS + lane] = e*gain[b];
                }
            }
        }
        if (blocks_v && used && block < DV/64) {
            seqkv_unpack_block(BITS_V, 0, v + (j0 + row)*a.v_nb1 + block*(1 + 8*BITS_V), tile + row*(DV/4 + 1) + 16*block);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        FOR_UNROLL (int r = 0; r < ROWS; ++r) {
            if (simd_shuffle(mt, (ushort) r) < 0) {
                continue;
            }
            float x[SEQKV_MAX_D/32];
            if (blocks_v) {
                threadgroup const uchar2 * w = (threadgroup const uchar2 *) ((threadgroup const uchar *) (tile + r*(DV/4 + 1)) + NV*lane);
                FOR_UNROLL (int i = 0; i < NV; i += 2) {
                    const uchar2 b = w[i/2];
                    x[i]     = level[b.x];
                    x[i + 1] = level[b.y];
                }
            } else {
                device const uchar * cell = exact ? (device const uchar *) (seqkv_exact(win, a.win_nb1, a.n_win, cur, cur_stride, j0 + r - a.n_kv) + a.n_head_kv*DK + h*DV) : v + (j0 + r)*a.v_nb1;
                FOR_UNROLL (int i = 0; i < NV; ++i) {
                    x[i] = seqkv_value(exact ? SEQKV_CELL_F16 : CELL_V, cell, v0 + i);
                }
            }
            FOR_UNROLL (int g = 0; g < HEADS; ++g) {
                const float e = p[(g*(DV/64) + NV*lane/64)*ROWS + r];
                FOR_UNROLL (int i = 0; i < NV; ++i) {
                    sum[g][i] += e*x[i];
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    // the simdgroups' sums together
    if (lane == 0) {
        FOR_UNROLL (int g = 0; g < HEADS; ++g) {
            mls[sgitg][g] = float2(m[g], l[g]);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    FOR_UNROLL (int g = 0; g < HEADS; ++g) { // a constant number of times: the sums have to stay in registers
        float highest = mls[0][g].x, total = 0.0f;
        for (int i = 1; i < SEQKV_DECODE_SG; ++i) {
            highest = max(highest, mls[i][g].x);
        }
        const float f = exp(m[g] - highest);
        FOR_UNROLL (int i = 0; i < NV; ++i) {
            ((threadgroup float *) tile)[v0 + seqkv_value_step(blocks_v, i)] = f*sum[g][i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int64_t out = ((int64_t) tgpig.z*a.n_head_kv*a.group + h*a.group + chunk*HEADS + g)*a.n_parts + part;
        if (chunk*HEADS + g < a.group) {
            for (int i = tiitg; i < DV; i += 32*SEQKV_DECODE_SG) {
                float y = 0.0f;
                FOR_UNROLL (int w = 0; w < SEQKV_DECODE_SG; ++w) {
                    y += ((threadgroup float *) tiles[w])[i];
                }
                acc[out*DV + i] = y;
            }
            if (tiitg == 0) {
                for (int i = 0; i < SEQKV_DECODE_SG; ++i) {
                    total += mls[i][g].y*exp(mls[i][g].x - highest);
                }
                ml[out] = float2(highest, total);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

// Parts -> dst: H of the sums over cells, their scale and mean, the sink. threadgroup: (query head, token); DV threads
kernel void kernel_seqkv_reduce(
        constant ggml_metal_kargs_seqkv_attn & args,
        device const float2 * ml,
        device const float  * acc,
        device const float  * sinks,
        device const half   * prof,
        device       float  * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort     i[[thread_index_in_threadgroup]]) {
    threadgroup float  z[SEQKV_MAX_D];
    threadgroup float2 parts[SEQKV_MAX_D]; // factor of a part, sum of its p

    const int h = tgpig.x/args.group, n = args.n_parts;
    const int64_t row = (int64_t) tgpig.y*args.n_head_kv*args.group + tgpig.x;
    ml  += row*n;
    acc += row*n*DV;

    z[i] = SEQKV_NO_LOGIT;
    for (int c = i; c < n; c += DV) {
        z[i] = max(z[i], ml[c].x);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float m = args.has_sinks ? sinks[tgpig.x] : SEQKV_NO_LOGIT;
    const float sink = m;
    for (int c = 0; c < min(n, DV); ++c) {
        m = max(m, z[c]);
    }
    float l = args.has_sinks ? exp(sink - m) : 0.0f, l_cells = 0.0f, cells = 0.0f, exact = 0.0f;
    for (int c0 = 0; c0 < n; c0 += DV) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (c0 + i < n) {
            const float2 part = ml[c0 + i];
            const float  f    = exp(part.x - m);
            parts[i] = float2(f, f*part.y);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int c = c0; c < min(n, c0 + DV); ++c) {
            const float2 part = parts[c - c0];
            const float  x    = part.x*acc[(int64_t) c*DV + i];
            if (c < args.n_cells) {
                cells   += x;
                l_cells += part.y;
            } else {
                exact += x;
                l     += part.y;
            }
        }
    }
    l += l_cells;
    if (FORM_V == SEQKV_HADAMARD) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        z[i] = cells;
        seqkv_fwht(z, DV, DV, i, DV);
        cells = z[i];
        if (CELL_V == SEQKV_CELL_BLOCKS && args.has_prof) {
            cells = cells/seqkv_v_scale(prof, h, DK, DV)[i] + l_cells*seqkv_v_mean(prof, h, DK, DV)[i];
        }
    }
    dst[row*DV + i] = l > 0.0f ? (cells + exact)/l : 0.0f;
}

// x (EXPAND_ROWS, d): a head's values of cells first .., 0 where there is none in use. By all threads of the threadgroup.
static inline void seqkv_expand_cells(int type, int bits, int graded, int d, device const uchar * cells, uint64_t nb1, int first, int n_kv,
        threadgroup const int * rows, threadgroup float * x, int i, int nt) {
    for (int item = i; item < SEQKV_EXPAND_ROWS*d/32; item += nt) {
        const int r = item/(d/32), c = item%(d/32), j = first + r;
        if (rows[r] >= 0 && j < n_kv) {
            seqkv_load(type, bits, graded, cells + j*nb1, c, x + 32*item);
        } else {
            for (int k = 0; k < 32; ++k) {
                x[32*item + k] = 0.0f;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Rows [j0, j1) -> k_out, v_out (n_stream, n_head_kv, pad, d): absolute keys, and values; rows not in use and those from j1 on are 0.
// threadgroup: (EXPAND_ROWS rows, KV head, stream)
kernel void kernel_seqkv_expand(
        constant ggml_metal_kargs_seqkv_attn & args,
        device const uchar * k,
        device const uchar * v,
        device const char  * win,
        device const half  * cur,
        device const int   * meta,
        device const float * rot,
        device const half  * prof,
        device       half  * k_out,
        device       half  * v_out,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]],
        ushort3  ntg[[threads_per_threadgroup]]) {
    threadgroup float x[SEQKV_EXPAND_ROWS*SEQKV_MAX_D], y[SEQKV_EXPAND_ROWS*SEQKV_MAX_D];

    const int h = tgpig.y, s = tgpig.z, nt = ntg.x;
    const int first = args.j0 + tgpig.x*SEQKV_EXPAND_ROWS, n = min(SEQKV_EXPAND_ROWS, args.j1 - first);
    const int64_t out = ((int64_t) s*args.n_head_kv + h)*args.pad + first - args.j0;
    threadgroup int rows[SEQKV_EXPAND_ROWS]; // of meta
    if (tiitg < SEQKV_EXPAND_ROWS) {
        rows[tiitg] = tiitg < n ? meta[(int64_t) s*args.n_virt + first + tiitg] : -1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    win += s*args.win_nb2;
    const int64_t cur_stride = args.n_head_kv*(DK + DV);
    cur += s*args.n_tokens*cur_stride;

    // keys: cells to the domain of frame rows, in x or y
    seqkv_expand_cells(CELL_K, BITS_K, GRADED_K, DK, k + s*args.k_nb2 + h*args.size_k, args.k_nb1, first, args.n_kv, rows, x, tiitg, nt);
    if (FORM_K == SEQKV_DENSE) {
        device const half * pred = seqkv_pred(prof, h, DK, DV);
        for (int item = tiitg; item < SEQKV_EXPAND_ROWS*DK; item += nt) {
            x[item] += rows[item/DK] >= 0 ? (float) pred[(rows[item/DK] & 255)*DK + item%DK] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (FORM_K == SEQKV_HADAMARD) {
        seqkv_fwht(x, SEQKV_EXPAND_ROWS*DK, DK, tiitg, nt);
    } else if (FORM_K == SEQKV_DENSE) {
        device const half * dec = seqkv_dec(prof, h, DK, DV);
        for (int i = 8*sgitg; i < DK; i += 8*(nt/32)) {
            simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(0.0f), z;
            simdgroup_half8x8  d;
            for (int c = 0; c < DK; c += 8) {
                simdgroup_load(z, x + c, DK, 0, false);
                simdgroup_load(d, dec + i*DK + c, DK, 0, true);
                simdgroup_multiply_accumulate(sum, z, d, sum);
            }
            simdgroup_store(sum, y + i, DK, 0, false);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    threadgroup float * keys = FORM_K == SEQKV_DENSE ? y : x;
    for (int item = tiitg; item < SEQKV_EXPAND_ROWS*DK; item += nt) {
        const int r = item/DK, i = item%DK, j = first + r;
        float key = 0.0f;
        if (rows[r] >= 0) {
            device const float * cs = rot + (int64_t) (rows[r] >> 8)*args.rot_stride;
            key = j < args.n_kv ? seqkv_rotated(keys + r*DK, i, cs, args.n_rot, args.neox, false)
                : seqkv_rotated(seqkv_exact(win, args.win_nb1, args.n_win, cur, cur_stride, j - args.n_kv) + h*DK, i, cs, args.n_rot, args.neox, false);
        }
        k_out[(out + r)*DK + i] = (half) key;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // values
    seqkv_expand_cells(CELL_V, BITS_V, 0, DV, v + s*args.v_nb2 + h*args.size_v, args.v_nb1, first, args.n_kv, rows, x, tiitg, nt);
    if (FORM_V == SEQKV_HADAMARD) {
        seqkv_fwht(x, SEQKV_EXPAND_ROWS*DV, DV, tiitg, nt);
    }
    for (int item = tiitg; item < SEQKV_EXPAND_ROWS*DV; item += nt) {
        const int r = item/DV, i = item%DV, j = first + r;
        float value = x[item];
        if (rows[r] < 0) {
            value = 0.0f;
        } else if (j >= args.n_kv) {
            value = seqkv_exact(win, args.win_nb1, args.n_win, cur, cur_stride, j - args.n_kv)[args.n_head_kv*DK + h*DV + i];
        } else if (CELL_V == SEQKV_CELL_BLOCKS && args.has_prof) {
            value = value/seqkv_v_scale(prof, h, DK, DV)[i] + seqkv_v_mean(prof, h, DK, DV)[i];
        }
        v_out[(out + r)*DV + i] = (half) value;
    }
}

// Attention of 8 tokens' queries of one head to the expanded rows [j0, j1), a simdgroup each. dst holds the sums between chunks,
// ml (stream, head, token) their maximum and sum of p; the last chunk divides.
// threadgroup: (tiles of a KV head, KV head, stream)
kernel void kernel_seqkv_prefill(
        constant ggml_metal_kargs_seqkv_attn & args,
        device const char   * query,
        device const half   * k,
        device const half   * v,
        device const char   * mask,
        device const float  * sinks,
        device       float2 * ml,
        device       float  * dst,
        threadgroup  char   * shared[[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort sgitg[[simdgroup_index_in_threadgroup]],
        ushort  lane[[thread_index_in_simdgroup]]) {
    const int tile = tgpig.x*SEQKV_PREFILL_SG + sgitg;
    const int h = tgpig.y, s = tgpig.z, n_head = args.n_head_kv*args.group;
    const int head = h*args.group + tile%args.group, t0 = tile/args.group*8, n = min(8, args.n_tokens - t0);
    if (n <= 0) {
        return; // no barriers of the threadgroup below
    }
    threadgroup half  * q = (threadgroup half  *) (shared + sgitg*SEQKV_PREFILL_BYTES(DK)); // (8, DK)
    threadgroup float * p = (threadgroup float *) (q + 8*DK);                               // (8, TILE)
    threadgroup float * f = p + 8*SEQKV_TILE;                                               // (8, 8) diagonal: factors of the rows

    for (int i = lane; i < 8*DK; i += 32) {
        const int t = s*args.n_tokens + t0 + min(i/DK, n - 1);
        q[i] = (half) ((device const float *) (query + head*args.q_nb1 + t*args.q_nb2))[i%DK];
    }
    for (int i = lane; i < 64; i += 32) {
        f[i] = 0.0f;
    }
    // row lane%8 of the tile: its maximum and sum; the same in 4 lanes
    const int64_t row = (int64_t) s*args.n_tokens + t0 + min((int) lane%8, n - 1);
    float m = args.has_sinks ? sinks[head] : SEQKV_NO_LOGIT, l = args.has_sinks ? 1.0f : 0.0f;
    if (args.j0 > 0) {
        const float2 former = (int) lane < n ? ml[row*n_head + head] : float2(SEQKV_NO_LOGIT, 0.0f);
        m = simd_shuffle(former.x, (ushort) (lane%8));
        l = simd_shuffle(former.y, (ushort) (lane%8));
    }
    simdgroup_float8x8 sum[SEQKV_MAX_D/8];
    FOR_UNROLL (int i = 0; i < DV/8; ++i) {
        sum[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        if (args.j0 > 0) {
            simdgroup_barrier(mem_flags::mem_threadgroup);
            for (int c = lane; c < 64; c += 32) {
                p[c] = c/8 < n ? dst[(((int64_t) s*args.n_tokens + t0 + c/8)*n_head + head)*DV + 8*i + c%8] : 0.0f;
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            simdgroup_load(sum[i], p, 8, 0, false);
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    const int rows = args.j1 - args.j0;
    k += ((int64_t) s*args.n_head_kv + h)*args.pad*DK;
    v += ((int64_t) s*args.n_head_kv + h)*args.pad*DV;
    for (int j = 0; j < rows; j += SEQKV_TILE) {
        uint keep = 0; // bit r: row r of the tile attends to this lane's row of the virtual axis
        for (int r = 0; r < n; ++r) {
            device const ushort * mask_row = (device const ushort *) (mask + s*args.mask_nb3 + (t0 + r)*args.mask_nb1);
            keep |= j + lane < rows && mask_row[args.j0 + j + lane] == 0 ? 1u << r : 0;
        }
        if (!simd_any(keep != 0)) {
            continue;
        }
        for (int c = 0; c < SEQKV_TILE; c += 8) {
            simdgroup_float8x8 logits = make_filled_simdgroup_matrix<float, 8>(0.0f);
            simdgroup_half8x8  a, b;
            for (int i = 0; i < DK; i += 8) {
                simdgroup_load(a, q + i, DK, 0, false);
                simdgroup_load(b, k + (int64_t) (j + c)*DK + i, DK, 0, true);
                simdgroup_multiply_accumulate(logits, a, b, logits);
            }
            simdgroup_store(logits, p + c, SEQKV_TILE, 0, false);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int r = 0; r < 8; ++r) {
            const bool  on      = keep >> r & 1;
            const float old     = simd_shuffle(m, (ushort) r);
            const float logit   = on ? seqkv_logit(args.scale, args.softcap, p[r*SEQKV_TILE + lane]) : SEQKV_NO_LOGIT;
            const float highest = max(old, simd_max(logit));
            const float e       = on ? exp(logit - highest) : 0.0f;
            const float total   = simd_sum(e);
            p[r*SEQKV_TILE + lane] = e;
            if (lane%8 == r) {
                const float x = exp(m - highest);
                l = l*x + total;
                m = highest;
                if (lane < 8) {
                    f[9*r] = x;
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_float8x8 scale, weights[SEQKV_TILE/8];
        simdgroup_load(scale, f, 8, 0, false);
        FOR_UNROLL (int c = 0; c < SEQKV_TILE/8; ++c) {
            simdgroup_load(weights[c], p + 8*c, SEQKV_TILE, 0, false);
        }
        FOR_UNROLL (int i = 0; i < DV/8; ++i) {
            simdgroup_multiply(sum[i], scale, sum[i]);
            FOR_UNROLL (int c = 0; c < SEQKV_TILE/8; ++c) {
                simdgroup_half8x8 b;
                simdgroup_load(b, v + (int64_t) (j + 8*c)*DV + 8*i, DV, 0, false);
                simdgroup_multiply_accumulate(sum[i], weights[c], b, sum[i]);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    const bool last = args.j1 == args.n_virt;
    FOR_UNROLL (int i = 0; i < DV/8; ++i) {
        simdgroup_store(sum[i], p, 8, 0, false);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int c = lane; c < 64; c += 32) {
            const float total = simd_shuffle(l, (ushort) (c/8));
            if (c/8 < n) {
                dst[(((int64_t) s*args.n_tokens + t0 + c/8)*n_head + head)*DV + 8*i + c%8] = !last ? p[c] : total > 0.0f ? p[c]/total : 0.0f;
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    if ((int) lane < n) {
        ml[row*n_head + head] = float2(m, l);
    }
}
