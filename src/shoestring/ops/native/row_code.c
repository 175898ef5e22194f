/* Rows of coded keys and values on a CPU: encode, recode, decode, and attention over them.

   A row is one token of one layer, as ops/row_code.py has it: for side (keys, values), head and
   group of 8 coordinates, b bytes that hold 8 codes of b bits, low bits first; then a scale for
   each side and head. A coordinate is scale * level[b][code].

   Attention goes through tiles of tokens. A tile's coordinates become floats in the first cache,
   where two small products follow: with the queries, and with the weights. Groups of 0 bits are
   left out of both. How codes become floats depends on the processor, the products do not.

   Memory is the caller's. Errors are returned, nothing else is. C11 with the vectors of GCC and
   Clang. */

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

static float from_half(uint16_t half) {
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
static uint16_t to_half(float x) {
    if (x < 0x1p-14f) {
        return (uint16_t)rintf(x * 0x1p24f);
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)((bits >> 13) - (112 << 10));
}

static float from_bfloat(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

/* count (a multiple of 8) numbers of a dtype, one after another. */
static void to_floats(float *to, const uint8_t *from, int64_t dtype, int64_t count) {
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

/* ---- plan ----------------------------------------------------------------------------------- */

INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t row_code_room(int64_t heads, int64_t width) {
    int64_t groups = 2 * heads * (width / GROUP);
    return aligned(sizeof(row_code)) + aligned(2 * heads * (int64_t)sizeof(side)) +
           aligned(groups) + aligned(8 * groups) +
           2 * heads * units_of(width) * (int64_t)sizeof(unit);
}

/* Group `which` of a unit: of each 16 lanes, two are for each coordinate, one for each token. */
static void plan_group(const row_code *code, unit *u, int which, int bits, int offset) {
    double step = ldexp(1.0, 1 - bits), each = step;
    int apart = u->bytes > 32 ? 64 : 32;
    for (int lane = 0; lane < 16; lane++) {
        int word = 2 * lane + which, bit = lane / 2 * bits;
        int byte = offset - u->start + bit / 8 + lane % 2 * apart;
        u->pick[2 * word] = (uint8_t)byte;
        u->pick[2 * word + 1] = (uint8_t)(bit % 8 + bits > 8 ? byte + 1 : byte);
        u->shift[word] = (uint16_t)(bit % 8);
    }
    /* Repeated, so that bits of the next code do not matter. */
    u->kind[which] = bits <= 4 ? SIXTEEN : bits == 5 ? THIRTY_TWO : POLYNOMIAL;
    for (int k = 0; k < 32; k++) {
        u->table[which][k] = levels32(code, bits)[k & ((1 << bits) - 1)];
    }
    u->mask[which] = (1 << bits) - 1;
    u->centre[which] = (float)u->mask[which] / 2;
    for (int k = 0; k < 3; k++, each *= step * step) {
        u->power[which][k] = (float)(powers(code, bits)[k] * each);
    }
}

/* Groups of a block from most bits to fewest, so that neighbours in a vector are alike. */
static int sorted(const uint8_t *bits, int first, int last, int *found) {
    int count = 0;
    for (int b = MOST_BITS; b > 0; b--) {
        for (int g = first; g < last; g++) {
            if (bits[g] == b) {
                found[count++] = g;
            }
        }
    }
    return count;
}

static void plan_side(const row_code *code, side *s, const uint8_t *bits, unit *units) {
    int groups = (int)(code->width / GROUP), at = s->start;
    for (int g = 0; g < groups; g++) {
        s->offset[g] = (int16_t)(at - s->start);
        at += bits[g];
    }
    s->pairs = s->kept = 0;
    for (int first = 0; first < groups; first += BLOCK) {
        int last = first + BLOCK < groups ? first + BLOCK : groups, found[BLOCK + 1];
        int count = sorted(bits, first, last, found);
        found[count] = -1;
        for (int k = 0; k < count; k += 2) {
            unit *u = units + s->pairs;
            memset(u, 0, sizeof *u);
            u->start = s->start + s->offset[first];
            u->bytes = s->start + s->offset[last - 1] + bits[last - 1] - u->start;
            u->column = s->kept;
            for (int which = 0; which < 2; which++) {
                int g = found[k + which];
                s->group[2 * s->pairs + which] = (int16_t)g;
                if (g >= 0) {
                    plan_group(code, u, which, bits[g], s->start + s->offset[g]);
                    s->kept++;
                }
            }
            s->pairs++;
        }
    }
}

/* Fills the room of a code, which is aligned to 64 bytes, and returns its row_bytes. */
int64_t row_code_prepare(void *room, int64_t heads, int64_t width, int64_t scale_bytes,
                         const uint8_t *bits, const double *weights, const double *tables,
                         const float *tables32) {
    row_code *code = room;
    int64_t groups = width / GROUP, count = 2 * heads * groups, at = 0;
    uint8_t *next = (uint8_t *)room + aligned(sizeof *code);
    code->heads = heads;
    code->width = width;
    code->scale_bytes = scale_bytes;
    code->tables = tables;
    code->tables32 = tables32;
    code->sides = (side *)next;
    code->bits = next += aligned(2 * heads * (int64_t)sizeof(side));
    memcpy(next, bits, (size_t)count);
    code->weights = (double *)(next += aligned(count));
    memcpy(next, weights, (size_t)count * 8);
    code->units = (unit *)(next + aligned(8 * count));
    for (int64_t k = 0; k < count; k++) {
        at += bits[k];
    }
    code->row_bytes = at + 2 * heads * scale_bytes;
    int64_t start = 0;
    for (int64_t k = 0; k < 2 * heads; k++) {
        side *s = code->sides + k;
        s->start = (int32_t)start;
        s->scale = (int32_t)(at + k * scale_bytes);
        plan_side(code, s, bits + k * groups, code->units + k * units_of(width));
        for (int64_t g = 0; g < groups; g++) {
            start += bits[k * groups + g];
        }
    }
    return code->row_bytes;
}

/* ---- encode, recode, decode ----------------------------------------------------------------- */

/* The numbers of edges below 8 numbers. In step, so that none waits for another. */
static void find(const double *edge, int bits, const double *u, uint32_t *code) {
    for (int i = 0; i < GROUP; i++) {
        code[i] = 0;
    }
    for (int bit = bits - 1; bit >= 0; bit--) {
        const double *middle = edge + (1 << bit) - 1;
        for (int i = 0; i < GROUP; i++) {
            code[i] |= (uint32_t)(middle[code[i]] < u[i]) << bit;
        }
    }
}

static int put_scale(const row_code *code, double scale, uint8_t *to) {
    if (code->scale_bytes == 2) {
        float nearest = (float)scale; /* by way of float32, as torch rounds */
        if (!(nearest < 65520.0f)) {
            return NO_HALF;
        }
        uint16_t half = to_half(nearest);
        memcpy(to, &half, 2);
        return FINE;
    }
    double step = scale == 0.0 ? -128.0 : fmin(fmax(rint(16.0 * log2(scale)), -127.0), 127.0);
    *to = (uint8_t)(step + 128.0);
    return FINE;
}

static double get_scale(const row_code *code, const side *s, const uint8_t *row) {
    if (code->scale_bytes == 1) {
        return byte_scales(code)[row[s->scale]];
    }
    uint16_t half;
    memcpy(&half, row + s->scale, 2);
    return from_half(half);
}

static uint64_t get_word(const uint8_t *row, int bits) {
    uint64_t word = 0;
    for (int k = 0; k < bits; k++) {
        word |= (uint64_t)row[k] << 8 * k;
    }
    return word;
}

/* z, of width numbers -> its codes and its scale in a row. */
static int encode_vector(const row_code *code, int which, int64_t head, const double *z,
                         uint8_t *row) {
    const side *s = side_of(code, which, head);
    const uint8_t *bits = bits_of(code, which, head);
    const double *weights = code->weights + (bits - code->bits);
    int64_t groups = code->width / GROUP, kept = 0;
    double squares = 0.0, was = 0.0, comes = 0.0;
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = g * GROUP; bits[g] && i < (g + 1) * GROUP; i++, kept++) {
            squares += z[i] * z[i];
        }
    }
    double size = kept ? sqrt(squares / (double)kept) : 0.0;
    int small = size < SMALLEST;
    if (!(size <= 1.7976931348623157e308)) {
        return NOT_FINITE;
    }
    for (int64_t g = 0; g < groups; g++) {
        uint64_t word = 0;
        uint32_t found[GROUP];
        double u[GROUP], before = 0.0, after = 0.0;
        if (!bits[g]) {
            continue;
        }
        for (int i = 0; i < GROUP; i++) {
            u[i] = small ? 0.0 : z[g * GROUP + i] / size;
        }
        find(edges(code, bits[g]), bits[g], u, found);
        for (int i = 0; i < GROUP; i++) {
            double c = levels(code, bits[g])[found[i]];
            before += u[i] * u[i];
            after += c * c;
            word |= (uint64_t)found[i] << i * bits[g];
        }
        was += weights[g] * before;
        comes += weights[g] * after;
        memcpy(row + s->start + s->offset[g], &word, bits[g]);
    }
    return put_scale(code, small || comes == 0.0 ? 0.0 : size * sqrt(was / comes),
                     row + s->scale);
}

static double element(const uint8_t *from, int64_t dtype) {
    if (dtype == FLOAT32) {
        float found;
        memcpy(&found, from, 4);
        return found;
    }
    uint16_t half;
    memcpy(&half, from, 2);
    return dtype == FLOAT16 ? from_half(half) : from_bfloat(half);
}

/* Rows j of A (d, d) that are kept, times 8 vectors side by side. */
static void transformed(const double *A, const eight *x, int64_t d, const uint8_t *bits,
                        eight *z) {
    for (int64_t j = 0; j < d; j += 4) {
        const double *a = A + j * d;
        if (!bits[j / GROUP]) {
            continue;
        }
        eight z0 = {0}, z1 = {0}, z2 = {0}, z3 = {0};
        for (int64_t i = 0; i < d; i++) {
            z0 += a[i] * x[i];
            z1 += a[i + d] * x[i];
            z2 += a[i + 2 * d] * x[i];
            z3 += a[i + 3 * d] * x[i];
        }
        z[j] = z0, z[j + 1] = z1, z[j + 2] = z2, z[j + 3] = z3;
    }
}

typedef struct {
    const uint8_t *from[2];      /* keys, values (B, H, t, d) */
    int64_t strides[2][3];       /* in bytes: batch, head, token */
    int64_t dtype, batch, count; /* B, t */
    const double *A, *mean;      /* (2, H, d, d), (2, B or 1, H, d) */
    int64_t mean_side, mean_batch; /* strides, in numbers */
    uint8_t *rows;
    int64_t rows_batch, rows_token; /* strides, in bytes */
    int64_t threads;
} encoding;

static int encode_eight(const row_code *code, const encoding *e, int which, int64_t b,
                        int64_t head, int64_t first) {
    eight x[MOST_WIDTH], z[MOST_WIDTH];
    double one[MOST_WIDTH];
    int64_t d = code->width, count = e->count - first < 8 ? e->count - first : 8;
    const double *mean = e->mean + which * e->mean_side + b * e->mean_batch + head * d;
    const int64_t *strides = e->strides[which], size = item_bytes(e->dtype);
    memset(x, 0, sizeof(eight) * (size_t)d);
    memset(z, 0, sizeof(eight) * (size_t)d);
    for (int64_t t = 0; t < count; t++) {
        const uint8_t *from =
            e->from[which] + b * strides[0] + head * strides[1] + (first + t) * strides[2];
        for (int64_t i = 0; i < d; i++) {
            double each = element(from + i * size, e->dtype);
            if (!isfinite(each)) {
                return NOT_FINITE;
            }
            x[i][t] = each - mean[i];
        }
    }
    transformed(e->A + (which * code->heads + head) * d * d, x, d, bits_of(code, which, head), z);
    int wrong = FINE;
    for (int64_t t = 0; t < count && !wrong; t++) {
        for (int64_t i = 0; i < d; i++) {
            one[i] = z[i][t];
        }
        uint8_t *row = e->rows + b * e->rows_batch + (first + t) * e->rows_token;
        wrong = encode_vector(code, which, head, one, row);
    }
    return wrong;
}

int64_t row_code_encode(const row_code *code, const encoding *e) {
    int64_t eights = (e->count + 7) / 8, items = 2 * e->batch * code->heads * eights;
    int wrong = FINE;
#pragma omp parallel for schedule(static) reduction(max : wrong) num_threads((int)e->threads) \
    if (e->threads > 1 && eights > 1)
    for (int64_t item = 0; item < items; item++) {
        int64_t rest = item / eights, head = rest % code->heads, b = rest / code->heads / 2;
        int found = encode_eight(code, e, (int)(rest / code->heads % 2), b, head,
                                 item % eights * 8);
        wrong = found > wrong ? found : wrong;
    }
    return wrong;
}

typedef struct {
    const uint8_t *rows;
    int64_t rows_batch, rows_token; /* strides, in bytes */
    uint8_t *out;                   /* rows, or float32 (B, 2, H, n, d) */
    int64_t out_batch, out_token;   /* strides of rows */
    int64_t batch, count, threads;
} moving;

static int recode_row(const row_code *from, const row_code *to, const uint8_t *row,
                      uint8_t *out) {
    double z[MOST_WIDTH];
    for (int which = 0; which < 2; which++) {
        for (int64_t head = 0; head < from->heads; head++) {
            const side *s = side_of(from, which, head);
            const uint8_t *bits = bits_of(from, which, head);
            double scale = get_scale(from, s, row);
            for (int64_t g = 0; g < from->width / GROUP; g++) {
                uint64_t word = get_word(row + s->start + s->offset[g], bits[g]);
                const double *level = levels(from, bits[g]); /* one zero for 0 bits */
                for (int i = 0; i < GROUP; i++) {
                    z[g * GROUP + i] =
                        scale * level[word >> i * bits[g] & ((1u << bits[g]) - 1)];
                }
            }
            int wrong = encode_vector(to, which, head, z, out);
            if (wrong) {
                return wrong;
            }
        }
    }
    return FINE;
}

int64_t row_code_recode(const row_code *from, const row_code *to, const moving *w) {
    int wrong = FINE;
#pragma omp parallel for schedule(static) reduction(max : wrong) num_threads((int)w->threads) \
    if (w->threads > 1 && w->count > 7)
    for (int64_t item = 0; item < w->batch * w->count; item++) {
        int64_t b = item / w->count, t = item % w->count;
        int found = recode_row(from, to, w->rows + b * w->rows_batch + t * w->rows_token,
                               w->out + b * w->out_batch + t * w->out_token);
        wrong = found > wrong ? found : wrong;
    }
    return wrong;
}

static void decode_vector(const row_code *code, int which, int64_t head, const uint8_t *row,
                          float *to) {
    const side *s = side_of(code, which, head);
    const uint8_t *bits = bits_of(code, which, head);
    float scale = (float)get_scale(code, s, row);
    for (int64_t g = 0; g < code->width / GROUP; g++) {
        uint64_t word = get_word(row + s->start + s->offset[g], bits[g]);
        const float *level = levels32(code, bits[g]);
        for (int i = 0; i < GROUP; i++) {
            to[g * GROUP + i] = scale * level[word >> i * bits[g] & ((1u << bits[g]) - 1)];
        }
    }
}

int64_t row_code_decode(const row_code *code, const moving *w) {
    int64_t sides = 2 * code->heads;
#pragma omp parallel for schedule(static) num_threads((int)w->threads) \
    if (w->threads > 1 && w->count > 7)
    for (int64_t item = 0; item < w->batch * sides * w->count; item++) {
        int64_t b = item / w->count / sides, each = item / w->count % sides, t = item % w->count;
        decode_vector(code, (int)(each / code->heads), each % code->heads,
                      w->rows + b * w->rows_batch + t * w->rows_token,
                      (float *)w->out + item * code->width);
    }
    return FINE;
}

/* ---- codes to floats, without their scales --------------------------------------------------- */

typedef struct {
    const row_code *code;
    const side *s;
    const uint8_t *bits;
    const unit *units;
} coded_side;

#ifndef WITH_VBMI

/* One group of one row, 8 floats. */
static void unpack_group(const coded_side *c, int g, const uint8_t *row, float *to) {
    int bits = c->bits[g];
    uint64_t word = get_word(row + c->s->start + c->s->offset[g], bits);
    const float *level = levels32(c->code, bits);
    for (int i = 0; i < GROUP; i++) {
        to[i] = level[word >> i * bits & ((1u << bits) - 1)];
    }
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

/* A group of all rows but the last, behind which there may be no 8 bytes. */
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
    unpack_group(c, g, rows + (count - 1) * stride, tile + (count - 1) * width);
}

#else

static void unpack_groups(const coded_side *c, int g, const uint8_t *rows, int64_t stride,
                          int64_t count, float *tile, int64_t width) {
    for (int64_t t = 0; t < count; t++) {
        unpack_group(c, g, rows + t * stride, tile + t * width);
    }
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

/* Scales of count rows -> (2, H, TILE). */
static void get_scales(const row_code *code, const uint8_t *rows, int64_t stride, int64_t count,
                       float *to) {
    int64_t sides = 2 * code->heads;
    const uint8_t *at = rows + code->sides[0].scale;
    if (code->scale_bytes == 2) {
        turn_scales(at, stride, count, sides, to);
        return;
    }
    for (int64_t k = 0; k < sides; k++) {
        for (int64_t t = 0; t < count; t++) {
            to[k * TILE + t] = byte_scales32(code)[at[t * stride + k]];
        }
    }
}

/* ---- two products --------------------------------------------------------------------------- */

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
    const __m512i turn = _mm512_set_epi32(27, 26, 25, 24, 15, 14, 13, 12, 19, 18, 17, 16, 7, 6, 5, 4);
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

/* ---- attention ------------------------------------------------------------------------------ */

/* Rows of one kind, the same number for every batch row. */
typedef struct {
    const row_code *code; /* null for raw ones: H d keys, then H d values */
    int64_t dtype;        /* of raw ones */
    const uint8_t *rows;
    int64_t batch_stride, row_stride, count;
    const int64_t *visible; /* (B, 2): from, to; null for all */
} segment;

typedef struct {
    const float *q; /* (B, H G, m, d) */
    int64_t q_strides[3];
    const float *inverse, *mean; /* (2, H, d, d), (2, B or 1, H, d) */
    int64_t mean_side, mean_batch;
    const uint8_t *own[2]; /* keys, values (B, H, m, d) */
    int64_t own_strides[2][3], own_dtype; /* in bytes */
    const int64_t *own_from;              /* (B,), null for 0 */
    float *out;                           /* (B, m, H G, d) */
    int64_t segment_count;
    int64_t batch, heads, groups, queries, width;
    int64_t threads;
    float *room;
    double scaling;
    const segment *segments; /* given apart */
} attention;

/* What one thread has of one batch row: all rows of all heads, row (head, group, query). */
typedef struct {
    float *tile, *score;         /* (TILE, padded), (R, TILE) */
    float *scale;                /* (2, H, TILE) */
    float *q, *turned;           /* queries: as they are, transformed */
    float *raw, *coded;          /* sums of values: raw, z */
    float *packed, *part;        /* turned and coded in the order of a plan, as wide as two */
    float *high, *mass, *coded_mass, *bias;
} state;

INLINE int64_t rows_of(const attention *a) { return a->groups * a->queries; }
INLINE int64_t padded_of(const attention *a) { return (a->width + 15) / 16 * 16; }
INLINE int64_t state_floats(const attention *a) {
    int64_t rows = a->heads * rows_of(a), each = (rows + 15) / 16 * 16;
    int64_t tokens = TILE > a->width ? TILE : padded_of(a);
    return tokens * padded_of(a) + (rows_of(a) + 2 * a->heads) * TILE + 8 * rows * padded_of(a) + 4 * each;
}

static state state_at(const attention *a, int64_t item) {
    int64_t rows = a->heads * rows_of(a), size = rows * padded_of(a), each = (rows + 15) / 16 * 16;
    int64_t tokens = TILE > a->width ? TILE : padded_of(a);
    float *at = a->room + item * state_floats(a);
    state s = {.tile = at, .score = at + tokens * padded_of(a)};
    float **parts[] = {&s.q, &s.turned, &s.raw, &s.coded, &s.packed, &s.part};
    s.scale = s.score + rows_of(a) * TILE;
    at = s.scale + 2 * a->heads * TILE;
    for (int k = 0; k < 6; k++) {
        *parts[k] = at;
        at += k < 4 ? size : 2 * size;
    }
    s.high = at, s.mass = at + each, s.coded_mass = at + 2 * each, s.bias = at + 3 * each;
    return s;
}

/* 2^x for x <= 0, to 2 units in the last place; NaN stays. */
INLINE vec power_of_2(vec x) {
    const vec magic = all(12582912.0f);
    x = chosen(x < -126.0f, all(-126.0f), x);
    vec shifted = x + magic, whole = shifted - magic, f = x - whole;
    vec y = all(1.5403530e-4f);
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    ints exponent = ((ints)shifted - (ints)magic + 127) << 23;
    return y * (vec)exponent;
}

#ifdef WITH_AVX512
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float most_of(vec x) { return _mm512_reduce_max_ps(x); }
#else
INLINE float sum_of(vec x) {
    float found = 0.0f;
    UNROLLED for (int k = 0; k < LANES; k++) { found += x[k]; }
    return found;
}

INLINE float most_of(vec x) {
    float found = x[0];
    UNROLLED for (int k = 1; k < LANES; k++) { found = x[k] > found ? x[k] : found; }
    return found;
}
#endif

INLINE void scale_row(float *row, int64_t n, float by) {
    for (int64_t k = 0; k < n; k += LANES) {
        store(row + k, load(row + k) * by);
    }
}

/* A higher score has come: what was summed weighs less. */
static void lower(const attention *a, state *s, int64_t row, float high) {
    float by = exp2f(s->high[row] - high);
    int64_t n = padded_of(a);
    s->high[row] = high;
    s->mass[row] *= by;
    s->coded_mass[row] *= by;
    scale_row(s->raw + row * n, n, by);
    scale_row(s->coded + row * n, n, by);
    scale_row(s->part + row * 2 * n, 2 * n, by);
}

typedef struct {
    const float *key_scale, *value_scale; /* of coded ones, else null */
    int64_t from, to;                     /* what of the tile is seen */
} seen;

/* scores of one row and one tile -> weights, 0 for what is not seen. whole: all of it is. */
INLINE void soften_of(const int coded, const int whole, const attention *a, state *s,
                      int64_t row, float *score, seen what) {
    ints lane, from = (ints){0} + (int32_t)what.from, to = (ints){0} + (int32_t)what.to;
    int64_t end = (what.to + 15) / 16 * 16;
    vec most = all(-INFINITY), bias = all(coded ? s->bias[row] : 0.0f), sum = {0};
    UNROLLED for (int k = 0; k < LANES; k++) { lane[k] = k; }
    for (int64_t t = 0; t < end; t += LANES) {
        vec each = load(score + t);
        if (coded) {
            each = each * load(what.key_scale + t) + bias;
        }
        if (!whole) {
            ints at = lane + (int32_t)t;
            each = chosen((at >= from) & (at < to), each, all(-INFINITY));
        }
        most = chosen(each > most, each, most);
        store(score + t, each);
    }
    float high = most_of(most);
    if (high > s->high[row]) {
        lower(a, s, row, high);
    }
    vec by = all(s->high[row] == -INFINITY ? 0.0f : s->high[row]);
    for (int64_t t = 0; t < end; t += LANES) {
        vec weight = power_of_2(load(score + t) - by);
        if (!whole) {
            ints at = lane + (int32_t)t;
            weight = (vec)((at >= from) & (at < to) & (ints)weight);
        }
        sum += weight;
        store(score + t, coded ? weight * load(what.value_scale + t) : weight);
    }
    float mass = sum_of(sum);
    s->mass[row] += mass;
    s->coded_mass[row] += coded ? mass : 0.0f;
}

static void soften(const attention *a, state *s, int64_t row, float *score, seen what) {
    if (what.from > 0 || what.to % 16) {
        if (what.key_scale) {
            soften_of(1, 0, a, s, row, score, what);
        } else {
            soften_of(0, 0, a, s, row, score, what);
        }
    } else if (what.key_scale) {
        soften_of(1, 1, a, s, row, score, what);
    } else {
        soften_of(0, 1, a, s, row, score, what);
    }
}

/* d x d numbers with a row stride that the products can take. */
static const float *wide_matrix(const attention *a, const float *matrix, float *tile) {
    int64_t d = a->width, n = padded_of(a);
    if (n == d) {
        return matrix;
    }
    memset(tile, 0, (size_t)(n * n) * 4);
    for (int64_t i = 0; i < d; i++) {
        memcpy(tile + i * n, matrix + i * d, (size_t)d * 4);
    }
    return tile;
}

/* The queries of a batch row, times scaling and log2(e), and what they are to coded keys. */
static void begin(const attention *a, state *s, int64_t b) {
    int64_t d = a->width, n = padded_of(a), rows = rows_of(a), all_rows = a->heads * rows;
    float by = (float)(a->scaling * 1.4426950408889634);
    memset(s->q, 0, (size_t)(8 * all_rows * n) * 4);
    for (int64_t row = 0; row < all_rows; row++) {
        const float *from = a->q + b * a->q_strides[0] + row / a->queries * a->q_strides[1] +
                            row % a->queries * a->q_strides[2];
        const float *mean = a->mean + b * a->mean_batch + row / rows * d;
        double bias = 0.0;
        for (int64_t i = 0; i < d; i++) {
            s->q[row * n + i] = from[i] * by;
            bias += (double)from[i] * mean[i];
        }
        s->bias[row] = (float)(bias * a->scaling * 1.4426950408889634);
        s->high[row] = -INFINITY;
        s->mass[row] = s->coded_mass[row] = 0.0f;
    }
    for (int64_t h = 0; h < a->heads; h++) {
        const float *matrix = wide_matrix(a, a->inverse + h * d * d, s->tile);
        int64_t at = h * rows * n;
        add(matrix, n, d, s->q + at, n, rows, n, s->turned + at, n);
    }
}

INLINE int64_t tile_width(const side *s) { return 16 * (ABREAST == 2 ? s->kept : s->pairs); }

/* Queries in the order of the key's plan of a head. */
static void pack_queries(const attention *a, state *s, const side *keys, int64_t head) {
    int64_t n = padded_of(a), rows = rows_of(a);
    for (int64_t row = head * rows; row < (head + 1) * rows; row++) {
        float *to = s->packed + row * 2 * n;
        memset(to, 0, (size_t)n * 8);
        for (int32_t half = 0; half < 2 * keys->pairs; half++) {
            int g = keys->group[half];
            for (int i = 0; g >= 0 && i < GROUP * ABREAST; i++) {
                to[i] = s->turned[row * n + GROUP * g + i / ABREAST];
            }
            to += ABREAST == 2 && g < 0 ? 0 : GROUP * ABREAST;
        }
    }
}

/* Sums in the order of the value's plan of a head to where they belong, and away. */
static void place_sums(const attention *a, state *s, const side *values, int64_t head) {
    int64_t n = padded_of(a), rows = rows_of(a);
    for (int64_t row = head * rows; row < (head + 1) * rows; row++) {
        const float *from = s->part + row * 2 * n;
        for (int32_t half = 0; half < 2 * values->pairs; half++) {
            int g = values->group[half];
            for (int i = 0; g >= 0 && i < GROUP * ABREAST; i++) {
                s->coded[row * n + GROUP * g + i / ABREAST] += from[i];
            }
            from += ABREAST == 2 && g < 0 ? 0 : GROUP * ABREAST;
        }
        memset(s->part + row * 2 * n, 0, (size_t)n * 8);
    }
}

static void add_coded_tile(const attention *a, state *s, const row_code *code,
                           const uint8_t *rows_at, int64_t stride, int64_t count) {
    int64_t n = padded_of(a), rows = rows_of(a);
    get_scales(code, rows_at, stride, count, s->scale);
    for (int64_t h = 0; h < a->heads; h++) {
        coded_side keys = coded_side_of(code, 0, h), values = coded_side_of(code, 1, h);
        float *sums = s->part + h * rows * 2 * n;
        unpack(&keys, rows_at, stride, count, s->tile);
        coded_dots(s->tile, count, s->packed + h * rows * 2 * n, 2 * n, rows, tile_width(keys.s),
                   s->score);
        for (int64_t r = 0; r < rows; r++) {
            const float *scale = s->scale + h * TILE;
            seen what = {scale, scale + a->heads * TILE, 0, count};
            soften(a, s, h * rows + r, s->score + r * TILE, what);
        }
        unpack(&values, rows_at, stride, count, s->tile);
        coded_add(s->tile, count, s->score, rows, tile_width(values.s), sums, 2 * n);
    }
}

/* Rows of raw numbers into the tile. */
static void fill(const attention *a, state *s, const uint8_t *from, int64_t stride,
                 int64_t dtype, int64_t count) {
    int64_t n = padded_of(a);
    for (int64_t t = 0; t < count; t++) {
        to_floats(s->tile + t * n, from + t * stride, dtype, a->width);
        memset(s->tile + t * n + a->width, 0, (size_t)(n - a->width) * 4);
    }
}

static void add_raw_tile(const attention *a, state *s, const uint8_t *rows_at, int64_t stride,
                         int64_t dtype, int64_t count) {
    int64_t n = padded_of(a), rows = rows_of(a), size = a->width * item_bytes(dtype);
    for (int64_t h = 0; h < a->heads; h++) {
        fill(a, s, rows_at + h * size, stride, dtype, count);
        dots(s->tile, n, count, s->q + h * rows * n, n, rows, n, s->score, TILE);
        for (int64_t r = 0; r < rows; r++) {
            seen what = {0, 0, 0, count};
            soften(a, s, h * rows + r, s->score + r * TILE, what);
        }
        fill(a, s, rows_at + (a->heads + h) * size, stride, dtype, count);
        add(s->tile, n, count, s->score, TILE, rows, n, s->raw + h * rows * n, n);
    }
}

/* The newest tokens: each query sees those up to its own. */
static void add_own(const attention *a, state *s, int64_t b) {
    int64_t n = padded_of(a), rows = rows_of(a), m = a->queries;
    int64_t first = a->own_from ? a->own_from[b] : 0;
    for (int64_t h = 0; h < a->heads; h++) {
        const int64_t *k = a->own_strides[0], *v = a->own_strides[1];
        fill(a, s, a->own[0] + b * k[0] + h * k[1], k[2], a->own_dtype, m);
        dots(s->tile, n, m, s->q + h * rows * n, n, rows, n, s->score, TILE);
        for (int64_t r = 0; r < rows; r++) {
            seen what = {0, 0, first < 0 ? 0 : first, r % m + 1};
            memset(s->score + r * TILE + what.to, 0, (size_t)(TILE - what.to) * 4);
            soften(a, s, h * rows + r, s->score + r * TILE, what);
        }
        fill(a, s, a->own[1] + b * v[0] + h * v[1], v[2], a->own_dtype, m);
        add(s->tile, n, m, s->score, TILE, rows, n, s->raw + h * rows * n, n);
    }
}

/* Rows from..to of a segment, in tiles. */
static void add_segment(const attention *a, state *s, const segment *g, int64_t b, int64_t from,
                        int64_t to) {
    const uint8_t *rows = g->rows + b * g->batch_stride;
    for (int64_t h = 0; g->code && h < a->heads; h++) {
        pack_queries(a, s, side_of(g->code, 0, h), h);
    }
    for (int64_t t = from; t < to; t += TILE) {
        int64_t count = to - t < TILE ? to - t : TILE;
        if (g->code) {
            add_coded_tile(a, s, g->code, rows + t * g->row_stride, g->row_stride, count);
        } else {
            add_raw_tile(a, s, rows + t * g->row_stride, g->row_stride, g->dtype, count);
        }
    }
    for (int64_t h = 0; g->code && h < a->heads; h++) {
        place_sums(a, s, side_of(g->code, 1, h), h);
    }
}

static void visible_of(const segment *g, int64_t b, int64_t *from, int64_t *to) {
    *from = 0, *to = g->count;
    if (g->visible) {
        *from = g->visible[2 * b] > 0 ? g->visible[2 * b] : 0;
        *to = g->visible[2 * b + 1] < g->count ? g->visible[2 * b + 1] : g->count;
    }
    *to = *to < *from ? *from : *to;
}

/* One of `splits` parts of the tokens of a batch row. */
static void attend_part(const attention *a, state *s, int64_t b, int64_t split, int64_t splits) {
    int64_t total = 0, done = 0, from, to;
    begin(a, s, b);
    for (int64_t k = 0; k < a->segment_count; k++) {
        visible_of(a->segments + k, b, &from, &to);
        total += to - from;
    }
    int64_t tiles = (total + TILE - 1) / TILE;
    int64_t first = tiles * split / splits * TILE, last = tiles * (split + 1) / splits * TILE;
    for (int64_t k = 0; k < a->segment_count; k++) {
        visible_of(a->segments + k, b, &from, &to);
        int64_t start = from + (first > done ? first - done : 0), count = to - from;
        int64_t end = last - done < count ? from + last - done : to;
        done += count;
        if (start < end) {
            add_segment(a, s, a->segments + k, b, start, end);
        }
    }
    if (split == splits - 1) {
        add_own(a, s, b);
    }
}

/* What another thread summed, added to s. */
static void merge(const attention *a, state *s, state *other) {
    int64_t n = padded_of(a);
    for (int64_t row = 0; row < a->heads * rows_of(a); row++) {
        if (other->high[row] > s->high[row]) {
            lower(a, s, row, other->high[row]);
        } else if (s->high[row] > other->high[row]) {
            lower(a, other, row, s->high[row]);
        }
        s->mass[row] += other->mass[row];
        s->coded_mass[row] += other->coded_mass[row];
        for (int64_t k = row * n; k < (row + 1) * n; k++) {
            s->raw[k] += other->raw[k];
            s->coded[k] += other->coded[k];
        }
    }
}

static void finish(const attention *a, state *s, int64_t b) {
    int64_t d = a->width, n = padded_of(a), rows = rows_of(a), m = a->queries;
    for (int64_t h = 0; h < a->heads; h++) {
        const float *matrix = wide_matrix(a, a->inverse + (a->heads + h) * d * d, s->tile);
        const float *mean = a->mean + a->mean_side + b * a->mean_batch + h * d;
        /* packed is free now, and as wide as this needs: d in sixteens */
        float *back = s->packed + h * rows * n;
        dots(matrix, n, n == d ? d : n, s->coded + h * rows * n, n, rows, n, back, n);
        for (int64_t r = 0; r < rows; r++) {
            int64_t row = h * rows + r, head = h * a->groups + r / m;
            float *out = a->out + ((b * m + r % m) * a->heads * a->groups + head) * d;
            float by = s->mass[row] == 0.0f ? 0.0f : 1.0f / s->mass[row];
            for (int64_t i = 0; i < d; i++) {
                float sum = s->raw[row * n + i] + back[r * n + i];
                out[i] = (sum + mean[i] * s->coded_mass[row]) * by;
            }
        }
    }
}

static int64_t splits_of(const attention *a) {
    int64_t tokens = 0;
    for (int64_t k = 0; k < a->segment_count; k++) {
        tokens += a->segments[k].count;
    }
    int64_t most = tokens / (8 * TILE) + 1, wanted = (a->threads + a->batch - 1) / a->batch;
    return wanted < most ? wanted : most;
}

/* Bytes of room that `row_code_attend` needs, for up to these threads. */
int64_t row_code_attend_room(int64_t batch, int64_t heads, int64_t groups, int64_t queries,
                             int64_t width, int64_t threads) {
    attention a = {.heads = heads, .groups = groups, .queries = queries, .width = width};
    int64_t splits = (threads + batch - 1) / batch;
    return batch * splits * state_floats(&a) * 4;
}

int64_t row_code_attend(const attention *given, const segment *segments) {
    attention whole = *given;
    const attention *a = &whole;
    whole.segments = segments;
    int64_t splits = splits_of(a), items = a->batch * splits;
#pragma omp parallel for schedule(static) num_threads((int)a->threads) \
    if (a->threads > 1 && items > 1)
    for (int64_t item = 0; item < items; item++) {
        state s = state_at(a, item);
        attend_part(a, &s, item / splits, item % splits, splits);
        if (splits == 1) {
            finish(a, &s, item);
        }
    }
    for (int64_t b = 0; splits > 1 && b < a->batch; b++) {
        state s = state_at(a, b * splits);
        for (int64_t split = 1; split < splits; split++) {
            state other = state_at(a, b * splits + split);
            merge(a, &s, &other);
        }
        finish(a, &s, b);
    }
    return FINE;
}

/* What this was compiled for: 0 plain vectors of 4, 1 AVX2, 2 AVX-512, 3 with VBMI. */
int64_t row_code_level(void) {
#if defined(WITH_VBMI)
    return 3;
#elif defined(WITH_AVX512)
    return 2;
#elif defined(WITH_AVX2)
    return 1;
#else
    return 0;
#endif
}
