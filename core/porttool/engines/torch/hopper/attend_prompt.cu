// Causal attention of prompts, many tokens of a row at once, over the cache that holds their keys.
//
// A program takes item after item: ROWS queries, those of TOKENS tokens of a row in GROUP heads
// that share their keys. Each of its TEAMS warpgroups has 64 of them; one warp asks for queries,
// keys and values, and runs ahead of the teams into the next item. So neither a tile nor an item
// waits for memory, and while one team is at its exponentials the tensor cores have the products of
// another. An average is kept with the highest score so far (Dao 2023).
// Two operations for each element of a key or value and query that sees it, TFLOP/s at 924 and 8192
// tokens: 299 and 394 with heads of 64 elements (GPT-2 XL), 375 and 543 with 128 (camel-5b), 437
// and 568 where 16 share their keys (SantaCoder). A matrix product reaches 750; the rest are
// exponentials, masked keys and the ends of items.
//
// Behind machine.cuh, overlap.cuh and warpgroup.cuh. Defined outside: HEADS, KV, DIM (64 or 128),
// GROUP, TEAMS, BLOCK_T (keys of a tile), RING (tiles of keys or of values), BF16.

constexpr int OWN = 64 / GROUP;  // tokens of a team
constexpr int ROWS = TEAMS * 64, TOKENS = TEAMS * OWN;
constexpr int THREADS = TEAMS * 128 + 128;  // the last warpgroup's first warp fills the ring
constexpr int REGISTERS = TEAMS == 2 ? 240 : 160, OTHERS = TEAMS == 2 ? 24 : 32;
constexpr int TILES = HEADS / GROUP;      // of heads
constexpr int HALVES = DIM / 64;          // of a key: 128 bytes, swizzled together
constexpr int BYTES = BLOCK_T * DIM * 2;  // of a tile
constexpr int STEPS = DIM / 16, SUMS = DIM / 2, SCORES = BLOCK_T / 2;

static_assert(DIM % 64 == 0 && DIM <= 128, "products are as wide as a head");
static_assert(64 % GROUP == 0 && HEADS / KV % GROUP == 0, "a team has whole tokens");
static_assert(TEAMS == 2 || TEAMS == 3, "their registers are all that there are");
static_assert(BLOCK_T == 128, "one product has the scores of a tile");
static_assert(RING >= 3, "a tile's values, while the next one's keys are taken");

struct Arguments {
    TensorMap queries;       // [tokens, HEADS * HALVES or more, 64] in boxes of TOKENS
    TensorMap keys, values;  // [HALVES, positions of all slots' heads, 64] in boxes of BLOCK_T
    u16* out;                // [tokens, HEADS, DIM]
    const int *slots, *starts, *first;  // of the rows; first[row + 1] is past the last token
    u32* drawn;                         // zero, and zero again afterwards
    int capacity, rows;
    int blocks;    // of the longest row's tokens, TOKENS each
    int section;   // tiles of rows that are done before others: their keys stay in the L2 cache
    int batch;     // items of a draw, at most 32
    float factor;  // scale of the scores, times log2(e)
};

// Queries of a row: `tokens` of them, from the token-th of all, at the row's begin-th position on.
struct Item {
    int token, tokens = 0, head, begin, end;  // end: positions that the last of them sees
    int cached;                               // of the cache's positions, the row's first

    __device__ Item() {}

    // Draws of a row and tile of heads.
    __device__ static int groups(const Arguments& a) { return (a.blocks + a.batch - 1) / a.batch; }

    // A lane's of a draw: those of one row and tile of heads, the last tokens first.
    __device__ Item(const Arguments& a, int draw, int lane) {
        const int pairs = a.rows * TILES, size = a.section * groups(a);
        const int low = draw / size * a.section, place = draw % size;
        const int wide = min(a.section, pairs - low), pair = low + place % wide;
        const int row = pair / TILES;
        const int from = (a.blocks - 1 - (place / wide * a.batch + lane)) * TOKENS;
        head = pair % TILES * GROUP;
        token = a.first[row] + from;
        tokens = from < 0 ? 0 : max(min(a.first[row + 1] - token, TOKENS), 0);
        begin = a.starts[row] + from;
        end = begin + tokens;
        if (end <= 0) tokens = 0;  // padding that sees no key
        cached = (a.slots[row] * KV + head / (HEADS / KV)) * a.capacity;
    }

