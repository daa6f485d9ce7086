/* What serving needs beside the passes: attention over keys and values that lie in blocks, and an output head of 8 bits
   a weight. */

#include "numbers.h"
#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)

enum { BLOCK = 32 /* tokens */ };

/* A layer's keys and values: `pool` has blocks of 32 tokens, and of each the keys and as many values of each head, as the
   tiles that products take: keys across, values down. A request's `table` names its blocks in the order of its tokens. */
typedef struct {
    bf16 *pool;
    ptrdiff_t keys, size;
} Pool;

static inline bf16 *tiles_of(const Pool *p, const int64_t *table, ptrdiff_t block, ptrdiff_t shared, ptrdiff_t value) {
    return p->pool + ((table[block] * 2 + value) * p->keys + shared) * BLOCK * p->size;
}

/* Store the keys and values of `count` tokens of a block, from its token `first` on, for the head `shared`. A block that
   begins is emptied: what is left of others would be multiplied by 0, and 0 times a NaN is NaN. */
static void store(const Pool *p, const int64_t *table, ptrdiff_t block, ptrdiff_t first, ptrdiff_t count, ptrdiff_t shared,
                  const bf16 *key, ptrdiff_t key_stride, const bf16 *value, ptrdiff_t value_stride) {
    bf16 *keys = tiles_of(p, table, block, shared, 0), *values = tiles_of(p, table, block, shared, 1);
    if (first == 0) memset(values, 0, (size_t)(BLOCK * p->size) * sizeof(bf16));
    if (count == BLOCK) {
        pack_across(count, key, key_stride, p->size, keys);
        pack_down(count, value, value_stride, p->size, values);
        return;
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        ptrdiff_t token = first + i;
        bf16 *across = keys + token / 16 * 16 * p->size + token % 16 * 2, *down = values + token / 2 * 32 + token % 2;
        for (ptrdiff_t d = 0; d < p->size; d += 2) memcpy(across + d * 16, key + i * key_stride + d, 2 * sizeof(bf16));
        for (ptrdiff_t d = 0; d < p->size; d++) down[d / 16 * TILE + d % 16 * 2] = value[i * value_stride + d];
    }
}

/* A request's new tokens, of which each has `group` queries that share a key. */
typedef struct {
    const int64_t *table;
    ptrdiff_t seen, count, window, group, shared;
} Asking;

/* Scores, and shares of the values, of one row of a product: the token `own`, where the first of `width` is `begin`. Sums
   are made lane by lane of whole blocks, so that they are the same whatever else is in the product. */
static void share(ptrdiff_t own, ptrdiff_t begin, ptrdiff_t width, ptrdiff_t window, float scale, float *restrict line, bf16 *shares) {
    ptrdiff_t from = own + 1 > window + begin ? own + 1 - window - begin : 0, to = own + 1 - begin;
    float largest = -INFINITY;
    __m512 sum = _mm512_setzero_ps();
#pragma omp simd reduction(max : largest)
    for (ptrdiff_t j = from; j < to; j++) largest = line[j] > largest ? line[j] : largest;
    for (ptrdiff_t j = 0; j < width; j++) {
        float e = power(scale * line[j] - scale * largest);
        line[j] = j >= from && j < to ? e : 0.0f;
    }
    for (ptrdiff_t j = 0; j < width; j += 16) sum = _mm512_add_ps(sum, _mm512_load_ps(line + j));
    float by = 1.0f / _mm512_reduce_add_ps(sum);
    for (ptrdiff_t j = 0; j < width; j++) line[j] *= by;
    for (ptrdiff_t j = 0; j < width; j += 32) _mm512_store_si512(shares + j / 32 * TILE, narrow_32(line + j, line + j + 16));
}

/* sums = 16 queries times the 32 keys of each of two blocks. */
static inline void meet_two(ptrdiff_t tiles, const bf16 *queries, const bf16 *one, const bf16 *two, float *sums) {
    zero();
    for (ptrdiff_t i = 0; i < tiles * TILE; i += TILE) {
        _tile_loadd(7, queries + i, 64);
        _tile_loadd(4, one + i, 64);
        _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(5, one + tiles * TILE + i, 64);
        _tile_dpbf16ps(1, 7, 5);
        _tile_loadd(6, two + i, 64);
        _tile_dpbf16ps(2, 7, 6);
        _tile_loadd(4, two + tiles * TILE + i, 64);
        _tile_dpbf16ps(3, 7, 4);
    }
    suspend(sums);
}

