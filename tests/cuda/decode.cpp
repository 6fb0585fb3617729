// decode_kernel on the emulated machine against sums in double, from the same cells, digits of queries (or the queries themselves, where it makes these) and
// predictions, and the exact rows' part of it.
// Arguments: orders of cells to try.
#include "seqkv-decode-kernels.cuh"

#include <array>

extern "C" void ggml_abort(const char *, int, const char * text, ...) { fail(text); }

enum order { IN_ORDER, SHIFTED, SCRAMBLED, GAPS }; // GAPS: tiles that nobody attends to, the first one too

struct shape {
    int n_head_kv, group, n_tokens, n_kv, n_stream;
    int smem;    // bytes a block may have
    int n_parts; // at most
    int pad;     // bytes behind a row of cells
    float softcap;
    int n_rot;   // values that are turned, where the kernel makes the queries; less than 0: neox
};
static constexpr int H100 = 228*1024, SMALL = 99*1024;

static uint32_t word() { return (uint32_t) rand() << 20 ^ (uint32_t) rand() << 9 ^ rand(); }
template <class T> static T * aligned(std::vector<T> & x) { return (T *) (((uintptr_t) x.data() + 15) & ~(uintptr_t) 15); }

// the first n parts of a query row, combined, against sums in double: want over sum
template <int D> static void add_difference(const seqkv_parts & parts, int64_t row, int n, const std::vector<double> & want, double sum, double & error, double & norm) {
    const float2 * ml  = parts.ml  + row*parts.n_parts;
    const float  * acc = parts.acc + row*parts.n_parts*D;
    std::vector<double> got(D);
    double max = -INFINITY, sum_got = 0;
    for (int c = 0; c < n; ++c) {
        max = std::max(max, (double) ml[c].x);
    }
    for (int c = 0; c < n; ++c) {
        const double w = ml[c].x == -INFINITY ? 0.0 : exp(ml[c].x - max);
        sum_got += w*ml[c].y;
        for (int i = 0; i < D; ++i) {
            got[i] += w*acc[c*D + i];
        }
    }
    if ((sum == 0) != (sum_got == 0)) {
        fail("sums of what nobody attends to");
    }
    for (int i = 0; sum > 0 && i < D; ++i) {
        error += (got[i]/sum_got - want[i]/sum)*(got[i]/sum_got - want[i]/sum);
        norm  += want[i]/sum*want[i]/sum;
    }
}

