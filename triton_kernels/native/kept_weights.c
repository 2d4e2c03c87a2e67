/* Weights that are rounded to bf16 and laid into panels once, and read where they lie from then on: by the products of
 * many rows, which would make the same panels at every call, and by few tokens, which wait for memory, for half of the
 * bytes. `kept_weights.py` keeps them; panels are those of bf16_products.c, one behind the other.
 *
 * Few tokens are not rounded themselves, sums are fp32 in one order for any number of rows, and a NaN stays one.
 * Included by few_tokens.c. Legend as there, and: I inputs, O outputs of a weight.
 */

/* A weight in fp32, and the panels that are kept of it, or NULL. */
typedef struct {
    const float *wide;
    const uint32_t *panels;
} Weight;

/* Outputs of a panel: its word holds two inputs of one. */
enum { PANEL_COLUMNS = 32 };

static inline long panel_words(long in) { return (in + 1) / 2 * PANEL_COLUMNS; }

/* Words of a weight [I, O], and of the panels before its output `first`, which begins one. */
static inline long words_of(long in, long out) { return (out + PANEL_COLUMNS - 1) / PANEL_COLUMNS * panel_words(in); }
static inline long words_before(long in, long first) { return first / PANEL_COLUMNS * panel_words(in); }

#if defined(__AVX512BF16__)
/* Rows that fit into the processor's registers. */
enum { PANEL_ROWS = 4 };

/* y[r][o] = sum over i of x[r][i] w[i][o], outputs of one panel. The inputs of even and of odd number are added up
 * apart: twice as many sums wait for each other. */
static inline __attribute__((always_inline)) void rows_of_panel(const int n, const float *const *x, float *const *y,
                                                                const uint32_t *panel, long in, long o, long columns) {
    __m512 even[PANEL_ROWS][2], odd[PANEL_ROWS][2];
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 4
    for (int r = 0; r < n; r++) even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = _mm512_setzero_ps();
    long i = 0;
    for (; i + 1 < in; i += 2, panel += PANEL_COLUMNS) {
        __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + LANES);
        __m512 low[] = {(__m512)_mm512_slli_epi32(first, 16), (__m512)_mm512_slli_epi32(second, 16)};
        __m512 high[] = {(__m512)_mm512_and_si512(first, upper), (__m512)_mm512_and_si512(second, upper)};
#pragma GCC unroll 4
        for (int r = 0; r < n; r++) {
            __m512 x0 = _mm512_set1_ps(x[r][i]), x1 = _mm512_set1_ps(x[r][i + 1]);
            even[r][0] = _mm512_fmadd_ps(x0, low[0], even[r][0]), even[r][1] = _mm512_fmadd_ps(x0, low[1], even[r][1]);
            odd[r][0] = _mm512_fmadd_ps(x1, high[0], odd[r][0]), odd[r][1] = _mm512_fmadd_ps(x1, high[1], odd[r][1]);
        }
    }
    for (int r = 0; r < n; r++)
        for (int j = 0; j < 2; j++) {
            __m512 sum = _mm512_add_ps(even[r][j], odd[r][j]);
            if (i < in) {
                __m512 last = (__m512)_mm512_slli_epi32(_mm512_loadu_si512(panel + j * LANES), 16);
                sum = _mm512_fmadd_ps(_mm512_set1_ps(x[r][i]), last, sum);
            }
            _mm512_mask_storeu_ps(y[r] + o + j * LANES, first_of(columns - j * LANES), sum);
        }
}

/* Columns [first, last) of y[r][O] = x[r][I] w[I][O], n rows; `first` begins a panel. */
static void rows_times_panels(long n, const float *const *x, float *const *y, const uint32_t *panels, long in,
                              long first, long last) {
    const uint32_t *panel = panels + words_before(in, first);
    for (long o = first; o < last; o += PANEL_COLUMNS, panel += panel_words(in))
        for (long r = 0; r < n; r += PANEL_ROWS) switch (n - r) {
            case 1: rows_of_panel(1, x + r, y + r, panel, in, o, last - o); break;
            case 2: rows_of_panel(2, x + r, y + r, panel, in, o, last - o); break;
            case 3: rows_of_panel(3, x + r, y + r, panel, in, o, last - o); break;
            default: rows_of_panel(4, x + r, y + r, panel, in, o, last - o); break;
            }
}
#else
/* Nobody keeps any. */
static void rows_times_panels(long n, const float *const *x, float *const *y, const uint32_t *panels, long in,
                              long first, long last) {
    (void)n, (void)x, (void)y, (void)panels, (void)in, (void)first, (void)last;
}
#endif
