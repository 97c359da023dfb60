// A product of several rows whose programs share the work in clusters: out = f(x . w), or the sum
// that the residual stream takes. Behind machine.cuh, activation.cuh, overlap.cuh, cluster.cuh and
// warpgroup.cuh.
//
// A cluster owns BLOCK_N columns. Each of its SPLIT programs multiplies its part of the inner
// dimension, 64 elements of all its columns and rows a slot of the ring; then they send each other
// their sums, and each finishes a share of the rows. So activations are read once for BLOCK_N
// columns, in pieces, and nothing but finished rows goes to memory (BY_MEMORY: sums, too, which
// leaves the shared memory to the ring where rows and columns are many).
// The norm before a product is applied after it: with xg = x gamma, y = r (w . xg - mean w . gamma)
// + w . beta + bias, where mean and r come from sums that the products before have left. xg is
// scaled by a power of two that brings the largest gamma to 1, so that it fits where x does.
// Moves each weight once. In chains of their like, norms included: GPT-2 XL's 20 MB at 32 rows in
// 6.7 to 6.9 us, 3.0 TB/s; SantaCoder's 34 MB in 9.6 us, 3.5 TB/s, at 128 rows in 13 us, 2.6 TB/s,
// of 4.5; StarCoder's 302 MB in 73 to 76 us, 4.0 to 4.1 TB/s, at 128 rows in 80 to 87. What is
// lost are the ends, when the last sums are exchanged and the next kernel begins.
//
// Defined outside beside machine.cuh's: BLOCK_M (rows), BLOCK_N, SPLIT, STAGES, AHEAD (slots that
// are asked for before the predecessor ends), BY_MEMORY, GATED, NORM, RESIDUAL, ACTIVATED and RMS
// (0 or 1), EPS (of the norm).

constexpr int GROUPS = BLOCK_N / 64;  // warpgroups, 64 columns each
constexpr int WARPS = GROUPS * 4;     // that multiply; one more fills the ring, another helps
constexpr int PARTS = GATED ? 2 : 1;
constexpr int WEIGHTS = BLOCK_N * 128, INPUTS = BLOCK_M * 128;  // bytes of a slot
constexpr int SHARE = (BLOCK_M + SPLIT - 1) / SPLIT;            // rows that a program finishes
constexpr int PITCH = BLOCK_N + 4;   // of a row of sums: no bank is met twice
constexpr int SENT = SHARE * PITCH;  // sums that one program gives another

constexpr int QUADS = BLOCK_N / 4;  // of columns, a thread each when finished
constexpr int QUEUED = STAGES > 4;  // slots whose products run while the next one's are begun
constexpr int TOLD = 64;            // columns whose sums are told as one
constexpr int LEFT = 4;             // slots to be asked for when the next kernel may start
constexpr bool CLUSTERED = SPLIT > 1 && !BY_MEMORY;

static_assert(BLOCK_N % 64 == 0 && BLOCK_N <= 256, "a warpgroup multiplies 64 columns");
static_assert(SPLIT >= 1 && SPLIT <= 8, "a cluster has up to eight programs");
static_assert(SPLIT > 1 || !BY_MEMORY, "a program alone has nobody to exchange sums with");
static_assert(STAGES >= 2, "one slot is filled while another is multiplied");
static_assert(AHEAD >= 1 && AHEAD <= STAGES, "asked for before there is a slot");

struct Arguments {
    TensorMap weights, inputs, first_inputs;
    const void* bias;  // [columns]: 16-bit, or float32 with the norm's shift
    const float* column_sum;
    const float2* heard;  // [heard_tiles, rows]: sums and sums of squares of x
    float* x;             // [rows, columns], the residual stream
    u16* out;             // [rows, columns]; x times the next norm's scale with RESIDUAL
    const float* gamma;   // of the next norm
    float2* told;         // [tiles of TOLD columns, rows], as `heard`
    float* parts;         // [programs, PARTS, BLOCK_M, BLOCK_N]: sums BY_MEMORY
    u32* met;             // [tiles of columns]: programs that have left theirs there
    int rows, columns, chunks, heard_tiles, width;
    int row_tile;        // the first
    float given, taken;  // scale of x gamma for the next product; the inverse of this one's
};

