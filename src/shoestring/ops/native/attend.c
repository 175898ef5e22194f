/* Attention of a few queries over coded rows, raw rows and themselves.

   It goes through tiles of tokens. A tile's coordinates become floats in the first cache, where
   two small products follow: with the queries, and with the weights. Groups of 0 bits are left
   out of both. How codes become floats depends on the processor (tiles.h), the products do not
   (products.h). Queries go to the codes' coordinates, sums of values come back from them; no key
   or value does. One softmax over all, in powers of 2, with what was summed scaled down where a
   higher score comes. */

#include "products.h"
#include "tiles.h"

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
    return tokens * padded_of(a) + (rows_of(a) + 2 * a->heads) * TILE + 8 * rows * padded_of(a) +
           4 * each;
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
