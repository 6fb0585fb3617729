#include "seqkv-cpu.h"

#include "../ggml-seqkv.h"
#include "../seqkv.h"
#include "../encode.h"
#include "rows.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-gemm.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

static constexpr int MAX_HEAD = 256;
static constexpr int TILE     = TILE_ROWS; // rows of the KV axis in a tile
static constexpr int TILE_Q   = 256;     // query rows (tokens x heads of a group) in a tile, at most; GGML_SEQKV_MAX_GROUP and more
static constexpr int CHUNK    = 16*TILE; // KV rows of one unit of work in decode; fixed, so that results do not depend on the number of threads
static constexpr ggml_fp16_t MASKED = 0xfc00; // -inf; a mask has this or 0
static constexpr int MIN_RUN  = 16;      // shorter runs of one origin are gathered into mixed tiles

static ggml_seqkv_params get_params(const ggml_tensor * t) {
    ggml_seqkv_params p;
    memcpy(&p, t->op_params, sizeof(p));
    return p;
}

// rotation rows of a meta entry, see ggml-seqkv.h
struct rotations {
    const float * base;
    int64_t       stride;

    rotations(const ggml_tensor * rot, int set) :
        base((const float *) rot->data + set*rot->ne[0]*rot->ne[1]), stride(rot->ne[0]) {}

    const float * offset(int32_t meta) const { return base + (meta & 255)*stride; }
    const float * origin(int32_t meta) const { return base + (meta >> 8)*stride; }
};

// meta of token t of the ubatch
static int32_t token_meta(const ggml_tensor * meta, const ggml_seqkv_params & p, int64_t t) {
    const int64_t per_stream = meta->ne[0] - p.n_kv - p.n_win;
    return ((const int32_t *) meta->data)[t/per_stream*meta->ne[0] + p.n_kv + p.n_win + t%per_stream];
}

// Tables of one KV head, see ggml-seqkv.h; NULL: no profile
struct head_profile {
    const ggml_fp16_t * enc     = nullptr; // (dk, dk)
    const ggml_fp16_t * dec     = nullptr; // (dk, dk)
    const ggml_fp16_t * pred    = nullptr; // (64, dk)
    const ggml_fp16_t * v_mean  = nullptr; // (dv)
    const ggml_fp16_t * v_scale = nullptr; // (dv)

    head_profile(const ggml_tensor * prof, const ggml_seqkv_params & p, int h) {
        if (prof) {
            enc     = (const ggml_fp16_t *) prof->data + h*ggml_seqkv_prof_stride(p.dk, p.dv);
            dec     = enc  + p.dk*p.dk;
            pred    = dec  + p.dk*p.dk;
            v_mean  = pred + SEQKV_FRAME*p.dk;
            v_scale = v_mean + p.dv;
        }
    }
};

// How a cell holds a head vector.
enum form_t {
    PLAIN,    // as it is
    HADAMARD, // in the domain of H: quantized types
    DENSE,    // in that of E, a prediction subtracted: graded types with a profile
};

static form_t form_of(ggml_type type, const ggml_tensor * prof) {
    return !ggml_is_quantized(type) ? PLAIN : prof && ggml_seqkv_graded(type) ? DENSE : HADAMARD;
}

static std::vector<float> floats(const ggml_fp16_t * x, int64_t n) {
    std::vector<float> y(x ? n : 0);
    if (x) {
        ggml_cpu_fp16_to_fp32(x, y.data(), n);
    }
    return y;
}

// 16-point Hadamard matrix, so that the short strides of a transform are a product over contiguous vectors
struct hadamard16 {
    float m[16][16];
    hadamard16() {
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 16; ++j) {
                int bits = i & j, odd = 0;
                for (; bits; bits &= bits - 1) {
                    odd ^= 1;
                }
                m[i][j] = odd ? -1.0f : 1.0f;
            }
        }
    }
};
static const hadamard16 had16;

// as seqkv_fwht, for one contiguous vector
static void fwht_row(float * x, int d) {
    const float s = 1.0f/sqrtf((float) d);
    for (int i = 0; i < d; i += 16) {
        vec y[16/VEC];
        for (int c = 0; c < 16/VEC; ++c) {
            y[c] = vset1(0.0f);
        }
        for (int k = 0; k < 16; ++k) {
            const vec xk = vset1(s*x[i + k]);
            for (int c = 0; c < 16/VEC; ++c) {
                y[c] = vmad(xk, vload(had16.m[k] + c*VEC), y[c]);
            }
        }
        for (int c = 0; c < 16/VEC; ++c) {
            vstore(x + i + c*VEC, y[c]);
        }
    }
    for (int h = 16; h < d; h *= 2) {
        for (int i = 0; i < d; i += 2*h) {
            for (int j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j]     = a + b;
                x[j + h] = a - b;
            }
        }
    }
}

// Hadamard transform of the d rows of x (d, w): each column is one vector
static void fwht_columns(float * x, int d, int w) {
    for (int h = 1; h < d; h *= 2) {
        for (int i = 0; i < d; i += 2*h) {
            for (int r = i; r < i + h; ++r) {
                float * GGML_RESTRICT a = x + r*w;
                float * GGML_RESTRICT b = x + (r + h)*w;
                for (int j = 0; j < w; ++j) {
                    const float u = a[j], v = b[j];
                    a[j] = u + v;
                    b[j] = u - v;
                }
            }
        }
    }
    const float s = 1.0f/sqrtf((float) d);
    for (int i = 0; i < d*w; ++i) {
        x[i] *= s;
    }
}

//
// frame rows
//

void ggml_compute_forward_seqkv_frame(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k    = dst->src[0];
    const ggml_tensor * v    = dst->src[1];
    const ggml_tensor * meta = dst->src[2];

    const ggml_seqkv_params p = get_params(dst);
    const rotations rot(dst->src[3], p.rot_set);

    for (int64_t t = params->ith; t < dst->ne[1]; t += params->nth) {
        ggml_fp16_t * row = (ggml_fp16_t *) ((char *) dst->data + t*dst->nb[1]);
        for (int h = 0; h < p.n_head_kv; ++h) {
            float x[MAX_HEAD];
            memcpy(x, (const char *) k->data + h*k->nb[1] + t*k->nb[2], p.dk*sizeof(float));
            seqkv_rotate(x, rot.origin(token_meta(meta, p, t)), p.n_rot, p.neox, 1);
            ggml_cpu_fp32_to_fp16(x, row + h*p.dk, p.dk);
            ggml_cpu_fp32_to_fp16((const float *) ((const char *) v->data + h*v->nb[1] + t*v->nb[2]), row + p.n_head_kv*p.dk + h*p.dv, p.dv);
        }
    }
}

