#include "seqkv.h"
#include "entropy.h"

// Weights are coded with the frequencies of their values: lowest value, number of values - 1, a 16-bit frequency for each value
// between (0: none such), then the symbols.

int64_t seqkv_weights_bound(int64_t n) {
    return n <= 0 || n > INT64_MAX/8 ? SEQKV_ELENGTH : 2 + 2*256 + seqkv_writer_bound(n);
}

int64_t seqkv_weights_encode(const int8_t * w, int64_t n, uint8_t * dst, int64_t n_dst, uint32_t * work) {
    int64_t count[256] = { 0 };
    if (n <= 0) {
        return SEQKV_ELENGTH;
    }
    for (int64_t i = 0; i < n; ++i) {
        ++count[w[i] + 128];
    }
    int low = 0, high = 255;
    while (!count[low])  { ++low; }
    while (!count[high]) { --high; }
    if (low == high) { // an alphabet has two symbols at least
        high += high < 255;
        low  -= low == high;
    }
    // at least 1 for each value between, the rest in proportion; what rounding leaves goes to the most frequent
    uint32_t freq[256], cum[256], left = (1u << SEQKV_RANS_BITS) - (uint32_t) (high - low + 1), sum = 0;
    int most = low;
    for (int k = low; k <= high; ++k) {
        freq[k] = 1 + (uint32_t) ((double) count[k]/(double) n*left);
        sum += freq[k];
        most = count[k] > count[most] ? k : most;
    }
    freq[most] += (1u << SEQKV_RANS_BITS) - sum;
    const int64_t head = 2 + 2*(high - low + 1);
    if (n_dst < head) {
        return SEQKV_ELENGTH;
    }
    dst[0] = (uint8_t) low;
    dst[1] = (uint8_t) (high - low);
    sum = 0;
    for (int k = low; k <= high; ++k) {
        dst[2 + 2*(k - low)] = (uint8_t) freq[k];
        dst[3 + 2*(k - low)] = (uint8_t) (freq[k] >> 8);
        cum[k] = sum;
        sum += freq[k];
    }
    seqkv_writer out = { work, 0 };
    for (int64_t i = 0; i < n; ++i) {
        seqkv_put(&out, cum[w[i] + 128], freq[w[i] + 128]);
    }
    const int64_t size = seqkv_flush(&out, dst + head, n_dst - head);
    return size < 0 ? SEQKV_ELENGTH : head + size;
}

int64_t seqkv_weights_decode(const uint8_t * src, int64_t n_src, int8_t * w, int64_t n) {
    if (n <= 0) {
        return SEQKV_ELENGTH;
    }
    if (n_src < 2 || n_src < 2 + 2*(src[1] + 1) || src[0] + src[1] > 255) {
        return SEQKV_EDATA;
    }
    const int low = src[0], values = src[1] + 1;
    uint32_t freq[256], cum[256], sum = 0;
    uint8_t  symbol[1 << SEQKV_RANS_BITS]; // of each position
    for (int k = 0; k < values; ++k) {
        freq[k] = seqkv_word(src + 2 + 2*k);
        cum[k]  = sum;
        sum    += freq[k];
        if (sum > 1u << SEQKV_RANS_BITS) {
            return SEQKV_EDATA;
        }
        memset(symbol + cum[k], k, freq[k]);
    }
    seqkv_reader in;
    if (sum != 1u << SEQKV_RANS_BITS || !seqkv_reader_init(&in, src + 2 + 2*values, n_src - 2 - 2*values)) {
        return SEQKV_EDATA;
    }
    for (int64_t i = 0; i < n; ++i) {
        const int k = symbol[seqkv_peek(&in)];
        w[i] = (int8_t) (low + k - 128);
        seqkv_take(&in, cum[k], freq[k]);
    }
    return seqkv_reader_done(&in) ? n_src : SEQKV_EDATA;
}
