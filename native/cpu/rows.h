// Inner loops of the attention op over rows of head vectors, for each instruction set:
//     unpack_keys   blocks of a head -> int8 levels and factors
//     key_floats    these -> floats
//     dot_keys      s = q k^T of a few queries with them
//     unpack_values blocks of a head -> int8 levels and factors, row by row
//     value_floats  these -> floats
//     mad_values    y += p x of them, for a few rows p
//     dot_rows      s = q k^T for a few queries, both along their rows: no transposition
//     mad_rows      y += p x for a few rows p
// The instruction set is that of the compilation; ggml builds this file once for each variant of its CPU backend.
#pragma once

#include "../decode.h"

#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__GNUC__)
#    define SEQKV_INLINE inline __attribute__((always_inline))
#    define SEQKV_NOINLINE __attribute__((noinline))
#    if defined(__clang__)
#        define SEQKV_UNROLL _Pragma("clang loop unroll(full)")
#    else
#        define SEQKV_UNROLL _Pragma("GCC unroll 8")
#    endif
#else
#    define SEQKV_INLINE inline
#    define SEQKV_NOINLINE
#    define SEQKV_UNROLL
#endif

// gcc 12 takes the undefined operands in its own AVX-512 intrinsics for ours (gcc bug 105593)
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX2__)
#    include <immintrin.h>
#elif defined(__aarch64__)
#    include <arm_neon.h>
#endif

static constexpr int TILE_ROWS = 64; // most rows of a tile

// Blocks of the rows of a tile, unpacked: value i of row j is f[i/64][group of i][j] * lv[i/64][at], at of a key key_at(j, i%64), of a
// value 64*j + i%64.
struct level_tile {
    int8_t * lv; // (d/64, TILE_ROWS, 64)
    float  * f;  // (d/64, 3, TILE_ROWS): the uniform plan has one group, the others are not used

    static constexpr int LV = TILE_ROWS*SEQKV_BLOCK, F = 3*TILE_ROWS; // of one block column
};

// Keys lie by value where a look-up can leave them so, KEY_ROWS rows side by side: a vector is then the same value of many rows,
// which is multiplied by one value of a query, and there are no sums across lanes. Elsewhere they lie by row.
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#    define SEQKV_KEYS_BY_VALUE
static constexpr int KEY_ROWS = 16;
#else
static constexpr int KEY_ROWS = 1;
#endif
static constexpr int key_at(int j, int i) { return (j/KEY_ROWS*SEQKV_BLOCK + i)*KEY_ROWS + j%KEY_ROWS; }

// group of values 16*q .. 16*q + 15 of a block
static constexpr int group_of(int graded, int q) { return !graded ? 0 : q < 2 ? q : 2; }

// gain*scale by the stored gain, for each group of a plan
template <int bits, int graded> struct factor_table {
    float f[graded ? 3 : 1][graded ? 32 : 256];

    factor_table() {
        for (int k = 0; k < (graded ? 3 : 1); ++k) {
            for (int g = 0; g < (graded ? 32 : 256); ++g) {
                f[k][g] = (graded ? seqkv_gain_graded[g & 31] : seqkv_gain[g])*seqkv_scale[seqkv_value_bits(bits, graded, k)];
            }
        }
    }
};
template <int bits, int graded> static const factor_table<bits, graded> block_factors;

// always inline: as a function of its own it has no effect that gcc knows of, and would be dropped
static SEQKV_INLINE void prefetch(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2); // to the second level: a tile of each is much of the first
#elif defined(__SSE__) || defined(_M_X64)
    _mm_prefetch((const char *) p, _MM_HINT_T1);
#else
    (void) p;
#endif
}

// Rows that are read next, to be prefetched one by one beside products: all at once they would take every buffer for lines on their
// way, and loads would wait for one.
struct next_rows {
    const char * k, * v;
    size_t       stride_k, stride_v; // bytes from row to row
    size_t       size_k, size_v;     // of a row

    SEQKV_INLINE void prefetch_row(int j) const {
        prefetch_bytes(k + j*stride_k, size_k);
        prefetch_bytes(v + j*stride_v, size_v);
    }
    static SEQKV_INLINE void prefetch_bytes(const char * p, size_t n) {
        for (size_t i = 0; i < n - 1; i += 64) {
            prefetch(p + i);
        }
        prefetch(p + n - 1);
    }
};

#if defined(__AVX2__) || defined(__aarch64__)

// 8 bytes, the last ones 0 if n < 8
static inline uint64_t load_word(const uint8_t * b, int n = 8) {
    uint64_t w = 0;
    memcpy(&w, b, n);
    return w;
}

// Where index planes 2.. of a block are (planes 0 and 1 are computed from the path, its first bytes): shuffles of the block's
// bytes behind its gains.
template <int bits, int graded> struct plane_map {
    static constexpr int n_plane = bits + 2*graded + 1; // index planes
    static constexpr int whole   = bits - graded;       // code planes of 8 bytes
    static constexpr int rest    = bits > 1 ? 8 : 0;    // 16 bytes from here on, or 8 of them twice, hold planes 2 and 3
    static constexpr int upper   = bits > 3 ? 24 : rest; // and 16 or 8 from here on planes 4..6

    uint8_t at[7][8] = {}; // byte k of plane j is byte at[j][k] of these 16, or 255: none

    constexpr plane_map() {
        for (int j = 2; j < 7; ++j) {
            for (int k = 0; k < 8; ++k) {
                const int B = !graded ? bits : k < 2 ? bits + 2 : k < 4 ? bits : bits - 1; // bits of values 8*k ..
                const int c = j - 1;
                const int o = (c <= whole ? 8*c : 8*whole + 4 + 2*(c - whole - 1)) + k - (j < 4 ? rest : upper);
                at[j][k] = (uint8_t) (c < B ? o : 255);
            }
        }
    }
};

#endif

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)

