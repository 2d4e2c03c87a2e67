/* Softmax attention on a CPU, forward and backward, for training and prompts: FlashAttention-2's tiling (arXiv
 * 2307.08691) by blocks of keys, each of which meets all queries that see it. What is as large as queries times keys
 * exists for one block of both.
 *
 * Pieces of a job are heads, of the backward pass the query heads of one key head: every sum has one order, whatever
 * the number of threads. Legend as in few_tokens.c, and: T queries, S keys, V width of a value.
 */

enum { QUERIES = 60, KEYS = 512 };

/* Rows of a head: x + b * batch + t * token + h * head, in elements. */
typedef struct {
    const float *x;
    long batch, token, head;
} Heads;

static inline const float *head_of(Heads m, long b, long h) { return m.x + b * m.batch + h * m.head; }

typedef struct {
    Heads q, k, v;
    const float *cosine, *sine, *sink;                                             /* [T, half] and [H], or NULL */
    long half, heads, kv_heads, queries, keys, width, value_width, causal, window; /* window 0: all */
    float scale;
    int bf16;           /* whether products round what they read to it */
    int held_bf16;      /* whether keys and values are bf16, as a cache may hold them; forward only */
    float *o, *log_sum; /* [B, T, H, V], [B, H, T] */
    const float *d_o;
    float *dq, *dk, *dv, *d_sink; /* dense as o; d_sink [B, H] or NULL */
    atomic_int no_memory;
} Softmax;

/* The first `half` channels and those behind them, by the angle of token t, or back. */
static void turn(const Softmax *m, float *x, long t, float direction) {
    const float *cosine = m->cosine + t * m->half, *sine = m->sine + t * m->half;
    for (long i = 0; i < m->half; i++) {
        float first = x[i], second = x[i + m->half], s = direction * sine[i];
        x[i] = first * cosine[i] - second * s;
        x[i + m->half] = second * cosine[i] + first * s;
    }
}

/* Turned and scaled queries [T, K] of one head. */
static void prepare_queries(const Softmax *m, long b, long h, float *q) {
    const float *source = head_of(m->q, b, h);
    for (long t = 0; t < m->queries; t++, q += m->width) {
        for (long i = 0; i < m->width; i++) q[i] = source[t * m->q.token + i] * m->scale;
        if (m->half) turn(m, q, t, 1.0f);
    }
}

/* Of the keys [first, first + n), those that any of the queries [t, t + rows) may see, as columns [*from, *to); `from`
 * begins a panel. */
static int visible(const Softmax *m, long t, long rows, long first, long n, long *from, long *to) {
    long position = m->keys - m->queries + t, low = m->causal && m->window ? position - m->window + 1 - first : 0;
    long high = m->causal ? position + rows - first : n;
    *from = low > 0 ? low / TILE_COLUMNS * TILE_COLUMNS : 0;
    *to = high < n ? high : n;
    return *from < *to;
}

/* Logits that query t must not see, among the columns [from, to) of the keys from `first` on. */
static void hide(const Softmax *m, float *logits, long t, long first, long from, long to) {
    if (!m->causal) return;
    long position = m->keys - m->queries + t - first;
    for (long c = position + 1 > from ? position + 1 : from; c < to; c++) logits[c] = -INFINITY;
    if (m->window)
        for (long c = from; c <= position - m->window && c < to; c++) logits[c] = -INFINITY;
}

/* Logits [rows, to - from] of the queries from t on become their exponentials, as `words` where products are of bf16.
 * Brings up to date what was largest and the sum of each query, and says how much is left of what came before. */
