/* A router on a CPU, from its logits to rows sorted by expert, with the gradient of the weights; for the tokens of a
 * decode step and for those of training alike. Legend as in few_tokens.c.
 */

/* Tokens of a piece. */
enum { ROUTED = 64 };
enum { TOP_K, TOP_P, THRESHOLD, RIVALS, PREDICTED };

/* ---- A decision, as router_scores describes it ---- */

/* What a policy decides by beside the experts' scores, see routing/policies/null_experts.py and difficulty_head.py. */
typedef struct {
    /* RIVALS: logits of null columns [T, Z]; what they compete by may have a bias each, or NULL. */
    const float *null_logits, *column_bias;
    long columns;
    int apart, null_weighs;
    /* PREDICTED: of each token the logarithm of a number of experts [T], and how soft an edge it makes. */
    const float *predicted;
    float softness;
    /* Multiplies what null columns weigh, and the logarithm of the edge. */
    float gain;
    float *returned; /* written: what chosen null columns weigh [T]; or NULL */
} Beside;

typedef struct {
    const float *logits, *bias;
    float threshold, *weight;
    int64_t *expert;
    uint8_t *keep;
    float *level, *scratch; /* scratch: [pieces, 5, E + Z] */
    long tokens, experts, k, floor;
    int rule, use_sigmoid, renormalise;
    const Beside *beside; /* NULL for rules that know nothing beside */
} Routes;

static float at_least_tiny(float sum) { return sum < 1.17549435e-38f ? 1.17549435e-38f : sum; }

/* An integer that is the larger the sooner an expert is taken: by its number, a NaN before all as in torch.topk, equal
 * ones in order. Maxima of integers have no branch to mistake. */
typedef int64_t Rank __attribute__((aligned(4), may_alias)); /* lies in scratch of floats */

static inline Rank rank_of(float number, long expert) {
    float positive_zero = number + 0.0f;
    int32_t bits;
    memcpy(&bits, &positive_zero, 4);
    bits = number != number ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
    return (Rank)((uint64_t)(uint32_t)bits << 32 | (uint32_t)(INT32_MAX - expert));
}

/* The largest rank below `last`; no two are alike. To strike out what was taken is slower: wide loads would wait for a
 * narrow store. */
static inline Rank next_rank(const Rank *rank, long n, Rank last) {
#if defined(__AVX512F__)
    __m512i bound = _mm512_set1_epi64(last), most = _mm512_set1_epi64(INT64_MIN);
    for (long e = 0; e < n; e += 8) {
        __mmask8 there = n - e >= 8 ? 0xff : (__mmask8)((1 << (n - e)) - 1);
        __m512i here = _mm512_maskz_loadu_epi64(there, rank + e);
        most = _mm512_mask_max_epi64(most, _mm512_mask_cmplt_epi64_mask(there, here, bound), here, most);
    }
    return _mm512_reduce_max_epi64(most);
#else
    Rank most = INT64_MIN;
    for (long e = 0; e < n; e++) most = rank[e] < last && rank[e] > most ? rank[e] : most;
    return most;
#endif
}

static inline long expert_of(Rank rank) { return INT32_MAX - (int64_t)(uint32_t)rank; }

static void softmax_of(const float *restrict logits, float *restrict mass, long n) {
    float most = most_of(logits, n);
    for (long e = 0; e < n; e++) mass[e] = exp_fp32(logits[e] - most);
    float total = sum_of(mass, n);
    for (long e = 0; e < n; e++) mass[e] /= total;
}

/* The scores of all columns of a token: one softmax, of which null columns that stand apart are no part. */
static void scores_with_null(const Routes *m, long t, float *restrict score, float *restrict null) {
    const Beside *beside = m->beside;
    long E = m->experts, Z = beside->columns;
    const float *logits = m->logits + t * E, *null_logits = beside->null_logits + t * Z;
    float most = most_of(logits, E), most_null = beside->apart ? most : most_of(null_logits, Z);
    most = most_null > most ? most_null : most;
    for (long e = 0; e < E; e++) score[e] = exp_fp32(logits[e] - most);
    for (long z = 0; z < Z; z++) null[z] = exp_fp32(null_logits[z] - most);
    float total = sum_of(score, E) + (beside->apart ? 0.0f : sum_of(null, Z));
    for (long e = 0; e < E; e++) score[e] = m->use_sigmoid ? sigmoid(logits[e]) : score[e] / total;
    for (long z = 0; z < Z; z++) null[z] = m->use_sigmoid ? sigmoid(null_logits[z]) : null[z] / total;
}

