// The forward pass of a Llama-shaped model over the tokens of a step: many sequences side by side, each with its own
// keys.
#include "attention.h"
#include "draw.h"
#include "engine.h"
#include "matmul.h"
#include "pool.h"

#define PR_ABI 3

enum Wide { WIDE_QKV = 1, WIDE_OUTPUT = 2, WIDE_MLP = 4, WIDE_DOWN = 8, WIDE_HEAD = 16 };
enum Part { Q, K, V, OUTPUT, GATE, UP, DOWN };

struct PrModel {
    PrConfig config;
    PrLayer* layers;
    const uint8_t *embedding, *head;
    const float *norm, *cos_table, *sin_table;
    half *keys, *values;
    Pool pool;
    // Buffers of one step, T = max_tokens.
    float *hidden, *attended, *inner;  // [T, E], [T, H D], [T, I]
    float *queries, *normed;           // [T, H D], [T, E]
    float* low_rank;                   // [T, 7, MAX_RANK], what an adapter's first factor makes of a token
    Quantised x, mlp_x, heads,
        inner_q;     // what the matrices read: qkv, gate and up [T, E], output [T, H D], down [T, I]
    Quantised last;  // [rows, E]
    int32_t *piece_token, *piece_length, *piece_sequence;  // pieces of attention: tokens of one sequence
    int32_t* sequence_of;                                  // [T]
    float* found_best;                                     // [items of the head, rows, 2]
    void* arena;
};

static const int MAX_RANK = 512, PIECE_TOKENS = 8, NORM_TOKENS = 4, HEAD_BLOCKS = 16, SPAN_TOKENS = 64;

struct Job {
    PrModel* model;
    PrStep step;
    const PrDraw* draws;  // where this is set, the job is to draw tokens, and nothing else
    int32_t* chosen;
    int num_draws;
    int num_pieces;
    bool has_adapters;
};

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What an adapter's first factor [rank, width] makes of x.
static void project_down(const PrFactors& factors, const float* x, int width, float* out) {
    for (int r = 0; r < factors.rank; r++) {
        const float* a = factors.a + (size_t)r * width;
        f32x16 total{};
        for (int i = 0; i < width; i += 16) total = fma(load<f32x16>(a + i), load<f32x16>(x + i), total);
        out[r] = sum(total);
    }
}

// Adds the second factor's share to `count` outputs from `first` on.
static void project_up(const PrFactors& factors, const float* low_rank, int num_outputs, int first, int count,
                       float* out) {
    for (int r = 0; r < factors.rank; r++) {
        const float* b = factors.b + (size_t)r * num_outputs + first;
        for (int i = 0; i < count; i += 16)
            store(out + i, fma(load<f32x16>(b + i), splat(low_rank[r]), load<f32x16>(out + i)));
    }
}

static const PrAdapterLayer* adapter_of(const PrModel* m, const Job& job, int token, int layer) {
    const PrAdapterLayer* layers = job.has_adapters ? job.step.adapters[m->sequence_of[token]] : nullptr;
    return layers ? layers + layer : nullptr;
}

static float* low_rank_of(const PrModel* m, int token, Part part) {
    return m->low_rank + ((size_t)token * 7 + part) * MAX_RANK;
}

static void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
    f32x16 squares{};
    for (int i = 0; i < width; i += 16) squares = fma(load<f32x16>(x + i), load<f32x16>(x + i), squares);
    float inverse = 1.0f / sqrtf(sum(squares) / width + eps);
    for (int i = 0; i < width; i += 16) store(out + i, load<f32x16>(x + i) * inverse * load<f32x16>(weight + i));
}

// Reads one row of a packed 8-bit matrix.
static void read_row(const uint8_t* matrix, int row, int width, float* out) {
    int groups = width / GROUP;
    const uint8_t* tile = matrix + (size_t)(row / LANES) * groups * Tile<8>::bytes;
    for (int g = 0; g < groups; g++, tile += Tile<8>::bytes) {
        half scale;
        memcpy(&scale, tile + 512 + 2 * (row % LANES), 2);
        for (int k = 0; k < GROUP; k++)
            out[g * GROUP + k] = (float)scale * (tile[64 * (k / 4) + 4 * (row % LANES) + k % 4] - 128);
    }
}

