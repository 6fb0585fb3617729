// Lossless coding of one layer of a frame. Encoder and decoder are one piece of code, so that they cannot differ.
#include "predict.h"

#if defined(__GNUC__) && defined(__x86_64__)
#    include <immintrin.h>
#    define SEQKV_WIDE // AVX2 where the processor has it
#endif

#define LANES 8 // blocks that are coded side by side: their chains of dependent steps overlap

typedef struct {
    seqkv_writer w;
    seqkv_reader r;
    int encode;
    int32_t edge[7][2][64];   // bits, parity -> lower edges of the reachable levels, in half levels
    int32_t level[7][128];    // bits -> levels, in half levels
    int32_t gain_edge[256];   // lower edges of gains, in half steps
    int     wide;             // decode LANES blocks with AVX2
} coder;

static void coder_init(coder * c) {
    for (int B = 1; B <= 6; ++B) {
        const int8_t * level = seqkv_level_table(B);
        for (int l = 0; l < 2 << B; ++l) {
            c->level[B][l] = 2*level[l];
        }
        for (int parity = 0; parity < 2; ++parity) {
            for (int j = 1; j < 1 << B; ++j) {
                c->edge[B][parity][j] = level[2*j - 2 + parity] + level[2*j + parity];
            }
        }
    }
    for (int j = 1; j < 256; ++j) {
        c->gain_edge[j] = 2*j - 1;
    }
#ifdef SEQKV_WIDE
    c->wide = !c->encode && __builtin_cpu_supports("avx2");
#else
    c->wide = 0;
#endif
}

// places in the work buffer
typedef struct {
    int16_t  * in;      // (64, n_in + n_head*dk) inputs of every token
    int16_t  * x;       // (64, n_head*dk) predicted x
    int16_t  * z;       // (64, n_head*max(dk, dv)) predicted z
    int16_t  * copy_in; // (64, n_in + n_head*dk) inputs of the tokens that are copied
    int16_t  * own;     // (64, n_head*max(dk, dv)) what is predicted of these
    int16_t  * copy;    // (n_head*dv) of one token
    uint32_t * symbols;
    int        n_prev;  // inputs that the previous layer gives
    int        n_k, n_v; // values in a row
} workspace;

static int valid_layer(const seqkv_layer * l) {
    const int dims = (l->dk == 64 || l->dk == 128 || l->dk == 256) && (l->dv == 64 || l->dv == 128 || l->dv == 256);
    return dims && l->n_head >= 1 && l->n_head <= 64 && l->n_rot >= 0 && l->n_rot <= l->dk && l->n_rot % 2 == 0;
}

static int64_t symbols_of(const seqkv_layer * l, int64_t n) {
    return n*(l->n_head*(l->dk + l->dv) + seqkv_k_groups(l) + seqkv_v_groups(l));
}

// Bytes of the workspace; work may be NULL. < 0: a status.
static int64_t layout(const seqkv_layer * l, const seqkv_layer * prev, uint8_t * work, workspace * ws) {
    if (!valid_layer(l) || (prev && !valid_layer(prev))) {
        return SEQKV_ESHAPE;
    }
    ws->n_k    = l->n_head*l->dk;
    ws->n_v    = l->n_head*l->dv;
    ws->n_prev = prev ? prev->n_head*(prev->dk + prev->dv) : 0;
    if (ws->n_prev + ws->n_k > SEQKV_MAX_INPUTS) {
        return SEQKV_ESHAPE;
    }
    const int64_t widest = ws->n_k > ws->n_v ? ws->n_k : ws->n_v;
    const int64_t in = SEQKV_FRAME*(int64_t) (ws->n_prev + ws->n_k), x = SEQKV_FRAME*(int64_t) ws->n_k, z = SEQKV_FRAME*widest;
    const int64_t values = 2*in + x + 2*z + ws->n_v; // a multiple of 4
    if (work) {
        ws->in      = (int16_t *) work;
        ws->x       = ws->in + in;
        ws->z       = ws->x + x;
        ws->copy_in = ws->z + z;
        ws->own     = ws->copy_in + in;
        ws->copy    = ws->own + z;
        ws->symbols = (uint32_t *) (ws->copy + ws->n_v);
    }
    return values*(int64_t) sizeof(int16_t) + symbols_of(l, SEQKV_FRAME)*(int64_t) sizeof(uint32_t);
}

int64_t seqkv_delta_work(const seqkv_layer * layer, const seqkv_layer * prev) {
    workspace ws;
    return layout(layer, prev, NULL, &ws);
}

