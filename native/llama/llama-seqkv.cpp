#include "llama-seqkv.h"
#include "llama-seqkv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
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
#include <set>
#include <stdexcept>

static int32_t fail(char * err, size_t n_err, const std::string & text) {
    if (err && n_err > 0) {
        snprintf(err, n_err, "%s", text.c_str());
    }
    return -1;
}

llama_seqkv_params llama_seqkv_default_params(void) {
    const llama_seqkv_config config;
    return { nullptr, nullptr, config.n_sink, config.n_window };
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
    if (version < 0 || gguf_get_kv_type(gguf.get(), version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(gguf.get(), version) != 1) {
        throw std::runtime_error(format("profile %s has a version that this build does not know: make it again with calibrate", path));
    }
    const std::string id = profile_string(gguf.get(), "seqkv.profile.model_id");
    if (!config.model_id.empty() && id != config.model_id) {
        throw std::runtime_error(format("profile %s was made for another model (%.16s, this one is %.16s)", path, id.c_str(), config.model_id.c_str()));
    }

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!is_seqkv_layer(hparams, il)) {
            continue;
        }
        const int64_t dk = hparams.n_embd_head_k(il), dv = hparams.n_embd_head_v(il), h = hparams.n_head_kv(il);
        const ggml_tensor * k = ggml_get_tensor(ctx.get(), format("blk.%u.k_mean", il).c_str());
        const ggml_tensor * v = ggml_get_tensor(ctx.get(), format("blk.%u.v_mean", il).c_str());
        const auto fits = [h](const ggml_tensor * t, int64_t d) {
            return t && t->type == GGML_TYPE_F32 && t->ne[0] == d && t->ne[1] == h && t->ne[2] == 1 && t->ne[3] == 1;
        };
        if (!k && !v && il >= hparams.n_layer()) {
            continue; // layers of a draft head that the calibration pass does not run
        }
        if (!fits(k, dk) || !fits(v, dv)) {
            throw std::runtime_error(format("profile %s does not fit the model: layer %u needs means of %d x %d and %d x %d",
                        path, il, (int) dk, (int) h, (int) dv, (int) h));
        }
        auto & means = config.means[il];
        means.resize(h*(dk + dv));
        memcpy(means.data(),        k->data, h*dk*sizeof(float));
        memcpy(means.data() + h*dk, v->data, h*dv*sizeof(float));
        for (const float x : means) {
            if (!std::isfinite(x)) {
                throw std::runtime_error(format("profile %s is damaged: layer %u has a mean that is not finite", path, il));
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
    if (!llama_seqkv::uses(tk, tv)) {
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
    struct layer {
        int64_t n_k = 0, n_v = 0;   // positions seen, skipped ones included
        std::vector<double> k, v;   // sums
        llama_seqkv_rope_t rope;
    };
    const llama_model * model;
    int32_t n_skip;
    std::map<int32_t, layer> layers;
};

llama_seqkv_collector * llama_seqkv_collector_init(const llama_model * model, int32_t n_skip) {
    return model ? new llama_seqkv_collector { model, std::max(n_skip, 0), {} } : nullptr;
}

void llama_seqkv_collector_free(llama_seqkv_collector * collector) {
    delete collector;
}

int32_t llama_seqkv_collector_bind(llama_seqkv_collector * collector, const llama_context * ctx) {
    if (&ctx->get_model() != collector->model) {
        return -1;
    }
    collector->layers.clear();
    for (uint32_t il = 0; il < collector->model->hparams.n_layer_all; ++il) {
        if (is_seqkv_layer(collector->model->hparams, il)) {
            collector->layers[il].rope = llama_seqkv_layer_rope(*collector->model, ctx->get_cparams(), il);
        }
    }
    return 0;
}

// Every architecture writes its cache by SET_ROWS into "cache_k_l<il>" and "cache_v_l<il>": k after RoPE and v, one row a token.
bool llama_seqkv_collect(ggml_tensor * t, bool ask, void * user) {
    auto & collector = *(llama_seqkv_collector *) user;

    int  il   = -1;
    char kind = 0;
    if (t->op != GGML_OP_SET_ROWS || !t->view_src || sscanf(t->view_src->name, "cache_%c_l%d", &kind, &il) != 2 || (kind != 'k' && kind != 'v')) {
        return !ask; // not asked for; true afterwards: go on
    }
    const auto it = collector.layers.find(il);
    if (it == collector.layers.end()) {
        return !ask;
    }
    if (ask) {
        return true;
    }

    const ggml_tensor * rows = t->src[0]; // F32 [n_head_kv*head_dim, n_tokens]
    GGML_ASSERT(rows->type == GGML_TYPE_F32 && rows->nb[0] == sizeof(float));

    auto & l    = it->second;
    auto & sum  = kind == 'k' ? l.k : l.v;
    auto & seen = kind == 'k' ? l.n_k : l.n_v;

    const auto &  hparams = collector.model->hparams;
    const int64_t width   = rows->ne[0];
    const int64_t h       = hparams.n_head_kv(il);
    const int64_t d       = width/h;
    const int     n_half  = l.rope.freq.size();

    sum.resize(width, 0.0);
    std::vector<float> row(width);
    for (int64_t i = 0; i < rows->ne[1]; ++i, ++seen) {
        if (seen < collector.n_skip) {
            continue;
        }
        ggml_backend_tensor_get(rows, row.data(), i*rows->nb[1], width*sizeof(float));
        if (kind == 'v') {
            for (int64_t j = 0; j < width; ++j) {
                sum[j] += row[j];
            }
            continue;
        }
        // R(-t) k
        for (int p = 0; p < n_half; ++p) {
            const double a = (double) seen*l.rope.freq[p];
            const double c = std::cos(a), s = -std::sin(a);
            const int i0 = l.rope.neox ? p : 2*p;
            const int i1 = l.rope.neox ? p + n_half : 2*p + 1;
            for (int64_t hh = 0; hh < h; ++hh) {
                float * x = row.data() + hh*d;
                const double u = x[i0], w = x[i1];
                x[i0] = (float) (u*c - w*s);
                x[i1] = (float) (u*s + w*c);
            }
        }
        for (int64_t j = 0; j < width; ++j) {
            sum[j] += row[j];
        }
    }
    return true;
}

int64_t llama_seqkv_collector_layer(const llama_seqkv_collector * collector, int32_t il, float * k_mean, float * v_mean, int32_t * n_k, int32_t * n_v) {
    const auto it = collector->layers.find(il);
    if (it == collector->layers.end()) {
        *n_k = *n_v = 0;
        return 0;
    }
    const auto & l = it->second;
    const auto emit = [&](const std::vector<double> & sum, int64_t seen, float * dst, int32_t * n) {
        const int64_t count = seen - collector->n_skip;
        for (int32_t i = 0; count > 0 && i < std::min<int32_t>(*n, sum.size()); ++i) {
            dst[i] = (float) (sum[i]/count);
        }
        *n = sum.size();
        return std::max<int64_t>(count, 0);
    };
    return std::min(emit(l.k, l.n_k, k_mean, n_k), emit(l.v, l.n_v, v_mean, n_v));
}
