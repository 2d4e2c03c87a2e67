/* x W^T of many rows on a CPU, with its gradients; every sum has one order, whatever the number of threads. Legend as
 * in few_tokens.c, and: I and O the widths of W [O, I].
 */

/* Rows of a piece of y and dx; outputs of a piece of dW; rows whose part of dW is added up at once. */
enum { PROJECTED = 60, PROJECTED_OUTPUTS = 48, PROJECTED_BLOCK = 240 };

typedef struct {
    const float *left, *dy, *panels; /* the right factor in panels */
    float *result;
    long rows, in, out, first; /* first: of the rows of a block */
    int bf16;                  /* whether products round what they read to it */
    atomic_int no_memory;
} Projected;

static void projected_piece(void *job, long index) {
    Projected *m = job;
    long first = index * PROJECTED, n = m->rows - first < PROJECTED ? m->rows - first : PROJECTED;
    product_as(m->bf16, (Left){m->left + first * m->in, NULL, m->in, 1}, m->panels, m->in, n, m->out,
               (Result){m->result + first * m->out, NULL, m->out, 0});
}

/* y [T, O]; kept panels are read only where products round. Returns 0 or an error. */
static long project_rows_of(const float *x, Weight weight, float *y, long rows, long in, long out, int bf16,
                            int threads) {
    Projected job = {.left = x, .result = y, .rows = rows, .in = in, .out = out, .bf16 = bf16};
    float *own = NULL;
    if (weight.panels) job.panels = (const float *)weight.panels;
    else {
        own = scratch_for(&job.no_memory, rounded_up(out, TILE_COLUMNS) * in);
        if (!own) return NO_MEMORY;
        pack_transposed_as(bf16, weight.wide, in, out, in, own);
        job.panels = own;
    }
    in_pieces(projected_piece, &job, (rows + PROJECTED - 1) / PROJECTED, threads);
    free(own);
    return 0;
}

long project_rows(const float *x, const float *weight, float *y, long rows, long in, long out, int bf16, int threads) {
    return project_rows_of(x, (Weight){weight, NULL}, y, rows, in, out, bf16, threads);
}

static void weight_gradient_piece(void *job, long index) {
    Projected *m = job;
    long O = m->out, first = index * PROJECTED_OUTPUTS,
         n = O - first < PROJECTED_OUTPUTS ? O - first : PROJECTED_OUTPUTS;
    long rows = m->rows - m->first < PROJECTED_BLOCK ? m->rows - m->first : PROJECTED_BLOCK;
    float dy[PROJECTED_BLOCK * (PROJECTED_OUTPUTS + 16)];
    long stride = apart(n);
    for (long r = 0; r < rows; r++)
        memcpy(dy + r * stride, m->dy + (m->first + r) * O + first, (size_t)n * sizeof(float));
    product_as(m->bf16, (Left){dy, NULL, 1, stride}, m->panels, rows, n, m->in,
               (Result){m->result + first * m->in, NULL, m->in, m->first > 0});
}

/* dx [T, I] and d_weight [O, I], either of them NULL where nobody asks. Returns 0 or an error. */
long project_rows_backward(const float *dy, const float *x, const float *weight, float *dx, float *d_weight, long rows,
                           long in, long out, int bf16, int threads) {
    Projected job = {.left = dy, .dy = dy, .result = dx, .rows = rows, .in = out, .out = in, .bf16 = bf16};
    long block = rows < PROJECTED_BLOCK ? rows : PROJECTED_BLOCK, depth = block > out ? block : out;
    float *panels = scratch_for(&job.no_memory, rounded_up(in, TILE_COLUMNS) * (depth ? depth : 1));
    if (!panels) return NO_MEMORY;
    job.panels = panels;
    if (dx) {
        pack_as(bf16, weight, NULL, in, 0, in, out, panels);
        in_pieces(projected_piece, &job, (rows + PROJECTED - 1) / PROJECTED, threads);
    }
    if (d_weight && !rows) memset(d_weight, 0, (size_t)(out * in) * sizeof(float));
    job.result = d_weight, job.in = in, job.out = out;
    for (; d_weight && job.first < rows; job.first += PROJECTED_BLOCK) {
        long n = rows - job.first < PROJECTED_BLOCK ? rows - job.first : PROJECTED_BLOCK;
        pack_as(bf16, x + job.first * in, NULL, in, 0, in, n, panels);
        in_pieces(weight_gradient_piece, &job, (out + PROJECTED_OUTPUTS - 1) / PROJECTED_OUTPUTS, threads);
    }
    free(panels);
    return 0;
}
