// Attention of several rows whose heads have keys of their own: who is done with a head draws the
// next. Multiprocessors do not get equal shares of the memory: dealt out evenly, GPT-2 XL's heads
// of 128 rows were all asked for after 108 us by the slowest program, after 73 by the fastest.
//
// One warp asks for keys and values, head after head, into a ring that is always full; another
// fetches queries one head ahead; those that compute take 16 positions at a time, each warp with a
// softmax of its own positions; a last one joins what they found, while they are at the next head.
// So the memory never waits for a head to begin or end. Products run on the tensor cores, though a
// single query fills an eighth of them: the ordinary ones take four times the instructions, and
// power, which is the limit at 128 rows.
//
// Moves each key and value once. To a step it adds, a layer of GPT-2 XL: 109 MB at 32 rows in 26
// us, 4.2 TB/s, 436 MB at 128 rows in 99 us, 4.4 TB/s, the memory's own speed. (Measured on the
// ordinary cores; whole steps have changed by 0.2 % since.)
//
// Behind machine.cuh, overlap.cuh and heads.cuh. Defined outside beside heads.cuh's: SLOT
// (positions of a slot of the ring), SLOTS, WARPS (that compute).

constexpr int BYTES = 2 * DIM;    // of a key
constexpr int CHUNKS = DIM / 32;  // of a key: 64 bytes, which four lanes load
constexpr int LINES = DIM / 64;   // of a value: 128 bytes, which eight lanes load
constexpr int BLOCK = 16;         // positions that a warp takes at once
constexpr int QUEUE = 4;          // heads drawn ahead, at most
constexpr int WHOLE = 226 << 10;  // shared memory of a multiprocessor: one program's, or two's

static_assert(KV == HEADS, "each head has keys of its own");
static_assert(DIM == 64 || DIM == 128 || DIM == 256, "lanes share a key evenly");
static_assert(SLOT % BLOCK == 0 && SLOTS >= 2, "warps take blocks of a slot");

struct Arguments {
    Step step;
    u32* drawn;  // heads that were drawn: zero before and after
};

struct Shared {
    alignas(16) char ring[SLOTS][2][SLOT * BYTES];
    alignas(16) u16 query[2][DIM], key[2][DIM], value[2][DIM];
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

// Queries, and the step's own keys and values, which it stores.
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
                s.query[i][d] = rotated(step, place, place.kv, d);
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

// Of a query, what meets a lane's 16 bytes of eight keys. Those count, as they lie, as a part of
// the tensor cores' first factor: words 0 and 2 as row r, 1 and 3 as row r + 8. So columns 0 and 1
// of the second factor have the query's words 0 and 2, and 1 and 3, and (r, 0) + (r + 8, 1) of the
// product is the score. Odd rows come by other chunks, in columns 2 and 3: two rows that eight
// lanes load together meet no bank twice.
struct Query {
    uint2 parts[CHUNKS];

    __device__ Query(const u16* query, int lane) {
        const int column = lane / 4 % 4;
        const u16* from = query + lane % 4 * 8 + column % 2 * 2;
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            const u16* at = from + (j ^ column / 2) * 32;
            parts[j] = {*reinterpret_cast<const u32*>(at), *reinterpret_cast<const u32*>(at + 4)};
        }
    }

    // Scores of eight positions: lane 4 r + r % 2 gets the r-th.
    __device__ float scores(const char* keys, int lane) const {
        const int row = lane / 4;
        const char* from = keys + row * BYTES + lane % 4 * UNIT;
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j)
            multiply_add(sum, *reinterpret_cast<const uint4*>(from + (j ^ row % 2) * 64), parts[j]);
        return sum[0] + sum[3];
    }
};

// The largest number of a warp. As integers floats are in order, those below zero the other way.
__device__ __forceinline__ float warp_most(float v) {
    const int bits = __float_as_uint(v);
    const int most = __reduce_max_sync(~0u, bits ^ (bits >> 31 & 0x7fffffff));
    return __uint_as_float(most ^ (most >> 31 & 0x7fffffff));
}

// A warp's running softmax (Milakov and Gimelshein 2018). Values come to the tensor cores as their
// first factor, transposed: lane 4 c + g loads 16 bytes of positions 2 g, 2 g + 1, and the same of
// the next eight, the (c + 2 g)-th unit of each line, so that no bank is met twice. Units of
// different lanes g must not be added: column g of the second factor has the chances of g's
// positions, and zeros. (Infinity in a value so makes the same word of other units NaN, too: such a
// row's logits are lost either way.)
struct Running {
    float top = LOWEST, total = 0.0f;  // the sum of this lane's chances
    float own = 0.0f;             // chance of the step's own position, which is not in the ring
    float acc[LINES][4][4] = {};  // of word i, its lower half in columns 2 g and 2 g + 1, then
                                  // its upper half

    __device__ void rise(float to) {
        const float shrink = __expf(top - to);
        top = to, total *= shrink, own *= shrink;
#pragma unroll
        for (int l = 0; l < LINES; ++l)
#pragma unroll
            for (int i = 0; i < 16; ++i) acc[l][i / 4][i % 4] *= shrink;
    }

