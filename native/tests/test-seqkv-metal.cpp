// The cases of test-seqkv-ops.h for tests/test_metal_kernels.py: what the host would launch on Metal, its buffers in memory, and the
// result of the CPU backend in reference mode, i.e. of the scalar oracle.
#include "../metal/seqkv-metal-plan.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

// the part of test-backend-ops.cpp that the cases need
enum test_mode { MODE_TEST, MODE_PERF };
struct test_case {
    test_mode mode = MODE_TEST;

    virtual ~test_case() {}
    virtual std::string vars() { return ""; }
    virtual std::string op_desc(ggml_tensor * t) { return ggml_op_name(t->op); }
    virtual double max_nmse_err() { return 1e-7; }
    virtual double max_nmse_err(ggml_backend_t) { return max_nmse_err(); }
    virtual ggml_tensor * build_graph(ggml_context * ctx) = 0;
    virtual void initialize_tensors(ggml_context * ctx) = 0;
};

static void join(std::ostringstream &) {}
template <typename T, typename... R> static void join(std::ostringstream & out, T value, R... rest) {
    if constexpr (std::is_same_v<T, ggml_type>) {
        out << ggml_type_name(value) << ",";
    } else {
        out << +value << ",";
    }
    join(out, rest...);
}
template <typename... T> static std::string named_values(const char * names, T... values) {
    std::ostringstream text;
    join(text, values...);
    std::istringstream name(names), value(text.str());
    std::string out, n, v;
    while (std::getline(name, n, ',') && std::getline(value, v, ',')) {
        out += (out.empty() ? "" : ",") + n.substr(n.find_first_not_of(' ')) + "=" + v;
    }
    return out;
}
#define VARS_TO_STR16(...) named_values(#__VA_ARGS__, __VA_ARGS__)

static bool ggml_is_view_op(ggml_op op) {
    return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

static std::mt19937 rng;

static void init_tensor_uniform(ggml_tensor * t, float min = -1.0f, float max = 1.0f) {
    std::uniform_real_distribution<float> uniform(min, max);
    std::vector<float> x(ggml_nelements(t));
    for (float & v : x) {
        v = uniform(rng);
    }
    if (t->type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), ggml_nbytes(t));
    } else {
        ggml_quantize_chunk(t->type, x.data(), t->data, 0, ggml_nrows(t), t->ne[0], nullptr);
    }
}

#include "test-seqkv-ops.h"

namespace {

// rows of the window
struct test_rows : public test_seqkv {
    test_rows() : test_seqkv(GGML_OP_SEQKV_STORE, GGML_TYPE_F16, GGML_TYPE_F16, 64, 128, 2, 1, 256, 68, 33) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_seqkv_params params = {};
        params.dk        = (int32_t) dk;
        params.dv        = (int32_t) dv;
        params.n_head_kv = (int32_t) n_head_kv;
        params.n_kv      = (int32_t) n_kv;
        params.n_win     = (int32_t) n_win;
        params.part      = GGML_SEQKV_ROW;
        ggml_tensor * meta = ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_kv + n_win + n_tokens, 1), "meta");
        ggml_tensor * cur  = ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_head_kv*(dk + dv), n_tokens), "cur");
        ggml_tensor * dst  = ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_head_kv*(dk + dv), n_win), "dst");
        ggml_tensor * idxs = ggml_set_name(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens), "idxs");
        return ggml_seqkv_store(ctx, dst, cur, idxs, meta, nullptr, params);
    }
    void initialize_tensors(ggml_context * ctx) override {
        test_seqkv::initialize_tensors(ctx);
        ggml_tensor * idxs = ggml_get_tensor(ctx, "idxs");
        for (int64_t i = 0; i < n_tokens; ++i) {
            ((int64_t *) idxs->data)[i] = i%7 == 3 ? -1 : (5*i + 2)%n_win;
        }
    }
};

// a cache of 4,096 cells, all of them in use and attended to: what decode costs
struct test_cost : public test_seqkv {
    test_cost(int bits, bool profile) : test_seqkv(GGML_OP_SEQKV_ATTN, ggml_seqkv_type(bits, profile), ggml_seqkv_type(bits, false), 128, 128, 1, 4, 4096, 68, 1, 1, IN_ORDER, profile) {}

