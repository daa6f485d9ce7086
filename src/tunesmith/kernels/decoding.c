/* What serving needs beside the passes: attention over keys and values that lie in blocks, and an output head of 8 bits
   a weight. */

#include "numbers.h"
#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)

enum { BLOCK = 32 /* tokens */, FEW = 8 /* new tokens of a request: more of them are attended to on the matrix unit */ };

/* A layer's keys and values: `pool` has blocks of 32 tokens' keys and, as many, values, (block, 2, token, key, size).
   A request's `table` names its blocks in the order of its tokens. */
typedef struct {
    bf16 *pool;
    ptrdiff_t keys, size;
} Pool;

static inline bf16 *place(const Pool *p, const int64_t *table, ptrdiff_t token, ptrdiff_t value) {
    return p->pool + ((table[token / BLOCK] * 2 + value) * BLOCK + token % BLOCK) * p->keys * p->size;
}

/* What one new token's heads that share a key gather, of the tokens from `from` to its own. */
static void attend_one(const Pool *p, const int64_t *table, ptrdiff_t shared, ptrdiff_t from, ptrdiff_t own, ptrdiff_t group,
                       const bf16 *query, float scale, bf16 *gathered) {
    ptrdiff_t size = p->size, count = own + 1 - from;
    float scores[group][count], out[size] __attribute__((aligned(64)));
    for (ptrdiff_t i = 0; i < count; i++) {
        const bf16 *key = place(p, table, from + i, 0) + shared * size;
        for (ptrdiff_t head = 0; head < group; head++) {
            __m512 even = _mm512_setzero_ps(), odd = even;
            for (ptrdiff_t d = 0; d < size; d += 64) {
                even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_loadu_si512(query + head * size + d), (__m512bh)_mm512_loadu_si512(key + d));
                odd = _mm512_dpbf16_ps(odd, (__m512bh)_mm512_loadu_si512(query + head * size + d + 32), (__m512bh)_mm512_loadu_si512(key + d + 32));
            }
            scores[head][i] = scale * _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        }
    }
    for (ptrdiff_t head = 0; head < group; head++) {
        float *line = scores[head], largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (ptrdiff_t i = 0; i < count; i++) largest = line[i] > largest ? line[i] : largest;
        for (ptrdiff_t i = 0; i < count; i++) sum += line[i] = power(line[i] - largest);
        for (ptrdiff_t d = 0; d < size; d++) out[d] = 0.0f;
        for (ptrdiff_t i = 0; i < count; i++) {
            const bf16 *value = place(p, table, from + i, 1) + shared * size;
            /* Rounded as the matrix unit rounds it, so that a token is the same however many come with it. */
            float share = wide(narrow(line[i] / sum));
            for (ptrdiff_t d = 0; d < size; d++) out[d] += share * wide(value[d]);
        }
        for (ptrdiff_t d = 0; d < size; d++) gathered[head * size + d] = narrow(out[d]);
    }
}

/* 16 of a request's new tokens from `first` on, for one head; `key` and `value` are packed from the token `from` on. */
static void attend_some(ptrdiff_t from, ptrdiff_t first, ptrdiff_t count, ptrdiff_t window, ptrdiff_t size, const bf16 *key,
                        const bf16 *value, const bf16 *query, ptrdiff_t query_stride, float scale, bf16 *gathered, ptrdiff_t stride) {
    ptrdiff_t low = first + 1 > window ? first + 1 - window : 0, skip = (low > from ? low - from : 0) / 32 * 32;
    ptrdiff_t begin = from + skip, end = first + count, tiles = size / 32, chunks = (end - begin + 31) / 32, width = chunks * 32;
    bf16 left[tiles * TILE] __attribute__((aligned(64))), shares[chunks * TILE] __attribute__((aligned(64)));
    float scores[16 * width] __attribute__((aligned(64))), sums[1024] __attribute__((aligned(64)));
    pack_left(count, query, query_stride, size, left);
    score((end - begin + 15) / 16 - 1, tiles, left, key + skip / 16 * tiles * TILE, scores, width);
    memset(shares, 0, sizeof shares);
    for (ptrdiff_t i = 0; i < count; i++) {
        float *restrict line = scores + i * width, largest = -INFINITY, sum = 0.0f;
        ptrdiff_t own = first + i, a = own + 1 > window + begin ? own + 1 - window - begin : 0, b = own + 1 - begin;
#pragma omp simd reduction(max : largest)
        for (ptrdiff_t j = a; j < b; j++) largest = line[j] > largest ? line[j] : largest;
        for (ptrdiff_t j = a; j < b; j++) sum += line[j] = power(scale * line[j] - scale * largest);
        for (ptrdiff_t j = 0; j < a; j++) line[j] = 0.0f;
        for (ptrdiff_t j = b; j < width; j++) line[j] = 0.0f;
        for (ptrdiff_t j = 0; j < width; j++) line[j] /= sum;
        for (ptrdiff_t j = 0; j < width; j += 32)
            _mm512_store_si512(shares + j / 32 * TILE + i * 32, narrow_32(line + j, line + j + 16));
    }
    for (ptrdiff_t d = 0; d < size; d += 64) {
        gather(chunks, shares, value + (skip / 32 * (size / 16) + d / 16) * TILE, size / 16, 0, sums);
        spill(count, sums, gathered + d, stride);
    }
}

