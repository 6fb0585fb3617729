// Runs the kernels of a library, one threadgroup after the other. Linked to each of them by emulator.py.
//
// The threads of a threadgroup are fibers of one OS thread. One runs until it ends or waits: at a barrier for its threadgroup or
// simdgroup, in a simdgroup function for its simdgroup. A simdgroup runs as far as it can before another one does. Waits that cannot
// end are errors: not all threads reach the barrier or function, or they are at different ones.
//
// clang's -fsanitize=thread calls us for each load and store; its own runtime is not used. An access has to be inside of a buffer or of
// threadgroup memory and aligned, threadgroup memory has to be written before it is read, and two accesses of different threads to
// the same byte, one of them a write, have to be separated by a barrier of their scope whose flags include that memory.
//
// Kernels that take it that a simdgroup runs in lockstep are run so on demand: a thread waits before each access, and those of its simdgroup
// that are first in the code go on together, as if all others were masked out. Then there are no races within a simdgroup, and it is none
// if a thread of another one stores what is there already.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <sys/mman.h>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

// saves what a call has to preserve, and the stack pointer in *from; goes on at to
extern "C" void emu_switch(void ** from, void * to);
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
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

namespace {
constexpr int    SIMD = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 128*1024, THREADGROUP_MEMORY = 32*1024, GUARD = 4096;
constexpr unsigned MEM_DEVICE = 1, MEM_THREADGROUP = 2;

enum state { RUN, AT_ACCESS, AT_SIMD, AT_BARRIER, DONE };
enum space { DEVICE, THREADGROUP, N_SPACES };

struct fiber {
    void *       sp;
    enum state   state;
    const char * function; // where it waits
    const char * file;
    int          line;
    unsigned     flags;    // of the barrier
    void *       access;   // address in the code
};
struct simdgroup {
    uint32_t epoch[N_SPACES]; // barriers that order a memory, passed by it
    unsigned exchanges;
    char     slots[2][SIMD][64];
};
// accesses to a byte: the last write, and the reads since: by which simdgroups since the last barrier of the threadgroup, and by which
// lanes of the last of these since its last barrier
struct cell {
    uint32_t write_group, write_simd, read_group, read_simd, read_simdgroups, read_lanes;
    uint16_t write_thread;
    uint8_t  read_simdgroup, read_before; // by an earlier threadgroup
};
struct region { uintptr_t begin, end; bool writable; cell * cells; };
struct kernel { void (*call)(const void *); const void * entry; std::vector<int> kinds; };
struct constant { void * value; size_t size; };
// in the order of COUNTERS in emulator.py, which is followed by emu_operations
struct counters { uint64_t load_bytes, store_bytes, loads, stores, constant_loads, threadgroup_loads, threadgroup_stores, threadgroup_bytes, matrix, simd, barriers; };

struct machine {
    fiber     fibers[MAX_THREADS];
    simdgroup simdgroups[MAX_THREADS/SIMD];
    void *    scheduler = nullptr;
    char *    stacks = nullptr;
    char *    memory = nullptr; // threadgroup memory between guards
    cell *    cells = nullptr;  // of threadgroup memory
    int       current = -1, n_threads = 0;
    unsigned  group[3], groups[3], threads[3];
    uint32_t  epoch[N_SPACES], first_epoch[N_SPACES]; // barriers of the threadgroup, on from group to group
    size_t    used = 0;         // threadgroup memory
    std::map<int, size_t> arrays, arguments;
    void *    buffers[32];
    std::vector<region> regions;
    size_t    last_region = 0;
    const kernel * running = nullptr;
    counters  count;
    uint64_t  random;
    bool      lockstep;
    void *    same = nullptr;   // a store that has to leave what is there, in lockstep
    char      there[64];
    size_t    same_size;
    void *    same_at;
    std::string same_error, error;
    void *    error_at;
};
machine m;

std::map<std::string, kernel> & kernels() { static std::map<std::string, kernel> k; return k; }
std::multimap<int, constant> & constants() { static std::multimap<int, constant> c; return c; }

std::string where() {
    char text[128];
    snprintf(text, sizeof(text), " (threadgroup %u,%u,%u, thread %d)", m.group[0], m.group[1], m.group[2], m.current);
    return text;
}

void check_same();

void wait(enum state s) {
    check_same();
    fiber & f = m.fibers[m.current];
    f.state = s;
    emu_switch(&f.sp, m.scheduler);
}

void fail(const std::string & text, void * at = nullptr) {
    m.same = nullptr;
    if (m.error.empty()) {
        m.error    = text + where();
        m.error_at = at;
    }
    wait(DONE); // the scheduler sees the error and does not come back
}

// the store of a moment ago
void check_same() {
    if (m.same) {
        const void * p = m.same;
        m.same = nullptr;
        if (memcmp(p, m.there, m.same_size) != 0) {
            fail(m.same_error, m.same_at);
        }
    }
}

void race(uintptr_t p, size_t n, bool write, const std::string & text, void * at) {
    if (!m.lockstep || !write || n > sizeof(m.there)) {
        return fail(text, at);
    }
    m.same       = (void *) p;
    m.same_size  = n;
    m.same_error = text;
    m.same_at    = at;
    memcpy(m.there, m.same, n);
}

void start() {
    m.running->call(m.running->entry);
    wait(DONE);
    abort();
}

unsigned next_random() {
    m.random = m.random*6364136223846793005u + 1442695040888963407u;
    return m.random >> 33;
}

// whether thread t has a barrier between an access and now
bool ordered(uint32_t group, uint32_t simd, int thread, int t, space s) {
    if (group < m.first_epoch[s]) {
        return false; // another threadgroup
    }
    return thread == t || group != m.epoch[s] || (thread/SIMD == t/SIMD && (m.lockstep || simd != m.simdgroups[t/SIMD].epoch[s]));
}

// false: a race
bool note(cell & c, bool write, space s) {
    const int t = m.current, g = t/SIMD, lane = t%SIMD;
    const uint32_t group = m.epoch[s], simd = m.simdgroups[g].epoch[s];
    if (c.write_group != 0 && !ordered(c.write_group, c.write_simd, c.write_thread, t, s)) {
        return false;
    }
    if (write) {
        const bool read_now = c.read_group == group;
        if (c.read_before || (c.read_group != 0 && c.read_group < m.first_epoch[s]) || (read_now && c.read_simdgroups & ~(1u << g))
                || (read_now && !m.lockstep && c.read_simdgroup == g && c.read_simd == simd && c.read_lanes & ~(1u << lane))) {
            return false;
        }
        c = { group, simd, 0, 0, 0, 0, (uint16_t) t, 0, 0 };
        return true;
    }
    if (c.read_group != group) {
        c.read_before |= c.read_group != 0 && c.read_group < m.first_epoch[s];
        c.read_group = group;
        c.read_simdgroups = c.read_lanes = 0;
    }
    if (c.read_simdgroup != g || c.read_simd != simd) {
        c.read_lanes     = 0;
        c.read_simdgroup = g;
        c.read_simd      = simd;
    }
    c.read_simdgroups |= 1u << g;
    c.read_lanes      |= 1u << lane;
    return true;
}

region * find(uintptr_t p) {
    if (m.last_region < m.regions.size() && p >= m.regions[m.last_region].begin && p < m.regions[m.last_region].end) {
        return &m.regions[m.last_region];
    }
    for (size_t i = 0; i < m.regions.size(); ++i) {
        if (p >= m.regions[i].begin && p < m.regions[i].end) {
            m.last_region = i;
            return &m.regions[i];
        }
    }
    return nullptr;
}

extern "C" char __ehdr_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));

