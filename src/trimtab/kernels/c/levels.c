/* Levels to weights: (phi + half) * unit + gain * B A, then round, clamp and (q - z) * s, a tile of 4 x 64 at a time. */
#include "rows.h"

#define BLOCK 4
typedef float lane __attribute__((vector_size(64)));

static inline lane fused(lane a, lane b, lane c) {
#ifdef WIDE
    return (lane)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

/* A (R, K) cut into tiles of 64 columns, the last padded with zeros, so that a tile is contiguous: (tiles, R, 64). */
static float *tiles_of(const float *A, long R, long K) {
    long tiles = (K + TILE - 1) / TILE;
    float *packed = aligned_alloc(64, tiles * R * TILE * sizeof(float));
    for (long t = 0; t < tiles; t++)
        for (long r = 0; r < R; r++) {
            long count = K - t * TILE < TILE ? K - t * TILE : TILE;
            float *to = packed + (t * R + r) * TILE;
            memcpy(to, A + r * K + t * TILE, count * sizeof(float));
            memset(to + count, 0, (TILE - count) * sizeof(float));
        }
    return packed;
}

/* BLOCK rows of B (each R long) times a tile of A: sums (BLOCK, TILE). */
static void product(const float *const B[BLOCK], const float *tile, long R, float sums[BLOCK][TILE]) {
    lane sum[BLOCK][4] = {{{0}}};
    for (long r = 0; r < R; r++) {
        const lane *a = (const lane *)(tile + r * TILE);
#pragma GCC unroll 4
        for (int i = 0; i < BLOCK; i++) {
            lane b = B[i][r] - (lane){0};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = fused(a[j], b, sum[i][j]);
        }
    }
    memcpy(sums, sum, sizeof sum);
}

/* What levels are made of. */
typedef struct {
    const uint8_t *phi;  /* packed codes (bits of them), or with bits = 8 one byte a level */
    long row_bytes;
    int bits;
    float half, unit;    /* level = (byte + half) * unit */
    const float *A, *B;  /* (R, K), (N, R), or null */
    long R;
    float gain;
    float top;           /* largest code */
    const float *scales, *zeros, *offsets;  /* (N, G); zeros and offsets may be null */
    float center;
    long N, K, G;
} Levels;

/* Levels of rows n0 .. n0 + height and columns k0 .. k0 + count. */
typedef struct {
    long n0, k0, height, count;
    float u[BLOCK][TILE];
} Tile;

/* What is done with a tile; `to` and `more` are the results. */
typedef void (*Body)(const Levels *, Tile *, void *to, float *const more[2]);

static void each_tile(const Levels *L, Body body, void *to, float *const more[2]) {
    float *tiles = L->A ? tiles_of(L->A, L->R, L->K) : NULL;
#pragma omp parallel
    {
        long stride = L->K + 64;
        uint8_t *buffer = malloc(BLOCK * stride);
#pragma omp for schedule(static)
        for (long n0 = 0; n0 < L->N; n0 += BLOCK) {
            Tile tile = {.n0 = n0, .height = L->N - n0 < BLOCK ? L->N - n0 : BLOCK};
            const uint8_t *phi[BLOCK];
            const float *B[BLOCK];
            for (long i = 0; i < BLOCK; i++) {
                long n = n0 + (i < tile.height ? i : tile.height - 1);
                phi[i] = read_row(L->phi + n * L->row_bytes, L->bits, L->K, buffer + i * stride);
                B[i] = L->B + n * L->R;
            }
            for (long k0 = 0; k0 < L->K; k0 += TILE) {
                tile.k0 = k0, tile.count = L->K - k0 < TILE ? L->K - k0 : TILE;
                if (tiles) product(B, tiles + k0 * L->R, L->R, tile.u);
                else memset(tile.u, 0, sizeof tile.u);
                for (long i = 0; i < tile.height; i++)
                    for (long j = 0; j < tile.count; j++)
                        tile.u[i][j] = (phi[i][k0 + j] + L->half) * L->unit + L->gain * tile.u[i][j];
                body(L, &tile, to, more);
            }
        }
        free(buffer);
    }
    free(tiles);
}

/* Half to even in [0, top], whose ends are whole. Adding 1.5 * 2^23 leaves no bits for a fraction. */
static inline float round_clamp(float u, float top) {
    u = u < 0 ? 0 : u;
    u = u > top ? top : u;
    return (u + 12582912.0f) - 12582912.0f;
}

static void codes_of(const Levels *L, Tile *t, void *to, float *const more[2]) {
    (void)more;
    for (long i = 0; i < t->height; i++) {
        uint8_t *codes = (uint8_t *)to + (t->n0 + i) * L->K + t->k0;
        for (long j = 0; j < t->count; j++) {
            float code = round_clamp(t->u[i][j], L->top);
            codes[j] = code == code ? (uint8_t)code : 0;  /* no integer stands for a NaN */
        }
    }
}

/* The columns of a tile from j on that lie in one group end before this one. */
static inline long group_end(const Levels *L, const Tile *t, long j) {
    long g = L->K / L->G, end = j + g - (t->k0 + j) % g;
    return end < t->count ? end : t->count;
}

static void values_of(const Levels *L, Tile *t, long i) {
    float *u = t->u[i], top = L->top;
    for (long j = 0, end; j < t->count; j = end) {
        end = group_end(L, t, j);
        long at = (t->n0 + i) * L->G + (t->k0 + j) / (L->K / L->G);
        float s = L->scales[at], z = L->zeros ? L->zeros[at] : L->center, o = L->offsets ? L->offsets[at] : 0;
        if (L->offsets)
            for (long m = j; m < end; m++) u[m] = round_clamp(u[m], top) * s + o;
        else
            for (long m = j; m < end; m++) u[m] = (round_clamp(u[m], top) - z) * s;
    }
}

/* A bit for each of 64 columns whose level rounds to a code that does not exist.
 * Half to even: -0.5 rounds to code 0, and top + 0.5, top being odd, to top + 1, which is clipped. */
static uint64_t clipped_columns(const float *u, long count, float top) {
    uint64_t bits = 0;
    float high = top + 0.5f;
#ifdef WIDE
    for (int j = 0; j < TILE; j += 16) {
        __m512 v = _mm512_loadu_ps(u + j);
        uint64_t out = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-0.5f), _CMP_NGE_UQ) |
                       _mm512_cmp_ps_mask(v, _mm512_set1_ps(high), _CMP_NLT_UQ);
        bits |= out << j;
    }