static void normalise(PrModel* m, const Job& job, int token, const float* weight, const Quantised& to, int layer,
                      const Part* parts, int num_parts) {
    int width = m->config.hidden;
    float* normed = m->normed + (size_t)token * width;
    rms_norm(m->hidden + (size_t)token * width, weight, width, m->config.norm_eps, normed);
    quantise_row(to, token, normed);
    if (const PrAdapterLayer* adapter = adapter_of(m, job, token, layer))
        for (int p = 0; p < num_parts; p++)
            project_down(adapter->parts[parts[p]], normed, width, low_rank_of(m, token, parts[p]));
}

// Rotates a head (RoFormer, arXiv 2104.09864, in the half-split layout of Llama) and multiplies it by `scale`.
INLINE void rotate(float* head, const float* cosines, const float* sines, int size, float scale) {
    for (int i = 0; i < size / 2; i += 16) {
        f32x16 low = load<f32x16>(head + i), high = load<f32x16>(head + size / 2 + i);
        f32x16 c = load<f32x16>(cosines + i), s = load<f32x16>(sines + i);
        store(head + i, (low * c - high * s) * scale), store(head + size / 2 + i, (high * c + low * s) * scale);
    }
}

// float16 has no numbers above 65504; an infinity would poison every later token of the sequence.
INLINE half to_half(float x) { return (half)(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x); }

// Keys or values of a block lie together for all layers: [block, layer, kv head, ...]. So memory that is in use is
// dense.
static size_t layer_size(const PrConfig& c) { return (size_t)c.num_kv_heads * c.head_dim * BLOCK; }
static size_t block_size(const PrConfig& c) { return c.num_layers * layer_size(c); }

// One head of q, k or v for a span of tokens: multiply, adapt, rotate, put away.
template <int bits>
static void make_head(PrModel* m, const Job& job, int layer, int head, int token, int num_tokens, float* scratch) {
    const PrConfig& c = m->config;
    int size = c.head_dim, first_k = c.num_heads, first_v = c.num_heads + c.num_kv_heads;
    Part part = head < first_k ? Q : head < first_v ? K : V;
    int of_part = head - (part == Q ? 0 : part == K ? first_k : first_v);
    int num_outputs = (part == Q ? c.num_heads : c.num_kv_heads) * size;
    multiply<bits>(m->layers[layer].qkv, head * size / LANES, size / LANES, m->x, token, num_tokens, scratch, size);
    for (int t = 0; t < num_tokens; t++) {
        float* values = scratch + t * size;
        int at = token + t, position = job.step.positions[at];
        if (const PrAdapterLayer* adapter = adapter_of(m, job, at, layer))
            project_up(adapter->parts[part], low_rank_of(m, at, part), num_outputs, of_part * size, size, values);
        if (part != V)
            rotate(values, m->cos_table + (size_t)position * size / 2, m->sin_table + (size_t)position * size / 2, size,
                   part == Q ? 1.0f / sqrtf(size) : 1.0f);
        if (part == Q) {
            memcpy(m->queries + ((size_t)at * c.num_heads + of_part) * size, values, size * sizeof(float));
            continue;
        }
        int sequence = m->sequence_of[at];
        size_t block = job.step.tables[job.step.table_starts[sequence] + position / BLOCK], slot = position % BLOCK;
        size_t offset = block * block_size(c) + layer * layer_size(c) + (size_t)of_part * size * BLOCK;
        if (part == K)
            for (int d = 0; d < size; d++) m->keys[offset + d * BLOCK + slot] = to_half(values[d]);
        else
            for (int d = 0; d < size; d++) m->values[offset + slot * size + d] = to_half(values[d]);
    }
}