void access(uintptr_t p, size_t n, bool write, bool aligned, void * at) {
    if (m.current < 0 || p - (uintptr_t) m.stacks < STACK*MAX_THREADS) {
        return;
    }
    check_same();
    if (m.lockstep && !(p >= (uintptr_t) __ehdr_start && p < (uintptr_t) _end)) {
        m.fibers[m.current].access = at;
        wait(AT_ACCESS);
    }
    const auto what = [=] { return std::string(write ? "store" : "load") + " of " + std::to_string(n) + " bytes"; };
    if (p - (uintptr_t) m.memory < THREADGROUP_MEMORY + 2*GUARD) {
        const size_t i = p - (uintptr_t) m.memory - GUARD;
        if (i >= m.used || i + n > m.used) {
            return fail(what() + " outside of threadgroup memory", at);
        }
        ++(write ? m.count.threadgroup_stores : m.count.threadgroup_loads);
        m.count.threadgroup_bytes += n;
        for (size_t k = i; k < i + n; ++k) {
            cell & c = m.cells[k];
            if (!write && c.write_group == 0) {
                return fail(what() + " of threadgroup memory that was not written, at byte " + std::to_string(k), at);
            }
            if (!note(c, write, THREADGROUP)) {
                race(p, n, write, "race: " + what() + " of threadgroup memory at byte " + std::to_string(k) + ", another thread's access has no barrier between, last written by thread "
                    + std::to_string(c.write_thread), at);
                break;
            }
        }
    } else if (region * r = find(p)) {
        if (p + n > r->end) {
            return fail(what() + " beyond the end of a buffer", at);
        }
        if (write && !r->writable) {
            return fail(what() + " to a buffer that is constant", at);
        }
        (write ? m.count.store_bytes : m.count.load_bytes) += n;
        ++(write ? m.count.stores : m.count.loads);
        for (size_t k = p - r->begin; r->cells && k < p - r->begin + n; ++k) {
            if (!note(r->cells[k], write, DEVICE)) {
                race(p, n, write, "race: " + what() + " of device memory at byte " + std::to_string(k) + " of a buffer, another thread's access has no barrier between", at);
                break;
            }
        }
    } else if (p >= (uintptr_t) __ehdr_start && p < (uintptr_t) _end) {
        ++m.count.constant_loads; // tables
        return;
    } else {
        return fail(what() + " outside of all buffers", at);
    }
    if (aligned && p%std::min(n, (size_t) 16)) {
        fail("misaligned " + what(), at);
    }
}