//
// writing the cache
//

// Blocks waiting to be coded together.
struct block_queue {
    const int bits, graded;
    int       n = 0;
    float     z[SEQKV_LANES][SEQKV_BLOCK];
    uint8_t * dst[SEQKV_LANES];

    block_queue(int bits, int graded) : bits(bits), graded(graded) {}

    void push(const float * src, uint8_t * out) {
        memcpy(z[n], src, sizeof(z[n]));
        dst[n++] = out;
        if (n == SEQKV_LANES) {
            flush();
        }
    }
    void flush() {
        const float * src[SEQKV_LANES];
        for (int j = 0; j < n; ++j) {
            src[j] = z[j];
        }
        if (n > 0) {
            seqkv_encode_blocks(bits, graded, src, dst, n);
        }
        n = 0;
    }
};

static constexpr int STORE_ROWS = 16; // head vectors that are transformed together

// Scratch begins at a cache line: vectors across two take twice as long to load
static constexpr size_t LINE = 64;
static float * scratch(const ggml_compute_params * params) { return (float *) GGML_PAD((uintptr_t) params->wdata, LINE); }

// scratch of one thread in floats: enc (dk, dk), vectors (STORE_ROWS, d), the same transformed
static size_t store_floats(const ggml_seqkv_params & p) {
    return p.dk*p.dk + 2*STORE_ROWS*std::max(p.dk, p.dv);
}

// the oracle: one vector after the other
static void store_ref(const ggml_tensor * dst, const ggml_fp16_t * row, int h, int32_t offset, uint8_t * out) {
    const ggml_seqkv_params p = get_params(dst);
    const bool is_key = p.part == GGML_SEQKV_KEY;
    const int  bits   = ggml_seqkv_bits(dst->type), graded = ggml_seqkv_graded(dst->type);
    const head_profile prof(dst->src[4], p, h);

    const auto optional = [](const std::vector<float> & x) { return x.empty() ? nullptr : x.data(); };
    if (is_key) {
        const auto x    = floats(row + h*p.dk, p.dk);
        const auto enc  = floats(graded ? prof.enc : nullptr, p.dk*p.dk);
        const auto pred = floats(graded && prof.pred ? prof.pred + offset*p.dk : nullptr, p.dk);
        seqkv_encode_key(bits, graded, x.data(), p.dk, optional(enc), optional(pred), out);
    } else {
        const auto x     = floats(row + p.n_head_kv*p.dk + h*p.dv, p.dv);
        const auto mean  = floats(prof.v_mean,  p.dv);
        const auto scale = floats(prof.v_scale, p.dv);
        seqkv_encode_value(bits, x.data(), p.dv, optional(mean), optional(scale), out);
    }
}

// Up to STORE_ROWS tokens of one head: their vectors x (n, d) to the domain of the cell, in x or z. Returns where. enc: as floats, or NULL
static float * transform_rows(form_t form, const head_profile & prof, const float * enc, const int32_t * offset, int n, int d, float * x, float * z) {
    if (form == DENSE) {
        if (enc) {
            dot_rows(x, enc, n, d, d, z, d);
        } else {
            dot_rows(x, prof.enc, n, d, d, z, d);
        }
        for (int j = 0; j < n; ++j) {
            const ggml_fp16_t * pred = prof.pred + offset[j]*d;
            for (int i = 0; i < d; ++i) {
                z[j*d + i] -= GGML_CPU_FP16_TO_FP32(pred[i]);
            }
        }
        return z;
    }
    for (int j = 0; j < n; ++j) {
        fwht_row(x + j*d, d);
    }
    return x;
}

void ggml_compute_forward_seqkv_store(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * cur  = dst->src[0];
    const int64_t     * idxs = (const int64_t *) dst->src[1]->data;
    const ggml_tensor * meta = dst->src[3];
    const ggml_tensor * prof = dst->src[4];

    const ggml_seqkv_params p = get_params(dst);

    const bool   is_key    = p.part == GGML_SEQKV_KEY;
    const int    d         = is_key ? p.dk : p.dv;
    const int    bits      = ggml_seqkv_bits(dst->type);
    const form_t form      = p.part == GGML_SEQKV_ROW ? PLAIN : form_of(dst->type, prof);
    const size_t head_size = ggml_row_size(dst->type, d);

    const auto row_of = [&](int64_t t) { return (const ggml_fp16_t *) ((const char *) cur->data + t*cur->nb[1]); };
    const auto out_of = [&](int64_t t) {
        GGML_ASSERT(idxs[t] < dst->ne[1]);
        return (uint8_t *) dst->data + idxs[t]*dst->nb[1];
    };
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(dst->type)->from_float;

    if (p.part == GGML_SEQKV_ROW || form == PLAIN || (bits && params->use_ref)) {
        for (int64_t t = params->ith; t < cur->ne[1]; t += params->nth) {
            if (idxs[t] < 0) {
                continue;
            }
            if (p.part == GGML_SEQKV_ROW) {
                memcpy(out_of(t), row_of(t), cur->ne[0]*sizeof(ggml_fp16_t));
                continue;
            }
            for (int h = 0; h < p.n_head_kv; ++h) {
                uint8_t * out = out_of(t) + h*head_size;
                if (bits) {
                    store_ref(dst, row_of(t), h, token_meta(meta, p, t) & 255, out);
                } else {
                    float x[MAX_HEAD];
                    ggml_cpu_fp16_to_fp32(row_of(t) + (is_key ? 0 : p.n_head_kv*p.dk) + h*d, x, d);
                    from_float(x, out, d);
                }
            }
        }
        return;
    }

    float * enc = scratch(params) + params->ith*store_floats(p);
    float * x   = enc + p.dk*p.dk;
    float * z   = x + STORE_ROWS*d;
    block_queue queue(bits, ggml_seqkv_graded(dst->type));

    // head vectors in the order (head, token), a contiguous share of them for each thread
    const int64_t n_tokens = cur->ne[1];
    const int64_t n_items  = n_tokens*p.n_head_kv;
    const int64_t end      = n_items*(params->ith + 1)/params->nth;
    int enc_head = -1;
    for (int64_t item = n_items*params->ith/params->nth; item < end;) {
        const int h = (int) (item/n_tokens);
        const head_profile tables(bits ? prof : nullptr, p, h);

        int       n = 0;
        int32_t   offset[STORE_ROWS];
        uint8_t * out[STORE_ROWS];
        for (; item < end && item/n_tokens == h && n < STORE_ROWS; ++item) {
            const int64_t t = item%n_tokens;
            if (idxs[t] < 0) {
                continue;
            }
            ggml_cpu_fp16_to_fp32(row_of(t) + (is_key ? 0 : p.n_head_kv*p.dk) + h*d, x + n*d, d);
            offset[n] = token_meta(meta, p, t) & 255;
            out[n++]  = out_of(t) + h*head_size;
        }
        if (n == 0) {
            continue;
        }
        const bool few = n < 3; // tokens, as in decode: E is read as it is
        if (form == DENSE && enc_head != h && !few) {
            ggml_cpu_fp16_to_fp32(tables.enc, enc, d*d);
            enc_head = h;
        }
        if (!is_key && tables.v_mean) {
            float mean[MAX_HEAD], scale[MAX_HEAD];
            ggml_cpu_fp16_to_fp32(tables.v_mean,  mean,  d);
            ggml_cpu_fp16_to_fp32(tables.v_scale, scale, d);
            for (int j = 0; j < n; ++j) {
                for (int i = 0; i < d; ++i) {
                    x[j*d + i] = scale[i]*(x[j*d + i] - mean[i]);
                }
            }
        }
        const float * y = transform_rows(form, tables, few ? nullptr : enc, offset, n, d, x, z);
        for (int j = 0; j < n; ++j) {
            if (bits) {
                for (int i = 0; i < d; i += SEQKV_BLOCK) {
                    queue.push(y + j*d + i, out[j] + i/SEQKV_BLOCK*ggml_type_size(dst->type));
                }
            } else {
                from_float(y + j*d, out[j], d);
            }
        }
    }
    queue.flush();
}

