// A program's products: eight rows at a time on the tensor cores, and the input that they meet.

// The computing warps' barrier: the filling ones are elsewhere.
__device__ __forceinline__ void together() { meet<1, THREADS>(); }

// Eight rows times the input on the tensor cores. A lane's 16 bytes of a row are its part of the
// first operand as they lie: words 0 and 2 count as row r, words 1 and 3 as row r + 8. So the
// second operand has the input's words 0 and 2 in column 0, 1 and 3 in column 1 (their first 16
// bits; the rest is in columns 2 and 3), and (r, 0) + (r + 8, 1) is the product.
// All rows begin at the same bank of shared memory. So while even rows read one step of a line odd
// rows read the other: the second operand has even rows' step in columns 0 to 3 and odd rows' in
// columns 4 to 7. What a row comes to with the other's step is of no use.
struct Product {
    const bool odd, high;  // the row of this lane's weights is; its input is in columns 4 to 7
    float acc[4][4] = {};

    __device__ explicit Product(int lane) : odd(lane / 4 % 2), high(lane / 16) {}

    // Every TEAM-th line of the next `n` steps, from this lane's first of each: N steps, or with
    // FEWER at most.
    template <int N, bool FEWER>
    __device__ void piece(const char* weights, const char* input, int n) {
        const int to_other[] = {odd ? -STEP : STEP, high ? -STEP : STEP};  // step of a line
        uint4 w[N] = {};
        uint2 x[N] = {};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int line = j / 2 * TEAM;
            if (FEWER && 2 * line >= n) break;
            w[j] = *reinterpret_cast<const uint4*>(weights + line * LINE + j % 2 * to_other[0]);
            x[j] = *reinterpret_cast<const uint2*>(input + line * LINE + j % 2 * to_other[1]);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) multiply_add(acc[j % 4], w[j], x[j]);
    }

    // Lane 4 r gets the sum of row r, over the input's rest too where it has one.
    __device__ float sum(bool rest) const {
        float sum = acc[0][0] + acc[1][0] + acc[2][0] + acc[3][0];
        sum += acc[0][3] + acc[1][3] + acc[2][3] + acc[3][3];
        const float more = __shfl_down_sync(~0u, sum, 1);
        if (rest) sum += more;
        const float other = __shfl_down_sync(~0u, sum, 2);
        return odd ? other : sum;
    }
};

constexpr int PAIRS = (D / 2 + THREADS - 1) / THREADS;  // of the residual stream, a thread
constexpr bool NORM_AHEAD = PAIRS <= 12;                // else there are not the registers

// A norm's scale and shift, as far as this thread needs them.
struct Norm {
    const float *scale, *shift;
    float2 g[PAIRS], b[PAIRS];

    __device__ static int pair(int i) {
        return min(i * THREADS + static_cast<int>(threadIdx.x), D / 2 - 1);
    }
    __device__ void load() {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            g[i] = read_constant(scale + 2 * pair(i));
            b[i] = shift ? read_constant(shift + 2 * pair(i)) : make_float2(0.0f, 0.0f);
        }
    }
};

// Where a program is: the token and layer it works on, and its place in the ring.
struct Program {
    Shared& shared;
    Desk& s;
    const u32 base;  // flags up to this one are of earlier launches
    const int warp, lane;
    int position, token = 0, layer = 0;
    u32 taken = 0;  // slots of the ring

    __device__ const Layer& weights() const { return s.plan.layers[layer]; }

    // The flag of this layer's words; the stream is told twice, then with the next flag.
    __device__ u32 flag() const { return base + 2 * (token * LAYERS + layer) + 1; }

    // The next slot, once it is full. A barrier's parity is the same every second turn, so the turn
    // before must be over: when a stage begins, some warp has seen every slot before it full, and
    // all have met since; within it, this warp has seen the slot TEAMS before this one full, and
    // fillers ask for a slot once all up to FLYING before it are full.
    __device__ const char* slot() const {
        const Place place(taken);
        barrier_wait(shared_address(&shared.full[place.slot]), place.parity);
        return shared.ring[place.slot];
    }

