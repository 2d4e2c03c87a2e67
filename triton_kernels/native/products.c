/* Products of matrices on a CPU in fp32, of sizes that a framework's call is too long for: the right factor is packed
 * once and used for many left ones, whose rows are read where they lie, and results are added where they belong.
 *
 * The order of a sum is that of its terms, whatever the sizes around it. A NaN stays one.
 */

/* One register of the processor, and a tile that fits into its registers beside what it is computed from. */
#if defined(__AVX512F__)
enum { LINE = 16 };
#elif defined(__AVX__)
enum { LINE = 8 };
#else
enum { LINE = 4 };
#endif
enum { TILE_ROWS = 6, TILE_COLUMNS = 2 * LINE };
typedef float Line __attribute__((vector_size(4 * LINE), aligned(4), may_alias));

static inline long larger(long a, long b) { return a > b ? a : b; }
static inline long rounded_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

/* A stride of an odd number of cache lines, for rows that are read down their columns: by powers of two they would fall
 * upon each other in the cache. */
static inline long apart(long n) { return rounded_up(n, 16) + (rounded_up(n, 16) % 32 ? 0 : 16); }

/* NULL, and `no_memory` set, where there is none. */
static float *scratch_for(atomic_int *no_memory, long floats) {
    float *scratch = aligned_alloc(64, (size_t)rounded_up(floats * (long)sizeof(float), 64));
    if (!scratch) atomic_store(no_memory, 1);
    return scratch;
}

/* ---- Products of matrices ---- */

/* Compiled once, and not wherever they are called: the compiler would take longer for their copies than for the rest.
 */
#define CALLED static __attribute__((noinline))

/* The right factor lies in panels: TILE_COLUMNS of its columns, row after row, the last panel filled up with zeros. */

/* Columns [first, first + columns) of source, whose `depth` rows are the ones in `index` where it is not NULL. */
CALLED void pack(const float *source, const int64_t *index, long stride, long first, long columns, long depth,
                 float *panels) {
    for (long j = 0; j < columns; j += TILE_COLUMNS, panels += depth * TILE_COLUMNS) {
        long n = columns - j < TILE_COLUMNS ? columns - j : TILE_COLUMNS;
        for (long k = 0; k < depth; k++) {
            const float *row = source + (index ? index[k] : k) * stride + first + j;
            Line *packed = (Line *)(panels + k * TILE_COLUMNS);
            if (n == TILE_COLUMNS) packed[0] = *(const Line *)row, packed[1] = *(const Line *)(row + LINE);
            else
                for (long c = 0; c < TILE_COLUMNS; c++) panels[k * TILE_COLUMNS + c] = c < n ? row[c] : 0.0f;
        }
    }
}

/* Two vectors' elements by their places in both. */
#if defined(__clang__)
#define MIXED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(4 * WIDE)));
#define MIXED(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

