// Attention of several rows whose heads have keys of their own: who is done with a head draws the
// next. Multiprocessors do not get equal shares of the memory: dealt out evenly, GPT-2 XL's heads
// of 128 rows were all asked for after 108 us by the slowest program, after 73 by the fastest.
//
// One warp asks for keys and values, head after head, into a ring that is always full; another
// fetches queries one head ahead; those that compute take positions, 512 bytes of keys a warp's
// load, each lane with a softmax of its own positions; a last one joins what they found, while they
// are at the next head. So the memory never waits for a head to begin or end.
// Moves each key and value once. To a step it adds, a layer of GPT-2 XL: 109 MB at 32 rows in 26 us,
// 4.2 TB/s, 436 MB at 128 rows in 99 us, 4.4 TB/s, the memory's own speed.
//
// Behind machine.cuh, overlap.cuh and heads.cuh. Defined outside beside heads.cuh's: SLOT (positions
// of a slot of the ring), SLOTS, WARPS (that compute).

constexpr int BYTES = 2 * DIM;        // of a key
constexpr int LANES = DIM / 8;        // that hold a position's key, eight elements each
constexpr int EACH = 32 / LANES;      // positions of a warp's load
constexpr int STRIDE = WARPS * EACH;  // of all warps'
constexpr int AT_ONCE = SLOT / STRIDE < 4 ? SLOT / STRIDE : 4;  // positions of a lane
constexpr int QUEUE = 4;                                        // heads drawn ahead, at most

static_assert(KV == HEADS, "each head has keys of its own");
static_assert(DIM == 64 || DIM == 128 || DIM == 256, "lanes share a key evenly");
static_assert(SLOT % (AT_ONCE * STRIDE) == 0 && SLOTS >= 2, "all warps take a slot");

struct Arguments {
    Step step;
    u32* drawn;  // heads that were drawn: zero before and after
};

struct Shared {
    alignas(16) char ring[SLOTS][2][SLOT * BYTES];
    alignas(16) float query[2][DIM];
    alignas(16) u16 key[2][DIM], value[2][DIM];
    float sums[2][WARPS][DIM], tops[2][WARPS], totals[2][WARPS];  // of a head, by warps
    alignas(8) u64 full[SLOTS];
    u64 empty[SLOTS], drawn[QUEUE], noted[QUEUE], asked[2], answered[2], found[2], joined[2];
    int queue[QUEUE], head[2], stored[2], finished[2];  // heads: NOBODY behind the last
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than there is");

// The next head, or NOBODY. Of `heads` draws the last one puts the count back.
__device__ __forceinline__ int draw(const Arguments& a, int heads) {
    const int number = count_up(a.drawn);
    if (number == heads - 1) *a.drawn = 0;
    const int head = number + gridDim.x;
    return head < heads ? head : NOBODY;
}

// Keys and values of one head after the other, the first one without drawing it.
__device__ __forceinline__ void fill(const Arguments& a, Shared& s) {
    const int heads = a.step.rows * HEADS;
    int number = blockIdx.x < heads ? blockIdx.x : NOBODY, filled = 0;
    for (int n = 0;; ++n) {
        barrier_wait(shared_address(&s.noted[n % QUEUE]), (n / QUEUE & 1) ^ 1);
        s.queue[n % QUEUE] = number;
        barrier_arrive(shared_address(&s.drawn[n % QUEUE]), 1);
        if (number == NOBODY) break;
        const Place place(a.step, number);
        for (int t = 0; t < place.stored; t += SLOT, ++filled) {
            const int i = filled % SLOTS, bytes = min(SLOT, place.stored - t) * BYTES;
            const long long from = (place.first + t) * DIM;
            const u32 full = shared_address(&s.full[i]);
            barrier_wait(shared_address(&s.empty[i]), (filled / SLOTS & 1) ^ 1);
            barrier_expect(full, 2 * bytes);
            copy_once(shared_address(s.ring[i][0]), a.step.keys + from, bytes, full);
            copy_once(shared_address(s.ring[i][1]), a.step.values + from, bytes, full);
        }
        number = draw(a, heads);
    }
    let_next_start();
}

// Queries, times the scale of scores, and the step's own keys and values, which it stores.
__device__ __forceinline__ void ask(const Step& step, Shared& s, int lane) {
    for (int n = 0, number = 0; number != NOBODY; ++n) {
        const int i = n % 2;
        barrier_wait(shared_address(&s.drawn[n % QUEUE]), n / QUEUE & 1);
        number = s.queue[n % QUEUE];
        barrier_wait(shared_address(&s.answered[i]), (n / 2 & 1) ^ 1);
        if (number != NOBODY) {
            const Place place(step, number);
#pragma unroll
            for (int d = lane; d < DIM; d += 32) {
                own(step, place, d, s.key[i][d], s.value[i][d]);
                s.query[i][d] = widen_one(rotated(step, place, place.kv, d)) * step.scale;
            }
            if (lane == 0) s.stored[i] = place.stored;
        }
        if (lane == 0) s.head[i] = number;
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(shared_address(&s.noted[n % QUEUE]), 1);
            barrier_arrive(shared_address(&s.asked[i]), 1);
        }
    }
}

