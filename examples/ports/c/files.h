/* The two kinds of files that models come in. */
#ifndef FILES_H
#define FILES_H

#include "json.h"

typedef struct {
    const char *name, *kind;      // kind: "F32", "F16", "BF16", "Q4_1", ...
    int n_dims;
    size_t dims[8];               // outermost first: a matrix is [outputs, inputs]
    const unsigned char *data;
    size_t size;                  // bytes
    bool used;
} Tensor;

typedef struct {                  // a pair of a GGUF file
    const char *key, *text;       // text: NULL unless it is one
    double number;                // of an array: how many elements it has
} Pair;

typedef struct {
    Tensor *tensors;
    int n_tensors;
    Pair *pairs;
    int n_pairs;
} File;

unsigned char *read_bytes(const char *path, size_t *size, Arena *arena);
void open_safetensors(File *file, const unsigned char *bytes, size_t size, Arena *arena);
void open_gguf(File *file, const unsigned char *bytes, size_t size, Arena *arena);
Tensor *tensor_named(const File *file, const char *name);
const Pair *pair_named(const File *file, const char *format, const char *architecture);  // format has one %s
bool can_dequantise(const char *kind);
void dequantise(float *y, const char *kind, const unsigned char *data, size_t count);   // C6

/* config.c */
Config config_of_json(const Json *json, Arena *arena);                       // the suite's plain form, C1
Config config_of_hf(const Json *json, const char *family, Arena *arena);     // a Hugging Face folder's config.json, C4
Config config_of_gguf(const File *file, const char *arch, Arena *arena);     // a GGUF file's pairs, C5

/* load.c */
typedef enum { PLAIN, LLAMA, GEMMA, GPT2, GGUF, GGUF_GPT2 } Naming;

void load_arrays(Model *model, const File *file, Naming naming);

#endif
