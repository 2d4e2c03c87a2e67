/* Attention of the many tokens of a prompt between the projections of a block: s->inner to s->mixed, for softmax and
 * for linear layers. What the tokens leave for those behind them goes to the cache. Included by decode_step.c; legend
 * as there, and: T tokens of each sequence, S keys that they see, R inputs that a convolution remembers.
 */

typedef struct {
    const Block *l;
    const Scratch *s;
    long position, length; /* of each sequence: tokens before these, and these */
    float *ring;           /* keys and values of a window that goes round, [2, B, kept + length, G, K], or NULL */
    long kept, sequences;
    float *decay, *beta; /* of a delta rule, [N, H or H K] and [N, H] */
} Prompt;

enum { PROMPT_TOKENS = 64 };

static void in_prompt_pieces(Piece run, Prompt *m, int threads) {
    in_pieces(run, m, (m->s->tokens + PROMPT_TOKENS - 1) / PROMPT_TOKENS, threads);
}

static long end_of(const Prompt *m, long index) {
    long end = (index + 1) * PROMPT_TOKENS;
    return end < m->s->tokens ? end : m->s->tokens;
}

/* ---- Softmax ---- */

/* As a cache holds it. */
static float held_as(const Block *l, float x) { return l->bf16 ? from_bf16(to_bf16(x)) : x; }

/* Norms queries where they lie, and brings keys and values into the cache and where they are read. */
static void softmax_piece(void *job, long index) {
    const Prompt *m = job;
    const Block *l = m->l;
    long H = l->heads, G = l->kv_heads, K = l->key, S = m->kept + m->length;
    float x[K];
    for (long i = index * PROMPT_TOKENS; i < end_of(m, index); i++) {
        long b = i / m->length, t = i % m->length, row = (m->position + t) % l->capacity;
        float *q = m->s->inner + i * l->inner, *k = q + H * K + (l->output_gate ? H * K : 0);
        for (long h = 0; l->q_norm && h < H; h++) rms_norm(q + h * K, l->q_norm, q + h * K, 1, K, l->eps);
        Heading heading = {NULL, l->k_norm, l->cosine + t * l->half, l->sine + t * l->half, l->eps, K, l->half};
        for (long g = 0; l->writes && g < G; g++) {
            const float *v = k + (G + g) * K;
            long at = b * l->cache_stride + (row * G + g) * K;
            prepare(&heading, k + g * K, l->k_norm, x);
            if (m->ring) {
                float *keys = m->ring + ((b * S + m->kept + t) * G + g) * K, *values = keys + m->sequences * S * G * K;
                for (long c = 0; c < K; c++) keys[c] = held_as(l, x[c]), values[c] = held_as(l, v[c]);
            }
            /* Of more tokens than rows only the newest stay. */
            if (t < m->length - l->capacity) continue;
            write_row(l->keys, at, x, K, (int)l->bf16);
            write_row(l->values, at, v, K, (int)l->bf16);
        }
    }
}

static void widen_row(const Block *l, const void *cache, long at, float *y) {
    long line = l->kv_heads * l->key;
    if (!l->bf16) memcpy(y, (const float *)cache + at, (size_t)line * sizeof(float));
    else
        for (long c = 0; c < line; c++) y[c] = from_bf16(((const uint16_t *)cache)[at + c]);
}

/* What a window that goes round has kept, in the order of tokens, before they are overwritten. A layer that reads it
 * after its owner finds it as the owner left it. */
static long begin_ring(Prompt *m, Scratch *s) {
    const Block *l = m->l;
    long B = m->sequences, S = m->kept + m->length, line = l->kv_heads * l->key;
    if (l->writes) {
        free(s->ring);
        s->ring = malloc((size_t)(2 * B * S * line) * sizeof(float));
        if (!s->ring) return NO_MEMORY;
        for (long b = 0; b < B; b++)
            for (long j = 0; j < m->kept; j++) {
                long at = b * l->cache_stride + (m->position - m->kept + j) % l->capacity * line;
                widen_row(l, l->keys, at, s->ring + (b * S + j) * line);
                widen_row(l, l->values, at, s->ring + ((B + b) * S + j) * line);
            }
    }
    m->ring = s->ring;
    return 0;
}

