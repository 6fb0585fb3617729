// Encoding of seqkv blocks, inline: SEQKV_LANES blocks at a time as structures of arrays, for the compiler to vectorise over
// blocks. Each lane is computed for itself, so a block's bytes do not depend on what is encoded beside it.
//
// A group of values (block.h) is coded as its gain, found near the root mean square, and the path through the trellis that is
// nearest to the values, found by the Viterbi algorithm: see tools/make_tables.py for the trellis and its source.
#pragma once

#include "decode.h"

#include <float.h>
#include <math.h>

#define SEQKV_LANES 16

#if defined(__GNUC__) || defined(_MSC_VER)
#    define SEQKV_RESTRICT __restrict
#else
#    define SEQKV_RESTRICT
#endif

// before a loop over the lanes: compilers would unroll it before they look for loops to vectorise
#if defined(__clang__)
#    define SEQKV_LANE_LOOP _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#    define SEQKV_LANE_LOOP _Pragma("GCC unroll 1")
#else
#    define SEQKV_LANE_LOOP
#endif

// Scratch of one group. First index: value of the group.
typedef struct {
    uint32_t levels[SEQKV_BLOCK][SEQKV_LANES]; // nearest level of each of the 4 subsets, one a byte
    uint32_t older [SEQKV_BLOCK][SEQKV_LANES]; // bit s: state s was reached from s >> 1 | 4, not from s >> 1
} seqkv_paths;

// One step of the trellis. State s: u_(i-1) | u_(i-2) << 1 | u_(i-3) << 2. Its predecessors differ in the oldest bit; d0 and
// d1 are the subsets of these two branches.
#define SEQKV_STEP(s, d0, d1)                               \
    {                                                       \
        const float a = cost[(s) >> 1][j]     + e[d0];      \
        const float b = cost[(s) >> 1 | 4][j] + e[d1];      \
        next[s][j] = b < a ? b : a;                         \
        bits      |= b < a ? 1u << (s) : 0;                 \
    }

SEQKV_FN void seqkv_step(const uint32_t * SEQKV_RESTRICT nearest, const float * SEQKV_RESTRICT z, const float * SEQKV_RESTRICT inv,
                         const float (* SEQKV_RESTRICT cost)[SEQKV_LANES], float (* SEQKV_RESTRICT next)[SEQKV_LANES],
                         uint32_t * SEQKV_RESTRICT levels, uint32_t * SEQKV_RESTRICT older, const int lanes) {
    // several loops: not every compiler vectorises the look-up, nor two clamps in a row, and these should not keep it from the rest
    float   t[SEQKV_LANES];
    int32_t k[SEQKV_LANES];
    SEQKV_LANE_LOOP
    for (int j = 0; j < lanes; ++j) {
        float f = z[j]*inv[j];
        f = f < 2048.0f ? f : 2048.0f; // reached only beyond the gain range: errors stay comparable
        f = f > -2048.0f ? f : -2048.0f;
        t[j] = f;
    }
    SEQKV_LANE_LOOP
    for (int j = 0; j < lanes; ++j) {
        float f = 2.0f*t[j] + 256.0f;
        f = f > 0.0f   ? f : 0.0f;
        f = f < 511.0f ? f : 511.0f;
        k[j] = (int32_t) f;
    }
#if defined(__AVX512F__)
    if (lanes == 16) {
        _mm512_storeu_si512(levels, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, _mm512_loadu_si512(k), nearest, 4));
    } else
#endif
#if defined(__AVX2__)
    for (int j = 0; j < lanes; j += 8) {
        const __m256i at = _mm256_loadu_si256((const __m256i *) (k + j));
        _mm256_storeu_si256((__m256i *) (levels + j), _mm256_i32gather_epi32((const int *) nearest, at, 4));
    }
#else
    SEQKV_LANE_LOOP
    for (int j = 0; j < lanes; ++j) {
        levels[j] = nearest[k[j]];
    }
#endif
    SEQKV_LANE_LOOP
    for (int j = 0; j < lanes; ++j) {
        const uint32_t l = levels[j];
        float e[4];
        e[0] = t[j] - (float) ((int32_t) (l << 24) >> 24);
        e[1] = t[j] - (float) ((int32_t) (l << 16) >> 24);
        e[2] = t[j] - (float) ((int32_t) (l <<  8) >> 24);
        e[3] = t[j] - (float) ((int32_t)  l        >> 24);
        e[0] *= e[0];
        e[1] *= e[1];
        e[2] *= e[2];
        e[3] *= e[3];
        uint32_t bits = 0;
        SEQKV_STEP(0, 0, 2)
        SEQKV_STEP(1, 2, 0)
        SEQKV_STEP(2, 2, 0)
        SEQKV_STEP(3, 0, 2)
        SEQKV_STEP(4, 1, 3)
        SEQKV_STEP(5, 3, 1)
        SEQKV_STEP(6, 3, 1)
        SEQKV_STEP(7, 1, 3)
        older[j] = bits;
    }
}
#undef SEQKV_STEP

