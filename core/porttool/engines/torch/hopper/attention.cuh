// Attention of the row's position: parts of the context, each by another program, and their join.

// A lane holds eight elements of every (32 / LANES)-th position, with a running softmax of its own
// positions (Milakov and Gimelshein 2018).
struct Running {
    float top = LOWEST, total = 0.0f, acc[8] = {};

    // Positions that are not `inside` count for nothing: theirs are zeros.
    template <int N>
    __device__ void take(const float (&score)[N], const uint4 (&value)[N],
                         const bool (&inside)[N]) {
        float above = top;
#pragma unroll
        for (int i = 0; i < N; ++i) above = fmaxf(above, inside[i] ? score[i] : LOWEST);
        const float shrink = __expf(top - above);
        top = above, total *= shrink;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] *= shrink;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float v[8];
            widen8(value[j], v);
            const float chance = inside[j] ? __expf(score[j] - above) : 0.0f;
            total += chance;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[i] += chance * v[i];
        }
    }
};

struct Attention : Program {
    // The step's query, and where this program attends to the step's own position its key and
    // value. Queries and keys are rotated by their position (Su et al. 2021): element i is paired
    // with i + ROTARY / 2, elements from ROTARY on pass through.
    __device__ void load_heads(const Part& part, bool own) {
        constexpr int EACH = (3 * DIM + THREADS - 1) / THREADS, HALF = most(ROTARY / 2, 1);
        const Layer& w = weights();
        const int kv = part.kv(), count = (own ? 3 : 1) * DIM;
        const u64* places[EACH];
        float heard[EACH], cosine[EACH], sine[EACH];
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int i = min(static_cast<int>(threadIdx.x) + j * THREADS, count - 1);
            const int d = i % DIM, kind = i / DIM;
            const int head = kind == 0 ? part.head : HEADS + (kind - 1) * KV + kv;
            places[j] = s.plan.qkv + head * DIM + d;
            if (!ROTARY || d >= ROTARY) continue;
            const long long angle = static_cast<long long>(position) * HALF + d % HALF;
            cosine[j] = s.plan.cosine[angle], sine[j] = s.plan.sine[angle];
        }
        hear(heard, places, flag());
        float* plain = reinterpret_cast<float*>(s.input);
        if (ROTARY) {
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (threadIdx.x + j * THREADS < count) plain[threadIdx.x + j * THREADS] = heard[j];
            together();
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int i = threadIdx.x + j * THREADS, d = i % DIM, kind = i / DIM;
            if (i >= count) break;
            float value = heard[j];
            if (ROTARY && kind < 2 && d < ROTARY)
                value =
                    value * cosine[j] + (d < HALF ? -plain[i + HALF] : plain[i - HALF]) * sine[j];
            if (kind == 0) {
                s.query[d] = value * static_cast<float>(w.scale);
                continue;
            }
            const u16 kept = narrow(value);
            (kind == 1 ? s.key : s.value)[d] = kept;
            if (part.head % (HEADS / KV) == 0)
                (kind == 1 ? w.keys : w.values)[(kv * s.plan.capacity + position) * DIM + d] = kept;
        }
        together();
    }

    // N positions at once, so that nobody waits for one after the other: this lane's elements of
    // their keys and values.
    template <int N>
    __device__ static void meet(Running& run, const float (&query)[8], const uint4 (&key)[N],
                                const uint4 (&value)[N], const bool (&inside)[N]) {
        float score[N] = {};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float k[8];
            widen8(key[j], k);
#pragma unroll
            for (int i = 0; i < 8; ++i) score[j] += query[i] * k[i];
        }
#pragma unroll
        for (int step = LANES / 2; step; step /= 2)
