// How a program's weights and cached keys reach it: a ring of shared memory that some warps fill.
//
// Program c owns columns N c / GRID .. N (c + 1) / GRID of every matrix [N, K], eight rows of K at
// a time, in pieces of a few KB a row; one slot of the ring holds a piece of all eight. What comes
// next is known ahead of all activations, so the filling warps run through the whole model by
// themselves and wait only for free slots: the ring fills up whatever the computing warps wait for.
// (One warp alone does not issue copies fast enough.)
//
// Defined outside: D, HEADS, KV, DIM, FF, VOCAB, LAYERS (the model's sizes), ROTARY (rotated
// elements of a head), GATED, RMS (0 or 1), ACT_name, EPS (of the norms), GRID (multiprocessors),
// THREADS (that compute), FILLERS (warps that fill), TEAM (warps that share a slot), MOST_STEPS,
// FLYING, SPLITS (see PersistentTile) and PLAN_WORDS.

constexpr int WARPS = THREADS / 32;
constexpr int ALL_THREADS = THREADS + FILLERS * 32;
constexpr int TEAMS = WARPS / TEAM;
constexpr int ROWS = 8;         // rows of a slot
constexpr int STEP = 64;        // bytes of a row that one load of a warp covers, 32 elements
constexpr int LINE = 2 * STEP;  // rows and pieces of them begin and end with one
constexpr int ATTENDED = HEADS * DIM;
constexpr int LANES = DIM / 8;  // lanes that hold a position's key, eight elements each

__device__ constexpr int ceiling(int a, int b) { return (a + b - 1) / b; }

// One matrix's geometry. A gated one holds its two halves one after the other; a column's two rows
// follow each other in its program. Columns are cut in groups of `cut`.
struct Matrix {
    int columns, steps, span, pieces, paired, cut, groups;  // a piece is `span` of `steps` at most

    __device__ constexpr Matrix(int columns, int inner, int paired = 0, int cut = 1)
        : columns(columns),
          steps(inner / 32),
          span(ceiling(ceiling(steps, ceiling(steps, MOST_STEPS)), 2) * 2),  // whole lines
          pieces(ceiling(steps, span)),
          paired(paired),
          cut(cut),
          groups(columns / cut) {}
    __device__ constexpr int most_rows() const {
        return (groups + GRID - 1) / GRID * cut * (paired ? 2 : 1);
    }
    __device__ int begin(int piece) const { return min(piece * span, steps); }
    __device__ int edge(int program) const {
        return static_cast<u32>(groups) * program / GRID * cut;
    }
    __device__ int first() const { return edge(blockIdx.x); }
    __device__ int owned() const { return edge(blockIdx.x + 1) - first(); }
    __device__ int rows() const { return owned() << paired; }
};

enum Stage { QKV, OUT, UP, DOWN, HEAD };

__constant__ constexpr Matrix QKV_MATRIX((HEADS + 2 * KV) * DIM, D), OUT_MATRIX(D, ATTENDED),
    UP_MATRIX(FF, D, GATED, 2), DOWN_MATRIX(D, FF), HEAD_MATRIX(VOCAB, D);
__constant__ constexpr Matrix MATRICES[] = {QKV_MATRIX, OUT_MATRIX, UP_MATRIX, DOWN_MATRIX,
                                            HEAD_MATRIX};

__device__ constexpr int most_of(int a, int b, int c, int d, int e) {
    return most(most(most(a, b), most(c, d)), e);
}
constexpr int LONGEST =
    most_of(QKV_MATRIX.span, OUT_MATRIX.span, UP_MATRIX.span, DOWN_MATRIX.span, HEAD_MATRIX.span);
// Whole lines apart: where every other copy ended in the middle of one, four slots on their way
// took a quarter longer than three.
constexpr int PITCH = LONGEST * STEP;
constexpr int TOGETHER = THREADS / LANES;  // positions that the warps meet at once
constexpr int CHUNK = most(ROWS * PITCH / (4 * DIM) / TOGETHER, 1) * TOGETHER;  // of a slot
constexpr int SLOT = most(ROWS * PITCH, CHUNK * DIM * 4);                       // keys, then values
constexpr int BATCH = THREADS / 2;  // rows of the head between two reductions

