/* safetensors and GGUF (C5), read without believing what they say, and the forms that weights have in them (C6). */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "files.h"

unsigned char *read_bytes(const char *path, size_t *size, Arena *arena) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("FileFormatError", "%s cannot be read", path);
    long length = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    rewind(file);
    unsigned char *bytes = length < 0 ? NULL : take(arena, (size_t)length + 1, 1);
    *size = bytes ? fread(bytes, 1, (size_t)length, file) : 0;
    fclose(file);
    if (!bytes || *size != (size_t)length) fail("FileFormatError", "%s cannot be read to its end", path);
    return bytes;
}

Tensor *tensor_named(const File *file, const char *name) {
    for (int i = 0; i < file->n_tensors; i++)
        if (strcmp(file->tensors[i].name, name) == 0) return &file->tensors[i];
    return NULL;
}

const Pair *pair_named(const File *file, const char *format, const char *architecture) {
    char key[128];
    snprintf(key, sizeof key, format, architecture);
    for (int i = 0; i < file->n_pairs; i++)
        if (strcmp(file->pairs[i].key, key) == 0) return &file->pairs[i];
    return NULL;
}

/* ---- Kinds */

static const struct {
    int id;
    const char *name;
    size_t per_block, bytes;
} kinds[] = {
    {0, "F32", 1, 4}, {1, "F16", 1, 2}, {30, "BF16", 1, 2}, {2, "Q4_0", 32, 18}, {3, "Q4_1", 32, 20}, {8, "Q8_0", 32, 34},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static int kind_index(const char *name) {
    for (int i = 0; i < N_KINDS; i++)
        if (strcmp(kinds[i].name, name) == 0) return i;
    return -1;
}

bool can_dequantise(const char *kind) { return kind_index(kind) >= 0; }

static uint64_t little(const unsigned char *bytes, int n) {
    uint64_t value = 0;
    for (int i = n; i-- > 0;) value = value << 8 | bytes[i];
    return value;
}

static float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float half(const unsigned char *bytes) {
    uint32_t bits = (uint32_t)little(bytes, 2), exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? ldexpf((float)(1024 + fraction), (int)exponent - 25)
                                : ldexpf((float)fraction, -24);
    return bits >> 15 ? -size : size;
}

void dequantise(float *y, const char *kind, const unsigned char *data, size_t count) {
    int k = kind_index(kind);
    if (k < 0) fail("FileFormatError", "weights of kind %s are not implemented", kind);
    size_t per_block = kinds[k].per_block, bytes = kinds[k].bytes;
    for (size_t at = 0; at < count; at += per_block, data += bytes, y += per_block) {
        if (strcmp(kind, "F32") == 0) *y = as_float((uint32_t)little(data, 4));
        else if (strcmp(kind, "F16") == 0) *y = half(data);
        else if (strcmp(kind, "BF16") == 0) *y = as_float((uint32_t)little(data, 2) << 16);
        else if (strcmp(kind, "Q8_0") == 0)
            for (int i = 0; i < 32; i++) y[i] = half(data) * (float)(data[2 + i] < 128 ? data[2 + i] : data[2 + i] - 256);
        else {
            bool has_m = strcmp(kind, "Q4_1") == 0;
            float d = half(data), m = has_m ? half(data + 2) : 0;
            const unsigned char *qs = data + (has_m ? 4 : 2);
            for (int i = 0; i < 32; i++) {
                int q = i < 16 ? qs[i] & 15 : qs[i - 16] >> 4;
                y[i] = has_m ? fmaf((float)q, d, m) : d * (float)(q - 8);
            }
        }
    }
}

/* ---- safetensors */

static size_t size_of_type(const char *type) {
    static const char *const types[] = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16",
                                        "I8",  "U64", "U32", "U16",  "U8",  "BOOL"};
    static const size_t sizes[] = {8, 4, 2, 2, 8, 4, 2, 1, 8, 4, 2, 1, 1};
    for (size_t i = 0; type && i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(types[i], type) == 0) return sizes[i];
    return 0;
}

