// Inner loops of the attention op over rows of head vectors, for each instruction set:
//     unpack_rows   blocks of a head -> floats
//     dot_rows      s = q k^T for a few queries, both along their rows: no transposition
//     mad_rows      y += p x for a few rows p
// The instruction set is that of the compilation; ggml builds this file once for each variant of its CPU backend.
#pragma once

#include "../decode.h"

#include "simd-mappings.h"

#include <cstdint>

// gcc 12 takes the undefined operands in its own AVX-512 intrinsics for ours (gcc bug 105593)
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX2__)
#    include <immintrin.h>
#elif defined(__aarch64__)
#    include <arm_neon.h>
#endif

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

    // factor of values 16*q .. 16*q + 15 of a block
    float of(const uint8_t * b, int q) const {
        return graded ? f[q < 2 ? q : 2][(b[0] | b[1] << 8) >> 5*(q < 2 ? q : 2) & 31] : f[0][b[0]];
    }
};
template <int bits, int graded> static const factor_table<bits, graded> block_factors;

// unpack_block: y[64] = the values of a block, with those of add[64] if summed. f: block_factors of the plan.

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

// levels of the indices l of values with B bits
template <int B> SEQKV_FN __m512i look_up(__m512i l) {
    const int8_t * level = seqkv_level_table(B);
    if (B == 0) {
        return _mm512_setzero_si512();
    }
    if (B == 6) {
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(level), l, _mm512_loadu_si512(level + 64));
    }
    return _mm512_permutexvar_epi8(l, _mm512_maskz_loadu_epi8(B >= 5 ? ~0ull : (1ull << (2 << B)%64) - 1, level));
}

template <int bits, int graded, bool summed>
SEQKV_FN void unpack_block(const uint8_t * b, const factor_table<bits, graded> & f, const float * add, float * y) {
    uint64_t q[7];
    seqkv_index_planes(bits, graded, b, q);

    __m512i l = _mm512_maskz_set1_epi8(q[0], 1);
    for (int j = 1; j <= bits + 2*graded; ++j) {
        l = _mm512_mask_add_epi8(l, q[j], l, _mm512_set1_epi8(1 << j));
    }
    __m512i levels = look_up<bits>(l);
    if (graded) {
        levels = _mm512_mask_blend_epi8(0x000000000000ffffull, levels, look_up<graded ? bits + 2 : bits>(l));
        levels = _mm512_mask_blend_epi8(0xffffffff00000000ull, levels, look_up<graded ? bits - 1 : bits>(l));
    }
    const __m128i part[4] = {
        _mm512_castsi512_si128(levels),           _mm512_extracti32x4_epi32(levels, 1),
        _mm512_extracti32x4_epi32(levels, 2),     _mm512_extracti32x4_epi32(levels, 3),
    };
    for (int k = 0; k < 4; ++k) {
        const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[k]));
        const __m512 s = _mm512_set1_ps(f.of(b, k));
        _mm512_storeu_ps(y + 16*k, summed ? _mm512_fmadd_ps(s, x, _mm512_loadu_ps(add + 16*k)) : _mm512_mul_ps(s, x));
    }
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

template <int bits, int graded, bool summed>
SEQKV_FN void unpack_block(const uint8_t * b, const factor_table<bits, graded> & f, const float * add, float * y) {
    using map = plane_map<bits, graded>;
    const auto & to = block_shuffles<bits, graded>;
    const auto read     = [&](int at, int n) { // 16 or 8 bytes of the planes, in each half
        const uint8_t * p = b + 1 + graded + at;
        return n == 16 ? _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)) : _mm256_set1_epi64x((long long) load_word(p));
    };
    __m256 s[4];
    for (int k = 0; k < 4; ++k) {
        s[k] = _mm256_set1_ps(f.of(b, k)); // before y is written, which may be anything to the compiler
    }

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
    for (int k = 0; k < 4; ++k) {
        const __m128i part = k < 2 ? _mm256_castsi256_si128(levels[k]) : _mm256_extracti128_si256(levels[k - 2], 1);
        const __m256  z[2] = { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part)),
                               _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(part, 8))) };
        for (int i = 0; i < 2; ++i) {
            const int o = 16*k + 8*i;
#if defined(__FMA__)
            _mm256_storeu_ps(y + o, summed ? _mm256_fmadd_ps(s[k], z[i], _mm256_loadu_ps(add + o)) : _mm256_mul_ps(s[k], z[i]));
#else
            _mm256_storeu_ps(y + o, summed ? _mm256_add_ps(_mm256_mul_ps(s[k], z[i]), _mm256_loadu_ps(add + o)) : _mm256_mul_ps(s[k], z[i]));
#endif
        }
    }
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

