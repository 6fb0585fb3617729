#include "llama-seqkv.h"
#include "llama-seqkv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

static int32_t fail(char * err, size_t n_err, const std::string & text) {
    if (err && n_err > 0) {
        snprintf(err, n_err, "%s", text.c_str());
    }
    return -1;
}

llama_seqkv_params llama_seqkv_default_params(void) {
    const llama_seqkv_config config;
    return { nullptr, nullptr, config.n_sink, config.n_window, config.any_type };
}

//
// profile
//

static std::string profile_string(const gguf_context * gguf, const char * key) {
    const int64_t id = gguf_find_key(gguf, key);
    return id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf, id) : "";
}

// layers whose cache is of seqkv types, if the context asks for them
static bool is_seqkv_layer(const llama_hparams & hparams, uint32_t il) {
    return hparams.has_kv(il) && !hparams.is_swa(il) && !hparams.is_recr(il);
}

// D = E^-1, both (n, n) and row-major, D rounded to f16. Returns false if D is not an inverse: |E D - I| > 0.05 or not finite.
static bool invert(const ggml_fp16_t * enc, int64_t n, ggml_fp16_t * dec) {
    std::vector<double> e(n*n), a(n*n), d(n*n, 0.0);
    for (int64_t i = 0; i < n*n; ++i) {
        a[i] = e[i] = ggml_fp16_to_fp32(enc[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
        d[i*n + i] = 1.0;
    }
    for (int64_t c = 0; c < n; ++c) { // Gauss-Jordan, partial pivoting
        int64_t pivot = c;
        for (int64_t r = c + 1; r < n; ++r) {
            if (std::abs(a[r*n + c]) > std::abs(a[pivot*n + c])) {
                pivot = r;
            }
        }
        if (!(std::abs(a[pivot*n + c]) > 0.0)) {
            return false;
        }
        std::swap_ranges(&a[c*n], &a[c*n] + n, &a[pivot*n]);
        std::swap_ranges(&d[c*n], &d[c*n] + n, &d[pivot*n]);
        const double f = 1.0/a[c*n + c];
        for (int64_t i = 0; i < n; ++i) {
            a[c*n + i] *= f;
            d[c*n + i] *= f;
        }
        for (int64_t r = 0; r < n; ++r) {
            const double g = a[r*n + c];
            if (r == c || g == 0.0) {
                continue;
            }
            for (int64_t i = 0; i < n; ++i) {
                a[r*n + i] -= g*a[c*n + i];
                d[r*n + i] -= g*d[c*n + i];
            }
        }
    }
    for (int64_t i = 0; i < n*n; ++i) {
        dec[i] = ggml_fp32_to_fp16((float) d[i]);
        d[i]   = ggml_fp16_to_fp32(dec[i]);
    }
    std::vector<double> row(n);
    for (int64_t r = 0; r < n; ++r) {
        std::fill(row.begin(), row.end(), 0.0);
        for (int64_t c = 0; c < n; ++c) {
            for (int64_t i = 0; i < n; ++i) {
                row[i] += e[r*n + c]*d[c*n + i];
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            if (!(std::abs(row[i] - (i == r)) <= 0.05)) {
                return false;
            }
        }
    }
    return true;
}

// bits of each layer by a profile's array, false: the profile has none
static bool profile_bits(const gguf_context * gguf, const std::string & key, std::vector<int32_t> & bits, const llama_hparams & hparams, const char * path) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        return false;
    }
    const bool array = gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY;
    const enum gguf_type type = array ? gguf_get_arr_type(gguf, id) : GGUF_TYPE_COUNT;
    if (type != GGUF_TYPE_UINT8 && type != GGUF_TYPE_INT32) {
        throw std::runtime_error(format("profile %s: %s is not an array of uint8 or int32: make it again with calibrate", path, key.c_str()));
    }
    const size_t n = gguf_get_arr_n(gguf, id);
    if (n != hparams.n_layer_all && n != hparams.n_layer()) {
        throw std::runtime_error(format("profile %s does not fit the model: %s has %d entries for %u layers", path, key.c_str(), (int) n, hparams.n_layer_all));
    }
    bits.assign(hparams.n_layer_all, 0);
    for (size_t i = 0; i < n; ++i) {
        bits[i] = type == GGUF_TYPE_UINT8 ? ((const uint8_t *) gguf_get_arr_data(gguf, id))[i] : ((const int32_t *) gguf_get_arr_data(gguf, id))[i];
        if (bits[i] < 0 || bits[i] > 4) {
            throw std::runtime_error(format("profile %s is damaged: %s gives %d bits to layer %d, possible are 1 to 4", path, key.c_str(), bits[i], (int) i));
        }
    }
    return true;
}

// finite as they are and in f16
static bool all_finite(const std::vector<float> & values) {
    return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(ggml_fp16_to_fp32(ggml_fp32_to_fp16(x))); });
}

