// Tensor core instructions on plain registers. Fragments (PTX ISA, mma): lane = 4*g + t.
//   A (16, k): a[0] row g, a[1] row g + 8, both k 4t.. (int8) or 2t.. (f16); a[2], a[3] the same in the second half of k
//   B (k, 8):  b0, b1: column g, the same k
//   C (16, 8): c[0], c[1] row g, columns 2t, 2t + 1; c[2], c[3] row g + 8
#pragma once

#include "seqkv-common.cuh"

SEQKV_FN void mma_s8_8x8x16(int & c0, int & c1, uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
#else
    GGML_UNUSED_VARS(c0, c1, a, b);
#endif
}

// k = 16: a[0], a[1]
SEQKV_FN void mma_s8_k16(int (&c)[4], const uint32_t * a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
#else
    mma_s8_8x8x16(c[0], c[1], a[0], b);
    mma_s8_8x8x16(c[2], c[3], a[1], b);
#endif
}

// the same with bytes in B
SEQKV_FN void mma_s8u8_k16(int (&c)[4], const uint32_t * a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
#elif __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c[0]), "+r"(c[1]) : "r"(a[0]), "r"(b));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c[2]), "+r"(c[3]) : "r"(a[1]), "r"(b));
#else
    GGML_UNUSED_VARS(c, a, b);
#endif
}

// k = 32
SEQKV_FN void mma_s8_k32(int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_s8_k16(c, a, b0);
    mma_s8_k16(c, a + 2, b1);
#endif
}

// k = 32 with bytes in B
SEQKV_FN void mma_s8u8_k32(int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_s8u8_k16(c, a, b0);
    mma_s8u8_k16(c, a + 2, b1);
#endif
}

// f16, k = 16
SEQKV_FN void mma_f16(float (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
    GGML_UNUSED_VARS(c, a, b0, b1);
#endif
}

// ldmatrix: four matrices of 8 rows of 16 bytes in shared memory, lane l gives the address of row l%8 of matrix l/8.
// As they are: register i has bytes 4t.. of row g of matrix i. With 8-byte rows of k these are A fragments (rows 0..7, 8..15, then the second half of k).
SEQKV_FN void load_a(uint32_t * r, const void * row) {
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t) __cvta_generic_to_shared(row)) : "memory");
#else
    GGML_UNUSED_VARS(r, row);
#endif
}
// Transposed: register i has 16-bit element g of rows 2t and 2t + 1 of matrix i. Of f16 rows of k that is a B fragment.
SEQKV_FN void load_transposed(uint32_t * r, const void * row) {
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t) __cvta_generic_to_shared(row)) : "memory");
#else
    GGML_UNUSED_VARS(r, row);
#endif
}

// asynchronous copies of 4 and 16 bytes into shared memory; plain ones before compute capability 8.0
SEQKV_FN void copy_async4(void * dst, const void * src) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src) : "memory");
#else
    *(uint32_t *) dst = *(const uint32_t *) src;
#endif
}
SEQKV_FN void copy_async16(void * dst, const void * src) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src) : "memory");
#else
    *(uint4 *) dst = *(const uint4 *) src;
#endif
}
SEQKV_FN void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// waits for all groups of this thread but the last N
template <int N> SEQKV_FN void copy_wait_but() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}
SEQKV_FN void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Barriers in shared memory (mbarrier, compute capability 8.0) that a number of threads arrive at, some by copies that have landed, and bulk copies of
// bytes in multiples of 16 (9.0), which a barrier counts. parity: of the phase that is waited for, 0 of the first one.
#if __CUDA_ARCH__ >= 900
static constexpr bool bulk_copies = true;
#else
static constexpr bool bulk_copies = false;
#endif
#if __CUDA_ARCH__ >= 800
static constexpr bool async_barriers = true;
#else
static constexpr bool async_barriers = false;
#endif
SEQKV_FN void barrier_init(uint64_t * barrier, int n) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"((uint32_t) __cvta_generic_to_shared(barrier)), "r"(n) : "memory");
#endif
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // before bulk copies
#endif
    GGML_UNUSED_VARS(barrier, n);
}
SEQKV_FN void barrier_arrive(uint64_t * barrier) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" :: "r"((uint32_t) __cvta_generic_to_shared(barrier)) : "memory");
#endif
    GGML_UNUSED(barrier);
}
// once the asynchronous copies of this thread have landed
SEQKV_FN void barrier_arrive_copied(uint64_t * barrier) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"((uint32_t) __cvta_generic_to_shared(barrier)) : "memory");
#endif
    GGML_UNUSED(barrier);
}
// ... and that many bytes of bulk copies are to land
SEQKV_FN void barrier_arrive_expect(uint64_t * barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"((uint32_t) __cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
#endif
    GGML_UNUSED_VARS(barrier, bytes);
}
SEQKV_FN void barrier_wait(uint64_t * barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred done;\nagain%=:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again%=;\n}"
        :: "r"((uint32_t) __cvta_generic_to_shared(barrier)), "r"(parity) : "memory");
