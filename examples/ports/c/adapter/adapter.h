/* What every part of the adapter uses: the request, and the answer as it is written. */
#ifndef ADAPTER_H
#define ADAPTER_H

#include "../files.h"

typedef struct { float *x; int n, dims[3]; } Floats;  // dims from the right, 1 where there are fewer

extern Arena scratch;               // of one request
extern Cache cache;                 // likewise
extern Model checked;               // likewise: one whose arrays are only checked
extern const Json *inputs, *want;

Floats floats(const char *name);    // x is NULL if the request has none
double real(const char *name, double otherwise);
int whole(const char *name, int otherwise);
const char *word(const char *name);
uint64_t seed_of(void);
int *whole_list(const Json *list, int *n);

void begin_output(const char *name);
void put(const char *name, const float *x, int n);
void put_whole(const char *name, const int *x, int n);

Model *the_model(void);             // that the request names, kept from request to request

typedef struct { const char *op; void (*answer)(void); } Operation;
extern const Operation operations[], run_operations[];  // the last one's op is NULL

#endif
