/* Products of matrices whose numbers are rounded to bf16 on their way in, on processors that multiply pairs of such
 * numbers (AVX512-BF16), twice as fast as in fp32; sums are fp32. What is given, and what comes out, is fp32.
 *
 * A word holds two numbers that follow each other along the sum, the first in its lower half. A panel is laid out as
 * one of fp32, with a row of words for two rows of numbers, and takes half of its place; the next one follows it. Every
 * sum has one order, and a NaN stays one. What stands in the place of a missing second number is 0.
 */

/* What a processor can do with bf16: nothing, products by these functions, or others that only a framework has. */
enum { NO_PRODUCTS, THESE_PRODUCTS, OTHER_PRODUCTS };

long bf16_products(void) {
#if defined(__AVX512BF16__)
    return THESE_PRODUCTS;
#elif defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return OTHER_PRODUCTS;
#else
    return NO_PRODUCTS;
#endif
}

/* Rows of words: row r begins at words + (index ? index[r] : r) * row, and its pairs are `pair` words apart, 1 or
 * PAIR_WORDS. */
typedef struct {
    const uint32_t *words;
    const int64_t *index;
    long row, pair;
} Words;

#if defined(__AVX512BF16__)
_Static_assert((int)PANEL_COLUMNS == (int)TILE_COLUMNS, "kept panels are panels");
/* Rows and terms of the left factor that are rounded at once, and words between its rows, or between its pairs. */
enum { ROUNDED_ROWS = 60, ROUNDED_TERMS = 512, ROW_WORDS = ROUNDED_TERMS / 2 + 48, PAIR_WORDS = 64 };

/* Words of the first n of 32 numbers in a row. */
static inline __m512i words_along(const float *x, long n) {
    __m512 early = _mm512_maskz_loadu_ps(first_of(n), x), late = _mm512_maskz_loadu_ps(first_of(n - 16), x + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(late, early);
}

/* Words of n numbers in a row; up to a multiple of 16 of them are written. */
static void round_row(const float *x, long n, uint32_t *words) {
    for (long i = 0; i < n; i += 2 * LINE) _mm512_storeu_si512(words + i / 2, words_along(x + i, n - i));
}

/* Words of the first n of 16 numbers of two rows; `second` may be NULL. */
static inline __m512i words_across(const float *first, const float *second, long n) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_of(n), first)));
    if (!second) return low;
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_of(n), second)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* The same of numbers that are bf16 already. */
static inline __mmask32 first_halves(long n) { return n >= 32 ? 0xffffffff : n > 0 ? (1u << n) - 1 : 0; }
static inline __m512i held_along(const uint16_t *x, long n) { return _mm512_maskz_loadu_epi16(first_halves(n), x); }
static inline __m512i held_across(const uint16_t *first, const uint16_t *second, long n) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(n), first));
    if (!second) return low;
    return _mm512_or_si512(low,
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(n), second)), 16));
}

static inline __attribute__((always_inline)) __m512i along(const int held, const void *x, long at, long n) {
    return held ? held_along((const uint16_t *)x + at, n) : words_along((const float *)x + at, n);
}
/* Rows begin at `at` and, unless it is below 0, `next`. */
static inline __attribute__((always_inline)) __m512i across(const int held, const void *x, long at, long next, long n) {
    const uint16_t *half = x;
    const float *wide = x;
    return held ? held_across(half + at, next < 0 ? NULL : half + next, n)
                : words_across(wide + at, next < 0 ? NULL : wide + next, n);
}

/* As `pack`, of numbers in fp32, or `held` in bf16. */
static inline __attribute__((always_inline)) void pack_words(const int held, const void *source, const int64_t *index,
                                                             long stride, long first, long columns, long depth,
                                                             uint32_t *panels) {
    for (long j = 0; j < columns; j += TILE_COLUMNS, panels += panel_words(depth))
        for (long k = 0; k < depth; k += 2) {
            long row = (index ? index[k] : k) * stride + first + j, next = -1;
            if (k + 1 < depth) next = (index ? index[k + 1] : k + 1) * stride + first + j;
            uint32_t *words = panels + k / 2 * TILE_COLUMNS;
            _mm512_storeu_si512(words, across(held, source, row, next, columns - j));
            if (next >= 0) next += LINE;
            _mm512_storeu_si512(words + LINE, across(held, source, row + LINE, next, columns - j - LINE));
        }
}

