/* The experts of a layer on a CPU, forward and backward, for the many rows of training and of prompts.
 *
 * Between the products of an expert nothing leaves the cache: tokens are read where they lie, activations of one block
 * of rows stay in scratch, and results are added to their tokens at once. Every sum has one order, whatever the number
 * of threads: pieces of a job are experts, or columns of the result, never parts of a sum.
 *
 * Legend as in few_tokens.c, and: N rows sorted by expert, M rows of a block.
 */

enum {
    SCRATCH_FLOATS = 80 * 1024,
    LEAST_BLOCK = 144,
    MOST_BLOCK = 240,
    LEAST_COLUMNS = 64,
    MOST_COLUMNS = 128,
    LEAST_INNER = 16
};

typedef struct {
    const float *x, *dy, *weight;
    Weight gate_up, down;
    const int64_t *token, *offsets;
    float *hidden, *inner, *y;            /* hidden [N, 2 F] or NULL; inner: rows of the second product's left factor */
    float *d_gate_up, *d_down, *d_weight; /* the first two NULL where nobody asks */
    long tokens, experts, d_model, d_expert, piece_columns;
    int bf16; /* whether products round what they read to it */
    /* What several products read is rounded once then: x and dy, and `inner` holds such rows. */
    uint32_t *x_words, *dy_words;
    long x_row, inner_row; /* words between rows */
    atomic_int no_memory;
} ManyRows;

/* Words between rows of n numbers, which are written a register at a time; fp32 takes as much, or LEAST_INNER. */
static long row_words(long n) { return rounded_up(n, 2 * LINE) / 2; }
static long inner_floats(long n) { return larger(n, LEAST_INNER); }

/* As many rows at a time as leave the block's scratch in the cache. */
static long block_rows(long floats_per_row) {
    long rows = SCRATCH_FLOATS / floats_per_row / TILE_ROWS * TILE_ROWS;
    return rows < LEAST_BLOCK ? LEAST_BLOCK : rows > MOST_BLOCK ? MOST_BLOCK : rows;
}

/* inner = weight silu(gate) up, (gate | up) = x W_gate_up, of one expert. */
static void forward_piece(void *job, long e) {
    ManyRows *m = job;
    long D = m->d_model, F = m->d_expert, last = m->offsets[e + 1], M = block_rows(D + 2 * F),
         panels = m->gate_up.panels ? 0 : rounded_up(2 * F, TILE_COLUMNS) * D;
    if (m->offsets[e] == last) return;
    float *own = scratch_for(&m->no_memory, panels + F + (m->hidden ? 0 : M * 2 * F)), *activation = own + panels;
    if (!own) return;
    const float *packed = own;
    if (panels) pack_as(m->bf16, m->gate_up.wide + e * D * 2 * F, NULL, 2 * F, 0, 2 * F, D, own);
    else packed = (const float *)(m->gate_up.panels + e * words_of(D, 2 * F));
    for (long row = m->offsets[e]; row < last; row += M) {
        long n = last - row < M ? last - row : M;
        float *hidden = m->hidden ? m->hidden + row * 2 * F : activation + F;
        Result sums = {hidden, NULL, 2 * F, 0};
        if (m->bf16) words_times((Words){m->x_words, m->token + row, m->x_row, 1}, packed, D, D, 0, n, 2 * F, sums);
        else product((Left){m->x, m->token + row, D, 1}, packed, D, n, 2 * F, sums);
        for (long r = 0; r < n; r++) {
            const float *restrict gate = hidden + r * 2 * F, *restrict up = gate + F;
            float *restrict inner = m->bf16 ? activation : m->inner + (row + r) * F, weight = m->weight[row + r];
            for (long f = 0; f < F; f++) inner[f] = silu(gate[f]) * up[f] * weight;
            if (m->bf16) round_row(inner, F, (uint32_t *)m->inner + (row + r) * m->inner_row);
        }
    }
    free(own);
}

/* Columns of y: each row of `inner` [N, K] times its expert's weight [K, D] is added to the row's token. The weight is
 * W_down, or of the gradient of x the transpose of W_gate_up. */