/* Where a request's keys and values that are seen begin: with a whole block. */
static inline ptrdiff_t seen_from(ptrdiff_t seen, ptrdiff_t window) { return (seen + 1 > window ? seen + 1 - window : 0) / BLOCK * BLOCK; }

/* How many bfloat16 numbers `attend_cached` needs beside its arguments. */
ptrdiff_t cache_scratch(ptrdiff_t requests, ptrdiff_t keys, ptrdiff_t size, ptrdiff_t window, const int64_t *counts, const int64_t *seen) {
    ptrdiff_t tokens = 0;
    for (ptrdiff_t r = 0; r < requests; r++)
        if (counts[r] >= FEW) tokens += (seen[r] + counts[r] - seen_from(seen[r], window) + BLOCK - 1) / BLOCK * BLOCK;
    return tokens * keys * size * 2;
}

/* Store the new tokens' keys and values, and attend. Of each request: `counts` new tokens, which begin at `starts` in
   `turned` (token, queries and keys, size) and `heads` (token, queries and keys and values, size), after `seen` ones; and
   `tables`, `most` blocks wide. A token sees itself and window - 1 before it. */
void attend_cached(ptrdiff_t requests, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size, ptrdiff_t window, ptrdiff_t most,
                   const int64_t *starts, const int64_t *counts, const int64_t *seen, const int64_t *tables, bf16 *pool,
                   const bf16 *turned, const bf16 *heads, float scale, bf16 *scratch, bf16 *gathered) {
    ptrdiff_t turning = queries + keys, all = turning + keys, group = queries / keys, tiles = size / 32, longest = 0;
    int64_t packed[requests + 1]; /* where in `scratch` a request's are, in tokens */
    Pool p = {pool, keys, size};
    packed[0] = 0;
    for (ptrdiff_t r = 0; r < requests; r++) {
        ptrdiff_t tokens = (seen[r] + counts[r] - seen_from(seen[r], window) + BLOCK - 1) / BLOCK * BLOCK;
        packed[r + 1] = packed[r] + (counts[r] >= FEW ? tokens : 0);
        longest = counts[r] > longest ? counts[r] : longest;
    }
#pragma omp parallel
    {
        configure();
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < requests; r++)
            for (ptrdiff_t i = 0; i < counts[r]; i++) {
                ptrdiff_t token = starts[r] + i;
                memcpy(place(&p, tables + r * most, seen[r] + i, 0), turned + (token * turning + queries) * size, (size_t)(keys * size) * sizeof(bf16));
                memcpy(place(&p, tables + r * most, seen[r] + i, 1), heads + (token * all + turning) * size, (size_t)(keys * size) * sizeof(bf16));
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (ptrdiff_t r = 0; r < requests; r++)
            for (ptrdiff_t shared = 0; shared < keys; shared++) {
                ptrdiff_t from = seen_from(seen[r], window), end = seen[r] + counts[r];
                bf16 *key = scratch + (packed[r] * keys + shared * (packed[r + 1] - packed[r])) * size * 2;
                bf16 *value = key + (packed[r + 1] - packed[r]) * size;
                if (counts[r] < FEW) {
                    for (ptrdiff_t i = 0; i < counts[r]; i++) {
                        ptrdiff_t own = seen[r] + i, first = own + 1 > window ? own + 1 - window : 0, token = starts[r] + i;
                        attend_one(&p, tables + r * most, shared, first, own, group, turned + (token * turning + shared * group) * size,
                                   scale, gathered + (token * queries + shared * group) * size);
                    }
                    continue;
                }
                for (ptrdiff_t token = from; token < end; token += BLOCK) {
                    ptrdiff_t count = end - token < BLOCK ? end - token : BLOCK;
                    bf16 *across = key + (token - from) / 16 * tiles * TILE;
                    if (count <= 16) memset(across + tiles * TILE, 0, (size_t)(tiles * TILE) * sizeof(bf16));
                    pack_across(count, place(&p, tables + r * most, token, 0) + shared * size, keys * size, size, across);
                    pack_down(count, place(&p, tables + r * most, token, 1) + shared * size, keys * size, size,
                              value + (token - from) / 32 * (size / 16) * TILE);
                }
            }
#pragma omp for collapse(3) schedule(dynamic)
        for (ptrdiff_t r = 0; r < requests; r++)
            for (ptrdiff_t head = 0; head < queries; head++)
                for (ptrdiff_t i = 0; i < longest; i += 16) {
                    if (counts[r] < FEW || i >= counts[r]) continue;
                    ptrdiff_t token = starts[r] + i, held = packed[r + 1] - packed[r];
                    const bf16 *key = scratch + (packed[r] * keys + head / group * held) * size * 2;
                    attend_some(seen_from(seen[r], window), seen[r] + i, counts[r] - i < 16 ? counts[r] - i : 16, window, size, key,
                                key + held * size, turned + (token * turning + head) * size, turning * size, scale,
                                gathered + (token * queries + head) * size, queries * size);
                }
        _tile_release();
    }
}