static void load_layer(const llama_hparams & hparams, ggml_context * ctx, uint32_t il, const char * path, llama_seqkv_config & config) {
    const int64_t dk = hparams.n_embd_head_k(il), dv = hparams.n_embd_head_v(il), h = hparams.n_head_kv(il);

    const auto find = [&](const char * part) { return ggml_get_tensor(ctx, format("blk.%u.%s", il, part).c_str()); };
    const ggml_tensor * k_mean = find("k_mean"), * k_encode = find("k_encode"), * v_mean = find("v_mean"), * v_scale = find("v_scale");
    if (!k_mean && !k_encode && !v_mean && !v_scale && il >= hparams.n_layer()) {
        return; // layers of a draft head that the calibration pass does not run
    }
    const auto fits = [](const ggml_tensor * t, ggml_type type, int64_t n0, int64_t n1, int64_t n2) {
        return t && t->type == type && t->ne[0] == n0 && t->ne[1] == n1 && t->ne[2] == n2 && t->ne[3] == 1;
    };
    if (!fits(k_mean, GGML_TYPE_F32, dk, h, 1) || !fits(k_encode, GGML_TYPE_F16, dk, dk, h) ||
        !fits(v_mean, GGML_TYPE_F32, dv, h, 1) || !fits(v_scale,  GGML_TYPE_F32, dv, h, 1)) {
        throw std::runtime_error(format("profile %s does not fit the model: layer %u has %d KV heads of %d and %d values", path, il, (int) h, (int) dk, (int) dv));
    }
    const auto floats = [](const ggml_tensor * t) { return std::vector<float>((const float *) t->data, (const float *) t->data + ggml_nelements(t)); };

    auto & l  = config.layers[il];
    l.k_mean  = floats(k_mean);
    l.v_mean  = floats(v_mean);
    l.v_scale = floats(v_scale);
    l.enc.assign((const ggml_fp16_t *) k_encode->data, (const ggml_fp16_t *) k_encode->data + h*dk*dk);
    l.dec.resize(h*dk*dk);

    std::vector<float> enc(h*dk*dk);
    ggml_fp16_to_fp32_row(l.enc.data(), enc.data(), enc.size());
    if (!all_finite(l.k_mean) || !all_finite(l.v_mean) || !all_finite(l.v_scale) || !all_finite(enc)) {
        throw std::runtime_error(format("profile %s is damaged: layer %u has values that are not finite", path, il));
    }
    if (!std::all_of(l.v_scale.begin(), l.v_scale.end(), [](float x) { return ggml_fp16_to_fp32(ggml_fp32_to_fp16(x)) > 0.0f; })) {
        throw std::runtime_error(format("profile %s is damaged: layer %u has a scale that is not positive", path, il));
    }
    for (int64_t i = 0; i < h; ++i) {
        if (!invert(l.enc.data() + i*dk*dk, dk, l.dec.data() + i*dk*dk)) {
            throw std::runtime_error(format("profile %s is damaged: the key transform of layer %u, head %d has no inverse", path, il, (int) i));
        }
        // |E R(offset) mean| <= |row of E| |mean|
        const auto norm = [&](const float * x) { return std::sqrt(std::inner_product(x, x + dk, x, 0.0)); };
        for (int64_t r = 0; r < dk; ++r) {
            if (norm(&enc[(i*dk + r)*dk])*norm(&l.k_mean[i*dk]) > 65504.0) {
                throw std::runtime_error(format("profile %s is damaged: the prediction of layer %u, head %d is beyond the range of f16", path, il, (int) i));
            }
        }
    }
}

