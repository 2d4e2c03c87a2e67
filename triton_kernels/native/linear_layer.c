/* What stands around the chunked rule in a linear-attention layer on a CPU, with gradients: the short causal
 * convolution with its SiLU, and the RMSNorm of a head's output times an activated gate.
 *
 * Pieces of a job are blocks of rows or channels of one size; what is summed over rows is summed within a block, then
 * block by block in their order. Legend as in few_tokens.c, and: X channels, W taps, R = W - 1 inputs before the first.
 */

/* ---- y[t] = act(bias + sum over w of weight[w] x[t - R + w]) ---- */

enum { CONV_ROWS = 128, CONV_CHANNELS = 1024, CONV_TAPS = 8 };

typedef struct {
    const float *x, *tail, *weight, *bias, *dy; /* tail [B, R, X], weight [W, X]; bias NULL for none */
    long batch, token;                          /* strides of x */
    long rows, tokens, channels, taps;
    int silu;
    float *y, *dx, *d_tail, *d_weight; /* dense; d_weight [pieces, W + 1, X], the last row the bias's */
} Convolution;

static const float *conv_input(const Convolution *m, long b, long t) {
    long R = m->taps - 1;
    return t < 0 ? m->tail + (b * R + R + t) * m->channels : m->x + b * m->batch + t * m->token;
}

/* n channels from `first` on of the sum for token t. */
static inline __attribute__((always_inline)) void convolve(const Convolution *m, long b, long t, long first, long n,
                                                           const int taps, float *restrict z) {
    const float *x[CONV_TAPS], *weight = m->weight + first, *bias = m->bias ? m->bias + first : NULL;
    for (int w = 0; w < taps; w++) x[w] = conv_input(m, b, t - taps + 1 + w) + first;
    for (long i = 0; i < n; i++) {
        float sum = bias ? bias[i] : 0.0f;
#pragma GCC unroll 8
        for (int w = 0; w < taps; w++) sum += weight[w * m->channels + i] * x[w][i];
        z[i] = sum;
    }
}

static void convolve_any(const Convolution *m, long b, long t, long first, long n, float *z) {
    if (m->taps == 4) convolve(m, b, t, first, n, 4, z);
    else convolve(m, b, t, first, n, (int)m->taps, z);
}

static void conv_forward_piece(void *job, long index) {
    Convolution *m = job;
    long blocks = (m->tokens + CONV_ROWS - 1) / CONV_ROWS, b = index / blocks, first = index % blocks * CONV_ROWS;
    long last = first + CONV_ROWS < m->tokens ? first + CONV_ROWS : m->tokens;
    for (long t = first; t < last; t++) {
        float *restrict y = m->y + (b * m->tokens + t) * m->channels;
        convolve_any(m, b, t, 0, m->channels, y);
        if (m->silu)
            for (long i = 0; i < m->channels; i++) y[i] = silu(y[i]);
    }
}

/* strides: of x over batch rows and tokens. sizes: B, T, X, W, silu. */
void conv_forward(const float *x, const float *tail, const float *weight, const float *bias, const long *strides,
                  const long *sizes, float *y, int threads) {
    Convolution job = {.x = x, .tail = tail, .weight = weight, .bias = bias, .batch = strides[0], .token = strides[1]};
    job.rows = sizes[0], job.tokens = sizes[1], job.channels = sizes[2], job.taps = sizes[3], job.silu = (int)sizes[4];
    job.y = y;
    in_pieces(conv_forward_piece, &job, job.rows * ((job.tokens + CONV_ROWS - 1) / CONV_ROWS), threads);
}

/* From the gradient of the sum of token t to those of its inputs' weights, and from those of the W tokens from t on to
 * input t's. */
static inline __attribute__((always_inline)) void spread(const Convolution *m, long b, long t, long first, long n,
                                                         const int taps, float (*ring)[CONV_CHANNELS],
                                                         float (*sum)[CONV_CHANNELS], float *dx) {
    const float *x[CONV_TAPS], *later[CONV_TAPS], *weight = m->weight + first;
    long X = m->channels;
    for (int w = 0; w < taps; w++) later[w] = ring[(t + 2 * taps - 1 - w) % taps];
#pragma GCC ivdep
    for (long i = 0; i < n; i++) {
        float all = 0;
#pragma GCC unroll 8
        for (int w = taps - 1; w >= 0; w--) all += weight[w * X + i] * later[w][i];
        dx[i] = all;
    }
    if (t < 0) return;
    for (int w = 0; w < taps; w++) x[w] = conv_input(m, b, t - taps + 1 + w) + first;
    const float *dz = later[taps - 1];
#pragma GCC ivdep
    for (long i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (int w = 0; w < taps; w++) sum[w][i] += dz[i] * x[w][i];
        sum[taps][i] += dz[i];
    }
}

