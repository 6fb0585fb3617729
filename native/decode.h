// Decoding of seqkv blocks, inline: for kernels of any backend. bits (1..4) and graded (0, 1) should be constants where these
// are called, so that the plan folds away: put the switch outside. Every byte pattern is a valid block.
//
// A backend whose functions or tables need other qualifiers defines SEQKV_FN and SEQKV_TABLE before it includes this.
#pragma once

#include "block.h"

#include <string.h>

#if defined(__SSE4_1__) && !defined(__CUDA_ARCH__)
#    include <immintrin.h>
#endif

#ifndef SEQKV_FN
#    if defined(__GNUC__)
#        define SEQKV_FN static inline __attribute__((always_inline))
#    else
#        define SEQKV_FN static inline
#    endif
#endif

#include "tables.h"

// bytes of a block
SEQKV_FN int seqkv_block_bytes(int bits, int graded) {
    return 1 + graded + 8*bits;
}

// bits of values 16*q .. 16*q + 15, q = 0..3: 0..6
SEQKV_FN int seqkv_value_bits(int bits, int graded, int q) {
    return !graded ? bits : q == 0 ? bits + 2 : q == 1 ? bits : bits - 1;
}

// values in bit plane j: 64, 32, 16 or 0, always a prefix of the block
SEQKV_FN int seqkv_plane_values(int bits, int graded, int j) {
    return j < seqkv_value_bits(bits, graded, 3) ? 64
         : j < seqkv_value_bits(bits, graded, 1) ? 32
         : j < seqkv_value_bits(bits, graded, 0) ? 16 : 0;
}

// int8 levels of values with B bits, 1..6: 2^(B+1) entries, ascending
SEQKV_FN const int8_t * seqkv_level_table(int B) {
    switch (B) {
        case 1:  return seqkv_level1;
        case 2:  return seqkv_level2;
        case 3:  return seqkv_level3;
        case 4:  return seqkv_level4;
        case 5:  return seqkv_level5;
        default: return seqkv_level6;
    }
}

// Bit plane j of a block, j = 0..5: bit i = bit j of code i, 0 where the code has no bit j.
SEQKV_FN uint64_t seqkv_plane(int bits, int graded, const uint8_t * b, int j) {
    const int n = seqkv_plane_values(bits, graded, j);
    const int whole = seqkv_value_bits(bits, graded, 3); // planes of 8 bytes; a graded block goes on with 4, 2 and 2 bytes
    b += 1 + graded + (j <= whole ? 8*j : 8*whole + 4 + 2*(j - whole - 1));
    uint64_t p = 0;
    if (n >= 16) {
        p = b[0] | (uint64_t) b[1] << 8;
    }
    if (n >= 32) {
        p |= (uint64_t) b[2] << 16 | (uint64_t) b[3] << 24;
    }
    if (n >= 64) {
        p |= (uint64_t) b[4] << 32 | (uint64_t) b[5] << 40 | (uint64_t) b[6] << 48 | (uint64_t) b[7] << 56;
    }
    return p;
}

// Bit planes of a block's level indices: q[j] bit i = bit j of l(i). Index bits 0 and 1 come from the trellis path, the
// others are the code's. q: 7 words.
//   z1_i = u_i ^ u_(i-1) ^ u_(i-3),  z0_i = u_(i-2),  u = 0 before the first value of a group
SEQKV_FN void seqkv_index_planes(int bits, int graded, const uint8_t * b, uint64_t * q) {
    const uint64_t start = graded ? 0x0000000100010001u : 1; // first value of each group
    const uint64_t m1 = ~start, m2 = m1 & ~(start << 1), m3 = m2 & ~(start << 2);
    const uint64_t u = seqkv_plane(bits, graded, b, 0);
    q[0] = u << 2 & m2;
    q[1] = u ^ (u << 1 & m1) ^ (u << 3 & m3);
    q[2] = seqkv_plane(bits, graded, b, 1);
    q[3] = seqkv_plane(bits, graded, b, 2);
    q[4] = seqkv_plane(bits, graded, b, 3);
    q[5] = seqkv_plane(bits, graded, b, 4);
    q[6] = seqkv_plane(bits, graded, b, 5);
}

// bit k of x -> byte k
SEQKV_FN uint64_t seqkv_spread(uint8_t x) {
    return ((x & 0x7f)*0x0002040810204081u & 0x0101010101010101u) | (uint64_t) (x >> 7) << 56;
}

