// Writing the cache: frame rows, and their blocks in the cells.
//
// The encoder is the one of encode.h: for each group of values three candidate gains, for each of these the Viterbi search. A
// warp codes one group: lane 8*c + s holds state s of candidate c and carries its path, so that nothing has to be traced back.
#include "seqkv-attn.cuh"
#include "seqkv-mma.cuh"

#include "../../ggml-cuda/cpy-utils.cuh"

#include <algorithm>
#include <vector>

static constexpr int STORE_WARPS = 8;

//
// frame rows
//

// a thread a value of K and V
static __global__ void seqkv_frame_kernel(const char * k, const char * v, half * dst, seqkv_meta meta, seqkv_rot rot,
        ggml_seqkv_params p, int64_t k_nb1, int64_t k_nb2, int64_t v_nb1, int64_t v_nb2) {
    const int t = blockIdx.x, h = blockIdx.y, i = threadIdx.x;
    half * row = dst + (int64_t) t*p.n_head_kv*(p.dk + p.dv);
    const float * x = (const float *) (k + h*k_nb1 + t*k_nb2);
    const float * y = (const float *) (v + h*v_nb1 + t*v_nb2);
    const int  pair = p.neox && i >= p.n_rot/2 ? i - p.n_rot/2 : p.neox ? i : i/2;
    const bool second = p.neox ? i >= p.n_rot/2 : i & 1, rotated = i < p.dk && i < p.n_rot;
    ggml_cuda_pdl_lc();
    const float2 cs = rotated ? ((const float2 *) rot.origin(meta.token(t)))[pair] : make_float2(1.0f, 0.0f);
    ggml_cuda_pdl_sync();
    if (i < p.dk) {
        const int2 at = seqkv_pair(pair, p.n_rot, p.neox);
        row[h*p.dk + i] = __float2half(rotated ? second ? x[at.y]*cs.x - x[at.x]*cs.y : x[at.x]*cs.x + x[at.y]*cs.y : x[i]);
    } else {
        row[p.n_head_kv*p.dk + h*p.dv + i - p.dk] = __float2half(y[i - p.dk]);
    }
}

void ggml_cuda_seqkv_frame(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[0];
    const ggml_tensor * v = dst->src[1];
    const ggml_seqkv_params p = seqkv_params(dst);
    if (dst->ne[1] == 0) {
        return;
    }
    ggml_cuda_kernel_launch(seqkv_frame_kernel, ggml_cuda_kernel_launch_params(dim3(dst->ne[1], p.n_head_kv), dim3(p.dk + p.dv), 0, ctx.stream()),
        (const char *) k->data, (const char *) v->data, (half *) dst->data, seqkv_meta_of(dst->src[2], p), seqkv_rot_of(dst->src[3], p), p,
        (int64_t) k->nb[1], (int64_t) k->nb[2], (int64_t) v->nb[1], (int64_t) v->nb[2]);
}

//
// cells
//

SEQKV_FN const uint32_t * nearest_table(int B) {
    switch (B) {
        case 1:  return seqkv_nearest1;
        case 2:  return seqkv_nearest2;
        case 3:  return seqkv_nearest3;
        case 4:  return seqkv_nearest4;
        case 5:  return seqkv_nearest5;
        default: return seqkv_nearest6;
    }
}

SEQKV_FN float clamped_level(float z, float inv) {
    return fmaxf(-2048.0f, fminf(2048.0f, z*inv));
}

SEQKV_FN uint32_t nearest_levels(const uint32_t * nearest, float t) {
    return nearest[(int) fmaxf(0.0f, fminf(511.0f, 2.0f*t + 256.0f))];
}

SEQKV_FN float branch_error(uint32_t levels, int subset, float t) {
    const float e = t - (float) (int8_t) (levels >> 8*subset);
    return e*e;
}

// Scratch of a warp: squared error of the nearest level of each subset, by value and candidate
struct encode_scratch {
    float4 error[SEQKV_BLOCK][3];
};

// Tables of a block's groups in shared memory
struct encode_tables {
    uint32_t nearest[3][512];
    int8_t   level[3][128];

    __device__ __forceinline__ void load(int bits, int graded) {
        for (int k = 0; k < (graded ? 3 : 1); ++k) {
            const int B = seqkv_value_bits(bits, graded, k);
            for (int i = threadIdx.x; i < 512 && B > 0; i += blockDim.x) {
                nearest[k][i] = nearest_table(B)[i];
            }
            for (int i = threadIdx.x; i < 2 << B && B > 0; i += blockDim.x) {
                level[k][i] = seqkv_level_table(B)[i];
            }
        }
    }
};