struct Shared {
    union {
        struct {
            alignas(1024) char weights[STAGES][PARTS * WEIGHTS];
            char inputs[STAGES][INPUTS];
        };
        float sums[PARTS][SPLIT][BY_MEMORY ? 4 : SENT];  // by the programs that finish them
    };
    alignas(16) float heard[CLUSTERED ? SPLIT - 1 : 1][PARTS][CLUSTERED ? SENT : 4];  // from others
    alignas(16) float old[RESIDUAL && !BY_MEMORY ? SHARE : 1][BLOCK_N];  // of the residual stream
    alignas(8) u64 full[STAGES];
    u64 empty[STAGES], begun, all_heard, old_read;
    float2 moments[SHARE];  // mean and inverse deviation
    alignas(16) float bias[PARTS][BLOCK_N], column_sum[PARTS][BLOCK_N], gamma[BLOCK_N];
};
static_assert(sizeof(Shared) + 1024 <= SHARED, "more shared memory than there is");

struct Place {
    int tile, rank, row0, first, chunks;  // first of this program's chunks of 64 inner elements

    __device__ Place(const Arguments& a)
        : tile(blockIdx.x / SPLIT),
          rank(blockIdx.x % SPLIT),
          row0((blockIdx.y + a.row_tile) * BLOCK_M) {
        first = a.chunks * rank / SPLIT;
        chunks = a.chunks * (rank + 1) / SPLIT - first;
    }

    // Where the sums of a program of this tile lie in memory.
    __device__ float* parts(const Arguments& a, int program) const {
        return a.parts + static_cast<long long>(tile * SPLIT + program) * PARTS * BLOCK_M * BLOCK_N;
    }
};

struct Filler {
    const Arguments& a;
    Shared& s;
    const Place& at;
    u64 once;

    __device__ Filler(const Arguments& a, Shared& s, const Place& at) : a(a), s(s), at(at) {
        once = leaving_first();
    }

    __device__ u32 full(int i) const { return shared_address(&s.full[i % STAGES]); }

    __device__ void weights(int i, int bytes) const {
        barrier_expect(full(i), bytes);
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
            copy_box(shared_address(s.weights[i % STAGES]) + p * WEIGHTS, a.weights,
                     (at.first + i) * 64, at.tile * BLOCK_N + p * a.columns, full(i), once);
    }

    // What does not depend on the predecessor.
    __device__ void begin() const {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full(i), 1);
            barrier_init(shared_address(&s.empty[i]), GROUPS);
        }
        barrier_init(shared_address(&s.begun), 1);
        barrier_init(shared_address(&s.all_heard), 1);
        barrier_init(shared_address(&s.old_read), 1);
        fence_barriers();
        for (int i = 0; i < min(AHEAD, at.chunks); ++i) weights(i, PARTS * WEIGHTS);
    }

    // The first slots' inputs come in one box: asked for one by one they would come late. A kernel
    // that may start asks for its weights about a microsecond later: the next one may when LEFT
    // slots of this one's are still to be asked for, or before the wait if none will be then.
    __device__ void run() const {
        const u32 begun = shared_address(&s.begun);
        barrier_expect(begun, AHEAD * INPUTS);
        if (at.chunks <= AHEAD) let_next_start();
        await_last();
        copy_chunks(shared_address(s.inputs[0]), a.first_inputs, at.row0, at.first, begun);
        if (at.chunks <= AHEAD + LEFT) let_next_start();
        for (int i = AHEAD; i < at.chunks; ++i) {
            barrier_wait(shared_address(&s.empty[i % STAGES]), (i / STAGES & 1) ^ 1);
            weights(i, PARTS * WEIGHTS + INPUTS);
            copy_chunks(shared_address(s.inputs[i % STAGES]), a.inputs, at.row0, at.first + i,
                        full(i));
            if (i + 1 + LEFT == at.chunks) let_next_start();
        }
    }
};

