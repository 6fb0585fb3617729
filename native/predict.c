#include "predict.h"

#include <math.h>

#if defined(__clang__) || defined(_MSC_VER)
#    pragma STDC FP_CONTRACT OFF // GCC: -std=c11 does that
#endif

#if defined(__GNUC__)
#    define SEQKV_ALIGNED __attribute__((aligned(64))) // a line of cache
#else
#    define SEQKV_ALIGNED
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#    include <immintrin.h>
#    include "predict-avx2.h" // where the processor has it
#    define SEQKV_WIDE
#endif

void seqkv_block_values(int bits, int graded, const uint8_t * block, int unit, int16_t * z) {
    int8_t lv[SEQKV_BLOCK];
    seqkv_levels(bits, graded, block, lv);
    for (int q = 0; q < 4; ++q) {
        const int g = graded ? seqkv_k_gain(block, bits, q < 2 ? q : 2) : block[0];
        const int B = seqkv_value_bits(bits, graded, q);
        const int32_t f = g && B ? seqkv_exp2(seqkv_scale17[B], seqkv_log_gain(graded, g, unit) - 96 < -288 ? -288
                                                              : seqkv_log_gain(graded, g, unit) - 96) : 0; // 2^-15 of a unit
        for (int i = 16*q; i < 16*q + 16; ++i) {
            z[i] = (int16_t) seqkv_clip((lv[i]*f + 128) >> 8, SEQKV_MAX_VALUE);
        }
    }
}

#define MAX_TURNED 5800     // above sqrt(2)*SEQKV_MAX_VALUE: more only in a profile whose table is no rotation
#define MAX_SUM    350000.0 // of the magnitudes in a row of E', so that MAX_TURNED of each is below 2^31

// pair i of x: indices of its values
static inline int pair_first (const seqkv_layer * l, int i) { return l->neox ? i : 2*i; }
static inline int pair_second(const seqkv_layer * l, int i) { return l->neox ? i + l->n_rot/2 : 2*i + 1; }

// To the sums (n, 2) the products of two rows of weights w (2, n_in) with n rows of inputs (n, stride); n_in is a multiple of 64.
// Integers: the same in any order.
static void products(const int16_t * w, const int16_t * in, int64_t stride, int n_in, int n, int32_t * sum) {
    int t = 0;
#ifdef SEQKV_WIDE
    if (n >= 8 && __builtin_cpu_supports("avx512vnni")) {
        t = n/8*8;
        products_vnni(w, in, stride, n_in, t, sum);
    } else if (__builtin_cpu_supports("avx2")) {
        t = n/4*4;
        products_avx2(w, in, stride, n_in, t, sum);
    }
#endif
    for (; t < n; ++t) {
        const int16_t * x = in + t*stride;
        int32_t s0 = 0, s1 = 0;
        for (int i = 0; i < n_in; ++i) {
            s0 += w[i]*x[i];
            s1 += w[n_in + i]*x[i];
        }
        sum[2*t]     += s0;
        sum[2*t + 1] += s1;
    }
}

void seqkv_key_inputs(const seqkv_layer * l, int bits, const uint8_t * const * row, const uint8_t * offset, int n, int16_t * x, int64_t stride) {
    const int dk = l->dk, blocks = dk/SEQKV_BLOCK, size = seqkv_block_bytes(bits, 1);
    int16_t z[SEQKV_FRAME*256], y[SEQKV_FRAME*256]; // (n, dk)
    int32_t sum[SEQKV_FRAME*2];
    for (int h = 0; h < l->n_head; ++h, x += dk) {
        for (int t = 0; t < n; ++t) {
            for (int b = 0; b < blocks; ++b) {
                seqkv_block_values(bits, 1, row[t] + (h*blocks + b)*size, SEQKV_UNIT_KEY, z + t*dk + b*SEQKV_BLOCK);
            }
        }
        const int16_t * d = l->k_decode + (int64_t) h*dk*dk;
        for (int i = 0; i < dk; i += 2) {
            memset(sum, 0, sizeof(sum));
            products(d + i*dk, z, dk, dk, n, sum);
            for (int t = 0; t < n; ++t) {
                y[t*dk + i]     = (int16_t) seqkv_clip((sum[2*t]     + (1 << 12)) >> 13, 2*SEQKV_MAX_VALUE);
                y[t*dk + i + 1] = (int16_t) seqkv_clip((sum[2*t + 1] + (1 << 12)) >> 13, 2*SEQKV_MAX_VALUE);
            }
        }
        for (int t = 0; t < n; ++t) {
            const int16_t * cs = l->rope + (int64_t) offset[t]*l->n_rot, * from = y + t*dk;
            int16_t * to = x + t*stride;
            for (int i = 0; i < l->n_rot/2; ++i) {
                const int i0 = pair_first(l, i), i1 = pair_second(l, i);
                const int32_t a = from[i0], b = from[i1], c = cs[2*i], s = cs[2*i + 1];
                to[i0] = (int16_t) seqkv_clip((a*c + b*s + (1 << 13)) >> 14, SEQKV_MAX_VALUE);
                to[i1] = (int16_t) seqkv_clip((b*c - a*s + (1 << 13)) >> 14, SEQKV_MAX_VALUE);
            }
            for (int i = l->n_rot; i < dk; ++i) {
                to[i] = (int16_t) seqkv_clip(from[i], SEQKV_MAX_VALUE);
            }
        }
    }
}

