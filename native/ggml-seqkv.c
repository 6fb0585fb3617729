#include "ggml-seqkv.h"
#include "ggml-impl.h"
#include "seqkv.h"

#include <string.h>

int ggml_seqkv_bits(enum ggml_type type) {
    switch (type) {
#define BITS(type, name, bits, graded) case GGML_TYPE_##type: return bits;
        GGML_SEQKV_TYPES(BITS)
        default: return 0;
    }
}

bool ggml_seqkv_graded(enum ggml_type type) {
    switch (type) {
#define GRADED(type, name, bits, graded) case GGML_TYPE_##type: return graded;
        GGML_SEQKV_TYPES(GRADED)
        default: return false;
    }
}

enum ggml_type ggml_seqkv_type(int bits, bool graded) {
    GGML_ASSERT(bits >= 1 && bits <= 4);
    return (enum ggml_type) ((graded ? GGML_TYPE_SEQKV1K : GGML_TYPE_SEQKV1) + bits - 1);
}

#define ROWS(type, name, bits, graded) \
    void quantize_row_##name  (const float * x, void * y, int64_t n) { seqkv_quantize  (bits, graded, x, n, y, seqkv_bound(bits, graded, n)); } \
    void dequantize_row_##name(const void * x, float * y, int64_t n) { seqkv_dequantize(bits, graded, x, seqkv_bound(bits, graded, n), y, n); }
GGML_SEQKV_TYPES(ROWS)

static void set_params(struct ggml_tensor * t, struct ggml_seqkv_params params) {
    static_assert(sizeof(params) <= GGML_MAX_OP_PARAMS, "op params too large");
    memcpy(t->op_params, &params, sizeof(params));
}

static int64_t row_width(const struct ggml_seqkv_params * p) {
    return (int64_t) p->n_head_kv*(p->dk + p->dv);
}

static void check_prof(const struct ggml_tensor * prof, const struct ggml_seqkv_params * p) {
    GGML_ASSERT(!prof || (prof->type == GGML_TYPE_F16 && ggml_is_contiguous(prof)));
    GGML_ASSERT(!prof || ggml_nelements(prof) == p->n_head_kv*ggml_seqkv_prof_stride(p->dk, p->dv));
}

static void check_meta(const struct ggml_tensor * meta, const struct ggml_seqkv_params * p, int64_t n_tokens) {
    GGML_ASSERT(meta->type == GGML_TYPE_I32 && ggml_is_contiguous(meta) && n_tokens % meta->ne[1] == 0);
    GGML_ASSERT(meta->ne[0] == p->n_kv + p->n_win + n_tokens/meta->ne[1]);
}

struct ggml_tensor * ggml_seqkv_frame(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_seqkv_params params) {
    GGML_ASSERT(k->type == GGML_TYPE_F32 && k->ne[0] == params.dk && k->ne[1] == params.n_head_kv && k->nb[0] == sizeof(float));
    GGML_ASSERT(v->type == GGML_TYPE_F32 && v->ne[0] == params.dv && v->ne[1] == params.n_head_kv && v->nb[0] == sizeof(float));
    GGML_ASSERT(k->ne[2] == v->ne[2] && k->ne[3] == 1 && v->ne[3] == 1);
    check_meta(meta, &params, k->ne[2]);
    GGML_ASSERT(rot->type == GGML_TYPE_F32 && ggml_is_contiguous(rot) && rot->ne[0] >= params.n_rot);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, row_width(&params), k->ne[2]);
    set_params(result, params);
    result->op     = GGML_OP_SEQKV_FRAME;
    result->src[0] = k;
    result->src[1] = v;
    result->src[2] = meta;
    result->src[3] = rot;
    return result;
}

struct ggml_tensor * ggml_seqkv_store(struct ggml_context * ctx, struct ggml_tensor * dst, struct ggml_tensor * cur,
        struct ggml_tensor * idxs, struct ggml_tensor * meta, struct ggml_tensor * prof, struct ggml_seqkv_params params) {
    const int64_t width = params.part == GGML_SEQKV_KEY   ? (int64_t) params.n_head_kv*params.dk
                        : params.part == GGML_SEQKV_VALUE ? (int64_t) params.n_head_kv*params.dv : row_width(&params);
    GGML_ASSERT(dst->ne[0] == width && dst->ne[2] == 1 && dst->ne[3] == 1);
    GGML_ASSERT(params.part != GGML_SEQKV_ROW || dst->type == GGML_TYPE_F16);
    GGML_ASSERT(cur->type == GGML_TYPE_F16 && ggml_is_contiguous(cur) && cur->ne[0] == row_width(&params));
    GGML_ASSERT(idxs->type == GGML_TYPE_I64 && idxs->ne[0] == cur->ne[1]);
    check_meta(meta, &params, cur->ne[1]);
    check_prof(prof, &params);

    struct ggml_tensor * result = ggml_view_tensor(ctx, dst);
    set_params(result, params);
    result->op     = GGML_OP_SEQKV_STORE;
    result->src[0] = cur;
    result->src[1] = idxs;
    result->src[2] = dst;
    result->src[3] = meta;
    result->src[4] = prof;
    return result;
}