/* See passes.c and products.c. */
void norm(ptrdiff_t rows, ptrdiff_t n, const bf16 *x, const float *factor, float eps, bf16 *y, float *inverse);
void add_norm(ptrdiff_t rows, ptrdiff_t n, const bf16 *x, const bf16 *y, const float *factor, float eps, bf16 *sum, float *inverse);
void turn(ptrdiff_t rows, ptrdiff_t all, ptrdiff_t heads, ptrdiff_t size, const bf16 *x, const float *cosine, const float *sine,
          const float *factor, float eps, bf16 *turned, float *inverse);
void gate(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t silu, const bf16 *gate_and_up, bf16 *product);
ptrdiff_t product_scratch(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t adapters, ptrdiff_t ranks);
void product(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t adapters, ptrdiff_t ranks, const bf16 *x, const bf16 *w,
             const bf16 *const *a, const bf16 *const *b, const int64_t *firsts, const int64_t *given_ends, bf16 *low, bf16 *y,
             bf16 *scratch);

/* A layer: its products' matrices (of queries, keys and values; of what is gathered; of gate and up; down), the factors of
   its norms, NULL where there is none, and its keys and values. `kind` is which of the passes' kinds it is of. */
typedef struct {
    const bf16 *products[4];
    const float *before_attention, *turned, *after_attention, *before_mlp, *after_mlp;
    bf16 *pool;
    int64_t kind;
} Layer;

/* What all layers of a kind have in common in one pass. */
typedef struct {
    const float *cosine, *sine;
    const int64_t *tables;
    int64_t window, most;
} Kind;

typedef struct {
    int64_t layers, tokens, width, queries, keys, size, middle, silu, requests, adapters, ranks[4];
    float eps, scale;
    const Layer *layer;
    const Kind *kind;
    const int64_t *starts, *counts, *seen, *firsts, *ends;
    const bf16 *const *pairs; /* of each layer and product all adapters' A, then all B */
    bf16 *x, *scratch;
} Pass;

/* The parts of a pass's scratch. */
typedef struct {
    bf16 *normed, *heads, *turned, *gathered, *out, *both, *product, *low, *packed, *attention;
    float *inverse;
    ptrdiff_t total;
} Parts;