void seqkv_value_inputs(const seqkv_layer * l, int bits, const uint8_t * row, int16_t * z) {
    const int blocks = l->dv/SEQKV_BLOCK;
    for (int b = 0; b < l->n_head*blocks; ++b) {
        seqkv_block_values(bits, 0, row + b*seqkv_block_bytes(bits, 0), l->v_gain[b/blocks], z + b*SEQKV_BLOCK);
    }
}

void seqkv_key_values(const seqkv_layer * l, const int16_t * x, const uint8_t * offset, int n, int16_t * z) {
    const int dk = l->dk, width = l->n_head*dk;
    int16_t y[SEQKV_FRAME*256]; // (n, dk)
    int32_t sum[SEQKV_FRAME*2];
    for (int h = 0; h < l->n_head; ++h, x += dk, z += dk) {
        for (int t = 0; t < n; ++t) {
            const int16_t * cs = l->rope + (int64_t) offset[t]*l->n_rot, * from = x + t*width;
            int16_t * to = y + t*dk;
            memcpy(to, from, dk*sizeof(int16_t));
            for (int i = 0; i < l->n_rot/2; ++i) {
                const int i0 = pair_first(l, i), i1 = pair_second(l, i);
                const int32_t a = from[i0], b = from[i1], c = cs[2*i], s = cs[2*i + 1];
                to[i0] = (int16_t) seqkv_clip((a*c - b*s + (1 << 13)) >> 14, MAX_TURNED);
                to[i1] = (int16_t) seqkv_clip((a*s + b*c + (1 << 13)) >> 14, MAX_TURNED);
            }
        }
        const int16_t * e = l->k_encode + (int64_t) h*dk*dk;
        const int shift = l->k_shift[h];
        for (int i = 0; i < dk; i += 2) {
            memset(sum, 0, sizeof(sum));
            products(e + i*dk, y, dk, dk, n, sum);
            for (int t = 0; t < n; ++t) {
                z[t*width + i]     = (int16_t) seqkv_clip((sum[2*t]     + (1 << shift >> 1)) >> shift, SEQKV_MAX_VALUE);
                z[t*width + i + 1] = (int16_t) seqkv_clip((sum[2*t + 1] + (1 << shift >> 1)) >> shift, SEQKV_MAX_VALUE);
            }
        }
    }
}

static int16_t scaled(int32_t sum, int32_t step) {
    const int64_t y = ((int64_t) sum*step + (1 << 15)) >> 16;
    return (int16_t) (y < -SEQKV_MAX_VALUE ? -SEQKV_MAX_VALUE : y > SEQKV_MAX_VALUE ? SEQKV_MAX_VALUE : y);
}

void seqkv_predict(const seqkv_predictor * p, const int16_t * in, int stride, int n_in, int n, int16_t * out, int n_out) {
    if (!p->weight || n_in == 0) {
        memset(out, 0, (size_t) n*n_out*sizeof(int16_t));
        return;
    }
    // many outputs from some inputs at a time: these are put next to each other and stay in the cache
    enum { OUTPUTS = 128, INPUTS = 512 };
    SEQKV_ALIGNED int16_t w[2*INPUTS], x[SEQKV_FRAME*INPUTS];
    int32_t sums[OUTPUTS/2][SEQKV_FRAME*2];
    for (int first = 0; first < n_out; first += OUTPUTS) {
        const int end = first + OUTPUTS < n_out ? first + OUTPUTS : n_out;
        memset(sums, 0, sizeof(sums));
        for (int i0 = 0; i0 < n_in; i0 += INPUTS) {
            const int m = n_in - i0 < INPUTS ? n_in - i0 : INPUTS;
            for (int t = 0; t < n; ++t) {
                memcpy(x + t*m, in + (int64_t) t*stride + i0, m*sizeof(int16_t));
            }
            for (int o = first; o < end; o += 2) {
                const int8_t * from = p->weight + (int64_t) o*n_in + i0;
                for (int i = 0; i < m; ++i) {
                    w[i]     = from[i];
                    w[m + i] = from[n_in + i];
                }
                products(w, x, m, m, n, sums[(o - first)/2]);
            }
        }
        for (int o = first; o < end; o += 2) {
            const int32_t * sum = sums[(o - first)/2];
            for (int t = 0; t < n; ++t) {
                out[(int64_t) t*n_out + o]     = scaled(sum[2*t],     p->step[o]);
                out[(int64_t) t*n_out + o + 1] = scaled(sum[2*t + 1], p->step[o + 1]);
            }
        }
    }
}

static int valid_layer(const seqkv_layer * l) {
    const int dims = (l->dk == 64 || l->dk == 128 || l->dk == 256) && (l->dv == 64 || l->dv == 128 || l->dv == 256);
    return dims && l->n_head >= 1 && l->n_head <= 64 && l->n_rot >= 0 && l->n_rot <= l->dk && l->n_rot % 2 == 0;
}

