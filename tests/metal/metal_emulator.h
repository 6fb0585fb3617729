// Runs Metal kernels as C++ on the CPU. Included before a kernel's source, by emulator.py, which also rewrites its attributes.
//
// The threads of a threadgroup are fibers of one OS thread. One runs until it ends or waits: at a barrier for the others of its
// threadgroup or simdgroup, in a simd function for its simdgroup. A wait that cannot end is an error, and every load and store is
// checked (clang's trace-loads, trace-stores): it has to be inside a buffer, and two threads that touch the same threadgroup memory,
// one of them writing, have to be separated by a barrier of their scope.
#pragma once

#include <cfloat>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <map>
#include <string>
#include <sys/mman.h>
#include <vector>

#define NO_TRACE __attribute__((no_sanitize("coverage")))

typedef unsigned int   uint;
typedef unsigned short ushort;
typedef unsigned char  uchar;
typedef unsigned long  ulong;

// ---- half and vectors

struct half {
    uint16_t bits;
    half() = default;
    template <typename T> half(T x) : bits((uint16_t) _cvtss_sh((float) x, 0)) {}
    operator float() const { return _cvtsh_ss(bits); }
    half & operator+=(float x) { return *this = half((float) *this + x); }
    half & operator*=(float x) { return *this = half((float) *this * x); }
};
inline half operator""h(long double x) { return half((float) x); }

template <typename T, int N> struct vec {
    T v[N];
    vec() = default;
    explicit vec(T x) { for (T & y : v) { y = x; } }
    template <typename U, typename = std::enable_if_t<!std::is_same_v<U, T>>> explicit vec(const vec<U, N> & x) { for (int i = 0; i < N; ++i) { v[i] = (T) x.v[i]; } }
    template <typename... U, typename = std::enable_if_t<sizeof...(U) == N && (N > 1)>> vec(U... x) : v{ (T) x... } {}
    T & operator[](int i) { return v[i]; }
    const T & operator[](int i) const { return v[i]; }
    vec & operator+=(const vec & o) { for (int i = 0; i < N; ++i) { v[i] += o.v[i]; } return *this; }
};
template <typename T, int N> vec<T, N> operator*(float f, const vec<T, N> & x) { vec<T, N> y; for (int i = 0; i < N; ++i) { y.v[i] = f*x.v[i]; } return y; }
typedef vec<float, 4> float4;
typedef vec<half, 4>  half4;
struct alignas(8) float2 { float x, y; float2() = default; float2(float x, float y) : x(x), y(y) {} };
struct uint3 { uint x, y, z; };
struct ushort3 { ushort x, y, z; };
inline float dot(const float4 & a, const float4 & b) { float s = 0.0f; for (int i = 0; i < 4; ++i) { s += a[i]*b[i]; } return s; }

// ---- the machine

namespace emu {

constexpr int    SIMD = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 64*1024;

enum wait { RUN, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };

struct fiber {
    void * sp;
    wait   state;
    uint   group_epoch, simd_epoch; // barriers passed, of the threadgroup and of both kinds
    uint   parity;
};

struct region { uintptr_t begin, end; };

struct access { uint16_t thread; uint16_t set; uint group_epoch, simd_epoch; }; // set: 1 if any

struct shadow { access write, read[2]; };

struct counters { uint64_t load_bytes, store_bytes, loads, stores, matrix, simd, barriers; };

struct machine {
    fiber    fibers[MAX_THREADS];
    void *   scheduler_sp;
    char *   stacks = nullptr;
    int      current, n_threads;
    uint3    group, groups;
    uint8_t  slots[2][MAX_THREADS][64];
    char *   group_memory = nullptr; size_t group_bytes = 0; // of threadgroup(0)
    void *   buffers[32];
    std::vector<region> regions;
    std::map<int, int *> constants;
    std::vector<shadow> shadows;
    counters count;
    void (*kernel)(machine &);
    std::string error;
    bool     tracing = false;
    uint64_t random;
};
extern machine m;

// switches stacks: callee-saved registers only
extern "C" void emu_switch(void ** from, void * to);

extern "C" char __start_tgmem[] __attribute__((weak, visibility("hidden"))), __stop_tgmem[] __attribute__((weak, visibility("hidden")));
extern "C" char __ehdr_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));

NO_TRACE inline void block(wait w) {
    fiber & f = m.fibers[m.current];
    f.state = w;
    emu_switch(&f.sp, m.scheduler_sp);
}
NO_TRACE inline void fail(const std::string & text) {
    if (m.error.empty()) {
        m.error = text + " (thread " + std::to_string(m.current) + " of threadgroup " + std::to_string(m.group.x) + "," + std::to_string(m.group.y) + "," + std::to_string(m.group.z) + ")";
    }
    block(DONE);
}

// what a value of every lane becomes after all of them have arrived
template <typename T, typename F> NO_TRACE auto exchange(const T & x, F f) {
    static_assert(sizeof(T) <= 64, "");
    const int me = m.current, first = me/SIMD*SIMD;
    const uint p = m.fibers[me].parity ^= 1;
    memcpy(m.slots[p][me], &x, sizeof(T));
    ++m.count.simd;
    block(AT_SIMD);
    T all[SIMD];
    for (int i = 0; i < SIMD; ++i) {
        memcpy(&all[i], m.slots[p][first + i], sizeof(T));
    }
    return f(all, me%SIMD);
}

}

