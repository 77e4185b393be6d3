/* Rows of pages into keys and values, written past the caches. */

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LINE 64

/* `bytes` whole lines to an aligned place: no line of it is read first, and none displaces what is in the caches. */
static void stream(char *to, const char *from, int64_t bytes) {
#if defined(__AVX512F__)
    for (int64_t at = 0; at < bytes; at += 64) _mm512_stream_si512((void *)(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX__)
    for (int64_t at = 0; at < bytes; at += 32)
        _mm256_stream_si256((__m256i *)(to + at), _mm256_loadu_si256((const __m256i *)(from + at)));
#elif defined(__SSE2__)
    for (int64_t at = 0; at < bytes; at += 16)
        _mm_stream_si128((__m128i *)(to + at), _mm_loadu_si128((const __m128i *)(from + at)));
#else
    memcpy(to, from, bytes);
#endif
}

static void copy(char *to, const char *from, int64_t bytes, int past_caches) {
    int64_t head = past_caches ? -(uintptr_t)to % LINE : bytes;
    if (head > bytes) head = bytes;
    int64_t body = (bytes - head) / LINE * LINE;
    memcpy(to, from, head);
    stream(to + head, from + head, body);
    memcpy(to + head + body, from + head + body, bytes - head - body);
}

/* Heads `first` to `stop`, counted through the layers, of rows [L][Hk][N] of a page's keys and then its values. Keys and
   values lie page after page within a head; strides in bytes. */
void kvtier_split_rows(const char *rows, char *keys, char *values, int64_t first, int64_t stop, int64_t heads,
                       int64_t pages, int64_t key_bytes, int64_t value_bytes, int64_t key_layer, int64_t key_head,
                       int64_t value_layer, int64_t value_head, int past_caches) {
    const char *from = rows + first * pages * (key_bytes + value_bytes);
    for (int64_t at = first; at < stop; at++) {
        char *key = keys + at / heads * key_layer + at % heads * key_head;
        char *value = values + at / heads * value_layer + at % heads * value_head;
        for (int64_t page = 0; page < pages; page++, key += key_bytes, value += value_bytes) {
            copy(key, from, key_bytes, past_caches);
            copy(value, from + key_bytes, value_bytes, past_caches);
            from += key_bytes + value_bytes;
        }
    }
#if defined(__SSE2__)
    if (past_caches) _mm_sfence(); /* before anybody is told that they are there */
#endif
}
