/* Levels 0 and 1, choosing a token, and what must be refused. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapter.h"

/* ---- Level 0 */

static void answer_kv_head(void) {
    int heads[64], n = whole("n_heads", 0);
    for (int h = 0; h < n; h++) heads[h] = kv_head(h, n, whole("n_kv_heads", 1));
    put_whole("kv_head", heads, n);
}

static void answer_reads(void) {
    int start = whole("start", 0), n = whole("n", 0), r = 0;
    int *dst = take(&scratch, (size_t)n * (start + n), sizeof(int)),
        *src = take(&scratch, (size_t)n * (start + n), sizeof(int));
    for (int pos = start; pos < start + n; pos++)
        for (int slot = first_slot(pos, whole("window", 0)); slot <= pos; slot++) dst[r] = pos, src[r++] = slot;
    put_whole("dst", dst, r);
    put_whole("src", src, r);
}

static void answer_rope_pairs(void) {
    int pairs[64], hd = whole("head_dim", 0);
    for (int i = 0; i < hd / 2; i++) pair(&pairs[2 * i], &pairs[2 * i + 1], i, hd, strcmp(word("pairs"), "neighbours") == 0);
    put_whole("pairs", pairs, hd);
}

static void answer_offset(void) {
    int offset = 0;
    const Json *index = member(inputs, "index")->items;
    for (const Json *n = member(inputs, "shape")->items; n; n = n->next, index = index->next)
        offset = offset * (int)n->number + (int)index->number;
    put_whole("offset", &offset, 1);
}

/* ---- Level 1 */

static void answer_number(void) {
    const char *name = word("function");
    Floats x = floats("x"), a = floats("a"), b = floats("b"), c = floats("c");
    float (*function)(float) = strcmp(name, "exp") == 0    ? exp32
                               : strcmp(name, "tanh") == 0 ? tanh32
                               : strcmp(name, "erf") == 0  ? erf32
                                                           : NULL;
    if (function) {
        for (int i = 0; i < x.n; i++) x.x[i] = function(x.x[i]);
        put("y", x.x, x.n);
    } else if (strcmp(name, "fma") == 0) {
        for (int i = 0; i < a.n; i++) a.x[i] = fmaf(a.x[i], b.x[i], c.x[i]);
        put("y", a.x, a.n);
    } else {
        float y = strcmp(name, "sum") == 0       ? sum16(x.x, x.n, whole("first", 0))
                  : strcmp(name, "maximum") == 0 ? maximum(x.x, x.n)
                                                 : sum16_squares(x.x, x.n);
        put("y", &y, 1);
    }
}

static void answer_linear(void) {
    Floats x = floats("x"), w = floats("w"), b = floats("b");
    int rows = x.dims[1], k = x.dims[2], n = w.dims[1];
    float *y = take(&scratch, (size_t)rows * n, sizeof(float));
    for (int t = 0; t < rows; t++) linear(y + t * n, x.x + t * k, w.x, b.x, n, k);
    put("y", y, rows * n);
}

static void answer_norm(void) {
    Floats x = floats("x"), w = floats("w"), b = floats("b");
    for (int at = 0; at < x.n; at += w.n) {
        if (b.x) layer_norm(x.x + at, x.x + at, w.x, b.x, (float)real("eps", 0), w.n);
        else rms_norm(x.x + at, x.x + at, w.x, (float)real("eps", 0), w.n);
    }
    put("y", x.x, x.n);
}

static void answer_rope_table(void) {
    int hd = whole("head_dim", 0), n = whole("n", 0), P = hd / 2, i = 0;
    Rope rope = {.base = real("base", 0)};
    const Json *divisors = member(inputs, "divisors");
    if (divisors) rope.divisors = take(&scratch, (size_t)P, sizeof(double));
    for (const Json *d = divisors ? divisors->items : NULL; d; d = d->next) rope.divisors[i++] = d->number;
    set_frequencies(&rope, hd, &scratch);
    float *cos_ = take(&scratch, (size_t)n * P, sizeof(float)), *sin_ = take(&scratch, (size_t)n * P, sizeof(float));
    for (int t = 0; t < n; t++) rope_table(cos_ + t * P, sin_ + t * P, &rope, hd, whole("start", 0) + t);
    put("cos", cos_, n * P);
    put("sin", sin_, n * P);
}

