/* The native tier: one translation unit, a plain C interface, no dependency but the C library. */
#include "simd.h"
#include "parallel.h"

#if defined(_WIN32)
#define TT_API __declspec(dllexport)
#else
#define TT_API __attribute__((visibility("default")))
#endif

/* Where torch's GOMP_parallel is (0: none), and how many threads torch uses. */
TT_API void tt_set_threads(void *gomp_parallel, int32_t threads) {
    tt_runtime = (tt_gomp_parallel)gomp_parallel;
    tt_threads = threads > 1 ? (unsigned)threads : 1u;
}

#include "attention.h"
#include "blockwise.h"
#include "cross_entropy.h"
#include "decode.h"
#include "dropout.h"
#include "fold.h"
#include "gated.h"
#include "int8.h"
#include "norm.h"
#include "optim8bit.h"
#include "rescale.h"
#include "thin_amx.h"
