/* Tokens of every sequence through a whole model in one call: one of each, by the parts of few_tokens.c, or the many of
 * a prompt, by those for many rows. Between two parts nothing but a residual sum is left. `decode_step.py` holds the
 * same structs and says whose fields they are.
 *
 * Legend as in few_tokens.c, and: B sequences, N tokens of all of them, I outputs of a layer's first projection, X
 * inputs of its last one.
 */
enum { SOFTMAX, DELTA, LIGHTNING };

/* Rows that a router outside of the call has sorted, and the share of the token [N] and what else [N, D] is added to
 * what they give; these two may be NULL. */
typedef struct {
    const int64_t *token, *expert_offsets, *token_offsets, *row_of_slot;
    const float *weight, *returned, *added;
    long rows;
} Decision;

/* One block. Weights and states lie where the model and its cache keep them; NULL stands for what a block has not. */
typedef struct {
    const float *attention_norm, *attention_out_norm, *moe_norm, *moe_out_norm;
    /* Attention: heads, widths of keys and values, both projections. */
    long mixer, heads, key, value, inner;
    Weight to_inner, to_out;
    float eps;
    /* Softmax: `half` pairs of channels are turned; rows of the cache are used in turn. */
    long kv_heads, half, output_gate, writes, capacity, cache_stride, bf16;
    double rope_base;
    const float *q_norm, *k_norm, *sink;
    void *keys, *values;
    const float *cosine, *sine; /* of the tokens of a prompt, [tokens, half] */
    /* Linear layers; `bf16` is the tail's. to_gate and to_decay: from their bottlenecks, as wide as one head. */
    Weight to_gate, to_decay;
    const float *conv, *A_log, *dt_bias, *norm, *log_decay;
    float *state;
    void *tail;
    long taps, per_channel, use_silu;
    /* Router; `drift` and `aim` of a budget are looked at for NaN only. null_router [Z, D] and all behind it: see
     * `Beside` of routing.c; the gain is the square of what is learned. */
    const float *router, *bias, *threshold, *drift, *aim, *null_router, *column_bias, *gain, *head;
    long experts, slots, floor, rule, use_sigmoid, renormalise, columns, apart, null_weighs, returns;
    float softness;
    /* Where the router decides outside of the call it is asked, and leaves its `decision`. */
    long outside;
    long alone; /* of the last block: whether it may route some tokens without the others */
    Decision decision;
    Matrices gate_up, down;
    Weight shared_gate_up, shared_down;
    long d_expert, d_shared;
    /* Where in `whole` and `real` its routing is written, see `route_tokens`. */
    long whole_at, real_at;
} Block;

typedef struct {
    const Block *block;
    const float *embedding, *norm;
    Weight head;
    long blocks, vocabulary, width, batch;
    long bf16; /* whether products of many rows round what they read to it */
    float eps;
    double *seconds;            /* by part, added to; NULL where nobody asks */
    long (*decide)(long block); /* fills in the block's decision; not 0 where it could not */
} Model;

/* In the order of `PARTS` in decode_step.py. */
enum { PROJECTIONS, MIXING, ROUTER, EXPERTS, NORMS, HEAD };

/* What has passed since `*since` was the part's. */
static void lap(const Model *m, int part, double *since) {
    if (!m->seconds) return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    m->seconds[part] += seconds - *since;
    *since = seconds;
}

/* Begins to count. */
static double lap_from_here(const Model *m) {
    double since = 0;
    if (m->seconds) {
        double before = m->seconds[HEAD];
        lap(m, HEAD, &since);
        m->seconds[HEAD] = before;
    }
    return since;
}

typedef struct {
    long tokens; /* N */
    int last;    /* whether the last token of each sequence is all that is asked for behind attention */
    float *x, *normed, *y, *inner, *mixed, *gate, *decay, *hidden, *weight, *level, *predicted, *scores;
    int64_t *expert;
    uint8_t *keep;
    float *ring; /* of a prompt: see prompt.c */
} Scratch;

