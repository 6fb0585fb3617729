// Preloaded, counts what is allocated: by the thread that called allocations_reset, and by all others. glibc alone.
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

void * __libc_malloc(size_t size);
void * __libc_calloc(size_t n, size_t size);
void * __libc_realloc(void * old, size_t size);
void * __libc_memalign(size_t alignment, size_t size);

static atomic_long own, others;
static pthread_t   self;

static void count(void) { atomic_fetch_add(pthread_equal(pthread_self(), self) ? &own : &others, 1); }

void allocations_reset(void) {
    self = pthread_self();
    own = others = 0;
}
long allocations_own(void)    { return own; }
long allocations_others(void) { return others; }

void * malloc(size_t size)                          { count(); return __libc_malloc(size); }
void * calloc(size_t n, size_t size)                { count(); return __libc_calloc(n, size); }
void * realloc(void * old, size_t size)             { count(); return __libc_realloc(old, size); }
void * memalign(size_t alignment, size_t size)      { count(); return __libc_memalign(alignment, size); }
void * aligned_alloc(size_t alignment, size_t size) { count(); return __libc_memalign(alignment, size); }
int posix_memalign(void ** out, size_t alignment, size_t size) {
    count();
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : 12;
}