// A group: n values z in shared memory, B bits each, by one warp. Returns the gain as stored; code: that of value i in lane i%32, element i/32.
static __device__ int encode_group(int B, int graded, const uint32_t * nearest, const int8_t * level, const float * z, int n, encode_scratch & scratch, uint32_t (&code)[2]) {
    const int lane  = threadIdx.x % WARP_SIZE;
    const int cand  = min(lane/8, 2); // lanes 24 .. 31 repeat the last candidate
    const int state = lane % 8;

    const float * gain  = graded ? seqkv_gain_graded : seqkv_gain;
    const float   steps = graded ? SEQKV_GRADED_STEPS : SEQKV_GAIN_STEPS;
    const int     bias  = graded ? SEQKV_GRADED_BIAS  : SEQKV_GAIN_BIAS;
    const int     top   = graded ? 31 : 255;

    float energy = 0.0f;
    for (int i = lane; i < n; i += WARP_SIZE) {
        energy += z[i]*z[i];
    }
    energy = warp_reduce_sum(energy);
    code[0] = code[1] = 0;
    if (energy < 1e-30f) {
        return 0;
    }
    const int   first = (int) floorf(0.5f*steps*log2f(energy/n)) + bias;
    const int   g     = max(1, min(top, first + (cand == 0 ? 0 : cand == 1 ? 1 : -1)));
    const float s     = gain[g]*seqkv_scale[B]*seqkv_shrink[B];
    const float inv   = __frcp_rn(s);

    __syncwarp();
    for (int i = state; i < n && lane < 24; i += 8) {
        const float    t = clamped_level(z[i], inv);
        const uint32_t l = nearest_levels(nearest, t);
        scratch.error[i][cand] = make_float4(branch_error(l, 0, t), branch_error(l, 1, t), branch_error(l, 2, t), branch_error(l, 3, t));
    }
    __syncwarp();

    // predecessors of a state and the subsets of their branches: encode.h, SEQKV_STEP
    const int from0 = 8*cand + (state >> 1);
    const int from1 = from0 + 4;
    const int d0    = (state >> 2 & 1) | ((state ^ state >> 1) & 1) << 1;
    const int d1    = d0 ^ 2;

    float    cost = state == 0 ? 0.0f : 1e30f;
    uint32_t lo = 0, hi = 0; // path: bit i is that of value i
    const float * error = (const float *) &scratch.error[0][cand];
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
        const float    a  = __shfl_sync(0xffffffff, cost, from0) + error[12*i + d0];
        const float    b  = __shfl_sync(0xffffffff, cost, from1) + error[12*i + d1];
        const uint32_t l0 = __shfl_sync(0xffffffff, lo, from0), l1 = __shfl_sync(0xffffffff, lo, from1);
        const bool     older = b < a;
        cost = older ? b : a;
        lo   = older ? l1 : l0;
        const uint32_t bit = (uint32_t) (state & 1) << i%32;
        if (n > 32) {
            const uint32_t h0 = __shfl_sync(0xffffffff, hi, from0), h1 = __shfl_sync(0xffffffff, hi, from1);
            hi = older ? h1 : h0;
            hi |= i >= 32 ? bit : 0;
        }
        lo |= i < 32 ? bit : 0;
    }

    // best end of each candidate, then the best candidate: the first one of equals
    float best = cost;
    int   end  = state;
    for (int m = 1; m < 8; m *= 2) {
        const float other     = __shfl_xor_sync(0xffffffff, best, m);
        const int   other_end = __shfl_xor_sync(0xffffffff, end,  m);
        if (other < best || (other == best && other_end < end)) {
            best = other;
            end  = other_end;
        }
    }
    best *= s*s;
    float kept = energy; // of zeros
    int   from = -1;
    for (int c = 0; c < 3; ++c) {
        const float err = __shfl_sync(0xffffffff, best, 8*c);
        if (err < kept) {
            kept = err;
            from = c;
        }
    }
    if (from < 0) {
        return 0;
    }
    const int at = 8*from + __shfl_sync(0xffffffff, end, 8*from);
    lo = __shfl_sync(0xffffffff, lo, at);
    hi = __shfl_sync(0xffffffff, hi, at);
    const uint64_t u     = (uint64_t) hi << 32 | lo;
    const int      taken = __shfl_sync(0xffffffff, g, 8*from);
    const float    scale = __shfl_sync(0xffffffff, inv, 8*from);

    for (int k = 0; k < 2; ++k) {
        const int i = 32*k + lane;
        if (i < n) {
            // subset: u_(i-2) | (u_i ^ u_(i-1) ^ u_(i-3)) << 1
            const int u0 = u >> i & 1, u1 = i >= 1 ? u >> (i - 1) & 1 : 0, u2 = i >= 2 ? u >> (i - 2) & 1 : 0, u3 = i >= 3 ? u >> (i - 3) & 1 : 0;
            const int subset = u2 | (u0 ^ u1 ^ u3) << 1;
            const int value  = (int8_t) (nearest_levels(nearest, clamped_level(z[i], scale)) >> 8*subset);
            int l = 0;
            for (int step = 1 << B; step > 0; step /= 2) {
                l += level[l + step] <= value ? step : 0;
            }
            code[k] = u0 | l >> 2 << 1;
        }
    }
    return taken;
}

// Codes of a group -> its part of the planes, as bytes. n: values of the group, i0: the first one.
SEQKV_FN void write_planes(int bits, int graded, int B, int i0, int n, const uint32_t (&code)[2], uint8_t * block) {
    const int lane = threadIdx.x % WARP_SIZE;
    for (int j = 0; j < B; ++j) {
        const uint32_t w0 = __ballot_sync(0xffffffff, code[0] >> j & 1);
        const uint32_t w1 = __ballot_sync(0xffffffff, code[1] >> j & 1);
        int at = 1 + graded;
        for (int i = 0; i < j; ++i) {
            at += seqkv_plane_values(bits, graded, i)/8;
        }
        if (lane < n/8) {
            block[at + i0/8 + lane] = (uint8_t) ((lane < 4 ? w0 : w1) >> 8*(lane%4));
        }
    }
}

// d/64 blocks of z (shared memory) -> dst, by all warps of the block
static __device__ void encode_head(int bits, int graded, const encode_tables & tables, float * z, int d, encode_scratch * scratch, uint8_t * dst) {
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        const float x = isfinite(z[i]) ? z[i] : 0.0f;
        z[i] = fmaxf(-1e15f, fminf(1e15f, x));
    }
    __shared__ int gains[SEQKV_MAX_HEAD/SEQKV_BLOCK][3];
    if (threadIdx.x < SEQKV_MAX_HEAD/SEQKV_BLOCK*3) {
        gains[threadIdx.x/3][threadIdx.x%3] = 0;
    }
    __syncthreads();

    const int warp     = threadIdx.x/WARP_SIZE;
    const int n_groups = graded ? 3 : 1;
    const int size     = seqkv_block_bytes(bits, graded);
    // the long groups first
    for (int item = warp; item < d/SEQKV_BLOCK*n_groups; item += STORE_WARPS) {
        const int b = item % (d/SEQKV_BLOCK), k = n_groups - 1 - item/(d/SEQKV_BLOCK);
        const int i0 = k == 0 ? 0 : k == 1 ? 16 : 32;
        const int n  = !graded ? 64 : k == 2 ? 32 : 16;
        const int B  = seqkv_value_bits(bits, graded, k);
        uint32_t code[2];
        if (B > 0) {
            const int gain = encode_group(B, graded, tables.nearest[k], tables.level[k], z + b*SEQKV_BLOCK + i0, n, scratch[warp], code);
            write_planes(bits, graded, B, i0, n, code, dst + b*size);
            if (threadIdx.x%WARP_SIZE == 0) {
                gains[b][k] = gain;
            }
            __syncwarp();
        }
    }
    __syncthreads();
    if (threadIdx.x < d/SEQKV_BLOCK) {
        const int * g = gains[threadIdx.x];
        const int   w = g[0] | g[1] << 5 | g[2] << 10;
        uint8_t * out = dst + threadIdx.x*size;
        out[0] = (uint8_t) w;
        if (graded) {
            out[1] = (uint8_t) (w >> 8);
        }
    }
}

