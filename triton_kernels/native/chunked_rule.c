/* Linear attention over many tokens on a CPU, forward and backward, with the delta rule's correction or without, by a
 * decay per head or per key channel: the formulas of linear/chunked_rule_torch.py, a head's chunks one after the other
 * while its state lies in the first cache. So the errors E of a chunk are solved for by substitution, after what the
 * state predicts is taken off, and no inverse is ever made.
 *
 * Pieces of a job are heads of sequences, of the backward pass the value heads of one key head: every sum has one
 * order, whatever the number of threads. Legend as in few_tokens.c, and: H value heads, G heads of queries and keys, V
 * width of a value, n tokens of a chunk; "rows" are those that read, n queries and then n keys.
 */

enum { CHUNK = 32 };
/* A decay below this is none at all: see linear/chunk_decays_torch.py. */
static const float STRONGEST = -100.0f;

typedef struct {
    Heads q, k, v, decay, beta; /* decay [B, T, H or H K]; beta NULL: nothing is corrected */
    const int64_t *sequence;    /* of each: batch row, first token, tokens, chunks before it */
    long heads, key_heads, width, value_width, tokens;
    int per_channel, normalize;
    float scale;
    const float *initial;   /* [S, H, K, V], as all states */
    float *final, *o;       /* o [B, T, H, V], as all that follows is dense */
    float *states, *errors; /* before every chunk [chunks, H, K, V], and [B, T, H, V]; or NULL */
    const float *d_o, *d_final;
    float *dq, *dk, *dv, *d_decay, *d_beta, *d_initial; /* d_decay NULL where nobody asks */
    atomic_int no_memory;
} Rule;

/* What is made of a chunk's inputs before any state is known. */
typedef struct {
    long n;
    float *rows, *read;                   /* [2 n, K]: q and k; scale e^c q and -e^c k */
    float *weighted, *write;              /* [n, K]: b k; e^{c_n - c} b k */
    float *from_start, *to_end, *whole;   /* [n, K]: e^c, e^{c_n - c}; [K]: e^{c_n} */
    float *decay, *late, *early;          /* [n, K]: log-decays; decays from and to a pair's anchor, per channel */
    float *pair;                          /* [2 n, K] */
    float *panels;                        /* [2 CHUNK, K or V] or [K, V] */
    float scores[2 * CHUNK * CHUNK];      /* F, and -(A^-1 - 1) */
    float within[CHUNK * CHUNK];          /* e^{c_i - c_j} for j <= i */
    float length[2 * CHUNK], beta[CHUNK]; /* 1 / length of a row */
} Chunk;

static float *take(float **from, long n) {
    float *here = *from;
    *from += rounded_up(n, 16);
    return here;
}

static long wide_columns(long n) { return rounded_up(n, TILE_COLUMNS); }

static long panel_floats(const Rule *m) {
    long K = wide_columns(m->width), V = wide_columns(m->value_width);
    return K * V + 2 * CHUNK * (K > V ? K : V);
}

static long chunk_floats(const Rule *m) {
    return 14 * rounded_up(CHUNK * m->width, 16) + rounded_up(m->width, 16) + rounded_up(panel_floats(m), 16);
}

static void place(const Rule *m, Chunk *c, float **from) {
    long size = CHUNK * m->width;
    c->rows = take(from, 2 * size), c->read = take(from, 2 * size), c->pair = take(from, 2 * size);
    c->weighted = take(from, size), c->write = take(from, size);
    c->from_start = take(from, size), c->to_end = take(from, size), c->whole = take(from, m->width);
    c->decay = take(from, size), c->late = take(from, size), c->early = take(from, size);
    c->panels = take(from, panel_floats(m));
}

/* ---- Products of triangles ---- */