int64_t seqkv_delta_bound(const seqkv_layer * layer, int n) {
    return !valid_layer(layer) || n < 1 || n > SEQKV_FRAME ? SEQKV_ESHAPE : seqkv_writer_bound(symbols_of(layer, n));
}

static int valid_bits(int bits) {
    return bits >= 1 && bits <= 4;
}

static int64_t check(const seqkv_layer * l, const seqkv_layer * prev, const seqkv_frame * f, int64_t n_work, workspace * ws, uint8_t * work) {
    const int64_t need = layout(l, prev, work, ws);
    if (need < 0) {
        return need;
    }
    if (n_work < need) {
        return SEQKV_ELENGTH;
    }
    if (!valid_bits(f->k_bits) || !valid_bits(f->v_bits) || (prev && (!valid_bits(f->prev_k_bits) || !valid_bits(f->prev_v_bits)))) {
        return SEQKV_EBITS;
    }
    if (f->n < 1 || f->n > SEQKV_FRAME || f->n_past < 0) {
        return SEQKV_ESHAPE;
    }
    for (int t = 0; t < f->n; ++t) {
        const int copied = f->match[t] != 0;
        if (f->offset[f->n_past + t] >= SEQKV_FRAME || f->match[t] >= SEQKV_COPY_CLASSES ||
            (copied && (f->source[t] < 0 || f->source[t] >= f->n_past || f->offset[f->source[t]] >= SEQKV_FRAME))) {
            return SEQKV_ESHAPE;
        }
    }
    return SEQKV_OK;
}

// ---- gains

static int k_gain(const uint8_t * row, int bits, int q) { return seqkv_k_gain(row, bits, q); }
static int v_gain(const uint8_t * row, int bits, int q) { return seqkv_v_gain(row, bits, q); }

// an expected gain in 2^-8 steps, whatever the profile says
static int64_t expected(int32_t gain) { return seqkv_clip(gain, 0xffff); }

// weight * (gain - what is expected of it), 2^-16 steps
static int64_t term(int32_t weight, int gain, int32_t usual) { return seqkv_clip(weight, 4096)*(256*gain - expected(usual)); }

// Gains of one kind of the frame, token after token: g (64, groups), filled when decoding. rows, row: those coded.
// The expected gain is linear in the differences of its neighbours to what is expected of them without any.
static void code_gains(coder * c, const seqkv_predictor * p, const seqkv_frame * f, int graded, int groups, int bits, const uint8_t * past,
                       int64_t row, const uint8_t * rows, const uint8_t * prev, int prev_bits, int64_t prev_row, int prev_groups,
                       const seqkv_layer * l, uint8_t * g) {
    int (* const gain)(const uint8_t *, int, int) = graded ? k_gain : v_gain;
    const int alphabet = graded ? 5 : 8;
    const int head_groups = graded ? 3*(l->dk/SEQKV_BLOCK) : l->dv/SEQKV_BLOCK;
    for (int t = 0; t < f->n; ++t) {
        const uint8_t * copy = f->match[t] ? past + f->source[t]*row : NULL;
        const uint8_t * last = t == 0 && f->n_past > 0 ? past + (int64_t) (f->n_past - 1)*row : NULL;
        uint8_t * out = g + t*groups;
        for (int q = 0; q < groups; ++q) {
            const int32_t * k = p->gain + q*SEQKV_GAIN_TERMS;
            const int before = t > 0 ? out[q - groups] : last ? gain(last, bits, q) : -1;
            int64_t mean = 256*expected(k[0]); // 2^-16 gain steps
            mean += before >= 0 ? term(k[1], before, k[0]) : 0;
            mean += copy ? term(k[2], gain(copy, bits, q), k[0])*p->copy[f->match[t]]/128 : 0;
            mean += q >= head_groups ? term(k[3], out[q - head_groups], k[-head_groups*SEQKV_GAIN_TERMS]) : 0;
            mean += graded && q % 3 ? term(k[4], out[q - 1], k[-SEQKV_GAIN_TERMS]) : 0;
            mean += prev && q < prev_groups ? term(k[5], gain(prev + t*prev_row, prev_bits, q), k[7]) : 0;
            mean = mean < 0 ? 0 : mean > 0xffffff ? 0xffffff : mean;
            const int32_t a = seqkv_exp2(4096, 240 - seqkv_clip(k[6], 144)); // one step is 2^17
            const int32_t b = (int32_t) ((mean >> 8)*a >> 7);
            if (c->encode) {
                out[q] = (uint8_t) gain(rows + t*row, bits, q);
                seqkv_write_value(&c->w, a, b, c->gain_edge, alphabet, out[q]);
            } else {
                out[q] = (uint8_t) seqkv_read_value(&c->r, a, b, c->gain_edge, alphabet);
            }
        }
    }
}

