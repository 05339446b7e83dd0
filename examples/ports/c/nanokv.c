/* The arithmetic, the cache and the forward pass. Compile with -ffp-contract=off and without -ffast-math: every operation
   rounds once (N1), and fmaf rounds a product and a sum once (N2). */
#include <math.h>
#include <string.h>

#include "nanokv.h"

/* ---- Functions (F). Written out, for no two libraries agree in the last bit. */

static float with_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

float exp32(float x) {  // F1
    if (x < -105) x = -105;
    if (x > 89) x = 89;
    float t = fmaf(x, 1.44269504f, 12582912.0f);
    float n = t - 12582912.0f;  // the whole number nearest to x / ln 2
    float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x));
    float p = 0.00138140086f;
    p = fmaf(p, r, 0.00836900063f);
    p = fmaf(p, r, 0.0416684151f);
    p = fmaf(p, r, 0.166665182f);
    p = fmaf(p, r, 0.49999994f);
    p = fmaf(p, r, 1);
    p = fmaf(p, r, 1);
    if (x != x) return x;
    int whole = (int)n, half = (whole - (whole & 1)) / 2;  // half rounds towards minus infinity
    return p * with_bits((uint32_t)(half + 127) << 23) * with_bits((uint32_t)(whole - half + 127) << 23);
}

float tanh32(float x) {  // F2
    float a = fabsf(x), s = a * a, p = -0.00589515036f;
    p = fmaf(p, s, 0.0207959637f);
    p = fmaf(p, s, -0.0537838265f);
    p = fmaf(p, s, 0.133319244f);
    p = fmaf(p, s, -0.333332986f);
    return copysignf(a < 0.6f ? fmaf(p * s, a, a) : 1 - 2 / (exp32(a + a) + 1), x);
}

float erf32(float x) {  // F3
    float a = fabsf(x);
    if (a > 4) a = 4;
    float s = a * a, p = 8.31677244e-05f;
    p = fmaf(p, s, -0.000813001185f);
    p = fmaf(p, s, 0.00519990642f);
    p = fmaf(p, s, -0.0268589407f);
    p = fmaf(p, s, 0.112836875f);
    p = fmaf(p, s, -0.376126319f);
    p = fmaf(p, s, 0.128379166f);
    float q = 7.37456389e-07f;
    q = fmaf(q, a, 1.13113501e-05f);
    q = fmaf(q, a, -0.000378849683f);
    q = fmaf(q, a, 0.0039941012f);
    q = fmaf(q, a, -0.0247745123f);
    q = fmaf(q, a, 0.107858211f);
    q = fmaf(q, a, 0.633663297f);
    q = fmaf(q, a, 1.12938178f);
    q = fmaf(q, a, -0.000150613705f);
    return copysignf(a < 0.92f ? fmaf(p, a, a) : 1 - exp32(-q), x);
}

static float activation(float x, Activation kind) {  // F4 to F7
    switch (kind) {
    case SILU: return x / (1 + exp32(-x));
    case GELU_TANH: return 0.5f * x * (1 + tanh32(x * fmaf(0.0356774081f, x * x, 0.797884561f)));
    case GELU: return 0.5f * x * (1 + erf32(x * 0.707106781f));
    default: return x > 0 || x != x ? x : 0;
    }
}

void activate(float *y, const float *gate, const float *up, Activation kind, int n) {  // F8; gate NULL: none
    for (int i = 0; i < n; i++) y[i] = gate ? activation(gate[i], kind) * up[i] : activation(up[i], kind);
}

uint64_t hash_words(const float *x, int n) {  // J5
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < n; i++) hash = (hash ^ bits_of(x[i])) * 0x100000001b3u;
    return hash;
}

/* ---- Sums, linear maps, norms, rotary positions */

