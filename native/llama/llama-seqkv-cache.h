// The seqkv cache of one llama_kv_cache: frames, exact window, profile and graph.
//
// A cell's K and V are written as blocks when its token arrives. Two things are kept beside them:
//   - its offset in its frame, in llama_kv_cell_ext::x (free, since M-RoPE models are refused). The origin of the frame is
//     always position - offset: moving a cell changes its position and nothing else.
//   - for the first n_sink and the last n_window tokens of every sequence, an exact row: a slot of the window tensor.
// See ggml-seqkv.h for the virtual KV axis that the attention op works on.
#pragma once

#include "llama-graph.h"
#include "llama-kv-cells.h"

#include "../ggml-seqkv.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_context;
class llama_io_write_i;
class llama_io_read_i;
struct llama_memory_i;
struct llama_memory_context_i;

// what a profile says of a layer
struct llama_seqkv_layer_profile {
    std::vector<float>       k_mean; // (n_head_kv, dk)      mean of a key before RoPE
    std::vector<ggml_fp16_t> enc;    // (n_head_kv, dk, dk)  E
    std::vector<ggml_fp16_t> dec;    // (n_head_kv, dk, dk)  D, the inverse of E
    std::vector<float>       v_mean; // (n_head_kv, dv)
    std::vector<float>       v_scale;
    int32_t k_bits[5] = { 0, 1, 2, 3, 4 }; // bits of the layer's K and V by nominal bits
    int32_t v_bits[5] = { 0, 1, 2, 3, 4 };
};

// what llama_seqkv_configure() sets, owned by the model
struct llama_seqkv_config {
    int32_t     n_sink   = 4;
    int32_t     n_window = 64;
    std::string model_id;
    std::string profile; // path, for messages
    bool        any_type = false;
    std::map<int32_t, llama_seqkv_layer_profile> layers; // empty: no profile
};

// RoPE of a layer: angle per position of each rotated pair
struct llama_seqkv_rope_t {
    std::vector<float> freq;
    bool neox = false;

    bool operator==(const llama_seqkv_rope_t & o) const { return freq == o.freq && neox == o.neox; }
};

// effective RoPE of a layer, the linear part of ggml_rope_ext: angle = position*freq[i]
llama_seqkv_rope_t llama_seqkv_layer_rope(const llama_model & model, const llama_cparams & cparams, int32_t il);

class llama_seqkv {
public:
    // a type that contexts name; their layers may have others, see layer_type
    static bool is_type(ggml_type type) { return ggml_seqkv_bits(type) >= 2 && !ggml_seqkv_graded(type); }
    // whether contexts of these types have a seqkv cache
    static bool uses(const llama_model & model, ggml_type type_k, ggml_type type_v);
    // type of a layer's K or V in a context of that type
    static ggml_type layer_type(const llama_model & model, ggml_type type, int32_t il, bool is_key);

    // the seqkv part of a memory module, nullptr: it has none
    static llama_seqkv * of(llama_memory_i * memory);

    // kv: its layers exist and are allocated; types as given with the context
    llama_seqkv(llama_kv_cache & kv, ggml_type type_k, ggml_type type_v);

    //
    // cells
    //

    void clear();
    void stream_copy(uint32_t ssrc, uint32_t sdst); // slots, when the cells are copied
    void stream_copy_data(uint32_t ssrc, uint32_t sdst);

    // the cells idxs of a stream got new tokens
    void cells_written(uint32_t strm, const std::vector<uint32_t> & idxs);
    // a cell of a stream lost sequences, or was freed
    void cell_removed(uint32_t strm, uint32_t cell);
    // any cells got other positions or sequences
    void cells_changed() { changed = true; }

    // a ubatch is about to be computed: lay out the virtual axis, move the window
    void begin_ubatch(const llama_kv_cache_context & mctx);

    //
    // state
    //

    void state_write_header(llama_io_write_i & io) const;
    void state_read_header (llama_io_read_i  & io) const; // throws before anything is changed
    void state_write(llama_io_write_i & io, uint32_t strm, const std::vector<uint32_t> & cells, llama_seq_id seq_id) const; // -1: all sequences
    void state_read (llama_io_read_i  & io, uint32_t strm, const std::vector<uint32_t> & cells, llama_seq_id seq_id);

    // the state of the positions p0..p1-1 of a sequence alone, of a cache of any types, in the order of the positions; exact: with
    // the exact rows that are held. Throws before anything is written if a position is missing
    static void range_write(const llama_kv_cache & kv, llama_io_write_i & io, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool exact);

    // bytes of the cells in use of a cache of any types, exact rows included
    static size_t bytes_used(const llama_kv_cache & kv);

    double bits() const;          // per value of K and V, window and tables not counted
    size_t profile_bytes() const; // of the tables of the profile
    void   memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const; // adds the tables of the profile

private:
    friend class llm_graph_input_seqkv;

    struct layer {
        uint32_t il;
        ggml_tensor * win  = nullptr; // F16 [row, n_slots, n_stream]
        ggml_tensor * prof = nullptr; // F16, see ggml-seqkv.h, or nullptr
        int32_t rot_set = 0;
    };

