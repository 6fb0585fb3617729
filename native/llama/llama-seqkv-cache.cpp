#include "llama-seqkv-cache.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"

#include "../block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

static constexpr uint32_t STATE_MAGIC = 0x32564b53; // "SKV2"

// FNV-1a, 64 bits
static uint64_t hash_bytes(uint64_t h, const void * data, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        h = (h ^ ((const uint8_t *) data)[i])*0x100000001b3ull;
    }
    return h;
}
static constexpr uint64_t HASH_INIT = 0xcbf29ce484222325ull;

// Names, types and shapes of all tensors, the values of the small F32 ones (norms, biases) and the head of host-resident
// token embeddings: enough to tell models apart in a saved state when no fingerprint was configured.
static uint64_t hash_model(const llama_model & model) {
    uint64_t h = HASH_INIT;
    const std::string arch = model.arch_name();
    h = hash_bytes(h, arch.data(), arch.size());
    if (model.hparams.no_alloc) {
        return h;
    }
    // by name: the model has them in the order of its buffers, tied embeddings perhaps twice
    std::map<std::string, const ggml_tensor *> tensors;
    for (const auto & [name, t] : model.tensors_by_name) {
        if (t == model.tok_embd || !tensors.count(name)) {
            tensors[name] = t;
        }
    }
    std::vector<uint8_t> buf;
    for (const auto & [name, t] : tensors) {
        h = hash_bytes(h, name.data(), name.size());
        h = hash_bytes(h, &t->type, sizeof(t->type));
        h = hash_bytes(h, t->ne, sizeof(t->ne));
        const bool small = t->type == GGML_TYPE_F32 && ggml_nbytes(t) <= 64*1024 && t->buffer;
        const bool embd  = t == model.tok_embd && t->buffer && ggml_backend_buffer_is_host(t->buffer);
        if (small || embd) {
            buf.resize(std::min<size_t>(ggml_nbytes(t), 64*1024));
            ggml_backend_tensor_get(t, buf.data(), 0, buf.size());
            h = hash_bytes(h, buf.data(), buf.size());
        }
    }
    return h;
}

// Whether the model rotates the keys of a layer, as the graph of its architecture decides (src/models/*.cpp): `has_rope` alone
// does not say it. For layers with full attention; those that slide are not asked about.
static bool layer_has_rope(const llama_model & model, uint32_t il) {
    const auto & hparams = model.hparams;
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return false;
    }
    const uint32_t step = hparams.n_no_rope_layer_step;
    switch (model.arch) {
        case LLM_ARCH_STARCODER: // has learned positions, and a RoPE type all the same
            return false;
        case LLM_ARCH_AFMOE:
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_SMOLLM3:
            return step > 0 && (il + 1) % step != 0;
        case LLM_ARCH_SMALLTHINKER:
            return step == hparams.n_layer() || (step > 0 && il % step != 0);
        case LLM_ARCH_EXAONE4:
            return hparams.is_swa(il) || hparams.swa_type == LLAMA_SWA_TYPE_NONE;
        case LLM_ARCH_COHERE2MOE: // its draft head rotates
            return hparams.is_swa(il) || il < hparams.n_layer_dense_lead || il >= hparams.n_layer();
        case LLM_ARCH_COHERE2:
        case LLM_ARCH_EXAONE_MOE:
        case LLM_ARCH_MAPLE:
        case LLM_ARCH_MUSE_GLIMMER:
            return hparams.is_swa(il);
        default:
            return true;
    }
}

llama_seqkv_rope_t llama_seqkv_layer_rope(const llama_model & model, const llama_cparams & cparams, int32_t il) {
    const auto & hparams = model.hparams;

    llama_seqkv_rope_t res;
    if (!layer_has_rope(model, il)) {
        return res;
    }

    const int   n_rot      = (int) hparams.n_rot(il);
    const float freq_base  = model.get_rope_freq_base (cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    std::vector<float> factors(n_rot/2, 1.0f);
    if (ggml_tensor * t = model.get_rope_factors(cparams, il); t && t->buffer && !hparams.no_alloc) {
        GGML_ASSERT(t->type == GGML_TYPE_F32 && t->ne[0] >= n_rot/2);
        ggml_backend_tensor_get(t, factors.data(), 0, n_rot/2*sizeof(float));
    }

    float corr[2];
    ggml_rope_yarn_corr_dims(n_rot, cparams.n_ctx_orig_yarn, freq_base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr);

    res.neox = hparams.rope_type & GGML_ROPE_TYPE_NEOX;
    for (int i = 0; i < n_rot/2; ++i) {
        const double extrap = std::pow((double) freq_base, -2.0*i/n_rot)/factors[i];
        const double interp = freq_scale*extrap;
        const double ramp   = 1.0 - std::min(1.0, std::max(0.0, (i - corr[0])/std::max(0.001, (double) corr[1] - corr[0])));
        const double mix    = ramp*cparams.yarn_ext_factor;
        res.freq.push_back((float) (interp*(1.0 - mix) + extrap*mix));
    }
    return res;
}

//
// llama_seqkv
//

void llama_seqkv::slots::assign(int32_t s, int32_t c) {
    drop_cell(c);
    drop_slot(s);
    cell[s] = c;
    slot[c] = s;
}

void llama_seqkv::slots::drop_cell(int32_t c) {
    if (slot[c] >= 0) {
        cell[slot[c]] = -1;
        slot[c] = -1;
    }
}

void llama_seqkv::slots::drop_slot(int32_t s) {
    if (cell[s] >= 0) {
        slot[cell[s]] = -1;
        cell[s] = -1;
    }
}

llama_seqkv * llama_seqkv::of(llama_memory_i * memory) {
    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        return kv->seqkv.get();
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base()->seqkv.get();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn()->seqkv.get();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return hybrid->get_mem_attn()->get_base()->seqkv.get();
    }
    return nullptr;
}

bool llama_seqkv::uses(const llama_model & model, ggml_type type_k, ggml_type type_v) {
    return is_type(type_k) || is_type(type_v) || (model.seqkv && model.seqkv->any_type && (ggml_is_quantized(type_k) || ggml_is_quantized(type_v)));
}