    void initialize_tensors(ggml_context * ctx) override {
        test_seqkv::initialize_tensors(ctx);
        const ggml_tensor * meta = ggml_get_tensor(ctx, "meta"), * mask = ggml_get_tensor(ctx, "mask");
        for (int64_t j = 0; j < n_kv; ++j) {
            ((int32_t *) meta->data)[j] = (SEQKV_FRAME + j/SEQKV_FRAME) << 8 | j%SEQKV_FRAME;
        }
        memset(mask->data, 0, ggml_nbytes(mask));
    }
};

std::vector<std::unique_ptr<test_case>> & cases() {
    static std::vector<std::unique_ptr<test_case>> all;
    if (all.empty()) {
        test_seqkv::add(all);
        // the other types are written as well
        for (const ggml_type t : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL }) {
            all.emplace_back(new test_seqkv(GGML_OP_SEQKV_STORE, t, GGML_TYPE_F16, 128, 64, 2, 1, 256, 68, 33, 2));
            if (t != GGML_TYPE_F16) {
                all.emplace_back(new test_seqkv(GGML_OP_SEQKV_STORE, t, t, 64, 64, 2, 1, 256, 68, 33, 1));
            }
        }
        all.emplace_back(new test_rows);
        for (const int bits : { 2, 3, 4 }) {
            all.emplace_back(new test_cost(bits, true));
            all.emplace_back(new test_cost(bits, false));
        }
        // prefill over more than one chunk of rows
        all.emplace_back(new test_seqkv(GGML_OP_SEQKV_ATTN, GGML_TYPE_SEQKV3K, GGML_TYPE_SEQKV3, 64, 64, 1, 1, 4200, 68, 9, 1, test_seqkv::IN_ORDER, true, true));
    }
    return all;
}

struct run {
    ggml_context *        ctx = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    ggml_tensor *         out = nullptr;
    std::vector<uint8_t>  before; // what out holds before the op
    std::string           text;

    ~run() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }
};

const ggml_tensor * base_of(const ggml_tensor * t) { return t->view_src ? t->view_src : t; }

std::vector<float> values(const ggml_tensor * t, const void * data) {
    std::vector<float> y(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(y.data(), data, y.size()*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(data, y.data(), (int64_t) y.size());
    }
    return y;
}

}

