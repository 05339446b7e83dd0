/* The shape of a model, from a file's settings (C1, C3 to C5). What does not fit is refused. */
#include <math.h>
#include <string.h>

#include "files.h"

/* ---- The config (C1, C3) */

static void require(bool good, const char *what) {
    if (!good) fail("ConfigError", "%s", what);
}

static bool positive(double x) { return x > 0 && x < INFINITY; }

static void check_rope(Rope *rope, const Config *p, Arena *arena) {
    if (!rope->base) return;
    require(p->head_dim % 2 == 0, "RoPE turns pairs of features, and head_dim is odd");
    require(positive(rope->base), "the base of RoPE must be above 0");
    for (int i = 0; rope->divisors && i < p->head_dim / 2; i++)
        require(positive(rope->divisors[i]), "a divisor of RoPE must be above 0");
    set_frequencies(rope, p->head_dim, arena);
}

void check_config(Config *p, Arena *arena) {
    const int sizes[] = {p->n_layers, p->n_heads, p->n_kv_heads, p->head_dim, p->d_model, p->vocab_size, p->n_ctx};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) require(sizes[i] > 0, "a size is missing, or not above 0");
    require(p->d_ff >= 0, "d_ff is negative");
    require(p->n_heads % p->n_kv_heads == 0, "n_heads must be a multiple of n_kv_heads");
    require(p->norm_eps >= 0 && p->norm_eps < INFINITY, "norm_eps must not be negative");
    require(isfinite(p->embed_scale), "embed_scale must be a finite number");
    require(!p->post_norms || p->norm == RMS, "post_norms are RMS norms, and norm is another");
    if (!p->attn_scale) p->attn_scale = 1 / sqrt(p->head_dim);
    require(positive(p->attn_scale), "attn_scale must be above 0");
    if (!p->sliding) p->sliding = take(arena, (size_t)p->n_layers, sizeof(bool));
    for (int l = 0; l < p->n_layers; l++) require(!p->sliding[l] || p->window, "a layer slides, but there is no window");
    check_rope(&p->rope, p, arena);
    check_rope(&p->rope_local, p, arena);
}

static double as_number(const Json *json, const char *key) {
    const Json *found = member(json, key);
    if (found && found->kind != J_NUMBER) fail("ConfigError", "%s is not a number", key);
    return found ? found->number : 0;
}

static int as_whole(const Json *json, const char *key) {
    double x = as_number(json, key);
    if (x != floor(x) || fabs(x) > 2e9) fail("ConfigError", "%s is not a whole number", key);
    return (int)x;
}

static double number_or(const Json *json, const char *key, double otherwise) {
    return member(json, key) ? as_number(json, key) : otherwise;
}

static int whole_or(const Json *json, const char *key, int otherwise) {
    return member(json, key) ? as_whole(json, key) : otherwise;
}

static bool flag_or(const Json *json, const char *key, bool otherwise) {
    const Json *found = member(json, key);
    if (found && found->kind != J_TRUE && found->kind != J_FALSE) fail("ConfigError", "%s is neither true nor false", key);
    return found ? found->kind == J_TRUE : otherwise;
}

static int choice(const Json *json, const char *key, const char *const names[], int n) {  // names[0] if nothing is said
    const Json *found = member(json, key);
    if (!found) return 0;
    for (int i = 0; i < n; i++)
        if (text_of(found) && strcmp(found->text, names[i]) == 0) return i;
    fail("ConfigError", "%s is unknown", key);
}

static Rope rope_of_json(const Json *json, int head_dim, Arena *arena) {
    Rope rope = {0};
    if (!json) return rope;
    rope.base = as_number(json, "base");
    require(positive(rope.base), "the base of RoPE must be above 0");
    const Json *divisors = member(json, "divisors");
    if (!divisors) return rope;
    require(divisors->kind == J_LIST && divisors->count == head_dim / 2, "RoPE needs a divisor for each of its pairs");
    rope.divisors = take(arena, (size_t)divisors->count, sizeof(double));
    int i = 0;
    for (const Json *d = divisors->items; d; d = d->next) rope.divisors[i++] = d->kind == J_NUMBER ? d->number : 0;
    return rope;
}

