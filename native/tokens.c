// Adaptive coder of token ids: no model, integers only, so that every machine codes the same bits.
//
// An id is coded as n_bits binary decisions, highest bit first. Each has predictions from what followed the same 0, 1, 2 and 3
// tokens before (adaptive probabilities in hashed slots) and from the longest match of what came last; a gated logistic mixer
// joins them (M. Mahoney, "Adaptive weighing of context models for lossless data compression", 2005), an adaptive map refines the
// result, a binary arithmetic coder writes it. Where nothing was seen yet the order-0 prediction is p(id) ~ 1/(id + 200): tokenizers
// that merge pairs number them by frequency.
#include "seqkv.h"

#include <stdbool.h>
#include <string.h>

#define N_ORDER   4               // orders 0..3
#define N_INPUT   (N_ORDER + 2)   // and the match model, and a constant
#define N_SETS    (4*4*3*4)       // sets of weights: counts of orders 1 and 2, of order 0, length of the match
#define MIN_MATCH 3
#define PRIOR     200
#define RATE      6               // of the mixer

typedef struct {
    uint16_t p;     // probability of a 1, 16 bits
    uint8_t  check;
    uint8_t  n;     // times seen, up to a limit
} slot;

typedef struct {
    int16_t  stretch[4096];
    int32_t  weights[N_SETS][N_INPUT]; // 16 fractional bits
    uint16_t match_p[16];              // P(the predicted bit is right) by length of the match
    uint16_t apm[2][24][33];           // p by seen before or not, order-0 depth and stretch(p)
    int      slot_bits, match_bits;
    slot *     slots;
    uint32_t * heads;                  // last position by hash of MIN_MATCH tokens, + 1
} model;

static int table_bits(int64_t n, int n_bits) {
    int bits = 12;
    while (bits < 22 && ((int64_t) 1 << bits) < n*n_bits*N_ORDER) {
        bits++;
    }
    return bits;
}

static int head_bits(int64_t n) {
    int bits = 8;
    while (bits < 20 && ((int64_t) 1 << bits) < n) {
        bits++;
    }
    return bits;
}

int64_t seqkv_tokens_work(int64_t n, int n_bits) {
    if (n < 0 || n > SEQKV_TOKENS_MAX || n_bits < 1 || n_bits > 32) {
        return SEQKV_ELENGTH;
    }
    return (int64_t) sizeof(model) + ((int64_t) sizeof(slot) << table_bits(n, n_bits)) + ((int64_t) sizeof(uint32_t) << head_bits(n)) + 16;
}

int64_t seqkv_tokens_bound(int64_t n, int n_bits) {
    if (n < 0 || n > SEQKV_TOKENS_MAX || n_bits < 1 || n_bits > 32) {
        return SEQKV_ELENGTH;
    }
    return n*n_bits*2 + 16; // a decision costs at most 16 bits
}

// 4096/(1 + e^-x/256), x in -2047..2047
static int squash(int x) {
    static const int16_t t[33] = { 1, 2, 3, 6, 10, 16, 27, 45, 73, 120, 194, 310, 488, 747, 1101, 1546, 2047, 2549, 2994, 3348, 3607, 3785,
        3901, 3975, 4022, 4050, 4068, 4079, 4085, 4089, 4092, 4093, 4094 };
    if (x > 2047) {
        return 4095;
    }
    if (x < -2047) {
        return 1;
    }
    const int i = (x + 2048) >> 7, w = x & 127;
    return (t[i]*(128 - w) + t[i + 1 > 32 ? 32 : i + 1]*w + 64) >> 7;
}

// log2(x) with 12 fractional bits, x > 0
static int64_t log2_12(uint64_t x) {
    int n = 0;
    for (uint64_t y = x; y > 1; y >>= 1) {
        n++;
    }
    uint64_t m = n > 31 ? x >> (n - 31) : x << (31 - n); // 1 <= m/2^31 < 2
    int64_t  r = (int64_t) n << 12;
    for (int i = 11; i >= 0; --i) {
        m = (m*m) >> 31;
        if (m >> 32) {
            m >>= 1;
            r += (int64_t) 1 << i;
        }
    }
    return r;
}

// P(next bit is 1) of an id whose first bits are known, p(id) ~ 1/(id + PRIOR): 16 bits
static uint16_t prior(uint64_t prefix, int n_left) {
    const uint64_t lo = (prefix << n_left) + PRIOR, mid = lo + ((uint64_t) 1 << (n_left - 1)), hi = lo + ((uint64_t) 1 << n_left);
    const int64_t  a = log2_12(lo), b = log2_12(mid), c = log2_12(hi);
    const int64_t  p = c > a ? 65536*(c - b)/(c - a) : 32768;
    return (uint16_t) (p < 1024 ? 1024 : p > 64512 ? 64512 : p);
}