/* What up to 16 queries gather, of the request's `group` queries of each of its tokens, from the `first` of all on. */
static void attend(const Pool *p, const Asking *a, ptrdiff_t first, const bf16 *queries, ptrdiff_t stride, float scale,
                   bf16 *gathered, ptrdiff_t gathered_stride) {
    ptrdiff_t all = a->count * a->group, rows = all - first < 16 ? all - first : 16, tiles = p->size / 32;
    ptrdiff_t low = a->seen + first / a->group + 1 - a->window, begin = low > 0 ? low / BLOCK : 0;
    ptrdiff_t chunks = (a->seen + (first + rows - 1) / a->group) / BLOCK + 1 - begin, width = chunks * BLOCK;
    bf16 left[tiles * TILE] __attribute__((aligned(64))), shares[chunks * TILE] __attribute__((aligned(64)));
    float scores[16 * width] __attribute__((aligned(64))), sums[1024] __attribute__((aligned(64)));
    memset(left, 0, sizeof left);
    memset(shares, 0, sizeof shares);
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *query = queries + (first + row) / a->group * stride + (first + row) % a->group * p->size;
        for (ptrdiff_t i = 0; i < tiles; i++) _mm512_store_si512(left + i * TILE + row * 32, _mm512_loadu_si512(query + i * 32));
    }
    for (ptrdiff_t i = 0; i < chunks; i += 2) {
        ptrdiff_t next = i + 1 < chunks ? i + 1 : i; /* the last one's are computed twice where it is alone */
        meet_two(tiles, left, tiles_of(p, a->table, begin + i, a->shared, 0), tiles_of(p, a->table, begin + next, a->shared, 0), sums);
        for (ptrdiff_t row = 0; row < rows; row++)
            for (ptrdiff_t part = 0; part < 4 && i * BLOCK + part * 16 < width; part++)
                _mm512_store_ps(scores + row * width + i * BLOCK + part * 16, _mm512_load_ps(sums + part * 256 + row * 16));
    }
    for (ptrdiff_t row = 0; row < rows; row++)
        share(a->seen + (first + row) / a->group, begin * BLOCK, width, a->window, scale, scores + row * width, shares + row * 32);
    for (ptrdiff_t d = 0; d < p->size; d += 64) {
        zero();
        for (ptrdiff_t i = 0; i < chunks; i++) add_values(shares + i * TILE, tiles_of(p, a->table, begin + i, a->shared, 1) + d / 16 * TILE);
        suspend(sums);
        for (ptrdiff_t row = 0; row < rows; row++) {
            bf16 *to = gathered + (first + row) / a->group * gathered_stride + (first + row) % a->group * p->size + d;
            _mm512_storeu_si512(to, narrow_32(sums + row * 16, sums + 256 + row * 16));
            _mm512_storeu_si512(to + 32, narrow_32(sums + 512 + row * 16, sums + 768 + row * 16));
        }
    }
}

/* Store the new tokens' keys and values, and attend. Of each request: `counts` new tokens, which begin at `starts` in
   `turned` (token, queries and keys, size) and `heads` (token, queries and keys and values, size), after `seen` ones; and
   `tables`, `most` blocks wide. A token sees itself and window - 1 before it. */