struct ggml_tensor * ggml_seqkv_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * mask, struct ggml_tensor * sinks, struct ggml_tensor * win,
        struct ggml_tensor * cur, struct ggml_tensor * meta, struct ggml_tensor * rot, struct ggml_tensor * prof,
        struct ggml_seqkv_params params) {
    const int64_t n_stream = k->ne[2];
    const int64_t n_tokens = q->ne[2];
    const int64_t n_virt   = params.n_kv + params.n_win + n_tokens/n_stream;

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[0] == params.dk && q->nb[0] == sizeof(float) && q->ne[3] == 1);
    GGML_ASSERT(q->ne[1] % params.n_head_kv == 0 && q->ne[1]/params.n_head_kv <= GGML_SEQKV_MAX_GROUP && n_tokens % n_stream == 0);
    GGML_ASSERT(k->ne[0] == (int64_t) params.n_head_kv*params.dk && k->ne[1] == params.n_kv);
    GGML_ASSERT(v->ne[0] == (int64_t) params.n_head_kv*params.dv && v->ne[1] == params.n_kv && v->ne[2] == n_stream);
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && ggml_is_contiguous(mask) && mask->ne[0] >= n_virt);
    GGML_ASSERT(mask->ne[1] == n_tokens/n_stream && mask->ne[3] == n_stream);
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[1]));
    GGML_ASSERT(win->type == GGML_TYPE_F16 && win->ne[0] == row_width(&params) && win->ne[1] >= params.n_win && win->ne[2] == n_stream);
    GGML_ASSERT(cur->type == GGML_TYPE_F16 && ggml_is_contiguous(cur) && cur->ne[0] == row_width(&params) && cur->ne[1] == n_tokens);
    GGML_ASSERT(meta->ne[1] == n_stream);
    check_meta(meta, &params, n_tokens);
    GGML_ASSERT(rot->type == GGML_TYPE_F32 && ggml_is_contiguous(rot) && rot->ne[0] >= params.n_rot);
    check_prof(prof, &params);

    struct ggml_tensor * result = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, params.dv, q->ne[1], n_tokens);
    set_params(result, params);
    result->op     = GGML_OP_SEQKV_ATTN;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = mask;
    result->src[4] = sinks;
    result->src[5] = win;
    result->src[6] = cur;
    result->src[7] = meta;
    result->src[8] = rot;
    result->src[9] = prof;
    return result;
}

// op_params of a kept input, and of a copy of it (version alone)
struct kept_input {
    uint64_t begin, end;
    int32_t  kept, version, base;
};

static struct kept_input get_kept(const struct ggml_tensor * t) {
    static_assert(sizeof(struct kept_input) <= GGML_MAX_OP_PARAMS, "op params too large");
    struct kept_input k;
    memcpy(&k, t->op_params, sizeof(k));
    return k;
}

static void set_kept(struct ggml_tensor * t, struct kept_input k) { memcpy(t->op_params, &k, sizeof(k)); }

void ggml_seqkv_keep_input(struct ggml_tensor * input) {
    struct kept_input k = { 0, 0, 1, 0, 0 };
    set_kept(input, k);
}

bool ggml_seqkv_is_kept(const struct ggml_tensor * input) {
    return input->op == GGML_OP_NONE && (input->flags & GGML_TENSOR_FLAG_INPUT) && !input->view_src && get_kept(input).kept == 1;
}

void ggml_seqkv_set_change(struct ggml_tensor * input, int32_t version, int32_t base, size_t begin, size_t end) {
    struct kept_input k = { begin, end, get_kept(input).kept, version, base };
    set_kept(input, k);
}

bool ggml_seqkv_take_change(const struct ggml_tensor * input, struct ggml_tensor * copy, size_t * begin, size_t * end) {
    if (!ggml_seqkv_is_kept(input)) {
        return false;
    }
    const struct kept_input k = get_kept(input);
    struct kept_input c = get_kept(copy);
    const bool known = k.base > 0 && c.version == k.base;
    *begin = k.begin;
    *end   = k.end;
    c.version = k.version;
    set_kept(copy, c);
    return known;
}
