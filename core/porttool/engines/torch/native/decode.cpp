// One decode step of the canonical decoder on a CPU: a few tokens, all layers, one parallel region.
//
// The weights are the checkpoint's own row-major [out, in] matrices, so torch runs prefill from the
// same memory. A step of one token is bound by reading them. All arithmetic is float32 whatever the
// storage type is, and every dot product is summed in the same order for every batch: a row's
// result does not depend on its neighbours.

#include "vectors.h"

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <vector>

namespace {

constexpr int CHUNK = 64;      // weight rows a thread takes at a time
constexpr int SPINS = 1000;    // pauses before a waiting thread yields its core: some 50 us

// The threads of one step. OpenMP lends its threads (torch's own: two pools would fight over the
// cores); sharing and waiting are done here, because a decode step waits some seventy times and
// must not lose a time slice each time when the machine is busy.
struct Team {
    int size = 0;
    alignas(64) std::atomic<int> arrived{0}, phase{0};
    alignas(64) std::atomic<long> next{0};
};

struct Worker {
    Team& team;
    const int id;
    explicit Worker(Team& t) : team(t), id(omp_get_thread_num()) {
#pragma omp single
        team.size = omp_get_num_threads();
    }

    void wait() const {
        const int phase = team.phase.load(std::memory_order_acquire);
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) == team.size - 1) {
            team.arrived.store(0, std::memory_order_relaxed);
            team.next.store(0, std::memory_order_relaxed);
            team.phase.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; team.phase.load(std::memory_order_acquire) == phase; spins++)
            spins < SPINS ? _mm_pause() : (void)sched_yield();
    }
    // Calls run(first, end) for parts of n things until all threads together have done them all.
    template <typename Run>
    void share(long n, long part, Run run) const {
        for (long first; (first = team.next.fetch_add(part, std::memory_order_relaxed)) < n;)
            run(first, std::min(n, first + part));
        wait();
    }
    // rows_by_tokens, shared.
    template <typename W, typename Use>
    void multiply(const W* w, long n_rows, long k, const float* x, long n, Use use) const {
        const long part = n_rows / (8 * team.size) / ROWS * ROWS;
        share(n_rows, std::clamp<long>(part, ROWS, CHUNK), [&](long first, long end) {
            rows_by_tokens(w + first * k, end - first, k, x, n,
                           [&](long r, long t, float v) { use(first + r, t, v); });
        });
    }
};

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

// Everything below is mirrored in cpu_native.py. Vectors are float32; a missing bias is null.
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
    const void *embedding, *position, *head;      // position null: rotary or none
    const void* prompt_table;                     // rows for ids from vocab_size on, or null
    const float *final_norm, *final_norm_bias, *frequencies;  // [rotary_dim / 2]
    void *keys, *values;  // [n_layer, n_slots, n_kv_head, capacity, head_dim]
    const int8_t* coarse;                         // the head, each row rounded to int8
    const float *coarse_scale, *coarse_error;     // [vocab_size]
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

struct alignas(64) Best {  // one a thread and row, each on a cache line of its own
    float norm = 0, floor = -INFINITY, logit = -INFINITY;
    int64_t id = 0;
    void offer(float v, int64_t i) {  // the lowest id among equals
        if (v > logit || (v == logit && i < id)) logit = v, id = i;
    }
};

// Each thread's candidates for the highest logits of x [n, d_model], without reading all of the
// head: an int8 copy of it is read first. |w . x - coarse . x| <= error |x| holds for every row
// (Cauchy-Schwarz), so only rows whose upper bound reaches the highest lower bound can win, and
// those are computed from the weights themselves. `near` is [n, vocab_size].
template <typename W>
void choose(const Worker& me, const Model& m, const float* x, long n, float* near, Best* best) {
    const long d = m.d_model, v = m.vocab_size;
    Best* mine = best + me.id * n;
    for (long t = 0; t < n; t++) {
        float square[1][1];
        dots<1, 1>(x + t * d, d, x + t * d, d, square);
        mine[t] = Best();
        mine[t].norm = sqrtf(square[0][0]) * 1.0001f;
    }
    me.multiply(m.coarse, v, d, x, n, [&](long r, long t, float product) {
        near[t * v + r] = product * m.coarse_scale[r];
        mine[t].floor = std::max(mine[t].floor, near[t * v + r] - m.coarse_error[r] * mine[t].norm);
    });
    for (long t = 0; t < n; t++) {
        float floor = -INFINITY;
        for (int i = 0; i < me.team.size; i++) floor = std::max(floor, best[i * n + t].floor);
        me.share(v, 4096, [&](long first, long end) {
            for (long r = first; r < end; r++) {
                if (near[t * v + r] + m.coarse_error[r] * mine[t].norm < floor) continue;
                float logit[1][1];
                dots<1, 1>((const W*)m.head + r * d, d, x + t * d, d, logit);
                mine[t].offer(logit[0][0], r);
            }
        });
    }
}

template <typename W>
void step(const Model& m, const Tokens& tokens, float* scratch, float* logits, int threads) {
    const Scratch s(m, scratch, tokens.n, threads);
    Team team;
#pragma omp parallel num_threads(threads)
    {
        const Worker me(team);
        const float* x = forward<W>(me, m, tokens, s);
        me.multiply((const W*)m.head, m.vocab_size, m.d_model, x, tokens.n_out,
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
            choose<W>(me, m, forward<W>(me, m, tokens, s), n, near, best.data());
            me.share(n, 1, [&](long t, long) {
                Best winner;
                for (int j = 0; j < team.size; j++) {
                    const Best& b = best[j * n + t];
                    winner.offer(b.logit, b.id);
                }
                out[t * n_new + i] = ids[t] = winner.id;
                positions[t]++;
            });
        }
    }
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
}
