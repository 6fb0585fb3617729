// Block formats of the seqkv types. native/format.md states every byte; this header is its C form, decode.h reads it.
//
// A block holds 64 values z of one head vector in its transform domain. Values with the same number of bits form a group
// with its own gain and its own run of the trellis:
//     z[i] ~ gain[group of i] * seqkv_scale[B] * level_B[l(i)]        B: bits of value i
// Two plans for each nominal b = 1..4:
//     uniform   all 64 values have b bits                                            seqkv1  .. seqkv4
//     graded    values 0..15 have b+2 bits, 16..31 b bits, 32..63 b-1 bits           seqkv1k .. seqkv4k
#pragma once

#include <assert.h>
#include <stdint.h>

#define SEQKV_BLOCK 64 // values per block
#define SEQKV_FRAME 64 // positions per frame

#ifndef __cplusplus
#ifndef static_assert
#define static_assert _Static_assert
#endif
#endif

// Uniform plan. Bit i%8 of qs[8*j + i/8] is bit j of code i; bit 0 of a code is the trellis path.
typedef struct {
    uint8_t gain;      // 2^((gain - 128)/4); 0: the block is all zeros
    uint8_t qs[8];     // planes of 64 bits
} block_seqkv1;
static_assert(sizeof(block_seqkv1) == 9, "seqkv1 block must be 9 bytes");

typedef struct {
    uint8_t gain;      // as in seqkv1
    uint8_t qs[16];
} block_seqkv2;
static_assert(sizeof(block_seqkv2) == 17, "seqkv2 block must be 17 bytes");

typedef struct {
    uint8_t gain;      // as in seqkv1
    uint8_t qs[24];
} block_seqkv3;
static_assert(sizeof(block_seqkv3) == 25, "seqkv3 block must be 25 bytes");

typedef struct {
    uint8_t gain;      // as in seqkv1
    uint8_t qs[32];
} block_seqkv4;
static_assert(sizeof(block_seqkv4) == 33, "seqkv4 block must be 33 bytes");

// Graded plan. Plane j holds bit j of the codes that have more than j bits, which are the first 64, 32 or 16 values.
typedef struct {
    uint8_t gain[2];   // little-endian word w: g_k = w >> 5*k & 31 of groups k = 0, 1, 2; gain 2^((g_k - 12)/3), 0: all zeros
    uint8_t qs[8];     // planes of 32, 16, 16 bits; values 32..63 have no bits and decode to 0
} block_seqkv1k;
static_assert(sizeof(block_seqkv1k) == 10, "seqkv1k block must be 10 bytes");

typedef struct {
    uint8_t gain[2];   // as in seqkv1k
    uint8_t qs[16];    // planes of 64, 32, 16, 16 bits
} block_seqkv2k;
static_assert(sizeof(block_seqkv2k) == 18, "seqkv2k block must be 18 bytes");

typedef struct {
    uint8_t gain[2];   // as in seqkv1k
    uint8_t qs[24];    // planes of 64, 64, 32, 16, 16 bits
} block_seqkv3k;
static_assert(sizeof(block_seqkv3k) == 26, "seqkv3k block must be 26 bytes");

typedef struct {
    uint8_t gain[2];   // as in seqkv1k
    uint8_t qs[32];    // planes of 64, 64, 64, 32, 16, 16 bits
} block_seqkv4k;
static_assert(sizeof(block_seqkv4k) == 34, "seqkv4k block must be 34 bytes");
