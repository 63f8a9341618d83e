/* Weights to packed codes, while a model is loaded: a row is coded into a buffer in the L1 cache, then packed. */
#include "rows.h"

/* Row n as floats: itself, or widened into the buffer. */
static inline const float *row_of(const void *w, int is_bf16, long n, long K, float *restrict buffer) {
    if (!is_bf16) return (const float *)w + n * K;
    const bf16 *row = (const bf16 *)w + n * K;
    for (long k = 0; k < K; k++) buffer[k] = widen(row[k]);
    return buffer;
}

/* One byte a code to the layout of packing.py: the inverse of unpack_row. */
static void pack_row(const uint8_t *restrict codes, int bits, long K, uint8_t *restrict packed) {
    int shift = 0;
    for (const int *part = PARTS[bits]; part < PARTS[bits] + 4 && *part; part++) {
        int width = *part, segments = 8 / width;
        long length = (K + segments - 1) / segments;
        uint8_t mask = (1 << width) - 1;
        memset(packed, 0, length);
        for (int i = 0; i < segments; i++) {
            long count = K - i * length < length ? K - i * length : length;
            const uint8_t *in = codes + i * length;
            for (long j = 0; j < count; j++) packed[j] |= ((in[j] >> shift) & mask) << (i * width);
        }
        packed += length;
        shift += width;
    }
}

/* The least and the largest weight of each group: float32 (N, G). */
void extremes(const void *w, int is_bf16, long N, long K, long G, float *low, float *high) {
    long g = K / G;
#pragma omp parallel
    {
        float *buffer = malloc(K * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const float *row = row_of(w, is_bf16, n, K, buffer);
            for (long j = 0; j < G; j++, row += g) {
                float least = row[0], most = row[0];
#pragma omp simd reduction(min : least) reduction(max : most)
                for (long k = 0; k < g; k++) {
                    least = row[k] < least ? row[k] : least;
                    most = row[k] > most ? row[k] : most;
                }
                low[n * G + j] = least;
                high[n * G + j] = most;
            }
        }
        free(buffer);
    }
}

/* Half to even for values in [0, 2^22]. */
static inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* Levels u = w / s + z, or (w - o) / s, clamped to [0, top], as rounded codes. */
static void codes_of_group(const float *restrict w, long g, float s, float z, float o, int has_offset, float top,
                           uint8_t *restrict to) {
#pragma omp simd
    for (long k = 0; k < g; k++) {
        float u = has_offset ? (w[k] - o) / s : w[k] / s + z;
        u = u > 0 ? u : 0;  /* a NaN becomes 0: no integer stands for it */
        u = u > top ? top : u;
        to[k] = (uint8_t)(int)nearest(u);
    }
}

/* The same as n = floor(u * unit), one less where reading (n + 0.5) / unit back would round to another code than u. */
static void levels_of_group(const float *restrict w, long g, float s, float z, float o, int has_offset, float top,
                            float unit, uint8_t *restrict to) {
#pragma omp simd
    for (long k = 0; k < g; k++) {
        float u = has_offset ? (w[k] - o) / s : w[k] / s + z;
        u = u > 0 ? u : 0;  /* a NaN becomes 0: no integer stands for it */
        u = u > top ? top : u;
        int n = (int)(u * unit);
        n -= nearest((n + 0.5f) / unit) != nearest(u);
        to[k] = (uint8_t)n;
    }
}

/* y^(1/5) for y >= 0, to a few units in the last place: a fifth of the exponent, then Newton's steps. */
static inline float fifth_root(float y) {
    uint32_t bits;
    memcpy(&bits, &y, 4);
    bits = bits / 5 + 852282573;
    float t;
    memcpy(&t, &bits, 4);
    for (int i = 0; i < 3; i++) {
        float squared = t * t;
        t = 0.2f * (4.0f * t + y / (squared * squared));
    }
    return t;
}

/* d^p for d >= 0 and one of five p, without a call: 2, 2.4, 3, 3.5, 4. */
static inline float power(float d, int tenths) {
    float squared = d * d;
    switch (tenths) {
    case 20: return squared;
    case 24: { float root = fifth_root(squared); return squared * root; }
    case 30: return squared * d;
    case 35: return squared * d * __builtin_sqrtf(d);
    default: return squared * squared;
    }
}

