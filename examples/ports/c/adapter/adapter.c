/* The port behind the conformance suite's door: one JSON request a line in, one JSON answer a line out, as
   tests/conformance/README.md has it. */
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapter.h"

/* ---- What a request holds, and what an answer says */

Arena scratch;
Cache cache;
Model checked;
const Json *inputs, *want;
static bool any_output;

Floats floats(const char *name) {  // {"shape": [...], "f32": [...]}; dims from the right, 1 where there are fewer
    const Json *given = member(inputs, name), *list = member(given, "f32"), *shape = member(given, "shape");
    if (!list) return (Floats){NULL, 0, {0, 0, 0}};
    Floats f = {take(&scratch, (size_t)list->count + 1, sizeof(float)), 0, {1, 1, 1}};
    for (const Json *x = list->items; x; x = x->next)
        f.x[f.n++] = (float)strtod(x->text, NULL);  // what is no number is NaN or an infinity, as text
    int at = 3 - shape->count;
    for (const Json *d = shape->items; d; d = d->next) f.dims[at++] = (int)d->number;
    return f;
}

double real(const char *name, double otherwise) {
    const Json *given = member(inputs, name);
    return given ? given->number : otherwise;
}

int whole(const char *name, int otherwise) { return (int)real(name, otherwise); }

const char *word(const char *name) { return text_of(member(inputs, name)); }

uint64_t seed_of(void) { return word("seed") ? strtoull(word("seed"), NULL, 10) : 0; }

int *whole_list(const Json *list, int *n) {
    int *made = take(&scratch, (size_t)(list ? list->count : 0) + 1, sizeof(int));
    *n = 0;
    for (const Json *x = list ? list->items : NULL; x; x = x->next) made[(*n)++] = (int)x->number;
    return made;
}

void begin_output(const char *name) {
    printf("%s\"%s\": ", any_output ? ", " : "\"outputs\": {", name);
    any_output = true;
}

void put(const char *name, const float *x, int n) {
    begin_output(name);
    printf("\"");
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        printf("%08x", bits);
    }
    printf("\"");
}

void put_whole(const char *name, const int *x, int n) {
    begin_output(name);
    for (int i = 0; i < n; i++) printf("%s%d", i ? ", " : "[", x[i]);
    printf(n ? "]" : "[]");
}

/* ---- The loop */

static char *read_line(void) {  // NULL at the end
    size_t size = 1 << 16, n = 0;
    char *line = malloc(size);
    for (int c; line && (c = getchar()) != EOF && c != '\n'; line[n++] = (char)c)
        if (n + 1 == size) {
            char *longer = realloc(line, size *= 2);
            if (!longer) free(line);
            line = longer;
        }
    if (line) line[n] = '\0';
    if (!n) {
        free(line);
        return NULL;
    }
    return line;
}

static const Operation *operation_named(const char *name) {
    const Operation *tables[] = {operations, run_operations};
    for (int i = 0; i < 2; i++)
        for (const Operation *o = tables[i]; o->op; o++)
            if (strcmp(o->op, name) == 0) return o;
    return NULL;
}

static void print_text(const char *text) {  // as JSON
    putchar('"');
    for (; *text; text++) printf((unsigned char)*text < 32 ? "\\u%04x" : strchr("\"\\", *text) ? "\\%c" : "%c", *text);
    putchar('"');
}

static bool run_safely(void (*answer)(void), Failure *failure) {  // false: it was refused
    jmp_buf here;
    failure->jump = &here;
    failed_to = failure;
    bool first = !setjmp(here);
    if (first) answer();
    failed_to = NULL;
    return first;
}

static void answer(const Json *request) {
    Failure failure = {0};
    const Operation *operation = operation_named(text_of(member(request, "op")));
    printf("{\"id\": \"%s\", ", text_of(member(request, "id")));
    inputs = member(request, "inputs"), want = member(request, "want"), any_output = false;
    if (!operation || member(inputs, "cuts"))
        printf("\"skip\": \"%s\"}\n", operation ? "no edges can be cut" : "token ids in and out, no text");
    else if (strcmp(operation->op, "dequantise") == 0 && !can_dequantise(word("kind")))
        printf("\"skip\": \"weights of this kind are not implemented\"}\n");
    else if (run_safely(operation->answer, &failure)) printf(any_output ? "}}\n" : "\"outputs\": {}}\n");
    else {  // before any output, so that the error takes its place
        printf("\"error\": \"%s\", \"message\": ", failure.kind);
        print_text(failure.message);
        printf("}\n");
    }
}

int main(void) {
    for (char *line; (line = read_line()); free(line)) {
        Arena text = {NULL};
        answer(parse_json(line, strlen(line), &text));
        fflush(stdout);
        free_arena(&scratch);
        free_arena(&cache.arena);
        free_arena(&checked.arena);
        free_arena(&text);
    }
    return 0;
}
