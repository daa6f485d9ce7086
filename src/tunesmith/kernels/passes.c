/* The small operations of a training step, each in one pass over its rows; see passes.py for what they compute.

   Rows are independent, so that the number of threads changes no result. Numbers are bfloat16 (as 16 bits) or
   float; sums are taken in float. */

#include "numbers.h"
#include "tiles.h"

static inline float inverse_of(const bf16 *x, ptrdiff_t n, float eps) {
    float sum = 0.0f;
    for (ptrdiff_t i = 0; i < n; i++) sum += wide(x[i]) * wide(x[i]);
    return 1.0f / sqrtf(sum / (float)n + eps);
}

void norm(ptrdiff_t rows, ptrdiff_t n, const bf16 *x, const float *factor, float eps, bf16 *y, float *inverse) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *in = x + row * n;
        bf16 *out = y + row * n;
        float by = inverse[row] = inverse_of(in, n, eps);
        for (ptrdiff_t i = 0; i < n; i++) out[i] = narrow(wide(in[i]) * by * factor[i]);
    }
}

void add_norm(ptrdiff_t rows, ptrdiff_t n, const bf16 *x, const bf16 *y, const float *factor, float eps, bf16 *sum,
              float *inverse) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *in = y + row * n, *left = x + row * n;
        bf16 *out = sum + row * n;
        float by = inverse[row] = inverse_of(in, n, eps);
        for (ptrdiff_t i = 0; i < n; i++)
            out[i] = narrow(wide(left[i]) + wide(narrow(wide(in[i]) * by * factor[i])));
    }
}

/* gradient (float) of norm(x) -> that of x */
void norm_back(ptrdiff_t rows, ptrdiff_t n, const float *gradient, const bf16 *x, const float *inverse,
               const float *factor, bf16 *out) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const float *g = gradient + row * n;
        const bf16 *in = x + row * n;
        bf16 *to = out + row * n;
        float by = inverse[row], along = 0.0f;
        for (ptrdiff_t i = 0; i < n; i++) along += g[i] * factor[i] * wide(in[i]);
        along *= by * by / (float)n;
        for (ptrdiff_t i = 0; i < n; i++) to[i] = narrow((g[i] * factor[i] - wide(in[i]) * along) * by);
    }
}

/* gradient (bf16) of norm(x) -> added to that of x (float) */
void norm_back_add(ptrdiff_t rows, ptrdiff_t n, const bf16 *gradient, const bf16 *x, const float *inverse,
                   const float *factor, float *total) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *g = gradient + row * n, *in = x + row * n;
        float *to = total + row * n;
        float by = inverse[row], along = 0.0f;
        for (ptrdiff_t i = 0; i < n; i++) along += wide(g[i]) * factor[i] * wide(in[i]);
        along *= by * by / (float)n;
        for (ptrdiff_t i = 0; i < n; i++) to[i] += (wide(g[i]) * factor[i] - wide(in[i]) * along) * by;
    }
}

/* The first `heads` of `all` heads are normalised, where there is a factor, and turned by their positions. */
void turn(ptrdiff_t rows, ptrdiff_t all, ptrdiff_t heads, ptrdiff_t size, const bf16 *x, const float *cosine,
          const float *sine, const float *factor, float eps, bf16 *turned, float *inverse) {
    ptrdiff_t half = size / 2;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const float *c = cosine + row * size, *s = sine + row * size;
        for (ptrdiff_t head = 0; head < heads; head++) {
            const bf16 *in = x + (row * all + head) * size;
            bf16 *out = turned + (row * heads + head) * size;
            const float *f = factor + head * size;
            float by = 1.0f, scaled[size];
            if (factor) by = inverse[row * heads + head] = inverse_of(in, size, eps);
            for (ptrdiff_t i = 0; i < size; i++) scaled[i] = wide(in[i]) * by * (factor ? f[i] : 1.0f);
            for (ptrdiff_t i = 0; i < half; i++) {
                out[i] = narrow(scaled[i] * c[i] + scaled[i + half] * s[i]);
                out[i + half] = narrow(scaled[i + half] * c[i + half] + scaled[i] * s[i + half]);
            }
        }
    }
}