// A multishift takes 8 bits from anywhere in a word to a byte: u(i-3) .. u(i) of the path at once, or a code bit to its place in
// the index. The words are those of the block behind its gains; the last one of a graded block holds three planes. What is above
// the bits that were asked for is left there: the next bit's byte is taken in its place, and look-ups take 6 bits.
template <int bits, int graded> struct unpack_tables {
    static constexpr bool direct(int B) { return B <= 3; }         // the path's four bits select a level, without z1 and z0
    static constexpr int  low   (int B) { return direct(B) ? 4 : 2; } // index bits from the path
    static constexpr int  word  (int j) { return j < bits ? j : bits - 1; }
    static constexpr int  first (int j) { return j < bits ? 0 : j == bits ? 32 : 48; } // bit of value 0 in its word

    alignas(64) uint8_t path[64], keep[64], bit[6][64], z[64], level[3][128] = {};

    unpack_tables() {
        for (int i = 0; i < 64; ++i) {
            const int B     = seqkv_value_bits(bits, graded, i/16);
            const int begin = !graded ? 0 : i < 16 ? 0 : i < 32 ? 16 : 32;
            path[i] = (uint8_t) ((i - 3) & 63);
            keep[i] = (uint8_t) (i - begin < 3 ? 15 & 15 << (3 - (i - begin)) : 15);
            z[i]    = (uint8_t) z_of(i%16);
            for (int j = 1; j < 6; ++j) {
                bit[j][i] = (uint8_t) ((first(j) + i - (low(B) + j - 1)) & 63);
            }
        }
        for (int k = 0; k < (graded ? 3 : 1); ++k) {
            const int B = seqkv_value_bits(bits, graded, k);
            for (int i = 0; B > 0 && i < 128; ++i) {
                const int l = direct(B) ? 4*(i/16) + z_of(i%16) : i;
                level[k][i] = (uint8_t) seqkv_level_table(B)[l & ((2 << B) - 1)];
            }
        }
    }
    static int z_of(int u) { return 2*((u >> 3 ^ u >> 2 ^ u) & 1) + (u >> 1 & 1); } // u(i) in bit 3
};
template <int bits, int graded> static const unpack_tables<bits, graded> block_tables;

// what an index keeps of its lower n bits when the next one is put above them
static inline __m512i put_above(int n, __m512i l, __m512i next) {
    return _mm512_ternarylogic_epi64(l, next, _mm512_set1_epi8((char) ((1 << n) - 1)), 0xe4);
}

// the levels lv[64] of a block of the uniform plan
template <int bits> struct unpacker {
    using tables = unpack_tables<bits, 0>;

    __m512i path, keep, z, bit[bits], level; // constants, for the loop over the rows

    unpacker() {
        const auto & t = block_tables<bits, 0>;
        const auto load = [](const uint8_t * x) { return _mm512_load_si512(x); };
        path  = load(t.path);
        keep  = load(t.keep);
        z     = load(t.z);
        level = load(t.level[0]);
        for (int j = 1; j < bits; ++j) {
            bit[j] = load(t.bit[j]);
        }
    }

    SEQKV_INLINE void operator()(const uint8_t * b, int8_t * lv) const {
        const auto word = [b](int k) { return _mm512_set1_epi64((long long) load_word(b + 1 + 8*k)); };
        __m512i l = _mm512_and_si512(_mm512_multishift_epi64_epi8(path, word(0)), keep);
        if (!tables::direct(bits)) {
            l = _mm512_permutexvar_epi8(l, z);
        }
        for (int j = 1; j < bits; ++j) {
            l = put_above(tables::low(bits) + j - 1, l, _mm512_multishift_epi64_epi8(bit[j], word(j)));
        }
        _mm512_storeu_si512(lv, _mm512_permutexvar_epi8(l, level));
    }
};

// Levels 8*o .. 8*o + 7 of 16 rows, by value; word r of w[k][s]: word k of row 8*s + r. level: the tables of the groups, at last the
// rest of that of 6 bits
template <int bits, int graded, int o>
SEQKV_INLINE void unpack_values_of_rows(const __m512i (&w)[bits][2], const __m512i (&level)[4], __m512i z, const __m512i (&by_value)[2], int8_t * lv) {
    using tables = unpack_tables<bits, graded>;
    const auto & t = block_tables<bits, graded>;
    constexpr int k = group_of(graded, o/2);
    const int B = seqkv_value_bits(bits, graded, k);
    const auto each = [](const uint8_t * x) { return _mm512_set1_epi64((long long) load_word(x + 8*o)); };
    __m512i x[2];
    for (int s = 0; s < 2; ++s) {
        if (B == 0) {
            x[s] = _mm512_setzero_si512();
            continue;
        }
        __m512i l = _mm512_multishift_epi64_epi8(each(t.path), w[0][s]);
        if (o == 0 || (graded && (o == 2 || o == 4))) {
            l = _mm512_and_si512(l, each(t.keep));
        }
        if (!tables::direct(B)) {
            l = _mm512_permutexvar_epi8(l, z);
        }
        for (int j = 1; j < B; ++j) {
            l = put_above(tables::low(B) + j - 1, l, _mm512_multishift_epi64_epi8(each(t.bit[j]), w[tables::word(j)][s]));
        }
        x[s] = B == 6 ? _mm512_permutex2var_epi8(level[k], l, level[3]) : _mm512_permutexvar_epi8(l, level[k]);
    }
    _mm512_storeu_si512(lv + (8*o    )*KEY_ROWS, _mm512_permutex2var_epi8(x[0], by_value[0], x[1]));
    _mm512_storeu_si512(lv + (8*o + 4)*KEY_ROWS, _mm512_permutex2var_epi8(x[0], by_value[1], x[1]));
}

#elif defined(__AVX2__)

// Levels of B0 bits for the lower and of B1 <= B0 for the upper 16 of 32 values, 16 of a table side by side; unused ones are 0.
template <int B0, int B1> struct level_pair {
    static constexpr int n_part = B0 < 3 ? 1 : 1 << (B0 - 3);

    alignas(32) int8_t part[n_part][32] = {};

    level_pair() {
        for (int i = 0; i < 16*n_part; ++i) {
            part[i/16][i%16]      = B0 > 0 && i < 2 << B0 ? seqkv_level_table(B0)[i] : 0;
            part[i/16][i%16 + 16] = B1 > 0 && i < 2 << B1 ? seqkv_level_table(B1)[i] : 0;
        }
    }
};
template <int B0, int B1> static const level_pair<B0, B1> level_pairs;

static inline __m256i load32(const void * x) { return _mm256_load_si256((const __m256i *) x); }

// Levels of 32 values from bits 0..3 of their indices and masks of bits 4..6.
template <int B0, int B1> SEQKV_FN __m256i look_up(__m256i l, const __m256i * mask) {
    constexpr int n_part = level_pair<B0, B1>::n_part;
    __m256i part[n_part];
    for (int k = 0; k < n_part; ++k) {
        part[k] = _mm256_shuffle_epi8(load32(level_pairs<B0, B1>.part[k]), l);
    }
    for (int j = 0, n = n_part; n > 1; ++j, n /= 2) { // index bit 4 + j chooses among the parts
        for (int k = 0; k < n/2; ++k) {
            part[k] = _mm256_blendv_epi8(part[2*k], part[2*k + 1], mask[j]);
        }
    }
    return part[0];
}

