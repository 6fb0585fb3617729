// Cells: one value of other types, and one block of the seqkv types by one thread: int8 levels in stored order (seqkv-unpack.cuh)
// and the factors of its groups.
#pragma once

#include "seqkv-common.cuh"
#include "seqkv-unpack.cuh"

#include "../../ggml-cuda/dequantize.cuh"

#include <utility>

// value i of a head of another type
SEQKV_FN float other_value(ggml_type type, const char * src, int i) {
    float2 v = make_float2(0.0f, 0.0f); // values iqs and iqs + 16 of a block of 32, for Q8_0 iqs and iqs + 1
    const int ib = i/32, j = i%32;
    switch (type) {
        case GGML_TYPE_F32:  return ((const float *) src)[i];
        case GGML_TYPE_F16:  return __half2float(((const half *) src)[i]);
        case GGML_TYPE_BF16: return __bfloat162float(((const nv_bfloat16 *) src)[i]);
        case GGML_TYPE_Q8_0: {
            const block_q8_0 & b = ((const block_q8_0 *) src)[ib];
            return __half2float(b.d)*b.qs[j];
        }
        case GGML_TYPE_IQ4_NL: {
            const block_iq4_nl & b = ((const block_iq4_nl *) src)[ib];
            return __half2float(b.d)*kvalues_iq4nl[j < 16 ? b.qs[j] & 15 : b.qs[j - 16] >> 4];
        }
        case GGML_TYPE_Q4_0: dequantize_q4_0(src, ib, j % 16, v); break;
        case GGML_TYPE_Q4_1: dequantize_q4_1(src, ib, j % 16, v); break;
        case GGML_TYPE_Q5_0: dequantize_q5_0(src, ib, j % 16, v); break;
        case GGML_TYPE_Q5_1: dequantize_q5_1(src, ib, j % 16, v); break;
        default: break;
    }
    return j < 16 ? v.x : v.y;
}

// N words of shared memory. Rows of a warp's lanes begin in a fourth of the banks; CROSSED: lanes from 16 on read neighbouring words in the other order.
template <int N, bool CROSSED> SEQKV_FN void read_words(const uint32_t * raw, uint32_t (&x)[N]) {
    if constexpr (CROSSED) {
        const int upper = threadIdx.x >> 4 & 1;
        const uint32_t * a = raw + upper, * b = raw + 1 - upper;
#pragma unroll
        for (int i = 0; i + 1 < N; i += 2) {
            const uint32_t u = a[i], v = b[i];
            x[i]     = upper ? v : u;
            x[i + 1] = upper ? u : v;
        }
        if (N%2) {
            x[N - 1] = raw[N - 1];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = raw[i];
        }
    }
}

// words of a block's planes and its gains from a byte of raw words
template <int bits, int graded, bool CROSSED = false> SEQKV_FN void read_block(const uint32_t * raw, uint32_t byte, uint32_t & gain, uint32_t (&w)[2*bits]) {
    raw += byte/4;
    uint32_t shift = byte%4*8;
    if constexpr (!graded) {
        uint32_t x[2*bits + 1];
        read_words<2*bits + 1, CROSSED>(raw, x);
        gain = x[0] >> shift;
        shift += 8; // of 32 the next word is the result
#pragma unroll
        for (int i = 0; i < 2*bits; ++i) {
            w[i] = __funnelshift_rc(x[i], x[i + 1], shift);
        }
    } else {
        gain = raw[0] >> shift;
        if (byte%4 == 3) {
            gain = (gain & 255) | raw[1] << 8;
        }
        raw  += byte%4/2;
        shift = (byte + 2)%4*8;
        uint32_t x[2*bits];
        read_words<2*bits, CROSSED>(raw, x);
        const uint32_t last = shift ? raw[2*bits] : 0;
#pragma unroll
        for (int i = 0; i < 2*bits; ++i) {
            w[i] = __funnelshift_r(x[i], i < 2*bits - 1 ? x[i + 1] : last, shift);
        }
    }
}

// 2^((g - bias)*step), 0 for 0
SEQKV_FN float gain_of(uint32_t g, float step, int bias) {
    const float x = __uint_as_float(0x4b000000 | g) - (8388608.0f + bias); // g < 2^23: an exact conversion
    return g ? exp2f(x*step) : 0.0f;
}