/* As `pack_transposed`, likewise. */
static inline __attribute__((always_inline)) void pack_transposed_words(const int held, const void *source, long stride,
                                                                        long columns, long depth, uint32_t *panels) {
    float words[WIDE * LINE];
    for (long j = 0; j < columns; j += TILE_COLUMNS, panels += panel_words(depth))
        for (long c = 0; c < TILE_COLUMNS; c += WIDE)
            for (long k = 0; k < depth; k += 2 * LINE) {
                long pairs = (depth - k + 1) / 2 < LINE ? (depth - k + 1) / 2 : LINE, p = 0;
                for (long i = 0; i < WIDE; i++) {
                    int there = j + c + i < columns;
                    long row = there ? (j + c + i) * stride + k : 0;
                    _mm512_storeu_si512(words + i * LINE, along(held, source, row, there ? depth - k : 0));
                }
                float *panel = (float *)panels + k / 2 * TILE_COLUMNS + c;
                for (; p + WIDE <= pairs; p += WIDE)
                    transpose_square(words + p, LINE, panel + p * TILE_COLUMNS, TILE_COLUMNS);
                for (; p < pairs; p++)
                    for (long i = 0; i < WIDE; i++) memcpy(panel + p * TILE_COLUMNS + i, words + i * LINE + p, 4);
            }
}

CALLED void pack_bf16(const float *source, const int64_t *index, long stride, long first, long columns, long depth,
                      float *panels) {
    pack_words(0, source, index, stride, first, columns, depth, (uint32_t *)panels);
}
CALLED void pack_held(const uint16_t *source, const int64_t *index, long stride, long columns, long depth,
                      float *panels) {
    pack_words(1, source, index, stride, 0, columns, depth, (uint32_t *)panels);
}
CALLED void pack_transposed_bf16(const float *source, long stride, long columns, long depth, float *panels) {
    pack_transposed_words(0, source, stride, columns, depth, (uint32_t *)panels);
}
CALLED void pack_transposed_held(const uint16_t *source, long stride, long columns, long depth, float *panels) {
    pack_transposed_words(1, source, stride, columns, depth, (uint32_t *)panels);
}

/* The words of some rows of a left factor, in [ROUNDED_ROWS][ROW_WORDS] where its terms follow each other in memory.
 * Otherwise its rows do, and they are in [pairs][PAIR_WORDS]. */
static void round_left(Left left, long i, long rows, long k, long terms, uint32_t *words) {
    if (left.step == 1)
        for (long r = 0; r < rows; r++) {
            const float *x = left.x + (left.index ? left.index[i + r] : i + r) * left.stride + k;
            round_row(x, terms, words + r * ROW_WORDS);
        }
    else
        for (long at = 0; at < terms; at += 2) {
            const float *x = left.x + (k + at) * left.step + i, *next = at + 1 < terms ? x + left.step : NULL;
            for (long r = 0; r < rows; r += LINE)
                _mm512_storeu_si512(words + at / 2 * PAIR_WORDS + r,
                                    words_across(x + r, next ? next + r : NULL, rows - r));
        }
}

static inline __attribute__((always_inline)) void tile_bf16(Words left, const long pair, const float *panel, long terms,
                                                            Result result, long i, const int rows, long columns) {
    const uint32_t *x[TILE_ROWS];
    Line sum[TILE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        x[r] = left.words + (left.index ? left.index[r] : r) * left.row;
        sum[r][0] = sum[r][1] = (Line){0};
        const float *y = result.x + (result.index ? result.index[i + r] : i + r) * result.stride;
        __builtin_prefetch(y, 1), __builtin_prefetch(y + LINE, 1);
    }
    for (long p = 0; p < (terms + 1) / 2; p++, panel += TILE_COLUMNS) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(panel), second = (__m512bh)_mm512_loadu_si512(panel + LINE);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512bh here = (__m512bh)_mm512_set1_epi32((int)x[r][p * pair]);
            sum[r][0] = (Line)_mm512_dpbf16_ps((__m512)sum[r][0], here, first);
            sum[r][1] = (Line)_mm512_dpbf16_ps((__m512)sum[r][1], here, second);
        }
    }
    keep_tile(sum, result, i, rows, columns);
}

static inline __attribute__((always_inline)) void tiles_bf16(Words left, const long pair, const float *panel,
                                                             long terms, Result result, long i, long rows,
                                                             long columns) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, i += TILE_ROWS) {
        tile_bf16(left, pair, panel, terms, result, i, TILE_ROWS, columns);
        if (left.index) left.index += TILE_ROWS;
        else left.words += TILE_ROWS * left.row;
    }
    switch (rows) {
    case 5: tile_bf16(left, pair, panel, terms, result, i, 5, columns); break;
    case 4: tile_bf16(left, pair, panel, terms, result, i, 4, columns); break;
    case 3: tile_bf16(left, pair, panel, terms, result, i, 3, columns); break;
    case 2: tile_bf16(left, pair, panel, terms, result, i, 2, columns); break;
    case 1: tile_bf16(left, pair, panel, terms, result, i, 1, columns); break;
    }
}

