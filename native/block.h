// Block formats of the seqkv types. native/format.md states every byte; this header is its C form.
//
// A block holds 64 values z of one head vector in its transform domain as codes of a fixed codebook and one gain:
//     z[i] ~ seqkv_gain[gain] * codebook[code(i)]
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

typedef struct {
    uint8_t gain;     // index into seqkv_gain; 0: the block is all zeros
    uint8_t qs[16];   // 2-bit codes: value i at qs[i % 16], bits 2*(i/16) and up
} block_seqkv2;
static_assert(sizeof(block_seqkv2) == 17, "seqkv2 block must be 17 bytes");

typedef struct {
    uint8_t gain;     // index into seqkv_gain; 0: the block is all zeros
    uint8_t qs[16];   // low 2 bits of the codes, as in seqkv2
    uint8_t qh[8];    // high bit of code i at qh[i % 8], bit i/8
} block_seqkv3;
static_assert(sizeof(block_seqkv3) == 25, "seqkv3 block must be 25 bytes");

typedef struct {
    uint8_t gain;     // index into seqkv_gain; 0: the block is all zeros
    uint8_t qs[32];   // 4-bit codes: value i at qs[i % 32], bits 4*(i/32) and up
} block_seqkv4;
static_assert(sizeof(block_seqkv4) == 33, "seqkv4 block must be 33 bytes");
