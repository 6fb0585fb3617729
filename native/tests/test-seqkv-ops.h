// Cases of test-backend-ops for the seqkv ops, included there after its test_case class.
// Each backend is compared with the CPU backend in reference mode, i.e. with the scalar oracle.
#pragma once

#include "../ggml-seqkv.h"
#include "../block.h"

#include <numeric>

struct test_seqkv : public test_case {
    enum order_t { IN_ORDER, SHIFTED, SCRAMBLED }; // of the cells: one frame a tile, two frames a tile, any

    const ggml_op   op;       // SEQKV_FRAME, SEQKV_STORE, SEQKV_ATTN
    const ggml_type type_k;
    const ggml_type type_v;   // STORE: a value of this type is stored, or if it is F16, a key of type_k
    const int64_t   dk, dv, n_head_kv, group;
    const int64_t   n_kv, n_win, n_tokens, n_stream;
    const int       order;
    const bool      profile, sinks, neox;
    const int64_t   n_rot;
    const float     softcap;

    std::string vars() override {
        return VARS_TO_STR16(type_k, type_v, dk, dv, n_head_kv, group, n_kv, n_win, n_tokens, n_stream, order, profile, sinks, neox, n_rot, softcap);
    }
    std::string op_desc(ggml_tensor * t) override { return ggml_op_name(t->op); }

    double max_nmse_err() override { return op == GGML_OP_SEQKV_STORE ? 1e-3 : 1e-8; } // STORE: codes may differ at level boundaries
    // GPU: decode rounds rotated queries to f16, as upstream's kernels do, and probabilities to 15 bits for integer tensor cores;
    // prefill expands rows to f16 for upstream's kernels and takes their tolerance.
    static constexpr double GPU_DECODE_ERR = 3e-6, GPU_PREFILL_ERR = 5e-4;
    static constexpr int64_t GPU_DECODE_TOKENS = 8;
    double max_nmse_err(ggml_backend_t backend) override {
        if (op != GGML_OP_SEQKV_ATTN || ggml_backend_dev_type(ggml_backend_get_device(backend)) != GGML_BACKEND_DEVICE_TYPE_GPU) {
            return max_nmse_err();
        }
        return n_tokens <= GPU_DECODE_TOKENS ? GPU_DECODE_ERR : GPU_PREFILL_ERR;
    }

    test_seqkv(ggml_op op, ggml_type type_k, ggml_type type_v, int64_t dk = 64, int64_t dv = 64, int64_t n_head_kv = 2, int64_t group = 3,
            int64_t n_kv = 256, int64_t n_win = 68, int64_t n_tokens = 1, int64_t n_stream = 1, int order = IN_ORDER, bool profile = true,
            bool sinks = false, bool neox = false, int64_t n_rot = 0, float softcap = 0.0f) :
        op(op), type_k(type_k), type_v(type_v), dk(dk), dv(dv), n_head_kv(n_head_kv), group(group), n_kv(n_kv), n_win(n_win),
        n_tokens(n_tokens), n_stream(n_stream), order(order), profile(profile), sinks(sinks), neox(neox), n_rot(n_rot ? n_rot : dk), softcap(softcap) {}