/* Of a left factor [n, n] what lies on and below its diagonal, added to the result. */
static void lower_product(const float *left, const float *panels, long n, long columns, Result result) {
    for (long i = 0; i < n; i += TILE_ROWS, result.x += TILE_ROWS * result.stride) {
        long rows = n - i < TILE_ROWS ? n - i : TILE_ROWS;
        product_of((Left){left + i * CHUNK, NULL, CHUNK, 1}, panels, n, 0, i + rows, rows, columns, result);
    }
}

/* Likewise of its transpose; the right factor's rows are `first` and those behind it, of `depth`. */
static void upper_product(const float *left, const float *panels, long depth, long first, long n, long columns,
                          Result result) {
    for (long i = 0; i < n; i += TILE_ROWS, result.x += TILE_ROWS * result.stride) {
        long rows = n - i < TILE_ROWS ? n - i : TILE_ROWS;
        product_of((Left){left + i * CHUNK + i, NULL, 1, CHUNK}, panels, depth, first + i, n - i, rows, columns,
                   result);
    }
}

/* x_i += sum over j < i of left_ij x_j, row by row, of one panel. */
static void substitute(const float *left, long n, float *panel) {
    Line *x = (Line *)panel;
    for (long i = 0; i < n; i += TILE_ROWS) {
        long rows = n - i < TILE_ROWS ? n - i : TILE_ROWS;
        product((Left){left + i * CHUNK, NULL, CHUNK, 1}, panel, i, rows, TILE_COLUMNS,
                (Result){panel + i * TILE_COLUMNS, NULL, TILE_COLUMNS, 1});
        for (long r = i + 1; r < i + rows; r++)
            for (long j = i; j < r; j++) {
                float here = left[r * CHUNK + j];
                x[2 * r] += here * x[2 * j], x[2 * r + 1] += here * x[2 * j + 1];
            }
    }
}

/* x_j += sum over i > j of left_ij x_i, from the last row on. */
static void substitute_back(const float *left, long n, float *panel) {
    Line *x = (Line *)panel;
    for (long end = n; end > 0; end -= TILE_ROWS) {
        long from = end > TILE_ROWS ? end - TILE_ROWS : 0;
        product((Left){left + end * CHUNK + from, NULL, 1, CHUNK}, panel + end * TILE_COLUMNS, n - end, end - from,
                TILE_COLUMNS, (Result){panel + from * TILE_COLUMNS, NULL, TILE_COLUMNS, 1});
        for (long r = end - 2; r >= from; r--)
            for (long i = r + 1; i < end; i++) {
                float here = left[i * CHUNK + r];
                x[2 * r] += here * x[2 * i], x[2 * r + 1] += here * x[2 * i + 1];
            }
    }
}

static void unpack(const float *panels, long n, long columns, float *rows, long stride) {
    for (long j = 0; j < columns; j += TILE_COLUMNS, panels += n * TILE_COLUMNS) {
        long here = columns - j < TILE_COLUMNS ? columns - j : TILE_COLUMNS;
        for (long i = 0; i < n; i++) {
            float *row = rows + i * stride + j;
            const float *panel = panels + i * TILE_COLUMNS;
            if (here == TILE_COLUMNS)
                *(Line *)row = *(const Line *)panel, *(Line *)(row + LINE) = *(const Line *)(panel + LINE);
            else
                for (long c = 0; c < here; c++) row[c] = panel[c];
        }
    }
}

/* x y^T of n rows each, of which the panels on and below the diagonal are made; y^T is packed. */
static void lower_scores(const float *x, long stride, const float *panels, long depth, long n, float *scores) {
    for (long j = 0; j < n; j += TILE_COLUMNS)
        product((Left){x + j * stride, NULL, stride, 1}, panels + j * depth, depth, n - j,
                n - j < TILE_COLUMNS ? n - j : TILE_COLUMNS, (Result){scores + j * CHUNK + j, NULL, CHUNK, 0});
}

/* ---- Decays ---- */

/* Exponents are sums from one end: as differences of longer sums they would lose their digits behind a strong decay. */
static void fill(float *restrict y, long n, float x) {
    for (long i = 0; i < n; i++) y[i] = x;
}