    __device__ Item of_lane(int lane) const {
        Item item;
        item.token = __shfl_sync(~0u, token, lane), item.tokens = __shfl_sync(~0u, tokens, lane);
        item.head = __shfl_sync(~0u, head, lane), item.begin = __shfl_sync(~0u, begin, lane);
        item.end = item.begin + item.tokens, item.cached = __shfl_sync(~0u, cached, lane);
        return item;
    }

    __device__ int tiles() const { return (end + BLOCK_T - 1) / BLOCK_T; }
};

struct Shared {
    alignas(1024) char ring[RING][BYTES];  // keys and values by turns
    char queries[2][HALVES][ROWS][128];
    alignas(8) u64 full[RING];
    u64 empty[RING], asked[2], taken[2];  // queries
    Item item[2];
};
static_assert(sizeof(Shared) + 1024 <= SHARED, "more shared memory than there is");

// ---- the warp that fills ----

// The items of a program: whoever is done draws again, the longest first. A draw has several items
// where few of them have queries, as in a graph, whose rows may be of any length: a lane each.
struct Drawn {
    u32 left = 0;  // lanes whose items are still to be taken
    Item own;

    // The next one with queries; one without where there is no more.
    __device__ Item next(const Arguments& a, int lane) {
        const u32 draws = a.rows * TILES * Item::groups(a);
        while (!left) {
            u32 draw = lane == 0 ? count_up(a.drawn) : 0;
            draw = __shfl_sync(~0u, draw, 0);
            if (draw >= draws) {
                if (draw == draws + gridDim.x - 1) *a.drawn = 0;  // all have come to the end
                return {};
            }
            own = lane < a.batch ? Item(a, draw, lane) : Item();
            left = __ballot_sync(~0u, own.tokens > 0);
        }
        const int from = __popc((left & -left) - 1);
        left &= left - 1;
        return own.of_lane(from);
    }
};

__device__ __forceinline__ void copy_tile(const Arguments& a, Shared& s, const Item& item, int t,
                                          int copy) {
    const int i = copy % RING;
    const u32 full = shared_address(&s.full[i]);
    barrier_wait(shared_address(&s.empty[i]), (copy / RING & 1) ^ 1);
    barrier_expect(full, BYTES);
    copy_chunks(shared_address(s.ring[i]), copy % 2 ? a.values : a.keys, item.cached + t * BLOCK_T,
                0, full);
}

__device__ __forceinline__ void fill(const Arguments& a, Shared& s, int lane) {
    Drawn drawn;
    int copies = 0, items = 0;
    for (Item item = drawn.next(a, lane), following;; item = following, ++items) {
        const u32 asked = shared_address(&s.asked[items % 2]);
        if (lane == 0) {
            barrier_wait(shared_address(&s.taken[items % 2]), (items / 2 & 1) ^ 1);
            s.item[items % 2] = item;
            barrier_expect(asked, item.tokens ? sizeof(s.queries[0]) : 0);
        }
        if (!item.tokens) return;
        for (int half = 0; lane == 0 && half < HALVES; ++half)
            copy_cube(shared_address(s.queries[items % 2][half]), a.queries, half * 64, item.head,
                      item.token, asked);
        for (int t = 0; t < item.tiles(); ++t, copies += 2) {
            if (lane == 0) copy_tile(a, s, item, t, copies), copy_tile(a, s, item, t, copies + 1);
            if (t == 0) following = drawn.next(a, lane);  // while there is something to do
        }
    }
}

// ---- the teams that compute ----

// What a thread has of two queries, rows lane / 4 and lane / 4 + 8 of its warp's.
struct Running {
    float top[2] = {LOWEST, LOWEST}, total[2] = {}, sum[SUMS] = {};
};