/* Some channels of a block of tokens, from the last one on, whose followers' sums count as well: the gradients of the
 * sums of the W tokens from the current one on are at hand, in a ring. */
static void conv_backward_channels(const Convolution *m, long b, long start, long end, long first, long n,
                                   float *d_weight) {
    long X = m->channels, W = m->taps, T = m->tokens;
    float ring[CONV_TAPS][CONV_CHANNELS] = {{0}}, sum[CONV_TAPS + 1][CONV_CHANNELS];
    memset(sum, 0, sizeof sum);
    for (long t = (end + W - 1 < T ? end + W - 1 : T) - 1; t >= (start ? start : 1 - W); t--) {
        float *dz = ring[(t + W) % W];
        if (t < 0) memset(dz, 0, sizeof ring[0]);
        else {
            const float *restrict dy = m->dy + (b * T + t) * X + first;
            if (m->silu) {
                float z[CONV_CHANNELS];
                convolve_any(m, b, t, first, n, z);
                for (long i = 0; i < n; i++) {
                    float s = sigmoid(z[i]);
                    dz[i] = dy[i] * s * (1.0f + z[i] * (1.0f - s));
                }
            } else memcpy(dz, dy, (size_t)n * sizeof(float));
        }
        if (t >= end) continue;
        float *dx = t < 0 ? m->d_tail + (b * (W - 1) + W - 1 + t) * X + first : m->dx + (b * T + t) * X + first;
        if (W == 4) spread(m, b, t, first, n, 4, ring, sum, dx);
        else spread(m, b, t, first, n, (int)W, ring, sum, dx);
    }
    for (long w = 0; w <= W; w++) memcpy(d_weight + w * X + first, sum[w], (size_t)n * sizeof(float));
}

static void conv_backward_piece(void *job, long index) {
    Convolution *m = job;
    long X = m->channels, blocks = (m->tokens + CONV_ROWS - 1) / CONV_ROWS, start = index % blocks * CONV_ROWS;
    long end = start + CONV_ROWS < m->tokens ? start + CONV_ROWS : m->tokens;
    for (long first = 0; first < X; first += CONV_CHANNELS)
        conv_backward_channels(m, index / blocks, start, end, first,
                               X - first < CONV_CHANNELS ? X - first : CONV_CHANNELS,
                               m->d_weight + index * (m->taps + 1) * X);
}

/* d_weight: [B ceil(T / CONV_ROWS), W + 1, X]; its first W + 1 rows are the result. T is at least 1. */
void conv_backward(const float *x, const float *tail, const float *weight, const float *bias, const long *strides,
                   const long *sizes, const float *dy, float *dx, float *d_tail, float *d_weight, int threads) {
    Convolution job = {.x = x, .tail = tail, .weight = weight, .bias = bias, .batch = strides[0], .token = strides[1]};
    job.rows = sizes[0], job.tokens = sizes[1], job.channels = sizes[2], job.taps = sizes[3], job.silu = (int)sizes[4];
    job.dy = dy, job.dx = dx, job.d_tail = d_tail, job.d_weight = d_weight;
    long pieces = job.rows * ((job.tokens + CONV_ROWS - 1) / CONV_ROWS), size = (job.taps + 1) * job.channels;
    in_pieces(conv_backward_piece, &job, pieces, threads);
    for (long p = 1; p < pieces; p++)
        for (long i = 0; i < size; i++) d_weight[i] += d_weight[p * size + i];
}

/* ---- y = x / rms(x) * weight * act(gate) over rows ---- */

typedef struct {
    const float *x, *gate, *weight, *dy;
    long outer, inner; /* row r of the gate: r / heads * outer + r % heads * inner */
    long rows, heads, width;
    float eps;
    int silu;
    float *y, *dx, *d_gate, *d_weight; /* d_weight: [pieces, D] */
} GatedNorm;

static const float *gate_of(const GatedNorm *m, long r) {
    return m->gate + r / m->heads * m->outer + r % m->heads * m->inner;
}

