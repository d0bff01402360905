// What Python may call (backends/native_runner/library.py mirrors it). All pointers stay the caller's.
#pragma once
#include <stdint.h>

extern "C" {

// Sizes of a model and of its memory. Weights are 4 or 8 bits wide, in the layout of modelstore.packing.
struct PrConfig {
    int32_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab;
    int32_t weight_bits, num_threads, num_blocks, context_length;
    int32_t max_tokens, max_rows;  // of one step
    // Matrices that read activations of 15 bits in place of 8, of a prompt's tokens and of the rest: 1 qkv, 2 output,
    // 4 gate and up, 8 down, 16 head.
    int32_t wide_in_prompts, wide_after;
    float norm_eps;
};

// Packed matrices and norms of one layer.
struct PrLayer {
    const uint8_t *qkv, *output, *gate, *up, *down;
    const float *attention_norm, *mlp_norm;
};

// The two factors of an adapter for one matrix: a [rank, K], b [rank, N] (transposed, the scale folded in). rank 0:
// none.
struct PrFactors {
    const float *a, *b;
    int32_t rank;
};

// One layer of an adapter, in this order: q, k, v, output, gate, up, down.
struct PrAdapterLayer {
    PrFactors parts[7];
};

// One step. Token t of the step belongs to the sequence s with starts[s] <= t < starts[s + 1]; positions of a
// sequence's tokens are consecutive. tables[table_starts[s] + i] is the sequence's i-th block.
struct PrStep {
    int32_t num_tokens, num_sequences, num_rows;
    const int32_t *token_ids, *positions, *starts, *tables, *table_starts;
    const uint8_t* is_prompt;     // [num_tokens] whether nothing is sampled from the token
    const int32_t* rows;          // [num_rows] tokens whose likeliest successor is wanted
    const uint8_t* wants_logits;  // [num_rows] whether the row's logits are wanted too
    const PrAdapterLayer* const*
        adapters;   // [num_sequences] layers of the sequence's adapter or null; null for none at all
    float* logits;  // [num_rows, vocab]
    int32_t* best;  // [num_rows] the likeliest token, the lowest id of equals
};

// How to draw one token: temperature above 0; top_k 0, top_p 1 and min_p 0 keep all; uniform in [0, 1).
struct PrDraw {
    const float* logits;  // [vocab]
    float temperature, top_p, min_p;
    int32_t top_k;
    double uniform;
};

struct PrModel;

int32_t pr_abi(void);  // changes with every change of this file
// Says whether this processor can run this library.
int32_t pr_is_supported(void);
// Returns null where memory or threads ran out.
PrModel* pr_open(const PrConfig* config, const PrLayer* layers, const uint8_t* embedding, const uint8_t* head,
                 const float* norm, const float* cos_table, const float* sin_table, uint16_t* keys, uint16_t* values);
void pr_close(PrModel* model);
// Computes a step: writes keys and values, then logits and best.
void pr_forward(PrModel* model, const PrStep* step);
// Draws one token for each of num_draws rows.
void pr_draw(PrModel* model, const PrDraw* draws, int32_t num_draws, int32_t* chosen);
}
