// Decoding of a single row in one launch: every layer of every token, the head, the greedy choice.
//
// Five stages a layer (QKV, attention, output, up, down), then the head and the choice. A
// stage's activations are heard whole by every program, 6 to 100 KB from the L2 cache; its weights
// come through the ring of stream.cuh, which waits for nobody.
//
// A token moves every weight and the row's cache once: on an H200 camel-5b's 10 GB and StarCoder's
// 31 GB at 4.3 TB/s, GPT-2 XL's 3.1 GB at 3.3, 124M's 0.25 GB at 1.7, of 4.6 that copies alone
// reach (docs/performance.md), the rest being the words' way through the L2 cache.

struct Step : Attention {
    // One product: what it meets, the product, what becomes of it.
    __device__ void run(int stage, float* logits) {
        const Layer& w = weights();
        const Matrix& m = MATRICES[stage];
        const int local = min(static_cast<int>(threadIdx.x), m.rows() - 1);
        const int row = m.first() + (m.paired ? local / 2 + (local & 1) * m.columns : local);
        const u16* bias = stage == QKV    ? w.qkv_bias
                          : stage == OUT  ? w.out_bias
                          : stage == UP   ? w.up_bias
                          : stage == DOWN ? w.down_bias
                                          : nullptr;
        const bool inner = stage == UP, last = stage == HEAD;
        Norm norm{last    ? s.plan.head_scale
                  : inner ? w.up_scale
                          : w.qkv_scale,
                  last    ? s.plan.head_shift
                  : inner ? w.up_shift
                          : w.qkv_shift};
        // Asked for before the words. That the bias is waited for gives the others time to tell:
        // who asks too early asks twice, and delays those who tell.
        if (NORM_AHEAD && stage != OUT && stage != DOWN) norm.load();
        const float shift = bias ? widen_one(__ldg(bias + row)) : 0.0f;
        if (stage == OUT)
            load_attended();
        else if (stage == DOWN)
            load_hidden();
        else
            load_normed(norm, flag() + last - (stage == QKV), stage == QKV && layer == 0);
        if (stage == HEAD) return choose_among(logits);
        if (stage == QKV) multiply<QKV>(QKV_MATRIX.rows());
        if (stage == OUT) multiply<OUT>(OUT_MATRIX.rows());
        if (stage == UP) multiply<UP>(UP_MATRIX.rows());
        if (stage == DOWN) multiply<DOWN>(DOWN_MATRIX.rows());
        const float y = total(local) + shift;
        if (stage == UP) return leave_hidden(y);
        if (threadIdx.x >= m.rows()) return;
        if (stage == QKV) return tell(s.plan.qkv + row, y, flag());
        tell(s.plan.stream + row, s.residual[threadIdx.x] += y, flag() + (stage == DOWN));
    }

    // The MLP's inner activations. Two share a word: columns are cut in pairs.
    __device__ void leave_hidden(float y) {
        if (GATED) {  // gate and linear are neighbours
            const float linear = __shfl_down_sync(~0u, y, 1);
            y = activate(y) * linear;
        } else {
            y = activate(y);
        }
        const float odd = __shfl_down_sync(~0u, y, GATED ? 2 : 1);
        const int column = threadIdx.x / (GATED ? 2 : 1);
        if (threadIdx.x % (GATED ? 4 : 2) == 0 && column < UP_MATRIX.owned())
            tell(s.plan.hidden + (UP_MATRIX.first() + column) / 2, narrow(y, odd), flag());
    }

    // Logits of this program's part of the vocabulary: all of them where wanted, the first largest.
    __device__ void choose_among(float* logits) {
        float top = LOWEST;
        int where = NOBODY;
        const int rows = HEAD_MATRIX.rows();
        for (int batch = 0; batch < rows; batch += BATCH) {
            const int n = min(rows - batch, BATCH), row = HEAD_MATRIX.first() + batch + threadIdx.x;
            multiply<HEAD>(n);
            if (threadIdx.x < n) {
                const float y = total(threadIdx.x);
                if (logits) logits[row] = y;
                prefer(top, where, y, row);
            }
            together();
        }
        prefer_warp(top, where);
        if (lane == 0) s.best[warp] = top, s.where[warp] = where;
        together();
        if (threadIdx.x == 0) {
            for (int i = 1; i < WARPS; ++i) prefer(top, where, s.best[i], s.where[i]);
            fence_copies();
            fence_all();  // the cache's new positions
            tell(s.plan.best + 2 * blockIdx.x, top, flag());
            tell(s.plan.best + 2 * blockIdx.x + 1, static_cast<u32>(where), flag());
        }
    }

