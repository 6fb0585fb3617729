// The ways to add up products of predict.c, each against the plain one. Prints how many of them this processor has besides.
#include "predict.c"

#include <stdio.h>
#include <stdlib.h>

enum { N = 64, N_IN = 512 };

static int16_t w[2*N_IN], x[N*N_IN];

int main(void) {
    int ways = 0;
    for (int i = 0; i < 2*N_IN; ++i) { w[i] = (int16_t) (rand() % 255 - 127); }
    for (int i = 0; i < N*N_IN; ++i) { x[i] = (int16_t) (rand() % (2*SEQKV_MAX_VALUE + 1) - SEQKV_MAX_VALUE); }
    for (int n_in = 64; n_in <= N_IN; n_in *= 2) {
        int32_t plain[2*N], sum[2*N];
        for (int t = 0; t < N; ++t) {
            plain[2*t] = t;
            plain[2*t + 1] = -t;
            for (int i = 0; i < n_in; ++i) {
                plain[2*t]     += w[i]*x[t*n_in + i];
                plain[2*t + 1] += w[n_in + i]*x[t*n_in + i];
            }
        }
        const int starts[] = { 0, 3 }; // products() itself, whole and with a rest; what is there already stays
        ways = 0;
        for (int way = 0; way < 4; ++way) {
            for (int t = 0; t < N; ++t) { sum[2*t] = t; sum[2*t + 1] = -t; }
            if (way < 2) {
                products(w, x, n_in, n_in, N - starts[way], sum);
                products(w, x + (N - starts[way])*n_in, n_in, n_in, starts[way], sum + 2*(N - starts[way]));
            }
#ifdef SEQKV_WIDE
            else if (way == 2 && __builtin_cpu_supports("avx2"))       { ++ways; products_avx2(w, x, n_in, n_in, N, sum); }
            else if (way == 3 && __builtin_cpu_supports("avx512vnni")) { ++ways; products_vnni(w, x, n_in, n_in, N, sum); }
#endif
            else { continue; }
            if (memcmp(plain, sum, sizeof(sum))) {
                printf("way %d differs for %d inputs\n", way, n_in);
                return 1;
            }
        }
    }
    printf("%d\n", ways);
    return 0;
}
