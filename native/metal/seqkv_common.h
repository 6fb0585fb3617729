// What the Metal kernels of seqkv share: constants of the pipeline, tables, values of a cell, transforms.
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

// gain and scale of values 16*q .. 16*q + 15 of a block
static inline float seqkv_factor(int bits, int graded, device const uchar * b, int q) {
    const float gain = graded ? seqkv_gain_graded[(b[0] | (uint) b[1] << 8) >> 5*min(q, 2) & 31] : seqkv_gain[b[0]];
    return gain*seqkv_scale[seqkv_value_bits(bits, graded, 2*q)];
}

// Half h of a block, 32 values: byte m of w[r] is the index of value 32*h + 8*m + r in its table of levels. Bit planes are words, which
// three steps of a transposition turn; planes that a plan does not have are 0 and cost nothing.
static inline void seqkv_unpack(int bits, int graded, device const uchar * b, int h, thread uint * w) {
    const int first = seqkv_value_bits(bits, graded, 4*h), low = seqkv_value_bits(bits, graded, 4*h + 2); // bits of values 0 .. 15, 16 .. 31
    b += 1 + graded;
    const uint before = h == 1 && !graded ? (uint) b[3] << 24 : 0; // the path before these values
    b += 4*h;
    FOR_UNROLL (int j = 0; j < 7; ++j) {
        w[j + 1] = j < low ? as_type<uint>(uchar4(*(device const packed_uchar4 *) b)) : j < first ? b[0] | (uint) b[1] << 8 : 0;
        b += seqkv_plane_bytes(bits, graded, j);
    }
    const uint u = w[1], start = graded && h == 0 ? 1u << 16 : 0; // value 16 begins a group
    w[0] = (u << 2 & ~(3*start)) | before >> 30;
    w[1] = u ^ ((u << 1 & ~start) | before >> 31) ^ ((u << 3 & ~(7*start)) | before >> 29);
    FOR_UNROLL (int s = 1; s < 8; s *= 2) {
        const uint mask = s == 1 ? 0x55555555 : s == 2 ? 0x33333333 : 0x0f0f0f0f;
        FOR_UNROLL (int j = 0; j < 8; ++j) {
            if ((j & s) == 0) {
                const uint t = (w[j] >> s ^ w[j + s]) & mask;
                w[j]     ^= t << s;
                w[j + s] ^= t;
            }
        }
    }
}

// value i of a head's cell of another type
static inline float seqkv_value(int type, device const uchar * cell, int i) {
    const int j = i%32; // in a block of 32
    switch (type) {
        case SEQKV_CELL_F32:  return ((device const float *) cell)[i];
        case SEQKV_CELL_F16:  return ((device const half  *) cell)[i];
        case SEQKV_CELL_BF16: return as_type<float>((uint) ((device const ushort *) cell)[i] << 16);
        case SEQKV_CELL_Q8_0: return *(device const half *) (cell + i/32*34)*(float) (int8_t) cell[i/32*34 + 2 + j];
        default: break;
    }
    const bool five = type == SEQKV_CELL_Q5_0 || type == SEQKV_CELL_Q5_1, min = type == SEQKV_CELL_Q4_1 || type == SEQKV_CELL_Q5_1;
    const int head = 2 + (min ? 2 : 0);
    device const uchar * b = cell + i/32*(head + (five ? 4 : 0) + 16);
    const float d = ((device const half *) b)[0];
    const float m = min ? (float) ((device const half *) b)[1] : five ? -16.0f*d : -8.0f*d;
    const uint  q = (b[head + (five ? 4 : 0) + j%16] >> j/16*4 & 15) | (five ? b[head + j/8] >> j%8 & 1 : 0) << 4;
    return type == SEQKV_CELL_IQ4_NL ? d*kvalues_iq4nl_f[q] : d*q + m;
}

// values 32*c .. 32*c + 31 of a head's cell -> x[32]
static inline void seqkv_load(int type, int bits, int graded, device const uchar * cell, int c, threadgroup float * x) {
    if (type != SEQKV_CELL_BLOCKS) {
        for (int i = 0; i < 32; ++i) {
            x[i] = seqkv_value(type, cell, 32*c + i);
        }
        return;
    }
    device const uchar * b = cell + c/2*(1 + graded + 8*bits);
    uint w[8];
    seqkv_unpack(bits, graded, b, c%2, w);
    for (int m = 0; m < 4; ++m) {
        const int   q      = c%2*2 + m/2;
        const float factor = seqkv_factor(bits, graded, b, q);
        constant int8_t * level = seqkv_level_table(seqkv_value_bits(bits, graded, 2*q));
        FOR_UNROLL (int r = 0; r < 8; ++r) {
            x[8*m + r] = factor*level[w[r] >> 8*m & 255];
        }
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
