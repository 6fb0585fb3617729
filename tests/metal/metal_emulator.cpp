// The machine of metal_emulator.h; emulator.py appends kernels and their table.
namespace emu {
machine m;

asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

NO_TRACE static void enter() {
    m.kernel(m);
    block(DONE);
    abort();
}

NO_TRACE static bool ordered(const access & a, int thread) {
    if (!a.set || a.thread == thread) {
        return true;
    }
    const fiber & f = m.fibers[thread];
    return a.thread/SIMD == thread/SIMD ? a.simd_epoch != f.simd_epoch : a.group_epoch != f.group_epoch;
}

NO_TRACE static void touch(uintptr_t p, size_t n, bool write) {
    if (!m.tracing) {
        return;
    }
    const uintptr_t stack = (uintptr_t) m.stacks;
    if (p - stack < STACK*MAX_THREADS) {
        return;
    }
    size_t at;
    if (p >= (uintptr_t) __start_tgmem && p < (uintptr_t) __stop_tgmem) {
        at = p - (uintptr_t) __start_tgmem;
    } else if (p - (uintptr_t) m.group_memory < m.group_bytes) {
        at = p - (uintptr_t) m.group_memory + (__stop_tgmem - __start_tgmem);
        if (p + n > (uintptr_t) m.group_memory + m.group_bytes) {
            return fail("out of range in threadgroup memory");
        }
    } else {
        for (const region & r : m.regions) {
            if (p >= r.begin && p + n <= r.end) {
                (write ? m.count.store_bytes : m.count.load_bytes) += n;
                ++(write ? m.count.stores : m.count.loads);
                if (p%n) {
                    fail("misaligned access of " + std::to_string(n) + " bytes");
                }
                return;
            }
        }
        if (p >= (uintptr_t) __ehdr_start && p < (uintptr_t) _end) {
            return; // constants, and the machine itself
        }
        return fail(std::string(write ? "store" : "load") + " of " + std::to_string(n) + " bytes outside of all buffers");
    }
    const int t = m.current;
    const access now = { (uint16_t) t, 1, m.fibers[t].group_epoch, m.fibers[t].simd_epoch };
    for (size_t i = at; i < at + n; ++i) {
        shadow & s = m.shadows[i];
        if (!ordered(s.write, t) || (write && (!ordered(s.read[0], t) || !ordered(s.read[1], t)))) {
            return fail("threadgroup memory at byte " + std::to_string(i) + " is touched by two threads without a barrier between, one of them writing");
        }
        if (write) {
            s.write = now;
        } else if (s.read[0].thread != t || !s.read[0].set) {
            s.read[1] = s.read[0];
            s.read[0] = now;
        } else {
            s.read[0] = now;
        }
    }
}

NO_TRACE static void run_group(int threads, int schedule) {
    const size_t shared = __stop_tgmem - __start_tgmem;
    memset(__start_tgmem, 0xff, shared);
    memset(m.group_memory, 0xff, m.group_bytes);
    m.shadows.assign(shared + m.group_bytes, shadow{});
    for (int i = 0; i < threads; ++i) {
        void ** sp = (void **) (m.stacks + STACK*(i + 1));
        *--sp = nullptr;
        *--sp = (void *) enter;
        for (int k = 0; k < 6; ++k) {
            *--sp = nullptr;
        }
        m.fibers[i] = { sp, RUN, 0, 0, 0 };
    }
    std::vector<int> order(threads);
    int left = threads;
    while (left > 0 && m.error.empty()) {
        for (int i = 0; i < threads; ++i) {
            order[i] = schedule == 1 ? threads - 1 - i : i;
        }
        for (int i = threads - 1; schedule >= 2 && i > 0; --i) {
            m.random = m.random*6364136223846793005u + 1442695040888963407u;
            std::swap(order[i], order[(m.random >> 33)%(i + 1)]);
        }
        bool ran = false;
        for (int i : order) {
            // a simdgroup runs on as far as it can before another one does
            for (bool again = true; again && m.error.empty();) {
                again = false;
                const int first = i/SIMD*SIMD, last = std::min(first + SIMD, threads);
                for (int k = 0; k < last - first; ++k) {
                    const int j = schedule == 1 ? last - 1 - k : schedule >= 2 ? first + (k*5 + (int) (m.random >> 40)%SIMD)%(last - first) : first + k;
                    if (m.fibers[j].state == RUN && m.error.empty()) {
                        m.current = j;
                        m.tracing = true;
                        emu_switch(&m.scheduler_sp, m.fibers[j].sp);
                        m.tracing = false;
                        left -= m.fibers[j].state == DONE;
                        ran = true;
                    }
                }
                for (wait w : { AT_SIMD, AT_SIMD_BARRIER }) {
                    int n = 0;
                    for (int j = first; j < last; ++j) {
                        n += m.fibers[j].state == w;
                    }
                    if (n == SIMD) {
                        for (int j = first; j < last; ++j) {
                            m.fibers[j].state = RUN;
                            m.fibers[j].simd_epoch += w == AT_SIMD_BARRIER;
                        }
                        again = true;
                    }
                }
            }
        }
        int n = 0;
        for (int i = 0; i < threads; ++i) {
            n += m.fibers[i].state == AT_BARRIER;
        }
        if (n == threads) {
            for (int i = 0; i < threads; ++i) {
                m.fibers[i].state = RUN;
                ++m.fibers[i].group_epoch;
                ++m.fibers[i].simd_epoch;
            }
        } else if (!ran && left > 0 && m.error.empty()) {
            m.error = "a barrier or simd function that not all threads reach, in threadgroup " + std::to_string(m.group.x);
        }
    }
}

struct entry { const char * name; void (*run)(machine &); };
extern const entry kernels[];
}