// Best path of n values z (n, SEQKV_LANES) for each of the first `lanes` lanes, a constant: end[j] its last state, err[j] its squared error, in units of the levels.
SEQKV_FN void seqkv_search(const uint32_t * nearest, const float (*z)[SEQKV_LANES], int n, const float * inv,
                           seqkv_paths * paths, int32_t * end, float * err, const int lanes) {
    float cost[2][8][SEQKV_LANES];
    for (int s = 0; s < 8; ++s) {
        for (int j = 0; j < lanes; ++j) {
            cost[0][s][j] = s == 0 ? 0.0f : 1e30f; // a path begins in state 0; errors stay below 1e9
        }
    }
    for (int i = 0; i < n; i += 2) {
        seqkv_step(nearest, z[i],     inv, (const float (*)[SEQKV_LANES]) cost[0], cost[1], paths->levels[i],     paths->older[i],     lanes);
        seqkv_step(nearest, z[i + 1], inv, (const float (*)[SEQKV_LANES]) cost[1], cost[0], paths->levels[i + 1], paths->older[i + 1], lanes);
    }
    for (int j = 0; j < lanes; ++j) {
        err[j] = cost[0][0][j];
        end[j] = 0;
    }
    for (int s = 1; s < 8; ++s) {
        SEQKV_LANE_LOOP
        for (int j = 0; j < lanes; ++j) {
            end[j] = cost[0][s][j] < err[j] ? s : end[j];
            err[j] = cost[0][s][j] < err[j] ? cost[0][s][j] : err[j];
        }
    }
}

static inline const uint32_t * seqkv_nearest_table(int B) {
    switch (B) {
        case 1:  return seqkv_nearest1;
        case 2:  return seqkv_nearest2;
        case 3:  return seqkv_nearest3;
        case 4:  return seqkv_nearest4;
        case 5:  return seqkv_nearest5;
        default: return seqkv_nearest6;
    }
}

#define SEQKV_TRIES 3 // gains tried for a group

// A group: n values z (n, SEQKV_LANES) of B bits of each of n_blocks blocks -> gains[j] as stored and codes (SEQKV_LANES, SEQKV_BLOCK),
// the group's n. The tries of few blocks share the lanes.
static inline void seqkv_encode_group(int B, int graded, const float (*z)[SEQKV_LANES], int n, int n_blocks, uint8_t * gains,
                                      uint8_t (*codes)[SEQKV_BLOCK]) {
    const uint32_t * nearest = seqkv_nearest_table(B);
    const float    * gain    = graded ? seqkv_gain_graded : seqkv_gain;
    const int        steps   = graded ? SEQKV_GRADED_STEPS : SEQKV_GAIN_STEPS;
    const int        bias    = graded ? SEQKV_GRADED_BIAS  : SEQKV_GAIN_BIAS;
    const int        top     = graded ? 31 : 255;
    const float      unit    = seqkv_scale[B]*seqkv_shrink[B]; // least-squares factor of the levels

    float energy[SEQKV_LANES] = { 0.0f };
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < SEQKV_LANES; ++j) {
            energy[j] += z[i][j]*z[i][j];
        }
    }

    int   first[SEQKV_LANES];         // gain of the first try
    float best [SEQKV_LANES];         // squared error of what is kept; zeros to begin with
    int   kept [SEQKV_LANES] = { 0 }; // which try that is
    int32_t state[SEQKV_LANES] = { 0 };
    for (int j = 0; j < n_blocks; ++j) {
        const float e = energy[j] < 1e-30f ? 0.0f : floorf(0.5f*steps*log2f(energy[j]/n));
        first[j] = (int) e + bias;
        best[j]  = energy[j] < 1e-30f ? -1.0f : energy[j];
        gains[j] = 0;
    }

    // try t: block t % n_blocks with the first gain, the next and the one before
    static const int offset[SEQKV_TRIES] = { 0, 1, -1 };
    seqkv_paths paths[SEQKV_TRIES];
    const int n_tries = SEQKV_TRIES*n_blocks;
    for (int t0 = 0; t0 < n_tries; t0 += SEQKV_LANES) {
        int     g  [SEQKV_LANES];
        float   s  [SEQKV_LANES], inv[SEQKV_LANES], err[SEQKV_LANES];
        int32_t end[SEQKV_LANES];
        float   zt [SEQKV_BLOCK][SEQKV_LANES];
        int     block[SEQKV_LANES];
        const int lanes = n_tries - t0 > SEQKV_LANES/2 ? SEQKV_LANES : SEQKV_LANES/2;
        for (int j = 0; j < lanes; ++j) {
            const int t = t0 + j < n_tries ? t0 + j : n_tries - 1;
            block[j] = t % n_blocks;
            g[j]     = first[block[j]] + offset[t/n_blocks];
            g[j]     = g[j] < 1 ? 1 : g[j] > top ? top : g[j];
            s[j]     = gain[g[j]]*unit;
            inv[j]   = 1.0f/s[j];
        }
        if (n_blocks < SEQKV_LANES) {
            for (int i = 0; i < n; ++i) {
                for (int j = 0; j < lanes; ++j) {
                    zt[i][j] = z[i][block[j]];
                }
            }
        }
        const float (*values)[SEQKV_LANES] = n_blocks < SEQKV_LANES ? (const float (*)[SEQKV_LANES]) zt : z;
        if (lanes == SEQKV_LANES) {
            seqkv_search(nearest, values, n, inv, &paths[t0/SEQKV_LANES], end, err, SEQKV_LANES);
        } else { // few blocks, as in decode
            seqkv_search(nearest, values, n, inv, &paths[t0/SEQKV_LANES], end, err, SEQKV_LANES/2);
        }

        for (int j = 0; j < SEQKV_LANES && t0 + j < n_tries; ++j) {
            const int   b = block[j];
            const float e = err[j]*(s[j]*s[j]);
            if (e < best[b]) {
                best[b]  = e;
                gains[b] = (uint8_t) g[j];
                kept[b]  = t0 + j;
                state[b] = end[j];
            }
        }
    }

    // back along the paths
    const int8_t * level = seqkv_level_table(B);
    uint8_t index[256]; // level, as a byte -> place in its subset
    for (int l = 0; l < 2 << B; ++l) {
        index[(uint8_t) level[l]] = (uint8_t) (l >> 2);
    }
    const uint32_t * levels[SEQKV_LANES], * older[SEQKV_LANES];
    for (int j = 0; j < n_blocks; ++j) {
        levels[j] = &paths[kept[j]/SEQKV_LANES].levels[0][kept[j]%SEQKV_LANES];
        older[j]  = &paths[kept[j]/SEQKV_LANES].older [0][kept[j]%SEQKV_LANES];
    }
    for (int i = n - 1; i >= 0; --i) {
        for (int j = 0; j < n_blocks; ++j) {
            const uint32_t s      = (uint32_t) state[j];
            const uint32_t oldest = older[j][i*SEQKV_LANES] >> s & 1;
            const uint32_t subset = (s >> 2 & 1) | ((s ^ s >> 1 ^ oldest) & 1) << 1;
            codes[j][i] = (uint8_t) ((s & 1) | index[levels[j][i*SEQKV_LANES] >> 8*subset & 255] << 1);
            state[j]    = (int32_t) (s >> 1 | oldest << 2);
        }
    }
    for (int j = 0; j < n_blocks; ++j) {
        for (int i = 0; gains[j] == 0 && i < n; ++i) {
            codes[j][i] = 0;
        }
    }
}

