/* The dropped projection of LoRA on a CPU and its gradients, masks drawn on the way: see functional.py for the formulas and masks.py for the masks.

   x (M, K) has rows x_stride apart; A holds the adapters' matrices (R_i, K) one after another in fp32; hidden and its gradient have the adapters'
   columns side by side. Every function works on rows [first, last) alone, so that threads can share M. keep = 0: no dropout.
   Compiled once per element type: ELEMENT is how a number is stored, LOAD and STORE turn it to fp32 and back. */

#include <stdint.h>
#include <string.h>

#define ROWS 8  /* rows for which one adapter's A stays in the first-level cache */

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) { /* to nearest, ties to even, as PyTorch; NaN stays NaN */
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return (wide & 0x7fffffff) > 0x7f800000 ? (uint16_t)((wide >> 16) | 0x40) : (uint16_t)rounded;
}

/* kept[column] = all bits set or 0, for one row of one adapter. */
static void draw_row(int16_t *kept, int64_t key, int64_t row, int64_t K, int16_t keep) {
    int64_t draws = (K + 3) / 4;
    uint64_t counter = (uint64_t)key + (uint64_t)(row * draws) * 0x9E3779B97F4A7C15u;
    for (int64_t i = 0; i < draws; i++) {
        uint64_t x = counter + (uint64_t)i * 0x9E3779B97F4A7C15u;
        x = (x ^ (uint64_t)((int64_t)x >> 32)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (uint64_t)((int64_t)x >> 29)) * 0x94D049BB133111EBu;
        x = (x ^ (uint64_t)((int64_t)x >> 32)) & 0x7FFF7FFF7FFF7FFFu;
        memcpy(kept + 4 * i, &x, 8); /* little-endian: field 0 comes first */
    }
    for (int64_t k = 0; k < 4 * draws; k++) kept[k] = (int16_t)(kept[k] - keep) >> 15;
}

typedef float lanes __attribute__((vector_size(64)));

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* out[k] += sum over j of coefficients[j] * rows[j][k], rows of K numbers; the sums of four lanes stay in registers. */
static void combine(float *out, int64_t K, const float *coefficients, int64_t count, const float *rows) {
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
        lanes a = load(out + k), b = load(out + k + 16), c = load(out + k + 32), d = load(out + k + 48);
        for (int64_t j = 0; j < count; j++) {
            const float *row = rows + j * K + k;
            a += coefficients[j] * load(row);
            b += coefficients[j] * load(row + 16);
            c += coefficients[j] * load(row + 32);
            d += coefficients[j] * load(row + 48);
        }
        memcpy(out + k, &a, sizeof a);
        memcpy(out + k + 16, &b, sizeof b);
        memcpy(out + k + 32, &c, sizeof c);
        memcpy(out + k + 48, &d, sizeof d);
    }
    for (; k < K; k++)
        for (int64_t j = 0; j < count; j++) out[k] += coefficients[j] * rows[j * K + k];
}