#pragma unroll
            for (int j = 0; j < N; ++j) score[j] += __shfl_xor_sync(~0u, score[j], step);
        run.take(score, value, inside);
    }

    __device__ void attend() {
        const Part part(position);
        if (!part.live()) return;
        const bool own = part.high == position + 1 && part.low <= position;
        load_heads(part, own);
        Running run;
        float query[8];
        const int at = lane % LANES * 8, group = lane / LANES, mine = warp * (32 / LANES) + group;
#pragma unroll
        for (int i = 0; i < 8; ++i) query[i] = s.query[at + i];
        const int end = part.stored(position);
        for (int first = part.low; first < end; first += CHUNK) {
            constexpr int N = CHUNK / TOGETHER;
            const char* chunk = slot() + (mine * DIM + at) * 2;
            uint4 key[N] = {}, value[N] = {};
            bool inside[N];
#pragma unroll
            for (int j = 0; j < N; ++j) {
                inside[j] = first + j * TOGETHER + mine < end;
                if (!inside[j]) continue;
                key[j] = *reinterpret_cast<const uint4*>(chunk + j * TOGETHER * DIM * 2);
                value[j] =
                    *reinterpret_cast<const uint4*>(chunk + (CHUNK + j * TOGETHER) * DIM * 2);
            }
            meet(run, query, key, value, inside);
            release();
        }
        if (own && warp == 0) {
            const bool inside[] = {group == 0};
            uint4 key[1] = {}, value[1] = {};
            if (group == 0) {
                key[0] = *reinterpret_cast<const uint4*>(s.key + at);
                value[0] = *reinterpret_cast<const uint4*>(s.value + at);
            }
            meet(run, query, key, value, inside);
        }
        join(part, run, at);
    }

    // The softmax of all warps' positions; tells the part's average and its logarithmic weight.
    __device__ void join(const Part& part, Running& run, int at) {
        float* sums = reinterpret_cast<float*>(s.input);
        float* tops = sums + WARPS * DIM;
        float* totals = tops + WARPS;
        float top = run.top;
#pragma unroll
        for (int step = 16; step >= LANES; step /= 2)
            top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        const float shrink = __expf(run.top - top);
        run.total *= shrink;
#pragma unroll
        for (int i = 0; i < 8; ++i) run.acc[i] *= shrink;
#pragma unroll
        for (int step = 16; step >= LANES; step /= 2) {
            run.total += __shfl_xor_sync(~0u, run.total, step);
#pragma unroll
            for (int i = 0; i < 8; ++i) run.acc[i] += __shfl_xor_sync(~0u, run.acc[i], step);
        }
        if (lane < LANES)
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[warp * DIM + at + i] = run.acc[i];
        if (lane == 0) tops[warp] = top, totals[warp] = run.total;
        together();
        const int d = 2 * threadIdx.x, place = part.head * SPLITS + part.split;
        if (d >= DIM) return;
        top = LOWEST;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) top = fmaxf(top, tops[i]);
        float total = 0.0f, even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            const float weight = __expf(tops[i] - top);
            total += totals[i] * weight;
            even += sums[i * DIM + d] * weight, odd += sums[i * DIM + d + 1] * weight;
        }
        const bool empty = total == 0.0f;  // a NaN is not: it shall be seen in the logits
        const float scale = empty ? 0.0f : 1.0f / total;
        if (d == 0) tell(s.plan.share + place, empty ? LOWEST : top + __logf(total), flag());
        tell(s.plan.part + (place * DIM + d) / 2, narrow(even * scale, odd * scale), flag());
    }

    // Attention's result joined from its parts.
    __device__ void load_attended() {
        constexpr int EACH = (ATTENDED / 4 + THREADS - 1) / THREADS;
        constexpr bool FEW = EACH <= 4;  // else parts are asked for when all have been told
        if (!FEW) {
            if (threadIdx.x < HEADS * SPLITS)
                s.share[threadIdx.x] = hear(s.plan.share + threadIdx.x, flag());
            together();
        }
        Words parts[EACH][SPLITS];
        bool all;
        do {
            all = true;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int at = min(i * THREADS + static_cast<int>(threadIdx.x), ATTENDED / 4 - 1);
#pragma unroll
                for (int p = 0; p < SPLITS; ++p)
                    parts[i][p] =
                        peek(s.plan.part, (at * 4 / DIM * SPLITS + p) * DIM / 4 + at % (DIM / 4));
            }
#pragma unroll
            for (int i = 0; i < EACH; ++i)
#pragma unroll
                for (int p = 0; p < SPLITS; ++p) all = all && parts[i][p].of(flag());
        } while (!all);
        if (FEW) {  // not before: so many who ask for so few words delay those who tell them
            if (threadIdx.x < HEADS * SPLITS)
                s.share[threadIdx.x] = hear(s.plan.share + threadIdx.x, flag());
            together();
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int at = i * THREADS + threadIdx.x;
            if (at >= ATTENDED / 4) break;
            const float* share = s.share + at * 4 / DIM * SPLITS;
            const Words(&heard)[SPLITS] = parts[i];
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float top = LOWEST, sum = 0.0f;
#pragma unroll
            for (int p = 0; p < SPLITS; ++p) top = fmaxf(top, share[p]);
#pragma unroll
            for (int p = 0; p < SPLITS; ++p) {
                const float weight = __expf(share[p] - top);
                const float2 low = widen(heard[p].a.bits), high = widen(heard[p].b.bits);
                sum += weight;
                v.x += low.x * weight, v.y += low.y * weight;
                v.z += high.x * weight, v.w += high.y * weight;
            }
            const float scale = 1.0f / sum;
            v.x *= scale, v.y *= scale, v.z *= scale, v.w *= scale;
            put<ATTENDED>(4 * at, v.x, v.y), put<ATTENDED>(4 * at + 2, v.z, v.w);
        }
        together();
    }
};
