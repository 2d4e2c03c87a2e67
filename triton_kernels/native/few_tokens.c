/* Few tokens on a CPU: what a decode step computes between its memory reads, one call per part of a layer.
 *
 * At one token a layer of a small model takes microseconds, and an operator of a framework as long as that, so the
 * parts are whole here: the experts of a layer, its attention with norms, rotation and cache, a router's decision. All
 * reduce in a fixed order that does not depend on the number of threads, sums are fp32, and a NaN stays one.
 *
 * Everything is row-major and dense unless a stride says otherwise. Legend: T tokens (or sequences), D model width, E
 * experts, F expert width, K slots per token or width of a head, H query heads, G key/value heads, S rows of a cache.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { MOST_ROWS = 8, NO_MEMORY = -1, OUT_OF_RANGE = -2 };

/* ---- A second core, without waiting for it ---- */

/* Pieces of a job are taken from a counter by whoever is free. A helper that the machine has given to someone else
 * takes none, and the caller computes them itself; it waits for pieces that are under way, and for nothing else. After
 * a fork there are no helpers: the same. */

typedef void (*Piece)(void *job, long index);

static struct {
    pthread_mutex_t caller, lock;
    pthread_cond_t posted;
    atomic_long generation, next, running;
    long pieces;
    Piece run;
    void *job;
    int helpers;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .posted = PTHREAD_COND_INITIALIZER};

static void start_anew(void) {
    pthread_mutex_init(&pool.caller, NULL), pthread_mutex_init(&pool.lock, NULL), pthread_cond_init(&pool.posted, NULL);
    atomic_store(&pool.running, 0);
    pool.pieces = 0, pool.helpers = 0;
}

/* About 30 microseconds: the parts of a layer follow each other more closely than that. */
enum { SPINS = 2000 };

static void breathe(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_pieces(Piece run, void *job, long pieces) {
    /* Whoever comes too late must not touch the counter: it may be the next job's already. */
    if (pieces == 0) return;
    for (long i; (i = atomic_fetch_add(&pool.next, 1)) < pieces;) run(job, i);
}

static void *help(void *unused) {
    long seen = 0;
    (void)unused;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.generation) == seen; spin++) breathe();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.posted, &pool.lock);
        seen = atomic_load(&pool.generation);
        Piece run = pool.run;
        void *job = pool.job;
        long pieces = pool.pieces;
        atomic_fetch_add(&pool.running, 1);
        pthread_mutex_unlock(&pool.lock);
        take_pieces(run, job, pieces);
        atomic_fetch_sub(&pool.running, 1);
    }
    return NULL;
}

static void in_pieces(Piece run, void *job, long pieces, int threads) {
    /* One job at a time: another thread of the program that comes meanwhile works alone. */
    if (threads < 2 || pieces < 2 || pthread_mutex_trylock(&pool.caller)) {
        for (long i = 0; i < pieces; i++) run(job, i);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    if (pool.helpers == 0) pthread_atfork(NULL, NULL, start_anew);
    while (pool.helpers < threads - 1) {
        pthread_t thread;
        pool.helpers++;
        if (pthread_create(&thread, NULL, help, NULL) == 0) pthread_detach(thread);
    }
    pool.run = run, pool.job = job, pool.pieces = pieces;
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.posted);
    pthread_mutex_unlock(&pool.lock);
    take_pieces(run, job, pieces);
    /* The lock keeps a helper from joining between the look and the next job. */
    for (;;) {
        pthread_mutex_lock(&pool.lock);
        long running = atomic_load(&pool.running);
        if (running == 0) pool.pieces = 0;
        pthread_mutex_unlock(&pool.lock);
        if (running == 0) break;
        breathe();
    }
    pthread_mutex_unlock(&pool.caller);
}