static void exponentials(const Softmax *m, float *p, long stride, long t, long rows, long first, long from, long to,
                         float *most, float *sum, float *kept, uint32_t *words) {
    float zero[QUERIES];
    for (long r = 0; r < rows; r++) {
        hide(m, p + r * stride, t + r, first, from, to);
        float here = most_of(p + r * stride + from, to - from), before = most[t + r];
        most[t + r] = here > before ? here : before;
        /* Where nothing is to be seen yet, exponentials are 0 and a NaN stays one. */
        zero[r] = most[t + r] == -INFINITY ? 0.0f : most[t + r];
        kept[r] = before - zero[r];
    }
    exp_all(kept, rows, 0.0f);
    for (long r = 0; r < rows; r++) {
        float *row = p + r * stride + from, total;
        if (m->bf16) total = exp_words(row, to - from, zero[r], words + r * ROW_WORDS);
        else exp_all(row, to - from, zero[r]), total = sum_of(row, to - from);
        sum[t + r] = sum[t + r] * kept[r] + total;
    }
}

/* n rows of a head of keys or values from row `first` on in fp32: where they lie, or in `wide`. */
static const float *rows_from(const Softmax *m, Heads held, long b, long g, long first, long n, long width, float *wide,
                              long *stride) {
    long at = b * held.batch + g * held.head + first * held.token;
    *stride = m->held_bf16 ? width : held.token;
    if (!m->held_bf16) return held.x + at;
    for (long j = 0; j < n; j++)
        for (long i = 0; i < width; i++)
            wide[j * width + i] = from_bf16(((const uint16_t *)held.x)[at + j * held.token + i]);
    return wide;
}

static void softmax_forward_piece(void *job, long index) {
    Softmax *m = job;
    long H = m->heads, K = m->width, V = m->value_width, T = m->queries, b = index / H, h = index % H,
         g = h / (H / m->kv_heads);
    long key_panels = K * rounded_up(KEYS, TILE_COLUMNS), value_panels = rounded_up(V, TILE_COLUMNS) * KEYS,
         stride = apart(KEYS), query_words = m->bf16 ? rounded_up(K, 2 * LINE) / 2 : 0,
         widened = m->held_bf16 ? KEYS * larger(K, V) : 0;
    float *q = scratch_for(&m->no_memory, T * (K + query_words + 2) + key_panels + value_panels + widened +
                                              QUERIES * (stride + ROW_WORDS));
    if (!q) return;
    float *most = q + T * K, *sum = most + T, *key = sum + T, *value = key + key_panels, *p = value + value_panels,
          *wide = p + QUERIES * stride;
    uint32_t *words = (uint32_t *)(wide + widened), *rounded = words + QUERIES * ROW_WORDS;
    float *o = m->o + (b * T * H + h) * V, kept[QUERIES];
    prepare_queries(m, b, h, q);
    for (long t = 0; t < T; t++) {
        if (m->bf16) round_row(q + t * K, K, rounded + t * query_words);
        most[t] = -INFINITY, sum[t] = 0;
        memset(o + t * H * V, 0, (size_t)V * sizeof(float));
    }
    for (long first = 0; first < m->keys; first += KEYS) {
        long n = m->keys - first < KEYS ? m->keys - first : KEYS, from, to, packed = 0;
        for (long t = 0; t < T; t += QUERIES) {
            long rows = T - t < QUERIES ? T - t : QUERIES;
            if (!visible(m, t, rows, first, n, &from, &to)) continue;
            if (!packed) {
                long token;
                const float *rows = rows_from(m, m->k, b, g, first, n, K, wide, &token);
                pack_transposed_as(m->bf16, rows, token, n, K, key);
                rows = rows_from(m, m->v, b, g, first, n, V, wide, &token);
                pack_as(m->bf16, rows, NULL, token, 0, V, n, value);
                packed = 1;
            }
            Result logits = {p + from, NULL, stride, 0}, sums = {o + t * H * V, NULL, H * V, 1};
            Words query = {rounded + t * query_words, NULL, query_words, 1}, weight = {words, NULL, ROW_WORDS, 1};
            if (m->bf16) words_times(query, key + from * K, K, K, 0, rows, to - from, logits);
            else product((Left){q + t * K, NULL, K, 1}, key + from * K, K, rows, to - from, logits);
            exponentials(m, p, stride, t, rows, first, from, to, most, sum, kept, words);
            for (long r = 0; r < rows; r++)
                for (long i = 0; kept[r] != 1.0f && i < V; i++) o[(t + r) * H * V + i] *= kept[r];
            if (m->bf16) words_times(weight, value + from / 2 * TILE_COLUMNS, n, to - from, 0, rows, V, sums);
            else product_of((Left){p + from, NULL, stride, 1}, value, n, from, to - from, rows, V, sums);
        }
    }
    for (long t = 0; t < T; t++) {
        float sink = m->sink ? m->sink[h] : -INFINITY, now = sink > most[t] ? sink : most[t],
              zero = now == -INFINITY ? 0.0f : now;
        float share = exp_fp32(most[t] - zero), total = sum[t] * share + exp_fp32(sink - zero);
        m->log_sum[(b * H + h) * T + t] = zero + logf(total);
        for (long i = 0; i < V; i++) o[t * H * V + i] *= share / total;
    }
    free(q);
}

