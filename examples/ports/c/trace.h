/* Calls that leave a trace on the disk (J), as nanokv check, diff and its pictures read it. */
#ifndef TRACE_H
#define TRACE_H

#include "nanokv.h"

typedef struct {
    const char *name, *type;  // "F32", "I32", "U64", "U8"
    int level, n_dims;        // the level from which on a trace has it
    size_t dims[4], count;
    void *data;
} Array;

typedef struct {
    char folder[512];
    int level;                // 0 writes, 1 weights, 2 vectors, 3 states
    const Config *config;
    int n_steps, turn, chunk;
    // of the call that is recorded:
    Arena arena;
    Array arrays[40];
    int n_arrays, start, T;
    size_t *reads_before;     // [L, T + 1] reads of a layer before each position
} Trace;

void begin_trace(Trace *trace, const char *folder, const char *level, const Config *config);
void end_trace(Trace *trace, const Cache *cache);

/* One call: tokens are appended to the cache; logits [V] of the last. trace NULL: it leaves none. sampled: the model's own. */
const float *call(Model *model, Cache *cache, const int *tokens, int n, Trace *trace, bool sampled);

#endif
