// Threads that share the work of one step.
#pragma once

#include "vectors.h"

#include <omp.h>
#include <sched.h>

#include <atomic>

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
    Worker(Team& t, int i) : team(t), id(i) {}
    explicit Worker(Team& t) : Worker(t, omp_get_thread_num()) {
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

}  // namespace