// d values of z (shared memory) -> blocks of another type, by n threads of which this is number i
static __device__ void write_other(ggml_type type, const float * z, int d, char * dst, int i, int n) {
    const bool values = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    for (int j = i; j < (values ? d : d/32); j += n) {
        const float * x = z + 32*j;
        switch (type) {
            case GGML_TYPE_F32:    ((float       *) dst)[j] = z[j];                   break;
            case GGML_TYPE_F16:    ((half        *) dst)[j] = __float2half(z[j]);     break;
            case GGML_TYPE_BF16:   ((nv_bfloat16 *) dst)[j] = __float2bfloat16(z[j]); break;
            case GGML_TYPE_Q4_0:   quantize_f32_q4_0_block  (x, (block_q4_0   *) dst + j); break;
            case GGML_TYPE_Q4_1:   quantize_f32_q4_1_block  (x, (block_q4_1   *) dst + j); break;
            case GGML_TYPE_Q5_0:   quantize_f32_q5_0_block  (x, (block_q5_0   *) dst + j); break;
            case GGML_TYPE_Q5_1:   quantize_f32_q5_1_block  (x, (block_q5_1   *) dst + j); break;
            case GGML_TYPE_Q8_0:   quantize_f32_q8_0_block  (x, (block_q8_0   *) dst + j); break;
            case GGML_TYPE_IQ4_NL: quantize_f32_iq4_nl_block(x, (block_iq4_nl *) dst + j); break;
            default: break;
        }
    }
}

// One part of frame rows that goes into a cache
struct store_part {
    char          * dst;
    const int64_t * idxs;
    seqkv_tables    tables;
    int64_t         nb1;
    ggml_type       type;
    int             bits, graded, form, is_key;
    int             head_size; // bytes of a head's cell
};

static store_part store_part_of(const ggml_tensor * dst) {
    const ggml_seqkv_params p = seqkv_params(dst);
    const ggml_tensor * prof = dst->src[4];

    store_part part;
    part.dst       = (char *) dst->data;
    part.idxs      = (const int64_t *) dst->src[1]->data;
    part.tables    = seqkv_tables_of(prof, p);
    part.nb1       = dst->nb[1];
    part.type      = dst->type;
    part.bits      = ggml_seqkv_bits(dst->type);
    part.graded    = ggml_seqkv_graded(dst->type);
    part.form      = seqkv_form_of(dst->type, prof);
    part.is_key    = p.part == GGML_SEQKV_KEY;
    part.head_size = (int) ggml_row_size(dst->type, part.is_key ? p.dk : p.dv);
    return part;
}

// z = E x - pred by STORE_WARPS warps, 8 lanes a row of E. Reading E is a step of its own, for what it does not depend on.
template <int D> struct dense_transform {
    static constexpr int N = D/64, ROWS = STORE_WARPS*WARP_SIZE/8, PASSES = D/ROWS, HELD = N*PASSES <= 8 ? PASSES : 2;
    uint4 e[HELD][N];

    __device__ __forceinline__ void load(const half * enc, int pass) {
#pragma unroll
        for (int p = 0; p < HELD; ++p) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                e[p][n] = *(const uint4 *) (enc + (threadIdx.x/8 + ROWS*(pass + p))*D + 64*n + 8*(threadIdx.x%8));
            }
        }
    }
    // after load(enc, 0); x, z in shared memory
    __device__ __forceinline__ void apply(const half * enc, const half * pred, const float * x, float * z) {
        for (int pass = 0; pass < PASSES; pass += HELD) {
            if (pass > 0) {
                load(enc, pass);
            }
#pragma unroll
            for (int p = 0; p < HELD; ++p) {
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float * xn = x + 64*n + 8*(threadIdx.x%8);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float2 f = __half22float2(((const half2 *) &e[p][n])[j]);
                        sum += f.x*xn[2*j] + f.y*xn[2*j + 1];
                    }
                }
                for (int m = 1; m < 8; m *= 2) {
                    sum += __shfl_xor_sync(0xffffffff, sum, m);
                }
                const int r = threadIdx.x/8 + ROWS*(pass + p);
                if (threadIdx.x%8 == 0) {
                    z[r] = sum - __half2float(pred[r]);
                }
            }
        }
        __syncthreads();
    }
};

// One head vector of a token to the domain of its cell, and into it. x: its frame row's values (d), z: scratch, both in shared memory
template <int D>
static __device__ void store_head(const store_part & a, int h, int32_t offset, float * x, float * z, encode_scratch * scratch, const encode_tables & tables,
        char * out, dense_transform<D> & dense) {
    if (a.form == SEQKV_DENSE) {
        __syncthreads();
        dense.apply(a.tables.enc(h), a.tables.pred(h) + offset*D, x, z);
        x = z;
    } else if (a.form == SEQKV_HADAMARD) {
        if (a.bits && !a.is_key && a.tables.prof) {
            for (int i = threadIdx.x; i < D; i += blockDim.x) {
                x[i] = __half2float(a.tables.v_scale(h)[i])*(x[i] - __half2float(a.tables.v_mean(h)[i]));
            }
        }
        seqkv_fwht_shared(x, D, threadIdx.x, blockDim.x);
    } else {
        __syncthreads();
    }
    if (a.bits) {
        encode_head(a.bits, a.graded, tables, x, D, scratch, (uint8_t *) out);
    } else {
        write_other(a.type, x, D, out, threadIdx.x, blockDim.x);
    }
}

// STOREs of one launch, of any layers: their arguments are at most 4 KB
struct store_batch {
    static constexpr int MAX = 48;
    store_part   part[MAX];
    const half * rows[MAX];
};

