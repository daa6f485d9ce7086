/* Products of few rows with large frozen matrices are bound by reading these: packed for the matrix unit they are read
   once, from the first byte to the last, and the adapters' products are added before the result leaves the unit.

   A tile of a packed matrix W (out, in) has 16 outputs of 32 inputs: for each pair of inputs, the 16 outputs' weights
   of both, 1 KiB in all. The tiles of 16 outputs lie behind one another. */

#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, LARGE_PAGE = 1 << 21 };
enum { LONGEST_SUM = 8192, PART_OF_SUM = 4096, HELD = 32 /* blocks of rows that stay in the cache */ };

/* Linux lets a process use the tiles once it has asked (Documentation/arch/x86/xstate.rst). */
ptrdiff_t has_matrix_unit(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

/* W[o][i] = w[o x out_step + i x in_step] for o < out and i < in, else 0, of `count` matrices; `all_out` and `all_in`
   are multiples of 16 and 32. */
void pack(ptrdiff_t count, ptrdiff_t step, ptrdiff_t out, ptrdiff_t in, ptrdiff_t all_out, ptrdiff_t all_in,
          ptrdiff_t out_step, ptrdiff_t in_step, ptrdiff_t alone, const bf16 *w, bf16 *packed) {
#pragma omp parallel for collapse(2) schedule(static) if (!alone)
    for (ptrdiff_t matrix = 0; matrix < count; matrix++)
        for (ptrdiff_t o = 0; o < all_out; o += 16)
            for (ptrdiff_t i = 0; i < all_in; i += 32) {
                const bf16 *from = w + matrix * step + o * out_step + i * in_step;
                bf16 *tile = packed + matrix * all_out * all_in + o * all_in + i * 16;
                ptrdiff_t outs = out - o < 16 ? out - o : 16, ins = in - i < 32 ? in - i : 32;
                if (outs < 16 || ins < 32) memset(tile, 0, TILE * sizeof(bf16));
                if (in_step == 1 && ins == 32 && outs == 16) {
                    __m512i rows[16], columns[16];
                    for (ptrdiff_t b = 0; b < 16; b++) rows[b] = _mm512_loadu_si512(from + b * out_step);
                    exchange(rows, columns);
                    for (ptrdiff_t b = 0; b < 16; b++) _mm512_storeu_si512(tile + b * 32, columns[b]);
                } else if (out_step == 1 && ins == 32 && outs == 16)
                    for (ptrdiff_t a = 0; a < 32; a += 2) {
                        __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(from + a * in_step)));
                        __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(from + (a + 1) * in_step)));
                        _mm512_storeu_si512(tile + a * 16, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
                    }
                else
                    for (ptrdiff_t a = 0; a < ins; a++)
                        for (ptrdiff_t b = 0; b < outs; b++)
                            tile[(a / 2) * 32 + b * 2 + a % 2] = from[b * out_step + a * in_step];
            }
}

/* Ask for large pages: the tables of small ones take as long to read as the numbers. */
void spread(void *memory, ptrdiff_t bytes) {
    uintptr_t first = ((uintptr_t)memory + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / LARGE_PAGE * LARGE_PAGE;
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
}

/* An adapter's share in a product: its rows' A x, 0 for other rows, and B; and which blocks of rows are its. */
typedef struct {
    Operands operands;
    ptrdiff_t first, end;
} Share;

/* Blocks of rows from `row` to `end` of y = x W^T plus the shares, and of these the blocks of outputs from `first` to
   `last`, an even number. With `sums` they go on from there once `begun`, and stay there unless this is the
   `last_part`. */
static void part(ptrdiff_t row, ptrdiff_t end, ptrdiff_t first, ptrdiff_t last, const Operands *main, const Share *shares,
                 ptrdiff_t count, float *sums, ptrdiff_t begun, ptrdiff_t last_part, bf16 *y, ptrdiff_t out) {
    float own[2][1024] __attribute__((aligned(64)));
    ptrdiff_t turn = 0;
    Pending before = {0};
    for (ptrdiff_t block = first; block < last; block += 2)
        for (ptrdiff_t r = row; r < end; r += 2, turn = !turn) {
            float *at = sums ? sums + (r / 2 * (out / 32) + block / 2) * 1024 : own[turn];
            ptrdiff_t both = r + 1 < end;
            if (begun) resume(at);
            else zero();
            if (both) multiply(main, r, block, &before);
            else multiply_half(main, r, block, &before);
            for (const Share *share = shares; share < shares + count; share++) {
                if (r + both < share->first || r >= share->end) continue;
                if (both) multiply(&share->operands, r, block, &before);
                else multiply_half(&share->operands, r, block, &before);
            }
            drain(&before, 32);
            suspend(at);
            if (last_part) before = (Pending){at, y + r * 16 * out + block * 16, out, 0, both ? 32 : 16};
        }
    drain(&before, 32);
}

/* The same for 16 rows, whole sums, and a number of blocks that is a multiple of four. */
static void few(ptrdiff_t first, ptrdiff_t last, const Operands *main, const Share *shares, ptrdiff_t count, bf16 *y, ptrdiff_t out) {
    float sums[1024] __attribute__((aligned(64)));
    ptrdiff_t quarter = (last - first) / 4;
    for (ptrdiff_t block = first; block < first + quarter; block++) {
        zero();
        multiply_few(main->tiles, main->x, outputs_of(main, block), quarter * main->w_step * TILE);
        for (const Share *share = shares; share < shares + count; share++) {
            const Operands *own = &share->operands;
            multiply_few(own->tiles, own->x, outputs_of(own, block), quarter * own->w_step * TILE);
        }
        suspend(sums);
        for (int row = 0; row < 16; row++)
            for (int part = 0; part < 4; part++)
                _mm256_storeu_si256((void *)(y + row * out + (block + part * quarter) * 16),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + part * 256 + row * 16)));
    }
}