ggml_type llama_seqkv::layer_type(const llama_model & model, ggml_type type, int32_t il, bool is_key) {
    const int bits = ggml_seqkv_bits(type);
    if (bits == 0 || !model.seqkv || model.seqkv->layers.count(il) == 0) {
        return type;
    }
    const auto & l = model.seqkv->layers.at(il);
    return ggml_seqkv_type(is_key ? l.k_bits[bits] : l.v_bits[bits], is_key);
}

// identity of what a profile does to the bytes of a cache, 0: no profile
static uint64_t hash_profile(const llama_seqkv_config & config) {
    uint64_t h = config.layers.empty() ? 0 : HASH_INIT;
    for (const auto & [il, l] : config.layers) {
        h = hash_bytes(h, &il, sizeof(il));
        h = hash_bytes(h, l.k_mean .data(), l.k_mean .size()*sizeof(float));
        h = hash_bytes(h, l.enc    .data(), l.enc    .size()*sizeof(ggml_fp16_t));
        h = hash_bytes(h, l.v_mean .data(), l.v_mean .size()*sizeof(float));
        h = hash_bytes(h, l.v_scale.data(), l.v_scale.size()*sizeof(float));
        h = hash_bytes(h, l.k_bits, sizeof(l.k_bits));
        h = hash_bytes(h, l.v_bits, sizeof(l.v_bits));
    }
    return h;
}

llama_seqkv::llama_seqkv(llama_kv_cache & kv, ggml_type type_k, ggml_type type_v) : kv(kv), type_k(type_k), type_v(type_v),
    config(kv.model.seqkv ? kv.model.seqkv : std::make_shared<llama_seqkv_config>()) {
    if (kv.other) {
        throw std::runtime_error("a seqkv cache cannot be shared with another context: use f16 for the draft context");
    }

    n_sink   = config->n_sink;
    n_window = config->n_window;
    model_id = config->model_id;
    n_slots  = std::max<uint32_t>(1, (kv.n_stream > 1 ? 1 : kv.n_seq_max)*(n_sink + n_window));

    const uint32_t kv_size = kv.get_size();
    streams.resize(kv.n_stream);
    written.resize(kv.n_stream);
    for (auto & st : streams) {
        st.cell.assign(n_slots, -1);
        st.slot.assign(kv_size, -1);
    }

    // window and profile tensors live with the layer's K
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> win_ctxs, prof_ctxs;
    const auto context_of = [&](auto & ctxs, ggml_backend_buffer_type_t buft) {
        auto & ctx = ctxs[buft];
        if (!ctx) {
            ctx.reset(ggml_init({ kv.layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        return ctx.get();
    };
    for (const auto & l : kv.layers) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(l.k->buffer);

        layer res;
        res.il  = l.il;
        res.win = ggml_new_tensor_3d(context_of(win_ctxs, buft), GGML_TYPE_F16, l.k->ne[0] + l.v->ne[0], n_slots, kv.n_stream);
        ggml_format_name(res.win, "cache_win_l%d", l.il);

        // without seqkv types there is nothing that the profile applies to
        if (config->layers.count(l.il) && (ggml_seqkv_bits(l.k->type) || ggml_seqkv_bits(l.v->type))) {
            const int64_t stride = ggml_seqkv_prof_stride(kv.hparams.n_embd_head_k(l.il), kv.hparams.n_embd_head_v(l.il));
            res.prof = ggml_new_tensor_1d(context_of(prof_ctxs, buft), GGML_TYPE_F16, kv.hparams.n_head_kv(l.il)*stride);
            ggml_format_name(res.prof, "seqkv_prof_l%d", l.il);
        }
        layers.push_back(std::move(res));
    }

    const size_t win_size  = allocate(win_ctxs,  kv.ctxs_bufs);
    const size_t prof_size = allocate(prof_ctxs, prof_bufs);

    model_hash   = hash_model(kv.model);
    profile_hash = hash_profile(*config);

    // The ops have to run where the cache lives. Ask before the first graph, so that nothing falls back to the CPU unnoticed.
    for (const auto & l : kv.layers) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(l.k->buffer));
        if (dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            ggml_tensor op = {};
            op.op     = GGML_OP_SEQKV_STORE;
            op.type   = l.k->type;
            if (!ggml_backend_dev_supports_op(dev, &op)) {
                throw std::runtime_error(format("the seqkv types are not available on %s (layer %d): keep the cache on the CPU (offload_kqv = false, or fewer GPU layers)",
                            ggml_backend_dev_name(dev), l.il));
            }
        }
    }

    LLAMA_LOG_INFO("%s: exact window: %d sinks + %d last tokens per sequence, %u slots, %.2f MiB; %.3f bits per value; profile: %s, %.2f MiB\n", __func__,
            n_sink, n_window, n_slots, win_size/1024.0/1024.0, bits(), config->layers.empty() ? "none" : config->profile.c_str(), prof_size/1024.0/1024.0);
}

size_t llama_seqkv::allocate(std::map<ggml_backend_buffer_type_t, ggml_context_ptr> & ctxs, buffers & bufs) const {
    size_t size = 0;
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_t buf;
        if (kv.hparams.no_alloc) {
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate the exact window and the tables of the seqkv cache");
        }
        ggml_backend_buffer_clear(buf, 0);
        size += ggml_backend_buffer_get_size(buf);
        bufs.emplace_back(std::move(ctx), buf);
    }
    return size;
}

