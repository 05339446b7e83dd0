/* A decoder-only transformer with a key/value cache: what there is, in the order in which one reads it.

   Letters: L layers, H query heads, G key/value heads, hd features of a head, D width of the stream, F width of the MLP,
   V tokens, P = hd/2 pairs, S positions in the cache. Labels such as A2 are the rules of tests/conformance/SPEC.md. */
#ifndef NANOKV_H
#define NANOKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- Memory and errors: memory.c */

typedef struct Chunk Chunk;
typedef struct { Chunk *first; } Arena;           // memory that is freed together
void *take(Arena *arena, size_t count, size_t size);  // zeroed
void free_arena(Arena *arena);

_Noreturn void fail(const char *kind, const char *format, ...);  // to whoever set failed_to, else prints and exits
typedef struct { void *jump; const char *kind; char message[240]; } Failure;
extern Failure *failed_to;

/* ---- The model: what a file says (C1, C2) */

typedef struct {
    double base;             // 0: no rotary positions
    double *divisors;        // [P], or NULL
    double *frequencies;     // [P]: R1
} Rope;

typedef enum { RMS, LAYER, NO_NORM } Norm;
typedef enum { SILU, GELU_TANH, GELU, RELU } Activation;

typedef struct {
    int n_layers, n_heads, n_kv_heads, head_dim, d_model, d_ff, vocab_size, n_ctx;
    Norm norm;
    double norm_eps;
    Rope rope, rope_local;   // of the sliding layers, if their own
    bool neighbours;         // pairs are (2i, 2i+1), not (i, i + P)
    bool learned_positions;
    Activation activation;
    bool gated_mlp;
    double attn_scale, embed_scale;
    int window;              // 0: none
    bool *sliding;           // [L]
    bool qkv_bias, out_bias, mlp_bias, qk_norm, post_norms, tied_head;
} Config;

typedef struct {             // matrices are [outputs, inputs]; what a config does not ask for is NULL
    const float *attn_norm, *attn_norm_bias;      // [D]
    const float *wq, *wk, *wv, *wo;               // [H*hd, D], [G*hd, D], [G*hd, D], [D, H*hd]
    const float *bq, *bk, *bv, *bo;               // [H*hd], [G*hd], [G*hd], [D]
    const float *q_norm, *k_norm;                 // [hd]
    const float *post_attn_norm;                  // [D]
    const float *mlp_norm, *mlp_norm_bias;        // [D]
    const float *w_gate, *w_up, *w_down;          // [F, D], [F, D], [D, F]
    const float *b_gate, *b_up, *b_down;          // [F], [F], [D]
    const float *post_mlp_norm;                   // [D]
} Block;

typedef struct {             // what one position needs on its way; overwritten by the next
    float *x;                // [D]     the residual stream
    float *h;                // [D]     the stream, normed
    float *q, *z;            // [H, hd] queries, and what each head found
    float *scores, *weights; // [H, S]  of the slots that the position reads
    float *gate, *up;        // [F]
    float *out;              // [D]     what a sublayer adds
    float *cos, *sin;        // [P]
    float *logits;           // [V]
} Run;

typedef struct {
    Config config;
    const float *embed;                           // [V, D]
    const float *pos_embed;                       // [n_ctx, D], or NULL
    Block *blocks;                                // [L]
    const float *final_norm, *final_norm_bias;    // [D]
    const float *head;                            // [V, D]; embed itself if tied
    Run run;
    Arena arena;             // where all of this lies
} Model;

void load_model(Model *model, const char *path);  // a .gguf file, a Hugging Face folder, or the suite's plain form: load.c
void check_config(Config *config, Arena *arena);  // C3; fills in frequencies: config.c

/* ---- The cache (K): all that a position leaves to those after it */

typedef struct {
    int n_layers, n_ctx, n_kv_heads, head_dim;
    int length;              // positions committed
    int *written;            // [L] slots written so far; ahead of length inside of a call
    float *k, *v;            // [L, n_ctx, G, hd]; keys after RoPE
    Arena arena;
} Cache;

void new_cache(Cache *cache, const Config *config);
float *cache_place(const Cache *cache, float *kv, int layer, int slot);        // [G, hd] of a slot in k or v
void cache_claim(Cache *cache, int layer, int slot, int n);                    // the n slots from `slot` on are written now
void cache_need(const Cache *cache, int layer, int end);                       // slots up to end - 1 are read now
void cache_commit(Cache *cache, int n);                                        // a call of n positions ends well

/* ---- Arithmetic (S to F): nanokv.c */

float exp32(float x);
float tanh32(float x);
float erf32(float x);
float sum16(const float *x, int n, int first);
float sum16_squares(const float *x, int n);
float maximum(const float *x, int n);
void linear(float *y, const float *x, const float *w, const float *b, int n_out, int n_in);
float norm_scale(const float *x, float eps, int n);                     // r of M1
void rms_norm(float *y, const float *x, const float *w, float eps, int n);
void layer_norm(float *y, const float *x, const float *w, const float *b, float eps, int n);
void set_frequencies(Rope *rope, int head_dim, Arena *arena);
void rope_table(float *cos_, float *sin_, const Rope *rope, int head_dim, int pos);
void rotate(float *x, const float *cos_, const float *sin_, int n_heads, int head_dim, bool neighbours);
void activate(float *y, const float *gate, const float *up, Activation kind, int n);
void attention(float *z, const float *q, const Cache *cache, int layer, int first, int pos, int n_heads, float scale,
               float *scores, float *weights);

/* ---- The forward pass (B): nanokv.c */

typedef struct {             // told of every state on the way; NULL: nobody watches
    void (*see)(void *self, const char *site, int layer, int pos, const float *x, int n);
    void *self;
} Observer;

int kv_head(int head, int n_heads, int n_kv_heads);   // I1
int first_slot(int pos, int window);                  // I2
int window_of(const Config *config, int layer);       // 0: none
void pair(int *first, int *second, int i, int head_dim, bool neighbours);                        // I4

void check_call(const Model *model, const Cache *cache, const int *tokens, int n);               // E1, K5: refuses
const float *forward(Model *model, Cache *cache, int token, const Observer *observer);           // logits [V]
void block(Model *model, Cache *cache, int layer, int pos, float *x, const Observer *observer);  // x [D], in place

/* ---- The trace's hash (J5) */

uint64_t hash_words(const float *x, int n);

/* ---- Choosing a token (G): sample.c */

typedef struct { uint64_t state, increment; } Pcg32;
typedef struct { double temperature, top_p; int top_k; } Sampling;  // top_k 0, top_p 0: all

void pcg32_seed(Pcg32 *random, uint64_t seed, uint64_t stream);
uint32_t pcg32_next(Pcg32 *random);
void check_sampling(const Sampling *how);
int greedy(const float *logits, int n);
int sample(const float *logits, int n, const Sampling *how, Pcg32 *random);

#endif