extern "C" {
NO_TRACE void __sanitizer_cov_trace_pc_guard(uint *) {} // comes with the traces
NO_TRACE void __sanitizer_cov_trace_pc_guard_init(uint *, uint *) {}

#define TRACE(n, T) \
    NO_TRACE void __sanitizer_cov_load##n (T * p) { emu::touch((uintptr_t) p, n, false); } \
    NO_TRACE void __sanitizer_cov_store##n(T * p) { emu::touch((uintptr_t) p, n, true);  }
TRACE(1, uint8_t) TRACE(2, uint16_t) TRACE(4, uint32_t) TRACE(8, uint64_t) TRACE(16, __int128)

// Runs a kernel. buffers: addresses by index; regions: begin and end of n_regions; schedule 0 forward, 1 reverse, others: random seed.
// Returns NULL or an error.
NO_TRACE const char * emu_run(const char * name, const uint * grid, int threads, void ** buffers, const uint64_t * regions, int n_regions,
        size_t group_bytes, const int * constants, int n_constants, int schedule, uint64_t * counters) {
    emu::machine & m = emu::m;
    m.error.clear();
    const emu::entry * e = emu::kernels;
    while (e->name && strcmp(e->name, name)) {
        ++e;
    }
    if (!e->name) {
        m.error = "no such kernel";
        return m.error.c_str();
    }
    if (!m.stacks) {
        m.stacks = (char *) mmap(nullptr, emu::STACK*emu::MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    for (int i = 0; i < n_constants; ++i) {
        auto c = m.constants.find(constants[2*i]);
        if (c != m.constants.end()) {
            *c->second = constants[2*i + 1];
        }
    }
    m.kernel = e->run;
    memcpy(m.buffers, buffers, sizeof(m.buffers));
    m.regions.clear();
    for (int i = 0; i < n_regions; ++i) {
        m.regions.push_back({ (uintptr_t) regions[2*i], (uintptr_t) regions[2*i + 1] });
    }
    m.group_bytes = group_bytes;
    m.group_memory = (char *) aligned_alloc(64, (group_bytes + 127)/64*64);
    m.n_threads = threads;
    m.count = {};
    m.random = schedule;
    m.groups = { grid[0], grid[1], grid[2] };
    const uint n = grid[0]*grid[1]*grid[2];
    for (uint k = 0; k < n && m.error.empty(); ++k) {
        const uint g = schedule == 1 ? n - 1 - k : k;
        m.group = { g%grid[0], g/grid[0]%grid[1], g/grid[0]/grid[1] };
        emu::run_group(threads, schedule);
    }
    free(m.group_memory);
    memcpy(counters, &m.count, sizeof(m.count));
    return m.error.empty() ? nullptr : m.error.c_str();
}
}