static void combine(ManyRows *m, long index, Weight weight, long K, int transposed) {
    long D = m->d_model, first = index * m->piece_columns,
         columns = D - first < m->piece_columns ? D - first : m->piece_columns;
    long M = block_rows(K);
    for (long t = 0; t < m->tokens; t++) memset(m->y + t * D + first, 0, (size_t)columns * sizeof(float));
    float *own = scratch_for(&m->no_memory, weight.panels ? 1 : rounded_up(columns, TILE_COLUMNS) * K);
    if (!own) return;
    for (long e = 0; e < m->experts; e++) {
        long last = m->offsets[e + 1];
        if (m->offsets[e] == last) continue;
        const float *packed = own;
        if (weight.panels) packed = (const float *)(weight.panels + e * words_of(K, D) + words_before(K, first));
        else if (transposed) pack_transposed_as(m->bf16, weight.wide + (e * D + first) * K, K, columns, K, own);
        else pack_as(m->bf16, weight.wide + e * K * D, NULL, D, first, columns, K, own);
        for (long row = m->offsets[e]; row < last; row += M) {
            long n = last - row < M ? last - row : M;
            Words words = {(uint32_t *)m->inner + row * m->inner_row, NULL, m->inner_row, 1};
            Result sums = {m->y + first, m->token + row, D, 1};
            if (m->bf16) words_times(words, packed, K, K, 0, n, columns, sums);
            else product((Left){m->inner + row * K, NULL, K, 1}, packed, K, n, columns, sums);
        }
    }
    free(own);
}

static void words_piece(void *job, long index) {
    ManyRows *m = job;
    for (long t = index * MOST_BLOCK; t < m->tokens && t < (index + 1) * MOST_BLOCK; t++) {
        round_row(m->x + t * m->d_model, m->d_model, m->x_words + t * m->x_row);
        if (m->dy) round_row(m->dy + t * m->d_model, m->d_model, m->dy_words + t * m->x_row);
    }
}

/* x, and dy where there is one, as words. `K`: width of the rows of `inner`. */
static long begin_words(ManyRows *m, long K, int threads) {
    m->x_row = row_words(m->d_model), m->inner_row = row_words(K);
    m->x_words = (uint32_t *)scratch_for(&m->no_memory, (m->dy ? 2 : 1) * m->tokens * m->x_row + 1);
    if (!m->x_words) return NO_MEMORY;
    m->dy_words = m->x_words + m->tokens * m->x_row;
    in_pieces(words_piece, m, (m->tokens + MOST_BLOCK - 1) / MOST_BLOCK, threads);
    return 0;
}

static void outputs_piece(void *job, long index) {
    ManyRows *m = job;
    combine(m, index, m->down, m->d_expert, 0);
}

static void inputs_gradient_piece(void *job, long index) {
    ManyRows *m = job;
    combine(m, index, m->gate_up, 2 * m->d_expert, 1);
}

/* Of a = silu(gate) up, weighted: its own gradient da gives those of gate and up. Leaves weight * a, returns <da, a>.
 */
static float activation_gradient(const float *restrict gate, const float *restrict up, float weight, long n,
                                 const float *restrict da, float *restrict a, float *restrict d_gate,
                                 float *restrict d_up) {
    /* The sigmoid waits where the gradient that needs it will be. */
    for (long f = 0; f < n; f++) {
        d_gate[f] = sigmoid(gate[f]);
        a[f] = gate[f] * d_gate[f] * up[f];
    }
    float d_weight = dot(da, a, n);
    for (long f = 0; f < n; f++) {
        float s = d_gate[f], d = da[f] * weight;
        a[f] *= weight;
        d_up[f] = d * (gate[f] * s);
        d_gate[f] = d * up[f] * (s * (1.0f + gate[f] * (1.0f - s)));
    }
    return d_weight;
}

/* Rows of fp32, or of bf16 where products round; `stride` in numbers. */
typedef struct {
    const void *x;
    const int64_t *index;
    long stride;
} Factor;

