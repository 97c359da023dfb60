// The likeliest token without reading all of the head.
#pragma once

#include "team.h"

#include <vector>

// Mirrored in head.py.
extern "C" struct Head {
    int64_t vocab_size, d_model;
    const void* weight;          // [vocab_size, d_model] in the storage type
    const int8_t* coarse;        // the same, each row rounded to int8
    const float *scale, *error;  // [vocab_size]
};

namespace {

struct alignas(64) Best {  // one a thread and row, each on a cache line of its own
    float norm = 0, floor = -INFINITY, logit = -INFINITY;
    int64_t id = 0;
    void offer(float v, int64_t i) {  // the lowest id among equals
        if (v > logit || (v == logit && i < id)) logit = v, id = i;
    }
};

// Calls use(t, id) with the likeliest id of each x [n, d_model], without reading all of the head:
// an int8 copy of it is read first. |w . x - coarse . x| <= error |x| holds for every row
// (Cauchy-Schwarz), so only rows whose upper bound reaches the highest lower bound can win, and
// those are computed from the weights themselves. `near` is [n, vocab_size], `best` [threads, n].
template <typename W, typename Use>
void choose(const Worker& me, const Head& head, const float* x, long n, float* near, Best* best,
            Use use) {
    const long d = head.d_model, v = head.vocab_size;
    Best* mine = best + me.id * n;
    for (long t = 0; t < n; t++) {
        float square[1][1];
        dots<1, 1>(x + t * d, d, x + t * d, d, square);
        mine[t] = Best();
        mine[t].norm = sqrtf(square[0][0]) * 1.0001f;
    }
    me.multiply(head.coarse, v, d, x, n, [&](long r, long t, float product) {
        near[t * v + r] = product * head.scale[r];
        mine[t].floor = std::max(mine[t].floor, near[t * v + r] - head.error[r] * mine[t].norm);
    });
    for (long t = 0; t < n; t++) {
        float floor = -INFINITY;
        for (int i = 0; i < me.team.size; i++) floor = std::max(floor, best[i * n + t].floor);
        me.share(v, 4096, [&](long first, long end) {
            for (long r = first; r < end; r++) {
                if (near[t * v + r] + head.error[r] * mine[t].norm < floor) continue;
                float logit[1][1];
                dots<1, 1>((const W*)head.weight + r * d, d, x + t * d, d, logit);
                mine[t].offer(logit[0][0], r);
            }
        });
    }
    me.share(n, 1, [&](long t, long) {
        Best winner;
        for (int i = 0; i < me.team.size; i++) {
            const Best& b = best[i * n + t];
            winner.offer(b.logit, b.id);
        }
        use(t, winner.id);
    });
}

}  // namespace