// Constants of the columns, which no earlier kernel writes.
__device__ __forceinline__ void read_constants(const Arguments& a, Shared& s, const Place& at) {
    for (int i = threadIdx.x; i < PARTS * BLOCK_N; i += WARPS * 32) {
        const int p = i / BLOCK_N, n = at.tile * BLOCK_N + i % BLOCK_N;
        const int from = p * a.columns + n;
        float bias = 0.0f;
        if (a.bias && n < a.columns)
            bias = NORM ? static_cast<const float*>(a.bias)[from]
                        : widen_one(static_cast<const u16*>(a.bias)[from]);
        s.bias[p][i % BLOCK_N] = bias;
        if (NORM) s.column_sum[p][i % BLOCK_N] = n < a.columns ? a.column_sum[from] : 0.0f;
        if (RESIDUAL) s.gamma[i % BLOCK_N] = n < a.columns ? a.gamma[n] * a.given : 0.0f;
    }
}

// Mean and inverse deviation of the rows that this program will finish, a lane each.
__device__ __forceinline__ void read_moments(const Arguments& a, Shared& s, const Place& at,
                                             int lane) {
    for (int j = lane; j < SHARE; j += 32) {
        const int m = at.rank * SHARE + j;
        if (m >= BLOCK_M || at.row0 + m >= a.rows) break;
        const float2* parts = a.heard + at.row0 + m;
        float2 sum = {0.0f, 0.0f};
#pragma unroll 16
        for (int t = 0; t < a.heard_tiles; ++t) {
            const float2 part = parts[t * a.rows];
            sum.x += part.x, sum.y += part.y;
        }
        const float mean = RMS ? 0.0f : sum.x / a.width;
        const float square = sum.y / a.width - mean * mean;
        s.moments[j] = {mean, rsqrtf((square < 0.0f ? 0.0f : square) + EPS)};  // NaN stays
    }
}

__device__ __forceinline__ void multiply(float (&sum)[PARTS][HELD], Shared& s, int chunks,
                                         int group, int leader) {
    barrier_wait(shared_address(&s.begun), 0);
    for (int i = 0; i < chunks; ++i) {
        const u32 weights = shared_address(s.weights[i % STAGES]) + group * 8192;
        const u32 inputs = shared_address(s.inputs[i % STAGES]);
        barrier_wait(shared_address(&s.full[i % STAGES]), i / STAGES & 1);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) pinned(sum[p]);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
                multiply_tile(sum[p], described(weights + p * WEIGHTS + k * 32),
                              described(inputs + k * 32));
        commit_products();
#pragma unroll
        for (int p = 0; p < PARTS; ++p) pinned(sum[p]);
        await_products<QUEUED>();
        if (leader && i >= QUEUED)
            barrier_arrive(shared_address(&s.empty[(i - QUEUED) % STAGES]), 1);
    }
    await_products<0>();
#pragma unroll
    for (int p = 0; p < PARTS; ++p) pinned(sum[p]);
}

// This program's rows of the residual stream, as they were.
__device__ __forceinline__ void read_old(const Arguments& a, Shared& s, const Place& at, int lane) {
    const int column = at.tile * BLOCK_N, first = at.row0 + at.rank * SHARE;
    const u32 bytes = min(BLOCK_N, a.columns - column) * 4, barrier = shared_address(&s.old_read);
    const int rows = max(min(min(SHARE, BLOCK_M - at.rank * SHARE), a.rows - first), 0);
    if (lane == 0) barrier_expect(barrier, rows * bytes);
    __syncwarp();
    for (int j = lane; j < rows; j += 32)
        copy(shared_address(s.old[j]), a.x + static_cast<long long>(first + j) * a.columns + column,
             bytes, barrier);
}

