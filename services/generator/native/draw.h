// Draws a token from logits: temperature, top_k, top_p, min_p, in this order, as core/sampling.py says in numpy.
#pragma once
#include "engine.h"
#include "simd.h"
#include <stdlib.h>

static int by_weight_descending(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// The weight below which top_k and top_p drop a token. `sorted` has room for all weights.
static float find_threshold(const PrDraw& draw, const float* weights, int vocab, double total, float* sorted) {
    bool has_k = draw.top_k > 0 && draw.top_k < vocab, has_p = draw.top_p < 1.0f;
    if (!has_k && !has_p) return 0.0f;
    // Nearly always a few tokens carry all that counts: sorting those is enough, and 40 times faster than sorting all.
    const float cuts[] = {1e-3f, 1e-6f, 0.0f};
    for (float cut : cuts) {
        int count = 0;
        double mass = 0;
        for (int i = 0; i < vocab; i++)
            if (weights[i] >= cut) sorted[count++] = weights[i], mass += weights[i];
        bool is_enough = cut == 0.0f || (has_k ? count >= draw.top_k : mass >= (double)draw.top_p * total);
        if (!is_enough) continue;
        qsort(sorted, count, sizeof(float), by_weight_descending);
        if (has_k && count > draw.top_k) count = draw.top_k;
        if (!has_p) return sorted[count - 1];
        double kept = 0, reached = 0;
        if (has_k)
            for (int i = 0; i < count; i++) kept += sorted[i];
        else kept = total;
        for (int i = 0; i < count; i++)
            if ((reached += sorted[i]) >= draw.top_p * kept) return sorted[i];
        return sorted[count - 1];
    }
    return 0.0f;
}

// `weights` and `sorted` have room for the vocabulary, rounded up to 16.
static int32_t draw_token(const PrDraw& draw, int vocab, float* weights, float* sorted) {
    int whole = vocab / 16 * 16;
    f32x16 highest_of = splat(-INFINITY);
    for (int i = 0; i < whole; i += 16) highest_of = max(highest_of, load<f32x16>(draw.logits + i));
    float highest = largest(highest_of);
    for (int i = whole; i < vocab; i++) highest = draw.logits[i] > highest ? draw.logits[i] : highest;
    memcpy(weights, draw.logits, vocab * sizeof(float));
    for (int i = vocab; i < (vocab + 15) / 16 * 16; i++) weights[i] = -INFINITY;
    double total = 0;
    for (int i = 0; i < vocab; i += 16) {
        f32x16 scaled = (load<f32x16>(weights + i) - highest) / draw.temperature;
        f32x16 weight = exp16(scaled);
        // exp16 stops at e^-87; what is forbidden (minus infinity) or that far off must weigh nothing.
        u32x16 is_counted = (u32x16)(scaled > -87.0f);
        store(weights + i, (f32x16)((u32x16)weight & is_counted));
    }
    for (int i = 0; i < vocab; i++) total += weights[i];
    float threshold = find_threshold(draw, weights, vocab, total, sorted);
    threshold = threshold > draw.min_p ? threshold : draw.min_p;
    if (threshold > 0) {
        total = 0;
        for (int i = 0; i < vocab; i++) {
            if (weights[i] < threshold) weights[i] = 0;
            total += weights[i];
        }
    }
    double target = draw.uniform * total, below = nextafter(total, 0.0), reached = 0;
    target = target < below ? target : below;
    int32_t last = 0;
    for (int i = 0; i < vocab; i++) {
        if (weights[i] > 0) last = i;
        if ((reached += weights[i]) > target) return i;
    }
    return last;
}