//
// attention
//

// One attention op, seen from one stream.
struct attn_view {
    ggml_seqkv_params p;
    rotations rot;

    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * win;
    const ggml_tensor * cur;
    const ggml_tensor * meta;
    const ggml_tensor * prof;

    int     n_head, group;
    int     bits_k, bits_v;
    int     graded_k;
    form_t  form_k, form_v;
    int64_t n_stream, n_tokens; // tokens per stream
    int64_t n_virt;

    explicit attn_view(const ggml_tensor * dst) : p(get_params(dst)), rot(dst->src[8], p.rot_set),
        q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), sinks(dst->src[4]), win(dst->src[5]),
        cur(dst->src[6]), meta(dst->src[7]), prof(dst->src[9]) {
        n_head   = (int) q->ne[1];
        group    = n_head/p.n_head_kv;
        bits_k   = ggml_seqkv_bits(k->type);
        bits_v   = ggml_seqkv_bits(v->type);
        graded_k = ggml_seqkv_graded(k->type);
        form_k   = form_of(k->type, prof);
        form_v   = form_of(v->type, nullptr);
        n_stream = k->ne[2];
        n_tokens = q->ne[2]/n_stream;
        n_virt   = p.n_kv + p.n_win + n_tokens;
    }

    // tables of a head for the values; none if these are of another type
    head_profile tables_v(int h) const { return head_profile(bits_v ? prof : nullptr, p, h); }

    const char * cell_k(int64_t s, int64_t j, int h) const {
        return (const char *) k->data + s*k->nb[2] + j*k->nb[1] + h*ggml_row_size(k->type, p.dk);
    }
    const char * cell_v(int64_t s, int64_t j, int h) const {
        return (const char *) v->data + s*v->nb[2] + j*v->nb[1] + h*ggml_row_size(v->type, p.dv);
    }
    // frame row of an exact row, j counted on the virtual axis
    const ggml_fp16_t * exact(int64_t s, int64_t j) const {
        return j < p.n_kv + p.n_win ?
            (const ggml_fp16_t *) ((const char *) win->data + s*win->nb[2] + (j - p.n_kv)*win->nb[1]) :
            (const ggml_fp16_t *) ((const char *) cur->data + (s*n_tokens + j - p.n_kv - p.n_win)*cur->nb[1]);
    }
    const ggml_fp16_t * mask_row(int64_t s, int64_t t) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + s*mask->nb[3] + t*mask->nb[1]);
    }
    const int32_t * meta_row(int64_t s) const { return (const int32_t *) ((const char *) meta->data + s*meta->nb[1]); }
    const float * query(int64_t s, int64_t t, int h) const {
        return (const float *) ((const char *) q->data + h*q->nb[1] + (s*n_tokens + t)*q->nb[2]);
    }
};

static void to_float(const ggml_tensor * t, const void * src, float * dst, int64_t n) {
    if (t->type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(src, dst, n);
    }
}

// The oracle: every row decoded to absolute K and V, then seqkv_attention.
static void attn_ref(const ggml_compute_params * params, ggml_tensor * dst) {
    const attn_view a(dst);
    const auto & p = a.p;

    std::vector<float> k(a.n_virt*p.dk), v(a.n_virt*p.dv), mask(a.n_virt);

    for (int64_t unit = params->ith; unit < a.n_stream*p.n_head_kv; unit += params->nth) {
        const int64_t s = unit/p.n_head_kv;
        const int     h = unit%p.n_head_kv;
        const int32_t * meta = a.meta_row(s);

        const head_profile tables(a.form_k == DENSE ? a.prof : nullptr, p, h);
        const auto dec   = floats(tables.dec,  p.dk*p.dk);
        const auto pred  = floats(tables.pred, SEQKV_FRAME*p.dk);
        const auto mean  = floats(a.tables_v(h).v_mean,  p.dv);
        const auto scale = floats(a.tables_v(h).v_scale, p.dv);

        for (int64_t j = 0; j < a.n_virt; ++j) {
            float * kj = k.data() + j*p.dk;
            float * vj = v.data() + j*p.dv;
            if (meta[j] < 0) {
                continue;
            }
            if (j >= p.n_kv) {
                ggml_cpu_fp16_to_fp32(a.exact(s, j) + h*p.dk, kj, p.dk);
                ggml_cpu_fp16_to_fp32(a.exact(s, j) + p.n_head_kv*p.dk + h*p.dv, vj, p.dv);
            } else {
                if (a.bits_k) {
                    seqkv_decode_key(a.bits_k, a.graded_k, a.cell_k(s, j, h), p.dk, dec.empty() ? nullptr : dec.data(),
                            pred.empty() ? nullptr : pred.data() + (meta[j] & 255)*p.dk, kj);
                } else {
                    to_float(a.k, a.cell_k(s, j, h), kj, p.dk);
                    if (a.form_k == HADAMARD) {
                        seqkv_fwht(kj, p.dk);
                    }
                }
                if (a.bits_v) {
                    seqkv_decode_value(a.bits_v, a.cell_v(s, j, h), p.dv, mean.empty() ? nullptr : mean.data(), scale.empty() ? nullptr : scale.data(), vj);
                } else {
                    to_float(a.v, a.cell_v(s, j, h), vj, p.dv);
                    if (a.form_v == HADAMARD) {
                        seqkv_fwht(vj, p.dv);
                    }
                }
            }
            seqkv_rotate(kj, a.rot.origin(meta[j]), p.n_rot, p.neox, 0);
        }

        for (int64_t t = 0; t < a.n_tokens; ++t) {
            ggml_cpu_fp16_to_fp32(a.mask_row(s, t), mask.data(), a.n_virt);
            for (int g = 0; g < a.group; ++g) {
                const int head = h*a.group + g;
                seqkv_attention(a.query(s, t, head), k.data(), v.data(), mask.data(), a.n_virt, p.dk, p.dv, p.scale, p.softcap,
                        a.sinks ? (const float *) a.sinks->data + head : nullptr,
                        (float *) ((char *) dst->data + head*dst->nb[1] + (s*a.n_tokens + t)*dst->nb[2]));
            }
        }
    }
}

