#include "seqkv-metal-plan.h"

#include <algorithm>
#include <cstring>

static constexpr int MAX_DECODE  = 8;    // tokens of a stream up to which attention works on blocks directly
static constexpr int PART_ROWS   = 64*SEQKV_DECODE_SG; // of a part of decode a multiple: a frame each simdgroup
static constexpr int MIN_GROUPS  = 128;  // threadgroups of decode that keep a large GPU busy
static constexpr int CHUNK       = 4096; // rows of prefill in scratch at a time
static constexpr int EXPAND_SIZE = 128;  // threads that expand rows

typedef ggml_seqkv_metal_step step;

static ggml_seqkv_params params_of(const ggml_tensor * t) {
    ggml_seqkv_params p;
    memcpy(&p, t->op_params, sizeof(p));
    return p;
}

// -1: not one that a cell may have
static int cell_of(ggml_type type) {
    if (ggml_seqkv_bits(type)) {
        return SEQKV_CELL_BLOCKS;
    }
    switch (type) {
        case GGML_TYPE_F32:    return SEQKV_CELL_F32;
        case GGML_TYPE_F16:    return SEQKV_CELL_F16;
        case GGML_TYPE_BF16:   return SEQKV_CELL_BF16;
        case GGML_TYPE_Q8_0:   return SEQKV_CELL_Q8_0;
        case GGML_TYPE_Q4_0:   return SEQKV_CELL_Q4_0;
        case GGML_TYPE_Q4_1:   return SEQKV_CELL_Q4_1;
        case GGML_TYPE_Q5_0:   return SEQKV_CELL_Q5_0;
        case GGML_TYPE_Q5_1:   return SEQKV_CELL_Q5_1;
        case GGML_TYPE_IQ4_NL: return SEQKV_CELL_IQ4_NL;
        default:               return -1;
    }
}

static int form_of(ggml_type type, const ggml_tensor * prof) {
    return !ggml_is_quantized(type) ? SEQKV_PLAIN : prof && ggml_seqkv_graded(type) ? SEQKV_DENSE : SEQKV_HADAMARD;
}

bool ggml_seqkv_metal_supported(const ggml_tensor * op) {
    const ggml_seqkv_params p = params_of(op);
    const auto head  = [](int d) { return d == 0 || d == 64 || d == 128 || d == 256; }; // 0: only the type is asked about
    // sources may be missing: what is there is asked about. Values are not graded.
    const auto cells  = [](const ggml_tensor * t) { return !t || cell_of(t->type) >= 0; };
    const auto values = [&](const ggml_tensor * t) { return !t || (cells(t) && !ggml_seqkv_graded(t->type)); };
    switch (op->op) {
        case GGML_OP_SEQKV_FRAME: return true;
        case GGML_OP_SEQKV_STORE: return p.part == GGML_SEQKV_ROW || (p.part == GGML_SEQKV_KEY ? head(p.dk) && cells(op) : head(p.dv) && values(op));
        case GGML_OP_SEQKV_ATTN:  return head(p.dk) && head(p.dv) && cells(op->src[1]) && values(op->src[2]);
        default:                  return false;
    }
}

// rows of rot of the op's set
static step::buffer rot_of(const ggml_tensor * rot, const ggml_seqkv_params & p) {
    return { rot, p.rot_set*rot->nb[2] };
}