/* gradients (bf16) of what `turn` made and of the heads that it left -> that of x */
void turn_back(ptrdiff_t rows, ptrdiff_t all, ptrdiff_t heads, ptrdiff_t size, const bf16 *of_query,
               const bf16 *of_key, const bf16 *of_value, ptrdiff_t queries, const bf16 *x, const float *cosine,
               const float *sine, const float *factor, const float *inverse, bf16 *out) {
    ptrdiff_t half = size / 2, keys = heads - queries;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const float *c = cosine + row * size, *s = sine + row * size;
        for (ptrdiff_t head = 0; head < heads; head++) {
            const bf16 *g = head < queries ? of_query + (row * queries + head) * size
                                           : of_key + (row * keys + head - queries) * size;
            const bf16 *in = x + (row * all + head) * size;
            bf16 *to = out + (row * all + head) * size;
            const float *f = factor + head * size;
            float back[size];
            for (ptrdiff_t i = 0; i < half; i++) {
                back[i] = wide(g[i]) * c[i] + wide(g[i + half]) * s[i + half];
                back[i + half] = wide(g[i + half]) * c[i + half] + wide(g[i]) * s[i];
            }
            float by = 1.0f, along = 0.0f;
            if (factor) {
                by = inverse[row * heads + head];
                for (ptrdiff_t i = 0; i < size; i++) back[i] *= f[i];
                for (ptrdiff_t i = 0; i < size; i++) along += back[i] * wide(in[i]);
                along *= by * by / (float)size;
            }
            for (ptrdiff_t i = 0; i < size; i++) to[i] = narrow((back[i] - wide(in[i]) * along) * by);
        }
        memcpy(out + (row * all + heads) * size, of_value + row * (all - heads) * size,
               (size_t)((all - heads) * size) * sizeof(bf16));
    }
}

#define GELU_A 0.7978845608f
#define GELU_B 0.044715f

/* 1 / (1 + e to the -z): gelu's 0.5 (1 + tanh(z / 2)) is the same. */
static inline float logistic(float z) { return 1.0f / (1.0f + power(-z)); }

void gate(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t silu, const bf16 *gate_and_up, bf16 *product) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *restrict g = gate_and_up + row * 2 * n, *restrict up = g + n;
        bf16 *restrict out = product + row * n;
        for (ptrdiff_t i = 0; i < n; i++) {
            float x = wide(g[i]);
            float z = silu ? x : 2.0f * GELU_A * x * (1.0f + GELU_B * x * x);
            out[i] = narrow(x * logistic(z) * wide(up[i]));
        }
    }
}

void gate_back(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t silu, const bf16 *gradient, const bf16 *gate_and_up, bf16 *of_both) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *d = gradient + row * n, *g = gate_and_up + row * 2 * n, *up = g + n;
        bf16 *of_gate = of_both + row * 2 * n, *of_up = of_gate + n;
        for (ptrdiff_t i = 0; i < n; i++) {
            float x = wide(g[i]), upstream = wide(d[i]);
            float z = silu ? x : 2.0f * GELU_A * x * (1.0f + GELU_B * x * x);
            float slope = silu ? 1.0f : 2.0f * GELU_A * (1.0f + 3.0f * GELU_B * x * x);
            float share = logistic(z);
            of_up[i] = narrow(upstream * x * share);
            of_gate[i] = narrow(upstream * wide(up[i]) * (share + x * share * (1.0f - share) * slope));
        }
    }
}

/* Per row: e to the logits less the largest, their sum, and the cross-entropy at the target. */
void softmax(ptrdiff_t rows, ptrdiff_t words, const bf16 *logits, const int64_t *targets, bf16 *powers, float *sums,
             float *losses) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *in = logits + row * words;
        bf16 *out = powers + row * words;
        float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (ptrdiff_t i = 0; i < words; i++) largest = wide(in[i]) > largest ? wide(in[i]) : largest;
        for (ptrdiff_t first = 0; first < words; first += 4096) { /* summed in parts, for the sake of its last bits */
            ptrdiff_t end = first + 4096 < words ? first + 4096 : words;
            float own = 0.0f;
            for (ptrdiff_t i = first; i < end; i++) {
                float p = power(wide(in[i]) - largest);
                own += p;
                out[i] = narrow(p);
            }
            sum += own;
        }
        sums[row] = sum;
        losses[row] = logf(sum) + largest - wide(in[targets[row]]);
    }
}

