/* Rows of codes: their layout, the plan of how they come out, half precision. See row_code.c. */

#ifndef ROWS_H
#define ROWS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rows are little endian"
#endif

#if !defined(ROW_CODE_PORTABLE) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WITH_AVX2 1
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WITH_AVX512 1
#if defined(__AVX512VBMI__)
#define WITH_VBMI 1
#endif
#endif
#endif

#ifdef WITH_AVX512
#define LANES 16
#elif defined(WITH_AVX2)
#define LANES 8
#else
#define LANES 4
#endif

#define GROUP 8
#define MOST_BITS 8
#define MOST_WIDTH 256
#define MOST_GROUPS (MOST_WIDTH / GROUP)
#define BLOCK 8  /* groups; their codes are 64 bytes at most */
#define TILE 64  /* tokens, a multiple of 16 */
#define AHEAD 96 /* tokens: how far codes are asked for before they are needed */
#define SMALLEST 1e-30

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

enum { FINE = 0, NOT_FINITE = 1, NO_HALF = 2 };
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef double eight __attribute__((vector_size(64)));

/* With VBMI two tokens are unpacked side by side, else one. */
#ifdef WITH_VBMI
#define ABREAST 2
#else
#define ABREAST 1
#endif

/* How two groups of a block come out of the rows of two tokens; see `plan_unit`. */
enum { NONE = 0, SIXTEEN = 1, THIRTY_TWO = 2, POLYNOMIAL = 3 };

typedef struct {
    uint8_t pick[64];     /* the byte of two blocks, for each byte of 32 words */
    uint16_t shift[32];   /* of each word */
    float table[2][32];   /* levels of each group, over and over */
    float centre[2], power[2][3];
    int32_t kind[2], mask[2];
    int32_t start, bytes; /* of the block, in the row */
    int32_t column, unused; /* of the tile */
} unit;

/* One side of one head. */
typedef struct {
    int32_t start;              /* first byte in the row */
    int32_t scale;              /* where its scale lies */
    int32_t pairs, kept;        /* of groups with bits, pairs within their block; and groups */
    int16_t group[MOST_GROUPS]; /* two for each pair, -1 for none */
    int16_t offset[MOST_GROUPS]; /* in the row, of each group of the head */
} side;

typedef struct {
    int64_t heads, width, scale_bytes, row_bytes;
    const double *tables;  /* level (9, 256), edge (9, 256), scale (256), coefficient (9, 3) */
    const float *tables32; /* level (9, 256), scale (256) */
    const uint8_t *bits;   /* (2, H, g) */
    const double *weights; /* (2, H, g) */
    side *sides;           /* (2, H) */
    unit *units;           /* (2, H, units_of(width)) */
} row_code;

INLINE const double *levels(const row_code *code, int bits) { return code->tables + bits * 256; }
INLINE const double *edges(const row_code *code, int bits) {
    return code->tables + (9 + bits) * 256;
}
INLINE const double *byte_scales(const row_code *code) { return code->tables + 18 * 256; }
INLINE const double *powers(const row_code *code, int bits) {
    return code->tables + 19 * 256 + 3 * bits;
}
INLINE const float *levels32(const row_code *code, int bits) {
    return code->tables32 + bits * 256;
}
INLINE const float *byte_scales32(const row_code *code) { return code->tables32 + 9 * 256; }
INLINE const side *side_of(const row_code *code, int which, int64_t head) {
    return code->sides + which * code->heads + head;
}
INLINE const uint8_t *bits_of(const row_code *code, int which, int64_t head) {
    return code->bits + (which * code->heads + head) * (code->width / GROUP);
}
INLINE int64_t units_of(int64_t width) { return (width / GROUP + 1) / 2; }

INLINE vec load(const float *from) {
    vec found;
    memcpy(&found, from, sizeof found);
    return found;
}
INLINE void store(float *to, vec what) { memcpy(to, &what, sizeof what); }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec chosen(ints where, vec yes, vec no) {
    return (vec)((where & (ints)yes) | (~where & (ints)no));
}

/* ---- half precision ------------------------------------------------------------------------- */

static inline float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    if (rest >= 0x7c00) { /* infinity and NaN */
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {
        float small = (float)rest * 0x1p-24f;
        return sign ? -small : small;
    }
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

/* Nearest even, of a float >= 0 and below 65520. */
static inline uint16_t to_half(float x) {
    if (x < 0x1p-14f) {
        return (uint16_t)rintf(x * 0x1p24f);
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)((bits >> 13) - (112 << 10));
}

static inline float from_bfloat(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

/* count (a multiple of 8) numbers of a dtype, one after another. */
static inline void to_floats(float *to, const uint8_t *from, int64_t dtype, int64_t count) {
    if (dtype == FLOAT32) {
        memcpy(to, from, (size_t)count * 4);
        return;
    }
    for (int64_t i = 0; i < count; i += 8) {
#ifdef WITH_AVX2
        __m128i raw = _mm_loadu_si128((const __m128i *)(from + 2 * i));
        __m256 found =
            dtype == FLOAT16
                ? _mm256_cvtph_ps(raw)
                : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
        _mm256_storeu_ps(to + i, found);
#else
        for (int64_t j = i; j < i + 8; j++) {
            uint16_t half;
            memcpy(&half, from + 2 * j, 2);
            to[j] = dtype == FLOAT16 ? from_half(half) : from_bfloat(half);
        }
#endif
    }
}

INLINE int64_t item_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* A group of a row: its 8 codes, the first lowest. */
static inline uint64_t get_word(const uint8_t *row, int bits) {
    uint64_t word = 0;
    for (int k = 0; k < bits; k++) {
        word |= (uint64_t)row[k] << 8 * k;
    }
    return word;
}

#endif