static std::vector<step> plan_store(const ggml_tensor * op) {
    const ggml_seqkv_params p = params_of(op);
    const bool frame = op->op == GGML_OP_SEQKV_FRAME;
    const ggml_tensor * meta = op->src[frame ? 2 : 3];
    const int64_t n_tokens = op->src[0]->ne[frame ? 2 : 1];

    step s = {};
    ggml_metal_kargs_seqkv_store & a = s.args.store;
    s.args_size = sizeof(a);
    a.n_head_kv = p.n_head_kv;
    a.dk        = p.dk;
    a.dv        = p.dv;
    a.n_virt    = (int32_t) meta->ne[0];
    a.first     = p.n_kv + p.n_win;
    a.n_tokens  = a.n_virt - a.first;
    a.n_rot     = p.n_rot;
    a.neox      = p.neox;
    s.grid[0]   = (int) n_tokens;
    s.grid[1]   = p.part == GGML_SEQKV_ROW && !frame ? 1 : p.n_head_kv;
    s.grid[2]   = 1;
    const auto bind = [&](std::initializer_list<step::buffer> buffers) {
        std::copy(buffers.begin(), buffers.end(), s.buffers);
        s.n_buffers = (int) buffers.size();
    };

    if (frame) {
        const ggml_tensor * k = op->src[0], * v = op->src[1], * rot = op->src[3];
        s.kernel     = "kernel_seqkv_frame";
        s.threads    = 64;
        a.rot_stride = (int32_t) rot->ne[0];
        a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
        a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2];
        bind({ { k, 0 }, { v, 0 }, { meta, 0 }, rot_of(rot, p), { op, 0 } });
        return { s };
    }
    const ggml_tensor * cur = op->src[0], * idxs = op->src[1], * prof = op->src[4];
    a.nb1 = op->nb[1];
    if (p.part == GGML_SEQKV_ROW) {
        s.kernel  = "kernel_seqkv_store_row";
        s.threads = 128;
        bind({ { cur, 0 }, { idxs, 0 }, { op, 0 } });
        return { s };
    }
    s.kernel    = "kernel_seqkv_store";
    s.threads   = 32*SEQKV_STORE_SG;
    a.is_key    = p.part == GGML_SEQKV_KEY;
    a.has_prof  = prof != nullptr;
    a.head_size = (int32_t) ggml_row_size(op->type, a.is_key ? p.dk : p.dv);
    s.constants[SEQKV_FC_DK]       = a.is_key ? p.dk : p.dv;
    s.constants[SEQKV_FC_CELL_K]   = cell_of(op->type);
    s.constants[SEQKV_FC_BITS_K]   = ggml_seqkv_bits(op->type);
    s.constants[SEQKV_FC_GRADED_K] = ggml_seqkv_graded(op->type);
    s.constants[SEQKV_FC_FORM_K]   = form_of(op->type, a.is_key ? prof : nullptr);
    bind({ { cur, 0 }, { idxs, 0 }, { meta, 0 }, { prof ? prof : cur, 0 }, { op, 0 } });
    return { s };
}

// Scratch of ATTN behind its data, in this order; sizes in bytes
struct attn_scratch {
    size_t query, ml, acc; // decode: transformed and rotated queries, parts
    size_t k, v;           // prefill: a chunk of expanded rows; ml: of the query rows

    size_t total() const { return query + ml + acc + k + v; }
};

struct attn_view {
    ggml_metal_kargs_seqkv_attn a;
    int          heads;  // of a chunk of query heads
    bool         decode;
    attn_scratch scratch;
};