// blockIdx: (token, KV head, part)
template <int D>
static __global__ void __launch_bounds__(STORE_WARPS*WARP_SIZE) seqkv_store_kernel(const store_batch batch, seqkv_meta meta, ggml_seqkv_params p) {
    __shared__ float x[D], z[D];
    __shared__ encode_scratch scratch[STORE_WARPS];
    __shared__ encode_tables  tables;

    const int t = blockIdx.x;
    const int h = blockIdx.y;
    const store_part & part = batch.part[blockIdx.z];
    const int64_t cell = part.idxs[t];
    if (cell < 0) {
        return;
    }
    dense_transform<D> dense;
    if (part.form == SEQKV_DENSE) {
        dense.load(part.tables.enc(h), 0);
    }
    if (part.bits) {
        tables.load(part.bits, part.graded);
    }
    const half * row = batch.rows[blockIdx.z] + (int64_t) t*p.n_head_kv*(p.dk + p.dv) + (part.is_key ? 0 : p.n_head_kv*p.dk) + h*D;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        x[i] = __half2float(row[i]);
    }
    store_head<D>(part, h, meta.token(t) & 255, x, z, scratch, tables, part.dst + cell*part.nb1 + h*part.head_size, dense);
}

// FRAME and both its STOREs. blockIdx: (token, KV head, key or value)
template <int D>
static __global__ void __launch_bounds__(STORE_WARPS*WARP_SIZE) seqkv_write_kernel(store_part part_k, store_part part_v, const char * k, const char * v, half * rows,
        seqkv_meta meta, seqkv_rot rot, ggml_seqkv_params p, int64_t k_nb1, int64_t k_nb2, int64_t v_nb1, int64_t v_nb2, int /* n_tokens */) {
    __shared__ float x[D], z[D];
    __shared__ encode_scratch scratch[STORE_WARPS];
    __shared__ encode_tables  tables;

    const int t = blockIdx.x;
    const int h = blockIdx.y;
    const store_part & part = blockIdx.z == 0 ? part_k : part_v;
    dense_transform<D> dense;
    if (part.form == SEQKV_DENSE) {
        dense.load(part.tables.enc(h), 0);
    }
    if (part.bits) {
        tables.load(part.bits, part.graded);
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    const int64_t cell = part.idxs[t];
    const int32_t mt   = meta.token(t);
    const float * src  = (const float *) (blockIdx.z == 0 ? k + h*k_nb1 + t*k_nb2 : v + h*v_nb1 + t*v_nb2);
    half        * row  = rows + (int64_t) t*p.n_head_kv*2*D + (blockIdx.z*p.n_head_kv + h)*D;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        const half y = __float2half(blockIdx.z == 0 ? seqkv_rotated(src, i, rot.origin(mt), p.n_rot, p.neox, 1) : src[i]);
        row[i] = y;
        x[i]   = __half2float(y);
    }
    if (cell >= 0) {
        store_head<D>(part, h, mt & 255, x, z, scratch, tables, part.dst + cell*part.nb1 + h*part.head_size, dense);
    }
}

//
// cells of many tokens
//

static constexpr int TILE_THREADS = 192; // a thread a candidate gain of a block
static constexpr int TILE_BLOCKS  = 64;

// Tokens of a tile have 64 blocks of 64 values together. item: token + TOKENS*block of its head
template <int D> struct store_tile {
    static constexpr int NB = D/SEQKV_BLOCK, TOKENS = TILE_BLOCKS/NB, LDX = D + 8, LDZ = D + 1;
    __align__(16) half x[TOKENS*LDX]; // frame rows, for the tensor cores
    float    z[TOKENS*LDZ];
    uint32_t nearest[3][512];
    uint8_t  index[3][256];           // level, as a byte -> place in its subset
    float    error[3][3][TILE_BLOCKS]; // (group, candidate, item)
    uint8_t  gain [3][3][TILE_BLOCKS];
    uint64_t path [3][TILE_BLOCKS];   // (candidate, item): bit i is that of value i
    uint8_t  out[TILE_BLOCKS*sizeof(block_seqkv4k)];

    __device__ __forceinline__ void load_tables(int bits, int graded) {
        for (int k = 0; k < (graded ? 3 : 1); ++k) {
            const int B = seqkv_value_bits(bits, graded, k);
            for (int i = threadIdx.x; i < 512 && B > 0; i += TILE_THREADS) {
                nearest[k][i] = nearest_table(B)[i];
            }
            for (int i = threadIdx.x; i < 2 << B && B > 0; i += TILE_THREADS) {
                index[k][(uint8_t) seqkv_level_table(B)[i]] = (uint8_t) (i >> 2);
            }
        }
    }
};

SEQKV_FN int group_begin(int graded, int k) { return !graded ? 64*k : k < 2 ? 16*k : 32*(k - 1); } // k = 3: the end of a graded block

// Steps [0, n) of the search, n <= 32, the second half of 64 or not. All 8 states are in registers.
template <bool SECOND>
SEQKV_FN void search_steps(const uint32_t * nearest, const float * z, int n, float inv, float (&cost)[8], uint32_t (&lo)[8], uint32_t (&hi)[8]) {
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
        const float    t = clamped_level(z[i], inv);
        const uint32_t l = nearest_levels(nearest, t);
        float e[4];
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            e[d] = branch_error(l, d, t);
        }
        float    next[8];
        uint32_t next_lo[8], next_hi[8];
#pragma unroll
        for (int s = 0; s < 8; ++s) { // encode.h, SEQKV_STEP
            const int   d0 = (s >> 2 & 1) | ((s ^ s >> 1) & 1) << 1;
            const float a = cost[s >> 1] + e[d0], b = cost[s >> 1 | 4] + e[d0 ^ 2];
            const bool  older = b < a;
            next[s]    = older ? b : a;
            next_lo[s] = older ? lo[s >> 1 | 4] : lo[s >> 1];
            next_hi[s] = SECOND ? (older ? hi[s >> 1 | 4] : hi[s >> 1]) : 0;
            if (s & 1) {
                (SECOND ? next_hi : next_lo)[s] |= 1u << i;
            }
        }
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            cost[s] = next[s];
            lo[s]   = next_lo[s];
            hi[s]   = next_hi[s];
        }
    }
}

