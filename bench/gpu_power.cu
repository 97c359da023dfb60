// What a product of several rows cannot do without, and nothing else: weights that are copied to
// shared memory, and the tensor cores that multiply them there, each alone or both in one kernel.
// Behind machine.cuh, overlap.cuh and warpgroup.cuh. gpu_power.py runs it.
//
// A chunk is 64 elements of BLOCK_N columns, swizzled as the tensor cores want it; program p of P
// takes chunks p, p + P, ... and sums their products with activations of the same 64 elements.
//
// Defined outside beside theirs: BLOCK_N, STAGES (slots of the ring), STEPS (chunks of activations,
// which come again and again), BESIDE (0: activations stay in shared memory; 1: they are copied
// beside every slot's weights), STREAMED (0: the first STAGES chunks of weights stay, and are taken
// again and again), MULTIPLIED (0: copies alone).

constexpr int GROUPS = BLOCK_N / 64;  // warpgroups, 64 columns each
constexpr int WARPS = GROUPS * 4;     // that multiply; one more fills the ring
constexpr int WEIGHTS = BLOCK_N * 128, INPUTS = BLOCK_M * 128;  // bytes of a chunk
constexpr bool KEPT = MULTIPLIED && !BESIDE;

static_assert(STAGES >= 2, "a slot is given back when the next one's products have begun");
static_assert(STREAMED || !BESIDE, "slots that stay have nothing copied beside them");
static_assert(STREAMED || MULTIPLIED, "copies of what stays are none");

struct Shared {
    alignas(1024) char weights[STAGES][WEIGHTS];
    char inputs[BESIDE ? STAGES : STEPS][INPUTS];
    alignas(8) u64 full[STAGES];
    u64 empty[STAGES], kept;
};
static_assert(sizeof(Shared) + 1024 <= SHARED, "more shared memory than there is");

__device__ __forceinline__ void begin(Shared& s) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(shared_address(&s.full[i]), 1);
        barrier_init(shared_address(&s.empty[i]), MULTIPLIED ? GROUPS : WARPS);
    }
    barrier_init(shared_address(&s.kept), 1);
    fence_barriers();
}

// The filling warp's only active lane. Activations are the same for all programs, which ask for
// them at about the same time: they come from the L2 cache.
__device__ __forceinline__ void fill(Shared& s, const char* weights, const char* inputs,
                                     int chunks) {
    if (KEPT) {
        barrier_expect(shared_address(&s.kept), STEPS * INPUTS);
        copy(shared_address(s.inputs[0]), inputs, STEPS * INPUTS, shared_address(&s.kept));
    }
    for (int i = 0, c = blockIdx.x; c < chunks && (STREAMED || i < STAGES); ++i, c += gridDim.x) {
        const int slot = i % STAGES;
        const u32 full = shared_address(&s.full[slot]);
        barrier_wait(shared_address(&s.empty[slot]), (i / STAGES & 1) ^ 1);
        barrier_expect(full, WEIGHTS + (BESIDE ? INPUTS : 0));
        const char* from = weights + static_cast<long long>(c) * WEIGHTS;
        copy_once(shared_address(s.weights[slot]), from, WEIGHTS, full);
        if (BESIDE) copy(shared_address(s.inputs[slot]), inputs + i % STEPS * INPUTS, INPUTS, full);
    }
}

// Every warp sees every slot come, and gives it back unread.
__device__ __forceinline__ void pass_over(Shared& s, int chunks) {
    for (int i = 0, c = blockIdx.x; c < chunks; ++i, c += gridDim.x) {
        barrier_wait(shared_address(&s.full[i % STAGES]), i / STAGES & 1);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&s.empty[i % STAGES]), 1);
    }
}

__device__ __forceinline__ void multiply(float (&sum)[HELD], Shared& s, int chunks) {
    const int group = threadIdx.x / 128, leader = threadIdx.x % 128 == 0;
    if (KEPT) barrier_wait(shared_address(&s.kept), 0);
    for (int i = 0, c = blockIdx.x; c < chunks; ++i, c += gridDim.x) {
        const u32 weights = shared_address(s.weights[i % STAGES]) + group * 8192;
        const u32 inputs = shared_address(s.inputs[i % (BESIDE ? STAGES : STEPS)]);
        if (STREAMED || i < STAGES)
            barrier_wait(shared_address(&s.full[i % STAGES]), i / STAGES & 1);
        pinned(sum);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k)
            multiply_tile(sum, described(weights + k * 32), described(inputs + k * 32));
        commit_products();
        pinned(sum);
        await_products<1>();
        if (STREAMED && leader && i >= 1)
            barrier_arrive(shared_address(&s.empty[(i - 1) % STAGES]), 1);
    }
    await_products<0>();
    pinned(sum);
}

// This program's sums to out [programs, BLOCK_N, BLOCK_M].
__device__ __forceinline__ void leave(const float (&sum)[HELD], float* out) {
    const int column = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float* to = out + static_cast<long long>(blockIdx.x) * BLOCK_N * BLOCK_M;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int row = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        to[(column + i / 2 % 2 * 8) * BLOCK_M + row] = sum[i];
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32)
    power(const char* weights, const char* inputs, float* out, int chunks) {
    extern __shared__ char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    if (threadIdx.x == WARPS * 32) begin(s);
    __syncthreads();
    if (threadIdx.x >= WARPS * 32) {
        if (threadIdx.x == WARPS * 32) fill(s, weights, inputs, chunks);
    } else if (MULTIPLIED) {
        float sum[HELD] = {};
        multiply(sum, s, chunks);
        leave(sum, out);
    } else {
        pass_over(s, chunks);
    }
}
