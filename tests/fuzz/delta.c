// Fuzz target of the lossless coder of blocks: any bytes may be decoded, and what is encoded comes back.
//
//     clang -g -O1 -fsanitize=fuzzer,address,undefined -Inative tests/fuzz/delta.c native/{delta,predict,entropy,quantize,transform}.c -lm
//     cc -g -O1 -fsanitize=address,undefined -DSTANDALONE -Inative tests/fuzz/delta.c ... -lm && ./a.out 10000    # seeds 0..9999
//
// Buffers have exactly the size that the functions ask for, each from malloc: a byte too far is seen.
#include "seqkv.h"
#include "block.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const uint8_t * data;
    size_t   left;
    uint32_t state;
} source;

// next byte of the input; pseudorandom ones when it has come to its end
static uint8_t byte(source * s) {
    if (s->left) {
        --s->left;
        return *s->data++;
    }
    s->state = s->state*1664525u + 1013904223u;
    return (uint8_t) (s->state >> 24);
}

static uint8_t noise(source * s) {
    s->state = s->state*1664525u + 1013904223u;
    return (uint8_t) (s->state >> 24);
}

static void * fill(source * s, size_t n) {
    uint8_t * p = malloc(n ? n : 1);
    for (size_t i = 0; i < n; ++i) {
        p[i] = noise(s);
    }
    return p;
}

