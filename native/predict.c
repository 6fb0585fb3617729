#include "predict.h"
#include "encode.h" // SEQKV_RESTRICT

#include <math.h>

#if defined(__clang__) || defined(_MSC_VER)
#    pragma STDC FP_CONTRACT OFF // GCC: -std=c11 does that
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#    define SEQKV_CLONES __attribute__((target_clones("avx2", "default"))) // sums of integers: the same on each
#else
#    define SEQKV_CLONES
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

static inline int32_t dot(const int16_t * a, const int16_t * b, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        sum += a[i]*b[i];
    }
    return sum;
}

SEQKV_CLONES
void seqkv_key_inputs(const seqkv_layer * l, int bits, const uint8_t * row, int offset, int16_t * x) {
    const int16_t * cs = l->rope + (int64_t) offset*l->n_rot;
    for (int h = 0; h < l->n_head; ++h, x += l->dk) {
        int16_t z[256];
        for (int b = 0; b < l->dk/SEQKV_BLOCK; ++b, row += seqkv_block_bytes(bits, 1)) {
            seqkv_block_values(bits, 1, row, SEQKV_UNIT_KEY, z + b*SEQKV_BLOCK);
        }
        int32_t y[256];
        const int16_t * d = l->k_decode + (int64_t) h*l->dk*l->dk;
        for (int i = 0; i < l->dk; ++i) {
            y[i] = seqkv_clip((dot(d + i*l->dk, z, l->dk) + (1 << 12)) >> 13, 2*SEQKV_MAX_VALUE);
        }
        for (int i = 0; i < l->n_rot/2; ++i) {
            const int i0 = pair_first(l, i), i1 = pair_second(l, i);
            const int32_t a = y[i0], b = y[i1], c = cs[2*i], s = cs[2*i + 1];
            y[i0] = (a*c + b*s + (1 << 13)) >> 14;
            y[i1] = (b*c - a*s + (1 << 13)) >> 14;
        }
        for (int i = 0; i < l->dk; ++i) {
            x[i] = (int16_t) seqkv_clip(y[i], SEQKV_MAX_VALUE);
        }
    }
}

void seqkv_value_inputs(const seqkv_layer * l, int bits, const uint8_t * row, int16_t * z) {
    const int blocks = l->dv/SEQKV_BLOCK;
    for (int b = 0; b < l->n_head*blocks; ++b) {
        seqkv_block_values(bits, 0, row + b*seqkv_block_bytes(bits, 0), l->v_gain[b/blocks], z + b*SEQKV_BLOCK);
    }
}

SEQKV_CLONES
void seqkv_key_values(const seqkv_layer * l, const int16_t * x, int offset, int16_t * z) {
    const int16_t * cs = l->rope + (int64_t) offset*l->n_rot;
    for (int h = 0; h < l->n_head; ++h, x += l->dk, z += l->dk) {
        int16_t y[256];
        memcpy(y, x, l->dk*sizeof(int16_t));
        for (int i = 0; i < l->n_rot/2; ++i) {
            const int i0 = pair_first(l, i), i1 = pair_second(l, i);
            const int32_t a = x[i0], b = x[i1], c = cs[2*i], s = cs[2*i + 1];
            y[i0] = (int16_t) seqkv_clip((a*c - b*s + (1 << 13)) >> 14, MAX_TURNED);
            y[i1] = (int16_t) seqkv_clip((a*s + b*c + (1 << 13)) >> 14, MAX_TURNED);
        }
        const int16_t * e = l->k_encode + (int64_t) h*l->dk*l->dk;
        const int shift = l->k_shift[h];
        for (int i = 0; i < l->dk; ++i) {
            z[i] = (int16_t) seqkv_clip((dot(e + i*l->dk, y, l->dk) + (1 << shift >> 1)) >> shift, SEQKV_MAX_VALUE);
        }
    }
}

// sums of the products of w[n] and four rows of inputs: n a multiple of 64
SEQKV_CLONES
static void dot4(const int16_t * SEQKV_RESTRICT w, const int16_t * SEQKV_RESTRICT in, int64_t stride, int n, int32_t * SEQKV_RESTRICT sum) {
    const int16_t * a = in, * b = in + stride, * c = in + 2*stride, * d = in + 3*stride;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int i = 0; i < n; ++i) {
        s0 += w[i]*a[i];
        s1 += w[i]*b[i];
        s2 += w[i]*c[i];
        s3 += w[i]*d[i];
    }
    sum[0] = s0;
    sum[1] = s1;
    sum[2] = s2;
    sum[3] = s3;
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
    int16_t w[SEQKV_MAX_INPUTS];
    for (int o = 0; o < n_out; ++o) {
        for (int i = 0; i < n_in; ++i) {
            w[i] = p->weight[(int64_t) o*n_in + i];
        }
        int t = 0;
        for (; t + 4 <= n; t += 4) {
            int32_t sum[4];
            dot4(w, in + (int64_t) t*stride, stride, n_in, sum);
            for (int j = 0; j < 4; ++j) {
                out[(int64_t) (t + j)*n_out + o] = scaled(sum[j], p->step[o]);
            }
        }
        for (; t < n; ++t) {
            out[(int64_t) t*n_out + o] = scaled(dot(w, in + (int64_t) t*stride, n_in), p->step[o]);
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
    for (int64_t t = 0; t < n_rows; ++t) {
        if (k) {
            if (offset[t] >= SEQKV_FRAME) {
                return SEQKV_ESHAPE;
            }
            seqkv_key_inputs(l, k_bits, k + t*(l->n_head*(l->dk/SEQKV_BLOCK)*seqkv_block_bytes(k_bits, 1)), offset[t], x + t*l->n_head*l->dk);
        }
        if (v) {
            seqkv_value_inputs(l, v_bits, v + t*(l->n_head*(l->dv/SEQKV_BLOCK)*seqkv_block_bytes(v_bits, 0)), z + t*l->n_head*l->dv);
        }
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