static size_t whole(const Json *json) {
    if (!json || json->kind != J_NUMBER || !(json->number >= 0 && json->number <= 9e15) || json->number != floor(json->number))
        fail("FileFormatError", "a size is not a whole number");
    return (size_t)json->number;
}

static void read_entry(Tensor *t, const Json *entry, const unsigned char *body, size_t body_size) {
    const Json *shape = member(entry, "shape"), *offsets = member(entry, "data_offsets");
    size_t size = size_of_type(text_of(member(entry, "dtype")));
    if (!size || !shape || shape->kind != J_LIST || shape->count > 8 || !offsets || offsets->kind != J_LIST ||
        offsets->count != 2)
        fail("FileFormatError", "array %s is not described as it should be", entry->key);
    *t = (Tensor){.name = entry->key, .kind = text_of(member(entry, "dtype")), .n_dims = shape->count};
    int i = 0;
    for (const Json *n = shape->items; n; n = n->next) {
        t->dims[i] = whole(n);
        if (t->dims[i] && size > SIZE_MAX / t->dims[i]) fail("FileFormatError", "array %s is too large", entry->key);
        size *= t->dims[i++];
    }
    size_t begin = whole(offsets->items), end = whole(offsets->items->next);
    if (begin > end || end > body_size || end - begin != size)
        fail("FileFormatError", "array %s does not fit its place", entry->key);
    t->data = body + begin;
    t->size = size;
}

void open_safetensors(File *file, const unsigned char *bytes, size_t size, Arena *arena) {
    uint64_t length = size < 8 ? 0 : little(bytes, 8);
    if (length < 2 || length > size - 8) fail("FileFormatError", "a header of another length than the file has");
    const Json *header = parse_json((const char *)bytes + 8, (size_t)length, arena);
    if (header->kind != J_OBJECT) fail("FileFormatError", "the header is no object");
    const unsigned char *body = bytes + 8 + length;
    *file = (File){.tensors = take(arena, (size_t)header->count + 1, sizeof(Tensor))};
    for (const Json *entry = header->items; entry; entry = entry->next)
        if (strcmp(entry->key, "__metadata__") != 0)
            read_entry(&file->tensors[file->n_tensors++], entry, body, size - 8 - length);
    // They lie one after the other: each begins where another ends, or at the beginning, and their sizes add up to the file's.
    size_t total = 0;
    for (int i = 0; i < file->n_tensors; i++) {
        const Tensor *t = &file->tensors[i];
        bool placed = t->data == body;
        for (int j = 0; j < file->n_tensors && !placed; j++)
            placed = j != i && file->tensors[j].data + file->tensors[j].size == t->data;
        for (int j = 0; j < i && t->size; j++)
            if (file->tensors[j].data == t->data && file->tensors[j].size) placed = false;
        if (!placed) fail("FileFormatError", "array %s leaves a gap or overlaps another", t->name);
        total += t->size;
    }
    if (total != size - 8 - length) fail("FileFormatError", "the arrays do not fill the file");
}

/* ---- GGUF */

typedef struct {
    const unsigned char *bytes;
    size_t at, size;
    Arena *arena;
} Cursor;

static const unsigned char *skip(Cursor *c, uint64_t n) {
    if (n > c->size - c->at) fail("FileFormatError", "the file ends at byte %zu, in the midst of its header", c->size);
    c->at += (size_t)n;
    return c->bytes + c->at - n;
}

static uint64_t number(Cursor *c, int bytes) { return little(skip(c, (uint64_t)bytes), bytes); }

static const char *string(Cursor *c) {
    uint64_t n = number(c, 8);
    const unsigned char *bytes = skip(c, n);
    char *copy = take(c->arena, (size_t)n + 1, 1);
    memcpy(copy, bytes, (size_t)n);
    return copy;
}