// the threads of a simdgroup that wait in a simdgroup function go on if all of them are there
bool release(int first, int n) {
    const fiber & f = m.fibers[first];
    for (int i = first; i < first + n; ++i) {
        if (m.fibers[i].state != AT_SIMD) {
            return false;
        }
        if (m.fibers[i].line != f.line || strcmp(m.fibers[i].function, f.function) != 0 || strcmp(m.fibers[i].file, f.file) != 0) {
            m.current = i;
            m.error = std::string("simdgroup functions in divergent flow: ") + f.function + " in line " + std::to_string(f.line) + " of " + f.file + ", "
                + m.fibers[i].function + " in line " + std::to_string(m.fibers[i].line) + " of " + m.fibers[i].file + where();
            return false;
        }
    }
    simdgroup & g = m.simdgroups[first/SIMD];
    g.epoch[DEVICE]      += (f.flags & MEM_DEVICE) != 0;
    g.epoch[THREADGROUP] += (f.flags & MEM_THREADGROUP) != 0;
    ++g.exchanges;
    for (int i = first; i < first + n; ++i) {
        m.fibers[i].state = RUN;
    }
    return true;
}

// in lockstep: the threads of a simdgroup that wait for an access, and are first in the code, go on
bool step(int first, int n) {
    void * least = nullptr;
    for (int i = first; i < first + n; ++i) {
        if (m.fibers[i].state == AT_ACCESS && (!least || m.fibers[i].access < least)) {
            least = m.fibers[i].access;
        }
    }
    for (int i = first; least && i < first + n; ++i) {
        if (m.fibers[i].state == AT_ACCESS && m.fibers[i].access == least) {
            m.fibers[i].state = RUN;
        }
    }
    return least != nullptr;
}

