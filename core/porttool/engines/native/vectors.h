// Dot products of stored weights with float32 vectors: 16 floats at a time with AVX-512, 8 with
// AVX2.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "the processor has neither AVX-512 nor AVX2 with FMA and F16C"
#endif

namespace {

constexpr int ROWS = 4;  // weight rows read side by side

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#ifdef __AVX512BW__
typedef __m512 Vec;
constexpr int LANES = 16;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline Vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec add_product(Vec sum, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Vec x) { return _mm512_reduce_add_ps(x); }
#else
typedef __m256 Vec;
constexpr int LANES = 8;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec add_product(Vec sum, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

inline float value(float x) { return x; }
inline float value(int8_t x) { return x; }
inline float value(fp16 x) { return _cvtsh_ss(x.bits); }
inline float value(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline void store(float* p, float x) { *p = x; }
inline void store(fp16* p, float x) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store(bf16* p, float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// out[r][t] = w[r] . x[t] for R rows of k weights and T tokens. The R rows after these are fetched
// meanwhile: the hardware alone follows four interleaved streams at half the speed.
template <int R, int T, typename W>
inline void dots(const W* w, long k, const float* x, long stride, float (*out)[T]) {
    Vec sum[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = splat(0);
    constexpr int LINE = 64 / sizeof(W);  // elements of one cache line
    long i = 0;
    auto add = [&](long at) {
        Vec a[R];
        for (int r = 0; r < R; r++) a[r] = load(w + r * k + at);
        for (int t = 0; t < T; t++) {
            const Vec b = load(x + t * stride + at);
            for (int r = 0; r < R; r++) sum[r][t] = add_product(sum[r][t], a[r], b);
        }
    };
    for (; i + LINE <= k; i += LINE) {
        for (int r = 0; r < R; r++) _mm_prefetch((const char*)(w + (R + r) * k + i), _MM_HINT_T1);
        for (int j = 0; j < LINE; j += LANES) add(i + j);
    }
    for (; i + LANES <= k; i += LANES) add(i);
    const long whole = i;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            out[r][t] = total(sum[r][t]);
            for (i = whole; i < k; i++)
                out[r][t] = fmaf(value(w[r * k + i]), x[t * stride + i], out[r][t]);
        }
}

// out[j] = sum over p of weights[p] values[p, j], for n values of d elements.
template <typename W>
inline void mix(const float* weights, const W* values, long n, long d, float* out) {
    long j = 0;
    auto columns = [&](auto wide) {
        constexpr int V = decltype(wide)::value;
        for (; j + V * LANES <= d; j += V * LANES) {
            Vec sum[V];
            for (int v = 0; v < V; v++) sum[v] = splat(0);
            for (long p = 0; p < n; p++)
                for (int v = 0; v < V; v++)
                    sum[v] = add_product(sum[v], splat(weights[p]),
                                         load(values + p * d + j + v * LANES));
            for (int v = 0; v < V; v++) store(out + j + v * LANES, sum[v]);
        }
    };
    columns(std::integral_constant<int, 4>());
    columns(std::integral_constant<int, 1>());
    for (; j < d; j++) {
        out[j] = 0;
        for (long p = 0; p < n; p++) out[j] += weights[p] * value(values[p * d + j]);
    }
}

// Calls use(row, token, w[row] . x[token]) for n_rows rows of w and n tokens.
template <typename W, typename Use>
inline void rows_by_tokens(const W* w, long n_rows, long k, const float* x, long n, Use use) {
    long row = 0, token = 0;
    auto block = [&](auto rows, auto tokens) {
        constexpr int R = decltype(rows)::value, T = decltype(tokens)::value;
        for (; token + T <= n; token += T) {
            float out[R][T];
            dots<R, T>(w + row * k, k, x + token * k, k, out);
            for (int r = 0; r < R; r++)
                for (int t = 0; t < T; t++) use(row + r, token + t, out[r][t]);
        }
    };
    auto band = [&](auto rows) {
        for (; row + rows.value <= n_rows; row += rows.value) {
            token = 0;
            block(rows, std::integral_constant<int, 6>());
            block(rows, std::integral_constant<int, 2>());
            block(rows, std::integral_constant<int, 1>());
        }
    };
    band(std::integral_constant<int, ROWS>());
    band(std::integral_constant<int, 1>());
}

}  // namespace