/* What N tokens need in the largest block, in one piece that the caller frees; NULL where there is no memory. */
static void *scratch_of(const Model *m, long N, Scratch *s) {
    long D = m->width, inner = 0, mixed = 0, decay = 0, hidden = 0, slots = 0, columns = 0;
    for (const Block *l = m->block; l < m->block + m->blocks; l++) {
        inner = larger(inner, l->inner), mixed = larger(mixed, l->heads * l->value),
        decay = larger(decay, l->heads * l->key);
        hidden = larger(hidden, inner_floats(2 * l->d_shared)), slots = larger(slots, l->slots),
        columns = larger(columns, l->experts + l->columns);
    }
    long reals = N * (3 * D + inner + 2 * mixed + decay + hidden + 2 * slots + 1) + routing_scratch(N, columns);
    char *memory = malloc((size_t)(N * slots) * (sizeof(int64_t) + 1) + (size_t)reals * sizeof(float));
    if (!memory) return NULL;
    s->tokens = N, s->last = 0, s->ring = NULL;
    s->expert = (int64_t *)memory;
    s->x = (float *)(s->expert + N * slots), s->normed = s->x + N * D, s->y = s->normed + N * D,
    s->inner = s->y + N * D;
    s->mixed = s->inner + N * inner, s->gate = s->mixed + N * mixed, s->decay = s->gate + N * mixed,
    s->hidden = s->decay + N * decay;
    s->weight = s->hidden + N * hidden, s->level = s->weight + N * slots, s->predicted = s->level + N * slots,
    s->scores = s->predicted + N;
    s->keep = (uint8_t *)(s->scores + routing_scratch(N, columns));
    return memory;
}

/* ---- The same for few tokens and for many ---- */

/* What a router decides by is never rounded: `bf16` is the model's for all but that. */
static long project(const float *x, Weight weight, float *y, long rows, long in, long out, int bf16, int threads) {
    if (rows > MOST_ROWS) return project_rows_of(x, weight, y, rows, in, out, bf16, threads);
    linear_of(x, in, weight, y, rows, in, out, threads);
    return 0;
}

static void normed_or_copied(const float *x, const float *weight, float *y, const Model *m, long rows, int threads) {
    if (weight) rms_norm_rows(x, weight, y, rows, m->width, m->eps, threads);
    else memcpy(y, x, (size_t)(rows * m->width) * sizeof(float));
}

enum { ADDED = 32768 };
typedef struct {
    float *x;
    const float *y;
    long n;
} Addition;

static void add_piece(void *job, long index) {
    const Addition *m = job;
    long first = index * ADDED, n = m->n - first < ADDED ? m->n - first : ADDED;
    float *restrict x = m->x + first;
    const float *restrict y = m->y + first;
    for (long i = 0; i < n; i++) x[i] += y[i];
}

static void add(float *x, const float *y, long n, int threads) {
    Addition job = {x, y, n};
    in_pieces(add_piece, &job, (n + ADDED - 1) / ADDED, threads);
}

/* Of the rows of each sequence the last one. */
static void keep_last(float *x, long batch, long length, long width) {
    for (long b = 0; b < batch; b++)
        memmove(x + b * width, x + ((b + 1) * length - 1) * width, (size_t)width * sizeof(float));
}

/* x * sigmoid(gate) of each sequence. */
static void gated(float *x, const float *gate, long stride, long batch, long n) {
    for (long b = 0; b < batch; b++, x += n, gate += stride)
        for (long i = 0; i < n; i++) x[i] *= sigmoid(gate[i]);
}

/* Softmax attention of `batch` sequences from the b-th on, whose tokens all stand at `position`. */
static long softmax(const Block *l, Scratch *s, long position, long b, long batch, int threads) {
    long H = l->heads, K = l->key, held = position < l->capacity ? position + 1 : l->capacity;
    float cosine[l->half + 1], sine[l->half + 1];
    /* In fp64, as `rotary_tables`: angles grow with the position. */
    for (long i = 0; i < l->half; i++) {
        double angle = (double)position * pow(l->rope_base, -(double)i / (double)l->half);
        cosine[i] = (float)cos(angle), sine[i] = (float)sin(angle);
    }
    const float *q = s->inner + b * l->inner, *k = q + H * K + (l->output_gate ? H * K : 0);
    long offset = b * l->cache_stride * (l->bf16 ? 2 : 4);
    return softmax_decode(q, l->writes ? k : NULL, k + l->kv_heads * K, l->inner, l->inner, (char *)l->keys + offset,
                          (char *)l->values + offset, l->cache_stride, position % l->capacity, held, (int)l->bf16,
                          l->q_norm, l->k_norm, cosine, sine, l->sink, l->eps, 1.0f / sqrtf((float)K), batch, H,
                          l->kv_heads, K, l->half, s->mixed + b * H * K, threads);
}

