// Blocks -> int8 levels, 4 at a time by byte permutes, for kernels on integer tensor cores.
//
// Stored order: of each 16 values, place 4*k + i holds value 4*i + k. It is what the bit transpose below gives; dot products and
// output dims take the permutation instead of the codes.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#    define SEQKV_UNPACK static __device__ __forceinline__
#    define SEQKV_INLINE __device__ __forceinline__
#    define SEQKV_CONSTEXPR static constexpr __host__ __device__
SEQKV_UNPACK uint32_t seqkv_prmt(uint32_t a, uint32_t b, uint32_t sel) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
    return r;
}
#else
#    define SEQKV_UNPACK static inline
#    define SEQKV_INLINE inline
#    define SEQKV_CONSTEXPR static constexpr
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

// Words of the level table of B bits that look-ups use: of 5 and 6 bits the upper half, the rest follows by symmetry.
SEQKV_CONSTEXPR int seqkv_table_words(int B) { return B == 0 ? 0 : B == 1 ? 1 : B < 5 ? 1 << (B - 1) : 1 << (B - 2); }

// ... as constants in the code
template <int B, int i> struct seqkv_level_words;
#define SEQKV_LEVEL_WORDS(B) template <int i> struct seqkv_level_words<B, i> { static constexpr uint32_t value = seqkv_level_word(seqkv_level##B, 4*(i + (B < 5 ? 0 : seqkv_table_words(B)))); };
SEQKV_LEVEL_WORDS(1) SEQKV_LEVEL_WORDS(2) SEQKV_LEVEL_WORDS(3) SEQKV_LEVEL_WORDS(4) SEQKV_LEVEL_WORDS(5) SEQKV_LEVEL_WORDS(6)
#undef SEQKV_LEVEL_WORDS

template <int B> struct seqkv_constants {
    template <int i> SEQKV_INLINE uint32_t word() const { return seqkv_level_words<B, i>::value; }
};

// ... or in registers, read from memory: a permute takes one constant alone, so that constants are moved before most of them
template <int B> struct seqkv_registers {
    uint32_t w[B == 0 ? 1 : seqkv_table_words(B)];
    template <int i> SEQKV_INLINE uint32_t word() const { return w[i]; }
};

// byte i of the result: 255 where bit 16*h + 4*i + k of p is set
template <int k, int h> SEQKV_UNPACK uint32_t seqkv_byte_mask(uint32_t p) {
    return seqkv_prmt(p << (3 - k), p << (7 - k), h == 0 ? 0x9d8c : 0xbfae);
}

SEQKV_UNPACK uint32_t seqkv_choose(uint32_t mask, uint32_t set, uint32_t clear) {
    return (set & mask) | (clear & ~mask);
}

// Entries 8*first .. of the words of a table (n8 of these runs of 8, a power of two) by the selectors sel; q: index planes, from 3 on
// they choose the run.
template <int B, int k, int h, int first, int n8, class T> SEQKV_UNPACK uint32_t seqkv_pick(uint32_t sel, const uint32_t * q, const T & table) {
    if constexpr (n8 == 1) {
        return seqkv_prmt(table.template word<2*first>(), table.template word<B == 1 ? 0 : 2*first + 1>(), sel);
    } else {
        constexpr int plane = n8 == 2 ? 3 : n8 == 4 ? 4 : 5;
        return seqkv_choose(seqkv_byte_mask<k, h>(q[plane]), seqkv_pick<B, k, h, first + n8/2, n8/2>(sel, q, table), seqkv_pick<B, k, h, first, n8/2>(sel, q, table));
    }
}

template <int B, int k, int h, class T> SEQKV_UNPACK uint32_t seqkv_look_up(uint32_t sel, const uint32_t * q, const T & table) {
    const uint32_t level = seqkv_pick<B, k, h, 0, B < 3 ? 1 : seqkv_table_words(B)/2>(sel, q, table);
    if constexpr (B < 5) {
        return level;
    } else {
        // negated where the top plane is 0; q is complemented there already
        const uint32_t minus = ~seqkv_byte_mask<k, h>(q[B]);
        return (level ^ minus) + (minus & 0x01010101); // levels are not 0: no carry
    }
}

