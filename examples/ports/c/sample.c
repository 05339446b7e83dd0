/* Choosing a token (G). */
#include <math.h>
#include <stdlib.h>

#include "nanokv.h"

uint32_t pcg32_next(Pcg32 *random) {  // G1
    uint64_t old = random->state;
    random->state = old * 6364136223846793005u + random->increment;
    uint32_t word = (uint32_t)(((old >> 18) ^ old) >> 27), turn = (uint32_t)(old >> 59);
    return word >> turn | word << (-turn & 31);
}

void pcg32_seed(Pcg32 *random, uint64_t seed, uint64_t stream) {
    *random = (Pcg32){0, 2 * stream + 1};
    pcg32_next(random);
    random->state += seed;
    pcg32_next(random);
}

void check_sampling(const Sampling *how) {
    if (!(how->temperature >= 0 && how->temperature < INFINITY))
        fail("NanokvError", "the temperature must be 0 or a positive number");
    if (how->top_k < 0) fail("NanokvError", "top_k must be 1 or more");
    if (!(how->top_p >= 0 && how->top_p <= 1)) fail("NanokvError", "top_p must be above 0 and at most 1");
}

int greedy(const float *logits, int n) {  // G2
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

typedef struct {
    float logit;
    int id;
    double cumulative;
} Choice;

static int by_falling_logit(const void *a, const void *b) {
    const Choice *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->id - y->id;
}

int sample(const float *logits, int n, const Sampling *how, Pcg32 *random) {  // G3
    Arena arena = {NULL};
    Choice *choices = take(&arena, n, sizeof(Choice));
    for (int i = 0; i < n; i++) choices[i] = (Choice){logits[i], i, 0};
    qsort(choices, n, sizeof(Choice), by_falling_logit);
    if (how->top_k && how->top_k < n) n = how->top_k;
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += exp(((double)choices[i].logit - choices[0].logit) / how->temperature);
        choices[i].cumulative = sum;
    }
    if (how->top_p) {
        int kept = 1;
        while (choices[kept - 1].cumulative < how->top_p * sum) kept++;
        n = kept;
    }
    double drawn = pcg32_next(random) / 4294967296.0 * choices[n - 1].cumulative;
    int i = 0;
    while (i < n - 1 && choices[i].cumulative <= drawn) i++;
    int id = choices[i].id;
    free_arena(&arena);
    return id;
}