// Take the queries' scores of a tile: the weights of its values, and what that makes of the sums.
__device__ __forceinline__ void weigh(const float (&score)[SCORES], u32 (&weights)[SCORES / 2],
                                      Running& run, float factor) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = LOWEST;
#pragma unroll
        for (int j = 2 * i; j < SCORES; j += 4) top = fmaxf(top, fmaxf(score[j], score[j + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float above = fmaxf(run.top[i], top * factor);
        const float shrink = two_to(run.top[i] - above);
        run.top[i] = above, run.total[i] *= shrink;
        if (__any_sync(~0u, shrink != 1.0f))
#pragma unroll
            for (int j = 2 * i; j < SUMS; j += 4) run.sum[j] *= shrink, run.sum[j + 1] *= shrink;
#pragma unroll
        for (int j = 2 * i; j < SCORES; j += 4) {
            const float a = two_to(score[j] * factor - above);
            const float b = two_to(score[j + 1] * factor - above);
            run.total[i] += a + b;
            weights[j / 2] = narrow(a, b);
        }
    }
}

// Values behind the last that anybody sees may be NaN, which no weight of zero takes away.
__device__ __forceinline__ void clear_rest(char* values, int live, int team) {
    for (int i = threadIdx.x % 128; i < (BLOCK_T - live) * DIM / 8; i += 128) {
        const int row = live + i / (DIM / 8), unit = i % (DIM / 8);
        store16(shared_address(values) + unit / 8 * (BLOCK_T * 128) + row * 128 +
                    (unit % 8 ^ row % 8) * 16,
                {0, 0, 0, 0});
    }
    fence_shared_copies();
    meet_some(1 + team, 128);
}

// Known to the compiler to be the same in all lanes: it has each product awaited on paths that some
// lanes of a warp could take without others.
__device__ __forceinline__ int same_in_warp(int value) { return __shfl_sync(~0u, value, 0); }

// Four lanes' words turned: lane l gets the l-th of each.
__device__ __forceinline__ void transpose(u32 (&w)[4], int lane) {
#pragma unroll
    for (int step = 1; step <= 2; ++step)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k & step) continue;
            u32 &low = w[k], &high = w[k + step];
            const bool upper = lane & step;
            const u32 other = __shfl_xor_sync(~0u, upper ? low : high, step);
            (upper ? low : high) = other;
        }
}

struct Team {
    const Arguments& a;
    Shared& s;
    const int team = same_in_warp(threadIdx.x / 128), warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    int copies = 0;
    u32 queries;  // where this team's are

    __device__ Team(const Arguments& a, Shared& s) : a(a), s(s) {}

    __device__ __forceinline__ const char* await(int copy) const {
        barrier_wait(shared_address(&s.full[copy % RING]), copy / RING & 1);
        return s.ring[copy % RING];
    }

    // A warp whose lanes have all seen that it came.
    __device__ __forceinline__ void give_back(int copy) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&s.empty[copy % RING]), 1);
    }

    // Enqueue queries times keys.
    __device__ __forceinline__ void score(float (&sum)[SCORES], const char* keys) const {
        const u32 from = shared_address(keys);
        multiply_shared<false>(sum, described(queries), described(from));
#pragma unroll
        for (int k = 1; k < STEPS; ++k)
            multiply_shared<true>(sum, described(queries + k / 4 * (ROWS * 128) + k % 4 * 32),
                                  described(from + k / 4 * (BLOCK_T * 128) + k % 4 * 32));
    }

    // Enqueue weights times values.
    __device__ __forceinline__ void average(float (&sum)[SUMS], const u32 (&weights)[SCORES / 2],
                                            const char* values) const {
        const u32 from = shared_address(values);
#pragma unroll
        for (int k = 0; k < BLOCK_T / 16; ++k) {
            const u32* w = weights + 4 * k;
            multiply_held<true, true>(sum, {w[0], w[1], w[2], w[3]},
                                      described_turned(from + k * 2048, BLOCK_T * 128));
        }
    }

    // Queries see no keys behind their own.
    __device__ __forceinline__ void mask(float (&scores)[SCORES], int first, int begin) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = team * 64 + warp * 16 + lane / 4 + 8 * i;
            const int seen = begin + row / GROUP - first - lane % 4 * 2;