static void check(int ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

typedef struct {
    seqkv_layer layer;
    int k_bits, v_bits;
    int64_t k_row, v_row;
} shape;

static shape make_shape(source * s) {
    shape h;
    const uint8_t b = byte(s);
    seqkv_layer * l = &h.layer;
    l->n_head = b%8 == 3 ? 2 : 1;
    l->dk     = b%8 == 6 ? 128 : 64; // 256 is slow and no different
    l->dv     = b%8 >= 6 ? 128 : 64;
    l->neox   = b/8%2;
    l->n_rot  = b/16%3 == 0 ? 0 : b/16%3 == 1 ? l->dk : l->dk/2;
    h.k_bits  = 1 + byte(s)%4;
    h.v_bits  = 1 + byte(s)%4;
    h.k_row   = l->n_head*(l->dk/64)*(2 + 8*h.k_bits);
    h.v_row   = l->n_head*(l->dv/64)*(1 + 8*h.v_bits);
    int16_t * rope = fill(s, 64*l->n_rot*sizeof(int16_t));
    // the transforms of a strange but regular matrix
    const size_t square = (size_t) l->dk*l->dk;
    float    * enc  = malloc(square*sizeof(float));
    double   * work = malloc(2*square*sizeof(double));
    int16_t  * e = malloc(l->n_head*square*sizeof(int16_t)), * d = malloc(l->n_head*square*sizeof(int16_t));
    uint8_t  * shift = malloc(l->n_head);
    for (int n = 0; n < l->n_head; ++n) {
        for (size_t i = 0; i < square; ++i) {
            enc[i] = (float) (noise(s) - 128)/256.0f + (i % (l->dk + 1) == 0 ? 8.0f : 0.0f);
        }
        check(seqkv_delta_transform(enc, l->dk, l->n_rot, l->neox, e + n*square, d + n*square, shift + n, work) == SEQKV_OK, "transform");
    }
    free(enc);
    free(work);
    l->rope     = rope;
    l->k_encode = e;
    l->k_decode = d;
    l->k_shift  = shift;
    l->v_gain   = fill(s, l->n_head);
    return h;
}

static void free_shape(shape * h) {
    free((void *) h->layer.rope);
    free((void *) h->layer.k_encode);
    free((void *) h->layer.k_decode);
    free((void *) h->layer.k_shift);
    free((void *) h->layer.v_gain);
}

static seqkv_predictor make_predictor(source * s, int n, int inputs, int groups) {
    seqkv_predictor p;
    uint8_t * copy = fill(s, SEQKV_COPY_CLASSES);
    for (int i = 0; i < SEQKV_COPY_CLASSES; ++i) {
        copy[i] %= 129;
    }
    p.weight      = byte(s) % 4 ? fill(s, (size_t) n*inputs) : NULL;
    p.step        = fill(s, n*sizeof(uint16_t));
    p.spread      = fill(s, n);
    p.copy        = copy;
    p.copy_error  = fill(s, SEQKV_COPY_CLASSES);
    p.copy_spread = fill(s, SEQKV_COPY_CLASSES);
    p.gain        = fill(s, groups*SEQKV_GAIN_TERMS*sizeof(int32_t)); // any numbers: nothing may overflow
    if (byte(s) % 2) {
        for (int i = 0; i < groups*SEQKV_GAIN_TERMS; ++i) {
            ((int32_t *) p.gain)[i] %= 300;
        }
    }
    return p;
}

static void free_predictor(seqkv_predictor * p) {
    free((void *) p->weight);
    free((void *) p->step);
    free((void *) p->spread);
    free((void *) p->copy);
    free((void *) p->copy_error);
    free((void *) p->copy_spread);
    free((void *) p->gain);
}

static void clear_reserved(uint8_t * k, int64_t rows, const shape * h) {
    const int block = 2 + 8*h->k_bits;
    for (int64_t i = 0; i < rows*h->k_row/block; ++i) {
        k[i*block + 1] &= 0x7f;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    source s = { data, size, 1 };
    if (byte(&s) % 4 == 0) { // weights
        const int64_t n = 1 + byte(&s)*16;
        int8_t * w = malloc(n);
        if (seqkv_weights_decode(s.data, s.left, w, n) >= 0) {
            check(s.left > 0, "weights from nothing");
        }
        for (int64_t i = 0; i < n; ++i) {
            w[i] = (int8_t) (byte(&s)*byte(&s)/256);
        }
        const int64_t bound = seqkv_weights_bound(n);
        uint8_t  * out  = malloc(bound);
        uint32_t * work = malloc(n*sizeof(uint32_t));
        int8_t   * back = malloc(n);
        const int64_t used = seqkv_weights_encode(w, n, out, bound, work);
        check(used > 0 && used <= bound, "weights: bound");
        check(seqkv_weights_decode(out, used, back, n) == used && memcmp(w, back, n) == 0, "weights: round trip");
        free(w); free(out); free(work); free(back);
        return 0;
    }
    shape h = make_shape(&s), before = make_shape(&s);
    const uint8_t flags = byte(&s);
    const seqkv_layer * l = &h.layer, * prev = flags & 1 ? &before.layer : NULL;
    const int n_k = l->n_head*l->dk, n_v = l->n_head*l->dv, n_prev = prev ? prev->n_head*(prev->dk + prev->dv) : 0;
    seqkv_predictor pk = make_predictor(&s, n_k, n_prev, n_k/64*3), pv = make_predictor(&s, n_v, n_prev + n_k, n_v/64);
    const int n = 1 + byte(&s)%(flags & 2 ? (flags & 0x38 ? 12 : 64) : 2), n_past = byte(&s)%8;
    uint8_t * offset = fill(&s, n_past + n), * match = fill(&s, n);
    int32_t * from = malloc(n*sizeof(int32_t));
    for (int t = 0; t < n_past + n; ++t) {
        offset[t] %= 64;
    }
    for (int t = 0; t < n; ++t) {
        match[t] = n_past ? match[t] % SEQKV_COPY_CLASSES : 0;
        from[t]  = n_past ? noise(&s) % n_past : -5;
    }
    if (flags & 4) { // numbers that must be refused
        match[byte(&s)%n] = byte(&s);
        from[byte(&s)%n]  = byte(&s) - 128;
    }
    uint8_t * k = fill(&s, n*h.k_row), * v = fill(&s, n*h.v_row), * k2 = malloc(n*h.k_row), * v2 = malloc(n*h.v_row);
    uint8_t * kp = fill(&s, n_past*h.k_row), * vp = fill(&s, n_past*h.v_row);
    uint8_t * pkr = fill(&s, (n_past + n)*before.k_row), * pvr = fill(&s, (n_past + n)*before.v_row);
    clear_reserved(k, n, &h);
    const seqkv_frame f = { n_past, n, h.k_bits, h.v_bits, before.k_bits, before.v_bits, offset, from, match, kp, vp, pkr, pvr };
    const int64_t n_work = seqkv_delta_work(l, prev), bound = seqkv_delta_bound(l, n);
    check(n_work > 0 && bound > 0, "sizes");
    void    * work = malloc(n_work);
    uint8_t * out  = malloc(bound);
    uint8_t * rest = malloc(s.left ? s.left : 1);
    memcpy(rest, s.data, s.left);
    seqkv_delta_decode(l, prev, &pk, &pv, &f, k2, v2, rest, s.left, work, n_work);
    const int64_t used = seqkv_delta_encode(l, prev, &pk, &pv, &f, k, v, out, bound, work, n_work);
    if (used < 0) {
        check(flags & 4, "encode");
    } else {
        check(used <= bound, "bound");
        check(seqkv_delta_encode(l, prev, &pk, &pv, &f, k, v, out, used - 1, work, n_work) == SEQKV_ELENGTH, "short buffer");
        check(seqkv_delta_encode(l, prev, &pk, &pv, &f, k, v, out, bound, work, n_work) == used, "encode again");
        uint8_t * exact = malloc(used);
        memcpy(exact, out, used);
        check(seqkv_delta_decode(l, prev, &pk, &pv, &f, k2, v2, exact, used, work, n_work) == used, "decode");
        check(memcmp(k, k2, n*h.k_row) == 0 && memcmp(v, v2, n*h.v_row) == 0, "round trip");
        exact[byte(&s)*(size_t) used/256] ^= (uint8_t) (1 + byte(&s)%255); // a damaged byte
        seqkv_delta_decode(l, prev, &pk, &pv, &f, k2, v2, exact, used, work, n_work);
        seqkv_delta_decode(l, prev, &pk, &pv, &f, k2, v2, exact, used*byte(&s)/256, work, n_work);
        free(exact);
    }
    free(offset); free(match); free(from); free(k); free(v); free(k2); free(v2); free(kp); free(vp); free(pkr); free(pvr);
    free(work); free(out); free(rest);
    free_predictor(&pk); free_predictor(&pv);
    free_shape(&h); free_shape(&before);
    return 0;
}

#ifdef STANDALONE
int main(int argc, char ** argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 1000;
    for (int seed = 0; seed < n; ++seed) {
        source s = { NULL, 0, (uint32_t) seed*2654435761u + 12345u };
        uint8_t data[4096];
        const size_t size = (noise(&s) | noise(&s) << 8) % sizeof(data);
        for (size_t i = 0; i < size; ++i) {
            data[i] = noise(&s);
        }
        LLVMFuzzerTestOneInput(data, size);
    }
    return 0;
}
#endif
