// CUDA's language on a CPU, as far as decode_kernel (native/cuda/seqkv-decode-kernels.cuh) needs it: threads of one block are fibers, what a warp does
// together happens when its last lane arrives, shared memory is static. Copies and the order of warps are delayed at random, within what barriers allow.
#pragma once

#include "ggml.h"

#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __global__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#undef  GGML_UNUSED_VARS
#define GGML_UNUSED_VARS(...) do { (void) sizeof((__VA_ARGS__, 0)); } while (0)
#define WARP_SIZE 32

struct ggml_backend_cuda_context;

struct int2   { int x, y; };
struct uint2  { uint32_t x, y; };
struct uint3  { unsigned x, y, z; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline int2   make_int2  (int x, int y) { return { x, y }; }
inline float2 make_float2(float x, float y) { return { x, y }; }
inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
inline uint4  make_uint4 (uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return { x, y, z, w }; }

typedef _Float16 half;
struct half2 { half x, y; };
inline float  __half2float(half x) { return x; }
inline half   __float2half(float x) { return (half) x; }
inline half2  __floats2half2_rn(float x, float y) { return { (half) x, (half) y }; }
inline half2  __lows2half2 (half2 a, half2 b) { return { a.x, b.x }; }
inline half2  __highs2half2(half2 a, half2 b) { return { a.y, b.y }; }
inline float2 __half22float2(half2 x) { return { (float) x.x, (float) x.y }; }

inline uint32_t __float_as_uint(float x) { uint32_t r; memcpy(&r, &x, 4); return r; }
inline float    __uint_as_float(uint32_t x) { float r; memcpy(&r, &x, 4); return r; }
inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t s) { return (uint32_t) (((uint64_t) hi << 32 | lo) >> (s & 31)); }
inline uint32_t __funnelshift_rc(uint32_t lo, uint32_t hi, uint32_t s) { return s < 32 ? __funnelshift_r(lo, hi, s) : hi; }
inline int      __popc(uint32_t x) { return __builtin_popcount(x); }
inline float    __expf(float x) { return expf(x); }
inline float    rsqrtf(float x) { return 1.0f/sqrtf(x); }
template <class T> inline T min(T a, T b) { return a < b ? a : b; }
template <class T> inline T max(T a, T b) { return a > b ? a : b; }

[[noreturn]] inline void fail(const char * what) {
    printf("FAIL: %s\n", what);
    exit(1);
}

struct fiber {
    ucontext_t        context;
    std::vector<char> stack;
    bool              done;
    uint3             thread;
};
struct meeting {
    int      arrived = 0;
    unsigned time    = 0;
};
struct warp : meeting {
    void * args[WARP_SIZE];
};
struct named_state : meeting {
    int n = 0;
};
inline fiber * current;
inline uint3   block_index, block_size, grid_size;
inline std::vector<warp> warps;
inline named_state       named[16];
inline ucontext_t        scheduler;
inline long              progress; // what others may have waited for
alignas(128) inline char shared_memory[232448];
#define threadIdx (current->thread)
#define blockIdx  block_index
#define blockDim  block_size
#define gridDim   grid_size

inline void yield() { swapcontext(&current->context, &scheduler); }
inline int  lane_of_thread() { return current->thread.x%WARP_SIZE; }

// waits until n threads have come; the last one runs last()
template <class F> inline void meet(meeting & m, int n, F last) {
    const unsigned time = m.time;
    if (++m.arrived == n) {
        last();
        m.arrived = 0;
        ++m.time;
        ++progress;
    } else {
        while (m.time == time) {
            yield();
        }
    }
}
// run(arguments of all lanes), once
template <class A, class F> inline void together(A * arg, F run) {
    warp & w = warps[current->thread.x/WARP_SIZE];
    w.args[lane_of_thread()] = arg;
    meet(w, WARP_SIZE, [&] { run((A **) w.args); });
}
struct exchange { uint64_t own, got; int from; };
template <class T> inline T __shfl_sync(unsigned, T x, int from) {
    exchange e = { 0, 0, from };
    memcpy(&e.own, &x, sizeof(T));
    together(&e, [](exchange ** all) {
        for (int i = 0; i < WARP_SIZE; ++i) {
            all[i]->got = all[all[i]->from & 31]->own;
        }
    });
    memcpy(&x, &e.got, sizeof(T));
    return x;
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int bits) { return __shfl_sync(mask, x, lane_of_thread() ^ bits); }
inline uint32_t __ballot_sync(unsigned, int x) {
    exchange e = { x != 0, 0, 0 };
    together(&e, [](exchange ** all) {
        uint32_t bits = 0;
        for (int i = 0; i < WARP_SIZE; ++i) { bits |= (uint32_t) all[i]->own << i; }
        for (int i = 0; i < WARP_SIZE; ++i) { all[i]->got = bits; }
    });
    return (uint32_t) e.got;
}
inline void __syncwarp() { int none; together(&none, [](int **) {}); }