extern "C" {

int metal_n_cases(void) { return (int) cases().size(); }

const char * metal_case(int i) {
    static std::string text;
    const test_seqkv & c = *static_cast<test_seqkv *>(cases()[i].get());
    text = std::string(ggml_op_name(c.op)) + "(" + cases()[i]->vars() + ")";
    return text.c_str();
}

// Builds a case and computes it on the CPU. metal_text: its plan as JSON; buffers are (tensor, offset), tensors (address, bytes); tensor 0
// is the op's own: scratch bytes follow its data, and what it holds before the op is at `before`.
void * metal_open(int i) {
    test_seqkv & c = *static_cast<test_seqkv *>(cases()[i].get());
    run * r = new run;
    r->ctx = ggml_init({ ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true });
    r->out = c.build_graph(r->ctx);
    ggml_cgraph * graph = ggml_new_graph(r->ctx);
    ggml_build_forward_expand(graph, r->out);
    r->buffer = ggml_backend_alloc_ctx_tensors_from_buft(r->ctx, ggml_backend_cpu_buffer_type());
    rng.seed(i);
    c.initialize_tensors(r->ctx);
    r->before.assign(ggml_nbytes(r->out), 0xff); // NaN in every float: an output that is left out shows
    if (r->out->view_src) {
        memcpy(r->before.data(), r->out->data, ggml_nbytes(r->out));
    }
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 2);
    ggml_backend_cpu_set_use_ref(cpu, true);
    ggml_backend_graph_compute(cpu, graph);
    ggml_backend_free(cpu);

    std::vector<const ggml_tensor *> tensors = { base_of(r->out) };
    std::ostringstream steps;
    for (const ggml_seqkv_metal_step & s : ggml_seqkv_metal_plan(r->out)) {
        steps << (steps.str().empty() ? "" : ",") << "{\"kernel\":\"" << s.kernel << "\",\"constants\":[";
        for (int k = 0; k < SEQKV_FC_COUNT; ++k) {
            steps << (k ? "," : "") << s.constants[k];
        }
        steps << "],\"args\":[";
        for (size_t k = 0; k < s.args_size; ++k) {
            steps << (k ? "," : "") << (int) ((const uint8_t *) &s.args)[k];
        }
        steps << "],\"threadgroup_bytes\":" << s.threadgroup_bytes << ",\"grid\":[" << s.grid[0] << "," << s.grid[1] << "," << s.grid[2] << "],\"threads\":"
              << s.threads << ",\"buffers\":[";
        for (int k = 0; k < s.n_buffers; ++k) {
            const ggml_tensor * t = base_of(s.buffers[k].tensor);
            const size_t at = std::find(tensors.begin(), tensors.end(), t) - tensors.begin();
            if (at == tensors.size()) {
                tensors.push_back(t);
            }
            steps << (k ? "," : "") << "[" << at << "," << s.buffers[k].offset + s.buffers[k].tensor->view_offs << "]";
        }
        steps << "]}";
    }
    const double error = c.op == GGML_OP_SEQKV_ATTN ? (c.n_tokens <= test_seqkv::GPU_DECODE_TOKENS ? test_seqkv::GPU_DECODE_ERR : test_seqkv::GPU_PREFILL_ERR)
                                                     : c.max_nmse_err();
    std::ostringstream text;
    text << "{\"supported\":" << (ggml_seqkv_metal_supported(r->out) ? "true" : "false") << ",\"max_error\":" << error << ",\"scratch\":"
         << ggml_seqkv_metal_scratch(r->out) << ",\"before\":" << (uintptr_t) r->before.data() << ",\"bytes\":" << ggml_nbytes(r->out) << ",\"tensors\":[";
    for (size_t k = 0; k < tensors.size(); ++k) {
        text << (k ? "," : "") << "[" << (uintptr_t) tensors[k]->data << "," << ggml_nbytes(tensors[k]) << "]";
    }
    text << "],\"steps\":[" << steps.str() << "]}";
    r->text = text.str();
    return r;
}

const char * metal_text(void * handle) { return ((run *) handle)->text.c_str(); }

// normalized mean squared error of what is at data against the oracle's result; NaN stays NaN
double metal_error(void * handle, const void * data) {
    const run * r = (const run *) handle;
    const std::vector<float> expected = values(r->out, r->out->data), found = values(r->out, data);
    double error = 0.0, square = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        error  += (double) (expected[i] - found[i])*(expected[i] - found[i]);
        square += (double) expected[i]*expected[i];
    }
    return error/square;
}

// bytes that differ from the oracle's
int64_t metal_differs(void * handle, const uint8_t * data) {
    const run * r = (const run *) handle;
    int64_t n = 0;
    for (size_t i = 0; i < ggml_nbytes(r->out); ++i) {
        n += ((const uint8_t *) r->out->data)[i] != data[i];
    }
    return n;
}

// whether STORE of a part (enum ggml_seqkv_part) into cells of a type, or ATTN with keys of it and values of another, is said to be possible
bool metal_supports(const char * type, int part, const char * type_v, int dk, int dv) {
    const auto type_of = [](const char * name) {
        int i = 0;
        while (i < GGML_TYPE_COUNT && (!ggml_type_name((ggml_type) i) || strcmp(ggml_type_name((ggml_type) i), name))) {
            ++i;
        }
        GGML_ASSERT(i < GGML_TYPE_COUNT);
        return (ggml_type) i;
    };
    ggml_seqkv_params p = {};
    p.part = part;
    p.dk   = dk;
    p.dv   = dv;
    ggml_tensor op = {}, k = {}, v = {};
    op.op     = type_v ? GGML_OP_SEQKV_ATTN : GGML_OP_SEQKV_STORE;
    op.type   = type_v ? GGML_TYPE_F32 : type_of(type);
    k.type    = type_of(type);
    v.type    = type_v ? type_of(type_v) : GGML_TYPE_F32;
    op.src[1] = &k;
    op.src[2] = &v;
    memcpy(op.op_params, &p, sizeof(p));
    return ggml_seqkv_metal_supported(&op);
}

void metal_close(void * handle) { delete (run *) handle; }

}
