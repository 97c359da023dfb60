// Attention of several rows whose heads share keys: a cluster for each row and head of keys.
//
// Each of its SPLIT programs takes a part of the context: the heads of the group are the rows of
// products on the tensor cores. All warps share a slot of keys, each its positions, exchange the
// highest scores, and share the slot's values, each its elements; so nothing of the sums is held
// twice. Then the programs send each other what they found, and each finishes a share of the heads.
// Keys and values are asked for before the predecessor ends. The step's own are not in the cache
// yet: they take their place in the slot where its position is.
// Moves each key and value once: SantaCoder's 9 MB at 32 rows take 5.1 us from the query's arrival
// to the last program's end, 1.8 TB/s; what they take are the ways from the query to all sums.
//
// Behind machine.cuh, overlap.cuh, cluster.cuh and heads.cuh. Defined outside beside heads.cuh's:
// SPLIT, SLOT (positions that are taken together), RING (copies of 16 positions that it holds),
// WIDE (warps for 16 heads).

constexpr int GROUP = HEADS / KV;                     // heads that share their keys
constexpr int TALL = (GROUP + 15) / 16;               // tiles of heads
constexpr int WARPS = TALL * WIDE;                    // that compute; one more fills the ring
constexpr int GRAIN = 16;                             // positions of a copy
constexpr int HALVES = DIM / 64;                      // of a key: 128 bytes, swizzled together
constexpr int BYTES = GRAIN * DIM * 2;                // of a copy
constexpr int QUERY = DIM * 2 + 16;                   // bytes of a query: no bank is met twice
constexpr int SCORED = (SLOT / 8 + WIDE - 1) / WIDE;  // tiles of a slot's positions, a warp
constexpr int CHANCES = SCORED * WIDE * 16 + 16;      // bytes of a head's, the same
constexpr int HELD = DIM / WIDE / 8;                  // tiles of the elements, a warp
constexpr int SHARE = (GROUP + SPLIT - 1) / SPLIT;    // heads that a program finishes
constexpr int FOUND = DIM + 4;    // of a head: sums, highest score, weight, two unused
constexpr int TWICE = 113 << 10;  // bytes of shared memory: two programs fit a multiprocessor

static_assert(DIM % 64 == 0 && HELD * WIDE * 8 == DIM && HELD % 2 == 0, "warps share evenly");
static_assert(SLOT % GRAIN == 0, "a slot is made of copies");
static_assert(SPLIT >= 1 && SPLIT <= 8, "a cluster has up to eight programs");
static_assert(RING >= SLOT / GRAIN, "a slot is taken as a whole");
static_assert(SLOT / GRAIN <= 32, "a lane gives back each copy of a slot");

struct Arguments {
    TensorMap keys, values;  // boxes of GRAIN positions
    Step step;
};

struct Shared {
    union {
        struct {
            alignas(1024) char keys[RING][BYTES];
            char values[RING][BYTES];
        };
        float sums[SPLIT][SHARE][FOUND];  // by the programs that finish them
    };
    alignas(16) float heard[most(SPLIT - 1, 1)][SHARE][FOUND];  // from others
    alignas(16) char query[TALL * 16][QUERY], chances[TALL * 16][CHANCES];
    alignas(16) u16 key[DIM], value[DIM];  // the step's own
    float tops[TALL][WIDE][16], totals[TALL][WIDE][16];
    alignas(8) u64 full[RING];
    u64 empty[RING], all_heard;
};
static_assert(sizeof(Shared) + 1024 <= SHARED, "more shared memory than there is");

// A program's part of a context; the last one that has any has the step's own position.
struct Part : Place {
    int rank, low, high;
    bool last;

    __device__ explicit Part(const Step& step)
        : Place(step, blockIdx.x / SPLIT), rank(blockIdx.x % SPLIT) {
        const int context = stored + 1, grains = (context + GRAIN - 1) / GRAIN;
        const int each = (grains + SPLIT - 1) / SPLIT * GRAIN;
        low = min(each * rank, context), high = min(each * (rank + 1), context);
        last = low < high && high == context;
    }
};

__device__ __forceinline__ void together() { meet<1, WARPS * 32>(); }