void order(std::vector<int> & o, int n, int schedule) {
    o.resize(n);
    for (int i = 0; i < n; ++i) {
        o[i] = schedule == 1 ? n - 1 - i : i;
    }
    for (int i = n - 1; schedule > 1 && i > 0; --i) {
        std::swap(o[i], o[next_random()%(i + 1)]);
    }
}

void run_group(int schedule) {
    const int n = m.n_threads;
    for (int s = 0; s < N_SPACES; ++s) {
        m.first_epoch[s] = ++m.epoch[s];
    }
    m.used = 0;
    m.arrays.clear();
    for (const auto & a : m.arguments) { // the size is a multiple of 16 in Metal
        m.used += a.second;
    }
    memset(m.memory, 0xff, THREADGROUP_MEMORY + 2*GUARD);
    memset(m.cells, 0, THREADGROUP_MEMORY*sizeof(cell));
    for (int i = 0; i < n; ++i) {
        void ** sp = (void **) (m.stacks + STACK*(i + 1));
        *--sp = nullptr;
        *--sp = (void *) start;
        sp -= 6;
        m.fibers[i] = { sp, RUN, "", "", 0, 0, nullptr };
    }
    std::vector<int> groups, lanes;
    for (int done = 0; done < n;) {
        bool ran = false;
        order(groups, (n + SIMD - 1)/SIMD, schedule);
        for (int g : groups) {
            const int first = g*SIMD, count = std::min(SIMD, n - first);
            do {
                order(lanes, count, schedule);
                for (int l : lanes) {
                    fiber & f = m.fibers[first + l];
                    if (f.state == RUN) {
                        m.current = first + l;
                        emu_switch(&m.scheduler, f.sp);
                        ran = true;
                        if (!m.error.empty()) {
                            return;
                        }
                        done += f.state == DONE;
                    }
                }
            } while (step(first, count) || release(first, count));
            if (!m.error.empty()) {
                return;
            }
        }
        const int at = std::count_if(m.fibers, m.fibers + n, [](const fiber & f) { return f.state == AT_BARRIER; });
        if (at == n) {
            const fiber & f = m.fibers[0];
            for (int i = 1; i < n; ++i) {
                if (m.fibers[i].line != f.line || strcmp(m.fibers[i].file, f.file) != 0) {
                    m.current = i;
                    m.error = "threads wait at different barriers, in lines " + std::to_string(f.line) + " and " + std::to_string(m.fibers[i].line) + where();
                    return;
                }
            }
            m.epoch[DEVICE]      += (f.flags & MEM_DEVICE) != 0;
            m.epoch[THREADGROUP] += (f.flags & MEM_THREADGROUP) != 0;
            for (int i = 0; i < n; ++i) {
                m.fibers[i].state = RUN;
            }
        } else if (!ran && done < n) {
            const fiber * f = std::find_if(m.fibers, m.fibers + n, [](const fiber & f) { return f.state != DONE; });
            m.current = f - m.fibers;
            int same = 0;
            for (int i = 0; i < n; ++i) {
                same += m.fibers[i].state == f->state && m.fibers[i].line == f->line;
            }
            m.error = std::string(f->function) + " in line " + std::to_string(f->line) + " of " + f->file + " waits for threads that do not come: "
                + std::to_string(same) + " of " + std::to_string(n) + " are there, " + std::to_string(done) + " have ended" + where();
            return;
        }
    }
}
}

