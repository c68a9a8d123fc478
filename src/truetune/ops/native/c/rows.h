/* The rows of a matrix as units of work: float32 inside, rounded once at the end.
 *
 * A row is the unit of work and no sum crosses rows, so the number of threads can't change a bit of any result.
 * Rows are `stride` elements apart and dense inside. The functions that hold the arithmetic of a row take element types
 * as constants, so that no loop asks for a type, and the other arguments by value, which no store can change.
 */
#ifndef TT_ROWS_H
#define TT_ROWS_H

#include "parallel.h"
#include "simd.h"

#define TT_INLINE static inline __attribute__((always_inline))

/* The last, incomplete vector of a row: apart, so that the loops which call it stay small. */
static __attribute__((noinline)) vf load_tail(const void *from, int64_t n, int dtype, float fill) {
    float lanes[TT_WIDTH];
    vf_store(lanes, vf_set(fill));
    load_row(lanes, from, n, dtype);
    return vf_load(lanes);
}

static __attribute__((noinline)) void store_tail(void *to, vf v, int64_t n, int dtype) {
    float lanes[TT_WIDTH];
    vf_store(lanes, v);
    store_row(to, lanes, n, dtype);
}

/* Elements i, i + 1, ... of a row of n as a vector; those beyond its end are `fill`. */
TT_INLINE vf load_at(const void *row, int64_t i, int64_t n, int dtype, float fill) {
    const char *from = (const char *)row + i * element_size(dtype);
    if (n - i < TT_WIDTH) return load_tail(from, n - i, dtype, fill);
    return dtype == TT_FLOAT32 ? vf_load((const float *)from) : vf_from_bf16((const uint16_t *)from);
}

/* Writes a vector to elements i, i + 1, ... of a row of n; what would lie beyond its end is dropped. */
TT_INLINE void store_at(void *row, int64_t i, int64_t n, vf v, int dtype) {
    char *to = (char *)row + i * element_size(dtype);
    if (n - i < TT_WIDTH)
        store_tail(to, v, n - i, dtype);
    else if (dtype == TT_FLOAT32)
        vf_store((float *)to, v);
    else
        vf_to_bf16((uint16_t *)to, v);
}

#define TT_TASK 16384 /* elements: some microseconds of work, enough to be worth handing to a thread */

static int64_t rows_per_task(int64_t columns) { return columns >= TT_TASK ? 1 : TT_TASK / (columns + 1) + 1; }

static int64_t tasks_of(int64_t rows, int64_t columns) {
    int64_t each = rows_per_task(columns);
    return (rows + each - 1) / each;
}

static void *at_row(const void *base, int64_t row, int64_t stride, int dtype) {
    return (char *)base + row * stride * element_size(dtype);
}

/* Runs `body` on each row of a task. */
#define TT_EACH_ROW(c, task, row)                                                          \
    for (int64_t row = (task) * rows_per_task((c)->n), end_ = row + rows_per_task((c)->n); \
         row < (end_ < (c)->rows ? end_ : (c)->rows); row++)

#endif