// This thread's candidate for all groups of its block
template <int D>
SEQKV_FN void search_block(store_tile<D> & sm, int bits, int graded, int item, int cand) {
    const float * gain  = graded ? seqkv_gain_graded : seqkv_gain;
    const float   steps = graded ? SEQKV_GRADED_STEPS : SEQKV_GAIN_STEPS;
    const int     bias  = graded ? SEQKV_GRADED_BIAS  : SEQKV_GAIN_BIAS;
    const int     top   = graded ? 31 : 255;
    uint64_t path = 0;
#pragma unroll 1
    for (int k = 0; k < (graded ? 3 : 1); ++k) {
        const int B = seqkv_value_bits(bits, graded, k), i0 = group_begin(graded, k), n = group_begin(graded, k + 1) - i0;
        const float * z = sm.z + item%sm.TOKENS*sm.LDZ + item/sm.TOKENS*SEQKV_BLOCK + i0;
        float energy = 0.0f;
#pragma unroll 8
        for (int i = 0; i < n; ++i) {
            energy += z[i]*z[i];
        }
        int   g   = 0;
        float err = energy; // of zeros
        if (B > 0 && energy >= 1e-30f) {
            const int first = (int) floorf(0.5f*steps*log2f(energy/n)) + bias;
            g = max(1, min(top, first + (cand == 0 ? 0 : cand == 1 ? 1 : -1)));
            const float s   = gain[g]*seqkv_scale[B]*seqkv_shrink[B];
            const float inv = __frcp_rn(s);
            float    cost[8];
            uint32_t lo[8], hi[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                cost[j] = j == 0 ? 0.0f : 1e30f;
                lo[j] = hi[j] = 0;
            }
            search_steps<false>(sm.nearest[k], z, min(32, n), inv, cost, lo, hi);
            if (n > 32) {
                search_steps<true>(sm.nearest[k], z + 32, n - 32, inv, cost, lo, hi);
            }
#pragma unroll
            for (int j = 1; j < 8; ++j) {
                if (cost[j] < cost[0]) {
                    cost[0] = cost[j];
                    lo[0]   = lo[j];
                    hi[0]   = hi[j];
                }
            }
            const float e = cost[0]*(s*s);
            if (e < energy) {
                err   = e;
                path |= ((uint64_t) hi[0] << 32 | lo[0]) << i0;
            } else {
                g = 0;
            }
        }
        sm.error[k][cand][item] = err;
        sm.gain [k][cand][item] = (uint8_t) g;
    }
    sm.path[cand][item] = path;
}

// The best candidates -> bytes of 32 values of a block, and its gains if they are the first 32
template <int D>
SEQKV_FN void write_half(store_tile<D> & sm, int bits, int graded, int item, int half) {
    int best[3] = { 0 }, gains[3] = { 0 };
    uint64_t u = 0;
    for (int k = 0; k < (graded ? 3 : 1); ++k) {
        for (int c = 1; c < 3; ++c) {
            best[k] = sm.error[k][c][item] < sm.error[k][best[k]][item] ? c : best[k];
        }
        gains[k] = sm.gain[k][best[k]][item];
        const int begin = group_begin(graded, k), end = group_begin(graded, k + 1);
        u |= sm.path[best[k]][item] & (~0ull >> (64 - (end - begin)) << begin);
    }
    // index bits 0 and 1 as in seqkv_index_planes
    const uint64_t start = graded ? 0x0000000100010001u : 1;
    const uint64_t m1 = ~start, m2 = m1 & ~(start << 1), m3 = m2 & ~(start << 2);
    const uint32_t q0 = (u << 2 & m2) >> 32*half, q1 = (u ^ (u << 1 & m1) ^ (u << 3 & m3)) >> 32*half;
    uint32_t w[6] = { (uint32_t) (u >> 32*half), 0, 0, 0, 0, 0 };
    const float * z = sm.z + item%sm.TOKENS*sm.LDZ + item/sm.TOKENS*SEQKV_BLOCK + 32*half;
    for (int part = 0; part < 2; ++part) {
        const int k = !graded ? 0 : half ? 2 : part;
        if (gains[k] == 0) {
            continue;
        }
        const int   B   = seqkv_value_bits(bits, graded, k);
        const float inv = __frcp_rn((graded ? seqkv_gain_graded : seqkv_gain)[gains[k]]*seqkv_scale[B]*seqkv_shrink[B]);
#pragma unroll 4
        for (int i = 16*part; i < 16*part + 16; ++i) {
            const uint32_t l    = nearest_levels(sm.nearest[k], clamped_level(z[i], inv));
            const uint32_t code = sm.index[k][l >> 8*((q0 >> i & 1) | (q1 >> i & 1) << 1) & 255];
#pragma unroll
            for (int j = 1; j < 6; ++j) {
                w[j] |= (code >> (j - 1) & 1) << i;
            }
        }
    }
    const int size = seqkv_block_bytes(bits, graded);
    uint8_t * out = sm.out + (item%sm.TOKENS*sm.NB + item/sm.TOKENS)*size;
    if (half == 0) {
        const int g = gains[0] | gains[1] << 5 | gains[2] << 10;
        out[0] = (uint8_t) g;
        if (graded) {
            out[1] = (uint8_t) (g >> 8);
        }
    }
    out += 1 + graded;
#pragma unroll
    for (int j = 0; j < 6; ++j) {
        const int values = seqkv_plane_values(bits, graded, j);
        for (int b = 0; b < min(32, values - 32*half)/8; ++b) {
            out[4*half + b] = (uint8_t) (w[j] >> 8*b);
        }
        out += values/8;
    }
}