extern "C" {
uint64_t emu_operations[4]; // floating point operations, integer operations, functions (exp, ..), loads of constants: counted in the kernels

void emu_register(const char * name, void (*call)(const void *), const void * entry, const int * kinds, int n) { kernels()[name] = { call, entry, std::vector<int>(kinds, kinds + n + 1) }; }
void emu_register_constant(int index, void * value, unsigned long size) { constants().insert({ index, { value, size } }); }
int  emu_lane()  { return m.current%SIMD; }
int  emu_lanes() { return std::min(SIMD, m.n_threads - m.current/SIMD*SIMD); }
void emu_fail(const char * text) { fail(text, __builtin_return_address(0)); }
void emu_matrix() { m.count.matrix += m.current%SIMD == 0; }
void emu_access(const void * p, unsigned long n, bool write) { access((uintptr_t) p, n, write, true, __builtin_return_address(0)); }
const void * emu_buffer(int i) { return m.buffers[i]; }

const char * emu_exchange(const void * value, unsigned size, const char * function, const char * file, int line) {
    fiber & f = m.fibers[m.current];
    simdgroup & g = m.simdgroups[m.current/SIMD];
    char (* slots)[64] = g.slots[g.exchanges%2]; // the other half may still be read
    memcpy(slots[m.current%SIMD], value, size);
    m.count.simd += m.current%SIMD == 0;
    f.function = function;
    f.file     = file;
    f.line     = line;
    f.flags    = 0;
    wait(AT_SIMD);
    return slots[0];
}

void emu_barrier(bool simd, unsigned flags, const char * file, int line) {
    fiber & f = m.fibers[m.current];
    f.function = simd ? "simdgroup_barrier" : "threadgroup_barrier";
    f.file     = file;
    f.line     = line;
    f.flags    = flags;
    m.count.barriers += m.current%(simd ? SIMD : MAX_THREADS) == 0;
    wait(simd ? AT_SIMD : AT_BARRIER);
}

void * emu_threadgroup(int key, unsigned long n, unsigned long align) {
    if (!m.arrays.count(key)) {
        m.used = (m.used + align - 1)/align*align;
        m.arrays[key] = m.used;
        m.used += n;
        if (m.used > THREADGROUP_MEMORY) {
            fail("more than 32 KB of threadgroup memory", __builtin_return_address(0));
        }
    }
    return m.memory + GUARD + m.arrays[key];
}

void * emu_threadgroup_argument(int i) {
    size_t at = 0;
    for (const auto & a : m.arguments) {
        if (a.first == i) {
            return m.memory + GUARD + at;
        }
        at += a.second;
    }
    fail("threadgroup argument " + std::to_string(i) + " has no size");
    return nullptr;
}

// KINDS of emulator.py
unsigned emu_builtin(int kind, int d) {
    const unsigned t = m.current, x = m.threads[0], y = m.threads[1];
    const unsigned at[3] = { t%x, t/x%y, t/x/y };
    switch (-kind) {
        case 1: return m.group[d];
        case 2: return m.groups[d];
        case 3: return at[d];
        case 4: return m.threads[d];
        case 5: return m.group[d]*m.threads[d] + at[d];
        case 6: return d == 0 ? t : 0;
        case 7: return d == 0 ? t%SIMD : 0;
        case 8: return d == 0 ? t/SIMD : 0;
        case 9: return d == 0 ? (m.n_threads + SIMD - 1)/SIMD : 0;
        case 10: return d == 0 ? SIMD : 0;
        case 11: return m.groups[d]*m.threads[d];
        default: abort();
    }
}

// ---- what -fsanitize=thread calls

#define ACCESS(n) \
    void __tsan_read##n           (void * p) { access((uintptr_t) p, n, false, true,  __builtin_return_address(0)); } \
    void __tsan_write##n          (void * p) { access((uintptr_t) p, n, true,  true,  __builtin_return_address(0)); } \
    void __tsan_read_write##n     (void * p) { access((uintptr_t) p, n, false, true,  __builtin_return_address(0)); access((uintptr_t) p, n, true, true, __builtin_return_address(0)); } \
    void __tsan_unaligned_read##n (void * p) { access((uintptr_t) p, n, false, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##n(void * p) { access((uintptr_t) p, n, true,  false, __builtin_return_address(0)); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_init() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void * __tsan_memcpy(void * to, const void * from, size_t n) {
    access((uintptr_t) from, n, false, false, __builtin_return_address(0));
    access((uintptr_t) to,   n, true,  false, __builtin_return_address(0));
    return memcpy(to, from, n);
}
void * __tsan_memmove(void * to, const void * from, size_t n) { return __tsan_memcpy(to, from, n); }
void * __tsan_memset(void * to, int x, size_t n) {
    access((uintptr_t) to, n, true, false, __builtin_return_address(0));
    return memset(to, x, n);
}