    // A block of which the first `live` positions are there.
    __device__ void take(const Query& query, const char* keys, const char* values, int live,
                         float scale, int lane) {
        const int row = lane / 4, group = lane % 4, first = 2 * group;
        float low = query.scores(keys, lane) * scale;
        float high = query.scores(keys + 8 * BYTES, lane) * scale;
        const bool holds = group == row % 2;
        low = holds && row < live ? low : LOWEST;
        high = holds && row + 8 < live ? high : LOWEST;
        const float above = warp_most(fmaxf(low, high));
        if (above > top) rise(above);
        low = __expf(low - top), high = __expf(high - top);
        total += low + high;
        const u32 a = pair(low, group), b = pair(high, group);
        const uint2 chances = {row == group ? a : 0, row == group ? b : 0};
        const char* from = values + first * BYTES + (row + first) % 8 * UNIT;
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int t = i % 2 + i / 2 * 8;
                v[i] = *reinterpret_cast<const uint4*>(from + t * BYTES + l * 128);
                if (first + t >= live) v[i] = {0, 0, 0, 0};  // zero times what is there may be NaN
            }
            add(acc[l][0], v[0].x, v[1].x, v[2].x, v[3].x, chances);
            add(acc[l][1], v[0].y, v[1].y, v[2].y, v[3].y, chances);
            add(acc[l][2], v[0].z, v[1].z, v[2].z, v[3].z, chances);
            add(acc[l][3], v[0].w, v[1].w, v[2].w, v[3].w, chances);
        }
    }

    // The chances of positions 2 `group` and the next as two 16-bit numbers.
    __device__ static u32 pair(float chance, int group) {
        const float even = __shfl_sync(~0u, chance, 8 * group);
        const float odd = __shfl_sync(~0u, chance, 8 * group + 5);
        return narrow(even, odd);
    }

    // A word of each of four positions, times their chances.
    __device__ static void add(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, uint2 chances) {
        const uint4 turned = {__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                              __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632)};
        multiply_add(sum, turned, chances);
    }

    // Half h of word i of line l's unit `lane` / 4, the sum of all four columns.
    __device__ float found(int l, int i, int h, int lane) const {
        const float even = acc[l][i][2 * h], odd = acc[l][i][2 * h + 1];
        const int unit = lane / 4;
        float sum = __shfl_sync(~0u, even, unit * 4);
        sum += __shfl_sync(~0u, odd, (unit + 6) % 8 * 4);
        sum += __shfl_sync(~0u, even, (unit + 4) % 8 * 4 + 1);
        return sum + __shfl_sync(~0u, odd, (unit + 2) % 8 * 4 + 1);
    }
};

// Begin with the step's own position, whose chance is one so far.
__device__ __forceinline__ void begin_with_own(Running& run, const u16* query, const u16* key,
                                               float scale, int lane) {
    float score = 0.0f;
#pragma unroll
    for (int d = lane; d < DIM; d += 32) score += widen_one(query[d]) * widen_one(key[d]);
    run.top = warp_sum(score) * scale, run.own = 1.0f;
}

// What a warp found of a head to shared memory, its own position's value with it.
__device__ __forceinline__ void leave(const Running& run, float* sums, const u16* value, int lane) {
#pragma unroll
    for (int l = 0; l < LINES; ++l)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int d = l * 64 + lane / 4 * 8 + e;
            const float own = run.own > 0.0f ? run.own * widen_one(value[d]) : 0.0f;
            const float sum = run.found(l, e / 2, e % 2, lane) + own;
            if (lane % 4 == 0) sums[d] = sum;
        }
}

__device__ __forceinline__ void attend(Shared& s, float scale, int warp, int lane) {
    for (int n = 0, taken = 0, number = 0; number != NOBODY; ++n) {
        const int which = n % 2;
        Running run;
        barrier_wait(shared_address(&s.asked[which]), n / 2 & 1);
        number = s.head[which];
        if (number != NOBODY) {
            const int stored = s.stored[which];
            const Query query(s.query[which], lane);
            if (warp == 0) begin_with_own(run, s.query[which], s.key[which], scale, lane);
            for (int t = 0; t < stored; t += SLOT, ++taken) {
                const int i = taken % SLOTS, live = min(SLOT, stored - t);
                barrier_wait(shared_address(&s.full[i]), taken / SLOTS & 1);
#pragma unroll 1
                for (int k = warp * BLOCK; k < live; k += WARPS * BLOCK)
                    run.take(query, s.ring[i][0] + k * BYTES, s.ring[i][1] + k * BYTES, live - k,
                             scale, lane);
                __syncwarp();
                if (lane == 0) barrier_arrive(shared_address(&s.empty[i]), 1);
            }
            run.total = warp_sum(run.total) + run.own;
        }
        barrier_wait(shared_address(&s.joined[which]), (n / 2 & 1) ^ 1);
        if (number != NOBODY) leave(run, s.sums[which][warp], s.value[which], lane);
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
            out[d] = narrow(sum.x * scale, sum.y * scale);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&s.joined[which]), 1);
    }
}

// Grid: as many programs as the GPU holds.
extern "C" __global__ void __launch_bounds__(WARPS * 32 + 96, 2 * SHARED <= WHOLE ? 2 : 1)
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
        attend(s, a.step.scale, warp, lane);
}
