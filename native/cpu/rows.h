// Inner loops of the attention op over rows of head vectors, for each instruction set:
//     unpack_rows   blocks of a head -> floats
//     dot_rows      s = q k^T for a few queries, both along their rows: no transposition
//     mad_rows      y += p x for a few rows p
// The instruction set is that of the compilation; ggml builds this file once for each variant of its CPU backend.
#pragma once

#include "../decode.h"

#include "simd-mappings.h"

#include <cstdint>

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

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)

// levels of the indices l of values with B bits
template <int B> static inline __m512i look_up(__m512i l) {
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
static inline void unpack_block(const uint8_t * b, const factor_table<bits, graded> & f, const float * add, float * y) {
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

// Levels of 32 values from words of their index planes. Values 0..15 have B0 bits, the others B1 <= B0.
template <int B0, int B1> static inline __m256i levels32(const uint32_t * w) {
    if (B0 == 0) {
        return _mm256_setzero_si256();
    }
    const __m256i bit  = _mm256_set1_epi64x((long long) 0x8040201008040201u);
    const __m256i wide = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    __m256i l = _mm256_setzero_si256();
    for (int j = B0; j >= 0; --j) {
        const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) w[j]), wide), bit);
        l = _mm256_sub_epi8(_mm256_add_epi8(l, l), _mm256_cmpeq_epi8(bytes, bit));
    }
    const auto table = [](int B, int k) { // levels 16k .. of a table, its last 16 beyond its end
        const int8_t * level = seqkv_level_table(B);
        const int      n     = 2 << B;
        if (B == 0) {
            return _mm_setzero_si128();
        }
        if (n < 16) {
            int64_t few = 0;
            memcpy(&few, level, n);
            return _mm_set_epi64x(0, few);
        }
        return _mm_loadu_si128((const __m128i *) (level + (16*k < n ? 16*k : n - 16)));
    };
    constexpr int n_part = B0 < 3 ? 1 : 1 << (B0 - 3);
    const __m256i low = _mm256_and_si256(l, _mm256_set1_epi8(15));
    __m256i part[8];
    for (int k = 0; k < n_part; ++k) {
        part[k] = _mm256_shuffle_epi8(_mm256_set_m128i(table(B1, k), table(B0, k)), low);
    }
    for (int j = 4, n = n_part; n > 1; ++j, n /= 2) { // index bit j, moved to the top of its byte, chooses among the parts
        const __m256i mask = _mm256_sll_epi16(l, _mm_cvtsi32_si128(7 - j));
        for (int k = 0; k < n/2; ++k) {
            part[k] = _mm256_blendv_epi8(part[2*k], part[2*k + 1], mask);
        }
    }
    return part[0];
}

template <int bits, int graded, bool summed>
static inline void unpack_block(const uint8_t * b, const factor_table<bits, graded> & f, const float * add, float * y) {
    uint64_t q[7];
    seqkv_index_planes(bits, graded, b, q);
    alignas(32) int8_t lv[64];
    for (int half = 0; half < 2; ++half) {
        uint32_t w[7];
        for (int j = 0; j <= bits + 2*graded; ++j) {
            w[j] = (uint32_t) (q[j] >> 32*half);
        }
        constexpr int B0 = graded ? bits + 2 : bits, B2 = graded ? bits - 1 : bits;
        _mm256_store_si256((__m256i *) (lv + 32*half), half ? levels32<B2, B2>(w) : levels32<B0, bits>(w));
    }
    for (int i = 0; i < 64; i += 8) {
        const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (lv + i))));
        const __m256 s = _mm256_set1_ps(f.of(b, i/16));
#if defined(__FMA__)
        _mm256_storeu_ps(y + i, summed ? _mm256_fmadd_ps(s, x, _mm256_loadu_ps(add + i)) : _mm256_mul_ps(s, x));
#else
        _mm256_storeu_ps(y + i, summed ? _mm256_add_ps(_mm256_mul_ps(s, x), _mm256_loadu_ps(add + i)) : _mm256_mul_ps(s, x));
#endif
    }
}

#elif defined(__aarch64__)

