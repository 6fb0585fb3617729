// Blocks -> int8 levels, 4 at a time by byte permutes, for kernels on integer tensor cores.
//
// Stored order: of each 16 values, place 4*k + i holds value 4*i + k. It is what the bit transpose below gives; dot products and
// output dims take the permutation instead of the codes.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#    define SEQKV_UNPACK static __device__ __forceinline__
SEQKV_UNPACK uint32_t seqkv_prmt(uint32_t a, uint32_t b, uint32_t sel) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
    return r;
}
#else
#    define SEQKV_UNPACK static inline
static inline uint32_t seqkv_prmt(uint32_t a, uint32_t b, uint32_t sel) {
    const uint64_t ab = (uint64_t) b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t s = sel >> 4*i & 15, x = (uint32_t) (ab >> 8*(s & 7)) & 255;
        r |= (s & 8 ? (x & 128 ? 255u : 0u) : x) << 8*i;
    }
    return r;
}
#endif

// 4 levels as a word
template <int N> constexpr uint32_t seqkv_level_word(const int8_t (&level)[N], int i) {
    return (uint32_t) (uint8_t) level[i] | (uint32_t) (uint8_t) level[i + 1] << 8 | (uint32_t) (uint8_t) level[i + 2] << 16 | (uint32_t) (uint8_t) level[i + 3] << 24;
}

// word i of the level table of B bits, a constant in device code too
template <int B, int i> struct seqkv_level_words;
#define SEQKV_LEVEL_WORDS(B) template <int i> struct seqkv_level_words<B, i> { static constexpr uint32_t value = seqkv_level_word(seqkv_level##B, 4*i); };
SEQKV_LEVEL_WORDS(1) SEQKV_LEVEL_WORDS(2) SEQKV_LEVEL_WORDS(3) SEQKV_LEVEL_WORDS(4) SEQKV_LEVEL_WORDS(5) SEQKV_LEVEL_WORDS(6)
#undef SEQKV_LEVEL_WORDS

// byte i of the result: 255 where bit 16*h + 4*i + k of p is set
template <int k, int h> SEQKV_UNPACK uint32_t seqkv_byte_mask(uint32_t p) {
    return seqkv_prmt(p << (3 - k), p << (7 - k), h == 0 ? 0x9d8c : 0xbfae);
}

SEQKV_UNPACK uint32_t seqkv_choose(uint32_t mask, uint32_t set, uint32_t clear) {
    return (set & mask) | (clear & ~mask);
}

// Entries 8*first .. of the table of B bits (n8 of these runs of 8, a power of two) by the selectors sel; q: index planes, from 3 on
// they choose the run.
template <int B, int k, int h, int first, int n8> SEQKV_UNPACK uint32_t seqkv_pick(uint32_t sel, const uint32_t * q) {
    if constexpr (n8 == 1) {
        constexpr uint32_t a = seqkv_level_words<B, 2*first>::value, b = seqkv_level_words<B, B == 1 ? 0 : 2*first + 1>::value;
        return seqkv_prmt(a, b, sel);
    } else {
        constexpr int plane = n8 == 2 ? 3 : n8 == 4 ? 4 : 5;
        return seqkv_choose(seqkv_byte_mask<k, h>(q[plane]), seqkv_pick<B, k, h, first + n8/2, n8/2>(sel, q), seqkv_pick<B, k, h, first, n8/2>(sel, q));
    }
}

template <int B, int k, int h> SEQKV_UNPACK uint32_t seqkv_look_up(uint32_t sel, const uint32_t * q) {
    constexpr int n8 = B < 3 ? 1 : 1 << (B - 2);
    if constexpr (B < 5) {
        return seqkv_pick<B, k, h, 0, n8>(sel, q);
    } else {
        // the upper half of the table, negated where the top plane is 0; q is complemented there already
        const uint32_t level = seqkv_pick<B, k, h, n8/2, n8/2>(sel, q);
        const uint32_t minus = ~seqkv_byte_mask<k, h>(q[B]);
        return (level ^ minus) + (minus & 0x01010101); // levels are not 0: no carry
    }
}