#else
    for (int j = 0; j < TILE; j++) bits |= (uint64_t) !(u[j] >= -0.5f && u[j] < high) << j;
#endif
    return count < TILE ? bits & ((1ull << count) - 1) : bits;
}

static void weights_bf16(const Levels *L, Tile *t, void *to, float *const more[2]) {
    if (more) {
        uint64_t *clipped = (uint64_t *)more[0];
        long words = (L->K + TILE - 1) / TILE;
        for (long i = 0; i < t->height; i++)
            clipped[(t->n0 + i) * words + t->k0 / TILE] = clipped_columns(t->u[i], t->count, L->top);
    }
    for (long i = 0; i < t->height; i++) {
        bf16 *out = (bf16 *)to + (t->n0 + i) * L->K + t->k0;
        values_of(L, t, i);
        for (long j = 0; j < t->count; j++) out[j] = narrow(t->u[i][j]);
    }
}

static void weights_float(const Levels *L, Tile *t, void *to, float *const more[2]) {
    (void)more;
    for (long i = 0; i < t->height; i++) {
        values_of(L, t, i);
        memcpy((float *)to + (t->n0 + i) * L->K + t->k0, t->u[i], t->count * sizeof(float));
    }
}

static void gradients(const Levels *L, Tile *t, void *to, float *const more[2]) {
    float *of_scale = more[0], *of_offset = more[1], top = L->top, high = L->top + 0.5f;
    for (long i = 0; i < t->height; i++) {
        bf16 *d = (bf16 *)to + (t->n0 + i) * L->K + t->k0;
        const float *u = t->u[i];
        for (long j = 0, end; j < t->count; j = end) {
            end = group_end(L, t, j);
            long at = (t->n0 + i) * L->G + (t->k0 + j) / (L->K / L->G);
            float s = L->scales[at], z = L->offsets ? 0 : L->zeros ? L->zeros[at] : L->center;
            float scale_sum = 0, sum = 0;
#pragma omp simd reduction(+ : scale_sum, sum)
            for (long m = j; m < end; m++) {
                float dw = widen(d[m]);
                scale_sum += dw * (round_clamp(u[m], top) - z);
                sum += dw;
                d[m] = narrow(u[m] >= -0.5f && u[m] < high ? dw * s : 0);
            }
            of_scale[at] += scale_sum;
            if (of_offset) of_offset[at] += sum;
        }
    }
}

/* The codes that levels round to: uint8 (N, K). */
void level_codes(const Levels *L, uint8_t *out) { each_tile(L, codes_of, out, NULL); }

/* The weights that levels round to: (N, K). */
void level_weights(const Levels *L, void *out, int is_bf16) {
    each_tile(L, is_bf16 ? weights_bf16 : weights_float, out, NULL);
}

/* The same in bfloat16, and which levels were clipped: a bit each, (N, ceil(K / 64)) words. */
void level_weights_clipped(const Levels *L, bf16 *out, uint64_t *clipped) {
    each_tile(L, weights_bf16, out, (float *const[2]){(float *)clipped, NULL});
}

/* From dL/dW (bfloat16, (N, K), overwritten): dL/du = dW * s where no level was clipped, in its place;
 * of_scale = sum over the group of dW * (q - z); of_offset = sum over the group of dW, or null. */
void level_gradients(const Levels *L, bf16 *grad, float *of_scale, float *of_offset) {
    memset(of_scale, 0, L->N * L->G * sizeof(float));
    if (of_offset) memset(of_offset, 0, L->N * L->G * sizeof(float));
    each_tile(L, gradients, grad, (float *const[2]){of_scale, of_offset});
}
