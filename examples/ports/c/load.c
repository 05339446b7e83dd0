/* A file or a folder -> a model. What files call each array and each setting stands in tables; what does not fit is refused. */
#include <stdio.h>
#include <string.h>

#include "files.h"

/* ---- Arrays (C2): when each is there, its shape, what files call it. ^T: stored [inputs, outputs]. [q]: q's rows alone. */

typedef enum { ALWAYS, NORMED, LAYER_NORMED, QKV_BIAS, OUT_BIAS, MLP_BIAS, GATED, GATE_BIAS, QK_NORM, POST_NORMS } When;

static const struct {
    const char *name;
    size_t at;  // in a Block
    When when;
    char rows, columns;  // D, F, Q = H*hd, K = G*hd, h = hd; columns 0: a vector
    const char *llama, *gpt2, *gguf;
} arrays[] = {
#define AT(name) #name, offsetof(Block, name)
    {AT(attn_norm), NORMED, 'D', 0, "input_layernorm.weight", "ln_1.weight", "attn_norm.weight"},
    {AT(attn_norm_bias), LAYER_NORMED, 'D', 0, NULL, "ln_1.bias", "attn_norm.bias"},
    {AT(wq), ALWAYS, 'Q', 'D', "self_attn.q_proj.weight", "attn.c_attn.weight^T[q]", "attn_q.weight"},
    {AT(wk), ALWAYS, 'K', 'D', "self_attn.k_proj.weight", "attn.c_attn.weight^T[k]", "attn_k.weight"},
    {AT(wv), ALWAYS, 'K', 'D', "self_attn.v_proj.weight", "attn.c_attn.weight^T[v]", "attn_v.weight"},
    {AT(wo), ALWAYS, 'D', 'Q', "self_attn.o_proj.weight", "attn.c_proj.weight^T", "attn_output.weight"},
    {AT(bq), QKV_BIAS, 'Q', 0, "self_attn.q_proj.bias", "attn.c_attn.bias[q]", "attn_q.bias"},
    {AT(bk), QKV_BIAS, 'K', 0, "self_attn.k_proj.bias", "attn.c_attn.bias[k]", "attn_k.bias"},
    {AT(bv), QKV_BIAS, 'K', 0, "self_attn.v_proj.bias", "attn.c_attn.bias[v]", "attn_v.bias"},
    {AT(bo), OUT_BIAS, 'D', 0, "self_attn.o_proj.bias", "attn.c_proj.bias", "attn_output.bias"},
    {AT(q_norm), QK_NORM, 'h', 0, "self_attn.q_norm.weight", NULL, "attn_q_norm.weight"},
    {AT(k_norm), QK_NORM, 'h', 0, "self_attn.k_norm.weight", NULL, "attn_k_norm.weight"},
    {AT(post_attn_norm), POST_NORMS, 'D', 0, "post_attention_layernorm.weight", NULL, NULL},
    {AT(mlp_norm), NORMED, 'D', 0, "post_attention_layernorm.weight", "ln_2.weight", "ffn_norm.weight"},
    {AT(mlp_norm_bias), LAYER_NORMED, 'D', 0, NULL, "ln_2.bias", "ffn_norm.bias"},
    {AT(w_gate), GATED, 'F', 'D', "mlp.gate_proj.weight", NULL, "ffn_gate.weight"},
    {AT(w_up), ALWAYS, 'F', 'D', "mlp.up_proj.weight", "mlp.c_fc.weight^T", "ffn_up.weight"},
    {AT(w_down), ALWAYS, 'D', 'F', "mlp.down_proj.weight", "mlp.c_proj.weight^T", "ffn_down.weight"},
    {AT(b_gate), GATE_BIAS, 'F', 0, "mlp.gate_proj.bias", NULL, "ffn_gate.bias"},
    {AT(b_up), MLP_BIAS, 'F', 0, "mlp.up_proj.bias", "mlp.c_fc.bias", "ffn_up.bias"},
    {AT(b_down), MLP_BIAS, 'D', 0, "mlp.down_proj.bias", "mlp.c_proj.bias", "ffn_down.bias"},
    {AT(post_mlp_norm), POST_NORMS, 'D', 0, "post_feedforward_layernorm.weight", NULL, NULL},
#undef AT
};