// This warpgroup's sums to shared memory, or to memory.
__device__ __forceinline__ void leave(const float (&sum)[PARTS][HELD], const Arguments& a,
                                      Shared& s, const Place& at) {
    constexpr int pitch = BY_MEMORY ? BLOCK_N : PITCH;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = warp * 16 + lane / 4;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        float* to = BY_MEMORY ? at.parts(a, at.rank) + p * BLOCK_M * BLOCK_N : s.sums[p][0];
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int m = i / 4 * 8 + lane % 4 * 2 + i % 2;
            to[m * pitch + column + i / 2 % 2 * 8] = sum[p][i];
        }
    }
}

// Give every other program of the cluster the sums of its rows.
__device__ __forceinline__ void tell_others(Shared& s, int rank, int lane) {
    if (lane == 0) barrier_expect(shared_address(&s.all_heard), (SPLIT - 1) * sizeof(s.heard[0]));
    if (lane < SPLIT && lane != rank)
        for (int p = 0; p < PARTS; ++p)
            send(address_in(lane, shared_address(s.heard[rank - (rank > lane)][p])),
                 shared_address(s.sums[p][lane]), sizeof(s.sums[0][0]),
                 address_in(lane, shared_address(&s.all_heard)));
}

// What columns n to n + 3 of one of this program's rows are made of.
struct Quad {
    float4 parts[PARTS][SPLIT], old;

    __device__ __forceinline__ void read(const Arguments& a, const Shared& s, const Place& at,
                                         int j, int n) {
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
#pragma unroll
            for (int r = 0; r < SPLIT; ++r) {
                if (BY_MEMORY) {
                    const int m = p * BLOCK_M + at.rank * SHARE + j;
                    parts[p][r] = read_fresh(at.parts(a, r) + m * BLOCK_N + n);
                } else {
                    const float* from = r == at.rank ? s.sums[p][r] : s.heard[r - (r > at.rank)][p];
                    parts[p][r] = *reinterpret_cast<const float4*>(from + j * PITCH + n);
                }
            }
        if (!RESIDUAL) return;
        const long long row = at.row0 + at.rank * SHARE + j;
        old = BY_MEMORY ? read_fresh(a.x + row * a.columns + at.tile * BLOCK_N + n)
                        : *reinterpret_cast<const float4*>(&s.old[j][n]);
    }

    // Finished but for the activation.
    __device__ __forceinline__ float4 joined(const Arguments& a, const Shared& s, int p, int j,
                                             int n) const {
        float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < SPLIT; ++r) {
            const float4 more = parts[p][r];
            v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
        }
        const float4 bias = *reinterpret_cast<const float4*>(&s.bias[p][n]);
        if (NORM) {
            const float2 moment = s.moments[j];
            const float4 column = *reinterpret_cast<const float4*>(&s.column_sum[p][n]);
            const float scale = moment.y * a.taken, shift = -moment.x * moment.y;
            v.x = scale * v.x + shift * column.x;
            v.y = scale * v.y + shift * column.y;
            v.z = scale * v.z + shift * column.z;
            v.w = scale * v.w + shift * column.w;
        }
        return {v.x + bias.x, v.y + bias.y, v.z + bias.z, v.w + bias.w};
    }
};

__device__ __forceinline__ uint2 narrow4(float4 v) { return {narrow(v.x, v.y), narrow(v.z, v.w)}; }