// Levels of N values (16 or 32) of B bits from the words q[0..B] of their index planes -> out[N/4], in stored order.
template <int B, int N> SEQKV_UNPACK void seqkv_levels_prmt(const uint32_t * planes, uint32_t * out) {
    if constexpr (B == 0) {
        for (int i = 0; i < N/4; ++i) {
            out[i] = 0;
        }
    } else {
        uint32_t q[7];
        for (int j = 0; j <= B; ++j) {
            q[j] = B >= 5 && j < B ? ~(planes[j] ^ planes[B]) : planes[j];
        }
        // nibble i of n[k] = bits 0..2 of the index of value 4*i + k
        const uint32_t p2 = B >= 2 ? q[2] : 0;
        const uint32_t a = (q[0] & 0x55555555) | (q[1] << 1 & 0xaaaaaaaa);
        const uint32_t b = (q[0] >> 1 & 0x55555555) | (q[1] & 0xaaaaaaaa);
        const uint32_t c = p2 & 0x55555555, d = p2 >> 1 & 0x55555555;
        const uint32_t n[4] = {
            (a & 0x33333333) | (c << 2 & 0xcccccccc), (b & 0x33333333) | (d << 2 & 0xcccccccc),
            (a >> 2 & 0x33333333) | (c & 0xcccccccc), (b >> 2 & 0x33333333) | (d & 0xcccccccc),
        };
        out[0] = seqkv_look_up<B, 0, 0>(n[0], q);
        out[1] = seqkv_look_up<B, 1, 0>(n[1], q);
        out[2] = seqkv_look_up<B, 2, 0>(n[2], q);
        out[3] = seqkv_look_up<B, 3, 0>(n[3], q);
        if constexpr (N == 32) {
            out[4] = seqkv_look_up<B, 0, 1>(n[0] >> 16, q);
            out[5] = seqkv_look_up<B, 1, 1>(n[1] >> 16, q);
            out[6] = seqkv_look_up<B, 2, 1>(n[2] >> 16, q);
            out[7] = seqkv_look_up<B, 3, 1>(n[3] >> 16, q);
        }
    }
}

// Levels of a block from the 2*bits words of its planes -> out[16], in stored order.
template <int bits, int graded> SEQKV_UNPACK void seqkv_unpack_block(const uint32_t * w, uint32_t * out) {
    // words of the path: values 0..31, 32..63; a graded block begins anew at 16 and 32
    constexpr bool path64 = !graded || bits > 1;
    const uint32_t lo = w[0];
    const uint32_t hi = path64 ? w[1] : 0;
    constexpr uint32_t m1 = graded ? 0xfffeffff : 0xffffffff, m2 = graded ? 0xfffcffff : 0xffffffff, m3 = graded ? 0xfff8ffff : 0xffffffff;
    uint32_t q[7];
    if constexpr (!graded) {
        q[0] = lo << 2;
        q[1] = lo ^ lo << 1 ^ lo << 3;
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j];
        }
        seqkv_levels_prmt<bits, 32>(q, out);
        q[0] = hi << 2 | lo >> 30;
        q[1] = hi ^ (hi << 1 | lo >> 31) ^ (hi << 3 | lo >> 29);
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j + 1];
        }
        seqkv_levels_prmt<bits, 32>(q, out + 8);
    } else {
        q[0] = lo << 2 & m2;
        q[1] = lo ^ (lo << 1 & m1) ^ (lo << 3 & m3);
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j];
        }
        q[bits + 1] = w[2*bits - 1];
        q[bits + 2] = w[2*bits - 1] >> 16;
        seqkv_levels_prmt<bits + 2, 16>(q, out);
        for (int j = 0; j <= bits; ++j) {
            q[j] >>= 16;
        }
        seqkv_levels_prmt<bits, 16>(q, out + 4);
        q[0] = hi << 2;
        q[1] = hi ^ hi << 1 ^ hi << 3;
        for (int j = 1; j < bits - 1; ++j) {
            q[j + 1] = w[2*j + 1];
        }
        seqkv_levels_prmt<bits - 1, 32>(q, out + 8);
    }
}