// shuffles of a plan: bytes k of planes 0..3 side by side, k = 0..7, and byte i/8 of planes 4..6 for values 0..15, 32..47 and 16..31, 48..63
template <int bits, int graded> struct shuffles {
    alignas(32) uint8_t path[32] = {}, rest[32] = {}, upper[3][2][32] = {};
    alignas(32) uint8_t bit[32] = {}, nibble[32] = {}, step7[32] = {}, step14[32] = {}; // masks; in memory, since a compiler that knew them would make them in every row

    shuffles() {
        const plane_map<bits, graded> map;
        for (int i = 0; i < 32; ++i) {
            bit[i]    = (uint8_t) (1 << i%8);
            nibble[i] = 0x0f;
            step7[i]  = i%2 == 0 ? 0xaa : 0;
            step14[i] = i%4 < 2 ? 0xcc : 0;
            path[i] = (uint8_t) (i%4 < 2 ? 8*(i%4) + i/4 : 255);
            rest[i] = i%4 < 2 ? 255 : map.at[i%4][i/4];
            for (int j = 0; j < 3; ++j) {
                for (int v = 0; v < 2; ++v) {
                    upper[j][v][i] = map.at[4 + j][(i/16*32 + 16*v + i%16)/8];
                }
            }
        }
    }
};

template <int bits, int graded> static const shuffles<bits, graded> block_shuffles;

template <int bits, int graded> SEQKV_FN void unpack_block(const uint8_t * b, int8_t * lv) {
    using map = plane_map<bits, graded>;
    const auto & to = block_shuffles<bits, graded>;
    const auto read     = [&](int at, int n) { // 16 or 8 bytes of the planes, in each half
        const uint8_t * p = b + 1 + graded + at;
        return n == 16 ? _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)) : _mm256_set1_epi64x((long long) load_word(p));
    };

    // planes 0 and 1, see seqkv_index_planes
    constexpr uint64_t start = graded ? 0x0000000100010001u : 1;
    constexpr uint64_t m1 = ~start, m2 = m1 & ~(start << 1), m3 = m2 & ~(start << 2);
    const auto each = [](uint64_t q0, uint64_t q1) { return _mm256_set_epi64x((long long) q1, (long long) q0, (long long) q1, (long long) q0); };
    const __m256i u = _mm256_set1_epi64x((long long) load_word(b + 1 + graded, bits == 1 && graded ? 4 : 8));
    const __m256i q = _mm256_xor_si256(_mm256_xor_si256(
        _mm256_and_si256(_mm256_sllv_epi64(u, each( 2, 1)), each(m2, m1)),
        _mm256_and_si256(_mm256_sllv_epi64(u, each(64, 3)), each( 0, m3))),
        _mm256_and_si256(u, each(0, ~0ull)));

    // Bits 0..3 of the indices. A word holds 8 bits of each of 4 planes; two steps of a transposition make it 8 numbers of 4 bits
    __m256i x = _mm256_shuffle_epi8(q, load32(to.path));
    __m256i rest = x;
    if (map::n_plane > 2) {
        rest = read(map::rest, bits > 2 ? 16 : 8);
        x    = _mm256_or_si256(x, _mm256_shuffle_epi8(rest, load32(to.rest)));
    }
    __m256i t = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 7)), load32(to.step7));
    x = _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, 7)));
    t = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 14)), load32(to.step14));
    x = _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, 14)));
    const __m256i lo = _mm256_and_si256(x, load32(to.nibble));
    const __m256i hi = _mm256_and_si256(_mm256_srli_epi32(x, 4), load32(to.nibble));
    const __m256i l[2] = { _mm256_unpacklo_epi32(lo, hi), _mm256_unpackhi_epi32(lo, hi) }; // values 0..15, 32..47 and 16..31, 48..63

    const __m256i bit   = load32(to.bit);
    const __m256i upper = map::n_plane <= 4 || bits < 4 ? rest : read(map::upper, 8);
    __m256i mask[2][3];
    for (int v = 0; v < 2; ++v) {
        for (int j = 0; 4 + j <= (v ? bits : bits + 2*graded); ++j) {
            mask[v][j] = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(upper, load32(to.upper[j][v])), bit), bit);
        }
    }
    constexpr int B0 = graded ? bits + 2 : bits, B2 = graded ? bits - 1 : bits;
    const __m256i levels[2] = { look_up<B0, B2>(l[0], mask[0]), look_up<bits, B2>(l[1], mask[1]) };
    _mm256_storeu_si256((__m256i *) lv,        _mm256_permute2x128_si256(levels[0], levels[1], 0x20));
    _mm256_storeu_si256((__m256i *) (lv + 32), _mm256_permute2x128_si256(levels[0], levels[1], 0x31));
}

#elif defined(__aarch64__)

// levels of the indices l of values with B bits
template <int B> SEQKV_FN int8x16_t look_up(uint8x16_t l) {
    const int8_t * level = seqkv_level_table(B);
    if (B == 0) {
        return vdupq_n_s8(0);
    }
    if (B < 3) {
        int8_t few[16] = { 0 };
        memcpy(few, level, 2 << B);
        return vqtbl1q_s8(vld1q_s8(few), l);
    }
    if (B == 3) {
        return vqtbl1q_s8(vld1q_s8(level), l);
    }
    if (B == 4) {
        return vqtbl2q_s8(vld1q_s8_x2(level), l);
    }
    const int8x16_t r = vqtbl4q_s8(vld1q_s8_x4(level), l);
    return B == 5 ? r : vqtbx4q_s8(r, vld1q_s8_x4(level + 64*(B == 6)), vsubq_u8(l, vdupq_n_u8(64)));
}

// shuffles of a plan: byte i/8 of index plane j for values 16*g + i, from the 16 bytes that hold it
template <int bits, int graded> struct shuffles {
    uint8_t at[4][7][16] = {};

    constexpr shuffles() {
        const plane_map<bits, graded> map;
        for (int g = 0; g < 4; ++g) {
            for (int j = 0; j < 7; ++j) {
                for (int i = 0; i < 16; ++i) {
                    at[g][j][i] = j < 2 ? (uint8_t) (8*j + 2*g + i/8) : map.at[j][2*g + i/8];
                }
            }
        }
    }
};