static void answer_rope(void) {
    Floats x = floats("x"), c = floats("cos"), s = floats("sin");
    int heads = x.dims[1], hd = x.dims[2];
    for (int t = 0; t < x.dims[0]; t++)
        rotate(x.x + t * heads * hd, c.x + t * hd / 2, s.x + t * hd / 2, heads, hd, strcmp(word("pairs"), "neighbours") == 0);
    put("y", x.x, x.n);
}

static void answer_activate(void) {
    static const char *const names[] = {"silu", "gelu_tanh", "gelu", "relu"};
    Floats up = floats("up"), gate = floats("gate");
    int kind = 0;
    while (strcmp(names[kind], word("kind")) != 0) kind++;
    activate(up.x, gate.x, up.x, (Activation)kind, up.n);
    put("y", up.x, up.n);
}

static void answer_attention(void) {
    Floats q = floats("q"), k = floats("k"), v = floats("v");
    int T = q.dims[0], H = q.dims[1], hd = q.dims[2], S = k.dims[0], window = whole("window", 0), reads = 0, at = 0;
    Cache cache = {1, S, k.dims[1], hd, 0, &S, k.x, v.x, {NULL}};
    for (int t = 0; t < T; t++) reads += S - T + t + 1 - first_slot(S - T + t, window);
    size_t all = (size_t)H * reads;
    float *rows = take(&scratch, 2 * all, sizeof(float)), *scores = take(&scratch, 2 * all, sizeof(float)),
          *weights = scores + all;
    for (int t = 0; t < T; t++) {
        int pos = S - T + t, first = first_slot(pos, window), n = pos + 1 - first;
        attention(q.x + t * H * hd, q.x + t * H * hd, &cache, 0, first, pos, H, (float)real("scale", 1), rows, rows + all);
        for (int h = 0; h < H; h++) {  // [H, R] of all positions
            memcpy(scores + h * reads + at, rows + h * n, (size_t)n * sizeof(float));
            memcpy(weights + h * reads + at, rows + all + h * n, (size_t)n * sizeof(float));
        }
        at += n;
    }
    put("scores", scores, (int)all);
    put("pattern", weights, (int)all);
    put("z", q.x, q.n);
}

static unsigned char *bytes_of(const char *hex, size_t *n) {
    *n = strlen(hex) / 2;
    unsigned char *bytes = take(&scratch, *n + 1, 1);
    for (size_t i = 0; i < *n; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], 0};
        bytes[i] = (unsigned char)strtoul(digits, NULL, 16);
    }
    return bytes;
}

static void answer_dequantise(void) {
    size_t n, count = 1;
    const unsigned char *data = bytes_of(word("data"), &n);
    for (const Json *d = member(inputs, "shape")->items; d; d = d->next) count *= (size_t)d->number;
    float *y = take(&scratch, count, sizeof(float));
    dequantise(y, word("kind"), data, count);
    put("y", y, (int)count);
}

static void answer_hash_words(void) {
    Floats x = floats("x");
    begin_output("hash");
    for (int t = 0; t < x.dims[1]; t++)
        printf("%s\"%016llx\"", t ? ", " : "[", (unsigned long long)hash_words(x.x + t * x.dims[2], x.dims[2]));
    printf("]");
}

/* ---- Choosing a token */

static Sampling sampling(void) {
    Sampling how = {real("temperature", 0), real("top_p", 0), whole("top_k", 0)};
    if ((member(inputs, "top_k") && !how.top_k) || (member(inputs, "top_p") && !how.top_p))
        how.top_k = -1;  // 0 is not "all" here
    check_sampling(&how);
    return how;
}

static void answer_pcg32(void) {
    Pcg32 random;
    pcg32_seed(&random, seed_of(), (uint64_t)whole("stream", 0));
    begin_output("words");
    for (int i = 0; i < whole("n", 0); i++) printf("%s%lu", i ? ", " : "[", (unsigned long)pcg32_next(&random));
    printf("]");
}

static void answer_greedy(void) {
    Floats logits = floats("logits");
    int token = greedy(logits.x, logits.n);
    put_whole("token", &token, 1);
}

static void answer_sample(void) {
    Floats logits = floats("logits");
    Sampling how = sampling();
    Pcg32 random;
    int n = whole("n", 0), *tokens = take(&scratch, (size_t)n, sizeof(int));
    pcg32_seed(&random, seed_of(), 0);
    for (int i = 0; i < n; i++) tokens[i] = sample(logits.x, logits.n, &how, &random);
    put_whole("tokens", tokens, n);
}