// factors of a block's groups from its gains
template <int bits, int graded> SEQKV_FN void factors_of(uint32_t gain, float (&factor)[3]) {
    if (graded) {
        factor[0] = gain_of(gain       & 31, 1.0f/SEQKV_GRADED_STEPS, SEQKV_GRADED_BIAS)*seqkv_scale[bits + 2];
        factor[1] = gain_of(gain >>  5 & 31, 1.0f/SEQKV_GRADED_STEPS, SEQKV_GRADED_BIAS)*seqkv_scale[bits];
        factor[2] = gain_of(gain >> 10 & 31, 1.0f/SEQKV_GRADED_STEPS, SEQKV_GRADED_BIAS)*seqkv_scale[bits - 1];
    } else {
        factor[0] = factor[1] = factor[2] = gain_of(gain & 255, 1.0f/SEQKV_GAIN_STEPS, SEQKV_GAIN_BIAS)*seqkv_scale[bits];
    }
}

// A block's tables of levels in shared memory, its groups one after the other, each on 16 bytes
static constexpr int TABLE_WORDS = 32;
SEQKV_CONSTEXPR int table_at(int bits, int graded, int group) {
    int at = 0;
    for (int k = 0; k < group; ++k) {
        at += (seqkv_table_words(!graded ? bits : k == 0 ? bits + 2 : k == 1 ? bits : bits - 1) + 3) & ~3;
    }
    return at;
}
struct level_tables {
    uint32_t word[8][TABLE_WORDS]; // bits - 1, graded
};
template <int B, int... i> constexpr void add_level_words(uint32_t * word, std::integer_sequence<int, i...>) {
    ((word[i] = seqkv_level_words<B, i>::value), ...);
}
template <int B> constexpr void add_level_table(level_tables & t, int bits, int graded, int group) {
    add_level_words<B>(t.word[2*(bits - 1) + graded] + table_at(bits, graded, group), std::make_integer_sequence<int, seqkv_table_words(B)>());
}
template <int bits> constexpr void add_level_tables(level_tables & t) {
    add_level_table<bits>    (t, bits, 0, 0);
    add_level_table<bits + 2>(t, bits, 1, 0);
    add_level_table<bits>    (t, bits, 1, 1);
    if constexpr (bits > 1) {
        add_level_table<bits - 1>(t, bits, 1, 2);
    }
}
constexpr level_tables all_level_tables() {
    level_tables t = {};
    add_level_tables<1>(t);
    add_level_tables<2>(t);
    add_level_tables<3>(t);
    add_level_tables<4>(t);
    return t;
}
static __device__ constexpr level_tables seqkv_level_tables = all_level_tables();

// words_k words of the tables of keys, words_v of those of values behind them; by n_threads threads, which synchronize afterwards
SEQKV_FN void load_level_tables(int bits_k, int graded_k, int bits_v, uint32_t * table, int words_k, int words_v, int thread, int n_threads) {
    for (int i = thread; i < words_k + words_v; i += n_threads) {
        table[i] = i < words_k ? seqkv_level_tables.word[2*(bits_k - 1) + graded_k][i] : seqkv_level_tables.word[2*(bits_v - 1)][i - words_k];
    }
}
// ... of one live type, of keys and behind them of values, by a warp: words in the code, which are at hand before those in memory would be
template <int bits, int graded> SEQKV_FN void make_level_tables(uint32_t * table, int lane) {
    constexpr int words_k = table_at(bits, graded, 3), words_v = table_at(bits, 0, 1);
    uint32_t k = 0, v = 0;
#pragma unroll
    for (int i = 0; i < words_k; ++i) {
        k = lane == i ? seqkv_level_tables.word[2*(bits - 1) + graded][i] : k;
    }
#pragma unroll
    for (int i = 0; i < words_v; ++i) {
        v = lane == i ? seqkv_level_tables.word[2*(bits - 1)][i] : v;
    }
    if (lane < words_k) {
        table[lane] = k;
    }
    if (lane < words_v) {
        table[words_k + lane] = v;
    }
}
template <int B> SEQKV_FN void read_level_table(const uint32_t * table, seqkv_registers<B> & t) {
    constexpr int n = seqkv_table_words(B);
#pragma unroll
    for (int i = 0; i < n; i += 4) {
        const uint4 x = *(const uint4 *) (table + i);
        t.w[i] = x.x;
        if (i + 1 < n) { t.w[i + 1] = x.y; }
        if (i + 2 < n) { t.w[i + 2] = x.z; t.w[i + 3] = x.w; }
    }
}

