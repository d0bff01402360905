// Products of packed weights with quantised activations (layout: libs/modelstore/src/modelstore/packing.py).
//
// Both sides are integers within a group of 32 columns, so a group's product is exact; groups are added up in order, so
// a token's result depends neither on its neighbours in the step nor on the thread.
#pragma once
#include "simd.h"

static const int GROUP = 32, LANES = 16, MAX_TILE_TOKENS = 8;

// Activations [T, K] as whole numbers with a scale for each group of 32, and the sum of each group's numbers. A number
// is 128 * q + low. Wide tokens have all 15 bits, at nearly twice the work; narrow ones have 8: their low is 0.
struct Quantised {
    int8_t* q;         // [T, K]
    int8_t* low;       // [T, K], null where all tokens are narrow
    float* scales;     // [T, K / 32]
    float* sums;       // [T, K / 32]
    int width;         // K
    uint8_t* is_wide;  // [T]
};

static const float NARROW_MOST = 127, WIDE_MOST = 127 * 128;

INLINE void store_bytes(int8_t* to, f32x16 whole) {
    store(to, __builtin_convertvector(__builtin_convertvector(whole, i32x16), i8x16));
}

// Quantises 32 numbers: group `group` of a token.
INLINE void quantise_group(const Quantised& to, int token, int group, const float* x) {
    bool is_wide = to.is_wide[token];
    size_t at = (size_t)token * to.width + group * GROUP, of_group = (size_t)token * (to.width / GROUP) + group;
    f32x16 halves[2] = {load<f32x16>(x), load<f32x16>(x + 16)}, total{};
    float most = largest(max(max(halves[0], -halves[0]), max(halves[1], -halves[1])));
    float inverse = most > 0 ? (is_wide ? WIDE_MOST : NARROW_MOST) / most : 0.0f;
    for (int h = 0; h < 2; h++) {
        f32x16 whole = __builtin_elementwise_roundeven(halves[h] * inverse);
        f32x16 upper = is_wide ? __builtin_elementwise_roundeven(whole * (1.0f / 128)) : whole;
        store_bytes(to.q + at + 16 * h, upper);
        if (to.low) store_bytes(to.low + at + 16 * h, is_wide ? whole - upper * 128.0f : f32x16{});
        total += is_wide ? whole : whole * 128.0f;
    }
    to.scales[of_group] = most / WIDE_MOST;
    to.sums[of_group] = sum(total);  // whole numbers below 2^24: exact
}

INLINE void quantise_row(const Quantised& to, int token, const float* x) {
    for (int g = 0; g < to.width / GROUP; g++) quantise_group(to, token, g, x + g * GROUP);
}

template <int bits>
struct Tile;
template <>
struct Tile<4> {
    static const int bytes = 320;
    INLINE void read(const uint8_t* from, u8x64* w, f32x16* scale, f32x16* minimum) {
        for (int j = 0; j < 4; j++) {
            u8x64 both = load<u8x64>(from + 64 * j);
            w[j] = both & 15;
            w[j + 4] = (u8x64)((u16x32)both >> 4) & 15;
        }
        *scale = load_half(from + 256), *minimum = load_half(from + 288);
    }
    INLINE f32x16 value(i32x16 dot, float sum_of, f32x16 scale, f32x16 minimum) {
        return fma(to_float(dot), scale, minimum * sum_of);
    }
};
template <>
struct Tile<8> {
    static const int bytes = 544;
    INLINE void read(const uint8_t* from, u8x64* w, f32x16* scale, f32x16* minimum) {
        for (int j = 0; j < 8; j++) w[j] = load<u8x64>(from + 64 * j);
        *scale = load_half(from + 512), *minimum = f32x16{};
    }
    INLINE f32x16 value(i32x16 dot, float sum_of, f32x16 scale, f32x16) {
        return to_float(dot - splat((int32_t)sum_of * 128)) * scale;
    }
};

// 16 rows of weights times T tokens: out[t * stride + lane].
template <int bits, bool is_wide, int T>
INLINE void multiply_tokens(const uint8_t* block, const Quantised& x, int token, float* out, int stride) {
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
            dot <<= 7;
            if (is_wide) {
                q = x.low + first;
                for (int j = 0; j < 8; j++) dot = dot4<bits == 8>(dot, w[j], splat(load<int32_t>(q + 4 * j)));
            }
            int at = (token + t) * groups + g;
            total[t] = fma(Tile<bits>::value(dot, x.sums[at], scale, minimum), splat(x.scales[at]), total[t]);
        }
    }
    for (int t = 0; t < T; t++) store(out + (size_t)t * stride, total[t]);
}

template <int bits, bool is_wide>
static void multiply_tile(const uint8_t* block, const Quantised& x, int token, int num_tokens, float* out, int stride) {
    switch (num_tokens) {
        case 1: multiply_tokens<bits, is_wide, 1>(block, x, token, out, stride); break;
        case 2: multiply_tokens<bits, is_wide, 2>(block, x, token, out, stride); break;
        case 3: multiply_tokens<bits, is_wide, 3>(block, x, token, out, stride); break;
        case 4: multiply_tokens<bits, is_wide, 4>(block, x, token, out, stride); break;
        case 5: multiply_tokens<bits, is_wide, 5>(block, x, token, out, stride); break;
        case 6: multiply_tokens<bits, is_wide, 6>(block, x, token, out, stride); break;
        case 7: multiply_tokens<bits, is_wide, 7>(block, x, token, out, stride); break;
        case 8: multiply_tokens<bits, is_wide, 8>(block, x, token, out, stride); break;
    }
}

template <int bits>
static void multiply_block(const uint8_t* block, const Quantised& x, int token, int num_tokens, float* out,
                           int stride) {
    for (int end = token + num_tokens; token < end; token += MAX_TILE_TOKENS, out += (size_t)MAX_TILE_TOKENS * stride) {
        int count = end - token < MAX_TILE_TOKENS ? end - token : MAX_TILE_TOKENS;
        bool has_wide = false;
        for (int t = token; t < token + count; t++) has_wide |= x.is_wide[t];
        // A narrow token beside wide ones loses nothing but time: its low half is 0.
        if (has_wide) multiply_tile<bits, true>(block, x, token, count, out, stride);
        else multiply_tile<bits, false>(block, x, token, count, out, stride);
    }
}

// Row blocks [first, first + num_blocks) times tokens [token, token + num_tokens): out[t * stride + 16 * block + lane].
template <int bits>
static void multiply(const uint8_t* weights, int first, int num_blocks, const Quantised& x, int token, int num_tokens,
                     float* out, int stride) {
    size_t block_bytes = (size_t)(x.width / GROUP) * Tile<bits>::bytes;
    for (int b = 0; b < num_blocks; b++) {
        const uint8_t* block = weights + (first + b) * block_bytes;
        multiply_block<bits>(block, x, token, num_tokens, out + b * LANES, stride);
    }
}