static void attend_cached(ptrdiff_t requests, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size, ptrdiff_t window, ptrdiff_t most,
                          const int64_t *starts, const int64_t *counts, const int64_t *seen, const int64_t *tables, bf16 *pool,
                          const bf16 *turned, const bf16 *heads, float scale, bf16 *gathered) {
    ptrdiff_t turning = queries + keys, all = turning + keys, group = queries / keys, longest = 0;
    Pool p = {pool, keys, size};
    for (ptrdiff_t r = 0; r < requests; r++) longest = counts[r] > longest ? counts[r] : longest;
#pragma omp parallel
    {
        configure();
#pragma omp for collapse(3) schedule(static)
        for (ptrdiff_t r = 0; r < requests; r++)
            for (ptrdiff_t shared = 0; shared < keys; shared++)
                for (ptrdiff_t i = 0; i < longest / BLOCK + 2; i++) {
                    ptrdiff_t block = seen[r] / BLOCK + i, end = seen[r] + counts[r], from = block * BLOCK;
                    ptrdiff_t first = from < seen[r] ? seen[r] : from, last = end < from + BLOCK ? end : from + BLOCK;
                    if (first >= last) continue;
                    ptrdiff_t token = starts[r] + first - seen[r];
                    store(&p, tables + r * most, block, first - from, last - first, shared, turned + (token * turning + queries + shared) * size,
                          turning * size, heads + (token * all + turning + shared) * size, all * size);
                }
#pragma omp for collapse(3) schedule(dynamic)
        for (ptrdiff_t r = 0; r < requests; r++)
            for (ptrdiff_t shared = 0; shared < keys; shared++)
                for (ptrdiff_t first = 0; first < longest * group; first += 16) {
                    if (first >= counts[r] * group) continue;
                    Asking asking = {tables + r * most, seen[r], counts[r], window, group, shared};
                    attend(&p, &asking, first, turned + (starts[r] * turning + shared * group) * size, turning * size, scale,
                           gathered + (starts[r] * queries + shared * group) * size, queries * size);
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
    bf16 *normed, *heads, *turned, *gathered, *out, *both, *product, *low, *packed;
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
    ptrdiff_t packed = 0, ranks = 0;
    for (int i = 0; i < 4; i++) {
        packed = larger(packed, product_scratch(p->tokens, outputs(p, i), inputs(p, i), p->adapters, p->ranks[i]));
        ranks = larger(ranks, p->ranks[i]);
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
                      layer->pool, parts.turned, parts.heads, p->scale, parts.gathered);
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

/* y = x W^T in float for `groups` times 16 rows; outputs are a multiple of 128. What is read of W meets all rows. */
void head(ptrdiff_t groups, ptrdiff_t out, ptrdiff_t in, const bf16 *x, const bf16 *w, float *y, bf16 *scratch) {
    pack_rows(0, groups, in, in / 32, x, scratch);
#pragma omp parallel
    {
        float sums[1024] __attribute__((aligned(64)));
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads(), quarter = out / 64;
        configure();
        for (ptrdiff_t block = quarter * me / all; block < quarter * (me + 1) / all; block++)
            for (ptrdiff_t group = 0; group < groups; group++) {
                zero();
                multiply_few(in / 32, scratch + group * 16 * in, w + block * 16 * in, quarter * 16 * in);
                suspend(sums);
                for (ptrdiff_t row = 0; row < 16; row++)
                    for (ptrdiff_t part = 0; part < 4; part++)
                        _mm512_storeu_ps(y + (group * 16 + row) * out + (block + part * quarter) * 16,
                                         _mm512_load_ps(sums + part * 256 + row * 16));
            }
        _tile_release();
    }
}

/* Add the products of 16 rows of two numbers of 8 bits each and of 16 outputs in each of two places to the tiles 0 to 3. */
static inline void multiply_split(ptrdiff_t in, const int8_t *high, const int8_t *low, const int8_t *left, const int8_t *right) {
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
}

/* The same with W of 8 bits. */
void head_of_8_bits(ptrdiff_t groups, ptrdiff_t out, ptrdiff_t in, const bf16 *x, const int8_t *w, const float *scales, float *y,
                    int8_t *scratch) {
    float x_scales[groups * 16];
    for (ptrdiff_t group = 0; group < groups; group++) {
        int8_t *high = scratch + group * 32 * in;
        split(in, x + group * 16 * in, high, high + 16 * in, x_scales + group * 16);
    }
#pragma omp parallel
    {
        int32_t sums[1024] __attribute__((aligned(64)));
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads(), half = out / 32;
        configure();
        for (ptrdiff_t block = half * me / all; block < half * (me + 1) / all; block++)
            for (ptrdiff_t group = 0; group < groups; group++) {
                const int8_t *left = w + block * 16 * in, *high = scratch + group * 32 * in;
                zero();
                multiply_split(in, high, high + 16 * in, left, left + half * 16 * in);
                suspend((float *)sums);
                for (ptrdiff_t row = 0; row < 16; row++)
                    for (ptrdiff_t part = 0; part < 2; part++) {
                        ptrdiff_t word = (block + part * half) * 16;
                        __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums + part * 256 + row * 16));
                        __m512 rest = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 512 + part * 256 + row * 16));
                        __m512 found = _mm512_fmadd_ps(rest, _mm512_set1_ps(1.0f / 256.0f), whole);
                        __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scales[group * 16 + row]), _mm512_loadu_ps(scales + word));
                        _mm512_storeu_ps(y + (group * 16 + row) * out + word, _mm512_mul_ps(found, scale));
                    }
            }
        _tile_release();
    }
}

/* Which of the 16 words from `word` on may be chosen; `allowed` has a bit a word, or is NULL. */
static __mmask16 may_come(const uint32_t *allowed, ptrdiff_t word) {
    return allowed ? (__mmask16)(allowed[word / 32] >> word % 32) : 0xffff;
}