// One key head for a piece of a sequence: the query heads that share it, over all keys so far.
static void attend_piece(PrModel* m, const Job& job, int layer, int piece, int kv_head, float* scratch) {
    const PrConfig& c = m->config;
    int size = c.head_dim, shared = c.num_heads / c.num_kv_heads, token = m->piece_token[piece],
        count = m->piece_length[piece];
    const float* queries[PIECE_TOKENS * 64];
    float* out[PIECE_TOKENS * 64];
    int lengths[PIECE_TOKENS * 64], n = 0;
    for (int t = token; t < token + count; t++)
        for (int h = kv_head * shared; h < (kv_head + 1) * shared; h++, n++) {
            size_t at = ((size_t)t * c.num_heads + h) * size;
            queries[n] = m->queries + at, out[n] = m->attended + at, lengths[n] = job.step.positions[t] + 1;
        }
    size_t layer_offset = layer * layer_size(c), head_offset = (size_t)kv_head * size * BLOCK;
    const half *keys = m->keys + layer_offset, *values = m->values + layer_offset;
    const int32_t* table = job.step.tables + job.step.table_starts[m->piece_sequence[piece]];
    size_t stride = (c.context_length + BLOCK - 1) / BLOCK * BLOCK;
    switch (size) {
        case 32:
            attend<32>(keys, values, table, block_size(c), head_offset, queries, lengths, out, n, scratch, stride);
            break;
        case 64:
            attend<64>(keys, values, table, block_size(c), head_offset, queries, lengths, out, n, scratch, stride);
            break;
        case 96:
            attend<96>(keys, values, table, block_size(c), head_offset, queries, lengths, out, n, scratch, stride);
            break;
        case 128:
            attend<128>(keys, values, table, block_size(c), head_offset, queries, lengths, out, n, scratch, stride);
            break;
    }
    for (int t = token; t < token + count; t++) {
        const float* from = m->attended + (size_t)t * c.num_heads * size;
        for (int g = kv_head * shared * size / GROUP; g < (kv_head + 1) * shared * size / GROUP; g++)
            quantise_group(m->heads, t, g, from + g * GROUP);
    }
}

// Adds a matrix's outputs [16 first_block, + 16 num_blocks) to the residual stream.
template <int bits>
static void add_to_hidden(PrModel* m, const Job& job, int layer, const uint8_t* weights, const Quantised& x, Part part,
                          int first_block, int num_blocks, int token, int num_tokens, float* scratch) {
    int count = num_blocks * LANES, first = first_block * LANES, width = m->config.hidden;
    multiply<bits>(weights, first_block, num_blocks, x, token, num_tokens, scratch, count);
    for (int t = 0; t < num_tokens; t++) {
        float* to = m->hidden + (size_t)(token + t) * width + first;
        if (const PrAdapterLayer* adapter = adapter_of(m, job, token + t, layer))
            project_up(adapter->parts[part], low_rank_of(m, token + t, part), width, first, count, scratch + t * count);
        for (int i = 0; i < count; i += 16) store(to + i, load<f32x16>(to + i) + load<f32x16>(scratch + t * count + i));
    }
}

// 32 numbers of silu(gate) * up, quantised for `down`.
template <int bits>
static void make_inner(PrModel* m, const Job& job, int layer, int group, int token, int num_tokens, float* scratch) {
    int width = m->config.intermediate, first = group * GROUP;
    float *gate = scratch, *up = scratch + SPAN_TOKENS * GROUP;
    multiply<bits>(m->layers[layer].gate, group * 2, 2, m->mlp_x, token, num_tokens, gate, GROUP);
    multiply<bits>(m->layers[layer].up, group * 2, 2, m->mlp_x, token, num_tokens, up, GROUP);
    for (int t = 0; t < num_tokens; t++, gate += GROUP, up += GROUP) {
        int at = token + t;
        if (const PrAdapterLayer* adapter = adapter_of(m, job, at, layer)) {
            project_up(adapter->parts[GATE], low_rank_of(m, at, GATE), width, first, GROUP, gate);
            project_up(adapter->parts[UP], low_rank_of(m, at, UP), width, first, GROUP, up);
        }
        float* inner = m->inner + (size_t)at * width + first;
        for (int i = 0; i < GROUP; i += 16) store(inner + i, silu(load<f32x16>(gate + i)) * load<f32x16>(up + i));
        quantise_group(m->inner_q, at, group, inner);
    }
}