/* Attention of one token of each sequence between its projections: s->inner to s->mixed. Sequence b stands behind[b]
 * tokens before `position`; all stand there where that is NULL. */
static long mix(const Block *l, const Model *m, Scratch *s, long position, const int64_t *behind, int threads) {
    long B = m->batch, H = l->heads, K = l->key, V = l->value, X = H * V;
    if (l->mixer == SOFTMAX) {
        long error = behind ? 0 : softmax(l, s, position, 0, B, threads);
        for (long b = 0; behind && b < B && !error; b++) error = softmax(l, s, position - behind[b], b, 1, threads);
        if (l->output_gate) gated(s->mixed, s->inner + H * K, l->inner, B, X);
        return error;
    }
    const float *gate = s->inner + H * (2 * K + V);
    if (l->mixer == LIGHTNING) {
        lightning_decode(s->inner, l->inner, l->log_decay, l->state, s->mixed, B, H, K, V);
        rms_norm(s->mixed, l->norm, s->mixed, B, X, l->eps);
        gated(s->mixed, gate, l->inner, B, X);
        return 0;
    }
    const float *a = gate + (l->to_gate.wide ? V : X), *b = a + (l->to_decay.wide ? K : H);
    long gate_stride = l->inner, a_stride = l->inner;
    if (l->to_gate.wide) {
        linear_of(gate, l->inner, l->to_gate, s->gate, B, V, X, threads);
        linear_of(a, l->inner, l->to_decay, s->decay, B, K, H * K, threads);
        gate = s->gate, a = s->decay, gate_stride = X, a_stride = H * K;
    }
    delta_decode(s->inner, gate, a, b, l->inner, gate_stride, a_stride, l->inner, l->conv, l->A_log, l->dt_bias,
                 l->norm, l->state, l->tail, (int)l->bf16, (int)l->per_channel, (int)l->use_silu, l->eps, B, H, K, V,
                 l->taps, s->mixed, threads);
    return 0;
}

static int is_nan(const float *x, long n) {
    int any = 0;
    for (long i = 0; x && i < n; i++) any |= x[i] != x[i];
    return any;
}

#include "prompt.c"

/* ---- Experts ---- */

/* Decides and sorts here. Writes down, for whoever asks later: in `whole` the token, the expert and the slot of each
 * row [N, slots] and both offsets [E + 1], [N + 1]; in `real` the rows' weights [N, slots], what was routed [N, D], its
 * logits [N, E] and those of null columns [N, Z], and what these return of the token [N]. Returns the number of the
 * block, from 1, where scores are not finite or compared with a NaN, or an error below 0. */
static long decide_here(const Block *l, const Model *m, Scratch *s, int64_t *whole, float *real, Decision *decision,
                        int threads) {
    long N = s->tokens, D = m->width, E = l->experts, Z = l->columns, n = N * l->slots, error;
    int64_t *token = whole + l->whole_at, *row_expert = token + n, *row_of_slot = row_expert + n,
            *expert_offsets = row_of_slot + n, *token_offsets = expert_offsets + E + 1;
    float *row_weight = real + l->real_at, *x = row_weight + n, *logits = x + N * D, *null_logits = logits + N * E;
    float *returned = l->returns ? null_logits + N * Z : NULL, gain = l->gain ? *l->gain * *l->gain : 1.0f;
    error = project(x, (Weight){l->router, NULL}, logits, N, D, E, 0, threads);
    if (Z && !error) error = project(x, (Weight){l->null_router, NULL}, null_logits, N, D, Z, 0, threads);
    if (l->head && !error) error = project(x, (Weight){l->head, NULL}, s->predicted, N, D, 1, 0, threads);
    if (error) return error;
    if (!isfinite(sum_of(logits, N * E) + sum_of(null_logits, N * Z)) || is_nan(l->bias, E) ||
        is_nan(l->threshold, 1) || is_nan(l->drift, 1) || is_nan(l->aim, 1) || is_nan(l->gain, 1) ||
        is_nan(l->column_bias, Z) || is_nan(l->head, D))
        return l - m->block + 1;
    Beside beside = {null_logits,  l->column_bias, Z,    (int)l->apart, (int)l->null_weighs,
                     s->predicted, l->softness,    gain, returned};
    route_beside(logits, l->bias, l->threshold ? *l->threshold : 0.0f, s->weight, s->expert, s->keep, s->level,
                 s->scores, N, E, l->slots, l->floor, (int)l->rule, (int)l->use_sigmoid, (int)l->renormalise, &beside,
                 threads);
    long rows = sort_slots(s->expert, s->weight, s->keep, row_weight, token, row_expert, expert_offsets, token_offsets,
                           row_of_slot, N, l->slots, E);
    *decision = (Decision){token, expert_offsets, token_offsets, row_of_slot, row_weight, returned, NULL, rows};
    return rows < 0 ? rows : 0;
}

