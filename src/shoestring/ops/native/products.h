/* Two products of a tile: with queries, which gives scores, and with weights, which gives sums. */

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "rows.h"

#ifdef WITH_AVX2
#define ROWS (LANES == 16 ? 4 : 2)    /* of queries at once, */
#define VECTORS (LANES == 16 ? 4 : 2) /* and of coordinates: so that registers hold the sums */
#else
#define ROWS 4
#define VECTORS 4
#endif

#ifdef WITH_AVX512

/* Four vectors -> one: sums over fours of lanes, the four parts of a, c, b, d in turn. */
INLINE vec folded(vec a, vec b, vec c, vec d) {
    const __m512i turn =
        _mm512_set_epi32(27, 26, 25, 24, 15, 14, 13, 12, 19, 18, 17, 16, 7, 6, 5, 4);
    __m512 ab = _mm512_mask_blend_ps(0xff00, a, b) + _mm512_shuffle_f32x4(a, b, 0x4e);
    __m512 cd = _mm512_mask_blend_ps(0xff00, c, d) + _mm512_shuffle_f32x4(c, d, 0x4e);
    return _mm512_mask_blend_ps(0xf0f0, ab, cd) + _mm512_permutex2var_ps(ab, turn, cd);
}

/* Four of these -> the 16 sums in order. */
INLINE void store_sums(float *to, const vec *f) {
    const __m512i order =
        _mm512_set_epi32(15, 7, 11, 3, 14, 6, 10, 2, 13, 5, 9, 1, 12, 4, 8, 0);
    __m512 a = _mm512_shuffle_ps(f[0], f[1], 0x88) + _mm512_shuffle_ps(f[0], f[1], 0xdd);
    __m512 b = _mm512_shuffle_ps(f[2], f[3], 0x88) + _mm512_shuffle_ps(f[2], f[3], 0xdd);
    __m512 sums = _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(order, sums));
}

/* Two of them, of sums for two tokens in turn -> the 16 sums in order. */
INLINE void store_pairs(float *to, const vec *f) {
    const __m512i order =
        _mm512_set_epi32(15, 14, 7, 6, 11, 10, 3, 2, 13, 12, 5, 4, 9, 8, 1, 0);
    __m512 sums = _mm512_shuffle_ps(f[0], f[1], 0x44) + _mm512_shuffle_ps(f[0], f[1], 0xee);
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(order, sums));
}

#else

typedef float four __attribute__((vector_size(16)));

INLINE four folded(vec a, vec b, vec c, vec d) {
#ifdef WITH_AVX2
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
#else
    return (four){a[0] + a[1] + (a[2] + a[3]), b[0] + b[1] + (b[2] + b[3]),
                  c[0] + c[1] + (c[2] + c[3]), d[0] + d[1] + (d[2] + d[3])};
#endif
}

INLINE void store_sums(float *to, const four *f) { memcpy(to, f, 64); }

#endif

/* The weight of a token, or of two in turn. */
INLINE vec weights_at(const int abreast, const float *weight, int64_t t) {
#ifdef WITH_VBMI
    if (abreast == 2) {
        double both;
        memcpy(&both, weight + 2 * t, 8);
        return _mm512_castpd_ps(_mm512_set1_pd(both));
    }
#endif
    (void)abreast;
    return all(weight[t]);
}

/* In a register: read once, not once for each product. */
#ifdef WITH_AVX512
#define HOLD(x) __asm__("" : "+v"(x))
#elif defined(WITH_AVX2)
#define HOLD(x) __asm__("" : "+x"(x))
#else
#define HOLD(x) (void)0
#endif

/* Products of four neighbours with some rows, still spread over the lanes. */
INLINE void four_dots(const int rows, const float *x, int64_t x_stride, const float *q,
                      int64_t q_stride, int64_t n, vec sum[4][4]) {
    for (int64_t k = 0; k < n; k += LANES) {
        vec a = load(x + k), b = load(x + k + x_stride);
        vec c = load(x + k + 2 * x_stride), d = load(x + k + 3 * x_stride);
        HOLD(a);
        HOLD(b);
        HOLD(c);
        HOLD(d);
        UNROLLED for (int r = 0; r < rows; r++) {
            vec each = load(q + r * q_stride + k);
            HOLD(each);
            sum[r][0] += a * each;
            sum[r][1] += b * each;
            sum[r][2] += c * each;
            sum[r][3] += d * each;
        }
    }
}

