#include "seqkv.h"
#include "encode.h"

#include <string.h>

const char * seqkv_strerror(int64_t status) {
    switch (status) {
        case SEQKV_EBITS:   return "bits must be 1, 2, 3 or 4";
        case SEQKV_ELENGTH: return "length must be a positive multiple of 64 and the buffer large enough";
        case SEQKV_ESHAPE:  return "heads, head_dim, tokens, offsets or copies are out of their ranges";
        case SEQKV_EDATA:   return "the coded bytes are damaged";
        default:            return status >= 0 ? "ok" : "unknown status";
    }
}

int64_t seqkv_bound(int bits, int graded, int64_t n) {
    if (bits < 1 || bits > 4) {
        return SEQKV_EBITS;
    }
    return n <= 0 || n % SEQKV_BLOCK != 0 || n > INT64_MAX/64 ? SEQKV_ELENGTH : n/SEQKV_BLOCK*seqkv_block_bytes(bits, !!graded);
}

// seqkv_bound, or a status if the buffer is smaller
static int64_t checked_size(int bits, int graded, int64_t n, int64_t n_buffer) {
    const int64_t size = seqkv_bound(bits, graded, n);
    return size > n_buffer ? SEQKV_ELENGTH : size;
}

int64_t seqkv_quantize(int bits, int graded, const float * x, int64_t n, void * dst, int64_t n_dst) {
    const int64_t size = checked_size(bits, graded, n, n_dst);
    if (size < 0) {
        return size;
    }
    const int64_t n_blocks = n/SEQKV_BLOCK;
    for (int64_t b = 0; b < n_blocks; b += SEQKV_LANES) {
        const int lanes = n_blocks - b < SEQKV_LANES ? (int) (n_blocks - b) : SEQKV_LANES;
        const float * src[SEQKV_LANES];
        uint8_t     * out[SEQKV_LANES];
        for (int j = 0; j < lanes; ++j) {
            src[j] = x + (b + j)*SEQKV_BLOCK;
            out[j] = (uint8_t *) dst + (b + j)*(size/n_blocks);
        }
        seqkv_encode_blocks(bits, !!graded, src, out, lanes);
    }
    return size;
}

static void decode_block(int bits, int graded, const uint8_t * block, float * y) {
    switch (bits << 1 | graded) {
        case 2:  seqkv_decode_block(1, 0, block, y); break;
        case 3:  seqkv_decode_block(1, 1, block, y); break;
        case 4:  seqkv_decode_block(2, 0, block, y); break;
        case 5:  seqkv_decode_block(2, 1, block, y); break;
        case 6:  seqkv_decode_block(3, 0, block, y); break;
        case 7:  seqkv_decode_block(3, 1, block, y); break;
        case 8:  seqkv_decode_block(4, 0, block, y); break;
        default: seqkv_decode_block(4, 1, block, y); break;
    }
}

int64_t seqkv_dequantize(int bits, int graded, const void * src, int64_t n_src, float * y, int64_t n) {
    const int64_t size = checked_size(bits, graded, n, n_src);
    if (size < 0) {
        return size;
    }
    const int64_t n_blocks = n/SEQKV_BLOCK;
    for (int64_t b = 0; b < n_blocks; ++b) {
        decode_block(bits, !!graded, (const uint8_t *) src + b*(size/n_blocks), y + b*SEQKV_BLOCK);
    }
    return size;
}

int64_t seqkv_unpack(int bits, int graded, const void * src, int64_t n_src, uint8_t * codes, uint8_t * gains, int64_t n) {
    const int64_t size = checked_size(bits, graded, n, n_src);
    if (size < 0) {
        return size;
    }
    const int64_t n_blocks = n/SEQKV_BLOCK;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const uint8_t * block = (const uint8_t *) src + b*(size/n_blocks);
        memset(codes + b*SEQKV_BLOCK, 0, SEQKV_BLOCK);
        for (int j = 0; j < 6; ++j) {
            const uint64_t plane = seqkv_plane(bits, !!graded, block, j);
            for (int i = 0; i < SEQKV_BLOCK; ++i) {
                codes[b*SEQKV_BLOCK + i] |= (uint8_t) ((plane >> i & 1) << j);
            }
        }
        for (int k = 0; k < 3; ++k) {
            gains[3*b + k] = graded ? (block[0] | block[1] << 8) >> 5*k & 31 : k == 0 ? block[0] : 0;
        }
    }
    return size;
}