static void load_profile(const llama_model & model, llama_seqkv_config & config) {
    const auto & hparams = model.hparams;
    const char * path    = config.profile.c_str();

    ggml_context * ctx_raw = nullptr;
    gguf_context_ptr gguf(gguf_init_from_file(path, { /*.no_alloc =*/ false, /*.ctx =*/ &ctx_raw }));
    ggml_context_ptr ctx(ctx_raw);
    if (!gguf || !ctx) {
        throw std::runtime_error(format("profile %s is missing or not a GGUF file: make it again with calibrate", path));
    }
    if (profile_string(gguf.get(), "general.architecture") != "seqkv-profile") {
        throw std::runtime_error(format("%s is not a seqkv profile", path));
    }
    const int64_t version = gguf_find_key(gguf.get(), "seqkv.profile.version");
    if (version < 0 || gguf_get_kv_type(gguf.get(), version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(gguf.get(), version) != 2) {
        throw std::runtime_error(format("profile %s has a version that this build does not know: make it again with calibrate", path));
    }
    const std::string id = profile_string(gguf.get(), "seqkv.profile.model_id");
    if (!config.model_id.empty() && id != config.model_id) {
        throw std::runtime_error(format("profile %s was made for another model (%.16s, this one is %.16s)", path, id.c_str(), config.model_id.c_str()));
    }

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (is_seqkv_layer(hparams, il)) {
            load_layer(hparams, ctx.get(), il, path, config);
        }
    }
    for (int nominal = 2; nominal <= 4; ++nominal) {
        for (const bool is_key : { true, false }) {
            const std::string key = format("seqkv.profile.seqkv%d.%c_bits", nominal, is_key ? 'k' : 'v');
            std::vector<int32_t> bits;
            if (!profile_bits(gguf.get(), key, bits, hparams, path)) {
                continue;
            }
            for (auto & [il, l] : config.layers) {
                if (bits[il] == 0) {
                    throw std::runtime_error(format("profile %s is damaged: %s gives 0 bits to layer %d, possible are 1 to 4", path, key.c_str(), il));
                }
                (is_key ? l.k_bits : l.v_bits)[nominal] = bits[il];
            }
        }
    }
}

int32_t llama_seqkv_configure(llama_model * model, const llama_seqkv_params * params, char * err, size_t n_err) {
    if (!model || !params) {
        return fail(err, n_err, "llama_seqkv_configure needs a model and parameters");
    }
    if (params->n_sink < 0 || params->n_window < 0 || params->n_sink > 1 << 20 || params->n_window > 1 << 20) {
        return fail(err, n_err, format("n_sink = %d and n_window = %d must be within 0 and 1048576", params->n_sink, params->n_window));
    }
    try {
        auto config = std::make_shared<llama_seqkv_config>();
        config->n_sink   = params->n_sink;
        config->n_window = params->n_window;
        config->model_id = params->model_id ? params->model_id : "";
        config->profile  = params->profile  ? params->profile  : "";
        config->any_type = params->any_type;
        if (config->model_id.size() > 64) {
            throw std::runtime_error("model_id has more than 64 characters");
        }
        if (!config->profile.empty()) {
            load_profile(*model, *config);
        }
        model->seqkv = std::move(config);
    } catch (const std::exception & e) {
        return fail(err, n_err, e.what());
    }
    return 0;
}

//
// types
//