template <int D, int NT, int KIND, bool MAKES = false> static void check(order cells, bool dense, const shape & x) {
    constexpr int NB = D/64, BITS = KIND ? KIND/2 : 3, GRADED = KIND ? KIND%2 : 1, BLOCK_K = 1 + GRADED + 8*BITS, BLOCK_V = 1 + 8*BITS;
    const int kv_size = x.n_kv + 64, n_frames = kv_size/SEQKV_FRAME + 3, nq = x.n_tokens*x.group, n_chunks = (nq + 4*NT - 1)/(4*NT);
    seqkv_view a = {};
    a.p.dk = a.p.dv = D;
    a.p.n_rot     = abs(x.n_rot);
    a.p.neox      = x.n_rot < 0;
    a.p.n_head_kv = x.n_head_kv;
    a.p.n_kv      = x.n_kv;
    a.p.n_win     = MAKES ? 37 : 4;
    a.p.scale     = MAKES ? 0.02f : 0.05f;
    a.p.softcap   = x.softcap;
    a.n_virt      = x.n_kv + a.p.n_win + x.n_tokens;
    a.n_tokens    = x.n_tokens;
    a.n_stream    = x.n_stream;
    a.group       = x.group;
    a.n_head      = x.group*x.n_head_kv;
    a.inv_group   = (65536 + x.group - 1)/x.group;
    a.bits_k      = a.bits_v = BITS;
    a.graded_k    = GRADED;
    a.form_k      = dense ? SEQKV_DENSE : SEQKV_HADAMARD;
    a.form_v      = SEQKV_HADAMARD;
    a.size_k      = NB*BLOCK_K;
    a.size_v      = NB*BLOCK_V;
    a.k_nb1       = a.size_k*x.n_head_kv + x.pad;
    a.v_nb1       = a.size_v*x.n_head_kv + x.pad;
    a.k_nb2       = a.k_nb1*kv_size;
    a.v_nb2       = a.v_nb1*kv_size;

    std::vector<char> k(a.k_nb2*x.n_stream + 32), v(a.v_nb2*x.n_stream + 32);
    std::generate(k.begin(), k.end(), word);
    std::generate(v.begin(), v.end(), word);
    char * k0 = aligned(k), * v0 = aligned(v);
    a.k = k0;
    a.v = v0;
    const auto end = [&](int64_t nb2) { return (nb2*x.n_stream + 15)/16*16; }; // tensors end at multiples of 16 bytes, and more
    readable = { { k0, k0 + end(a.k_nb2) }, { v0, v0 + end(a.v_nb2) } };
    std::vector<int32_t> meta((size_t) a.n_virt*x.n_stream);
    a.mask_nb1 = (a.n_virt + 255)/256*256*sizeof(half);
    a.mask_nb3 = a.mask_nb1*x.n_tokens;
    std::vector<half> mask(a.mask_nb3*x.n_stream/sizeof(half));
    for (int s = 0; s < x.n_stream; ++s) {
        for (int j = 0; j < kv_size; ++j) {
            for (int b = 0; b < NB*x.n_head_kv; ++b) { // gains that leave numbers in range
                char * key = k0 + s*a.k_nb2 + j*a.k_nb1 + b*BLOCK_K, * value = v0 + s*a.v_nb2 + j*a.v_nb1 + b*BLOCK_V;
                if (GRADED) {
                    const int gains = (14 + rand()%5) | (14 + rand()%5) << 5 | (14 + rand()%5) << 10;
                    key[0] = (char) gains;
                    key[1] = (char) (gains >> 8);
                } else {
                    key[0] = (char) (SEQKV_GAIN_BIAS - 8 + rand()%10);
                }
                value[0] = rand()%20 == 0 ? 0 : (char) (SEQKV_GAIN_BIAS - 8 + rand()%16);
            }
        }
        for (int j = 0; j < a.n_virt; ++j) {
            const int at = cells == SHIFTED ? j + 13 : j;
            int32_t & m = meta[s*a.n_virt + j];
            m = cells == SCRAMBLED || cells == GAPS ? (SEQKV_FRAME + rand()%3) << 8 | rand()%SEQKV_FRAME : (SEQKV_FRAME + at/SEQKV_FRAME) << 8 | at%SEQKV_FRAME;
            if ((cells == GAPS && (j/TILE%3 == 1 || j < TILE)) || (cells != IN_ORDER && rand()%9 == 0)) {
                m = -1;
            }
            for (int t = 0; t < x.n_tokens; ++t) {
                mask[(s*a.mask_nb3 + t*a.mask_nb1)/sizeof(half) + j] = cells != IN_ORDER && rand()%4 == 0 ? (half) -INFINITY : (half) 0.0f;
            }
        }
    }
    a.meta = meta.data();
    a.mask = (const char *) mask.data();

    // queries, rotations and exact rows, where the kernel makes what it needs of them
    const int n_exact = MAKES ? (a.p.n_win + x.n_tokens + EXACT - 1)/EXACT : 0, width = 2*D*x.n_head_kv;
    std::vector<float> q, rot;
    std::vector<half>  win, cur;
    if constexpr (MAKES) {
        const auto random = [] { return (rand()%2001 - 1000)/700.0f; };
        q.resize((size_t) x.n_stream*a.n_head*D + 4);
        rot.resize((size_t) (SEQKV_FRAME + n_frames)*a.p.n_rot + 4);
        win.resize((size_t) x.n_stream*a.p.n_win*width + 8);
        cur.resize((size_t) x.n_stream*width + 8);
        std::generate(q.begin(), q.end(), random);
        std::generate(win.begin(), win.end(), random);
        std::generate(cur.begin(), cur.end(), random);
        for (size_t i = 0; i < rot.size(); i += 2) {
            const double angle = rand();
            aligned(rot)[i]     = (float) cos(angle);
            aligned(rot)[i + 1] = (float) sin(angle);
        }
        a.q       = (const char *) aligned(q);
        a.q_nb1   = D*sizeof(float);
        a.q_nb2   = a.n_head*a.q_nb1;
        a.rot     = { aligned(rot), a.p.n_rot };
        a.win     = (const char *) aligned(win);
        a.win_nb1 = width*sizeof(half);
        a.win_nb2 = a.p.n_win*a.win_nb1;
        a.cur     = aligned(cur);
    }

    frame_queries f;
    f.n_frames = n_frames;
    f.n4       = n_chunks*NT;
    const size_t n = (size_t) x.n_stream*n_frames*x.n_head_kv*f.n4;
    std::vector<uint32_t> digits(n*D*2 + 4);
    std::vector<float2>   scale(n*4);
    std::vector<int16_t>  pred(n*4*SEQKV_FRAME);
    std::generate(digits.begin(), digits.end(), word);
    std::generate(scale.begin(), scale.end(), [] { return float2 { (1 + rand()%100)*3e-7f, (1 + rand()%100)*6e-6f }; });
    std::generate(pred.begin(), pred.end(), [] { return (int16_t) (rand()%65535 - 32767); });
    f.digits = aligned(digits);
    f.scale  = scale.data();
    f.pred   = pred.data();

    size_t smem = 0;
    const block_plan plan = plan_block<D, NT, KIND>(a, x.smem - static_smem(D, NT), smem);
    if (smem + static_smem(D, NT) > (size_t) x.smem || plan.heads*plan.teams > max_warps(D, NT)) {
        fail("a block that does not fit");
    }
    const int n_tiles = (x.n_kv + TILE - 1)/TILE, n_threads = plan.heads*plan.teams*WARP_SIZE;
    seqkv_parts parts;
    parts.n_z      = std::min((n_tiles + plan.teams - 1)/plan.teams, x.n_parts);
    parts.n_parts  = parts.n_z + std::max(n_exact, 1); // otherwise exact rows are none of this kernel's
    parts.permuted = 1;
    std::vector<float2> ml((size_t) x.n_stream*x.n_tokens*a.n_head*parts.n_parts, { NAN, NAN });
    std::vector<float>  acc(ml.size()*D, NAN);
    parts.ml  = ml.data();
    parts.acc = acc.data();
    for (unsigned z = 0; z < (unsigned) x.n_stream*n_chunks; ++z) {
        for (unsigned y = 0; y < (unsigned) x.n_head_kv/plan.heads; ++y) {
            for (unsigned part = 0; part < (unsigned) parts.n_z; ++part) {
                run_block(n_threads, { part, y, z }, [&] {
                    decode_kernel<D, NT, KIND, MAKES>(a, f, parts, plan, block_tiles { n_tiles/parts.n_z, n_tiles%parts.n_z }, n_chunks, part%2 == 0);
                });
            }
        }
    }

    if constexpr (MAKES) { // exact rows: what check_exact has checked
        std::vector<float2> ml1(ml.size(), { NAN, NAN });
        std::vector<float>  acc1(acc.size(), NAN);
        seqkv_parts apart = parts;
        apart.ml  = ml1.data();
        apart.acc = acc1.data();
        for (int s = 0; s < x.n_stream; ++s) {
            for (int h = 0; h < x.n_head_kv; ++h) {
                for (int part = 0; part < n_exact; ++part) {
                    run_block(WARP_SIZE, { 0, 0, 0 }, [&] { exact_part<D>(a, apart, s, h, 0, nq, x.n_kv + part*EXACT, parts.n_z + part, true); });
                }
            }
        }
        for (size_t row = 0; row < ml.size()/parts.n_parts; ++row) {
            const size_t at = row*parts.n_parts + parts.n_z;
            if (memcmp(&ml[at], &ml1[at], n_exact*sizeof(float2)) || memcmp(&acc[at*D], &acc1[at*D], n_exact*D*sizeof(float))) {
                fail("other parts of exact rows");
            }
        }
    }
    std::map<std::array<int, 3>, std::vector<double>> turned; // (stream, head, origin) -> H R(-t0) q, in the order of dims
    const auto made_query = [&](int s, int head, int origin) -> const std::vector<double> & {
        std::vector<double> & z = turned[{ s, head, origin }];
        if (z.empty()) {
            const float * from = a.query(s, 0, head), * cs = a.rot.base + origin*a.rot.stride;
            z.assign(from, from + D);
            for (int pair = 0; pair < a.p.n_rot/2; ++pair) {
                double & u = z[a.p.neox ? pair : 2*pair], & v = z[a.p.neox ? pair + a.p.n_rot/2 : 2*pair + 1];
                const double u0 = u;
                u = u*cs[2*pair] + v*cs[2*pair + 1];
                v = v*cs[2*pair] - u0*cs[2*pair + 1];
            }
            for (int m = 1; m < D; m *= 2) {
                for (int i = 0; i < D; ++i) {
                    if (!(i & m)) {
                        const double u = z[i], v = z[i | m];
                        z[i]     = (u + v)*sqrt(0.5);
                        z[i | m] = (u - v)*sqrt(0.5);
                    }
                }
            }
        }
        return z;
    };

    double error = 0, norm = 0;
    for (int64_t row = 0; row < (int64_t) x.n_stream*x.n_tokens*a.n_head; ++row) {
        const int s = row/(x.n_tokens*a.n_head), t = row/a.n_head%x.n_tokens, head = row%a.n_head, h = head/x.group, iq = t*x.group + head%x.group;
        std::vector<double> logit(x.n_kv, -INFINITY), want(D);
        double max = -INFINITY, sum = 0;
        for (int j = 0; j < x.n_kv; ++j) {
            const int32_t m = meta[s*a.n_virt + j];
            if (m < 0 || mask[(s*a.mask_nb3 + t*a.mask_nb1)/sizeof(half) + j] != (half) 0.0f) {
                continue;
            }
            const size_t index = ((size_t) s*n_frames + (m >> 8) - SEQKV_FRAME)*x.n_head_kv + h;
            double dot = 0;
            for (int b = 0; b < NB; ++b) {
                uint32_t raw[20] = { 0 }, level[16];
                float    factor[3];
                memcpy(raw, a.cell_k(s, j, h) + b*BLOCK_K, BLOCK_K);
                decode_block<BITS, GRADED, false>(raw, 0, nullptr, level, factor);
                for (int i = 0; i < 64; ++i) { // word i/4%4 of run i/16
                    if constexpr (MAKES) {
                        dot += (double) factor[0]*(int8_t) (level[i/4] >> 8*(i%4))*made_query(s, head, m >> 8)[64*b + i/16*16 + i%4*4 + i/4%4];
                        continue;
                    }
                    const uint32_t * from = f.digits + index*f.n4*D*2 + ((iq/4*NB + b)*WARP_SIZE + 8*(iq%4) + i/4%4)*4 + i/16;
                    const int upper = (int8_t) (from[0] >> 8*(i%4)), lower = (int8_t) (from[16] >> 8*(i%4));
                    dot += (double) factor[std::min(i/16, 2)]*(int8_t) (level[i/4] >> 8*(i%4))*(256*upper + lower);
                }
            }
            const float2 factor = MAKES ? float2 { 1.0f, 0.0f } : scale[index*4*f.n4 + iq];
            logit[j] = a.p.scale*(dot*factor.x + (dense ? (double) factor.y*pred[(index*4*f.n4 + iq)*SEQKV_FRAME + pred_place(m & 63)] : 0.0));
            logit[j] = x.softcap ? x.softcap*tanh(logit[j]/x.softcap) : logit[j];
            max = std::max(max, logit[j]);
        }
        for (int j = 0; j < x.n_kv; ++j) {
            if (logit[j] == -INFINITY) {
                continue;
            }
            const double p = exp(logit[j] - max);
            sum += p;
            for (int b = 0; b < NB; ++b) {
                uint32_t raw[20] = { 0 }, level[16];
                float    factor[3];
                memcpy(raw, a.cell_v(s, j, h) + b*BLOCK_V, BLOCK_V);
                decode_block<BITS, 0, false>(raw, 0, nullptr, level, factor);
                for (int i = 0; i < 64; ++i) {
                    want[64*b + i] += p*factor[0]*(int8_t) (level[i/4] >> 8*(i%4));
                }
            }
        }
        add_difference<D>(parts, row, parts.n_z, want, sum, error, norm);
    }
    printf("%shead_dim %d, %d tiles of queries, kind %d, %d KV heads, group %d, %d tokens, %d cells, order %d: block of %d heads x %d teams, whole %d %d: NMSE %.2g\n", MAKES ? "queries made, " : "", D, NT, KIND,
        x.n_head_kv, x.group, x.n_tokens, x.n_kv, cells, plan.heads, plan.teams, plan.whole_k, plan.whole_v, error/norm);
    if (!(error <= 1e-7*norm)) {
        fail("other sums");
    }
}

