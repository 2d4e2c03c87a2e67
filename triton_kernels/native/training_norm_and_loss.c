/* What stands around the products of a training step on a CPU: numbers between bf16 and fp32, RMSNorm with its
 * gradients, and the output head with its cross-entropy, whose logits exist for one block of tokens at a time.
 *
 * Pieces of a job are blocks of rows of one size; what is summed over rows is summed within a block, then block by
 * block in their order. Legend as in few_tokens.c, and: V words of the vocabulary.
 */

enum { NORM_ROWS = 256, LOSS_ROWS = 60, LOSS_COLUMNS = 512 };

/* ---- bf16 to fp32 and back ---- */

enum { CONVERTED = 16384 };

typedef struct {
    uint16_t *half;
    float *wide;
    long n;
} Conversion;

static void widen_piece(void *job, long index) {
    Conversion *m = job;
    long first = index * CONVERTED, last = first + CONVERTED < m->n ? first + CONVERTED : m->n;
    for (long i = first; i < last; i++) m->wide[i] = from_bf16(m->half[i]);
}

static void narrow_piece(void *job, long index) {
    Conversion *m = job;
    long first = index * CONVERTED, last = first + CONVERTED < m->n ? first + CONVERTED : m->n;
    for (long i = first; i < last; i++) m->half[i] = to_bf16(m->wide[i]);
}

void convert_bf16(uint16_t *half, float *wide, long n, int to_wide, int threads) {
    Conversion job = {half, wide, n};
    in_pieces(to_wide ? widen_piece : narrow_piece, &job, (n + CONVERTED - 1) / CONVERTED, threads);
}

/* ---- x / rms(x) * weight of many rows, and its gradients ---- */

typedef struct {
    const float *x, *weight;
    float *y;
    long rows, width;
    float eps;
} Norm;

static void norm_piece(void *job, long index) {
    Norm *m = job;
    long first = index * NORM_ROWS, n = m->rows - first < NORM_ROWS ? m->rows - first : NORM_ROWS;
    rms_norm(m->x + first * m->width, m->weight, m->y + first * m->width, n, m->width, m->eps);
}

void rms_norm_rows(const float *x, const float *weight, float *y, long rows, long width, float eps, int threads) {
    Norm job = {x, weight, y, rows, width, eps};
    in_pieces(norm_piece, &job, (rows + NORM_ROWS - 1) / NORM_ROWS, threads);
}

typedef struct {
    const float *dy, *x, *weight;
    float *dx, *d_weight; /* d_weight: [pieces, D] */
    long rows, width;
    float eps;
} NormGradient;

static void norm_gradient_piece(void *job, long index) {
    NormGradient *m = job;
    long D = m->width, first = index * NORM_ROWS, last = first + NORM_ROWS < m->rows ? first + NORM_ROWS : m->rows;
    const float *restrict weight = m->weight;
    float *restrict d_weight = m->d_weight + index * D;
    memset(d_weight, 0, (size_t)D * sizeof(float));
    for (long r = first; r < last; r++) {
        const float *restrict x = m->x + r * D, *restrict dy = m->dy + r * D;
        float *restrict dx = m->dx + r * D, scale = inverse_rms(x, D, m->eps);
        for (long i = 0; i < D; i++) {
            dx[i] = dy[i] * weight[i];
            d_weight[i] += dy[i] * (x[i] * scale);
        }
        float along = dot(dx, x, D) * scale * scale / (float)D;
        for (long i = 0; i < D; i++) dx[i] = scale * (dx[i] - x[i] * along);
    }
}

/* d_weight: [ceil(rows / NORM_ROWS), D]; its first row is the result. */
void rms_norm_backward(const float *dy, const float *x, const float *weight, float *dx, float *d_weight, long rows,
                       long width, float eps, int threads) {
    long pieces = (rows + NORM_ROWS - 1) / NORM_ROWS;
    NormGradient job = {dy, x, weight, dx, d_weight, rows, width, eps};
    in_pieces(norm_gradient_piece, &job, pieces, threads);
    for (long p = 1; p < pieces; p++)
        for (long i = 0; i < width; i++) d_weight[i] += d_weight[p * width + i];
}

/* ---- The mean cross-entropy of x W^T with its gradients ---- */

/* Tokens whose logits are in memory together; their gradient of W is added up by pieces of the vocabulary. */
enum { LOSS_BLOCK = 4 * LOSS_ROWS };

typedef struct {
    const float *x, *weight;
    const int64_t *target;
    long tokens, words, width, first, ignored;
    int bf16;                 /* whether products round what they read to it */
    float *columns, *rows;    /* W in panels for x W^T, and for logits' gradients W */
    float *logits, *x_panels; /* of a block of tokens: [LOSS_BLOCK, stride] */
    long stride;
    float *loss, *dx, *d_weight; /* [T], and the gradients of the mean, or NULL */
} Loss;