template <int bits>
static void run_layer(Worker* worker, PrModel* m, const Job& job, int layer) {
    const PrConfig& c = m->config;
    const PrLayer& w = m->layers[layer];
    const int T = job.step.num_tokens, spans = ceil_div(T, SPAN_TOKENS);
    const auto span = [T](int i, int* count) {
        *count = T - i * SPAN_TOKENS < SPAN_TOKENS ? T - i * SPAN_TOKENS : SPAN_TOKENS;
        return i * SPAN_TOKENS;
    };
    const auto each_token = [&](int item, auto fn) {
        for (int t = item * NORM_TOKENS; t < T && t < (item + 1) * NORM_TOKENS; t++) fn(t);
    };
    float* scratch = worker->scratch;

    run_phase(worker, ceil_div(T, NORM_TOKENS), [&](int item) {
        each_token(item, [&](int t) {
            const Part parts[] = {Q, K, V};
            if (layer == 0) read_row(m->embedding, job.step.token_ids[t], c.hidden, m->hidden + (size_t)t * c.hidden);
            normalise(m, job, t, w.attention_norm, m->x, layer, parts, 3);
        });
    });
    int num_all_heads = c.num_heads + 2 * c.num_kv_heads;
    run_phase(worker, num_all_heads * spans, [&](int item) {
        int count, token = span(item / num_all_heads, &count);
        make_head<bits>(m, job, layer, item % num_all_heads, token, count, scratch);
    });
    run_phase(worker, job.num_pieces * c.num_kv_heads,
              [&](int item) { attend_piece(m, job, layer, item / c.num_kv_heads, item % c.num_kv_heads, scratch); });
    if (job.has_adapters)
        run_phase(worker, T, [&](int t) {
            if (const PrAdapterLayer* adapter = adapter_of(m, job, t, layer))
                project_down(adapter->parts[OUTPUT], m->attended + (size_t)t * c.num_heads * c.head_dim,
                             c.num_heads * c.head_dim, low_rank_of(m, t, OUTPUT));
        });
    int num_blocks = c.hidden / LANES, pairs = num_blocks / 2;
    run_phase(worker, pairs * spans, [&](int item) {
        int count, token = span(item / pairs, &count);
        add_to_hidden<bits>(m, job, layer, w.output, m->heads, OUTPUT, item % pairs * 2, 2, token, count, scratch);
    });
    run_phase(worker, ceil_div(T, NORM_TOKENS), [&](int item) {
        each_token(item, [&](int t) {
            const Part parts[] = {GATE, UP};
            normalise(m, job, t, w.mlp_norm, m->mlp_x, layer, parts, 2);
        });
    });
    int groups = c.intermediate / GROUP;
    run_phase(worker, groups * spans, [&](int item) {
        int count, token = span(item / groups, &count);
        make_inner<bits>(m, job, layer, item % groups, token, count, scratch);
    });
    if (job.has_adapters)
        run_phase(worker, T, [&](int t) {
            if (const PrAdapterLayer* adapter = adapter_of(m, job, t, layer))
                project_down(adapter->parts[DOWN], m->inner + (size_t)t * c.intermediate, c.intermediate,
                             low_rank_of(m, t, DOWN));
        });
    run_phase(worker, pairs * spans, [&](int item) {
        int count, token = span(item / pairs, &count);
        add_to_hidden<bits>(m, job, layer, w.down, m->inner_q, DOWN, item % pairs * 2, 2, token, count, scratch);
    });
}

// The first of the largest.
static int find_best(const float* values, int num) {
    int whole = num / 16 * 16, i = 0;
    f32x16 highest_of = splat(-INFINITY);
    for (; i < whole; i += 16) highest_of = max(highest_of, load<f32x16>(values + i));
    float highest = largest(highest_of);
    for (; i < num; i++) highest = values[i] > highest ? values[i] : highest;
    for (i = 0; i < num; i++)
        if (values[i] == highest) return i;
    return 0;
}

// Logits of the wanted rows, HEAD_BLOCKS x 16 of the vocabulary at a time, and the best of each piece.
static void make_logits(PrModel* m, const Job& job, int item, float* scratch) {
    const PrConfig& c = m->config;
    const int R = job.step.num_rows, blocks = ceil_div(c.vocab, LANES), first = item * HEAD_BLOCKS;
    const int count = blocks - first < HEAD_BLOCKS ? blocks - first : HEAD_BLOCKS, stride = HEAD_BLOCKS * LANES;
    for (int row = 0; row < R; row += SPAN_TOKENS) {
        int rows = R - row < SPAN_TOKENS ? R - row : SPAN_TOKENS;
        multiply<8>(m->head, first, count, m->last, row, rows, scratch, stride);
        for (int r = 0; r < rows; r++) {
            const float* from = scratch + r * stride;
            int begin = first * LANES, num = c.vocab - begin < count * LANES ? c.vocab - begin : count * LANES;
            if (job.step.wants_logits[row + r])
                memcpy(job.step.logits + (size_t)(row + r) * c.vocab + begin, from, num * sizeof(float));
            int best = find_best(from, num);
            float* found = m->found_best + ((size_t)item * c.max_rows + row + r) * 2;
            found[0] = from[best];
            int32_t id = begin + best;
            memcpy(found + 1, &id, 4);
        }
    }
}