static bf16 *room(Parts *p, bf16 *scratch, ptrdiff_t numbers) {
    bf16 *found = scratch ? scratch + p->total : NULL;
    p->total += (numbers + 31) / 32 * 32;
    return found;
}

static ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

static ptrdiff_t outputs(const Pass *p, int product) {
    ptrdiff_t all[4] = {(p->queries + 2 * p->keys) * p->size, p->width, 2 * p->middle, p->width};
    return all[product];
}

static ptrdiff_t inputs(const Pass *p, int product) {
    ptrdiff_t all[4] = {p->width, p->queries * p->size, p->width, p->middle};
    return all[product];
}

static Parts parts_of(const Pass *p, bf16 *scratch) {
    Parts parts = {0};
    ptrdiff_t packed = 0, ranks = 0, attention = 0;
    for (int i = 0; i < 4; i++) {
        packed = larger(packed, product_scratch(p->tokens, outputs(p, i), inputs(p, i), p->adapters, p->ranks[i]));
        ranks = larger(ranks, p->ranks[i]);
    }
    for (ptrdiff_t i = 0; i < p->layers; i++) {
        ptrdiff_t window = p->kind[p->layer[i].kind].window;
        attention = larger(attention, cache_scratch(p->requests, p->keys, p->size, window, p->counts, p->seen));
    }
    parts.normed = room(&parts, scratch, p->tokens * p->width);
    parts.heads = room(&parts, scratch, p->tokens * outputs(p, 0));
    parts.turned = room(&parts, scratch, p->tokens * (p->queries + p->keys) * p->size);
    parts.gathered = room(&parts, scratch, p->tokens * p->queries * p->size);
    parts.out = room(&parts, scratch, p->tokens * p->width);
    parts.both = room(&parts, scratch, p->tokens * 2 * p->middle);
    parts.product = room(&parts, scratch, p->tokens * p->middle);
    parts.low = room(&parts, scratch, p->adapters * p->tokens * ranks);
    parts.packed = room(&parts, scratch, packed);
    parts.attention = room(&parts, scratch, attention);
    parts.inverse = (float *)room(&parts, scratch, 2 * p->tokens * (p->queries + p->keys));
    return parts;
}

/* How many bfloat16 numbers `decode` needs as scratch. */
ptrdiff_t decode_scratch(const Pass *p) { return parts_of(p, NULL).total; }

static void add(ptrdiff_t n, const bf16 *x, const bf16 *y, bf16 *sum) {
    for (ptrdiff_t i = 0; i < n; i++) sum[i] = narrow(wide(x[i]) + wide(y[i]));
}

static void multiply_by(const Pass *p, const Parts *parts, ptrdiff_t layer, int product_number, const bf16 *x, bf16 *y) {
    const bf16 *const *pairs = p->pairs + (layer * 4 + product_number) * 2 * p->adapters;
    product(p->tokens, outputs(p, product_number), inputs(p, product_number), p->adapters, p->ranks[product_number], x,
            p->layer[layer].products[product_number], pairs, pairs + p->adapters, p->firsts, p->ends, parts->low, y, parts->packed);
}

static void go_on(const Pass *p, const Parts *parts, const float *factor) {
    if (factor) add_norm(p->tokens, p->width, p->x, parts->out, factor, p->eps, p->x, parts->inverse);
    else add(p->tokens * p->width, p->x, parts->out, p->x);
}

/* Run a decoder's layers on x (tokens, width), in place. */
void decode(const Pass *p) {
    Parts parts = parts_of(p, p->scratch);
    memset(parts.gathered, 0, (size_t)(p->tokens * p->queries * p->size) * sizeof(bf16)); /* rows of no request stay 0 */
    for (ptrdiff_t i = 0; i < p->layers; i++) {
        const Layer *layer = p->layer + i;
        const Kind *kind = p->kind + layer->kind;
        norm(p->tokens, p->width, p->x, layer->before_attention, p->eps, parts.normed, parts.inverse);
        multiply_by(p, &parts, i, 0, parts.normed, parts.heads);
        turn(p->tokens, p->queries + 2 * p->keys, p->queries + p->keys, p->size, parts.heads, kind->cosine, kind->sine, layer->turned,
             p->eps, parts.turned, parts.inverse);
        attend_cached(p->requests, p->queries, p->keys, p->size, kind->window, kind->most, p->starts, p->counts, p->seen, kind->tables,
                      layer->pool, parts.turned, parts.heads, p->scale, parts.attention, parts.gathered);
        multiply_by(p, &parts, i, 1, parts.gathered, parts.out);
        go_on(p, &parts, layer->after_attention);
        norm(p->tokens, p->width, p->x, layer->before_mlp, p->eps, parts.normed, parts.inverse);
        multiply_by(p, &parts, i, 2, parts.normed, parts.both);
        gate(p->tokens, p->middle, p->silu, parts.both, parts.product);
        multiply_by(p, &parts, i, 3, parts.product, parts.out);
        go_on(p, &parts, layer->after_mlp);
    }
}