static void pack_columns_piece(void *job, long index) {
    Loss *m = job;
    long first = index * LOSS_COLUMNS, n = m->words - first < LOSS_COLUMNS ? m->words - first : LOSS_COLUMNS;
    pack_transposed_as(m->bf16, m->weight + first * m->width, m->width, n, m->width,
                       m->columns + floats_before(m->bf16, m->width, first));
}

/* The losses of some tokens; of their logits remain the gradients. */
static void loss_piece(void *job, long index) {
    Loss *m = job;
    long V = m->words, D = m->width, first = m->first + index * LOSS_ROWS;
    long n = m->tokens - first < LOSS_ROWS ? m->tokens - first : LOSS_ROWS;
    float *logits = m->logits + index * LOSS_ROWS * m->stride, share = 1.0f / (float)m->tokens;
    product_as(m->bf16, (Left){m->x + first * D, NULL, D, 1}, m->columns, D, n, V,
               (Result){logits, NULL, m->stride, 0});
    for (long r = 0; r < n; r++) {
        float *row = logits + r * m->stride, most = most_of(row, V);
        long target = m->target[first + r];
        most = most == -INFINITY ? 0.0f : most;
        float there = target == m->ignored ? 0.0f : row[target];
        exp_all(row, V, most);
        float sum = sum_of(row, V);
        m->loss[first + r] = target == m->ignored ? 0.0f : logf(sum) + most - there;
        if (!m->dx) continue;
        float scale = target == m->ignored ? 0.0f : share / sum;
        for (long v = 0; v < V; v++) row[v] *= scale;
        if (target != m->ignored) row[target] -= share;
    }
    /* Sums over the vocabulary in parts, which stay in the cache and round less. */
    for (long v = 0; m->dx && v < V; v += LOSS_COLUMNS)
        product_of_as(m->bf16, (Left){logits + v, NULL, m->stride, 1}, m->rows, V, v,
                      V - v < LOSS_COLUMNS ? V - v : LOSS_COLUMNS, n, D, (Result){m->dx + first * D, NULL, D, v > 0});
}

static void head_gradient_piece(void *job, long index) {
    Loss *m = job;
    long D = m->width, first = index * LOSS_COLUMNS, words = m->words - first, tokens = m->tokens - m->first;
    words = words < LOSS_COLUMNS ? words : LOSS_COLUMNS, tokens = tokens < LOSS_BLOCK ? tokens : LOSS_BLOCK;
    product_as(m->bf16, (Left){m->logits + first, NULL, 1, m->stride}, m->x_panels, tokens, words, D,
               (Result){m->d_weight + first * D, NULL, D, m->first > 0});
}

/* loss: [T]. dx [T, D] and d_weight [V, D]: gradients of the mean of all T, or both NULL. Returns 0 or an error. */
long head_loss(const float *x, const float *weight, const int64_t *target, float *loss, float *dx, float *d_weight,
               long tokens, long words, long width, long ignored, int bf16, int threads) {
    for (long t = 0; t < tokens; t++)
        if (target[t] != ignored && (target[t] < 0 || target[t] >= words)) return OUT_OF_RANGE;
    long stride = apart(words), columns = rounded_up(words, TILE_COLUMNS), wide = rounded_up(width, TILE_COLUMNS);
    long rows = dx ? words * wide : 0, block = tokens < LOSS_BLOCK ? rounded_up(tokens, LOSS_ROWS) : LOSS_BLOCK;
    atomic_int no_memory = 0;
    float *scratch = scratch_for(&no_memory, columns * width + rows + block * stride + (dx ? block * wide : 0));
    if (!scratch) return NO_MEMORY;
    Loss job = {.x = x,
                .weight = weight,
                .target = target,
                .tokens = tokens,
                .words = words,
                .width = width,
                .ignored = ignored,
                .bf16 = bf16,
                .columns = scratch,
                .rows = scratch + columns * width,
                .stride = stride,
                .loss = loss,
                .dx = dx,
                .d_weight = d_weight};
    job.logits = job.rows + rows, job.x_panels = job.logits + block * stride;
    long pieces = (words + LOSS_COLUMNS - 1) / LOSS_COLUMNS;
    in_pieces(pack_columns_piece, &job, pieces, threads);
    if (dx) pack_as(bf16, weight, NULL, width, 0, width, words, job.rows);
    for (; job.first < tokens; job.first += LOSS_BLOCK) {
        long n = tokens - job.first < LOSS_BLOCK ? tokens - job.first : LOSS_BLOCK;
        in_pieces(loss_piece, &job, (n + LOSS_ROWS - 1) / LOSS_ROWS, threads);
        if (!dx) continue;
        pack_as(bf16, x + job.first * width, NULL, width, 0, width, n, job.x_panels);
        in_pieces(head_gradient_piece, &job, pieces, threads);
    }
    free(scratch);
    return 0;
}
