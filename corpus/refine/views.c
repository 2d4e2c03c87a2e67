// What layers look at of a text, in one pass each: see page.py, repetition.py, personal_data.py, near_duplicates.py and
// ngram_model.py, whose Python forms give the same bits. Legend: G n-grams, H hashes.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SPACE, LETTER, HAN, DIGIT, PUNCTUATION, SYMBOL, KANA, HANGUL, BROKEN, KINDS };
enum { TABLE = 1 << 16, BLOCK = 64 };

static inline uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The kind of every character, and how many there are of each.
void kinds(const uint32_t *codes, long n, const uint8_t *table, uint8_t *kind, int64_t *counts) {
    memset(counts, 0, KINDS * sizeof *counts);
    for (long i = 0; i < n; i++) {
        uint32_t code = codes[i];
        kind[i] = code < TABLE ? table[code] : code >= 0x20000 && code < 0x40000 ? HAN : SYMBOL;
        counts[kind[i]]++;
    }
}

// Runs of characters and their hashes; returns how many. `form` is 0 for words, 1 for Chinese words, 2 for terms.
long runs(const uint32_t *codes, const uint8_t *kind, long n, int form, const uint32_t *lower, uint64_t inverse,
          int64_t *starts, int64_t *ends, uint64_t *hashes) {
    long count = 0;
    uint64_t hash = 0, power = 1;
    int open = 0;
    for (long i = 0; i < n; i++) {
        uint8_t k = kind[i];
        int inside = form == 2 ? k == LETTER || k == DIGIT || k == HAN : k != SPACE;
        int alone = form != 0 && k == HAN;
        if (open && (!inside || alone)) {
            ends[count] = i;
            hashes[count] = mix(hash + (uint64_t)(i - starts[count]));
            count++;
            open = 0;
        }
        if (!inside) continue;
        uint64_t code = codes[i];
        if (form == 2) code = k == DIGIT ? '0' : code < TABLE ? lower[code] : code;
        if (!open) {
            starts[count] = i;
            hash = 0;
            power = 1;
        }
        hash += mix(code + 1) * power;
        power *= inverse;
        open = 1;
        if (alone) {
            ends[count] = i + 1;
            hashes[count] = mix(hash + 1);
            count++;
            open = 0;
        }
    }
    if (open) {
        ends[count] = n;
        hashes[count] = mix(hash + (uint64_t)(n - starts[count]));
        count++;
    }
    return count;
}

// The hash of a text as one run.
uint64_t whole(const uint32_t *codes, long n, uint64_t inverse) {
    uint64_t hash = 0, power = 1;
    for (long i = 0; i < n; i++) {
        hash += mix(codes[i]) * power;
        power *= inverse;
    }
    return mix(hash + (uint64_t)n);
}

// Which forms of personal data a text may have: 1 an @, 2 figures with dots, 4 figures with colons, 8 a long number.
int gates(const uint32_t *codes, long n) {
    int found = 0, dots = 0, figures = 0, gap = 0, colon = 0, hex = 0;
    for (long i = 0; i < n; i++) {
        uint32_t c = codes[i];
        int digit = c >= '0' && c <= '9';
        if (c == '@') found |= 1;
        // \d\.\d+\.\d : a digit, a digit and a dot, that and digits, that and a dot.
        if (digit) {
            if (dots == 4) found |= 2;
            dots = dots == 2 || dots == 3 || dots == 4 ? 3 : 1;
        } else {
            dots = c != '.' ? 0 : dots == 1 ? 2 : dots == 3 ? 4 : 0;
        }
        // \d(?:[ .()/-]{0,2}\d){6}
        if (digit) {
            figures = figures && gap <= 2 ? figures + 1 : 1;
            gap = 0;
            if (figures >= 7) found |= 8;
        } else if (c == ' ' || c == '.' || c == '(' || c == ')' || c == '/' || c == '-') {
            gap++;
        } else {
            figures = 0;
        }
        // ::|:[0-9A-Fa-f]+:[0-9A-Fa-f]+: : colons that hexadecimal figures alone are between, and how many in a row.
        if (c == ':') {
            if (i && codes[i - 1] == ':') found |= 4;
            colon = colon && hex ? colon + 1 : 1;
            if (colon >= 3) found |= 4;
            hex = 0;
        } else if (digit || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
            hex = 1;
        } else {
            colon = hex = 0;
        }
    }
    return found;
}