// z of a tile's tokens <- E x - pred, on tensor cores. at: meta of the tokens, -1: none
template <int D>
SEQKV_FN void transform_tile(store_tile<D> & sm, const half * enc, const half * pred, const int32_t * at) {
    constexpr int MT = store_tile<D>::TOKENS/16, LDX = store_tile<D>::LDX, LDZ = store_tile<D>::LDZ;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE, g = lane/4, t = lane%4;
    for (int n = 8*warp; n < D; n += 8*(TILE_THREADS/WARP_SIZE)) {
        float acc[MT][4] = {{ 0.0f }};
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            const half * e = enc + (n + g)*D + k + 2*t;
            const uint32_t b0 = *(const uint32_t *) e, b1 = *(const uint32_t *) (e + 8);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                uint32_t x[4];
                load_a(x, sm.x + (16*m + lane%16)*LDX + k + lane/16*8);
                mma_f16(acc[m], x, b0, b1);
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int r = 16*m + g + e/2*8, i = n + 2*t + e%2;
                sm.z[r*LDZ + i] = at[r] < 0 ? 0.0f : acc[m][e] - __half2float(pred[(at[r] & 255)*D + i]);
            }
        }
    }
}

// The same as the kernels above for a tile of tokens. FUSED: FRAME as well, from k and v; else the frame rows are there.
// blockIdx: (tile, KV head, part)
template <int D, bool FUSED>
static __global__ void __launch_bounds__(TILE_THREADS, 5) seqkv_write_tile_kernel(store_part part0, store_part part1, const char * k, const char * v, half * rows,
        seqkv_meta meta, seqkv_rot rot, ggml_seqkv_params p, int64_t k_nb1, int64_t k_nb2, int64_t v_nb1, int64_t v_nb2, int n_tokens) {
    constexpr int TOKENS = store_tile<D>::TOKENS, LDX = store_tile<D>::LDX, LDZ = store_tile<D>::LDZ, J = D/WARP_SIZE, WARPS = TILE_THREADS/WARP_SIZE;
    __shared__ store_tile<D> sm;
    __shared__ int64_t cell[TOKENS];
    __shared__ int32_t at[TOKENS]; // meta, -1: not stored

    const int t0 = blockIdx.x*TOKENS, h = blockIdx.y;
    const int warp = threadIdx.x/WARP_SIZE, lane = threadIdx.x%WARP_SIZE;
    const store_part & part = blockIdx.z == 0 ? part0 : part1;
    if (part.bits) {
        sm.load_tables(part.bits, part.graded);
    }
    if (FUSED) {
        ggml_cuda_pdl_sync();
        ggml_cuda_pdl_lc();
    }
    for (int r = threadIdx.x; r < TOKENS; r += TILE_THREADS) {
        cell[r] = t0 + r < n_tokens ? part.idxs[t0 + r] : -1;
        at[r]   = cell[r] < 0 ? -1 : meta.token(t0 + r);
    }

    float v_scale[J], v_mean[J];
    const bool normalized = part.form == SEQKV_HADAMARD && part.bits && !part.is_key && part.tables.prof;
#pragma unroll
    for (int j = 0; j < J; ++j) {
        v_scale[j] = normalized ? __half2float(part.tables.v_scale(h)[WARP_SIZE*j + lane]) : 1.0f;
        v_mean [j] = normalized ? __half2float(part.tables.v_mean (h)[WARP_SIZE*j + lane]) : 0.0f;
    }
#pragma unroll 2
    for (int r = warp; r < TOKENS; r += WARPS) { // a warp a token: value 32*j + lane
        const int t = min(t0 + r, n_tokens - 1);
        half * row = rows + (int64_t) t*p.n_head_kv*(p.dk + p.dv) + (part.is_key ? 0 : p.n_head_kv*p.dk) + h*D;
        float x[J];
        if (FUSED) {
            const float * src = (const float *) (part.is_key ? k + h*k_nb1 + t*k_nb2 : v + h*v_nb1 + t*v_nb2);
            const float * cs  = rot.origin(meta.token(t));
#pragma unroll
            for (int j = 0; j < J; ++j) {
                const int  i = WARP_SIZE*j + lane;
                const half y = __float2half(part.is_key ? seqkv_rotated(src, i, cs, p.n_rot, p.neox, 1) : src[i]);
                if (t0 + r < n_tokens) {
                    row[i] = y;
                }
                x[j] = __half2float(y);
            }
        } else {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                x[j] = __half2float(row[WARP_SIZE*j + lane]);
            }
        }
        if (part.form == SEQKV_DENSE) {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                sm.x[r*LDX + WARP_SIZE*j + lane] = __float2half(x[j]);
            }
            continue;
        }
        if (part.form == SEQKV_HADAMARD) {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                x[j] = rsqrtf((float) D)*v_scale[j]*(x[j] - v_mean[j]);
            }
            seqkv_fwht_warp<J>(x, lane);
        }