static void softmax_backward_piece(void *job, long index) {
    Softmax *m = job;
    long H = m->heads, G = m->kv_heads, K = m->width, V = m->value_width, T = m->queries, R = H / G, b = index / G,
         g = index % G;
    long stride = apart(KEYS), columns = rounded_up(KEYS, TILE_COLUMNS), k_width = rounded_up(K, TILE_COLUMNS),
         v_width = rounded_up(V, TILE_COLUMNS);
    float *q = scratch_for(&m->no_memory, 2 * T * K + T + columns * (K + V) + KEYS * k_width +
                                              QUERIES * (k_width + v_width + 2 * stride));
    if (!q) return;
    float *dq = q + T * K, *delta = dq + T * K, *key = delta + T, *value = key + columns * K,
          *key_rows = value + columns * V;
    float *q_rows = key_rows + KEYS * k_width, *d_o_rows = q_rows + QUERIES * k_width,
          *p = d_o_rows + QUERIES * v_width, *ds = p + QUERIES * stride;
    float *dk = m->dk + (b * m->keys * G + g) * K, *dv = m->dv + (b * m->keys * G + g) * V;
    for (long s = 0; s < m->keys; s++) {
        memset(dk + s * G * K, 0, (size_t)K * sizeof(float));
        memset(dv + s * G * V, 0, (size_t)V * sizeof(float));
    }
    for (long r = 0; r < R; r++) {
        long h = g * R + r;
        const float *o = m->o + (b * T * H + h) * V, *d_o = m->d_o + (b * T * H + h) * V,
                    *log_sum = m->log_sum + (b * H + h) * T;
        float d_sink = 0;
        prepare_queries(m, b, h, q);
        memset(dq, 0, (size_t)(T * K) * sizeof(float));
        for (long t = 0; t < T; t++) {
            delta[t] = dot(o + t * H * V, d_o + t * H * V, V);
            if (m->sink) d_sink -= exp_fp32(m->sink[h] - log_sum[t]) * delta[t];
        }
        if (m->sink) m->d_sink[b * H + h] = d_sink;
        for (long first = 0; first < m->keys; first += KEYS) {
            long n = m->keys - first < KEYS ? m->keys - first : KEYS, from, to;
            const float *k = head_of(m->k, b, g) + first * m->k.token, *v = head_of(m->v, b, g) + first * m->v.token;
            pack_transposed_as(m->bf16, k, m->k.token, n, K, key);
            pack_transposed_as(m->bf16, v, m->v.token, n, V, value);
            pack_as(m->bf16, k, NULL, m->k.token, 0, K, n, key_rows);
            for (long t = 0; t < T; t += QUERIES) {
                long rows = T - t < QUERIES ? T - t : QUERIES;
                if (!visible(m, t, rows, first, n, &from, &to)) continue;
                Left left_q = {q + t * K, NULL, K, 1}, left_d_o = {d_o + t * H * V, NULL, H * V, 1};
                product_as(m->bf16, left_q, key + from * K, K, rows, to - from, (Result){p + from, NULL, stride, 0});
                product_as(m->bf16, left_d_o, value + from * V, V, rows, to - from,
                           (Result){ds + from, NULL, stride, 0});
                for (long i = 0; i < rows; i++) {
                    float *restrict row = p + i * stride, *restrict d_row = ds + i * stride, total = log_sum[t + i],
                                    mean = delta[t + i];
                    hide(m, row, t + i, first, from, to);
                    exp_all(row + from, to - from, total);
                    for (long c = from; c < to; c++) d_row[c] = row[c] * (d_row[c] - mean);
                }
                pack_as(m->bf16, d_o + t * H * V, NULL, H * V, 0, V, rows, d_o_rows);
                pack_as(m->bf16, q + t * K, NULL, K, 0, K, rows, q_rows);
                product_as(m->bf16, (Left){p + from, NULL, 1, stride}, d_o_rows, rows, to - from, V,
                           (Result){dv + (first + from) * G * V, NULL, G * V, 1});
                product_as(m->bf16, (Left){ds + from, NULL, 1, stride}, q_rows, rows, to - from, K,
                           (Result){dk + (first + from) * G * K, NULL, G * K, 1});
                product_of_as(m->bf16, (Left){ds + from, NULL, stride, 1}, key_rows, n, from, to - from, rows, K,
                              (Result){dq + t * K, NULL, K, 1});
            }
        }
        for (long t = 0; t < T; t++) {
            float *out = m->dq + ((b * T + t) * H + h) * K;
            for (long i = 0; i < K; i++) out[i] = dq[t * K + i] * m->scale;
            if (m->half) turn(m, out, t, -1.0f);
        }
    }
    free(q);
}