/* W of 8 bits: scales[o] x whole numbers, as tiles of 16 outputs of 64 inputs, four by four. `in` is a multiple of 64. */
void shrink(ptrdiff_t out, ptrdiff_t in, const bf16 *w, int8_t *packed, float *scales) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t o = 0; o < out; o++) {
        const bf16 *from = w + o * in;
        int8_t *to = packed + o / 16 * 16 * in + o % 16 * 4;
        float largest = 0.0f;
        for (ptrdiff_t i = 0; i < in; i++) largest = fabsf(wide(from[i])) > largest ? fabsf(wide(from[i])) : largest;
        float by = largest > 0.0f ? 127.0f / largest : 0.0f;
        scales[o] = largest / 127.0f;
        for (ptrdiff_t i = 0; i < in; i++) to[i / 4 * 64 + i % 4] = (int8_t)lrintf(wide(from[i]) * by);
    }
}

/* 16 rows as two numbers of 8 bits each: x = scale x (high + low / 256) but for a 65,000th of a row's largest. */
static void split(ptrdiff_t in, const bf16 *x, int8_t *high, int8_t *low, float *scales) {
    for (ptrdiff_t row = 0; row < 16; row++) {
        float largest = 0.0f;
        for (ptrdiff_t i = 0; i < in; i++) largest = fabsf(wide(x[row * in + i])) > largest ? fabsf(wide(x[row * in + i])) : largest;
        float by = largest > 0.0f ? 126.0f / largest : 0.0f;
        scales[row] = largest / 126.0f;
        for (ptrdiff_t i = 0; i < in; i++) {
            float whole = wide(x[row * in + i]) * by, first = rintf(whole), rest = rintf((whole - first) * 256.0f);
            ptrdiff_t at = i / 64 * 1024 + row * 64 + i % 64;
            high[at] = (int8_t)first;
            low[at] = (int8_t)(rest > 127.0f ? 127.0f : rest);
        }
    }
}

/* y = x W^T in float for 16 rows; outputs are a multiple of 128. */
void head(ptrdiff_t out, ptrdiff_t in, const bf16 *x, const bf16 *w, float *y, bf16 *scratch) {
    pack_rows(0, 1, in, in / 32, x, scratch);
#pragma omp parallel
    {
        float sums[1024] __attribute__((aligned(64)));
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads(), quarter = out / 64;
        configure();
        for (ptrdiff_t block = quarter * me / all; block < quarter * (me + 1) / all; block++) {
            zero();
            multiply_few(in / 32, scratch, w + block * 16 * in, quarter * 16 * in);
            suspend(sums);
            for (ptrdiff_t row = 0; row < 16; row++)
                for (ptrdiff_t part = 0; part < 4; part++)
                    _mm512_storeu_ps(y + row * out + (block + part * quarter) * 16, _mm512_load_ps(sums + part * 256 + row * 16));
        }
        _tile_release();
    }
}