int32_t llama_seqkv_check(const llama_model * model, int32_t type_k, int32_t type_v, char * err, size_t n_err) {
    if (!model || type_k < 0 || type_k >= GGML_TYPE_COUNT || type_v < 0 || type_v >= GGML_TYPE_COUNT) {
        return fail(err, n_err, "unknown cache type");
    }
    const ggml_type tk = (ggml_type) type_k, tv = (ggml_type) type_v;
    for (const ggml_type t : { tk, tv }) {
        if (ggml_seqkv_bits(t) && !llama_seqkv::is_type(t)) {
            return fail(err, n_err, format("%s is a type of single layers: use seqkv2, seqkv3 or seqkv4", ggml_type_name(t)));
        }
    }
    if (!llama_seqkv::uses(*model, tk, tv)) {
        return 0;
    }
    const auto & hparams = model->hparams;
    const std::string who = format("%s:%s cannot serve this model (%s): ", ggml_type_name(tk), ggml_type_name(tv), model->arch_name().c_str());

    for (const ggml_type t : { tk, tv }) {
        if (ggml_blck_size(t) == 0 || (t != GGML_TYPE_F32 && (!ggml_get_type_traits(t)->to_float || !ggml_get_type_traits(t)->from_float_ref)) ||
            ggml_quantize_requires_imatrix(t) || t == GGML_TYPE_F32) {
            return fail(err, n_err, format("%s is not a cache type to combine with seqkv types", ggml_type_name(t)));
        }
    }

    if (llm_arch_is_recurrent(model->arch)) {
        return fail(err, n_err, who + "it is recurrent and has no KV cache; use f16");
    }
    if (llama_model_has_encoder(model) || !hparams.causal_attn) {
        return fail(err, n_err, who + "encoder models have no KV cache to compress; use f16");
    }
    if (hparams.is_mla()) {
        return fail(err, n_err, who + "its attention is multi-head latent (MLA), already compressed; use f16");
    }
    switch (model->arch) {
        case LLM_ARCH_GROK:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
            return fail(err, n_err, who + "its attention reads the cache in its own way; use f16");
        default:
            break;
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return fail(err, n_err, who + "it uses ALiBi position biases; use f16");
    }
    if (hparams.n_pos_per_embd() > 1) {
        return fail(err, n_err, who + "its RoPE has several sections (M-RoPE); use f16");
    }

    int n_layers = 0;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!is_seqkv_layer(hparams, il)) {
            continue;
        }
        n_layers++;
        for (const uint32_t d : { hparams.n_embd_head_k(il), hparams.n_embd_head_v(il) }) {
            if (d != 64 && d != 128 && d != 256) {
                return fail(err, n_err, who + format("layer %u has head_dim %u, supported are 64, 128 and 256; use f16", il, d));
            }
        }
        if (hparams.n_embd_head_k(il) % ggml_blck_size(tk) != 0 || hparams.n_embd_head_v(il) % ggml_blck_size(tv) != 0) {
            return fail(err, n_err, who + format("the blocks do not divide the head_dim of layer %u", il));
        }
        if (hparams.n_gqa(il) > GGML_SEQKV_MAX_GROUP) {
            return fail(err, n_err, who + format("layer %u has %u query heads per KV head, supported are up to %d; use f16", il, hparams.n_gqa(il), GGML_SEQKV_MAX_GROUP));
        }
        if ((int64_t) hparams.n_rot(il) > (int64_t) hparams.n_embd_head_k(il)) {
            return fail(err, n_err, who + format("layer %u rotates more dimensions than its head has; use f16", il));
        }
    }
    if (n_layers == 0) {
        return fail(err, n_err, who + "it has no layer with full attention; use f16");
    }
    return 0;
}

int32_t llama_seqkv_type(const char * name) {
    for (int i = 0; name && i < GGML_TYPE_COUNT; ++i) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && ggml_blck_size((ggml_type) i) > 0 && strcmp(name, other) == 0) {
            return i;
        }
    }
    return -1;
}

const char * llama_seqkv_type_name(int32_t i) {
    for (int t = 0; i >= 0 && t < GGML_TYPE_COUNT; ++t) {
        if (llama_seqkv::is_type((ggml_type) t) && i-- == 0) {
            return ggml_type_name((ggml_type) t);
        }
    }
    return nullptr;
}

double llama_seqkv_type_bits(int32_t type) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0) {
        return 0.0;
    }
    return 8.0*ggml_type_size((ggml_type) type)/ggml_blck_size((ggml_type) type);
}

//
// memory
//

static std::vector<const llama_kv_cache *> caches_of(const llama_context * ctx) {
    llama_memory_i * memory = ctx->get_memory();
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return { hybrid->get_mem_attn() };
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return { hybrid->get_mem_attn()->get_base(), hybrid->get_mem_attn()->get_swa() };
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return { iswa->get_base(), iswa->get_swa() };
    }
    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        return { kv };
    }
    return {};
}

