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

// Words of the level table of B bits that look-ups use: of 4 and more bits the upper half, the rest follows by symmetry.
SEQKV_CONSTEXPR int seqkv_table_words(int B) { return B == 0 ? 0 : B <= 2 ? B : B == 3 ? 4 : 1 << (B - 2); }

// Entries 4*i .. 4*i + 3 of the table as look-ups need them. Of 3 and more bits in runs of 16: words 0 and 1 have the entries with bit 2 of the index clear
// (0..3, 8..11), words 2 and 3 those with bit 2 set (4..7, 12..15), as what a fill with the sign of the entry 4 before has to be xored with: 7 bits.
template <int B, int N> constexpr uint32_t seqkv_level_word(const int8_t (&level)[N], int i) {
    const int first = B < 4 ? 0 : N/2, run = B < 3 ? 4*i : 16*(i/4) + 4*(i/2%2) + 8*(i%2);
    uint32_t w = 0;
    for (int k = 0; k < 4; ++k) {
        const int x = level[first + run + k];
        w |= (uint32_t) (uint8_t) (B >= 3 && i/2%2 && x < 0 ? ~x & 127 : x) << 8*k;
    }
    return w;
}

// ... as constants in the code
template <int B, int i> struct seqkv_level_words;
#define SEQKV_LEVEL_WORDS(B) template <int i> struct seqkv_level_words<B, i> { static constexpr uint32_t value = seqkv_level_word<B>(seqkv_level##B, i); };
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

// One instruction, whatever is known about the bits of its operands
SEQKV_UNPACK uint32_t seqkv_choose(uint32_t mask, uint32_t set, uint32_t clear) {
#ifdef __CUDACC__
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(set), "r"(clear));
    return r;
#else
    return (set & mask) | (clear & ~mask);
#endif
}

// Entries of the runs of 16 [first, first + runs) of a table, a power of two, by the selectors sel; q: index planes, from 4 on they choose the run.
// A permute fills bytes with the sign of the entry where the top bit of its selector is set.
template <int B, int k, int h, int first, int runs, class T> SEQKV_UNPACK uint32_t seqkv_pick(uint32_t sel, uint32_t other, const uint32_t * q, const T & table) {
    if constexpr (runs == 1) {
        return seqkv_prmt(table.template word<4*first>(), table.template word<4*first + 1>(), sel) ^ seqkv_prmt(table.template word<4*first + 2>(), table.template word<4*first + 3>(), other);
    } else {
        return seqkv_choose(seqkv_byte_mask<k, h>(q[runs == 2 ? 4 : 5]), seqkv_pick<B, k, h, first + runs/2, runs/2>(sel, other, q, table), seqkv_pick<B, k, h, first, runs/2>(sel, other, q, table));
    }
}

template <int B, int k, int h, class T> SEQKV_UNPACK uint32_t seqkv_look_up(uint32_t sel, const uint32_t * q, uint32_t minus, const T & table) {
    if constexpr (B < 3) {
        return seqkv_prmt(table.template word<0>(), table.template word<B - 1>(), sel);
    } else {
        const uint32_t level = seqkv_pick<B, k, h, 0, B < 5 ? 1 : 1 << (B - 4)>(sel, sel ^ 0x88888888, q, table);
        if constexpr (B == 3) {
            return level;
        } else {
            const uint32_t mask = seqkv_byte_mask<k, h>(minus);
            return (level ^ mask) + (mask & 0x01010101); // levels are not 0: no carry
        }
    }
}

// Selectors of 32 values: nibble i of n[k] = bits 4*i + k of p0, p1, p2, p3; half: p0 >> 1 without its top bit
SEQKV_UNPACK void seqkv_selectors(uint32_t p0, uint32_t half, uint32_t p1, uint32_t p2, uint32_t p3, uint32_t (&n)[4]) {
    const uint32_t a = seqkv_choose(0x55555555, p0, p1 << 1), b = seqkv_choose(0x55555555, half, p1);
    const uint32_t c = seqkv_choose(0x55555555, p2, p3 << 1), d = seqkv_choose(0x55555555, p2 >> 1, p3);
    n[0] = seqkv_choose(0x33333333, a, c << 2);
    n[1] = seqkv_choose(0x33333333, b, d << 2);
    n[2] = seqkv_choose(0x33333333, a >> 2, c);
    n[3] = seqkv_choose(0x33333333, b >> 2, d);
}

