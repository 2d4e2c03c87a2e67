/* Softmax attention on a CPU, forward and backward, for training and prompts: FlashAttention-2's tiling (arXiv
 * 2307.08691) by blocks of keys, each of which meets all queries that see it. What is as large as queries times keys
 * exists for one block of both.
 *
 * Pieces of a job are some queries of the heads that share a key head, of the backward pass all of them: every sum has
 * one order, whatever the number of threads. Legend as in few_tokens.c, and: T queries, S keys, V width of a value.
 */

enum { QUERIES = 60, KEYS = 512 };
/* Of a forward piece: what they have summed stays in the cache while the keys pass by. */
enum { PIECE_QUERIES = 16 * QUERIES };
/* Of the forward pass: what the panels of keys and values take, unless one key head takes more. */
enum { MOST_PANEL_FLOATS = 1 << 24 };

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
    int bf16; /* whether products round what they read to it */
    /* Of the forward pass: key heads of all sequences whose panels there are, from `first_group` on, by blocks of KEYS
     * keys; whether keys and values are bf16, as a cache may hold them. */
    float *panels;
    long first_group, groups, blocks, key_floats, value_floats;
    int held_bf16;
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

/* Heads alone: x [B, T, H, K] with strides over the first three axes, in bf16 or fp32 as y is, which is dense. */
typedef struct {
    const void *x;
    void *y;
    const long *strides;
    Softmax angles;
    long tokens, length, heads, width;
    int bf16;
    float direction;
} Rotation;

enum { ROTATED = 64 };

static void rotate_piece(void *job, long index) {
    Rotation *m = job;
    long K = m->width;
    float x[K];
    for (long i = index * ROTATED; i < m->tokens && i < (index + 1) * ROTATED; i++)
        for (long h = 0; h < m->heads; h++) {
            long b = i / m->length, t = i % m->length, to = (i * m->heads + h) * K,
                 from = b * m->strides[0] + t * m->strides[1] + h * m->strides[2];
            const uint16_t *half = (const uint16_t *)m->x + from;
            if (!m->bf16) memcpy(x, (const float *)m->x + from, (size_t)K * sizeof(float));
            else
                for (long c = 0; c < K; c++) x[c] = from_bf16(half[c]);
            turn(&m->angles, x, t, m->direction);
            if (!m->bf16) memcpy((float *)m->y + to, x, (size_t)K * sizeof(float));
            else
                for (long c = 0; c < K; c++) ((uint16_t *)m->y)[to + c] = to_bf16(x[c]);
        }
}

/* sizes: B, T, H, K, half. direction: 1, or -1 to turn back. */
void rotate_heads(const void *x, void *y, const long *strides, const long *sizes, const float *cosine,
                  const float *sine, float direction, int bf16, int threads) {
    Softmax angles = {.cosine = cosine, .sine = sine, .half = sizes[4]};
    Rotation job = {x, y, strides, angles, sizes[0] * sizes[1], sizes[1], sizes[2], sizes[3], bf16, direction};
    in_pieces(rotate_piece, &job, (job.tokens + ROTATED - 1) / ROTATED, threads);
}