// exact rows of the window, and those of the ubatch, which are made from its keys and values
template <int D> static void check_exact(int n_head_kv, int group, int n_tokens, int n_stream, int n_rot, bool neox, float softcap) {
    seqkv_view a = {};
    a.p.dk = a.p.dv = D;
    a.p.n_rot     = n_rot;
    a.p.neox      = neox;
    a.p.n_head_kv = n_head_kv;
    a.p.n_kv      = 64;
    a.p.n_win     = 6;
    a.p.scale     = 0.1f;
    a.p.softcap   = softcap;
    a.n_virt      = a.p.n_kv + a.p.n_win + n_tokens;
    a.n_tokens    = n_tokens;
    a.n_stream    = n_stream;
    a.group       = group;
    a.n_head      = group*n_head_kv;
    a.inv_group   = (65536 + group - 1)/group;
    const auto random = [](float) { return (rand()%2001 - 1000)/700.0f; };
    const int  n_exact = a.p.n_win + n_tokens, width = 2*D*n_head_kv, n_origins = 3;
    std::vector<float> q((size_t) n_stream*n_tokens*a.n_head*D), k((size_t) n_stream*n_tokens*n_head_kv*D), v(k.size()), rot((size_t) (SEQKV_FRAME + n_origins)*n_rot);
    std::vector<half>  win((size_t) n_stream*a.p.n_win*width), cur((size_t) n_stream*n_tokens*width + 8), mask((size_t) n_stream*n_tokens*256);
    std::vector<int32_t> meta((size_t) n_stream*a.n_virt);
    std::transform(q.begin(), q.end(), q.begin(), random);
    std::transform(k.begin(), k.end(), k.begin(), random);
    std::transform(v.begin(), v.end(), v.begin(), random);
    std::transform(win.begin(), win.end(), win.begin(), random);
    for (size_t i = 0; i < rot.size(); i += 2) {
        const double angle = rand();
        rot[i]     = (float) cos(angle);
        rot[i + 1] = (float) sin(angle);
    }
    for (int j = 0; j < (int) meta.size(); ++j) {
        meta[j] = j%a.n_virt < a.p.n_kv + a.p.n_win && rand()%5 == 0 ? -1 : (SEQKV_FRAME + rand()%n_origins) << 8 | rand()%SEQKV_FRAME;
    }
    std::generate(mask.begin(), mask.end(), [] { return rand()%4 ? (half) 0.0f : (half) -INFINITY; });
    a.q     = (const char *) q.data();
    a.q_nb1 = D*sizeof(float);
    a.q_nb2 = a.n_head*a.q_nb1;
    a.k_new = (const char *) k.data();
    a.v_new = (const char *) v.data();
    a.k_new_nb1 = a.v_new_nb1 = D*sizeof(float);
    a.k_new_nb2 = a.v_new_nb2 = n_head_kv*a.k_new_nb1;
    a.win      = (const char *) win.data();
    a.win_nb1  = width*sizeof(half);
    a.win_nb2  = a.p.n_win*a.win_nb1;
    a.cur      = aligned(cur);
    a.rot      = { rot.data(), n_rot };
    a.meta     = meta.data();
    a.mask     = (const char *) mask.data();
    a.mask_nb1 = 256*sizeof(half);
    a.mask_nb3 = n_tokens*a.mask_nb1;

    seqkv_parts parts;
    parts.n_z      = 0;
    parts.n_parts  = (n_exact + EXACT - 1)/EXACT;
    parts.permuted = 0;
    std::vector<float2> ml((size_t) n_stream*n_tokens*a.n_head*parts.n_parts, { NAN, NAN });
    std::vector<float>  acc(ml.size()*D, NAN);
    parts.ml  = ml.data();
    parts.acc = acc.data();
    for (int s = 0; s < n_stream; ++s) {
        for (int h = 0; h < n_head_kv; ++h) {
            for (int part = 0; part < parts.n_parts; ++part) {
                run_block(WARP_SIZE, { 0, 0, 0 }, [&] { exact_part<D>(a, parts, s, h, 0, n_tokens*group, a.p.n_kv + part*EXACT, part, true); });
            }
        }
    }

    // value i of a row turned by an origin, forwards or back
    const auto turned = [&](const auto * row, int i, int origin, double sign) {
        const int  half_rot = n_rot/2, pair = neox ? i%half_rot : i/2;
        const bool second = neox ? i >= half_rot : i%2;
        if (i >= n_rot) {
            return (double) row[i];
        }
        const int other = neox ? (second ? i - half_rot : i + half_rot) : i ^ 1;
        return rot[(size_t) origin*n_rot + 2*pair]*(double) row[i] + (second ? sign : -sign)*rot[(size_t) origin*n_rot + 2*pair + 1]*(double) row[other];
    };
    double error = 0, norm = 0;
    for (int64_t row = 0; row < (int64_t) n_stream*n_tokens*a.n_head; ++row) {
        const int s = row/(n_tokens*a.n_head), t = row/a.n_head%n_tokens, head = row%a.n_head, h = head/group;
        std::vector<double> want(D);
        double sum = 0;
        for (int j = a.p.n_kv; j < a.n_virt; ++j) {
            const int32_t m = meta[s*a.n_virt + j];
            const half * exact = a.exact(s, j) + h*D;
            if (j >= a.p.n_kv + a.p.n_win) { // what FRAME would have made of it
                const size_t token = (size_t) s*n_tokens + j - a.p.n_kv - a.p.n_win;
                for (int i = 0; i < D; ++i) {
                    const double x = turned(&k[(token*n_head_kv + h)*D], i, m >> 8, -1.0);
                    if (fabs((double) exact[i] - x) > 6e-4*fabs(x) + 1e-6 || exact[n_head_kv*D + i] != (half) v[(token*n_head_kv + h)*D + i]) {
                        fail("another frame row");
                    }
                }
            }
            if (m < 0 || mask[(s*n_tokens + t)*256 + j] != (half) 0.0f) {
                continue;
            }
            double dot = 0;
            for (int i = 0; i < D; ++i) {
                dot += q[row*D + i]*turned(exact, i, m >> 8, 1.0);
            }
            const double logit = softcap ? softcap*tanh(a.p.scale*dot/softcap) : a.p.scale*dot, p = exp(logit);
            sum += p;
            for (int i = 0; i < D; ++i) {
                want[i] += p*(double) exact[n_head_kv*D + i];
            }
        }
        add_difference<D>(parts, row, parts.n_parts, want, sum, error, norm);
    }
    printf("exact rows, head_dim %d, %d KV heads, group %d, %d tokens, %d streams, %d values turned%s: error %.2g\n", D, n_head_kv, group, n_tokens, n_stream, n_rot, neox ? ", neox" : "", error/norm);
    if (!(error <= 1e-10*norm)) {
        fail("other sums of exact rows");
    }
}

