/* A clock of its own for one process (LD_PRELOAD): the machine's CLOCK_REALTIME, and as many nanoseconds ahead of it as the
 * file WEIR_TEST_CLOCK says at the moment. Who waits for an absolute time of it waits as when the machine's clock is set: longer
 * if it is set back meanwhile, no more if it is set beyond. CLOCK_MONOTONIC, by which Rust's own waits and tokio's go, is the
 * machine's.
 *
 * Of what waits for absolute times there is only C11's cnd_timedwait here: librdkafka has no other. What the agent imports besides,
 * pthread_cond_timedwait, is that of OpenSSL's pool of threads, which nobody uses. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static const int64_t SECOND = 1000000000;
/* So often a waiting thread looks whether the clock was set. */
static const int64_t LOOK = 20000000;

static volatile int64_t *ahead;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("WEIR_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED) ahead = mapped;
}

static int64_t of(const struct timespec *time) { return (int64_t)time->tv_sec * SECOND + time->tv_nsec; }

static struct timespec to(int64_t nanoseconds) {
    return (struct timespec){.tv_sec = nanoseconds / SECOND, .tv_nsec = nanoseconds % SECOND};
}

/* By the kernel, for the C library's own function is this one. */
static int64_t machine(clockid_t clock) {
    struct timespec time = {0};
    syscall(SYS_clock_gettime, clock, &time);
    return of(&time);
}

static int64_t now(clockid_t clock) { return machine(clock) + (ahead ? *ahead : 0); }

int clock_gettime(clockid_t clock, struct timespec *time) {
    if (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE) return syscall(SYS_clock_gettime, clock, time);
    *time = to(now(clock));
    return 0;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    struct timespec read = to(now(CLOCK_REALTIME));
    time->tv_sec = read.tv_sec;
    time->tv_usec = read.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *to_too) {
    time_t seconds = now(CLOCK_REALTIME) / SECOND;
    if (to_too) *to_too = seconds;
    return seconds;
}

int timespec_get(struct timespec *time, int base) {
    if (base != TIME_UTC) return 0;
    *time = to(now(CLOCK_REALTIME));
    return base;
}

int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex, const struct timespec *restrict until) {
    static int (*wait)(cnd_t *, mtx_t *, const struct timespec *);
    if (!wait) wait = dlsym(RTLD_NEXT, "cnd_timedwait");
    for (;;) {
        int64_t left = of(until) - now(CLOCK_REALTIME);
        struct timespec look = to(machine(CLOCK_REALTIME) + (left < LOOK ? left : LOOK));
        int ended = wait(condition, mutex, &look);
        if (ended != thrd_timedout || left <= LOOK) return ended;
    }
}