size_t llama_seqkv_kv_bytes(const llama_context * ctx) {
    size_t res = 0;
    for (const auto & [_, data] : ctx->memory_breakdown()) {
        res += data.context;
    }
    return res;
}

size_t llama_seqkv_kv_bytes_used(const llama_context * ctx) {
    size_t res = 0;
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        res += llama_seqkv::bytes_used(*kv);
    }
    return res;
}

size_t llama_seqkv_compute_bytes(const llama_context * ctx) {
    size_t res = 0;
    for (const auto & [_, data] : ctx->memory_breakdown()) {
        res += data.compute;
    }
    return res;
}

size_t llama_seqkv_profile_bytes(const llama_context * ctx) {
    const llama_seqkv * seqkv = llama_seqkv::of(ctx->get_memory());
    return seqkv ? seqkv->profile_bytes() : 0;
}

double llama_seqkv_bits(const llama_context * ctx) {
    const llama_seqkv * seqkv = llama_seqkv::of(ctx->get_memory());
    return seqkv ? seqkv->bits() : 0.0;
}

// writes what fits into a buffer, and counts
class io_write_range : public llama_io_write_i {
public:
    io_write_range(void * buf, size_t size) : buf((uint8_t *) buf), size(size) {}

    void write(const void * src, size_t n) override {
        if (n_written <= size && n <= size - n_written) {
            memcpy(buf + n_written, src, n);
        }
        n_written += n;
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        if (n_written <= size && n <= size - n_written) {
            ggml_backend_tensor_get(tensor, buf + n_written, offset, n);
        }
        n_written += n;
    }

    size_t n_bytes() override { return n_written; }

private:
    uint8_t * buf;
    size_t    size;
    size_t    n_written = 0;
};

int64_t llama_seqkv_range_get(llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool exact, void * buf, size_t size,
        char * err, size_t n_err) {
    const auto * kv = dynamic_cast<const llama_kv_cache *>(ctx->get_memory());
    if (!kv) {
        return fail(err, n_err, "only memories that are one KV cache with full attention are read in parts");
    }
    if (seq_id < 0 || seq_id >= (llama_seq_id) ctx->n_seq_max() || p0 < 0 || p1 <= p0 || p1 - p0 > (llama_pos) kv->get_size()) {
        return fail(err, n_err, "no such sequence, or no such positions");
    }
    ctx->synchronize();
    try {
        io_write_range io(buf, buf ? size : 0);
        llama_seqkv::range_write(*kv, io, seq_id, p0, p1, exact);
        return (int64_t) io.n_bytes();
    } catch (const std::exception & e) {
        return fail(err, n_err, e.what());
    }
}

int32_t llama_seqkv_rope(const llama_context * ctx, int32_t il, float * freq, int32_t n, int32_t * neox) {
    const auto & model = ctx->get_model();
    if (il < 0 || il >= (int32_t) model.hparams.n_layer_all) {
        return -1;
    }
    const auto rope = llama_seqkv_layer_rope(model, ctx->get_cparams(), il);
    std::copy_n(rope.freq.begin(), std::min<int32_t>(n, rope.freq.size()), freq);
    if (neox) {
        *neox = rope.neox;
    }
    return rope.freq.size();
}

//
// collector
//

struct llama_seqkv_collector {
    const llama_model * model = nullptr;
    llama_seqkv_rows_t  fn    = nullptr;
    void *              user  = nullptr;

    std::map<int32_t, int32_t> n_seen; // layer -> tokens reported; the layers to report

    // the layer in progress: its cache tensors have been written, its attention has not been computed
    int32_t il = -1;
    const ggml_tensor * cache_k = nullptr;
    const ggml_tensor * cache_v = nullptr;
    std::vector<float> q, k, v, x2;
    std::vector<char>  buf;

    bool        stop = false;
    std::string error;
};

