/* Packed codes to weights: a row is unpacked into a buffer that stays in the L1 cache, then valued group by group. */
#include "rows.h"

/* A packed weight. Affine: s * (q - z), or s * q + o where there are offsets; zeros may be null (then center counts).
 * With a table (not null): absmax * table[q] (+ o), where with double quantization (map not null)
 * absmax = map[code] * block_scale[group / 256] + mean. */
typedef struct {
    const uint8_t *codes;
    long row_bytes;
    int bits;
    long K, G;
    const float *scales, *zeros, *offsets;  /* (N, G) */
    float center;
    const float *table;
    const void *absmax;
    const float *map, *block_scales, *mean;
} Codes;

static inline float absmax_of(const Codes *C, long at) {
    if (!C->map) return ((const float *)C->absmax)[at];
    return C->map[((const uint8_t *)C->absmax)[at]] * C->block_scales[at / 256] + *C->mean;
}

/* The values that the codes of a group stand for: 2^bits of them. */
static void values_of_group(const Codes *C, long at, float *values) {
    int count = 1 << C->bits;
    if (C->table) {
        float a = absmax_of(C, at);
        for (int q = 0; q < count; q++) values[q] = C->offsets ? C->table[q] * a + C->offsets[at] : C->table[q] * a;
        return;
    }
    float s = C->scales[at], z = C->zeros ? C->zeros[at] : C->center;
    if (C->offsets)
        for (int q = 0; q < count; q++) values[q] = q * s + C->offsets[at];
    else
        for (int q = 0; q < count; q++) values[q] = (q - z) * s;
}

#ifdef WIDE
/* The same for up to 4 bits, as one register. */
static inline __m512 wide_values(const Codes *C, long at) {
    const __m512 q = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if (C->table) {
        float a = absmax_of(C, at);
        __m512 entries = _mm512_maskz_loadu_ps((1 << (1 << C->bits)) - 1, C->table);
        __m512 values = _mm512_mul_ps(entries, _mm512_set1_ps(a));
        return C->offsets ? _mm512_add_ps(values, _mm512_set1_ps(C->offsets[at])) : values;
    }
    __m512 s = _mm512_set1_ps(C->scales[at]);
    if (C->offsets) return _mm512_add_ps(_mm512_mul_ps(q, s), _mm512_set1_ps(C->offsets[at]));
    return _mm512_mul_ps(_mm512_sub_ps(q, _mm512_set1_ps(C->zeros ? C->zeros[at] : C->center)), s);
}

/* One product of row n with x, up to 4 bits: codes become indices into that register and are used at once. */
static float wide_product(const Codes *C, long n, const uint8_t *codes, const float *x) {
    long g = C->K / C->G;
    __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
    for (long j = 0, at = n * C->G; j < C->G; j++, at++) {
        __m512 values = wide_values(C, at);
        for (long k = 0; k < g; k += 32, codes += 32, x += 32) {
            __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
            __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16)));
            sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(first, values), _mm512_loadu_ps(x), sum);
            other = _mm512_fmadd_ps(_mm512_permutexvar_ps(second, values), _mm512_loadu_ps(x + 16), other);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
}
#endif

static void look_up_bf16(const uint8_t *codes, const float *values, long length, bf16 *out) {
    bf16 table[32];
    long k = 0;
    for (int i = 0; i < 32; i++) table[i] = narrow(values[i]);
#ifdef WIDE
    __m512i entries = _mm512_loadu_si512(table);
    for (; k + 32 <= length; k += 32) {
        __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + k)));
        _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(index, entries));
    }
#endif
    for (; k < length; k++) out[k] = table[codes[k]];
}

static void look_up_float(const uint8_t *codes, const float *values, long length, float *out) {
    long k = 0;
#ifdef WIDE
    __m512 low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + 16);
    for (; k + 16 <= length; k += 16) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + k)));
        _mm512_storeu_ps(out + k, _mm512_permutex2var_ps(low, index, high));
    }
#endif
    for (; k < length; k++) out[k] = values[codes[k]];
}

static void compute_float(const Codes *C, const uint8_t *codes, long at, long length, float *out) {
    float s = C->scales[at], z = C->zeros ? C->zeros[at] : C->center, o = C->offsets ? C->offsets[at] : 0;
    if (C->offsets)
        for (long k = 0; k < length; k++) out[k] = codes[k] * s + o;
    else
        for (long k = 0; k < length; k++) out[k] = (codes[k] - z) * s;
}

static void compute_bf16(const Codes *C, const uint8_t *codes, long at, long length, bf16 *out) {
    float s = C->scales[at], z = C->zeros ? C->zeros[at] : C->center, o = C->offsets ? C->offsets[at] : 0;
    if (C->offsets)
        for (long k = 0; k < length; k++) out[k] = narrow(codes[k] * s + o);
    else
        for (long k = 0; k < length; k++) out[k] = narrow((codes[k] - z) * s);
}

/* Row n: K values into out. Up to 5 bits they are looked up among the 2^bits values of the group. */
static void row_values(const Codes *C, long n, uint8_t *buffer, void *out, int is_bf16) {
    const uint8_t *codes = read_row(C->codes + n * C->row_bytes, C->bits, C->K, buffer);
    long g = C->K / C->G;
    for (long j = 0, at = n * C->G; j < C->G; j++, at++, codes += g) {
        float values[32] = {0};
#ifdef WIDE
        if (C->bits <= 4) _mm512_storeu_ps(values, wide_values(C, at));
#else
        if (C->bits <= 4) values_of_group(C, at, values);
#endif
        if (C->bits == 5) values_of_group(C, at, values);
        if (is_bf16 && C->bits <= 5) look_up_bf16(codes, values, g, (bf16 *)out + j * g);
        else if (is_bf16) compute_bf16(C, codes, at, g, (bf16 *)out + j * g);
        else if (C->bits <= 5) look_up_float(codes, values, g, (float *)out + j * g);
        else compute_float(C, codes, at, g, (float *)out + j * g);
    }
}

/* Weights (N, K); `rows`, if not null, says which N rows to make. */
void dequantize(const Codes *C, const int64_t *rows, long N, void *out, int is_bf16) {
    long row_size = C->K * (is_bf16 ? 2 : 4);
#pragma omp parallel
    {
        uint8_t *buffer = malloc(C->K + 64);
#pragma omp for schedule(static)
        for (long i = 0; i < N; i++) row_values(C, rows ? rows[i] : i, buffer, (char *)out + i * row_size, is_bf16);
        free(buffer);
    }
}

/* y (T, N) = x (T, K) W^T for a few rows x, in float32: a row of W is made in the L1 cache and used at once. */
void product_of_few(const Codes *C, const float *x, long T, long N, float *y) {
    long K = C->K;
#pragma omp parallel
    {
        uint8_t *buffer = malloc(K + 64);
        float *w = malloc(K * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
#ifdef WIDE
            if (T == 1 && C->bits <= 4 && C->K / C->G % 32 == 0) {
                y[n] = wide_product(C, n, read_row(C->codes + n * C->row_bytes, C->bits, K, buffer), x);
                continue;
            }
#endif
            row_values(C, n, buffer, w, 0);
            for (long t = 0; t < T; t++) {
                const float *row = x + t * K;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (long k = 0; k < K; k++) sum += w[k] * row[k];
                y[t * N + n] = sum;
            }
        }
        free(w);
        free(buffer);
    }
}