// Levels 16*g .. 16*g + 15 of a block, B bits each. planes: the bytes with index planes 0 and 1, 2 and 3, 4 .. 6
template <int B, int bits, int graded> SEQKV_FN void unpack16(int g, const uint8x16_t * planes, int8_t * lv) {
    static constexpr shuffles<bits, graded> to;
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    uint8x16_t l = vdupq_n_u8(0);
    for (int j = B; B > 0 && j >= 0; --j) {
        const uint8x16_t mask = vtstq_u8(vqtbl1q_u8(planes[j < 2 ? 0 : j < 4 ? 1 : 2], vld1q_u8(to.at[g][j])), bit);
        l = vsliq_n_u8(mask, l, 1);
    }
    vst1q_s8(lv + 16*g, look_up<B>(l));
}

template <int bits, int graded> SEQKV_FN void unpack_block(const uint8_t * b, int8_t * lv) {
    using map = plane_map<bits, graded>;
    const uint8_t * p = b + 1 + graded;

    // index planes 0 and 1, see seqkv_index_planes
    static constexpr uint64_t start = graded ? 0x0000000100010001u : 1;
    static constexpr uint64_t m1 = ~start, m2 = m1 & ~(start << 1), m3 = m2 & ~(start << 2);
    static constexpr int64_t  shift[2][2] = { { 2, 1 }, { 64, 3 } };
    static constexpr uint64_t keep [3][2] = { { m2, m1 }, { 0, m3 }, { 0, ~0ull } };
    const uint64x2_t u  = vdupq_n_u64(load_word(p, bits == 1 && graded ? 4 : 8));
    const uint64x2_t q0 = vandq_u64(vshlq_u64(u, vld1q_s64(shift[0])), vld1q_u64(keep[0]));
    const uint64x2_t q1 = vandq_u64(vshlq_u64(u, vld1q_s64(shift[1])), vld1q_u64(keep[1]));

    uint8x16_t planes[3];
    planes[0] = vreinterpretq_u8_u64(veorq_u64(veorq_u64(q0, q1), vandq_u64(u, vld1q_u64(keep[2]))));
    planes[1] = map::n_plane <= 2 ? planes[0] : bits > 2 ? vld1q_u8(p + map::rest) : vreinterpretq_u8_u64(vdupq_n_u64(load_word(p + map::rest)));
    planes[2] = bits > 3 ? vreinterpretq_u8_u64(vdupq_n_u64(load_word(p + map::upper))) : planes[1];
    unpack16<graded ? bits + 2 : bits, bits, graded>(0, planes, lv);
    unpack16<bits,                     bits, graded>(1, planes, lv);
    unpack16<graded ? bits - 1 : bits, bits, graded>(2, planes, lv);
    unpack16<graded ? bits - 1 : bits, bits, graded>(3, planes, lv);
}

#else

template <int bits, int graded> SEQKV_FN void unpack_block(const uint8_t * b, int8_t * lv) { seqkv_levels(bits, graded, b, lv); }

#endif

// as unpack_keys for one block of every row
#if defined(SEQKV_KEYS_BY_VALUE)
// byte 16*i + r of four values i and 16 rows r from those of 8 rows, 8*r + i, and of 8 more
struct by_value_tables {
    alignas(64) uint8_t at[2][64];

    by_value_tables() {
        for (int i = 0; i < 128; ++i) {
            at[i/64][i%64] = (uint8_t) (i%16/8*64 + i%8*8 + i/16);
        }
    }
};
static const by_value_tables by_value;

// words and gains of the blocks of 16 rows, the last ones the same if there are fewer
template <int bits, int graded> SEQKV_INLINE void read_blocks(const char * src, size_t stride, int n, __m512i (&w)[bits][2], uint16_t * gain) {
    for (int k = 0; k < bits; ++k) {
        w[k][0] = w[k][1] = _mm512_setzero_si512();
    }
    SEQKV_UNROLL
    for (int s = 0; s < 2; ++s) {
        SEQKV_UNROLL
        for (int r = 0; r < 8; ++r) {
            const int j = 8*s + r;
            const uint8_t * b = (const uint8_t *) src + (j < n ? j : n - 1)*stride;
            gain[j] = (uint16_t) (graded ? b[0] | b[1] << 8 : b[0]);
            for (int k = 0; k < bits; ++k) {
                w[k][s] = _mm512_mask_broadcastq_epi64(w[k][s], (__mmask8) (1 << r), _mm_loadl_epi64((const __m128i *) (b + 1 + graded + 8*k)));
            }
        }
    }
}

template <int bits, int graded> static void unpack_key_column(const char * src, size_t stride, const bool * live, int n, int8_t * lv, float * f) {
    const auto & t = block_tables<bits, graded>;
    const auto load = [](const uint8_t * x) { return _mm512_load_si512(x); };
    const __m512i z        = load(t.z);
    const __m512i level[4] = { load(t.level[0]), load(t.level[1]), load(t.level[2]), load(t.level[0] + 64) };
    const __m512i order[2] = { load(by_value.at[0]), load(by_value.at[1]) };
    const auto & factors = block_factors<bits, graded>;
    for (int j = 0; j < n; j += KEY_ROWS, lv += KEY_ROWS*SEQKV_BLOCK) {
        alignas(32) uint16_t gain[KEY_ROWS];
        __m512i w[bits][2];
        if (j + KEY_ROWS <= n) {
            read_blocks<bits, graded>(src + j*stride, stride, KEY_ROWS, w, gain);
        } else {
            read_blocks<bits, graded>(src + j*stride, stride, n - j, w, gain);
        }
        unpack_values_of_rows<bits, graded, 0>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 1>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 2>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 3>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 4>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 5>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 6>(w, level, z, order, lv);
        unpack_values_of_rows<bits, graded, 7>(w, level, z, order, lv);
        if (!graded) {
            for (int r = 0; r < KEY_ROWS; ++r) {
                f[j + r] = live[j + r] ? factors.f[0][gain[r]] : 0.0f;
            }
            continue;
        }
        const __m512i   g     = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i *) gain));
        const __mmask16 there = _mm_test_epi8_mask(_mm_loadu_si128((const __m128i *) (live + j)), _mm_set1_epi8(1));
        for (int k = 0; k < 3; ++k) {
            const float * of = factors.f[graded ? k : 0];
            _mm512_storeu_ps(f + k*TILE_ROWS + j,
                _mm512_maskz_permutex2var_ps(there, _mm512_loadu_ps(of), _mm512_srli_epi32(g, 5*k), _mm512_loadu_ps(of + 16)));
        }
    }
}
#else
template <int bits, int graded> static void unpack_key_column(const char * src, size_t stride, const bool * live, int n, int8_t * lv, float * f) {
    const auto & factors = block_factors<bits, graded>;
    for (int j = 0; j < GGML_PAD(n, 16); ++j, src += stride) {
        const uint8_t * b = (const uint8_t *) src;
        for (int k = 0; k < (graded ? 3 : 1); ++k) {
            f[k*TILE_ROWS + j] = !live[j] ? 0.0f : factors.f[k][graded ? (b[0] | b[1] << 8) >> 5*k & 31 : b[0]];
        }
        if (!live[j]) {
            continue;
        }
        unpack_block<bits, graded>(b, lv + key_at(j, 0));
    }
}