// prof of ggml-seqkv.h for every layer; RoPE is known
void llama_seqkv::upload_profile() {
    if (kv.hparams.no_alloc) {
        return;
    }
    std::vector<ggml_fp16_t> prof;
    for (const auto & l : layers) {
        if (!l.prof) {
            continue;
        }
        const auto & from = config->layers.at(l.il);
        const auto & rope = rope_sets[l.rot_set];
        const int64_t dk = kv.hparams.n_embd_head_k(l.il), dv = kv.hparams.n_embd_head_v(l.il), n_pair = rope.freq.size();

        prof.clear();
        for (uint32_t h = 0; h < kv.hparams.n_head_kv(l.il); ++h) {
            const ggml_fp16_t * enc  = from.enc.data() + h*dk*dk;
            const float       * mean = from.k_mean.data() + h*dk;
            prof.insert(prof.end(), enc, enc + dk*dk);
            prof.insert(prof.end(), from.dec.data() + h*dk*dk, from.dec.data() + (h + 1)*dk*dk);

            std::vector<float> e(dk*dk);
            ggml_fp16_to_fp32_row(enc, e.data(), dk*dk);
            for (int32_t off = 0; off < SEQKV_FRAME; ++off) {
                std::vector<double> x(mean, mean + dk); // R(off) mean
                for (int64_t i = 0; i < n_pair; ++i) {
                    double & a = x[rope.neox ? i          : 2*i];
                    double & b = x[rope.neox ? i + n_pair : 2*i + 1];
                    const double c = std::cos((double) off*rope.freq[i]), s = std::sin((double) off*rope.freq[i]);
                    const double u = a*c - b*s;
                    b = a*s + b*c;
                    a = u;
                }
                for (int64_t r = 0; r < dk; ++r) {
                    double sum = 0.0;
                    for (int64_t i = 0; i < dk; ++i) {
                        sum += e[r*dk + i]*x[i];
                    }
                    prof.push_back(ggml_fp32_to_fp16((float) sum));
                }
            }
            for (const auto * values : { &from.v_mean, &from.v_scale }) {
                for (int64_t i = 0; i < dv; ++i) {
                    prof.push_back(ggml_fp32_to_fp16((*values)[h*dv + i]));
                }
            }
        }
        GGML_ASSERT(prof.size()*sizeof(ggml_fp16_t) == ggml_nbytes(l.prof));
        ggml_backend_tensor_set(l.prof, prof.data(), 0, ggml_nbytes(l.prof));
    }
}

void llama_seqkv::clear() {
    cells_changed();
    for (auto & st : streams) {
        std::fill(st.cell.begin(), st.cell.end(), -1);
        std::fill(st.slot.begin(), st.slot.end(), -1);
    }
}

void llama_seqkv::stream_copy(uint32_t ssrc, uint32_t sdst) {
    cells_changed();
    streams[sdst] = streams[ssrc];
}

void llama_seqkv::stream_copy_data(uint32_t ssrc, uint32_t sdst) {
    for (const auto & l : layers) {
        std::vector<uint8_t> buf(l.win->nb[2]);
        ggml_backend_tensor_get(l.win, buf.data(), ssrc*l.win->nb[2], buf.size());
        ggml_backend_tensor_set(l.win, buf.data(), sdst*l.win->nb[2], buf.size());
    }
}

void llama_seqkv::cells_written(uint32_t strm, const std::vector<uint32_t> & idxs) {
    auto & cells = kv.v_cells[strm];
    for (const uint32_t c : idxs) {
        streams[strm].drop_cell(c);

        auto ext = cells.ext_get(c);
        ext.x = cells.pos_get(c) % SEQKV_FRAME;
        cells.ext_set(c, ext);
    }
    add_written(strm, idxs);
}

void llama_seqkv::cell_removed(uint32_t strm, uint32_t cell) {
    add_written(strm, { cell });
}

void llama_seqkv::add_written(uint32_t strm, const std::vector<uint32_t> & cells) {
    written[strm].insert(written[strm].end(), cells.begin(), cells.end());
    changed = changed || written[strm].size() > kv.v_cells[strm].size();
}

bool llama_seqkv::wanted(const llama_kv_cells & cells, uint32_t cell, llama_seq_id seq_id) const {
    const llama_pos pos = cells.pos_get(cell);
    if (is_sink(pos)) {
        return true;
    }
    for (llama_seq_id s = std::max(seq_id, 0); s < (seq_id < 0 ? (llama_seq_id) kv.n_seq_max : seq_id + 1); ++s) {
        if (cells.seq_has(cell, s) && pos > cells.seq_pos_max(s) - n_window) {
            return true;
        }
    }
    return false;
}

uint32_t llama_seqkv::first_slot(llama_seq_id seq_id) const {
    return kv.n_stream > 1 || seq_id < 0 ? 0 : seq_id*(n_sink + n_window);
}