static void decay_per_head(const Rule *m, Chunk *c) {
    long K = m->width, n = c->n;
    float exponent[CHUNK], from_start = 0;
    fill(exponent, CHUNK, -INFINITY);
    for (long i = 0; i < n; i++) {
        float here = c->decay[i], *restrict within = c->within + i * CHUNK;
        from_start += here;
        for (long j = 0; j < i; j++) exponent[j] += here;
        exponent[i] = 0;
        for (long j = 0; j < CHUNK; j++) within[j] = exp_fp32(exponent[j]);
        fill(c->from_start + i * K, K, exp_fp32(from_start));
    }
    for (long j = 0; j < n; j++) fill(c->to_end + j * K, K, c->within[(n - 1) * CHUNK + j]);
}

static void decay_per_channel(const Rule *m, Chunk *c) {
    long K = m->width, n = c->n;
    for (long d = 0; d < K; d++) c->from_start[d] = c->decay[d], c->to_end[(n - 1) * K + d] = 0;
    for (long i = 1; i < n; i++)
        for (long d = 0; d < K; d++) c->from_start[i * K + d] = c->from_start[(i - 1) * K + d] + c->decay[i * K + d];
    for (long i = n - 1; i > 0; i--)
        for (long d = 0; d < K; d++) c->to_end[(i - 1) * K + d] = c->to_end[i * K + d] + c->decay[i * K + d];
    for (long i = 0; i < n * K; i++)
        c->from_start[i] = exp_fp32(c->from_start[i]), c->to_end[i] = exp_fp32(c->to_end[i]);
    for (long i = 0; i < n; i++)
        for (long j = 0; j <= i; j++) c->within[i * CHUNK + j] = 1.0f;
}

/* A decay per channel stands inside the dot product, so the triangle is cut by halving, as in linear/
 * chunk_decays_torch.py: tokens [middle, end) meet [first, middle) through the first of them, their anchor. */
typedef struct {
    long first, middle, end;
} Pair;

static int next_pair(const Chunk *c, long *half, Pair *pair) {
    for (; *half < c->n; *half *= 2, pair->first = 0)
        if ((pair->middle = pair->first + *half) < c->n) {
            pair->end = pair->middle + *half < c->n ? pair->middle + *half : c->n;
            return 1;
        }
    return 0;
}

static void decay_of_pair(Chunk *c, long K, Pair pair) {
    long later = pair.end - pair.middle, earlier = pair.middle - pair.first;
    const float *restrict decay = c->decay + pair.middle * K;
    for (long d = 0; d < K; d++) c->late[d] = 0, c->early[(earlier - 1) * K + d] = decay[d];
    for (long i = K; i < later * K; i++) c->late[i] = c->late[i - K] + decay[i];
    for (long i = (earlier - 1) * K - 1; i >= 0; i--)
        c->early[i] = c->early[i + K] + c->decay[(pair.first + 1) * K + i];
    for (long i = 0; i < later * K; i++) c->late[i] = exp_fp32(c->late[i]);
    for (long i = 0; i < earlier * K; i++) c->early[i] = exp_fp32(c->early[i]);
}

/* y = a * b of n numbers. */
static void times(const float *restrict a, const float *restrict b, long n, float *restrict y) {
    for (long i = 0; i < n; i++) y[i] = a[i] * b[i];
}

static void add_times(const float *restrict a, const float *restrict b, long n, float *restrict y) {
    for (long i = 0; i < n; i++) y[i] += a[i] * b[i];
}

