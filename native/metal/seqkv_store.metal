// Writing the cache on Metal: frame rows, and their blocks in the cells.
//
// The encoder is the one of encode.h: for each group of values three candidate gains, for each of these the Viterbi search. A
// simdgroup codes one group: lane 8*c + s holds state s of candidate c and carries its path, so that nothing has to be traced back.
#include "seqkv_common.h"

// row of rot << 8 | offset of token t of the ubatch
static inline int seqkv_token_meta(constant ggml_metal_kargs_seqkv_store & args, device const int * meta, int t) {
    return meta[(int64_t) (t/args.n_tokens)*args.n_virt + args.first + t%args.n_tokens];
}

// threadgroup: (token, KV head)
kernel void kernel_seqkv_frame(
        constant ggml_metal_kargs_seqkv_store & args,
        device const char  * k,
        device const char  * v,
        device const int   * meta,
        device const float * rot,
        device       half  * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort3  ntg[[threads_per_threadgroup]]) {
    const int t = tgpig.x, h = tgpig.y;
    device const float * cs = rot + (int64_t) (seqkv_token_meta(args, meta, t) >> 8)*args.rot_stride;
    device const float * x  = (device const float *) (k + h*args.k_nb1 + t*args.k_nb2);
    device const float * y  = (device const float *) (v + h*args.v_nb1 + t*args.v_nb2);
    device half * row = dst + (int64_t) t*args.n_head_kv*(args.dk + args.dv);
    for (int i = tiitg; i < args.dk; i += ntg.x) {
        row[h*args.dk + i] = (half) seqkv_rotated(x, i, cs, args.n_rot, args.neox, true);
    }
    for (int i = tiitg; i < args.dv; i += ntg.x) {
        row[args.n_head_kv*args.dk + h*args.dv + i] = (half) y[i];
    }
}

// the whole frame row of a token, threadgroup: token
kernel void kernel_seqkv_store_row(
        constant ggml_metal_kargs_seqkv_store & args,
        device const half    * cur,
        device const int64_t * idxs,
        device       char    * dst,
        uint   tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort   ntg[[threads_per_threadgroup]]) {
    const int64_t cell = idxs[tgpig];
    if (cell < 0) {
        return;
    }
    const int n = args.n_head_kv*(args.dk + args.dv)/4;
    device const half4 * from = (device const half4 *) cur + (int64_t) tgpig*n;
    device       half4 * to   = (device       half4 *) (dst + cell*args.nb1);
    for (int i = tiitg; i < n; i += ntg) {
        to[i] = from[i];
    }
}

static inline float seqkv_level_of(float z, float inv) {
    return max(-2048.0f, min(2048.0f, z*inv));
}

static inline uint seqkv_nearest_levels(constant uint32_t * nearest, float t) {
    return nearest[(int) max(0.0f, min(511.0f, 2.0f*t + 256.0f))];
}

static inline float seqkv_branch_error(uint levels, int subset, float t) {
    const float e = t - (float) (int8_t) (levels >> 8*subset);
    return e*e;
}