#pragma unroll
        for (int j = 0; j < J; ++j) {
            sm.z[r*LDZ + WARP_SIZE*j + lane] = x[j];
        }
    }
    __syncthreads();
    if (part.form == SEQKV_DENSE) {
        transform_tile<D>(sm, part.tables.enc(h), part.tables.pred(h), at);
        __syncthreads();
    }

    if (!part.bits) {
        for (int r = warp; r < TOKENS; r += WARPS) {
            if (cell[r] >= 0) {
                write_other(part.type, sm.z + r*LDZ, D, part.dst + cell[r]*part.nb1 + h*part.head_size, lane, WARP_SIZE);
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < TOKENS*D; i += TILE_THREADS) {
        float & z = sm.z[i/D*LDZ + i%D];
        z = fmaxf(-1e15f, fminf(1e15f, isfinite(z) ? z : 0.0f));
    }
    __syncthreads();
    search_block<D>(sm, part.bits, part.graded, warp/3*WARP_SIZE + lane, warp%3);
    __syncthreads();
    if (threadIdx.x < 2*TILE_BLOCKS) {
        write_half<D>(sm, part.bits, part.graded, threadIdx.x%TILE_BLOCKS, threadIdx.x/TILE_BLOCKS);
    }
    __syncthreads();
    for (int r = warp; r < TOKENS; r += WARPS) {
        if (cell[r] >= 0) {
            char * dst = part.dst + cell[r]*part.nb1 + h*part.head_size;
            for (int i = lane; i < part.head_size; i += WARP_SIZE) {
                dst[i] = (char) sm.out[r*part.head_size + i];
            }
        }
    }
}

static __global__ void seqkv_store_row_kernel(char * dst, const half * cur, const int64_t * idxs, int width, int64_t nb1) {
    const int64_t cell = idxs[blockIdx.x];
    if (cell < 0) {
        return;
    }
    const half2 * from = (const half2 *) (cur + (int64_t) blockIdx.x*width);
    half2       * to   = (half2 *) (dst + cell*nb1);
    for (int i = threadIdx.x; i < width/2; i += blockDim.x) {
        to[i] = from[i];
    }
}

static int head_of(const ggml_tensor * part) {
    const ggml_seqkv_params p = seqkv_params(part);
    return p.part == GGML_SEQKV_KEY ? p.dk : p.dv;
}

// n STOREs of up to SEQKV_MAX_DECODE tokens, with the same meta and dims
template <int D> static void store_few(const ggml_tensor * const * parts, int n, cudaStream_t stream) {
    const ggml_seqkv_params p = seqkv_params(parts[0]);
    for (int first = 0; first < n; first += store_batch::MAX) {
        const int count = std::min(n - first, store_batch::MAX);
        store_batch batch;
        for (int i = 0; i < count; ++i) {
            batch.part[i] = store_part_of(parts[first + i]);
            batch.rows[i] = (const half *) parts[first + i]->src[0]->data;
        }
        seqkv_store_kernel<D><<<dim3((int) parts[0]->src[0]->ne[1], p.n_head_kv, count), STORE_WARPS*WARP_SIZE, 0, stream>>>(batch, seqkv_meta_of(parts[0]->src[3], p), p);
    }
}
static void store_few(const ggml_tensor * const * parts, int n, cudaStream_t stream) {
    switch (head_of(parts[0])) {
        case 64:  store_few< 64>(parts, n, stream); break;
        case 128: store_few<128>(parts, n, stream); break;
        default:  store_few<256>(parts, n, stream); break;
    }
}

void ggml_cuda_seqkv_store(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * cur = dst->src[0];
    const ggml_seqkv_params p = seqkv_params(dst);
    if (cur->ne[1] == 0) {
        return;
    }
    if (p.part == GGML_SEQKV_ROW) {
        seqkv_store_row_kernel<<<cur->ne[1], 256, 0, ctx.stream()>>>((char *) dst->data, (const half *) cur->data,
            (const int64_t *) dst->src[1]->data, (int) cur->ne[0], dst->nb[1]);
        return;
    }
    if (cur->ne[1] <= SEQKV_MAX_DECODE) {
        store_few(&dst, 1, ctx.stream());
        return;
    }
    const auto launch = [&](auto kernel, int tile) {
        const int n_tokens = (int) cur->ne[1];
        kernel<<<dim3((n_tokens + tile - 1)/tile, p.n_head_kv, 1), TILE_THREADS, 0, ctx.stream()>>>(
            store_part_of(dst), store_part_of(dst), nullptr, nullptr, (half *) cur->data, seqkv_meta_of(dst->src[3], p), seqkv_rot(), p, 0, 0, 0, 0, n_tokens);
    };
    switch (head_of(dst)) {
        case 64:  launch(seqkv_write_tile_kernel< 64, false>, store_tile< 64>::TOKENS); break;
        case 128: launch(seqkv_write_tile_kernel<128, false>, store_tile<128>::TOKENS); break;
        default:  launch(seqkv_write_tile_kernel<256, false>, store_tile<256>::TOKENS); break;
    }
}

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_NONE;
}

// FRAME at node i, STORE of keys and of values, with nothing but views between. Returns the last one, 0: not these.
static int match_write(const ggml_cgraph * graph, int i, const ggml_tensor * (&parts)[2]) {
    const ggml_tensor * frame = graph->nodes[i];
    if (frame->op != GGML_OP_SEQKV_FRAME || frame->ne[1] == 0 || seqkv_params(frame).dk != seqkv_params(frame).dv) {
        return 0;
    }
    int n = 0;
    for (int j = i + 1; j < graph->n_nodes; ++j) {
        const ggml_tensor * t = graph->nodes[j];
        if (is_view(t)) {
            continue;
        }
        if (t->op != GGML_OP_SEQKV_STORE || t->src[0] != frame || seqkv_params(t).part != (n == 0 ? GGML_SEQKV_KEY : GGML_SEQKV_VALUE)) {
            return 0;
        }
        parts[n++] = t;
        if (n == 2) {
            return j;
        }
    }
    return 0;
}

// Decode writes the blocks of all layers beside what follows the last attention, since none reads them: their encoder takes long and little of a GPU.
struct seqkv_late {
    std::vector<const ggml_tensor *> parts;
    const ggml_tensor * frame = nullptr; // FRAME that is left to the attention that comes next
    cudaEvent_t fork = nullptr, join = nullptr;
    bool        forked = false;

    seqkv_late() {
        CUDA_CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
    }
    ~seqkv_late() {
        CUDA_CHECK(cudaEventDestroy(fork));
        CUDA_CHECK(cudaEventDestroy(join));
    }

    static seqkv_late & of(ggml_backend_cuda_context & ctx) {
        if (!ctx.seqkv) {
            ctx.seqkv = std::make_shared<seqkv_late>();
        }
        return *(seqkv_late *) ctx.seqkv.get();
    }

    void write(cudaStream_t stream) {
        const auto same_launch = [](const ggml_tensor * a, const ggml_tensor * b) {
            const ggml_seqkv_params p = seqkv_params(a), q = seqkv_params(b);
            return a->src[3] == b->src[3] && a->src[0]->ne[1] == b->src[0]->ne[1] && p.n_head_kv == q.n_head_kv && p.dk == q.dk && p.dv == q.dv && p.n_kv == q.n_kv && p.n_win == q.n_win;
        };
        while (!parts.empty()) {
            const ggml_tensor * first = parts[0];
            const auto rest = std::stable_partition(parts.begin(), parts.end(), [&](const ggml_tensor * part) { return same_launch(first, part); });
            store_few(parts.data(), (int) (rest - parts.begin()), stream);
            parts.erase(parts.begin(), rest);
        }
    }
};

