// Preloaded: counts what posix_memalign has given and free has not got back, whoever calls them. PyTorch's tensors on a
// CPU are made by it; a thread of gloo may free what another thread has made, which PyTorch's own profiler misses.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define LEAST 4096  // smaller ones are not counted
#define PLACES (1u << 20)
#define GONE ((void *)1)

static struct { void *at; size_t size; } places[PLACES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long live, most;
static int (*real_memalign)(void **, size_t, size_t);
static void (*real_free)(void *);

static unsigned first(void *at) { return (unsigned)(((uintptr_t)at >> 6) * 2654435761u) & (PLACES - 1); }

int posix_memalign(void **out, size_t alignment, size_t size) {
    if (!real_memalign) real_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    int code = real_memalign(out, alignment, size);
    if (code || size < LEAST) return code;
    pthread_mutex_lock(&lock);
    unsigned place = first(*out);
    while (places[place].at && places[place].at != GONE) place = (place + 1) & (PLACES - 1);
    places[place].at = *out;
    places[place].size = size;
    live += size;
    if (live > most) most = live;
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void *at) {
    if (!real_free) real_free = dlsym(RTLD_NEXT, "free");
    if (at && !((uintptr_t)at & 63)) {  // else it is not one of a tensor's
        pthread_mutex_lock(&lock);
        unsigned place = first(at);
        while (places[place].at && places[place].at != at) place = (place + 1) & (PLACES - 1);
        if (places[place].at == at) {
            live -= places[place].size;
            places[place].at = GONE;
        }
        pthread_mutex_unlock(&lock);
    }
    real_free(at);
}

long peak_memory_live(void) { return live; }
long peak_memory_most(void) { return most; }
void peak_memory_begin(void) { most = live; }