struct Layer {
    const char *qkv, *out, *up, *down;
    const float *qkv_scale, *qkv_shift;  // of the norm before it
    const u16 *qkv_bias, *out_bias;
    const float *up_scale, *up_shift;
    const u16 *up_bias, *down_bias;
    u16 *keys, *values;  // [KV, capacity, DIM] of slot 0; in shared memory, of the row's slot
    double scale;
};

struct Plan {
    const char* head;
    const float *head_scale, *head_shift;
    const u16 *embedding, *learned;
    const float *cosine, *sine;
    int *tokens, *positions, *slots, *cursor, *history;
    float* x;  // [D], the residual stream of the next token to be fed
    u64 *stream, *qkv, *part, *share, *hidden, *best;  // words
    long long capacity, last_position;
    Layer layers[LAYERS];
};

static_assert(sizeof(Plan) == 8 * PLAN_WORDS, "the plan is laid out as plan_words does it");

constexpr int INPUT_BYTES =
    most_of(D * 4 + STEP, ATTENDED * 4 + STEP, FF * 2, WARPS*(DIM + 2) * 4, 3 * DIM * 4);
constexpr int SUMS = (most_of(QKV_MATRIX.most_rows(), OUT_MATRIX.most_rows(), UP_MATRIX.most_rows(),
                              DOWN_MATRIX.most_rows(), BATCH) +
                      ROWS) *
                     WARPS;

// A program's shared memory beside the rings.
struct Desk {
    Plan plan;
    alignas(16) char input[INPUT_BYTES];     // activations of a stage; attention's parts
    alignas(16) float sums[SUMS];            // of each row, by warps
    float residual[OUT_MATRIX.most_rows()];  // this program's elements of the residual stream
    float2 square[WARPS];                    // sums and sums of squares of the norm's input
    float share[HEADS * SPLITS];             // logarithmic weights of attention's parts
    alignas(16) float query[DIM];
    alignas(16) u16 key[DIM], value[DIM];  // of the step's own position
    float best[WARPS];
    int where[WARPS];
    int token;
};

// Two barriers a slot; 256 bytes for the rest and for alignment.
constexpr int SLOTS = (SHARED - sizeof(Desk) - 256) / (SLOT + 16);
static_assert(SLOTS >= 2, "too little shared memory for the ring");
static_assert(DIM <= 2 * THREADS, "a thread tells two elements of a head");
static_assert(SLOTS <= ALL_THREADS, "a thread sets up the barriers of each slot");
static_assert(FLYING >= 1 && FLYING <= SLOTS, "a filler waits for slots that it has asked for");
static_assert(WARPS % TEAM == 0, "every warp is in a team");
static_assert(TEAMS == 1 || SLOTS >= TEAMS + FLYING, "a team knows which turn its next slot is in");
static_assert(FILLERS >= 2, "one warp asks for the keys, another for the values");
static_assert(SPLITS >= 1 && HEADS * SPLITS <= GRID && HEADS * SPLITS <= THREADS,
              "a program attends to one part of a head, a thread joins it");
static_assert(QKV_MATRIX.most_rows() <= THREADS && OUT_MATRIX.most_rows() <= THREADS &&
                  UP_MATRIX.most_rows() <= THREADS,
              "a thread tells of each row");
static_assert(QKV_MATRIX.columns >= GRID && D >= GRID && FF / 2 >= GRID && VOCAB >= GRID,
              "every program tells words in every stage");
static_assert(static_cast<u64>(VOCAB) * (GRID + 1) < 1ull << 32, "edges are computed in 32 bits");
static_assert(D % 64 == 0 && ATTENDED % 64 == 0 && FF % 64 == 0, "rows are whole lines");
static_assert(DIM >= 8 && DIM <= 128 && (DIM & (DIM - 1)) == 0 && HEADS % KV == 0,
              "a head's lanes divide a warp");