/* The best `rivals` null columns, best first: what they weigh, and what they compete by. */
static void best_null(const Beside *beside, long rivals, const float *null, Rank *rank, float *weighs, float *by) {
    for (long z = 0; z < beside->columns; z++)
        rank[z] = rank_of(beside->column_bias ? null[z] + beside->column_bias[z] : null[z], z);
    for (long j = 0; j < rivals; j++) {
        long best = 0;
        for (long z = 1; z < beside->columns; z++) best = rank[z] > rank[best] ? z : best;
        rank[best] = INT64_MIN;
        weighs[j] = null[best], by[j] = beside->column_bias ? null[best] + beside->column_bias[best] : null[best];
    }
}

/* How far a slot is inside of a predicted number: sigmoid(margin / softness), to the power of the gain. */
static float edge_of(const Beside *beside, float margin) {
    float x = margin / beside->softness;
    if (beside->gain == 1.0f) return sigmoid(x);
    return exp_fp32(beside->gain * ((x < 0 ? x : 0.0f) - log1pf(expf(-fabsf(x)))));
}

static void route_token(const Routes *m, long t, float *scratch) {
    const Beside *beside = m->beside;
    long E = m->experts, k = m->k, Z = m->rule == RIVALS ? beside->columns : 0, rivals = k < Z ? k : Z, kept = 0;
    Rank *rank = (Rank *)scratch, *null_rank = rank + E, last = INT64_MAX;
    float *score = (float *)(null_rank + Z), *selection = score + E, *mass = selection + E;
    float *null = mass + E, *weighs = null + Z, *rival = weighs + Z;
    const float *logits = m->logits + t * E;
    int64_t *expert = m->expert + t * k;
    float *weight = m->weight + t * k, *level = m->level + t * k, ahead = 0, sum = 0, rest = 0;
    uint8_t *keep = m->keep + t * k;
    if (Z) {
        scores_with_null(m, t, score, null);
        best_null(beside, rivals, null, null_rank, weighs, rival);
    } else {
        softmax_of(logits, mass, E);
        for (long e = 0; e < E; e++) score[e] = m->use_sigmoid ? sigmoid(logits[e]) : mass[e];
    }
    for (long e = 0; e < E; e++) selection[e] = score[e] + m->bias[e];
    for (long e = 0; e < E; e++) rank[e] = rank_of(selection[e], e);
    for (long slot = 0; slot < k; slot++) {
        last = next_rank(rank, E, last);
        long best = expert[slot] = expert_of(last);
        float here = -selection[best], weighing = score[best];
        if (m->rule == TOP_P) here = ahead;
        else if (m->rule == RIVALS) here = k - slot > rivals ? -INFINITY : rival[k - slot - 1] - selection[best];
        else if (m->rule == PREDICTED) {
            here = logf((float)(slot + 1)) - beside->predicted[t];
            weighing *= edge_of(beside, m->threshold - here);
        }
        level[slot] = slot < m->floor || m->rule == TOP_K ? -INFINITY : here;
        keep[slot] = !(level[slot] > m->threshold);
        weight[slot] = selection[best] != selection[best] ? NAN : keep[slot] ? weighing : 0.0f;
        if (m->rule == TOP_P) ahead += mass[best];
        sum += weight[slot], kept += keep[slot];
    }
    /* Null columns fill the slots that real experts leave. */
    for (long j = 0; Z && beside->null_weighs && j < rivals && j < k - kept; j++) rest += weighs[j] * beside->gain;
    float by = m->renormalise ? at_least_tiny(sum + rest) : 1.0f;
    for (long slot = 0; slot < k; slot++) weight[slot] /= by;
    if (Z && beside->returned) beside->returned[t] = rest / by;
}

/* Floats of scratch, of so many columns of experts and null ones. */
static long routing_scratch(long tokens, long columns) { return (tokens + ROUTED - 1) / ROUTED * 5 * columns; }

static void route_piece(void *job, long index) {
    Routes *m = job;
    long columns = m->experts + (m->rule == RIVALS ? m->beside->columns : 0);
    for (long t = index * ROUTED; t < m->tokens && t < (index + 1) * ROUTED; t++)
        route_token(m, t, m->scratch + index * 5 * columns);
}

static void route_beside(const float *logits, const float *bias, float threshold, float *weight, int64_t *expert,
                         uint8_t *keep, float *level, float *scratch, long tokens, long experts, long k, long floor,
                         int rule, int use_sigmoid, int renormalise, const Beside *beside, int threads) {
    Routes job = {logits, bias,    threshold, weight, expert, keep,        level,       scratch,
                  tokens, experts, k,         floor,  rule,   use_sigmoid, renormalise, beside};
    in_pieces(route_piece, &job, (tokens + ROUTED - 1) / ROUTED, threads);
}