__device__ __forceinline__ void fill(const Arguments& a, Shared& s, const Part& part) {
    int copies = 0;
    for (int t = part.low; t < part.high; t += GRAIN, ++copies) {
        const int i = copies % RING, row = part.first + t;
        const u32 full = shared_address(&s.full[i]);
        barrier_wait(shared_address(&s.empty[i]), (copies / RING & 1) ^ 1);
        barrier_expect(full, 2 * BYTES);
        copy_chunks(shared_address(s.keys[i]), a.keys, row, 0, full);
        copy_chunks(shared_address(s.values[i]), a.values, row, 0, full);
    }
    let_next_start();
}

// 16 bytes of a copy: row `row`, its unit-th eight elements.
__device__ __forceinline__ u32 unit_of(const char* copy, int row, int unit) {
    return shared_address(copy) + unit / 8 * (GRAIN * 128) + row * 128 +
           ((unit % 8) ^ (row % 8)) * 16;
}

// Eight elements of the group's queries, in a row; zeros behind them.
__device__ __forceinline__ uint4 query_unit(const Step& step, const Part& part, int unit) {
    const int h = unit / (DIM / 8), d = unit % (DIM / 8) * 8, head = part.kv * GROUP + h;
    if (h >= GROUP) return {0, 0, 0, 0};
    if (PARTS == 1 && ROTARY == 0) {
        const u16* from = static_cast<const u16*>(step.qkv);
        return *reinterpret_cast<const uint4*>(from + static_cast<long long>(part.row) * QKV +
                                               head * DIM + d);
    }
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pairs[i] = rotated(step, part, head, d + 2 * i) |
                   u32(rotated(step, part, head, d + 2 * i + 1)) << 16;
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// All queries of the group; where the step's own position is this program's, its key and its value.
// Everything is asked for before anything is used.
__device__ __forceinline__ void read_step(const Step& step, Shared& s, const Part& part) {
    constexpr int UNITS = TALL * 16 * DIM / 8, EACH = (UNITS + WARPS * 32 - 1) / (WARPS * 32);
    uint4 query[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int unit = i * WARPS * 32 + threadIdx.x;
        if (unit < UNITS) query[i] = query_unit(step, part, unit);
    }
    if (part.last)
        for (int d = threadIdx.x; d < DIM; d += WARPS * 32)
            own(step, part, d, s.key[d], s.value[d]);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int unit = i * WARPS * 32 + threadIdx.x;
        if (unit < UNITS)
            store16(shared_address(s.query[unit / (DIM / 8)]) + unit % (DIM / 8) * 16, query[i]);
    }
    together();
}

// What a warp has of 16 heads: lane l holds rows l / 4 and l / 4 + 8.
struct Running {
    float top[2] = {LOWEST, LOWEST}, total[2] = {}, sum[HELD][4] = {};

    __device__ static int element(int w, int j, int i, int lane) {
        return (w * HELD + j) * 8 + lane % 4 * 2 + i % 2;
    }

    __device__ void rise(int i, float to) {
        const float shrink = __expf(top[i] - to);
        top[i] = to, total[i] *= shrink;
#pragma unroll
        for (int j = 0; j < HELD; ++j) sum[j][2 * i] *= shrink, sum[j][2 * i + 1] *= shrink;
    }
};

// Scores of this warp's positions of the n-th slot, of which `live` are there.
__device__ __forceinline__ void score(float (&scores)[SCORED][4], const Shared& s, int n, int tile,
                                      int w, int lane, int live, float scale) {
    u32 keys[SCORED];
#pragma unroll
    for (int j = 0; j < SCORED; ++j) {
        const int first = (j * WIDE + w) * 8;
        keys[j] = shared_address(s.keys[(n * (SLOT / GRAIN) + first / GRAIN) % RING]) +
                  (first % GRAIN + lane % 8) * 128;
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[j][i] = 0.0f;
    }
    const u32 query = shared_address(s.query[tile * 16 + lane % 16]) + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < DIM / 32; ++k) {
        const uint4 a = load_matrices(query + k * 64), b = load_matrices(query + k * 64 + 32);
        const int unit = k * 4 + lane / 8;
        const u32 place = unit / 8 * (GRAIN * 128) + ((unit % 8) ^ (lane % 8)) * 16;
#pragma unroll
        for (int j = 0; j < SCORED; ++j) {
            if ((j * WIDE + w) * 8 >= live) break;
            const uint4 key = load_matrices(keys[j] + place);
            multiply_add(scores[j], a, {key.x, key.y});
            multiply_add(scores[j], b, {key.z, key.w});
        }
    }
