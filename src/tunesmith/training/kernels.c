/* The small operations of a training step, each in one pass over its rows; see kernels.py for what they compute.

   Rows are independent, so that the number of threads changes no result. Numbers are bfloat16 (as 16 bits) or
   float; sums are taken in float. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

typedef uint16_t bf16;

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest, ties to even; what is no number stays none. */
static inline bf16 narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)0x7fc0 : (bf16)rounded;
}

/* e to the x, to 2e-7; a polynomial, as the compiler makes vectors of it. Below -87 it is 0 for our purposes. */
static inline float power(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
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
    return p * scale;
}

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

/* Products of few rows with large frozen matrices are bound by reading these: packed for the matrix unit (Intel's
   AMX, Architecture Instruction Set Extensions, chapter 3) they are read once, from the first byte to the last, and
   the adapter's product is added before the result leaves the unit.

   A tile of a packed matrix W (out, in) has 16 outputs of 32 inputs: for each pair of inputs, the 16 outputs' weights
   of both, 1 KiB in all. The tiles of 16 outputs lie behind one another. */

#if defined(__AMX_BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, TILE = 512, LARGE_PAGE = 1 << 21 };
enum { LONGEST_SUM = 8192, PART_OF_SUM = 4096, HELD = 32 /* blocks of rows that stay in the cache */ };

/* Linux lets a process use the tiles once it has asked (Documentation/arch/x86/xstate.rst). */
ptrdiff_t has_matrix_unit(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

static void configure(void) {
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

/* W[o][i] = w[o x out_step + i x in_step] for o < out and i < in, else 0, of `count` matrices; `all_out` and `all_in`
   are multiples of 16 and 32. */
void pack(ptrdiff_t count, ptrdiff_t step, ptrdiff_t out, ptrdiff_t in, ptrdiff_t all_out, ptrdiff_t all_in,
          ptrdiff_t out_step, ptrdiff_t in_step, const bf16 *w, bf16 *packed) {
#pragma omp parallel for collapse(2) schedule(static)
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

/* Blocks of rows from `row` to `end` of y = x W^T + low B^T, and of these the blocks of outputs from `first` to `last`,
   an even number. With `sums` they go on from there once `begun`, and stay there unless this is the `last_part`. */
static void part(ptrdiff_t row, ptrdiff_t end, ptrdiff_t first, ptrdiff_t last, const Operands *main,
                 const Operands *adapter, float *sums, ptrdiff_t begun, ptrdiff_t last_part, bf16 *y, ptrdiff_t out) {
    float own[2][1024] __attribute__((aligned(64)));
    ptrdiff_t turn = 0;
    Pending before = {0};
    for (ptrdiff_t block = first; block < last; block += 2)
        for (ptrdiff_t r = row; r < end; r += 2, turn = !turn) {
            float *at = sums ? sums + (r / 2 * (out / 32) + block / 2) * 1024 : own[turn];
            if (begun) resume(at);
            else zero();
            if (r + 1 < end) {
                multiply(main, r, block, &before);
                if (adapter) multiply(adapter, r, block, &before);
            } else {
                multiply_half(main, r, block, &before);
                if (adapter) multiply_half(adapter, r, block, &before);
            }
            drain(&before, 32);
            suspend(at);
            if (last_part) before = (Pending){at, y + r * 16 * out + block * 16, out, 0, r + 1 < end ? 32 : 16};
        }
    drain(&before, 32);
}

/* How many bfloat16 numbers `product` needs beside its arguments. */
ptrdiff_t product_scratch(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t ranks) {
    if (in <= LONGEST_SUM || ranks) return rows * (in + ranks);
    return rows * 2 * PART_OF_SUM + (rows + 31) / 32 * 32 * out * 2;
}

/* low = x A^T and y = x W^T + low B^T; without ranks y = x W^T. Rows are a multiple of 16, the others of 32; `scratch`
   is aligned to 64 bytes. Long sums are made in parts, whose inputs stay in the cache. */
void product(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t ranks, const bf16 *x, const bf16 *w, const bf16 *a,
             const bf16 *b, bf16 *low, bf16 *y, bf16 *scratch) {
    ptrdiff_t blocks = rows / 16, pairs = out / 32, step = in <= LONGEST_SUM || ranks ? in : PART_OF_SUM;
    bf16 *low_packed = scratch, *packed = scratch + rows * ranks;
    float *sums = step < in ? (float *)(packed + 2 * rows * step) : NULL;
#pragma omp parallel
    {
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads();
        ptrdiff_t from = blocks * me / all, to = blocks * (me + 1) / all;
        configure();
        for (ptrdiff_t start = 0; start < in; start += step) {
            ptrdiff_t width = start + step < in ? step : in - start;
            bf16 *own = packed + start / step % 2 * rows * step; /* others may still read what came before */
            Operands main = {own, w + start * 16, width / 32, width / 32, in / 32};
            Operands lower = main, adapter = {low_packed, b, ranks / 32, ranks / 32, ranks / 32};
            lower.w = a;
            pack_rows(from, to, in, width / 32, x + start, own);
            if (ranks && from < to) { /* then this is the whole sum */
                part(from, to, 0, ranks / 16, &lower, NULL, NULL, 0, 1, low, ranks);
                pack_rows(from, to, ranks, ranks / 32, low, low_packed);
            }
#pragma omp barrier
            for (ptrdiff_t row = 0; row < blocks; row += HELD)
                part(row, row + HELD < blocks ? row + HELD : blocks, pairs * me / all * 2, pairs * (me + 1) / all * 2,
                     &main, ranks ? &adapter : NULL, sums, start > 0, start + step >= in, y, out);
        }
        _tile_release();
    }
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

/* sums (+)= 16 rows of weights times the tokens' numbers, four times 16 of these; `left` and `right` from the first of
   `chunks` of 32 tokens on, whose tiles are `step` apart. */
static inline void gather(ptrdiff_t chunks, const bf16 *left, const bf16 *right, ptrdiff_t step, ptrdiff_t more, float *sums) {
    if (more) resume(sums);
    else zero();
    for (ptrdiff_t i = 0; i < chunks; i++) {
        const bf16 *w = right + i * step * TILE;
        _tile_loadd(7, left + i * TILE, 64);
        _tile_loadd(4, w, 64);
        _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(5, w + TILE, 64);
        _tile_dpbf16ps(1, 7, 5);
        _tile_loadd(6, w + 2 * TILE, 64);
        _tile_dpbf16ps(2, 7, 6);
        _tile_loadd(4, w + 3 * TILE, 64);
        _tile_dpbf16ps(3, 7, 4);
    }
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

#else

ptrdiff_t has_matrix_unit(void) { return 0; }

#endif
