// What attention kernels of several rows are given, and a step's own queries, keys and values.
// Behind machine.cuh. Defined outside: HEADS, KV, DIM, ROTARY (rotated elements of a head), PARTS
// (sums that qkv is still in), HAS_BIAS (which is then to be added), BF16.

constexpr int QKV = (HEADS + 2 * KV) * DIM;

struct Step {
    const void* qkv;               // [rows, QKV], 16-bit, or PARTS sums of it in float32
    const u16* bias;               // [QKV]
    u16 *keys, *values;            // [slots, KV, capacity, DIM]
    const int *slots, *positions;  // [rows]; a negative slot is padding
    const float *cosine, *sine;    // [positions, ROTARY / 2]
    u16* out;                      // [rows, HEADS, DIM]
    long long capacity;
    int rows;
    float scale;
};

// One of a step's rows, and one of its heads that have keys.
struct Place {
    int row, kv, position, slot, stored;  // positions that the cache holds
    long long first;                      // of its keys and values: position 0 of all slots'

    __device__ Place(const Step& step, int number) : row(number / KV), kv(number % KV) {
        slot = step.slots[row], position = slot < 0 ? 0 : step.positions[row];
        stored = position;
        first = (static_cast<long long>(slot) * KV + kv) * step.capacity;
    }
};

// Element i of a row's queries, keys and values.
__device__ __forceinline__ float projected(const Step& step, int row, int i) {
    const long long at = static_cast<long long>(row) * QKV + i;
    if (PARTS == 1) return widen_one(static_cast<const u16*>(step.qkv)[at]);
    const float* sums = static_cast<const float*>(step.qkv);
    float value = HAS_BIAS ? widen_one(step.bias[i]) : 0.0f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
        value += sums[p * static_cast<long long>(step.rows) * QKV + at];
    return value;
}

// Element d of the `part`-th head among a row's queries and keys, rotated by its position (Su et
// al. 2021): i is paired with i + ROTARY / 2, elements from ROTARY on pass through. Rounded, as if
// cached.
__device__ __forceinline__ u16 rotated(const Step& step, const Place& place, int part, int d) {
    float value = projected(step, place.row, part * DIM + d);
    if (d < ROTARY) {
        constexpr int HALF = most(ROTARY / 2, 1);
        const int partner = d < HALF ? d + HALF : d - HALF;
        const float other = projected(step, place.row, part * DIM + partner);
        const long long angle = static_cast<long long>(place.position) * HALF + d % HALF;
        value = value * step.cosine[angle] + (d < HALF ? -other : other) * step.sine[angle];
    }
    return narrow(value);
}

// The step's own key and value, element d, which are stored unless the row is padding.
__device__ __forceinline__ void own(const Step& step, const Place& place, int d, u16& key,
                                    u16& value) {
    key = rotated(step, place, HEADS + place.kv, d);
    value = narrow(projected(step, place.row, (HEADS + KV + place.kv) * DIM + d));
    if (place.slot < 0) return;
    const long long to = (place.first + place.position) * DIM + d;
    step.keys[to] = key, step.values[to] = value;
}