static Softmax softmax_job(const float *q, const float *k, const float *v, const long *strides, const long *sizes,
                           const float *cosine, const float *sine, const float *sink, float scale, float *o,
                           float *log_sum, int bf16) {
    return (Softmax){.q = {q, strides[0], strides[1], strides[2]},
                     .k = {k, strides[3], strides[4], strides[5]},
                     .v = {v, strides[6], strides[7], strides[8]},
                     .cosine = cosine,
                     .sine = sine,
                     .sink = sink,
                     .queries = sizes[1],
                     .keys = sizes[2],
                     .heads = sizes[3],
                     .kv_heads = sizes[4],
                     .width = sizes[5],
                     .value_width = sizes[6],
                     .half = sizes[7],
                     .causal = sizes[8],
                     .window = sizes[9],
                     .scale = scale,
                     .o = o,
                     .log_sum = log_sum,
                     .bf16 = bf16};
}

/* Keys and values are fp32, or bf16 where `held_bf16`. strides: of q, k and v over sequences, tokens and heads. sizes:
 * B, T, S, H, G, K, V, half, causal, window (0: all). Returns 0 or an error. */
long softmax_forward(const float *q, const void *k, const void *v, const long *strides, const long *sizes,
                     const float *cosine, const float *sine, const float *sink, float scale, float *o, float *log_sum,
                     int bf16, int held_bf16, int threads) {
    Softmax job = softmax_job(q, k, v, strides, sizes, cosine, sine, sink, scale, o, log_sum, bf16);
    job.held_bf16 = held_bf16;
    in_pieces(softmax_forward_piece, &job, sizes[0] * job.heads, threads);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}

long softmax_backward(const float *q, const float *k, const float *v, const long *strides, const long *sizes,
                      const float *cosine, const float *sine, const float *sink, float scale, float *o, float *log_sum,
                      const float *d_o, float *dq, float *dk, float *dv, float *d_sink, int bf16, int threads) {
    Softmax job = softmax_job(q, k, v, strides, sizes, cosine, sine, sink, scale, o, log_sum, bf16);
    job.d_o = d_o, job.dq = dq, job.dk = dk, job.dv = dv, job.d_sink = d_sink;
    in_pieces(softmax_backward_piece, &job, sizes[0] * job.kv_heads, threads);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}