int main(int argc, char ** argv) {
    check_exact< 64>(2, 4, 1, 2, 64,  false, 0.0f);
    check_exact< 64>(1, 3, 5, 1, 32,  true,  0.0f);
    check_exact<128>(2, 4, 1, 1, 128, true,  0.0f);
    check_exact<128>(1, 8, 8, 2, 96,  false, 5.0f);
    check_exact<256>(1, 2, 3, 1, 128, true,  0.0f);
    for (int i = 1; i < argc; ++i) {
        const order cells = (order) atoi(argv[i]);
        //                             heads group tokens cells  streams smem parts pad softcap
        check<128, 1, 6>(cells, false, {  8, 4, 1, 64*9 + 20, 1, H100,  2, 0, 0.0f });
        check<128, 1, 7>(cells, true,  {  8, 4, 1, 64*7,      1, H100,  2, 0, 0.0f });
        check<128, 1, 8>(cells, false, {  8, 2, 2, 64*5 + 1,  1, SMALL, 1, 0, 30.0f });
        check<128, 1, 9>(cells, true,  { 16, 1, 3, 64*4,      1, SMALL, 1, 0, 0.0f });
        check<128, 1, 4>(cells, false, { 32, 4, 1, 64*5,      1, H100,  2, 0, 0.0f });
        check<128, 2, 6>(cells, false, {  8, 8, 1, 64*5,      1, H100,  2, 0, 0.0f });
        check<128, 4, 0>(cells, true,  {  2, 5, 3, 64*5,      1, H100,  1, 0, 0.0f });
        check<128, 1, 6>(cells, false, {  4, 4, 1, 64*5 + 7,  1, H100,  1, 0, 0.0f });
        check< 64, 1, 6>(cells, false, {  8, 4, 1, 64*9 + 33, 2, H100,  2, 0, 0.0f });
        check< 64, 1, 6>(cells, false, {  2, 4, 1, 64*9,      1, H100,  1, 14, 0.0f });
        check< 64, 1, 8>(cells, false, {  5, 4, 1, 64*5,      1, H100,  1, 3, 0.0f });
        check< 64, 2, 5>(cells, true,  {  3, 7, 1, 64*6,      1, H100,  1, 0, 0.0f });
        check<256, 1, 4>(cells, false, {  2, 3, 1, 64*5 + 40, 1, H100,  1, 0, 0.0f });
        check<256, 1, 8>(cells, false, {  4, 4, 1, 64*5,      1, H100,  1, 0, 0.0f });
        check<128, 1, 4, true>(cells, false, {  8, 4, 1, 64*7 + 20, 1, H100,  2, 0, 0.0f, -128 });
        check<128, 1, 6, true>(cells, false, {  8, 3, 1, 64*6,      2, SMALL, 2, 0, 0.0f,   96 });
        check< 64, 1, 8, true>(cells, false, {  5, 4, 1, 64*7,      1, H100,  1, 3, 20.0f, -64 });
        check<256, 1, 6, true>(cells, false, {  2, 4, 1, 64*6 + 9,  1, H100,  2, 0, 0.0f, -256 });
        check<256, 2, 0>(cells, true,  {  1, 3, 2, 64*9,      1, H100,  1, 0, 0.0f });
    }
}