/* d_weight [L, R] = left^T right, of n rows, or that is added to it. Scratch: panels [n, R], and for fp32 `gathered`
 * [n, apart(L)]. */
static void weight_gradient(const ManyRows *m, Factor left, long L, Factor right, long R, long n, int add,
                            float *d_weight, float *panels, float *gathered) {
    Result sums = {d_weight, NULL, R, add};
    if (m->bf16) {
        pack_held(right.x, right.index, right.stride, R, n, panels);
        held_transposed_times(left.x, left.index, left.stride, panels, n, L, R, sums);
        return;
    }
    pack(right.x, right.index, right.stride, 0, R, n, panels);
    if (left.index) {
        for (long r = 0; r < n; r++)
            memcpy(gathered + r * apart(L), (const float *)left.x + left.index[r] * left.stride,
                   (size_t)L * sizeof(float));
        left = (Factor){gathered, NULL, apart(L)};
    }
    product((Left){left.x, NULL, 1, left.stride}, panels, n, L, R, sums);
}

/* The gradients of one expert's weights and of its rows' weights, and into `inner` those of (gate | up). */
static void backward_piece(void *job, long e) {
    ManyRows *m = job;
    long D = m->d_model, F = m->d_expert, start = m->offsets[e], last = m->offsets[e + 1],
         M = block_rows(2 * D + 5 * F);
    float *d_gate_up = m->d_gate_up ? m->d_gate_up + e * D * 2 * F : NULL,
          *d_down = m->d_down ? m->d_down + e * F * D : NULL;
    if (start == last) {
        if (d_gate_up) memset(d_gate_up, 0, (size_t)(D * 2 * F) * sizeof(float));
        if (d_down) memset(d_down, 0, (size_t)(F * D) * sizeof(float));
        return;
    }
    long panel_width = rounded_up(D > 2 * F ? D : 2 * F, TILE_COLUMNS), stride = larger(apart(F), row_words(F));
    float *down =
        scratch_for(&m->no_memory, D * rounded_up(F, TILE_COLUMNS) + M * (panel_width + apart(D) + 2 * stride) + 3 * F);
    if (!down) return;
    float *panels = down + D * rounded_up(F, TILE_COLUMNS), *gathered = panels + M * panel_width,
          *inner = gathered + M * apart(D), *d_inner = inner + M * stride, *a_row = d_inner + M * stride;
    pack_transposed_as(m->bf16, m->down.wide + e * F * D, D, F, D, down);
    for (long row = start; row < last; row += M) {
        long n = last - row < M ? last - row : M;
        const int64_t *token = m->token + row;
        float *d_hidden = m->inner + row * (m->bf16 ? m->inner_row : 2 * F);
        Result sums = {d_inner, NULL, stride, 0};
        if (m->bf16) words_times((Words){m->dy_words, token, m->x_row, 1}, down, D, D, 0, n, F, sums);
        else product((Left){m->dy, token, D, 1}, down, D, n, F, sums);
        for (long r = 0; r < n; r++) {
            const float *gate = m->hidden + (row + r) * 2 * F;
            float *a = m->bf16 ? a_row : inner + r * stride, *d_row = m->bf16 ? a_row + F : d_hidden + r * 2 * F;
            m->d_weight[row + r] =
                activation_gradient(gate, gate + F, m->weight[row + r], F, d_inner + r * stride, a, d_row, d_row + F);
            if (!m->bf16) continue;
            round_row(a, F, (uint32_t *)inner + r * stride);
            round_row(d_row, 2 * F, (uint32_t *)d_hidden + r * m->inner_row);
        }
        Factor x = {m->x, token, D}, dy = {m->dy, token, D}, a = {inner, NULL, stride}, dh = {d_hidden, NULL, 2 * F};
        if (m->bf16) {
            x = (Factor){m->x_words, token, 2 * m->x_row}, dy = (Factor){m->dy_words, token, 2 * m->x_row};
            a.stride = 2 * stride, dh.stride = 2 * m->inner_row;
        }
        if (d_down) weight_gradient(m, a, F, dy, D, n, row > start, d_down, panels, gathered);
        if (d_gate_up) weight_gradient(m, x, D, dh, 2 * F, n, row > start, d_gate_up, panels, gathered);
    }
    free(down);
}