/* Causal attention within short rows. `turned` has each token's queries, then its keys; `heads` its queries, keys
   and values. Queries share keys in groups. Probabilities of row r and query head h lie at
   (row_places[r] + h x length x length). */

static inline float dot(const float *restrict a, const float *restrict b, ptrdiff_t n) {
    float sum = 0.0f;
    for (ptrdiff_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline void widen(const bf16 *from, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n, float *restrict to) {
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t i = 0; i < n; i++) to[row * n + i] = wide(from[row * stride + i]);
}

static inline void add_times(float *restrict to, const float *restrict from, float by, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) to[i] += by * from[i];
}

void attend(ptrdiff_t rows, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size, const int64_t *starts,
            const int64_t *lengths, const int64_t *row_places, const bf16 *turned, const bf16 *heads, float scale,
            float *probabilities, bf16 *gathered) {
    ptrdiff_t turning = queries + keys, all = turning + keys, group = queries / keys;
#pragma omp parallel for collapse(2) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t head = 0; head < queries; head++) {
            ptrdiff_t start = starts[row], length = lengths[row], shared = head / group;
            float key[length * size], value[length * size], query[size], out[size];
            widen(turned + (start * turning + queries + shared) * size, length, turning * size, size, key);
            widen(heads + (start * all + turning + shared) * size, length, all * size, size, value);
            for (ptrdiff_t i = 0; i < length; i++) {
                float *p = probabilities + row_places[row] + (head * length + i) * length;
                float largest = -INFINITY, sum = 0.0f;
                widen(turned + ((start + i) * turning + head) * size, 1, 0, size, query);
                for (ptrdiff_t j = 0; j <= i; j++) {
                    p[j] = scale * dot(query, key + j * size, size);
                    largest = p[j] > largest ? p[j] : largest;
                }
                for (ptrdiff_t j = 0; j <= i; j++) sum += p[j] = power(p[j] - largest);
                memset(out, 0, sizeof out);
                for (ptrdiff_t j = 0; j <= i; j++) add_times(out, value + j * size, p[j] /= sum, size);
                bf16 *to = gathered + ((start + i) * queries + head) * size;
                for (ptrdiff_t d = 0; d < size; d++) to[d] = narrow(out[d]);
            }
        }
}

void attend_back(ptrdiff_t rows, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size, const int64_t *starts,
                 const int64_t *lengths, const int64_t *row_places, const bf16 *turned, const bf16 *heads,
                 float scale, const float *probabilities, const bf16 *gradient, bf16 *of_query, bf16 *of_key,
                 bf16 *of_value) {
    ptrdiff_t turning = queries + keys, all = turning + keys, group = queries / keys;
#pragma omp parallel for collapse(2) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t shared = 0; shared < keys; shared++) {
            ptrdiff_t start = starts[row], length = lengths[row];
            float key[length * size], value[length * size], to_key[length * size], to_value[length * size];
            float query[size], upstream[size], out[size], of_score[length];
            widen(turned + (start * turning + queries + shared) * size, length, turning * size, size, key);
            widen(heads + (start * all + turning + shared) * size, length, all * size, size, value);
            memset(to_key, 0, sizeof to_key);
            memset(to_value, 0, sizeof to_value);
            for (ptrdiff_t head = shared * group; head < (shared + 1) * group; head++)
                for (ptrdiff_t i = 0; i < length; i++) {
                    const float *p = probabilities + row_places[row] + (head * length + i) * length;
                    float mean = 0.0f;
                    widen(turned + ((start + i) * turning + head) * size, 1, 0, size, query);
                    widen(gradient + ((start + i) * queries + head) * size, 1, 0, size, upstream);
                    for (ptrdiff_t j = 0; j <= i; j++) {
                        of_score[j] = dot(upstream, value + j * size, size);
                        mean += p[j] * of_score[j];
                    }
                    memset(out, 0, sizeof out);
                    for (ptrdiff_t j = 0; j <= i; j++) {
                        float s = p[j] * (of_score[j] - mean) * scale;
                        add_times(to_value + j * size, upstream, p[j], size);
                        add_times(to_key + j * size, query, s, size);
                        add_times(out, key + j * size, s, size);
                    }
                    bf16 *to = of_query + ((start + i) * queries + head) * size;
                    for (ptrdiff_t d = 0; d < size; d++) to[d] = narrow(out[d]);
                }
            for (ptrdiff_t i = 0; i < length; i++)
                for (ptrdiff_t d = 0; d < size; d++) {
                    of_key[((start + i) * keys + shared) * size + d] = narrow(to_key[i * size + d]);
                    of_value[((start + i) * keys + shared) * size + d] = narrow(to_value[i * size + d]);
                }
        }
}

