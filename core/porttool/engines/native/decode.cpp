// One decode step of the canonical decoder on a CPU: a few tokens, all layers, one parallel region.
//
// The weights are the checkpoint's own row-major [out, in] matrices, so torch runs prefill from the
// same memory. A step of one token is bound by reading them. All arithmetic is float32 whatever the
// storage type is, and every dot product is summed in the same order for every batch: a row's
// result does not depend on its neighbours.

#include "head.h"

#include <system_error>
#include <thread>

namespace {

enum Activation : int64_t { GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SILU };
enum Norm : int64_t { LAYERNORM, RMSNORM };

inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

inline float activate(int64_t kind, float x) {
    switch (kind) {
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        // 0.5 (1 + tanh u) = sigmoid(2 u)
        case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        case QUICK_GELU: return x * sigmoid(1.702f * x);
        case RELU: return x > 0 ? x : 0;
        case RELU2: return x > 0 ? x * x : 0;
        default: return x * sigmoid(x);
    }
}

}  // namespace

// Everything below is mirrored in torch/cpu_native.py. Vectors are float32; a missing bias is null.
extern "C" {
struct Layer {
    const void *qkv, *out, *up, *down;  // [rows, columns] in the storage type
    const float *norm1, *norm1_bias, *qkv_bias, *out_bias;
    const float *norm2, *norm2_bias, *up_bias, *down_bias;
    float scale;
};
struct Model {
    int64_t n_layer, n_head, n_kv_head, head_dim, d_model, d_ff, vocab_size, n_positions;
    int64_t rotary_dim, n_slots, capacity, gated, activation, norm;
    float norm_eps;
    const Layer* layers;
    const void *embedding, *position;             // position null: rotary or none
    const void* prompt_table;                     // rows for ids from vocab_size on, or null
    const float *final_norm, *final_norm_bias, *frequencies;  // [rotary_dim / 2]
    void *keys, *values;  // [n_layer, n_slots, n_kv_head, capacity, head_dim]
    Head head;
};
struct Tokens {
    int64_t n, n_out;
    const int64_t *ids, *slots, *positions;  // [n], a row's tokens in order
    const int64_t* out;                      // [n_out]: which tokens' logits are wanted
};
}