/* The same with W of 8 bits. */
void head_of_8_bits(ptrdiff_t out, ptrdiff_t in, const bf16 *x, const int8_t *w, const float *scales, float *y, int8_t *scratch) {
    float x_scales[16];
    int8_t *high = scratch, *low = scratch + 16 * in;
    split(in, x, high, low, x_scales);
#pragma omp parallel
    {
        int32_t sums[1024] __attribute__((aligned(64)));
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads(), half = out / 32;
        configure();
        for (ptrdiff_t block = half * me / all; block < half * (me + 1) / all; block++) {
            const int8_t *left = w + block * 16 * in, *right = left + half * 16 * in;
            zero();
            for (ptrdiff_t i = 0; i < 16 * in; i += 1024) {
                fetch(left + i + 2 * AHEAD);
                fetch(right + i + 2 * AHEAD);
                _tile_loadd(4, left + i, 64);
                _tile_loadd(6, high + i, 64);
                _tile_dpbssd(0, 6, 4);
                _tile_loadd(5, right + i, 64);
                _tile_dpbssd(1, 6, 5);
                _tile_loadd(7, low + i, 64);
                _tile_dpbssd(2, 7, 4);
                _tile_dpbssd(3, 7, 5);
            }
            suspend((float *)sums);
            for (ptrdiff_t row = 0; row < 16; row++)
                for (ptrdiff_t part = 0; part < 2; part++) {
                    ptrdiff_t word = (block + part * half) * 16;
                    __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums + part * 256 + row * 16));
                    __m512 rest = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 512 + part * 256 + row * 16));
                    __m512 found = _mm512_fmadd_ps(rest, _mm512_set1_ps(1.0f / 256.0f), whole);
                    __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scales[row]), _mm512_loadu_ps(scales + word));
                    _mm512_storeu_ps(y + row * out + word, _mm512_mul_ps(found, scale));
                }
        }
        _tile_release();
    }
}

/* The `count`-th largest of scores less `by` x scales. */
static float bound(ptrdiff_t words, ptrdiff_t count, const float *scores, const float *scales, float by) {
    float kept[count], least = -INFINITY;
    for (ptrdiff_t i = 0; i < count; i++) kept[i] = -INFINITY;
    for (ptrdiff_t word = 0; word < words; word += 16) {
        __m512 low = _mm512_fnmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(scales + word), _mm512_loadu_ps(scores + word));
        __mmask16 more = _mm512_cmp_ps_mask(low, _mm512_set1_ps(least), _CMP_GT_OQ);
        if (!more) continue;
        float lows[16];
        _mm512_storeu_ps(lows, low);
        for (int i = 0; i < 16; i++) {
            if (!(more >> i & 1) || lows[i] <= least) continue;
            ptrdiff_t smallest = 0;
            for (ptrdiff_t j = 1; j < count; j++) smallest = kept[j] < kept[smallest] ? j : smallest;
            kept[smallest] = lows[i];
            least = kept[0];
            for (ptrdiff_t j = 1; j < count; j++) least = kept[j] < least ? kept[j] : least;
        }
    }
    return least;
}

/* Scores of a head of 8 bits made those of 16 wherever they may be among the `counts` largest of their row. A rounded
   weight is off by up to half a scale, evenly: a score's error has the deviation norm(x) x scale / sqrt(12), and is
   less than nine times that but for once in 10^18. The best word comes to `best`. */
void refine(ptrdiff_t rows, ptrdiff_t words, ptrdiff_t in, const int64_t *counts, const bf16 *x, const bf16 *weight,
            const float *scales, float *scores, int64_t *best) {
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t row = 0; row < rows; row++) {
        float *own = scores + row * words, squares = 0.0f, top = -INFINITY;
        for (ptrdiff_t d = 0; d < in; d++) squares += wide(x[row * in + d]) * wide(x[row * in + d]);
        float by = 9.0f * sqrtf(squares / 12.0f), least = bound(words, counts[row], own, scales, by);
        best[row] = 0;
        for (ptrdiff_t word = 0; word < words; word += 16) {
            __m512 high = _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(scales + word), _mm512_loadu_ps(own + word));
            __mmask16 may = _mm512_cmp_ps_mask(high, _mm512_set1_ps(least), _CMP_GE_OQ);
            for (int i = 0; may; i++, may >>= 1) {
                if (!(may & 1)) continue;
                __m512 even = _mm512_setzero_ps();
                for (ptrdiff_t d = 0; d < in; d += 32)
                    even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_loadu_si512(x + row * in + d),
                                            (__m512bh)_mm512_loadu_si512(weight + (word + i) * in + d));
                float exact = own[word + i] = _mm512_reduce_add_ps(even);
                if (exact > top) top = exact, best[row] = word + i;
            }
        }
    }
}

#endif