void llama_seqkv::begin_ubatch(const llama_kv_cache_context & mctx) {
    const auto & sinfo  = mctx.sinfos [mctx.i_cur];
    const auto & ubatch = mctx.ubatches[mctx.i_cur];

    const uint32_t n_stream = sinfo.n_stream();
    const uint32_t n_tokens = sinfo.size();
    const uint32_t n_kv     = mctx.n_kv;
    const uint32_t n_virt   = n_kv + n_slots + n_tokens;

    GGML_ASSERT(ubatch.n_tokens == n_stream*n_tokens && sinfo.s1 - sinfo.s0 + 1 == n_stream);

    // a context of many tokens is not looked through for each new one, unless too many rows of rot are of origins that no cell has any more
    ub.id++;
    ub.anew = changed || kv.other || ub.strm != sinfo.strm || ub.origins.size() > n_kv/SEQKV_FRAME + 32;
    ub.written.assign(n_stream, {});
    for (uint32_t i = 0; i < n_stream && !ub.anew; ++i) {
        std::copy_if(written[sinfo.strm[i]].begin(), written[sinfo.strm[i]].end(), std::back_inserter(ub.written[i]), [&](uint32_t c) { return c < n_kv; });
        for (uint32_t c = ub.n_kv; c < n_kv; ++c) {
            ub.written[i].push_back(c);
        }
    }
    if (ub.anew) {
        ub.meta.assign((size_t) n_stream*n_virt, -1);
        ub.origins.clear();
        ub.row_of .clear();
    } else if (ub.n_kv != n_kv || ub.n_tokens != n_tokens) {
        const std::vector<int32_t> last = std::move(ub.meta);
        ub.meta.assign((size_t) n_stream*n_virt, -1);
        for (uint32_t i = 0; i < n_stream; ++i) {
            std::copy_n(last.begin() + i*(last.size()/n_stream), std::min(ub.n_kv, n_kv), ub.meta.begin() + (size_t) i*n_virt);
        }
    }
    changed = false;
    for (auto & w : written) {
        w.clear();
    }

    ub.strm     = sinfo.strm;
    ub.n_kv     = n_kv;
    ub.n_stream = n_stream;
    ub.n_tokens = n_tokens;
    ub.slot_cell.assign(n_stream, std::vector<int32_t>(n_slots, -1));
    ub.cur_cell .assign(n_stream, std::vector<int32_t>(n_tokens));
    ub.win_idxs .assign((size_t) n_stream*n_tokens, -1);

    // exact rows of the ubatch stand for its blocks if no sequence's positions in it are a window apart
    std::unordered_map<llama_seq_id, std::pair<llama_pos, llama_pos>> span;
    ub.stored_before = n_window > 0;
    for (uint32_t t = 0; t < ubatch.n_tokens; ++t) {
        for (int32_t s = 0; s < ubatch.n_seq_id[t]; ++s) {
            const llama_pos pos = ubatch.pos[t];
            auto & [first, last] = span.try_emplace(ubatch.seq_id[t][s], pos, pos).first->second;
            first = std::min(first, pos);
            last  = std::max(last,  pos);
            ub.stored_before = ub.stored_before && last - first < n_window;
        }
    }

    int32_t last_origin = 0, last_row = -1;
    const auto meta_of = [&](const llama_kv_cells & cells, uint32_t c) {
        const int32_t offset = cells.ext_get(c).x;
        const int32_t origin = cells.pos_get(c) - offset;
        if (last_row < 0 || origin != last_origin) {
            const auto [it, fresh] = ub.row_of.try_emplace(origin, SEQKV_FRAME + (int32_t) ub.origins.size());
            if (fresh) {
                ub.origins.push_back(origin);
            }
            last_origin = origin;
            last_row    = it->second;
        }
        return last_row << 8 | offset;
    };

    for (uint32_t i = 0; i < n_stream; ++i) {
        const uint32_t strm = sinfo.strm[i];
        const auto & cells = kv.v_cells[strm];
        const auto & idxs  = sinfo.idxs[i];
        auto & st = streams[strm];
        int32_t * meta = ub.meta.data() + (size_t) i*n_virt;

        if (ub.anew) {
            for (uint32_t c = 0; c < n_kv; ++c) {
                if (!cells.is_empty(c)) {
                    meta[c] = meta_of(cells, c);
                }
            }
        } else {
            for (const uint32_t c : ub.written[i]) {
                meta[c] = cells.is_empty(c) ? -1 : meta_of(cells, c);
            }
            std::fill(meta + n_kv, meta + n_virt, -1);
        }

        // exact rows that this ubatch can read, then the ones that are kept after it
        for (uint32_t s = 0; s < n_slots; ++s) {
            const int32_t c = st.cell[s];
            if (c < 0) {
                continue;
            }
            if (cells.is_empty(c)) {
                st.drop_slot(s);
                continue;
            }
            ub.slot_cell[i][s] = c;
            meta[n_kv + s] = meta[c];
            if (!wanted(cells, c)) {
                st.drop_slot(s);
            }
        }

        for (uint32_t t = 0; t < n_tokens; ++t) {
            const uint32_t c = idxs[t];
            ub.cur_cell[i][t] = c;
            meta[n_kv + n_slots + t] = meta[c];
            if (!wanted(cells, c)) {
                continue;
            }
            // a slot given by the position, so that the layout does not depend on how the tokens were batched; another one if it is taken
            const llama_pos pos = cells.pos_get(c);
            uint32_t s = first_slot(ubatch.seq_id[i*n_tokens + t][0]) + (is_sink(pos) ? pos : n_sink + pos%n_window);
            if (st.cell[s] >= 0) {
                s = std::find(st.cell.begin(), st.cell.end(), -1) - st.cell.begin();
            }
            if (s < n_slots) {
                st.assign(s, c);
                ub.win_idxs[i*n_tokens + t] = (int64_t) strm*n_slots + s;
            }
        }
    }
}

void llama_seqkv::init_rope(const llama_cparams & cparams) {
    rope_sets.clear();
    n_rot_max = 2;
    for (auto & l : layers) {
        auto rope = llama_seqkv_layer_rope(kv.model, cparams, l.il);
        n_rot_max = std::max<uint32_t>(n_rot_max, 2*rope.freq.size());
        const auto it = std::find(rope_sets.begin(), rope_sets.end(), rope);
        l.rot_set = it - rope_sets.begin();
        if (it == rope_sets.end()) {
            rope_sets.push_back(std::move(rope));
        }
    }
    rot_origins.clear();
    rot_rows.assign(rope_sets.size(), {});

    upload_profile();
}

void llama_seqkv::rot_row(const llama_seqkv_rope_t & rope, int32_t p, float * cs) const {
    for (size_t i = 0; i < rope.freq.size(); ++i) {
        const double a = (double) p*rope.freq[i];
        cs[2*i]     = (float) std::cos(a);
        cs[2*i + 1] = (float) std::sin(a);
    }
}

//
// state
//

void llama_seqkv::state_write_header(llama_io_write_i & io) const {
    io.write(&STATE_MAGIC, sizeof(STATE_MAGIC));
    io.write_string(ggml_type_name(type_k)); // with the profile, these say the types of all layers
    io.write_string(ggml_type_name(type_v));
    io.write(&n_sink,       sizeof(n_sink));
    io.write(&n_window,     sizeof(n_window));
    io.write_string(model_id);
    io.write(&model_hash,   sizeof(model_hash));
    io.write(&profile_hash, sizeof(profile_hash));
}

static std::string read_short_string(llama_io_read_i & io) {
    uint32_t n;
    io.read(&n, sizeof(n));
    if (n > 64) {
        throw std::runtime_error("damaged seqkv state: a name of more than 64 characters");
    }
    std::string s(n, '\0');
    io.read(&s[0], n);
    return s;
}