static void answer_generate(void) {
    Sampling how = sampling();
    Pcg32 random;
    int n, n_stop, n_made = 0, *tokens = whole_list(member(inputs, "tokens"), &n),
                   *stop = whole_list(member(inputs, "stop"), &n_stop);
    int most = whole("max_new_tokens", 0), *made = take(&scratch, (size_t)most + 1, sizeof(int));
    Model *m = the_model();
    new_cache(&cache, &m->config);
    check_call(m, &cache, tokens, n);
    pcg32_seed(&random, seed_of(), 0);
    const float *logits = NULL;
    for (int t = 0; t < n; t++) logits = forward(m, &cache, tokens[t], NULL);
    for (; n_made < most; n_made++) {
        int token = how.temperature == 0 ? greedy(logits, m->config.vocab_size)
                                         : sample(logits, m->config.vocab_size, &how, &random);
        for (int i = 0; i < n_stop; i++)
            if (token == stop[i]) most = -1;
        if (most < 0) break;
        check_call(m, &cache, &token, 1);
        logits = forward(m, &cache, token, NULL);
        made[n_made] = token;
    }
    put_whole("tokens", made, n_made);
}

/* ---- What must be refused */

static void answer_cache(void) {
    Config config = {.n_layers = whole("n_layers", 1), .n_ctx = whole("n_ctx", 1), .n_kv_heads = 1, .head_dim = 1};
    new_cache(&cache, &config);
    for (const Json *call = member(inputs, "actions")->items; call; call = call->next) {
        for (const Json *action = call->items->next; action; action = action->next) {
            const Json *what = action->items, *layer = what->next, *slot = layer->next, *n = slot->next;
            if (strcmp(what->text, "write") == 0) cache_claim(&cache, (int)layer->number, (int)slot->number, (int)n->number);
            else cache_need(&cache, (int)layer->number, (int)(slot->number + n->number));
        }
        cache_commit(&cache, (int)call->items->number);
    }
    put_whole("length", &cache.length, 1);
}

static void put_ok(void) {
    int ok = 1;
    put_whole("ok", &ok, 1);
}

static void answer_check_config(void) {
    config_of_json(member(inputs, "config"), &scratch);
    put_ok();
}

static void answer_check_weights(void) {
    const Json *shapes = member(inputs, "shapes");
    checked.config = config_of_json(member(inputs, "config"), &scratch);
    File file = {.tensors = take(&scratch, (size_t)shapes->count, sizeof(Tensor))};
    for (const Json *shape = shapes->items; shape; shape = shape->next) {
        Tensor *t = &file.tensors[file.n_tensors++];
        size_t count = 1;
        *t = (Tensor){.name = shape->key, .kind = "F32"};
        for (const Json *d = shape->items; d; d = d->next) count *= t->dims[t->n_dims++] = (size_t)d->number;
        t->data = take(&scratch, count, 4);
        t->size = 4 * count;
    }
    load_arrays(&checked, &file, PLAIN);
    put_ok();
}

static int by_name(const void *a, const void *b) { return strcmp(((const Tensor *)a)->name, ((const Tensor *)b)->name); }

static void answer_open_file(void) {
    size_t n;
    const unsigned char *bytes = bytes_of(word("data"), &n);
    File file;
    (strcmp(word("kind"), "gguf") == 0 ? open_gguf : open_safetensors)(&file, bytes, n, &scratch);
    qsort(file.tensors, (size_t)file.n_tensors, sizeof(Tensor), by_name);
    begin_output("names");
    for (int i = 0; i < file.n_tensors; i++) printf("%s\"%s\"", i ? ", " : "[", file.tensors[i].name);
    printf("]");
}

const Operation operations[] = {{"kv_head", answer_kv_head},
                                {"reads", answer_reads},
                                {"rope_pairs", answer_rope_pairs},
                                {"offset", answer_offset},
                                {"number", answer_number},
                                {"linear", answer_linear},
                                {"dequantise", answer_dequantise},
                                {"rms_norm", answer_norm},
                                {"layer_norm", answer_norm},
                                {"rope_table", answer_rope_table},
                                {"rope", answer_rope},
                                {"activate", answer_activate},
                                {"attention", answer_attention},
                                {"hash_words", answer_hash_words},
                                {"pcg32", answer_pcg32},
                                {"greedy", answer_greedy},
                                {"sample", answer_sample},
                                {"generate", answer_generate},
                                {"cache", answer_cache},
                                {"check_config", answer_check_config},
                                {"check_weights", answer_check_weights},
                                {"open_file", answer_open_file},
                                {NULL, NULL}};