#pragma unroll
    for (int j = 0; j < SCORED; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool there = (j * WIDE + w) * 8 + lane % 4 * 2 + i % 2 < live;
            scores[j][i] = there ? scores[j][i] * scale : LOWEST;
        }
}

// The highest score of all warps' positions, of both of a lane's heads.
__device__ __forceinline__ void highest(const float (&scores)[SCORED][4], float (&tops)[WIDE][16],
                                        float (&above)[2], int w, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = LOWEST;
#pragma unroll
        for (int j = 0; j < SCORED; ++j)
            top = fmaxf(top, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        if (lane % 4 == 0) tops[w][lane / 4 + 8 * i] = top;
    }
    together();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int v = 0; v < WIDE; ++v) above[i] = fmaxf(above[i], tops[v][lane / 4 + 8 * i]);
}

// Nothing of what lies behind the first `live` positions of a copy: it may be NaN, which no weight
// of zero takes away.
__device__ __forceinline__ void clear_rest(char* values, int live) {
    for (int i = threadIdx.x; i < (GRAIN - live) * DIM / 8; i += WARPS * 32)
        store16(unit_of(values, live + i / (DIM / 8), i % (DIM / 8)), {0, 0, 0, 0});
}

// The step's own key and value where the cache does not have them yet.
__device__ __forceinline__ void place_own(Shared& s, int copy, int row) {
    for (int i = threadIdx.x; i < DIM / 4; i += WARPS * 32) {
        const int unit = i % (DIM / 8);
        const bool first = i < DIM / 8;
        store16(unit_of(first ? s.keys[copy] : s.values[copy], row, unit),
                reinterpret_cast<const uint4*>(first ? s.key : s.value)[unit]);
    }
    together();
}

__device__ __forceinline__ void take_slot(Running& run, Shared& s, int n, int tile, int w, int lane,
                                          int live, float scale) {
    const int copy = n * (SLOT / GRAIN);
    float scores[SCORED][4], above[2] = {run.top[0], run.top[1]};
    score(scores, s, n, tile, w, lane, live, scale);
    highest(scores, s.tops[tile], above, w, lane);
    run.rise(0, above[0]), run.rise(1, above[1]);
#pragma unroll
    for (int j = 0; j < SCORED; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float a = __expf(scores[j][2 * i] - above[i]);
            const float b = __expf(scores[j][2 * i + 1] - above[i]);
            char* to = s.chances[tile * 16 + lane / 4 + 8 * i];
            run.total[i] += a + b;
            reinterpret_cast<u32*>(to)[(j * WIDE + w) * 4 + lane % 4] = narrow(a, b);
        }
    if (live % GRAIN) clear_rest(s.values[(copy + live / GRAIN) % RING], live % GRAIN);
    together();
    for (int g = 0; g * GRAIN < live; ++g) {
        const uint4 chances = load_matrices(shared_address(s.chances[tile * 16 + lane % 16]) +
                                            (g * 2 + lane / 16) * 16);
#pragma unroll
        for (int j = 0; j < HELD; j += 2) {
            const uint4 value = load_matrices_turned(
                unit_of(s.values[(copy + g) % RING], lane % 16, w * HELD + j + lane / 16));
            multiply_add(run.sum[j], chances, {value.x, value.y});
            multiply_add(run.sum[j + 1], chances, {value.z, value.w});
        }
    }
}

__device__ __forceinline__ Running attend(const Step& step, Shared& s, const Part& part, int warp,
                                          int lane) {
    const int tile = warp / WIDE, w = warp % WIDE;
    Running run;
    for (int n = 0, t = part.low; t < part.high; ++n, t += SLOT) {
        const int copy = n * (SLOT / GRAIN), live = min(part.high - t, SLOT);
        const int end = copy + (live + GRAIN - 1) / GRAIN;
        for (int i = copy; i < end; ++i)
            barrier_wait(shared_address(&s.full[i % RING]), i / RING & 1);
        if (part.last && t + live == part.high) place_own(s, (end - 1) % RING, (live - 1) % GRAIN);
        take_slot(run, s, n, tile, w, lane, live, step.scale);
        __syncwarp();
        if (lane < end - copy) barrier_arrive(shared_address(&s.empty[(copy + lane) % RING]), 1);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float total = run.total[i];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (lane % 4 == 0) s.totals[tile][w][lane / 4 + 8 * i] = total;
    }
    together();  // nobody reads the ring any more
    return run;
}

