/* Muon's orthogonalisation of many small matrices: the Newton-Schulz iteration X <- (a + b X X^T + c (X X^T)^2) X, its
 * polynomials multiplied up on the smaller side first. They commute, being polynomials of one Gram matrix, so each step
 * costs four products of that side, and the longer one enters twice in all.
 *
 * Legend: N matrices of one shape, R rows and C columns of each, R <= C.
 */

/* Matrices of one shape, whose results are multiplied by `scale`. */
typedef struct {
    float *x;
    long matrices, next, rows, row_stride, columns, column_stride;
    double scale;
} Stack;

typedef struct {
    const Stack *stack;
    long steps;
    const float *coefficients;
    float eps;
    atomic_int no_memory;
} NewtonSchulz;

static void newton_schulz_piece(void *job, long index) {
    NewtonSchulz *m = job;
    const Stack *of = m->stack;
    for (; index >= of->matrices; of++) index -= of->matrices;
    long R = of->rows, C = of->columns, square = R * R;
    float *matrix = of->x + index * of->next, scale = (float)of->scale;
    float *x = scratch_for(&m->no_memory, R * C + 5 * square + R * rounded_up(C, TILE_COLUMNS) + C * TILE_COLUMNS);
    if (!x) return;
    float *gram = x + R * C, *squared = gram + square, *step = squared + square, *all = step + square,
          *other = all + square;
    float *panels = other + square;
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) x[r * C + c] = matrix[r * of->row_stride + c * of->column_stride];
    float norm = sqrtf(dot(x, x, R * C));
    norm = 1.0f / (norm < m->eps ? m->eps : norm);
    for (long i = 0; i < R * C; i++) x[i] *= norm;
    pack_transposed(x, C, R, C, panels);
    product((Left){x, NULL, C, 1}, panels, C, R, R, (Result){gram, NULL, R, 0});
    for (long s = 0; s < m->steps; s++) {
        const float *by = m->coefficients;
        pack(gram, NULL, R, 0, R, R, panels);
        product((Left){gram, NULL, R, 1}, panels, R, R, R, (Result){squared, NULL, R, 0});
        for (long i = 0; i < square; i++) step[i] = by[1] * gram[i] + by[2] * squared[i];
        for (long r = 0; r < R; r++) step[r * R + r] += by[0];
        pack(step, NULL, R, 0, R, R, panels);
        if (s == 0) memcpy(all, step, (size_t)square * sizeof(float));
        else {
            product((Left){all, NULL, R, 1}, panels, R, R, R, (Result){other, NULL, R, 0});
            float *before = all;
            all = other, other = before;
        }
        if (s + 1 == m->steps) break;
        product((Left){gram, NULL, R, 1}, panels, R, R, R, (Result){squared, NULL, R, 0});
        pack(squared, NULL, R, 0, R, R, panels);
        product((Left){step, NULL, R, 1}, panels, R, R, R, (Result){gram, NULL, R, 0});
    }
    pack(x, NULL, C, 0, C, R, panels);
    product((Left){all, NULL, R, 1}, panels, R, R, C, (Result){x, NULL, C, 0});
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) matrix[r * of->row_stride + c * of->column_stride] = scale * x[r * C + c];
    free(x);
}

/* In place; largest matrices first, so that nobody waits long for the last one. coefficients: a, b, c. Returns 0 or an
 * error, and then nothing in the matrices can be used. */
long newton_schulz(const Stack *stack, long stacks, const float *coefficients, long steps, float eps, int threads) {
    NewtonSchulz job = {.stack = stack, .steps = steps, .coefficients = coefficients, .eps = eps};
    long matrices = 0;
    for (long i = 0; i < stacks; i++) matrices += stack[i].matrices;
    in_pieces(newton_schulz_piece, &job, matrices, threads);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}
