// What the Metal kernels of seqkv share: constants of the pipeline, tables, 8 values of a cell, transforms.
#pragma once

#include "common.h"
#include "seqkv-metal.h"
#include "tables.h"

constant int DK       [[function_constant(FC_SEQKV + SEQKV_FC_DK)]];
constant int CELL_K   [[function_constant(FC_SEQKV + SEQKV_FC_CELL_K)]];
constant int BITS_K   [[function_constant(FC_SEQKV + SEQKV_FC_BITS_K)]];
constant int GRADED_K [[function_constant(FC_SEQKV + SEQKV_FC_GRADED_K)]];
constant int FORM_K   [[function_constant(FC_SEQKV + SEQKV_FC_FORM_K)]];
constant int DV       [[function_constant(FC_SEQKV + SEQKV_FC_DV)]];
constant int CELL_V   [[function_constant(FC_SEQKV + SEQKV_FC_CELL_V)]];
constant int BITS_V   [[function_constant(FC_SEQKV + SEQKV_FC_BITS_V)]];
constant int FORM_V   [[function_constant(FC_SEQKV + SEQKV_FC_FORM_V)]];
constant int HEADS    [[function_constant(FC_SEQKV + SEQKV_FC_HEADS)]];

// bits of values 8*i .. 8*i + 7 of a block; values in bit plane j: as in decode.h
static inline int seqkv_value_bits(int bits, int graded, int i) {
    return !graded ? bits : i < 2 ? bits + 2 : i < 4 ? bits : bits - 1;
}

static inline int seqkv_plane_bytes(int bits, int graded, int j) {
    return j < seqkv_value_bits(bits, graded, 7) ? 8 : j < seqkv_value_bits(bits, graded, 2) ? 4 : j < seqkv_value_bits(bits, graded, 0) ? 2 : 0;
}

static inline constant int8_t * seqkv_level_table(int B) {
    return B == 1 ? seqkv_level1 : B == 2 ? seqkv_level2 : B == 3 ? seqkv_level3 : B == 4 ? seqkv_level4 : B == 5 ? seqkv_level5 : seqkv_level6;
}

static inline constant uint32_t * seqkv_nearest_table(int B) {
    return B == 1 ? seqkv_nearest1 : B == 2 ? seqkv_nearest2 : B == 3 ? seqkv_nearest3 : B == 4 ? seqkv_nearest4 : B == 5 ? seqkv_nearest5 : seqkv_nearest6;
}

// bit k of x -> byte k, x < 16
static inline uint seqkv_spread(uint x) {
    return x*0x00204081u & 0x01010101u;
}

// values 8*c .. 8*c + 7 of a head's blocks -> y[8]
static inline void seqkv_load_blocks(int bits, int graded, device const uchar * cell, int c, thread float * y) {
    const int i = c%8; // byte of the planes
    device const uchar * b = cell + c/8*(1 + graded + 8*bits);
    device const uchar * planes = b + 1 + graded + i;
    const int B = seqkv_value_bits(bits, graded, i);
    if (B == 0) {
        FOR_UNROLL (int k = 0; k < 8; ++k) {
            y[k] = 0.0f;
        }
        return;
    }
    const float gain   = graded ? seqkv_gain_graded[(b[0] | (uint) b[1] << 8) >> (i < 2 ? 0 : i < 4 ? 5 : 10) & 31] : seqkv_gain[b[0]];
    const float factor = gain*seqkv_scale[B];

    // the path of these values, and above 8 bits of that before
    const bool start = graded ? i == 0 || i == 2 || i == 4 : i == 0;
    const uint u  = (uint) planes[0] << 8 | (start ? 0 : planes[-1]);
    const uint z0 = u >> 6 & 255, z1 = (u >> 8 ^ u >> 7 ^ u >> 5) & 255;
    uint lo = seqkv_spread(z0 & 15) | seqkv_spread(z1 & 15) << 1;
    uint hi = seqkv_spread(z0 >> 4) | seqkv_spread(z1 >> 4) << 1;
    for (int j = 1; j < B; ++j) {
        planes += seqkv_plane_bytes(bits, graded, j - 1);
        lo |= seqkv_spread(planes[0] & 15) << (j + 1);
        hi |= seqkv_spread(planes[0] >> 4) << (j + 1);
    }
    constant int8_t * level = seqkv_level_table(B);
    const uchar4 l0 = as_type<uchar4>(lo), l1 = as_type<uchar4>(hi);
    FOR_UNROLL (int k = 0; k < 4; ++k) {
        y[k]     = factor*level[l0[k]];
        y[k + 4] = factor*level[l1[k]];
    }
}

