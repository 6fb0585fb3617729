// Entropy coding with integers only, inline: rANS (Duda 2013, arXiv 1311.2540) in eight states that take turns, and the
// distribution of a value around its prediction. native/format.md states the bytes.
#pragma once

#include "entropy_tables.h"

#include <string.h>

#define SEQKV_RANS_STATES 8
#define SEQKV_RANS_BITS   15           // frequencies of an alphabet sum to 2^15
#define SEQKV_RANS_LOW    (1u << 16)   // states are in [2^16, 2^32) between symbols

// ---- reader

typedef struct {
    uint32_t        x[SEQKV_RANS_STATES];
    const uint8_t * in;    // next 16-bit word
    const uint8_t * end;
    uint32_t        turn;  // symbols read
    int             error; // words were missing; what is read then is of no use, but valid
} seqkv_reader;

static inline uint32_t seqkv_word(const uint8_t * p) {
    return (uint32_t) p[0] | (uint32_t) p[1] << 8;
}

// 0: too short
static inline int seqkv_reader_init(seqkv_reader * r, const uint8_t * src, int64_t n) {
    if (n < 4*SEQKV_RANS_STATES) {
        return 0;
    }
    for (int k = 0; k < SEQKV_RANS_STATES; ++k) {
        r->x[k] = seqkv_word(src + 4*k) | seqkv_word(src + 4*k + 2) << 16;
    }
    r->in    = src + 4*SEQKV_RANS_STATES;
    r->end   = src + n;
    r->turn  = 0;
    r->error = 0;
    return 1;
}

// position of the next symbol in its alphabet, 0 .. 2^15 - 1
static inline uint32_t seqkv_peek(const seqkv_reader * r) {
    return r->x[r->turn % SEQKV_RANS_STATES] & ((1u << SEQKV_RANS_BITS) - 1);
}

// the symbol has the interval [cum, cum + freq), which holds seqkv_peek()
static inline void seqkv_take(seqkv_reader * r, uint32_t cum, uint32_t freq) {
    static const uint8_t none[2];
    uint32_t * x = &r->x[r->turn++ % SEQKV_RANS_STATES];
    const uint32_t y     = freq*(*x >> SEQKV_RANS_BITS) + (*x & ((1u << SEQKV_RANS_BITS) - 1)) - cum;
    const uint32_t refill = y < SEQKV_RANS_LOW;           // as likely as not: no branch depends on it
    const int      empty  = r->end - r->in < 2;
    const uint32_t word   = seqkv_word(empty ? none : r->in);
    r->error |= (int) refill & empty;
    r->in    += 2*(refill & !empty);
    *x = refill ? y << 16 | word : y;
}

// Whether all was read, and the states are where the writer began: true of every stream that was written, of few others.
static inline int seqkv_reader_done(const seqkv_reader * r) {
    int ok = !r->error && r->in == r->end;
    for (int k = 0; k < SEQKV_RANS_STATES; ++k) {
        ok &= r->x[k] == SEQKV_RANS_LOW;
    }
    return ok;
}

// ---- writer: symbols are collected, then written backwards

typedef struct {
    uint32_t * symbols; // cum << 16 | freq
    int64_t    n;
} seqkv_writer;

static inline void seqkv_put(seqkv_writer * w, uint32_t cum, uint32_t freq) {
    w->symbols[w->n++] = cum << 16 | freq;
}

// bytes that n symbols take at most
static inline int64_t seqkv_writer_bound(int64_t n) {
    return 4*SEQKV_RANS_STATES + 2*n;
}

// -> bytes at dst, at most seqkv_writer_bound(n); -1: n_dst is too small
static inline int64_t seqkv_flush(const seqkv_writer * w, uint8_t * dst, int64_t n_dst) {
    uint32_t x[SEQKV_RANS_STATES];
    for (int k = 0; k < SEQKV_RANS_STATES; ++k) {
        x[k] = SEQKV_RANS_LOW;
    }
    int64_t at = n_dst;
    for (int64_t i = w->n - 1; i >= 0; --i) {
        uint32_t * s = &x[i % SEQKV_RANS_STATES];
        const uint32_t cum = w->symbols[i] >> 16, freq = w->symbols[i] & 0xffff;
        if (*s >= (uint64_t) freq << (32 - SEQKV_RANS_BITS)) {
            if (at < 2) {
                return -1;
            }
            dst[--at] = (uint8_t) (*s >> 8);
            dst[--at] = (uint8_t) *s;
            *s >>= 16;
        }
        *s = (*s/freq << SEQKV_RANS_BITS) + *s % freq + cum;
    }
    if (at < 4*SEQKV_RANS_STATES) {
        return -1;
    }
    const int64_t size = n_dst - at;
    memmove(dst + 4*SEQKV_RANS_STATES, dst + at, size);
    for (int k = 0; k < SEQKV_RANS_STATES; ++k) {
        for (int j = 0; j < 4; ++j) {
            dst[4*k + j] = (uint8_t) (x[k] >> 8*j);
        }
    }
    return 4*SEQKV_RANS_STATES + size;
}

// ---- distribution of a value

// 2^(x/48) * s, s < 2^13, x = -288 .. 384
static inline int32_t seqkv_exp2(int32_t s, int32_t x) {
    return (int32_t) ((uint64_t) s*seqkv_exp2_table[x + 288] >> 16);
}

// Place of an edge on the axis of the distribution, in 1/64 of its spread: (a*edge - b)/2^12, cut at 8 spreads.
// |a*edge| and |b| < 2^30.
static inline int32_t seqkv_place(int32_t a, int32_t b, int32_t edge) {
    const int32_t u = (a*edge - b) >> 12;
    return u < -512 ? -512 : u > 511 ? 511 : u;
}

// first position of symbol j of 2^bits, edge[j] its lower edge
static inline uint32_t seqkv_cum(int32_t a, int32_t b, const int32_t * edge, int j, int bits) {
    return j == 0 ? 0 : j == 1 << bits ? 1u << SEQKV_RANS_BITS : seqkv_cdf[seqkv_place(a, b, edge[j]) + 512] + (uint32_t) j;
}

static inline void seqkv_write_value(seqkv_writer * w, int32_t a, int32_t b, const int32_t * edge, int bits, int j) {
    const uint32_t cum = seqkv_cum(a, b, edge, j, bits);
    seqkv_put(w, cum, seqkv_cum(a, b, edge, j + 1, bits) - cum);
}

static inline int seqkv_read_value(seqkv_reader * r, int32_t a, int32_t b, const int32_t * edge, int bits) {
    const uint32_t slot = seqkv_peek(r);
    uint32_t low = 0, high = 1u << SEQKV_RANS_BITS;
    int j = 0;
    for (int step = 1 << bits >> 1; step; step >>= 1) {
        const uint32_t cum = seqkv_cdf[seqkv_place(a, b, edge[j + step]) + 512] + (uint32_t) (j + step);
        if (cum <= slot) { // a branch: it is foreseen more often than not, and look-ups need not wait for each other
            low = cum;
            j  += step;
        } else {
            high = cum;
        }
    }
    seqkv_take(r, low, high - low);
    return j;
}