struct Shared {
    alignas(128) char ring[SLOTS][SLOT];
    alignas(8) u64 full[SLOTS];
    u64 empty[SLOTS], chosen;
    alignas(16) Desk desk;
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than there is");

// Which part of the context this program attends to, for one query head.
struct Part {
    int head, split, low, high;

    __device__ Part(int position) {
        head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
        const int each = (position / SPLITS + 1 + 7) / 8 * 8;
        low = min(split * each, position + 1);
        high = min(low + each, position + 1);
    }
    __device__ bool live() const { return head < HEADS; }
    __device__ int kv() const { return head / (HEADS / KV); }
    // What the cache holds of it before the step: the last position is the step's own.
    __device__ int stored(int position) const { return min(high, position); }
};

// Where in the ring the n-th slot since the start lies, and in which of its turns.
struct Place {
    int slot;
    u32 parity;

    __device__ explicit Place(u32 n) : slot(n % SLOTS), parity(n / SLOTS & 1) {}
};

// A filling warp's only active lane: asks for its rows of everything, in the order of consumption.
struct Filler {
    Shared& shared;
    const int number;
    u32 asked = 0;

    // The address of the next slot once it is empty; it will receive so many bytes of this warp. No
    // more than FLYING slots are on their way at a time: what programs tell each other queues up
    // behind them.
    __device__ u32 open(u32 bytes) {
        if (asked >= FLYING) {
            const Place flying(asked - FLYING);
            barrier_wait(shared_address(&shared.full[flying.slot]), flying.parity);
        }
        const Place place(asked);
        barrier_wait(shared_address(&shared.empty[place.slot]), place.parity ^ 1);
        barrier_expect(full(), bytes);
        return shared_address(shared.ring[place.slot]);
    }
    __device__ u32 full() const { return shared_address(&shared.full[Place(asked).slot]); }

    __device__ void rows(const Matrix& m, const char* matrix) {
        const int rows = m.rows();
        const long long row = m.steps * STEP;
        for (int group = 0; group < rows; group += ROWS) {
            const int n = min(rows - group, ROWS);
            const char* from = matrix + (m.first() + (group >> m.paired)) * row;
            for (int piece = 0; piece < m.pieces; ++piece, ++asked) {
                const int begin = m.begin(piece) * STEP, bytes = m.begin(piece + 1) * STEP - begin;
                const u32 to = open((n - number + FILLERS - 1) / FILLERS * bytes), barrier = full();
                for (int i = number; i < n; i += FILLERS) {
                    const long long at = m.paired ? i / 2 + (i & 1) * m.columns : i;
                    copy_once(to + i * PITCH, from + at * row + begin, bytes, barrier);
                }
            }
        }
    }

    // Keys are the first filling warp's, values the second's.
    __device__ void context(const Layer& w, int position) {
        const Part part(position);
        const int end = part.stored(position);
        if (!part.live()) return;
        for (int at = part.low; at < end; at += CHUNK, ++asked) {
            const u32 bytes = min(end - at, CHUNK) * DIM * 2, to = open(number < 2 ? bytes : 0);
            const long long from = (part.kv() * shared.desk.plan.capacity + at) * DIM;
            if (number == 0) copy(to, w.keys + from, bytes, full());
            if (number == 1) copy(to + CHUNK * DIM * 2, w.values + from, bytes, full());
        }
    }

    // The cache holds a token's keys once every program has chosen the token.
    __device__ void run(int start, int count) {
        const Plan& plan = shared.desk.plan;
        for (int token = 0; token < count; ++token) {
            for (int layer = 0; layer < LAYERS; ++layer) {
                const Layer& w = plan.layers[layer];
                rows(MATRICES[QKV], w.qkv);
                if (token && !layer) {
                    barrier_wait(shared_address(&shared.chosen), (token - 1) & 1);
                    fence_copies();
                }
                context(w, start + token);
                for (int stage = OUT; stage <= DOWN; ++stage)
                    rows(MATRICES[stage], stage == OUT ? w.out : stage == UP ? w.up : w.down);
            }
            rows(MATRICES[HEAD], plan.head);
        }
    }
};