    // This warp has done with it. It arrives for `warps`: those of other teams do not read it.
    __device__ void release(u32 warps = 1) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.empty[Place(taken).slot]), warps);
        ++taken;
    }

    // Rows of a stage's matrix. The warps of a team share a slot, each has every TEAM-th line of
    // its rows, so that the first slots are soon free and the last soon done; teams take slots in
    // turn. Each warp leaves its own sums, complete after the barrier. The rest of the input's
    // elements lies behind their first 16 bits; the MLP's inner ones have none.
    template <int STAGE>
    __device__ void multiply(int rows) {
        constexpr Matrix m = MATRICES[STAGE];
        constexpr int rest = STAGE == DOWN ? 0 : m.steps * STEP + STEP;
        constexpr int EACH = 2 * ceiling(m.span / 2, TEAM);
        constexpr bool fewer = m.steps % m.span || m.span / 2 % TEAM;
        const int member = warp % TEAM, first = member * LINE + lane % 4 * UNIT;
        const int offset = first + lane / 4 * PITCH + lane / 4 % 2 * STEP;
        int others = warp / TEAM;  // slots until this team's next
        const char* input =
            s.input + first + lane / 4 % 2 * 8 + lane / 8 % 2 * rest + lane / 16 * STEP;
        for (int row = 0; row < rows; row += ROWS) {
            Product product(lane);
            for (int piece = 0; piece < m.pieces; ++piece) {
                if (others--) {
                    ++taken;
                    continue;
                }
                others = TEAMS - 1;
                const int begin = m.begin(piece), n = m.begin(piece + 1) - begin - 2 * member;
                product.piece<EACH, fewer>(slot() + offset, input + begin * STEP, n);
                release(TEAMS);
            }
            const float sum = product.sum(rest);
            if (lane % 4 == 0) s.sums[(row + lane / 4) * WARPS + warp] = sum;
        }
        together();
    }

    // A row's sum over all warps'.
    __device__ float total(int local) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += s.sums[local * WARPS + i];
        return sum;
    }

    // ---- inputs ----

    // Two elements of the chosen token's embedding, and of its position's, asked for here.
    struct Embedded {
        u32 token, position;

        __device__ float2 sum() const {
            const float2 a = widen(token), b = widen(position);
            return make_float2(a.x + b.x, a.y + b.y);
        }
    };

    __device__ Embedded embedded(int pair) const {
        const long long token = s.token,
                        row = min(static_cast<long long>(position), s.plan.last_position);
        return {read_pair(s.plan.embedding + token * D + 2 * pair),
                s.plan.learned ? read_pair(s.plan.learned + row * D + 2 * pair) : 0};
    }

    // Where a pair of elements goes: a unit's middle words change places.
    __device__ static int placed(int word) {
        return (word & ~3) | (word & 1) << 1 | (word >> 1 & 1);
    }

    // Two neighbouring elements of the input: their first 16 bits, and the rest behind all of
    // those, half a line further, so that both are read at once.
    template <int K>
    __device__ void put(int at, float a, float b) {
        u32* to = reinterpret_cast<u32*>(s.input) + placed(at / 2);
        const u32 first = narrow(a, b);
        const float2 kept = widen(first);
        to[0] = first, to[(K * 2 + STEP) / 4] = narrow(a - kept.x, b - kept.y);
    }

    // The first layer's input, an embedding: what every thread meets of it, all asked for at once.
    __device__ void load_embedding(float2 (&x)[PAIRS]) {
        if (token) {
            Embedded asked[PAIRS];
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) asked[i] = embedded(Norm::pair(i));
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) x[i] = asked[i].sum();
        } else {
#pragma unroll
            for (int i = 0; i < PAIRS; ++i)
                x[i] = reinterpret_cast<const float2*>(s.plan.x)[Norm::pair(i)];
        }
#pragma unroll
        for (int i = 0; i < PAIRS; ++i)
            keep(2 * Norm::pair(i), x[i].x), keep(2 * Norm::pair(i) + 1, x[i].y);
    }

    // The normalised residual stream (Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019). `before`
    // is the flag of the words to hear, unless the input is an embedding.
    __device__ void load_normed(Norm& norm, u32 before, bool first) {
        float2 x[PAIRS];
        float sum = 0.0f, square = 0.0f;
        if (first) {
            load_embedding(x);
        } else {
            Words heard[PAIRS];
            hear(heard, s.plan.stream, threadIdx.x, THREADS, D / 2, before);
#pragma unroll
            for (int i = 0; i < PAIRS; ++i)
                x[i] =
                    make_float2(__uint_as_float(heard[i].a.bits), __uint_as_float(heard[i].b.bits));
        }
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            if (i * THREADS + threadIdx.x >= D / 2) break;
            sum += x[i].x + x[i].y;
            square += x[i].x * x[i].x + x[i].y * x[i].y;
        }
        if (!NORM_AHEAD) norm.load();
        sum = warp_sum(sum), square = warp_sum(square);
        if (lane == 0) s.square[warp] = make_float2(sum, square);
        together();
        sum = square = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += s.square[i].x, square += s.square[i].y;
        const float mean = RMS ? 0.0f : sum / D;
        const float r = rsqrtf(fmaxf(square / D - mean * mean, 0.0f) + EPS);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int at = i * THREADS + threadIdx.x;
            if (at >= D / 2) break;
            put<D>(2 * at, (x[i].x - mean) * r * norm.g[i].x + norm.b[i].x,
                   (x[i].y - mean) * r * norm.g[i].y + norm.b[i].y);
        }
        together();
    }

    // An element of the residual stream, if it is this program's.
    __device__ void keep(int at, float value) {
        const u32 local = at - OUT_MATRIX.first();
        if (local < OUT_MATRIX.rows()) s.residual[local] = value;
    }

    // The MLP's inner activations, two to a word, as they are stored.
    __device__ void load_hidden() {
        constexpr int ALL = FF / 4, EACH = (ALL + THREADS - 1) / THREADS,
                      AT_ONCE = EACH > 8 ? (EACH + 1) / 2 : EACH;  // more arrive later
        for (int first = threadIdx.x; first < ALL; first += AT_ONCE * THREADS) {
            Words heard[AT_ONCE];
            hear(heard, s.plan.hidden, first, THREADS, ALL, flag());
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i * THREADS < ALL) {
                    u32* to = reinterpret_cast<u32*>(s.input) + placed(2 * (first + i * THREADS));
                    to[0] = heard[i].a.bits, to[2] = heard[i].b.bits;
                }
        }
        together();
    }
};