/* All tokens see what is in the cache before `position`, or its window. */
static long softmax_prompt(const Block *l, const Model *m, Scratch *s, long position, long length, int threads) {
    long B = m->batch, H = l->heads, K = l->key, S = position + length, line = l->kv_heads * K, I = l->inner;
    long window = S > l->capacity ? l->capacity : 0, error;
    Prompt job = {.l = l, .s = s, .position = position, .length = length, .sequences = B, .kept = position};
    if (window) {
        job.kept = position < window ? position : window, S = job.kept + length;
        if ((error = begin_ring(&job, s))) return error;
    }
    in_prompt_pieces(softmax_piece, &job, threads);
    long asked = s->last ? 1 : length, next = s->last ? length * I : I;
    const float *q = s->inner + (length - asked) * I;
    float *log_sum = malloc((size_t)(B * asked * H) * sizeof(float));
    if (!log_sum) return NO_MEMORY;
    const void *keys = l->keys, *values = l->values;
    long stride = l->cache_stride;
    if (window) keys = s->ring, values = s->ring + B * S * line, stride = S * line;
    long strides[] = {length * I, I, K, stride, line, K, stride, line, K};
    long sizes[] = {B, asked, S, H, l->kv_heads, K, K, l->half, 1, window}, turned = (length - asked) * l->half;
    error = softmax_forward(q, keys, values, strides, sizes, l->cosine + turned, l->sine + turned, l->sink,
                            1.0f / sqrtf((float)K), s->mixed, log_sum, (int)m->bf16, l->bf16 && !window, threads);
    free(log_sum);
    if (l->output_gate) gated(s->mixed, q + H * K, next, B * asked, H * K);
    return error;
}

/* ---- Linear layers ---- */

/* What one sequence after the other is for `rule_forward`. */
static void sequences_of(int64_t *sequence, long batch, long length) {
    long chunks = (length + CHUNK - 1) / CHUNK;
    for (long b = 0; b < batch; b++, sequence += 4)
        sequence[0] = b, sequence[1] = 0, sequence[2] = length, sequence[3] = b * chunks;
}

/* Log-decays and what a token writes. */
static void decay_piece(void *job, long index) {
    const Prompt *m = job;
    const Block *l = m->l;
    long H = l->heads, K = l->key, V = l->value, per_head = l->per_channel ? K : 1;
    const float *a = m->s->inner + H * (2 * K + V) + (l->to_gate.wide ? V : H * V), *b = a + (l->to_decay.wide ? K : H);
    for (long i = index * PROMPT_TOKENS; i < end_of(m, index); i++)
        for (long h = 0; h < H; h++) {
            const float *from = (l->to_decay.wide ? m->s->decay + i * H * K : a + i * l->inner) + h * per_head;
            float *decay = m->decay + (i * H + h) * per_head, rate = -expf(l->A_log[h]);
            for (long c = 0; c < per_head; c++) decay[c] = rate * softplus(from[c] + l->dt_bias[h * per_head + c]);
            m->beta[i * H + h] = sigmoid(b[i * l->inner + h]);
        }
}

/* A narrow part of each token's projection times a weight [out, in]. */
static long project_part(const Model *m, const Block *l, const float *part, long N, long in, Weight weight, float *y,
                         long out, int threads) {
    float *x = malloc((size_t)(N * in) * sizeof(float));
    if (!x) return NO_MEMORY;
    for (long i = 0; i < N; i++) memcpy(x + i * in, part + i * l->inner, (size_t)in * sizeof(float));
    long error = project(x, weight, y, N, in, out, (int)m->bf16, threads);
    free(x);
    return error;
}

/* The convolution's last inputs, oldest first; `tail` [B, R, X] are those before the prompt. */
static void keep_tail(const Block *l, const Scratch *s, const float *tail, long batch, long length, long channels) {
    long R = l->taps - 1;
    for (long i = 0; i < batch * R; i++) {
        long b = i / R, t = length - R + i % R;
        const float *x = t < 0 ? tail + (b * R + R + t) * channels : s->inner + (b * length + t) * l->inner;
        for (long c = 0; c < channels; c++) {
            long at = (b * channels + c) * R + i % R;
            if (l->bf16) ((uint16_t *)l->tail)[at] = to_bf16(x[c]);
            else ((float *)l->tail)[at] = x[c];
        }
    }
}