static int head_items(const PrConfig& c) { return ceil_div(ceil_div(c.vocab, LANES), HEAD_BLOCKS); }

static void body(Worker* worker, void* argument) {
    Job job = *(Job*)argument;
    PrModel* m = job.model;
    const PrConfig& c = m->config;
    if (job.draws) {
        run_phase(worker, job.num_draws, [&](int i) {
            job.chosen[i] = draw_token(job.draws[i], c.vocab, worker->scratch, worker->scratch + c.vocab + LANES);
        });
        return;
    }
    for (int layer = 0; layer < c.num_layers && !worker->is_late; layer++)
        c.weight_bits == 4 ? run_layer<4>(worker, m, job, layer) : run_layer<8>(worker, m, job, layer);
    if (!job.step.num_rows) return;
    run_phase(worker, job.step.num_rows, [&](int row) {
        float* normed = worker->scratch;
        rms_norm(m->hidden + (size_t)job.step.rows[row] * c.hidden, m->norm, c.hidden, c.norm_eps, normed);
        quantise_row(m->last, row, normed);
    });
    run_phase(worker, head_items(c), [&](int item) { make_logits(m, job, item, worker->scratch); });
}

// Memory of a step, cut from one piece.
struct Arena {
    char* at;
    size_t used;
    template <class T>
    T* take(size_t count) {
        T* piece = (T*)(at + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    Quantised quantised(size_t rows, int width, bool has_low) {
        int8_t* q = take<int8_t>(rows * width);
        int8_t* low = has_low ? take<int8_t>(rows * width) : nullptr;
        return Quantised{
            q, low, take<float>(rows * width / GROUP), take<float>(rows * width / GROUP), width, take<uint8_t>(rows)};
    }
};

static bool needs_low(const PrConfig& c, Wide part) { return (c.wide_in_prompts | c.wide_after) & part; }

static size_t lay_out(PrModel* m, char* at) {
    const PrConfig& c = m->config;
    Arena arena{at, 0};
    size_t T = c.max_tokens, attended = (size_t)c.num_heads * c.head_dim;
    m->layers = arena.take<PrLayer>(c.num_layers);
    m->hidden = arena.take<float>(T * c.hidden), m->normed = arena.take<float>(T * c.hidden);
    m->queries = arena.take<float>(T * attended), m->attended = arena.take<float>(T * attended);
    m->inner = arena.take<float>(T * c.intermediate), m->low_rank = arena.take<float>(T * 7 * MAX_RANK);
    m->x = arena.quantised(T, c.hidden, needs_low(c, WIDE_QKV)),
    m->heads = arena.quantised(T, attended, needs_low(c, WIDE_OUTPUT));
    m->mlp_x = arena.quantised(T, c.hidden, needs_low(c, WIDE_MLP)),
    m->inner_q = arena.quantised(T, c.intermediate, needs_low(c, WIDE_DOWN));
    m->last = arena.quantised(c.max_rows, c.hidden, needs_low(c, WIDE_HEAD));
    m->piece_token = arena.take<int32_t>(T), m->piece_length = arena.take<int32_t>(T),
    m->piece_sequence = arena.take<int32_t>(T);
    m->sequence_of = arena.take<int32_t>(T);
    m->found_best = arena.take<float>((size_t)head_items(c) * c.max_rows * 2);
    return arena.used;
}

// Asks the processor and the system for what this build was compiled for.
static bool is_supported(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d, b7, c7;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    const unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, F16C = 1u << 29;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d) || (c & (FMA | OSXSAVE | F16C)) != (FMA | OSXSAVE | F16C))
        return false;
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));  // the registers that the system keeps
#if defined(__AVX512VNNI__)
    const unsigned F = 1u << 16, DQ = 1u << 17, CD = 1u << 28, BW = 1u << 30, VL = 1u << 31, VNNI = 1u << 11;
    return (b7 & (F | DQ | CD | BW | VL)) == (F | DQ | CD | BW | VL) && (c7 & VNNI) && (saved & 0xe6) == 0xe6;