// n blocks, n <= SEQKV_LANES: 64 values at each x[j] -> seqkv_block_bytes() bytes at each dst[j].
// Non-finite values count as 0, magnitudes end at 1e15.
static inline void seqkv_encode_blocks(int bits, int graded, const float * const * x, uint8_t * const * dst, int n) {
    float z[SEQKV_BLOCK][SEQKV_LANES] = { { 0.0f } };
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < SEQKV_BLOCK; ++i) {
            float v = fabsf(x[j][i]) <= FLT_MAX ? x[j][i] : 0.0f;
            v = v < 1e15f ? v : 1e15f;
            z[i][j] = v > -1e15f ? v : -1e15f;
        }
    }

    uint8_t gains[3][SEQKV_LANES] = { { 0 } };
    uint8_t codes[SEQKV_LANES][SEQKV_BLOCK] = { { 0 } };
    static const int begin[4] = { 0, 16, 32, 64 }; // groups of a graded block
    for (int k = 0; k < (graded ? 3 : 1); ++k) {
        const int B  = seqkv_value_bits(bits, graded, k);
        const int i0 = begin[k];
        if (B > 0) {
            seqkv_encode_group(B, graded, (const float (*)[SEQKV_LANES]) (z + i0), graded ? begin[k + 1] - i0 : SEQKV_BLOCK, n,
                               gains[k], (uint8_t (*)[SEQKV_BLOCK]) &codes[0][i0]);
        }
    }

    for (int j = 0; j < n; ++j) {
        uint8_t * out = dst[j];
        const int w = gains[0][j] | gains[1][j] << 5 | gains[2][j] << 10;
        *out++ = (uint8_t) w;
        if (graded) {
            *out++ = (uint8_t) (w >> 8);
        }
        for (int p = 0; p < 6; ++p) {
            for (int i = 0; i < seqkv_plane_values(bits, graded, p); i += 8) {
                uint64_t eight = 0; // codes, the first in the lowest byte; the product gathers bit p of each in its top byte
                for (int m = 7; m >= 0; --m) {
                    eight = eight << 8 | codes[j][i + m];
                }
                *out++ = (uint8_t) ((eight >> p & 0x0101010101010101u)*0x0102040810204080u >> 56);
            }
        }
    }
}