/* Turned and scaled queries [n, K] of one head, from the one at `first` on. */
static void prepare_queries(const Softmax *m, long b, long h, long first, long n, float *q) {
    const float *source = head_of(m->q, b, h);
    for (long t = first; t < first + n; t++, q += m->width) {
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

/* Queries [first, first + n) of a head: prepared, as words where products are of bf16, and what they have seen so far.
 */
typedef struct {
    long b, h, first, n;
    float *q, *o, *most, *sum;
    uint32_t *words;
} Queries;

/* Where a piece computes: panels of a block of keys and of their values, logits and what becomes of them. */
typedef struct {
    const float *key, *value;
    float *p, kept[QUERIES];
    uint32_t *words;
    long stride, query_words;
} Room;

static void begin_queries(const Softmax *m, const Room *room, Queries *x) {
    prepare_queries(m, x->b, x->h, x->first, x->n, x->q);
    for (long t = 0; t < x->n; t++) {
        if (m->bf16) round_row(x->q + t * m->width, m->width, x->words + t * room->query_words);
        x->most[t] = -INFINITY, x->sum[t] = 0;
        memset(x->o + t * m->heads * m->value_width, 0, (size_t)m->value_width * sizeof(float));
    }
}

/* Logits [rows, to - from] of the queries from t on become their exponentials, as words where products are of bf16.
 * Brings up to date what was largest and the sum of each query, and says how much is left of what came before. */
static void exponentials(const Softmax *m, Room *room, Queries *x, long t, long rows, long first, long from, long to) {
    float zero[QUERIES];
    for (long r = 0; r < rows; r++) {
        float *row = room->p + r * room->stride, *most = x->most + t + r;
        hide(m, row, x->first + t + r, first, from, to);
        float here = most_of(row + from, to - from), before = *most;
        *most = here > before ? here : before;
        /* Where nothing is to be seen yet, exponentials are 0 and a NaN stays one. */
        zero[r] = *most == -INFINITY ? 0.0f : *most;
        room->kept[r] = before - zero[r];
    }
    exp_all(room->kept, rows, 0.0f);
    for (long r = 0; r < rows; r++) {
        float *row = room->p + r * room->stride + from, total;
        if (m->bf16) total = exp_words(row, to - from, zero[r], room->words + r * ROW_WORDS);
        else exp_all(row, to - from, zero[r]), total = sum_of(row, to - from);
        x->sum[t + r] = x->sum[t + r] * room->kept[r] + total;
    }
}

/* Some rows of queries meet the columns [from, to) of a block of n keys that begins with key `first`. */
static void attend(const Softmax *m, Room *room, Queries *x, long t, long rows, long first, long n, long from,
                   long to) {
    long K = m->width, V = m->value_width, next = m->heads * V;
    float *p = room->p + from, *o = x->o + t * next;
    Result logits = {p, NULL, room->stride, 0}, sums = {o, NULL, next, 1};
    Words query = {x->words + t * room->query_words, NULL, room->query_words, 1},
          weight = {room->words, NULL, ROW_WORDS, 1};
    const float *key = room->key + floats_before(m->bf16, K, from);
    if (m->bf16) words_times(query, key, K, K, 0, rows, to - from, logits);
    else product((Left){x->q + t * K, NULL, K, 1}, key, K, rows, to - from, logits);
    exponentials(m, room, x, t, rows, first, from, to);
    for (long r = 0; r < rows; r++) {
        float kept = room->kept[r];
        for (long i = 0; kept != 1.0f && i < V; i++) o[r * next + i] *= kept;
    }
    if (m->bf16) words_times(weight, room->value + from / 2 * TILE_COLUMNS, n, to - from, 0, rows, V, sums);
    else product_of((Left){p, NULL, room->stride, 1}, room->value, n, from, to - from, rows, V, sums);
}

static void end_queries(const Softmax *m, const Queries *x) {
    float *log_sum = m->log_sum + (x->b * m->heads + x->h) * m->queries + x->first;
    for (long t = 0; t < x->n; t++) {
        float sink = m->sink ? m->sink[x->h] : -INFINITY, now = sink > x->most[t] ? sink : x->most[t],
              zero = now == -INFINITY ? 0.0f : now;
        float share = exp_fp32(x->most[t] - zero), total = x->sum[t] * share + exp_fp32(sink - zero);
        log_sum[t] = zero + logf(total);
        for (long i = 0; i < m->value_width; i++) x->o[t * m->heads * m->value_width + i] *= share / total;
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

/* Panels of a block of keys of one head, and of their values. */
static void pack_keys_piece(void *job, long index) {
    Softmax *m = job;
    long group = m->first_group + index / m->blocks, b = group / m->kv_heads, g = group % m->kv_heads, token;
    long first = index % m->blocks * KEYS, n = m->keys - first < KEYS ? m->keys - first : KEYS;
    float *key = m->panels + index * (m->key_floats + m->value_floats), *value = key + m->key_floats;
    if (m->held_bf16 && m->bf16) {
        const uint16_t *k = (const uint16_t *)m->k.x + b * m->k.batch + g * m->k.head + first * m->k.token;
        const uint16_t *v = (const uint16_t *)m->v.x + b * m->v.batch + g * m->v.head + first * m->v.token;
        pack_transposed_held(k, m->k.token, n, m->width, key);
        pack_held(v, NULL, m->v.token, m->value_width, n, value);
        return;
    }
    float *wide = scratch_for(&m->no_memory, m->held_bf16 ? KEYS * larger(m->width, m->value_width) : 1);
    if (!wide) return;
    const float *rows = rows_from(m, m->k, b, g, first, n, m->width, wide, &token);
    pack_transposed_as(m->bf16, rows, token, n, m->width, key);
    rows = rows_from(m, m->v, b, g, first, n, m->value_width, wide, &token);
    pack_as(m->bf16, rows, NULL, token, 0, m->value_width, n, value);
    free(wide);
}

/* Queries of a piece and of each of its heads. */
static long queries_of_piece(const Softmax *m) {
    long each = PIECE_QUERIES / (m->heads / m->kv_heads) / QUERIES * QUERIES;
    return each < QUERIES ? QUERIES : each;
}

static void softmax_forward_piece(void *job, long index) {
    Softmax *m = job;
    long H = m->heads, G = m->kv_heads, R = H / G, K = m->width, V = m->value_width, each = queries_of_piece(m);
    /* The last queries see most: they come first, and nobody waits long for the last piece. */
    long here = index % m->groups, b = (m->first_group + here) / G, g = (m->first_group + here) % G,
         start = (m->queries - 1) / each * each - index / m->groups * each,
         N = m->queries - start < each ? m->queries - start : each;
    Room room = {.stride = apart(KEYS), .query_words = m->bf16 ? rounded_up(K, 2 * LINE) / 2 : 0};
    long per_head = N * (K + 2 + room.query_words);
    room.p = scratch_for(&m->no_memory, QUERIES * (room.stride + ROW_WORDS) + R * per_head);
    if (!room.p) return;
    room.words = (uint32_t *)(room.p + QUERIES * room.stride);
    Queries heads[R];
    for (long r = 0; r < R; r++) {
        float *own = (float *)(room.words + QUERIES * ROW_WORDS) + r * per_head;
        long h = g * R + r;
        heads[r] = (Queries){b,
                             h,
                             start,
                             N,
                             own,
                             m->o + ((b * m->queries + start) * H + h) * V,
                             own + N * K,
                             own + N * (K + 1),
                             (uint32_t *)(own + N * (K + 2))};
        begin_queries(m, &room, heads + r);
    }
    for (long block = 0; block < m->blocks; block++) {
        long first = block * KEYS, n = m->keys - first < KEYS ? m->keys - first : KEYS, from, to;
        room.key = m->panels + (here * m->blocks + block) * (m->key_floats + m->value_floats);
        room.value = room.key + m->key_floats;
        for (long t = 0; t < N; t += QUERIES) {
            long rows = N - t < QUERIES ? N - t : QUERIES;
            if (!visible(m, start + t, rows, first, n, &from, &to)) continue;
            for (long r = 0; r < R; r++) attend(m, &room, heads + r, t, rows, first, n, from, to);
        }
    }
    for (long r = 0; r < R; r++) end_queries(m, heads + r);
    free(room.p);
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
        prepare_queries(m, b, h, 0, T, q);
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
                product_as(m->bf16, left_q, key + floats_before(m->bf16, K, from), K, rows, to - from,
                           (Result){p + from, NULL, stride, 0});
                product_as(m->bf16, left_d_o, value + floats_before(m->bf16, V, from), V, rows, to - from,
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
    long each = queries_of_piece(&job), pieces = (job.queries + each - 1) / each, groups = sizes[0] * job.kv_heads;
    long block = job.keys < KEYS ? job.keys : KEYS;
    job.blocks = (job.keys + KEYS - 1) / KEYS;
    job.key_floats = floats_of_panels(bf16, job.width, block),
    job.value_floats = floats_of_panels(bf16, block, job.value_width);
    long group_floats = job.blocks * (job.key_floats + job.value_floats) + 1;
    long at_once = larger(1, MOST_PANEL_FLOATS / group_floats);
    at_once = at_once < groups ? at_once : groups;
    job.panels = scratch_for(&job.no_memory, at_once * group_floats);
    if (!job.panels) return NO_MEMORY;
    for (; job.first_group < groups; job.first_group += at_once) {
        job.groups = groups - job.first_group < at_once ? groups - job.first_group : at_once;
        in_pieces(pack_keys_piece, &job, job.groups * job.blocks, threads);
        in_pieces(softmax_forward_piece, &job, job.groups * pieces, threads);
    }
    free(job.panels);
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