void route(const float *logits, const float *bias, float threshold, float *weight, int64_t *expert, uint8_t *keep,
           float *level, float *scratch, long tokens, long experts, long k, long floor, int rule, int use_sigmoid,
           int renormalise, int threads) {
    route_beside(logits, bias, threshold, weight, expert, keep, level, scratch, tokens, experts, k, floor, rule,
                 use_sigmoid, renormalise, NULL, threads);
}

/* ---- Its gradient: of the kept slots' weights with respect to all logits ---- */

typedef struct {
    const float *d_weight, *logits;
    const int64_t *expert;
    const uint8_t *keep;
    float *d_logits, *scratch; /* scratch: [pieces, E] */
    long tokens, experts, k;
    int use_sigmoid, renormalise;
} RouteGradient;

static void route_gradient_piece(void *job, long index) {
    RouteGradient *m = job;
    long E = m->experts, k = m->k;
    float *restrict score = m->scratch + index * E;
    for (long t = index * ROUTED; t < m->tokens && t < (index + 1) * ROUTED; t++) {
        const float *logits = m->logits + t * E, *d_weight = m->d_weight + t * k;
        const int64_t *expert = m->expert + t * k;
        const uint8_t *keep = m->keep + t * k;
        float *restrict d_logits = m->d_logits + t * E, sum = 0, along = 0, spread = 0;
        if (!m->use_sigmoid) softmax_of(logits, score, E);
        else
            for (long e = 0; e < E; e++) score[e] = sigmoid(logits[e]);
        memset(d_logits, 0, (size_t)E * sizeof(float));
        for (long slot = 0; slot < k; slot++)
            if (keep[slot]) sum += score[expert[slot]], along += d_weight[slot] * score[expert[slot]];
        float by = m->renormalise ? 1.0f / at_least_tiny(sum) : 1.0f;
        along = m->renormalise ? along * by : 0.0f;
        for (long slot = 0; slot < k; slot++) {
            if (!keep[slot]) continue;
            d_logits[expert[slot]] = (d_weight[slot] - along) * by;
            spread += d_logits[expert[slot]] * score[expert[slot]];
        }
        for (long e = 0; e < E; e++)
            d_logits[e] =
                m->use_sigmoid ? d_logits[e] * score[e] * (1.0f - score[e]) : score[e] * (d_logits[e] - spread);
    }
}

void route_backward(const float *d_weight, const float *logits, const int64_t *expert, const uint8_t *keep,
                    float *d_logits, float *scratch, long tokens, long experts, long k, int use_sigmoid,
                    int renormalise, int threads) {
    RouteGradient job = {d_weight, logits,  expert, keep,        d_logits,   scratch,
                         tokens,   experts, k,      use_sigmoid, renormalise};
    in_pieces(route_gradient_piece, &job, (tokens + ROUTED - 1) / ROUTED, threads);
}

/* ---- Slots into rows, as sort_slots describes it ---- */

/* keep may be NULL. Returns the number of rows, or an error. */
long sort_slots(const int64_t *expert, const float *weight, const uint8_t *keep, float *row_weight, int64_t *token,
                int64_t *row_expert, int64_t *expert_offsets, int64_t *token_offsets, int64_t *row_of_slot, long tokens,
                long k, long n_experts) {
    long rows = 0;
    memset(expert_offsets, 0, (size_t)(n_experts + 1) * sizeof(int64_t));
    for (long t = 0; t < tokens; t++) {
        token_offsets[t] = rows;
        for (long i = t * k; i < (t + 1) * k; i++) {
            if (keep && !keep[i]) continue;
            if (expert[i] < 0 || expert[i] >= n_experts) return OUT_OF_RANGE;
            expert_offsets[expert[i] + 1]++;
            rows++;
        }
    }
    token_offsets[tokens] = rows;
    for (long e = 0; e < n_experts; e++) expert_offsets[e + 1] += expert_offsets[e];
    /* Each offset moves on as its rows are filled, and comes to lie where the next one began. */
    for (long t = 0, slot = 0; t < tokens; t++)
        for (long i = t * k; i < (t + 1) * k; i++) {
            if (keep && !keep[i]) continue;
            long row = expert_offsets[expert[i]]++;
            row_weight[row] = weight[i], token[row] = t, row_expert[row] = expert[i], row_of_slot[slot++] = row;
        }
    memmove(expert_offsets + 1, expert_offsets, (size_t)n_experts * sizeof(int64_t));
    expert_offsets[0] = 0;
    return rows;
}
