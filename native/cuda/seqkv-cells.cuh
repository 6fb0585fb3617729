// Cells: one value of other types, and one block of the seqkv types by one thread: int8 levels in stored order (seqkv-unpack.cuh)
// and the factors of its groups.
#pragma once

#include "seqkv-common.cuh"
#include "seqkv-unpack.cuh"

#include "../../ggml-cuda/dequantize.cuh"

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

// block at a byte of raw words -> 16 words of levels in stored order
template <int bits, int graded> SEQKV_FN void unpack_raw(const uint32_t * raw, int byte, uint32_t & gain, uint32_t * out) {
    const uint32_t at = byte + 1 + graded;
    gain = raw[(uint32_t) byte/4] >> 8*(byte & 3);
    if (graded && (byte & 3) == 3) {
        gain = (gain & 255) | raw[(uint32_t) byte/4 + 1] << 8;
    }
    const uint32_t shift = at%4*8;
    uint32_t w[2*bits];
    uint32_t x = raw[at/4];
#pragma unroll
    for (int i = 0; i < 2*bits; ++i) {
        const uint32_t y = i < 2*bits - 1 || shift ? raw[at/4 + i + 1] : 0;
        w[i] = __funnelshift_r(x, y, shift);
        x = y;
    }
    seqkv_unpack_block<bits, graded>(w, out);
}

// 2^((g - bias)*step), 0 for 0
SEQKV_FN float gain_of(uint32_t g, float step, int bias) {
    const float x = __uint_as_float(0x4b000000 | g) - (8388608.0f + bias); // g < 2^23: an exact conversion
    return g ? exp2f(x*step) : 0.0f;
}

// One row's block: levels -> dst, factors of its groups -> factor[3]
template <int bits, int graded> SEQKV_FN void decode_block(const uint32_t * raw, int byte, uint32_t * out, float (&factor)[3]) {
    uint32_t gain;
    unpack_raw<bits, graded>(raw, byte, gain, out);
    if (graded) {
        factor[0] = gain_of(gain       & 31, 1.0f/SEQKV_GRADED_STEPS, SEQKV_GRADED_BIAS)*seqkv_scale[bits + 2];
        factor[1] = gain_of(gain >>  5 & 31, 1.0f/SEQKV_GRADED_STEPS, SEQKV_GRADED_BIAS)*seqkv_scale[bits];
        factor[2] = gain_of(gain >> 10 & 31, 1.0f/SEQKV_GRADED_STEPS, SEQKV_GRADED_BIAS)*seqkv_scale[bits - 1];
    } else {
        factor[0] = factor[1] = factor[2] = gain_of(gain & 255, 1.0f/SEQKV_GAIN_STEPS, SEQKV_GAIN_BIAS)*seqkv_scale[bits];
    }
}

SEQKV_FN void decode_any(int bits, int graded, const uint32_t * raw, int byte, uint32_t * out, float (&factor)[3]) {
    switch (bits << 1 | graded) {
        case 2:  decode_block<1, 0>(raw, byte, out, factor); break;
        case 3:  decode_block<1, 1>(raw, byte, out, factor); break;
        case 4:  decode_block<2, 0>(raw, byte, out, factor); break;
        case 5:  decode_block<2, 1>(raw, byte, out, factor); break;
        case 6:  decode_block<3, 0>(raw, byte, out, factor); break;
        case 7:  decode_block<3, 1>(raw, byte, out, factor); break;
        case 8:  decode_block<4, 0>(raw, byte, out, factor); break;
        default: decode_block<4, 1>(raw, byte, out, factor); break;
    }
}

// One row's uniform block: levels -> dst
SEQKV_FN void decode_levels(int bits, const uint32_t * raw, int byte, uint32_t * out) {
    uint32_t gain;
    switch (bits) {
        case 1:  unpack_raw<1, 0>(raw, byte, gain, out); break;
        case 2:  unpack_raw<2, 0>(raw, byte, gain, out); break;
        case 3:  unpack_raw<3, 0>(raw, byte, gain, out); break;
        default: unpack_raw<4, 0>(raw, byte, gain, out); break;
    }
}
// scale of the levels of uniform blocks
SEQKV_FN float seqkv_scale_of(int bits) { return bits == 1 ? seqkv_scale[1] : bits == 2 ? seqkv_scale[2] : bits == 3 ? seqkv_scale[3] : seqkv_scale[4]; }