Config config_of_json(const Json *json, Arena *arena) {
    static const char *const known[] = {
        "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff", "vocab_size", "n_ctx", "norm", "norm_eps", "rope",
        "rope_pairs", "learned_positions", "activation", "gated_mlp", "attn_scale", "embed_scale", "window", "sliding",
        "rope_local", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "post_norms", "tied_head"};
    static const char *const nullable[] = {"rope", "rope_local", "window", "attn_scale"};
    static const char *const norms[] = {"rms", "layer", "none"}, *const pairs[] = {"halves", "neighbours"};
    static const char *const activations[] = {"silu", "gelu_tanh", "gelu", "relu"};
    for (const Json *entry = json->items; entry; entry = entry->next) {
        bool found = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) found |= strcmp(entry->key, known[i]) == 0;
        if (!found) fail("ConfigError", "%s is unknown", entry->key);
        found = entry->kind != J_NULL;
        for (size_t i = 0; i < sizeof nullable / sizeof *nullable; i++) found |= strcmp(entry->key, nullable[i]) == 0;
        if (!found) fail("ConfigError", "%s is null", entry->key);
    }
    require(member(json, "d_ff"), "d_ff is missing");
    require(!member(json, "window") || as_whole(json, "window") > 0, "window must be above 0");
    require(!member(json, "attn_scale") || as_number(json, "attn_scale") > 0, "attn_scale must be above 0");
    Config p = {.n_layers = as_whole(json, "n_layers"),
                .n_heads = as_whole(json, "n_heads"),
                .n_kv_heads = as_whole(json, "n_kv_heads"),
                .head_dim = as_whole(json, "head_dim"),
                .d_model = as_whole(json, "d_model"),
                .d_ff = as_whole(json, "d_ff"),
                .vocab_size = as_whole(json, "vocab_size"),
                .n_ctx = as_whole(json, "n_ctx"),
                .norm = (Norm)choice(json, "norm", norms, 3),
                .norm_eps = number_or(json, "norm_eps", 1e-5),
                .neighbours = choice(json, "rope_pairs", pairs, 2),
                .learned_positions = flag_or(json, "learned_positions", false),
                .activation = (Activation)choice(json, "activation", activations, 4),
                .gated_mlp = flag_or(json, "gated_mlp", true),
                .attn_scale = number_or(json, "attn_scale", 0),
                .embed_scale = number_or(json, "embed_scale", 1),
                .window = whole_or(json, "window", 0),
                .qkv_bias = flag_or(json, "qkv_bias", false),
                .out_bias = flag_or(json, "out_bias", false),
                .mlp_bias = flag_or(json, "mlp_bias", false),
                .qk_norm = flag_or(json, "qk_norm", false),
                .post_norms = flag_or(json, "post_norms", false),
                .tied_head = flag_or(json, "tied_head", true)};
    p.rope = rope_of_json(member(json, "rope"), p.head_dim, arena);
    p.rope_local = rope_of_json(member(json, "rope_local"), p.head_dim, arena);
    const Json *sliding = member(json, "sliding");
    if (sliding && sliding->count) {
        require(sliding->kind == J_LIST && sliding->count == p.n_layers, "sliding must have an entry for each layer");
        p.sliding = take(arena, (size_t)p.n_layers, sizeof(bool));
        int l = 0;
        for (const Json *each = sliding->items; each; each = each->next) p.sliding[l++] = each->kind == J_TRUE;
    }
    check_config(&p, arena);
    return p;
}

/* ---- Settings of a Hugging Face folder (C4) */

/* layer_type: "full_attention" or "sliding_attention", for files that describe each by itself. */
static Rope rope_of_hf(const Json *json, const char *layer_type, const char *base_key, double otherwise, int head_dim,
                       Arena *arena) {
    const Json *said = member(json, "rope_parameters");
    if (member(said, layer_type)) said = member(said, layer_type);
    bool full = strcmp(layer_type, "full_attention") == 0, in_said = member(said, "rope_theta") != NULL;
    Rope rope = {.base = number_or(in_said ? said : json, in_said ? "rope_theta" : base_key, otherwise)};
    const Json *scaling = said ? said : full ? member(json, "rope_scaling") : NULL;
    const char *kind = text_of(member(scaling, member(scaling, "rope_type") ? "rope_type" : "type"));
    if (!kind || strcmp(kind, "default") == 0) return rope;
    bool linear_ = strcmp(kind, "linear") == 0;
    require(linear_ || strcmp(kind, "llama3") == 0, "this scaling of RoPE is not implemented");
    double factor = as_number(scaling, "factor"), low = as_number(scaling, "low_freq_factor"),
           high = as_number(scaling, "high_freq_factor");
    double context = as_number(scaling, "original_max_position_embeddings");
    set_frequencies(&rope, head_dim, arena);
    rope.divisors = take(arena, (size_t)head_dim / 2, sizeof(double));
    for (int i = 0; i < head_dim / 2; i++) {
        double turns = context * rope.frequencies[i] / (2 * acos(-1)), smooth = fmin(fmax((turns - low) / (high - low), 0), 1);
        rope.divisors[i] = linear_ ? factor : 1 / ((1 - smooth) / factor + smooth);
    }
    return rope;
}