/* What rows give beside experts: the token itself, and what else a router adds. */
static void add_beside(const Decision *decision, const float *x, float *y, long N, long D, int threads) {
    for (long t = 0; decision->returned && t < N; t++)
        for (long i = 0; i < D; i++) y[t * D + i] += decision->returned[t] * x[t * D + i];
    if (decision->added) add(y, decision->added, N * D, threads);
}

/* What decided rows give of the tokens x: s->y. */
static long experts_sum(const Block *l, const Model *m, const Decision *d, const float *x, Scratch *s, int threads) {
    long N = s->tokens, D = m->width;
    if (N <= MOST_ROWS)
        return experts_of(x, l->gate_up, l->down, d->token, d->weight, d->expert_offsets, d->token_offsets,
                          d->row_of_slot, s->y, N, d->rows, l->experts, D, l->d_expert, threads);
    float *inner = malloc((size_t)(d->rows * inner_floats(l->d_expert) + 1) * sizeof(float));
    if (!inner) return NO_MEMORY;
    Weight gate_up = {l->gate_up.codes, l->gate_up.panels}, down = {l->down.codes, l->down.panels};
    long error = grouped_mlp_of(x, gate_up, down, d->token, d->weight, d->expert_offsets, NULL, inner, s->y, N, d->rows,
                                l->experts, D, l->d_expert, (int)m->bf16, threads);
    free(inner);
    return error;
}

typedef struct {
    const Block *l;
    const Model *m;
    const Scratch *s;
    const float *x;
    atomic_int no_memory;
} Shared;

/* Some tokens through the shared expert, which is the one that all of them go to. */
static void shared_piece(void *job, long index) {
    Shared *m = job;
    long D = m->m->width, F = m->l->d_shared, first = index * MOST_BLOCK,
         n = m->s->tokens - first < MOST_BLOCK ? m->s->tokens - first : MOST_BLOCK;
    int64_t token[MOST_BLOCK], offsets[] = {0, n};
    float weight[MOST_BLOCK];
    for (long t = 0; t < n; t++) token[t] = t, weight[t] = 1.0f;
    if (grouped_mlp_of(m->x + first * D, m->l->shared_gate_up, m->l->shared_down, token, weight, offsets, NULL,
                       m->s->hidden + first * inner_floats(2 * F), m->s->normed + first * D, n, n, 1, D, F,
                       (int)m->m->bf16, 1))
        atomic_store(&m->no_memory, 1);
}

/* What the shared expert gives of the tokens x: s->normed. */
static long shared_sum(const Block *l, const Model *m, const float *x, Scratch *s, int threads) {
    long N = s->tokens, D = m->width, F = l->d_shared;
    if (N > MOST_ROWS) {
        Shared job = {l, m, s, x, 0};
        in_pieces(shared_piece, &job, (N + MOST_BLOCK - 1) / MOST_BLOCK, threads);
        return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
    }
    const float *in[MOST_ROWS];
    float *hidden[MOST_ROWS], *out[MOST_ROWS];
    for (long r = 0; r < N; r++) in[r] = x + r * D, hidden[r] = s->hidden + r * 2 * F, out[r] = s->normed + r * D;
    Matrices gate_up = {.codes = l->shared_gate_up.wide, .bits = 32, .panels = l->shared_gate_up.panels};
    Matrices down = {.codes = l->shared_down.wide, .bits = 32, .panels = l->shared_down.panels};
    matrix_times(N, in, hidden, &gate_up, 0, D, 2 * F);
    for (long r = 0; r < N; r++)
        for (long f = 0; f < F; f++) hidden[r][f] = silu(hidden[r][f]) * hidden[r][F + f];
    matrix_times(N, (const float *const *)hidden, out, &down, 0, F, D);
    return 0;
}