#else
    const unsigned AVX2 = 1u << 5;
    return (b7 & AVX2) && (saved & 6) == 6;
#endif
#else
    return true;
#endif
}

extern "C" {

int32_t pr_abi(void) { return PR_ABI; }

int32_t pr_is_supported(void) { return is_supported(); }

PrModel* pr_open(const PrConfig* config, const PrLayer* layers, const uint8_t* embedding, const uint8_t* head,
                 const float* norm, const float* cos_table, const float* sin_table, uint16_t* keys, uint16_t* values) {
    PrModel* m = (PrModel*)calloc(1, sizeof(PrModel));
    if (!m) return nullptr;
    m->config = *config;
    const PrConfig& c = m->config;
    m->embedding = embedding, m->head = head, m->norm = norm, m->cos_table = cos_table, m->sin_table = sin_table;
    m->keys = (half*)keys, m->values = (half*)values;
    size_t scratch = (size_t)SPAN_TOKENS * HEAD_BLOCKS * LANES,
           scores = (size_t)MAX_QUERIES * (c.context_length + BLOCK);
    size_t head_floats = (size_t)SPAN_TOKENS * c.head_dim;
    scratch = scratch > scores ? scratch : scores, scratch = scratch > head_floats ? scratch : head_floats;
    scratch = scratch > (size_t)c.hidden ? scratch : c.hidden;
    scratch = scratch > 2 * (size_t)(c.vocab + LANES) ? scratch : 2 * (size_t)(c.vocab + LANES);
    if (posix_memalign(&m->arena, 64, lay_out(m, nullptr))) m->arena = nullptr;
    if (!m->arena ||
        !open_pool(&m->pool, c.num_threads, c.num_layers * 9 + 2, sizeof(Job), scratch * sizeof(float), body)) {
        free(m->arena), free(m);
        return nullptr;
    }
    lay_out(m, (char*)m->arena);
    memcpy(m->layers, layers, sizeof(PrLayer) * c.num_layers);
    return m;
}

void pr_close(PrModel* m) {
    close_pool(&m->pool);
    free(m->arena), free(m);
}

void pr_forward(PrModel* m, const PrStep* step) {
    const PrConfig& c = m->config;
    Job job{m, *step, nullptr, nullptr, 0, 0, false};
    for (int s = 0; s < step->num_sequences; s++) {
        for (int t = step->starts[s]; t < step->starts[s + 1]; t++) m->sequence_of[t] = s;
        for (int t = step->starts[s]; t < step->starts[s + 1]; t += PIECE_TOKENS, job.num_pieces++) {
            int left = step->starts[s + 1] - t;
            m->piece_token[job.num_pieces] = t, m->piece_sequence[job.num_pieces] = s;
            m->piece_length[job.num_pieces] = left < PIECE_TOKENS ? left : PIECE_TOKENS;
        }
        job.has_adapters |= step->adapters && step->adapters[s];
    }
    const Quantised* read_by[] = {&m->x, &m->heads, &m->mlp_x, &m->inner_q};
    for (int part = 0; part < 4; part++)
        for (int t = 0; t < step->num_tokens; t++)
            read_by[part]->is_wide[t] = (step->is_prompt[t] ? c.wide_in_prompts : c.wide_after) >> part & 1;
    for (int row = 0; row < step->num_rows; row++)
        m->last.is_wide[row] = ((step->is_prompt[step->rows[row]] ? c.wide_in_prompts : c.wide_after) & WIDE_HEAD) != 0;
    run_job(&m->pool, &job, c.num_layers * (job.has_adapters ? 9 : 7) + (step->num_rows ? 2 : 0));
    for (int row = 0; row < step->num_rows; row++) {
        float highest = -INFINITY;
        int32_t id = 0;
        for (int item = 0; item < head_items(c); item++) {
            const float* found = m->found_best + ((size_t)item * c.max_rows + row) * 2;
            if (found[0] > highest) highest = found[0], memcpy(&id, found + 1, 4);
        }
        step->best[row] = id;
    }
}

void pr_draw(PrModel* m, const PrDraw* draws, int32_t num_draws, int32_t* chosen) {
    Job job{m, PrStep{}, draws, chosen, num_draws, 0, false};
    run_job(&m->pool, &job, 1);
}
}