static float add_lanes(float lanes[16]) {  // S1
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

float sum16(const float *x, int n, int first) {  // S1, S2: x[0] is element or slot `first`
    float lanes[16] = {0};
    for (int i = 0; i < n; i++) lanes[(first + i) % 16] += x[i];
    return add_lanes(lanes);
}

float sum16_squares(const float *x, int n) {
    float lanes[16] = {0};
    for (int i = 0; i < n; i++) lanes[i % 16] = fmaf(x[i], x[i], lanes[i % 16]);
    return add_lanes(lanes);
}

float maximum(const float *x, int n) {  // S3
    float top = -INFINITY;
    for (int i = 0; i < n; i++)
        if (x[i] > top) top = x[i];
    return top;
}

/* y [n_out] = w [n_out, n_in] x + b (L1). Sixteen outputs at a time, so that none waits for its own last addition. */
void linear(float *y, const float *x, const float *w, const float *b, int n_out, int n_in) {
    for (int n = 0; n < n_out; n += 16) {
        int rows = n_out - n < 16 ? n_out - n : 16;
        const float *row[16];
        float sum[16] = {0};
        for (int j = 0; j < 16; j++) row[j] = w + (size_t)(n + (j < rows ? j : 0)) * n_in;
        for (int k = 0; k < n_in; k++)
            for (int j = 0; j < 16; j++) sum[j] = fmaf(x[k], row[j][k], sum[j]);
        for (int j = 0; j < rows; j++) y[n + j] = b ? sum[j] + b[n + j] : sum[j];
    }
}

float norm_scale(const float *x, float eps, int n) { return 1 / sqrtf(sum16_squares(x, n) / n + eps); }

void rms_norm(float *y, const float *x, const float *w, float eps, int n) {  // M1
    float r = norm_scale(x, eps, n);
    for (int i = 0; i < n; i++) y[i] = x[i] * r * w[i];
}

void layer_norm(float *y, const float *x, const float *w, const float *b, float eps, int n) {  // M2
    float mean = sum16(x, n, 0) / n;
    for (int i = 0; i < n; i++) y[i] = x[i] - mean;
    float r = norm_scale(y, eps, n);
    for (int i = 0; i < n; i++) y[i] = y[i] * r * w[i] + b[i];
}

static void norm(float *y, const float *x, const float *w, const float *b, const Config *p) {
    if (p->norm == RMS) rms_norm(y, x, w, (float)p->norm_eps, p->d_model);
    else if (p->norm == LAYER) layer_norm(y, x, w, b, (float)p->norm_eps, p->d_model);
    else memmove(y, x, p->d_model * sizeof *y);
}

void set_frequencies(Rope *rope, int head_dim, Arena *arena) {  // R1
    rope->frequencies = take(arena, head_dim / 2, sizeof(double));
    for (int i = 0; i < head_dim / 2; i++) {
        rope->frequencies[i] = (double)powl(rope->base, -2.0L * i / head_dim);
        if (rope->divisors) rope->frequencies[i] /= rope->divisors[i];
    }
}

void rope_table(float *cos_, float *sin_, const Rope *rope, int head_dim, int pos) {  // R1
    for (int i = 0; i < head_dim / 2; i++) {
        double angle = pos * rope->frequencies[i];
        cos_[i] = (float)cos(angle);
        sin_[i] = (float)sin(angle);
    }
}

void pair(int *first, int *second, int i, int head_dim, bool neighbours) {  // I4
    *first = neighbours ? 2 * i : i;
    *second = neighbours ? 2 * i + 1 : i + head_dim / 2;
}

void rotate(float *x, const float *cos_, const float *sin_, int n_heads, int head_dim, bool neighbours) {  // R2, x [heads, hd]
    for (int h = 0; h < n_heads; h++, x += head_dim)
        for (int i = 0; i < head_dim / 2; i++) {
            int a, b;
            pair(&a, &b, i, head_dim, neighbours);
            float x0 = x[a], x1 = x[b];
            x[a] = fmaf(x0, cos_[i], -(x1 * sin_[i]));
            x[b] = fmaf(x0, sin_[i], x1 * cos_[i]);
        }
}

/* ---- The cache (K) */

void new_cache(Cache *c, const Config *p) {
    *c = (Cache){p->n_layers, p->n_ctx, p->n_kv_heads, p->head_dim, 0, NULL, NULL, NULL, {NULL}};
    size_t slots = (size_t)p->n_layers * p->n_ctx, size = (size_t)p->n_kv_heads * p->head_dim * sizeof(float);
    c->written = take(&c->arena, p->n_layers, sizeof(int));
    c->k = take(&c->arena, slots, size);
    c->v = take(&c->arena, slots, size);
}

float *cache_place(const Cache *c, float *kv, int layer, int slot) {
    return kv + ((size_t)layer * c->n_ctx + slot) * c->n_kv_heads * c->head_dim;
}

void cache_claim(Cache *c, int layer, int slot, int n) {  // K1, K5
    if (slot != c->written[layer])
        fail("CacheError", "layer %d: slot %d was given to write, but %d is the next", layer, slot, c->written[layer]);
    if (slot + n > c->n_ctx) fail("ContextFullError", "layer %d has no slot %d", layer, slot + n - 1);
    c->written[layer] += n;
}

void cache_need(const Cache *c, int layer, int end) {  // K2
    if (end > c->written[layer])
        fail("UnwrittenSlotError", "layer %d: slot %d is read, but only %d are written", layer, end - 1, c->written[layer]);
}

void cache_commit(Cache *c, int n) {  // K3
    for (int l = 0; l < c->n_layers; l++)
        if (c->written[l] != c->length + n)
            fail("CacheError", "layer %d has %d slots, not %d", l, c->written[l], c->length + n);
    c->length += n;
}

/* ---- Attention (A): the only place where positions meet */

int kv_head(int head, int n_heads, int n_kv_heads) { return head / (n_heads / n_kv_heads); }

int first_slot(int pos, int window) { return window && pos + 1 > window ? pos + 1 - window : 0; }

int window_of(const Config *p, int layer) { return p->sliding[layer] ? p->window : 0; }

/* z [H, hd] = what position pos finds in slots first to pos. scores and weights [H, pos + 1 - first] are filled on the way. */
void attention(float *z, const float *q, const Cache *c, int layer, int first, int pos, int n_heads, float scale, float *scores,
               float *weights) {
    int hd = c->head_dim, n = pos + 1 - first;
    cache_need(c, layer, pos + 1);
    for (int h = 0; h < n_heads; h++, q += hd, z += hd, scores += n, weights += n) {
        int g = kv_head(h, n_heads, c->n_kv_heads);
        for (int s = 0; s < n; s++) {  // A2
            const float *k = cache_place(c, c->k, layer, first + s) + g * hd;
            float dot = 0;
            for (int i = 0; i < hd; i++) dot = fmaf(q[i], k[i], dot);
            scores[s] = dot * scale;
        }
        float top = maximum(scores, n);  // A3
        if (top == -INFINITY) top = 0;
        for (int s = 0; s < n; s++) weights[s] = exp32(scores[s] - top);
        float total = sum16(weights, n, first);
        if (total == 0) total = 1;
        for (int i = 0; i < hd; i++) z[i] = 0;  // A4
        for (int s = 0; s < n; s++) {
            const float *v = cache_place(c, c->v, layer, first + s) + g * hd;
            for (int i = 0; i < hd; i++) z[i] = fmaf(weights[s], v[i], z[i]);
        }
        for (int i = 0; i < hd; i++) z[i] = z[i] / total;
        for (int s = 0; s < n; s++) weights[s] = weights[s] / total;  // A5
    }
}

/* ---- The forward pass (B) */

static void see(const Observer *o, const char *site, int layer, int pos, const float *x, int n) {
    if (o) o->see(o->self, site, layer, pos, x, n);
}

void block(Model *m, Cache *c, int l, int pos, float *x, const Observer *o) {
    const Config *p = &m->config;
    const Block *w = &m->blocks[l];
    Run *r = &m->run;
    int D = p->d_model, F = p->d_ff, H = p->n_heads, G = p->n_kv_heads, hd = p->head_dim;

    // attention: x = x + wo z
    see(o, "resid_pre", l, pos, x, D);
    norm(r->h, x, w->attn_norm, w->attn_norm_bias, p);
    see(o, "ln1", l, pos, r->h, D);
    cache_claim(c, l, pos, 1);
    float *k = cache_place(c, c->k, l, pos), *v = cache_place(c, c->v, l, pos);  // they are made where they stay
    linear(r->q, r->h, w->wq, w->bq, H * hd, D);
    linear(k, r->h, w->wk, w->bk, G * hd, D);
    linear(v, r->h, w->wv, w->bv, G * hd, D);
    if (p->qk_norm) {
        for (int h = 0; h < H; h++) rms_norm(r->q + h * hd, r->q + h * hd, w->q_norm, (float)p->norm_eps, hd);
        for (int g = 0; g < G; g++) rms_norm(k + g * hd, k + g * hd, w->k_norm, (float)p->norm_eps, hd);
    }
    const Rope *rope = p->sliding[l] && p->rope_local.base ? &p->rope_local : &p->rope;
    if (rope->base) {
        rope_table(r->cos, r->sin, rope, hd, pos);
        rotate(r->q, r->cos, r->sin, H, hd, p->neighbours);
        rotate(k, r->cos, r->sin, G, hd, p->neighbours);
    }
    see(o, "q", l, pos, r->q, H * hd);
    see(o, "k", l, pos, k, G * hd);
    see(o, "v", l, pos, v, G * hd);
    int first = first_slot(pos, window_of(p, l));
    attention(r->z, r->q, c, l, first, pos, H, (float)p->attn_scale, r->scores, r->weights);
    see(o, "scores", l, pos, r->scores, H * (pos + 1 - first));
    see(o, "pattern", l, pos, r->weights, H * (pos + 1 - first));
    see(o, "z", l, pos, r->z, H * hd);
    linear(r->out, r->z, w->wo, w->bo, D, H * hd);
    if (p->post_norms) norm(r->out, r->out, w->post_attn_norm, NULL, p);
    see(o, "attn_out", l, pos, r->out, D);
    for (int i = 0; i < D; i++) x[i] += r->out[i];
    see(o, "resid_mid", l, pos, x, D);

    // MLP: x = x + w_down (act(w_gate h) * w_up h)
    norm(r->h, x, w->mlp_norm, w->mlp_norm_bias, p);
    see(o, "ln2", l, pos, r->h, D);
    if (p->gated_mlp) {
        linear(r->gate, r->h, w->w_gate, w->b_gate, F, D);
        see(o, "gate", l, pos, r->gate, F);
    }
    linear(r->up, r->h, w->w_up, w->b_up, F, D);
    see(o, "up", l, pos, r->up, F);
    activate(r->up, p->gated_mlp ? r->gate : NULL, r->up, p->activation, F);
    see(o, "act", l, pos, r->up, F);
    linear(r->out, r->up, w->w_down, w->b_down, D, F);
    if (p->post_norms) norm(r->out, r->out, w->post_mlp_norm, NULL, p);
    see(o, "mlp_out", l, pos, r->out, D);
    for (int i = 0; i < D; i++) x[i] += r->out[i];
    see(o, "resid_post", l, pos, x, D);
}

/* One position: token -> logits [V]. Positions go one by one, for their bits don't depend on company (B1). */
const float *forward(Model *m, Cache *c, int token, const Observer *o) {
    const Config *p = &m->config;
    Run *r = &m->run;
    int D = p->d_model, pos = c->length;  // K4

    for (int i = 0; i < D; i++) {  // L3
        r->x[i] = m->embed[(size_t)token * D + i];
        if (p->embed_scale != 1) r->x[i] *= (float)p->embed_scale;
        if (m->pos_embed) r->x[i] += m->pos_embed[(size_t)pos * D + i];
    }
    for (int l = 0; l < p->n_layers; l++) block(m, c, l, pos, r->x, o);
    norm(r->h, r->x, m->final_norm, m->final_norm_bias, p);
    linear(r->logits, r->h, m->head, NULL, p->vocab_size, D);  // B4
    cache_commit(c, 1);
    see(o, "logits", p->n_layers, pos, r->logits, p->vocab_size);
    return r->logits;
}

void check_call(const Model *m, const Cache *c, const int *tokens, int n) {
    if (n == 0) fail("EmptyPromptError", "there is no token to process");
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.vocab_size)
            fail("TokenError", "token %d is not in the vocabulary of %d", tokens[i], m->config.vocab_size);
    if (n > c->n_ctx - c->length)
        fail("ContextFullError", "%d positions are in the cache and %d more were given, but the context has %d", c->length, n,
             c->n_ctx);
}