namespace {

// Scratch of one step, all float32. `normed` has one copy a thread: each norms for itself, which is
// cheaper than a barrier; so has `scores`.
struct Scratch {
    float *x, *qkv, *mixed, *hidden, *turns, *normed, *scores;
    static long floats(const Model& m, long n, long threads) {
        const long heads = (m.n_head + 2 * m.n_kv_head) * m.head_dim;
        return n * (m.d_model + heads + m.n_head * m.head_dim + m.d_ff + m.rotary_dim) +
               threads * (n * m.d_model + m.capacity);
    }
    Scratch(const Model& m, float* at, long n, long threads) {
        x = at;
        qkv = x + n * m.d_model;
        mixed = qkv + n * (m.n_head + 2 * m.n_kv_head) * m.head_dim;
        hidden = mixed + n * m.n_head * m.head_dim;
        turns = hidden + n * m.d_ff;
        normed = turns + n * m.rotary_dim;
        scores = normed + threads * n * m.d_model;
    }
};

void normalise(const Model& m, const float* x, const float* w, const float* b, float* out) {
    const long d = m.d_model;
    double sum = 0, square = 0;
    if (m.norm != RMSNORM)
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < d; i++) sum += x[i];
    const float mean = static_cast<float>(sum / d);
#pragma omp simd reduction(+ : square)
    for (long i = 0; i < d; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = static_cast<float>(1 / sqrt(square / d + m.norm_eps));
    for (long i = 0; i < d; i++) out[i] = (x[i] - mean) * scale * w[i] + (b ? b[i] : 0);
}

template <typename W>
void embed(const Model& m, int64_t id, int64_t position, float* x) {
    const bool virtual_token = id >= m.vocab_size;
    const W* row = static_cast<const W*>(virtual_token ? m.prompt_table : m.embedding) +
                   (id - (virtual_token ? m.vocab_size : 0)) * m.d_model;
    const W* at = m.position ? static_cast<const W*>(m.position) +
                                   std::min(position, m.n_positions - 1) * m.d_model
                             : nullptr;
    for (long i = 0; i < m.d_model; i++) x[i] = value(row[i]) + (at ? value(at[i]) : 0);
}

// Cosines, then sines, of a position's angles.
void turn(const Model& m, int64_t position, float* turns) {
    const long half = m.rotary_dim / 2;
    for (long i = 0; i < half; i++) {
        const float angle = static_cast<float>(position) * m.frequencies[i];
        turns[i] = cosf(angle);
        turns[half + i] = sinf(angle);
    }
}

// Rotates the leading elements of one head, element i with element i + half.
void rotate(const Model& m, const float* turns, float* head) {
    const long half = m.rotary_dim / 2;
    for (long i = 0; i < half; i++) {
        const float first = head[i], second = head[i + half];
        head[i] = first * turns[i] - second * turns[half + i];
        head[i + half] = second * turns[i] + first * turns[half + i];
    }
}

template <typename W>
W* cache_row(const Model& m, void* cache, long layer, int64_t slot, long head) {
    return static_cast<W*>(cache) +
           ((layer * m.n_slots + slot) * m.n_kv_head + head) * m.capacity * m.head_dim;
}

// Rotates queries and keys in place and puts keys and values in the cache.
template <typename W>
void keep(const Worker& me, const Model& m, const Tokens& step, long layer, const Scratch& s) {
    const long heads = m.n_head + 2 * m.n_kv_head, d = m.head_dim;
    me.share(step.n * heads, heads, [&](long first, long end) {
        for (long i = first; i < end; i++) {
            const long t = i / heads, h = i % heads, kv = h - m.n_head;
            float* head = s.qkv + i * d;
            if (h < m.n_head + m.n_kv_head) rotate(m, s.turns + t * m.rotary_dim, head);
            if (kv < 0) continue;
            void* cache = kv < m.n_kv_head ? m.keys : m.values;
            W* to = cache_row<W>(m, cache, layer, step.slots[t], kv % m.n_kv_head);
            for (long j = 0; j < d; j++) store(to + step.positions[t] * d + j, head[j]);
        }
    });
}

// mixed[token, head] = softmax(scale q k^T) v over the token's row up to itself.
template <typename W>
void attend(const Worker& me, const Model& m, const Tokens& step, long layer, const Scratch& s) {
    const long d = m.head_dim, heads = m.n_head + 2 * m.n_kv_head;
    float* scores = s.scores + me.id * m.capacity;
    me.share(step.n * m.n_head, 1, [&](long i, long) {
        const long t = i / m.n_head, h = i % m.n_head, kv = h / (m.n_head / m.n_kv_head);
        const long reach = step.positions[t] + 1;
        const W* keys = cache_row<W>(m, m.keys, layer, step.slots[t], kv);
        const W* values = cache_row<W>(m, m.values, layer, step.slots[t], kv);
        rows_by_tokens(keys, reach, d, s.qkv + (t * heads + h) * d, 1, [&](long p, long, float v) {
            scores[p] = v * m.layers[layer].scale;
        });
        const float highest = *std::max_element(scores, scores + reach);
        float sum = 0;
        for (long p = 0; p < reach; p++) sum += scores[p] = expf(scores[p] - highest);
        float* mixed = s.mixed + i * d;
        mix(scores, values, reach, d, mixed);
        for (long j = 0; j < d; j++) mixed[j] /= sum;
    });
}

// Runs all layers; returns this thread's copy of the final norm of the wanted tokens.
template <typename W>
const float* forward(const Worker& me, const Model& m, const Tokens& step, const Scratch& s) {
    const long d = m.d_model, n = step.n, heads = (m.n_head + 2 * m.n_kv_head) * m.head_dim;
    const long f = m.d_ff;
    float* normed = s.normed + me.id * n * d;
    me.share(n, 1, [&](long t, long) {
        embed<W>(m, step.ids[t], step.positions[t], s.x + t * d);
        turn(m, step.positions[t], s.turns + t * m.rotary_dim);
    });
    auto norm = [&](const float* w, const float* b) {
        for (long t = 0; t < n; t++) normalise(m, s.x + t * d, w, b, normed + t * d);
    };
    auto add_to_x = [&](const float* bias) {
        return [&s, bias, d](long r, long t, float v) {
            s.x[t * d + r] += v + (bias ? bias[r] : 0);
        };
    };
    for (long i = 0; i < m.n_layer; i++) {
        const Layer& l = m.layers[i];
        norm(l.norm1, l.norm1_bias);
        me.multiply((const W*)l.qkv, heads, d, normed, n, [&](long r, long t, float v) {
            s.qkv[t * heads + r] = v + (l.qkv_bias ? l.qkv_bias[r] : 0);
        });
        keep<W>(me, m, step, i, s);
        attend<W>(me, m, step, i, s);
        me.multiply((const W*)l.out, d, m.n_head * m.head_dim, s.mixed, n, add_to_x(l.out_bias));
        norm(l.norm2, l.norm2_bias);
        me.multiply((const W*)l.up, f, d, normed, n, [&](long r, long t, float v) {
            s.hidden[t * f + r] = activate(m.activation, v + (l.up_bias ? l.up_bias[r] : 0));
        });
        if (m.gated)
            me.multiply((const W*)l.up + f * d, f, d, normed, n, [&](long r, long t, float v) {
                s.hidden[t * f + r] *= v + (l.up_bias ? l.up_bias[f + r] : 0);
            });
        me.multiply((const W*)l.down, d, f, s.hidden, n, add_to_x(l.down_bias));
    }
    for (long t = 0; t < step.n_out; t++)
        normalise(m, s.x + step.out[t] * d, m.final_norm, m.final_norm_bias, normed + t * d);
    return normed;
}

template <typename W>
void step(const Model& m, const Tokens& tokens, float* scratch, float* logits, int threads) {
    const Scratch s(m, scratch, tokens.n, threads);
    Team team;
#pragma omp parallel num_threads(threads)
    {
        const Worker me(team);
        const float* x = forward<W>(me, m, tokens, s);
        me.multiply((const W*)m.head.weight, m.vocab_size, m.d_model, x, tokens.n_out,
                    [&](long r, long t, float v) { logits[t * m.vocab_size + r] = v; });
    }
}

// Feeds one token for each of n rows, then its greedy successors: out [n, n_new].
template <typename W>
void decode(const Model& m, const Tokens& tokens, int64_t* ids, int64_t* positions, long n_new,
            float* scratch, float* near, int64_t* out, int threads) {
    const Scratch s(m, scratch, tokens.n, threads);
    const long n = tokens.n;
    std::vector<Best> best(threads * n);
    Team team;
#pragma omp parallel num_threads(threads)
    {
        const Worker me(team);
        for (long i = 0; i < n_new; i++) {
            const float* x = forward<W>(me, m, tokens, s);
            choose<W>(me, m.head, x, n, near, best.data(), [&](long t, int64_t id) {
                out[t * n_new + i] = ids[t] = id;
                positions[t]++;
            });
        }
    }
}

// The likeliest ids of x [n, d_model] on threads of its own, which end with it: OpenMP's would go
// on spinning, on the cores that the caller's other library needs next. Where the system lends fewer
// threads than asked for, those share the work.
void choose_apart(const Head& head, const float* x, long n, float* near, int64_t* out,
                  int threads) {
    std::vector<Best> best(threads * n);
    Team team;
    std::atomic<bool> begun{false};
    auto work = [&](int id) {
        choose<float>(Worker(team, id), head, x, n, near, best.data(),
                      [&](long t, int64_t token) { out[t] = token; });
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int id = 1; id < threads; id++)
            others.emplace_back([&, id] {
                while (!begun.load(std::memory_order_acquire)) sched_yield();
                work(id);
            });
    } catch (const std::system_error&) {
    }
    team.size = (int)others.size() + 1;
    begun.store(true, std::memory_order_release);
    work(0);
    for (auto& other : others) other.join();
}

}  // namespace