#if defined(__AMX_BF16__) && defined(__linux__)

/* x (rows, ranks) as tiles of 16 ranks of 32 rows: of each 16 ranks all rows. */
static void transpose(ptrdiff_t rows, ptrdiff_t ranks, const bf16 *x, bf16 *tiles) {
    ptrdiff_t chunks = (rows + 31) / 32;
    memset(tiles, 0, (size_t)(chunks * ranks) * 32 * sizeof(bf16));
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t rank = 0; rank < ranks; rank++)
            tiles[((rank / 16 * chunks + row / 32) * 16 + rank % 16) * 32 + row % 32] = x[row * ranks + rank];
}

/* sums = 16 or, as `both`, 32 ranks x 32 columns of low^T x: a tile for each 16 of both. */
static inline void across(ptrdiff_t chunks, ptrdiff_t both, const bf16 *low, const bf16 *pairs, float *sums) {
    zero();
    for (ptrdiff_t i = 0; i < chunks; i++) {
        _tile_loadd(6, low + i * TILE, 64);
        _tile_loadd(4, pairs + 2 * i * TILE, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, pairs + (2 * i + 1) * TILE, 64);
        _tile_dpbf16ps(1, 6, 5);
        if (!both) continue;
        _tile_loadd(7, low + (chunks + i) * TILE, 64);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
    }
    suspend(sums);
}

/* Add to an adapter's gradient, of A (layers x rank, in) and B (out, rank), which belong to layers of `outs` outputs,
   multiples of 16. `scratch` has room for 2 x ranks x (rows, up to a multiple of 32). */
