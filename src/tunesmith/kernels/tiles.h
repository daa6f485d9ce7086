/* Numbers as tiles of the matrix unit (Intel's AMX, Architecture Instruction Set Extensions, chapter 3), and products of
   these. */

#pragma once

#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__linux__)

#include <immintrin.h>

enum { TILE = 512, AHEAD = 2 * TILE };

static inline void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t columns[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.columns[i] = 64, tiles.rows[i] = 16;
    __asm__ volatile("" ::"r"(&tiles) : "memory"); /* GCC takes only the first bytes of it for read */
    _tile_loadconfig(&tiles);
}

/* Exchange rows and columns of 16 x 16 numbers. */
static inline void exchange(const __m512i *rows, __m512i *columns) {
    __m512i pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
            fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
        }
    for (int i = 0; i < 4; i++) { /* of `fours`, each quarter holds four rows of one column */
        __m512i even_low = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88), odd_low = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
        columns[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        columns[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        columns[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        columns[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

/* A product's rows and its matrix, as tiles: `x` has 16 rows of 32 inputs a tile, and both lie block of 16 after block,
   with `step` tiles from one to the next. */
typedef struct {
    const bf16 *x, *w;
    ptrdiff_t tiles, x_step, w_step;
} Operands;

static inline const bf16 *rows_of(const Operands *o, ptrdiff_t block) { return o->x + block * o->x_step * TILE; }
static inline const bf16 *outputs_of(const Operands *o, ptrdiff_t block) { return o->w + block * o->w_step * TILE; }

/* Results that are yet to be made bfloat16: four tiles, of which the second lies beside the first. This is done while
   the unit is at the next ones. */
typedef struct {
    const float *sums;
    bf16 *y;
    ptrdiff_t width, row, rows;
} Pending;

static inline __m512i narrow_32(const float *low, const float *high) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(high), _mm512_load_ps(low));
}

static inline void drain(Pending *p, ptrdiff_t rows) {
    for (; rows > 0 && p->row < p->rows; rows--, p->row++) {
        const float *line = p->sums + p->row / 16 * 512 + p->row % 16 * 16;
        _mm512_storeu_si512(p->y + p->row * p->width, narrow_32(line, line + 256));
    }
}

/* Add the products of two times 16 rows and two times 16 outputs to the tiles 0 to 3. */
static inline void multiply(const Operands *o, ptrdiff_t row, ptrdiff_t block, Pending *before) {
    const bf16 *x0 = rows_of(o, row), *x1 = rows_of(o, row + 1), *w0 = outputs_of(o, block), *w1 = outputs_of(o, block + 1);
    for (ptrdiff_t i = 0; i < o->tiles * TILE; i += TILE) {
        _tile_loadd(4, w0 + i, 64);
        _tile_loadd(6, x0 + i, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, w1 + i, 64);
        _tile_dpbf16ps(1, 6, 5);
        _tile_loadd(7, x1 + i, 64);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
        drain(before, 2);
    }
}

/* The same for 16 rows: tiles 0 and 1. */
static inline void multiply_half(const Operands *o, ptrdiff_t row, ptrdiff_t block, Pending *before) {
    const bf16 *x = rows_of(o, row), *w0 = outputs_of(o, block), *w1 = outputs_of(o, block + 1);
    for (ptrdiff_t i = 0; i < o->tiles * TILE; i += TILE) {
        _tile_loadd(6, x + i, 64);
        _tile_loadd(4, w0 + i, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, w1 + i, 64);
        _tile_dpbf16ps(1, 6, 5);
        drain(before, 2);
    }
}

/* Have a tile on its way from memory. */
static inline void fetch(const void *tile) {
    for (int line = 0; line < 1024; line += 64) _mm_prefetch((const char *)tile + line, _MM_HINT_T1);
}

/* Add the products of 16 rows and of 16 outputs in each of four places to the tiles 0 to 3: memory is read faster in
   several places at once. */
static inline void multiply_few(ptrdiff_t tiles, const bf16 *x, const bf16 *w, ptrdiff_t apart) {
    for (ptrdiff_t i = 0; i < tiles * TILE; i += TILE) {
        for (int part = 0; part < 4; part++) fetch(w + part * apart + i + AHEAD);
        _tile_loadd(7, x + i, 64);
        _tile_loadd(4, w + i, 64);
        _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(5, w + apart + i, 64);
        _tile_dpbf16ps(1, 7, 5);
        _tile_loadd(6, w + 2 * apart + i, 64);
        _tile_dpbf16ps(2, 7, 6);
        _tile_loadd(4, w + 3 * apart + i, 64);
        _tile_dpbf16ps(3, 7, 4);
    }
}

static inline void pack_rows(ptrdiff_t from, ptrdiff_t to, ptrdiff_t width, ptrdiff_t tiles, const bf16 *x, bf16 *packed) {
    for (ptrdiff_t row = from * 16; row < to * 16; row++)
        for (ptrdiff_t i = 0; i < tiles; i++)
            _mm512_store_si512(packed + (row / 16 * tiles + i) * TILE + row % 16 * 32, _mm512_loadu_si512(x + row * width + i * 32));
}

static inline void zero(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums go on where they were left. */
static inline void resume(const float *sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
}

static inline void suspend(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* 32 rows of 32 numbers, as far as there are rows, as two tiles of pairs of rows. */
static inline void interleave(ptrdiff_t rows, const bf16 *x, ptrdiff_t width, bf16 *left, bf16 *right) {
    static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62,
         31, 63}};
    __m512i first = _mm512_loadu_si512(order[0]), second = _mm512_loadu_si512(order[1]), nothing = _mm512_setzero_si512();
    for (ptrdiff_t row = 0; row < 32; row += 2) {
        __m512i even = row < rows ? _mm512_loadu_si512(x + row * width) : nothing;
        __m512i odd = row + 1 < rows ? _mm512_loadu_si512(x + (row + 1) * width) : nothing;
        _mm512_store_si512(left + row * 16, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_store_si512(right + row * 16, _mm512_permutex2var_epi16(even, second, odd));
    }
}

/* `size` numbers of 16 tokens, as far as there are, as tiles: the left side of a product. */
static inline void pack_left(ptrdiff_t length, const bf16 *x, ptrdiff_t stride, ptrdiff_t size, bf16 *packed) {
    for (ptrdiff_t token = 0; token < 16; token++)
        for (ptrdiff_t d = 0; d < size; d += 32) {
            bf16 *to = packed + d / 32 * TILE + token * 32;
            _mm512_store_si512(to, token < length ? _mm512_loadu_si512(x + token * stride + d) : _mm512_setzero_si512());
        }
}

/* `size` numbers of each token as the right side of a product that sums over them: tiles of 16 tokens' pairs. */
static inline void pack_across(ptrdiff_t length, const bf16 *x, ptrdiff_t stride, ptrdiff_t size, bf16 *packed) {
    for (ptrdiff_t token = 0; token < length; token += 16)
        for (ptrdiff_t d = 0; d < size; d += 32, packed += TILE) {
            __m512i rows[16], columns[16];
            for (ptrdiff_t i = 0; i < 16; i++)
                rows[i] = token + i < length ? _mm512_loadu_si512(x + (token + i) * stride + d) : _mm512_setzero_si512();
            exchange(rows, columns);
            for (ptrdiff_t i = 0; i < 16; i++) _mm512_store_si512(packed + i * 32, columns[i]);
        }
}

/* The same as the right side of a product that sums over the tokens: tiles of 32 tokens of 16 numbers. */
static inline void pack_down(ptrdiff_t length, const bf16 *x, ptrdiff_t stride, ptrdiff_t size, bf16 *packed) {
    for (ptrdiff_t token = 0; token < length; token += 32)
        for (ptrdiff_t d = 0; d < size; d += 32) {
            bf16 *to = packed + (token / 32 * (size / 16) + d / 16) * TILE;
            interleave(length - token, x + token * stride + d, stride, to, to + TILE);
        }
}

/* sums = tile of 16 rows times up to four tiles across, each `tiles` after the other. */
static inline void meet(ptrdiff_t count, ptrdiff_t tiles, const bf16 *left, const bf16 *right, float *sums) {
    zero();
    for (ptrdiff_t i = 0; i < tiles; i++) {
        const bf16 *w = right + i * TILE;
        _tile_loadd(7, left + i * TILE, 64);
        _tile_loadd(4, w, 64);
        _tile_dpbf16ps(0, 7, 4);
        if (count < 2) continue;
        _tile_loadd(5, w + tiles * TILE, 64);
        _tile_dpbf16ps(1, 7, 5);
        if (count < 3) continue;
        _tile_loadd(6, w + 2 * tiles * TILE, 64);
        _tile_dpbf16ps(2, 7, 6);
        if (count < 4) continue;
        _tile_loadd(4, w + 3 * tiles * TILE, 64);
        _tile_dpbf16ps(3, 7, 4);
    }
    suspend(sums);
}

/* Add 16 rows of weights times 32 values, four times 16 numbers of these, to the tiles 0 to 3. */
static inline void add_values(const bf16 *weights, const bf16 *values) {
    _tile_loadd(7, weights, 64);
    _tile_loadd(4, values, 64);
    _tile_dpbf16ps(0, 7, 4);
    _tile_loadd(5, values + TILE, 64);
    _tile_dpbf16ps(1, 7, 5);
    _tile_loadd(6, values + 2 * TILE, 64);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(4, values + 3 * TILE, 64);
    _tile_dpbf16ps(3, 7, 4);
}

/* sums (+)= 16 rows of weights times the tokens' numbers, four times 16 of these; `left` and `right` from the first of
   `chunks` of 32 tokens on, whose tiles are `step` apart. */
static inline void gather(ptrdiff_t chunks, const bf16 *left, const bf16 *right, ptrdiff_t step, ptrdiff_t more, float *sums) {
    if (more) resume(sums);
    else zero();
    for (ptrdiff_t i = 0; i < chunks; i++) add_values(left + i * TILE, right + i * step * TILE);
    suspend(sums);
}

/* Four tiles side by side to bfloat16, as far as there are rows. */
static inline void spill(ptrdiff_t rows, const float *sums, bf16 *y, ptrdiff_t stride) {
    for (ptrdiff_t row = 0; row < rows && row < 16; row++) {
        _mm512_storeu_si512(y + row * stride, narrow_32(sums + row * 16, sums + 256 + row * 16));
        _mm512_storeu_si512(y + row * stride + 32, narrow_32(sums + 512 + row * 16, sums + 768 + row * 16));
    }
}

/* The scores of 16 queries with the keys up to theirs: (16, up to 16 x blocks) in rows of `width`. */
static inline void score(ptrdiff_t block, ptrdiff_t tiles, const bf16 *left, const bf16 *right, float *scores, ptrdiff_t width) {
    float sums[1024] __attribute__((aligned(64)));
    for (ptrdiff_t first = 0; first <= block; first += 4) {
        ptrdiff_t count = block + 1 - first < 4 ? block + 1 - first : 4;
        meet(count, tiles, left, right + first * tiles * TILE, sums);
        for (ptrdiff_t i = 0; i < count; i++)
            for (int row = 0; row < 16; row++)
                _mm512_store_ps(scores + row * width + (first + i) * 16, _mm512_load_ps(sums + i * 256 + row * 16));
    }
}

#endif
