// Decoding of LANES = 8 blocks with AVX2, one lane each: code_blocks() for these, with the same result. Part of delta.c.

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i clip8(__m256i x, int low, int high) {
    return _mm256_min_epi32(_mm256_max_epi32(x, _mm256_set1_epi32(low)), _mm256_set1_epi32(high));
}

AVX2 static inline __m256i look_up8(const void * table, __m256i at) {
    return _mm256_i32gather_epi32((const int *) table, at, 4);
}

// s*e >> 16, unsigned, below 2^32
AVX2 static inline __m256i scale8(__m256i s, __m256i e) {
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(s, e), 16);
    const __m256i odd  = _mm256_srli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(s, 32), _mm256_srli_epi64(e, 32)), 16);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

// table[at] of 8 or 16 entries that are held in registers: a fifth of a gather's latency, which is what a value waits for
AVX2 static inline __m256i permute8(__m256i low, __m256i high, __m256i at) {
    const __m256i above = _mm256_slli_epi32(at, 28); // bit 3 on top
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_permutevar8x32_epi32(low, at)),
                                                _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(high, at)), _mm256_castsi256_ps(above)));
}

// seqkv_place() + 512
AVX2 static inline __m256i place8(__m256i a, __m256i b, __m256i edge) {
    const __m256i u = _mm256_srai_epi32(_mm256_sub_epi32(_mm256_mullo_epi32(a, edge), b), 12);
    return _mm256_add_epi32(clip8(u, -512, 511), _mm256_set1_epi32(512));
}

// The same near the end of the stream, word by word.
AVX2 static __m256i refill_end(seqkv_reader * r, __m256i state, int refill) {
    uint32_t x[8];
    _mm256_storeu_si256((__m256i *) x, state);
    for (; refill; refill &= refill - 1) {
        const int j = __builtin_ctz((unsigned) refill);
        uint32_t word = 0;
        if (r->end - r->in >= 2) {
            word = seqkv_word(r->in);
            r->in += 2;
        } else {
            r->error = 1;
        }
        x[j] = x[j] << 16 | word;
    }
    return _mm256_loadu_si256((const __m256i *) x);
}