#pragma unroll
            for (int j = 2 * i; j < SCORES; j += 4) {
                if (j / 4 * 8 > seen) scores[j] = LOWEST;
                if (j / 4 * 8 + 1 > seen) scores[j + 1] = LOWEST;
            }
        }
    }

    __device__ __forceinline__ void store(const Item& item, const Running& run) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = team * 64 + warp * 16 + lane / 4 + 8 * i;
            float total = run.total[i];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const float scale = 1.0f / total;
            const long long place = static_cast<long long>(item.token + row / GROUP) * HEADS;
            u16* to = a.out + (place + item.head + row % GROUP) * DIM + lane % 4 * 8;
#pragma unroll
            for (int j = 2 * i; j < SUMS; j += 16) {
                u32 w[4];
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    w[k] = narrow(run.sum[j + 4 * k] * scale, run.sum[j + 4 * k + 1] * scale);
                transpose(w, lane);
                if (row / GROUP < item.tokens)
                    *reinterpret_cast<uint4*>(to + j / 4 * 8) = {w[0], w[1], w[2], w[3]};
            }
        }
    }

    // The products of a tile's values run with those of the next one's keys.
    __device__ __forceinline__ void attend(const Item& item, int tiles) {
        const int plain = item.begin + team * OWN;  // the first query's position
        Running run;
        float scores[SCORES];
        u32 weights[SCORES / 2];
        begin_products();
        score(scores, await(copies));
        commit_products();
        await_products<0>();
        pinned(scores);
        give_back(copies);
        for (int t = 0; t < tiles; ++t, copies += 2) {
            const int first = t * BLOCK_T;
            if (first + BLOCK_T - 1 > plain) mask(scores, first, item.begin);
            weigh(scores, weights, run, a.factor);
            const char* values = await(copies + 1);
            if (first + BLOCK_T > item.end)
                clear_rest(s.ring[(copies + 1) % RING], item.end - first, team);
            pinned(run.sum);
            begin_products();
            average(run.sum, weights, values);
            if (t + 1 < tiles) {
                pinned(scores);
                score(scores, await(copies + 2));
            }
            commit_products();
            await_products<0>();
            pinned(run.sum), pinned(scores);
            give_back(copies + 1);
            if (t + 1 < tiles) give_back(copies + 2);
        }
        store(item, run);
    }

    __device__ __forceinline__ void run() {
        for (int items = 0;; ++items) {
            barrier_wait(shared_address(&s.asked[items % 2]), items / 2 & 1);
            Item item = s.item[items % 2];
            queries = shared_address(s.queries[items % 2][0][team * 64]);
            item.tokens = same_in_warp(item.tokens), item.begin = same_in_warp(item.begin);
            item.end = item.begin + item.tokens;
            if (!item.tokens) return;
            // positions that this team's last query sees, if it has any
            const int own = min(item.tokens - team * OWN, OWN);
            const int tiles = own > 0 ? (item.begin + team * OWN + own + BLOCK_T - 1) / BLOCK_T : 0;
            const int end = copies + 2 * item.tiles();
            if (tiles) attend(item, tiles);
            for (; copies < end; ++copies) await(copies), give_back(copies);
            if (lane == 0) barrier_arrive(shared_address(&s.taken[items % 2]), 1);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prompt_attention(const __grid_constant__ Arguments a) {
    extern __shared__ char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; ++i) {
            barrier_init(shared_address(&s.full[i]), 1);
            barrier_init(shared_address(&s.empty[i]), TEAMS * 4);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared_address(&s.asked[i]), 1);
            barrier_init(shared_address(&s.taken[i]), TEAMS * 4);
        }
        fence_barriers();
    }
    __syncthreads();
    if (threadIdx.x < TEAMS * 128) {
        take_registers<REGISTERS>();
        Team(a, s).run();
    } else {
        leave_registers<OTHERS>();
        if (threadIdx.x < TEAMS * 128 + 32) fill(a, s, threadIdx.x % 32);
    }
}