    // The larger of two logits; the lower id wins a tie, as torch.argmax does on a CPU.
    __device__ static void prefer(float& top, int& where, float other, int there) {
        if (other > top || (other == top && there < where)) top = other, where = there;
    }

    __device__ static void prefer_warp(float& top, int& where) {
#pragma unroll
        for (int step = 16; step; step /= 2) {
            const float other = __shfl_xor_sync(~0u, top, step);
            prefer(top, where, other, __shfl_xor_sync(~0u, where, step));
        }
    }

    // Every program finds the greedy token by itself, and goes on from its embedding.
    __device__ void choose() {
        if (warp == 0) {
            constexpr int EACH = (GRID + 31) / 32;
            Words heard[EACH];
            hear(heard, s.plan.best, lane, 32, GRID, flag());
            float top = LOWEST;
            int where = NOBODY;
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (i * 32 + lane < GRID)
                    prefer(top, where, __uint_as_float(heard[i].a.bits),
                           static_cast<int>(heard[i].b.bits));
            prefer_warp(top, where);
            if (lane == 0) s.token = min(where, VOCAB - 1);  // of nothing but NaN
            fence_all();
        }
        together();
        if (threadIdx.x == 0) barrier_arrive(shared_address(&shared.chosen), 1);
    }

    __device__ void advance() { ++position, ++token, layer = 0; }
};

// Decode `count` tokens of the row that the plan points to, from the residual stream x of the first
// on: greedy ones into its history, or with `logits` [VOCAB] those of a single token. Words with
// flags above `base` have never been told; this launch tells up to base + 2 count LAYERS. The row's
// slot is a real one, never padding.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
    decode_row(const Plan* plan, int count, u32 base, float* logits) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Desk& s = shared.desk;
    if (logits) count = 1;
    const int start = *plan->positions, cursor = *plan->cursor;
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Plan) / 8); i += ALL_THREADS)
        reinterpret_cast<u64*>(&s.plan)[i] = reinterpret_cast<const u64*>(plan)[i];
    if (threadIdx.x < SLOTS) {
        barrier_init(shared_address(&shared.full[threadIdx.x]), FILLERS);
        barrier_init(shared_address(&shared.empty[threadIdx.x]), WARPS);
    }
    if (threadIdx.x == 0) barrier_init(shared_address(&shared.chosen), 1);
    __syncthreads();
    const long long slot = *plan->slots * static_cast<long long>(KV) * s.plan.capacity * DIM;
    for (int i = threadIdx.x; i < LAYERS; i += ALL_THREADS)
        s.plan.layers[i].keys += slot, s.plan.layers[i].values += slot;
    fence_copies();
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x % 32 == 0)
            Filler{shared, static_cast<int>(threadIdx.x - THREADS) / 32}.run(start, count);
        return;
    }
    Step step{{{shared, s, base, static_cast<int>(threadIdx.x / 32),
                static_cast<int>(threadIdx.x % 32), start}}};
    while (step.token < count) {
        for (int stage = QKV; stage <= HEAD;) {
            if (stage == OUT) step.attend();
            step.run(stage, logits);
            const bool again = stage == DOWN && step.layer + 1 < LAYERS;
            step.layer += again;
            stage = again ? QKV : stage + 1;
        }
        if (logits) return;
        step.choose();
        if (blockIdx.x == 0 && threadIdx.x == 0) s.plan.history[cursor + step.token] = s.token;
        step.advance();
    }
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < D / 2; i += GRID * THREADS)
        reinterpret_cast<float2*>(s.plan.x)[i] = step.embedded(i).sum();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *s.plan.tokens = s.token;
        *s.plan.positions = start + count;
        *s.plan.cursor = cursor + count;
    }
}
