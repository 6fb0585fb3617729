#include "seqkv.h"

#include <math.h>
#include <string.h>

void seqkv_attention(const float * q, const float * k, const float * v, const float * mask, int64_t n, int dk, int dv,
                     float scale, float softcap, const float * sink, float * out) {
    double acc[256] = { 0.0 };
    double m = sink ? (double) *sink : -INFINITY;
    double l = sink ? 1.0 : 0.0;

    for (int64_t j = 0; j < n; ++j) {
        const float bias = mask ? mask[j] : 0.0f;
        if (bias == -INFINITY) {
            continue;
        }
        double s = 0.0;
        for (int i = 0; i < dk; ++i) {
            s += (double) q[i]*k[j*dk + i];
        }
        s *= scale;
        if (softcap != 0.0f) {
            s = softcap*tanh(s/softcap);
        }
        s += bias;

        if (s > m) {
            const double r = exp(m - s);
            l *= r;
            for (int i = 0; i < dv; ++i) {
                acc[i] *= r;
            }
            m = s;
        }
        const double p = exp(s - m);
        l += p;
        for (int i = 0; i < dv; ++i) {
            acc[i] += p*v[j*dv + i];
        }
    }

    for (int i = 0; i < dv; ++i) {
        out[i] = l > 0.0 ? (float) (acc[i]/l) : 0.0f;
    }
}