static double value(Cursor *c, uint32_t type, const char **text, int depth) {
    static const int sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type > 12 || depth > 4) fail("FileFormatError", "a pair of an unknown type");
    if (type == 8) {
        *text = string(c);
        return 0;
    }
    if (type == 9) {
        uint32_t of = (uint32_t)number(c, 4);
        uint64_t count = number(c, 8);
        const char *ignored;
        if (of < 8 || (of > 9 && of <= 12)) skip(c, count > c->size ? c->size + 1 : count * (uint64_t)sizes[of]);
        else
            for (uint64_t i = 0; i < count; i++) value(c, of, &ignored, depth + 1);
        return (double)count;
    }
    uint64_t bits = number(c, sizes[type]);
    switch (type) {
    case 1: return (int8_t)bits;
    case 3: return (int16_t)bits;
    case 5: return (int32_t)bits;
    case 6: return as_float((uint32_t)bits);
    case 11: return (double)(int64_t)bits;
    case 12: {
        double x;
        memcpy(&x, &bits, 8);
        return x;
    }
    default: return (double)bits;
    }
}

static void read_info(Cursor *c, Tensor *t, uint64_t *offset) {
    *t = (Tensor){.name = string(c)};
    t->n_dims = (int)number(c, 4);
    if (t->n_dims < 1 || t->n_dims > 4) fail("FileFormatError", "tensor %s of %d dimensions", t->name, t->n_dims);
    size_t count = 1;
    for (int i = t->n_dims; i-- > 0;) {  // innermost first
        t->dims[i] = (size_t)number(c, 8);
        if (!t->dims[i] || t->dims[i] > SIZE_MAX / count) fail("FileFormatError", "tensor %s has no such dimensions", t->name);
        count *= t->dims[i];
    }
    int id = (int)number(c, 4);
    *offset = number(c, 8);
    for (int i = 0; i < N_KINDS; i++)
        if (kinds[i].id == id) {
            if (t->dims[t->n_dims - 1] % kinds[i].per_block)
                fail("FileFormatError", "tensor %s has rows of broken blocks", t->name);
            t->kind = kinds[i].name;
            size_t n_blocks = count / kinds[i].per_block;
            t->size = n_blocks > SIZE_MAX / kinds[i].bytes ? SIZE_MAX : n_blocks * kinds[i].bytes;
        }
    if (!t->kind) fail("FileFormatError", "tensor %s is of kind %d, which is not implemented", t->name, id);
}

void open_gguf(File *file, const unsigned char *bytes, size_t size, Arena *arena) {
    Cursor c = {bytes, 0, size, arena};
    if (memcmp(skip(&c, 4), "GGUF", 4) != 0) fail("FileFormatError", "it does not begin with GGUF");
    uint64_t version = number(&c, 4), n_tensors = number(&c, 8), n_pairs = number(&c, 8);
    if (version != 2 && version != 3) fail("FileFormatError", "GGUF version %d", (int)version);
    if (n_pairs > size || n_tensors > size) fail("FileFormatError", "more pairs or tensors than the file has bytes");
    *file = (File){.pairs = take(arena, (size_t)n_pairs + 1, sizeof(Pair)),
                   .tensors = take(arena, (size_t)n_tensors + 1, sizeof(Tensor))};
    for (; (uint64_t)file->n_pairs < n_pairs; file->n_pairs++) {
        Pair *pair = &file->pairs[file->n_pairs];
        pair->key = string(&c);
        uint32_t type = (uint32_t)number(&c, 4);
        pair->number = value(&c, type, &pair->text, 0);
    }
    uint64_t *offsets = take(arena, (size_t)n_tensors + 1, sizeof *offsets);
    for (; (uint64_t)file->n_tensors < n_tensors; file->n_tensors++)
        read_info(&c, &file->tensors[file->n_tensors], &offsets[file->n_tensors]);
    const Pair *said = pair_named(file, "general.alignment%s", "");
    size_t alignment = said ? (size_t)said->number : 32;
    if (!alignment || alignment & (alignment - 1)) fail("FileFormatError", "an alignment that is no power of two");
    size_t start = (c.at + alignment - 1) / alignment * alignment;
    for (int i = 0; i < file->n_tensors; i++) {
        Tensor *t = &file->tensors[i];
        if (start > size || offsets[i] % alignment || offsets[i] > size - start || t->size > size - start - offsets[i])
            fail("FileFormatError", "tensor %s is outside of the file, or not aligned", t->name);
        t->data = bytes + start + offsets[i];
    }
}
