/* Codes to floats, without their scales, and scales: tiles of tokens for the products. */

#ifndef TILES_H
#define TILES_H

#include "rows.h"

typedef struct {
    const row_code *code;
    const side *s;
    const uint8_t *bits;
    const unit *units;
} coded_side;

#ifndef WITH_VBMI

/* 8 floats, of the codes of a group. */
INLINE void unpack_word(const row_code *code, int bits, uint64_t word, float *to) {
    const float *level = levels32(code, bits);
    for (int i = 0; i < GROUP; i++) {
        to[i] = level[word >> i * bits & ((1u << bits) - 1)];
    }
}

/* A group of the last row, behind which there may be no 8 bytes. */
static void unpack_last(const coded_side *c, int g, const uint8_t *row, float *to) {
    int bits = c->bits[g];
    unpack_word(c->code, bits, get_word(row + c->s->start + c->s->offset[g], bits), to);
}

#endif

#ifdef WITH_VBMI

/* What 16 lanes are looked up in. */
typedef struct {
    __m512 low, high, centre, power[3];
    __m512i mask;
} lookup;

INLINE lookup lookup_of(const unit *u, const int which) {
    lookup found;
    found.low = _mm512_load_ps(u->table[which]);
    found.high = _mm512_load_ps(u->table[which] + 16);
    found.centre = _mm512_set1_ps(u->centre[which]);
    UNROLLED for (int k = 0; k < 3; k++) { found.power[k] = _mm512_set1_ps(u->power[which][k]); }
    found.mask = _mm512_set1_epi32(u->mask[which]);
    return found;
}

/* 16 levels, of codes in the low bits of 16 lanes; what lies above them is whatever it is. */
INLINE __m512 looked_up(const int kind, lookup from, __m512i lanes) {
    if (kind == SIXTEEN) {
        return _mm512_permutexvar_ps(lanes, from.low);
    }
    if (kind == THIRTY_TWO) {
        return _mm512_permutex2var_ps(from.low, lanes, from.high);
    }
    lanes = _mm512_and_si512(lanes, from.mask);
    __m512 x = _mm512_sub_ps(_mm512_cvtepi32_ps(lanes), from.centre), square = _mm512_mul_ps(x, x);
    __m512 y = _mm512_fmadd_ps(square, from.power[2], from.power[1]);
    return _mm512_mul_ps(x, _mm512_fmadd_ps(square, y, from.power[0]));
}

/* A block of each row, two tokens side by side: 32 bytes each, or 64. */
static void gather(const unit *u, const uint8_t *restrict rows, int64_t stride, int64_t count,
                   uint8_t *restrict to) {
    const __mmask64 there = u->bytes >= 64 ? ~0ull : (1ull << u->bytes) - 1;
    rows += u->start;
    if (u->bytes <= 32) {
        for (int64_t t = 0; t < count; t++, rows += stride) {
            __builtin_prefetch(rows + AHEAD * stride);
            __m256i found = _mm256_maskz_loadu_epi8((__mmask32)there, rows);
            _mm256_store_si256((__m256i *)(to + 32 * t), found);
        }
    } else {
        for (int64_t t = 0; t < count; t++, rows += stride) {
            __builtin_prefetch(rows + AHEAD * stride);
            _mm512_store_si512(to + 64 * t, _mm512_maskz_loadu_epi8(there, rows));
        }
    }
    if (count % 2) {
        memset(to + (u->bytes <= 32 ? 32 : 64) * count, 0, 64);
    }
}

INLINE void unpack_unit(const int wide, const int first, const int second, const unit *u,
                        const uint8_t *restrict blocks, int64_t pairs, float *restrict tile,
                        int64_t width) {
    const __m512i pick = _mm512_loadu_si512(u->pick), shift = _mm512_loadu_si512(u->shift);
    const lookup one = lookup_of(u, 0), two = lookup_of(u, 1);
    tile += 16 * u->column;
    for (int64_t k = 0; k < pairs; k++, blocks += wide ? 128 : 64, tile += width) {
        __m512i words = _mm512_load_si512(blocks);
        words = wide ? _mm512_permutex2var_epi8(words, pick, _mm512_load_si512(blocks + 64))
                     : _mm512_permutexvar_epi8(pick, words);
        words = _mm512_srlv_epi16(words, shift);
        _mm512_store_ps(tile, looked_up(first, one, words));
        if (second != NONE) {
            _mm512_store_ps(tile + 16, looked_up(second, two, _mm512_srli_epi32(words, 16)));
        }
    }
}

