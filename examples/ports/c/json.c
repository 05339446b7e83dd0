/* A parser for JSON. Nothing is believed: the text may be cut anywhere. */
#include <stdlib.h>
#include <string.h>

#include "json.h"

enum { MAX_DEPTH = 64 };

typedef struct {
    const char *at, *end;
    Arena *arena;
} Reader;

static _Noreturn void bad(const char *what) { fail("FileFormatError", "JSON: %s", what); }

static void skip_space(Reader *r) {
    while (r->at < r->end && strchr(" \t\r\n", *r->at) && *r->at) r->at++;
}

static char next(Reader *r) {  // the character that is not space, '\0' at the end
    skip_space(r);
    return r->at < r->end ? *r->at : '\0';
}

static void expect(Reader *r, char c) {
    if (next(r) != c) bad("a character is missing");
    r->at++;
}

static int hex4(Reader *r) {
    int value = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        const char *digits = "0123456789abcdef", *found;
        char c = r->at < r->end ? *r->at : '\0';
        if (c >= 'A' && c <= 'F') c = (char)(c + 32);
        if (!c || !(found = strchr(digits, c))) bad("four hexadecimal digits are missing");
        value = 16 * value + (int)(found - digits);
    }
    return value;
}

static char *put_utf8(char *out, long c) {
    if (c < 0x80) *out++ = (char)c;
    else if (c < 0x800) *out++ = (char)(0xC0 | c >> 6), *out++ = (char)(0x80 | (c & 63));
    else if (c < 0x10000)
        *out++ = (char)(0xE0 | c >> 12), *out++ = (char)(0x80 | (c >> 6 & 63)), *out++ = (char)(0x80 | (c & 63));
    else {
        *out++ = (char)(0xF0 | c >> 18), *out++ = (char)(0x80 | (c >> 12 & 63));
        *out++ = (char)(0x80 | (c >> 6 & 63)), *out++ = (char)(0x80 | (c & 63));
    }
    return out;
}

static char *escaped(Reader *r, char *out) {
    static const char names[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char c = r->at < r->end ? *r->at++ : '\0';
    const char *found = c ? strchr(names, c) : NULL;
    if (found) {
        *out++ = meant[found - names];
        return out;
    }
    if (c != 'u') bad("an unknown escape");
    long code = hex4(r);
    if (code >= 0xD800 && code < 0xDC00 && r->end - r->at > 6 && r->at[0] == '\\' && r->at[1] == 'u') {
        r->at += 2;
        code = 0x10000 + ((code - 0xD800) << 10) + (hex4(r) - 0xDC00);
    }
    return put_utf8(out, code);
}

static char *parse_text(Reader *r) {
    expect(r, '"');
    const char *close = r->at;
    while (close < r->end && *close != '"') close += *close == '\\' ? 2 : 1;
    if (close >= r->end) bad("a text does not end");
    char *text = take(r->arena, (size_t)(close - r->at) + 1, 1), *out = text;
    while (r->at < close) {
        if ((unsigned char)*r->at < 32) bad("a control character in a text");
        if (*r->at != '\\') *out++ = *r->at++;
        else r->at++, out = escaped(r, out);
    }
    r->at = close + 1;
    return text;
}

static void parse_number(Reader *r, Json *json) {
    const char *start = r->at;
    while (r->at < r->end && *r->at && strchr("+-.0123456789eE", *r->at)) r->at++;
    char *copy = take(r->arena, (size_t)(r->at - start) + 1, 1), *end;
    memcpy(copy, start, (size_t)(r->at - start));
    *json = (Json){.kind = J_NUMBER, .text = copy, .number = strtod(copy, &end)};
    if (end == copy || *end) bad("what is no value");
}

static void parse_value(Reader *r, Json *json, int depth);

static void parse_entries(Reader *r, Json *json, int depth, char close) {
    Json **tail = &json->items;
    r->at++;
    if (next(r) == close) {
        r->at++;
        return;
    }
    for (;;) {
        const char *key = NULL;
        if (json->kind == J_OBJECT) {
            if (next(r) != '"') bad("a name is missing");
            key = parse_text(r);
            if (member(json, key)) bad("a name stands there twice");
            expect(r, ':');
        }
        Json *entry = take(r->arena, 1, sizeof(Json));
        parse_value(r, entry, depth + 1);
        entry->key = key;
        *tail = entry;
        tail = &entry->next;
        json->count++;
        char c = next(r);
        if (c != ',' && c != close) bad("a comma or an end is missing");
        r->at++;
        if (c == close) return;
    }
}

static void parse_value(Reader *r, Json *json, int depth) {
    static const struct {
        const char *word;
        JsonKind kind;
    } words[] = {{"null", J_NULL}, {"false", J_FALSE}, {"true", J_TRUE}};
    if (depth > MAX_DEPTH) bad("too deeply nested");
    char c = next(r);
    if (c == '{' || c == '[') {
        *json = (Json){.kind = c == '{' ? J_OBJECT : J_LIST};
        parse_entries(r, json, depth, c == '{' ? '}' : ']');
        return;
    }
    if (c == '"') {
        const char *text = parse_text(r);
        *json = (Json){.kind = J_TEXT, .text = text};
        return;
    }
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i].word);
        if ((size_t)(r->end - r->at) >= n && memcmp(r->at, words[i].word, n) == 0) {
            *json = (Json){.kind = words[i].kind};
            r->at += n;
            return;
        }
    }
    parse_number(r, json);
}

Json *parse_json(const char *text, size_t length, Arena *arena) {
    Reader reader = {text, text + length, arena};
    Json *json = take(arena, 1, sizeof(Json));
    parse_value(&reader, json, 0);
    if (next(&reader)) bad("something follows the value");
    return json;
}

Json *member(const Json *object, const char *key) {
    if (object && object->kind == J_OBJECT)
        for (Json *entry = object->items; entry; entry = entry->next)
            if (strcmp(entry->key, key) == 0) return entry->kind == J_NULL ? NULL : entry;
    return NULL;
}

const char *text_of(const Json *json) { return json && json->kind == J_TEXT ? json->text : NULL; }