// A group: n values z of B bits -> codes (n), the gain as stored. error: scratch of the simdgroup, (64, 3). By all of its lanes.
static int seqkv_encode_group(int B, int graded, threadgroup const float * z, int n, threadgroup float4 * error, threadgroup uchar * codes, int lane) {
    constant uint32_t * nearest = seqkv_nearest_table(B);
    const int cand  = min(lane/8, 2); // lanes 24 .. 31 repeat the last candidate
    const int state = lane%8;
    const int top   = graded ? 31 : 255;

    float energy = 0.0f;
    for (int i = lane; i < n; i += 32) {
        energy += z[i]*z[i];
    }
    energy = simd_sum(energy);
    int taken = 0;
    uint lo = 0, hi = 0; // path: bit i is that of value i
    float inv = 0.0f;
    if (energy >= 1e-30f) {
        const int first = (int) floor(0.5f*(graded ? SEQKV_GRADED_STEPS : SEQKV_GAIN_STEPS)*log2(energy/n)) + (graded ? SEQKV_GRADED_BIAS : SEQKV_GAIN_BIAS);
        const int g     = max(1, min(top, first + (cand == 0 ? 0 : cand == 1 ? 1 : -1)));
        const float s   = (graded ? seqkv_gain_graded[g] : seqkv_gain[g])*seqkv_scale[B]*seqkv_shrink[B];
        inv = 1.0f/s;
        for (int i = state; i < n && lane < 24; i += 8) {
            const float t = seqkv_level_of(z[i], inv);
            const uint  l = seqkv_nearest_levels(nearest, t);
            error[3*i + cand] = float4(seqkv_branch_error(l, 0, t), seqkv_branch_error(l, 1, t), seqkv_branch_error(l, 2, t), seqkv_branch_error(l, 3, t));
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        // predecessors of a state and the subsets of their branches: encode.h, SEQKV_STEP
        const ushort from0 = 8*cand + (state >> 1), from1 = from0 + 4;
        const int d0 = (state >> 2 & 1) | ((state ^ state >> 1) & 1) << 1, d1 = d0 ^ 2;
        float cost = state == 0 ? 0.0f : 1e30f;
        for (int i = 0; i < n; ++i) {
            const float4 e = error[3*i + cand];
            const float a = simd_shuffle(cost, from0) + e[d0], b = simd_shuffle(cost, from1) + e[d1];
            const uint l0 = simd_shuffle(lo, from0), l1 = simd_shuffle(lo, from1);
            const uint h0 = simd_shuffle(hi, from0), h1 = simd_shuffle(hi, from1);
            const uint bit = (uint) (state & 1) << i%32;
            cost = b < a ? b : a;
            lo   = (b < a ? l1 : l0) | (i < 32 ? bit : 0);
            hi   = (b < a ? h1 : h0) | (i < 32 ? 0 : bit);
        }

        // best end of each candidate, then the best candidate: the first one of equals
        float best = cost;
        int   end  = state;
        for (ushort m = 1; m < 8; m *= 2) {
            const float other     = simd_shuffle_xor(best, m);
            const int   other_end = simd_shuffle_xor(end,  m);
            if (other < best || (other == best && other_end < end)) {
                best = other;
                end  = other_end;
            }
        }
        best *= s*s;
        float kept = energy; // of zeros
        int   from = -1;
        for (int c = 0; c < 3; ++c) {
            const float err = simd_shuffle(best, (ushort) (8*c));
            if (err < kept) {
                kept = err;
                from = c;
            }
        }
        const ushort win = 8*max(from, 0);
        const ushort at  = win + simd_shuffle(end, win);
        const int    gw  = simd_shuffle(g, win);
        lo    = simd_shuffle(lo, at);
        hi    = simd_shuffle(hi, at);
        inv   = simd_shuffle(inv, win);
        taken = from < 0 ? 0 : gw;
    }
    for (int i = lane; i < n; i += 32) {
        // bits 3, 2, 1, 0: the path at i, i-1, i-2, i-3. Subset: u_(i-2) | (u_i ^ u_(i-1) ^ u_(i-3)) << 1
        const uint u  = i < 3 ? lo << (3 - i) : i < 32 ? lo >> (i - 3) : i < 35 ? lo >> (i - 3) | hi << (35 - i) : hi >> (i - 35);
        const uint b0 = u >> 3 & 1;
        const int  subset = (u >> 1 & 1) | (b0 ^ (u >> 2 & 1) ^ (u & 1)) << 1;
        const int  value  = (int8_t) (seqkv_nearest_levels(nearest, seqkv_level_of(z[i], inv)) >> 8*subset);
        int l = 0;
        for (int step = 1 << B; step > 0; step /= 2) {
            l += seqkv_level_table(B)[l + step] <= value ? step : 0;
        }
        codes[i] = taken ? b0 | l >> 2 << 1 : 0;
    }
    return taken;
}

// 32 values, one a lane, -> a block of another quantized type
static void seqkv_write_quant(int type, float x, device uchar * cell, int block, int lane) {
    const float lowest = simd_min(x), highest = simd_max(x);
    const float extreme = highest >= -lowest ? highest : lowest; // of largest magnitude
    const bool  five = type == SEQKV_CELL_Q5_0 || type == SEQKV_CELL_Q5_1, min = type == SEQKV_CELL_Q4_1 || type == SEQKV_CELL_Q5_1;
    if (type == SEQKV_CELL_Q8_0) {
        device uchar * b = cell + block*34;
        const float d = fabs(extreme)/127.0f;
        b[2 + lane] = (uchar) (int8_t) round(d > 0.0f ? x*(1.0f/d) : 0.0f);
        if (lane == 0) {
            *(device half *) b = (half) d;
        }
        return;
    }
    float d = min ? (highest - lowest)/(five ? 31 : 15) : extreme/(five ? -16 : type == SEQKV_CELL_IQ4_NL ? kvalues_iq4nl_f[0] : -8);
    const float inv = d != 0.0f ? 1.0f/d : 0.0f;
    int q;
    if (type == SEQKV_CELL_IQ4_NL) {
        q = best_index_int8(16, kvalues_iq4nl_f, x*inv);
        const float v = kvalues_iq4nl_f[q]; // then the least-squares factor, weighted by x^2
        const float xv = simd_sum(x*x*v*x), vv = simd_sum(x*x*v*v);
        d = vv > 0.0f ? xv/vv : d;
    } else {
        q = (int) ((min ? x - lowest : x)*inv + (min ? 0.5f : five ? 16.5f : 8.5f));
        q = clamp(q, 0, five ? 31 : 15);
    }
    const int  other = simd_shuffle_xor(q, (ushort) 16);
    const uint fifth = simd_or((uint) (q >> 4 & 1) << lane);
    const int  head  = 2 + (min ? 2 : 0);
    device uchar * b = cell + block*(head + (five ? 4 : 0) + 16);
    if (lane < 16) {
        b[head + (five ? 4 : 0) + lane] = (uchar) ((q & 15) | (other & 15) << 4);
    }
    if (five && lane < 4) {
        b[head + lane] = (uchar) (fifth >> 8*lane);
    }
    if (lane == 0) {
        *(device half *) b = (half) d;
        if (min) {
            *(device half *) (b + 2) = (half) lowest;
        }
    }
}

// z[DK] of a cell of another type
static void seqkv_store_other(threadgroup const float * z, device uchar * cell, int tiitg, int nt) {
    if (CELL_K == SEQKV_CELL_F32 || CELL_K == SEQKV_CELL_F16 || CELL_K == SEQKV_CELL_BF16) {
        for (int i = tiitg; i < DK; i += nt) {
            if (CELL_K == SEQKV_CELL_F32) {
                ((device float *) cell)[i] = z[i];
            } else if (CELL_K == SEQKV_CELL_F16) {
                ((device half *) cell)[i] = (half) z[i];
            } else { // to the nearest, ties to even
                const uint w = as_type<uint>(z[i]);
                ((device ushort *) cell)[i] = (ushort) ((w + 0x7fff + (w >> 16 & 1)) >> 16);
            }
        }
        return;
    }
    for (int block = tiitg/32; block < DK/32; block += nt/32) {
        seqkv_write_quant(CELL_K, z[32*block + tiitg%32], cell, block, tiitg%32);
    }
}

// One part of frame rows into the cells. threadgroup: (token, KV head)
kernel void kernel_seqkv_store(
        constant ggml_metal_kargs_seqkv_store & args,
        device const half    * cur,
        device const int64_t * idxs,
        device const int     * meta,
        device const half    * prof,
        device       uchar   * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]]) {
    threadgroup float  x[SEQKV_MAX_D], y[SEQKV_MAX_D];
    threadgroup float4 error[SEQKV_STORE_SG][64*3];
    threadgroup uchar  codes[SEQKV_MAX_D];
    threadgroup int    gains[SEQKV_MAX_D/64][3];

    const int nt = 32*SEQKV_STORE_SG;
    const int t = tgpig.x, h = tgpig.y, lane = tiitg%32, sg = tiitg/32;
    const int64_t cell = idxs[t];
    if (cell < 0) {
        return;
    }
    device uchar * out = dst + cell*args.nb1 + h*args.head_size;
    device const half * row = cur + (int64_t) t*args.n_head_kv*(args.dk + args.dv) + (args.is_key ? 0 : args.n_head_kv*args.dk) + h*DK;
    for (int i = tiitg; i < DK; i += nt) {
        x[i] = row[i];
        if (CELL_K == SEQKV_CELL_BLOCKS && !args.is_key && args.has_prof) {
            x[i] = seqkv_v_scale(prof, h, args.dk, args.dv)[i]*(x[i] - seqkv_v_mean(prof, h, args.dk, args.dv)[i]);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    threadgroup float * z = x;
    if (FORM_K == SEQKV_HADAMARD) {
        seqkv_fwht(x, DK, DK, tiitg, nt);
    } else if (FORM_K == SEQKV_DENSE) {
        z = y;
        device const half * enc  = seqkv_enc (prof, h, args.dk, args.dv);
        device const half * pred = seqkv_pred(prof, h, args.dk, args.dv) + (seqkv_token_meta(args, meta, t) & 255)*DK;
        for (int r = sg; r < DK; r += SEQKV_STORE_SG) {
            float sum = 0.0f;
            for (int i = lane; i < DK; i += 32) {
                sum += enc[r*DK + i]*x[i];
            }
            sum = simd_sum(sum);
            if (lane == 0) {
                y[r] = sum - pred[r];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (CELL_K != SEQKV_CELL_BLOCKS) {
        seqkv_store_other(z, out, tiitg, nt);
        return;
    }

    for (int i = tiitg; i < DK; i += nt) {
        const bool finite = (as_type<uint>(z[i]) & 0x7f800000) != 0x7f800000; // isfinite may be folded away by fast math
        z[i] = finite ? max(-1e15f, min(1e15f, z[i])) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int n_groups = GRADED_K ? 3 : 1;
    for (int item = sg; item < DK/64*n_groups; item += SEQKV_STORE_SG) {
        const int b = item%(DK/64), k = item/(DK/64);
        const int i0 = 64*b + (k == 0 ? 0 : k == 1 ? 16 : 32), n = !GRADED_K ? 64 : k == 2 ? 32 : 16;
        const int B = seqkv_value_bits(BITS_K, GRADED_K, 2*k);
        const int gain = B > 0 ? seqkv_encode_group(B, GRADED_K, z + i0, n, error[sg], codes + i0, lane) : 0;
        if (lane == 0) {
            gains[b][k] = gain;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup); // before error is written again
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // bytes: gains, then bit j of 8 codes
    const int size = 1 + GRADED_K + 8*BITS_K;
    for (int at = tiitg; at < DK/64*size; at += nt) {
        const int b = at/size;
        int i = at%size - 1 - GRADED_K;
        uint w = 0;
        if (i < 0) {
            w = (GRADED_K ? gains[b][0] | gains[b][1] << 5 | gains[b][2] << 10 : gains[b][0]) >> 8*(i + 1 + GRADED_K);
        } else {
            int j = 0;
            for (; i >= seqkv_plane_bytes(BITS_K, GRADED_K, j); ++j) {
                i -= seqkv_plane_bytes(BITS_K, GRADED_K, j);
            }
            for (int k = 0; k < 8; ++k) {
                w |= (uint) (codes[64*b + 8*i + k] >> j & 1) << k;
            }
        }
        out[at] = (uchar) w;
    }
}
