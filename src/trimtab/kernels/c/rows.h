/* What the C kernels share: bfloat16, and a row of packed codes to one byte a code.
 *
 * Plain C over raw pointers, no torch headers: a second to compile, and one build serves every torch version. Rows are
 * shared out among OpenMP threads. Compiled with -ffp-contract=off: `q * s + o` must round twice, as the torch reference
 * and GGUF do; only the sum over the rank is fused, and that explicitly.
 *
 * Legend: N rows (out features), K columns (in features), G groups in a row, R rank, T tokens.
 */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#if defined(__AVX512BF16__)
#define WIDE_BF16 1
#endif
#endif

#define TILE 64  /* columns that are worked on at once */

typedef uint16_t bf16;
typedef uint64_t word __attribute__((aligned(1), may_alias));

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to nearest even; a NaN stays one. */
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

/* ---- packed codes (the layout of packing.py) ------------------------------------------------------------------- */

/* Of 1 to 7 bits; 8 are a byte each, which is neither packed nor unpacked. */
static const int PARTS[8][4] = {{0}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}};

/* One row of packed codes to one byte a code, and up to 7 bytes more: the last segment is unpacked to its end.
 * Shifts act on eight bytes at once: what crosses a byte is masked away. */
static void unpack_row(const uint8_t *packed, int bits, long K, uint8_t *restrict codes) {
    int shift = 0;
    for (const int *part = PARTS[bits]; part < PARTS[bits] + 4 && *part; part++) {
        int width = *part, segments = 8 / width;
        long length = (K + segments - 1) / segments;
        uint8_t mask = (1 << width) - 1;
        word masks = 0x0101010101010101ull * mask;
        for (int i = 0; i < segments; i++) {
            const uint8_t *restrict in = packed;
            uint8_t *restrict out = codes + i * length;
            int down = i * width;
            long j = 0;
#ifdef WIDE
            __m512i wide = _mm512_set1_epi64(masks);
            for (; j + 64 <= length; j += 64) {
                __m512i piece = _mm512_and_si512(_mm512_srli_epi64(_mm512_loadu_si512(in + j), down), wide);
                if (shift) piece = _mm512_or_si512(_mm512_slli_epi64(piece, shift), _mm512_loadu_si512(out + j));
                _mm512_storeu_si512(out + j, piece);
            }
#endif
            if (shift == 0) {
                for (; j + 8 <= length; j += 8) *(word *)(out + j) = (*(const word *)(in + j) >> down) & masks;
                for (; j < length; j++) out[j] = (in[j] >> down) & mask;
            } else {
                for (; j + 8 <= length; j += 8)
                    *(word *)(out + j) |= ((*(const word *)(in + j) >> down) & masks) << shift;
                for (; j < length; j++) out[j] |= ((in[j] >> down) & mask) << shift;
            }
        }
        packed += length;
        shift += width;
    }
}

static inline const uint8_t *read_row(const uint8_t *row, int bits, long K, uint8_t *buffer) {
    if (bits == 8) return row;
    unpack_row(row, bits, K, buffer);
    return buffer;
}