// Scratch of one thread. Shapes in floats; nq: query rows of the largest tile.
struct attn_scratch {
    float * q;     // (nq, dk)     queries as given
    float * qs;    // (FRAME_Q, dk) the same, the two of each rotated pair swapped
    float * qr;    // (FRAME_Q, dk) queries rotated
    float * qf;    // (FRAMES, FRAME_Q, dk) queries in the frames of the next tiles, in the domain of the keys
    float * turn;  // (2, FRAMES, dk/2) these frames' cosines and sines
    float * wv;    // (2, dk/2, dk) what they are multiplied with, for one query
    float * sums;  // (2, FRAMES, dk) the products
    float * k;     // (TILE, dk)   keys of a tile
    float * kt;    // (dk, TILE)   the same, transposed
    float * ka;    // (dk, TILE)   the same, transformed back
    float * v;     // (TILE, dv)   values of a tile, transformed if their type is
    float * s;     // (nq, TILE)   scores, then probabilities
    float * acc_z; // (nq, dv)     sum of p z over transformed values
    float * acc_x; // (nq, dv)     sum of p v over exact rows
    float * dec;   // (dk, dk)     D
    float * pred;  // (64, dk)     E R(offset) mean
    float * add;   // (TILE, dk)   the same for the rows of a tile, in the order of their levels
    float * m;     // (nq)         running maximum
    float * l;     // (nq)         running sum of p
    float * l_z;   // (nq)         its part over transformed values
    level_tile x;  //              rows of a tile as levels: keys, then values

    static constexpr int FRAME_Q = TILE/2; // with up to so many query rows, these are rotated and not the keys
    static constexpr int FRAMES  = CHUNK/SEQKV_FRAME + 1;

    static size_t floats(const attn_view & a) {
        const size_t dk = a.p.dk, dv = a.p.dv, nq = tile_tokens(a)*a.group;
        const size_t levels = std::max(dk, dv)/SEQKV_BLOCK*(level_tile::LV/sizeof(float) + level_tile::F);
        const size_t tables = a.form_k == DENSE ? 2*dk*dk + SEQKV_FRAME*dk + TILE*dk + FRAMES*3*dk : 0;
        const size_t n = nq*(dk + 2*dv + TILE + 3) + FRAME_Q*2*dk + frame_rows(a)*dk + TILE*(3*dk + dv) + levels + tables;
        return GGML_PAD(n, 16) + 16; // threads do not share cache lines
    }
    static int64_t tile_tokens(const attn_view & a) {
        return std::max<int64_t>(1, std::min<int64_t>(a.n_tokens, TILE_Q/a.group));
    }
    // of qf: one frame at a time without D
    static size_t frame_rows(const attn_view & a) {
        return std::min<size_t>(FRAME_Q, tile_tokens(a)*a.group)*(a.form_k == DENSE ? FRAMES : 1);
    }
    attn_scratch(float * w, const attn_view & a) {
        const size_t dk = a.p.dk, dv = a.p.dv, nq = tile_tokens(a)*a.group;
        const auto take = [&w](size_t n) { float * r = w; w += n; return r; };
        q     = take(nq*dk);
        qs    = take(FRAME_Q*dk);
        qr    = take(FRAME_Q*dk);
        qf    = take(frame_rows(a)*dk);
        k     = take(TILE*dk);
        kt    = take(TILE*dk);
        ka    = take(TILE*dk);
        v     = take(TILE*dv);
        s     = take(nq*TILE);
        acc_z = take(nq*dv);
        acc_x = take(nq*dv);
        x.lv  = (int8_t *) take(std::max(dk, dv)/SEQKV_BLOCK*level_tile::LV/sizeof(float));
        x.f   = take(std::max(dk, dv)/SEQKV_BLOCK*level_tile::F);
        dec   = a.form_k == DENSE ? take(dk*dk) : nullptr;
        pred  = a.form_k == DENSE ? take(SEQKV_FRAME*dk) : nullptr;
        add   = a.form_k == DENSE ? take(TILE*dk) : nullptr;
        turn  = a.form_k == DENSE ? take(FRAMES*dk) : nullptr;
        wv    = a.form_k == DENSE ? take(dk*dk) : nullptr;
        sums  = a.form_k == DENSE ? take(2*FRAMES*dk) : nullptr;
        m     = take(nq);
        l     = take(nq);
        l_z   = take(nq);
    }
};

// Attention of one KV head's query tile over a range of the virtual axis.
struct attn_worker {
    const attn_view    & a;
    const attn_scratch & w;
    int64_t s;        // stream
    int     h;        // KV head
    int64_t t0;       // first token of the tile
    int64_t end = 0;  // of the range of the virtual axis
    int     nt, nq;   // tokens, query rows = nt*group; row r is token r/group, head r%group
    int     n_frames = 0; // what w.qf holds: nq rows for each frame
    int32_t frames[attn_scratch::FRAMES]; // its origin row of rot
    form_t  q_form   = PLAIN;
    bool    has_tables = false;
    int32_t offsets[TILE]; // of the rows that w.add is for
    bool    has_z      = false; // transformed values have been read