inline void barrier_of(int id, int n) {
    if (id > 15) {
        fail("a named barrier above 15");
    }
    named_state & b = named[id];
    if (b.arrived && b.n != n) {
        fail("a named barrier for two counts at once");
    }
    b.n = n;
    meet(b, n, [] {});
}
inline void __syncthreads() { barrier_of(0, block_size.x); }
inline void ggml_cuda_pdl_sync() {}
inline void ggml_cuda_pdl_lc() {}

// asynchronous copies and their barriers
struct barrier_state { int count = 0, pending = 0, bytes = 0, phase = 0; };
struct pending_copy  { void * dst; const void * src; int n; uint64_t * barrier; bool arrives; };
inline std::map<uint64_t *, barrier_state> barriers_of_block;
inline std::vector<pending_copy> on_their_way, of_thread[512];
inline std::vector<std::pair<const char *, const char *>> readable;

inline void check_copy(const void * dst, const void * src, int n, int align) {
    if (((uintptr_t) dst | (uintptr_t) src | n) & (align - 1)) {
        fail("a misaligned copy");
    }
    for (const auto & [begin, end] : readable) {
        if ((const char *) src >= begin && (const char *) src + n <= end) {
            return;
        }
    }
    fail("a copy out of range");
}
inline void settle(barrier_state & b) {
    if (b.pending < 0 || b.bytes < 0) {
        fail("more arrived at a barrier than it waits for");
    }
    if (b.pending == 0 && b.bytes == 0) {
        ++progress;
        b.phase  ^= 1;
        b.pending = b.count;
    }
}
inline void land(size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const pending_copy & c = on_their_way[i];
        if (c.dst) {
            memcpy(c.dst, c.src, c.n);
        }
        if (c.barrier) {
            barrier_state & b = barriers_of_block[c.barrier];
            (c.arrives ? b.pending : b.bytes) -= c.arrives ? 1 : c.n;
            settle(b);
        }
    }
    on_their_way.erase(on_their_way.begin(), on_their_way.begin() + n);
}

inline std::function<void()> thread_body;
inline void thread_main() {
    thread_body();
    current->done = true;
    yield();
}
inline void run_block(int n_threads, uint3 index, std::function<void()> body) {
    static std::vector<fiber> fibers;
    fibers.resize(n_threads);
    warps.assign(n_threads/WARP_SIZE, warp());
    std::fill(std::begin(named), std::end(named), named_state());
    barriers_of_block.clear();
    memset(shared_memory, 0xa5, sizeof(shared_memory));
    block_index = index;
    block_size  = { (unsigned) n_threads, 1, 1 };
    thread_body = std::move(body);
    for (int i = 0; i < n_threads; ++i) {
        fiber & f = fibers[i];
        f.done   = false;
        f.thread = { (unsigned) i, 0, 0 };
        f.stack.resize(65536);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, thread_main, 0);
    }
    int left = n_threads;
    for (long idle = 0, before = progress; left > 0; ++idle) {
        if (before != progress) {
            before = progress;
            idle   = 0;
        } else if (idle > 1000) {
            fail("a deadlock");
        }
        const int w = rand()%(n_threads/WARP_SIZE), times = 1 + rand()%40;
        for (int k = 0; k < times; ++k) {
            for (int i = 0; i < WARP_SIZE; ++i) {
                current = &fibers[w*WARP_SIZE + i];
                if (!current->done) {
                    swapcontext(&scheduler, &current->context);
                    left -= current->done;
                }
            }
        }
        if (rand()%3 == 0) {
            land(rand()%(on_their_way.size() + 1));
        }
    }
    if (!on_their_way.empty()) {
        fail("copies that nobody waited for");
    }
}