// ---- values

typedef struct {
    uint64_t planes[7];     // of level indices, when encoding
    const int16_t * mean;   // predicted z
    const uint8_t * spread;
    uint8_t * block;
    const uint8_t * gains;
    int32_t unit;           // gain that counts as 1
    int32_t shift;          // of the spread, 1/48 octaves
    int32_t log_gain;
    int32_t sum;            // of |residual| so far, 1/64 spreads
    uint32_t path;          // u_(i-1) | u_(i-2) << 1 | u_(i-3) << 2
    uint16_t codes[SEQKV_BLOCK]; // not bytes, which compilers must think may be anything
} lane;

SEQKV_FN void code_value(coder * c, lane * s, int B, int i, int encode) {
    const int32_t log_spread = seqkv_clip(3*(s->spread[i] - 128) + s->log_gain/2 + s->shift
                                          + seqkv_log_sum[(s->sum + 384) >> 3] - seqkv_log_count[i], 288);
    const int32_t ratio = s->log_gain - log_spread;
    const int32_t a = seqkv_exp2(seqkv_scale17[B], ratio < -144 ? -144 : ratio > 384 ? 384 : ratio);
    const int32_t b = s->mean[i]*seqkv_exp2(2048, -log_spread); // below 2^29
    const uint32_t parity = s->path >> 1 & 1;
    const int32_t * edge = c->edge[B][parity];
    uint32_t l; // level index
    if (encode) {
        l = 0;
        for (int j = 0; j <= B; ++j) {
            l |= (uint32_t) (s->planes[j] >> i & 1) << j;
        }
        seqkv_write_value(&c->w, a, b, edge, B, (int) (l >> 1));
    } else {
        l = 2*(uint32_t) seqkv_read_value(&c->r, a, b, edge, B) + parity;
    }
    const uint32_t u = (l >> 1 ^ s->path ^ s->path >> 2) & 1;
    s->codes[i] = (uint16_t) (l >> 2 << 1 | u);
    s->path = (s->path << 1 | u) & 7;
    const int32_t q = seqkv_place(a, b, c->level[B][l]);
    s->sum += q < -192 || q > 192 ? 192 : q < 0 ? -q : q;
}

// values of n blocks, LANES at most
SEQKV_FN void code_blocks(coder * c, lane * s, int n, int bits, int graded, int encode) {
    for (int q = 0; q < 4; ++q) {
        const int B = seqkv_value_bits(bits, graded, q);
        if (B == 0) {
            for (int j = 0; j < n; ++j) {
                memset(s[j].codes + 16*q, 0, 16*sizeof(uint16_t));
            }
            continue;
        }
        for (int j = 0; j < n && (q == 0 || (graded && q < 3)); ++j) { // a group begins
            s[j].path     = 0;
            s[j].log_gain = seqkv_log_gain(graded, s[j].gains[q], s[j].unit);
        }
        for (int i = 16*q; i < 16*q + 16; ++i) {
            for (int j = 0; j < n; ++j) {
                code_value(c, &s[j], B, i, encode);
            }
        }
    }
}

#ifdef SEQKV_WIDE
#    include "delta-avx2.h"
#endif

static void write_block(const lane * s, int bits, int graded) {
    uint8_t * out = s->block;
    const int w = graded ? s->gains[0] | s->gains[1] << 5 | s->gains[2] << 10 : s->gains[0];
    *out++ = (uint8_t) w;
    if (graded) {
        *out++ = (uint8_t) (w >> 8);
    }
    for (int p = 0; p < 6; ++p) {
        for (int i = 0; i < seqkv_plane_values(bits, graded, p); i += 8) {
            uint64_t eight = 0;
            for (int m = 7; m >= 0; --m) {
                eight = eight << 8 | s->codes[i + m];
            }
            *out++ = (uint8_t) ((eight >> p & 0x0101010101010101u)*0x0102040810204080u >> 56);
        }
    }
}