/* Where a block's routed tokens are written down, see `decide_here`, whoever decides. */
static float *routed_of(const Block *l, const Scratch *s, float *real) {
    return real + l->real_at + s->tokens * l->slots;
}

/* Experts of the routed tokens: s->y. */
static long route_tokens(const Block *l, const Model *m, Scratch *s, int64_t *whole, float *real, double *since,
                         int threads) {
    long N = s->tokens, D = m->width, error;
    const float *x = routed_of(l, s, real);
    Decision here;
    const Decision *d = l->outside ? &l->decision : &here;
    if (l->outside) error = m->decide(l - m->block) ? l - m->block + 1 : 0;
    else error = decide_here(l, m, s, whole, real, &here, threads);
    lap(m, ROUTER, since);
    if (error || (error = experts_sum(l, m, d, x, s, threads))) return error;
    add_beside(d, x, s->y, N, D, threads);
    if (!l->d_shared) return 0;
    if ((error = shared_sum(l, m, x, s, threads))) return error;
    add(s->y, s->normed, N * D, threads);
    return 0;
}

/* Logits [B, V] of what follows `length` tokens of each sequence [B, length], the first of which stands at `position`;
 * of one token see `mix` for `behind`. 0, an error below it, or what `route_tokens` returns. */
long decode_step(const Model *m, const int64_t *token, long length, long position, const int64_t *behind, float *logits,
                 int64_t *whole, float *real, int threads) {
    long B = m->batch, N = B * length, D = m->width, error = 0;
    Scratch s;
    for (long i = 0; i < N; i++)
        if (token[i] < 0 || token[i] >= m->vocabulary) return OUT_OF_RANGE;
    void *memory = scratch_of(m, N, &s);
    if (!memory) return NO_MEMORY;
    for (long i = 0; i < N; i++) memcpy(s.x + i * D, m->embedding + token[i] * D, (size_t)D * sizeof(float));
    double since = lap_from_here(m);
    for (const Block *l = m->block; l < m->block + m->blocks && !error; l++) {
        long X = l->heads * l->value;
        normed_or_copied(s.x, l->attention_norm, s.normed, m, N, threads);
        lap(m, NORMS, &since);
        if ((error = project(s.normed, l->to_inner, s.inner, N, D, l->inner, (int)m->bf16, threads))) break;
        lap(m, PROJECTIONS, &since);
        /* Nobody reads what the last block makes of other tokens. */
        s.last = length > 1 && l->alone;
        if (length > 1) error = mix_prompt(l, m, &s, position, length, threads);
        else error = mix(l, m, &s, position, behind, threads);
        if (error) break;
        if (s.last) keep_last(s.x, B, length, D), s.tokens = N = B, length = 1;
        lap(m, MIXING, &since);
        if ((error = project(s.mixed, l->to_out, s.y, N, X, D, (int)m->bf16, threads))) break;
        lap(m, PROJECTIONS, &since);
        if (l->attention_out_norm) rms_norm_rows(s.y, l->attention_out_norm, s.y, N, D, m->eps, threads);
        add(s.x, s.y, N * D, threads);
        normed_or_copied(s.x, l->moe_norm, routed_of(l, &s, real), m, N, threads);
        lap(m, NORMS, &since);
        if ((error = route_tokens(l, m, &s, whole, real, &since, threads))) break;
        lap(m, EXPERTS, &since);
        if (l->moe_out_norm) rms_norm_rows(s.y, l->moe_out_norm, s.y, N, D, m->eps, threads);
        add(s.x, s.y, N * D, threads);
    }
    if (!error) {
        for (long b = 0; b < B; b++)
            rms_norm(s.x + ((b + 1) * length - 1) * D, m->norm, s.normed + b * D, 1, D, m->eps);
        lap(m, NORMS, &since);
        linear_of(s.normed, D, m->head, logits, B, D, m->vocabulary, threads);
        lap(m, HEAD, &since);
    }
    free(memory), free(s.ring);
    return error;
}