void llama_seqkv::state_read_header(llama_io_read_i & io) const {
    uint32_t magic;
    io.read(&magic, sizeof(magic));
    if (magic != STATE_MAGIC) {
        throw std::runtime_error("not a state of a seqkv cache: it was saved with other cache types");
    }
    const std::string name_k = read_short_string(io);
    const std::string name_v = read_short_string(io);
    if (name_k != ggml_type_name(type_k) || name_v != ggml_type_name(type_v)) {
        throw std::runtime_error(format("state of cache types %s:%s, but the context has %s:%s",
                    name_k.c_str(), name_v.c_str(), ggml_type_name(type_k), ggml_type_name(type_v)));
    }
    int32_t sink, window;
    io.read(&sink,   sizeof(sink));
    io.read(&window, sizeof(window));
    if (sink != n_sink || window != n_window) {
        throw std::runtime_error(format("state with an exact window of %d + %d tokens, but the context has %d + %d", sink, window, n_sink, n_window));
    }
    const std::string id = read_short_string(io);
    uint64_t hm, hp;
    io.read(&hm, sizeof(hm));
    io.read(&hp, sizeof(hp));
    if (hm != model_hash || (!id.empty() && !model_id.empty() && id != model_id)) {
        throw std::runtime_error("state of another model");
    }
    if (hp != profile_hash) {
        throw std::runtime_error("state made with another profile");
    }
}

struct saved_row {
    uint32_t index; // of its cell in the saved order
    int32_t  slot;  // counted from the first one of the sequence, from 0 if all sequences are saved
};

void llama_seqkv::state_write(llama_io_write_i & io, uint32_t strm, const std::vector<uint32_t> & cells, llama_seq_id seq_id) const {
    const auto & st = streams[strm];

    std::vector<saved_row> rows;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        const int32_t slot = st.slot[cells[i]];
        if (slot >= 0 && (seq_id < 0 || wanted(kv.v_cells[strm], cells[i], seq_id))) {
            rows.push_back({ i, slot - (int32_t) first_slot(seq_id) });
        }
    }
    const uint32_t n = rows.size();
    io.write(&n, sizeof(n));
    io.write(rows.data(), n*sizeof(saved_row));
    for (const auto & l : layers) {
        for (const auto & r : rows) {
            io.write_tensor(l.win, strm*l.win->nb[2] + st.slot[cells[r.index]]*l.win->nb[1], l.win->nb[1]);
        }
    }
}

void llama_seqkv::state_read(llama_io_read_i & io, uint32_t strm, const std::vector<uint32_t> & cells, llama_seq_id seq_id) {
    const auto & kv_cells = kv.v_cells[strm];
    auto & st = streams[strm];
    cells_changed();

    for (const uint32_t c : cells) {
        if (kv_cells.ext_get(c).x < 0 || kv_cells.ext_get(c).x >= SEQKV_FRAME) {
            throw std::runtime_error("damaged seqkv state: an offset outside its frame");
        }
    }

    uint32_t n;
    io.read(&n, sizeof(n));
    if (n > cells.size()) {
        throw std::runtime_error("damaged seqkv state: more exact rows than cells");
    }
    std::vector<saved_row> rows(n);
    io.read(rows.data(), n*sizeof(saved_row));

    for (uint32_t s = 0; s < n_slots; ++s) {
        if (st.cell[s] >= 0 && kv_cells.is_empty(st.cell[s])) {
            st.drop_slot(s);
        }
    }

    // the slots they had if these are free, so that sums keep their order; if no slot is left, the row is read from its block
    std::vector<int32_t> dst(n, -1);
    for (uint32_t i = 0; i < n; ++i) {
        if (rows[i].index >= cells.size() || st.slot[cells[rows[i].index]] >= 0) {
            throw std::runtime_error("damaged seqkv state: an exact row of no cell, or twice the same");
        }
        uint32_t s = (uint32_t) rows[i].slot + first_slot(seq_id);
        if (s >= n_slots || st.cell[s] >= 0) {
            s = std::find(st.cell.begin(), st.cell.end(), -1) - st.cell.begin();
        }
        if (s < n_slots) {
            st.assign(s, cells[rows[i].index]);
            dst[i] = s;
        }
    }
    for (const auto & l : layers) {
        std::vector<uint8_t> skip;
        for (uint32_t i = 0; i < n; ++i) {
            if (dst[i] >= 0) {
                io.read_tensor(l.win, strm*l.win->nb[2] + dst[i]*l.win->nb[1], l.win->nb[1]);
            } else {
                skip.resize(l.win->nb[1]);
                io.read(skip.data(), skip.size());
            }
        }
    }
}

void llama_seqkv::range_write(const llama_kv_cache & kv, llama_io_write_i & io, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool exact) {
    const uint32_t strm  = kv.seq_to_stream.at(seq_id);
    const auto &   cells = kv.v_cells[strm];

    std::vector<uint32_t> idxs(p1 - p0, UINT32_MAX);
    for (uint32_t c = 0; c < cells.size(); ++c) {
        if (!cells.is_empty(c) && cells.seq_has(c, seq_id) && cells.pos_get(c) >= p0 && cells.pos_get(c) < p1) {
            idxs[cells.pos_get(c) - p0] = c;
        }
    }
    llama_kv_cache::cell_ranges_t cr { strm, {} };
    for (const uint32_t c : idxs) {
        if (c == UINT32_MAX) {
            throw std::runtime_error(format("the sequence lacks a position of %d..%d", p0, p1 - 1));
        }
        if (!cr.data.empty() && cr.data.back().second == c) {
            cr.data.back().second = c + 1;
        } else {
            cr.data.emplace_back(c, c + 1);
        }
    }

    if (kv.seqkv) {
        kv.seqkv->state_write_header(io);
    }
    io.write(&kv.n_stream, sizeof(kv.n_stream));
    const uint32_t n = idxs.size(), none = 0;
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        io.write(s == strm ? &n : &none, sizeof(n));
        if (s != strm) {
            continue;
        }
        kv.state_write_meta(io, cr, seq_id);
        kv.state_write_data(io, cr);
        if (kv.seqkv && exact) {
            kv.seqkv->state_write(io, strm, idxs, seq_id);
        } else if (kv.seqkv) {
            io.write(&none, sizeof(none));
        }
    }
}

