/* Memory that is freed together, and errors that leave from anywhere. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "nanokv.h"

struct Chunk {
    Chunk *next;
    max_align_t data[];
};

void *take(Arena *arena, size_t count, size_t size) {
    if (size && count > (SIZE_MAX - sizeof(Chunk)) / size) fail("NanokvError", "%zu times %zu bytes are too many", count, size);
    Chunk *chunk = calloc(1, sizeof(Chunk) + count * size);
    if (!chunk) fail("NanokvError", "no memory for %zu times %zu bytes", count, size);
    chunk->next = arena->first;
    arena->first = chunk;
    return chunk->data;
}

void free_arena(Arena *arena) {
    while (arena->first) {
        Chunk *next = arena->first->next;
        free(arena->first);
        arena->first = next;
    }
}

Failure *failed_to;

void fail(const char *kind, const char *format, ...) {
    char message[240];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    if (!failed_to) {
        fprintf(stderr, "%s: %s\n", kind, message);
        exit(1);
    }
    failed_to->kind = kind;
    snprintf(failed_to->message, sizeof failed_to->message, "%s", message);
    longjmp(*(jmp_buf *)failed_to->jump, 1);
}