// levels of the indices l of values with B bits
template <int B> static inline int8x16_t look_up(uint8x16_t l) {
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

// values 16*g .. 16*g + 15 of a block, B bits each, from its index planes
template <int B, bool summed> static inline void unpack16(int g, const uint64_t * q, float s, const float * add, float * y) {
    static const uint8_t bits[16] = { 1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128 };
    const uint8x16_t bit = vld1q_u8(bits);
    uint8x16_t l = vdupq_n_u8(0);
    for (int j = B; B > 0 && j >= 0; --j) {
        const uint8x16_t word = vcombine_u8(vdup_n_u8((uint8_t) (q[j] >> 16*g)), vdup_n_u8((uint8_t) (q[j] >> (16*g + 8))));
        l = vsubq_u8(vaddq_u8(l, l), vtstq_u8(word, bit));
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
static inline void unpack_block(const uint8_t * b, const factor_table<bits, graded> & f, const float * add, float * y) {
    uint64_t q[7];
    seqkv_index_planes(bits, graded, b, q);
    unpack16<graded ? bits + 2 : bits, summed>(0, q, f.of(b, 0), add, y);
    unpack16<bits, summed>                    (1, q, f.of(b, 1), add, y);
    unpack16<graded ? bits - 1 : bits, summed>(2, q, f.of(b, 2), add, y);
    unpack16<graded ? bits - 1 : bits, summed>(3, q, f.of(b, 3), add, y);
}

#else

template <int bits, int graded, bool summed>
static inline void unpack_block(const uint8_t * b, const factor_table<bits, graded> &, const float * add, float * y) {
    seqkv_decode_block(bits, graded, b, y);
    for (int i = 0; summed && i < SEQKV_BLOCK; ++i) {
        y[i] += add[i];
    }
}

#endif

// Rows of a tile: row j at src + j*stride -> y (n, d), zeros where live[j] is not set. pred (64, d): prediction by offset
// (meta[j] & 255) that is added, or NULL.
template <int bits, int graded, bool summed>
static void unpack_column(const uint8_t * b, size_t stride, const bool * live, int n, const float * pred, const int32_t * meta, int d, float * y) {
    const auto & f = block_factors<bits, graded>;
    for (int j = 0; j < n; ++j, b += stride, y += d) {
        if (live[j]) {
            unpack_block<bits, graded, summed>(b, f, summed ? pred + (meta[j] & 255)*d : nullptr, y);
        } else {
            for (int i = 0; i < SEQKV_BLOCK; ++i) {
                y[i] = 0.0f;
            }
        }
    }
}

template <int bits, int graded>
static void unpack_plan(const char * src, size_t stride, const bool * live, int n, const float * pred, const int32_t * meta, int d, float * y) {
    for (int i = 0; i < d; i += SEQKV_BLOCK, src += seqkv_block_bytes(bits, graded)) {
        if (pred) {
            unpack_column<bits, graded, true >((const uint8_t *) src, stride, live, n, pred + i, meta, d, y + i);
        } else {
            unpack_column<bits, graded, false>((const uint8_t *) src, stride, live, n, nullptr,  meta, d, y + i);
        }
    }
}

static void unpack_rows(int bits, int graded, const char * src, size_t stride, const bool * live, int n, const float * pred, const int32_t * meta,
        int d, float * y) {
    switch (bits << 1 | graded) {
        case 2:  unpack_plan<1, 0>(src, stride, live, n, pred, meta, d, y); break;
        case 3:  unpack_plan<1, 1>(src, stride, live, n, pred, meta, d, y); break;
        case 4:  unpack_plan<2, 0>(src, stride, live, n, pred, meta, d, y); break;
        case 5:  unpack_plan<2, 1>(src, stride, live, n, pred, meta, d, y); break;
        case 6:  unpack_plan<3, 0>(src, stride, live, n, pred, meta, d, y); break;
        case 7:  unpack_plan<3, 1>(src, stride, live, n, pred, meta, d, y); break;
        case 8:  unpack_plan<4, 0>(src, stride, live, n, pred, meta, d, y); break;
        default: unpack_plan<4, 1>(src, stride, live, n, pred, meta, d, y); break;
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
    for (int j = 0; j < n; j += 4) {
        vec sum[NQ][4];
        for (int h = 0; h < 4; h += DOT_K) {
            const float * kh = k + (j + h)*d;
            for (int r = 0; r < NQ; ++r) {
                for (int c = 0; c < DOT_K; ++c) {
                    sum[r][h + c] = vset1(0.0f);
                }
            }
            for (int i = 0; i < d; i += VEC) {
                vec kv[DOT_K];
                for (int c = 0; c < DOT_K; ++c) {
                    kv[c] = vload(kh + c*d + i);
                }
                for (int r = 0; r < NQ; ++r) {
                    const vec qv = vload(q + r*d + i);
                    for (int c = 0; c < DOT_K; ++c) {
                        sum[r][h + c] = vmad(qv, kv[c], sum[r][h + c]);
                    }
                }
            }
        }
        for (int r = 0; r < NQ; ++r) {
            sums4(s + r*ld + j, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
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
