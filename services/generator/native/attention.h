// Attention over keys and values in blocks (PagedAttention, arXiv 2309.06180), causal, with grouped query heads.
//
// Keys are [block, layer, kv head, D, 16] and values [block, layer, kv head, 16, D], both float16: a register holds 16
// keys, or 16 dimensions of one value. Scores are kept whole (no online softmax), so that a token's result depends on
// its own keys alone, however the step was cut.
#pragma once
#include "simd.h"

static const int BLOCK = 16, MAX_QUERIES = 4;  // queries that share what is loaded of a key or value
// Blocks lie anywhere in memory, each too short for the processor's own prefetching: without this a decode of 32
// sequences spent twice as long in attention.
static const int AHEAD = 2;

// Scores of Q queries against one block of 16 keys: out[i * stride + key]. `later` is what will be read soon.
template <int D, int Q>
INLINE void score_block(const half* keys, const half* later, const float* const* queries, float* out, size_t stride) {
    f32x16 dots[Q];
    for (int i = 0; i < Q; i++) dots[i] = f32x16{};
    for (int d = 0; d < D; d++) {
        if (d % 2 == 0) __builtin_prefetch(later + d * BLOCK);
        f32x16 key = load_half(keys + d * BLOCK);
#pragma clang loop unroll(full)
        for (int i = 0; i < Q; i++) dots[i] = fma(key, splat(queries[i][d]), dots[i]);
    }
    for (int i = 0; i < Q; i++) store(out + i * stride, dots[i]);
}

// Turns scores[0, length) into weights that sum to 1, and what follows up to `padded` into zeros.
INLINE void softmax(float* scores, int length, int padded) {
    for (int i = length; i < padded; i++) scores[i] = -INFINITY;
    int whole = (length + 15) / 16 * 16;
    f32x16 highest_of = load<f32x16>(scores);
    for (int i = 16; i < whole; i += 16) highest_of = max(highest_of, load<f32x16>(scores + i));
    float highest = largest(highest_of);
    f32x16 total{};
    for (int i = 0; i < whole; i += 16) {
        f32x16 weight = exp16(load<f32x16>(scores + i) - highest);
        if (i + 16 > length)
            for (int lane = length - i; lane < 16; lane++) weight[lane] = 0;
        total += weight;
        store(scores + i, weight);
    }
    float inverse = 1.0f / sum(total);
    for (int i = 0; i < whole; i += 16) store(scores + i, load<f32x16>(scores + i) * inverse);
    for (int i = whole; i < padded; i++) scores[i] = 0;
}

// Weighted sums of values of Q queries over num_keys keys.
template <int D, int Q>
INLINE void mix_values(const half* layer_values, const int32_t* table, size_t block_stride, size_t head_offset,
                       const float* weights, size_t stride, int num_keys, float* const* out) {
    const int CHUNKS = D / 16;
    f32x16 total[Q][CHUNKS];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < CHUNKS; c++) total[i][c] = f32x16{};
    for (int first = 0; first < num_keys; first += BLOCK) {
        const half* values = layer_values + table[first / BLOCK] * block_stride + head_offset;
        int last = (num_keys - 1) / BLOCK, next = first / BLOCK + AHEAD;
        const half* later = layer_values + table[next < last ? next : last] * block_stride + head_offset;
        int count = num_keys - first < BLOCK ? num_keys - first : BLOCK;
        for (int key = 0; key < count; key++) {
            for (int d = 0; d < D; d += 32) __builtin_prefetch(later + key * D + d);
#pragma clang loop unroll(full)
            for (int c = 0; c < CHUNKS; c++) {
                f32x16 value = load_half(values + key * D + c * 16);
#pragma clang loop unroll(full)
                for (int i = 0; i < Q; i++)
                    total[i][c] = fma(value, splat(weights[i * stride + first + key]), total[i][c]);
            }
        }
    }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < CHUNKS; c++) store(out[i] + c * 16, total[i][c]);
}

// Q queries of one key head; query i sees the first lengths[i] keys, lengths never fall, and out[i] gets D numbers.
template <int D, int Q>
INLINE void attend_queries(const half* layer_keys, const half* layer_values, const int32_t* table, size_t block_stride,
                           size_t head_offset, const float* const* queries, const int* lengths, float* const* out,
                           float* scores, size_t stride) {
    int most = lengths[Q - 1], padded = (most + BLOCK - 1) / BLOCK * BLOCK;
    int num_blocks = padded / BLOCK;
    for (int b = 0; b < num_blocks; b++) {
        // Past the last keys come the first values.
        const half* later = b + AHEAD < num_blocks ? layer_keys + table[b + AHEAD] * block_stride
                                                   : layer_values + table[(b + AHEAD) % num_blocks] * block_stride;
        score_block<D, Q>(layer_keys + table[b] * block_stride + head_offset, later + head_offset, queries,
                          scores + b * BLOCK, stride);
    }
    for (int i = 0; i < Q; i++) softmax(scores + i * stride, lengths[i], padded);
    mix_values<D, Q>(layer_values, table, block_stride, head_offset, scores, stride, most, out);
}

template <int D>
static void attend(const half* layer_keys, const half* layer_values, const int32_t* table, size_t block_stride,
                   size_t head_offset, const float* const* queries, const int* lengths, float* const* out,
                   int num_queries, float* scores, size_t stride) {
    int i = 0;
    for (; i + MAX_QUERIES <= num_queries; i += MAX_QUERIES)
        attend_queries<D, MAX_QUERIES>(layer_keys, layer_values, table, block_stride, head_offset, queries + i,
                                       lengths + i, out + i, scores, stride);
    switch (num_queries - i) {
        case 3:
            attend_queries<D, 3>(layer_keys, layer_values, table, block_stride, head_offset, queries + i, lengths + i,
                                 out + i, scores, stride);
            break;
        case 2:
            attend_queries<D, 2>(layer_keys, layer_values, table, block_stride, head_offset, queries + i, lengths + i,
                                 out + i, scores, stride);
            break;
        case 1:
            attend_queries<D, 1>(layer_keys, layer_values, table, block_stride, head_offset, queries + i, lengths + i,
                                 out + i, scores, stride);
            break;
    }
}