/* y[k][c] = x[c][k] of a square of WIDE rows. */
static inline void transpose_square(const float *x, long stride, float *y, long y_stride) {
    Vector row[WIDE], two[WIDE], four[WIDE];
    for (int c = 0; c < WIDE; c++) row[c] = load(x + c * stride);
    for (int c = 0; c < WIDE; c += 2) {
        two[c] = MIXED(row[c], row[c + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        two[c + 1] = MIXED(row[c], row[c + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int c = 0; c < WIDE; c += 4)
        for (int k = 0; k < 2; k++) {
            four[c + 2 * k] = MIXED(two[c + k], two[c + 2 + k], 0, 1, 8, 9, 4, 5, 12, 13);
            four[c + 2 * k + 1] = MIXED(two[c + k], two[c + 2 + k], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int k = 0; k < 4; k++) {
        Vector first = MIXED(four[k], four[4 + k], 0, 1, 2, 3, 8, 9, 10, 11);
        Vector second = MIXED(four[k], four[4 + k], 4, 5, 6, 7, 12, 13, 14, 15);
        memcpy(y + k * y_stride, &first, sizeof first), memcpy(y + (4 + k) * y_stride, &second, sizeof second);
    }
}

/* The transpose of `columns` rows of `depth` elements. */
CALLED void pack_transposed(const float *source, long stride, long columns, long depth, float *panels) {
    for (long j = 0; j < columns; j += TILE_COLUMNS, panels += depth * TILE_COLUMNS)
        for (long c = 0; c < TILE_COLUMNS; c += WIDE) {
            const float *rows = source + (j + c) * stride;
            long n = columns - j - c < WIDE ? columns - j - c : WIDE, k = 0;
            for (; n == WIDE && k + WIDE <= depth; k += WIDE)
                transpose_square(rows + k, stride, panels + k * TILE_COLUMNS + c, TILE_COLUMNS);
            for (; k < depth; k++)
                for (long i = 0; i < WIDE; i++) panels[k * TILE_COLUMNS + c + i] = i < n ? rows[i * stride + k] : 0.0f;
        }
}

/* The left factor: row i begins at x + (index ? index[i] : i) * stride, and its elements are `step` apart. */
typedef struct {
    const float *x;
    const int64_t *index;
    long stride, step;
} Left;

/* The result, whose row i begins likewise; what is there is added to, or overwritten. */
typedef struct {
    float *x;
    const int64_t *index;
    long stride;
    int add;
} Result;

/* Sums go where they belong: rows from i on. */
static inline __attribute__((always_inline)) void keep_tile(Line (*sum)[2], Result result, long i, const int rows,
                                                            long columns) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        float *y = result.x + (result.index ? result.index[i + r] : i + r) * result.stride;
        if (columns == TILE_COLUMNS) {
            Line *line = (Line *)y, *next = (Line *)(y + LINE);
            if (result.add) sum[r][0] += *line, sum[r][1] += *next;
            *line = sum[r][0], *next = sum[r][1];
        } else {
            float whole[TILE_COLUMNS];
            memcpy(whole, sum[r], sizeof whole);
            for (long c = 0; c < columns; c++) y[c] = result.add ? y[c] + whole[c] : whole[c];
        }
    }
}

static inline __attribute__((always_inline)) void tile(Left left, const float *panel, long depth, Result result, long i,
                                                       const int rows, long columns) {
    const float *x[TILE_ROWS];
    Line sum[TILE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        x[r] = left.x + (left.index ? left.index[i + r] : i + r) * left.stride;
        sum[r][0] = sum[r][1] = (Line){0};
        __builtin_prefetch(result.x + (result.index ? result.index[i + r] : i + r) * result.stride, 1);
    }
    for (long k = 0; k < depth; k++, panel += TILE_COLUMNS) {
        Line first = *(const Line *)panel, second = *(const Line *)(panel + LINE);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            float here = x[r][k * left.step];
            sum[r][0] += here * first;
            sum[r][1] += here * second;
        }
    }
    keep_tile(sum, result, i, rows, columns);
}

/* Of the panels' `depth` rows, `terms` from row `first` on are the right factor. */
CALLED void product_of(Left left, const float *panels, long depth, long first, long terms, long rows, long columns,
                       Result result) {
    panels += first * TILE_COLUMNS;
    for (long j = 0; j < columns; j += TILE_COLUMNS, panels += depth * TILE_COLUMNS, result.x += TILE_COLUMNS) {
        long n = columns - j < TILE_COLUMNS ? columns - j : TILE_COLUMNS, i = 0;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS) tile(left, panels, terms, result, i, TILE_ROWS, n);
        switch (rows - i) {
        case 5: tile(left, panels, terms, result, i, 5, n); break;
        case 4: tile(left, panels, terms, result, i, 4, n); break;
        case 3: tile(left, panels, terms, result, i, 3, n); break;
        case 2: tile(left, panels, terms, result, i, 2, n); break;
        case 1: tile(left, panels, terms, result, i, 1, n); break;
        }
    }
}

CALLED void product(Left left, const float *panels, long depth, long rows, long columns, Result result) {
    product_of(left, panels, depth, 0, depth, rows, columns, result);
}
