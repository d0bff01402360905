// Vectors of 512 bits as clang's vector extensions: one source for AVX-512, AVX2 and NEON; only dot4 is written by
// hand.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef _Float16 f16x16 __attribute__((vector_size(32)));
typedef _Float16 half;

#define INLINE static inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

INLINE f32x16 splat(float x) { return f32x16{} + x; }
INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }
INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
INLINE f32x16 load_half(const void* from) { return __builtin_convertvector(load<f16x16>(from), f32x16); }
// Never contracted by the compiler's choice: a token's arithmetic must not depend on how many others are computed with
// it.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return __builtin_elementwise_fma(a, b, c); }
INLINE f32x16 max(f32x16 a, f32x16 b) { return __builtin_elementwise_max(a, b); }
INLINE float sum(f32x16 v) {
    float s[16];
    store(s, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}
INLINE float largest(f32x16 v) { return __builtin_reduce_max(v); }

// Adds to each of 16 lanes the products of four unsigned bytes (weights) and four signed ones (activations).
// is_wide: weights use all eight bits; else they are below 16.
template <bool is_wide>
INLINE i32x16 dot4(i32x16 sums, u8x64 weights, i32x16 activations) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)activations);
#elif defined(__AVX2__)
    __m256i s[2], w[2], a[2];
    memcpy(s, &sums, 64), memcpy(w, &weights, 64), memcpy(a, &activations, 64);
    for (int h = 0; h < 2; h++) {
        if (is_wide) {  // maddubs would saturate at 255 * 127 * 2
            __m256i w_even = _mm256_and_si256(w[h], _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w[h], 8);
            __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a[h], 8), 8), a_odd = _mm256_srai_epi16(a[h], 8);
            s[h] = _mm256_add_epi32(s[h], _mm256_madd_epi16(w_even, a_even));
            s[h] = _mm256_add_epi32(s[h], _mm256_madd_epi16(w_odd, a_odd));
        } else {
            __m256i pairs = _mm256_maddubs_epi16(w[h], a[h]);
            s[h] = _mm256_add_epi32(s[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
    memcpy(&sums, s, 64);
    return sums;
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t s[4];
    int8x16_t w[4], a[4];
    memcpy(s, &sums, 64), memcpy(w, &weights, 64), memcpy(a, &activations, 64);
    for (int q = 0; q < 4; q++) {
        if (is_wide) {  // w = 128 + (w - 128), and the latter is signed
            s[q] = vdotq_s32(s[q], veorq_s8(w[q], vdupq_n_s8(-128)), a[q]);
            s[q] = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(64), a[q]), 1) + s[q];
        } else {
            s[q] = vdotq_s32(s[q], w[q], a[q]);
        }
    }
    memcpy(&sums, s, 64);
    return sums;
#else
    uint8_t w[64];
    int8_t a[64];
    store(w, weights), memcpy(a, &activations, 64);
    for (int lane = 0; lane < 16; lane++)
        for (int i = 0; i < 4; i++) sums[lane] += w[4 * lane + i] * a[4 * lane + i];
    return sums;
#endif
}

// e^x for x <= 0 or moderate x, within two units of the last place (range reduction and polynomial of Cephes' expf).
INLINE f32x16 exp16(f32x16 x) {
    x = max(x, splat(-87.0f));
    x = __builtin_elementwise_min(x, splat(88.0f));
    f32x16 n = __builtin_elementwise_roundeven(x * 1.44269504088896341f);
    f32x16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32x16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    i32x16 exponent = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return p * (f32x16)exponent;
}

INLINE f32x16 silu(f32x16 x) { return x / (exp16(-x) + 1.0f); }