    int64_t n_frames() const { return mode == MODE_PERF ? (n_kv + n_win + n_tokens)/SEQKV_FRAME + 1 : 64; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t row    = n_head_kv*(dk + dv);
        const int64_t n_virt = n_kv + n_win + n_tokens;

        ggml_seqkv_params params = {};
        params.dk        = dk;
        params.dv        = dv;
        params.n_head_kv = n_head_kv;
        params.n_rot     = n_rot;
        params.neox      = neox;
        params.rot_set   = 1;
        params.n_kv      = n_kv;
        params.n_win     = n_win;
        params.scale     = 1.0f/sqrtf(dk);
        params.softcap   = softcap;

        const auto named = [](ggml_tensor * t, const char * name) { ggml_set_name(t, name); return t; };

        ggml_tensor * rot  = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_rot, SEQKV_FRAME + n_frames(), 2), "rot");
        ggml_tensor * meta = named(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_virt, n_stream), "meta");

        ggml_tensor * out = nullptr;
        if (op == GGML_OP_SEQKV_FRAME) {
            ggml_tensor * k = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dk, n_head_kv, n_tokens*n_stream), "k");
            ggml_tensor * v = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dv, n_head_kv, n_tokens*n_stream), "v");
            out = ggml_seqkv_frame(ctx, k, v, meta, rot, params);
        } else {
            ggml_tensor * prof = profile ? named(ggml_new_tensor_1d(ctx, GGML_TYPE_F16, n_head_kv*ggml_seqkv_prof_stride(dk, dv)), "prof") : nullptr;
            ggml_tensor * cur  = named(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, row, n_tokens*n_stream), "cur");
            if (op == GGML_OP_SEQKV_STORE) {
                const bool key = type_v == GGML_TYPE_F16;
                params.part = key ? GGML_SEQKV_KEY : GGML_SEQKV_VALUE;
                ggml_tensor * dst  = named(ggml_new_tensor_2d(ctx, key ? type_k : type_v, n_head_kv*(key ? dk : dv), n_kv*n_stream), "dst");
                ggml_tensor * idxs = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens*n_stream), "idxs");
                out = ggml_seqkv_store(ctx, dst, cur, idxs, meta, prof, params);
            } else {
                ggml_tensor * q    = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dk, n_head_kv*group, n_tokens*n_stream), "q");
                ggml_tensor * k    = named(ggml_new_tensor_3d(ctx, type_k, n_head_kv*dk, n_kv, n_stream), "k");
                ggml_tensor * v    = named(ggml_new_tensor_3d(ctx, type_v, n_head_kv*dv, n_kv, n_stream), "v");
                ggml_tensor * win  = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F16, row, n_win, n_stream), "win");
                ggml_tensor * mask = named(ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_virt, n_tokens, 1, n_stream), "mask");
                ggml_tensor * s    = sinks ? named(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head_kv*group), "sinks") : nullptr;
                out = ggml_seqkv_attn(ctx, q, k, v, mask, s, win, cur, meta, rot, prof, params);
            }
        }
        return named(out, "out");
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng(42);
        std::vector<bool> empty(n_kv);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            if (ggml_is_view_op(t->op) || t->op != GGML_OP_NONE) {
                continue;
            }
            const std::string name = t->name;
            if (name == "rot") {
                std::vector<float> data(ggml_nelements(t));
                for (int64_t r = 0; r < t->ne[1]*t->ne[2]; ++r) {
                    for (int64_t i = 0; i < n_rot/2; ++i) {
                        const double p = r%t->ne[1] < SEQKV_FRAME ? r%t->ne[1] : (r%t->ne[1] - SEQKV_FRAME)*64.0 - 37.0;
                        const double a = p*std::pow(r < t->ne[1] ? 500.0 : 10000.0, -2.0*i/n_rot);
                        data[r*n_rot + 2*i]     = std::cos(a);
                        data[r*n_rot + 2*i + 1] = std::sin(a);
                    }
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "prof") {
                // E = diag(s) (I - 2 u u^T), D its inverse; a prediction larger than the residual
                std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
                std::vector<ggml_fp16_t> data;
                const auto put = [&](double x) { data.push_back(ggml_fp32_to_fp16((float) x)); };
                for (int64_t h = 0; h < n_head_kv; ++h) {
                    std::vector<double> scale(dk), u(dk);
                    double uu = 0.0;
                    for (int64_t i = 0; i < dk; ++i) {
                        scale[i] = std::exp(uniform(rng));
                        u[i]     = uniform(rng);
                        uu      += u[i]*u[i];
                    }
                    const auto reflection = [&](int64_t r, int64_t c) { return (r == c) - 2.0*u[r]*u[c]/uu; };
                    for (int64_t i = 0; i < dk*dk; ++i) {
                        put(scale[i/dk]*reflection(i/dk, i%dk));
                    }
                    for (int64_t i = 0; i < dk*dk; ++i) {
                        put(reflection(i/dk, i%dk)/scale[i%dk]);
                    }
                    for (int64_t i = 0; i < SEQKV_FRAME*dk + dv; ++i) {
                        put(4.0*uniform(rng));
                    }
                    for (int64_t i = 0; i < dv; ++i) {
                        put(std::exp(uniform(rng)));
                    }
                }
                GGML_ASSERT((int64_t) data.size() == ggml_nelements(t));
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "meta") {
                std::vector<int32_t> data(ggml_nelements(t));
                for (int64_t j = 0; j < (int64_t) data.size(); ++j) {
                    const int64_t c = order == SCRAMBLED ? rng()%4096 : (j%t->ne[0] + (order == SHIFTED ? 21 : 0));
                    data[j] = (SEQKV_FRAME + c/64%n_frames()) << 8 | c%64;
                    if (mode != MODE_PERF && j%t->ne[0] < n_kv && rng()%16 == 0) {
                        data[j] = -1;
                    }
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
                empty.assign(data.size(), false);
                for (size_t j = 0; j < data.size(); ++j) {
                    empty[j] = data[j] < 0;
                }
            } else if (name == "mask") {
                std::vector<ggml_fp16_t> data(ggml_nelements(t));
                const int64_t n_virt = t->ne[0];
                for (int64_t i = 0; i < (int64_t) data.size(); ++i) {
                    const int64_t j = i%n_virt, s = i/n_virt/n_tokens;
                    // whole frames are left out, as one behind the window is; with many cells none, as in a long context
                    const bool left_out = n_kv > 1000 ? j%64 != 0 && rng()%8 == 0 : rng()%8 == 0 || (j/64)%5 == 3;
                    const bool keep = mode == MODE_PERF || (!empty[s*n_virt + j] && !left_out);
                    data[i] = ggml_fp32_to_fp16(keep ? 0.0f : -INFINITY);
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "idxs") {
                std::vector<int64_t> data(t->ne[0]);
                std::vector<int64_t> rows(n_kv*n_stream);
                std::iota(rows.begin(), rows.end(), 0);
                std::shuffle(rows.begin(), rows.end(), rng);
                for (size_t i = 0; i < data.size(); ++i) {
                    data[i] = i%7 == 3 ? -1 : rows[i];
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "sinks") {
                init_tensor_uniform(t, -10.0f, 10.0f);
            } else if ((mode == MODE_PERF || ggml_nrows(t) > 32768) && ggml_is_quantized(t->type)) { // many rows: a few again and again
                const int64_t n = 64, rows = ggml_nrows(t), size = ggml_row_size(t->type, t->ne[0]);
                std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
                std::vector<float> values(n*t->ne[0]);
                std::generate(values.begin(), values.end(), [&] { return uniform(rng); });
                std::vector<uint8_t> data(rows*size);
                ggml_quantize_chunk(t->type, values.data(), data.data(), 0, n, t->ne[0], nullptr);
                for (int64_t r = n; r < rows; ++r) {
                    std::copy_n(data.begin() + (r - n)*size, size, data.begin() + r*size);
                }
                ggml_backend_tensor_set(t, data.data(), 0, data.size());
            } else {
                init_tensor_uniform(t, -3.0f, 3.0f);
            }
        }
    }

    // decode of a model of 8B behind a context, for 'test-backend-ops perf'
    static void add_perf(std::vector<std::unique_ptr<test_case>> & cases) {
        for (const int64_t n_kv : { 16384, 131072 }) {
            for (const ggml_type t : { GGML_TYPE_SEQKV4, GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV2 }) {
                for (const bool profile : { false, true }) {
                    cases.emplace_back(new test_seqkv(GGML_OP_SEQKV_ATTN, ggml_seqkv_type(ggml_seqkv_bits(t), profile), t, 128, 128, 8, 4, n_kv, 68, 1, 1, IN_ORDER, profile, false, true));
                }
            }
        }
    }

    static void add(std::vector<std::unique_ptr<test_case>> & cases) {
        const ggml_type keys[]   = { GGML_TYPE_SEQKV1, GGML_TYPE_SEQKV2, GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV4,
                                     GGML_TYPE_SEQKV1K, GGML_TYPE_SEQKV2K, GGML_TYPE_SEQKV3K, GGML_TYPE_SEQKV4K };
        const ggml_type values[] = { GGML_TYPE_SEQKV1, GGML_TYPE_SEQKV2, GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV4 };
        const ggml_type others[] = { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL };
        const auto attn = [&](auto... args) { cases.emplace_back(new test_seqkv(GGML_OP_SEQKV_ATTN, args...)); };

        for (const int64_t d : { 64, 128, 256 }) {
            for (const bool neox : { false, true }) {
                cases.emplace_back(new test_seqkv(GGML_OP_SEQKV_FRAME, GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV3, d, 64, 2, 1, 256, 68, 7, 2, SHIFTED, true, false, neox));
            }
            for (const bool profile : { false, true }) {
                for (const int64_t n_tokens : { 3, 33 }) { // GPUs have kernels for few tokens and for many
                    if (n_tokens == 3 && d != 128) {
                        continue;
                    }
                    for (const ggml_type t : keys) {
                        cases.emplace_back(new test_seqkv(GGML_OP_SEQKV_STORE, t, GGML_TYPE_F16, d, 64, 2, 1, 256, 68, n_tokens, 2, SHIFTED, profile, false, false, d/2));
                    }
                    for (const ggml_type t : values) {
                        cases.emplace_back(new test_seqkv(GGML_OP_SEQKV_STORE, t, t, 64, d, 3, 1, 256, 68, n_tokens, 1, IN_ORDER, profile));
                    }
                    for (const ggml_type t : others) {
                        if (d == 128 && !profile && t != GGML_TYPE_F16) {
                            cases.emplace_back(new test_seqkv(GGML_OP_SEQKV_STORE, t, t, 64, d, 3, 1, 256, 68, n_tokens, 1, IN_ORDER, profile));
                        }
                    }
                }
            }
            for (const int64_t n_tokens : { 1, 3, 64, 75 }) {
                for (const int order : { IN_ORDER, SHIFTED, SCRAMBLED }) {
                    for (const ggml_type t : values) {
                        const bool profile = t != GGML_TYPE_SEQKV2;
                        attn(ggml_seqkv_type(ggml_seqkv_bits(t), profile), t, d, d, 2, 3, 512, 68, n_tokens, 1, order, profile, false, order == SHIFTED);
                    }
                }
            }
        }
        // every type of K with one of V and the other way round, with and without profile, one token and more than a tile of queries
        for (const bool profile : { false, true }) {
            for (const int64_t n_tokens : { 1, 90 }) {
                for (const ggml_type t : keys) {
                    attn(t, GGML_TYPE_SEQKV2, 64, 128, 2, 3, 192, 68, n_tokens, 1, SHIFTED, profile, false, true, 32);
                }
                for (const ggml_type t : values) {
                    attn(GGML_TYPE_SEQKV3K, t, 128, 64, 2, 3, 192, 68, n_tokens, 1, SCRAMBLED, profile);
                }
                for (const ggml_type t : others) {
                    attn(t, GGML_TYPE_SEQKV3, 128, 128, 2, 2, 256, 1, n_tokens, 1, SHIFTED, profile);
                    attn(GGML_TYPE_SEQKV2K, t, 128, 128, 2, 2, 256, 1, n_tokens, 1, SCRAMBLED, profile);
                    attn(t, t, 64, 64, 2, 2, 256, 68, n_tokens, 1, SHIFTED, profile);
                }
            }
        }
        for (const int64_t group : { 1, 2, 3, 4, 7, 8, 16, 64 }) {
            for (const int64_t n_tokens : { 1, 2, 17 }) {
                attn(GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV3, 64, 64, 2, group, 256, 68, n_tokens, 2, SHIFTED, false, true, true, 32, 30.0f);
                attn(GGML_TYPE_SEQKV4K, GGML_TYPE_SEQKV3, 64, 64, 2, group, 256, 68, n_tokens, 2, IN_ORDER, true, true, false, 64, 0.0f);
            }
        }
        // decode around tile and chunk edges
        for (const int64_t n_kv : { 1, 63, 64, 65, 127, 955, 956, 1023, 1024, 2500 }) {
            attn(GGML_TYPE_SEQKV4,  GGML_TYPE_SEQKV2, 128, 64, 1, 4, n_kv, 68, 1);
            attn(GGML_TYPE_SEQKV3K, GGML_TYPE_SEQKV4, 64, 64, 1, 4, n_kv, 68, 1);
        }
        // decode of so many heads and streams that CUDA has the kernel for long contexts work on few cells
        for (const int64_t d : { 64, 128 }) {
            const int64_t n = d == 64 ? 16 : 8;
            for (const ggml_type t : { GGML_TYPE_SEQKV2, GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV4 }) {
                for (const bool profile : { false, true }) {
                    const ggml_type k = ggml_seqkv_type(ggml_seqkv_bits(t), profile);
                    attn(k, t, d, d, 8, 4, 320, 68, 1, n, IN_ORDER, profile);
                    attn(k, t, d, d, 8, 3, 390, 68, 2, n, SHIFTED, profile, false, true, d/2);
                }
            }
            for (const bool profile : { false, true }) {
                attn(ggml_seqkv_type(3, profile), GGML_TYPE_SEQKV3, d, d, 8, 8, 640, 68, 1, n, SHIFTED, profile, true, false, 0, 30.0f);
                attn(ggml_seqkv_type(3, profile), GGML_TYPE_SEQKV3, d, d, 8, 4, 640, 68, 3, n, SCRAMBLED, profile);
                attn(ggml_seqkv_type(4, profile), GGML_TYPE_SEQKV2, d, d, 8, 2, 448, 68, 8, n, IN_ORDER, profile);
            }
            attn(GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV3, d, d, 32, 1, 320, 68, 1, 4, IN_ORDER, false, false, true);
            attn(GGML_TYPE_SEQKV4, GGML_TYPE_SEQKV4, d, d,  5, 4, 640, 68, 1, 16, IN_ORDER, false);
        }
        // ... and so many cells for each of its blocks that it makes the queries
        for (const ggml_type t : { GGML_TYPE_SEQKV2, GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV4 }) {
            attn(t, t, 128, 128, 8, 4, 600, 68, 1, 68, IN_ORDER, false, false, true);
        }
        attn(GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV3, 128, 128, 8, 3, 590, 68, 1, 68, SCRAMBLED, false, false, false, 96);
        attn(GGML_TYPE_SEQKV4, GGML_TYPE_SEQKV4, 64,  64,  8, 4, 600, 68, 1, 68, SHIFTED, false, true, true, 0, 30.0f);
        attn(GGML_TYPE_SEQKV3, GGML_TYPE_SEQKV3, 256, 256, 4, 4, 600, 68, 1, 68, SHIFTED, false, false, true);
        // prefill around the edges of a tile of 256 query rows
        for (const int64_t n_tokens : { 85, 86, 127, 128, 129, 256, 300 }) {
            attn(GGML_TYPE_SEQKV3K, GGML_TYPE_SEQKV3, 64, 64, 1, n_tokens < 100 ? 3 : 2, 128, 68, n_tokens);
        }
        // prefill of so many tokens that CUDA's rows are in another order
        attn(GGML_TYPE_SEQKV3K, GGML_TYPE_SEQKV3, 64,  64,  1, 2, 1152, 68, 1100);
        attn(GGML_TYPE_SEQKV2,  GGML_TYPE_SEQKV4, 128, 128, 1, 1, 2048, 68, 1030, 1, SHIFTED, false);
        attn(GGML_TYPE_SEQKV3,  GGML_TYPE_SEQKV3, 64,  64,  1, 1, 192,  68, 1024, 1, SCRAMBLED, false);
    }
};