llama_seqkv_collector * llama_seqkv_collector_init(const llama_model * model, llama_seqkv_rows_t rows, void * user) {
    if (!model || !rows) {
        return nullptr;
    }
    auto * res = new llama_seqkv_collector;
    res->model = model;
    res->fn    = rows;
    res->user  = user;
    for (uint32_t il = 0; il < model->hparams.n_layer(); ++il) {
        if (is_seqkv_layer(model->hparams, il)) {
            res->n_seen[il] = 0;
        }
    }
    return res;
}

void llama_seqkv_collector_free(llama_seqkv_collector * collector) {
    delete collector;
}

int32_t llama_seqkv_collector_n_layer(const llama_seqkv_collector * collector) {
    return collector->n_seen.size();
}

// (n, h, d) contiguous from rows of d values at strides nb_n and nb_h; the tensor may be on a device
static void read_rows(const ggml_tensor * t, int64_t n, int64_t h, int64_t d, size_t nb_n, size_t nb_h, std::vector<float> & dst, std::vector<char> & buf) {
    if (t->type != GGML_TYPE_F32 || t->nb[0] != sizeof(float)) {
        throw std::runtime_error(format("%s is not made of f32 rows", t->name));
    }
    const size_t row = d*sizeof(float);
    dst.resize(n*h*d);
    if (nb_h == row && nb_n == h*row) {
        ggml_backend_tensor_get(t, dst.data(), 0, n*nb_n);
        return;
    }
    buf.resize((n - 1)*nb_n + (h - 1)*nb_h + row);
    ggml_backend_tensor_get(t, buf.data(), 0, buf.size());
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < h; ++j) {
            memcpy(dst.data() + (i*h + j)*d, buf.data() + i*nb_n + j*nb_h, row);
        }
    }
}

// the input of a norm over the width of the model: the last one before a layer's keys is its residual stream
static void collect_x2(llama_seqkv_collector & c, const ggml_tensor * t) {
    const auto * x = t->src[0]; // [n_embd, n_tokens]
    std::vector<float> rows;
    read_rows(x, x->ne[1], 1, x->ne[0], x->nb[1], x->nb[1], rows, c.buf);
    c.x2.resize(x->ne[1]);
    for (int64_t i = 0; i < x->ne[1]; ++i) {
        double sum = 0.0;
        for (int64_t j = 0; j < x->ne[0]; ++j) {
            sum += (double) rows[i*x->ne[0] + j]*rows[i*x->ne[0] + j];
        }
        c.x2[i] = (float) sum;
    }
}

// a SET_ROWS into a cache of ours: every architecture writes "cache_k_l<il>" and "cache_v_l<il>" so, one row a token
static void collect_kv(llama_seqkv_collector & c, const ggml_tensor * t, char kind, int32_t il) {
    const auto & hparams = c.model->hparams;
    const auto * rows    = t->src[0]; // [n_head_kv*d, n_tokens]
    const auto * cache   = t->view_src;

    const int64_t h = hparams.n_head_kv(il);
    const int64_t d = kind == 'k' ? hparams.n_embd_head_k(il) : hparams.n_embd_head_v(il);
    if (ggml_is_quantized(cache->type)) {
        throw std::runtime_error("its cache is quantized: use f16");
    }
    if (rows->ne[0] != h*d || rows->ne[2] != 1 || rows->ne[3] != 1) {
        throw std::runtime_error(format("layer %d does not store one row of %d x %d values a token: use flash attention", il, (int) h, (int) d));
    }
    if (c.il != il) {
        c.il = il;
        c.cache_k = c.cache_v = nullptr;
    }
    (kind == 'k' ? c.cache_k : c.cache_v) = cache;
    read_rows(rows, rows->ne[1], h, d, rows->nb[1], d*sizeof(float), kind == 'k' ? c.k : c.v, c.buf);
}

