// Sums of products with AVX2, or with AVX-512 and its products that add up: as the plain function of predict.c, which this is part of.

#define AVX2 __attribute__((target("avx2")))

// The sums of 8 lanes of each of four: one vector of four.
AVX2 static inline __m128i add_across(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

AVX2 static inline void add_to(int32_t * sum, __m128i x) {
    _mm_storeu_si128((__m128i *) sum, _mm_add_epi32(_mm_loadu_si128((const __m128i *) sum), x));
}

// One row of inputs by both rows of weights. The barrier keeps the inputs in a register: gcc would load them for each product.
#define MULTIPLY(j)                                                                       \
    do {                                                                                  \
        __m256i x = _mm256_loadu_si256((const __m256i *) (in + (j)*stride + i));          \
        __asm__("" : "+x"(x));                                                            \
        a##j = _mm256_add_epi32(a##j, _mm256_madd_epi16(x, w0));                          \
        b##j = _mm256_add_epi32(b##j, _mm256_madd_epi16(x, w1));                          \
    } while (0)

// products() of n rows of inputs, a multiple of 4, four at a time
AVX2 static void products_avx2(const int16_t * w, const int16_t * in, int64_t stride, int n_in, int n, int32_t * sum) {
    for (int t = 0; t < n; t += 4, in += 4*stride, sum += 8) {
        __m256i a0, a1, a2, a3, b0, b1, b2, b3;
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _mm256_setzero_si256();
        for (int64_t i = 0; i < n_in; i += 16) {
            const __m256i w0 = _mm256_loadu_si256((const __m256i *) (w + i)), w1 = _mm256_loadu_si256((const __m256i *) (w + n_in + i));
            MULTIPLY(0);
            MULTIPLY(1);
            MULTIPLY(2);
            MULTIPLY(3);
        }
        add_to(sum,     add_across(a0, b0, a1, b1));
        add_to(sum + 4, add_across(a2, b2, a3, b3));
    }
}
#undef MULTIPLY

#define VNNI __attribute__((target("avx2,avx512f,avx512vnni")))

VNNI static inline __m256i halves(__m512i a) { return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)); }

// products() of n rows of inputs, a multiple of 8, eight at a time
VNNI static void products_vnni(const int16_t * w, const int16_t * in, int64_t stride, int n_in, int n, int32_t * sum) {
    for (int t = 0; t < n; t += 8, in += 8*stride, sum += 16) {
        __m512i a[8], b[8];
        for (int j = 0; j < 8; ++j) {
            a[j] = b[j] = _mm512_setzero_si512();
        }
        for (int64_t i = 0; i < n_in; i += 32) {
            const __m512i w0 = _mm512_loadu_si512(w + i), w1 = _mm512_loadu_si512(w + n_in + i);
            for (int j = 0; j < 8; ++j) {
                const __m512i x = _mm512_loadu_si512(in + j*stride + i);
                __asm__("vpdpwssd %2, %1, %0" : "+v"(a[j]) : "v"(x), "v"(w0)); // gcc copies the sums at each of its intrinsics
                __asm__("vpdpwssd %2, %1, %0" : "+v"(b[j]) : "v"(x), "v"(w1));
            }
        }
        for (int j = 0; j < 8; j += 2) {
            add_to(sum + 2*j, add_across(halves(a[j]), halves(b[j]), halves(a[j + 1]), halves(b[j + 1])));
        }
    }
}
