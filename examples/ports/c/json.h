/* JSON: a tree of what a text says. */
#ifndef JSON_H
#define JSON_H

#include "nanokv.h"

typedef enum { J_NULL, J_FALSE, J_TRUE, J_NUMBER, J_TEXT, J_LIST, J_OBJECT } JsonKind;

typedef struct Json Json;
struct Json {
    JsonKind kind;
    const char *key;     // of a member of an object
    double number;
    const char *text;    // UTF-8; of a number: as it was written
    int count;           // of a list or an object
    Json *items, *next;  // its first entry; the entry after this one
};

Json *parse_json(const char *text, size_t length, Arena *arena);  // FileFormatError if it is none
Json *member(const Json *object, const char *key);                // NULL: no such member, or null
const char *text_of(const Json *json);                            // NULL unless it is a text

#endif