void adapt(ptrdiff_t rows, ptrdiff_t in, ptrdiff_t out, ptrdiff_t ranks, ptrdiff_t rank, ptrdiff_t layers,
           const int64_t *outs, float scale, const bf16 *x, const bf16 *gradient, const bf16 *low,
           const bf16 *low_gradient, bf16 *scratch, float *a_gradient, float *b_gradient) {
    ptrdiff_t chunks = (rows + 31) / 32, used = layers * rank;
    bf16 *turned = scratch + ranks * chunks * 32;
#pragma omp parallel
    {
        float sums[1024] __attribute__((aligned(64)));
        bf16 pairs[chunks * 2 * TILE] __attribute__((aligned(64)));
        configure();
#pragma omp sections
        {
#pragma omp section
            transpose(rows, ranks, low_gradient, scratch);
#pragma omp section
            transpose(rows, ranks, low, turned);
        }
#pragma omp for schedule(static) nowait
        for (ptrdiff_t i = 0; i < in; i += 32) {
            for (ptrdiff_t c = 0; c < chunks; c++)
                interleave(rows - c * 32, x + c * 32 * in + i, in, pairs + 2 * c * TILE, pairs + (2 * c + 1) * TILE);
            for (ptrdiff_t first = 0; first < used; first += 32) {
                across(chunks, first + 16 < used, scratch + first * chunks * 32, pairs, sums);
                for (ptrdiff_t r = first; r < used && r < first + 32; r++)
                    for (int at = 0; at < 32; at++)
                        a_gradient[r * in + i + at] += sums[(r - first) / 16 * 512 + at / 16 * 256 + (r - first) % 16 * 16 + at % 16];
            }
        }
#pragma omp for schedule(static)
        for (ptrdiff_t o = 0; o < out; o += 32) {
            for (ptrdiff_t c = 0; c < chunks; c++)
                interleave(rows - c * 32, gradient + c * 32 * out + o, out, pairs + 2 * c * TILE, pairs + (2 * c + 1) * TILE);
            ptrdiff_t layer[2] = {0, 0};
            for (int half = 0; half < 2; half++)
                for (ptrdiff_t end = outs[0]; o + half * 16 >= end; end += outs[++layer[half]]) continue;
            for (ptrdiff_t first = layer[0] * rank / 16 * 16; first < (layer[1] + 1) * rank; first += 32) {
                across(chunks, first + 16 < (layer[1] + 1) * rank, turned + first * chunks * 32, pairs, sums);
                for (int at = 0; at < 32; at++)
                    for (ptrdiff_t r = 0; r < rank; r++) {
                        ptrdiff_t from = layer[at / 16] * rank + r - first;
                        if (from >= 0 && from < 32)
                            b_gradient[(o + at) * rank + r] += scale * sums[from / 16 * 512 + at / 16 * 256 + from % 16 * 16 + at % 16];
                    }
            }
        }
        _tile_release();
    }
}

/* Attention within short rows as above, on the matrix unit. Of a row and head, probabilities are tiles of 16 queries
   and 32 keys. */

void attend_tiles(ptrdiff_t rows, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size, const int64_t *starts,
                  const int64_t *lengths, const int64_t *tile_places, const bf16 *turned, const bf16 *heads, float scale,
                  bf16 *probabilities, bf16 *gathered) {
    ptrdiff_t turning = queries + keys, all = turning + keys, tiles = size / 32;
#pragma omp parallel
    {
        configure();
#pragma omp for collapse(2) schedule(dynamic)
        for (ptrdiff_t row = 0; row < rows; row++)
            for (ptrdiff_t head = 0; head < queries; head++) {
                ptrdiff_t start = starts[row], length = lengths[row], blocks = (length + 15) / 16, chunks = (length + 31) / 32;
                ptrdiff_t width = chunks * 32, shared = head / (queries / keys);
                bf16 key[blocks * tiles * TILE] __attribute__((aligned(64))), query[tiles * TILE] __attribute__((aligned(64)));
                bf16 value[chunks * tiles * 2 * TILE] __attribute__((aligned(64)));
                float scores[16 * width] __attribute__((aligned(64))), sums[1024] __attribute__((aligned(64)));
                pack_across(length, turned + (start * turning + queries + shared) * size, turning * size, size, key);
                pack_down(length, heads + (start * all + turning + shared) * size, all * size, size, value);
                for (ptrdiff_t first = 0; first < length; first += 16) {
                    ptrdiff_t block = first / 16;
                    bf16 *p = probabilities + (tile_places[row] * queries + (head * blocks + block) * chunks) * TILE;
                    pack_left(length - first, turned + ((start + first) * turning + head) * size, turning * size, size, query);
                    score(block, tiles, query, key, scores, width);
                    memset(p, 0, (size_t)(chunks * TILE) * sizeof(bf16));
                    for (ptrdiff_t i = 0; i < 16 && first + i < length; i++) {
                        float *restrict line = scores + i * width, largest = -INFINITY, sum = 0.0f;
                        ptrdiff_t seen = first + i + 1, end = (seen + 31) / 32 * 32;
#pragma omp simd reduction(max : largest)
                        for (ptrdiff_t j = 0; j < seen; j++) largest = line[j] > largest ? line[j] : largest;
                        for (ptrdiff_t j = 0; j < seen; j++) sum += line[j] = power(scale * (line[j] - largest));
                        for (ptrdiff_t j = seen; j < end; j++) line[j] = 0.0f;
                        for (ptrdiff_t j = 0; j < end; j++) line[j] *= 1.0f / sum;
                        for (ptrdiff_t j = 0; j < end; j += 32)
                            _mm512_store_si512(p + j / 32 * TILE + i * 32, narrow_32(line + j, line + j + 16));
                    }
                    for (ptrdiff_t d = 0; d < size; d += 64) {
                        gather(block / 2 + 1, p, value + d / 16 * TILE, size / 16, 0, sums);
                        spill(length - first, sums, gathered + ((start + first) * queries + head) * size + d, queries * size);
                    }
                }
            }
        _tile_release();
    }
}

