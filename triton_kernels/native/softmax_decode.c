/* Softmax attention of one token per sequence, between its projections: norms and turns the query and the key (where
 * norms and angles are given), writes key and value into their row of the cache, and attends over the rows in use.
 *
 * A decode step waits for memory, so a piece of the job is a block of a sequence's rows with all heads of them, which
 * lie side by side: it is read once, from end to end (FlashDecoding, the split over keys). What the blocks give is
 * added up in their order. Caches are fp32 or bf16 [B, S, G, K] with a stride between sequences; bf16 is widened in
 * registers, and sums are fp32. Legend as in few_tokens.c.
 */

enum { CACHE_ROWS = 256, AT_ONCE = 4, LINES = 4 };
typedef uint32_t WordLine __attribute__((vector_size(4 * LINE), aligned(4), may_alias));

typedef struct {
    const void *keys, *values;
    long cache_stride, held, blocks, heads, kv_heads, width;
    int bf16;
    /* Whether rows fill whole registers as they lie, and the width of a row in them. */
    int whole;
    long padded;
    const float *query; /* [B, H, padded], in the order of `place_of` */
    float *part;        /* [B, blocks, H, padded + 2]: what was largest, the sum, and the values of a block */
} Decoded;

/* Where channel c of a row is computed: of words of bf16 all that come first, then all that come second. */
static long place_of(const Decoded *d, long c) {
    if (!d->bf16 || !d->whole) return c;
    return c / (2 * LINE) * 2 * LINE + c % 2 * LINE + c % (2 * LINE) / 2;
}

/* Rows of one head, `stride` bytes apart. */
typedef struct {
    const char *first;
    long stride;
} Rows;

/* n rows of a head from row s on: where they lie, or in `buffer` in fp32. */
static Rows rows_of(const Decoded *d, const void *cache, long b, long g, long s, long n, float *buffer) {
    long K = d->width, size = d->bf16 ? 2 : 4, line = d->kv_heads * K * size;
    const char *first = (const char *)cache + (b * d->cache_stride + g * K) * size + s * line;
    if (d->whole) return (Rows){first, line};
    for (long j = 0; j < n; j++)
        for (long i = 0; i < K; i++) {
            const char *x = first + j * line + i * size;
            buffer[j * d->padded + i] = d->bf16 ? from_bf16(*(const uint16_t *)x) : *(const float *)x;
        }
    return (Rows){(const char *)buffer, d->padded * 4};
}

static inline float sum_line(Line v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float x[LINE];
    memcpy(x, &v, sizeof x);
    for (int width = LINE / 2; width; width /= 2)
        for (int j = 0; j < width; j++) x[j] += x[j + width];
    return x[0];
#endif
}

static inline Line early_of(WordLine words) { return (Line)(words << 16); }
static inline Line late_of(WordLine words) { return (Line)(words & 0xffff0000u); }

/* Of row j the line l behind channel i, as one of fp32. */
static inline __attribute__((always_inline)) Line line_of(Rows rows, long j, long i, const int l, const int bf16) {
    const char *row = rows.first + j * rows.stride;
    if (!bf16) return *(const Line *)(row + 4 * (i + l * LINE));
    WordLine words = *(const WordLine *)(row + 2 * (i + l / 2 * 2 * LINE));
    return l % 2 ? late_of(words) : early_of(words);
}

/* y[j] = or += q . row j, of the `lines` from channel i on. */
static inline __attribute__((always_inline)) void keys_part(const float *q, Rows rows, long n, long i, const int lines,
                                                            const int bf16, float *y) {
    Line x[LINES];
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) x[l] = *(const Line *)(q + i + l * LINE);
    for (long j = 0; j < n; j++) {
        Line sum = x[0] * line_of(rows, j, i, 0, bf16);
#pragma GCC unroll 4
        for (int l = 1; l < lines; l++) sum += x[l] * line_of(rows, j, i, l, bf16);
        y[j] = (i ? y[j] : 0.0f) + sum_line(sum);
    }
}

/* o += the sum of p[j] times row j, of the `lines` from channel i on. */
static inline __attribute__((always_inline)) void values_part(const float *p, Rows rows, long n, long i,
                                                              const int lines, const int bf16, float *o) {
    Line sum[LINES];
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) sum[l] = *(const Line *)(o + i + l * LINE);
    for (long j = 0; j < n; j++)
#pragma GCC unroll 4
        for (int l = 0; l < lines; l++) sum[l] += p[j] * line_of(rows, j, i, l, bf16);
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) *(Line *)(o + i + l * LINE) = sum[l];
}

#define IN_PARTS(part, x, rows, n, width, bf16, y)                                                                     \
    do {                                                                                                               \
        long i = 0;                                                                                                    \
        for (; i + LINES * LINE <= (width); i += LINES * LINE) part(x, rows, n, i, LINES, bf16, y);                    \
        for (; i < (width); i += 2 * LINE) part(x, rows, n, i, 2, bf16, y);                                            \
    } while (0)