static bool is_there(When when, const Config *p) {
    const bool there[] = {true, p->norm != NO_NORM, p->norm == LAYER, p->qkv_bias, p->out_bias, p->mlp_bias, p->gated_mlp,
                          p->mlp_bias && p->gated_mlp, p->qk_norm, p->post_norms};
    return there[when];
}

static size_t size_of(char letter, const Config *p) {
    switch (letter) {
    case 'D': return (size_t)p->d_model;
    case 'F': return (size_t)p->d_ff;
    case 'Q': return (size_t)p->n_heads * p->head_dim;
    case 'K': return (size_t)p->n_kv_heads * p->head_dim;
    default: return (size_t)p->head_dim;
    }
}

/* rows x columns float32 of the array that a file has under this name; columns 0: a vector. NULL in a file: WeightsError. */
static const float *array(const File *file, const char *named, size_t rows, size_t columns, const Config *p, float add,
                          Arena *arena) {
    char name[160];
    snprintf(name, sizeof name, "%s", named);
    char *turned = strstr(name, "^T"), *part = strchr(name, '[');
    char which = part ? part[1] : 0;
    if (part) *part = '\0';
    if (turned) *turned = '\0';
    size_t q = size_of('Q', p), k = size_of('K', p);
    size_t from = which == 'k' ? q : which == 'v' ? q + k : 0, all = which ? q + 2 * k : rows, width = columns ? columns : 1;
    Tensor *t = tensor_named(file, name);
    if (!t && strncmp(name, "lm_head", 7) != 0) {  // with the prefix of whole models
        char longer[200];
        snprintf(longer, sizeof longer, "model.%s", name);
        if (!(t = tensor_named(file, longer)))
            snprintf(longer, sizeof longer, "transformer.%s", name), t = tensor_named(file, longer);
    }
    if (!t) fail("WeightsError", "array %s is missing", name);
    if (t->n_dims != (columns ? 2 : 1) || t->dims[0] != (turned ? width : all) ||
        (columns && t->dims[1] != (turned ? all : width)))
        fail("WeightsError", "array %s has another shape than [%zu, %zu]", name, turned ? width : all, turned ? all : width);
    t->used = true;
    float *stored = take(arena, all * width, sizeof(float));
    dequantise(stored, t->kind, t->data, all * width);
    float *made = turned ? take(arena, rows * width, sizeof(float)) : stored + from * width;
    for (size_t r = 0; turned && r < rows; r++)
        for (size_t c = 0; c < width; c++) made[r * width + c] = stored[c * all + from + r];
    for (size_t i = 0; add && i < rows * width; i++) made[i] += add;
    return made;
}

static const char *name_in(int i, Naming naming, int layer, char *name, size_t size) {
    const char *gpt2_gguf[] = {"attn_qkv.weight[q]", "attn_qkv.weight[k]", "attn_qkv.weight[v]",
                               "attn_qkv.bias[q]",   "attn_qkv.bias[k]",   "attn_qkv.bias[v]"};
    const char *own = arrays[i].name, *llama = arrays[i].llama, *gguf = arrays[i].gguf;
    if (naming == GEMMA && strcmp(own, "mlp_norm") == 0) llama = "pre_feedforward_layernorm.weight";
    for (int j = 0; naming == GGUF_GPT2 && j < 6; j++)
        if (strcmp(own, (const char *[]){"wq", "wk", "wv", "bq", "bk", "bv"}[j]) == 0) gguf = gpt2_gguf[j];
    if (naming == PLAIN) snprintf(name, size, "blocks.%d.%s", layer, own);
    else if (naming == GPT2) snprintf(name, size, "h.%d.%s", layer, arrays[i].gpt2 ? arrays[i].gpt2 : own);
    else if (naming >= GGUF) snprintf(name, size, "blk.%d.%s", layer, gguf ? gguf : own);
    else snprintf(name, size, "layers.%d.%s", layer, llama ? llama : own);
    return name;
}