/* count rows -> tile (pairs of rows, kept groups, 8 coordinates, 2 tokens) */
static void unpack(const coded_side *c, const uint8_t *rows, int64_t stride, int64_t count,
                   float *tile) {
    uint8_t blocks[TILE * 64 + 128] __attribute__((aligned(64)));
    for (int32_t k = 0; k < c->s->pairs; k++) {
        const unit *u = c->units + k;
        if (k == 0 || u->start != u[-1].start) {
            gather(u, rows, stride, count, blocks);
        }
#define CASE(wide, first, second)                                                             \
    case 16 * wide + 4 * first + second:                                                      \
        unpack_unit(wide, first, second, u, blocks, (count + 1) / 2, tile, 16 * c->s->kept);  \
        break;
#define CASES(wide, first)                                                                    \
    CASE(wide, first, NONE)                                                                   \
    CASE(wide, first, SIXTEEN) CASE(wide, first, THIRTY_TWO) CASE(wide, first, POLYNOMIAL)
        switch ((u->bytes > 32 ? 16 : 0) + 4 * u->kind[0] + u->kind[1]) {
            CASES(0, SIXTEEN)
            CASES(0, THIRTY_TWO)
            CASES(0, POLYNOMIAL)
            CASES(1, SIXTEEN)
            CASES(1, THIRTY_TWO)
            CASES(1, POLYNOMIAL)
        }
    }
}

#else

#ifdef WITH_AVX2

/* 8 levels of the codes in 8 lanes. */
INLINE __m256 looked_up(const int kind, __m256i lanes, __m256 low, __m256 high,
                        const float *power, __m256 centre) {
    if (kind == NONE) { /* up to 3 bits */
        return _mm256_permutevar8x32_ps(low, lanes);
    }
    if (kind == SIXTEEN) {
        __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, lanes),
                                _mm256_permutevar8x32_ps(high, lanes), top);
    }
    __m256 x = _mm256_sub_ps(_mm256_cvtepi32_ps(lanes), centre), square = _mm256_mul_ps(x, x);
    __m256 y = _mm256_fmadd_ps(square, _mm256_set1_ps(power[2]), _mm256_set1_ps(power[1]));
    return _mm256_mul_ps(x, _mm256_fmadd_ps(square, y, _mm256_set1_ps(power[0])));
}

/* rows -> every width-th place of tile. Reads 8 bytes of each row from `at`. */
INLINE void unpack_column(const int kind, const row_code *code, int bits, const uint8_t *rows,
                          int64_t stride, int64_t count, float *tile, int64_t width) {
    uint8_t bytes[32];
    int32_t shifts[8];
    float power[3];
    for (int i = 0; i < GROUP; i++) {
        int byte = i * bits / 8;
        shifts[i] = i * bits % 8;
        bytes[4 * i] = (uint8_t)byte;
        bytes[4 * i + 1] = (uint8_t)(shifts[i] + bits > 8 ? byte + 1 : 0x80);
        bytes[4 * i + 2] = bytes[4 * i + 3] = 0x80; /* zero */
    }
    for (int k = 0; k < 3; k++) {
        power[k] = (float)ldexp(powers(code, bits)[k], (1 - bits) * (2 * k + 1));
    }
    const __m256i pick = _mm256_loadu_si256((const __m256i *)bytes);
    const __m256i shift = _mm256_loadu_si256((const __m256i *)shifts);
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    const __m256 low = _mm256_loadu_ps(levels32(code, bits));
    const __m256 high = _mm256_loadu_ps(levels32(code, bits) + 8);
    const __m256 centre = _mm256_set1_ps(((float)(1 << bits) - 1) / 2);
    for (int64_t t = 0; t < count; t++, rows += stride, tile += width) {
        long long word;
        memcpy(&word, rows, 8);
        __m256i lanes = _mm256_shuffle_epi8(_mm256_set1_epi64x(word), pick);
        lanes = _mm256_and_si256(_mm256_srlv_epi32(lanes, shift), mask);
        _mm256_storeu_ps(tile, looked_up(kind, lanes, low, high, power, centre));
    }
}

/* A group of all rows. */
static void unpack_groups(const coded_side *c, int g, const uint8_t *rows, int64_t stride,
                          int64_t count, float *tile, int64_t width) {
    int bits = c->bits[g];
    const uint8_t *from = rows + c->s->start + c->s->offset[g];
    if (bits <= 3) {
        unpack_column(NONE, c->code, bits, from, stride, count - 1, tile, width);
    } else if (bits == 4) {
        unpack_column(SIXTEEN, c->code, bits, from, stride, count - 1, tile, width);
    } else {
        unpack_column(POLYNOMIAL, c->code, bits, from, stride, count - 1, tile, width);
    }
    unpack_last(c, g, rows + (count - 1) * stride, tile + (count - 1) * width);
}

#else

