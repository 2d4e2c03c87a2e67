/* One token of every sequence through a whole model in one call, by the parts of few_tokens.c: between two parts
 * nothing but a residual sum is left. `decode_step.py` holds the same structs and says whose fields they are.
 *
 * Legend as in few_tokens.c, and: B sequences (its tokens T), I outputs of a layer's first projection, X inputs of its
 * last one.
 */
enum { SOFTMAX, DELTA, LIGHTNING };

/* Rows that a router outside of the call has sorted, and the share of the token [B] and what else [B, D] is added to
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
    const float *to_inner, *to_out;
    float eps;
    /* Softmax: `half` pairs of channels are turned; rows of the cache are used in turn. */
    long kv_heads, half, output_gate, writes, capacity, cache_stride, bf16;
    double rope_base;
    const float *q_norm, *k_norm, *sink;
    void *keys, *values;
    /* Linear layers; `bf16` is the tail's. to_gate and to_decay: from their bottlenecks, as wide as one head. */
    const float *to_gate, *to_decay, *conv, *A_log, *dt_bias, *norm, *log_decay;
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
    Decision decision;
    Matrices gate_up, down;
    const float *shared_gate_up, *shared_down;
    long d_expert, d_shared;
    /* Where in `whole` and `real` its routing is written, see `route_tokens`. */
    long whole_at, real_at;
} Block;

typedef struct {
    const Block *block;
    const float *embedding, *norm, *head;
    long blocks, vocabulary, width, batch;
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
    float *x, *normed, *y, *inner, *mixed, *gate, *decay, *hidden, *weight, *level, *predicted, *scores;
    int64_t *expert;
    uint8_t *keep;
} Scratch;

static long larger(long a, long b) { return a > b ? a : b; }

/* What the largest block needs, in one piece that the caller frees; NULL where there is no memory. */
static void *scratch_of(const Model *m, Scratch *s) {
    long B = m->batch, D = m->width, inner = 0, mixed = 0, decay = 0, hidden = 0, slots = 0, experts = 0;
    for (const Block *l = m->block; l < m->block + m->blocks; l++) {
        inner = larger(inner, l->inner), mixed = larger(mixed, l->heads * l->value),
        decay = larger(decay, l->heads * l->key);
        hidden = larger(hidden, 2 * l->d_shared), slots = larger(slots, l->slots),
        experts = larger(experts, l->experts + l->columns);
    }
    long reals = B * (3 * D + inner + 2 * mixed + decay + hidden + 2 * slots + 1) + 5 * experts;
    char *memory = malloc((size_t)(B * slots) * (sizeof(int64_t) + 1) + (size_t)reals * sizeof(float));
    if (!memory) return NULL;
    s->expert = (int64_t *)memory;
    s->x = (float *)(s->expert + B * slots), s->normed = s->x + B * D, s->y = s->normed + B * D,
    s->inner = s->y + B * D;
    s->mixed = s->inner + B * inner, s->gate = s->mixed + B * mixed, s->decay = s->gate + B * mixed,
    s->hidden = s->decay + B * decay;
    s->weight = s->hidden + B * hidden, s->level = s->weight + B * slots, s->predicted = s->level + B * slots,
    s->scores = s->predicted + B;
    s->keep = (uint8_t *)(s->scores + 5 * experts);
    return memory;
}

static void normed_or_copied(const float *x, const float *weight, float *y, const Model *m) {
    if (weight) rms_norm(x, weight, y, m->batch, m->width, m->eps);
    else memcpy(y, x, (size_t)(m->batch * m->width) * sizeof(float));
}