template <int bits> struct unpacker {
    SEQKV_INLINE void operator()(const uint8_t * b, int8_t * lv) const { unpack_block<bits, 0>(b, lv); }
};
#endif

// as unpack_values for one block of every row
template <int bits> static void unpack_value_column(const char * src, size_t stride, const bool * live, int n, int8_t * lv, float * f) {
    const unpacker<bits> unpack;
    const auto & factors = block_factors<bits, 0>;
    for (int j = 0; j < n; ++j, src += stride) {
        const uint8_t * b = (const uint8_t *) src;
        f[j] = 0.0f;
        if (live[j]) {
            f[j] = factors.f[0][b[0]];
            unpack(b, lv + j*SEQKV_BLOCK);
        }
    }
}

// Rows of a tile: row j at src + j*stride, j < n. The factors are 0 where live[j] is not set, up to the next multiple of 16; the
// levels are anything there.
static void unpack_keys(int bits, int graded, const char * src, size_t stride, const bool * live, int n, int d, const level_tile & x) {
    static constexpr decltype(&unpack_key_column<1, 0>) columns[4][2] = {
        { unpack_key_column<1, 0>, unpack_key_column<1, 1> }, { unpack_key_column<2, 0>, unpack_key_column<2, 1> },
        { unpack_key_column<3, 0>, unpack_key_column<3, 1> }, { unpack_key_column<4, 0>, unpack_key_column<4, 1> },
    };
    for (int c = 0; c < d/SEQKV_BLOCK; ++c, src += seqkv_block_bytes(bits, graded)) {
        columns[bits - 1][graded](src, stride, live, n, x.lv + c*level_tile::LV, x.f + c*level_tile::F);
    }
}

static void unpack_values(int bits, const char * src, size_t stride, const bool * live, int n, int d, const level_tile & x) {
    static constexpr decltype(&unpack_value_column<1>) columns[4] = {
        unpack_value_column<1>, unpack_value_column<2>, unpack_value_column<3>, unpack_value_column<4>,
    };
    for (int c = 0; c < d/SEQKV_BLOCK; ++c, src += seqkv_block_bytes(bits, 0)) {
        columns[bits - 1](src, stride, live, GGML_PAD(n, 16), x.lv + c*level_tile::LV, x.f + c*level_tile::F);
    }
}

//
// products
//