    attn_worker(const attn_view & a, const attn_scratch & w, int64_t s, int h, int64_t t0, int nt) :
        a(a), w(w), s(s), h(h), t0(t0), nt(nt), nq(nt*a.group) {
        const auto & p = a.p;
        for (int r = 0; r < nq; ++r) {
            memcpy(w.q + r*p.dk, a.query(s, t0 + r/a.group, h*a.group + r%a.group), p.dk*sizeof(float));
        }
        for (int r = 0; nq <= attn_scratch::FRAME_Q && r < nq; ++r) {
            swap_pairs(w.q + r*p.dk, w.qs + r*p.dk);
        }
        std::fill(w.acc_z, w.acc_z + nq*p.dv, 0.0f);
        std::fill(w.acc_x, w.acc_x + nq*p.dv, 0.0f);
        std::fill(w.m,   w.m   + nq, -INFINITY);
        std::fill(w.l,   w.l   + nq, 0.0f);
        std::fill(w.l_z, w.l_z + nq, 0.0f);
    }

    // D and the predictions, converted when the first blocks are read
    void set_tables() {
        if (has_tables) {
            return;
        }
        const head_profile tables(a.prof, a.p, h);
        ggml_cpu_fp16_to_fp32(tables.dec,  w.dec,  a.p.dk*a.p.dk);
        ggml_cpu_fp16_to_fp32(tables.pred, w.pred, SEQKV_FRAME*a.p.dk);
        has_tables = true;
        std::iota(offsets, offsets + TILE, 0);
        arrange_predictions(w.pred, a.p.dk, w.add);
    }

    // w.add for the rows of a tile: mostly as it is, since tiles hold the offsets of a frame in their order
    void set_predictions(const int32_t * meta, int n) {
        int32_t differ = 0;
        for (int j = 0; j < n; ++j) {
            differ |= (meta[j] ^ offsets[j]) & 255 & ~(meta[j] >> 31);
        }
        if (!differ) {
            return;
        }
        const int dk = a.p.dk;
        for (int j = 0; j < TILE; ++j) {
            offsets[j] = j < n && meta[j] >= 0 ? meta[j] & 255 : j;
            memcpy(w.k + j*dk, w.pred + offsets[j]*dk, dk*sizeof(float));
        }
        arrange_predictions(w.k, dk, w.add);
    }

    // x[i] -> its partner in the rotation; the others 0
    void swap_pairs(const float * x, float * y) const {
        const int n_rot = a.p.n_rot, half = n_rot/2;
        for (int i = 0; i < half; ++i) {
            const int i0 = a.p.neox ? i : 2*i, i1 = a.p.neox ? i + half : 2*i + 1;
            y[i0] = x[i1];
            y[i1] = x[i0];
        }
        std::fill(y + n_rot, y + a.p.dk, 0.0f);
    }

    // R(-t) q -> y (nq, dk); cs: row of rot for t
    void rotate_queries(const float * cs, float * y) const {
        const int dk = a.p.dk, n_rot = a.p.n_rot, half = n_rot/2;
        float c[MAX_HEAD], sn[MAX_HEAD];
        if (a.p.neox) {
            for (int i = 0; i < half; ++i) {
                c [i] = c[i + half] = cs[2*i];
                sn[i]        =  cs[2*i + 1];
                sn[i + half] = -cs[2*i + 1];
            }
        } else {
            for (int i = 0; i < half; ++i) {
                c [2*i] = c[2*i + 1] = cs[2*i];
                sn[2*i]     =  cs[2*i + 1];
                sn[2*i + 1] = -cs[2*i + 1];
            }
        }
        std::fill(c  + n_rot, c  + dk, 1.0f);
        std::fill(sn + n_rot, sn + dk, 0.0f);
        for (int r = 0; r < nq; ++r) {
            const float * x = w.q + r*dk, * xs = w.qs + r*dk;
            float * yr = y + r*dk;
            for (int i = 0; i < dk; i += VEC) {
                vstore(yr + i, vmad(vload(x + i), vload(c + i), vmul(vload(xs + i), vload(sn + i))));
            }
        }
    }

    // cosines and sines of x from y, rows of rot of n pairs
    static void turn(const float * GGML_RESTRICT x, const float * GGML_RESTRICT y, int n, float * GGML_RESTRICT cosine, float * GGML_RESTRICT sine) {
        for (int i = 0; i < n; ++i) {
            cosine[i] = x[2*i]*y[2*i] + x[2*i + 1]*y[2*i + 1];
            sine  [i] = x[2*i + 1]*y[2*i] - x[2*i]*y[2*i + 1];
        }
    }

