// Fuzz target of the token coder: any ids survive, any bytes decode to ids without a fault.
//
//   cc -g -O1 -fsanitize=address,undefined -fno-sanitize-recover -Inative tests/fuzz/tokens.c native/tokens.c -o fuzz-tokens && ./fuzz-tokens 60
//   clang -g -O1 -fsanitize=fuzzer,address,undefined -DLIBFUZZER -Inative tests/fuzz/tokens.c native/tokens.c
#include "seqkv.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void check(int ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "fuzz-tokens: %s\n", what);
        abort();
    }
}

// byte 0: bits of an id, byte 1: kind; the rest as ids (round trip) or as coded bytes
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 2) {
        return 0;
    }
    const int n_bits = data[0] % 34; // 0 and 33 are refused
    const uint8_t * body = data + 2;
    const int64_t n_body = (int64_t) size - 2;
    const int64_t n = data[1] & 1 ? n_body/4 : (data[1] >> 1)*(data[1] & 2 ? 40 : 1);
    const int64_t n_work = seqkv_tokens_work(n, n_bits);
    if (n_bits < 1 || n_bits > 32) {
        check(n_work == SEQKV_ELENGTH && seqkv_tokens_bound(n, n_bits) == SEQKV_ELENGTH, "an impossible id is not refused");
        return 0;
    }
    void     * work = malloc((size_t) n_work);
    uint32_t * ids  = malloc(4*(size_t) n + 4);
    check(seqkv_tokens_decode(body, n_body, n_bits, work, n_work - 1, ids, n) == SEQKV_ELENGTH, "too little memory is not noticed");
    check(seqkv_tokens_decode(body, n_body, n_bits, work, n_work, ids, n) == n, "bytes are not decoded");
    for (int64_t i = 0; i < n && n_bits < 32; ++i) {
        check(ids[i] >> n_bits == 0, "an id has too many bits");
    }
    if (data[1] & 1) {
        for (int64_t i = 0; i < n; ++i) {
            memcpy(&ids[i], body + 4*i, 4);
            ids[i] &= n_bits < 32 ? (1u << n_bits) - 1 : ~0u;
        }
    }
    const int64_t bound = seqkv_tokens_bound(n, n_bits);
    uint8_t  * coded = malloc((size_t) bound);
    uint32_t * back  = malloc(4*(size_t) n + 4);
    const int64_t n_coded = seqkv_tokens_encode(ids, n, n_bits, work, n_work, coded, bound);
    check(n_coded >= 0 && n_coded <= bound, "ids are not encoded within the bound");
    uint8_t * exact = malloc((size_t) n_coded + 1); // so that a read behind the end is seen
    memcpy(exact, coded, (size_t) n_coded);
    check(seqkv_tokens_decode(exact, n_coded, n_bits, work, n_work, back, n) == n, "coded ids are not decoded");
    check(n == 0 || memcmp(ids, back, 4*(size_t) n) == 0, "decoded ids are others");
    if (n_coded > 0) {
        check(seqkv_tokens_encode(ids, n, n_bits, work, n_work, coded, n_coded - 1) == SEQKV_ELENGTH, "a full buffer is not noticed");
    }
    free(exact);
    free(back);
    free(coded);
    free(ids);
    free(work);
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char ** argv) {
    const double seconds = argc > 1 ? atof(argv[1]) : 10;
    uint64_t s = 0x9E3779B97F4A7C15u, n_runs = 0;
    uint8_t data[2048];
    const clock_t end = clock() + (clock_t) (seconds*CLOCKS_PER_SEC);
    while (clock() < end) {
        s ^= s << 13; s ^= s >> 7; s ^= s << 17;
        const size_t size = s % sizeof(data);
        const int repeats = s >> 20 & 3; // bytes of few values, or a period, or noise
        for (size_t i = 0; i < size; ++i) {
            s ^= s << 13; s ^= s >> 7; s ^= s << 17;
            data[i] = repeats == 0 ? (uint8_t) s : repeats == 1 ? (uint8_t) (s % 3) : repeats == 2 ? 0xff : i > 64 ? data[i - 60] : (uint8_t) s;
        }
        if (size >= 2) {
            data[0] = (uint8_t) (s >> 40);
            data[1] = (uint8_t) (s >> 48);
        }
        LLVMFuzzerTestOneInput(data, size);
        n_runs++;
    }
    printf("%llu inputs\n", (unsigned long long) n_runs);
    return 0;
}
#endif