/* Rounded rows times columns of a panel and those behind it, whose sums have `depth` terms at most; row 0 gives the
 * result's row i. */
CALLED void words_times(Words left, const float *panel, long depth, long terms, long i, long rows, long columns,
                        Result result) {
    for (long j = 0; j < columns; j += TILE_COLUMNS, panel += panel_words(depth), result.x += TILE_COLUMNS) {
        long width = columns - j < TILE_COLUMNS ? columns - j : TILE_COLUMNS;
        if (left.pair == 1) tiles_bf16(left, 1, panel, terms, result, i, rows, width);
        else tiles_bf16(left, PAIR_WORDS, panel, terms, result, i, rows, width);
    }
}

/* As `product_of`; `first` is even. */
CALLED void product_of_bf16(Left left, const float *panels, long depth, long first, long terms, long rows, long columns,
                            Result result) {
    uint32_t words[ROUNDED_ROWS * ROW_WORDS];
    _Static_assert(ROUNDED_TERMS / 2 * PAIR_WORDS <= ROUNDED_ROWS * ROW_WORDS, "either layout fits");
    for (long k = 0; k == 0 || k < terms; k += ROUNDED_TERMS, result.add = 1) {
        long n = terms - k < ROUNDED_TERMS ? terms - k : ROUNDED_TERMS;
        for (long i = 0; i < rows; i += ROUNDED_ROWS) {
            long m = rows - i < ROUNDED_ROWS ? rows - i : ROUNDED_ROWS;
            round_left(left, i, m, k, n, words);
            Words rounded = left.step == 1 ? (Words){words, NULL, ROW_WORDS, 1} : (Words){words, NULL, 1, PAIR_WORDS};
            words_times(rounded, panels + (first + k) / 2 * TILE_COLUMNS, depth, n, i, m, columns, result);
        }
    }
}

/* The transpose of `depth` rows of bf16, each of them `rows` numbers, times panels. */
CALLED void held_transposed_times(const uint16_t *x, const int64_t *index, long stride, const float *panels, long depth,
                                  long rows, long columns, Result result) {
    uint32_t words[ROUNDED_TERMS / 2 * PAIR_WORDS];
    for (long k = 0; k == 0 || k < depth; k += ROUNDED_TERMS, result.add = 1) {
        long n = depth - k < ROUNDED_TERMS ? depth - k : ROUNDED_TERMS;
        for (long i = 0; i < rows; i += ROUNDED_ROWS) {
            long m = rows - i < ROUNDED_ROWS ? rows - i : ROUNDED_ROWS;
            for (long at = k; at < k + n; at += 2) {
                const uint16_t *first = x + (index ? index[at] : at) * stride + i, *next = NULL;
                if (at + 1 < k + n) next = x + (index ? index[at + 1] : at + 1) * stride + i;
                for (long r = 0; r < m; r += LINE)
                    _mm512_storeu_si512(words + (at - k) / 2 * PAIR_WORDS + r,
                                        held_across(first + r, next ? next + r : NULL, m - r));
            }
            words_times((Words){words, NULL, 1, PAIR_WORDS}, panels + k / 2 * TILE_COLUMNS, depth, n, i, m, columns,
                        result);
        }
    }
}

/* `exp_lanes` to 9e-5: a twentieth of what rounding to bf16 may change. */
static inline __m512 rough_exp_lanes(__m512 x, __m512 zero, __mmask16 there) {
    x = _mm512_fmsub_ps(x, _mm512_set1_ps(LOG2_E), zero);
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = r * 7.706724030e-2f + 2.276449775e-1f;
    p = p * r + 6.951166307e-1f;
    return _mm512_maskz_scalef_ps(there, p * r + 1.0f, x);
}