// Levels of values 16*g .. 16*g + 15, B bits each (0: all 0), from the index planes q: lv[16].
SEQKV_FN void seqkv_levels16(int B, int g, const uint64_t * q, int8_t * lv) {
    if (B == 0) {
        memset(lv, 0, 16);
        return;
    }
    const int8_t * level = seqkv_level_table(B);
#if defined(__SSE4_1__) && !defined(__CUDA_ARCH__)
    const __m128i bit  = _mm_set1_epi64x((long long) 0x8040201008040201u);
    const __m128i wide = _mm_set_epi64x(0x0101010101010101, 0);
    __m128i m[7], l = _mm_setzero_si128(); // plane j as masks of bytes, the index
    for (int j = 0; j <= B; ++j) {
        const __m128i word = _mm_shuffle_epi8(_mm_cvtsi32_si128((int) (q[j] >> 16*g & 0xffff)), wide);
        m[j] = _mm_cmpeq_epi8(_mm_and_si128(word, bit), bit);
        l    = _mm_or_si128(l, _mm_and_si128(m[j], _mm_set1_epi8((char) (1 << j))));
    }
    if (B < 3) {
        int64_t few = 0;
        memcpy(&few, level, 2 << B);
        l = _mm_shuffle_epi8(_mm_set_epi64x(0, few), l);
    } else {
        __m128i part[8]; // the look-up in each 16 levels; the upper index bits choose among these
        for (int k = 0; k < 1 << (B - 3); ++k) {
            part[k] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) (level + 16*k)), _mm_and_si128(l, _mm_set1_epi8(15)));
        }
        for (int j = 4; j <= B; ++j) {
            for (int k = 0; k < 1 << (B - j); ++k) {
                part[k] = _mm_blendv_epi8(part[2*k], part[2*k + 1], m[j]);
            }
        }
        l = part[0];
    }
    _mm_storeu_si128((__m128i *) lv, l);
#else
    for (int k = 0; k < 2; ++k) {
        uint64_t l = 0;
        for (int j = 0; j <= B; ++j) {
            l |= seqkv_spread((uint8_t) (q[j] >> (16*g + 8*k))) << j;
        }
        for (int i = 0; i < 8; ++i) {
            lv[8*k + i] = level[l >> 8*i & 255];
        }
    }
#endif
}

// Levels of a block: lv[64], -127..127.
SEQKV_FN void seqkv_levels(int bits, int graded, const uint8_t * b, int8_t * lv) {
    uint64_t q[7];
    seqkv_index_planes(bits, graded, b, q);
    seqkv_levels16(seqkv_value_bits(bits, graded, 0), 0, q, lv);
    seqkv_levels16(seqkv_value_bits(bits, graded, 1), 1, q, lv + 16);
    seqkv_levels16(seqkv_value_bits(bits, graded, 2), 2, q, lv + 32);
    seqkv_levels16(seqkv_value_bits(bits, graded, 3), 3, q, lv + 48);
}

// Factors of a block: value i is f[i/16] * level i. f: 4 floats.
SEQKV_FN void seqkv_factors(int bits, int graded, const uint8_t * b, float * f) {
    for (int q = 0; q < 4; ++q) {
        const float gain = graded ? seqkv_gain_graded[(b[0] | b[1] << 8) >> 5*(q < 2 ? q : 2) & 31] : seqkv_gain[b[0]];
        f[q] = gain*seqkv_scale[seqkv_value_bits(bits, graded, q)];
    }
}

// Values 16*g .. 16*g + 15 of a block from its index planes q -> y[16*g ..]. factor: of seqkv_factors.
SEQKV_FN void seqkv_decode16(int B, int g, const uint64_t * q, float factor, float * y) {
    int8_t lv[16];
    seqkv_levels16(B, g, q, lv);
    for (int i = 0; i < 16; ++i) {
        y[16*g + i] = factor*lv[i];
    }
}

// One block -> y[64].
SEQKV_FN void seqkv_decode_block(int bits, int graded, const uint8_t * b, float * y) {
    uint64_t q[7];
    float    f[4];
    seqkv_index_planes(bits, graded, b, q);
    seqkv_factors(bits, graded, b, f);
    seqkv_decode16(seqkv_value_bits(bits, graded, 0), 0, q, f[0], y);
    seqkv_decode16(seqkv_value_bits(bits, graded, 1), 1, q, f[1], y);
    seqkv_decode16(seqkv_value_bits(bits, graded, 2), 2, q, f[2], y);
    seqkv_decode16(seqkv_value_bits(bits, graded, 3), 3, q, f[3], y);
}