int64_t seqkv_delta_inputs(const seqkv_layer * l, int k_bits, int v_bits, const uint8_t * offset, int64_t n_rows, const uint8_t * k,
                           const uint8_t * v, int16_t * x, int16_t * z) {
    if (!valid_layer(l) || n_rows < 0) {
        return SEQKV_ESHAPE;
    }
    if ((k && (k_bits < 1 || k_bits > 4)) || (v && (v_bits < 1 || v_bits > 4))) {
        return SEQKV_EBITS;
    }
    const int64_t k_row = l->n_head*(l->dk/SEQKV_BLOCK)*seqkv_block_bytes(k_bits, 1), v_row = l->n_head*(l->dv/SEQKV_BLOCK)*seqkv_block_bytes(v_bits, 0);
    const int64_t n_k = l->n_head*l->dk, n_v = l->n_head*l->dv;
    for (int64_t t = 0; k && t < n_rows; ++t) {
        if (offset[t] >= SEQKV_FRAME) {
            return SEQKV_ESHAPE;
        }
        const uint8_t * row = k + t*k_row;
        seqkv_key_inputs(l, k_bits, &row, offset + t, 1, x + t*n_k, n_k);
    }
    for (int64_t t = 0; v && t < n_rows; ++t) {
        seqkv_value_inputs(l, v_bits, v + t*v_row, z + t*n_v);
    }
    return SEQKV_OK;
}

int64_t seqkv_delta_transform(const float * enc, int n, int n_rot, int neox, int16_t * k_encode, int16_t * k_decode,
                              uint8_t * k_shift, double * work) {
    if ((n != 64 && n != 128 && n != 256) || n_rot < 0 || n_rot > n || n_rot % 2) {
        return SEQKV_ESHAPE;
    }
    // Gauss-Jordan with row pivots: a -> 1, b -> E^-1
    double * a = work, * b = work + n*n;
    for (int i = 0; i < n*n; ++i) {
        a[i] = enc[i];
        b[i] = i/n == i%n;
    }
    for (int c = 0; c < n; ++c) {
        int p = c;
        for (int r = c + 1; r < n; ++r) {
            p = fabs(a[r*n + c]) > fabs(a[p*n + c]) ? r : p;
        }
        const double pivot = a[p*n + c];
        if (!(fabs(pivot) > 1e-30) || !(fabs(pivot) < 1e30)) {
            return SEQKV_ESHAPE;
        }
        for (int i = 0; i < n; ++i) {
            const double ta = a[p*n + i], tb = b[p*n + i];
            a[p*n + i] = a[c*n + i];
            b[p*n + i] = b[c*n + i];
            a[c*n + i] = ta/pivot;
            b[c*n + i] = tb/pivot;
        }
        for (int r = 0; r < n; ++r) {
            const double f = a[r*n + c];
            if (r == c || f == 0.0) {
                continue;
            }
            for (int i = 0; i < n; ++i) {
                const double pa = f*a[c*n + i], pb = f*b[c*n + i];
                a[r*n + i] -= pa;
                b[r*n + i] -= pb;
            }
        }
    }
    // lengths of the rows of D, equal in a pair
    double * length = work; // n, a is done with
    for (int i = 0; i < n; ++i) {
        double sum = 0.0;
        for (int j = 0; j < n; ++j) {
            const double square = b[i*n + j]*b[i*n + j];
            sum += square;
        }
        length[i] = sum;
    }
    const seqkv_layer l = { .n_rot = n_rot, .neox = neox };
    for (int i = 0; i < n_rot/2; ++i) {
        const int i0 = pair_first(&l, i), i1 = pair_second(&l, i);
        length[i0] = length[i1] = 0.5*(length[i0] + length[i1]);
    }
    for (int i = 0; i < n; ++i) {
        length[i] = sqrt(length[i]);
        if (!(length[i] > 1e-30) || !(length[i] < 1e30)) {
            return SEQKV_ESHAPE;
        }
        for (int j = 0; j < n; ++j) {
            k_decode[i*n + j] = (int16_t) floor(8192.0*(b[i*n + j]/length[i]) + 0.5);
        }
    }
    // the largest shift at which E' fits and no sum can overflow
    double most = 0.0, largest = 0.0;
    for (int i = 0; i < n; ++i) {
        double sum = 0.0;
        for (int j = 0; j < n; ++j) {
            const double e = fabs((double) enc[i*n + j]*length[j]);
            sum    += e;
            largest = e > largest ? e : largest;
        }
        most = sum > most ? sum : most;
    }
    int shift = 11;
    while (shift > 0 && (largest*(1 << shift) > 32000.0 || most*(1 << shift) > MAX_SUM)) {
        --shift;
    }
    if (largest > 32000.0 || most > MAX_SUM) {
        return SEQKV_ESHAPE;
    }
    for (int i = 0; i < n*n; ++i) {
        k_encode[i] = (int16_t) floor((double) enc[i]*length[i%n]*(1 << shift) + 0.5);
    }
    *k_shift = (uint8_t) shift;
    return SEQKV_OK;
}