// Two shares of the characters of a text. `top`: in the commonest n-gram; else in n-grams that came before. What cannot
// be above `enough` is not computed, and its bound returned; -1 for no memory.
double repeated_share(const uint64_t *polynomials, const int64_t *sums, long words, long n, int top, double enough) {
    long G = words - n + 1;
    if (G <= 0) return 0.0;
    long size = 16;
    while (size < 2 * G) size *= 2;
    // By hash the place of the first of equal n-grams, from 1; of each first one how many there are.
    uint32_t *table = calloc(size, sizeof *table), *count = calloc(G, sizeof *count), *first = malloc(G * sizeof *first);
    double share = -1.0;
    if (table && count && first) {
        int64_t most = 0, repeated = 0, longest = 0, total = sums[words];
        for (long i = 0; i < G; i++) {
            uint64_t hash = mix(polynomials[i] + (uint64_t)n);
            long place = hash & (size - 1);
            while (table[place] && mix(polynomials[table[place] - 1] + (uint64_t)n) != hash) place = (place + 1) & (size - 1);
            if (!table[place]) table[place] = i + 1;
            first[i] = table[place] - 1;
            repeated += first[i] != i;
            if (++count[first[i]] > most) most = count[first[i]];
            if (sums[i + n] - sums[i] > longest) longest = sums[i + n] - sums[i];
        }
        share = repeated ? (double)((top ? most : repeated) * longest) / (double)total : 0.0;
        if (share > enough && top) {
            longest = 0;
            for (long i = 0; i < G; i++)
                if (count[first[i]] == most && sums[i + n] - sums[i] > longest) longest = sums[i + n] - sums[i];
            share = (double)(most * longest) / (double)total;
            if (share > 1.0) share = 1.0;
        } else if (share > enough) {
            int64_t covered = 0;
            long until = 0;
            for (long i = 0; i < G; i++) {
                if (first[i] == i) continue;
                covered += sums[i + n] - sums[i > until ? i : until];
                until = i + n;
            }
            share = (double)covered / (double)total;
        }
    }
    free(table);
    free(count);
    free(first);
    return share;
}

// Features that an automaton comes through, in the order of first visits, and how often; returns how many. `place` is where
// each feature stands among them; it is -1 everywhere before and behind the call.
long walk(const uint8_t *text, long n, const uint32_t *next, const int32_t *row, const int32_t *feature, int32_t *place,
          int64_t *found, int64_t *counts) {
    long count = 0;
    uint32_t state = 0;
    for (long i = 0; i < n; i++) {
        state = next[row[state] + text[i]];
        int32_t f = feature[state];
        if (f < 0) continue;
        if (place[f] < 0) {
            place[f] = count;
            found[count] = f;
            counts[count++] = 0;
        }
        counts[place[f]]++;
    }
    for (long i = 0; i < count; i++) place[found[i]] = -1;
    return count;
}

// The least of every permutation of the hashes' low halves, from what `least` holds already.
void minhash(const uint64_t *restrict hashes, long G, const uint32_t *restrict factors, const uint32_t *restrict shifts,
             long H, uint32_t *restrict least) {
    for (long g = 0; g < G; g++) {
        uint32_t low = (uint32_t)hashes[g];
        for (long h = 0; h < H; h++) {
            uint32_t value = factors[h] * low + shifts[h];
            least[h] = value < least[h] ? value : least[h];
        }
    }
}

// The probability of every character under hashed counts of n-grams, from `p` = uniform; see ngram_model.py. `sums` are
// those of RunHashes, `powers` of BASE.
void ngram_probabilities(const uint64_t *sums, const uint64_t *powers, long n, const uint16_t *counts, long order, int bits,
                         float total, float prior, float *p) {
    // Of each order the count that ends at this character, and at the one before: the next order's context.
    float here[16], before[16];
    uint32_t slots[BLOCK][16];
    for (long first = 0; first < n; first += BLOCK) {
        long last = first + BLOCK < n ? first + BLOCK : n;
        // The table is larger than the caches: a block's slots are asked for before the first is needed.
        for (long i = first; i < last; i++)
            for (long k = 1; k <= order && k <= i + 1; k++) {
                uint64_t polynomial = (sums[i + 1] - sums[i + 1 - k]) * powers[i + 1 - k];
                slots[i - first][k] = (polynomial * (uint64_t)(2 * k + 1)) >> (64 - bits);
                __builtin_prefetch(counts + slots[i - first][k]);
            }
        for (long i = first; i < last; i++) {
            float context = total, own = p[i];
            for (long k = 1; k <= order && k <= i + 1; k++) {
                here[k] = (float)counts[slots[i - first][k]];
                own *= prior;
                own += here[k];
                own /= context + prior;
                context = before[k];
            }
            memcpy(before, here, sizeof before);
            p[i] = own;
        }
    }
}