// `kind`: 0 float32, 1 bfloat16, 2 float16. `scratch` holds porttool_scratch floats.
extern "C" {
int64_t porttool_scratch(const Model* m, int64_t n, int64_t threads) {
    return Scratch::floats(*m, n, threads);
}

// Logits [n_out, vocab_size] of the wanted tokens.
void porttool_step(const Model* m, const Tokens* t, int64_t kind, float* scratch, float* logits,
                   int64_t threads) {
    const auto run = kind == 0 ? step<float> : kind == 1 ? step<bf16> : step<fp16>;
    run(*m, *t, scratch, logits, threads);
}

// `ids` and `positions` are those of `t`, and are moved on: n_new tokens later they end there.
void porttool_decode(const Model* m, const Tokens* t, int64_t kind, int64_t* ids,
                     int64_t* positions, int64_t n_new, float* scratch, float* near, int64_t* out,
                     int64_t threads) {
    const auto run = kind == 0 ? decode<float> : kind == 1 ? decode<bf16> : decode<fp16>;
    run(*m, *t, ids, positions, n_new, scratch, near, out, threads);
}

// `x` is float32 [n, d_model], what the head gets; so is the head's weight.
void porttool_choose(const Head* head, const float* x, int64_t n, float* near, int64_t* out,
                     int64_t threads) {
    choose_apart(*head, x, n, near, out, threads);
}
}