/* to[r][t] = x[t] . q[r] over n coordinates; tokens in sixteens. */
INLINE void dots_of(const int rows, const float *x, int64_t x_stride, int64_t count,
                    const float *q, int64_t q_stride, int64_t n, float *to, int64_t to_stride) {
    for (int64_t t = 0; t < count; t += 16) {
        __typeof__(folded((vec){0}, (vec){0}, (vec){0}, (vec){0})) sums[4][4];
        UNROLLED for (int part = 0; part < 4; part++) {
            vec sum[4][4] = {0};
            four_dots(rows, x + (t + 4 * part) * x_stride, x_stride, q, q_stride, n, sum);
            UNROLLED for (int r = 0; r < rows; r++) {
                sums[r][part] = folded(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
            }
        }
        UNROLLED for (int r = 0; r < rows; r++) { store_sums(to + r * to_stride + t, sums[r]); }
    }
}

/* to[r] += sum over t of weight[r][t] x[t], for some vectors of coordinates. */
INLINE void add_vectors(const int rows, const int vectors, const int abreast, const float *x,
                        int64_t x_stride, int64_t count, const float *weight,
                        int64_t weight_stride, float *to, int64_t to_stride) {
    vec sum[4][4];
    UNROLLED for (int r = 0; r < rows; r++) {
        UNROLLED for (int k = 0; k < vectors; k++) {
            sum[r][k] = load(to + r * to_stride + k * LANES);
        }
    }
    for (int64_t t = 0; t < count; t++) {
        vec each[4];
        UNROLLED for (int k = 0; k < vectors; k++) {
            each[k] = load(x + t * x_stride + k * LANES);
            HOLD(each[k]);
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            vec w = weights_at(abreast, weight + r * weight_stride, t);
            UNROLLED for (int k = 0; k < vectors; k++) { sum[r][k] += each[k] * w; }
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) {
        UNROLLED for (int k = 0; k < vectors; k++) {
            store(to + r * to_stride + k * LANES, sum[r][k]);
        }
    }
}

INLINE void add_of(const int rows, const int abreast, const float *x, int64_t x_stride,
                   int64_t count, const float *weight, int64_t weight_stride, int64_t n,
                   float *to, int64_t to_stride) {
#define ADD(vectors) \
    add_vectors(rows, vectors, abreast, x, x_stride, count, weight, weight_stride, to, to_stride)
    for (; n >= VECTORS * LANES; n -= VECTORS * LANES) {
        ADD(VECTORS);
        x += VECTORS * LANES, to += VECTORS * LANES;
    }
    if (n == LANES) {
        ADD(1);
    } else if (VECTORS > 2 && n == 2 * LANES) {
        ADD(2);
    } else if (VECTORS > 2 && n == 3 * LANES) {
        ADD(3);
    }
#undef ADD
}

/* A function of `some` rows at once, called for all of them. */
#if ROWS > 2
#define BY_ROWS(some, rows, call, step)                     \
    for (int64_t left = rows; left > 0; left -= ROWS) {     \
        switch (left < ROWS ? left : ROWS) {                \
        case 1: { enum { some = 1 }; call; break; }         \
        case 2: { enum { some = 2 }; call; break; }         \
        case 3: { enum { some = 3 }; call; break; }         \
        case 4: { enum { some = 4 }; call; break; }         \
        }                                                   \
        step;                                               \
    }
#else
#define BY_ROWS(some, rows, call, step)                     \
    for (int64_t left = rows; left > 0; left -= ROWS) {     \
        if (left == 1) {                                    \
            enum { some = 1 }; call;                        \
        } else {                                            \
            enum { some = 2 }; call;                        \
        }                                                   \
        step;                                               \
    }
#endif

static void dots(const float *x, int64_t x_stride, int64_t count, const float *q,
                 int64_t q_stride, int64_t rows, int64_t n, float *to, int64_t to_stride) {
    BY_ROWS(some, rows, dots_of(some, x, x_stride, count, q, q_stride, n, to, to_stride),
            (q += ROWS * q_stride, to += ROWS * to_stride))
}

static void add(const float *x, int64_t x_stride, int64_t count, const float *weight,
                int64_t weight_stride, int64_t rows, int64_t n, float *to, int64_t to_stride) {
    BY_ROWS(some, rows,
            add_of(some, 1, x, x_stride, count, weight, weight_stride, n, to, to_stride),
            (weight += ROWS * weight_stride, to += ROWS * to_stride))
}

/* The same for unpacked tiles, whose rows are of n numbers. */

#ifdef WITH_VBMI

INLINE void dots_of_pairs(const int rows, const float *x, int64_t count, const float *q,
                          int64_t q_stride, int64_t n, float *to) {
    for (int64_t t = 0; t < count; t += 16) {
        vec sums[4][2];
        UNROLLED for (int part = 0; part < 2; part++) {
            vec sum[4][4] = {0};
            four_dots(rows, x + (t / 2 + 4 * part) * n, n, q, q_stride, n, sum);
            UNROLLED for (int r = 0; r < rows; r++) {
                sums[r][part] = folded(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
            }
        }
        UNROLLED for (int r = 0; r < rows; r++) { store_pairs(to + r * TILE + t, sums[r]); }
    }
}

static void coded_dots(const float *x, int64_t count, const float *q, int64_t q_stride,
                       int64_t rows, int64_t n, float *to) {
    BY_ROWS(some, rows, dots_of_pairs(some, x, count, q, q_stride, n, to),
            (q += ROWS * q_stride, to += ROWS * TILE))
}

static void coded_add(const float *x, int64_t count, const float *weight, int64_t rows, int64_t n,
                      float *to, int64_t to_stride) {
    BY_ROWS(some, rows, add_of(some, 2, x, n, (count + 1) / 2, weight, TILE, n, to, to_stride),
            (weight += ROWS * TILE, to += ROWS * to_stride))
}

#else

static void coded_dots(const float *x, int64_t count, const float *q, int64_t q_stride,
                       int64_t rows, int64_t n, float *to) {
    dots(x, n, count, q, q_stride, rows, n, to, TILE);
}

static void coded_add(const float *x, int64_t count, const float *weight, int64_t rows, int64_t n,
                      float *to, int64_t to_stride) {
    add(x, n, count, weight, TILE, rows, n, to, to_stride);
}

#endif

#endif
