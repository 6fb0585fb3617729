#include "seqkv.h"

#include <math.h>
#include <string.h>

void seqkv_fwht(float * x, int n) {
    for (int h = 1; h < n; h *= 2) {
        for (int i = 0; i < n; i += 2*h) {
            for (int j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j]     = a + b;
                x[j + h] = a - b;
            }
        }
    }
    const float s = 1.0f/sqrtf((float) n);
    for (int i = 0; i < n; ++i) {
        x[i] *= s;
    }
}

void seqkv_rotate(float * x, const float * cs, int n_rot, int neox, int inverse) {
    for (int i = 0; i < n_rot/2; ++i) {
        const int   i0 = neox ? i : 2*i;
        const int   i1 = neox ? i + n_rot/2 : 2*i + 1;
        const float c  = cs[2*i];
        const float s  = inverse ? -cs[2*i + 1] : cs[2*i + 1];
        const float a = x[i0], b = x[i1];
        x[i0] = a*c - b*s;
        x[i1] = a*s + b*c;
    }
}

#define SEQKV_MAX_HEAD 256

// y = M x, M (n, n) row-major; NULL: the Hadamard transform
static void transform(const float * m, const float * x, int n, float * y) {
    if (!m) {
        memcpy(y, x, n*sizeof(float));
        seqkv_fwht(y, n);
        return;
    }
    for (int r = 0; r < n; ++r) {
        double sum = 0.0;
        for (int c = 0; c < n; ++c) {
            sum += (double) m[r*n + c]*x[c];
        }
        y[r] = (float) sum;
    }
}

void seqkv_encode_key(int bits, int graded, const float * k_frame, int head_dim, const float * enc, const float * pred, void * dst) {
    float z[SEQKV_MAX_HEAD];
    transform(enc, k_frame, head_dim, z);
    for (int i = 0; pred && i < head_dim; ++i) {
        z[i] -= pred[i];
    }
    seqkv_quantize(bits, graded, z, head_dim, dst, seqkv_bound(bits, graded, head_dim));
}

void seqkv_decode_key(int bits, int graded, const void * src, int head_dim, const float * dec, const float * pred, float * k_frame) {
    float z[SEQKV_MAX_HEAD];
    seqkv_dequantize(bits, graded, src, seqkv_bound(bits, graded, head_dim), z, head_dim);
    for (int i = 0; pred && i < head_dim; ++i) {
        z[i] += pred[i];
    }
    transform(dec, z, head_dim, k_frame);
}

void seqkv_encode_value(int bits, const float * v, int head_dim, const float * mean, const float * scale, void * dst) {
    float z[SEQKV_MAX_HEAD];
    for (int i = 0; i < head_dim; ++i) {
        z[i] = (scale ? scale[i] : 1.0f)*(mean ? v[i] - mean[i] : v[i]);
    }
    seqkv_fwht(z, head_dim);
    seqkv_quantize(bits, 0, z, head_dim, dst, seqkv_bound(bits, 0, head_dim));
}

void seqkv_decode_value(int bits, const void * src, int head_dim, const float * mean, const float * scale, float * v) {
    seqkv_dequantize(bits, 0, src, seqkv_bound(bits, 0, head_dim), v, head_dim);
    seqkv_fwht(v, head_dim);
    for (int i = 0; i < head_dim; ++i) {
        v[i] = (scale ? v[i]/scale[i] : v[i]) + (mean ? mean[i] : 0.0f);
    }
}