// the FLASH_ATTN_EXT that reads the cache just written
static void collect_q(llama_seqkv_collector & c, const ggml_tensor * t) {
    const auto & hparams = c.model->hparams;
    const auto * q       = t->src[0]; // [dk, n_tokens, n_head, n_stream]
    const auto * k       = t->src[1]; // [dk, n_kv, n_head_kv, n_stream]

    const int64_t n = q->ne[1], h = hparams.n_head(c.il), h_kv = hparams.n_head_kv(c.il);
    const int64_t dk = hparams.n_embd_head_k(c.il), dv = hparams.n_embd_head_v(c.il);
    if (!c.cache_v || t->src[2]->view_src != c.cache_v) {
        throw std::runtime_error(format("the attention of layer %d does not read values of its own", c.il));
    }
    if (q->ne[0] != dk || q->ne[2] != h || q->ne[3] != 1 || k->ne[2] != h_kv || (int64_t) c.k.size() != n*h_kv*dk || (int64_t) c.v.size() != n*h_kv*dv) {
        throw std::runtime_error(format("the queries of layer %d do not belong to one sequence of whole rows", c.il));
    }
    read_rows(q, n, h, dk, q->nb[1], q->nb[2], c.q, c.buf);

    float params[3]; // scale, max_bias, softcap
    memcpy(params, t->op_params, sizeof(params));

    const llama_seqkv_rows rows = {
        c.il, (int32_t) n, (int32_t) h, (int32_t) h_kv, (int32_t) dk, (int32_t) dv, c.q.data(), c.k.data(), c.v.data(),
        (int64_t) c.x2.size() == n ? c.x2.data() : nullptr, params[0], params[2],
    };
    c.n_seen[c.il] += n;
    c.il      = -1;
    c.cache_k = c.cache_v = nullptr;
    c.stop    = !c.fn(c.user, &rows);
}

bool llama_seqkv_collect(ggml_tensor * t, bool ask, void * user) {
    auto & c = *(llama_seqkv_collector *) user;

    if (c.stop) {
        return ask; // ends every split of the graph after its next node
    }

    int  il   = -1;
    char kind = 0;
    const bool kv = t->op == GGML_OP_SET_ROWS && t->view_src && sscanf(t->view_src->name, "cache_%c_l%d", &kind, &il) == 2 &&
        (kind == 'k' || kind == 'v') && c.n_seen.count(il) > 0;
    const bool q  = t->op == GGML_OP_FLASH_ATTN_EXT && c.cache_k && t->src[1]->view_src == c.cache_k;

    const bool x2 = (t->op == GGML_OP_RMS_NORM || t->op == GGML_OP_NORM) && t->src[0]->ne[0] == c.model->hparams.n_embd &&
        t->src[0]->ne[2] == 1 && t->src[0]->ne[3] == 1 && t->src[0]->type == GGML_TYPE_F32 && !c.cache_k;

    if (ask) {
        // the graph is cut after RoPE too: GPU backends fuse it with SET_ROWS, and then its rows are never stored
        return kv || q || x2 || t->op == GGML_OP_ROPE;
    }
    try {
        if (kv) {
            collect_kv(c, t, kind, il);
        } else if (q) {
            collect_q(c, t);
        } else if (x2) {
            collect_x2(c, t);
        }
    } catch (const std::exception & e) {
        c.error = e.what();
        c.stop  = true;
    }
    return !c.stop;
}

int32_t llama_seqkv_collector_finish(llama_seqkv_collector * collector, char * err, size_t n_err) {
    auto & c = *collector;

    const auto [least, most] = std::minmax_element(c.n_seen.begin(), c.n_seen.end(), [](const auto & a, const auto & b) { return a.second < b.second; });
    const int32_t n_least = c.n_seen.empty() ? 0 : least->second;
    const int32_t missing = c.n_seen.empty() || n_least == most->second ? -1 : least->first;

    const bool  stopped = std::exchange(c.stop, false);
    std::string error   = std::exchange(c.error, {});
    for (auto & [_, n] : c.n_seen) {
        n = 0;
    }
    c.il      = -1;
    c.cache_k = c.cache_v = nullptr;

    if (error.empty() && !stopped && (missing >= 0 || n_least == 0)) {
        error = c.n_seen.empty() ? "it has no layer with full attention" :
            format("the attention of layer %d was not found", missing >= 0 ? missing : c.n_seen.begin()->first);
    }
    if (!error.empty()) {
        return fail(err, n_err, format("the rows of this model (%s) cannot be captured: %s", c.model->arch_name().c_str(), error.c_str()));
    }
    return stopped ? 0 : n_least;
}