// One row's block -> 16 words of levels in stored order and its gains. SHARED: with the tables of load_level_tables, otherwise with constants in the code.
template <int bits, int graded, bool SHARED, bool CROSSED = false> SEQKV_FN uint32_t decode_levels(const uint32_t * raw, int byte, const uint32_t * table, uint32_t * out) {
    uint32_t gain, w[2*bits];
    read_block<bits, graded, CROSSED>(raw, byte, gain, w);
    constexpr int B0 = graded ? bits + 2 : bits, B1 = bits, B2 = graded ? bits - 1 : bits;
    if constexpr (SHARED) {
        seqkv_registers<B0> t0;
        read_level_table<B0>(table, t0);
        if constexpr (graded) {
            seqkv_registers<B1> t1;
            seqkv_registers<B2> t2;
            read_level_table<B1>(table + table_at(bits, graded, 1), t1);
            if constexpr (B2 > 0) {
                read_level_table<B2>(table + table_at(bits, graded, 2), t2);
            }
            seqkv_unpack_block<bits, graded>(w, t0, t1, t2, out);
        } else {
            seqkv_unpack_block<bits, graded>(w, t0, t0, t0, out);
        }
    } else {
        seqkv_unpack_block<bits, graded>(w, seqkv_constants<B0>(), seqkv_constants<B1>(), seqkv_constants<B2>(), out);
    }
    return gain;
}

template <int bits, int graded, bool SHARED, bool CROSSED = false> SEQKV_FN void decode_block(const uint32_t * raw, int byte, const uint32_t * table, uint32_t * out, float (&factor)[3]) {
    factors_of<bits, graded>(decode_levels<bits, graded, SHARED, CROSSED>(raw, byte, table, out), factor);
}

// ... and the factors of its groups
template <bool SHARED = false> SEQKV_FN void decode_any(int bits, int graded, const uint32_t * raw, int byte, uint32_t * out, float (&factor)[3], const uint32_t * table = nullptr) {
    switch (bits << 1 | graded) {
        case 2:  decode_block<1, 0, SHARED>(raw, byte, table, out, factor); break;
        case 3:  decode_block<1, 1, SHARED>(raw, byte, table, out, factor); break;
        case 4:  decode_block<2, 0, SHARED>(raw, byte, table, out, factor); break;
        case 5:  decode_block<2, 1, SHARED>(raw, byte, table, out, factor); break;
        case 6:  decode_block<3, 0, SHARED>(raw, byte, table, out, factor); break;
        case 7:  decode_block<3, 1, SHARED>(raw, byte, table, out, factor); break;
        case 8:  decode_block<4, 0, SHARED>(raw, byte, table, out, factor); break;
        default: decode_block<4, 1, SHARED>(raw, byte, table, out, factor); break;
    }
}

// levels of a uniform block alone, with the tables of load_level_tables
SEQKV_FN void decode_uniform(int bits, const uint32_t * raw, int byte, uint32_t * out, const uint32_t * table) {
    switch (bits) {
        case 1:  decode_levels<1, 0, true>(raw, byte, table, out); break;
        case 2:  decode_levels<2, 0, true>(raw, byte, table, out); break;
        case 3:  decode_levels<3, 0, true>(raw, byte, table, out); break;
        default: decode_levels<4, 0, true>(raw, byte, table, out); break;
    }
}
// scale of the levels of uniform blocks
SEQKV_FN float seqkv_scale_of(int bits) { return bits == 1 ? seqkv_scale[1] : bits == 2 ? seqkv_scale[2] : bits == 3 ? seqkv_scale[3] : seqkv_scale[4]; }