static void init(model * m, int64_t n, int n_bits) {
    memset(m, 0, sizeof(*m));
    int x = -2047;
    for (int p = 0; p < 4096; ++p) { // the inverse of squash
        while (x < 2047 && squash(x) < p) {
            x++;
        }
        m->stretch[p] = (int16_t) x;
    }
    for (int s = 0; s < N_SETS; ++s) {
        for (int i = 0; i < N_INPUT; ++i) {
            m->weights[s][i] = i < N_ORDER ? 24000 : i == N_ORDER ? 32768 : 0;
        }
    }
    for (int i = 0; i < 16; ++i) {
        m->match_p[i] = (uint16_t) (49152 + 900*i);
    }
    for (int s = 0; s < 2; ++s) {
        for (int d = 0; d < 24; ++d) {
            for (int i = 0; i < 33; ++i) {
                m->apm[s][d][i] = (uint16_t) (16*squash((i - 16)*128));
            }
        }
    }
    m->slot_bits  = table_bits(n, n_bits);
    m->match_bits = head_bits(n);
    m->slots = (slot *) (m + 1);
    m->heads = (uint32_t *) (m->slots + ((size_t) 1 << m->slot_bits));
    memset(m->slots, 0, sizeof(slot) << m->slot_bits);
    memset(m->heads, 0, sizeof(uint32_t) << m->match_bits);
}

static uint32_t hash(uint32_t h, uint32_t x) {
    h = (h ^ x)*0x9E3779B1u;
    return h ^ (h >> 15);
}

// the arithmetic coder, both ways
typedef struct {
    uint32_t lo, hi, x;
    uint8_t *       dst;
    const uint8_t * src;
    int64_t at, size;
    bool decode, full;
} coder;

static int code_bit(coder * c, int bit, uint32_t p1) { // p1: P(1), 1..65535
    const uint32_t range = c->hi - c->lo;
    const uint32_t mid   = c->lo + (range >> 16)*p1 + (((range & 0xffff)*p1) >> 16);
    if (c->decode) {
        bit = c->x <= mid;
    }
    if (bit) {
        c->hi = mid;
    } else {
        c->lo = mid + 1;
    }
    while (((c->lo ^ c->hi) & 0xff000000u) == 0) {
        if (c->decode) {
            c->x = c->x << 8 | (c->at < c->size ? c->src[c->at] : 0);
            c->at++;
        } else if (c->at < c->size) {
            c->dst[c->at++] = (uint8_t) (c->hi >> 24);
        } else {
            c->full = true;
        }
        c->lo <<= 8;
        c->hi = c->hi << 8 | 255;
    }
    return bit;
}

static int bucket(int n) { // of a count: 0, 1, 2..3, more
    return n == 0 ? 0 : n == 1 ? 1 : n < 4 ? 2 : 3;
}

