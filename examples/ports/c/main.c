/* nanokv MODEL [options] TOKEN...   Goes on from token ids, greedily or by chance, and may leave a trace.

   MODEL is a .gguf file, a Hugging Face folder, or a folder of the conformance suite. Options: -n N new tokens (16),
   -t TEMPERATURE (0: greedy), -k TOP_K, -p TOP_P, -s SEED, -e TOKEN that ends the text, -o NAME.nkv a trace, of level
   -l writes, weights, vectors or states (weights). With -n 0 the last position's logits are printed, as bits of float32. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nanokv.h"
#include "trace.h"

typedef struct {
    const char *model, *trace, *level;
    int n_new, stop, n_tokens;
    int *tokens;
    Sampling how;
    uint64_t seed;
} Options;

static void usage(void) {
    fprintf(stderr, "nanokv MODEL [-n new tokens] [-t temperature] [-k top_k] [-p top_p] [-s seed] [-e stop] [-o trace.nkv] "
                    "[-l level] TOKEN...\n");
    exit(2);
}

static Options parse(int argc, char **argv) {
    Options o = {.level = "weights", .n_new = 16, .stop = -1, .tokens = calloc((size_t)argc, sizeof(int))};
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (word[0] == '-' && strlen(word) == 2 && value) {
            i++;
            switch (word[1]) {
            case 'n': o.n_new = atoi(value); break;
            case 't': o.how.temperature = atof(value); break;
            case 'k': o.how.top_k = atoi(value); break;
            case 'p': o.how.top_p = atof(value); break;
            case 's': o.seed = strtoull(value, NULL, 10); break;
            case 'e': o.stop = atoi(value); break;
            case 'o': o.trace = value; break;
            case 'l': o.level = value; break;
            default: usage();
            }
        } else if (!o.model) o.model = word;
        else o.tokens[o.n_tokens++] = atoi(word);
    }
    if (!o.model || !o.n_tokens || !o.tokens) usage();
    return o;
}

int main(int argc, char **argv) {
    Options o = parse(argc, argv);
    Model model;
    Cache cache;
    Trace trace;
    Pcg32 random;
    check_sampling(&o.how);
    load_model(&model, o.model);
    new_cache(&cache, &model.config);
    pcg32_seed(&random, o.seed, 0);
    if (o.trace) begin_trace(&trace, o.trace, o.level, &model.config);

    const float *logits = call(&model, &cache, o.tokens, o.n_tokens, o.trace ? &trace : NULL, false);
    for (int i = 0; i < o.n_new; i++) {  // G4
        int token = o.how.temperature == 0 ? greedy(logits, model.config.vocab_size)
                                           : sample(logits, model.config.vocab_size, &o.how, &random);
        if (token == o.stop) break;
        printf("%d ", token);
        fflush(stdout);
        if (cache.length == cache.n_ctx) break;
        logits = call(&model, &cache, &token, 1, o.trace ? &trace : NULL, true);
    }
    for (int i = 0; i < model.config.vocab_size && o.n_new == 0; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], 4);
        printf("%08x\n", bits);
    }
    if (o.n_new) printf("\n");

    if (o.trace) end_trace(&trace, &cache);
    free_arena(&cache.arena);
    free_arena(&model.arena);
    free(o.tokens);
    return 0;
}