// Values of one kind: rows (n, row) given the gains g and the predictions z (n, width).
static void code_rows(coder * c, const seqkv_layer * l, const seqkv_predictor * p, const seqkv_frame * f, int graded, int bits,
                      uint8_t * rows, const uint8_t * g, const int16_t * z) {
    const int dim = graded ? l->dk : l->dv, blocks = l->n_head*(dim/SEQKV_BLOCK), size = seqkv_block_bytes(bits, graded);
    const int groups = graded ? 3 : 1, total = f->n*blocks;
    lane s[LANES];
    for (int first = 0; first < total; first += LANES) {
        const int n = total - first < LANES ? total - first : LANES;
        for (int j = 0; j < n; ++j) {
            const int t = (first + j)/blocks, b = (first + j)%blocks;
            s[j].mean   = z + (int64_t) (first + j)*SEQKV_BLOCK;
            s[j].spread = p->spread + b*SEQKV_BLOCK;
            s[j].block  = rows + (int64_t) (first + j)*size;
            s[j].gains  = g + (first + j)*groups;
            s[j].unit   = graded ? SEQKV_UNIT_KEY : l->v_gain[b/(dim/SEQKV_BLOCK)];
            s[j].shift  = 3*p->copy_spread[f->match[t]];
            s[j].sum    = 0;
            if (c->encode) {
                seqkv_index_planes(bits, graded, s[j].block, s[j].planes);
            }
        }
        if (c->encode) {
            if (graded) { code_blocks(c, s, n, bits, 1, 1); } else { code_blocks(c, s, n, bits, 0, 1); }
        } else {
#ifdef SEQKV_WIDE
            if (c->wide && n == LANES) { decode_blocks_avx2(c, s, bits, graded); } else
#endif
            if (graded) { code_blocks(c, s, n, bits, 1, 0); } else { code_blocks(c, s, n, bits, 0, 0); }
            for (int j = 0; j < n; ++j) {
                write_block(&s[j], bits, graded);
            }
        }
    }
}

// p[n], corrected by the copy c and what is predicted of it, own: p + share*(c - p) + error*(c - own)
static void mix(int16_t * p, const int16_t * c, const int16_t * own, int n, int share, int error) {
    for (int i = 0; i < n; ++i) {
        p[i] = (int16_t) seqkv_clip(p[i] + ((share*(c[i] - p[i]) + error*(c[i] - own[i]) + 64) >> 7), SEQKV_MAX_VALUE);
    }
}

static void code(coder * c, const seqkv_layer * l, const seqkv_layer * prev, const seqkv_predictor * pk, const seqkv_predictor * pv,
                 const seqkv_frame * f, uint8_t * k, uint8_t * v, workspace * ws) {
    const int stride = ws->n_prev + ws->n_k, n_k = ws->n_k, n_v = ws->n_v;
    const int64_t k_row = l->n_head*(l->dk/SEQKV_BLOCK)*seqkv_block_bytes(f->k_bits, 1);
    const int64_t v_row = l->n_head*(l->dv/SEQKV_BLOCK)*seqkv_block_bytes(f->v_bits, 0);
    const int64_t prev_k_row = prev ? prev->n_head*(prev->dk/SEQKV_BLOCK)*seqkv_block_bytes(f->prev_k_bits, 1) : 0;
    const int64_t prev_v_row = prev ? prev->n_head*(prev->dv/SEQKV_BLOCK)*seqkv_block_bytes(f->prev_v_bits, 0) : 0;
    const uint8_t * prev_k = prev ? f->prev_k + f->n_past*prev_k_row : NULL, * prev_v = prev ? f->prev_v + f->n_past*prev_v_row : NULL;
    const uint8_t * offset = f->offset + f->n_past;
    uint8_t g[SEQKV_FRAME*64*4*3];
    coder_init(c);

    // the tokens that are copied, each once, and its place among them
    int copied = 0;
    int64_t source[SEQKV_FRAME];
    uint8_t copy[SEQKV_FRAME], copy_offset[SEQKV_FRAME];
    for (int t = 0; t < f->n; ++t) {
        int j = 0;
        while (f->match[t] && j < copied && source[j] != f->source[t]) {
            ++j;
        }
        copy[t] = (uint8_t) j;
        if (f->match[t] && j == copied) {
            copy_offset[copied] = f->offset[f->source[t]];
            source[copied++]    = f->source[t];
        }
    }
    const uint8_t * own_k[SEQKV_FRAME], * copy_k[SEQKV_FRAME], * copy_prev_k[SEQKV_FRAME], * of_prev_k[SEQKV_FRAME];
    for (int t = 0; t < f->n; ++t) {
        own_k[t]     = k + t*k_row;
        of_prev_k[t] = prev ? prev_k + t*prev_k_row : NULL;
    }
    for (int j = 0; j < copied; ++j) {
        copy_k[j]      = f->k_past + source[j]*k_row;
        copy_prev_k[j] = prev ? f->prev_k + source[j]*prev_k_row : NULL;
    }

    // inputs of both
    if (prev) {
        const int n_prev_k = prev->n_head*prev->dk;
        seqkv_key_inputs(prev, f->prev_k_bits, of_prev_k,   offset,      f->n,   ws->in,      stride);
        seqkv_key_inputs(prev, f->prev_k_bits, copy_prev_k, copy_offset, copied, ws->copy_in, stride);
        for (int t = 0; t < f->n; ++t) {
            seqkv_value_inputs(prev, f->prev_v_bits, prev_v + t*prev_v_row, ws->in + t*stride + n_prev_k);
        }
        for (int j = 0; j < copied; ++j) {
            seqkv_value_inputs(prev, f->prev_v_bits, f->prev_v + source[j]*prev_v_row, ws->copy_in + j*stride + n_prev_k);
        }
    }
    seqkv_key_inputs(l, f->k_bits, copy_k, copy_offset, copied, ws->copy_in + ws->n_prev, stride);

    code_gains(c, pk, f, 1, seqkv_k_groups(l), f->k_bits, f->k_past, k_row, k, prev_k, f->prev_k_bits, prev_k_row,
               prev ? seqkv_k_groups(prev) : 0, l, g);
    seqkv_predict(pk, ws->in,      stride, ws->n_prev, f->n,   ws->x,   n_k);
    seqkv_predict(pk, ws->copy_in, stride, ws->n_prev, copied, ws->own, n_k);
    for (int t = 0; t < f->n; ++t) {
        const int match = f->match[t], j = copy[t];
        if (match) {
            mix(ws->x + t*n_k, ws->copy_in + j*stride + ws->n_prev, ws->own + j*n_k, n_k, pk->copy[match], pk->copy_error[match]);
        }
    }
    seqkv_key_values(l, ws->x, offset, f->n, ws->z);
    code_rows(c, l, pk, f, 1, f->k_bits, k, g, ws->z);

    if (pv->weight) {
        seqkv_key_inputs(l, f->k_bits, own_k, offset, f->n, ws->in + ws->n_prev, stride);
    }
    code_gains(c, pv, f, 0, seqkv_v_groups(l), f->v_bits, f->v_past, v_row, v, prev_v, f->prev_v_bits, prev_v_row,
               prev ? seqkv_v_groups(prev) : 0, l, g);
    seqkv_predict(pv, ws->in,      stride, stride, f->n,   ws->z,   n_v);
    seqkv_predict(pv, ws->copy_in, stride, stride, copied, ws->own, n_v);
    for (int t = 0; t < f->n; ++t) {
        const int match = f->match[t], j = copy[t];
        if (match) {
            seqkv_value_inputs(l, f->v_bits, f->v_past + f->source[t]*v_row, ws->copy);
            mix(ws->z + t*n_v, ws->copy, ws->own + j*n_v, n_v, pv->copy[match], pv->copy_error[match]);
        }
    }
    code_rows(c, l, pv, f, 0, f->v_bits, v, g, ws->z);
}