/* The gradients of scores, from the probabilities and these' gradients in `lines`: of 16 queries, as tiles from
   `of_scores` on. They and the probabilities also go to the same place of `turned_scores` and `turned_probabilities`,
   with keys and queries exchanged. */
static inline void through_softmax(ptrdiff_t first, ptrdiff_t length, ptrdiff_t chunks, float scale, const bf16 *probabilities,
                                   const float *lines, bf16 *of_scores, bf16 *turned_scores, bf16 *turned_probabilities) {
    memset(of_scores, 0, (size_t)(chunks * TILE) * sizeof(bf16));
    for (ptrdiff_t i = 0; i < 16 && first + i < length; i++) {
        const float *line = lines + i * chunks * 32;
        ptrdiff_t seen = first + i + 1, column = first / 32 * TILE + first % 32 + i;
        float mean = 0.0f;
        for (ptrdiff_t chunk = 0; chunk * 32 < seen; chunk++) {
            const bf16 *p = probabilities + chunk * TILE + i * 32;
            ptrdiff_t count = seen - chunk * 32 < 32 ? seen - chunk * 32 : 32;
            for (ptrdiff_t j = 0; j < count; j++) mean += wide(p[j]) * line[chunk * 32 + j];
        }
        for (ptrdiff_t chunk = 0; chunk * 32 < seen; chunk++) {
            const bf16 *p = probabilities + chunk * TILE + i * 32;
            bf16 *s = of_scores + chunk * TILE + i * 32;
            for (ptrdiff_t j = 0; j < 32; j++) s[j] = narrow(wide(p[j]) * (line[chunk * 32 + j] - mean) * scale);
            for (ptrdiff_t j = 0; j < 32 && chunk * 32 + j < seen; j++) {
                ptrdiff_t place = (chunk * 2 + j / 16) * chunks * TILE + j % 16 * 32 + column;
                turned_scores[place] = s[j];
                turned_probabilities[place] = p[j];
            }
        }
    }
}

/* How many bfloat16 numbers `attend_back_tiles` needs beside its arguments, for a number of tiles of each head and of
   chunks of 32 tokens in all rows. */
ptrdiff_t attend_scratch(ptrdiff_t queries, ptrdiff_t size, ptrdiff_t tiles, ptrdiff_t chunks) {
    return queries * 2 * (tiles + chunks * (size / 16)) * TILE;
}

