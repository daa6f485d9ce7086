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
    for (ptrdiff_t row = 0; row < rows; row++) {
        const bf16 *in = logits + row * words;
        bf16 *out = powers + row * words;
        float largest = -INFINITY, sum = 0.0f;
#pragma omp parallel for schedule(static) reduction(max : largest)
        for (ptrdiff_t i = 0; i < words; i++) largest = wide(in[i]) > largest ? wide(in[i]) : largest;
        float partial[64];
        ptrdiff_t part = (words + 63) / 64;
#pragma omp parallel for schedule(static)
        for (ptrdiff_t piece = 0; piece < 64; piece++) {
            ptrdiff_t end = (piece + 1) * part < words ? (piece + 1) * part : words;
            float own = 0.0f;
            for (ptrdiff_t i = piece * part; i < end; i++) {
                float p = power(wide(in[i]) - largest);
                own += p;
                out[i] = narrow(p);
            }
            partial[piece] = own;
        }
        for (int piece = 0; piece < 64; piece++) sum += partial[piece];
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

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, TILE = 512, HELD_BYTES = 1 << 20, LARGE_PAGE = 1 << 21 };

/* Linux lets a process use the tiles once it has asked (Documentation/arch/x86/xstate.rst). */
ptrdiff_t has_matrix_unit(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t columns[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.columns[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
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
                if (in_step == 1 && ins == 32)
                    for (ptrdiff_t b = 0; b < outs; b++)
                        for (ptrdiff_t pair = 0; pair < 16; pair++)
                            memcpy(tile + pair * 32 + b * 2, from + b * out_step + pair * 2, 2 * sizeof(bf16));
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

static inline void store(const float *tile, bf16 *y, ptrdiff_t width) {
    for (int row = 0; row < 16; row++)
        for (int i = 0; i < 16; i++) y[row * width + i] = narrow(tile[row * 16 + i]);
}

/* Add the products of two times 16 rows and two times 16 outputs to the tiles 0 to 3. */
static inline void multiply(ptrdiff_t tiles, const bf16 *x0, const bf16 *x1, ptrdiff_t width, const bf16 *w0,
                            const bf16 *w1) {
    for (ptrdiff_t i = 0; i < tiles; i++) {
        _tile_loadd(4, w0 + i * TILE, 64);
        _tile_loadd(5, w1 + i * TILE, 64);
        _tile_loadd(6, x0 + i * 32, width * 2);
        _tile_loadd(7, x1 + i * 32, width * 2);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 6, 5);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
    }
}

/* The same for 16 rows and four times 16 outputs. */
static inline void multiply_few(ptrdiff_t tiles, const bf16 *x, ptrdiff_t width, const bf16 *w, ptrdiff_t step) {
    for (ptrdiff_t i = 0; i < tiles; i++) {
        _tile_loadd(7, x + i * 32, width * 2);
        _tile_loadd(4, w + i * TILE, 64);
        _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(5, w + step + i * TILE, 64);
        _tile_dpbf16ps(1, 7, 5);
        _tile_loadd(6, w + 2 * step + i * TILE, 64);
        _tile_dpbf16ps(2, 7, 6);
        _tile_loadd(4, w + 3 * step + i * TILE, 64);
        _tile_dpbf16ps(3, 7, 4);
    }
}

/* 16 rows of y = x W^T, and of these the blocks of 16 outputs from `first` to `last`, four at a time. */
static void few(ptrdiff_t first, ptrdiff_t last, ptrdiff_t in, const bf16 *x, const bf16 *w, bf16 *y, ptrdiff_t out) {
    float tiles[4][256] __attribute__((aligned(64)));
    for (ptrdiff_t block = first; block < last; block += 4) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        multiply_few(in / 32, x, in, w + block * 16 * in, 16 * in);
        _tile_stored(0, tiles[0], 64);
        _tile_stored(1, tiles[1], 64);
        _tile_stored(2, tiles[2], 64);
        _tile_stored(3, tiles[3], 64);
        for (int i = 0; i < 4; i++) store(tiles[i], y + (block + i) * 16, out);
    }
}

/* Rows from `row` to `end` of y = x W^T + low B^T, and of these the blocks of 16 outputs from `first` to `last`. */
static void part(ptrdiff_t row, ptrdiff_t end, ptrdiff_t first, ptrdiff_t last, ptrdiff_t in, const bf16 *x,
                 const bf16 *w, ptrdiff_t ranks, const bf16 *low, const bf16 *b, bf16 *y, ptrdiff_t out) {
    float tile[256] __attribute__((aligned(64)));
    for (ptrdiff_t block = first; block < last; block += 2) {
        ptrdiff_t other = block + 1 < last ? block + 1 : block;
        for (ptrdiff_t r = row; r < end; r += 32) {
            ptrdiff_t s = r + 16 < end ? r + 16 : r;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            multiply(in / 32, x + r * in, x + s * in, in, w + block * 16 * in, w + other * 16 * in);
            if (ranks)
                multiply(ranks / 32, low + r * ranks, low + s * ranks, ranks, b + block * 16 * ranks,
                         b + other * 16 * ranks);
            _tile_stored(0, tile, 64);
            store(tile, y + r * out + block * 16, out);
            _tile_stored(1, tile, 64);
            store(tile, y + r * out + other * 16, out);
            _tile_stored(2, tile, 64);
            store(tile, y + s * out + block * 16, out);
            _tile_stored(3, tile, 64);
            store(tile, y + s * out + other * 16, out);
        }
    }
}

/* low = x A^T and y = x W^T + low B^T; without ranks y = x W^T. Rows are a multiple of 16. */
void product(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t in, ptrdiff_t ranks, const bf16 *x, const bf16 *w, const bf16 *a,
             const bf16 *b, bf16 *low, bf16 *y) {
    ptrdiff_t blocks = out / 16, pairs = (blocks + 1) / 2;
    ptrdiff_t held = HELD_BYTES / (in * 2) / 32 * 32; /* rows of x that stay in the cache */
    if (held < 64) held = 64;
#pragma omp parallel
    {
        ptrdiff_t me = omp_get_thread_num(), all = omp_get_num_threads(), left = rows;
        configure();
        if (ranks) {
            part(rows / 16 * me / all * 16, rows / 16 * (me + 1) / all * 16, 0, ranks / 16, in, x, a, 0, NULL, NULL,
                 low, ranks);
#pragma omp barrier
        }
        if (rows == 16 && !ranks && blocks % 4 == 0) {
            few(blocks / 4 * me / all * 4, blocks / 4 * (me + 1) / all * 4, in, x, w, y, out);
            left = 0;
        }
        ptrdiff_t first = pairs * me / all * 2, last = pairs * (me + 1) / all * 2;
        if (last > blocks) last = blocks;
        for (ptrdiff_t row = 0; row < left; row += held)
            part(row, row + held < left ? row + held : left, first, last, in, x, w, ranks, low, b, y, out);
        _tile_release();
    }
}

static void transpose(ptrdiff_t rows, ptrdiff_t ranks, ptrdiff_t all_rows, const bf16 *from, bf16 *to) {
    for (ptrdiff_t rank = 0; rank < ranks; rank++) {
        for (ptrdiff_t row = 0; row < rows; row++) to[rank * all_rows + row] = from[row * ranks + rank];
        memset(to + rank * all_rows + rows, 0, (size_t)(all_rows - rows) * sizeof(bf16));
    }
}

/* 32 rows of 16 numbers, as far as there are rows, as a tile of pairs of rows. */
static inline void interleave(ptrdiff_t rows, const bf16 *x, ptrdiff_t width, bf16 *tile) {
    if (rows < 32) memset(tile, 0, TILE * sizeof(bf16));
    for (ptrdiff_t row = 0; row < rows && row < 32; row += 2) {
        __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + row * width)));
        __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + (row + 1) * width)));
        _mm512_store_si512(tile + row * 16, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

/* tiles[rank / 16] = 16 ranks x 16 columns of low^T x, for up to 64 ranks; `low` is transposed. */
static void across(ptrdiff_t rows, ptrdiff_t all_rows, ptrdiff_t ranks, const bf16 *low, const bf16 *x, ptrdiff_t width,
                   float (*tiles)[256]) {
    bf16 pairs[TILE] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (ptrdiff_t row = 0; row < rows; row += 32) {
        interleave(rows - row, x + row * width, width, pairs);
        _tile_loadd(5, pairs, 64);
        _tile_loadd(4, low + row, all_rows * 2);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(4, low + 16 * all_rows + row, all_rows * 2);
        _tile_dpbf16ps(1, 4, 5);
        if (ranks > 32) {
            _tile_loadd(4, low + 32 * all_rows + row, all_rows * 2);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(4, low + 48 * all_rows + row, all_rows * 2);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, tiles[0], 64);
    _tile_stored(1, tiles[1], 64);
    _tile_stored(2, tiles[2], 64);
    _tile_stored(3, tiles[3], 64);
}

/* Add to an adapter's gradient, of A (layers x rank, in) and B (out, rank), which belong to layers of `outs` outputs.
   `scratch` has room for 2 x ranks x (rows, up to a multiple of 32). */
void adapt(ptrdiff_t rows, ptrdiff_t in, ptrdiff_t out, ptrdiff_t ranks, ptrdiff_t rank, ptrdiff_t layers,
           const int64_t *outs, float scale, const bf16 *x, const bf16 *gradient, const bf16 *low,
           const bf16 *low_gradient, bf16 *scratch, float *a_gradient, float *b_gradient) {
    ptrdiff_t all_rows = (rows + 31) / 32 * 32;
    bf16 *turned = scratch + ranks * all_rows;
#pragma omp parallel
    {
        float tiles[4][256] __attribute__((aligned(64)));
        configure();
#pragma omp sections
        {
#pragma omp section
            transpose(rows, ranks, all_rows, low_gradient, scratch);
#pragma omp section
            transpose(rows, ranks, all_rows, low, turned);
        }
        for (ptrdiff_t first = 0; first < ranks; first += 64) {
            ptrdiff_t count = ranks - first < 64 ? ranks - first : 64;
#pragma omp for schedule(static) nowait
            for (ptrdiff_t i = 0; i < in; i += 16) {
                across(rows, all_rows, count, scratch + first * all_rows, x + i, in, tiles);
                for (ptrdiff_t r = first; r < first + count && r < layers * rank; r++)
                    for (int at = 0; at < 16; at++)
                        a_gradient[r * in + i + at] += tiles[(r - first) / 16][(r - first) % 16 * 16 + at];
            }
#pragma omp for schedule(static)
            for (ptrdiff_t o = 0; o < out; o += 16) {
                across(rows, all_rows, count, turned + first * all_rows, gradient + o, out, tiles);
                ptrdiff_t layer = 0, end = outs[0];
                while (o >= end) end += outs[++layer];
                for (int at = 0; at < 16; at++)
                    for (ptrdiff_t r = 0; r < rank; r++) {
                        ptrdiff_t from = layer * rank + r - first;
                        if (from >= 0 && from < count)
                            b_gradient[(o + at) * rank + r] += scale * tiles[from / 16][from % 16 * 16 + at];
                    }
            }
        }
        _tile_release();
    }
}

#else

ptrdiff_t has_matrix_unit(void) { return 0; }

#endif
