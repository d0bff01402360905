// Products of packed weights with quantised activations (layout: libs/modelstore/src/modelstore/packing.py).
//
// Both sides are integers within a group of 32 columns, so a group's product is exact; groups are added up in order, so a
// token's result depends neither on its neighbours in the step nor on the thread.
#pragma once
#include "simd.h"

static const int GROUP = 32, LANES = 16, MAX_TILE_TOKENS = 8;

// Activations [T, K] as signed bytes with a scale for each group of 32, and the sum of each group's bytes.
struct Quantised {
    int8_t* q;      // [T, K]
    float* scales;  // [T, K / 32]
    float* sums;    // [T, K / 32]
    int width;      // K
};

INLINE void quantise_group(const float* x, int8_t* q, float* scale, float* sum_of) {
    f32x16 low = load<f32x16>(x), high = load<f32x16>(x + 16);
    float most = largest(max(max(low, -low), max(high, -high)));
    float inverse = most > 0 ? 127.0f / most : 0.0f;
    low = __builtin_elementwise_roundeven(low * inverse), high = __builtin_elementwise_roundeven(high * inverse);
    store(q, __builtin_convertvector(__builtin_convertvector(low, i32x16), i8x16));
    store(q + 16, __builtin_convertvector(__builtin_convertvector(high, i32x16), i8x16));
    *scale = most / 127.0f;
    *sum_of = sum(low + high);  // whole numbers: exact
}

INLINE void quantise_row(const Quantised& to, int token, const float* x) {
    int groups = to.width / GROUP;
    for (int g = 0; g < groups; g++)
        quantise_group(x + g * GROUP, to.q + (size_t)token * to.width + g * GROUP, to.scales + token * groups + g, to.sums + token * groups + g);
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
    INLINE f32x16 value(f32x16 dot, float sum_of, f32x16 scale, f32x16 minimum) { return fma(dot, scale, minimum * sum_of); }
};
template <> struct Tile<8> {
    static const int bytes = 544;
    INLINE void read(const uint8_t* from, u8x64* w, f32x16* scale, f32x16* minimum) {
        for (int j = 0; j < 8; j++) w[j] = load<u8x64>(from + 64 * j);
        *scale = load_half(from + 512), *minimum = f32x16{};
    }
    INLINE f32x16 value(f32x16 dot, float sum_of, f32x16 scale, f32x16) { return (dot - 128.0f * sum_of) * scale; }
};

// 16 rows of weights times T tokens: out[t * stride + lane].
template <int bits, int T> INLINE void multiply_tokens(const uint8_t* block, const Quantised& x, int token, float* out, int stride) {
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
            const int8_t* q = x.q + (size_t)(token + t) * x.width + g * GROUP;
            i32x16 dot{};
            for (int j = 0; j < 8; j++) dot = dot4<bits == 8>(dot, w[j], splat(load<int32_t>(q + 4 * j)));
            int at = (token + t) * groups + g;
            total[t] = fma(Tile<bits>::value(to_float(dot), x.sums[at], scale, minimum), splat(x.scales[at]), total[t]);
        }
    }
    for (int t = 0; t < T; t++) store(out + (size_t)t * stride, total[t]);
}

// Row blocks [first, first + num_blocks) times tokens [token, token + num_tokens): out[t * stride + 16 * block + lane].
template <int bits>
static void multiply(const uint8_t* weights, int first, int num_blocks, const Quantised& x, int token, int num_tokens, float* out, int stride) {
    size_t block_bytes = (size_t)(x.width / GROUP) * Tile<bits>::bytes;
    for (int b = 0; b < num_blocks; b++) {
        const uint8_t* block = weights + (first + b) * block_bytes;
        int t = 0;
        for (; t + MAX_TILE_TOKENS <= num_tokens; t += MAX_TILE_TOKENS)
            multiply_tokens<bits, MAX_TILE_TOKENS>(block, x, token + t, out + (size_t)t * stride + b * LANES, stride);
        float* rest = out + (size_t)t * stride + b * LANES;
        switch (num_tokens - t) {
            case 1: multiply_tokens<bits, 1>(block, x, token + t, rest, stride); break;
            case 2: multiply_tokens<bits, 2>(block, x, token + t, rest, stride); break;
            case 3: multiply_tokens<bits, 3>(block, x, token + t, rest, stride); break;
            case 4: multiply_tokens<bits, 4>(block, x, token + t, rest, stride); break;
            case 5: multiply_tokens<bits, 5>(block, x, token + t, rest, stride); break;
            case 6: multiply_tokens<bits, 6>(block, x, token + t, rest, stride); break;
            case 7: multiply_tokens<bits, 7>(block, x, token + t, rest, stride); break;
        }
    }
}
