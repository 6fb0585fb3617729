#include "seqkv-cpu.h"

#include "../ggml-seqkv.h"
#include "../seqkv.h"
#include "../block.h"
#include "../tables.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-gemm.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static constexpr int MAX_HEAD = 256;
static constexpr int TILE     = 64;      // rows of the KV axis in a tile
static constexpr int TILE_Q   = GGML_SEQKV_MAX_GROUP; // query rows (tokens x heads of a group) in a tile
static constexpr int CHUNK    = 16*TILE; // KV rows of one unit of work in decode; fixed, so that results do not depend on the number of threads
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

void ggml_compute_forward_seqkv_store(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * cur  = dst->src[0];
    const int64_t     * idxs = (const int64_t *) dst->src[1]->data;
    const ggml_tensor * meta = dst->src[3];
    const ggml_tensor * prof = dst->src[5];

    const ggml_seqkv_params p = get_params(dst);
    const rotations rot(dst->src[4], p.rot_set);

    const bool    is_key = p.part == GGML_SEQKV_KEY;
    const int     d      = is_key ? p.dk : p.dv;
    const int     bits   = ggml_seqkv_bits(dst->type);
    const size_t  head_size = ggml_row_size(dst->type, d);
    const float * mean   = prof ? (const float *) prof->data + (is_key ? 0 : p.n_head_kv*p.dk) : nullptr;

    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(dst->type)->from_float;

    for (int64_t t = params->ith; t < cur->ne[1]; t += params->nth) {
        if (idxs[t] < 0) {
            continue;
        }
        GGML_ASSERT(idxs[t] < dst->ne[1]);

        const ggml_fp16_t * row = (const ggml_fp16_t *) ((const char *) cur->data + t*cur->nb[1]);
        char * out = (char *) dst->data + idxs[t]*dst->nb[1];

        if (p.part == GGML_SEQKV_ROW) {
            memcpy(out, row, cur->ne[0]*sizeof(ggml_fp16_t));
            continue;
        }

        for (int h = 0; h < p.n_head_kv; ++h) {
            float x[MAX_HEAD];
            ggml_cpu_fp16_to_fp32(row + (is_key ? 0 : p.n_head_kv*p.dk) + h*d, x, d);
            if (bits == 0) {
                from_float(x, out + h*head_size, d);
            } else if (is_key) {
                seqkv_encode_key(bits, x, d, mean ? mean + h*d : nullptr, rot.offset(token_meta(meta, p, t)), p.n_rot, p.neox, out + h*head_size);
            } else {
                seqkv_encode_value(bits, x, d, mean ? mean + h*d : nullptr, out + h*head_size);
            }
        }
    }
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
    int64_t n_stream, n_tokens; // tokens per stream
    int64_t n_virt;

    explicit attn_view(const ggml_tensor * dst) : p(get_params(dst)), rot(dst->src[8], p.rot_set),
        q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), sinks(dst->src[4]), win(dst->src[5]),
        cur(dst->src[6]), meta(dst->src[7]), prof(dst->src[9]) {
        n_head   = (int) q->ne[1];
        group    = n_head/p.n_head_kv;
        bits_k   = ggml_seqkv_bits(k->type);
        bits_v   = ggml_seqkv_bits(v->type);
        n_stream = k->ne[2];
        n_tokens = q->ne[2]/n_stream;
        n_virt   = p.n_kv + p.n_win + n_tokens;
    }

    const float * mean_k(int h) const { return prof ? (const float *) prof->data + h*p.dk : nullptr; }
    const float * mean_v(int h) const { return prof ? (const float *) prof->data + p.n_head_kv*p.dk + h*p.dv : nullptr; }

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
                    seqkv_decode_key(a.bits_k, a.cell_k(s, j, h), p.dk, a.mean_k(h), a.rot.offset(meta[j]), p.n_rot, p.neox, kj);
                } else {
                    to_float(a.k, a.cell_k(s, j, h), kj, p.dk);
                }
                if (a.bits_v) {
                    seqkv_decode_value(a.bits_v, a.cell_v(s, j, h), p.dv, a.mean_v(h), vj);
                } else {
                    to_float(a.v, a.cell_v(s, j, h), vj, p.dv);
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

// one block -> 64 values y[i*stride] += or =
template <int bits>
static inline void unpack_block(const uint8_t * b, float * y, int stride) {
    const float * cb = bits == 2 ? seqkv_codebook2 : bits == 3 ? seqkv_codebook3 : seqkv_codebook4;
    const float gain = seqkv_gain[b[0]];
    float level[1 << bits];
    for (int i = 0; i < 1 << bits; ++i) {
        level[i] = gain*cb[i];
    }
    if (bits == 4) {
        for (int i = 0; i < 32; ++i) {
            y[ i      *stride] = level[b[1 + i] & 15];
            y[(i + 32)*stride] = level[b[1 + i] >> 4];
        }
        return;
    }
    uint8_t code[64];
    for (int k = 0; k < 4; ++k) {
        for (int i = 0; i < 16; ++i) {
            code[16*k + i] = b[1 + i] >> 2*k & 3;
        }
    }
    if (bits == 3) {
        for (int k = 0; k < 8; ++k) {
            for (int i = 0; i < 8; ++i) {
                code[8*k + i] |= (b[17 + i] >> k & 1) << 2;
            }
        }
    }
    for (int i = 0; i < 64; ++i) {
        y[i*stride] = level[code[i]];
    }
}

static void unpack_head(int bits, const char * src, float * y, int d, int stride) {
    const size_t bs = bits == 2 ? sizeof(block_seqkv2) : bits == 3 ? sizeof(block_seqkv3) : sizeof(block_seqkv4);
    for (int i = 0; i < d; i += SEQKV_BLOCK, src += bs) {
        switch (bits) {
            case 2:  unpack_block<2>((const uint8_t *) src, y + i*stride, stride); break;
            case 3:  unpack_block<3>((const uint8_t *) src, y + i*stride, stride); break;
            default: unpack_block<4>((const uint8_t *) src, y + i*stride, stride); break;
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
        float y[16] = { 0.0f };
        for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 16; ++j) {
                y[j] += x[i + k]*had16.m[k][j];
            }
        }
        for (int j = 0; j < 16; ++j) {
            x[i + j] = s*y[j];
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

// Scratch of one thread. Shapes in floats.
struct attn_scratch {
    float * q;     // (TILE_Q, dk)   queries as given
    float * qf;    // (TILE_Q, dk)   queries in the frame of the current tile, transformed if the tile is
    float * kt;    // (dk, TILE)     keys of a tile, transposed
    float * v;     // (TILE, dv)     values of a tile, transformed if they are blocks
    float * s;     // (TILE_Q, TILE) scores, then probabilities
    float * acc_z; // (TILE_Q, dv)   sum of p z over blocks
    float * acc_x; // (TILE_Q, dv)   sum of p v over exact rows
    float * pred;  // (64, dk)       H R(offset) mean
    float * m;     // (TILE_Q)       running maximum
    float * l;     // (TILE_Q)       running sum of p
    float * l_z;   // (TILE_Q)       its part over blocks

    static size_t floats(int dk, int dv) {
        return TILE_Q*(2*dk + 2*dv + TILE + 3) + TILE*(2*dk + dv) + CACHE_LINE_SIZE_F32;
    }
    attn_scratch(float * w, int dk, int dv) {
        const auto take = [&w](size_t n) { float * r = w; w += n; return r; };
        q     = take(TILE_Q*dk);
        qf    = take(TILE_Q*dk);
        kt    = take(TILE*dk);
        v     = take(TILE*dv);
        s     = take(TILE_Q*TILE);
        acc_z = take(TILE_Q*dv);
        acc_x = take(TILE_Q*dv);
        pred  = take(SEQKV_FRAME*dk);
        m     = take(TILE_Q);
        l     = take(TILE_Q);
        l_z   = take(TILE_Q);
    }
    static constexpr size_t CACHE_LINE_SIZE_F32 = 16;
};

// Attention of one KV head's query tile over a range of the virtual axis.
struct attn_worker {
    const attn_view    & a;
    const attn_scratch & w;
    int64_t s;        // stream
    int     h;        // KV head
    int64_t t0;       // first token of the tile
    int     nt, nq;   // tokens, query rows = nt*group; row r is token r/group, head r%group
    int32_t q_origin = -1; // what w.qf holds: origin row of rot
    bool    q_hadamard = false;
    bool    has_pred   = false;

    attn_worker(const attn_view & a, const attn_scratch & w, int64_t s, int h, int64_t t0, int nt) :
        a(a), w(w), s(s), h(h), t0(t0), nt(nt), nq(nt*a.group) {
        const auto & p = a.p;
        for (int r = 0; r < nq; ++r) {
            memcpy(w.q + r*p.dk, a.query(s, t0 + r/a.group, h*a.group + r%a.group), p.dk*sizeof(float));
        }
        std::fill(w.acc_z, w.acc_z + nq*p.dv, 0.0f);
        std::fill(w.acc_x, w.acc_x + nq*p.dv, 0.0f);
        std::fill(w.m,   w.m   + nq, -INFINITY);
        std::fill(w.l,   w.l   + nq, 0.0f);
        std::fill(w.l_z, w.l_z + nq, 0.0f);

    }

    // pred, made when the first blocks are read
    void set_predictions() {
        if (has_pred) {
            return;
        }
        for (int off = 0; off < SEQKV_FRAME; ++off) {
            float * x = w.pred + off*a.p.dk;
            memcpy(x, a.mean_k(h), a.p.dk*sizeof(float));
            seqkv_rotate(x, a.rot.offset(off), a.p.n_rot, a.p.neox, 0);
            fwht_row(x, a.p.dk);
        }
        has_pred = true;
    }

    // queries R(-t0) q, in the transform domain if hadamard
    void set_query_frame(int32_t origin, bool hadamard) {
        if (origin == q_origin && hadamard == q_hadamard) {
            return;
        }
        const float * cs = a.rot.origin(origin << 8);
        memcpy(w.qf, w.q, nq*a.p.dk*sizeof(float));
        for (int r = 0; r < nq; ++r) {
            seqkv_rotate(w.qf + r*a.p.dk, cs, a.p.n_rot, a.p.neox, 1);
            if (hadamard) {
                fwht_row(w.qf + r*a.p.dk, a.p.dk);
            }
        }
        q_origin   = origin;
        q_hadamard = hadamard;
    }

    // keys of the tile to absolute positions: inverse transform, then R(origin) column by column
    void keys_to_absolute(const int32_t * meta, int n, int tw, bool hadamard, bool one_origin) {
        const auto & p = a.p;
        if (hadamard) {
            fwht_columns(w.kt, p.dk, tw);
        }
        for (int i = 0; i < p.n_rot/2; ++i) {
            float * GGML_RESTRICT x = w.kt + (p.neox ? i : 2*i)*tw;
            float * GGML_RESTRICT y = w.kt + (p.neox ? i + p.n_rot/2 : 2*i + 1)*tw;
            float c[TILE], sn[TILE];
            const int32_t any = one_origin ? first_origin(meta, n) << 8 : 0;
            for (int j = 0; j < tw; ++j) {
                const float * cs = a.rot.origin(one_origin || j >= n ? any : std::max(meta[j], 0)) + 2*i;
                c[j]  = cs[0];
                sn[j] = cs[1];
            }
            for (int j = 0; j < tw; ++j) {
                const float u = x[j], v = y[j];
                x[j] = u*c[j] - v*sn[j];
                y[j] = u*sn[j] + v*c[j];
            }
        }
    }

    static int32_t first_origin(const int32_t * meta, int n) {
        for (int j = 0; j < n; ++j) {
            if (meta[j] >= 0) {
                return meta[j] >> 8;
            }
        }
        return 0;
    }

    // rows [j0, j0 + n) of the virtual axis, all cells or all exact rows
    void tile(int64_t j0, int n, bool one_origin) {
        const auto & p = a.p;
        const int32_t * meta = a.meta_row(s) + j0;
        const bool cells = j0 < p.n_kv;

        bool live[TILE];
        bool any_live = false;
        std::fill(live, live + n, false);
        for (int t = 0; t < nt; ++t) {
            const ggml_fp16_t * mask = a.mask_row(s, t0 + t) + j0;
            for (int j = 0; j < n; ++j) {
                live[j] |= mask[j] != 0xfc00; // -inf
            }
        }
        for (int j = 0; j < n; ++j) {
            any_live |= live[j];
        }
        if (!any_live) {
            return;
        }

        // tile width: a multiple of the vector width; the columns beyond n and the rows left out are zero
        const int  tw     = GGML_PAD(n, 16);
        const bool had_k  = cells && a.bits_k;
        const bool frame_q = one_origin && nq <= TILE/2; // rotate the queries, or the keys, whichever are fewer

        if (had_k && a.prof) {
            set_predictions();
        }

        for (int j = 0; j < tw; ++j) {
            float * kt = w.kt + j;
            if (j >= n || !live[j]) {
                for (int i = 0; i < p.dk; ++i) {
                    kt[i*tw] = 0.0f;
                }
            } else if (had_k) {
                unpack_head(a.bits_k, a.cell_k(s, j0 + j, h), kt, p.dk, tw);
                if (a.prof) {
                    const float * pred = w.pred + (meta[j] & 255)*p.dk;
                    for (int i = 0; i < p.dk; ++i) {
                        kt[i*tw] += pred[i];
                    }
                }
            } else {
                float x[MAX_HEAD];
                if (cells) {
                    to_float(a.k, a.cell_k(s, j0 + j, h), x, p.dk);
                } else {
                    ggml_cpu_fp16_to_fp32(a.exact(s, j0 + j) + h*p.dk, x, p.dk);
                }
                for (int i = 0; i < p.dk; ++i) {
                    kt[i*tw] = x[i];
                }
            }
        }

        const float * q = w.q;
        if (frame_q) {
            set_query_frame(first_origin(meta, n), had_k);
            q = w.qf;
        } else {
            keys_to_absolute(meta, n, tw, had_k, one_origin);
        }

        std::fill(w.s, w.s + nq*tw, 0.0f);
        simd_gemm(w.s, q, w.kt, nq, p.dk, tw);

        for (int r = 0; r < nq; ++r) {
            float * sr = w.s + r*tw;
            const ggml_fp16_t * mask = a.mask_row(s, t0 + r/a.group) + j0;
            float max = -INFINITY;
            if (p.softcap != 0.0f) {
                for (int j = 0; j < n; ++j) {
                    sr[j] = p.softcap*tanhf(sr[j]*p.scale/p.softcap);
                }
            } else {
                for (int j = 0; j < n; ++j) {
                    sr[j] *= p.scale;
                }
            }
            for (int j = 0; j < n; ++j) {
                sr[j] += GGML_CPU_FP16_TO_FP32(mask[j]);
                max = std::max(max, sr[j]);
            }
            for (int j = n; j < tw; ++j) {
                sr[j] = -INFINITY;
            }
            if (max == -INFINITY) {
                std::fill(sr, sr + tw, 0.0f);
                continue;
            }
            if (max > w.m[r]) {
                const float f = expf(w.m[r] - max);
                w.m[r]    = max;
                w.l[r]   *= f;
                w.l_z[r] *= f;
                ggml_vec_scale_f32(p.dv, w.acc_z + r*p.dv, f);
                ggml_vec_scale_f32(p.dv, w.acc_x + r*p.dv, f);
            }
            const float sum = (float) ggml_vec_soft_max_f32(tw, sr, sr, w.m[r]);
            w.l[r] += sum;
            if (cells && a.bits_v) {
                w.l_z[r] += sum;
            }
        }

        for (int j = 0; j < tw; ++j) {
            float * vj = w.v + j*p.dv;
            if (j >= n || !live[j]) {
                std::fill(vj, vj + p.dv, 0.0f);
            } else if (!cells) {
                ggml_cpu_fp16_to_fp32(a.exact(s, j0 + j) + p.n_head_kv*p.dk + h*p.dv, vj, p.dv);
            } else if (a.bits_v) {
                unpack_head(a.bits_v, a.cell_v(s, j0 + j, h), vj, p.dv, 1);
            } else {
                to_float(a.v, a.cell_v(s, j0 + j, h), vj, p.dv);
            }
        }
        simd_gemm(cells && a.bits_v ? w.acc_z : w.acc_x, w.s, w.v, nq, tw, p.dv);
    }

    // rows [j0, j1): runs of one frame become tiles; where cells are out of order, mixed tiles
    void range(int64_t j0, int64_t j1) {
        const auto    & p    = a.p;
        const int32_t * meta = a.meta_row(s); // < 0: not in use
        while (j0 < j1) {
            // tiles begin at a row in use, so that free cells and slots before it do not change the order of sums
            if (meta[j0] < 0) {
                ++j0;
                continue;
            }
            const int64_t end = std::min(std::min(j1, j0 < p.n_kv ? (int64_t) p.n_kv : j1), j0 + TILE);
            int32_t origin = -1;
            int64_t j = j0;
            for (; j < end; ++j) {
                if (meta[j] >= 0) {
                    if (origin >= 0 && meta[j] >> 8 != origin) {
                        break;
                    }
                    origin = meta[j] >> 8;
                }
            }
            const bool one_origin = j == end || j - j0 >= MIN_RUN;
            const int64_t n = one_origin ? j - j0 : end - j0;
            tile(j0, (int) n, one_origin);
            j0 += n;
        }
    }

    // acc_x <- acc_x + B^-1 acc_z: everything in the value domain, not yet divided by l
    void finish() {
        const auto & p = a.p;
        if (!a.bits_v) {
            return;
        }
        for (int r = 0; r < nq; ++r) {
            float * z = w.acc_z + r*p.dv;
            float * x = w.acc_x + r*p.dv;
            fwht_row(z, p.dv);
            const float * mean = a.mean_v(h);
            for (int i = 0; i < p.dv; ++i) {
                x[i] += z[i] + (mean ? w.l_z[r]*mean[i] : 0.0f);
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

size_t ggml_seqkv_attn_work_size(const ggml_tensor * dst, int n_tasks) {
    const attn_view a(dst);
    const size_t scratch  = attn_scratch::floats(a.p.dk, a.p.dv)*n_tasks;
    const size_t partials = n_chunks(a) > 1 ? a.n_stream*a.n_tokens*a.n_head*n_chunks(a)*(a.p.dv + 2) : 0;
    return (scratch + partials)*sizeof(float);
}

void ggml_compute_forward_seqkv_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref) {
        attn_ref(params, dst);
        return;
    }

    const attn_view a(dst);
    const auto & p = a.p;

    float * wdata = (float *) params->wdata;
    const attn_scratch w(wdata + params->ith*attn_scratch::floats(p.dk, p.dv), p.dk, p.dv);
    float * partials = wdata + params->nth*attn_scratch::floats(p.dk, p.dv); // (tokens, heads, chunks, dv + 2)

    const int64_t nc      = n_chunks(a);
    const int     tile_t  = std::max<int>(1, std::min<int64_t>(a.n_tokens, TILE_Q/a.group));
    const int64_t n_tiles = (a.n_tokens + tile_t - 1)/tile_t;
    const int64_t n_units = a.n_stream*n_tiles*p.n_head_kv*nc;

    for (int64_t unit = params->ith; unit < n_units; unit += params->nth) {
        const int64_t c  = unit%nc;
        const int     h  = (int) (unit/nc%p.n_head_kv);
        const int64_t ti = unit/nc/p.n_head_kv%n_tiles;
        const int64_t s  = unit/nc/p.n_head_kv/n_tiles;
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
