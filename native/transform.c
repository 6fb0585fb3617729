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

// prediction of a key in its frame: R(offset) mean
static void predict_key(const float * mean, int head_dim, const float * cs_off, int n_rot, int neox, float * pred) {
    if (!mean) {
        memset(pred, 0, head_dim*sizeof(float));
        return;
    }
    memcpy(pred, mean, head_dim*sizeof(float));
    seqkv_rotate(pred, cs_off, n_rot, neox, 0);
}

void seqkv_encode_key(int bits, const float * k_frame, int head_dim, const float * mean, const float * cs_off,
                      int n_rot, int neox, void * dst) {
    float pred[SEQKV_MAX_HEAD];
    float z[SEQKV_MAX_HEAD];
    predict_key(mean, head_dim, cs_off, n_rot, neox, pred);
    for (int i = 0; i < head_dim; ++i) {
        z[i] = k_frame[i] - pred[i];
    }
    seqkv_fwht(z, head_dim);
    seqkv_quantize(bits, z, head_dim, dst, seqkv_bound(bits, head_dim));
}

void seqkv_decode_key(int bits, const void * src, int head_dim, const float * mean, const float * cs_off,
                      int n_rot, int neox, float * k_frame) {
    float pred[SEQKV_MAX_HEAD];
    predict_key(mean, head_dim, cs_off, n_rot, neox, pred);
    seqkv_dequantize(bits, src, seqkv_bound(bits, head_dim), k_frame, head_dim);
    seqkv_fwht(k_frame, head_dim);
    for (int i = 0; i < head_dim; ++i) {
        k_frame[i] += pred[i];
    }
}

void seqkv_encode_value(int bits, const float * v, int head_dim, const float * mean, void * dst) {
    float z[SEQKV_MAX_HEAD];
    for (int i = 0; i < head_dim; ++i) {
        z[i] = mean ? v[i] - mean[i] : v[i];
    }
    seqkv_fwht(z, head_dim);
    seqkv_quantize(bits, z, head_dim, dst, seqkv_bound(bits, head_dim));
}

void seqkv_decode_value(int bits, const void * src, int head_dim, const float * mean, float * v) {
    seqkv_dequantize(bits, src, seqkv_bound(bits, head_dim), v, head_dim);
    seqkv_fwht(v, head_dim);
    for (int i = 0; mean && i < head_dim; ++i) {
        v[i] += mean[i];
    }
}
