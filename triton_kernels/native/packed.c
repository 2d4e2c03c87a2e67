/* Weights [E, I, O] of experts in fewer bits than fp32, read as they are stored and widened in registers: a decode step
 * waits for memory, and a byte takes a quarter of what a float takes.
 *
 * w[i][o] = scale[g][o] code[i][o] + offset[g][o], with g = i / group. Codes are signed bytes of 8 bits; of 4 bits two
 * inputs lie in a byte, the lower one in its low half, as code + 8. Scales and offsets are bf16, an offset of NULL is
 * none; 16 bits are bf16 weights without either. `moe/packed.py` makes them. Sums are fp32, in a fixed order.
 *
 * Included by few_tokens.c. Legend as there, and: I inputs, O outputs of a weight.
 */

/* The same weight of all experts; of 32 bits `codes` are floats, and `panels` what is kept of them (`Weight`). */
typedef struct {
    const void *codes;
    const uint16_t *scale, *offset;
    long bits, group;
    const uint32_t *panels;
} Matrices;

/* Inputs whose codes are computed together: those of a byte of 4 bits, and no more, for memory comes in the order in
 * which it lies. */
enum { ROWS = 2 };
/* What a code of 4 bits is stored above itself. */
enum { NIBBLE_ZERO = 8 };

/* WIDE codes become floats. */
#if defined(__AVX2__)
#include <immintrin.h>