size_t llama_seqkv::bytes_used(const llama_kv_cache & kv) {
    size_t cell_bytes = 0;
    for (const auto & l : kv.layers) {
        cell_bytes += ggml_row_size(l.k->type, l.k->ne[0]) + (l.v ? ggml_row_size(l.v->type, l.v->ne[0]) : 0);
    }
    size_t res = 0;
    for (const auto & cells : kv.v_cells) {
        res += cells.get_used()*cell_bytes;
    }
    for (uint32_t s = 0; kv.seqkv && s < kv.seqkv->streams.size(); ++s) {
        size_t n = 0;
        for (const int32_t c : kv.seqkv->streams[s].cell) {
            n += c >= 0 && !kv.v_cells[s].is_empty(c);
        }
        for (const auto & l : kv.seqkv->layers) {
            res += n*l.win->nb[1];
        }
    }
    return res;
}

double llama_seqkv::bits() const {
    double bytes = 0.0, values = 0.0;
    for (const auto & l : kv.layers) {
        for (const ggml_tensor * t : { l.k, l.v }) {
            bytes  += ggml_row_size(t->type, t->ne[0]);
            values += t->ne[0];
        }
    }
    return values > 0.0 ? 8.0*bytes/values : 0.0;
}

size_t llama_seqkv::profile_bytes() const {
    std::map<ggml_backend_buffer_type_t, size_t> sizes;
    memory_breakdown(sizes);
    size_t res = 0;
    for (const auto & [_, size] : sizes) {
        res += size;
    }
    return res;
}

void llama_seqkv::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : prof_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());
        sizes[buft] += kv.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
}

//
// llm_graph_input_seqkv
//

llama_seqkv & llm_graph_input_seqkv::seqkv() const {
    return *mctx->kv->seqkv;
}

uint32_t llm_graph_input_seqkv::n_frames(const llama_seqkv & seqkv, const llama_kv_cache_context * mctx) {
    // what cells in order need, rounded up so that graphs can be reused; more only if cells are out of order
    const uint32_t in_order = GGML_PAD(mctx->n_kv/SEQKV_FRAME + 64, 64);
    return mctx->ubatches.empty() ? in_order : std::max<uint32_t>(in_order, GGML_PAD(seqkv.ub.origins.size(), 64));
}

static constexpr int64_t MASK_PAD = 256; // rows of a mask that attention over expanded rows on a GPU takes as they are

llm_graph_input_seqkv * llm_graph_input_seqkv::build(ggml_context * ctx, llm_graph_result * res, const llama_kv_cache_context * mctx,
        get_mctx_t get_mctx, const llama_ubatch & ubatch, const llama_cparams & cparams) {
    llama_seqkv * seqkv = mctx->kv->seqkv.get();
    if (!seqkv) {
        return nullptr;
    }
    if (seqkv->rope_sets.empty()) {
        seqkv->init_rope(cparams);
    }

    auto inp = std::make_unique<llm_graph_input_seqkv>();
    inp->mctx     = mctx;
    inp->get_mctx = get_mctx;
    inp->causal   = cparams.causal_attn;
    inp->stored_before = !mctx->ubatches.empty() && seqkv->ub.stored_before; // no ubatch: the graph is measured, not run

    const auto &  sinfo    = mctx->sinfos[mctx->i_cur];
    const int64_t n_stream = sinfo.s1 - sinfo.s0 + 1;
    const int64_t n_tokens = ubatch.n_tokens/n_stream;
    const int64_t n_virt   = mctx->n_kv + seqkv->n_slots + n_tokens;

    inp->rot      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, seqkv->n_rot_max, SEQKV_FRAME + n_frames(*seqkv, mctx), seqkv->rope_sets.size());
    inp->meta     = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_virt, n_stream);
    inp->mask     = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, GGML_PAD(n_virt, MASK_PAD), n_tokens, 1, n_stream);
    inp->win_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens);
    for (auto [t, name] : { std::make_pair(inp->rot, "seqkv_rot"), { inp->meta, "seqkv_meta" }, { inp->mask, "seqkv_mask" }, { inp->win_idxs, "seqkv_win_idxs" } }) {
        ggml_set_input(t);
        ggml_set_output(t); // what it holds is kept for the next ubatch
        ggml_set_name(t, name);
    }
    // the mask is not: a copy that is kept gives its memory to nothing else, and a batch's is large
    ggml_seqkv_keep_input(inp->rot);
    ggml_seqkv_keep_input(inp->meta);

    return (llm_graph_input_seqkv *) res->add_input(std::move(inp));
}

bool llm_graph_input_seqkv::can_reuse(const llm_graph_params & params) {
    mctx = get_mctx(params.mctx);

    const auto &  sinfo    = mctx->sinfos[mctx->i_cur];
    const int64_t n_stream = sinfo.s1 - sinfo.s0 + 1;
    const int64_t n_tokens = params.ubatch.n_tokens/n_stream;

    return meta->ne[0] == mctx->n_kv + seqkv().n_slots + n_tokens && mask->ne[1] == n_tokens && mask->ne[3] == n_stream &&
        win_idxs->ne[0] == params.ubatch.n_tokens && rot->ne[1] >= (int64_t) (SEQKV_FRAME + seqkv().ub.origins.size()) &&
        causal == params.cparams.causal_attn && stored_before == seqkv().ub.stored_before;
}