/* Settings that would change what is computed. */
static void refuse(const Json *json) {
    static const char *const null[] = {"attn_logit_softcapping", "final_logit_softcapping", "quantization_config"};
    static const char *const off[] = {"use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
                                      "is_encoder_decoder", "use_sliding_window"};
    for (size_t i = 0; i < sizeof null / sizeof *null; i++)
        if (member(json, null[i])) fail("ConfigError", "%s is not implemented", null[i]);
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        if (flag_or(json, off[i], false)) fail("ConfigError", "%s is not implemented", off[i]);
    require(flag_or(json, "scale_attn_weights", true), "scores without a scale are not implemented");
    require(number_or(json, "partial_rotary_factor", 1) == 1, "RoPE on a part of a head is not implemented");
    require(!whole_or(json, "num_experts", 0) && !whole_or(json, "num_local_experts", 0), "experts are not implemented");
}

static Activation activation_of_hf(const Json *json, const char *key, Activation otherwise) {
    static const char *const names[] = {"silu", "swish", "gelu_pytorch_tanh", "gelu_new", "gelu", "relu"};
    static const Activation meant[] = {SILU, SILU, GELU_TANH, GELU_TANH, GELU, RELU};
    return member(json, key) ? meant[choice(json, key, names, 6)] : otherwise;
}

Config config_of_hf(const Json *json, const char *family, Arena *arena) {
    bool gemma = strcmp(family, "gemma3_text") == 0, qwen2 = strcmp(family, "qwen2") == 0, qwen3 = strcmp(family, "qwen3") == 0;
    Config p = {.embed_scale = 1};
    refuse(json);
    if (strcmp(family, "gpt2") == 0) {
        p = (Config){.n_layers = as_whole(json, "n_layer"),
                     .n_heads = as_whole(json, "n_head"),
                     .n_kv_heads = as_whole(json, "n_head"),
                     .d_model = as_whole(json, "n_embd"),
                     .vocab_size = as_whole(json, "vocab_size"),
                     .n_ctx = as_whole(json, "n_positions"),
                     .norm = LAYER,
                     .norm_eps = number_or(json, "layer_norm_epsilon", 1e-5),
                     .learned_positions = true,
                     .activation = activation_of_hf(json, "activation_function", GELU_TANH),
                     .embed_scale = 1,
                     .qkv_bias = true,
                     .out_bias = true,
                     .mlp_bias = true,
                     .tied_head = true};
        p.head_dim = p.n_heads > 0 ? p.d_model / p.n_heads : 0;
        p.d_ff = whole_or(json, "n_inner", 4 * p.d_model);
        check_config(&p, arena);
        return p;
    }
    require(gemma || qwen2 || qwen3 || strcmp(family, "llama") == 0, "this model_type is not implemented");
    p.n_layers = as_whole(json, "num_hidden_layers"), p.n_heads = as_whole(json, "num_attention_heads");
    p.n_kv_heads = whole_or(json, "num_key_value_heads", p.n_heads), p.d_model = as_whole(json, "hidden_size");
    p.head_dim = whole_or(json, "head_dim", gemma ? 256 : qwen3 ? 128 : p.n_heads > 0 ? p.d_model / p.n_heads : 0);
    p.d_ff = as_whole(json, "intermediate_size"), p.vocab_size = as_whole(json, "vocab_size");
    p.n_ctx = as_whole(json, "max_position_embeddings"), p.norm_eps = number_or(json, "rms_norm_eps", 1e-6);
    p.activation = activation_of_hf(json, gemma ? "hidden_activation" : "hidden_act", gemma ? GELU_TANH : SILU);
    p.gated_mlp = true, p.qkv_bias = qwen2 || flag_or(json, "attention_bias", false),
    p.out_bias = flag_or(json, "attention_bias", false) && !qwen2;
    p.mlp_bias = flag_or(json, "mlp_bias", false), p.qk_norm = qwen3 || gemma, p.post_norms = gemma;
    p.tied_head = flag_or(json, "tie_word_embeddings", gemma);
    p.rope = rope_of_hf(json, "full_attention", "rope_theta", gemma ? 1e6 : 1e4, p.head_dim, arena);
    if (gemma) {
        const Json *types = member(json, "layer_types");
        require(!types || (types->kind == J_LIST && types->count == p.n_layers),
                "layer_types must have an entry for each layer");
        require(p.n_layers > 0, "a size is missing, or not above 0");
        p.sliding = take(arena, (size_t)p.n_layers, sizeof(bool));
        int l = 0, pattern = whole_or(json, "sliding_window_pattern", 6);
        require(types || pattern > 0, "sliding_window_pattern must be above 0");
        for (const Json *t = types ? types->items : NULL; t; t = t->next)
            p.sliding[l++] = text_of(t) && strcmp(t->text, "sliding_attention") == 0;
        for (; l < p.n_layers; l++) p.sliding[l] = (l + 1) % pattern != 0;
        p.window = whole_or(json, "sliding_window", 4096);
        p.rope_local = rope_of_hf(json, "sliding_attention", "rope_local_base_freq", 1e4, p.head_dim, arena);
        p.attn_scale = pow(number_or(json, "query_pre_attn_scalar", 256), -0.5);
        p.embed_scale = sqrt(p.d_model);
    }
    check_config(&p, arena);
    return p;
}