static void in_column_pieces(Piece run, ManyRows *m, int threads) {
    /* Rows are read once for each piece of their columns: once by one thread, and not often by more. */
    long share = rounded_up((m->d_model + threads - 1) / threads, TILE_COLUMNS);
    if (threads > 1) share = share < LEAST_COLUMNS ? LEAST_COLUMNS : share > MOST_COLUMNS ? MOST_COLUMNS : share;
    m->piece_columns = share;
    in_pieces(run, m, (m->d_model + m->piece_columns - 1) / m->piece_columns, threads);
}

/* inner: scratch [N, inner_floats(F)]. hidden: [N, 2 F] for `grouped_mlp_backward`, or NULL. Returns 0 or an error. */
static long grouped_mlp_of(const float *x, Weight gate_up, Weight down, const int64_t *token, const float *weight,
                           const int64_t *offsets, float *hidden, float *inner, float *y, long tokens, long most_rows,
                           long experts, long d_model, long d_expert, int bf16, int threads) {
    if (!rising(offsets, experts, most_rows)) return OUT_OF_RANGE;
    for (long i = 0; i < offsets[experts]; i++)
        if (token[i] < 0 || token[i] >= tokens) return OUT_OF_RANGE;
    ManyRows job = {.x = x,
                    .gate_up = gate_up,
                    .down = down,
                    .token = token,
                    .weight = weight,
                    .offsets = offsets,
                    .hidden = hidden,
                    .inner = inner,
                    .y = y,
                    .tokens = tokens,
                    .experts = experts,
                    .d_model = d_model,
                    .d_expert = d_expert,
                    .bf16 = bf16};
    if (bf16 && begin_words(&job, d_expert, threads)) return NO_MEMORY;
    in_pieces(forward_piece, &job, experts, threads);
    in_column_pieces(outputs_piece, &job, threads);
    free(job.x_words);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}

long grouped_mlp_forward(const float *x, const float *gate_up, const float *down, const int64_t *token,
                         const float *weight, const int64_t *offsets, float *hidden, float *inner, float *y,
                         long tokens, long most_rows, long experts, long d_model, long d_expert, int bf16,
                         int threads) {
    return grouped_mlp_of(x, (Weight){gate_up, NULL}, (Weight){down, NULL}, token, weight, offsets, hidden, inner, y,
                          tokens, most_rows, experts, d_model, d_expert, bf16, threads);
}

/* With the `hidden` and the checked indices of the forward call. inner: scratch [N, inner_floats(2 F)]. */
long grouped_mlp_backward(const float *dy, const float *x, const float *gate_up, const float *down,
                          const int64_t *token, const float *weight, const int64_t *offsets, float *hidden,
                          float *inner, float *dx, float *d_gate_up, float *d_down, float *d_weight, long tokens,
                          long experts, long d_model, long d_expert, int bf16, int threads) {
    ManyRows job = {.x = x,
                    .dy = dy,
                    .gate_up = {gate_up, NULL},
                    .down = {down, NULL},
                    .token = token,
                    .weight = weight,
                    .offsets = offsets,
                    .hidden = hidden,
                    .inner = inner,
                    .y = dx,
                    .d_gate_up = d_gate_up,
                    .d_down = d_down,
                    .d_weight = d_weight,
                    .tokens = tokens,
                    .experts = experts,
                    .d_model = d_model,
                    .d_expert = d_expert,
                    .bf16 = bf16};
    if (bf16 && begin_words(&job, 2 * d_expert, threads)) return NO_MEMORY;
    in_pieces(backward_piece, &job, experts, threads);
    if (dx) in_column_pieces(inputs_gradient_piece, &job, threads);
    free(job.x_words);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}