    struct slots {
        std::vector<int32_t> cell; // (n_slots)  cell of a slot, -1: free
        std::vector<int32_t> slot; // (kv_size)  slot of a cell, -1: none
        void assign(int32_t s, int32_t c);
        void drop_cell(int32_t c);
        void drop_slot(int32_t s);
    };

    using buffers = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;

    llama_kv_cache & kv;
    const ggml_type type_k, type_v;
    std::shared_ptr<const llama_seqkv_config> config;
    int32_t  n_sink, n_window;
    uint32_t n_slots;            // per stream
    std::string model_id;
    uint64_t model_hash   = 0;   // structure and small tensors of the model
    uint64_t profile_hash = 0;

    std::vector<layer> layers;   // in the order of kv.layers
    std::vector<slots> streams;
    buffers prof_bufs; // beside those of the cache, since these are cleared

    // RoPE, known once the first graph is built
    std::vector<llama_seqkv_rope_t> rope_sets;
    uint32_t n_rot_max = 0;
    void init_rope(const llama_cparams & cparams);

    // what happened to cells since the last ubatch
    bool changed = true;
    std::vector<std::vector<uint32_t>> written; // per stream: cells that got tokens or lost sequences, if that is all
    void add_written(uint32_t strm, const std::vector<uint32_t> & cells);

    // the current ubatch
    struct {
        uint64_t id   = 0;
        bool     anew = true;                          // false: of all cells but `written`, it knows from the last ubatch
        std::vector<std::vector<uint32_t>> written;    // per stream of the ubatch; cells that the last one's axis did not have are among them
        std::vector<llama_seq_id> strm;                // its streams
        uint32_t n_kv = 0, n_stream = 1, n_tokens = 0; // tokens per stream
        std::vector<std::vector<int32_t>>  slot_cell;  // per stream of the ubatch: cell of a slot before this ubatch, -1: none
        std::vector<std::vector<int32_t>>  cur_cell;   // per stream: cell of a token
        std::vector<int32_t> meta;                     // (n_stream, n_virt)
        std::vector<int64_t> win_idxs;                 // (n_stream*n_tokens)
        std::vector<int32_t> origins;                  // of the rows of rot from 64 on
        std::unordered_map<int32_t, int32_t> row_of;   // row of an origin
        bool stored_before = false;                    // no token is read from the block that this ubatch writes
    } ub;

    // per stream of the ubatch: which cells its first token attends to, if all its tokens are of one sequence
    struct attended {
        uint64_t     ubatch = 0;
        llama_seq_id seq    = -1;
        llama_pos    first  = -1;           // position of that token
        bool         causal = true;
        std::vector<ggml_fp16_t> row;       // of the mask, exact rows not counted
    };
    std::vector<attended> last_attended;

    // rows of rot from 64 on as last computed, (n_sets)(n_origins, n_rot_max)
    std::vector<int32_t> rot_origins;
    std::vector<std::vector<float>> rot_rows;

    bool wanted(const llama_kv_cells & cells, uint32_t cell, llama_seq_id seq_id = -1) const; // by a sequence, -1: by any
    uint32_t first_slot(llama_seq_id seq_id) const; // of the n_sink + n_window that a sequence prefers
    bool is_sink(llama_pos p) const { return p < n_sink; }
    void upload_profile();
    size_t allocate(std::map<ggml_backend_buffer_type_t, ggml_context_ptr> & ctxs, buffers & bufs) const; // bytes
    void rot_row(const llama_seqkv_rope_t & rope, int32_t p, float * cs) const;
};

// Inputs of a graph with a seqkv cache, and its attention.
class llm_graph_input_seqkv : public llm_graph_input_i {
public:
    using get_mctx_t = const llama_kv_cache_context * (*)(const llama_memory_context_i *);

    // nullptr if the cache of mctx has no seqkv types. get_mctx finds the cache's context in that of the whole memory
    static llm_graph_input_seqkv * build(ggml_context * ctx, llm_graph_result * res, const llama_kv_cache_context * mctx, get_mctx_t get_mctx,
            const llama_ubatch & ubatch, const llama_cparams & cparams);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // store k_cur and v_cur in the cells idxs (nullptr: a layer that shares an earlier layer's cache) and attend: [dv*n_head, n_tokens]
    ggml_tensor * build_attn(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
            ggml_tensor * idxs, ggml_tensor * sinks, float kq_scale, int il);

private:
    const llama_kv_cache_context * mctx = nullptr;
    get_mctx_t  get_mctx = nullptr;
    bool causal = true;
    bool stored_before = false;

    ggml_tensor * rot      = nullptr;
    ggml_tensor * meta     = nullptr;
    ggml_tensor * mask     = nullptr;
    ggml_tensor * win_idxs = nullptr;

    // what the tensors hold from the last ubatch is written anew where it changed: rows and cells of a long context take longer than a layer
    uint64_t filled = 0;         // the last ubatch, 0: none
    std::vector<uint32_t> stale; // columns in which the mask of its only token differs from that of its sequence, or that changed there since

    std::map<int32_t, ggml_tensor *> cur; // frame rows by cache layer

    llama_seqkv & seqkv() const;
    static uint32_t n_frames(const llama_seqkv & seqkv, const llama_kv_cache_context * mctx); // capacity of rot
};