void llm_graph_input_seqkv::set_input(const llama_ubatch * ubatch) {
    auto & sk = seqkv();
    const auto & ub = sk.ub;

    // a graph without attention layers of this cache leaves its inputs without a buffer
    if (!mask->buffer) {
        return;
    }
    for (const ggml_tensor * t : { rot, meta, mask, win_idxs }) {
        GGML_ASSERT(t->buffer && ggml_backend_buffer_is_host(t->buffer));
    }

    const uint32_t n_virt = ub.n_kv + sk.n_slots + ub.n_tokens;
    GGML_ASSERT(meta->ne[0] == n_virt && meta->ne[1] == ub.n_stream && ubatch->n_tokens == ub.n_stream*ub.n_tokens);

    const bool holds_last = filled != 0 && filled + 1 == ub.id; // the last ubatch's
    filled = ub.id;

    // of elements [first, end) of a tensor, or of all that it has
    const auto changed = [&](ggml_tensor * t, bool known, size_t first, size_t end) {
        ggml_seqkv_set_change(t, (int32_t) ub.id, known ? (int32_t) ub.id - 1 : 0, first*ggml_element_size(t), end*ggml_element_size(t));
    };
    const bool meta_held = holds_last && !ub.anew;
    size_t meta_first = (size_t) ub.n_stream*n_virt, meta_end = 0;
    if (meta_held) {
        for (uint32_t i = 0; i < ub.n_stream; ++i) {
            const int32_t * src = ub.meta.data() + (size_t) i*n_virt;
            int32_t       * dst = (int32_t *) meta->data + (size_t) i*n_virt;
            for (const uint32_t c : ub.written[i]) {
                dst[c] = src[c];
                meta_first = std::min<size_t>(meta_first, i*n_virt + c);
            }
            std::copy(src + ub.n_kv, src + n_virt, dst + ub.n_kv);
            meta_first = std::min<size_t>(meta_first, i*n_virt + ub.n_kv);
            meta_end   = (size_t) (i + 1)*n_virt;
        }
    } else {
        memcpy(meta->data, ub.meta.data(), ggml_nbytes(meta));
    }
    changed(meta, meta_held, meta_first, meta_end);
    memcpy(win_idxs->data, ub.win_idxs.data(), ggml_nbytes(win_idxs));

    // rotations: offsets, then the origins; only origins that changed since the last ubatch are computed
    const size_t n_orig = ub.origins.size();
    const size_t stride = sk.n_rot_max;
    size_t rot_first = ggml_nelements(rot), rot_end = 0;
    GGML_ASSERT(rot->ne[1] >= (int64_t) (SEQKV_FRAME + n_orig) && rot->ne[2] == (int64_t) sk.rope_sets.size());
    for (size_t set = 0; set < sk.rope_sets.size(); ++set) {
        auto & rows = sk.rot_rows[set];
        if (rows.empty()) {
            rows.resize(SEQKV_FRAME*stride);
            for (int32_t off = 0; off < SEQKV_FRAME; ++off) {
                sk.rot_row(sk.rope_sets[set], off, rows.data() + off*stride);
            }
        }
        rows.resize((SEQKV_FRAME + n_orig)*stride);
        float * dst = (float *) ((char *) rot->data + set*rot->nb[2]);
        for (size_t r = 0; r < n_orig; ++r) {
            if (r >= sk.rot_origins.size() || sk.rot_origins[r] != ub.origins[r]) {
                float * row = rows.data() + (SEQKV_FRAME + r)*stride;
                sk.rot_row(sk.rope_sets[set], ub.origins[r], row);
                std::copy_n(row, stride, dst + (SEQKV_FRAME + r)*stride);
                const size_t at = dst - (float *) rot->data + (SEQKV_FRAME + r)*stride;
                rot_first = std::min(rot_first, at);
                rot_end   = std::max(rot_end, at + stride);
            }
        }
        if (!holds_last) {
            memcpy(dst, rows.data(), rows.size()*sizeof(float));
        }
    }
    sk.rot_origins = ub.origins;
    changed(rot, holds_last, rot_first, rot_end);

    // mask. Rows of a sequence's tokens differ in the cells behind the first of these, and in the exact ones
    const ggml_fp16_t keep = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t drop = ggml_fp32_to_fp16(-INFINITY);
    struct place {
        llama_pos pos;
        uint32_t  cell, column; // of a cell's exact row, behind n_kv

        bool operator<(const place & o) const { return pos != o.pos ? pos < o.pos : column > o.column; } // that of this ubatch first
    };
    struct sequence {
        llama_pos first;                         // of its tokens in the ubatch
        llama_seqkv::attended * known = nullptr; // what that token attends to
        std::vector<place> rest;                 // cells behind it
        bool in_order = false;                   // these are neighbours in the order of the positions
        llama_seqkv::attended own = {};
    };
    sk.last_attended.resize(ub.n_stream);
    const bool one_row = ub.n_stream*ub.n_tokens == 1;
    bool row_held = holds_last && one_row; // but for the columns `stale`
    for (uint32_t i = 0; i < ub.n_stream; ++i) {
        const auto & cells = sk.kv.v_cells[sk.kv.seq_to_stream[ubatch->seq_id[i*ub.n_tokens][0]]];
        std::vector<place> sinks, exact;
        const auto add = [&](int32_t c, uint32_t column) {
            if (c >= 0) {
                const llama_pos pos = cells.pos_get(c);
                (sk.is_sink(pos) ? sinks : exact).push_back({ pos, (uint32_t) c, column });
            }
        };
        for (uint32_t s = 0; s < sk.n_slots; ++s) {
            add(ub.slot_cell[i][s], ub.n_kv + s);
        }
        for (uint32_t t = 0; t < ub.n_tokens; ++t) {
            add(ub.cur_cell[i][t], ub.n_kv + sk.n_slots + t);
        }
        std::sort(sinks.begin(), sinks.end());
        std::sort(exact.begin(), exact.end());

        std::unordered_map<llama_seq_id, sequence> sequences;
        for (uint32_t it = i*ub.n_tokens; it < (i + 1)*ub.n_tokens; ++it) {
            auto & first = sequences.try_emplace(ubatch->seq_id[it][0], sequence { ubatch->pos[it] }).first->second.first;
            first = std::min(first, ubatch->pos[it]);
        }
        for (uint32_t it = i*ub.n_tokens; it < (i + 1)*ub.n_tokens; ++it) {
            const llama_seq_id seq = ubatch->seq_id[it][0];
            const llama_pos    p1  = ubatch->pos[it];
            sequence &         sq  = sequences[seq];
            if (!sq.known) {
                sq.known = sequences.size() == 1 ? &sk.last_attended[i] : &sq.own;
                auto & known = *sq.known;
                const auto look_at = [&](uint32_t c) {
                    const bool own = !cells.is_empty(c) && cells.seq_has(c, seq);
                    const bool later = own && causal && cells.pos_get(c) > sq.first;
                    known.row[c] = own && !later ? keep : drop;
                    if (row_held) {
                        stale.push_back(c);
                    }
                    if (later) {
                        sq.rest.push_back({ cells.pos_get(c), c, 0 });
                    }
                };
                if (!ub.anew && known.ubatch + 1 == ub.id && known.seq == seq && known.causal == causal) {
                    known.row.resize(mask->ne[0], drop);
                    std::fill(known.row.begin() + ub.n_kv, known.row.end(), drop);
                    std::for_each(ub.written[i].begin(), ub.written[i].end(), look_at);
                    // cells behind this token, and those behind the last ubatch's first one
                    const auto & at = cells.seq_pos_get(seq);
                    for (auto c = at.upper_bound({ std::min(known.first, sq.first), UINT32_MAX }); c != at.end(); ++c) {
                        look_at(c->second);
                    }
                } else {
                    row_held = false;
                    known.row.assign(mask->ne[0], drop);
                    for (uint32_t c = 0; c < ub.n_kv; ++c) {
                        look_at(c);
                    }
                }
                std::sort(sq.rest.begin(), sq.rest.end()); // of cells looked at twice one remains
                sq.rest.erase(std::unique(sq.rest.begin(), sq.rest.end(), [](const place & a, const place & b) { return a.cell == b.cell; }), sq.rest.end());
                sq.in_order = !sq.rest.empty() && std::adjacent_find(sq.rest.begin(), sq.rest.end(),
                    [](const place & a, const place & b) { return b.cell != a.cell + 1; }) == sq.rest.end();
                known.ubatch = ub.id;
                known.seq    = seq;
                known.first  = sq.first;
                known.causal = causal;
            }
            ggml_fp16_t * row = (ggml_fp16_t *) mask->data + it*mask->ne[0];
            if (row_held) {
                for (const uint32_t column : stale) {
                    row[column] = sq.known->row[column];
                }
            } else {
                memcpy(row, sq.known->row.data(), mask->nb[1]);
            }
            stale.clear();
            const size_t n_seen = std::upper_bound(sq.rest.begin(), sq.rest.end(), p1, [](llama_pos p, const place & r) { return p < r.pos; }) - sq.rest.begin();
            if (sq.in_order) {
                std::fill_n(row + sq.rest[0].cell, n_seen, keep);
            } else {
                std::for_each_n(sq.rest.begin(), n_seen, [&](const place & r) { row[r.cell] = keep; });
            }
            if (one_row) {
                std::for_each_n(sq.rest.begin(), n_seen, [&](const place & r) { stale.push_back(r.cell); });
            }
            // of a cell and its exact row, the exact one counts within the window
            const auto move = [&](const place & r) {
                if (row[r.cell] == keep) {
                    row[r.cell]   = drop;
                    row[r.column] = keep;
                    if (one_row) {
                        stale.insert(stale.end(), { r.cell, r.column });
                    }
                }
            };
            std::for_each(sinks.begin(), sinks.end(), move);
            for (auto r = std::lower_bound(exact.begin(), exact.end(), place { p1 - sk.n_window + 1, 0, UINT32_MAX }); r != exact.end() && r->pos < p1 + sk.n_window; ++r) {
                move(*r);
            }
        }
    }
}