static long delta_prompt(const Block *l, const Model *m, Scratch *s, long length, int threads) {
    long B = m->batch, N = s->tokens, H = l->heads, K = l->key, V = l->value, W = l->taps, R = W - 1, I = l->inner;
    long X = H * (2 * K + V), D = H * (l->per_channel ? K : 1), error = 0;
    const float *gate = s->inner + X, *a = gate + (l->to_gate.wide ? V : H * V);
    if (l->to_gate.wide) {
        error = project_part(m, l, gate, N, V, l->to_gate, s->gate, H * V, threads);
        if (!error) error = project_part(m, l, a, N, K, l->to_decay, s->decay, H * K, threads);
        if (error) return error;
    }
    float *qkv = malloc((size_t)(N * (X + H * V + D + H) + (W + B * R) * X + B * H * K * V) * sizeof(float));
    if (!qkv) return NO_MEMORY;
    float *o = qkv + N * X, *decay = o + N * H * V, *beta = decay + N * D, *weight = beta + N * H,
          *tail = weight + W * X, *before = tail + B * R * X;
    for (long c = 0; c < X; c++) {
        for (long w = 0; w < W; w++) weight[w * X + c] = l->conv[c * W + w];
        for (long i = 0; i < B * R; i++) {
            long at = (i / R * X + c) * R + i % R;
            tail[i * X + c] = l->bf16 ? from_bf16(((uint16_t *)l->tail)[at]) : ((float *)l->tail)[at];
        }
    }
    conv_forward(s->inner, tail, weight, NULL, (long[]){length * I, I}, (long[]){B, length, X, W, 1}, qkv, threads);
    keep_tail(l, s, tail, B, length, X);
    Prompt job = {.l = l, .s = s, .length = length, .decay = decay, .beta = beta};
    in_prompt_pieces(decay_piece, &job, threads);
    int64_t sequence[4 * B];
    sequences_of(sequence, B, length);
    memcpy(before, l->state, (size_t)(B * H * K * V) * sizeof(float));
    long per_head = l->per_channel ? K : 1;
    long strides[] = {length * X, X, K, length * X, X, K, length * X, X, V, length * D, D, per_head, length * H, H, 1};
    long sizes[] = {B, length, H, H, K, V, l->per_channel, 1};
    error = rule_forward(qkv, qkv + H * K, qkv + 2 * H * K, decay, beta, strides, sequence, sizes,
                         1.0f / sqrtf((float)K), NULL, NULL, before, l->state, o, threads);
    long norm_sizes[] = {N * H, H, V, l->to_gate.wide ? H * V : I, V, l->use_silu};
    gated_norm(o, l->to_gate.wide ? s->gate : gate, l->norm, norm_sizes, l->eps, s->mixed, threads);
    free(qkv);
    return error;
}

static void silu_piece(void *job, long index) {
    const Prompt *m = job;
    long X = m->l->heads * (2 * m->l->key + m->l->value);
    for (long i = index * PROMPT_TOKENS; i < end_of(m, index); i++) {
        float *restrict x = m->s->inner + i * m->l->inner;
        for (long c = 0; c < X; c++) x[c] = silu(x[c]);
    }
}

static long lightning_prompt(const Block *l, const Model *m, Scratch *s, long length, int threads) {
    long B = m->batch, N = s->tokens, H = l->heads, K = l->key, V = l->value, I = l->inner;
    Prompt job = {.l = l, .s = s, .length = length};
    in_prompt_pieces(silu_piece, &job, threads);
    float *o = malloc((size_t)(N * H * V + B * H * K * V) * sizeof(float)), *before = o + N * H * V;
    if (!o) return NO_MEMORY;
    int64_t sequence[4 * B];
    sequences_of(sequence, B, length);
    memcpy(before, l->state, (size_t)(B * H * K * V) * sizeof(float));
    long strides[] = {length * I, I, K, length * I, I, K, length * I, I, V, 0, 0, 1, 0, 0, 0};
    long sizes[] = {B, length, H, H, K, V, 0, 0}, norm_sizes[] = {N, 1, H * V, I, 0, 0};
    long error = rule_forward(s->inner, s->inner + H * K, s->inner + 2 * H * K, l->log_decay, NULL, strides, sequence,
                              sizes, 1.0f, NULL, NULL, before, l->state, o, threads);
    gated_norm(o, s->inner + H * (2 * K + V), l->norm, norm_sizes, l->eps, s->mixed, threads);
    free(o);
    return error;
}

static long mix_prompt(const Block *l, const Model *m, Scratch *s, long position, long length, int threads) {
    if (l->mixer == SOFTMAX) return softmax_prompt(l, m, s, position, length, threads);
    long error = (l->mixer == DELTA ? delta_prompt : lightning_prompt)(l, m, s, length, threads);
    if (s->last) keep_last(s->mixed, m->batch, length, l->heads * l->value);
    return error;
}