/* The `count`-th largest of scores less `by` x scales. */
static float bound(ptrdiff_t words, ptrdiff_t count, const float *scores, const float *scales, const uint32_t *allowed, float by) {
    float kept[count], least = -INFINITY;
    for (ptrdiff_t i = 0; i < count; i++) kept[i] = -INFINITY;
    for (ptrdiff_t word = 0; word < words; word += 16) {
        __m512 low = _mm512_fnmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(scales + word), _mm512_loadu_ps(scores + word));
        __mmask16 more = _mm512_cmp_ps_mask(low, _mm512_set1_ps(least), _CMP_GT_OQ) & may_come(allowed, word);
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

/* The scores of up to 16 words as `head` computes them, to the last bit; `left` is the row, packed. */
static void score_words(ptrdiff_t count, const int64_t *words, ptrdiff_t in, const bf16 *left, const bf16 *weight, float *scores) {
    bf16 rows[16 * in] __attribute__((aligned(64))), packed[16 * in] __attribute__((aligned(64)));
    float sums[1024] __attribute__((aligned(64)));
    for (ptrdiff_t i = 0; i < count; i++) memcpy(rows + i * in, weight + words[i] * in, (size_t)in * sizeof(bf16));
    pack_across(count, rows, in, in, packed);
    meet(1, in / 32, left, packed, sums);
    memcpy(scores, sums, (size_t)count * sizeof(float));
}

/* Put a word among the `count` best, which are in their order; of equal ones the earlier word comes first. */
static void keep(ptrdiff_t count, float score, int64_t word, float *values, int64_t *tokens) {
    if (!(score > values[count - 1])) return;
    ptrdiff_t place = count - 1;
    for (; place && score > values[place - 1]; place--) values[place] = values[place - 1], tokens[place] = tokens[place - 1];
    values[place] = score, tokens[place] = word;
}

/* The `counts` largest scores of some rows among the words that are allowed, and which words have them; behind them
   come scores of -infinity, to `width`. They are those of a head of 16 bits, found by scores that are near: of a head
   of 8 bits, or the same. A rounded weight is off by up to half a scale, evenly: a score's error has the deviation
   norm(x) x scale / sqrt(12), and is less than nine times that but for once in 10^18. */
void likeliest(ptrdiff_t rows, ptrdiff_t words, ptrdiff_t in, ptrdiff_t width, const int64_t *which, const int64_t *counts, const bf16 *x,
               const bf16 *weight, const float *scales, const float *near, const uint32_t *allowed, float *values, int64_t *tokens) {
#pragma omp parallel
    {
        configure();
#pragma omp for schedule(dynamic)
        for (ptrdiff_t row = 0; row < rows; row++) {
            bf16 left[16 * in] __attribute__((aligned(64)));
            const float *own = near + which[row] * words;
            const bf16 *state = x + which[row] * in;
            const uint32_t *may = allowed ? allowed + row * (words / 32) : NULL;
            float squares = 0.0f, scores[16];
            int64_t found[32]; /* 16 are scored together, and 16 more may be found by then */
            ptrdiff_t some = 0;
            for (ptrdiff_t i = 0; i < width; i++) values[row * width + i] = -INFINITY, tokens[row * width + i] = 0;
            if (!counts[row]) continue;
            for (ptrdiff_t d = 0; d < in; d++) squares += wide(state[d]) * wide(state[d]);
            float by = 9.0f * sqrtf(squares / 12.0f), least = bound(words, counts[row], own, scales, may, by);
            pack_left(1, state, in, in, left);
            for (ptrdiff_t word = 0; word < words; word += 16) {
                __m512 high = _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(scales + word), _mm512_loadu_ps(own + word));
                __mmask16 large = _mm512_cmp_ps_mask(high, _mm512_set1_ps(least), _CMP_GE_OQ) & may_come(may, word);
                if (!large && word + 16 < words) continue;
                for (int i = 0; large; i++, large >>= 1)
                    if (large & 1) found[some++] = word + i;
                while (some >= 16 || (some && word + 16 >= words)) {
                    ptrdiff_t now = some < 16 ? some : 16;
                    score_words(now, found, in, left, weight, scores);
                    for (ptrdiff_t i = 0; i < now; i++) keep(counts[row], scores[i], found[i], values + row * width, tokens + row * width);
                    some -= now;
                    memmove(found, found + now, (size_t)some * sizeof(int64_t));
                }
            }
        }
        _tile_release();
    }
}

#endif