AVX2 static void decode_blocks_avx2(coder * c, lane * s, int bits, int graded) {
    int32_t  mean[SEQKV_BLOCK][8], spread[SEQKV_BLOCK][8], codes[SEQKV_BLOCK][8];
    uint32_t x[8];
    int32_t  gain[8], shift[8];
    seqkv_reader * r = &c->r;
    for (int j = 0; j < 8; ++j) {
        x[j]     = r->x[(r->turn + (uint32_t) j) % SEQKV_RANS_STATES];
        shift[j] = s[j].shift;
        for (int i = 0; i < SEQKV_BLOCK; ++i) {
            mean[i][j]   = s[j].mean[i];
            spread[i][j] = 3*(s[j].spread[i] - 128);
        }
    }
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1), add = _mm256_loadu_si256((const __m256i *) shift);
    __m256i state = _mm256_loadu_si256((const __m256i *) x), sum = _mm256_set1_epi32(384), path = zero, log_gain = zero;
    __m256i edge[2] = { zero, zero }, level[2] = { zero, zero }; // tables of B <= 3, by parity and in halves
    for (int i = 0; i < SEQKV_BLOCK; ++i) {
        const int q = i/16, B = seqkv_value_bits(bits, graded, q);
        if (B == 0) {
            _mm256_storeu_si256((__m256i *) codes[i], zero);
            continue;
        }
        if (i == 0 || (graded && (i == 16 || i == 32))) { // a group begins
            for (int j = 0; j < 8; ++j) {
                gain[j] = seqkv_log_gain(graded, s[j].gains[q], s[j].unit);
            }
            log_gain = _mm256_loadu_si256((const __m256i *) gain);
            path     = zero;
        }
        if (i % 16 == 0) {
            for (int h = 0; h < 2; ++h) {
                edge[h]  = _mm256_loadu_si256((const __m256i *) c->edge[B][h]);
                level[h] = _mm256_loadu_si256((const __m256i *) (c->level[B] + 8*h));
            }
        }
        __m256i log_spread = _mm256_add_epi32(_mm256_loadu_si256((const __m256i *) spread[i]), _mm256_srai_epi32(log_gain, 1)); // even
        log_spread = _mm256_add_epi32(log_spread, _mm256_add_epi32(add, look_up8(seqkv_log_sum, _mm256_srli_epi32(sum, 3))));
        log_spread = clip8(_mm256_sub_epi32(log_spread, _mm256_set1_epi32(seqkv_log_count[i])), -288, 288);
        const __m256i ratio = clip8(_mm256_sub_epi32(log_gain, log_spread), -144, 384), base = _mm256_set1_epi32(288);
        const __m256i a = scale8(_mm256_set1_epi32(seqkv_scale17[B]), look_up8(seqkv_exp2_table, _mm256_add_epi32(ratio, base)));
        const __m256i inverse = _mm256_srli_epi32(look_up8(seqkv_exp2_table, _mm256_sub_epi32(base, log_spread)), 5);
        const __m256i b = _mm256_mullo_epi32(_mm256_loadu_si256((const __m256i *) mean[i]), inverse);

        const __m256i slot = _mm256_and_si256(state, _mm256_set1_epi32((1 << SEQKV_RANS_BITS) - 1));
        const __m256i parity = _mm256_and_si256(_mm256_srli_epi32(path, 1), one), row = _mm256_slli_epi32(parity, B <= 3 ? 3 : 6);
        __m256i low = zero, high = _mm256_set1_epi32(1 << SEQKV_RANS_BITS), sym = zero;
        for (int step = 1 << B >> 1; step; step >>= 1) {
            const __m256i next = _mm256_add_epi32(sym, _mm256_set1_epi32(step));
            const __m256i e    = _mm256_add_epi32(row, next);
            const __m256i at   = place8(a, b, B <= 3 ? permute8(edge[0], edge[1], e) : look_up8(c->edge[B][0], e));
            const __m256i cum  = _mm256_add_epi32(look_up8(seqkv_cdf, at), next);
            const __m256i down = _mm256_cmpgt_epi32(cum, slot);
            low  = _mm256_blendv_epi8(cum, low, down);
            high = _mm256_blendv_epi8(high, cum, down);
            sym  = _mm256_blendv_epi8(next, sym, down);
        }
        state = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_sub_epi32(high, low), _mm256_srli_epi32(state, SEQKV_RANS_BITS)),
                                 _mm256_sub_epi32(slot, low));
        const __m256i empty = _mm256_cmpeq_epi32(_mm256_srli_epi32(state, 16), zero);
        const int refill = _mm256_movemask_ps(_mm256_castsi256_ps(empty));
        if (r->end - r->in >= 16) { // the k-th empty state takes the k-th of the next words: byte j of the product counts those before lane j
            const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) r->in));
            const uint64_t ones = seqkv_spread((uint8_t) refill), before = ones*0x0101010101010101u << 8;
            const __m256i mine = _mm256_permutevar8x32_epi32(words, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) before)));
            state  = _mm256_blendv_epi8(state, _mm256_or_si256(_mm256_slli_epi32(state, 16), mine), empty);
            r->in += ones*0x0202020202020202u >> 56;
        } else if (refill) {
            state = refill_end(r, state, refill);
        }

        const __m256i l = _mm256_add_epi32(_mm256_slli_epi32(sym, 1), parity);
        const __m256i u = _mm256_and_si256(_mm256_xor_si256(sym, _mm256_xor_si256(path, _mm256_srli_epi32(path, 2))), one);
        path = _mm256_and_si256(_mm256_or_si256(_mm256_slli_epi32(path, 1), u), _mm256_set1_epi32(7));
        _mm256_storeu_si256((__m256i *) codes[i], _mm256_or_si256(_mm256_slli_epi32(_mm256_srli_epi32(sym, 1), 1), u));
        const __m256i value = B <= 3 ? permute8(level[0], level[1], l) : look_up8(c->level[B], l);
        const __m256i far = _mm256_abs_epi32(_mm256_sub_epi32(place8(a, b, value), _mm256_set1_epi32(512)));
        sum = _mm256_add_epi32(sum, _mm256_min_epi32(far, _mm256_set1_epi32(192)));
        r->turn += 8;
    }
    _mm256_storeu_si256((__m256i *) x, state);
    for (int j = 0; j < 8; ++j) {
        r->x[(r->turn + (uint32_t) j) % SEQKV_RANS_STATES] = x[j];
        for (int i = 0; i < SEQKV_BLOCK; ++i) {
            s[j].codes[i] = (uint16_t) codes[i][j];
        }
    }
}