#define DEFINE(NAME, ELEMENT, LOAD, STORE)                                                                                                            \
    static void dropped_row_##NAME(float *out, const ELEMENT *x, int16_t *kept, int64_t key, int64_t row, int64_t K, int16_t keep) {                  \
        if (!keep) {                                                                                                                                  \
            for (int64_t k = 0; k < K; k++) out[k] = LOAD(x[k]);                                                                                      \
            return;                                                                                                                                   \
        }                                                                                                                                             \
        draw_row(kept, key, row, K, keep);                                                                                                            \
        for (int64_t k = 0; k < K; k++) out[k] = kept[k] ? LOAD(x[k]) : 0.0f;                                                                         \
    }                                                                                                                                                 \
                                                                                                                                                      \
    void project_##NAME(const ELEMENT *x, int64_t x_stride, const float *A, const int64_t *ranks, const int64_t *keys, int64_t adapters, int64_t K,   \
                        int64_t keep, ELEMENT *hidden, int64_t hidden_stride, int64_t first, int64_t last) {                                          \
        float dropped[K];                                                                                                                             \
        int16_t kept[K + 3];                                                                                                                          \
        for (int64_t start = first; start < last; start += ROWS) {                                                                                    \
            int64_t end = start + ROWS < last ? start + ROWS : last, column = 0;                                                                      \
            for (int64_t i = 0; i < adapters; column += ranks[i++])                                                                                   \
                for (int64_t row = start; row < end; row++) {                                                                                         \
                    dropped_row_##NAME(dropped, x + row * x_stride, kept, keys[i], row, K, (int16_t)keep);                                            \
                    for (int64_t r = 0; r < ranks[i]; r++) {                                                                                          \
                        const float *a = A + (column + r) * K;                                                                                        \
                        float sum = 0;                                                                                                                \
                        for (int64_t k = 0; k < K; k++) sum += dropped[k] * a[k];                                                                     \
                        hidden[row * hidden_stride + column + r] = STORE(sum);                                                                        \
                    }                                                                                                                                 \
                }                                                                                                                                     \
        }                                                                                                                                             \
    }                                                                                                                                                 \
                                                                                                                                                      \
    /* Adds m_i * (dhidden_i A_i) of all adapters to dx and dhidden_i^T (m_i * x) to dA (in fp32); either may be NULL. */                             \
    void project_backward_##NAME(const ELEMENT *x, int64_t x_stride, const float *A, const int64_t *ranks, const int64_t *keys, int64_t adapters,     \
                                 int64_t K, int64_t keep, const ELEMENT *dhidden, int64_t dhidden_stride, ELEMENT *dx, int64_t dx_stride, float *dA,  \
                                 int64_t first, int64_t last) {                                                                                       \
        float dropped[ROWS][K], update[ROWS][K], part[K], coefficients[ROWS];                                                                         \
        int16_t kept[K + 3];                                                                                                                          \
        for (int64_t start = first; start < last; start += ROWS) {                                                                                    \
            int64_t rows = start + ROWS < last ? ROWS : last - start, column = 0;                                                                     \
            memset(update, 0, sizeof update);                                                                                                         \
            for (int64_t i = 0; i < adapters; column += ranks[i++]) {                                                                                 \
                for (int64_t row = 0; row < rows; row++) {                                                                                            \
                    const ELEMENT *dh = dhidden + (start + row) * dhidden_stride + column;                                                            \
                    dropped_row_##NAME(dropped[row], x + (start + row) * x_stride, kept, keys[i], start + row, K, (int16_t)keep);                     \
                    if (!dx) continue;                                                                                                                \
                    memset(part, 0, sizeof part);                                                                                                     \
                    for (int64_t r = 0; r < ranks[i]; r += ROWS) {                                                                                    \
                        int64_t count = r + ROWS < ranks[i] ? ROWS : ranks[i] - r;                                                                    \
                        for (int64_t j = 0; j < count; j++) coefficients[j] = LOAD(dh[r + j]);                                                        \
                        combine(part, K, coefficients, count, A + (column + r) * K);                                                                  \
                    }                                                                                                                                 \
                    for (int64_t k = 0; k < K; k++) update[row][k] += !keep || kept[k] ? part[k] : 0.0f;                                              \
                }                                                                                                                                     \
                for (int64_t r = column; dA && r < column + ranks[i]; r++) {                                                                          \
                    for (int64_t row = 0; row < rows; row++) coefficients[row] = LOAD(dhidden[(start + row) * dhidden_stride + r]);                   \
                    combine(dA + r * K, K, coefficients, rows, dropped[0]);                                                                           \
                }                                                                                                                                     \
            }                                                                                                                                         \
            for (int64_t row = 0; dx && row < rows; row++) {                                                                                          \
                ELEMENT *out = dx + (start + row) * dx_stride;                                                                                        \
                for (int64_t k = 0; k < K; k++) out[k] = STORE(LOAD(out[k]) + update[row][k]);                                                        \
            }                                                                                                                                         \
        }                                                                                                                                             \
    }

#define SAME(x) (x)
DEFINE(float, float, SAME, SAME)
DEFINE(bf16, uint16_t, from_bf16, to_bf16)