void load_arrays(Model *m, const File *file, Naming naming) {
    static const char *const outer[][6] = {
        // by Naming
        {"embed", "pos_embed", "final_norm", "final_norm_bias", "head"},
        {"embed_tokens.weight", "", "norm.weight", "", "lm_head.weight"},
        {"embed_tokens.weight", "", "norm.weight", "", "lm_head.weight"},
        {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight"},
        {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias", "output.weight"},
        {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias", "output.weight"}};
    const Config *p = &m->config;
    size_t V = (size_t)p->vocab_size, D = (size_t)p->d_model;
    float one = naming == GEMMA ? 1 : 0;  // M3
    const char *const *names = outer[naming];
    m->embed = array(file, names[0], V, D, p, 0, &m->arena);
    if (p->learned_positions) m->pos_embed = array(file, names[1], (size_t)p->n_ctx, D, p, 0, &m->arena);
    if (p->norm != NO_NORM) m->final_norm = array(file, names[2], D, 0, p, one, &m->arena);
    if (p->norm == LAYER) m->final_norm_bias = array(file, names[3], D, 0, p, 0, &m->arena);
    m->head = p->tied_head ? m->embed : array(file, names[4], V, D, p, 0, &m->arena);
    m->blocks = take(&m->arena, (size_t)p->n_layers, sizeof(Block));
    for (int l = 0; l < p->n_layers; l++)
        for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
            if (is_there(arrays[i].when, p)) {
                char name[160];
                name_in((int)i, naming, l, name, sizeof name);
                float add = strstr(arrays[i].name, "norm") ? one : 0;
                size_t columns = arrays[i].columns ? size_of(arrays[i].columns, p) : 0;
                const float *made = array(file, name, size_of(arrays[i].rows, p), columns, p, add, &m->arena);
                memcpy((char *)&m->blocks[l] + arrays[i].at, &made, sizeof made);
            }
    for (int i = 0; i < file->n_tensors; i++) {
        const char *name = file->tensors[i].name;
        bool harmless = strstr(name, "rotary_emb.inv_freq") || strstr(name, "attn.bias") || strstr(name, "attn.masked_bias") ||
                        strcmp(name, "rope_freqs.weight") == 0 ||
                        (p->tied_head && naming != PLAIN && strcmp(name, names[4]) == 0);
        if (!file->tensors[i].used && !harmless) fail("WeightsError", "array %s has no place in a model of this config", name);
    }
}

static void make_run(Model *m) {
    const Config *p = &m->config;
    size_t D = (size_t)p->d_model, F = (size_t)p->d_ff, Q = size_of('Q', p), reads = (size_t)p->n_heads * p->n_ctx;
    float **buffers[] = {&m->run.x, &m->run.h, &m->run.out, &m->run.q, &m->run.z, &m->run.scores, &m->run.weights,
                         &m->run.gate, &m->run.up, &m->run.cos, &m->run.sin, &m->run.logits};
    size_t sizes[] = {D, D, D, Q, Q, reads, reads, F, F, (size_t)p->head_dim, (size_t)p->head_dim, (size_t)p->vocab_size};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) *buffers[i] = take(&m->arena, sizes[i], sizeof(float));
}

static bool exists(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file) fclose(file);
    return file != NULL;
}

static const char *in_folder(char *path, size_t size, const char *folder, const char *name) {
    snprintf(path, size, "%s/%s", folder, name);
    return path;
}

void load_model(Model *m, const char *path) {
    *m = (Model){0};
    char place[1024];
    size_t size, length = strlen(path);
    File file;
    if (length > 5 && strcmp(path + length - 5, ".gguf") == 0) {
        unsigned char *bytes = read_bytes(path, &size, &m->arena);
        open_gguf(&file, bytes, size, &m->arena);
        const Pair *arch = pair_named(&file, "general.architecture%s", "");
        if (!arch || !arch->text) fail("ConfigError", "there is no general.architecture");
        m->config = config_of_gguf(&file, arch->text, &m->arena);
        load_arrays(m, &file, m->config.learned_positions ? GGUF_GPT2 : GGUF);
    } else {
        unsigned char *bytes = read_bytes(in_folder(place, sizeof place, path, "config.json"), &size, &m->arena);
        const Json *json = parse_json((const char *)bytes, size, &m->arena);
        bool plain = exists(in_folder(place, sizeof place, path, "weights.safetensors"));
        if (!plain) in_folder(place, sizeof place, path, "model.safetensors");
        bytes = read_bytes(place, &size, &m->arena);
        open_safetensors(&file, bytes, size, &m->arena);
        const char *family = text_of(member(json, "model_type"));
        m->config = plain ? config_of_json(json, &m->arena) : config_of_hf(json, family ? family : "", &m->arena);
        load_arrays(m, &file, plain ? PLAIN : m->config.learned_positions ? GPT2 : m->config.post_norms ? GEMMA : LLAMA);
    }
    make_run(m);
}