/* Rows from `first` to `end` of an adapter's A x as tiles, and 0 for others, of the blocks from `from` to `to`. */
static void pack_share(ptrdiff_t from, ptrdiff_t to, ptrdiff_t first, ptrdiff_t end, ptrdiff_t ranks, const bf16 *low, bf16 *packed) {
    pack_rows(from, to, ranks, ranks / 32, low, packed);
    for (ptrdiff_t row = from * 16; row < to * 16; row++)
        for (ptrdiff_t i = 0; (row < first || row >= end) && i < ranks / 32; i++)
            memset(packed + (row / 16 * (ranks / 32) + i) * TILE + row % 16 * 32, 0, 64);
}

/* How many bfloat16 numbers `product` needs beside its arguments. */
ptrdiff_t product_scratch(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t adapters, ptrdiff_t ranks) {
    if (in <= LONGEST_SUM || adapters) return rows * (in + adapters * ranks);
    return rows * 2 * PART_OF_SUM + (rows + 31) / 32 * 32 * out * 2;
}

/* low = x A^T and y = x W^T + low B^T, with an adapter's A and B for the rows from `firsts` to `given_ends`, or the last, which
   follow one another; its low are the `rows` x `ranks` numbers that begin with `low` + adapter x rows x ranks. Rows are a multiple
   of 16, the others of 32; `scratch` is aligned to 64 bytes. Long sums are made in parts, whose inputs stay in the
   cache. */
void product(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t adapters, ptrdiff_t ranks, const bf16 *x, const bf16 *w,
             const bf16 *const *a, const bf16 *const *b, const int64_t *firsts, const int64_t *given_ends, bf16 *low, bf16 *y,
             bf16 *scratch) {
    ptrdiff_t blocks = rows / 16, pairs = out / 32, step = in <= LONGEST_SUM || adapters ? in : PART_OF_SUM;
    bf16 *low_packed = scratch, *packed = scratch + adapters * rows * ranks;
    float *sums = step < in ? (float *)(packed + 2 * rows * step) : NULL;
    Share shares[adapters + 1];
    int64_t ends[adapters + 1];
    for (ptrdiff_t i = 0; i < adapters; i++) {
        ends[i] = given_ends[i] < rows ? given_ends[i] : rows;
        Operands own = {low_packed + i * rows * ranks, b[i], ranks / 32, ranks / 32, ranks / 32};
        shares[i] = (Share){own, firsts[i] / 16, (ends[i] + 15) / 16};
    }
#pragma omp parallel
    {
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads();
        ptrdiff_t from = blocks * me / all, to = blocks * (me + 1) / all;
        configure();
        for (ptrdiff_t start = 0; start < in; start += step) {
            ptrdiff_t width = start + step < in ? step : in - start;
            bf16 *own = packed + start / step % 2 * rows * step; /* others may still read what came before */
            Operands main = {own, w + start * 16, width / 32, width / 32, in / 32}, lower = main;
            pack_rows(from, to, in, width / 32, x + start, own);
            if (adapters && blocks < all) { /* too few rows to share: threads share the adapters' ranks */
#pragma omp barrier
                for (ptrdiff_t unit = me; unit < adapters * (ranks / 32); unit += all) {
                    ptrdiff_t i = unit / (ranks / 32), pair = unit % (ranks / 32) * 2;
                    lower.w = a[i];
                    part(shares[i].first, shares[i].end, pair, pair + 2, &lower, NULL, 0, NULL, 0, 1, low + i * rows * ranks, ranks);
                }
#pragma omp barrier
            }
            for (ptrdiff_t i = 0; i < adapters; i++) {
                ptrdiff_t first = from > shares[i].first ? from : shares[i].first, end = to < shares[i].end ? to : shares[i].end;
                lower.w = a[i];
                if (first < end && blocks >= all)
                    part(first, end, 0, ranks / 16, &lower, NULL, 0, NULL, 0, 1, low + i * rows * ranks, ranks);
                /* Of two blocks that are multiplied together one may be its, and the other must be 0. */
                first = first > from ? first - 1 : from, end = end < to ? end + 1 : to;
                if (first < end) pack_share(first, end, firsts[i], ends[i], ranks, low + i * rows * ranks, low_packed + i * rows * ranks);
            }
#pragma omp barrier
            ptrdiff_t begin = pairs * me / all * 2, finish = pairs * (me + 1) / all * 2;
            if (blocks == 1 && step == in && (finish - begin) % 4 == 0) {
                few(begin, finish, &main, shares, adapters, y, out);
                continue;
            }
            for (ptrdiff_t row = 0; row < blocks; row += HELD)
                part(row, row + HELD < blocks ? row + HELD : blocks, begin, finish, &main, shares, adapters, sums, start > 0, start + step >= in, y, out);
        }
        _tile_release();
    }
}

#else

ptrdiff_t has_matrix_unit(void) { return 0; }

#endif