static bool is_late(const ggml_tensor * frame) { return frame->ne[1] <= SEQKV_MAX_DECODE && seqkv_params(frame).stored_before; }

// attention at node i is done
static void write_late(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    auto & late = seqkv_late::of(ctx);
    if (late.parts.empty() || !ctx.stream_context().concurrent_events.empty()) {
        return;
    }
    for (int k = i + 1; k < graph->n_nodes; ++k) {
        if (graph->nodes[k]->op == GGML_OP_SEQKV_FRAME || graph->nodes[k]->op == GGML_OP_SEQKV_ATTN) {
            return;
        }
    }
    cudaStream_t beside = ctx.stream(ctx.device, GGML_CUDA_MAX_STREAMS - 1);
    CUDA_CHECK(cudaEventRecord(late.fork, ctx.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(beside, late.fork, 0));
    late.write(beside);
    CUDA_CHECK(cudaEventRecord(late.join, beside));
    late.forked = true;
}

void ggml_cuda_seqkv_finish(ggml_backend_cuda_context & ctx) {
    if (!ctx.seqkv) {
        return;
    }
    auto & late = seqkv_late::of(ctx);
    late.write(ctx.stream()); // of graphs that end without the attention that was waited for
    if (late.forked) {
        CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), late.join, 0));
        late.forked = false;
    }
}

void ggml_cuda_seqkv_optimize(const ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor * parts[2];
        if (graph->nodes[i]->op == GGML_OP_SEQKV_FRAME && is_late(graph->nodes[i]) && match_write(graph, i, parts)) {
            // what finish reads: the rows, the cells and meta, otherwise free for other tensors behind the last layer that uses them
            for (ggml_tensor * t : { graph->nodes[i], parts[0]->src[1], parts[1]->src[1], parts[0]->src[3] }) {
                params->add_alloc_dep(params->user_data, t, graph->nodes[graph->n_nodes - 1]);
            }
        }
    }
}

// STORE of the window's rows behind attention at node i, which the last kernel of that copies; 0: none
static int rows_behind(const ggml_cgraph * graph, int i) {
    int j = i + 1;
    while (j < graph->n_nodes && is_view(graph->nodes[j])) {
        ++j;
    }
    const ggml_tensor * rows = j < graph->n_nodes ? graph->nodes[j] : nullptr;
    return rows && rows->op == GGML_OP_SEQKV_STORE && seqkv_params(rows).part == GGML_SEQKV_ROW && rows->src[0] == graph->nodes[i]->src[6] ? j : 0;
}

// Is the write that ends at node i, of this FRAME, followed by an attention that makes its rows itself?
static bool attention_makes(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const ggml_tensor * frame, int i) {
    do {
        ++i;
    } while (i < graph->n_nodes && is_view(graph->nodes[i]));
    const ggml_tensor * attn = i < graph->n_nodes ? graph->nodes[i] : nullptr;
    return attn && attn->op == GGML_OP_SEQKV_ATTN && attn->src[6] == frame && ggml_nelements(attn) > 0 && attn->src[0]->ne[2]/attn->src[1]->ne[2] <= SEQKV_MAX_DECODE &&
        rows_behind(graph, i) && seqkv_decode_supported(ctx.device, attn) && ctx.stream_context().concurrent_events.empty();
}

// these in one launch, or the others later, and FRAME alone or with the attention
static int fuse_write(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    ggml_tensor * frame = graph->nodes[i];
    const ggml_tensor * parts[2] = { nullptr, nullptr };
    const int last = match_write(graph, i, parts);
    const ggml_seqkv_params p = seqkv_params(frame);
    if (last == 0) {
        return 0;
    }
    if (is_late(frame)) {
        auto & late = seqkv_late::of(ctx);
        if (attention_makes(ctx, graph, frame, last)) {
            late.frame = frame;
        } else {
            ggml_cuda_seqkv_frame(ctx, frame);
        }
        late.parts.insert(late.parts.end(), parts, parts + 2);
        return last - i;
    }
    const ggml_tensor * k = frame->src[0];
    const ggml_tensor * v = frame->src[1];
    const auto launch = [&](auto kernel, int tokens, int threads) {
        const int n_tokens = (int) frame->ne[1];
        ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(dim3((n_tokens + tokens - 1)/tokens, p.n_head_kv, 2), dim3(threads), 0, ctx.stream()),
            store_part_of(parts[0]), store_part_of(parts[1]), (const char *) k->data, (const char *) v->data, (half *) frame->data,
            seqkv_meta_of(frame->src[2], p), seqkv_rot_of(frame->src[3], p), p,
            (int64_t) k->nb[1], (int64_t) k->nb[2], (int64_t) v->nb[1], (int64_t) v->nb[2], n_tokens);
    };
    const auto launch_either = [&](auto kernel, auto tile_kernel, int tile) {
        if (frame->ne[1] <= SEQKV_MAX_DECODE) {
            launch(kernel, 1, STORE_WARPS*WARP_SIZE);
        } else {
            launch(tile_kernel, tile, TILE_THREADS);
        }
    };
    switch (p.dk) {
        case 64:  launch_either(seqkv_write_kernel< 64>, seqkv_write_tile_kernel< 64, true>, store_tile< 64>::TOKENS); break;
        case 128: launch_either(seqkv_write_kernel<128>, seqkv_write_tile_kernel<128, true>, store_tile<128>::TOKENS); break;
        default:  launch_either(seqkv_write_kernel<256>, seqkv_write_tile_kernel<256, true>, store_tile<256>::TOKENS); break;
    }
    return last - i;
}

int ggml_cuda_seqkv_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    if (node->op == GGML_OP_SEQKV_FRAME) {
        return fuse_write(ctx, graph, i);
    }
    if (node->op == GGML_OP_SEQKV_ATTN && ggml_nelements(node) > 0) {
        if (const int j = rows_behind(graph, i)) {
            const ggml_tensor * frame = nullptr;
            if (ctx.seqkv) {
                std::swap(frame, seqkv_late::of(ctx).frame);
            }
            ggml_cuda_seqkv_attn(ctx, graph->nodes[i], graph->nodes[j], frame);
            write_late(ctx, graph, j);
            return j - i;
        }
    }
    return 0;
}