/* ---- Pairs of a GGUF file (C5) */

static double pair_or(const File *file, const char *format, const char *arch, double otherwise) {
    const Pair *found = pair_named(file, format, arch);
    return found && !found->text ? found->number : otherwise;
}

Config config_of_gguf(const File *file, const char *arch, Arena *arena) {
    bool gpt2 = strcmp(arch, "gpt2") == 0, llama = strcmp(arch, "llama") == 0, qwen3 = strcmp(arch, "qwen3") == 0;
    require(gpt2 || llama || qwen3 || strcmp(arch, "qwen2") == 0, "this architecture is not implemented");
    static const char *const off[] = {"%s.expert_count", "%s.attn_logit_softcapping", "%s.final_logit_softcapping",
                                      "%s.attention.scale", "%s.attention.sliding_window", "%s.rope.scaling.factor",
                                      "%s.rope.scale_linear", "%s.use_parallel_residual"};
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        if (pair_or(file, off[i], arch, 0)) fail("ConfigError", off[i], arch);
    require(pair_or(file, "%s.attention.causal", arch, 1), "attention that is not causal is not implemented");
    const Tensor *embed = tensor_named(file, "token_embd.weight"), *divisors = tensor_named(file, "rope_freqs.weight");
    Config p = {.n_layers = (int)pair_or(file, "%s.block_count", arch, 0),
                .n_heads = (int)pair_or(file, "%s.attention.head_count", arch, 0),
                .d_model = (int)pair_or(file, "%s.embedding_length", arch, 0),
                .d_ff = (int)pair_or(file, "%s.feed_forward_length", arch, -1),
                .n_ctx = (int)pair_or(file, "%s.context_length", arch, 0),
                .embed_scale = 1,
                .neighbours = llama,
                .norm = gpt2 ? LAYER : RMS,
                .learned_positions = gpt2,
                .activation = gpt2 ? GELU_TANH : SILU,
                .gated_mlp = !gpt2,
                .qkv_bias = gpt2 || tensor_named(file, "blk.0.attn_q.bias"),
                .out_bias = tensor_named(file, "blk.0.attn_output.bias"),
                .mlp_bias = tensor_named(file, "blk.0.ffn_up.bias"),
                .qk_norm = qwen3,
                .tied_head = !tensor_named(file, "output.weight")};
    p.n_kv_heads = (int)pair_or(file, "%s.attention.head_count_kv", arch, p.n_heads);
    p.head_dim = (int)pair_or(file, "%s.attention.key_length", arch, p.n_heads > 0 ? p.d_model / p.n_heads : 0);
    p.norm_eps = pair_or(file, gpt2 ? "%s.attention.layer_norm_epsilon" : "%s.attention.layer_norm_rms_epsilon", arch, -1);
    p.vocab_size = (int)pair_or(file, "%s.vocab_size", arch,
                                pair_or(file, "tokenizer.ggml.tokens%s", "", embed ? (double)embed->dims[0] : 0));
    if (!gpt2) p.rope.base = pair_or(file, "%s.rope.freq_base", arch, 10000);
    if (divisors && divisors->n_dims == 1 && divisors->dims[0] == (size_t)p.head_dim / 2) {
        float *stored = take(arena, divisors->dims[0], sizeof(float));
        dequantise(stored, divisors->kind, divisors->data, divisors->dims[0]);
        p.rope.divisors = take(arena, divisors->dims[0], sizeof(double));
        for (size_t i = 0; i < divisors->dims[0]; i++) p.rope.divisors[i] = stored[i];
    }
    check_config(&p, arena);
    return p;
}