// ... of other types
static inline void seqkv_load_other(int type, device const uchar * cell, int c, thread float * y) {
    const int  j    = 8*(c%4); // first of these in a block of 32
    const bool high = j >= 16;
    device const uchar * b;
    switch (type) {
        case SEQKV_CELL_F32:  for (int k = 0; k < 8; ++k) { y[k] = ((device const float *) cell)[8*c + k]; } return;
        case SEQKV_CELL_F16:  for (int k = 0; k < 8; ++k) { y[k] = ((device const half  *) cell)[8*c + k]; } return;
        case SEQKV_CELL_BF16: for (int k = 0; k < 8; ++k) { y[k] = as_type<float>((uint) ((device const ushort *) cell)[8*c + k] << 16); } return;
        case SEQKV_CELL_Q8_0:
            b = cell + c/4*34;
            for (int k = 0; k < 8; ++k) { y[k] = *(device const half *) b*(float) (int8_t) b[2 + j + k]; }
            return;
        default: break;
    }
    const bool five = type == SEQKV_CELL_Q5_0 || type == SEQKV_CELL_Q5_1, min = type == SEQKV_CELL_Q4_1 || type == SEQKV_CELL_Q5_1;
    const int head = 2 + (min ? 2 : 0);
    b = cell + c/4*(head + (five ? 4 : 0) + 16);
    const float d = ((device const half *) b)[0];
    const float m = min ? (float) ((device const half *) b)[1] : five ? -16.0f*d : -8.0f*d;
    const uint  h = five ? b[head + j/8] : 0; // fifth bits
    device const uchar * qs = b + head + (five ? 4 : 0) + j%16;
    for (int k = 0; k < 8; ++k) {
        const uint q = (high ? qs[k] >> 4 : qs[k] & 15) | (h >> k & 1) << 4;
        y[k] = type == SEQKV_CELL_IQ4_NL ? d*kvalues_iq4nl_f[q] : d*q + m;
    }
}

static inline void seqkv_load(int type, int bits, int graded, device const uchar * cell, int c, thread float * y) {
    if (type == SEQKV_CELL_BLOCKS) {
        seqkv_load_blocks(bits, graded, cell, c, y);
    } else {
        seqkv_load_other(type, cell, c, y);
    }
}

// Value i of R(p) x, or of R(-p) x if inverse. cs: rotation row of p.
template <typename P>
static inline float seqkv_rotated(P x, int i, device const float * cs, int n_rot, int neox, bool inverse) {
    if (i >= n_rot) {
        return x[i];
    }
    const bool  second = neox ? i >= n_rot/2 : i & 1;
    const int   pair   = neox ? (second ? i - n_rot/2 : i) : i/2;
    const int   other  = neox ? (second ? i - n_rot/2 : i + n_rot/2) : i ^ 1;
    const float s      = inverse != second ? cs[2*pair + 1] : -cs[2*pair + 1];
    return x[i]*cs[2*pair] + x[other]*s;
}

// x (n/d, d) <- H x row by row, by nt threads of which this is number i. All threads of the threadgroup call it.
static inline void seqkv_fwht(threadgroup float * x, int n, int d, int i, int nt) {
    for (int h = 1; h < d; h *= 2) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int j = i; j < n/2; j += nt) {
            const int   at = (j & -h) << 1 | (j & (h - 1)); // h is a power of 2
            const float a = x[at], b = x[at + h];
            x[at]     = a + b;
            x[at + h] = a - b;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float s = rsqrt((float) d);
    for (int j = i; j < n; j += nt) {
        x[j] *= s;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Tables of KV head h in prof, in halves: see ggml_seqkv_prof_stride
static inline device const half * seqkv_enc    (device const half * prof, int h, int dk, int dv) { return prof + (int64_t) h*(2*dk*dk + 64*dk + 2*dv); }
static inline device const half * seqkv_dec    (device const half * prof, int h, int dk, int dv) { return seqkv_enc(prof, h, dk, dv) + dk*dk; }
static inline device const half * seqkv_pred   (device const half * prof, int h, int dk, int dv) { return seqkv_enc(prof, h, dk, dv) + 2*dk*dk; }
static inline device const half * seqkv_v_mean (device const half * prof, int h, int dk, int dv) { return seqkv_enc(prof, h, dk, dv) + 2*dk*dk + 64*dk; }
static inline device const half * seqkv_v_scale(device const half * prof, int h, int dk, int dv) { return seqkv_v_mean(prof, h, dk, dv) + dv; }