// Levels of 16 values of B bits, those of the low (h = 0) or high half of their selectors and index planes q -> out[4], in stored order.
// B >= 4: minus has the complement of plane B, with which the selectors and planes below B are xored.
template <int B, int h, class T> SEQKV_UNPACK void seqkv_levels_prmt(const uint32_t (&n)[4], const uint32_t * q, uint32_t minus, const T & table, uint32_t * out) {
    if constexpr (B == 0) {
        out[0] = out[1] = out[2] = out[3] = 0;
    } else {
        out[0] = seqkv_look_up<B, 0, h>(n[0] >> 16*h, q, minus, table);
        out[1] = seqkv_look_up<B, 1, h>(n[1] >> 16*h, q, minus, table);
        out[2] = seqkv_look_up<B, 2, h>(n[2] >> 16*h, q, minus, table);
        out[3] = seqkv_look_up<B, 3, h>(n[3] >> 16*h, q, minus, table);
    }
}

// ... of 32 values of B0 bits in the low and B1 <= B0 in the high half; where these are not the same, planes above B1 are 0 in the high half.
// half: q[0] >> 1 without its top bit
template <int B0, int B1, class T0, class T1> SEQKV_UNPACK void seqkv_levels_32(uint32_t (&q)[7], uint32_t half, const T0 & t0, const T1 & t1, uint32_t * out) {
    static_assert(B0 == B1 || B0 == B1 + 2, "both halves, or a graded block");
    constexpr uint32_t low = B0 == B1 ? 0xffffffff : 0xffff;
    uint32_t minus = 0;
    if constexpr (B0 >= 4) {
        minus = ~q[B0] & low;
        for (int j = B1 >= 4 && B0 != B1 ? 4 : 0; j < B0; ++j) {
            q[j] ^= minus;
        }
        if constexpr (B0 != B1 && B1 >= 4) {
            minus |= ~q[B1] & ~low; // plane B1 as it is there
            for (int j = 0; j < 4; ++j) {
                q[j] ^= minus;
            }
        }
        half = q[0] >> 1;
    }
    // nibbles: of 3 and more bits planes 0, 1, 3, and 2 in the top bit
    const uint32_t p2 = B0 < 3 ? q[2] : B1 == 2 ? q[3] | (q[2] & ~low) : q[3];
    const uint32_t p3 = B0 < 3 ? 0    : B1 == 2 ? q[2] & low           : q[2];
    uint32_t n[4];
    seqkv_selectors(q[0], half, q[1], p2, p3, n);
    seqkv_levels_prmt<B0, 0>(n, q, minus, t0, out);
    seqkv_levels_prmt<B1, 1>(n, q, minus, t1, out + 4);
}

// Levels of a block from the 2*bits words of its planes -> out[16], in stored order. t0, t1, t2: the tables of its groups of values (16, 16, 32).
template <int bits, int graded, class T0, class T1, class T2>
SEQKV_UNPACK void seqkv_unpack_block(const uint32_t * w, const T0 & t0, const T1 & t1, const T2 & t2, uint32_t * out) {
    // words of the path: values 0..31, 32..63; a graded block begins anew at 16 and 32
    constexpr bool path64 = !graded || bits > 1;
    const uint32_t lo = w[0];
    const uint32_t hi = path64 ? w[1] : 0;
    constexpr uint32_t m1 = graded ? 0xfffeffff : 0xffffffff, m2 = graded ? 0xfffcffff : 0xffffffff, m3 = graded ? 0xfff8ffff : 0xffffffff;
    uint32_t q[7] = { 0 }, half = lo << 1 & m1;
    q[0] = lo << 2 & m2;
    q[1] = lo ^ half ^ (lo << 3 & m3);
    for (int j = 1; j < bits; ++j) {
        q[j + 1] = w[2*j];
    }
    if constexpr (!graded) {
        seqkv_levels_32<bits, bits>(q, half, t0, t0, out);
        half = hi << 1 | lo >> 31;
        q[0] = hi << 2 | lo >> 30;
        q[1] = hi ^ half ^ (hi << 3 | lo >> 29);
        for (int j = 1; j < bits; ++j) {
            q[j + 1] = w[2*j + 1];
        }
        seqkv_levels_32<bits, bits>(q, half, t0, t0, out + 8);
    } else {
        q[bits + 1] = w[2*bits - 1] & 0xffff;
        q[bits + 2] = w[2*bits - 1] >> 16;
        seqkv_levels_32<bits + 2, bits>(q, half, t0, t1, out);
        half = hi << 1;
        q[0] = hi << 2;
        q[1] = hi ^ half ^ hi << 3;
        q[2] = 0;
        for (int j = 1; j < bits - 1; ++j) {
            q[j + 1] = w[2*j + 1];
        }
        seqkv_levels_32<bits - 1, bits - 1>(q, half, t2, t2, out + 8);
    }
}