static inline __attribute__((always_inline)) void exp_pair(const float *x, __m512 zero, __mmask16 early, __mmask16 late,
                                                           __m512 *sum, uint32_t *words) {
    __m512 first = rough_exp_lanes(_mm512_maskz_loadu_ps(early, x), zero, early);
    __m512 second = rough_exp_lanes(_mm512_maskz_loadu_ps(late, x + LINE), zero, late);
    sum[0] = _mm512_add_ps(sum[0], first), sum[1] = _mm512_add_ps(sum[1], second);
    _mm512_storeu_si512(words, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* The words of exp(x - zero) of n numbers, and the sum of what was rounded. */
static float exp_words(const float *x, long n, float zero, uint32_t *words) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, less = scaled_zero(zero);
    long i = 0;
    for (; i + 2 * LINE <= n; i += 2 * LINE) exp_pair(x + i, less, 0xffff, 0xffff, sum, words + i / 2);
    if (i < n) exp_pair(x + i, less, first_of(n - i), first_of(n - i - LINE), sum, words + i / 2);
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

/* Weights [E, I, O], or their transposes' [E, O, I], for `Weight.panels`. */
typedef struct {
    const float *source;
    uint32_t *panels;
    long in, out;
    int transposed;
} Kept;

enum { KEPT_COLUMNS = 8 * TILE_COLUMNS };

static void keep_piece(void *job, long index) {
    const Kept *m = job;
    long strips = (m->out + KEPT_COLUMNS - 1) / KEPT_COLUMNS, e = index / strips, first = index % strips * KEPT_COLUMNS,
         n = m->out - first < KEPT_COLUMNS ? m->out - first : KEPT_COLUMNS;
    const float *source = m->source + e * m->in * m->out;
    float *panels = (float *)(m->panels + e * words_of(m->in, m->out) + words_before(m->in, first));
    if (m->transposed) pack_transposed_bf16(source + first * m->in, m->in, n, m->in, panels);
    else pack_bf16(source, NULL, m->out, first, n, m->in, panels);
}

void keep_weights(const float *source, uint32_t *panels, long experts, long in, long out, int transposed, int threads) {
    Kept job = {source, panels, in, out, transposed};
    in_pieces(keep_piece, &job, experts * ((out + KEPT_COLUMNS - 1) / KEPT_COLUMNS), threads);
}

#define ROUNDED(call, rounded) (bf16 ? (rounded) : (call))
#else
/* Nobody calls these. */
enum { ROW_WORDS = 1 };
static void round_row(const float *x, long n, uint32_t *words) { (void)x, (void)n, (void)words; }
static void words_times(Words left, const float *panel, long depth, long terms, long i, long rows, long columns,
                        Result result) {
    (void)left, (void)panel, (void)depth, (void)terms, (void)i, (void)rows, (void)columns, (void)result;
}
static void held_transposed_times(const uint16_t *x, const int64_t *index, long stride, const float *panels, long depth,
                                  long rows, long columns, Result result) {
    (void)x, (void)index, (void)stride, (void)panels, (void)depth, (void)rows, (void)columns, (void)result;
}
static float exp_words(const float *x, long n, float zero, uint32_t *words) {
    return (void)x, (void)n, (void)zero, (void)words, 0.0f;
}
static void pack_held(const uint16_t *source, const int64_t *index, long stride, long columns, long depth,
                      float *panels) {
    (void)source, (void)index, (void)stride, (void)columns, (void)depth, (void)panels;
}
static void pack_transposed_held(const uint16_t *source, long stride, long columns, long depth, float *panels) {
    (void)source, (void)stride, (void)columns, (void)depth, (void)panels;
}
void keep_weights(const float *source, uint32_t *panels, long experts, long in, long out, int transposed, int threads) {
    (void)source, (void)panels, (void)experts, (void)in, (void)out, (void)transposed, (void)threads;
}

#define ROUNDED(call, rounded) ((void)bf16, (call))
#endif

/* ---- The same calls with or without rounding; where there is none, `bf16` is never asked for ---- */

/* Floats that panels take, and those before their column `first`, which begins one. */
static long floats_of_panels(int bf16, long depth, long columns) {
    return bf16 ? words_of(depth, columns) : rounded_up(columns, TILE_COLUMNS) * depth;
}
static long floats_before(int bf16, long depth, long first) {
    return bf16 ? words_before(depth, first) : first * depth;
}

static void pack_as(int bf16, const float *source, const int64_t *index, long stride, long first, long columns,
                    long depth, float *panels) {
    ROUNDED(pack(source, index, stride, first, columns, depth, panels),
            pack_bf16(source, index, stride, first, columns, depth, panels));
}

static void pack_transposed_as(int bf16, const float *source, long stride, long columns, long depth, float *panels) {
    ROUNDED(pack_transposed(source, stride, columns, depth, panels),
            pack_transposed_bf16(source, stride, columns, depth, panels));
}

static void product_of_as(int bf16, Left left, const float *panels, long depth, long first, long terms, long rows,
                          long columns, Result result) {
    ROUNDED(product_of(left, panels, depth, first, terms, rows, columns, result),
            product_of_bf16(left, panels, depth, first, terms, rows, columns, result));
}

static void product_as(int bf16, Left left, const float *panels, long depth, long rows, long columns, Result result) {
    product_of_as(bf16, left, panels, depth, 0, depth, rows, columns, result);
}