static attn_view view_of(const ggml_tensor * op) {
    const ggml_seqkv_params p = params_of(op);
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3], * win = op->src[5], * rot = op->src[8];

    attn_view r = {};
    ggml_metal_kargs_seqkv_attn & a = r.a;
    a.n_head_kv  = p.n_head_kv;
    a.group      = (int32_t) (q->ne[1]/p.n_head_kv);
    a.n_chunks   = (a.group + SEQKV_MAX_HEADS - 1)/SEQKV_MAX_HEADS;
    a.n_stream   = (int32_t) k->ne[2];
    a.n_tokens   = (int32_t) (q->ne[2]/k->ne[2]);
    a.n_kv       = p.n_kv;
    a.n_win      = p.n_win;
    a.n_virt     = p.n_kv + p.n_win + a.n_tokens;
    a.n_frames   = (int32_t) rot->ne[1] - 64;
    a.n_rot      = p.n_rot;
    a.neox       = p.neox;
    a.rot_stride = (int32_t) rot->ne[0];
    a.has_prof   = op->src[9] != nullptr;
    a.has_sinks  = op->src[4] != nullptr;
    a.size_k     = (int32_t) ggml_row_size(k->type, p.dk);
    a.size_v     = (int32_t) ggml_row_size(v->type, p.dv);
    a.scale      = p.scale;
    a.softcap    = p.softcap;
    a.q_nb1    = q->nb[1];    a.q_nb2    = q->nb[2];
    a.k_nb1    = k->nb[1];    a.k_nb2    = k->nb[2];
    a.v_nb1    = v->nb[1];    a.v_nb2    = v->nb[2];
    a.win_nb1  = win->nb[1];  a.win_nb2  = win->nb[2];
    a.mask_nb1 = mask->nb[1]; a.mask_nb3 = mask->nb[3];

    r.heads  = (a.group + a.n_chunks - 1)/a.n_chunks;
    r.decode = a.n_tokens <= MAX_DECODE;
    const size_t rows = (size_t) q->ne[1]*q->ne[2]; // of queries
    if (r.decode) {
        const int64_t others = (int64_t) a.n_head_kv*a.n_chunks*q->ne[2];
        const int64_t per_part = (int64_t) a.n_kv*others/MIN_GROUPS;
        a.part_rows = (int32_t) GGML_PAD(std::max<int64_t>(per_part, 1), PART_ROWS);
        a.n_cells   = (a.n_kv + a.part_rows - 1)/a.part_rows;
        a.n_parts   = a.n_cells + (a.n_virt - a.n_kv + a.part_rows - 1)/a.part_rows;
        r.scratch.query = 2*sizeof(ggml_fp16_t)*others*a.n_frames*r.heads*p.dk;
        r.scratch.ml    = 2*sizeof(float)*rows*a.n_parts;
        r.scratch.acc   = sizeof(float)*rows*a.n_parts*p.dv;
    } else {
        const size_t chunk = (size_t) a.n_stream*a.n_head_kv*GGML_PAD(std::min(CHUNK, a.n_virt), SEQKV_TILE)*sizeof(ggml_fp16_t);
        r.scratch.k  = chunk*p.dk;
        r.scratch.v  = chunk*p.dv;
        r.scratch.ml = 2*sizeof(float)*rows;
    }
    for (size_t * size : { &r.scratch.query, &r.scratch.ml, &r.scratch.acc, &r.scratch.k, &r.scratch.v }) {
        *size = GGML_PAD(*size, 32);
    }
    return r;
}

size_t ggml_seqkv_metal_scratch(const ggml_tensor * op) {
    return op->op == GGML_OP_SEQKV_ATTN ? 32 + view_of(op).scratch.total() : 0; // 32: its begin is aligned
}