static void unpack_groups(const coded_side *c, int g, const uint8_t *rows, int64_t stride,
                          int64_t count, float *tile, int64_t width) {
    const uint8_t *from = rows + c->s->start + c->s->offset[g];
    for (int64_t t = 0; t < count - 1; t++) {
        uint64_t word;
        memcpy(&word, from + t * stride, 8);
        unpack_word(c->code, c->bits[g], word, tile + t * width);
    }
    unpack_last(c, g, rows + (count - 1) * stride, tile + (count - 1) * width);
}

#endif

/* count rows -> tile (count, 16 pairs): the side's kept coordinates in the order of its plan. */
static void unpack(const coded_side *c, const uint8_t *rows, int64_t stride, int64_t count,
                   float *tile) {
    int64_t width = 16 * c->s->pairs;
    for (int32_t half = 0; half < 2 * c->s->pairs; half++) {
        int g = c->s->group[half];
        if (g >= 0) {
            unpack_groups(c, g, rows, stride, count, tile + 8 * half, width);
            continue;
        }
        for (int64_t t = 0; t < count; t++) {
            memset(tile + t * width + 8 * half, 0, 32);
        }
    }
}

#endif

static coded_side coded_side_of(const row_code *code, int which, int64_t head) {
    coded_side found = {
        code, side_of(code, which, head), bits_of(code, which, head),
        code->units + (which * code->heads + head) * units_of(code->width)};
    return found;
}

#ifdef WITH_AVX2

/* Eight halves each of eight rows -> eight floats each of eight scales, TILE apart. */
INLINE void turn_halves(const __m128i *row, float *to, int64_t count) {
    __m128i a[8], b[8];
    UNROLLED for (int k = 0; k < 4; k++) {
        a[k] = _mm_unpacklo_epi16(row[2 * k], row[2 * k + 1]);
        a[k + 4] = _mm_unpackhi_epi16(row[2 * k], row[2 * k + 1]);
    }
    UNROLLED for (int k = 0; k < 8; k += 4) {
        b[k] = _mm_unpacklo_epi32(a[k], a[k + 1]);
        b[k + 1] = _mm_unpackhi_epi32(a[k], a[k + 1]);
        b[k + 2] = _mm_unpacklo_epi32(a[k + 2], a[k + 3]);
        b[k + 3] = _mm_unpackhi_epi32(a[k + 2], a[k + 3]);
    }
    UNROLLED for (int k = 0; k < 8; k++) {
        const __m128i *from = b + k / 4 * 4 + k % 4 / 2;
        __m128i halves = k % 2 ? _mm_unpackhi_epi64(from[0], from[2])
                               : _mm_unpacklo_epi64(from[0], from[2]);
        if (k < count) {
            _mm256_storeu_ps(to + k * TILE, _mm256_cvtph_ps(halves));
        }
    }
}

static void turn_scales(const uint8_t *at, int64_t stride, int64_t count, int64_t sides,
                        float *to) {
    for (int64_t k = 0; k < sides; k += 8) {
        int64_t each = sides - k < 8 ? sides - k : 8;
        for (int64_t t = 0; t < count; t += 8) {
            __m128i row[8] = {0};
            UNROLLED for (int r = 0; r < 8; r++) {
                const uint8_t *from = at + (t + r) * stride + 2 * k;
                if (t + r + 8 < count) { /* rows follow that are as long as what is read too much */
                    row[r] = _mm_loadu_si128((const __m128i *)from);
                } else if (t + r < count) {
                    memcpy(row + r, from, (size_t)(2 * each));
                }
            }
            turn_halves(row, to + k * TILE + t, each);
        }
    }
}

#else

static void turn_scales(const uint8_t *at, int64_t stride, int64_t count, int64_t sides,
                        float *to) {
    for (int64_t k = 0; k < sides; k++) {
        for (int64_t t = 0; t < count; t++) {
            uint16_t half;
            memcpy(&half, at + t * stride + 2 * k, 2);
            to[k * TILE + t] = from_half(half);
        }
    }
}

#endif

/* Scales of count rows -> (2, H, TILE). Behind the last there are zeros up to whole vectors of
   tokens, which are multiplied by weights of 0: what lies there must be finite. */
static void get_scales(const row_code *code, const uint8_t *rows, int64_t stride, int64_t count,
                       float *to) {
    int64_t sides = 2 * code->heads;
    const uint8_t *at = rows + code->sides[0].scale;
    if (code->scale_bytes == 2) {
        turn_scales(at, stride, count, sides, to);
    } else {
        for (int64_t k = 0; k < sides; k++) {
            for (int64_t t = 0; t < count; t++) {
                to[k * TILE + t] = byte_scales32(code)[at[t * stride + k]];
            }
        }
    }
    for (int64_t k = 0; k < sides; k++) {
        for (int64_t t = count; t < TILE && t % 16; t++) {
            to[k * TILE + t] = 0.0f;
        }
    }
}

#endif