// Store this program's rows, or add them to the residual stream. Nothing is unrolled: code that
// has to be fetched would take longer than what it does. What comes from memory is asked for one
// turn ahead.
__device__ __forceinline__ void finish(const Arguments& a, Shared& s, const Place& at) {
    const int first = at.rank * SHARE, lane = threadIdx.x % 32;
    const int end = min(min(SHARE, BLOCK_M - first), a.rows - at.row0 - first) * QUADS;
    const auto inside = [&](int i) {
        return i < end && at.tile * BLOCK_N + i % QUADS * 4 < a.columns;
    };
    Quad next;
    if (BY_MEMORY && inside(threadIdx.x))
        next.read(a, s, at, threadIdx.x / QUADS, threadIdx.x % QUADS * 4);
#pragma unroll 1
    for (int begin = threadIdx.x - lane; begin < end; begin += WARPS * 32) {
        const int i = begin + lane, j = i / QUADS, n = i % QUADS * 4, later = i + WARPS * 32;
        const int m = at.row0 + first + j, column = at.tile * BLOCK_N + n;
        const long long place = static_cast<long long>(m) * a.columns + column;
        float2 told = {0.0f, 0.0f};
        Quad quad = next;
        if (!BY_MEMORY && inside(i)) quad.read(a, s, at, j, n);
        if (BY_MEMORY && inside(later)) next.read(a, s, at, later / QUADS, later % QUADS * 4);
        if (inside(i)) {
            float4 v = quad.joined(a, s, 0, j, n);
            if (ACTIVATED) v = {activate(v.x), activate(v.y), activate(v.z), activate(v.w)};
            if (GATED) {
                const float4 gate = quad.joined(a, s, PARTS - 1, j, n);
                v.x *= gate.x, v.y *= gate.y, v.z *= gate.z, v.w *= gate.w;
            }
            if (RESIDUAL) {
                const float4 old = quad.old;
                const float4 following = *reinterpret_cast<const float4*>(&s.gamma[n]);
                v.x += old.x, v.y += old.y, v.z += old.z, v.w += old.w;
                *reinterpret_cast<float4*>(a.x + place) = v;
                told.x = v.x + v.y + v.z + v.w;
                told.y = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                v.x *= following.x, v.y *= following.y;
                v.z *= following.z, v.w *= following.w;
            }
            *reinterpret_cast<uint2*>(a.out + place) = narrow4(v);
        }
        if (!RESIDUAL) continue;
#pragma unroll
        for (int step = TOLD / 8; step; step /= 2) {
            told.x += __shfl_xor_sync(~0u, told.x, step);
            told.y += __shfl_xor_sync(~0u, told.y, step);
        }
        if (inside(i) && n % TOLD == 0) a.told[column / TOLD * a.rows + m] = told;
    }
}

// Grid (tiles of columns x SPLIT, tiles of rows), in clusters of SPLIT, or BY_MEMORY all at once:
// programs of a tile wait for each other.
extern "C" __global__ void __launch_bounds__(WARPS * 32 + 64)
    cluster_linear(const __grid_constant__ Arguments a) {
    extern __shared__ char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Place at(a);
    const Filler filler(a, s, at);
    if (threadIdx.x == WARPS * 32) filler.begin();
    if (warp < WARPS) read_constants(a, s, at);
    __syncthreads();
    if (CLUSTERED) cluster_arrive();
    constexpr int MULTIPLYING = WARPS * 32, FINISHING = MULTIPLYING + 32;
    if (warp == WARPS) {
        if (lane == 0) filler.run();
        __syncwarp();
        if (CLUSTERED) cluster_wait(), cluster_arrive();
    } else if (warp > WARPS) {
        await_last();
        if (NORM) read_moments(a, s, at, lane);
        if (RESIDUAL && !BY_MEMORY) read_old(a, s, at, lane);
        pass<2, FINISHING>();
        if (CLUSTERED) cluster_wait(), cluster_arrive();
    } else {
        await_last();
        float sum[PARTS][HELD] = {};
        multiply(sum, s, at.chunks, warp / 4, threadIdx.x % 128 == 0);
        if (!BY_MEMORY) meet<1, MULTIPLYING>();
        leave(sum, a, s, at);
        if (CLUSTERED) fence_shared_copies();
        meet<2, FINISHING>();
        if (CLUSTERED) {
            cluster_wait();
            if (warp == 0) tell_others(s, at.rank, lane);
            barrier_wait(shared_address(&s.all_heard), 0);
            cluster_arrive();
        }
        if (BY_MEMORY) {
            if (threadIdx.x == 0) meet_programs(a.met + at.tile, SPLIT);
            meet<1, MULTIPLYING>();
        }
        if (RESIDUAL && !BY_MEMORY) barrier_wait(shared_address(&s.old_read), 0);
        finish(a, s, at);
    }
    // what others still read of this program's memory stays
    if (CLUSTERED) cluster_wait();
}
