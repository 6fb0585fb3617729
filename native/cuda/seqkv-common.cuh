// What the CUDA kernels of seqkv share: parameters, types of cells, small transforms.
#pragma once

#include "seqkv-cuda.cuh"

#define SEQKV_FN    static __device__ __forceinline__
#define SEQKV_TABLE static __device__ constexpr

#include "../ggml-seqkv.h"
#include "../decode.h"

static constexpr int SEQKV_MAX_HEAD   = 256;
static constexpr int SEQKV_MAX_DECODE = 8; // tokens of a stream up to which attention works on blocks directly

// The warp of this thread: the same for all its lanes, and known to be, or shuffles in loops and branches that depend on it are compiled twice
SEQKV_FN int seqkv_warp() { return __shfl_sync(0xffffffff, threadIdx.x/WARP_SIZE, 0); }

static inline ggml_seqkv_params seqkv_params(const ggml_tensor * t) {
    ggml_seqkv_params p;
    memcpy(&p, t->op_params, sizeof(p));
    return p;
}

// Layout of meta: token t of the ubatch, rows of a stream
struct seqkv_meta {
    const int32_t * data;
    int             n_virt, n_kv, n_win;

    __device__ __forceinline__ int32_t token(int t) const {
        const int per_stream = n_virt - n_kv - n_win;
        return data[(int64_t) (t/per_stream)*n_virt + n_kv + n_win + t%per_stream];
    }
};

static inline seqkv_meta seqkv_meta_of(const ggml_tensor * meta, const ggml_seqkv_params & p) {
    return { (const int32_t *) meta->data, (int) meta->ne[0], p.n_kv, p.n_win };
}

// Rotation rows of the op's set
struct seqkv_rot {
    const float * base;
    int           stride;

    __device__ __forceinline__ const float * origin(int32_t meta) const { return base + (int64_t) (meta >> 8)*stride; }
};

static inline seqkv_rot seqkv_rot_of(const ggml_tensor * rot, const ggml_seqkv_params & p) {
    return { (const float *) rot->data + p.rot_set*rot->ne[0]*rot->ne[1], (int) rot->ne[0] };
}

// Tables of one KV head, see ggml-seqkv.h
struct seqkv_tables {
    const half * prof; // NULL: no profile
    int          dk, dv;

    __device__ __forceinline__ const half * head(int h) const { return prof + (int64_t) h*(2*dk*dk + SEQKV_FRAME*dk + 2*dv); }
    __device__ __forceinline__ const half * enc    (int h) const { return head(h); }
    __device__ __forceinline__ const half * dec    (int h) const { return head(h) + dk*dk; }
    __device__ __forceinline__ const half * pred   (int h) const { return head(h) + 2*dk*dk; }
    __device__ __forceinline__ const half * v_mean (int h) const { return head(h) + 2*dk*dk + SEQKV_FRAME*dk; }
    __device__ __forceinline__ const half * v_scale(int h) const { return v_mean(h) + dv; }
};

static inline seqkv_tables seqkv_tables_of(const ggml_tensor * prof, const ggml_seqkv_params & p) {
    return { prof ? (const half *) prof->data : nullptr, p.dk, p.dv };
}

// How a cell holds a head vector.
enum seqkv_form {
    SEQKV_PLAIN,    // as it is
    SEQKV_HADAMARD, // in the domain of H: quantized types
    SEQKV_DENSE,    // in that of E, a prediction subtracted: graded types with a profile
};

static inline seqkv_form seqkv_form_of(ggml_type type, const ggml_tensor * prof) {
    return !ggml_is_quantized(type) ? SEQKV_PLAIN : prof && ggml_seqkv_graded(type) ? SEQKV_DENSE : SEQKV_HADAMARD;
}

// types that a cell may have besides the seqkv types
static inline bool seqkv_other_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  case GGML_TYPE_F16:  case GGML_TYPE_BF16: case GGML_TYPE_Q8_0: case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1:
            return true;
        default:
            return false;
    }
}

// Pair i of a rotation row: which two values it turns
SEQKV_FN int2 seqkv_pair(int i, int n_rot, int neox) {
    return neox ? make_int2(i, i + n_rot/2) : make_int2(2*i, 2*i + 1);
}

// Value i of R(p) x, or of R(-p) x if inverse; x in shared memory. cs: rotation row of p.
SEQKV_FN float seqkv_rotated(const float * x, int i, const float * cs, int n_rot, int neox, int inverse) {
    if (i >= n_rot) {
        return x[i];
    }
    const bool second = neox ? i >= n_rot/2 : i & 1;
    const int  pair   = neox ? (second ? i - n_rot/2 : i) : i/2;
    const int2 at     = seqkv_pair(pair, n_rot, neox);
    const float c = cs[2*pair];
    const float s = inverse ? -cs[2*pair + 1] : cs[2*pair + 1];
    return second ? x[at.x]*s + x[at.y]*c : x[at.x]*c - x[at.y]*s;
}

// Orthonormal Hadamard transform of x[d] in shared memory by n threads of a block, of which this is number i. All threads of the block call it.
SEQKV_FN void seqkv_fwht_shared(float * x, int d, int i, int n) {
    for (int h = 1; h < d; h *= 2) {
        __syncthreads();
        for (int j = i; j < d/2; j += n) {
            const int   at = (j & -h) << 1 | (j & (h - 1)); // h is a power of 2
            const float a = x[at], b = x[at + h];
            x[at]     = a + b;
            x[at + h] = a - b;
        }
    }
    __syncthreads();
    const float s = rsqrtf((float) d);
    for (int j = i; j < d; j += n) {
        x[j] *= s;
    }
    __syncthreads();
}

// Hadamard transform by a warp, not normalized: value 32*j + lane in x[j]
template <int J> SEQKV_FN void seqkv_fwht_warp(float (&x)[J], int lane) {
#pragma unroll
    for (int m = 1; m < WARP_SIZE; m *= 2) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const float other = __shfl_xor_sync(0xffffffff, x[j], m);
            x[j] = lane & m ? other - x[j] : x[j] + other;
        }
    }
#pragma unroll
    for (int m = 1; m < J; m *= 2) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            if (!(j & m)) {
                const float a = x[j], b = x[j | m];
                x[j]     = a + b;
                x[j | m] = a - b;
            }
        }
    }
}

// Hadamard transform of W values each, not normalized, over those bits of i of x[i] that are FROM or more
template <int FROM, int N, int W> SEQKV_FN void seqkv_fwht_rows(float (&x)[N][W]) {
#pragma unroll
    for (int m = FROM; m < N; m *= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (!(i & m)) {
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    const float a = x[i][k], b = x[i | m][k];
                    x[i][k]     = a + b;
                    x[i | m][k] = a - b;
                }
            }
        }
    }
}