ggml_tensor * llm_graph_input_seqkv::build_attn(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q_cur, ggml_tensor * k_cur,
        ggml_tensor * v_cur, ggml_tensor * idxs, ggml_tensor * sinks, float kq_scale, int il) {
    const auto & sk  = seqkv();
    const int    ikv = sk.kv.map_layer_ids.at(il);
    const auto & l   = sk.layers[ikv];
    const auto & kvl = sk.kv.layers[ikv];
    const auto & hparams = sk.kv.hparams;

    const auto &  sinfo    = mctx->sinfos[mctx->i_cur];
    const int64_t n_stream = sinfo.s1 - sinfo.s0 + 1;
    const int64_t n_kv     = mctx->n_kv;

    ggml_seqkv_params params = {};
    params.dk        = hparams.n_embd_head_k(kvl.il);
    params.dv        = hparams.n_embd_head_v(kvl.il);
    params.n_head_kv = hparams.n_head_kv(kvl.il);
    params.n_rot     = 2*sk.rope_sets[l.rot_set].freq.size();
    params.neox      = sk.rope_sets[l.rot_set].neox;
    params.rot_set   = l.rot_set;
    params.n_kv      = n_kv;
    params.n_win     = sk.n_slots;
    params.scale     = kq_scale;
    params.softcap   = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    params.stored_before = stored_before;

    const bool store = k_cur && v_cur;
    if (store) {
        cur[ikv] = ggml_seqkv_frame(ctx, k_cur, v_cur, meta, rot, params);

        const auto flat = [&](ggml_tensor * t) { return ggml_reshape_2d(ctx, t, t->ne[0], t->ne[1]*t->ne[2]); };
        params.part = GGML_SEQKV_KEY;
        ggml_build_forward_expand(gf, ggml_seqkv_store(ctx, flat(kvl.k), cur[ikv], idxs, meta, l.prof, params));
        params.part = GGML_SEQKV_VALUE;
        ggml_build_forward_expand(gf, ggml_seqkv_store(ctx, flat(kvl.v), cur[ikv], idxs, meta, l.prof, params));
    }
    GGML_ASSERT(cur.count(ikv) && "a layer shares a cache that no earlier layer has written");

    const auto view = [&](ggml_tensor * t, int64_t n) {
        return ggml_view_3d(ctx, t, t->ne[0], n, n_stream, t->nb[1], t->nb[2], sinfo.s0*t->nb[2]);
    };
    ggml_tensor * res = ggml_seqkv_attn(ctx, q_cur, view(kvl.k, n_kv), view(kvl.v, n_kv), mask, sinks, view(l.win, sk.n_slots), cur[ikv],
            meta, rot, l.prof, params);
    ggml_build_forward_expand(gf, res);

    // the window moves after it has been read
    if (store) {
        params.part = GGML_SEQKV_ROW;
        ggml_build_forward_expand(gf, ggml_seqkv_store(ctx, ggml_reshape_2d(ctx, l.win, l.win->ne[0], l.win->ne[1]*l.win->ne[2]),
                    cur[ikv], win_idxs, meta, nullptr, params));
    }

    return ggml_reshape_2d(ctx, res, res->ne[0]*res->ne[1], res->ne[2]);
}