static void decoded_piece(void *job, long index) {
    const Decoded *d = job;
    long H = d->heads, G = d->kv_heads, R = H / G, P = d->padded, b = index / d->blocks,
         first = index % d->blocks * CACHE_ROWS, n = d->held - first < CACHE_ROWS ? d->held - first : CACHE_ROWS;
    float p[H * CACHE_ROWS], buffer[d->whole ? 1 : AT_ONCE * P], *part = d->part + index * H * (P + 2);
    const float *query = d->query + b * H * P;
    int bf16 = d->bf16 && d->whole;
    memset(buffer, 0, sizeof buffer);
    for (long s = 0; s < n; s += AT_ONCE) {
        long some = n - s < AT_ONCE ? n - s : AT_ONCE;
        for (long g = 0; g < G; g++) {
            Rows rows = rows_of(d, d->keys, b, g, first + s, some, buffer);
            for (long h = g * R; h < (g + 1) * R; h++) {
                float *logits = p + h * CACHE_ROWS + s;
                if (bf16) IN_PARTS(keys_part, query + h * P, rows, some, P, 1, logits);
                else IN_PARTS(keys_part, query + h * P, rows, some, P, 0, logits);
            }
        }
    }
    for (long h = 0; h < H; h++) {
        float *logits = p + h * CACHE_ROWS, *values = part + h * (P + 2) + 2;
        values[-2] = most_of(logits, n);
        exp_all(logits, n, values[-2] == -INFINITY ? 0.0f : values[-2]);
        values[-1] = sum_of(logits, n);
        memset(values, 0, (size_t)P * sizeof(float));
    }
    for (long s = 0; s < n; s += AT_ONCE) {
        long some = n - s < AT_ONCE ? n - s : AT_ONCE;
        for (long g = 0; g < G; g++) {
            Rows rows = rows_of(d, d->values, b, g, first + s, some, buffer);
            for (long h = g * R; h < (g + 1) * R; h++) {
                float *values = part + h * (P + 2) + 2;
                if (bf16) IN_PARTS(values_part, p + h * CACHE_ROWS + s, rows, some, P, 1, values);
                else IN_PARTS(values_part, p + h * CACHE_ROWS + s, rows, some, P, 0, values);
            }
        }
    }
}

/* o [K] of one head of a sequence from the parts of its blocks. */
static void add_blocks(const Decoded *d, long b, long h, float sink, float *o) {
    long P = d->padded, next = d->heads * (P + 2);
    const float *part = d->part + (b * d->blocks * d->heads + h) * (P + 2);
    float most = sink, total = 0, values[P];
    for (long i = 0; i < d->blocks; i++) most = part[i * next] > most ? part[i * next] : most;
    float zero = most == -INFINITY ? 0.0f : most;
    memset(values, 0, sizeof values);
    for (long i = 0; i < d->blocks; i++, part += next) {
        float share = exp_fp32(part[0] - zero);
        total += share * part[1];
        for (long c = 0; c < P; c++) values[c] += share * part[2 + c];
    }
    total += exp_fp32(sink - zero);
    for (long c = 0; c < d->width; c++) o[c] = values[place_of(d, c)] / total;
}

/* ---- What one token brings ---- */

/* How heads of queries and keys are normed and turned; NULL for not at all. */
typedef struct {
    const float *q_norm, *k_norm, *cosine, *sine;
    float eps;
    long width, half;
} Heading;

static void prepare(const Heading *m, const float *x, const float *norm, float *y) {
    float scale = norm ? inverse_rms(x, m->width, m->eps) : 1.0f;
    for (long i = 0; i < m->width; i++) y[i] = norm ? x[i] * scale * norm[i] : x[i];
    for (long i = 0; i < m->half; i++) {
        float first = y[i], second = y[i + m->half];
        y[i] = first * m->cosine[i] - second * m->sine[i];
        y[i + m->half] = second * m->cosine[i] + first * m->sine[i];
    }
}

static void write_row(void *cache, long at, const float *x, long n, int bf16) {
    if (!bf16) memcpy((float *)cache + at, x, (size_t)n * sizeof(float));
    else
        for (long i = 0; i < n; i++) ((uint16_t *)cache)[at + i] = to_bf16(x[i]);
}

/* q [B, H K], k and v [B, G K] with strides between sequences, k NULL where another layer wrote them; o [B, H K]. The
 * new token goes to `row` of the `held` rows in use. Returns 0 or an error. */
long softmax_decode(const float *q, const float *k, const float *v, long q_stride, long kv_stride, void *keys,
                    void *values, long cache_stride, long row, long held, int bf16, const float *q_norm,
                    const float *k_norm, const float *cosine, const float *sine, const float *sink, float eps,
                    float scale, long batch, long heads, long kv_heads, long width, long half, float *o, int threads) {
    long unit = 2 * LINE, padded = rounded_up(width, unit), blocks = (held + CACHE_ROWS - 1) / CACHE_ROWS;
    Heading heading = {q_norm, k_norm, cosine, sine, eps, width, half};
    float *scratch = malloc((size_t)(batch * heads * (padded + blocks * (padded + 2))) * sizeof(float)), x[width];
    if (!scratch) return NO_MEMORY;
    Decoded job = {keys,
                   values,
                   cache_stride,
                   held,
                   blocks,
                   heads,
                   kv_heads,
                   width,
                   bf16,
                   width % unit == 0,
                   padded,
                   scratch,
                   scratch + batch * heads * padded};
    for (long b = 0; b < batch; b++) {
        for (long g = 0; k && g < kv_heads; g++) {
            long at = b * cache_stride + (row * kv_heads + g) * width;
            prepare(&heading, k + b * kv_stride + g * width, k_norm, x);
            write_row(keys, at, x, width, bf16);
            write_row(values, at, v + b * kv_stride + g * width, width, bf16);
        }
        for (long h = 0; h < heads; h++) {
            float *query = scratch + (b * heads + h) * padded;
            memset(query, 0, (size_t)padded * sizeof(float));
            prepare(&heading, q + b * q_stride + h * width, q_norm, x);
            for (long c = 0; c < width; c++) query[place_of(&job, c)] = x[c] * scale;
        }
    }
    in_pieces(decoded_piece, &job, batch * blocks, batch * kv_heads * held * width < 32768 ? 1 : threads);
    for (long b = 0; b < batch; b++)
        for (long h = 0; h < heads; h++)
            add_blocks(&job, b, h, sink ? sink[h] : -INFINITY, o + (b * heads + h) * width);
    free(scratch);
    return 0;
}
