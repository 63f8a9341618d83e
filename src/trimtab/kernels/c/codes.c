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
    const void *scales, *zeros, *offsets;  /* (N, G) */
    int scale_kind, zero_kind, offset_kind;  /* of Kind */
    float center;
    const float *table;
    const void *absmax;
    const float *map, *block_scales, *mean;
} Codes;

/* How scales and zeros are stored: read as they are, so that no widened copy is made for each token. */
enum Kind { FLOAT32, BFLOAT16, UINT8 };

static inline float read_at(const void *tensor, int kind, long at) {
    if (kind == BFLOAT16) return widen(((const bf16 *)tensor)[at]);
    return kind == UINT8 ? ((const uint8_t *)tensor)[at] : ((const float *)tensor)[at];
}
static inline float scale_of(const Codes *C, long at) { return read_at(C->scales, C->scale_kind, at); }
static inline float offset_of(const Codes *C, long at) { return read_at(C->offsets, C->offset_kind, at); }
static inline float zero_of(const Codes *C, long at) {
    return C->zeros ? read_at(C->zeros, C->zero_kind, at) : C->center;
}

static inline float absmax_of(const Codes *C, long at) {
    if (!C->map) return ((const float *)C->absmax)[at];
    return C->map[((const uint8_t *)C->absmax)[at]] * C->block_scales[at / 256] + *C->mean;
}

/* The values that the codes of a group stand for: 2^bits of them. */
static void values_of_group(const Codes *C, long at, float *values) {
    int count = 1 << C->bits;
    if (C->table) {
        float a = absmax_of(C, at);
        for (int q = 0; q < count; q++) values[q] = C->offsets ? C->table[q] * a + offset_of(C, at) : C->table[q] * a;
        return;
    }
    float s = scale_of(C, at), z = zero_of(C, at);
    if (C->offsets)
        for (int q = 0; q < count; q++) values[q] = q * s + offset_of(C, at);
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
        return C->offsets ? _mm512_add_ps(values, _mm512_set1_ps(offset_of(C, at))) : values;
    }
    __m512 s = _mm512_set1_ps(scale_of(C, at));
    if (C->offsets) return _mm512_add_ps(_mm512_mul_ps(q, s), _mm512_set1_ps(offset_of(C, at)));
    return _mm512_mul_ps(_mm512_sub_ps(q, _mm512_set1_ps(zero_of(C, at))), s);
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

/* The same for more bits, where codes are computed with. */
static float wide_product_computed(const Codes *C, long n, const uint8_t *codes, const float *x) {
    long g = C->K / C->G;
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long j = 0, at = n * C->G; j < C->G; j++, at++) {
        __m512 s = _mm512_set1_ps(scale_of(C, at)), z = _mm512_set1_ps(zero_of(C, at));
        __m512 o = _mm512_set1_ps(C->offsets ? offset_of(C, at) : 0);
        for (long k = 0; k < g; k += 16, codes += 16, x += 16) {
            __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)));
            __m512 w = C->offsets ? _mm512_add_ps(_mm512_mul_ps(q, s), o) : _mm512_mul_ps(_mm512_sub_ps(q, z), s);
            sums[k / 16 % 2] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sums[k / 16 % 2]);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}
#endif

#ifdef WIDE_BF16
/* Up to 4 bits and x in bfloat16, two products at a time. q - z is exact in bfloat16, so an affine group is summed over
 * small integers from one table for each zero and scaled once; a codebook's group has a table of its own, rounded to
 * bfloat16 as `dequantize` rounds it. */
typedef struct {
    bf16 tables[16][32] __attribute__((aligned(64)));  /* q - z for each z */
    float *sums;          /* of x in each group, for offsets */
} Prepared;

static void prepare(const Codes *C, const bf16 *x, Prepared *P) {
    long g = C->K / C->G;
    for (int z = 0; z < 16; z++)
        for (int q = 0; q < 32; q++) P->tables[z][q] = narrow(q - z);
    for (long j = 0; C->offsets && j < C->G; j++) {
        P->sums[j] = 0;
        for (long k = j * g; k < (j + 1) * g; k++) P->sums[j] += widen(x[k]);
    }
}

static inline int zero_index(const Codes *C, long at) {
    if (C->offsets) return 0;
    return C->zeros && C->zero_kind == UINT8 ? ((const uint8_t *)C->zeros)[at] : (int)zero_of(C, at);
}

static inline __m512i table_of_group(const Codes *C, const Prepared *P, long at) {
    int z = C->table ? 0 : zero_index(C, at);
    if (z < 0 || z > 15) {  /* a zero that is no code, as in some files */
        bf16 values[32] __attribute__((aligned(64)));
        for (int q = 0; q < 32; q++) values[q] = narrow(q - z);
        return _mm512_load_si512(values);
    }
    if (!C->table) return _mm512_load_si512(P->tables[z]);
    return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(wide_values(C, at)));
}

static inline __m512 settle(const Codes *C, long at, __m512 group, __m512 total) {
    return C->table ? _mm512_add_ps(group, total) : _mm512_fmadd_ps(group, _mm512_set1_ps(scale_of(C, at)), total);
}