static std::vector<step> plan_attn(const ggml_tensor * op) {
    const ggml_seqkv_params p = params_of(op);
    const attn_view r = view_of(op);
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3], * sinks = op->src[4], * win = op->src[5];
    const ggml_tensor * cur = op->src[6], * meta = op->src[7], * rot = op->src[8], * prof = op->src[9] ? op->src[9] : q;

    size_t at = GGML_PAD(ggml_nbytes(op), 32);
    const auto scratch = [&](size_t size) { const step::buffer b = { op, at }; at += size; return b; };
    const step::buffer query = scratch(r.scratch.query), ml = scratch(r.scratch.ml), acc = scratch(r.scratch.acc);
    const step::buffer k_rows = scratch(r.scratch.k), v_rows = scratch(r.scratch.v);
    const step::buffer sink = { sinks ? sinks : q, 0 };

    std::vector<step> plan;
    const auto add = [&](const char * kernel, int x, int y, int z, int threads, std::initializer_list<step::buffer> buffers) {
        step s = {};
        s.kernel    = kernel;
        s.args.attn = r.a;
        s.args_size = sizeof(r.a);
        s.constants[SEQKV_FC_DK]       = p.dk;
        s.constants[SEQKV_FC_CELL_K]   = cell_of(k->type);
        s.constants[SEQKV_FC_BITS_K]   = ggml_seqkv_bits(k->type);
        s.constants[SEQKV_FC_GRADED_K] = ggml_seqkv_graded(k->type);
        s.constants[SEQKV_FC_FORM_K]   = form_of(k->type, op->src[9]);
        s.constants[SEQKV_FC_DV]       = p.dv;
        s.constants[SEQKV_FC_CELL_V]   = cell_of(v->type);
        s.constants[SEQKV_FC_BITS_V]   = ggml_seqkv_bits(v->type);
        s.constants[SEQKV_FC_FORM_V]   = form_of(v->type, nullptr);
        s.constants[SEQKV_FC_HEADS]    = r.heads;
        s.grid[0] = x; s.grid[1] = y; s.grid[2] = z;
        s.threads = threads;
        std::copy(buffers.begin(), buffers.end(), s.buffers);
        s.n_buffers = (int) buffers.size();
        plan.push_back(s);
    };
    const int n_tokens = (int) q->ne[2];
    if (r.decode) {
        const int frames = SEQKV_QUERY_COLS(p.dk)/r.heads, chunks = r.a.n_head_kv*r.a.n_chunks;
        add("kernel_seqkv_query",  (r.a.n_frames + frames - 1)/frames, chunks, n_tokens, p.dk, { { q, 0 }, rot_of(rot, p), { prof, 0 }, query });
        add("kernel_seqkv_decode", r.a.n_parts, chunks, n_tokens, 32*SEQKV_DECODE_SG,
            { { k, 0 }, { v, 0 }, { mask, 0 }, { win, 0 }, { cur, 0 }, { meta, 0 }, { prof, 0 }, query, ml, acc });
        add("kernel_seqkv_reduce", (int) q->ne[1], n_tokens, 1, p.dv, { ml, acc, sink, { prof, 0 }, { op, 0 } });
        return plan;
    }
    const int tiles = (r.a.n_tokens + 7)/8*r.a.group;
    for (int j0 = 0; j0 < r.a.n_virt; j0 += CHUNK) {
        const int j1 = std::min(j0 + CHUNK, r.a.n_virt), pad = GGML_PAD(j1 - j0, SEQKV_TILE);
        add("kernel_seqkv_expand", pad/SEQKV_EXPAND_ROWS, r.a.n_head_kv, r.a.n_stream, EXPAND_SIZE,
            { { k, 0 }, { v, 0 }, { win, 0 }, { cur, 0 }, { meta, 0 }, rot_of(rot, p), { prof, 0 }, k_rows, v_rows });
        add("kernel_seqkv_prefill", (tiles + SEQKV_PREFILL_SG - 1)/SEQKV_PREFILL_SG, r.a.n_head_kv, r.a.n_stream, 32*SEQKV_PREFILL_SG,
            { { q, 0 }, k_rows, v_rows, { mask, 0 }, sink, ml, { op, 0 } });
        plan.back().threadgroup_bytes = SEQKV_PREFILL_SG*SEQKV_PREFILL_BYTES(p.dk);
        for (size_t i = plan.size() - 2; i < plan.size(); ++i) {
            plan[i].args.attn.j0  = j0;
            plan[i].args.attn.j1  = j1;
            plan[i].args.attn.pad = pad;
        }
    }
    return plan;
}

std::vector<ggml_seqkv_metal_step> ggml_seqkv_metal_plan(const ggml_tensor * op) {
    if (ggml_nelements(op) == 0 || op->src[0]->ne[op->op == GGML_OP_SEQKV_STORE ? 1 : 2] == 0) {
        return {};
    }
    return op->op == GGML_OP_SEQKV_ATTN ? plan_attn(op) : plan_store(op);
}