// This warp's elements to shared memory, and what belongs to them.
__device__ __forceinline__ void leave(const Running& run, Shared& s, int warp, int lane) {
    const int tile = warp / WIDE, w = warp % WIDE;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i, head = tile * 16 + row;
        if (head >= GROUP) continue;
        float* to = s.sums[head / SHARE][head % SHARE];
#pragma unroll
        for (int j = 0; j < HELD; ++j)
            *reinterpret_cast<float2*>(to + Running::element(w, j, 0, lane)) = {
                run.sum[j][2 * i], run.sum[j][2 * i + 1]};
        if (w != 0 || lane % 4 != 0) continue;
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < WIDE; ++v) total += s.totals[tile][v][row];
        to[DIM] = run.top[i], to[DIM + 1] = total;
    }
}

// Give every other program of the cluster what it finishes.
__device__ __forceinline__ void tell_others(Shared& s, int rank, int lane) {
    if (lane == 0) barrier_expect(shared_address(&s.all_heard), (SPLIT - 1) * sizeof(s.heard[0]));
    if (lane < SPLIT && lane != rank)
        send(address_in(lane, shared_address(s.heard[rank - (rank > lane)])),
             shared_address(s.sums[lane]), sizeof(s.sums[0]),
             address_in(lane, shared_address(&s.all_heard)));
}

// This program's heads, joined from all parts: four elements a thread.
__device__ __forceinline__ void finish(const Step& step, const Shared& s, const Part& part) {
#pragma unroll 1
    for (int i = threadIdx.x; i < SHARE * DIM / 4; i += WARPS * 32) {
        const int j = i / (DIM / 4), d = i % (DIM / 4) * 4, head = part.rank * SHARE + j;
        if (head >= GROUP) break;
        const float* from[SPLIT];
        float top = LOWEST, total = 0.0f;
#pragma unroll
        for (int r = 0; r < SPLIT; ++r) {
            from[r] = r == part.rank ? s.sums[r][j] : s.heard[r - (r > part.rank)][j];
            top = fmaxf(top, from[r][DIM]);
        }
        float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < SPLIT; ++r) {
            const float weight = __expf(from[r][DIM] - top);
            const float4 sum = *reinterpret_cast<const float4*>(from[r] + d);
            total += from[r][DIM + 1] * weight;
            v.x += sum.x * weight, v.y += sum.y * weight;
            v.z += sum.z * weight, v.w += sum.w * weight;
        }
        const float scale = 1.0f / total;
        u16* out = step.out +
                   (static_cast<long long>(part.row) * HEADS + part.kv * GROUP + head) * DIM + d;
        *reinterpret_cast<uint2*>(out) = {narrow(v.x * scale, v.y * scale),
                                          narrow(v.z * scale, v.w * scale)};
    }
}

// Grid: SPLIT programs for each row and head of keys, a cluster.
extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, SHARED <= TWICE ? 2 : 1)
    cluster_attention(const __grid_constant__ Arguments a) {
    extern __shared__ char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Part part(a.step);
    if (threadIdx.x == WARPS * 32) {
        for (int i = 0; i < RING; ++i) {
            barrier_init(shared_address(&s.full[i]), 1);
            barrier_init(shared_address(&s.empty[i]), WARPS);
        }
        barrier_init(shared_address(&s.all_heard), 1);
        fence_barriers();
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();
    if (warp == WARPS) {
        if (lane == 0) fill(a, s, part);
        __syncwarp();
        if (SPLIT > 1) cluster_wait(), cluster_arrive();
    } else {
        await_last();
        read_step(a.step, s, part);
        const Running run = attend(a.step, s, part, warp, lane);
        leave(run, s, warp, lane);
        if (SPLIT > 1) fence_shared_copies();
        together();
        if (SPLIT > 1) {
            cluster_wait();
            if (warp == 0) tell_others(s, part.rank, lane);
            barrier_wait(shared_address(&s.all_heard), 0);
            cluster_arrive();
        }
        finish(a.step, s, part);
    }
    if (SPLIT > 1) cluster_wait();  // what others still read of this program's memory stays
}
