// In place of native/cuda/seqkv-mma.cuh: what is in assembly there, on the CPU (machine.h). ARCH: compute capability times 100.
#pragma once

#include "seqkv-common.cuh"

static constexpr bool bulk_copies = ARCH >= 900, async_barriers = ARCH >= 800;

SEQKV_FN void keep(int &) {}
template <class T> SEQKV_FN T * kept(T * shared) { return shared; }

struct mma_args { int * c; const uint32_t * a; uint32_t b[2]; };
template <int K, bool UNSIGNED> inline void mma_bytes(int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
    mma_args own = { c, a, { b0, b1 } };
    together(&own, [](mma_args ** all) {
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 8; ++column) {
                int sum = 0;
                for (int k = 0; k < K; ++k) {
                    const int     t = k%16/4, shift = k%4*8;
                    const uint8_t b = (uint8_t) (all[4*column + t]->b[k/16] >> shift);
                    sum += (int8_t) (all[4*(row%8) + t]->a[row/8 + 2*(k/16)] >> shift)*(UNSIGNED ? (int) b : (int) (int8_t) b);
                }
                all[4*(row%8) + column/2]->c[2*(row/8) + column%2] += sum;
            }
        }
    });
}
SEQKV_FN void mma_s8_k16  (int (&c)[4], const uint32_t * a, uint32_t b) { mma_bytes<16, false>(c, a, b, 0); }
SEQKV_FN void mma_s8u8_k16(int (&c)[4], const uint32_t * a, uint32_t b) { mma_bytes<16, true >(c, a, b, 0); }
SEQKV_FN void mma_s8u8_k32(int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) { mma_bytes<32, true >(c, a, b0, b1); }
SEQKV_FN void mma_s8_k32  (int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) { mma_bytes<32, false>(c, a, b0, b1); }

struct mma_f16_args { float * c; const uint32_t * a; uint32_t b[2]; };
SEQKV_FN void mma_f16(float (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
    mma_f16_args own = { c, a, { b0, b1 } };
    together(&own, [](mma_f16_args ** all) {
        const auto value = [](const uint32_t & word, int i) { half x[2]; memcpy(x, &word, 4); return (float) x[i]; };
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 8; ++column) {
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) {
                    sum += value(all[4*(row%8) + k%8/2]->a[row/8 + 2*(k/8)], k%2)*value(all[4*column + k%8/2]->b[k/8], k%2);
                }
                all[4*(row%8) + column/2]->c[2*(row/8) + column%2] += sum;
            }
        }
    });
}

struct ldmatrix_args { uint32_t * r; const char * row; };
template <bool TRANSPOSED> inline void ldmatrix(uint32_t * r, const void * row) {
    if ((uintptr_t) row & 15) {
        fail("a misaligned row");
    }
    ldmatrix_args own = { r, (const char *) row };
    together(&own, [](ldmatrix_args ** all) {
        for (int lane = 0; lane < WARP_SIZE; ++lane) {
            const int g = lane/4, t = lane%4;
            for (int i = 0; i < 4; ++i) {
                uint16_t x, y;
                memcpy(&x, TRANSPOSED ? all[8*i + 2*t]->row + 2*g     : all[8*i + g]->row + 4*t,     2);
                memcpy(&y, TRANSPOSED ? all[8*i + 2*t + 1]->row + 2*g : all[8*i + g]->row + 4*t + 2, 2);
                all[lane]->r[i] = x | (uint32_t) y << 16;
            }
        }
    });
}
SEQKV_FN void load_a         (uint32_t * r, const void * row) { ldmatrix<false>(r, row); }
SEQKV_FN void load_transposed(uint32_t * r, const void * row) { ldmatrix<true >(r, row); }

SEQKV_FN void copy_async(void * dst, const void * src, int n) {
    check_copy(dst, src, n, n);
    if (ARCH >= 800) {
        of_thread[threadIdx.x].push_back({ dst, src, n, nullptr, false });
    } else {
        memcpy(dst, src, n);
    }
}
SEQKV_FN void copy_async4 (void * dst, const void * src) { copy_async(dst, src, 4); }
SEQKV_FN void copy_async16(void * dst, const void * src) { copy_async(dst, src, 16); }
SEQKV_FN void copy_commit() {}
SEQKV_FN void copy_wait() {
    for (const pending_copy & c : of_thread[threadIdx.x]) {
        memcpy(c.dst, c.src, c.n);
    }
    of_thread[threadIdx.x].clear();
}

SEQKV_FN void barrier_init(uint64_t * barrier, int n) { barriers_of_block[barrier] = { n, n, 0, 0 }; }
SEQKV_FN void barrier_arrive(uint64_t * barrier) {
    if (async_barriers) {
        barrier_state & b = barriers_of_block[barrier];
        --b.pending;
        settle(b);
    }
}
SEQKV_FN void barrier_arrive_copied(uint64_t * barrier) {
    if (async_barriers) {
        std::vector<pending_copy> & own = of_thread[threadIdx.x];
        on_their_way.insert(on_their_way.end(), own.begin(), own.end());
        on_their_way.push_back({ nullptr, nullptr, 0, barrier, true });
        own.clear();
    }
}
SEQKV_FN void barrier_arrive_expect(uint64_t * barrier, int bytes) {
    barrier_state & b = barriers_of_block[barrier];
    b.bytes += bytes;
    --b.pending;
    settle(b);
}
SEQKV_FN void barrier_wait(uint64_t * barrier, uint32_t parity) {
    while ((uint32_t) barriers_of_block[barrier].phase == parity) {
        yield();
    }
}
SEQKV_FN void bulk_copy(void * dst, const void * src, int bytes, uint64_t * barrier) {
    check_copy(dst, src, bytes, 16);
    on_their_way.push_back({ dst, src, bytes, barrier, false });
}
SEQKV_FN void prefetch(const char *, int) {}
SEQKV_FN void prefetch_to_l1(const void *) {}
SEQKV_FN void named_barrier(int id, int n) { barrier_of(id, n); }

// of the queries' kernel, which is not run
template <int D, class... T> SEQKV_FN void hadamard_mma(T &&...) { fail("not run here"); }
