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
    // Neighbours are counted apart: a counter that was just written is not read again at once.
    int64_t own[4][KINDS] = {0};
    for (long i = 0; i < n; i++) {
        uint32_t code = codes[i];
        uint8_t k = code < TABLE ? table[code] : code >= 0x20000 && code < 0x40000 ? HAN : SYMBOL;
        kind[i] = k;
        own[i & 3][k]++;
    }
    for (int k = 0; k < KINDS; k++) counts[k] = own[0][k] + own[1][k] + own[2][k] + own[3][k];
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

// How many runs have a character of a kind: the first one nearly always says it.
long runs_with(const uint8_t *kind, const int64_t *starts, const int64_t *ends, long n, int wanted) {
    long count = 0;
    for (long r = 0; r < n; r++)
        for (long i = starts[r]; i < ends[r]; i++)
            if (kind[i] == wanted) {
                count++;
                break;
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

// Lines, without their line feeds, in which a form of personal data may stand: an @, figures with dots or colons, a long
// number. Returns how many.
long gated_lines(const uint32_t *codes, long n, int64_t *starts, int64_t *ends) {
    long count = 0, start = 0;
    int found = 0, dots = 0, figures = 0, gap = 0, colon = 0, hex = 0;
    for (long i = 0; i <= n; i++) {
        uint32_t c = i < n ? codes[i] : '\n';
        if (c == '\n') {
            if (found) {
                starts[count] = start;
                ends[count++] = i;
            }
            start = i + 1;
            found = dots = figures = colon = hex = 0;
            continue;
        }
        int digit = c >= '0' && c <= '9';
        if (c == '@') found = 1;
        // \d\.\d+\.\d : a digit, a digit and a dot, that and digits, that and a dot.
        if (digit) {
            if (dots == 4) found = 1;
            dots = dots == 2 || dots == 3 || dots == 4 ? 3 : 1;
        } else {
            dots = c != '.' ? 0 : dots == 1 ? 2 : dots == 3 ? 4 : 0;
        }
        // \d(?:[ .()/-]{0,2}\d){6}
        if (digit) {
            figures = figures && gap <= 2 ? figures + 1 : 1;
            gap = 0;
            if (figures >= 7) found = 1;
        } else if (c == ' ' || c == '.' || c == '(' || c == ')' || c == '/' || c == '-') {
            gap++;
        } else {
            figures = 0;
        }
        // ::|:[0-9A-Fa-f]+:[0-9A-Fa-f]+: : colons that hexadecimal figures alone are between, and how many in a row.
        if (c == ':') {
            if (i && codes[i - 1] == ':') found = 1;
            colon = colon && hex ? colon + 1 : 1;
            if (colon >= 3) found = 1;
            hex = 0;
        } else if (digit || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
            hex = 1;
        } else {
            colon = hex = 0;
        }
    }
    return count;
}

// The sums of RunHashes.
void run_sums(const uint64_t *values, long n, uint64_t inverse, uint64_t *sums) {
    uint64_t power = 1;
    sums[0] = 0;
    for (long i = 0; i < n; i++) {
        sums[i + 1] = sums[i] + values[i] * power;
        power *= inverse;
    }
}

// Runs of terms that are on a list, by their places on it, in the order of lengths and then of the text; returns how many.
// `marks` has the low bits of the first terms of the list's runs, `list` their hashes, sorted.
long listed(const uint64_t *terms, const uint64_t *sums, const uint64_t *powers, long n, const uint8_t *marks, uint64_t low,
            const int64_t *lengths, long n_lengths, const uint64_t *list, long n_list, int64_t *starts, int64_t *found) {
    long n_starts = 0, count = 0;
    for (long i = 0; i < n; i++)
        if (marks[terms[i] & low]) starts[n_starts++] = i;
    for (long k = 0; k < n_lengths; k++)
        for (long s = 0; s < n_starts; s++) {
            long i = starts[s], length = lengths[k];
            if (i + length > n) break;
            uint64_t hash = mix((sums[i + length] - sums[i]) * powers[i] + (uint64_t)length);
            long first = 0, last = n_list;
            while (first < last) {
                long middle = (first + last) / 2;
                if (list[middle] < hash)
                    first = middle + 1;
                else
                    last = middle;
            }
            if (first < n_list && list[first] == hash) found[count++] = first;
        }
    return count;
}

static inline int line_end(uint32_t c) {
    return c == '\n' || c == '\r';
}

static inline int in_sentence_end(uint32_t c) {
    return c == '.' || c == '!' || c == '?' || c == 0x3002 || c == 0xFF01 || c == 0xFF1F || c == 0x2026;
}

static inline int closes(uint32_t c) {
    return c == '"' || c == '\'' || c == 0x201D || c == 0x2019 || c == 0x300D || c == 0x300F || c == ')' || c == 0xFF09;
}

static inline int white(const uint32_t *codes, const uint8_t *kind, long i) {
    return kind[i] == SPACE && codes[i] != 0xFEFF;
}

// The first place behind the line end at i.
static inline long behind(const uint32_t *codes, long n, long i) {
    return i + 1 + (codes[i] == '\r' && i + 1 < n && codes[i + 1] == '\n');
}

// Paragraphs of `shortest` characters or more, each followed by its spans of three sentences; returns how many.
long units(const uint32_t *codes, const uint8_t *kind, long n, long shortest, int64_t *paragraphs, int64_t *starts,
           int64_t *ends) {
    long count = 0, number = 0, start = 0;
    while (start <= n) {
        // The paragraph ends where line ends follow each other with nothing but white space between.
        long end = start, next = n + 1;
        for (; end < n; end++) {
            if (!line_end(codes[end])) continue;
            long last = behind(codes, n, end), gap = 0;
            for (long i = last; i < n && white(codes, kind, i); i++)
                if (line_end(codes[i])) {
                    last = behind(codes, n, i);
                    i = last - 1;
                    gap = 1;
                }
            if (gap) {
                next = last;
                break;
            }
            end = last - 1;
        }
        if (end - start >= shortest) {
            paragraphs[count] = number;
            starts[count] = start;
            ends[count++] = end;
            long sentence = 0, began[3] = {0}, before = count;
            for (long i = start; i < end; sentence++) {
                began[sentence % 3] = i;
                while (i < end && !in_sentence_end(codes[i])) i++;
                while (i < end && in_sentence_end(codes[i])) i++;
                while (i < end && closes(codes[i])) i++;
                while (i < end && white(codes, kind, i)) i++;
                if (sentence < 2) continue;
                paragraphs[count] = number;
                starts[count] = began[(sentence + 1) % 3];
                ends[count++] = i;
            }
            if (sentence <= 3) count = before;
        }
        number++;
        start = next;
    }
    return count;
}

// Two shares of the characters of a text. `top`: in the commonest n-gram; else in n-grams that came before. What cannot
// be above `enough` is not computed, and its bound returned; -1 for no memory. `most_common` is how often the commonest
// n-gram is there.
double repeated_share(const uint64_t *run_sums, const uint64_t *powers, const int64_t *sums, long words, long n, int top,
                      double enough, int64_t *most_common) {
    long G = words - n + 1;
    if (G <= 0) return 0.0;
    long size = 16;
    while (size < 2 * G) size *= 2;
    // By hash the place of the first of equal n-grams, from 1; of each first one how many there are.
    uint32_t *table = calloc(size, sizeof *table), *count = calloc(G, sizeof *count), *first = malloc(G * sizeof *first);
    uint64_t *hashes = malloc(G * sizeof *hashes);
    double share = -1.0;
    if (table && count && first && hashes) {
        for (long i = 0; i < G; i++) hashes[i] = mix((run_sums[i + n] - run_sums[i]) * powers[i] + (uint64_t)n);
        int64_t most = 0, repeated = 0, longest = 0, total = sums[words];
        for (long i = 0; i < G; i++) {
            uint64_t hash = hashes[i];
            long place = hash & (size - 1);
            while (table[place] && hashes[table[place] - 1] != hash) place = (place + 1) & (size - 1);
            if (!table[place]) table[place] = i + 1;
            first[i] = table[place] - 1;
            repeated += first[i] != i;
            if (++count[first[i]] > most) most = count[first[i]];
            if (sums[i + n] - sums[i] > longest) longest = sums[i + n] - sums[i];
        }
        *most_common = most;
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
    free(hashes);
    return share;
}

// Features that an automaton comes through, in the order of first visits, and how often; returns how many. Of every state
// `states` has the row and the feature. `place` is where each feature stands among them; it is -1 everywhere before and
// behind the call.
long walk(const uint8_t *text, long n, const uint32_t *next, const int32_t *states, int32_t *place, int64_t *found,
          int64_t *counts) {
    long count = 0;
    uint32_t state = 0;
    for (long i = 0; i < n; i++) {
        state = next[states[2 * state] + text[i]];
        int32_t f = states[2 * state + 1];
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

// Of every permutation of the low halves of the n-grams' hashes the least, `rows` of them mixed into a band; `least` is
// room for them.
void bands(const uint64_t *restrict run_sums, const uint64_t *restrict powers, long terms, long n,
           const uint32_t *restrict factors, const uint32_t *restrict shifts, long H, long rows, uint32_t *restrict least,
           uint64_t *restrict found) {
    for (long h = 0; h < H; h++) least[h] = UINT32_MAX;
    for (long g = 0; g + n <= terms; g++) {
        uint32_t low = (uint32_t)mix((run_sums[g + n] - run_sums[g]) * powers[g] + (uint64_t)n);
        for (long h = 0; h < H; h++) {
            uint32_t value = factors[h] * low + shifts[h];
            least[h] = value < least[h] ? value : least[h];
        }
    }
    for (long band = 0; band < H / rows; band++) {
        found[band] = 0;
        for (long row = 0; row < rows; row++) found[band] = mix(found[band] ^ least[band * rows + row]);
    }
}

// The sums of RunHashes over the characters, every digit the same; see ngram_model.py.
void character_sums(const uint32_t *codes, long n, uint64_t inverse, uint64_t *sums) {
    uint64_t power = 1;
    sums[0] = 0;
    for (long i = 0; i < n; i++) {
        uint64_t code = codes[i] >= '0' && codes[i] <= '9' ? '0' : codes[i];
        sums[i + 1] = sums[i] + mix(code + 1) * power;
        power *= inverse;
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