/* rows_i . keys_j of decayed channels for j <= i. */
static void channel_scores(Chunk *c, long K, int kinds) {
    long half = 1, n = c->n;
    for (long i = 0; i < n; i++) c->scores[i * CHUNK + i] = dot(c->rows + i * K, c->rows + (n + i) * K, K);
    for (Pair pair = {0}; next_pair(c, &half, &pair); pair.first += 2 * half) {
        long later = pair.end - pair.middle;
        decay_of_pair(c, K, pair);
        float *late = c->pair, *early = c->pair + half * K;
        times(c->rows + (n + pair.first) * K, c->early, half * K, early);
        if (half >= 8) pack_transposed(early, K, half, K, c->panels);
        for (int kind = 0; kind < kinds; kind++) {
            float *scores = c->scores + (kind * CHUNK + pair.middle) * CHUNK + pair.first;
            times(c->rows + (kind * n + pair.middle) * K, c->late, later * K, late);
            if (half >= 8)
                product((Left){late, NULL, K, 1}, c->panels, K, later, half, (Result){scores, NULL, CHUNK, 0});
            else
                for (long i = 0; i < later; i++)
                    for (long j = 0; j < half; j++) scores[i * CHUNK + j] = dot(late + i * K, early + j * K, K);
        }
    }
}

/* Adds what the gradients of the scores, [2 CHUNK, CHUNK], give to those of rows and keys. */
static void channel_scores_backward(Chunk *c, long K, int kinds, const float *d_scores, float *d_rows, float *d_keys) {
    long half = 1, n = c->n;
    float *early = c->pair, *late = c->pair + CHUNK * K, *panels = c->panels,
          *d_pair = panels + CHUNK * wide_columns(K);
    for (long i = 0; i < n; i++)
        for (long d = 0; d < K; d++) {
            float here = d_scores[i * CHUNK + i];
            d_rows[i * K + d] += here * c->weighted[i * K + d], d_keys[i * K + d] += here * c->rows[i * K + d];
        }
    for (Pair pair = {0}; next_pair(c, &half, &pair); pair.first += 2 * half) {
        long later = pair.end - pair.middle;
        decay_of_pair(c, K, pair);
        times(c->weighted + pair.first * K, c->early, half * K, early);
        for (int kind = 0; kind < kinds; kind++) {
            const float *d = d_scores + (kind * CHUNK + pair.middle) * CHUNK + pair.first;
            long row = kind * n + pair.middle;
            pack(early, NULL, K, 0, K, half, panels);
            product((Left){d, NULL, CHUNK, 1}, panels, half, later, K, (Result){d_pair, NULL, K, 0});
            add_times(d_pair, c->late, later * K, d_rows + row * K);
            times(c->rows + row * K, c->late, later * K, late);
            pack(late, NULL, K, 0, K, later, panels);
            product((Left){d, NULL, 1, CHUNK}, panels, later, half, K, (Result){d_pair, NULL, K, 0});
            add_times(d_pair, c->early, half * K, d_keys + pair.first * K);
        }
    }
}

/* ---- A chunk ---- */

static void scaled(const float *restrict x, float factor, long n, float *restrict y) {
    for (long i = 0; i < n; i++) y[i] = x[i] * factor;
}

static void shrink(float *restrict x, float factor, long n) {
    for (long i = 0; i < n; i++) x[i] *= factor;
}

/* y = factor * a * b of n numbers. */
static void scale_into(const float *restrict a, const float *restrict b, float factor, long n, float *restrict y) {
    for (long i = 0; i < n; i++) y[i] = factor * (a[i] * b[i]);
}

/* y *= factor * x of n numbers. */
static void scale_by(const float *restrict x, float factor, long n, float *restrict y) {
    for (long i = 0; i < n; i++) y[i] *= factor * x[i];
}

/* Of one key: b k and e^{c_n - c} b k. */
static void weigh(const float *restrict k, const float *restrict to_end, float beta, long n, float *restrict weighted,
                  float *restrict write) {
    for (long i = 0; i < n; i++) weighted[i] = beta * k[i], write[i] = to_end[i] * (beta * k[i]);
}

/* A triangle of scores times decays, with zeros above it, and on its diagonal for keys. */
static void mask(const float *restrict within, const float *restrict weight, float factor, long n, int kind,
                 float *restrict scores) {
    for (long i = 0; i < n; i++) {
        long last = i + 1 - kind;
        for (long j = 0; j < last; j++) scores[i * CHUNK + j] *= factor * within[i * CHUNK + j] * weight[j];
        for (long j = last; j < n; j++) scores[i * CHUNK + j] = 0;
    }
}