// A lane holds eight elements of every (32 / LANES)-th position, with a running softmax of its own
// positions (Milakov and Gimelshein 2018).
struct Running {
    float top = LOWEST, total = 0.0f, acc[8] = {};

    __device__ void rise(float to) {
        const float shrink = __expf(top - to);
        top = to, total *= shrink;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] *= shrink;
    }

    __device__ void take(float score, const float* value) {
        const float chance = __expf(score - top);
        total += chance;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] += chance * value[i];
    }

    // The lanes of the warp that hold the same elements.
    __device__ void join() {
        float above = top;
#pragma unroll
        for (int step = 16; step >= LANES; step /= 2)
            above = fmaxf(above, __shfl_xor_sync(~0u, above, step));
        rise(above);
#pragma unroll
        for (int step = 16; step >= LANES; step /= 2) {
            total += __shfl_xor_sync(~0u, total, step);
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[i] += __shfl_xor_sync(~0u, acc[i], step);
        }
    }
};

// Scores of N positions whose keys the lanes hold; every lane of a position gets its score.
template <int N>
__device__ __forceinline__ void compare(float (&score)[N], const float (&query)[8],
                                        const uint4 (&keys)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float key[8];
        widen8(keys[i], key);
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; e += 2) even += query[e] * key[e], odd += query[e + 1] * key[e + 1];
        score[i] = even + odd;
    }
#pragma unroll
    for (int step = LANES / 2; step; step /= 2)
#pragma unroll
        for (int i = 0; i < N; ++i) score[i] += __shfl_xor_sync(~0u, score[i], step);
}

// Positions first, first + STRIDE, ... of a slot, of which the first `live` are there. All loads
// come first: what is done with them would wait for each.
__device__ __forceinline__ void take_some(Running& run, const float (&query)[8], const char* slot,
                                          int first, int live) {
    uint4 keys[AT_ONCE], values[AT_ONCE];
    float score[AT_ONCE], value[8], above = run.top;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
        const char* from = slot + (first + i * STRIDE) * BYTES;
        keys[i] = *reinterpret_cast<const uint4*>(from);
        values[i] = *reinterpret_cast<const uint4*>(from + SLOT * BYTES);
    }
    compare(score, query, keys);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
        if (first + i * STRIDE < live) above = fmaxf(above, score[i]);
    run.rise(above);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
        if (first + i * STRIDE >= live) break;
        widen8(values[i], value);
        run.take(score[i], value);
    }
}