// code tokens[0..n-1], or fill them in when decoding
static void run(model * m, coder * c, uint32_t * tokens, int64_t n, int n_bits) {
    int64_t  match = 0; // position of the predicted token, 0: none
    int      length = 0;
    const uint32_t slot_mask = ((uint32_t) 1 << m->slot_bits) - 1;

    for (int64_t t = 0; t < n; ++t) {
        uint32_t ctx[N_ORDER]; // hashes of the tokens before
        ctx[0] = 0x1234567u;
        for (int o = 1; o < N_ORDER; ++o) {
            ctx[o] = hash(ctx[o - 1] + 0x51ED270Bu*(uint32_t) o, t >= o ? tokens[t - o] + 1 : 0);
        }
        const uint32_t expected = match > 0 ? tokens[match] : 0;
        bool     on_match = match > 0;
        uint32_t value = 0;

        for (int d = 0; d < n_bits; ++d) {
            slot * s[N_ORDER];
            int    in[N_INPUT];
            for (int o = 0; o < N_ORDER; ++o) {
                const uint32_t h = hash(hash(ctx[o], value), (uint32_t) d);
                s[o] = &m->slots[h & slot_mask];
                const uint8_t check = (uint8_t) (h >> 24);
                if (s[o]->n == 0 || s[o]->check != check) {
                    s[o]->check = check;
                    s[o]->n = 0;
                    s[o]->p = o == 0 ? prior(value, n_bits - d) : s[0]->p;
                }
                in[o] = s[o]->n > 0 || o == 0 ? m->stretch[s[o]->p >> 4] : 0;
            }
            const int l = length > 15 ? 15 : length;
            const int expected_bit = expected >> (n_bits - 1 - d) & 1;
            in[N_ORDER] = 0;
            if (on_match) {
                const int st = m->stretch[m->match_p[l] >> 4];
                in[N_ORDER] = expected_bit ? st : -st;
            }
            in[N_ORDER + 1] = 256;

            const int set = ((bucket(s[1]->n)*4 + bucket(s[2]->n))*3 + (s[0]->n == 0 ? 0 : s[0]->n < 4 ? 1 : 2))*4 +
                (!on_match ? 0 : length < 6 ? 1 : length < 16 ? 2 : 3);
            int32_t * w = m->weights[set];
            int64_t dot = 0;
            for (int i = 0; i < N_INPUT; ++i) {
                dot += (int64_t) w[i]*in[i];
            }
            dot >>= 16;
            const int st = dot > 2047 ? 2047 : dot < -2047 ? -2047 : (int) dot;
            const int p12 = squash(st);

            // refined by what such predictions came to
            const int at = st + 2048, lo = at >> 7, wt = at & 127;
            uint16_t * map = m->apm[s[0]->n > 0][d > 23 ? 23 : d];
            const int hi = lo + 1 > 32 ? 32 : lo + 1;
            const uint32_t refined = ((uint32_t) map[lo]*(128 - wt) + (uint32_t) map[hi]*wt) >> 7;
            uint32_t p16 = (16*(uint32_t) p12 + refined + 1) >> 1;
            p16 = p16 < 8 ? 8 : p16 > 65528 ? 65528 : p16;

            const int bit = code_bit(c, c->decode ? 0 : tokens[t] >> (n_bits - 1 - d) & 1, p16);

            // learn
            const int err = ((bit << 12) - p12)*RATE;
            for (int i = 0; i < N_INPUT; ++i) {
                w[i] += (in[i]*err + (1 << 13)) >> 14;
            }
            const int near = wt < 64 ? lo : hi;
            map[near] += ((bit ? 65535 : 0) - map[near])/32;
            for (int o = 0; o < N_ORDER; ++o) {
                // the n-th observation moves p by 1/(n + 1.6); order 0 starts from a prior that counts for more
                const int n_seen = s[o]->n, limit = o == 0 ? 200 : 60;
                const int32_t gap = (bit ? 65535 : 0) - s[o]->p;
                s[o]->p = (uint16_t) (s[o]->p + gap*10/(10*n_seen + (o == 0 ? 25 : 16)));
                s[o]->n = (uint8_t) (n_seen < limit ? n_seen + 1 : limit);
            }
            if (on_match) {
                const bool right = bit == expected_bit;
                m->match_p[l] += ((right ? 65535 : 0) - m->match_p[l])/32;
                on_match = right;
            }
            value = value << 1 | (uint32_t) bit;
        }
        tokens[t] = value;

        // the longest match goes on, or a new one is looked up
        if (match > 0 && value == expected) {
            match++;
            length++;
        } else {
            match = length = 0;
        }
        if (t + 1 >= MIN_MATCH) {
            uint32_t h = 0;
            for (int i = 0; i < MIN_MATCH; ++i) {
                h = hash(h, tokens[t - i] + 1);
            }
            uint32_t * head = &m->heads[h & (((uint32_t) 1 << m->match_bits) - 1)];
            if (match == 0 && *head > 0) {
                match = *head;
                while (length < 32 && length < match && tokens[match - 1 - length] == tokens[t - length]) {
                    length++;
                }
                if (length < MIN_MATCH) {
                    match = length = 0;
                }
            }
            *head = (uint32_t) (t + 1);
        }
    }
}

static int64_t begin(int64_t n, int n_bits, void * work, int64_t n_work, model ** m) {
    const int64_t need = seqkv_tokens_work(n, n_bits);
    if (need < 0) {
        return need;
    }
    if (n_work < need) {
        return SEQKV_ELENGTH;
    }
    *m = (model *) (((uintptr_t) work + 15) & ~(uintptr_t) 15);
    init(*m, n, n_bits);
    return SEQKV_OK;
}

int64_t seqkv_tokens_encode(const uint32_t * tokens, int64_t n, int n_bits, void * work, int64_t n_work, void * dst, int64_t n_dst) {
    model * m;
    const int64_t status = begin(n, n_bits, work, n_work, &m);
    if (status < 0) {
        return status;
    }
    for (int64_t i = 0; i < n; ++i) {
        if (n_bits < 32 && tokens[i] >> n_bits) {
            return SEQKV_ELENGTH;
        }
    }
    coder c = { 0, 0xffffffffu, 0, dst, NULL, 0, n_dst, false, false };
    run(m, &c, (uint32_t *) tokens, n, n_bits); // written as they are
    // as few bytes as tell lo..hi apart; a reader sees zeros behind the end
    int n_last = n > 0 ? 1 : 0;
    while (n > 0 && n_last < 4 && (c.hi >> (32 - 8*n_last) << (32 - 8*n_last)) < c.lo) {
        n_last++;
    }
    for (int i = 0; i < n_last; ++i) {
        if (c.at >= c.size) {
            return SEQKV_ELENGTH;
        }
        c.dst[c.at++] = (uint8_t) (c.hi >> (24 - 8*i));
    }
    return c.full ? SEQKV_ELENGTH : c.at;
}

int64_t seqkv_tokens_decode(const void * src, int64_t n_src, int n_bits, void * work, int64_t n_work, uint32_t * tokens, int64_t n) {
    model * m;
    const int64_t status = begin(n, n_bits, work, n_work, &m);
    if (status < 0) {
        return status;
    }
    coder c = { 0, 0xffffffffu, 0, NULL, src, 0, n_src < 0 ? 0 : n_src, true, false };
    for (int i = 0; i < 4; ++i) {
        c.x = c.x << 8 | (c.at < c.size ? c.src[c.at] : 0);
        c.at++;
    }
    run(m, &c, tokens, n, n_bits);
    return n;
}