static void load_rows(const Rule *m, Heads from, long b, long h, long t, long n, float *rows, float *length) {
    long K = m->width;
    for (long i = 0; i < n; i++, rows += K) {
        const float *source = head_of(from, b, h) + (t + i) * from.token;
        length[i] = m->normalize ? 1.0f / sqrtf(dot(source, source, K) + 1e-6f) : 1.0f;
        scaled(source, length[i], K, rows);
    }
}

/* Tokens [t, t + n) of value head h. */
static void prepare_chunk(const Rule *m, Chunk *c, long b, long h, long t, long n) {
    long K = m->width, g = h / (m->heads / m->key_heads), gates = m->per_channel ? K : 1;
    int kinds = m->beta.x ? 2 : 1;
    c->n = n;
    load_rows(m, m->q, b, g, t, n, c->rows, c->length);
    load_rows(m, m->k, b, g, t, n, c->rows + n * K, c->length + n);
    for (long i = 0; i < n; i++) {
        c->beta[i] = m->beta.x ? head_of(m->beta, b, h)[(t + i) * m->beta.token] : 1.0f;
        const float *decay = head_of(m->decay, b, h) + (t + i) * m->decay.token;
        /* A NaN stays one. */
        for (long d = 0; d < gates; d++) c->decay[i * gates + d] = decay[d] < STRONGEST ? STRONGEST : decay[d];
    }
    if (m->per_channel) decay_per_channel(m, c);
    else decay_per_head(m, c);
    memcpy(c->whole, c->from_start + (n - 1) * K, (size_t)K * sizeof(float));
    scale_into(c->from_start, c->rows, m->scale, n * K, c->read);
    if (kinds == 2) scale_into(c->from_start, c->rows + n * K, -1.0f, n * K, c->read + n * K);
    for (long i = 0; i < n; i++)
        weigh(c->rows + (n + i) * K, c->to_end + i * K, c->beta[i], K, c->weighted + i * K, c->write + i * K);
    if (m->per_channel) channel_scores(c, K, kinds);
    else {
        pack_transposed(c->rows + n * K, K, n, K, c->panels);
        for (int kind = 0; kind < kinds; kind++)
            lower_scores(c->rows + kind * n * K, K, c->panels, K, n, c->scores + kind * CHUNK * CHUNK);
    }
    for (int kind = 0; kind < kinds; kind++)
        mask(c->within, c->beta, kind ? -1.0f : m->scale, n, kind, c->scores + kind * CHUNK * CHUNK);
}

/* ---- Forward ---- */

static float *start_state(const float *from, float *state, long size) {
    if (from) memcpy(state, from, (size_t)size * sizeof(float));
    else memset(state, 0, (size_t)size * sizeof(float));
    return state;
}