static void gated_norm_piece(void *job, long index) {
    GatedNorm *m = job;
    long D = m->width, first = index * NORM_ROWS, last = first + NORM_ROWS < m->rows ? first + NORM_ROWS : m->rows;
    const float *restrict weight = m->weight;
    for (long r = first; r < last; r++) {
        const float *restrict x = m->x + r * D, *restrict gate = gate_of(m, r);
        float *restrict y = m->y + r * D, scale = inverse_rms(x, D, m->eps);
        if (m->silu)
            for (long i = 0; i < D; i++) y[i] = x[i] * scale * weight[i] * silu(gate[i]);
        else
            for (long i = 0; i < D; i++) y[i] = x[i] * scale * weight[i] * sigmoid(gate[i]);
    }
}

/* Of one row; what is left in dx is the gradient of the normalised row. */
static inline __attribute__((always_inline)) void gated_gradients(const float *restrict x, const float *restrict gate,
                                                                  const float *restrict weight,
                                                                  const float *restrict dy, float scale, long n,
                                                                  const int use_silu, float *restrict dx,
                                                                  float *restrict d_gate, float *restrict d_weight) {
    for (long i = 0; i < n; i++) {
        float open = sigmoid(gate[i]), normed = x[i] * scale, slope = open * (1.0f - open);
        float activated = use_silu ? gate[i] * open : open;
        slope = use_silu ? open + gate[i] * slope : slope;
        d_gate[i] = dy[i] * normed * weight[i] * slope;
        d_weight[i] += dy[i] * normed * activated;
        dx[i] = dy[i] * weight[i] * activated;
    }
}

static void gated_norm_gradient_piece(void *job, long index) {
    GatedNorm *m = job;
    long D = m->width, first = index * NORM_ROWS, last = first + NORM_ROWS < m->rows ? first + NORM_ROWS : m->rows;
    const float *restrict weight = m->weight;
    float *restrict d_weight = m->d_weight + index * D;
    memset(d_weight, 0, (size_t)D * sizeof(float));
    for (long r = first; r < last; r++) {
        const float *restrict x = m->x + r * D, *restrict gate = gate_of(m, r), *restrict dy = m->dy + r * D;
        float *restrict dx = m->dx + r * D, *restrict d_gate = m->d_gate + r * D, scale = inverse_rms(x, D, m->eps);
        if (m->silu) gated_gradients(x, gate, weight, dy, scale, D, 1, dx, d_gate, d_weight);
        else gated_gradients(x, gate, weight, dy, scale, D, 0, dx, d_gate, d_weight);
        float along = dot(dx, x, D) * scale * scale / (float)D;
        for (long i = 0; i < D; i++) dx[i] = scale * (dx[i] - x[i] * along);
    }
}

/* sizes: rows, heads, D, stride of heads' groups and of heads in the gate, silu. */
static GatedNorm gated_norm_job(const float *x, const float *gate, const float *weight, const long *sizes, float eps) {
    return (GatedNorm){.x = x,
                       .gate = gate,
                       .weight = weight,
                       .rows = sizes[0],
                       .heads = sizes[1],
                       .width = sizes[2],
                       .outer = sizes[3],
                       .inner = sizes[4],
                       .silu = (int)sizes[5],
                       .eps = eps};
}

void gated_norm(const float *x, const float *gate, const float *weight, const long *sizes, float eps, float *y,
                int threads) {
    GatedNorm job = gated_norm_job(x, gate, weight, sizes, eps);
    job.y = y;
    in_pieces(gated_norm_piece, &job, (job.rows + NORM_ROWS - 1) / NORM_ROWS, threads);
}

/* d_weight: [ceil(rows / NORM_ROWS), D]; its first row is the result. */
void gated_norm_backward(const float *x, const float *gate, const float *weight, const long *sizes, float eps,
                         const float *dy, float *dx, float *d_gate, float *d_weight, int threads) {
    GatedNorm job = gated_norm_job(x, gate, weight, sizes, eps);
    job.dy = dy, job.dx = dx, job.d_gate = d_gate, job.d_weight = d_weight;
    long pieces = (job.rows + NORM_ROWS - 1) / NORM_ROWS;
    in_pieces(gated_norm_gradient_piece, &job, pieces, threads);
    for (long p = 1; p < pieces; p++)
        for (long i = 0; i < job.width; i++) d_weight[i] += d_weight[p * job.width + i];
}