// ---- for emulator.py

// Arrays end with a negative index. error: "" or text; error_at: address in the library, or 0.
void emu_run(const char * name, const unsigned * grid, const unsigned * threads, void ** buffers, const uint64_t * regions, int n_regions,
        const int64_t * threadgroup, const int64_t * function_constants, int schedule, bool lockstep, uint64_t * counters, char * error, uint64_t * error_at) {
    m.error.clear();
    m.error_at = nullptr;
    const auto k = kernels().find(name);
    if (k == kernels().end()) {
        snprintf(error, 1024, "no kernel of that name in the library");
        return;
    }
    if (!m.stacks) {
        m.stacks = (char *) mmap(nullptr, STACK*MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        m.memory = (char *) aligned_alloc(GUARD, THREADGROUP_MEMORY + 2*GUARD);
        m.cells  = new cell[THREADGROUP_MEMORY];
    }
    for (; *function_constants >= 0; function_constants += 2) {
        const auto range = constants().equal_range(*function_constants);
        for (auto c = range.first; c != range.second; ++c) {
            memcpy(c->second.value, function_constants + 1, c->second.size);
        }
    }
    m.arguments.clear();
    size_t used = 0;
    for (; *threadgroup >= 0; threadgroup += 2) {
        m.arguments[*threadgroup] = threadgroup[1];
        used += threadgroup[1];
    }
    memcpy(m.groups, grid, sizeof(m.groups));
    memcpy(m.threads, threads, sizeof(m.threads));
    m.n_threads = threads[0]*threads[1]*threads[2];
    if (used > THREADGROUP_MEMORY || m.n_threads < 1 || m.n_threads > MAX_THREADS) {
        snprintf(error, 1024, "%zu bytes of threadgroup memory and %d threads: at most 32768 and 1024", used, m.n_threads);
        return;
    }
    m.running = &k->second;
    memcpy(m.buffers, buffers, sizeof(m.buffers));
    m.regions.clear();
    for (int i = 0; i < n_regions; ++i) {
        m.regions.push_back({ regions[2*i], regions[2*i + 1], false, nullptr });
    }
    for (size_t i = 0; i + 1 < k->second.kinds.size(); ++i) { // the last one: bits of the buffers that are written
        const int b = k->second.kinds[i];
        if (b >= 0 && b < 32 && k->second.kinds.back() >> b & 1) {
            if (region * r = find((uintptr_t) buffers[b])) {
                r->writable = true;
                if (!r->cells) {
                    r->cells = (cell *) mmap(nullptr, (r->end - r->begin)*sizeof(cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
                }
            }
        }
    }
    memset(&m.count, 0, sizeof(m.count));
    memset(emu_operations, 0, sizeof(emu_operations));
    memset(m.epoch, 0, sizeof(m.epoch));
    memset(m.simdgroups, 0, sizeof(m.simdgroups));
    m.random   = schedule;
    m.lockstep = lockstep;
    const unsigned n = grid[0]*grid[1]*grid[2];
    std::vector<int> groups;
    order(groups, n, schedule);
    for (unsigned i = 0; i < n && m.error.empty(); ++i) {
        const unsigned g = groups[i];
        m.group[0] = g%grid[0];
        m.group[1] = g/grid[0]%grid[1];
        m.group[2] = g/grid[0]/grid[1];
        run_group(schedule);
    }
    m.current = -1;
    for (const region & r : m.regions) {
        if (r.cells) {
            munmap(r.cells, (r.end - r.begin)*sizeof(cell));
        }
    }
    m.count.constant_loads += emu_operations[3];
    memcpy(counters, &m.count, sizeof(m.count));
    memcpy(counters + sizeof(m.count)/sizeof(*counters), emu_operations, 3*sizeof(*emu_operations));
    snprintf(error, 1024, "%s", m.error.c_str());
    *error_at = m.error_at ? (uintptr_t) m.error_at - (uintptr_t) __ehdr_start : 0;
}
}
