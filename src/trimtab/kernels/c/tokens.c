/* Sums over tokens that a matrix product would be too much for. */
#include "rows.h"

/* out[n] = sum over t of a[t, n] * b[t, n], for bfloat16 a and b of shape (T, N). */
void column_products(const bf16 *a, const bf16 *b, long T, long N, float *out) {
#pragma omp parallel for schedule(static)
    for (long n0 = 0; n0 < N; n0 += TILE) {
        long count = N - n0 < TILE ? N - n0 : TILE;
        float sum[TILE] = {0};
        for (long t = 0; t < T; t++) {
            const bf16 *x = a + t * N + n0, *y = b + t * N + n0;
            for (long j = 0; j < count; j++) sum[j] += widen(x[j]) * widen(y[j]);
        }
        memcpy(out + n0, sum, count * sizeof(float));
    }
}

/* out[p] = sum over t of g[t, n[p]] * x[t, k[p]]: single entries of g^T x, for bfloat16 g (T, N) and x (T, K). */
void entries_of_product(const bf16 *g, const bf16 *x, long T, long N, long K, const int64_t *n, const int64_t *k,
                        long count, float *out) {
#pragma omp parallel
    {
        float *wide_g = malloc(N * sizeof(float)), *wide_x = malloc(K * sizeof(float));
#pragma omp for schedule(static)
        for (long p0 = 0; p0 < count; p0 += 512) {
            long end = p0 + 512 < count ? p0 + 512 : count;
            memset(out + p0, 0, (end - p0) * sizeof(float));
            for (long t = 0; t < T; t++) {
                for (long j = 0; j < N; j++) wide_g[j] = widen(g[t * N + j]);
                for (long j = 0; j < K; j++) wide_x[j] = widen(x[t * K + j]);
                for (long p = p0; p < end; p++) out[p] += wide_g[n[p]] * wide_x[k[p]];
            }
        }
        free(wide_g);
        free(wide_x);
    }
}
