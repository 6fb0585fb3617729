#include "seqkv.h"
#include "block.h"
#include "tables.h"

#include <math.h>
#include <string.h>

const char * seqkv_strerror(int64_t status) {
    switch (status) {
        case SEQKV_EBITS:   return "bits must be 2, 3 or 4";
        case SEQKV_ELENGTH: return "length must be a positive multiple of 64 and the buffer large enough";
        default:            return status >= 0 ? "ok" : "unknown status";
    }
}

static const float * codebook(int bits) {
    return bits == 2 ? seqkv_codebook2 : bits == 3 ? seqkv_codebook3 : seqkv_codebook4;
}

static size_t block_bytes(int bits) {
    return bits == 2 ? sizeof(block_seqkv2) : bits == 3 ? sizeof(block_seqkv3) : sizeof(block_seqkv4);
}

int64_t seqkv_bound(int bits, int64_t n) {
    if (bits < 2 || bits > 4) {
        return SEQKV_EBITS;
    }
    return n <= 0 || n % SEQKV_BLOCK != 0 || n > INT64_MAX/64 ? SEQKV_ELENGTH : n/SEQKV_BLOCK*(int64_t) block_bytes(bits);
}

static void pack_codes(int bits, const uint8_t * codes, uint8_t * dst) {
    memset(dst, 0, block_bytes(bits) - 1);
    for (int i = 0; i < SEQKV_BLOCK; ++i) {
        if (bits == 4) {
            dst[i % 32] |= codes[i] << 4*(i/32);
        } else {
            dst[i % 16] |= (codes[i] & 3) << 2*(i/16);
            if (bits == 3) {
                dst[16 + i % 8] |= (codes[i] >> 2) << (i/8);
            }
        }
    }
}

static void unpack_codes(int bits, const uint8_t * src, uint8_t * codes) {
    for (int i = 0; i < SEQKV_BLOCK; ++i) {
        if (bits == 4) {
            codes[i] = src[i % 32] >> 4*(i/32) & 15;
        } else {
            codes[i] = src[i % 16] >> 2*(i/16) & 3;
            if (bits == 3) {
                codes[i] |= (src[16 + i % 8] >> (i/8) & 1) << 2;
            }
        }
    }
}

// codes of x at scale s: index of the nearest level, found by counting the midpoints below x
static void nearest(int bits, const float * x, float inv_s, uint8_t * codes) {
    const float * cb = codebook(bits);
    const int     nl = 1 << bits;
    int32_t c[SEQKV_BLOCK] = { 0 };
    for (int l = 1; l < nl; ++l) {
        const float edge = 0.5f*(cb[l - 1] + cb[l]);
        for (int i = 0; i < SEQKV_BLOCK; ++i) {
            c[i] += x[i]*inv_s > edge;
        }
    }
    for (int i = 0; i < SEQKV_BLOCK; ++i) {
        codes[i] = (uint8_t) c[i];
    }
}

static uint8_t gain_code(float gain) {
    const float g = rintf(SEQKV_GAIN_STEPS*log2f(gain)) + SEQKV_GAIN_BIAS;
    return g < 1.0f ? 1 : g > 255.0f ? 255 : (uint8_t) g;
}

// Scales tried by the encoder, as multiples of the root mean square of the block. The one whose code vector has the
// smallest angle to x is kept; the gain then restores the length.
static const float scale_search[] = { 1.0f, 0.9f, 1.1f, 0.8f };

static void quantize_block(int bits, const float * src, uint8_t * dst) {
    const float * cb = codebook(bits);

    float x[SEQKV_BLOCK];
    float xx = 0.0f;
    for (int i = 0; i < SEQKV_BLOCK; ++i) {
        x[i] = isfinite(src[i]) ? src[i] : 0.0f;
        x[i] = x[i] > 1e15f ? 1e15f : x[i] < -1e15f ? -1e15f : x[i];
        xx  += x[i]*x[i];
    }

    if (xx < 1e-30f) {
        memset(dst, 0, block_bytes(bits));
        return;
    }

    const float rms  = sqrtf(xx/SEQKV_BLOCK);
    float best_cos   = -1.0f;
    float best_gain  = 0.0f;
    uint8_t best[SEQKV_BLOCK];

    for (size_t k = 0; k < sizeof(scale_search)/sizeof(scale_search[0]); ++k) {
        uint8_t codes[SEQKV_BLOCK];
        nearest(bits, x, 1.0f/(rms*scale_search[k]), codes);

        float xy = 0.0f, yy = 0.0f;
        for (int i = 0; i < SEQKV_BLOCK; ++i) {
            const float y = cb[codes[i]];
            xy += x[i]*y;
            yy += y*y;
        }

        const float cos2 = xy*xy/(xx*yy);
        if (xy > 0.0f && cos2 > best_cos) {
            best_cos  = cos2;
            best_gain = xx/xy; // unbiased: <gain*y, x> = <x, x>
            memcpy(best, codes, sizeof(best));
        }
    }

    dst[0] = gain_code(best_gain);
    pack_codes(bits, best, dst + 1);
}

int64_t seqkv_quantize(int bits, const float * x, int64_t n, void * dst, int64_t n_dst) {
    const int64_t size = seqkv_bound(bits, n);
    if (size < 0 || size > n_dst) {
        return size < 0 ? size : SEQKV_ELENGTH;
    }
    const int64_t bs = (int64_t) block_bytes(bits);
    for (int64_t b = 0; b < n/SEQKV_BLOCK; ++b) {
        quantize_block(bits, x + b*SEQKV_BLOCK, (uint8_t *) dst + b*bs);
    }
    return size;
}

int64_t seqkv_unpack(int bits, const void * src, int64_t n_src, uint8_t * codes, uint8_t * gains, int64_t n) {
    const int64_t size = seqkv_bound(bits, n);
    if (size < 0 || size > n_src) {
        return size < 0 ? size : SEQKV_ELENGTH;
    }
    const int64_t bs = (int64_t) block_bytes(bits);
    for (int64_t b = 0; b < n/SEQKV_BLOCK; ++b) {
        const uint8_t * block = (const uint8_t *) src + b*bs;
        gains[b] = block[0];
        unpack_codes(bits, block + 1, codes + b*SEQKV_BLOCK);
    }
    return size;
}

int64_t seqkv_dequantize(int bits, const void * src, int64_t n_src, float * y, int64_t n) {
    const int64_t size = seqkv_bound(bits, n);
    if (size < 0 || size > n_src) {
        return size < 0 ? size : SEQKV_ELENGTH;
    }
    const int64_t bs = (int64_t) block_bytes(bits);
    const float * cb = codebook(bits);
    for (int64_t b = 0; b < n/SEQKV_BLOCK; ++b) {
        const uint8_t * block = (const uint8_t *) src + b*bs;
        const float gain = seqkv_gain[block[0]];
        uint8_t codes[SEQKV_BLOCK];
        unpack_codes(bits, block + 1, codes);
        for (int i = 0; i < SEQKV_BLOCK; ++i) {
            y[b*SEQKV_BLOCK + i] = gain*cb[codes[i]];
        }
    }
    return size;
}
