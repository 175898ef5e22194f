/* Rows of coded keys and values on a CPU: the plan of a code, encode, recode, decode.

   A row is one token of one layer, as ops/row_code.py has it: for side (keys, values), head and
   group of 8 coordinates, b bytes that hold 8 codes of b bits, low bits first; then a scale for
   each side and head. A coordinate is scale * level[b][code].

   Memory is the caller's. Errors are returned, nothing else is. C11 with the vectors of GCC and
   Clang. Attention over rows is attend.c. */

#include "rows.h"

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