    // D^T R(-t0) q for all frames -> w.qf. Of a query turned to t, with its i-th rotated pair (x0, x1) and the rows D0, D1 of D for it,
    //     D^T R(-t0) q = sum_i cos((t0 - t) f_i) W_i + sin((t0 - t) f_i) V_i,   W_i = x0 D0 + x1 D1,  V_i = x1 D0 - x0 D1
    // and the rows of D that are not rotated. With t in the middle, frames as far before as behind it differ in the sines' sign alone.
    void transform_queries() const {
        const auto & p = a.p;
        const int dk = p.dk, n_pair = p.n_rot/2, last = (n_frames - 1)/2; // last frame before the middle, which is half a frame behind its origin
        float middle[MAX_HEAD];
        const float * x = a.rot.origin(frames[last] << 8), * half = a.rot.offset(SEQKV_FRAME/2);
        for (int i = 0; i < 2*n_pair; i += 2) {
            middle[i]     = x[i]*half[i] - x[i + 1]*half[i + 1];
            middle[i + 1] = x[i + 1]*half[i] + x[i]*half[i + 1];
        }
        float * cosine = w.turn, * sine = w.turn + attn_scratch::FRAMES*n_pair;
        for (int f = 0; f < n_frames; ++f) {
            turn(a.rot.origin(frames[f] << 8), middle, n_pair, cosine + f*n_pair, sine + f*n_pair);
        }
        // frames are at any distance after a context shift; equal to the rounding of rot is enough
        const auto mirror = [last](int f) { return 2*last + 1 - f; };
        int differ = 0;
        for (int f = std::max(0, mirror(n_frames - 1)); f <= last; ++f) {
            const int g = mirror(f);
            for (int i = 0; i < n_pair; ++i) {
                differ |= fabsf(cosine[f*n_pair + i] - cosine[g*n_pair + i]) > 1e-6f;
                differ |= fabsf(sine  [f*n_pair + i] + sine  [g*n_pair + i]) > 1e-6f;
            }
        }
        const bool mirrored = !differ;
        const int  n        = mirrored ? last + 1 : n_frames;

        rotate_queries(middle, w.qr);
        float * W = w.wv, * V = w.wv + n_pair*dk, * even = w.sums, * odd = w.sums + n*dk;
        for (int r = 0; r < nq; ++r) {
            x = w.qr + r*dk;
            for (int i = 0; i < n_pair; ++i) {
                const int i0 = p.neox ? i : 2*i, i1 = p.neox ? i + n_pair : 2*i + 1;
                const vec x0 = vset1(x[i0]), x1 = vset1(x[i1]), minus_x0 = vset1(-x[i0]);
                for (int c = 0; c < dk; c += VEC) {
                    const vec d0 = vload(w.dec + i0*dk + c), d1 = vload(w.dec + i1*dk + c);
                    vstore(W + i*dk + c, vmad(x0, d0, vmul(x1, d1)));
                    vstore(V + i*dk + c, vmad(x1, d0, vmul(minus_x0, d1)));
                }
            }
            std::fill(even, even + 2*n*dk, 0.0f);
            if (p.n_rot < dk) {
                mad_rows(x + p.n_rot, dk, w.dec + p.n_rot*dk, 1, dk - p.n_rot, dk, even);
                for (int f = 1; f < n; ++f) {
                    memcpy(even + f*dk, even, dk*sizeof(float));
                }
            }
            mad_rows(cosine, n_pair, W, n, n_pair, dk, even);
            mad_rows(sine,   n_pair, V, n, n_pair, dk, odd);
            for (int f = 0; f < n; ++f) {
                float * y = w.qf + (f*nq + r)*dk;
                for (int c = 0; c < dk; c += VEC) {
                    vstore(y + c, vadd(vload(even + f*dk + c), vload(odd + f*dk + c)));
                }
                if (mirrored && mirror(f) < n_frames) {
                    y = w.qf + (mirror(f)*nq + r)*dk;
                    for (int c = 0; c < dk; c += VEC) {
                        vstore(y + c, vmad(vset1(-1.0f), vload(odd + f*dk + c), vload(even + f*dk + c)));
                    }
                }
            }
        }
    }

    // Queries R(-t0) q in the domain of the keys: as they are, H R(-t0) q or D^T R(-t0) q. With D those of the frames after row j0
    // are made as well.
    const float * frame_queries(int64_t j0, int32_t origin, form_t form) {
        const int dk = a.p.dk;
        for (int k = 0; k < n_frames; ++k) {
            if (frames[k] == origin && q_form == form) {
                return w.qf + k*nq*dk;
            }
        }
        q_form    = form;
        n_frames  = 1;
        frames[0] = origin;
        if (form == DENSE) {
            const int32_t     * meta = a.meta_row(s);
            const ggml_fp16_t * mask = a.mask_row(s, t0);
            for (int64_t j = j0 + TILE; j < std::min<int64_t>(end, a.p.n_kv) && n_frames < attn_scratch::FRAMES; j += TILE) {
                if (meta[j] >= 0 && meta[j] >> 8 != frames[n_frames - 1] && mask[j] != MASKED) {
                    frames[n_frames++] = meta[j] >> 8;
                }
            }
            transform_queries();
            return w.qf;
        }
        rotate_queries(a.rot.origin(origin << 8), w.qf);
        for (int r = 0; form == HADAMARD && r < nq; ++r) {
            fwht_row(w.qf + r*dk, dk);
        }
        return w.qf;
    }

    // keys of the tile (dk, tw) to absolute positions: inverse transform, then R(origin) column by column. Returns where they are.
    const float * keys_to_absolute(const int32_t * meta, int n, int tw, form_t form, bool one_origin) {
        const auto & p = a.p;
        float * keys = w.kt;
        if (form == HADAMARD) {
            fwht_columns(keys, p.dk, tw);
        } else if (form == DENSE) {
            keys = w.ka;
            std::fill(keys, keys + p.dk*tw, 0.0f);
            simd_gemm(keys, w.dec, w.kt, p.dk, p.dk, tw);
        }
        for (int i = 0; i < p.n_rot/2; ++i) {
            float * GGML_RESTRICT x = keys + (p.neox ? i : 2*i)*tw;
            float * GGML_RESTRICT y = keys + (p.neox ? i + p.n_rot/2 : 2*i + 1)*tw;
            float c[TILE], sn[TILE];
            if (one_origin) {
                const float * cs = a.rot.origin(first_origin(meta, n) << 8) + 2*i;
                std::fill(c,  c  + tw, cs[0]);
                std::fill(sn, sn + tw, cs[1]);
            } else {
                for (int j = 0; j < tw; ++j) {
                    const float * cs = a.rot.origin(j < n ? std::max(meta[j], 0) : 0) + 2*i;
                    c[j]  = cs[0];
                    sn[j] = cs[1];
                }
            }
            for (int j = 0; j < tw; ++j) {
                const float u = x[j], v = y[j];
                x[j] = u*c[j] - v*sn[j];
                y[j] = u*sn[j] + v*c[j];
            }
        }
        return keys;
    }

    static int32_t first_origin(const int32_t * meta, int n) {
        for (int j = 0; j < n; ++j) {
            if (meta[j] >= 0) {
                return meta[j] >> 8;
            }
        }
        return 0;
    }

    // products of token t's rows with a tile -> probabilities, and what was summed up before is scaled to the new maximum
    void softmax(int t, const float * bias, int n, int tw, bool transformed_v) const {
        const auto & p = a.p;
        const int first = t*a.group;
        float scale = p.scale;
        if (p.softcap != 0.0f) {
            for (int r = first; r < first + a.group; ++r) {
                for (int j = 0; j < n; ++j) {
                    w.s[r*tw + j] = tanhf(w.s[r*tw + j]*p.scale/p.softcap);
                }
            }
            scale = p.softcap;
        }
        // step by step for all rows, which wait for nothing of each other
        float max[GGML_SEQKV_MAX_GROUP];
        for (int g = 0; g < a.group; ++g) {
            max[g] = scale_row(w.s + (first + g)*tw, scale, bias, tw);
        }
        for (int r = first; r < first + a.group; ++r) {
            if (max[r - first] > w.m[r]) {
                const float f = expf(w.m[r] - max[r - first]);
                w.m[r]    = max[r - first];
                w.l[r]   *= f;
                w.l_z[r] *= f;
                ggml_vec_scale_f32(p.dv, w.acc_z + r*p.dv, f);
                ggml_vec_scale_f32(p.dv, w.acc_x + r*p.dv, f);
            }
        }
        for (int r = first; r < first + a.group; ++r) {
            float * sr = w.s + r*tw;
            if (max[r - first] == -INFINITY) {
                std::fill(sr, sr + tw, 0.0f);
                continue;
            }
            const float sum = exp_row(sr, w.m[r], tw);
            w.l[r] += sum;
            if (transformed_v) {
                w.l_z[r] += sum;
            }
        }
    }

