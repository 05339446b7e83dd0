/* The trace: every write to the cache and every read from it, as safetensors files. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "trace.h"

static const char *const levels[] = {"writes", "weights", "vectors", "states"};

/* ---- Files: complete or absent (J1), with a checksum for the arrays of each level (J6) */

static uint32_t crc32_of(const unsigned char *bytes, size_t n, uint32_t crc) {
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

static void put_little(unsigned char *bytes, uint64_t x, int n) {
    for (int i = 0; i < n; i++) bytes[i] = (unsigned char)(x >> 8 * i);
}

static uint64_t get_little(const unsigned char *bytes, int n) {
    uint64_t x = 0;
    for (int i = n; i-- > 0;) x = x << 8 | bytes[i];
    return x;
}

/* Rows of 4096 bytes, the last filled up with zeros, as 64-bit numbers: CRC-32 of the rows' sums, then of the columns' sums. */
static uint32_t checksum(const unsigned char *bytes, size_t n) {
    enum { ROW = 4096 };
    uint64_t columns[ROW / 8] = {0};
    uint32_t crc = 0;
    unsigned char word[8];
    for (size_t at = 0; at < n; at += ROW) {
        unsigned char row[ROW] = {0};
        uint64_t sum = 0;
        memcpy(row, bytes + at, n - at < ROW ? n - at : ROW);
        for (int i = 0; i < ROW / 8; i++) {
            uint64_t x = get_little(row + 8 * i, 8);
            sum += x;
            columns[i] += x;
        }
        put_little(word, sum, 8);
        crc = crc32_of(word, 8, crc);
    }
    for (int i = 0; i < ROW / 8; i++) {
        put_little(word, columns[i], 8);
        crc = crc32_of(word, 8, crc);
    }
    return crc;
}

static int bytes_of_type(const char *type) { return strcmp(type, "U8") == 0 ? 1 : strcmp(type, "U64") == 0 ? 8 : 4; }

static unsigned char *serialised(const Array *a, unsigned char *out) {  // little endian, whatever the machine is
    int size = bytes_of_type(a->type);
    for (size_t i = 0; i < a->count; i++, out += size) {
        uint64_t x = 0;
        if (size == 1) x = ((unsigned char *)a->data)[i];
        else if (size == 4) x = ((uint32_t *)a->data)[i];
        else x = ((uint64_t *)a->data)[i];
        put_little(out, x, size);
    }
    return out;
}

static void write_whole(const char *path, const char *text, const unsigned char *bytes, size_t n) {
    char part[600];
    snprintf(part, sizeof part, "%s.part", path);
    FILE *file = fopen(part, "wb");
    if (!file) fail("TraceError", "%s cannot be written", part);
    size_t length = strlen(text), wrote = 0;
    unsigned char size[8];
    put_little(size, length, 8);
    if (bytes) wrote += fwrite(size, 1, 8, file) - 8;
    wrote += fwrite(text, 1, length, file) - length;
    if (bytes) wrote += fwrite(bytes, 1, n, file) - n;
    if (fclose(file) || wrote || rename(part, path)) fail("TraceError", "%s cannot be written", path);
}

/* A safetensors file of those arrays that the level holds, level by level, with the metadata that begins `about`. */
static void write_arrays(const char *path, const char *about, const Array *arrays, int n, int level, Arena *arena) {
    size_t total = 1, used, at = 0;
    for (int i = 0; i < n; i++) total += arrays[i].count * (size_t)bytes_of_type(arrays[i].type);
    unsigned char *bytes = take(arena, total, 1), *end = bytes;
    char *header = take(arena, 8192, 1), entries[6000] = "";
    used = (size_t)snprintf(header, 8192, "{\"__metadata__\":{%s", about);
    for (int l = level; l >= 0; l--) {
        unsigned char *begin = end;
        for (int i = 0; i < n; i++)
            if (arrays[i].level == l) {
                const Array *a = &arrays[i];
                size_t from = (size_t)(end - bytes);
                end = serialised(a, end);
                at += (size_t)snprintf(entries + at, sizeof entries - at, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", a->name,
                                       a->type);
                for (int d = 0; d < a->n_dims; d++)
                    at += (size_t)snprintf(entries + at, sizeof entries - at, d ? ",%zu" : "%zu", a->dims[d]);
                at += (size_t)snprintf(entries + at, sizeof entries - at, "],\"data_offsets\":[%zu,%zu]}", from,
                                       (size_t)(end - bytes));
            }
        used += (size_t)snprintf(header + used, 8192 - used, ",\"sum.%s\":\"%08x\"", levels[l],
                                 (unsigned)checksum(begin, (size_t)(end - begin)));
    }
    used += (size_t)snprintf(header + used, 8192 - used, "}%s}", entries);
    while (used % 8 && used < 8191) header[used++] = ' ';
    write_whole(path, header, bytes, (size_t)(end - bytes));
}

/* ---- What is recorded of a call */

static void *add(Trace *t, const char *name, const char *type, int level, int n_dims, size_t a, size_t b, size_t c, size_t d) {
    Array *array = &t->arrays[t->n_arrays++];
    const size_t dims[] = {a, b, c, d};
    *array = (Array){.name = name, .type = type, .level = level, .n_dims = n_dims, .count = 1};
    for (int i = 0; i < n_dims; i++) array->count *= array->dims[i] = dims[i];
    return array->data = take(&t->arena, array->count + 1, (size_t)bytes_of_type(type));
}

static Array *named(Trace *t, const char *name) {
    for (int i = 0; i < t->n_arrays; i++)
        if (strcmp(t->arrays[i].name, name) == 0) return &t->arrays[i];
    return NULL;
}

/* The arrays that forward() fills through `record`, of any level: k and v are needed for their hashes. */
static void add_states(Trace *t) {
    static const char *const sites[] = {"resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"};
    const Config *p = t->config;
    size_t L = (size_t)p->n_layers, T = (size_t)t->T, H = (size_t)p->n_heads, G = (size_t)p->n_kv_heads,
           hd = (size_t)p->head_dim, reads = 0;
    t->reads_before = take(&t->arena, L * (T + 1), sizeof(size_t));
    for (int l = 0; l < p->n_layers; l++) {
        size_t *before = t->reads_before + (size_t)l * (T + 1);
        for (int i = 0; i < t->T; i++)
            before[i + 1] = before[i] + (size_t)(t->start + i + 1 - first_slot(t->start + i, window_of(p, l)));
        reads += before[T];
    }
    add(t, "weight", "F32", 1, 1, H * reads, 0, 0, 0);
    add(t, "score", "F32", 2, 1, H * reads, 0, 0, 0);
    add(t, "q", "F32", 2, 4, L, T, H, hd);
    add(t, "k", "F32", 2, 4, L, T, G, hd);
    add(t, "v", "F32", 2, 4, L, T, G, hd);
    add(t, "z", "F32", 2, 4, L, T, H, hd);
    for (int i = 0; i < 5; i++) add(t, sites[i], "F32", 3, 3, L, T, (size_t)p->d_model, 0);
    add(t, "final_scale", "F32", 3, 1, T, 0, 0, 0);
    add(t, "logits", "F32", 3, 2, T, (size_t)p->vocab_size, 0, 0);
}

static float final_scale(const Config *p, const float *x) {
    float c[p->d_model];
    memcpy(c, x, sizeof c);
    float mean = p->norm == LAYER ? sum16(x, p->d_model, 0) / p->d_model : 0;
    for (int i = 0; i < p->d_model && p->norm == LAYER; i++) c[i] = x[i] - mean;
    return p->norm == NO_NORM ? 1 : norm_scale(c, (float)p->norm_eps, p->d_model);
}

static void record(void *self, const char *site, int layer, int pos, const float *x, int n) {
    Trace *t = self;
    bool weights = strcmp(site, "pattern") == 0, scores = strcmp(site, "scores") == 0;
    Array *a = named(t, weights ? "weight" : scores ? "score" : site);
    if (!a) return;
    int at = pos - t->start, H = t->config->n_heads;
    float *out = a->data;
    if (weights || scores) {  // layer by layer, each [H, R]
        const size_t *before = t->reads_before + (size_t)layer * (size_t)(t->T + 1);
        for (int l = 0; l < layer; l++) out += (size_t)H * t->reads_before[(size_t)l * (size_t)(t->T + 1) + (size_t)t->T];
        for (int h = 0; h < H; h++)
            memcpy(out + (size_t)h * before[t->T] + before[at], x + h * (n / H), (size_t)(n / H) * sizeof(float));
        return;
    }
    memcpy(out + ((size_t)(layer % t->config->n_layers) * t->T + at) * n, x,
           (size_t)n * sizeof(float));  // logits come from layer L
    if (strcmp(site, "resid_post") == 0 && layer == t->config->n_layers - 1)
        ((float *)named(t, "final_scale")->data)[at] = final_scale(t->config, x);
}

/* The arrays of level writes: what was appended, written and read, in whole numbers and hashes. */
static void add_writes(Trace *t, const int *tokens, bool sampled) {
    const Config *p = t->config;
    size_t L = (size_t)p->n_layers, T = (size_t)t->T, H = (size_t)p->n_heads, G = (size_t)p->n_kv_heads,
           hd = (size_t)p->head_dim;
    for (int i = 0; i < 2; i++) {
        const float *x = named(t, i ? "v" : "k")->data;
        uint64_t *hash = add(t, i ? "v_hash" : "k_hash", "U64", 0, 3, L, T, G, 0);
        for (size_t row = 0; row < L * T * G; row++) hash[row] = hash_words(x + row * hd, (int)hd);
    }
    for (int i = 0; i < 2; i++) {
        const float *x = named(t, i ? "v" : "k")->data;
        float *length = add(t, i ? "v_norm" : "k_norm", "F32", 0, 3, L, T, G, 0);
        for (size_t row = 0; row < L * T * G; row++) length[row] = sqrtf(sum16_squares(x + row * hd, (int)hd));
    }
    int *id = add(t, "token_id", "I32", 0, 1, T, 0, 0, 0), *end = add(t, "text_end", "I32", 0, 1, T, 0, 0, 0);
    int *turn = add(t, "turn", "I32", 0, 1, T, 0, 0, 0), *chunk = add(t, "chunk", "I32", 0, 1, T, 0, 0, 0);
    int *slot = add(t, "write_slot", "I32", 0, 1, L, 0, 0, 0), *layer = add(t, "read_layer", "I32", 0, 1, L, 0, 0, 0);
    int *head = add(t, "read_kv_head", "I32", 0, 2, L, H, 0, 0);
    int *first = add(t, "read_first", "I32", 0, 2, L, T, 0, 0), *stop = add(t, "read_stop", "I32", 0, 2, L, T, 0, 0);
    char *texts = take(&t->arena, 12 * T + 1, 1);  // a token's text is its id, for there is no tokenizer
    for (size_t i = 0; i < T; i++) {
        id[i] = tokens[i], turn[i] = t->turn, chunk[i] = t->chunk;
        sprintf(texts + (i ? end[i - 1] : 0), "%d", tokens[i]);
        end[i] = (int)strlen(texts);
    }
    for (size_t l = 0; l < L; l++) {
        slot[l] = t->start, layer[l] = (int)l;
        for (size_t h = 0; h < H; h++) head[l * H + h] = kv_head((int)h, p->n_heads, p->n_kv_heads);
        for (size_t i = 0; i < T; i++) {
            int pos = t->start + (int)i;
            first[l * T + i] = first_slot(pos, window_of(p, (int)l)), stop[l * T + i] = pos + 1;
        }
    }
    memcpy(add(t, "text", "U8", 0, 1, strlen(texts), 0, 0, 0), texts, strlen(texts));
    memset(add(t, "role", "U8", 0, 1, T, 0, 0, 0), t->turn ? 1 : 0, T);  // user, then model
    memset(add(t, "sampled", "U8", 0, 1, T, 0, 0, 0), sampled, T);
}

const float *call(Model *m, Cache *cache, const int *tokens, int n, Trace *t, bool sampled) {
    check_call(m, cache, tokens, n);
    const Observer observer = {record, t};
    const float *logits = NULL;
    if (t) {
        t->n_arrays = 0, t->start = cache->length, t->T = n;
        if (sampled && !t->turn) t->turn = 1, t->chunk = 0;
        add_states(t);
    }
    for (int i = 0; i < n; i++) logits = forward(m, cache, tokens[i], t ? &observer : NULL);
    if (t) {
        char path[600], about[200];
        add_writes(t, tokens, sampled);
        snprintf(path, sizeof path, "%s/step-%06d.safetensors", t->folder, t->n_steps);
        snprintf(about, sizeof about, "\"format\":\"nanokv-trace-step 1\",\"step\":\"%d\",\"start\":\"%d\"", t->n_steps,
                 t->start);
        write_arrays(path, about, t->arrays, t->n_arrays, t->level, &t->arena);
        free_arena(&t->arena);
        t->chunk++;
        if (++t->n_steps % 64 == 0) end_trace(t, cache);
    }
    return logits;
}

/* ---- The whole trace */

static void put_rope(FILE *out, const char *name, const Rope *rope, int pairs) {
    if (!rope->base) {
        fprintf(out, " \"%s\": null,\n", name);
        return;
    }
    fprintf(out, " \"%s\": {\"base\": %.17g, \"divisors\": ", name, rope->base);
    for (int i = 0; rope->divisors && i < pairs; i++) fprintf(out, "%s%.17g", i ? ", " : "[", rope->divisors[i]);
    fprintf(out, rope->divisors ? "]},\n" : "null},\n");
}

static void put_config(FILE *out, const Config *p) {  // C1, every field
    static const char *const norms[] = {"rms", "layer", "none"}, *const activations[] = {"silu", "gelu_tanh", "gelu", "relu"};
    const struct {
        const char *name;
        bool value;
    } flags[] = {{"learned_positions", p->learned_positions},
                 {"gated_mlp", p->gated_mlp},
                 {"qkv_bias", p->qkv_bias},
                 {"out_bias", p->out_bias},
                 {"mlp_bias", p->mlp_bias},
                 {"qk_norm", p->qk_norm},
                 {"post_norms", p->post_norms},
                 {"tied_head", p->tied_head}};
    fprintf(out, "{\n \"n_layers\": %d, \"n_heads\": %d, \"n_kv_heads\": %d, \"head_dim\": %d,\n", p->n_layers, p->n_heads,
            p->n_kv_heads, p->head_dim);
    fprintf(out, " \"d_model\": %d, \"d_ff\": %d, \"vocab_size\": %d, \"n_ctx\": %d,\n", p->d_model, p->d_ff, p->vocab_size,
            p->n_ctx);
    fprintf(out, " \"norm\": \"%s\", \"norm_eps\": %.17g, \"activation\": \"%s\",\n", norms[p->norm], p->norm_eps,
            activations[p->activation]);
    put_rope(out, "rope", &p->rope, p->head_dim / 2);
    put_rope(out, "rope_local", &p->rope_local, p->head_dim / 2);
    fprintf(out, " \"rope_pairs\": \"%s\", \"attn_scale\": %.17g, \"embed_scale\": %.17g,\n",
            p->neighbours ? "neighbours" : "halves", p->attn_scale, p->embed_scale);
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        fprintf(out, " \"%s\": %s,\n", flags[i].name, flags[i].value ? "true" : "false");
    if (p->window) fprintf(out, " \"window\": %d,\n", p->window);
    else fprintf(out, " \"window\": null,\n");
    fprintf(out, " \"sliding\": [");
    for (int l = 0; l < p->n_layers; l++) fprintf(out, "%s%s", l ? ", " : "", p->sliding[l] ? "true" : "false");
    fprintf(out, "]\n}");
}

void begin_trace(Trace *t, const char *folder, const char *level, const Config *config) {
    *t = (Trace){.config = config, .level = -1};
    for (int i = 0; i < 4; i++)
        if (strcmp(levels[i], level) == 0) t->level = i;
    if (t->level < 0) fail("TraceError", "the level is writes, weights, vectors or states");
    snprintf(t->folder, sizeof t->folder, "%s", folder);
    if (mkdir(folder, 0777)) fail("TraceError", "%s cannot be made, or is already there", folder);
    char path[600];
    snprintf(path, sizeof path, "%s/trace.json", folder);
    FILE *out = fopen(path, "wb");
    if (!out) fail("TraceError", "%s cannot be written", path);
    fprintf(out, "{\"schema\": \"nanokv-trace\", \"version\": 1, \"level\": \"%s\", \"topk\": null, \"dtype\": \"float32\",\n",
            level);
    fprintf(out, "\"architecture\": \"standard\", \"model_hash\": \"\", \"model_name\": \"\",\n\"config\": ");
    put_config(out, config);
    fprintf(out, "}\n");
    if (fclose(out)) fail("TraceError", "%s cannot be written", path);
}

/* An audit (J7): the hashes of the whole cache as it is now, summed over layers and heads, and over slots. */
void end_trace(Trace *t, const Cache *cache) {
    if (!t->n_steps) return;
    size_t S = (size_t)cache->length, L = (size_t)cache->n_layers, G = (size_t)cache->n_kv_heads;
    char path[600], about[100];
    t->n_arrays = 0;
    uint64_t *by_slot[] = {add(t, "k_by_slot", "U64", 0, 1, S, 0, 0, 0), add(t, "v_by_slot", "U64", 0, 1, S, 0, 0, 0)};
    uint64_t *by_head[] = {add(t, "k_by_head", "U64", 0, 2, L, G, 0, 0), add(t, "v_by_head", "U64", 0, 2, L, G, 0, 0)};
    for (size_t l = 0; l < L; l++)
        for (size_t s = 0; s < S; s++)
            for (size_t g = 0; g < G; g++)
                for (int i = 0; i < 2; i++) {
                    const float *entry = cache_place(cache, i ? cache->v : cache->k, (int)l, (int)s) + (int)g * cache->head_dim;
                    uint64_t hash = hash_words(entry, cache->head_dim);
                    by_slot[i][s] += hash;
                    by_head[i][l * G + g] += hash;
                }
    snprintf(path, sizeof path, "%s/audit-%06d.safetensors", t->folder, t->n_steps - 1);
    snprintf(about, sizeof about, "\"format\":\"nanokv-trace-audit 1\",\"step\":\"%d\"", t->n_steps - 1);
    write_arrays(path, about, t->arrays, t->n_arrays, 0, &t->arena);
    free_arena(&t->arena);
}
