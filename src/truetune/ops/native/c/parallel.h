/* Work split over the threads that torch already has.
 *
 * A second OpenMP runtime in one process oversubscribes the cores, so nothing is linked: the address of torch's own
 * GOMP_parallel is handed in at run time, and without it everything runs on the calling thread.
 */
#ifndef TT_PARALLEL_H
#define TT_PARALLEL_H

#include <stdint.h>

typedef void (*tt_gomp_parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef void (*tt_body)(void *context, int64_t task);

static tt_gomp_parallel tt_runtime = 0;
static unsigned tt_threads = 1;

typedef struct {
    tt_body body;
    void *context;
    int64_t tasks, next;
} tt_work;

static void tt_take(void *data) {
    tt_work *work = (tt_work *)data;
    for (;;) {
        int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (task >= work->tasks) return;
        work->body(work->context, task);
    }
}

/* Calls body(context, i) once for each i in [0, tasks); tasks are taken in order, by whichever thread is free. */
static void tt_parallel(int64_t tasks, tt_body body, void *context) {
    tt_work work = {body, context, tasks, 0};
    if (tt_runtime && tt_threads > 1 && tasks > 1)
        tt_runtime(tt_take, &work, tt_threads, 0);
    else
        tt_take(&work);
}

#endif