#elif __CUDA_ARCH__ >= 800
    asm volatile("{\n.reg .pred done;\nagain%=:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again%=;\n}"
        :: "r"((uint32_t) __cvta_generic_to_shared(barrier)), "r"(parity) : "memory");
#endif
    GGML_UNUSED_VARS(barrier, parity);
}
SEQKV_FN void bulk_copy(void * dst, const void * src, int bytes, uint64_t * barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src), "r"(bytes), "r"((uint32_t) __cvta_generic_to_shared(barrier)) : "memory");
#endif
    GGML_UNUSED_VARS(dst, src, bytes, barrier);
}
// bytes on their way to the L2 cache, by a warp
SEQKV_FN void prefetch(const char * from, int bytes) {
#if __CUDA_ARCH__ >= 900
    const int skew = (int) (uintptr_t) from & 15;
    if (threadIdx.x%WARP_SIZE == 0 && bytes > 0) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from - skew), "r"((skew + bytes + 15) & ~15) : "memory");
    }
#else
    for (int i = threadIdx.x%WARP_SIZE*128; i < bytes; i += WARP_SIZE*128) {
        asm volatile("prefetch.global.L2 [%0];" :: "l"(from + i));
    }
#endif
}
SEQKV_FN void prefetch_to_l1(const void * from) { asm volatile("prefetch.global.L1 [%0];" :: "l"(from)); }
// of n threads, where there are no such barriers
SEQKV_FN void named_barrier(int id, int n) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(n) : "memory"); }

// Values of a lane, and places in shared memory, that stay in their registers where the compiler would rather compute them again each time: it cannot
// know what a shuffle gives
SEQKV_FN void keep(int & x) { x = __shfl_sync(0xffffffff, x, threadIdx.x%WARP_SIZE); }
template <class T> SEQKV_FN T * kept(T * shared) {
    int x = (int) __cvta_generic_to_shared(shared);
    keep(x);
    return (T *) __cvta_shared_to_generic((size_t) (uint32_t) x);
}

// Entries (n, k .. k + 7) of the Hadamard matrix of +-1, as f16; k a multiple of 8
SEQKV_FN uint4 hadamard8(int n, int k) {
    const uint32_t base = 0x3c003c00 ^ ((n & 1) << 31) ^ (__popc(n & k) & 1 ? 0x80008000 : 0);
    const uint32_t w1   = n & 2 ? 0x80008000 : 0, w2 = n & 4 ? 0x80008000 : 0;
    return make_uint4(base, base ^ w1, base ^ w2, base ^ w1 ^ w2);
}

// acc <- z H, not normalized, for 16 rows z (16, D + 8) in shared memory; acc: C fragments. Within WIDTH columns on tensor cores, between them by sums and
// differences. b: B fragments of the matrix of 16, for two tiles of columns
template <int D, int WIDTH> SEQKV_FN void hadamard_mma(const half * z, const uint32_t (&b)[2][2], float (&acc)[D/8][4]) {
    const int lane = threadIdx.x%WARP_SIZE;
    const uint32_t minus[2][2] = { { b[0][0] ^ 0x80008000, b[0][1] ^ 0x80008000 }, { b[1][0] ^ 0x80008000, b[1][1] ^ 0x80008000 } };
#pragma unroll
    for (int k0 = 0; k0 < D/16; k0 += WIDTH/16) {
#pragma unroll
        for (int i = 0; i < WIDTH/16; ++i) {
            uint32_t x[4];
            load_a(x, z + lane%16*(D + 8) + 16*(k0 + i) + lane/16*8);
#pragma unroll
            for (int n = 0; n < WIDTH/8; ++n) {
                float (&c)[4] = acc[2*k0 + n];
                if (i == 0) {
                    c[0] = c[1] = c[2] = c[3] = 0.0f;
                }
                const uint32_t (&s)[2] = (i & n/2) == 1 || (i & n/2) == 2 ? minus[n & 1] : b[n & 1];
                mma_f16(c, x, s[0], s[1]);
            }
        }
    }
    seqkv_fwht_rows<WIDTH/8>(acc);
}