__device__ __forceinline__ void attend(Shared& s, int warp, int lane) {
    const int at = lane % LANES * 8, first = warp * EACH + lane / LANES;
    for (int n = 0, taken = 0, number = 0; number != NOBODY; ++n) {
        const int which = n % 2;
        Running run;
        barrier_wait(shared_address(&s.asked[which]), n / 2 & 1);
        number = s.head[which];
        if (number != NOBODY) {
            const int stored = s.stored[which];
            float query[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) query[i] = s.query[which][at + i];
            for (int t = 0; t < stored; t += SLOT, ++taken) {
                const int i = taken % SLOTS;
                const char* slot = s.ring[i][0] + at * 2;
                barrier_wait(shared_address(&s.full[i]), taken / SLOTS & 1);
#pragma unroll 1
                for (int k = 0; k < SLOT; k += AT_ONCE * STRIDE)
                    take_some(run, query, slot + k * BYTES, first, stored - t - k);
                __syncwarp();
                if (lane == 0) barrier_arrive(shared_address(&s.empty[i]), 1);
            }
            if (warp == 0) {  // the step's own position
                const uint4 own[1] = {*reinterpret_cast<const uint4*>(s.key[which] + at)};
                float score[1], value[8];
                compare(score, query, own);
                widen8(*reinterpret_cast<const uint4*>(s.value[which] + at), value);
                if (lane < LANES) run.rise(fmaxf(run.top, score[0])), run.take(score[0], value);
            }
            run.join();
        }
        barrier_wait(shared_address(&s.joined[which]), (n / 2 & 1) ^ 1);
        if (lane < LANES)
#pragma unroll
            for (int i = 0; i < 8; ++i) s.sums[which][warp][at + i] = run.acc[i];
        if (lane == 0) {
            s.tops[which][warp] = run.top, s.totals[which][warp] = run.total;
            if (warp == 0) s.finished[which] = number;
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(shared_address(&s.answered[which]), 1);
            barrier_arrive(shared_address(&s.found[which]), 1);
        }
    }
}

// The softmax of all warps' positions; a lane has pairs of elements.
__device__ __forceinline__ void join(u16* all, Shared& s, int lane) {
    for (int n = 0;; ++n) {
        const int which = n % 2;
        barrier_wait(shared_address(&s.found[which]), n / 2 & 1);
        const int number = s.finished[which];
        if (number == NOBODY) return;
        float top = LOWEST, total = 0.0f, share[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.tops[which][w]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            share[w] = __expf(s.tops[which][w] - top);
            total += s.totals[which][w] * share[w];
        }
        const float scale = 1.0f / total;
        u32* out = reinterpret_cast<u32*>(all + static_cast<long long>(number) * DIM);
#pragma unroll
        for (int d = lane; d < DIM / 2; d += 32) {
            float2 sum = {0.0f, 0.0f};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float2 part = reinterpret_cast<const float2*>(s.sums[which][w])[d];
                sum.x += part.x * share[w], sum.y += part.y * share[w];
            }
            out[d] = narrow(sum.x * scale) | u32(narrow(sum.y * scale)) << 16;
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&s.joined[which]), 1);
    }
}

// Grid: as many programs as the GPU holds.
extern "C" __global__ void __launch_bounds__(WARPS * 32 + 96)
    balanced_attention(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(shared_address(&s.full[i]), 1);
            barrier_init(shared_address(&s.empty[i]), WARPS);
        }
        for (int i = 0; i < QUEUE; ++i) {
            barrier_init(shared_address(&s.drawn[i]), 1);
            barrier_init(shared_address(&s.noted[i]), 1);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared_address(&s.asked[i]), 1);
            barrier_init(shared_address(&s.answered[i]), WARPS);
            barrier_init(shared_address(&s.found[i]), WARPS);
            barrier_init(shared_address(&s.joined[i]), 1);
        }
        fence_barriers();
    }
    __syncthreads();
    if (warp == WARPS) {
        if (lane == 0) fill(a, s);
        return;
    }
    await_last();
    if (warp == WARPS + 1)
        ask(a.step, s, lane);
    else if (warp == WARPS + 2)
        join(a.step.out, s, lane);
    else
        attend(s, warp, lane);
}