int64_t seqkv_delta_encode(const seqkv_layer * layer, const seqkv_layer * prev, const seqkv_predictor * pk, const seqkv_predictor * pv,
                           const seqkv_frame * frame, const uint8_t * k, const uint8_t * v, uint8_t * dst, int64_t n_dst, void * work,
                           int64_t n_work) {
    workspace ws;
    const int64_t status = check(layer, prev, frame, n_work, &ws, work);
    if (status < 0) {
        return status;
    }
    for (int i = 0; i < frame->n*layer->n_head*(layer->dk/SEQKV_BLOCK); ++i) {
        if (k[i*seqkv_block_bytes(frame->k_bits, 1) + 1] & 0x80) {
            return SEQKV_EDATA;
        }
    }
    coder c;
    c.encode = 1;
    c.w = (seqkv_writer) { ws.symbols, 0 };
    code(&c, layer, prev, pk, pv, frame, (uint8_t *) k, (uint8_t *) v, &ws); // blocks are written when decoding only
    const int64_t size = seqkv_flush(&c.w, dst, n_dst);
    return size < 0 ? SEQKV_ELENGTH : size;
}

int64_t seqkv_delta_decode(const seqkv_layer * layer, const seqkv_layer * prev, const seqkv_predictor * pk, const seqkv_predictor * pv,
                           const seqkv_frame * frame, uint8_t * k, uint8_t * v, const uint8_t * src, int64_t n_src, void * work,
                           int64_t n_work) {
    workspace ws;
    const int64_t status = check(layer, prev, frame, n_work, &ws, work);
    if (status < 0) {
        return status;
    }
    coder c;
    c.encode = 0;
    if (!seqkv_reader_init(&c.r, src, n_src)) {
        return SEQKV_EDATA;
    }
    code(&c, layer, prev, pk, pv, frame, k, v, &ws);
    return seqkv_reader_done(&c.r) ? n_src : SEQKV_EDATA;
}
