// Products of packed weights with quantised activations (layout: libs/modelstore/src/modelstore/packing.py).
//
// Both sides are integers within a group of 32 columns, so a group's product is exact; groups are added up in order, so a
// token's result depends neither on its neighbours in the step nor on the thread.
#pragma once
#include "simd.h"

static const int GROUP = 32, LANES = 16, MAX_TILE_TOKENS = 8;

// Activations [T, K] as whole numbers with a scale for each group of 32, and the sum of each group's numbers.
// Narrow ones have 8 bits; wide ones 15, in two planes of bytes, at nearly twice the work: number = 128 * q + low.
struct Quantised {
    int8_t* q;      // [T, K]
    int8_t* low;    // [T, K], null for narrow ones
    float* scales;  // [T, K / 32]
    float* sums;    // [T, K / 32]
    int width;      // K
};

static const float NARROW_MOST = 127, WIDE_MOST = 127 * 128;

INLINE void quantise_half(f32x16 whole, int8_t* q, int8_t* low) {
    if (low) {
        f32x16 upper = __builtin_elementwise_roundeven(whole * (1.0f / 128));
        store(low, __builtin_convertvector(__builtin_convertvector(whole - upper * 128.0f, i32x16), i8x16));
        whole = upper;
    }
    store(q, __builtin_convertvector(__builtin_convertvector(whole, i32x16), i8x16));
}

// Quantises 32 numbers: group `group` of a token.
INLINE void quantise_group(const Quantised& to, int token, int group, const float* x) {
    f32x16 first = load<f32x16>(x), second = load<f32x16>(x + 16);
    float largest_of = largest(max(max(first, -first), max(second, -second))), most = to.low ? WIDE_MOST : NARROW_MOST;
    float inverse = largest_of > 0 ? most / largest_of : 0.0f;
    first = __builtin_elementwise_roundeven(first * inverse), second = __builtin_elementwise_roundeven(second * inverse);
    size_t at = (size_t)token * to.width + group * GROUP, of_group = (size_t)token * (to.width / GROUP) + group;
    quantise_half(first, to.q + at, to.low ? to.low + at : nullptr);
    quantise_half(second, to.q + at + 16, to.low ? to.low + at + 16 : nullptr);
    to.scales[of_group] = largest_of / most;
    to.sums[of_group] = sum(first + second);  // whole numbers below 2^24: exact
}

INLINE void quantise_row(const Quantised& to, int token, const float* x) {
    for (int g = 0; g < to.width / GROUP; g++) quantise_group(to, token, g, x + g * GROUP);
}

template <int bits> struct Tile;
template <> struct Tile<4> {
    static const int bytes = 320;
    INLINE void read(const uint8_t* from, u8x64* w, f32x16* scale, f32x16* minimum) {
        for (int j = 0; j < 4; j++) {
            u8x64 both = load<u8x64>(from + 64 * j);
            w[j] = both & 15;
            w[j + 4] = (u8x64)((u16x32)both >> 4) & 15;
        }
        *scale = load_half(from + 256), *minimum = load_half(from + 288);
    }
    INLINE f32x16 value(i32x16 dot, float sum_of, f32x16 scale, f32x16 minimum) { return fma(to_float(dot), scale, minimum * sum_of); }
};
template <> struct Tile<8> {
    static const int bytes = 544;
    INLINE void read(const uint8_t* from, u8x64* w, f32x16* scale, f32x16* minimum) {
        for (int j = 0; j < 8; j++) w[j] = load<u8x64>(from + 64 * j);
        *scale = load_half(from + 512), *minimum = f32x16{};
    }
    INLINE f32x16 value(i32x16 dot, float sum_of, f32x16 scale, f32x16) { return to_float(dot - splat((int32_t)sum_of * 128)) * scale; }
};

// 16 rows of weights times T tokens: out[t * stride + lane].
template <int bits, bool is_wide, int T> INLINE void multiply_tokens(const uint8_t* block, const Quantised& x, int token, float* out, int stride) {
    int groups = x.width / GROUP;
    f32x16 total[T];
    for (int t = 0; t < T; t++) total[t] = f32x16{};
    for (int g = 0; g < groups; g++, block += Tile<bits>::bytes) {
        u8x64 w[8];
        f32x16 scale, minimum;
        __builtin_prefetch(block + 2048), __builtin_prefetch(block + 2048 + 64), __builtin_prefetch(block + 2048 + 128);
        __builtin_prefetch(block + 2048 + 192), __builtin_prefetch(block + 2048 + 256);
        Tile<bits>::read(block, w, &scale, &minimum);
#pragma clang loop unroll(full)
        for (int t = 0; t < T; t++) {
            size_t first = (size_t)(token + t) * x.width + g * GROUP;
            const int8_t* q = x.q + first;
            i32x16 dot{};
            for (int j = 0; j < 8; j++) dot = dot4<bits == 8>(dot, w[j], splat(load<int32_t>(q + 4 * j)));
            if (is_wide) {
                dot <<= 7, q = x.low + first;
                for (int j = 0; j < 8; j++) dot = dot4<bits == 8>(dot, w[j], splat(load<int32_t>(q + 4 * j)));
            }
            int at = (token + t) * groups + g;
            total[t] = fma(Tile<bits>::value(dot, x.sums[at], scale, minimum), splat(x.scales[at]), total[t]);
        }
    }
    for (int t = 0; t < T; t++) store(out + (size_t)t * stride, total[t]);
}

template <int bits, bool is_wide>
static void multiply_block(const uint8_t* block, const Quantised& x, int token, int num_tokens, float* out, int stride) {
    for (; num_tokens >= MAX_TILE_TOKENS; num_tokens -= MAX_TILE_TOKENS, token += MAX_TILE_TOKENS, out += (size_t)MAX_TILE_TOKENS * stride)
        multiply_tokens<bits, is_wide, MAX_TILE_TOKENS>(block, x, token, out, stride);
    switch (num_tokens) {
        case 1: multiply_tokens<bits, is_wide, 1>(block, x, token, out, stride); break;
        case 2: multiply_tokens<bits, is_wide, 2>(block, x, token, out, stride); break;
        case 3: multiply_tokens<bits, is_wide, 3>(block, x, token, out, stride); break;
        case 4: multiply_tokens<bits, is_wide, 4>(block, x, token, out, stride); break;
        case 5: multiply_tokens<bits, is_wide, 5>(block, x, token, out, stride); break;
        case 6: multiply_tokens<bits, is_wide, 6>(block, x, token, out, stride); break;
        case 7: multiply_tokens<bits, is_wide, 7>(block, x, token, out, stride); break;
    }
}

// Row blocks [first, first + num_blocks) times tokens [token, token + num_tokens): out[t * stride + 16 * block + lane].
template <int bits>
static void multiply(const uint8_t* weights, int first, int num_blocks, const Quantised& x, int token, int num_tokens, float* out, int stride) {
    size_t block_bytes = (size_t)(x.width / GROUP) * Tile<bits>::bytes;
    for (int b = 0; b < num_blocks; b++) {
        const uint8_t* block = weights + (first + b) * block_bytes;
        if (x.low) multiply_block<bits, true>(block, x, token, num_tokens, out + b * LANES, stride);
        else multiply_block<bits, false>(block, x, token, num_tokens, out + b * LANES, stride);
    }
}