static inline __m128i eight_bytes(const void *p) { return _mm_loadl_epi64((const __m128i *)p); }
static inline Vector of_bytes(const int8_t *p) {
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p)));
}
static inline Vector of_halves(const uint16_t *p) {
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
static inline void of_nibbles(const uint8_t *p, Vector *low, Vector *high) {
    __m256i both = _mm256_cvtepu8_epi32(eight_bytes(p));
    *low = (Vector)_mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
    *high = (Vector)_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
}
#else
static inline Vector of_bytes(const int8_t *p) {
    float x[WIDE];
    for (int i = 0; i < WIDE; i++) x[i] = (float)p[i];
    return load(x);
}
static inline Vector of_halves(const uint16_t *p) {
    float x[WIDE];
    for (int i = 0; i < WIDE; i++) x[i] = from_bf16(p[i]);
    return load(x);
}
static inline void of_nibbles(const uint8_t *p, Vector *low, Vector *high) {
    float x[WIDE], y[WIDE];
    for (int i = 0; i < WIDE; i++) x[i] = (float)(p[i] & 15), y[i] = (float)(p[i] >> 4);
    *low = load(x), *high = load(y);
}
#endif

/* The code at input j and output o behind `rows`, as it is stored. */
static inline float code_at(const int bits, const uint8_t *rows, long out, long j, long o) {
    if (bits == 16) return from_bf16(((const uint16_t *)rows)[j * out + o]);
    if (bits == 8) return (float)((const int8_t *)rows)[j * out + o];
    return (float)(rows[j / 2 * out + o] >> 4 * (j % 2) & 15);
}

/* y[o] += x[0] code[0][o] + x[1] code[1][o]; `rows` lies at an input that is even. */
static inline __attribute__((always_inline)) void add_codes(const int bits, const float *restrict x,
                                                            const uint8_t *restrict rows, long out, float *restrict y) {
    long o = 0;
    for (; o + WIDE <= out; o += WIDE) {
        Vector sum = load(y + o);
        Vector first, second;
        if (bits == 4) of_nibbles(rows + o, &first, &second);
        else if (bits == 8)
            first = of_bytes((const int8_t *)rows + o), second = of_bytes((const int8_t *)rows + out + o);
        else first = of_halves((const uint16_t *)rows + o), second = of_halves((const uint16_t *)rows + out + o);
        sum += x[0] * first;
        sum += x[1] * second;
        memcpy(y + o, &sum, sizeof sum);
    }
    for (; o < out; o++)
        for (int j = 0; j < ROWS; j++) y[o] += x[j] * code_at(bits, rows, out, j, o);
}

/* y[o] += sum over `in` inputs of x[i] code[i][o]. */
static inline __attribute__((always_inline)) void add_all_codes(const int bits, const float *x, const uint8_t *codes,
                                                                long in, long out, float *y) {
    long i = 0;
    for (; i + ROWS <= in; i += ROWS) add_codes(bits, x + i, codes + i * out * bits / 8, out, y);
    for (long rest = i; i < in; i++)
        for (long o = 0; o < out; o++) y[o] += x[i] * code_at(bits, codes + rest * out * bits / 8, out, i - rest, o);
}

static void add_stored(const float *x, const uint8_t *codes, long bits, long in, long out, float *y) {
    switch (bits) {
    case 4: add_all_codes(4, x, codes, in, out, y); break;
    case 8: add_all_codes(8, x, codes, in, out, y); break;
    case 16: add_all_codes(16, x, codes, in, out, y); break;
    }
}

/* Codes of one expert; a byte that holds two inputs holds one of an odd number's last. */
static const uint8_t *codes_of(const Matrices *w, long e, long in, long out) {
    long lines = w->bits == 4 ? (in + 1) / 2 : in, line = w->bits == 16 ? 2 * out : out;
    return (const uint8_t *)w->codes + e * lines * line;
}

/* y[o] += w^T x over the inputs of group g, whose sums of codes are taken in `sum` [O]. */
static void add_group(const Matrices *w, long e, long g, const float *x, long in, long out, float *restrict sum,
                      float *restrict y) {
    long first = g * w->group, n = first + w->group < in ? w->group : in - first;
    long at = (e * ((in + w->group - 1) / w->group) + g) * out;
    const uint16_t *scale = w->scale + at, *offset = w->offset ? w->offset + at : NULL;
    float x_sum = 0;
    for (long i = 0; i < n; i++) x_sum += x[first + i];
    memset(sum, 0, (size_t)out * sizeof(float));
    add_stored(x + first, codes_of(w, e, in, out) + first * out * w->bits / 8, w->bits, n, out, sum);
    float zero = w->bits == 4 ? NIBBLE_ZERO * x_sum : 0.0f;
    for (long o = 0; o < out; o++) y[o] += from_bf16(scale[o]) * (sum[o] - zero);
    for (long o = 0; offset && o < out; o++) y[o] += from_bf16(offset[o]) * x_sum;
}

/* y[r][O] = x[r][I] w_e[I][O], n rows. */
static void matrix_times(long n, const float *const *x, float *const *y, const Matrices *w, long e, long in, long out) {
    if (w->panels) {
        rows_times_panels(n, x, y, w->panels + e * words_of(in, out), in, 0, out);
        return;
    }
    if (w->bits == 32) {
        rows_times(n, x, y, (const float *)w->codes + e * in * out, in, out);
        return;
    }
    for (long r = 0; r < n; r++) memset(y[r], 0, (size_t)out * sizeof(float));
    if (w->bits == 16) {
        for (long r = 0; r < n; r++) add_stored(x[r], codes_of(w, e, in, out), 16, in, out, y[r]);
        return;
    }
    float sum[out];
    /* All rows of a group: its codes are in the cache by the second one. */
    for (long g = 0; g * w->group < in; g++)
        for (long r = 0; r < n; r++) add_group(w, e, g, x[r], in, out, sum, y[r]);
}

/* One expert's weight in fp32, y [I, O]. */
void unpack_weight(const void *codes, const uint16_t *scale, const uint16_t *offset, float *y, long e, long in,
                   long out, long bits, long group) {
    Matrices w = {codes, scale, offset, bits, group, NULL};
    const uint8_t *rows = codes_of(&w, e, in, out);
    long groups = (in + group - 1) / group;
    for (long i = 0; i < in; i++, y += out) {
        long at = (e * groups + i / group) * out;
        float zero = bits == 4 ? NIBBLE_ZERO : 0.0f;
        /* By bits outside of the loops, which become vectors then. */
        if (bits == 4)
            for (long o = 0; o < out; o++) y[o] = code_at(4, rows, out, i, o) - zero;
        else if (bits == 8)
            for (long o = 0; o < out; o++) y[o] = code_at(8, rows, out, i, o);
        else
            for (long o = 0; o < out; o++) y[o] = code_at(16, rows, out, i, o);
        for (long o = 0; scale && o < out; o++) y[o] *= from_bf16(scale[at + o]);
        for (long o = 0; offset && o < out; o++) y[o] += from_bf16(offset[at + o]);
    }
}