// Values 16*g .. 16*g + 15 of a block, B bits each. planes: the bytes with index planes 0 and 1, 2 and 3, 4 .. 6; s: factor
template <int B, int bits, int graded, bool summed>
SEQKV_FN void unpack16(int g, const uint8x16_t * planes, float s, const float * add, float * y) {
    static constexpr shuffles<bits, graded> to;
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    uint8x16_t l = vdupq_n_u8(0);
    for (int j = B; B > 0 && j >= 0; --j) {
        const uint8x16_t mask = vtstq_u8(vqtbl1q_u8(planes[j < 2 ? 0 : j < 4 ? 1 : 2], vld1q_u8(to.at[g][j])), bit);
        l = vsliq_n_u8(mask, l, 1);
    }
    const int8x16_t lv = look_up<B>(l);
    const int16x8_t half[2] = { vmovl_s8(vget_low_s8(lv)), vmovl_high_s8(lv) };
    for (int i = 0; i < 16; i += 4) {
        const int16x8_t   h = half[i/8];
        const float32x4_t x = vcvtq_f32_s32(i%8 ? vmovl_high_s16(h) : vmovl_s16(vget_low_s16(h)));
        const int         o = 16*g + i;
        vst1q_f32(y + o, summed ? vfmaq_n_f32(vld1q_f32(add + o), x, s) : vmulq_n_f32(x, s));
    }
}

template <int bits, int graded, bool summed>
SEQKV_FN void unpack_block(const uint8_t * b, const factor_table<bits, graded> & f, const float * add, float * y) {
    using map = plane_map<bits, graded>;
    const uint8_t * p = b + 1 + graded;
    const float s[4] = { f.of(b, 0), f.of(b, 1), f.of(b, 2), f.of(b, 3) }; // before y is written, which may be anything to the compiler

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
    unpack16<graded ? bits + 2 : bits, bits, graded, summed>(0, planes, s[0], add, y);
    unpack16<bits,                     bits, graded, summed>(1, planes, s[1], add, y);
    unpack16<graded ? bits - 1 : bits, bits, graded, summed>(2, planes, s[2], add, y);
    unpack16<graded ? bits - 1 : bits, bits, graded, summed>(3, planes, s[3], add, y);
}

#else

template <int bits, int graded, bool summed>
SEQKV_FN void unpack_block(const uint8_t * b, const factor_table<bits, graded> &, const float * add, float * y) {
    seqkv_decode_block(bits, graded, b, y);
    for (int i = 0; summed && i < SEQKV_BLOCK; ++i) {
        y[i] += add[i];
    }
}

#endif

// as unpack_rows for one block of every row, b .. and y ..; pred only if summed
template <int bits, int graded, bool summed>
static void unpack_column(const char * b, size_t stride, const bool * live, int n, const float * pred, const int32_t * meta, int d, float * y) {
    const auto & f = block_factors<bits, graded>;
    for (int j = 0; j < n; ++j, b += stride, y += d) {
        if (live[j]) {
            unpack_block<bits, graded, summed>((const uint8_t *) b, f, summed ? pred + (meta[j] & 255)*d : nullptr, y);
        } else {
            for (int i = 0; i < SEQKV_BLOCK; ++i) {
                y[i] = 0.0f;
            }
        }
    }
}

// Rows of a tile: row j at src + j*stride -> y (n, d), zeros where live[j] is not set. pred (64, d): prediction by offset
// (meta[j] & 255) that is added to rows of a graded plan, or NULL.
static void unpack_rows(int bits, int graded, const char * src, size_t stride, const bool * live, int n, const float * pred, const int32_t * meta,
        int d, float * y) {
    static constexpr decltype(&unpack_column<1, 0, false>) columns[4][3] = {
        { unpack_column<1, 0, false>, unpack_column<1, 1, false>, unpack_column<1, 1, true> },
        { unpack_column<2, 0, false>, unpack_column<2, 1, false>, unpack_column<2, 1, true> },
        { unpack_column<3, 0, false>, unpack_column<3, 1, false>, unpack_column<3, 1, true> },
        { unpack_column<4, 0, false>, unpack_column<4, 1, false>, unpack_column<4, 1, true> },
    };
    const auto unpack = columns[bits - 1][graded ? 1 + (pred != nullptr) : 0];
    for (int i = 0; i < d; i += SEQKV_BLOCK, src += seqkv_block_bytes(bits, graded)) {
        unpack(src, stride, live, n, pred ? pred + i : nullptr, meta, d, y + i);
    }
}