static void add(float *restrict x, const float *restrict y, long n) {
    for (long i = 0; i < n; i++) x[i] += y[i];
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

/* Attention between its projections: s->inner to s->mixed. Sequence b stands behind[b] tokens before `position`; all
 * stand there where that is NULL. */
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
    const float *a = gate + (l->to_gate ? V : X), *b = a + (l->to_decay ? K : H);
    long gate_stride = l->inner, a_stride = l->inner;
    if (l->to_gate) {
        linear(gate, l->inner, l->to_gate, s->gate, B, V, X, threads);
        linear(a, l->inner, l->to_decay, s->decay, B, K, H * K, threads);
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

/* Decides and sorts here. Writes down, for whoever asks later: in `whole` the token, the expert and the slot of each
 * row [B, slots] and both offsets [E + 1], [B + 1]; in `real` the rows' weights [B, slots], what was routed [B, D], its
 * logits [B, E] and those of null columns [B, Z], and what these return of the token [B]. Returns the number of the
 * block, from 1, where scores are not finite or compared with a NaN. */
static long decide_here(const Block *l, const Model *m, Scratch *s, int64_t *whole, float *real, Decision *decision,
                        int threads) {
    long B = m->batch, D = m->width, E = l->experts, Z = l->columns, n = B * l->slots;
    int64_t *token = whole + l->whole_at, *row_expert = token + n, *row_of_slot = row_expert + n,
            *expert_offsets = row_of_slot + n, *token_offsets = expert_offsets + E + 1;
    float *row_weight = real + l->real_at, *x = row_weight + n, *logits = x + B * D, *null_logits = logits + B * E;
    float *returned = l->returns ? null_logits + B * Z : NULL, gain = l->gain ? *l->gain * *l->gain : 1.0f;
    linear(x, D, l->router, logits, B, D, E, threads);
    if (Z) linear(x, D, l->null_router, null_logits, B, D, Z, threads);
    if (l->head) linear(x, D, l->head, s->predicted, B, D, 1, threads);
    if (!isfinite(sum_of(logits, B * E) + sum_of(null_logits, B * Z)) || is_nan(l->bias, E) ||
        is_nan(l->threshold, 1) || is_nan(l->drift, 1) || is_nan(l->aim, 1) || is_nan(l->gain, 1) ||
        is_nan(l->column_bias, Z) || is_nan(l->head, D))
        return l - m->block + 1;
    Beside beside = {null_logits,  l->column_bias, Z,    (int)l->apart, (int)l->null_weighs,
                     s->predicted, l->softness,    gain, returned};
    route_beside(logits, l->bias, l->threshold ? *l->threshold : 0.0f, s->weight, s->expert, s->keep, s->level,
                 s->scores, B, E, l->slots, l->floor, (int)l->rule, (int)l->use_sigmoid, (int)l->renormalise, &beside,
                 1);
    long rows = sort_slots(s->expert, s->weight, s->keep, row_weight, token, row_expert, expert_offsets, token_offsets,
                           row_of_slot, B, l->slots, E);
    *decision = (Decision){token, expert_offsets, token_offsets, row_of_slot, row_weight, returned, NULL, rows};
    return rows < 0 ? rows : 0;
}

/* What rows give beside experts: the token itself, and what else a router adds. */
static void add_beside(const Decision *decision, const float *x, float *y, long B, long D) {
    for (long b = 0; decision->returned && b < B; b++)
        for (long i = 0; i < D; i++) y[b * D + i] += decision->returned[b] * x[b * D + i];
    if (decision->added) add(y, decision->added, B * D);
}

/* Experts of the normed tokens: s->y. What was routed is written to `real`, see `decide_here`, whoever decides. */
static long route_tokens(const Block *l, const Model *m, Scratch *s, int64_t *whole, float *real, double *since,
                         int threads) {
    long B = m->batch, D = m->width, F = l->d_shared, error;
    float *x = real + l->real_at + B * l->slots;
    memcpy(x, s->normed, (size_t)(B * D) * sizeof(float));
    Decision here;
    const Decision *d = l->outside ? &l->decision : &here;
    if (l->outside) error = m->decide(l - m->block) ? l - m->block + 1 : 0;
    else error = decide_here(l, m, s, whole, real, &here, threads);
    lap(m, ROUTER, since);
    if (error) return error;
    error = experts_of(x, l->gate_up, l->down, d->token, d->weight, d->expert_offsets, d->token_offsets, d->row_of_slot,
                       s->y, B, d->rows, l->experts, D, l->d_expert, threads);
    if (error) return error;
    add_beside(d, x, s->y, B, D);
    if (!F) return 0;
    for (long first = 0; first < B; first += MOST_ROWS) {
        long some = B - first < MOST_ROWS ? B - first : MOST_ROWS;
        const float *in[MOST_ROWS];
        float *hidden[MOST_ROWS], *out[MOST_ROWS];
        for (long r = 0; r < some; r++)
            in[r] = x + (first + r) * D, hidden[r] = s->hidden + (first + r) * 2 * F,
            out[r] = s->normed + (first + r) * D;
        rows_times(some, in, hidden, l->shared_gate_up, D, 2 * F);
        for (long r = 0; r < some; r++)
            for (long f = 0; f < F; f++) hidden[r][f] = silu(hidden[r][f]) * hidden[r][F + f];
        rows_times(some, (const float *const *)hidden, out, l->shared_down, F, D);
    }
    add(s->y, s->normed, B * D);
    return 0;
}

/* Logits [B, V] of the tokens after those at `position`, see `mix`. 0, an error below it, or what `route_tokens`
 * returns. */
long decode_step(const Model *m, const int64_t *token, long position, const int64_t *behind, float *logits,
                 int64_t *whole, float *real, int threads) {
    long B = m->batch, D = m->width, error = 0;
    Scratch s;
    for (long b = 0; b < B; b++)
        if (token[b] < 0 || token[b] >= m->vocabulary) return OUT_OF_RANGE;
    void *memory = scratch_of(m, &s);
    if (!memory) return NO_MEMORY;
    for (long b = 0; b < B; b++) memcpy(s.x + b * D, m->embedding + token[b] * D, (size_t)D * sizeof(float));
    double since = lap_from_here(m);
    for (const Block *l = m->block; l < m->block + m->blocks && !error; l++) {
        normed_or_copied(s.x, l->attention_norm, s.normed, m);
        lap(m, NORMS, &since);
        linear(s.normed, D, l->to_inner, s.inner, B, D, l->inner, threads);
        lap(m, PROJECTIONS, &since);
        if ((error = mix(l, m, &s, position, behind, threads))) break;
        lap(m, MIXING, &since);
        linear(s.mixed, l->heads * l->value, l->to_out, s.y, B, l->heads * l->value, D, threads);
        lap(m, PROJECTIONS, &since);
        if (l->attention_out_norm) rms_norm(s.y, l->attention_out_norm, s.y, B, D, m->eps);
        add(s.x, s.y, B * D);
        normed_or_copied(s.x, l->moe_norm, s.normed, m);
        lap(m, NORMS, &since);
        if ((error = route_tokens(l, m, &s, whole, real, &since, threads))) break;
        lap(m, EXPERTS, &since);
        if (l->moe_out_norm) rms_norm(s.y, l->moe_out_norm, s.y, B, D, m->eps);
        add(s.x, s.y, B * D);
    }
    if (!error) {
        rms_norm(s.x, m->norm, s.normed, B, D, m->eps);
        lap(m, NORMS, &since);
        linear(s.normed, D, m->head, logits, B, D, m->vocabulary, threads);
        lap(m, HEAD, &since);
    }
    free(memory);
    return error;
}