#define SUM(TENTHS) \
    _Pragma("omp simd reduction(+ : sum)") for (long k = 0; k < g; k++) { \
        float u = has_offset ? (w[k] - o) / s : w[k] / s + z; \
        u = u < 0 ? 0 : u; \
        u = u > top ? top : u; \
        float q = nearest(u), value = has_offset ? q * s + o : (q - z) * s, d = value - w[k]; \
        sum += power(d < 0 ? -d : d, TENTHS); \
    }

static float group_error(const float *restrict w, long g, float s, float z, float o, int has_offset, float top, int tenths) {
    float sum = 0;
    switch (tenths) {
    case 20: SUM(20) break;
    case 24: SUM(24) break;
    case 30: SUM(30) break;
    case 35: SUM(35) break;
    default: SUM(40) break;
    }
    return sum;
}

/* The sum of |w - w_hat|^p over each group: float32 (N, G). */
void range_errors(const float *w, long N, long K, long G, const float *scales, const float *zeros, const float *offsets,
                  float center, int bits, float p, float *out) {
    long g = K / G;
    float top = (1 << bits) - 1;
    int tenths = (int)(p * 10 + 0.5f);
#pragma omp parallel for schedule(static)
    for (long at = 0; at < N * G; at++) {
        float z = zeros ? zeros[at] : center, o = offsets ? offsets[at] : 0;
        out[at] = group_error(w + at * g, g, scales[at], z, o, offsets != NULL, top, tenths);
    }
}

void encode(const void *w, int is_bf16, long N, long K, long G, const float *scales, const float *zeros,
            const float *offsets, float center, int bits, int fixed, long row_bytes, uint8_t *out) {
    long g = K / G;
    float top = (1 << bits) - 1, unit = 1 << (8 - bits);
#pragma omp parallel
    {
        float *buffer = malloc(K * sizeof(float));
        uint8_t *codes = malloc(K);
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const float *row = row_of(w, is_bf16, n, K, buffer);
            uint8_t *to = fixed || bits == 8 ? out + n * row_bytes : codes;
            for (long j = 0; j < G; j++) {
                long at = n * G + j;
                float s = scales[at], z = zeros ? zeros[at] : center, o = offsets ? offsets[at] : 0;
                if (fixed) levels_of_group(row + j * g, g, s, z, o, offsets != NULL, top, unit, to + j * g);
                else codes_of_group(row + j * g, g, s, z, o, offsets != NULL, top, to + j * g);
            }
            if (to == codes) pack_row(codes, bits, K, out + n * row_bytes);
        }
        free(codes);
        free(buffer);
    }
}

/* For each of up to 64 values the number of ascending `middles` below it. */
static void count_below(const float *restrict x, long length, float factor, const float *middles, int count,
                        uint8_t *restrict to) {
    float scaled[TILE] = {0};
    int below[TILE] = {0};
    for (long k = 0; k < length; k++) scaled[k] = x[k] * factor;
    for (int i = 0; i < count; i++)
        for (int k = 0; k < TILE; k++) below[k] += middles[i] < scaled[k];
    for (long k = 0; k < length; k++) to[k] = (uint8_t)below[k];
}

/* absmax of each group, and for each weight over it the number of `middles` (between neighbouring entries) below it. */
void encode_table(const void *w, int is_bf16, long N, long K, long G, const float *middles, int count, int bits, long row_bytes,
                  float *absmax, uint8_t *out) {
    long g = K / G;
#pragma omp parallel
    {
        float *buffer = malloc(K * sizeof(float));
        uint8_t *codes = malloc(K);
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const float *row = row_of(w, is_bf16, n, K, buffer);
            for (long j = 0; j < G; j++, row += g) {
                float most = 0;
#pragma omp simd reduction(max : most)
                for (long k = 0; k < g; k++) {
                    float size = row[k] < 0 ? -row[k] : row[k];
                    most = size > most ? size : most;
                }
                absmax[n * G + j] = most;
                for (long k = 0; k < g; k += TILE)
                    count_below(row + k, g - k < TILE ? g - k : TILE, most > 0 ? 1.0f / most : 0, middles,
                                count, codes + j * g + k);
            }
            pack_row(codes, bits, K, out + n * row_bytes);
        }
        free(codes);
        free(buffer);
    }
}