static void rule_forward_piece(void *job, long index) {
    Rule *m = job;
    long H = m->heads, K = m->width, V = m->value_width, s = index / H, h = index % H;
    const int64_t *sequence = m->sequence + 4 * s;
    long b = sequence[0], first = sequence[1], size = K * V, columns = wide_columns(V);
    float *scratch = scratch_for(&m->no_memory, chunk_floats(m) + (K + CHUNK) * columns), *from = scratch;
    if (!scratch) return;
    Chunk c;
    place(m, &c, &from);
    float *held = from, *errors = held + K * columns;
    float *state =
        start_state(m->initial ? m->initial + (s * H + h) * size : NULL, m->final + (s * H + h) * size, size);
    for (long t = 0; t < sequence[2]; t += CHUNK) {
        long n = sequence[2] - t < CHUNK ? sequence[2] - t : CHUNK, token = first + t;
        Result o = {m->o + ((b * m->tokens + token) * H + h) * V, NULL, H * V, 0};
        if (m->states)
            memcpy(m->states + ((sequence[3] + t / CHUNK) * H + h) * size, state, (size_t)size * sizeof(float));
        prepare_chunk(m, &c, b, h, token, n);
        pack(state, NULL, V, 0, V, K, held);
        pack(head_of(m->v, b, h) + token * m->v.token, NULL, m->v.token, 0, V, n, errors);
        for (long j = 0; m->beta.x && j < columns; j += TILE_COLUMNS) {
            product((Left){c.read + n * K, NULL, K, 1}, held + j * K, K, n, TILE_COLUMNS,
                    (Result){errors + j * n, NULL, TILE_COLUMNS, 1});
            substitute(c.scores + CHUNK * CHUNK, n, errors + j * n);
        }
        product((Left){c.read, NULL, K, 1}, held, K, n, V, o);
        o.add = 1;
        lower_product(c.scores, errors, n, V, o);
        for (long d = 0; d < K; d++) shrink(state + d * V, c.whole[d], V);
        product((Left){c.write, NULL, 1, K}, errors, n, K, V, (Result){state, NULL, V, 1});
        if (m->errors) unpack(errors, n, V, m->errors + ((b * m->tokens + token) * H + h) * V, H * V);
    }
    free(scratch);
}

/* ---- Backward ---- */

/* Gradients of normalised rows become those of the rows, and are written, or added where value heads share them. */
static void store_rows(const Rule *m, const Chunk *c, float *restrict d, int kind, float *out, long stride, int add) {
    long K = m->width;
    for (long i = 0; i < c->n; i++, d += K, out += stride) {
        if (m->normalize) {
            const float *restrict row = c->rows + (kind * c->n + i) * K;
            float along = dot(row, d, K), length = c->length[kind * c->n + i];
            for (long j = 0; j < K; j++) d[j] = (d[j] - row[j] * along) * length;
        }
        if (add)
            for (long j = 0; j < K; j++) out[j] += d[j];
        else memcpy(out, d, (size_t)K * sizeof(float));
    }
}

/* What one token's decays change: q dq + k dk - b k U. The gradient of the key as a whole is left in du. */
static void gate_with_key(const float *restrict q, const float *restrict k, float beta, long n,
                          const float *restrict dq, const float *restrict dk, float *restrict du, float *restrict d) {
    for (long i = 0; i < n; i++) {
        float written = beta * du[i];
        d[i] = q[i] * dq[i] + k[i] * dk[i] - k[i] * written;
        du[i] = written + dk[i];
    }
}

static void gate_of_token(const float *restrict q, const float *restrict k, long n, const float *restrict dq,
                          const float *restrict du, float *restrict d) {
    for (long i = 0; i < n; i++) d[i] = q[i] * dq[i] - k[i] * du[i];
}