// Selectors of 32 values from planes 0..2 of their indices: nibble i of n[k] = bits 0..2 of the index of value 4*i + k
SEQKV_UNPACK void seqkv_selectors(uint32_t q0, uint32_t q1, uint32_t q2, uint32_t (&n)[4]) {
    const uint32_t a = seqkv_choose(0x55555555, q0, q1 << 1);
    const uint32_t b = seqkv_choose(0x55555555, q0 >> 1, q1);
    n[0] = (a & 0x33333333)      | (q2 << 2 & 0x44444444);
    n[1] = (b & 0x33333333)      | (q2 << 1 & 0x44444444);
    n[2] = (a >> 2 & 0x33333333) | (q2      & 0x44444444);
    n[3] = (b >> 2 & 0x33333333) | (q2 >> 1 & 0x44444444);
}

// Levels of 16 values of B bits, those of the low (h = 0) or high half of their index planes q and selectors -> out[4], in stored order.
// B >= 5: the selectors and planes below B are complemented where plane B is 0.
template <int B, int h, class T> SEQKV_UNPACK void seqkv_levels_prmt(const uint32_t (&n)[4], const uint32_t * q, const T & table, uint32_t * out) {
    if constexpr (B == 0) {
        out[0] = out[1] = out[2] = out[3] = 0;
    } else {
        out[0] = seqkv_look_up<B, 0, h>(n[0] >> 16*h, q, table);
        out[1] = seqkv_look_up<B, 1, h>(n[1] >> 16*h, q, table);
        out[2] = seqkv_look_up<B, 2, h>(n[2] >> 16*h, q, table);
        out[3] = seqkv_look_up<B, 3, h>(n[3] >> 16*h, q, table);
    }
}

// Levels of a block from the 2*bits words of its planes -> out[16], in stored order. t0, t1, t2: the tables of its groups of values (16, 16, 32).
template <int bits, int graded, class T0, class T1, class T2>
SEQKV_UNPACK void seqkv_unpack_block(const uint32_t * w, const T0 & t0, const T1 & t1, const T2 & t2, uint32_t * out) {
    // words of the path: values 0..31, 32..63; a graded block begins anew at 16 and 32
    constexpr bool path64 = !graded || bits > 1;
    const uint32_t lo = w[0];
    const uint32_t hi = path64 ? w[1] : 0;
    constexpr uint32_t m1 = graded ? 0xfffeffff : 0xffffffff, m2 = graded ? 0xfffcffff : 0xffffffff, m3 = graded ? 0xfff8ffff : 0xffffffff;
    uint32_t q[7] = { 0 }, n[4];
    q[0] = lo << 2 & m2;
    q[1] = lo ^ (lo << 1 & m1) ^ (lo << 3 & m3);
    if constexpr (!graded) {
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j];
        }
        seqkv_selectors(q[0], q[1], q[2], n);
        seqkv_levels_prmt<bits, 0>(n, q, t0, out);
        seqkv_levels_prmt<bits, 1>(n, q, t0, out + 4);
        q[0] = hi << 2 | lo >> 30;
        q[1] = hi ^ (hi << 1 | lo >> 31) ^ (hi << 3 | lo >> 29);
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j + 1];
        }
        seqkv_selectors(q[0], q[1], q[2], n);
        seqkv_levels_prmt<bits, 0>(n, q, t0, out + 8);
        seqkv_levels_prmt<bits, 1>(n, q, t0, out + 12);
    } else {
        // both groups of 16 at once; the planes that the second one does not have are 0 in its half
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j];
        }
        q[bits + 1] = w[2*bits - 1] & 0xffff;
        q[bits + 2] = w[2*bits - 1] >> 16;
        if constexpr (bits + 2 >= 5) {
            const uint32_t other = ~q[bits + 2] & 0xffff; // in the first group
            for (int j = 0; j < bits + 2; ++j) {
                q[j] ^= other;
            }
        }
        seqkv_selectors(q[0], q[1], q[2], n);
        seqkv_levels_prmt<bits + 2, 0>(n, q, t0, out);
        seqkv_levels_prmt<bits,     1>(n, q, t1, out + 4);
        q[0] = hi << 2;
        q[1] = hi ^ hi << 1 ^ hi << 3;
        for (int j = 1; j < bits - 1; ++j) {
            q[j + 1] = w[2*j + 1];
        }
        seqkv_selectors(q[0], q[1], bits > 2 ? q[2] : 0, n);
        seqkv_levels_prmt<bits - 1, 0>(n, q, t2, out + 8);
        seqkv_levels_prmt<bits - 1, 1>(n, q, t2, out + 12);
    }
}