void attend_back_tiles(ptrdiff_t rows, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size, const int64_t *starts,
                       const int64_t *lengths, const int64_t *tile_places, const int64_t *chunk_places, const bf16 *turned,
                       const bf16 *heads, float scale, const bf16 *probabilities, const bf16 *gradient, bf16 *scratch,
                       bf16 *of_query, bf16 *of_key, bf16 *of_value) {
    ptrdiff_t turning = queries + keys, all = turning + keys, group = queries / keys, tiles = size / 32, most = 0;
    ptrdiff_t last = rows - 1, all_chunks = chunk_places[last] + (lengths[last] + 31) / 32;
    ptrdiff_t all_tiles = tile_places[last] + (lengths[last] + 15) / 16 * ((lengths[last] + 31) / 32);
    bf16 *scores = scratch, *shares = scores + queries * all_tiles * TILE, *query_down = shares + queries * all_tiles * TILE;
    bf16 *upstream_down = query_down + queries * all_chunks * tiles * 2 * TILE;
    for (ptrdiff_t row = 0; row < rows; row++) most = lengths[row] > most ? lengths[row] : most;
#pragma omp parallel
    {
        configure();
#pragma omp for collapse(2) schedule(dynamic)
        for (ptrdiff_t row = 0; row < rows; row++)
            for (ptrdiff_t head = 0; head < queries; head++) {
                ptrdiff_t start = starts[row], length = lengths[row], blocks = (length + 15) / 16, chunks = (length + 31) / 32;
                ptrdiff_t square = (tile_places[row] * queries + head * blocks * chunks) * TILE, shared = head / group;
                ptrdiff_t down = (chunk_places[row] * queries + head * chunks) * tiles * 2 * TILE;
                bf16 value[blocks * tiles * TILE] __attribute__((aligned(64))), upstream[tiles * TILE] __attribute__((aligned(64)));
                bf16 key_down[chunks * tiles * 2 * TILE] __attribute__((aligned(64)));
                bf16 of_scores[chunks * TILE] __attribute__((aligned(64)));
                float lines[16 * chunks * 32] __attribute__((aligned(64))), sums[1024] __attribute__((aligned(64)));
                const bf16 *up = gradient + (start * queries + head) * size, *query = turned + (start * turning + head) * size;
                pack_across(length, heads + (start * all + turning + shared) * size, all * size, size, value);
                pack_down(length, turned + (start * turning + queries + shared) * size, turning * size, size, key_down);
                pack_down(length, query, turning * size, size, query_down + down);
                pack_down(length, up, queries * size, size, upstream_down + down);
                memset(scores + square, 0, (size_t)(blocks * chunks * TILE) * sizeof(bf16));
                memset(shares + square, 0, (size_t)(blocks * chunks * TILE) * sizeof(bf16));
                memset(lines, 0, sizeof lines);
                for (ptrdiff_t first = 0; first < length; first += 16) {
                    pack_left(length - first, up + first * queries * size, queries * size, size, upstream);
                    score(first / 16, tiles, upstream, value, lines, chunks * 32);
                    through_softmax(first, length, chunks, scale, probabilities + square + first / 16 * chunks * TILE, lines,
                                    of_scores, scores + square, shares + square);
                    for (ptrdiff_t d = 0; d < size; d += 64) {
                        gather(first / 32 + 1, of_scores, key_down + d / 16 * TILE, size / 16, 0, sums);
                        spill(length - first, sums, of_query + ((start + first) * queries + head) * size + d, queries * size);
                    }
                }
            }
#pragma omp for collapse(3) schedule(dynamic)
        for (ptrdiff_t row = 0; row < rows; row++)
            for (ptrdiff_t shared = 0; shared < keys; shared++)
                for (ptrdiff_t first = 0; first < most; first += 16) { /* 16 keys, which later queries see */
                    ptrdiff_t length = lengths[row], blocks = (length + 15) / 16, chunks = (length + 31) / 32, from = first / 32;
                    float to_key[1024] __attribute__((aligned(64))), to_value[1024] __attribute__((aligned(64)));
                    if (first >= length) continue;
                    for (ptrdiff_t d = 0; d < size; d += 64) {
                        for (ptrdiff_t head = shared * group; head < (shared + 1) * group; head++) {
                            ptrdiff_t square = tile_places[row] * queries + (head * blocks + first / 16) * chunks + from;
                            ptrdiff_t down = (chunk_places[row] * queries + head * chunks + from) * tiles * 2 + d / 16;
                            ptrdiff_t more = head > shared * group;
                            gather(chunks - from, scores + square * TILE, query_down + down * TILE, size / 16, more, to_key);
                            gather(chunks - from, shares + square * TILE, upstream_down + down * TILE, size / 16, more, to_value);
                        }
                        ptrdiff_t to = ((starts[row] + first) * keys + shared) * size + d;
                        spill(length - first, to_key, of_key + to, keys * size);
                        spill(length - first, to_value, of_value + to, keys * size);
                    }
                }
        _tile_release();
    }
}

#endif