#if defined(__AVX512F__) && defined(__AVX512DQ__)
typedef __m512 vec; // vload8: floats of int8
static constexpr int VEC = 16, DOT_K = 4, MAD_N = 4; // floats in a vector, rows of k and vectors of y held in registers at a time
static inline vec vload(const float * x) { return _mm512_loadu_ps(x); }
static inline vec vload(const ggml_fp16_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
static inline void vstore(float * x, vec a) { _mm512_storeu_ps(x, a); }
static inline vec vload8(const int8_t * x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x))); }
static inline vec vset1(float x) { return _mm512_set1_ps(x); }
static inline vec vmad(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); } // a*b + c
static inline vec vmul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec vadd(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline float max_of(vec a) { return _mm512_reduce_max_ps(a); }
static inline float sum_of(vec a) { return _mm512_reduce_add_ps(a); }
// the sums of four vectors
static inline void sums4(float * x, vec a, vec b, vec c, vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 s  = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 h  = _mm256_add_ps(_mm512_castps512_ps256(s), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1)));
    _mm_storeu_ps(x, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 vec;
static constexpr int VEC = 8, DOT_K = 2, MAD_N = 2;
static inline vec vload(const float * x) { return _mm256_loadu_ps(x); }
static inline vec vload(const ggml_fp16_t * x) { // processors with AVX2 have F16C, but a compiler may not be told
#    if defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x));
#    else
    float y[VEC];
    ggml_cpu_fp16_to_fp32(x, y, VEC);
    return _mm256_loadu_ps(y);
#    endif
}
static inline void vstore(float * x, vec a) { _mm256_storeu_ps(x, a); }
static inline vec vload8(const int8_t * x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) x))); }
static inline vec vset1(float x) { return _mm256_set1_ps(x); }
static inline vec vmad(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec vmul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec vadd(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline float max_of(vec a) {
    const __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 q = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
static inline float sum_of(vec a) {
    const __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline void sums4(float * x, vec a, vec b, vec c, vec d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 s  = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(x, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#elif defined(__aarch64__)
typedef float32x4_t vec;
static constexpr int VEC = 4, DOT_K = 4, MAD_N = 4;
static inline vec vload(const float * x) { return vld1q_f32(x); }
static inline vec vload(const ggml_fp16_t * x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
static inline void vstore(float * x, vec a) { vst1q_f32(x, a); }
static inline vec vload8(const int8_t * x) {
    int32_t four;
    memcpy(&four, x, sizeof(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
static inline vec vset1(float x) { return vdupq_n_f32(x); }
static inline vec vmad(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline vec vmul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec vadd(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec vmax(vec a, vec b) { return vmaxq_f32(a, b); }
static inline float max_of(vec a) { return vmaxvq_f32(a); }
static inline float sum_of(vec a) { return vaddvq_f32(a); }
static inline void sums4(float * x, vec a, vec b, vec c, vec d) { vst1q_f32(x, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
#else
// for the compiler to make something of
struct vec { float x[4]; };
static constexpr int VEC = 4, DOT_K = 2, MAD_N = 2;
static inline vec vload(const float * x) { return { { x[0], x[1], x[2], x[3] } }; }
static inline vec vload(const ggml_fp16_t * x) {
    vec y;
    ggml_cpu_fp16_to_fp32(x, y.x, VEC);
    return y;
}
static inline void vstore(float * x, vec a) { memcpy(x, a.x, sizeof(a.x)); }
static inline vec vload8(const int8_t * x) { return { { (float) x[0], (float) x[1], (float) x[2], (float) x[3] } }; }
static inline vec vset1(float x) { return { { x, x, x, x } }; }
static inline vec vmad(vec a, vec b, vec c) {
    return { { a.x[0]*b.x[0] + c.x[0], a.x[1]*b.x[1] + c.x[1], a.x[2]*b.x[2] + c.x[2], a.x[3]*b.x[3] + c.x[3] } };
}
static inline vec vmul(vec a, vec b) { return { { a.x[0]*b.x[0], a.x[1]*b.x[1], a.x[2]*b.x[2], a.x[3]*b.x[3] } }; }
static inline vec vadd(vec a, vec b) { return { { a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2], a.x[3] + b.x[3] } }; }
static inline vec vmax(vec a, vec b) {
    for (int i = 0; i < 4; ++i) {
        a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    }
    return a;
}
static inline float max_of(vec a) {
    float m = a.x[0];
    for (int i = 1; i < 4; ++i) {
        m = a.x[i] > m ? a.x[i] : m;
    }
    return m;
}
static inline void sums4(float * x, vec a, vec b, vec c, vec d) {
    const vec v[4] = { a, b, c, d };
    for (int i = 0; i < 4; ++i) {
        x[i] = (v[i].x[0] + v[i].x[1]) + (v[i].x[2] + v[i].x[3]);
    }
}
#endif

// ggml has an exponential function of these vectors; with SVE, none of NEON's
#if (defined(__AVX512F__) && defined(__AVX512DQ__)) || (defined(__AVX2__) && defined(__FMA__)) || (defined(__aarch64__) && !defined(__ARM_FEATURE_SVE))
#    define SEQKV_VEXP
#endif

// Keeps x in a register: compilers like to read an operand from memory again for each product, and loads are scarcer than these.
static inline void hold(vec & x) {
#if defined(__GNUC__) && defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__)
    __asm__("" : "+x"(x));
#else
    (void) x;
#endif
}

// x <- scale*x + bias; n a multiple of 16. Returns the maximum.
static float scale_row(float * x, float scale, const float * bias, int n) {
    vec m = vset1(-INFINITY);
    for (int i = 0; i < n; i += VEC) {
        const vec y = vmad(vset1(scale), vload(x + i), vload(bias + i));
        vstore(x + i, y);
        m = vmax(m, y);
    }
    return max_of(m);
}

// x <- exp(x - max); n a multiple of 16. Returns the sum.
static float exp_row(float * x, float max, int n) {
#if defined(SEQKV_VEXP)
    vec sum = vset1(0.0f);
    for (int i = 0; i < n; i += VEC) {
        const vec y = ggml_v_expf(vadd(vload(x + i), vset1(-max)));
        vstore(x + i, y);
        sum = vadd(sum, y);
    }
    return sum_of(sum);
#else
    return (float) ggml_vec_soft_max_f32(n, x, x, max);
#endif
}

// the sums of each vector -> s (NQ, ld)
template <int NQ> static inline void store_sums(const vec (&sum)[NQ][DOT_K], float * s, int ld) {
    static_assert(DOT_K == 2 || DOT_K == 4, "sums4 adds up four vectors");
    if (DOT_K == 4) {
        for (int r = 0; r < NQ; ++r) {
            sums4(s + r*ld, sum[r][0], sum[r][1], sum[r][DOT_K - 2], sum[r][DOT_K - 1]);
        }
        return;
    }
    for (int r = 0; r < NQ; r += 2) {
        const int other = r + 1 < NQ ? r + 1 : r;
        float x[4];
        sums4(x, sum[r][0], sum[r][1], sum[other][0], sum[other][1]);
        memcpy(s + r*ld,     x,     2*sizeof(float));
        memcpy(s + other*ld, x + 2, 2*sizeof(float));
    }
}

// s (NQ, ld) = q (NQ, d) k^T, k (n, d) of floats or f16; n a multiple of 4, d of 64
template <int NQ, class T> static void dot_block(const float * q, const T * k, int n, int d, float * s, int ld) {
    for (int j = 0; j < n; j += DOT_K, k += DOT_K*d) {
        vec sum[NQ][DOT_K];
        for (int r = 0; r < NQ; ++r) {
            for (int c = 0; c < DOT_K; ++c) {
                sum[r][c] = vset1(0.0f);
            }
        }
        for (int i = 0; i < d; i += VEC) {
            vec qv[NQ], kv[DOT_K];
            for (int r = 0; r < NQ; ++r) {
                qv[r] = vload(q + r*d + i);
                hold(qv[r]);
            }
            for (int c = 0; c < DOT_K; ++c) {
                kv[c] = vload(k + c*d + i);
            }
            for (int c = 0; c < DOT_K; ++c) {
                for (int r = 0; r < NQ; ++r) {
                    sum[r][c] = vmad(qv[r], kv[c], sum[r][c]);
                }
            }
        }
        store_sums<NQ>(sum, s + j, ld);
    }
}

// s (nq, ld) = q (nq, d) k^T, k (n, d) of floats or f16; n a multiple of 4, d of 64
template <class T> static void dot_rows(const float * q, const T * k, int nq, int n, int d, float * s, int ld) {
    int r = 0;
    for (; r + 4 <= nq; r += 4) {
        dot_block<4>(q + r*d, k, n, d, s + r*ld, ld);
    }
    switch (nq - r) {
        case 3: dot_block<3>(q + r*d, k, n, d, s + r*ld, ld); break;
        case 2: dot_block<2>(q + r*d, k, n, d, s + r*ld, ld); break;
        case 1: dot_block<1>(q + r*d, k, n, d, s + r*ld, ld); break;
    }
}

// y (NQ, d) += p (NQ, ld) x, x (n, d), d a multiple of 64
template <int NQ> static void mad_block(const float * p, int ld, const float * x, int n, int d, float * y) {
    for (int i = 0; i < d; i += MAD_N*VEC) {
        vec acc[NQ][MAD_N];
        for (int r = 0; r < NQ; ++r) {
            for (int c = 0; c < MAD_N; ++c) {
                acc[r][c] = vload(y + r*d + i + c*VEC);
            }
        }
        for (int j = 0; j < n; ++j) {
            vec xv[MAD_N];
            for (int c = 0; c < MAD_N; ++c) {
                xv[c] = vload(x + j*d + i + c*VEC);
                hold(xv[c]);
            }
            for (int r = 0; r < NQ; ++r) {
                vec pv = vset1(p[r*ld + j]);
                hold(pv);
                for (int c = 0; c < MAD_N; ++c) {
                    acc[r][c] = vmad(pv, xv[c], acc[r][c]);
                }
            }
        }
        for (int r = 0; r < NQ; ++r) {
            for (int c = 0; c < MAD_N; ++c) {
                vstore(y + r*d + i + c*VEC, acc[r][c]);
            }
        }
    }
}

// y (nq, d) += p (nq, ld) x, x (n, d), d a multiple of 64
static void mad_rows(const float * p, int ld, const float * x, int nq, int n, int d, float * y) {
    int r = 0;
    for (; r + 4 <= nq; r += 4) {
        mad_block<4>(p + r*ld, ld, x, n, d, y + r*d);
    }
    switch (nq - r) {
        case 3: mad_block<3>(p + r*ld, ld, x, n, d, y + r*d); break;
        case 2: mad_block<2>(p + r*ld, ld, x, n, d, y + r*d); break;
        case 1: mad_block<1>(p + r*ld, ld, x, n, d, y + r*d); break;
    }
}

//
// products with levels
//

// y (d, n) <- x (n, d), multiples of 16
static void transpose(const float * GGML_RESTRICT x, float * GGML_RESTRICT y, int n, int d) {
#if defined(__SSE__)
    for (int i = 0; i < d; i += 4) {
        for (int j = 0; j < n; j += 4) {
            __m128 r[4];
            for (int k = 0; k < 4; ++k) {
                r[k] = _mm_loadu_ps(x + (j + k)*d + i);
            }
            _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
            for (int k = 0; k < 4; ++k) {
                _mm_storeu_ps(y + (i + k)*n + j, r[k]);
            }
        }
    }
#else
    static constexpr int B = 16;
    for (int i0 = 0; i0 < d; i0 += B) {
        for (int j0 = 0; j0 < n; j0 += B) {
            for (int i = i0; i < i0 + B; ++i) {
                for (int j = j0; j < j0 + B; ++j) {
                    y[i*n + j] = x[j*d + i];
                }
            }
        }
    }
#endif
}

// Predictions of a tile's rows in the order of their levels: rows (TILE_ROWS, d) -> add, or by value (d, TILE_ROWS)
static void arrange_predictions(const float * rows, int d, float * add) {
    if (KEY_ROWS > 1) {
        transpose(rows, add, TILE_ROWS, d);
    } else {
        memcpy(add, rows, TILE_ROWS*d*sizeof(float));
    }
}

#if defined(SEQKV_KEYS_BY_VALUE)

// Keys as floats, plus add if summed. y (d, n)
template <int graded, bool summed> static void key_floats(const level_tile & x, const float * add, int n, int d, float *, float * y) {
    for (int i = 0; i < d; ++i) {
        const int b = i/SEQKV_BLOCK, o = i%SEQKV_BLOCK;
        for (int j = 0; j < n; j += VEC) {
            const vec f = vload(x.f + b*level_tile::F + group_of(graded, o/16)*TILE_ROWS + j);
            vstore(y + i*n + j, vmad(f, vload8(x.lv + b*level_tile::LV + key_at(j, o)), summed ? vload(add + i*TILE_ROWS + j) : vset1(0.0f)));
        }
    }
}

// s (NQ, ld) = q (NQ, d) k^T, plus add if summed, for N vectors of rows of k
template <int NQ, int N, int graded, bool summed>
static void dot_key_columns(const float * q, const level_tile & k, const float * add, const next_rows * next, int d, float * s, int ld) {
    vec sum[NQ][N];
    for (int r = 0; r < NQ; ++r) {
        for (int c = 0; c < N; ++c) {
            sum[r][c] = vset1(0.0f);
        }
    }
    const int8_t * lv = k.lv;
    const float  * f  = k.f;
    for (int b = 0; b < d; b += SEQKV_BLOCK, lv += level_tile::LV - SEQKV_BLOCK*KEY_ROWS, f += level_tile::F) {
        for (int g = 0; g < (graded ? 3 : 1); ++g) {
            vec fc[N];
            for (int c = 0; c < N; ++c) {
                fc[c] = vload(f + g*TILE_ROWS + c*VEC);
            }
            const int end = !graded ? 64 : 16 << g;
            for (int i = g*16; i < end; ++i, ++q, lv += KEY_ROWS, add += TILE_ROWS) {
                if (next && b == 0) {
                    next->prefetch_row(i);
                }
                vec kv[N];
                for (int c = 0; c < N; ++c) {
                    const vec x = vload8(lv + key_at(c*VEC, 0));
                    kv[c] = summed ? vmad(fc[c], x, vload(add + c*VEC)) : vmul(fc[c], x);
                }
                for (int r = 0; r < NQ; ++r) {
                    vec qv = vset1(q[r*d]);
                    hold(qv);
                    for (int c = 0; c < N; ++c) {
                        sum[r][c] = vmad(qv, kv[c], sum[r][c]);
                    }
                }
            }
        }
    }
    for (int r = 0; r < NQ; ++r) {
        for (int c = 0; c < N; ++c) {
            vstore(s + r*ld + c*VEC, sum[r][c]);
        }
    }
}

template <int NQ, int graded, bool summed>
static void dot_keys_block(const float * q, const level_tile & k, const float * add, const next_rows * next, int n, int d, float * s, int ld) {
    static constexpr int N = TILE_ROWS/VEC;
    if (n == TILE_ROWS) {
        dot_key_columns<NQ, N, graded, summed>(q, k, add, next, d, s, ld);
        return;
    }
    for (int j = 0; j < n; j += VEC) {
        dot_key_columns<NQ, 1, graded, summed>(q, { k.lv + key_at(j, 0), k.f + j }, add + j, nullptr, d, s + j, ld);
    }
}

#else

// Keys as floats, plus add if summed. y (d, n); rows (n, d): scratch
template <int graded, bool summed> static void key_floats(const level_tile & x, const float * add, int n, int d, float * rows, float * y) {
    for (int c = 0; c < d/SEQKV_BLOCK; ++c) {
        for (int j = 0; j < n; ++j) {
            for (int i = 0; i < SEQKV_BLOCK; i += VEC) {
                const int at = j*d + c*SEQKV_BLOCK + i;
                const vec f  = vset1(x.f[c*level_tile::F + group_of(graded, i/16)*TILE_ROWS + j]);
                vstore(rows + at, vmad(f, vload8(x.lv + c*level_tile::LV + key_at(j, i)), summed ? vload(add + at) : vset1(0.0f)));
            }
        }
    }
    transpose(rows, y, n, d);
}

// s (NQ, ld) = q (NQ, d) k^T; k: n rows of a tile, plus add if summed; n a multiple of 4. d is a constant, so that few pointers
// are needed: gcc keeps those that it has no register for in vectors, and what gets them back waits behind the products.
template <int NQ, int d, int graded, bool summed>
static void dot_key_rows(const float * q, const level_tile & k, const float * add, const next_rows * next, int n, float * s, int ld) {
    const int8_t * lv = k.lv;
    const float  * f  = k.f;
    for (int j = 0; j < n; j += DOT_K, lv += DOT_K*SEQKV_BLOCK, f += DOT_K, add += DOT_K*d) {
        vec sum[NQ][DOT_K];
        for (int r = 0; r < NQ; ++r) {
            for (int c = 0; c < DOT_K; ++c) {
                sum[r][c] = vset1(0.0f);
            }
        }
        for (int b = 0; b < d/SEQKV_BLOCK; ++b) {
            SEQKV_UNROLL
            for (int i = 0; i < SEQKV_BLOCK; i += VEC) {
                vec qv[NQ];
                for (int r = 0; r < NQ; ++r) {
                    qv[r] = vload(q + r*d + b*SEQKV_BLOCK + i);
                    hold(qv[r]);
                }
                for (int c = 0; c < DOT_K; ++c) {
                    const vec x  = vload8(lv + b*level_tile::LV + key_at(c, i));
                    const vec fc = vset1(f[b*level_tile::F + group_of(graded, i/16)*TILE_ROWS + c]);
                    const vec kv = vmad(fc, x, summed ? vload(add + c*d + b*SEQKV_BLOCK + i) : vset1(0.0f));
                    for (int r = 0; r < NQ; ++r) {
                        sum[r][c] = vmad(qv[r], kv, sum[r][c]);
                    }
                }
            }
        }
        for (int c = 0; next && c < DOT_K; ++c) {
            next->prefetch_row(j + c);
        }
        store_sums<NQ>(sum, s + j, ld);
    }
}

template <int NQ, int graded, bool summed>
static void dot_keys_block(const float * q, const level_tile & k, const float * add, const next_rows * next, int n, int d, float * s, int ld) {
    switch (d) {
        case 64:  dot_key_rows<NQ,  64, graded, summed>(q, k, add, next, n, s, ld); break;
        case 128: dot_key_rows<NQ, 128, graded, summed>(q, k, add, next, n, s, ld); break;
        default:  dot_key_rows<NQ, 256, graded, summed>(q, k, add, next, n, s, ld); break;
    }
}

#endif

// s (nq, ld) = q (nq, d) k^T; k: n rows of a tile, plus add if summed, n a multiple of 16; next is prefetched
template <int graded, bool summed>
static void dot_keys(const float * q, const level_tile & k, const float * add, const next_rows * next, int nq, int n, int d, float * s, int ld) {
    int r = 0;
    for (; r + 4 <= nq; r += 4, next = nullptr) {
        dot_keys_block<4, graded, summed>(q + r*d, k, add, next, n, d, s + r*ld, ld);
    }
    switch (nq - r) {
        case 3: dot_keys_block<3, graded, summed>(q + r*d, k, add, next, n, d, s + r*ld, ld); break;
        case 2: dot_keys_block<2, graded, summed>(q + r*d, k, add, next, n, d, s + r*ld, ld); break;
        case 1: dot_keys_block<1, graded, summed>(q + r*d, k, add, next, n, d, s + r*ld, ld); break;
    }
}

// Values as floats. y (n, d)
static void value_floats(const level_tile & x, int n, int d, float * y) {
    for (int c = 0; c < d/SEQKV_BLOCK; ++c) {
        for (int j = 0; j < n; ++j) {
            const vec f = vset1(x.f[c*level_tile::F + j]);
            for (int i = 0; i < SEQKV_BLOCK; i += VEC) {
                vstore(y + j*d + c*SEQKV_BLOCK + i, vmul(f, vload8(x.lv + c*level_tile::LV + j*SEQKV_BLOCK + i)));
            }
        }
    }
}

// y (NQ, d) += p (NQ, ld) x; x: n rows of a tile of the uniform plan, n a multiple of 16; p >= 0
template <int NQ> static void mad_values_block(const float * p, int ld, const level_tile & x, int n, int d, float * y) {
    for (int b = 0; b < d; b += SEQKV_BLOCK) {
        const int8_t * lv = x.lv + b/SEQKV_BLOCK*level_tile::LV;
        const float  * f  = x.f  + b/SEQKV_BLOCK*level_tile::F;
        float pf[NQ][TILE_ROWS];
        for (int r = 0; r < NQ; ++r) {
            for (int j = 0; j < n; ++j) {
                pf[r][j] = p[r*ld + j]*f[j];
            }
        }
        for (int i = 0; i < SEQKV_BLOCK; i += MAD_N*VEC) {
            vec acc[NQ][MAD_N];
            for (int r = 0; r < NQ; ++r) {
                for (int c = 0; c < MAD_N; ++c) {
                    acc[r][c] = vload(y + r*d + b + i + c*VEC);
                }
            }
            for (int j = 0; j < n; ++j) {
                vec xv[MAD_N];
                for (int c = 0; c < MAD_N; ++c) {
                    xv[c] = vload8(lv + j*SEQKV_BLOCK + i + c*VEC);
                }
                for (int r = 0; r < NQ; ++r) {
                    vec pv = vset1(pf[r][j]);
                    hold(pv);
                    for (int c = 0; c < MAD_N; ++c) {
                        acc[r][c] = vmad(pv, xv[c], acc[r][c]);
                    }
                }
            }
            for (int r = 0; r < NQ; ++r) {
                for (int c = 0; c < MAD_N; ++c) {
                    vstore(y + r*d + b + i + c*VEC, acc[r][c]);
                }
            }
        }
    }
}

static void mad_values(const float * p, int ld, const level_tile & x, int nq, int n, int d, float * y) {
    int r = 0;
    for (; r + 4 <= nq; r += 4) {
        mad_values_block<4>(p + r*ld, ld, x, n, d, y + r*d);
    }
    switch (nq - r) {
        case 3: mad_values_block<3>(p + r*ld, ld, x, n, d, y + r*d); break;
        case 2: mad_values_block<2>(p + r*ld, ld, x, n, d, y + r*d); break;
        case 1: mad_values_block<1>(p + r*ld, ld, x, n, d, y + r*d); break;
    }
}