static inline __m512 add_pairs(__m512 sum, __m512i index, __m512i values, const bf16 *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_permutexvar_epi16(index, values), (__m512bh)_mm512_loadu_si512(x));
}

static float bf16_product(const Codes *C, const Prepared *P, long n, const uint8_t *codes, const bf16 *x) {
    long g = C->K / C->G;
    float moved = 0;
    __m512 total = _mm512_setzero_ps();
    for (long j = 0, at = n * C->G; j < C->G; j++, at++) {
        __m512i values = table_of_group(C, P, at);
        __m512 sum = _mm512_setzero_ps();
        for (long k = 0; k < g; k += 32, codes += 32, x += 32)
            sum = add_pairs(sum, _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes)), values, x);
        total = settle(C, at, sum, total);
        if (C->offsets && !C->table) moved += offset_of(C, at) * P->sums[j];
    }
    return _mm512_reduce_add_ps(total) + moved;
}

/* 4 bits straight from the packed row: the low halves of its bytes are its first K / 2 codes, the high ones the rest. */
static float bf16_product_of_halves(const Codes *C, const Prepared *P, long n, const uint8_t *packed, const bf16 *x) {
    long half = C->K / 2, groups = C->G == 1 ? 1 : C->G / 2, g = half / groups, apart = C->G == 1 ? 0 : groups;
    float moved = 0;
    __m512 total = _mm512_setzero_ps();
    __m512i mask = _mm512_set1_epi16(15);
    for (long j = 0, at = n * C->G; j < groups; j++, at++) {
        __m512i lows = table_of_group(C, P, at), highs = apart ? table_of_group(C, P, at + apart) : lows;
        __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
        for (long k = 0; k < g; k += 32, packed += 32, x += 32) {
            __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)packed));
            low = add_pairs(low, _mm512_and_si512(both, mask), lows, x);
            high = add_pairs(high, _mm512_srli_epi16(both, 4), highs, x + half);
        }
        total = settle(C, at + apart, high, settle(C, at, low, total));
        if (C->offsets && !C->table) {
            moved += offset_of(C, at) * P->sums[j];
            if (apart) moved += offset_of(C, at + apart) * P->sums[j + apart];
        }
    }
    return _mm512_reduce_add_ps(total) + moved;
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
    float s = scale_of(C, at), z = zero_of(C, at), o = C->offsets ? offset_of(C, at) : 0;
    if (C->offsets)
        for (long k = 0; k < length; k++) out[k] = codes[k] * s + o;
    else
        for (long k = 0; k < length; k++) out[k] = (codes[k] - z) * s;
}

static void compute_bf16(const Codes *C, const uint8_t *codes, long at, long length, bf16 *out) {
    float s = scale_of(C, at), z = zero_of(C, at), o = C->offsets ? offset_of(C, at) : 0;
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
        else
#endif
        if (C->bits <= 5) values_of_group(C, at, values);
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

/* One product of row n with x by the quickest way that the processor and the shapes allow; 0 where there is none. */
static int quick_product(const Codes *C, const void *prepared, long n, const float *x, const bf16 *x16,
                         uint8_t *buffer, float *y) {
    const uint8_t *row = C->codes + n * C->row_bytes;
    long g = C->K / C->G;
#ifdef WIDE_BF16
    if (x16 && C->bits == 4 && g % 32 == 0 && (C->G == 1 ? C->K % 64 : C->G % 2) == 0) {
        *y = bf16_product_of_halves(C, prepared, n, row, x16);
        return 1;
    }
    if (x16 && C->bits <= 4 && g % 32 == 0) {
        *y = bf16_product(C, prepared, n, read_row(row, C->bits, C->K, buffer), x16);
        return 1;
    }
#endif
#ifdef WIDE
    if (C->bits <= 4 && g % 32 == 0) {
        *y = wide_product(C, n, read_row(row, C->bits, C->K, buffer), x);
        return 1;
    }
    if (C->bits > 4 && !C->table && g % 16 == 0) {
        *y = wide_product_computed(C, n, read_row(row, C->bits, C->K, buffer), x);
        return 1;
    }
#endif
    return 0;
}

/* y (T, N) = x (T, K) W^T for a few rows x, summed in float32: a row of W is made in the L1 cache and used at once. */
void product_of_few(const Codes *C, const void *given, int is_bf16, long T, long N, float *y) {
    long K = C->K;
    float *wide = is_bf16 ? malloc(T * K * sizeof(float)) : 0;
    for (long i = 0; is_bf16 && i < T * K; i++) wide[i] = widen(((const bf16 *)given)[i]);
    const float *x = is_bf16 ? wide : given;
    const void *prepared = 0;
#ifdef WIDE_BF16
    Prepared tables = {.sums = malloc(C->G * sizeof(float))};
    if (T == 1 && is_bf16) prepare(C, given, &tables);
    prepared = &tables;
#endif
#pragma omp parallel
    {
        uint8_t *buffer = malloc(K + 64);
        float *w = malloc(K * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            if (T == 1 && quick_product(C, prepared, n, x, is_bf16 ? given : 0, buffer, y + n)) continue;
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
#ifdef WIDE_BF16
    free(tables.sums);
#endif
    free(wide);
}
