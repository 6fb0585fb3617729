// Attention on Metal. A key is R(t0) D (z + prediction), so its product with a query is that of (z + prediction) with D^T R(-t0) q.
//   decode   these transformed queries for every frame (query), blocks straight into the softmax, part by part (decode), the parts (reduce)
//   prefill  rows to absolute K and V in f16, a chunk of the virtual axis at a time (expand), attention with simdgroup matrices (prefill)
#include "seqkv_common.h"

// none of a row's logits yet; infinities may be folded away by fast math, so masks are compared as bits
#define SEQKV_NO_LOGIT (-FLT_MAX/2)

static inline float seqkv_logit(constant ggml_metal_kargs_seqkv_attn & args, float dot) {
    const float s = dot*args.scale;
    return args.softcap == 0.0f ? s : args.softcap*precise::tanh(s/args.softcap);
}

static inline device const half * seqkv_exact(constant ggml_metal_kargs_seqkv_attn & args, device const char * win, device const half * cur, int s, int j) {
    return j < args.n_kv + args.n_win ? (device const half *) (win + s*args.win_nb2 + (j - args.n_kv)*args.win_nb1)
        : cur + ((int64_t) s*args.n_tokens + j - args.n_kv - args.n_win)*args.n_head_kv*(DK + DV);
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
    threadgroup float x[SEQKV_QUERY_COLS*SEQKV_MAX_D]; // (QUERY_COLS, DK)

    const int h = tgpig.y/args.n_chunks, chunk = tgpig.y%args.n_chunks;
    const int frames = SEQKV_QUERY_COLS/HEADS, f0 = tgpig.x*frames, n = min(frames, args.n_frames - f0)*HEADS;
    const int64_t row0 = (((int64_t) tgpig.z*tgpg.y + tgpig.y)*args.n_frames + f0)*HEADS;
    device half * rotated = dst + (int64_t) tgpg.z*tgpg.y*args.n_frames*HEADS*DK;

    const int group = args.group, n_rot = args.n_rot, neox = args.neox, rot_stride = args.rot_stride;
    const uint64_t q_nb1 = args.q_nb1;
    q += tgpig.z*args.q_nb2;
    for (int c = 0; c < SEQKV_QUERY_COLS; ++c) {
        float y = 0.0f;
        if (c < n) {
            const int head = h*group + min(chunk*HEADS + c%HEADS, group - 1);
            device const float * cs = rot + (int64_t) (64 + f0 + c/HEADS)*rot_stride;
            y = seqkv_rotated((device const float *) (q + head*q_nb1), i, cs, n_rot, neox, true);
            rotated[(row0 + c)*DK + i] = (half) y;
        }
        x[c*DK + i] = y;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (FORM_K == SEQKV_HADAMARD) {
        seqkv_fwht(x, SEQKV_QUERY_COLS*DK, DK, i, DK);
    } else if (FORM_K == SEQKV_DENSE) { // x <- x D, 32 columns by a simdgroup
        device const half * dec = seqkv_dec(prof, h, DK, DV) + i/32*32;
        simdgroup_float8x8 sum[SEQKV_QUERY_COLS/8][4], a[SEQKV_QUERY_COLS/8];
        FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS/8*4; ++k) {
            sum[k/4][k%4] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
        for (int r = 0; r < DK; r += 8) {
            FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS/8; ++k) {
                simdgroup_load(a[k], x + 8*k*DK + r, DK, 0, false);
            }
            FOR_UNROLL (int c = 0; c < 4; ++c) {
                simdgroup_half8x8 d;
                simdgroup_load(d, dec + r*DK + 8*c, DK, 0, false);
                FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS/8; ++k) {
                    simdgroup_multiply_accumulate(sum[k][c], a[k], d, sum[k][c]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        FOR_UNROLL (int k = 0; k < SEQKV_QUERY_COLS/8*4; ++k) {
            simdgroup_store(sum[k/4][k%4], x + k/4*8*DK + i/32*32 + k%4*8, DK, 0, false);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int c = 0; c < n; ++c) {
        dst[(row0 + c)*DK + i] = (half) x[c*DK + i];
    }
}

// One simdgroup: the query heads of a chunk and a part of the rows. Each lane has 8 values of a row, so DK/8 or DV/8 lanes share one.
// ml (rows of out, n_parts): running maximum, sum of p. acc (.., DV): sum of p v, in the domain of the cells for the parts over cells.
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
        ushort  lane[[thread_index_in_simdgroup]]) {
    threadgroup float p[SEQKV_MAX_HEADS*SEQKV_TILE];

    const int  h = tgpig.y/args.n_chunks, chunk = tgpig.y%args.n_chunks, part = tgpig.x;
    const int  s = tgpig.z/args.n_tokens, t = tgpig.z%args.n_tokens;
    const bool exact = part >= args.n_cells;
    const int  begin = exact ? args.n_kv + (part - args.n_cells)*args.part_rows : part*args.part_rows;
    const int  end   = min(begin + args.part_rows, exact ? args.n_virt : args.n_kv);
    const int  ck = lane%(DK/8), cv = lane%(DV/8); // which 8 values of a row

    k += s*args.k_nb2 + h*args.size_k;
    v += s*args.v_nb2 + h*args.size_v;
    const uint64_t k_nb1 = args.k_nb1, v_nb1 = args.v_nb1;
    device const ushort * mask_row = (device const ushort *) (mask + s*args.mask_nb3 + t*args.mask_nb1);
    device const int    * meta_row = meta + (int64_t) s*args.n_virt;
    device const half   * queries  = query + (exact ? (int64_t) tgpg.z*tgpg.y*args.n_frames*HEADS*DK : 0)
        + ((int64_t) tgpig.z*tgpg.y + tgpig.y)*args.n_frames*HEADS*DK + 8*ck;
    device const half   * pred     = FORM_K == SEQKV_DENSE ? seqkv_pred(prof, h, DK, DV) + 8*ck : prof;

    float m[SEQKV_MAX_HEADS], l[SEQKV_MAX_HEADS], sum[SEQKV_MAX_HEADS][8];
    half4 q[SEQKV_MAX_HEADS][2];
    FOR_UNROLL (int g = 0; g < HEADS; ++g) {
        m[g] = SEQKV_NO_LOGIT;
        l[g] = 0.0f;
        FOR_UNROLL (int i = 0; i < 8; ++i) {
            sum[g][i] = 0.0f;
        }
    }
    int held = -1; // frame whose queries are in q

    for (int j = begin; j < end; j += SEQKV_TILE) {
        const bool keep = j + lane < end && mask_row[j + lane] == 0;
        const int  mt   = keep ? meta_row[j + lane] : -1;
        if (!simd_any(keep)) {
            continue;
        }

        for (int r = 0; r < SEQKV_TILE; r += 256/DK) {
            const ushort at = r + lane/(DK/8);
            const int    mr = simd_shuffle(mt, at);
            float dot8[SEQKV_MAX_HEADS] = { 0.0f };
            if (mr >= 0) {
                float x[8];
                if (exact) {
                    seqkv_load_other(SEQKV_CELL_F16, (device const uchar *) (seqkv_exact(args, win, cur, s, j + at) + h*DK), ck, x);
                } else {
                    seqkv_load(CELL_K, BITS_K, GRADED_K, k + (j + at)*k_nb1, ck, x);
                    if (FORM_K == SEQKV_DENSE) {
                        device const half4 * add = (device const half4 *) (pred + (mr & 255)*DK);
                        const half4 add0 = add[0], add1 = add[1];
                        FOR_UNROLL (int i = 0; i < 4; ++i) {
                            x[i]     += add0[i];
                            x[i + 4] += add1[i];
                        }
                    }
                }
                if (mr >> 8 != held) {
                    held = mr >> 8;
                    FOR_UNROLL (int g = 0; g < HEADS; ++g) {
                        device const half4 * from = (device const half4 *) (queries + ((int64_t) (held - 64)*HEADS + g)*DK);
                        q[g][0] = from[0];
                        q[g][1] = from[1];
                    }
                }
                FOR_UNROLL (int g = 0; g < HEADS; ++g) {
                    dot8[g] = dot(float4(q[g][0]), float4(x[0], x[1], x[2], x[3])) + dot(float4(q[g][1]), float4(x[4], x[5], x[6], x[7]));
                }
            }
            FOR_UNROLL (int g = 0; g < HEADS; ++g) {
                for (ushort o = DK/16; o > 0; o /= 2) {
                    dot8[g] += simd_shuffle_xor(dot8[g], o);
                }
                if (ck == 0) {
                    p[g*SEQKV_TILE + at] = dot8[g];
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        FOR_UNROLL (int g = 0; g < HEADS; ++g) {
            const float logit   = keep ? seqkv_logit(args, p[g*SEQKV_TILE + lane]) : SEQKV_NO_LOGIT;
            const float highest = max(m[g], simd_max(logit));
            const float f       = exp(m[g] - highest);
            const float e       = keep ? exp(logit - highest) : 0.0f;
            m[g] = highest;
            l[g] = l[g]*f + simd_sum(e);
            p[g*SEQKV_TILE + lane] = e;
            FOR_UNROLL (int i = 0; i < 8; ++i) {
                sum[g][i] *= f;
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        for (int r = 0; r < SEQKV_TILE; r += 256/DV) {
            const ushort at = r + lane/(DV/8);
            if (simd_shuffle(mt, at) >= 0) {
                float x[8];
                if (exact) {
                    seqkv_load_other(SEQKV_CELL_F16, (device const uchar *) (seqkv_exact(args, win, cur, s, j + at) + args.n_head_kv*DK + h*DV), cv, x);
                } else {
                    seqkv_load(CELL_V, BITS_V, 0, v + (j + at)*v_nb1, cv, x);
                }
                FOR_UNROLL (int g = 0; g < HEADS; ++g) {
                    const float e = p[g*SEQKV_TILE + at];
                    FOR_UNROLL (int i = 0; i < 8; ++i) {
                        sum[g][i] += e*x[i];
                    }
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    FOR_UNROLL (int g = 0; g < HEADS; ++g) { // a constant number of times: the sums have to stay in registers
        const int64_t out = ((int64_t) tgpig.z*args.n_head_kv*args.group + h*args.group + chunk*HEADS + g)*args.n_parts + part;
        const bool    one = chunk*HEADS + g < args.group;
        FOR_UNROLL (int i = 0; i < 8; ++i) {
            for (ushort o = DV/8; o < 32; o *= 2) {
                sum[g][i] += simd_shuffle_xor(sum[g][i], o);
            }
            if (one && lane < DV/8) {
                acc[out*DV + 8*cv + i] = sum[g][i];
            }
        }
        if (one && lane == 0) {
            ml[out] = float2(m[g], l[g]);
        }
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
    threadgroup float z[SEQKV_MAX_D];

    const int h = tgpig.x/args.group;
    const int64_t row = (int64_t) tgpig.y*args.n_head_kv*args.group + tgpig.x;
    ml  += row*args.n_parts;
    acc += row*args.n_parts*DV;

    const float sink = args.has_sinks ? sinks[tgpig.x] : SEQKV_NO_LOGIT;
    float m = sink;
    for (int c = 0; c < args.n_parts; ++c) {
        m = max(m, ml[c].x);
    }
    float l = args.has_sinks ? exp(sink - m) : 0.0f, l_cells = 0.0f, cells = 0.0f, exact = 0.0f;
    for (int c = 0; c < args.n_parts; ++c) {
        const float f = exp(ml[c].x - m);
        const float x = f*acc[(int64_t) c*DV + i];
        l       += f*ml[c].y;
        l_cells += c < args.n_cells ? f*ml[c].y : 0.0f;
        cells   += c < args.n_cells ? x : 0.0f;
        exact   += c < args.n_cells ? 0.0f : x;
    }
    if (FORM_V == SEQKV_HADAMARD) {
        z[i] = cells;
        seqkv_fwht(z, DV, DV, i, DV);
        cells = z[i];
        if (CELL_V == SEQKV_CELL_BLOCKS && args.has_prof) {
            cells = cells/seqkv_v_scale(prof, h, DK, DV)[i] + l_cells*seqkv_v_mean(prof, h, DK, DV)[i];
        }
    }
    dst[row*DV + i] = l > 0.0f ? (cells + exact)/l : 0.0f;
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

    // keys: cells to the domain of frame rows, in x or y
    for (int item = tiitg; item < SEQKV_EXPAND_ROWS*DK/8; item += nt) {
        const int r = item/(DK/8), c = item%(DK/8), j = first + r;
        float z[8] = { 0.0f };
        if (rows[r] >= 0 && j < args.n_kv) {
            seqkv_load(CELL_K, BITS_K, GRADED_K, k + s*args.k_nb2 + j*args.k_nb1 + h*args.size_k, c, z);
        }
        FOR_UNROLL (int i = 0; i < 8; ++i) {
            const bool add = FORM_K == SEQKV_DENSE && rows[r] >= 0;
            x[r*DK + 8*c + i] = z[i] + (add ? (float) seqkv_pred(prof, h, DK, DV)[(rows[r] & 255)*DK + 8*c + i] : 0.0f);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
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
                : seqkv_rotated(seqkv_exact(args, win, cur, s, j) + h*DK, i, cs, args.n_rot, args.neox, false);
        }
        k_out[(out + r)*DK + i] = (half) key;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // values
    for (int item = tiitg; item < SEQKV_EXPAND_ROWS*DV/8; item += nt) {
        const int r = item/(DV/8), c = item%(DV/8), j = first + r;
        float z[8] = { 0.0f };
        if (rows[r] >= 0 && j < args.n_kv) {
            seqkv_load(CELL_V, BITS_V, 0, v + s*args.v_nb2 + j*args.v_nb1 + h*args.size_v, c, z);
        }
        FOR_UNROLL (int i = 0; i < 8; ++i) {
            x[r*DV + 8*c + i] = z[i];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (FORM_V == SEQKV_HADAMARD) {
        seqkv_fwht(x, SEQKV_EXPAND_ROWS*DV, DV, tiitg, nt);
    }
    for (int item = tiitg; item < SEQKV_EXPAND_ROWS*DV; item += nt) {
        const int r = item/DV, i = item%DV, j = first + r;
        float value = x[item];
        if (rows[r] < 0) {
            value = 0.0f;
        } else if (j >= args.n_kv) {
            value = seqkv_exact(args, win, cur, s, j)[args.n_head_kv*DK + h*DV + i];
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
            const float logit   = on ? seqkv_logit(args, p[r*SEQKV_TILE + lane]) : SEQKV_NO_LOGIT;
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
