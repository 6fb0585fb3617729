// What the seqkv ops (ggml-seqkv.h) launch on Metal: plain C++ without Metal, so that tests launch the same.
#pragma once

#include "../ggml-seqkv.h"
#include "seqkv-metal.h"

#ifdef __cplusplus
extern "C" {
#endif

// FRAME, STORE, ATTN: exactly what the plan can do
bool ggml_seqkv_metal_supported(const struct ggml_tensor * op);

// bytes behind the op's data that its kernels use
size_t ggml_seqkv_metal_scratch(const struct ggml_tensor * op);

#ifdef __cplusplus
}

#include <vector>

// One launch
struct ggml_seqkv_metal_step {
    struct buffer {
        const ggml_tensor * tensor;
        size_t              offset; // from its data; behind the op's own data: scratch
    };

    const char * kernel;
    int32_t      constants[SEQKV_FC_COUNT];
    union {
        ggml_metal_kargs_seqkv_store store;
        ggml_metal_kargs_seqkv_attn  attn;
    } args;                      // buffer 0
    size_t  args_size;
    buffer  buffers[11];         // buffers 1 ..
    int     n_buffers;
    size_t  threadgroup_bytes;   // threadgroup(0), 0: none
    int     grid[3], threads;    // threadgroups, threads of each
};

// the launches in order, each after all that the former wrote
std::vector<ggml_seqkv_metal_step> ggml_seqkv_metal_plan(const ggml_tensor * op);
#endif
