// Predictions of live blocks from what is decoded already, in integers. Internal to libseqkv; native/format.md has the formulas.
#pragma once

#include "seqkv.h"
#include "decode.h"
#include "entropy.h"

#define SEQKV_MAX_VALUE 4095 // largest magnitude of a z, an x and a prediction: 32 times unit variance
#define SEQKV_UNIT_KEY  12   // gain of graded blocks that is 1

static inline int32_t seqkv_clip(int32_t x, int32_t limit) {
    return x < -limit ? -limit : x > limit ? limit : x;
}

// logarithm of a gain over the one that counts as 1, in 1/48 octaves; gain 0 counts as the smallest
static inline int32_t seqkv_log_gain(int graded, int g, int unit) {
    g = g > 0 ? g : 1;
    return seqkv_clip(graded ? 16*(g - unit) : 12*(g - unit), 288);
}

// rows of a layer
static inline int seqkv_k_groups(const seqkv_layer * l) { return l->n_head*(l->dk/SEQKV_BLOCK)*3; }
static inline int seqkv_v_groups(const seqkv_layer * l) { return l->n_head*(l->dv/SEQKV_BLOCK); }

// gain of group q of a row of keys or values
static inline int seqkv_k_gain(const uint8_t * row, int bits, int q) {
    const uint8_t * b = row + (q/3)*seqkv_block_bytes(bits, 1);
    return (b[0] | b[1] << 8) >> 5*(q%3) & 31;
}

static inline int seqkv_v_gain(const uint8_t * row, int bits, int q) {
    return row[q*seqkv_block_bytes(bits, 0)];
}

// One block -> z[64]. unit: the gain that counts as 1.
void seqkv_block_values(int bits, int graded, const uint8_t * block, int unit, int16_t * z);

// Rows of keys at their offsets, n <= 64 -> x (n, stride), of which n_head*dk count; one row of values -> z (n_head*dv)
void seqkv_key_inputs(const seqkv_layer * l, int bits, const uint8_t * const * row, const uint8_t * offset, int n, int16_t * x, int64_t stride);
void seqkv_value_inputs(const seqkv_layer * l, int bits, const uint8_t * row, int16_t * z);

// x (n, n_head*dk) -> z = E' R(offset) x, of the same shape; n <= 64
void seqkv_key_values(const seqkv_layer * l, const int16_t * x, const uint8_t * offset, int n, int16_t * z);

// Predictions out (n, n_out) from inputs (n, stride) of which n_in count, n <= 64; NULL weights: zeros.
void seqkv_predict(const seqkv_predictor * p, const int16_t * in, int stride, int n_in, int n, int16_t * out, int n_out);