    // rows [j0, j0 + n) of the virtual axis, all cells or all exact rows
    void tile(int64_t j0, int n, bool one_origin) {
        const auto & p = a.p;
        const int32_t * meta = a.meta_row(s) + j0;
        const bool cells = j0 < p.n_kv;

        uint16_t seen[TILE] = { 0 }; // not 0: some query attends to the row
        for (int t = 0; t < nt; ++t) {
            const ggml_fp16_t * mask = a.mask_row(s, t0 + t) + j0;
            for (int j = 0; j < n; ++j) {
                seen[j] |= mask[j] ^ MASKED;
            }
        }
        bool live[TILE];
        uint16_t any_live = 0;
        for (int j = 0; j < TILE; ++j) {
            live[j]   = seen[j] != 0;
            any_live |= seen[j];
        }
        if (!any_live) {
            return;
        }

        // tile width: a multiple of the vector width; the columns beyond n and the rows left out are zero
        const int    tw      = GGML_PAD(n, 16);
        const form_t form    = cells ? a.form_k : PLAIN;
        const bool   frame_q = one_origin && nq <= attn_scratch::FRAME_Q; // rotate the queries, or the keys, whichever are fewer

        if (form == DENSE) {
            set_tables();
        }

        const next_rows next = {
            a.cell_k(s, j0 + TILE, h), a.cell_v(s, j0 + TILE, h), a.k->nb[1], a.v->nb[1], ggml_row_size(a.k->type, p.dk), ggml_row_size(a.v->type, p.dv),
        };
        for (int j = 0; cells && !(a.bits_k && frame_q) && j < TILE; ++j) {
            next.prefetch_row(j);
        }

        if (cells && a.bits_k) {
            if (form == DENSE) {
                set_predictions(meta, n);
            }
            unpack_keys(a.bits_k, a.graded_k, a.cell_k(s, j0, h), a.k->nb[1], live, n, p.dk, w.x);
            if (frame_q) {
                const float * q = frame_queries(j0, first_origin(meta, n), form);
                const auto dot = !a.graded_k ? dot_keys<0, false> : form == DENSE ? dot_keys<1, true> : dot_keys<1, false>;
                dot(q, w.x, w.add, &next, nq, tw, p.dk, w.s, tw);
            } else {
                const auto to_floats = !a.graded_k ? key_floats<0, false> : form == DENSE ? key_floats<1, true> : key_floats<1, false>;
                to_floats(w.x, w.add, tw, p.dk, w.k, w.kt);
            }
        } else {
            for (int j = 0; j < tw; ++j) {
                float * kj = w.k + j*p.dk;
                if (!live[j]) {
                    std::fill(kj, kj + p.dk, 0.0f);
                } else if (cells) {
                    to_float(a.k, a.cell_k(s, j0 + j, h), kj, p.dk);
                } else {
                    ggml_cpu_fp16_to_fp32(a.exact(s, j0 + j) + h*p.dk, kj, p.dk);
                }
            }
        }

        if (cells && a.bits_k && frame_q) {
            // done
        } else if (frame_q) {
            dot_rows(frame_queries(j0, first_origin(meta, n), form), w.k, nq, tw, p.dk, w.s, tw);
        } else {
            if (!cells || !a.bits_k) {
                transpose(w.k, w.kt, tw, p.dk);
            }
            std::fill(w.s, w.s + nq*tw, 0.0f);
            simd_gemm(w.s, w.q, keys_to_absolute(meta, n, tw, form, one_origin), nq, p.dk, tw);
        }

        const bool transformed_v = cells && a.form_v != PLAIN;
        for (int t = 0; t < nt; ++t) {
            const ggml_fp16_t * mask = a.mask_row(s, t0 + t) + j0;
            float bias[TILE]; // 0 or -inf
            for (int j = 0; j < n; ++j) {
                bias[j] = mask[j] == MASKED ? -INFINITY : 0.0f;
            }
            std::fill(bias + n, bias + tw, -INFINITY);
            softmax(t, bias, n, tw, transformed_v);
        }

        has_z |= transformed_v;
        if (cells && a.bits_v) {
            unpack_values(a.bits_v, a.cell_v(s, j0, h), a.v->nb[1], live, n, p.dv, w.x);
            if (frame_q) {
                mad_values(w.s, tw, w.x, nq, tw, p.dv, w.acc_z);
                return;
            }
            value_floats(w.x, tw, p.dv, w.v);
        } else {
            for (int j = 0; j < tw; ++j) {
                float * vj = w.v + j*p.dv;
                if (!live[j]) {
                    std::fill(vj, vj + p.dv, 0.0f);
                } else if (cells) {
                    to_float(a.v, a.cell_v(s, j0 + j, h), vj, p.dv);
                } else {
                    ggml_cpu_fp16_to_fp32(a.exact(s, j0 + j) + p.n_head_kv*p.dk + h*p.dv, vj, p.dv);
                }
            }
        }
        mad_rows(w.s, tw, w.v, nq, tw, p.dv, transformed_v ? w.acc_z : w.acc_x);
    }