/* ---- Numbers ---- */

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* To the nearest, ties to even; a NaN stays one. */
static inline uint16_t to_bf16(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Sums and maxima run in so many lanes, which compilers make vectors of without being allowed to reorder anything. */
enum { LANES = 16 };

#if defined(__AVX512F__)
/* Of a register's elements those that n are left of. */
static inline __mmask16 first_of(long n) { return n >= LANES ? 0xffff : n > 0 ? (__mmask16)((1 << n) - 1) : 0; }
#endif

/* exp in fp32 to 2 units in the last place, in a form that loops over arrays become vectors of. */
static inline float exp_fp32(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = nearbyintf(bounded * 1.44269504089f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    float y = p * scale;
    return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : x != x ? x : y;
}

#if defined(__AVX512DQ__)
static const float LOG2_E = 1.44269504089f;

/* exp(x - zero) to 1.5e-7 of it, by `scaled_zero(zero)`, of the elements in `there`, 0 of the others: 2^floor is an
 * instruction, and a polynomial of the least relative error on [0, 1] does the rest. A NaN stays one. */
static inline __m512 exp_lanes(__m512 x, __m512 zero, __mmask16 there) {
    x = _mm512_fmsub_ps(x, _mm512_set1_ps(LOG2_E), zero);
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = r * 1.867140294e-3f + 9.017007425e-3f;
    p = p * r + 5.579993129e-2f;
    p = p * r + 2.401644439e-1f;
    p = p * r + 6.931512952e-1f;
    return _mm512_maskz_scalef_ps(there, p * r + 1.0f, x);
}
static inline __m512 scaled_zero(float zero) { return _mm512_set1_ps(zero * LOG2_E); }
#endif

/* x[i] = exp(x[i] - zero). */
static void exp_all(float *x, long n, float zero) {
    long i = 0;
#if defined(__AVX512DQ__)
    for (; i < n; i += LANES) {
        __mmask16 there = first_of(n - i);
        _mm512_mask_storeu_ps(x + i, there, exp_lanes(_mm512_maskz_loadu_ps(there, x + i), scaled_zero(zero), there));
    }
#endif
    for (; i < n; i++) x[i] = exp_fp32(x[i] - zero);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_fp32(-x)); }
static inline float silu(float x) { return x * sigmoid(x); }

static inline float sum_lanes(float *lane) {
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
}

/* Vectors as gcc and clang have them on every processor; a wider sum than its registers becomes two. */
typedef float Vector __attribute__((vector_size(32)));
enum { WIDE = 8, SUMS = 4 };

static inline Vector load(const float *x) {
    Vector v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline float sum_wide(Vector v) {
    float x[WIDE];
    memcpy(x, &v, sizeof x);
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/* In several sums at a time: each waits for what was added to it before. */
static inline float dot(const float *a, const float *b, long n) {
    Vector sum[SUMS] = {0};
    long i = 0;
    for (; i + SUMS * WIDE <= n; i += SUMS * WIDE)
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++) sum[j] += load(a + i + j * WIDE) * load(b + i + j * WIDE);
    for (; i + WIDE <= n; i += WIDE) sum[0] += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum_wide((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

static float sum_of(const float *x, long n) {
    float lane[LANES] = {0};
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j];
    for (int j = 0; i < n; i++, j++) lane[j] += x[i];
    return sum_lanes(lane);
}

/* Of the numbers among them: a NaN shows in what is computed from it. */
static float most_of(const float *x, long n) {
#if defined(__AVX512F__)
    __m512 so_far[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    long i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) so_far[j] = _mm512_max_ps(_mm512_loadu_ps(x + i + j * LANES), so_far[j]);
    for (; i < n; i += LANES)
        so_far[0] =
            _mm512_mask_max_ps(so_far[0], first_of(n - i), _mm512_maskz_loadu_ps(first_of(n - i), x + i), so_far[0]);
    return _mm512_reduce_max_ps(_mm512_max_ps(so_far[0], so_far[1]));
#else
    float lane[LANES], most = -INFINITY;
    for (int j = 0; j < LANES; j++) lane[j] = -INFINITY;
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (int j = 0; i < n; i++, j++) lane[j] = x[i] > lane[j] ? x[i] : lane[j];
    for (int j = 0; j < LANES; j++) most = lane[j] > most ? lane[j] : most;
    return most;
#endif
}

static float inverse_rms(const float *x, long n, float eps) { return 1.0f / sqrtf(dot(x, x, n) / (float)n + eps); }

/* ---- x / rms(x) * weight over rows ---- */

void rms_norm(const float *x, const float *weight, float *y, long rows, long width, float eps) {
    for (long r = 0; r < rows; r++, x += width, y += width) {
        float scale = inverse_rms(x, width, eps);
        for (long i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    }
}

/* ---- y[T, O] = x[T, I] weight[O, I]^T, with a stride between rows of x ---- */

#include "kept_weights.c"

typedef struct {
    const float *x;
    Weight weight;
    float *y;
    long x_stride, rows, in, out;
} Linear;

enum { OUTPUTS = 64 };

static void linear_piece(void *job, long index) {
    Linear *l = job;
    long first = index * OUTPUTS, last = first + OUTPUTS < l->out ? first + OUTPUTS : l->out;
    if (l->weight.panels) {
        const float *x[l->rows];
        float *y[l->rows];
        for (long r = 0; r < l->rows; r++) x[r] = l->x + r * l->x_stride, y[r] = l->y + r * l->out;
        rows_times_panels(l->rows, x, y, l->weight.panels, l->in, first, last);
        return;
    }
    for (long o = first; o < last; o++)
        for (long r = 0; r < l->rows; r++)
            l->y[r * l->out + o] = dot(l->x + r * l->x_stride, l->weight.wide + o * l->in, l->in);
}

static void linear_of(const float *x, long x_stride, Weight weight, float *y, long rows, long in, long out,
                      int threads) {
    Linear job = {x, weight, y, x_stride, rows, in, out};
    in_pieces(linear_piece, &job, (out + OUTPUTS - 1) / OUTPUTS, out * in < 65536 ? 1 : threads);
}

void linear(const float *x, long x_stride, const float *weight, float *y, long rows, long in, long out, int threads) {
    linear_of(x, x_stride, (Weight){weight, NULL}, y, rows, in, out, threads);
}

/* ---- Experts ---- */

/* y[t] = sum over the kept slots of t of weight * down[e]^T (silu(gate) * up), (gate | up) = gate_up[e]^T x[t]. Each
 * expert's weights are read once, where they lie, for all of its tokens. */

/* y[n][O] = x[n][I] w[I][O], n rows of x at x[r], of y at y[r]. */
static void rows_times(long n, const float *const *x, float *const *y, const float *w, long in, long out) {
    for (long r = 0; r < n; r++) memset(y[r], 0, (size_t)out * sizeof(float));
    /* Row by row: weights come from memory in the order in which they lie, a third faster than eight rows at a time. */
    for (long i = 0; i < in; i++, w += out)
        for (long r = 0; r < n; r++) {
            float x0 = x[r][i], *restrict yr = y[r];
            for (long o = 0; o < out; o++) yr[o] += x0 * w[o];
        }
}

#include "packed.c"

typedef struct {
    const float *x, *weight;
    Matrices gate_up, down;
    const int64_t *token;
    const long *piece;   /* expert, first row, rows of each piece */
    float *hidden, *out; /* of each row: [N, 2 F] and [N, D] */
    long d_model, d_expert;
} Experts;

static void experts_piece(void *job, long index) {
    Experts *m = job;
    long D = m->d_model, F = m->d_expert, e = m->piece[3 * index], first = m->piece[3 * index + 1];
    long n = m->piece[3 * index + 2];
    const float *x[MOST_ROWS];
    float *hidden[MOST_ROWS], *out[MOST_ROWS];
    for (long r = 0; r < n; r++) {
        x[r] = m->x + m->token[first + r] * D;
        hidden[r] = m->hidden + (first + r) * 2 * F;
        out[r] = m->out + (first + r) * D;
    }
    matrix_times(n, x, hidden, &m->gate_up, e, D, 2 * F);
    for (long r = 0; r < n; r++) {
        float *restrict gate = hidden[r], weight = m->weight[first + r];
        const float *restrict up = gate + F;
        for (long f = 0; f < F; f++) gate[f] = silu(gate[f]) * up[f] * weight;
    }
    matrix_times(n, (const float *const *)hidden, out, &m->down, e, F, D);
}

/* Whether n + 1 offsets start at 0 and never fall, nor exceed `most`. */
static int rising(const int64_t *offsets, long n, long most) {
    int fits = offsets[0] == 0 && offsets[n] <= most;
    for (long i = 0; i < n; i++) fits &= offsets[i] <= offsets[i + 1];
    return fits;
}

static long experts_of(const float *x, Matrices gate_up, Matrices down, const int64_t *token, const float *weight,
                       const int64_t *expert_offsets, const int64_t *token_offsets, const int64_t *row_of_slot,
                       float *y, long tokens, long most_rows, long n_experts, long d_model, long d_expert,
                       int threads) {
    long rows = expert_offsets[n_experts], pieces = 0;
    /* Whoever gives rows of their own making reads an error, not somebody else's memory. */
    if (!rising(expert_offsets, n_experts, most_rows) || !rising(token_offsets, tokens, rows) ||
        token_offsets[tokens] != rows)
        return OUT_OF_RANGE;
    for (long row = 0; row < rows; row++)
        if (token[row] < 0 || token[row] >= tokens || row_of_slot[row] < 0 || row_of_slot[row] >= rows)
            return OUT_OF_RANGE;
    long *piece = malloc((size_t)(3 * rows + 1) * sizeof(long));
    float *hidden = malloc((size_t)(rows * (2 * d_expert + d_model) + 1) * sizeof(float));
    if (!piece || !hidden) {
        free(piece), free(hidden);
        return NO_MEMORY;
    }
    for (long e = 0; e < n_experts; e++)
        for (long first = expert_offsets[e], last = expert_offsets[e + 1]; first < last; first += MOST_ROWS, pieces++) {
            piece[3 * pieces] = e, piece[3 * pieces + 1] = first;
            piece[3 * pieces + 2] = last - first < MOST_ROWS ? last - first : MOST_ROWS;
        }
    Experts job = {x, weight, gate_up, down, token, piece, hidden, hidden + rows * 2 * d_expert, d_model, d_expert};
    in_pieces(experts_piece, &job, pieces, threads);
    memset(y, 0, (size_t)(tokens * d_model) * sizeof(float));
    for (long t = 0; t < tokens; t++, y += d_model)
        for (long slot = token_offsets[t]; slot < token_offsets[t + 1]; slot++) {
            const float *restrict out = job.out + row_of_slot[slot] * d_model;
            for (long d = 0; d < d_model; d++) y[d] += out[d];
        }
    free(piece), free(hidden);
    return 0;
}

long experts(const float *x, const float *gate_up, const float *down, const int64_t *token, const float *weight,
             const int64_t *expert_offsets, const int64_t *token_offsets, const int64_t *row_of_slot, float *y,
             long tokens, long most_rows, long n_experts, long d_model, long d_expert, int threads) {
    Matrices wide_gate_up = {.codes = gate_up, .bits = 32}, wide_down = {.codes = down, .bits = 32};
    return experts_of(x, wide_gate_up, wide_down, token, weight, expert_offsets, token_offsets, row_of_slot, y, tokens,
                      most_rows, n_experts, d_model, d_expert, threads);
}

/* The same of packed weights; an `offset` may be NULL, of 16 bits a `scale` too. */
long packed_experts(const float *x, const void *gate_up, const uint16_t *gate_up_scale, const uint16_t *gate_up_offset,
                    const void *down, const uint16_t *down_scale, const uint16_t *down_offset, const int64_t *token,
                    const float *weight, const int64_t *expert_offsets, const int64_t *token_offsets,
                    const int64_t *row_of_slot, float *y, long tokens, long most_rows, long n_experts, long d_model,
                    long d_expert, long bits, long group, int threads) {
    Matrices packed_gate_up = {gate_up, gate_up_scale, gate_up_offset, bits, group, NULL};
    Matrices packed_down = {down, down_scale, down_offset, bits, group, NULL};
    return experts_of(x, packed_gate_up, packed_down, token, weight, expert_offsets, token_offsets, row_of_slot, y,
                      tokens, most_rows, n_experts, d_model, d_expert, threads);
}

/* ---- One token of a delta-rule layer (gated DeltaNet, KDA), as delta_decode describes it ---- */

typedef struct {
    const float *qkv, *gate, *a, *b; /* with a stride between sequences: parts of one projection */
    long qkv_stride, gate_stride, a_stride, b_stride;
    const float *conv, *A_log, *dt_bias, *norm;
    float *state;
    void *tail;
    int bf16_tail, per_channel, use_silu;
    float eps;
    long heads, key, value, taps;
    float *y;
} Delta;

static float tail_at(const Delta *d, long i) {
    return d->bf16_tail ? from_bf16(((uint16_t *)d->tail)[i]) : ((float *)d->tail)[i];
}
static void set_tail(const Delta *d, long i, float x) {
    if (d->bf16_tail) ((uint16_t *)d->tail)[i] = to_bf16(x);
    else ((float *)d->tail)[i] = x;
}

/* SiLU of the convolution of `n` channels from `channel` on, whose tails move on by one token. */
static void convolved(const Delta *d, long b, long channel, long n, float *y) {
    long channels = d->heads * (2 * d->key + d->value), taps = d->taps;
    for (long i = 0; i < n; i++) {
        long c = channel + i, at = (b * channels + c) * (taps - 1);
        float x = d->qkv[b * d->qkv_stride + c], sum = x * d->conv[c * taps + taps - 1];
        for (long w = 0; w < taps - 1; w++) sum += tail_at(d, at + w) * d->conv[c * taps + w];
        for (long w = 0; w + 2 < taps; w++) set_tail(d, at + w, tail_at(d, at + w + 1));
        set_tail(d, at + taps - 2, x);
        y[i] = sum;
    }
    for (long i = 0; i < n; i++) y[i] = silu(y[i]);
}

/* log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), whose logarithm is 2 artanh(e / (2 + e)): a short series, in a form that
 * loops become vectors of. */
static inline float softplus(float x) {
    float e = exp_fp32(-fabsf(x)), s = e / (2.0f + e), square = s * s;
    float series = 1.0f / 13.0f;
    series = series * square + 1.0f / 11.0f;
    series = series * square + 1.0f / 9.0f;
    series = series * square + 1.0f / 7.0f;
    series = series * square + 1.0f / 5.0f;
    series = series * square + 1.0f / 3.0f;
    return (x > 0.0f ? x : 0.0f) + 2.0f * s * (series * square + 1.0f);
}

static void delta_piece(void *job, long index) {
    const Delta *d = job;
    long b = index / d->heads, h = index % d->heads, K = d->key, V = d->value;
    float q[K], k[K], decay[K], v[V], delta[V], o[V], *state = d->state + index * K * V;
    convolved(d, b, h * K, K, q);
    convolved(d, b, (d->heads + h) * K, K, k);
    convolved(d, b, 2 * d->heads * K + h * V, V, v);
    float q_scale = 1.0f / sqrtf(dot(q, q, K) + 1e-6f) / sqrtf((float)K), k_scale = 1.0f / sqrtf(dot(k, k, K) + 1e-6f);
    for (long i = 0; i < K; i++) {
        long c = d->per_channel ? h * K + i : h;
        q[i] *= q_scale, k[i] *= k_scale;
        decay[i] = i && !d->per_channel
                       ? decay[0]
                       : expf(-expf(d->A_log[h]) * softplus(d->a[b * d->a_stride + c] + d->dt_bias[c]));
    }
    float beta = sigmoid(d->b[b * d->b_stride + h]);
    memset(delta, 0, sizeof delta), memset(o, 0, sizeof o);
    for (long i = 0; i < K; i++)
        for (long j = 0; j < V; j++) {
            state[i * V + j] *= decay[i];
            delta[j] += k[i] * state[i * V + j];
        }
    for (long j = 0; j < V; j++) delta[j] = beta * (v[j] - delta[j]);
    for (long i = 0; i < K; i++)
        for (long j = 0; j < V; j++) {
            state[i * V + j] += k[i] * delta[j];
            o[j] += q[i] * state[i * V + j];
        }
    const float *gate = d->gate + b * d->gate_stride + h * V;
    float scale = inverse_rms(o, V, d->eps), *y = d->y + index * V;
    for (long j = 0; j < V; j++) y[j] = o[j] * scale * d->norm[j] * (d->use_silu ? silu(gate[j]) : sigmoid(gate[j]));
}

void delta_decode(const float *qkv, const float *gate, const float *a, const float *b, long qkv_stride,
                  long gate_stride, long a_stride, long b_stride, const float *conv, const float *A_log,
                  const float *dt_bias, const float *norm, float *state, void *tail, int bf16_tail, int per_channel,
                  int use_silu, float eps, long batch, long heads, long key, long value, long taps, float *y,
                  int threads) {
    Delta job = {qkv,      gate,  a,       b,    qkv_stride, gate_stride, a_stride,  b_stride,
                 conv,     A_log, dt_bias, norm, state,      tail,        bf16_tail, per_channel,
                 use_silu, eps,   heads,   key,  value,      taps,        y};
    in_pieces(delta_piece, &job, batch * heads, batch * heads * key * value < 65536 ? 1 : threads);
}

/* ---- One token of a lightning layer's heads: q, k, v = silu(x); S <- e^g S + k v^T; o = S^T q ---- */

void lightning_decode(const float *qkv, long stride, const float *log_decay, float *state, float *o, long batch,
                      long heads, long key, long value) {
    for (long index = 0; index < batch * heads; index++, state += key * value, o += value) {
        long b = index / heads, h = index % heads;
        const float *x = qkv + b * stride;
        float decay = expf(log_decay[h]), v[value];
        for (long j = 0; j < value; j++) v[j] = silu(x[2 * heads * key + h * value + j]), o[j] = 0;
        for (long i = 0; i < key; i++) {
            float q = silu(x[h * key + i]), k = silu(x[(heads + h) * key + i]);
            for (long j = 0; j < value; j++) {
                state[i * value + j] = decay * state[i * value + j] + k * v[j];
                o[j] += q * state[i * value + j];
            }
        }
    }
}
