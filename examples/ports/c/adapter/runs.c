/* Levels 2 to 4: blocks, runs and traces of the suite's models. */
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../trace.h"
#include "adapter.h"

/* ---- Models, and what is seen of them */

static Model model;
static char model_path[1024];

Model *the_model(void) {  // kept from request to request
    if (strcmp(model_path, word("model")) != 0) {
        free_arena(&model.arena);
        model_path[0] = '\0';
        load_model(&model, word("model"));
        snprintf(model_path, sizeof model_path, "%s", word("model"));
    }
    return &model;
}

typedef struct Seen Seen;
struct Seen {
    Seen *next;
    const char *site;
    int layer, pos, n;
    float *x;
};

static Seen *seen, **seen_end = &seen;

static void keep(void *self, const char *site, int layer, int pos, const float *x, int n) {
    Seen *kept = take(&scratch, 1, sizeof(Seen));
    *kept = (Seen){NULL, site, layer, pos, n, take(&scratch, (size_t)n + 1, sizeof(float))};
    memcpy(kept->x, x, (size_t)n * sizeof(float));
    *seen_end = kept;
    seen_end = &kept->next;
    (void)self;
}

static void begin_seeing(void) { seen = NULL, seen_end = &seen; }

static const Observer keeper = {keep, NULL};

static const Seen *find(const char *site, int layer, int pos) {
    for (const Seen *s = seen; s; s = s->next)
        if (s->pos == pos && s->layer == layer && strcmp(s->site, site) == 0) return s;
    return NULL;
}

/* The output that an id names: step{i}.layer{l}.SITE of positions start to stop - 1, or layer{l}.pos{p}.SITE. */
static void put_named(const char *name, const int *starts, int n_steps, const Config *p) {
    char site[32] = "resid_pre";
    int step = -1, layer = p->n_layers, head = -1, pos = -1, used = 0;
    const char *rest = name;
    if (sscanf(rest, "step%d.%n", &step, &used) == 1) rest += used;
    if (sscanf(rest, "layer%d%n", &layer, &used) == 1) rest += used + (rest[used] == '.');
    if (sscanf(rest, "pos%d%n", &pos, &used) == 1) rest += used + (rest[used] == '.');
    if (sscanf(rest, "head%d.%n", &head, &used) == 1) rest += used;
    if (*rest) snprintf(site, sizeof site, "%s", rest);
    if (step >= n_steps || (step < 0 && pos < 0)) return;
    int start = step < 0 ? pos : starts[step], stop = step < 0 ? pos + 1 : starts[step + 1];
    if (layer == p->n_layers && strcmp(site, "resid_pre") == 0) layer--, snprintf(site, sizeof site, "resid_post");
    const Seen *first = find(site, layer, start);
    if (!first) return;
    int width = head < 0 ? first->n : stop, at = 0;
    float *x = take(&scratch, (size_t)(stop - start) * width + 1, sizeof(float));
    for (int t = start; t < stop; t++, at += width) {
        const Seen *s = find(site, layer, t);
        if (head < 0) memcpy(x + at, s->x, (size_t)width * sizeof(float));
        else {  // [T, S]: what a head read of each slot, and what stands where it read none
            int n = s->n / p->n_heads;
            for (int i = 0; i < width; i++) x[at + i] = strcmp(site, "scores") == 0 ? -INFINITY : 0;
            memcpy(x + at + t + 1 - n, s->x + head * n, (size_t)n * sizeof(float));
        }
    }
    put(name, x, (stop - start) * width);
}

static void answer_block(void) {
    Model *m = the_model();
    begin_seeing();
    Floats x = floats("x");
    int n, *calls = whole_list(member(inputs, "calls"), &n), starts[64] = {0}, l = whole("layer", 0), D = m->config.d_model;
    new_cache(&cache, &m->config);
    for (int i = 0; i < n; i++) starts[i + 1] = starts[i] + calls[i];
    for (int pos = 0; pos < starts[n]; pos++) block(m, &cache, l, pos, x.x + pos * D, &keeper);
    for (const Json *name = want->items; name; name = name->next) put_named(name->text, starts, n, &m->config);
}

static const char *refused(const Model *m, const int *tokens, int n) {
    Failure failure = {.kind = ""}, *outer = failed_to;
    jmp_buf here;
    failure.jump = &here;
    failed_to = &failure;
    if (!setjmp(here)) check_call(m, &cache, tokens, n);
    failed_to = outer;
    return failure.kind;
}

static void answer_run(void) {
    Model *m = the_model();
    begin_seeing();
    const char *errors[64] = {0};
    int starts[64] = {0}, n_calls = 0, n_steps = 0;
    new_cache(&cache, &m->config);
    for (const Json *given = member(inputs, "calls")->items; given; given = given->next) {
        int n, *tokens = whole_list(given, &n);
        const char *kind = refused(m, tokens, n);
        errors[n_calls++] = kind;
        if (*kind) continue;
        for (int t = 0; t < n; t++) forward(m, &cache, tokens[t], &keeper);
        starts[++n_steps] = cache.length;
    }
    for (const Json *name = want->items; name; name = name->next) {
        if (strcmp(name->text, "errors") == 0) {
            begin_output("errors");
            for (int i = 0; i < n_calls; i++) printf("%s\"%s\"", i ? ", " : "[", errors[i]);
            printf("]");
        } else if (strcmp(name->text, "length") == 0) put_whole("length", &cache.length, 1);
        else put_named(name->text, starts, n_steps, &m->config);
    }
}

static void answer_trace(void) {
    Model *m = the_model();
    static Trace trace;
    int turn = 0;
    new_cache(&cache, &m->config);
    begin_trace(&trace, word("path"), word("trace_level"), &m->config);
    for (const Json *given = member(inputs, "calls")->items; given; given = given->next) {
        int n, *tokens = whole_list(given, &n);
        call(m, &cache, tokens, n, &trace, turn++ > 0);
    }
    end_trace(&trace, &cache);
}

const Operation run_operations[] = {{"block", answer_block}, {"run", answer_run}, {"trace", answer_trace}, {NULL, NULL}};