    // rows [j0, j1): runs of one frame become tiles; where cells are out of order, mixed tiles
    void range(int64_t j0, int64_t j1) {
        end = j1;
        const auto    & p    = a.p;
        const int32_t * meta = a.meta_row(s); // < 0: not in use
        while (j0 < j1) {
            // tiles begin at a row in use, so that free cells and slots before it do not change the order of sums
            if (meta[j0] < 0) {
                ++j0;
                continue;
            }
            const int64_t stop = std::min(std::min(j1, j0 < p.n_kv ? (int64_t) p.n_kv : j1), j0 + TILE);
            int32_t origin = -1, differ = 0;
            int64_t j = j0, last = j0; // last: of the rows in use
            for (int64_t i = j0; i < stop; ++i) {
                differ |= meta[i] ^ meta[j0];
            }
            if (differ >> 8 == 0) { // mostly
                j    = stop;
                last = stop - 1;
            }
            for (; j < stop; ++j) {
                if (meta[j] >= 0) {
                    if (origin >= 0 && meta[j] >> 8 != origin) {
                        break;
                    }
                    origin = meta[j] >> 8;
                    last   = j;
                }
            }
            const bool one_origin = j == stop || j - j0 >= MIN_RUN;
            const int64_t n = one_origin ? j - j0 : stop - j0;
            tile(j0, (int) (one_origin ? last + 1 - j0 : n), one_origin);
            j0 += n;
        }
    }

    // acc_x <- acc_x + l_z mean + (H acc_z)/scale: everything in the value domain, not yet divided by l
    void finish() {
        const auto & p = a.p;
        if (!has_z) {
            return;
        }
        const head_profile tables = a.tables_v(h);
        float mean[MAX_HEAD], inv[MAX_HEAD];
        for (int i = 0; i < p.dv; ++i) {
            mean[i] = tables.v_mean  ? GGML_CPU_FP16_TO_FP32(tables.v_mean[i])       : 0.0f;
            inv[i]  = tables.v_scale ? 1.0f/GGML_CPU_FP16_TO_FP32(tables.v_scale[i]) : 1.0f;
        }
        for (int r = 0; r < nq; ++r) {
            float * z = w.acc_z + r*p.dv;
            float * x = w.acc_x + r*p.dv;
            fwht_row(z, p.dv);
            for (int i = 0; i < p.dv; ++i) {
                x[i] += z[i]*inv[i] + w.l_z[r]*mean[i];
            }
        }
    }
};

// out = acc/l with the sink's logit in the sum
static void write_output(const attn_view & a, ggml_tensor * dst, int64_t token, int head, const float * acc, float m, float l) {
    if (a.sinks) {
        const float sink  = ((const float *) a.sinks->data)[head];
        const float max   = std::max(sink, m);
        const float scale = m == -INFINITY ? 0.0f : expf(m - max);
        l = l*scale + expf(sink - max);
        const float f = scale/l;
        float * out = (float *) ((char *) dst->data + head*dst->nb[1] + token*dst->nb[2]);
        for (int i = 0; i < a.p.dv; ++i) {
            out[i] = acc[i]*f;
        }
        return;
    }
    float * out = (float *) ((char *) dst->data + head*dst->nb[1] + token*dst->nb[2]);
    const float f = l > 0.0f ? 1.0f/l : 0.0f;
    for (int i = 0; i < a.p.dv; ++i) {
        out[i] = acc[i]*f;
    }
}

// KV chunks of one query tile: several in decode, where there are too few query tiles to share among threads
static int64_t n_chunks(const attn_view & a) {
    return a.n_tokens <= 8 ? (a.n_virt + CHUNK - 1)/CHUNK : 1;
}

size_t ggml_seqkv_work_size(const ggml_tensor * dst, int n_tasks) {
    if (dst->op == GGML_OP_SEQKV_STORE) {
        return store_floats(get_params(dst))*n_tasks*sizeof(float) + LINE;
    }
    const attn_view a(dst);
    const size_t scratch  = attn_scratch::floats(a)*n_tasks;
    const size_t partials = n_chunks(a) > 1 ? a.n_stream*a.n_tokens*a.n_head*n_chunks(a)*(a.p.dv + 2) : 0;
    return (scratch + partials)*sizeof(float) + LINE;
}

void ggml_compute_forward_seqkv_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref) {
        attn_ref(params, dst);
        return;
    }

    const attn_view a(dst);
    const auto & p = a.p;

    float * wdata = scratch(params);
    const attn_scratch w(wdata + params->ith*attn_scratch::floats(a), a);
    float * partials = wdata + params->nth*attn_scratch::floats(a); // (tokens, heads, chunks, dv + 2)

    const int64_t nc      = n_chunks(a);
    const int64_t tile_t  = attn_scratch::tile_tokens(a);
    const int64_t n_tiles = (a.n_tokens + tile_t - 1)/tile_t;
    const int64_t n_units = a.n_stream*n_tiles*p.n_head_kv*nc;

    for (int64_t unit = params->ith; unit < n_units; unit += params->nth) {
        const int     h  = (int) (unit%p.n_head_kv); // all heads of the same cells: these share cache lines
        const int64_t c  = unit/p.n_head_kv%nc;
        const int64_t ti = unit/p.n_head_kv/nc%n_tiles;
        const int64_t s  = unit/p.n_head_kv/nc/n_tiles;
        const int64_t t0 = ti*tile_t;
        const int     nt = (int) std::min<int64_t>(tile_t, a.n_tokens - t0);

        attn_worker worker(a, w, s, h, t0, nt);
        worker.range(nc > 1 ? c*CHUNK : 0, nc > 1 ? std::min<int64_t>((c + 1)*CHUNK, a.n_virt) : a.n_virt);
        worker.finish();

        for (int r = 0; r < worker.nq; ++r) {
            const int64_t token = s*a.n_tokens + t0 + r/a.group;
            const int     head  = h*a.group + r%a.group;
            const float * acc   = w.acc_x + r*p.dv;
            if (nc == 1) {
                write_output(a, dst, token, head, acc, w.m[r], w.l[r]);
            } else {
                float * part = partials + ((token*a.n_head + head)*nc + c)*(p.dv + 2);
                part[0] = w.m[r];
                part[1] = w.l[r];
                memcpy(part + 2, acc, p.dv*sizeof(float));
            }
        }
    }

    if (nc == 1) {
        return;
    }

    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < a.n_stream*a.n_tokens*a.n_head; i += params->nth) {
        const float * part = partials + i*nc*(p.dv + 2);
        float acc[MAX_HEAD] = { 0.0f };
        float m = -INFINITY, l = 0.0f;
        for (int64_t c = 0; c < nc; ++c) {
            m = std::max(m, part[c*(p.dv + 2)]);
        }
        for (int64_t c = 0; m > -INFINITY && c < nc; ++c) {
            const float * pc = part + c*(p.dv + 2);
            const float f = expf(pc[0] - m);
            l += f*pc[1];
            ggml_vec_mad_f32(p.dv, acc, pc + 2, f);
        }
        write_output(a, dst, i/a.n_head, (int) (i%a.n_head), acc, m, l);
    }
}
