// Threads that compute a step together. A step is a row of phases; a phase is a number of items that any thread may
// claim.
//
// Nobody waits for a thread, only for items: one that the system has descheduled between two items holds up nobody, and
// finds out by the epoch that it came too late. That matters where other processes share the cores.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define CPU_RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define CPU_RELAX() __asm__ __volatile__("yield")
#else
#define CPU_RELAX()
#endif

struct Pool;
typedef void (*Body)(struct Worker* worker, void* job);

struct alignas(64) Counter {
    uint64_t claimed;  // epoch << 32 | items that were claimed
    alignas(64) uint64_t done;
};

struct Worker {
    Pool* pool;
    int index;
    int phase;
    uint32_t epoch;
    bool is_late;
    float* scratch;  // this thread's own
    pthread_t thread;
};

struct Pool {
    int num_threads, job_bytes;
    Body body;
    void* job;  // read by workers under `guard`
    uint32_t epoch;
    bool is_closing;
    Counter* counters;
    Worker* workers;
    pthread_mutex_t guard;
    pthread_cond_t wake;
};

static const int SPIN_BEFORE_SLEEP = 4000, SPIN_BEFORE_YIELD = 3000;

// Runs fn(i) for every i below num_items, by whichever thread comes first, and returns when all of them are done.
template <class Fn>
static inline void run_phase(Worker* worker, int num_items, Fn fn) {
    if (worker->is_late) return;
    Counter* counter = &worker->pool->counters[worker->phase++];
    uint64_t base = (uint64_t)worker->epoch << 32;
    for (;;) {
        uint64_t seen = __atomic_load_n(&counter->claimed, __ATOMIC_RELAXED);
        if (seen - base >= (uint64_t)num_items) {  // all claimed, or of another epoch
            if (seen < base || seen - base > 0xffffffffull) worker->is_late = true;
            break;
        }
        if (!__atomic_compare_exchange_n(&counter->claimed, &seen, seen + 1, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            continue;
        fn((int)(seen - base));
        __atomic_fetch_add(&counter->done, 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; !worker->is_late; spins++) {
        if (__atomic_load_n(&counter->done, __ATOMIC_ACQUIRE) >= base + num_items) return;
        if (__atomic_load_n(&worker->pool->epoch, __ATOMIC_RELAXED) != worker->epoch) worker->is_late = true;
        if (spins < SPIN_BEFORE_YIELD) CPU_RELAX();
        else sched_yield();
    }
}

static void* worker_main(void* argument) {
    Worker* worker = (Worker*)argument;
    Pool* pool = worker->pool;
    void* job = malloc(pool->job_bytes);
    uint32_t last = 0;
    for (;;) {
        for (int spins = 0; spins < SPIN_BEFORE_SLEEP && __atomic_load_n(&pool->epoch, __ATOMIC_RELAXED) == last;
             spins++)
            CPU_RELAX();
        pthread_mutex_lock(&pool->guard);
        while (pool->epoch == last && !pool->is_closing) pthread_cond_wait(&pool->wake, &pool->guard);
        bool is_closing = pool->is_closing;
        worker->epoch = last = pool->epoch;
        memcpy(job, pool->job, pool->job_bytes);
        pthread_mutex_unlock(&pool->guard);
        if (is_closing) break;
        worker->phase = 0, worker->is_late = false;
        pool->body(worker, job);
    }
    free(job);
    return nullptr;
}

static void close_pool(Pool* pool) {
    pthread_mutex_lock(&pool->guard);
    pool->is_closing = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->guard);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->workers[i].thread, nullptr);
    for (int i = 0; i < pool->num_threads; i++) free(pool->workers[i].scratch);
    free(pool->counters), free(pool->workers), free(pool->job);
}

// Returns false where memory or threads ran out; nothing is left then. The caller is thread 0 of every step.
static bool open_pool(Pool* pool, int num_threads, int max_phases, int job_bytes, size_t scratch_bytes, Body body) {
    *pool = Pool{};
    pool->job_bytes = job_bytes, pool->body = body;
    pthread_mutex_init(&pool->guard, nullptr), pthread_cond_init(&pool->wake, nullptr);
    if (posix_memalign((void**)&pool->counters, 64, sizeof(Counter) * max_phases)) pool->counters = nullptr;
    pool->workers = (Worker*)calloc(num_threads, sizeof(Worker));
    pool->job = calloc(1, job_bytes);
    bool is_open = pool->counters && pool->workers && pool->job;
    for (int i = 0; is_open && i < num_threads; i++) {
        Worker* worker = &pool->workers[i];
        worker->pool = pool, worker->index = i;
        if (posix_memalign((void**)&worker->scratch, 64, scratch_bytes)) worker->scratch = nullptr;
        is_open = worker->scratch && (i == 0 || !pthread_create(&worker->thread, nullptr, worker_main, worker));
        if (is_open) pool->num_threads = i + 1;
        else free(worker->scratch);
    }
    if (!is_open) close_pool(pool);
    return is_open;
}

// Runs one job over all threads; num_phases bounds the phases that its body runs.
static void run_job(Pool* pool, const void* job, int num_phases) {
    pthread_mutex_lock(&pool->guard);
    uint32_t epoch = pool->epoch + 1;
    uint64_t base = (uint64_t)epoch << 32;
    for (int i = 0; i < num_phases; i++) {
        __atomic_store_n(&pool->counters[i].done, base, __ATOMIC_RELAXED);
        __atomic_store_n(&pool->counters[i].claimed, base, __ATOMIC_RELEASE);
    }
    memcpy(pool->job, job, pool->job_bytes);
    __atomic_store_n(&pool->epoch, epoch, __ATOMIC_RELEASE);
    if (pool->num_threads > 1) pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->guard);
    Worker* self = &pool->workers[0];
    self->epoch = epoch, self->phase = 0, self->is_late = false;
    pool->body(self, pool->job);
}