static void rule_backward_head(Rule *m, Chunk *c, float *from, long s, long h) {
    long H = m->heads, G = m->key_heads, R = H / G, K = m->width, V = m->value_width, g = h / R, size = K * V;
    int kinds = m->beta.x ? 2 : 1;
    const int64_t *sequence = m->sequence + 4 * s;
    long b = sequence[0], columns = wide_columns(V), gates = m->per_channel ? K : 1, line = H * V;
    float *later = take(&from, K * columns), *d_out = take(&from, CHUNK * columns), *dv = take(&from, CHUNK * columns);
    float *d_rows = take(&from, 2 * CHUNK * K), *d_keys = take(&from, CHUNK * K), *d_decay = take(&from, K);
    float d_scores[2 * CHUNK * CHUNK], ones[CHUNK];
    fill(ones, CHUNK, 1.0f);
    float *d_state = m->d_initial + (s * H + h) * size;
    start_state(m->d_final ? m->d_final + (s * H + h) * size : NULL, d_state, size);
    for (long chunk = (sequence[2] + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        long t = chunk * CHUNK, n = sequence[2] - t < CHUNK ? sequence[2] - t : CHUNK;
        long token = b * m->tokens + sequence[1] + t, place = token * H + h;
        const float *state = m->states + ((sequence[3] + chunk) * H + h) * size, *d_o = m->d_o + place * V;
        Left errors = m->errors ? (Left){m->errors + place * V, NULL, line, 1}
                                : (Left){head_of(m->v, b, h) + (sequence[1] + t) * m->v.token, NULL, m->v.token, 1};
        Left readers[2] = {{d_o, NULL, line, 1}, {m->dv + place * V, NULL, line, 1}};
        prepare_chunk(m, c, b, h, sequence[1] + t, n);

        /* Errors and values. */
        pack(d_state, NULL, V, 0, V, K, later);
        pack(d_o, NULL, line, 0, V, n, d_out);
        for (long j = 0; j < columns; j += TILE_COLUMNS) {
            Result panel = {dv + j * n, NULL, TILE_COLUMNS, 0};
            product((Left){c->write, NULL, K, 1}, later + j * K, K, n, TILE_COLUMNS, panel);
            panel.add = 1;
            upper_product(c->scores, d_out + j * n, n, 0, n, TILE_COLUMNS, panel);
            if (kinds == 2) substitute_back(c->scores + CHUNK * CHUNK, n, panel.x);
        }
        unpack(dv, n, V, m->dv + place * V, line);

        /* What was written: read by later chunks, then by the rows of this one. */
        pack_transposed(d_state, V, K, V, c->panels);
        product(errors, c->panels, V, n, K, (Result){d_keys, NULL, K, 0});
        for (long d = 0; d < K; d++) d_decay[d] = c->whole[d] * dot(d_state + d * V, state + d * V, V);
        scale_by(c->to_end, 1.0f, n * K, d_keys);
        for (long i = 0; i < n; i++) add_times(c->weighted + i * K, d_keys + i * K, K, d_decay);
        for (long d = 0; d < K; d++) shrink(d_state + d * V, c->whole[d], V);
        product((Left){c->read, NULL, 1, K}, d_out, n, K, V, (Result){d_state, NULL, V, 1});
        if (kinds == 2) product((Left){c->read + n * K, NULL, 1, K}, dv, n, K, V, (Result){d_state, NULL, V, 1});

        /* Rows: what they read of the state, then of this chunk. */
        pack_transposed(state, V, K, V, c->panels);
        for (int kind = 0; kind < kinds; kind++) {
            float *d = d_rows + kind * n * K;
            product(readers[kind], c->panels, V, n, K, (Result){d, NULL, K, 0});
            scale_by(c->from_start, kind ? -1.0f : m->scale, n * K, d);
        }
        pack_transposed(errors.x, errors.stride, n, V, c->panels);
        for (int kind = 0; kind < kinds; kind++) {
            lower_scores(readers[kind].x, line, c->panels, V, n, d_scores + kind * CHUNK * CHUNK);
            mask(c->within, ones, kind ? -1.0f : m->scale, n, kind, d_scores + kind * CHUNK * CHUNK);
        }
        if (m->per_channel) channel_scores_backward(c, K, kinds, d_scores, d_rows, d_keys);
        else {
            pack(c->weighted, NULL, K, 0, K, n, c->panels);
            for (int kind = 0; kind < kinds; kind++)
                lower_product(d_scores + kind * CHUNK * CHUNK, c->panels, n, K,
                              (Result){d_rows + kind * n * K, NULL, K, 1});
            pack(c->rows, NULL, K, 0, K, kinds * n, c->panels);
            for (int kind = 0; kind < kinds; kind++)
                upper_product(d_scores + kind * CHUNK * CHUNK, c->panels, kinds * n, kind * n, n, K,
                              (Result){d_keys, NULL, K, 1});
        }

        /* The gates, from the last token on; then the keys as a whole. */
        float below = sum_of(d_decay, K);
        for (long i = n - 1; i >= 0; i--) {
            const float *q = c->rows + i * K, *k = c->rows + (n + i) * K;
            float *du = d_keys + i * K, *d_gate = m->d_decay ? m->d_decay + (place + i * H) * gates : NULL;
            if (m->d_beta) m->d_beta[place + i * H] = dot(k, du, K);
            if (kinds == 2) gate_with_key(q, k, c->beta[i], K, d_rows + i * K, d_rows + (n + i) * K, du, c->pair);
            else gate_of_token(q, k, K, d_rows + i * K, du, c->pair);
            if (!d_gate) continue;
            if (!m->per_channel) *d_gate = below += sum_of(c->pair, K);
            else
                for (long d = 0; d < K; d++) d_gate[d] = d_decay[d] += c->pair[d];
        }
        store_rows(m, c, d_rows, 0, m->dq + (token * G + g) * K, G * K, h % R > 0);
        store_rows(m, c, d_keys, 1, m->dk + (token * G + g) * K, G * K, h % R > 0);
    }
}

static void rule_backward_piece(void *job, long index) {
    Rule *m = job;
    long G = m->key_heads, R = m->heads / G, columns = wide_columns(m->value_width);
    long own = rounded_up(m->width * columns, 16) + 2 * rounded_up(CHUNK * columns, 16) +
               3 * rounded_up(CHUNK * m->width, 16) + rounded_up(m->width, 16);
    float *scratch = scratch_for(&m->no_memory, chunk_floats(m) + own), *from = scratch;
    if (!scratch) return;
    Chunk c;
    place(m, &c, &from);
    for (long r = 0; r < R; r++) rule_backward_head(m, &c, from, index / G, index % G * R + r);
    free(scratch);
}

/* strides: of q, k, v, decay and beta over batch rows, tokens and heads. sizes: S, T, H, G, K, V, per channel,
 * normalised. */
static Rule rule_job(const float *q, const float *k, const float *v, const float *decay, const float *beta,
                     const long *strides, const int64_t *sequence, const long *sizes, float scale, float *states,
                     float *errors) {
    return (Rule){.q = {q, strides[0], strides[1], strides[2]},
                  .k = {k, strides[3], strides[4], strides[5]},
                  .v = {v, strides[6], strides[7], strides[8]},
                  .decay = {decay, strides[9], strides[10], strides[11]},
                  .beta = {beta, strides[12], strides[13], strides[14]},
                  .sequence = sequence,
                  .tokens = sizes[1],
                  .heads = sizes[2],
                  .key_heads = sizes[3],
                  .width = sizes[4],
                  .value_width = sizes[5],
                  .per_channel = (int)sizes[6],
                  .normalize = (int)sizes[7],
                  .scale = scale,
                  .states = states,
                  .errors = errors};
}

/* Returns 0 or an error. */
long rule_forward(const float *q, const float *k, const float *v, const float *decay, const float *beta,
                  const long *strides, const int64_t *sequence, const long *sizes, float scale, float *states,
                  float *errors, const float *initial, float *final, float *o, int threads) {
    Rule job = rule_job(q, k, v, decay, beta, strides, sequence, sizes, scale, states, errors);
    job.initial = initial, job.final = final, job.o = o;
    in_pieces(rule_forward_piece, &job, sizes[0] * job.heads, threads);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}

long rule_backward(const float *q, const float *k, const float *v, const float *decay, const float *beta,
                   const long *strides, const int64_t *sequence, const long *sizes, float scale, float *states,
                   float *errors, const float *d_o, const float *d_final, float *dq, float *dk, float *dv,
                   float *d_decay, float *d_beta, float *d_initial, int threads) {
    Rule job = rule_job(q, k, v, decay, beta, strides, sequence, sizes, scale, states, errors);
    job.d_o = d_o, job.d_final = d_final, job.d_initial = d_initial;
    job.dq = dq, job.dk = dk, job.dv = dv, job.d_decay = d_decay, job.d_beta = d_beta;
    in_pieces(rule_backward_piece, &job, sizes[0] * job.key_heads, threads);
    return atomic_load(&job.no_memory) ? NO_MEMORY : 0;
}