// ---- the standard library's part

namespace metal {
using std::exp; using std::log2; using std::floor; using std::round; using std::fabs; using std::isfinite; using std::sqrt;
template <typename T> inline T max(T a, T b) { return a > b ? a : b; }
template <typename T> inline T min(T a, T b) { return a < b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }
inline float min(float a, float b) { return a < b ? a : b; }
template <typename T> inline T clamp(T x, T a, T b) { return min(max(x, a), b); }
inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
inline float rsqrt(float x) { return 1.0f/std::sqrt(x); }
inline int popcount(uint x) { return __builtin_popcount(x); }
template <typename T, typename U> inline T as_type(const U & x) { static_assert(sizeof(T) == sizeof(U), ""); T y; memcpy(&y, &x, sizeof(T)); return y; }
namespace precise { using std::tanh; using std::exp; }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
NO_TRACE inline void threadgroup_barrier(mem_flags) { ++emu::m.count.barriers; emu::block(emu::AT_BARRIER); }
NO_TRACE inline void simdgroup_barrier  (mem_flags) { emu::block(emu::AT_SIMD_BARRIER); }

#define EMU_REDUCE(name, T, start, step) NO_TRACE inline T name(T x) { \
    return emu::exchange(x, [](const T * all, int) NO_TRACE { T y = start; for (int i = 0; i < emu::SIMD; ++i) { const T z = all[i]; step; } return y; }); }
EMU_REDUCE(simd_sum, float, 0.0f, y += z)
EMU_REDUCE(simd_max, float, -INFINITY, y = z > y ? z : y)
EMU_REDUCE(simd_min, float, INFINITY, y = z < y ? z : y)
EMU_REDUCE(simd_or,  uint,  0, y |= z)
EMU_REDUCE(simd_any, bool,  false, y |= z)
template <typename T> NO_TRACE inline T simd_shuffle(T x, ushort lane) {
    return emu::exchange(x, [lane](const T * all, int) NO_TRACE { if (lane >= emu::SIMD) { emu::fail("simd_shuffle from lane " + std::to_string(lane)); } return all[lane]; });
}
template <typename T> NO_TRACE inline T simd_shuffle_xor(T x, ushort mask) {
    return emu::exchange(x, [mask](const T * all, int lane) NO_TRACE { return all[(lane ^ mask)%emu::SIMD]; });
}

template <typename T> struct simdgroup_matrix8 { float e[2]; }; // elements 2*lane, 2*lane + 1, row by row
typedef simdgroup_matrix8<float> simdgroup_float8x8;
typedef simdgroup_matrix8<half>  simdgroup_half8x8;
template <typename T, int N> simdgroup_matrix8<T> make_filled_simdgroup_matrix(T x) { return { { (float) x, (float) x } }; }
template <typename T, typename P> inline void simdgroup_load(simdgroup_matrix8<T> & d, P src, ulong stride, int = 0, bool transpose = false) {
    static_assert(std::is_same_v<T, std::remove_cv_t<std::remove_pointer_t<P>>>, "type of the matrix");
    emu::exchange(0, [](const int *, int) NO_TRACE { return 0; });
    for (int k = 0; k < 2; ++k) {
        const int i = 2*(emu::m.current%emu::SIMD) + k;
        d.e[k] = transpose ? src[i%8*stride + i/8] : src[i/8*stride + i%8];
    }
}
template <typename T> inline void simdgroup_store(const simdgroup_matrix8<T> & d, T * dst, ulong stride, int = 0, bool = false) {
    emu::exchange(0, [](const int *, int) NO_TRACE { return 0; });
    for (int k = 0; k < 2; ++k) {
        const int i = 2*(emu::m.current%emu::SIMD) + k;
        dst[i/8*stride + i%8] = (T) d.e[k];
    }
}
template <typename A, typename B, typename C, typename D> NO_TRACE inline void simdgroup_multiply_accumulate(simdgroup_matrix8<D> & d, const A & a, const B & b, const C & c) {
    struct pair { float a[2], b[2]; };
    const pair p = { { a.e[0], a.e[1] }, { b.e[0], b.e[1] } };
    emu::m.count.matrix += emu::m.current%emu::SIMD == 0;
    d = emu::exchange(p, [&c](const pair * all, int lane) NO_TRACE {
        simdgroup_matrix8<D> y;
        for (int k = 0; k < 2; ++k) {
            const int i = 2*lane + k;
            float s = c.e[k];
            for (int r = 0; r < 8; ++r) {
                const int u = i/8*8 + r, w = r*8 + i%8;
                s += all[u/2].a[u%2]*all[w/2].b[w%2];
            }
            y.e[k] = s;
        }
        return y;
    });
}
template <typename A, typename B, typename D> NO_TRACE inline void simdgroup_multiply(simdgroup_matrix8<D> & d, const A & a, const B & b) {
    const simdgroup_matrix8<D> zero = { { 0.0f, 0.0f } };
    simdgroup_multiply_accumulate(d, a, b, zero);
}
}