//
// products
//

#if defined(__AVX512F__)
typedef __m512 vec;
static constexpr int VEC = 16, DOT_K = 4, MAD_N = 4; // floats in a vector, rows of k and vectors of y held in registers at a time
static inline vec vload(const float * x) { return _mm512_loadu_ps(x); }
static inline void vstore(float * x, vec a) { _mm512_storeu_ps(x, a); }
static inline vec vset1(float x) { return _mm512_set1_ps(x); }
static inline vec vmad(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); } // a*b + c
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
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
static inline void vstore(float * x, vec a) { _mm256_storeu_ps(x, a); }
static inline vec vset1(float x) { return _mm256_set1_ps(x); }
static inline vec vmad(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
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
static inline void vstore(float * x, vec a) { vst1q_f32(x, a); }
static inline vec vset1(float x) { return vdupq_n_f32(x); }
static inline vec vmad(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline vec vmax(vec a, vec b) { return vmaxq_f32(a, b); }
static inline void sums4(float * x, vec a, vec b, vec c, vec d) { vst1q_f32(x, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
#else
// for the compiler to make something of
struct vec { float x[4]; };
static constexpr int VEC = 4, DOT_K = 2, MAD_N = 2;
static inline vec vload(const float * x) { return { { x[0], x[1], x[2], x[3] } }; }
static inline void vstore(float * x, vec a) { memcpy(x, a.x, sizeof(a.x)); }
static inline vec vset1(float x) { return { { x, x, x, x } }; }
static inline vec vmad(vec a, vec b, vec c) {
    return { { a.x[0]*b.x[0] + c.x[0], a.x[1]*b.x[1] + c.x[1], a.x[2]*b.x[2] + c.x[2], a.x[3]*b.x[3] + c.x[3] } };
}
static inline vec vmax(vec a, vec b) {
    for (int i = 0; i < 4; ++i) {
        a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    }
    return a;
}
static inline void sums4(float * x, vec a, vec b, vec c, vec d) {
    const vec v[4] = { a, b, c, d };
    for (int i = 0; i < 4; ++i) {
        x[i] = (v[i].x[0] + v[i].x[1]) + (v[i].x[2] + v[i].x[3]);
    }
}
#endif

// maximum of n values, n a multiple of 16
static float row_max(const float * x, int n) {
    vec m = vload(x);
    for (int i = VEC; i < n; i += VEC) {
        m = vmax(m, vload(x + i));
    }
    float lane[VEC];
    vstore(lane, m);
    for (int w = VEC/2; w > 0; w /= 2) {
        for (int i = 0; i < w; ++i) {
            lane[i] = lane[i + w] > lane[i] ? lane[i + w] : lane[i];
        }
    }
    return lane[0];
}

// s (NQ, ld) = q (NQ, d) k^T, k (n, d); n a multiple of 4, d of 64
template <int NQ> static void dot_block(const float * q, const float * k, int n, int d, float * s, int ld) {
    static_assert(DOT_K == 2 || DOT_K == 4, "sums4 adds up four vectors");
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
        if (DOT_K == 4) {
            for (int r = 0; r < NQ; ++r) {
                sums4(s + r*ld + j, sum[r][0], sum[r][1], sum[r][DOT_K - 2], sum[r][DOT_K - 1]);
            }
            continue;
        }
        for (int r = 0; r < NQ; r += 2) {
            const int other = r + 1 < NQ ? r + 1 : r;
            float x[4];
            sums4(x, sum[r][0], sum[r][1], sum[other][0], sum[other][1]);
            memcpy(s + r*ld + j,     x,     2*sizeof(float));
            memcpy(s + other*ld + j, x + 2, 2*sizeof(float));
        }
    }
}

// s (nq, ld) = q (nq, d) k^T, k (n, d); n a multiple of 4, d of 64
static void dot_rows(const float * q, const float * k, int nq, int n, int d, float * s, int ld) {
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
            }
            for (int r = 0; r < NQ; ++r) {
                const vec pv = vset1(p[r*ld + j]);
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
